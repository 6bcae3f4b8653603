"""Write the packaged SmolLM2 with other weights of the same function: a teacher whose weights lie on no grid.

    python bench/off_grid.py FOLDER

The packaged model is a decoded Q4_1 file. Whoever rounds it to 4 bits with a minimum finds the very values again, and
seems to lose nothing. Here norms are folded into the layers that read them, value heads are rotated and turned back by
the output projection, and the hidden units of the MLP are rescaled and scaled back: in exact arithmetic the same
logits, from weights that no format was made for. The embedding stays on its grid of 8 bits.

Leaves FOLDER (for --teacher) and FOLDER/model.gguf (float32, for bench/quality.py and llama.cpp's quantizer).
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qad.artifact import save_artifact
from qad.export import gguf
from qad.model import load_model, resolve_source


def fold_norm(norm: Any, readers: list[nn.Linear]) -> None:
    """Move a norm's weights into the layers that read it."""
    for reader in readers:
        reader.weight.mul_(norm.weight)
    norm.weight.fill_(1.0)


def rotation(size: int, generator: torch.Generator) -> Tensor:
    """Return a random orthogonal matrix."""
    return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0].float()


@torch.no_grad()
def move_off_grid(model: PreTrainedModel, seed: int = 0) -> None:
    """Change a llama model's weights, and not its function."""
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    size = config.hidden_size // config.num_attention_heads
    per_value = config.num_attention_heads // config.num_key_value_heads
    layers: Any = model.model.layers
    for layer in layers:
        attention, mlp = layer.self_attn, layer.mlp
        fold_norm(layer.input_layernorm, [attention.q_proj, attention.k_proj, attention.v_proj])
        fold_norm(layer.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj])
        for head in range(config.num_key_value_heads):
            turn = rotation(size, generator)
            values = slice(head * size, (head + 1) * size)
            attention.v_proj.weight[values] = turn @ attention.v_proj.weight[values]
            for reader in range(head * per_value, (head + 1) * per_value):
                columns = slice(reader * size, (reader + 1) * size)
                attention.o_proj.weight[:, columns] = attention.o_proj.weight[:, columns] @ turn.t()
        scale = 2 ** (torch.rand(config.intermediate_size, generator=generator) - 0.5)
        mlp.up_proj.weight.mul_(scale.unsqueeze(1))
        mlp.down_proj.weight.div_(scale)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write SmolLM2 with other weights of the same function.")
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    loaded = load_model(resolve_source(None))
    ids = torch.tensor([loaded.tokenizer.encode("A block of weights shares one scale, and the device decodes it.")])
    with torch.no_grad():
        before = loaded.model(ids).logits.double().log_softmax(-1)
        move_off_grid(loaded.model)
        after = loaded.model(ids).logits.double().log_softmax(-1)
    kl = float((before.exp() * (before - after)).sum(-1).mean())
    assert abs(kl) < 1e-8, kl
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    with tempfile.TemporaryDirectory() as run:
        artifact = save_artifact(
            Path(run),
            config=loaded.model.config,
            tokenizer=loaded.tokenizer,
            quantized={},
            kept=dict(loaded.model.named_parameters()),
            tied_head=True,
            forward_sha256={},
            recipe={"name": "off-grid"},
        )
        gguf.write(artifact, folder / "model.gguf")
    print(f"{folder}: KL to the packaged model {kl:.1e}")


if __name__ == "__main__":
    main()
