"""``qad quantize``: an artifact without training that every other verb takes, under any plan."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from qad.artifact import open_artifact, tensor_sha256
from qad.errors import UserError
from qad.export import gguf
from qad.grid import get_grid
from qad.measure import measure
from qad.outcome import RESULT_FILE, load_outcome
from qad.plan import KEEP, make_plan
from qad.planning import PLAN_FILE
from qad.prepare import gather_rows, load_pair
from qad.quantize import held_out_batches, quantize_model
from qad.recipe import RECIPE_FILE, Recipe
from qad.rounding import round_without_hessian
from qad.tensor import dequantize
from qad.verify import verify
from tests.helpers_runs import save_model, save_text


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """Return a recipe over a tiny model; its files are not to be changed."""
    folder = tmp_path_factory.mktemp("model")
    teacher = save_model(folder / "teacher")
    return Recipe(name="quantize", steps=0, teacher=teacher, data=(save_text(folder / "text.jsonl"),), seq_len=32)


def quantize(recipe: Recipe, run: Path, *, resume: bool = False) -> str:
    """Quantize and return what was printed."""
    console = Console(record=True, width=200, quiet=False, file=(run.parent / "console.txt").open("a"))
    quantize_model(recipe, run, resume=resume, console=console)
    return console.export_text()


@pytest.mark.parametrize("init", ["rtn", "mse", "gptq"])
def test_the_artifact_is_what_every_other_verb_takes(tmp_path: Path, recipe: Recipe, init: str) -> None:
    run = tmp_path / "run"
    quantize(dataclasses.replace(recipe, init=init, grid="q4_0"), run)
    artifact = open_artifact(run)
    assert artifact.recipe["init"] == init
    assert artifact.recipe["grid"] == "q4_0"
    model = AutoModelForCausalLM.from_pretrained(recipe.teacher, dtype=torch.float32)
    assert {**artifact.grids, **dict.fromkeys(artifact.kept, KEEP)} == make_plan(model, 4)
    for name in artifact.kept:
        assert torch.equal(artifact.weight(name), model.get_parameter(name))
    if init != "gptq":
        # Without compensation every weight is the grid's nearest.
        for name, grid in artifact.grids.items():
            wanted = round_without_hessian(model.get_parameter(name).data, get_grid(grid), init, name)
            assert torch.equal(artifact.weight(name), dequantize(wanted.quantized)), name
    gguf.write(artifact, tmp_path / "file.gguf")
    result = verify(run, tmp_path / "file.gguf")
    assert result.ok
    assert result.exact == len(artifact.grids)


def test_figures_are_those_of_the_artifact(tmp_path: Path, recipe: Recipe) -> None:
    """The table is measured on the weights that the artifact holds, and the hashes are of those weights."""
    run = tmp_path / "run"
    printed = quantize(recipe, run)
    artifact = open_artifact(run)
    outcome = load_outcome(run)
    assert outcome.warning is None
    teacher, student = load_pair(recipe, Console(quiet=True))
    for name in artifact.grids:
        assert artifact.forward_sha256[name] == tensor_sha256(artifact.weight(name))
        student.get_parameter(name).data = artifact.weight(name)
    _, held_out = gather_rows(recipe, run, teacher, Console(quiet=True))
    quality = measure(student, teacher.model, held_out_batches(held_out, recipe, teacher.tokenizer))
    (_, of_teacher, _), (what, of_artifact, size) = outcome.rows
    assert what == "quantized to 4 bits (gptq)"
    assert of_artifact == quality
    assert of_teacher.kl == 0
    assert 0 < of_artifact.kl < 1
    stored = sum(
        artifact.shape(n)[0] * artifact.shape(n)[1] * get_grid(g).bits_per_weight / 8 for n, g in artifact.grids.items()
    )
    assert size == stored + sum(4 * artifact.weight(name).numel() for name in artifact.kept)
    assert "14 q4_0, 1 q8_0" in printed


def test_compensation_is_worth_it(tmp_path: Path, recipe: Recipe) -> None:
    kl = {}
    for init in ("rtn", "gptq"):
        quantize(dataclasses.replace(recipe, init=init), tmp_path / init)
        kl[init] = load_outcome(tmp_path / init).rows[1][1].kl
    assert kl["gptq"] < 0.8 * kl["rtn"]


def test_rules_reach_the_artifact(tmp_path: Path, recipe: Recipe) -> None:
    run = tmp_path / "run"
    rules = (("*.1.mlp.down_proj.*", "q8_0"), ("*.k_proj.*", KEEP), ("*embed*", "q4_0"))
    quantize(dataclasses.replace(recipe, init="rtn", rules=rules), run)
    artifact = open_artifact(run)
    assert artifact.grids["model.layers.1.mlp.down_proj.weight"] == "q8_0"
    assert artifact.grids["model.layers.0.mlp.down_proj.weight"] == "q4_0"
    assert artifact.grids["model.embed_tokens.weight"] == "q4_0"
    assert "model.layers.0.self_attn.k_proj.weight" in artifact.kept
    assert json.loads((run / PLAN_FILE).read_text()) == {**artifact.grids, **dict.fromkeys(artifact.kept, KEEP)}
    gguf.write(artifact, tmp_path / "file.gguf")
    assert verify(run, tmp_path / "file.gguf").ok


@pytest.mark.parametrize("init", ["rtn", "gptq"])
def test_a_budget_is_kept_and_worth_more_than_one_grid(tmp_path: Path, recipe: Recipe, init: str) -> None:
    run = tmp_path / "run"
    printed = quantize(dataclasses.replace(recipe, init=init, budget=6.0), run)
    artifact = open_artifact(run)
    sizes = {name: int(np.prod(artifact.shape(name))) for name in artifact.grids}
    bits = sum(sizes[name] * get_grid(grid).bits_per_weight for name, grid in artifact.grids.items())
    assert 5.5 < bits / sum(sizes.values()) <= 6.0
    assert len(set(artifact.grids.values())) > 1
    assert set(artifact.grids.values()) <= set(gguf.GRIDS)
    assert "expected KL of the rounding" in printed
    # More bits than this, all of them where the default plan puts them.
    quantize(dataclasses.replace(recipe, init=init, grid="q4_0"), tmp_path / "uniform")
    uniform = open_artifact(tmp_path / "uniform")
    assert sum(sizes[n] * get_grid(g).bits_per_weight for n, g in uniform.grids.items()) > bits
    assert load_outcome(run).rows[1][1].kl < load_outcome(tmp_path / "uniform").rows[1][1].kl


def test_a_measured_plan_is_not_measured_again(tmp_path: Path, recipe: Recipe) -> None:
    run = tmp_path / "run"
    wanted = dataclasses.replace(recipe, init="rtn", budget=6.0)
    first = quantize(wanted, run)
    before = {path.name: path.read_bytes() for path in (run / "artifact").iterdir()}
    assert "is finished" in quantize(wanted, run, resume=True)
    (run / RESULT_FILE).unlink()
    again = quantize(wanted, run, resume=True)
    assert "expected KL of the rounding" in first
    assert "expected KL of the rounding" not in again
    assert {path.name: path.read_bytes() for path in (run / "artifact").iterdir()} == before


def test_the_saved_plan_of_another_model_is_refused(tmp_path: Path, recipe: Recipe) -> None:
    run = tmp_path / "run"
    quantize(dataclasses.replace(recipe, init="rtn"), run)
    (run / RESULT_FILE).unlink()
    (run / PLAN_FILE).write_text(json.dumps({"model.layers.7.mlp.up_proj.weight": "q4_0"}))
    with pytest.raises(UserError, match=r"plan\.json is the plan of another model"):
        quantize(dataclasses.replace(recipe, init="rtn"), run, resume=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": 3.0}, r"--budget 3 is less than the 4\.500 bits per weight of the smallest plan"),
        ({"budget": 6.0, "formats": ("gguf", "gptq")}, "mixes grids, and gptq has one grid .*: use --grid"),
        ({"budget": 6.0, "formats": ("ggml",)}, "unknown format 'ggml'; known: .*gguf"),
        ({"grid": "int4_g128"}, "15 tensors do not fit their grid|14 tensors do not fit their grid"),
        ({"rules": (("*.v_porj.*", "q8_0"),)}, r"pattern '\*\.v_porj\.\*' matches no weight"),
    ],
)
def test_plans_that_cannot_be_leave_no_folder(
    tmp_path: Path, recipe: Recipe, changes: dict[str, object], message: str
) -> None:
    run = tmp_path / "run"
    with pytest.raises(UserError, match=message):
        quantize(recipe.override(**changes), run)
    assert not run.exists()


def test_a_run_of_another_recipe_is_left_alone(tmp_path: Path, recipe: Recipe) -> None:
    run = tmp_path / "run"
    quantize(dataclasses.replace(recipe, init="rtn"), run)
    before = (run / RECIPE_FILE).read_bytes(), open_artifact(run).run_hash
    with pytest.raises(UserError, match="holds another run: continue it with --resume"):
        quantize(dataclasses.replace(recipe, init="rtn"), run)
    with pytest.raises(UserError, match="another recipe .*budget 0.0 -> 6.0"):
        quantize(dataclasses.replace(recipe, init="rtn", budget=6.0), run, resume=True)
    with pytest.raises(UserError, match="another recipe .*the rules of the plan"):
        quantize(dataclasses.replace(recipe, init="rtn", rules=(("*", "q8_0"),)), run, resume=True)
    assert before == ((run / RECIPE_FILE).read_bytes(), open_artifact(run).run_hash)
