"""A run that was killed, at any moment and as often as one likes, ends with the bytes of a run that was not."""

import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from torch import Tensor

import qad.distill
from qad.distill import distill
from qad.errors import UserError
from qad.outcome import Outcome
from qad.recipe import Recipe, load_recipe
from qad.train import QADTrainer
from tests.helpers_runs import save_model, save_text

STEPS = 30
PHASES = ((0, 9), (9, 18), (18, 29))


def contents(run: Path) -> dict[str, bytes]:
    """Return what must be the same: the artifact's files, the figures, the recipe."""
    files = [*(run / "artifact").iterdir(), run / "result.json", run / "rounded.json", run / "recipe.json"]
    return {file.relative_to(run).as_posix(): file.read_bytes() for file in files}


def log_of(run: Path) -> list[dict[str, Any]]:
    """Return the log without times, and without the summary that is about one process."""
    records = [json.loads(line) for line in (run / "run.jsonl").read_text().splitlines()]
    return [{key: r[key] for key in r if key != "time"} for r in records if "train_runtime" not in r]


def check_same(run: Path, whole: Path) -> None:
    got, expected = contents(run), contents(whole)
    assert got.keys() == expected.keys()
    assert [name for name in got if got[name] != expected[name]] == []
    assert log_of(run) == log_of(whole)
    assert not (run / "checkpoints").exists()
    assert [p.name for p in run.iterdir() if p.name.startswith(".")] == []


# ---------------------------------------------------------------------------------------------------- SIGKILL


def start(run: Path, *options: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "qad.cli", "train", *options, "-o", str(run)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen[bytes]) -> None:
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors.decode()


def steps_done(run: Path) -> int:
    log = run / "run.jsonl"
    return log.read_text().count('"loss"') if log.exists() else 0


def kill_after(process: subprocess.Popen[bytes], run: Path, steps: int, delay: float) -> None:
    """Kill a run that has logged so many steps, a moment later."""
    limit = time.monotonic() + 300
    while steps_done(run) < steps and process.poll() is None and time.monotonic() < limit:
        time.sleep(0.001)
    assert process.poll() is None, "the run ended before it could be killed"
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.communicate()


def test_sigkill_at_three_random_moments(tmp_path: Path) -> None:
    seed = time.time_ns() % 100_000
    print(f"seed of the moments: {seed}")
    moments = random.Random(seed)
    options = [
        *("--teacher", save_model(tmp_path / "teacher"), "--data", save_text(tmp_path / "text.jsonl")),
        *("--steps", str(STEPS), "--batch-size", "4", "--micro-batch", "2", "--seq-len", "32", "--lr", "0.01"),
        *("--noise", "stochastic", "--noise-until", "0.7", "--scales", "learned", "--init", "gptq"),
        *("--save-every", "3", "--eval-every", "3"),
    ]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(start(whole, *options))
    for first, last in PHASES:
        process = start(killed, *options, "--resume")
        kill_after(process, killed, moments.randint(first, last - 1), moments.uniform(0, 0.05))
        assert not (killed / "result.json").exists()
    # And a kill in the middle of writing a checkpoint, at a moment that cannot be hit on purpose.
    checkpoints = killed / "checkpoints"
    newest = max(checkpoints.glob("checkpoint-*"), key=lambda folder: int(folder.name.rpartition("-")[2]))
    half = checkpoints / f".checkpoint-{int(newest.name.rpartition('-')[2]) + 3}.x1y2z3aa.tmp"
    half.mkdir()
    (half / "student.safetensors").write_bytes((newest / "student.safetensors").read_bytes()[:1000])
    with (killed / "run.jsonl").open("a") as log:
        log.write('{"step": 29, "ti')
    finish(start(killed, "--resume"))  # its options are those it was started with
    check_same(killed, whole)


# ---------------------------------------------------------------------------------------------------- in-process


class Stopped(Exception):
    """Stands for a kill: nothing in qad catches it."""


def interrupted(recipe: Recipe, run: Path, stop: int, monkeypatch: pytest.MonkeyPatch, *, late: bool = False) -> None:
    """Run until a step and stop there; ``late``: in the middle of its micro-batches."""

    class StoppingTrainer(QADTrainer):
        batches = 0

        def training_step(self, *arguments: Any, **options: Any) -> Tensor:
            if self.state.global_step == stop:
                if self.batches == int(late):
                    raise Stopped
                self.batches += 1
            return super().training_step(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(qad.distill, "QADTrainer", StoppingTrainer)
        with pytest.raises(Stopped):
            distill(recipe, run, resume=True, console=Console(quiet=True))


def stopped_at_the_end(recipe: Recipe, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run to where only the outcome is left to be saved, and stop there."""

    def stop(self: Any) -> None:
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(Outcome, "save", stop)
        with pytest.raises(Stopped):
            distill(recipe, run, resume=False, console=Console(quiet=True))


CASES: dict[str, dict[str, Any]] = {
    "mse scales between two searches": {"scales": "mse", "init": "mse", "steps": 26, "save_every": 5},
    "absmax scales, evaluations off the checkpoints": {"scales": "absmax", "init": "rtn", "eval_every": 4},
    "partial noise, cached teacher": {"noise": "partial", "cache_top_k": 16, "init": "mse", "eval_every": 5},
    "uniform noise, whole batches, no evaluations": {
        "noise": "uniform",
        "micro_batch": 4,
        "save_every": 7,
        "eval_every": 0,
    },
    "gradient checkpointing, next token, jsd": {"gradient_checkpointing": True, "next_token_weight": 0.2, "kl": "jsd"},
    "a start that no step improves on": {"init": "mse", "lr": 3.0, "eval_every": 2},
    "no checkpoints": {"save_every": 0, "eval_every": 3},
}


@pytest.mark.parametrize("case", CASES)
def test_every_kind_of_run_resumes(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe(
        **{
            "teacher": save_model(tmp_path / "teacher"),
            "data": (save_text(tmp_path / "text.jsonl"),),
            "steps": 11,
            "batch_size": 4,
            "micro_batch": 2,
            "seq_len": 32,
            "lr": 0.01,
            "calibration_tokens": 256,
            "save_every": 3,
            **CASES[case],
        }
    )
    distill(recipe, tmp_path / "whole", resume=False, console=Console(quiet=True))
    for stop, late in ((recipe.steps // 2, True), (recipe.steps - 1, False)):
        interrupted(recipe, tmp_path / "stopped", stop, monkeypatch, late=late and recipe.micro_batch < 4)
    told = io.StringIO()
    distill(recipe, tmp_path / "stopped", resume=True, console=Console(file=told))
    every = recipe.save_every
    kept = (recipe.steps - 1) // every * every if every else 0
    assert (f"continuing after step {kept} of {recipe.steps}" in told.getvalue()) == bool(kept)
    check_same(tmp_path / "stopped", tmp_path / "whole")


@pytest.mark.parametrize("eval_every", [0, 2])
def test_a_kill_after_the_last_step_takes_no_step_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, eval_every: int
) -> None:
    recipe = Recipe(
        teacher=save_model(tmp_path / "teacher"),
        data=(save_text(tmp_path / "text.jsonl"),),
        steps=7,
        batch_size=4,
        micro_batch=2,
        seq_len=32,
        init="mse",  # so that what is trained is not what is rounded to nearest
        lr=0.01,
        save_every=2,
        eval_every=eval_every,
    )
    distill(recipe, tmp_path / "whole", resume=False, console=Console(quiet=True))
    stopped_at_the_end(recipe, tmp_path / "stopped", monkeypatch)
    best = tmp_path / "stopped" / "checkpoints" / "checkpoint-7" / "best.json"
    content = best.read_text()
    best.write_text(content[:20])
    with pytest.raises(UserError, match=r"checkpoint-7 is damaged \(best.json is not as it was written\); delete"):
        distill(recipe, tmp_path / "stopped", resume=True, console=Console(quiet=True))
    best.write_text(content)
    # Only figures for the table, which are measured anew.
    (tmp_path / "stopped" / "rounded.json").write_text("{")
    distill(recipe, tmp_path / "stopped", resume=True, console=Console(quiet=True))
    check_same(tmp_path / "stopped", tmp_path / "whole")


def test_damaged_figures_are_measured_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe(
        teacher=save_model(tmp_path / "teacher"),
        data=(save_text(tmp_path / "text.jsonl"),),
        steps=0,
        seq_len=32,
        init="mse",  # so that what is trained is not what is rounded to nearest
    )
    distill(recipe, tmp_path / "whole", resume=False, console=Console(quiet=True))
    stopped_at_the_end(recipe, tmp_path / "stopped", monkeypatch)
    (tmp_path / "stopped" / "rounded.json").write_text("{")
    distill(recipe, tmp_path / "stopped", resume=True, console=Console(quiet=True))
    check_same(tmp_path / "stopped", tmp_path / "whole")


def test_a_finished_run_is_only_reported(tmp_path: Path) -> None:
    recipe = Recipe(
        teacher=save_model(tmp_path / "teacher"),
        data=(save_text(tmp_path / "text.jsonl"),),
        steps=2,
        seq_len=32,
        init="rtn",
    )
    first = distill(recipe, tmp_path / "run", resume=True, console=Console(quiet=True))
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "run").rglob("*")}
    assert distill(recipe, tmp_path / "run", resume=True, console=Console(quiet=True)) == first
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "run").rglob("*")} == before
    assert load_recipe(tmp_path / "run") == recipe
