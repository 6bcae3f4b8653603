"""What ``qad train`` and ``qad quantize`` leave in a run folder: recipe, training log, figures at the end."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qad.errors import UserError
from qad.files import sha256_of_file
from qad.report.fields import Fields
from qad.report.source import Source

KIND = "run (qad train)"
RECIPE, LOG, RESULT, ARTIFACT = "recipe.json", "run.jsonl", "result.json", "artifact/artifact.json"
REMEDY = "continue the run with --resume, or leave it out"


@dataclass(frozen=True)
class Step:
    """A line of the training log: the optimizer step, and the figures that it has."""

    step: int
    kl: float | None
    loss: float | None
    perplexity: float | None
    eval_kl: float | None
    eval_perplexity: float | None
    eval_same_top: float | None

    @property
    def held_out(self) -> bool:
        """Whether it is an evaluation on held-out text."""
        return self.eval_kl is not None or self.eval_perplexity is not None


@dataclass(frozen=True)
class Stage:
    """A row of the result: teacher (or the model as it was), rounded, trained; without a teacher no KL to it."""

    what: str
    kl: float | None
    perplexity: float
    nll: float
    same_top: float | None
    tokens: int
    bytes: float


@dataclass(frozen=True)
class RunRecord:
    """A run folder.

    Attributes:
        source: The folder.
        name: Its name.
        teacher: As in the recipe.
        planned: Optimizer steps of the recipe.
        recipe: All of it, as texts.
        steps: Lines of the log.
        stages: Teacher or the model as it was, rounded, and trained if there was training; empty for a run that has not
            ended.
        best_step: Whose weights the artifact holds.
        grids: Grid -> tensors of the artifact; empty without one.
        run_hash: Of the artifact.
    """

    source: Source
    name: str
    teacher: str
    planned: int
    recipe: dict[str, str]
    steps: tuple[Step, ...]
    stages: tuple[Stage, ...]
    best_step: int | None
    grids: dict[str, int]
    run_hash: str | None

    @property
    def held_out(self) -> list[Step]:
        """The evaluations; of several at one step the last."""
        return list({step.step: step for step in self.steps if step.held_out}.values())

    @property
    def taught(self) -> bool:
        """Whether there was a teacher, to whom it has a KL."""
        kls = [stage.kl for stage in self.stages] or [step.eval_kl for step in self.held_out]
        return not kls or any(kl is not None for kl in kls)

    @property
    def trained(self) -> list[Step]:
        """The optimizer steps."""
        return [step for step in self.steps if step.loss is not None]


def _load(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is damaged ({error}); {REMEDY}") from error


def _log(file: Path) -> list[Step]:
    if not file.is_file():
        return []
    try:
        lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is damaged ({error}); {REMEDY}") from error
    steps = []
    for number, line in enumerate(lines, start=1):
        try:
            values = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                break  # a kill cut it short, or it is being written
            raise UserError(f"{file} is damaged: line {number} is no JSON ({error}); {REMEDY}") from error
        fields = Fields(values, str(file), f"line {number}", REMEDY)
        names = ("kl", "loss", "perplexity", "eval_kl", "eval_perplexity", "eval_same_top1")
        steps.append(Step(fields.whole("step"), *(fields.maybe_number(name) for name in names)))
    return steps


def _result(file: Path) -> tuple[list[Stage], int | None]:
    if not file.is_file():
        return [], None
    fields = Fields(_load(file), str(file), "", REMEDY)
    stages = [
        Stage(
            one.text("what"),
            one.maybe_number("kl"),
            one.number("perplexity"),
            one.number("nll"),
            one.maybe_number("same_top1"),
            one.whole("tokens"),
            one.number("bytes"),
        )
        for one in fields.children("rows")
    ]
    if len({stage.kl is None for stage in stages}) > 1:
        raise UserError(f"{file} is damaged: some of its rows have a KL to a teacher and others none; {REMEDY}")
    return stages, fields.whole("best_step")


def read_run(folder: Path) -> RunRecord:
    """Return the record of a run folder.

    Raises:
        UserError: It is none, or a file in it is damaged.
    """
    recipe_file = folder / RECIPE
    if not recipe_file.is_file():
        raise UserError(
            f"{folder} is no run: it has no {RECIPE}; give a folder that `qad train` or `qad quantize` made"
        )
    recipe = Fields(_load(recipe_file), str(recipe_file), "", REMEDY)
    stages, best = _result(folder / RESULT)
    grids: dict[str, int] = {}
    run_hash = None
    if (folder / ARTIFACT).is_file():
        artifact = Fields(_load(folder / ARTIFACT), str(folder / ARTIFACT), "", REMEDY)
        grids = dict(Counter(artifact.child("grids").texts().values()).most_common())
        run_hash = artifact.text("run_hash")
    return RunRecord(
        Source(str(folder), KIND, sha256_of_file(recipe_file)),
        folder.resolve().name if folder.name in ("", "..") else folder.name,
        recipe.text("teacher"),
        recipe.whole("steps"),
        recipe.texts(),
        tuple(_log(folder / LOG)),
        tuple(stages),
        best,
        grids,
        run_hash,
    )


def run_names(runs: Sequence[RunRecord]) -> dict[str, str]:
    """Return a name for each run by its path: its folder's, or the path where two share it."""
    names = [run.name for run in runs]
    return {run.source.path: run.name if names.count(run.name) == 1 else run.source.path for run in runs}
