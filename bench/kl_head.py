"""Time and memory of the distillation head, forward and backward: ours against the ways it is usually written.

    python bench/kl_head.py [--kind forward] [--device cpu|cuda] [--threads 1] [--json OUT.json]

The head takes the last hidden states of both models to a divergence between their next-token distributions, and back to
the gradients of the student's hidden states and output head. Contenders:

- plain torch: all logits of both models, log_softmax, F.kl_div, autograd;
- chunked torch: our chunks of tokens, with the plain-torch formula for each;
- qad: the same chunks, with the kernel that overwrites logits with their gradient;
- Liger: LigerFusedLinearJSD, where liger-kernel is installed and there is a GPU.

Each turn of a contender is a process of its own, so that its peak is its own. Extra memory is what forward and backward
add to the models' hidden states and heads: on a CPU the resident memory that the system reports, what matrix products
pack included; on a GPU what torch allocated. The bound is the gradient of the head (vocabulary x width x 4 bytes)
and one chunk's logits (chunk tokens x vocabulary x 4 bytes). Time is the best step of all turns, which alternate.

Shapes: T tokens, D width of both models, V vocabulary.
"""

import argparse
import importlib.util
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from qad import divergence as reference
from qad import native
from qad.losses import KL_MODES, ChunkLogits, LiveTeacher, LossSettings, TeacherChunks, chunked_distillation

SHAPES = ("1024x49152x576", "1024x151936x1024")
PLAIN, CHUNKED, OURS, LIGER = "plain torch", "chunked torch", "qad", "Liger"
LIGER_BETA = {"forward": 0.0, "jsd": 0.5, "reverse": 1.0}
MIB = 2**20


@dataclass(frozen=True)
class Turn:
    """One process of a contender: its best step, its peak beyond the inputs, and the loss summed over tokens."""

    seconds: float
    extra_bytes: int
    loss: float


@dataclass(frozen=True)
class Row:
    """One contender at one shape."""

    contender: str
    tokens: int
    vocabulary: int
    width: int
    kind: str
    seconds: float
    extra_bytes: int
    bound_bytes: int
    loss_difference: float | None
    """Relative, to plain torch; None where the loss is scaled in another way."""


class ReferenceTeacher:
    """Like ``LiveTeacher``, never with a kernel."""

    def __init__(self, hidden_TD: Tensor, head_VD: Tensor) -> None:
        self._hidden_TD, self._head_VD = hidden_TD, head_VD
        self.logits_dtype: torch.dtype | None = head_VD.dtype

    def vocabulary(self, student_vocabulary: int) -> int:
        """See ``TeacherChunks``."""
        return min(student_vocabulary, len(self._head_VD))

    def divergence(
        self, logits: ChunkLogits, labels_C: Tensor, start: int, settings: LossSettings, keep_logits: bool
    ) -> tuple[Tensor, Tensor]:
        """See ``TeacherChunks``."""
        teacher_CV = logits.project_teacher(self._hidden_TD[start : start + len(labels_C)], self._head_VD)
        return reference.divergence(
            logits.student_CV,
            teacher_CV,
            labels_C,
            kind=settings.kl,
            beta=settings.beta,
            temperature=settings.temperature,
            next_token_weight=settings.next_token_weight,
            keep_logits=keep_logits,
        )


def plain_loss(hidden_TD: Tensor, head_VD: Tensor, teacher_TD: Tensor, teacher_VD: Tensor, kind: str) -> Tensor:
    """Return the divergence summed over tokens, as one writes it in torch."""
    log_q = F.linear(hidden_TD, head_VD).log_softmax(-1)
    log_p = F.linear(teacher_TD, teacher_VD).log_softmax(-1)

    def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
        return F.kl_div(log_b, log_a, reduction="sum", log_target=True)

    if kind == "forward":
        return kl(log_p, log_q)
    if kind == "reverse":
        return kl(log_q, log_p)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    return (kl(log_p, log_m) + kl(log_q, log_m)) / 2


def loss_of(contender: str, kind: str, chunk_tokens: int) -> Callable[..., Tensor]:
    """Return a function of (student's hidden states, its head, the teacher's, its head) to the loss."""
    if contender == PLAIN:
        return lambda *parts: plain_loss(*parts, kind=kind)
    if contender == LIGER:
        from liger_kernel.transformers import LigerFusedLinearJSD  # type: ignore[import-not-found]

        return LigerFusedLinearJSD(jsd_beta=LIGER_BETA[kind])
    settings = LossSettings(kind, chunk_tokens=chunk_tokens)
    teacher_class: Callable[[Tensor, Tensor], TeacherChunks] = LiveTeacher if contender == OURS else ReferenceTeacher

    def chunked(hidden_TD: Tensor, head_VD: Tensor, teacher_TD: Tensor, teacher_VD: Tensor) -> Tensor:
        labels_T = torch.zeros(len(hidden_TD), dtype=torch.long, device=hidden_TD.device)
        return chunked_distillation(hidden_TD, head_VD, labels_T, teacher_class(teacher_TD, teacher_VD), settings).loss

    return chunked


def resident(what: str) -> int:
    """Return a line of the system's account of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(what))


def take_turn(
    contender: str, shape: tuple[int, int, int], kind: str, chunk_tokens: int, device: str, steps: int
) -> Turn:
    """Run a contender in this process."""
    tokens, vocabulary, width = shape
    torch.manual_seed(0)
    loss = loss_of(contender, kind, chunk_tokens)

    def parts(tokens: int, vocabulary: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        hidden, head = torch.randn(tokens, width, device=device), torch.randn(vocabulary, width, device=device)
        head.mul_(3 * width**-0.5)
        teacher = hidden + 0.3 * torch.randn(tokens, width, device=device)
        return hidden.requires_grad_(), head.requires_grad_(), teacher, head.detach().clone()

    def step(inputs: tuple[Tensor, Tensor, Tensor, Tensor]) -> float:
        value = loss(*inputs)
        value.backward()
        inputs[0].grad = inputs[1].grad = None
        return float(value.detach())

    cuda = device.startswith("cuda")
    step(parts(min(tokens, chunk_tokens), 500))  # threads start, libraries load, kernels are built
    inputs = parts(tokens, vocabulary)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if cuda else resident("VmRSS")
    value = step(inputs)
    extra = (torch.cuda.max_memory_allocated() if cuda else resident("VmHWM")) - before
    best = math.inf
    for _ in range(steps):
        start = time.perf_counter()
        step(inputs)
        if cuda:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return Turn(best, extra, value)


def run_turn(contender: str, shape: str, arguments: argparse.Namespace) -> Turn:
    """Run a contender in a process of its own."""
    flags = ("kind", "device", "threads", "chunk_tokens", "steps")
    options = [f"--{flag.replace('_', '-')}={getattr(arguments, flag)}" for flag in flags]
    command = [sys.executable, __file__, "--turn", contender, "--shapes", shape, *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{contender} at {shape} failed:\n{done.stderr}")
    return Turn(**json.loads(done.stdout.splitlines()[-1]))


def sizes(shape: str) -> tuple[int, int, int]:
    tokens, vocabulary, width = map(int, shape.split("x"))
    return tokens, vocabulary, width


def shape_of(text: str) -> str:
    """Return a shape as it was given, or refuse what is none."""
    try:
        sensible = min(sizes(text)) > 0
    except ValueError:
        sensible = False
    if not sensible:
        raise argparse.ArgumentTypeError(f"{text!r} is no tokens x vocabulary x width such as {SHAPES[0]}")
    return text


def contenders(device: str) -> tuple[list[str], list[str]]:
    """Return who can run, and a line for each that cannot."""
    runs, missing = [PLAIN, CHUNKED, OURS], []
    if not device.startswith("cuda"):
        missing.append(f"{LIGER}: not run: needs a GPU")
    elif importlib.util.find_spec("liger_kernel") is None:
        missing.append(f"{LIGER}: not run: not installed (pip install liger-kernel)")
    else:
        runs.append(LIGER)
    return runs, missing


def measure(shape: str, runs: list[str], arguments: argparse.Namespace) -> list[Row]:
    """Let every contender have its turns at a shape."""
    turns: dict[str, list[Turn]] = {name: [] for name in runs}
    for _ in range(arguments.rounds):
        for name in runs:
            turns[name].append(run_turn(name, shape, arguments))
    tokens, vocabulary, width = sizes(shape)
    expected = turns[PLAIN][0].loss if PLAIN in turns else math.nan
    return [
        Row(
            name,
            tokens,
            vocabulary,
            width,
            arguments.kind,
            min(turn.seconds for turn in taken),
            max(turn.extra_bytes for turn in taken),
            4 * vocabulary * (width + arguments.chunk_tokens),
            None if name == LIGER else abs(taken[0].loss - expected) / abs(expected),
        )
        for name, taken in turns.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", default="forward", choices=KL_MODES, help="divergence (default: forward)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument(
        "--shapes",
        nargs="+",
        type=shape_of,
        default=list(SHAPES),
        metavar="TxVxD",
        help=f"tokens x vocabulary x width (default: {' '.join(SHAPES)})",
    )
    parser.add_argument(
        "--chunk-tokens", type=int, default=LossSettings().chunk_tokens, help="rows of a chunk's logits"
    )
    parser.add_argument("--steps", type=int, default=3, help="timed steps of a turn (default: 3)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each contender (default: 3)")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    parser.add_argument("--turn", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.turn:
        (shape,) = arguments.shapes
        turn = take_turn(
            arguments.turn, sizes(shape), arguments.kind, arguments.chunk_tokens, arguments.device, arguments.steps
        )
        print(json.dumps(asdict(turn)))
        return

    runs, missing = contenders(arguments.device)
    console = Console()
    console.print(f"CPU kernels: {native.describe()}; {arguments.threads} thread(s); torch {torch.__version__}")
    table = Table(title=f"distillation head, {arguments.kind}, forward + backward, on {arguments.device}")
    for column in ("T x V x D", "contender", "ms", "extra MiB", "of bound", "loss differs by"):
        table.add_column(column, justify="left" if column in ("T x V x D", "contender") else "right")
    rows = [row for shape in arguments.shapes for row in measure(shape, runs, arguments)]
    for row in rows:
        table.add_row(
            f"{row.tokens} x {row.vocabulary} x {row.width}",
            row.contender,
            f"{row.seconds * 1e3:.1f}",
            f"{row.extra_bytes / MIB:.1f}",
            f"{row.extra_bytes / row.bound_bytes:.2f}",
            "-" if row.loss_difference is None else f"{row.loss_difference:.1e}",
        )
    console.print(table)
    for line in missing:
        console.print(line)
    if arguments.json:
        record = {"torch": torch.__version__, "threads": arguments.threads, "kernels": native.describe()}
        record |= {"device": arguments.device, "not_run": missing, "rows": [asdict(row) for row in rows]}
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
