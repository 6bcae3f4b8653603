"""Every architecture of the table in every format that there is: trained, exported, proved and run.

The models are tiny and random, with weights large enough for what a file says of them to matter; the second half breaks
each such statement once, and sees that.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from qad import export, runtimes
from qad.architectures import ARCHITECTURES
from qad.artifact import open_artifact
from qad.distill import distill
from qad.errors import UserError
from qad.recipe import Recipe
from qad.verify import compare_runtime, verify
from tests.helpers_models import MODELS, verify_text
from tests.helpers_runs import save_model, save_text

# What runtimes make of exact weights: 8-bit activations, fp16.
LARGEST_KL = {"gptq": 1e-3}
# Why a format cannot carry an architecture; what is not here must work.
REFUSED = {("gemma3_text", "onnx"): "cannot make a Gemma3ForCausalLM"}

Trained = Callable[[str], Path]


def case_of(model_type: str) -> str:
    return next(case for case, tiny in MODELS.items() if tiny.model_type == model_type)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Return a maker of runs of two steps on the 4-bit grid, each made once."""

    @functools.cache
    def make(model_type: str) -> Path:
        folder, case = tmp_path_factory.mktemp(model_type), case_of(model_type)
        changes: dict[str, Any] = {"head_dim": 32, "query_pre_attn_scalar": 32}
        changes = {key: value for key, value in changes.items() if key in MODELS[case].config}
        teacher = save_model(folder / "teacher", case, MODELS[case].tokenizer, **changes)
        recipe = Recipe(
            teacher=teacher,
            data=(save_text(folder / "text.jsonl"),),
            steps=2,
            batch_size=2,
            micro_batch=2,
            seq_len=64,
            calibration_tokens=256,
            held_out_tokens=128,
            eval_every=0,
            save_every=0,
        )
        distill(recipe, folder / "run", resume=False, console=Console(quiet=True))
        return folder / "run"

    return make


@pytest.mark.parametrize("name", export.names())
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_trained_exported_proved_and_run(model_type: str, name: str, trained: Trained, tmp_path: Path) -> None:
    run, exporter = trained(model_type), export.get(name)
    artifact = open_artifact(run)
    assert artifact.grids["model.layers.1.self_attn.o_proj.weight"] == "q4_0"
    file = tmp_path / f"student{exporter.SUFFIX}"
    if (model_type, name) in REFUSED:
        with pytest.raises(UserError, match=REFUSED[model_type, name]):
            exporter.write(artifact, file)
        assert not list(tmp_path.iterdir())
        return
    exporter.write(artifact, file)
    proof = verify(run, file)
    assert proof.ok, proof.mismatches
    assert proof.exact > 0
    assert proof.file_run_hash == artifact.run_hash
    if reasons := [
        r for n in runtimes.names() if name in runtimes.get(n).FORMATS and (r := runtimes.get(n).available())
    ]:
        pytest.skip("; ".join(reasons))
    agreement = compare_runtime(run, file, verify_text(), threads=1)
    assert agreement.kl < LARGEST_KL.get(name, 1e-2)
    assert agreement.same_tokens
