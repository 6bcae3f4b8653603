"""Supervised training on the grid: no teacher is there, loss falls on answers alone, the export has the bits."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console

from qad import export, prepare, recipes
from qad.artifact import open_artifact, tensor_sha256
from qad.data.rows import chat_row, text_row
from qad.data.tokenize import end_rows, tokenize_rows
from qad.distill import distill
from qad.errors import UserError
from qad.losses import IGNORE
from qad.measure import Quality, measure
from qad.outcome import Outcome, load_outcome, print_outcome
from qad.recipe import Recipe
from qad.report.run_record import read_run
from qad.train import Collator, padding_id
from qad.verify import verify
from tests.helpers_models import make_tokenizer
from tests.helpers_runs import make_trainer, save_chats, save_model, tiny, token_rows

SUPERVISED = Recipe(
    kl_weight=0.0,
    next_token_weight=1.0,
    loss_on="completion",
    steps=4,
    batch_size=4,
    micro_batch=2,
    seq_len=24,
    lr=0.02,
    init="rtn",
    scales="absmax",
)


def quiet() -> Console:
    return Console(quiet=True)


def reasoning(tmp_path: Path, **changes: Any) -> Recipe:
    """Return the recipe on a tiny model, a few steps of it."""
    student = save_model(tmp_path / "student") if not (tmp_path / "student").exists() else str(tmp_path / "student")
    options: dict[str, Any] = {
        "student": student,
        "tasks": ("spell_backward@0",),
        "task_rows": 64,
        "steps": 12,
        "batch_size": 8,
        "lr": 0.1,
        "held_out_tokens": 512,
        "seq_len": 160,
    }
    return recipes.get("reasoning").override(**(options | changes))


def test_the_gradient_is_that_of_the_cross_entropy(tmp_path: Path) -> None:
    parts = make_trainer(tmp_path, SUPERVISED)
    assert parts.trainer.teacher is None
    batch = Collator(0, "completion")([dict(row) for row in token_rows(3)])  # type: ignore[call-overload]
    parts.masters.refresh(step=0)
    logits = parts.student(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    expected = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=IGNORE)
    expected.backward()
    named = dict(parts.student.named_parameters())
    wanted = {name: named[name].grad.clone() for name in parts.plan}  # type: ignore[union-attr]
    parts.student.zero_grad()
    loss = parts.trainer.compute_loss(parts.student, batch)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    loss.backward()
    for name in parts.plan:
        assert torch.allclose(named[name].grad, wanted[name], rtol=1e-3, atol=1e-7), name  # type: ignore[arg-type]


def test_what_is_measured_without_a_teacher() -> None:
    model = tiny()
    batch = Collator(0, "completion")([dict(row) for row in token_rows(3)])  # type: ignore[call-overload]
    quality = measure(model, None, [batch])
    assert quality.nll == pytest.approx(measure(model, model, [dict(batch)]).nll, rel=1e-6)
    assert quality.tokens == int((batch["labels"] != IGNORE).sum())
    assert math.isnan(quality.kl)
    assert math.isnan(quality.same_top1)
    assert json.loads(json.dumps(quality.to_dict(), allow_nan=False))["kl"] is None


def test_a_model_learns_on_its_grid_what_it_exports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe itself, a few steps of it: one model is loaded, its loss falls, and the GGUF file has its weights."""
    loaded: list[str] = []
    load = prepare.load_model

    def count(source: str) -> Any:
        loaded.append(source)
        return load(source)

    monkeypatch.setattr(prepare, "load_model", count)
    recipe = reasoning(tmp_path, steps=30, eval_every=10, teacher="there-is-no-such-teacher")
    run = tmp_path / "run"
    outcome = distill(recipe, run, resume=False, console=quiet())
    assert loaded == [str(tmp_path / "student")]
    before, rounded, trained = (quality for _, quality, _ in outcome.rows)
    assert trained.nll < 0.7 * rounded.nll
    assert before.nll == pytest.approx(rounded.nll, rel=0.02)
    assert outcome.best_step > 0
    assert repr(load_outcome(run)) == repr(outcome)
    artifact = open_artifact(run)
    for name, expected in artifact.forward_sha256.items():
        assert tensor_sha256(artifact.weight(name)) == expected
    records = [json.loads(line) for line in (run / "run.jsonl").read_text().splitlines()]
    assert not any("kl" in record or "eval_kl" in record for record in records)
    assert [(stage.kl, stage.nll) for stage in read_run(run).stages] == [
        (None, pytest.approx(quality.nll)) for quality in (before, rounded, trained)
    ]
    file = tmp_path / "model.gguf"
    export.get("gguf").write(artifact, file)
    proof = verify(run, file)
    assert proof.ok, proof.mismatches
    assert proof.exact == len(artifact.forward_sha256) > 10


def test_a_resumed_run_ends_as_one_that_was_not_stopped(tmp_path: Path) -> None:
    whole = distill(reasoning(tmp_path, steps=4, save_every=2), tmp_path / "whole", resume=False, console=quiet())
    again = distill(reasoning(tmp_path, steps=4, save_every=2), tmp_path / "whole", resume=True, console=quiet())
    assert repr(again) == repr(whole)


@pytest.mark.parametrize("bits", [4, 8])
def test_learning_rates_as_shares_of_the_weights(tmp_path: Path, bits: int) -> None:
    parts = make_trainer(tmp_path, SUPERVISED.override(lr=0.01, lr_unit="weight", bits=bits))
    groups = {id(group["params"][0]): group for group in parts.trainer.create_optimizer().param_groups}
    for master, _, _ in parts.masters.groups():
        assert groups[id(master)]["lr"] == pytest.approx(0.01 * math.sqrt(float((master.detach() ** 2).mean())))


def test_each_row_is_a_sequence_that_ends() -> None:
    tokenizer = make_tokenizer("smollm")
    end = padding_id(tokenizer)
    assert end == tokenizer.eos_token_id
    rows = [
        chat_row("Hi", "a") | {"sample_id": "short"},
        chat_row("Hi", "b " * 200) | {"sample_id": "long"},
        text_row("some words") | {"sample_id": "text"},
    ]
    made = end_rows(tokenize_rows(rows, tokenizer), 64, end)
    assert made["sample_id"][:] == ["short", "text"]
    chat, text = made["input_ids"][:]
    assert str(tokenizer.decode(chat)).endswith("a<|im_end|>\n")  # as the template ends it, not once more
    assert text[-1] == end
    assert tokenizer.decode(text) == "some words<|im_end|>"
    assert made["completion_mask"][1] == [1] * len(text)
    with pytest.raises(UserError, match="no row of the data fits in 3 tokens: raise --seq-len"):
        end_rows(tokenize_rows(rows, tokenizer), 3, end)


def test_data_of_ones_own(tmp_path: Path) -> None:
    """And gptq takes its calibration from rows of any length."""
    recipe = reasoning(
        tmp_path, tasks=(), data=(save_chats(tmp_path / "chats.jsonl"),), init="gptq", calibration_tokens=256, steps=2
    )
    outcome = distill(recipe, tmp_path / "run", resume=False, console=quiet())
    assert outcome.rows[2][1].nll <= outcome.rows[1][1].nll


def test_no_data_and_no_teacher_to_write_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no teacher to sample text from: give --data or --tasks"):
        distill(reasoning(tmp_path, tasks=()), tmp_path / "run", resume=False, console=quiet())
    assert not (tmp_path / "run").exists()


def test_a_warning_if_training_made_the_answers_worse(tmp_path: Path) -> None:
    reasoning(tmp_path).save(tmp_path)
    rows = [(str(nll), Quality(math.nan, nll, math.nan, 10), 1) for nll in (1.0, 1.1, 1.2)]
    outcome = Outcome(tmp_path, rows, 5)
    assert "WORSE: next-token loss 1.2 against 1.1" in str(outcome.warning)
    console = Console(record=True, width=100)
    print_outcome(outcome, console)
    shown = console.export_text()
    assert "KL" not in shown
    assert "nan" not in shown
    assert "3.320" in shown  # exp 1.2
