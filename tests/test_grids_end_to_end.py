"""Every grid of GGUF: trained, resumed, stored, exported and run by llama.cpp, on tiny models of width 256."""

from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

import qad.distill
import qad.student
from qad import export
from qad.agreement import compare_runtime
from qad.artifact import open_artifact, tensor_sha256
from qad.distill import distill
from qad.errors import UserError
from qad.export import gguf
from qad.gguf_check import read_header
from qad.gptq_init import initialize
from qad.grid import get_grid
from qad.model import load_model
from qad.pack import pack_gguf
from qad.recipe import Recipe
from qad.scale_search import find_scales
from qad.student import SCALE_MODES, Masters
from qad.tensor import dequantize, quantize
from qad.train import QADTrainer
from qad.verify import verify
from tests.helpers_ggml import GGUF_TYPES, ggml_dequantize, ggml_quantize
from tests.helpers_models import make_artifact, verify_text
from tests.helpers_runs import save_model, save_text, tiny
from tests.helpers_runtimes import needs

needs_llama = needs("llamacpp")

SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}
NEW = ("q4_1", "q5_0", "q8_0_fp16", "q4_k", "q5_k", "q6_k")
SEARCHED = [name for name in NEW if not get_grid(name).is_plain]
EMBEDDING = "model.embed_tokens.weight"
QUIET = Console(quiet=True)


# ---------------------------------------------------------------------------------------------------- GGUF


@pytest.mark.parametrize("grid", NEW)
def test_every_stored_number_survives_the_file(grid: str, tmp_path: Path) -> None:
    """Codes and scales that no sane model has, the embedding's too; llama's row order moves all parts alike."""
    artifact = make_artifact(tmp_path, "llama-untied", extreme=True, linear_grid=grid, grids={EMBEDDING: grid}, **SIZES)
    file = tmp_path / "model.gguf"
    gguf.write(artifact, file)
    result = verify(tmp_path, file)
    assert result.ok, result.mismatches
    assert result.exact == len(artifact.grids)
    tensors = read_header(file).tensors
    kinds = {tensors[name].type for name in ("token_embd.weight", "blk.1.attn_q.weight", "blk.0.ffn_down.weight")}
    assert kinds == {GGUF_TYPES[grid]}


@needs_llama
@pytest.mark.parametrize("grid", NEW)
def test_llama_cpp_computes_what_torch_computes(grid: str, tmp_path: Path) -> None:
    artifact = make_artifact(tmp_path, "llama-tied", linear_grid=grid, grids={EMBEDDING: grid}, **SIZES)
    gguf.write(artifact, tmp_path / "model.gguf")
    agreement = compare_runtime(tmp_path, tmp_path / "model.gguf", verify_text(), threads=1)
    assert agreement.kl < 1e-2
    assert agreement.same_tokens


@pytest.mark.parametrize("grid", NEW)
def test_other_formats_carry_it_or_refuse(grid: str, tmp_path: Path) -> None:
    artifact = make_artifact(tmp_path, "llama-tied", linear_grid=grid, **SIZES)
    able = export.formats_that_carry(artifact)
    assert "gguf" in able
    for name in set(export.names()) - {"gguf"}:
        assert (name in able) == (grid == "q8_0_fp16")
        if name not in able:
            with pytest.raises(UserError, match=f"cannot carry the grid {grid}.*formats that can: gguf"):
                export.get(name).write(artifact, tmp_path / "out")


def test_real_weights_decode_to_the_trained_ones_and_lie_nearer_than_llama_cpp_s() -> None:
    weight = load_model().model.get_parameter("model.layers.17.mlp.down_proj.weight").detach()
    assert weight.shape[1] == 1536
    for name in ("q4_1", "q5_0", "q4_k", "q5_k", "q6_k"):
        grid, kind = get_grid(name), GGUF_TYPES[name]
        quantized = quantize(weight, grid, find_scales(weight, grid, "mse"))
        decoded = ggml_dequantize(pack_gguf(quantized), kind)
        ours = dequantize(quantized)
        assert torch.equal(torch.from_numpy(decoded).view(torch.int32), ours.view(torch.int32)), name
        theirs = torch.from_numpy(ggml_dequantize(ggml_quantize(weight.numpy(), kind), kind))
        # The package's weights are on a grid of Q4_1 themselves: there both are exact.
        assert float((ours - weight).norm()) <= 0.95 * float((theirs - weight).norm()) + 1e-4, name


# ---------------------------------------------------------------------------------------------------- training


def make_masters(grid: str, scales: str) -> tuple[Any, Masters]:
    model = tiny(**SIZES)
    plan = {
        name: grid if "proj" in name else "q8_0" if "embed" in name else "keep" for name, _ in model.named_parameters()
    }
    return model, Masters(model, initialize(model, plan, "rtn"), scales)


def move(masters: Masters, steps: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for master, _, step in masters.groups():
            master.add_(torch.randn(master.shape, generator=generator), alpha=steps * step)


@pytest.mark.parametrize("scales", SCALE_MODES)
@pytest.mark.parametrize("grid", SEARCHED)
def test_hardened_buffers_are_what_the_device_decodes(grid: str, scales: str) -> None:
    model, masters = make_masters(grid, scales)
    start = masters.quantized()
    parameters = dict(model.named_parameters())
    for step in (0, 1, 20):
        move(masters, 0.6, seed=step)
        masters.refresh(step=step, noise="uniform", hard_share=0.3, seed=1)
        masters.harden()
        for name, tensor in masters.quantized().items():
            decoded = dequantize(tensor)
            assert torch.equal(decoded.view(torch.int32), parameters[name].detach().view(torch.int32)), name
            same = all(torch.equal(part, start[name].stored.parts[key]) for key, part in tensor.stored.parts.items())
            if tensor.grid.name == grid:
                # Learned scales stay for 20 steps, searched ones change at once and then every 20 steps.
                assert same == (scales == "learned" and step < 20), (name, step)


@pytest.mark.parametrize("grid", SEARCHED)
def test_searched_scales_are_for_the_masters_of_their_step(grid: str) -> None:
    _, masters = make_masters(grid, "mse")
    seen: list[dict[str, Tensor]] = []
    for step in (0, 1, 19, 20):
        move(masters, 1.0, seed=step)
        masters.refresh(step=step)
        seen.append({name: tensor.stored.decode()[0] for name, tensor in masters.quantized().items() if "proj" in name})
    for name in seen[0]:
        assert torch.equal(seen[0][name], seen[1][name])
        assert torch.equal(seen[0][name], seen[2][name])
        assert not torch.equal(seen[0][name], seen[3][name])


class Stopped(Exception):
    """Stands for a kill: nothing in qad catches it."""


@needs_llama
@pytest.mark.parametrize(
    ("grid", "scales", "init"),
    [
        ("q4_1", "mse", "mse"),
        ("q5_0", "learned", "mse"),
        ("q8_0_fp16", "learned", "mse"),
        ("q4_k", "learned", "gptq"),
        ("q5_k", "absmax", "rtn"),
        ("q6_k", "mse", "gptq"),
    ],
)
def test_a_run_trains_resumes_and_exports(
    grid: str, scales: str, init: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qad.student, "_REFRESH", 2)  # so that a short run searches on both sides of the kill
    recipe = Recipe(
        teacher=save_model(tmp_path / "teacher", **SIZES),
        data=(save_text(tmp_path / "text.jsonl"),),
        grid=grid,
        scales=scales,
        init=init,
        steps=4,
        batch_size=2,
        micro_batch=1,
        seq_len=32,
        lr=0.05,
        calibration_tokens=256,
        save_every=1,
        eval_every=2,
        noise="uniform",
    )
    distill(recipe, tmp_path / "whole", resume=False, console=QUIET)
    artifact = open_artifact(tmp_path / "whole")
    assert {artifact.grids[name] for name in artifact.grids if "proj" in name} == {grid}
    for name in artifact.grids:
        assert tensor_sha256(artifact.weight(name)) == artifact.forward_sha256[name]

    class StoppingTrainer(QADTrainer):
        def training_step(self, *arguments: Any, **options: Any) -> Tensor:
            if self.state.global_step == 3:
                raise Stopped
            return super().training_step(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(qad.distill, "QADTrainer", StoppingTrainer)
        with pytest.raises(Stopped):
            distill(recipe, tmp_path / "stopped", resume=False, console=QUIET)
    assert (tmp_path / "stopped" / "checkpoints" / "checkpoint-3").is_dir()
    distill(recipe, tmp_path / "stopped", resume=True, console=QUIET)
    for file in ("weights.safetensors", "artifact.json"):
        both = [(tmp_path / run / "artifact" / file).read_bytes() for run in ("whole", "stopped")]
        assert both[0] == both[1], file

    gguf.write(artifact, tmp_path / "model.gguf")
    assert verify(tmp_path / "whole", tmp_path / "model.gguf").ok
    assert compare_runtime(tmp_path / "whole", tmp_path / "model.gguf", verify_text(), threads=1).kl < 1e-2
