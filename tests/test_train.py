"""The trainer: it learns, counts tokens right, quantizes once per optimizer step, and keeps what it says it keeps.

Shapes: B sequences, T tokens, D width, V vocabulary.
"""

import copy
import gc
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from rich.console import Console
from torch import Tensor

from qad.artifact import open_artifact, tensor_sha256
from qad.checkpoints import check_checkpoint, checkpoint_step, last_checkpoint
from qad.distill import distill
from qad.errors import UserError
from qad.files import replacing_file
from qad.losses import IGNORE
from qad.measure import Quality, measure
from qad.model import load_model
from qad.outcome import Outcome, load_outcome
from qad.prepare import gather_rows
from qad.recipe import Recipe
from qad.student import Masters
from qad.train import Collator, QADTrainer
from tests.helpers_models import make_tokenizer
from tests.helpers_runs import make_trainer, save_chats, save_model, save_text, tiny, token_rows

QUICK = Recipe(steps=4, batch_size=4, micro_batch=4, seq_len=24, lr=0.02, init="rtn", scales="absmax")


def quiet() -> Console:
    return Console(quiet=True)


def run_recipe(tmp_path: Path, **changes: Any) -> Recipe:
    """Return a recipe on a saved model and text."""
    options: dict[str, Any] = {
        "steps": 3,
        "batch_size": 4,
        "micro_batch": 2,
        "seq_len": 32,
        "lr": 0.02,
        "calibration_tokens": 256,
    }
    if not {"teacher"} & changes.keys():
        options["teacher"] = save_model(tmp_path / "teacher")
    if "data" not in changes:
        options["data"] = (save_text(tmp_path / "text.jsonl"),)
    return Recipe(**(options | changes))


def plain_loss(student: Any, teacher: Any, batch: dict[str, Any]) -> Tensor:
    """Return the mean KL over the counted tokens from full logits."""
    counted = batch["labels"] != IGNORE
    log_q, log_p = (
        m(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[counted].log_softmax(-1)
        for m in (student, teacher)
    )
    return F.kl_div(log_q, log_p, log_target=True, reduction="sum") / counted.sum()


# ---------------------------------------------------------------------------------------------------- collator


def test_labels_are_the_next_tokens_that_count() -> None:
    rows = [
        {"input_ids": [5, 6, 7, 8], "completion_mask": [0, 0, 1, 1], "sample_id": "a"},
        {"input_ids": [9, 10], "completion_mask": [1, 1], "sample_id": "b"},
    ]
    batch = Collator(0, "all")(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8], [9, 10, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[6, 7, 8, IGNORE], [10, IGNORE, IGNORE, IGNORE]]
    assert batch["sample_id"] == ["a", "b"]
    completion = Collator(0, "completion")(rows)
    assert completion["labels"].tolist() == [[IGNORE, 7, 8, IGNORE], [10, IGNORE, IGNORE, IGNORE]]


# ---------------------------------------------------------------------------------------------------- the step


@pytest.mark.parametrize("loss_on", ["all", "completion"])
def test_loss_and_gradients_are_those_of_full_logits(tmp_path: Path, loss_on: str) -> None:
    parts = make_trainer(tmp_path, QUICK.override(loss_on=loss_on))
    rows = token_rows(3)
    batch = Collator(0, loss_on)([dict(row) for row in rows])  # type: ignore[call-overload]
    expected = plain_loss(copy.deepcopy(parts.student), parts.teacher, batch)
    parts.masters.refresh(step=0)
    loss = parts.trainer.compute_loss(parts.student, batch)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    plain_loss(parts.student, parts.teacher, batch).backward()
    named = dict(parts.student.named_parameters())
    wanted = {name: named[name].grad.clone() for name in parts.plan}  # type: ignore[union-attr]
    parts.student.zero_grad()
    loss.backward()
    for name in parts.plan:
        got = named[name].grad
        assert got is not None
        assert torch.allclose(got, wanted[name], rtol=1e-3, atol=1e-7), name


class Spy(Masters):
    """Masters that remember when they were refreshed and with which gradients they were left."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.refreshed: list[int] = []
        self.gradients: list[list[Tensor]] = []

    def refresh(self, *, step: int, **noise: Any) -> None:
        self.refreshed.append(step)
        super().refresh(step=step, **noise)

    def collect_gradients(self, *, step: int, **noise: Any) -> None:
        super().collect_gradients(step=step, **noise)
        self.gradients.append([master.grad.clone() for master, _, _ in self.groups()])  # type: ignore[union-attr]


@pytest.mark.parametrize("micro_batch", [1, 2])
@pytest.mark.parametrize("loss_on", ["all", "completion"])
def test_micro_batches_give_the_gradients_of_the_whole_batch(tmp_path: Path, micro_batch: int, loss_on: str) -> None:
    """Also when they hold different numbers of tokens."""
    rows = [dict(row) for row in token_rows(4)]  # type: ignore[call-overload]
    for number, row in enumerate(rows):
        row["input_ids"], row["completion_mask"] = (
            row[key][: 24 - 5 * number] for key in ("input_ids", "completion_mask")
        )
    data = Dataset.from_list(rows)
    seen = []
    for size in (4, micro_batch):
        recipe = QUICK.override(steps=1, micro_batch=size, loss_on=loss_on)
        parts = make_trainer(tmp_path / str(size), recipe, make_masters=Spy, train_rows=data)
        parts.trainer.train()
        assert isinstance(parts.masters, Spy)
        (gradients,) = parts.masters.gradients
        seen.append((gradients, parts.trainer.state.log_history[0]["loss"]))
    (whole, whole_loss), (parted, parted_loss) = seen
    assert parted_loss == pytest.approx(whole_loss, rel=1e-4)
    assert any(g.abs().max() > 1e-4 for g in whole)
    for a, b in zip(parted, whole, strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-6)


def test_the_logged_loss_is_the_mean_over_all_counted_tokens(tmp_path: Path) -> None:
    parts = make_trainer(tmp_path, QUICK.override(lr=0.0, steps=3))
    parts.trainer.train()
    for entry in parts.trainer.state.log_history[:3]:
        assert entry["loss"] == pytest.approx(entry["kl"], rel=1e-4)


def test_a_batch_without_a_token_that_counts_changes_nothing(tmp_path: Path) -> None:
    """As packed rows with --loss-on completion can be."""
    rows = token_rows(4).map(lambda row: {"completion_mask": [0] * len(row["input_ids"])})
    parts = make_trainer(tmp_path, QUICK.override(steps=2, loss_on="completion", micro_batch=2), train_rows=rows)
    before = [p.detach().clone() for p in parts.masters.masters]
    parts.trainer.train()
    for old, new in zip(before, parts.masters.masters, strict=True):
        assert torch.equal(old, new)


@pytest.mark.parametrize("noise", ["none", "stochastic"])
def test_weights_are_quantized_once_per_optimizer_step(tmp_path: Path, noise: str) -> None:
    parts = make_trainer(tmp_path, QUICK.override(steps=5, micro_batch=1, noise=noise), make_masters=Spy)
    parts.trainer.train()
    assert isinstance(parts.masters, Spy)
    assert parts.masters.refreshed == [0, 1, 2, 3, 4]
    assert len(parts.masters.gradients) == 5


def test_after_an_evaluation_the_noise_of_the_step_comes_back(tmp_path: Path) -> None:
    parts = make_trainer(tmp_path, QUICK.override(noise="uniform", noise_until=1.0, steps=4, eval_every=2))
    forward: dict[int, dict[str, str]] = {}
    step_of = parts.trainer.training_step

    def watch(*arguments: Any) -> Tensor:
        loss = step_of(*arguments)
        forward[parts.trainer.state.global_step] = parts.masters.fingerprint()
        return loss

    parts.trainer.training_step = watch  # type: ignore[method-assign]
    parts.trainer.train()
    hard = parts.masters.fingerprint()  # as the last evaluation left it
    assert list(forward) == [0, 1, 2, 3]
    assert all(forward[step] != hard for step in forward)
    parts.masters.harden()
    assert parts.masters.fingerprint() == hard


def test_the_share_of_hard_blocks_rises_to_one() -> None:
    class Bare:
        recipe = Recipe(steps=10, noise="partial", noise_until=0.5, seed=3)

    shares = [QADTrainer._noise(Bare(), step)["hard_share"] for step in range(10)]  # type: ignore[arg-type]
    assert shares == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("scales", ["absmax", "mse", "learned"])
def test_training_lowers_the_divergence(tmp_path: Path, scales: str) -> None:
    recipe = QUICK.override(steps=60, batch_size=8, lr=0.01, scales=scales, eval_every=10)
    rows = token_rows(128, seed=2)
    parts = make_trainer(tmp_path, recipe, train_rows=rows, held_out_rows=token_rows(16, seed=3))
    before = parts.trainer.evaluate()["eval_kl"]
    parts.trainer.train()
    assert parts.trainer.best is not None
    assert parts.trainer.best[0] > 0
    assert parts.trainer.best[1].kl < 0.9 * before
    assert [step for step, _ in parts.best] == sorted({step for step, _ in parts.best})
    assert parts.best[-1] == parts.trainer.best


@pytest.mark.parametrize("kl", ["reverse", "jsd"])
def test_other_divergences_train_too(tmp_path: Path, kl: str) -> None:
    recipe = QUICK.override(steps=20, lr=0.02, kl=kl, temperature=2.0, next_token_weight=0.05)
    parts = make_trainer(tmp_path, recipe, train_rows=token_rows(4))
    parts.trainer.train()
    losses = [entry["loss"] for entry in parts.trainer.state.log_history if "loss" in entry]
    assert min(losses[10:]) < losses[0]


def test_gradient_checkpointing_changes_nothing_but_memory(tmp_path: Path) -> None:
    runs = []
    for on in (False, True):
        recipe = QUICK.override(steps=3, gradient_checkpointing=on)
        parts = make_trainer(tmp_path / str(on), recipe)
        recomputed = 0

        def count(*_: Any) -> None:
            nonlocal recomputed
            recomputed += 1

        parts.student.model.layers[0].mlp.register_forward_pre_hook(count)  # type: ignore[union-attr,index,operator]
        parts.trainer.train()
        runs.append(([entry.get("loss") for entry in parts.trainer.state.log_history], recomputed))
    assert runs[0][0][:3] == pytest.approx(runs[1][0][:3], rel=1e-5)
    assert runs[1][1] == runs[0][1] + 3  # each layer runs again in backward


def test_learning_rates_are_in_grid_steps(tmp_path: Path) -> None:
    parts = make_trainer(tmp_path, QUICK.override(scales="learned", lr=0.02, scale_lr=0.003, kept_lr=1e-4))
    groups = {id(g["params"][0]): g for g in parts.trainer.create_optimizer().param_groups}
    trained = {id(p) for g in groups.values() for p in g["params"]}
    for master, scales, step in parts.masters.groups():
        assert groups[id(master)]["lr"] == pytest.approx(0.02 * step)
        assert groups[id(scales)]["lr"] == pytest.approx(0.003 * step)
    assert not trained & {id(p) for p in parts.masters.forward_parameters()}
    norms = [p for name, p in parts.student.named_parameters() if parts.plan.get(name) == "keep"]
    assert {id(p) for p in norms} <= trained


def test_weight_decay_is_of_the_masters(tmp_path: Path) -> None:
    parts = make_trainer(tmp_path, QUICK.override(weight_decay=0.1))
    masters = {id(master) for master, _, _ in parts.masters.groups()}
    for group in parts.trainer.create_optimizer().param_groups:
        assert group["weight_decay"] == (0.1 if id(group["params"][0]) in masters else 0.0)


# ---------------------------------------------------------------------------------------------------- other teachers


def test_a_student_smaller_than_its_teacher(tmp_path: Path) -> None:
    student = tiny(num_hidden_layers=1, hidden_size=32, num_attention_heads=1, head_dim=32)
    rows = token_rows(4)
    parts = make_trainer(tmp_path, QUICK.override(steps=20, lr=0.05), student=student, train_rows=rows)
    parts.trainer.train()
    losses = [entry["loss"] for entry in parts.trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("sizes", [(640, 600), (600, 640)], ids=["teacher padded", "student padded"])
def test_padded_vocabularies(tmp_path: Path, sizes: tuple[int, int]) -> None:
    """The same weights with more rows: the divergence is only that of rounding."""
    teacher, student = (tiny(vocab_size=size) for size in sizes)
    small, large = sorted((teacher, student), key=lambda m: m.config.vocab_size)
    state = large.state_dict()
    for name, tensor in small.state_dict().items():
        state[name][: len(tensor)] = tensor
    large.load_state_dict(state)
    parts = make_trainer(tmp_path, QUICK.override(steps=2, bits=8), teacher=teacher, student=student)
    assert parts.trainer.evaluate()["eval_kl"] < 0.01
    parts.trainer.train()
    losses = [entry["loss"] for entry in parts.trainer.state.log_history if "loss" in entry]
    assert max(losses) < 0.01


# ---------------------------------------------------------------------------------------------------- whole runs


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("scales", ["absmax", "mse", "learned"])
def test_the_artifact_holds_the_weights_the_trainer_saw(tmp_path: Path, bits: int, scales: str) -> None:
    recipe = run_recipe(tmp_path, bits=bits, scales=scales, noise="partial", init="mse", eval_every=2)
    outcome = distill(recipe, tmp_path / "run", resume=False, console=quiet())
    artifact = open_artifact(tmp_path / "run")
    assert artifact.recipe == recipe.to_dict()
    assert set(artifact.grids.values()) == ({"q4_0", "q8_0"} if bits == 4 else {"q8_0"})
    for name, expected in artifact.forward_sha256.items():
        assert tensor_sha256(artifact.weight(name)) == expected
    assert load_outcome(tmp_path / "run") == outcome


def test_the_table_measures_the_artifact(tmp_path: Path) -> None:
    """The KL of the last row, computed anew from teacher and artifact on the same held-out rows."""
    recipe = run_recipe(tmp_path, steps=6, eval_every=3, init="rtn")
    outcome = distill(recipe, tmp_path / "run", resume=False, console=quiet())
    teacher = load_model(recipe.teacher)
    student = copy.deepcopy(teacher.model)
    artifact = open_artifact(tmp_path / "run")
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            parameter.copy_(artifact.weight(name))
    _, held_out = gather_rows(recipe, tmp_path / "run", teacher, quiet())
    collator = Collator(0, "all")
    batches = [collator([held_out[n]]) for n in range(len(held_out))]  # type: ignore[misc]
    quality = measure(student, teacher.model, batches)
    assert outcome.rows[2][1].kl == pytest.approx(quality.kl, rel=1e-4)
    assert outcome.rows[2][1].tokens == quality.tokens
    assert outcome.rows[0][1].kl == pytest.approx(0.0, abs=1e-6)
    assert outcome.rows[1][1].kl > 0


def test_no_steps_at_all(tmp_path: Path) -> None:
    outcome = distill(run_recipe(tmp_path, steps=0, init="gptq"), tmp_path / "run", resume=False, console=quiet())
    assert outcome.best_step == 0
    assert outcome.warning is None
    assert outcome.rows[2][1].kl < outcome.rows[1][1].kl
    open_artifact(tmp_path / "run")


def test_loss_on_completions(tmp_path: Path) -> None:
    recipe = run_recipe(tmp_path, data=(save_chats(tmp_path / "chats.jsonl"),), loss_on="completion")
    everything = distill(recipe.override(loss_on="all"), tmp_path / "all", resume=False, console=quiet())
    completions = distill(recipe, tmp_path / "completion", resume=False, console=quiet())
    assert 0 < completions.rows[0][1].tokens < 0.5 * everything.rows[0][1].tokens


def test_text_has_no_completions(tmp_path: Path) -> None:
    """All of a text counts as completion."""
    recipe = run_recipe(tmp_path, loss_on="completion")
    outcome = distill(recipe, tmp_path / "run", resume=False, console=quiet())
    assert outcome.rows[0][1].tokens > 100


def test_a_student_of_another_folder(tmp_path: Path) -> None:
    student = save_model(tmp_path / "student", num_hidden_layers=1)
    outcome = distill(run_recipe(tmp_path, student=student), tmp_path / "run", resume=False, console=quiet())
    assert outcome.rows[0][2] > 2 * outcome.rows[2][2]
    assert open_artifact(tmp_path / "run").config["num_hidden_layers"] == 1


def test_different_tokenizers_are_refused(tmp_path: Path) -> None:
    student = save_model(tmp_path / "student", family="gpt2")
    with pytest.raises(UserError, match="different|differently"):
        distill(run_recipe(tmp_path, student=student), tmp_path / "run", resume=False, console=quiet())
    assert not (tmp_path / "run").exists()


def test_a_cache_on_disk_in_a_whole_run(tmp_path: Path) -> None:
    recipe = run_recipe(tmp_path, cache_top_k=16)
    outcome = distill(recipe, tmp_path / "run", resume=False, console=quiet())
    assert (tmp_path / "run" / "teacher_cache" / "index.json").is_file()
    assert math.isfinite(outcome.rows[2][1].kl)


def test_every_line_of_the_log_is_json_and_tensorboard_is_written(tmp_path: Path) -> None:
    recipe = run_recipe(tmp_path, steps=5, eval_every=2, tensorboard=True)
    distill(recipe, tmp_path / "run", resume=False, console=quiet())
    records = [json.loads(line) for line in (tmp_path / "run" / "run.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "loss" in r] == [1, 2, 3, 4, 5]
    assert [r["step"] for r in records if "eval_kl" in r] == [0, 2, 4, 5]
    events = list((tmp_path / "run" / "tensorboard").rglob("events.out.tfevents.*"))
    assert events
    assert sum(file.stat().st_size for file in events) > 500
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_warning_if_training_made_things_worse_or_was_of_no_use(tmp_path: Path) -> None:
    Recipe(steps=5).save(tmp_path)

    def outcome(rounded: float, trained: float, best_step: int) -> Outcome:
        teacher, *rest = (Quality(kl, 2.0, 0.9, 100) for kl in (0.0, rounded, trained))
        return Outcome(tmp_path, [(str(q.kl), q, 1) for q in (teacher, *rest)], best_step)

    assert "WORSE: KL 0.3 against 0.2" in str(outcome(0.2, 0.3, 5).warning)
    assert "no training step improved" in str(outcome(0.2, 0.1, 0).warning)
    assert outcome(0.2, 0.1, 3).warning is None


def test_a_run_with_far_too_high_a_rate_warns_and_keeps_its_start(tmp_path: Path) -> None:
    recipe = run_recipe(tmp_path, lr=5.0, init="rtn", steps=4)
    outcome = distill(recipe, tmp_path / "run", resume=False, console=quiet())
    assert outcome.best_step == 0
    assert "no training step improved" in str(outcome.warning)
    assert outcome.rows[2][1].kl == pytest.approx(outcome.rows[1][1].kl, rel=1e-4)


# ---------------------------------------------------------------------------------------------------- checkpoints


def test_the_newest_whole_checkpoint_is_found_and_leftovers_are_cleared(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    assert last_checkpoint(tmp_path) is None
    for name in ("checkpoint-3", "checkpoint-12", ".checkpoint-15.x1y2z3aa.tmp", ".checkpoint-9.previous"):
        (folder / name).mkdir(parents=True)
        (folder / name / "best.json").write_text("null")
    (folder / "checkpoint-9").mkdir()
    found = last_checkpoint(tmp_path)
    assert found == folder / "checkpoint-12"
    assert found is not None
    assert checkpoint_step(found) == 12
    assert sorted(p.name for p in folder.iterdir()) == ["checkpoint-12", "checkpoint-3", "checkpoint-9"]


def test_a_checkpoint_moved_aside_by_a_kill_comes_back(tmp_path: Path) -> None:
    aside = tmp_path / "checkpoints" / ".checkpoint-6.previous"
    aside.mkdir(parents=True)
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoints" / "checkpoint-6"


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    recipe = QUICK.override(steps=2, save_every=1)
    make_trainer(tmp_path, recipe).trainer.train()
    found = last_checkpoint(tmp_path)
    other = make_trainer(tmp_path / "other", recipe, student=tiny(num_hidden_layers=1))
    with pytest.raises(UserError, match="belongs to another model"):
        other.trainer.train(resume_from_checkpoint=str(found))


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    make_trainer(tmp_path, QUICK.override(steps=2, save_every=1)).trainer.train()
    folder = last_checkpoint(tmp_path)
    assert folder is not None
    check_checkpoint(folder)
    files = sorted(folder.iterdir())
    assert {"student.safetensors", "optimizer.pt", "trainer_state.json", "best.json"} < {file.name for file in files}
    for file in files:
        content = file.read_bytes()
        flipped = bytes([*content[:-1], content[-1] ^ 1])
        for damage in (content[: len(content) // 2], b"", flipped):
            file.write_bytes(damage)
            with pytest.raises(UserError, match=rf"checkpoint-2 .*; delete {re.escape(str(folder))} to start"):
                check_checkpoint(folder)
        file.unlink()
        with pytest.raises(UserError, match=rf"cannot be read .*{re.escape(file.name)}|older qad"):
            check_checkpoint(folder)
        file.write_bytes(content)
    (folder / "files.json").write_text("{}")
    with pytest.raises(UserError, match="is damaged"):
        check_checkpoint(folder)


def test_only_the_newest_checkpoint_is_kept(tmp_path: Path) -> None:
    make_trainer(tmp_path, QUICK.override(steps=5, save_every=2)).trainer.train()
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["checkpoint-5"]


def test_a_checkpoint_on_a_full_disk_leaves_the_one_before(small_disk: Path) -> None:
    small: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 1, "vocab_size": 64}
    rows = token_rows(8, vocabulary=64)
    parts = make_trainer(
        small_disk,
        QUICK.override(steps=3, save_every=1),
        teacher=tiny(**small),
        student=tiny(**small),
        train_rows=rows,
        held_out_rows=rows,
    )
    save = parts.trainer._save_checkpoint

    def save_and_fill(*arguments: Any) -> None:
        save(*arguments)
        (small_disk / "filler").write_bytes(bytes(shutil.disk_usage(small_disk).free - 16_384))

    parts.trainer._save_checkpoint = save_and_fill  # type: ignore[method-assign]
    message = ""
    try:
        parts.trainer.train()
    except UserError as error:
        message = str(error)
    gc.collect()  # the failed writer is part of a cycle and holds its file open
    assert re.search(r"disk is full while writing .*checkpoint-2; what was there before is untouched", message)
    assert [p.name for p in (small_disk / "checkpoints").iterdir()] == ["checkpoint-1"]
    (small_disk / "filler").unlink()
    make_trainer(
        small_disk,
        QUICK.override(steps=3, save_every=1),
        teacher=tiny(**small),
        student=tiny(**small),
        train_rows=rows,
        held_out_rows=rows,
    ).trainer.train(resume_from_checkpoint=str(last_checkpoint(small_disk)))
    assert [p.name for p in (small_disk / "checkpoints").iterdir()] == ["checkpoint-3"]


@pytest.mark.parametrize("floats", [1 << 20, 130_900])
def test_torch_save_on_a_full_disk(small_disk: Path, floats: int) -> None:
    """It notices missing bytes, not why they are missing, and raises a RuntimeError."""
    target = small_disk / "optimizer.pt"
    target.write_bytes(b"the one before")
    message = ""
    try:
        with replacing_file(target) as path:
            torch.save({"moments": torch.zeros(floats)}, path)
    except UserError as error:
        message = str(error)
    gc.collect()
    assert message.startswith(f"the disk is full while writing {target}")
    assert target.read_bytes() == b"the one before"


def test_other_failures_of_a_writer_are_not_taken_for_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="something else"), replacing_file(tmp_path / "file"):
        raise RuntimeError("inline_container.cc: something else")


def test_the_tokenizer_s_padding_does_not_matter(tmp_path: Path) -> None:
    """Rows padded to their batch have the loss of the same rows alone."""
    parts = make_trainer(tmp_path, QUICK, tokenizer=make_tokenizer("smollm"))
    rows = [dict(row) for row in token_rows(2)]  # type: ignore[call-overload]
    rows[1]["input_ids"], rows[1]["completion_mask"] = rows[1]["input_ids"][:9], rows[1]["completion_mask"][:9]
    collator = Collator(0, "all")
    together = parts.trainer.compute_loss(parts.student, collator(rows)).detach() * (23 + 8)
    alone = sum(
        parts.trainer.compute_loss(parts.student, collator([row])).detach() * (len(row["input_ids"]) - 1)
        for row in rows
    )
    assert float(together) == pytest.approx(float(alone), rel=1e-4)
