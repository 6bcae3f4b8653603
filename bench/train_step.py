"""What fake quantization costs a training step: the same step with it and without, taking turns.

    python bench/train_step.py [--model smollm2] [--bits 4] [--tokens 1024] [--steps 5] [--json OUT.json]

A step is what ``qad train`` does: forward of the teacher and of the student, the chunked KL head, backward, and AdamW
over every parameter. With fake quantization the weights are made from masters and learned scales before it, and their
gradients moved to these after it; without, AdamW moves the weights themselves. The best and the median of the steps.
"""

import argparse
import copy
import json
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor

from qad import ops
from qad.gptq_init import initialize
from qad.losses import LiveTeacher, LossSettings, chunked_distillation
from qad.measure import last_hidden, output_head
from qad.model import load_model
from qad.plan import make_plan
from qad.student import Masters


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="as for qad train --teacher (default: smollm2)")
    parser.add_argument("--bits", type=int, default=4, help="default: 4")
    parser.add_argument(
        "--tokens", type=int, default=1024, help="tokens of a step, in sequences of 256 (default: 1024)"
    )
    parser.add_argument("--steps", type=int, default=5, help="steps of each kind (default: 5)")
    parser.add_argument("--noise", default="uniform", help="noise mode of the quantized step (default: uniform)")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    teacher = load_model(arguments.model).model.to(device).requires_grad_(False)
    plain = copy.deepcopy(teacher).requires_grad_(True)
    student = copy.deepcopy(plain)
    masters = Masters(student, initialize(student, make_plan(student, arguments.bits), "rtn", None), "learned").to(
        device
    )
    shape = (max(1, arguments.tokens // 256), min(256, arguments.tokens))
    tokens_BT = torch.randint(0, teacher.config.vocab_size, shape, device=device)
    inputs = {"input_ids": tokens_BT, "attention_mask": torch.ones_like(tokens_BT)}
    labels_T = inputs["input_ids"].roll(-1).flatten()
    settings = LossSettings()

    owned = {id(parameter) for parameter in masters.forward_parameters()}
    kept = [parameter for parameter in student.parameters() if id(parameter) not in owned]
    optimizers = {
        "without": torch.optim.AdamW(plain.parameters(), lr=1e-6),
        "with": torch.optim.AdamW([*masters.parameters(), *kept], lr=1e-6),
    }

    def loss_of(model: torch.nn.Module) -> Tensor:
        with torch.no_grad():
            teacher_chunks = LiveTeacher(last_hidden(teacher, inputs).flatten(0, 1), output_head(teacher))
        hidden_TD = last_hidden(model, inputs).flatten(0, 1)
        return chunked_distillation(hidden_TD, output_head(model), labels_T, teacher_chunks, settings).loss

    def step(kind: str, number: int) -> tuple[float, float]:
        """Return the seconds of a step, and of fake quantization within it."""
        begin, quantizing = time.perf_counter(), 0.0
        noise = {"step": number, "noise": arguments.noise, "hard_share": 0.5, "seed": 0}
        if kind == "with":
            start = time.perf_counter()
            masters.refresh(**noise)
            quantizing += time.perf_counter() - start
        (loss_of(student if kind == "with" else plain) / labels_T.numel()).backward()
        if kind == "with":
            start = time.perf_counter()
            masters.collect_gradients(**noise)
            quantizing += time.perf_counter() - start
        optimizers[kind].step()
        optimizers[kind].zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begin, quantizing

    times: dict[str, list[float]] = {"without": [], "with": []}
    shares: list[float] = []
    print(f"{ops.describe(device)}; torch {torch.__version__}, {torch.get_num_threads()} threads; {device}")
    for number in range(arguments.steps + 1):
        for kind in times:
            seconds, quantizing = step(kind, number)
            if number:  # the first of each warms up
                times[kind].append(seconds)
                if kind == "with":
                    shares.append(quantizing)
                print(f"step {number} {kind:8} {seconds:.3f} s", flush=True)
    figures = {
        "with_s": min(times["with"]),
        "without_s": min(times["without"]),
        "ratio_of_best": min(times["with"]) / min(times["without"]),
        "ratio_of_medians": statistics.median(times["with"]) / statistics.median(times["without"]),
        "fake_quantization_s": statistics.median(shares),
    }
    for name, value in figures.items():
        print(f"{name:22} {value:.4f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures | {"kernels": ops.describe(device)}, indent=1) + "\n")


if __name__ == "__main__":
    main()
