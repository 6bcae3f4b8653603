"""``qad eval``: models on tasks and texts, one after another, and everything that follows from their answers."""

import os
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from qad import interrupts
from qad.errors import Unreachable, UserError
from qad.evals import calibration, results, table, tasks
from qad.evals.alike import check_alike, known_of, known_of_task
from qad.evals.calibration import Judged, confidence_of
from qad.evals.chains import likeness_to_samples, likeness_to_solutions
from qad.evals.differences import differences, plain
from qad.evals.failures import diagnose
from qad.evals.metrics import ItemResult, costs_of, cut_off, majority_baseline, metrics_of, pass_curve
from qad.evals.plots import reliability_plot
from qad.evals.progress import ItemProgress, StepProgress
from qad.evals.record import write_record
from qad.evals.results import Result
from qad.evals.runner import Asking, Model, run_task
from qad.evals.samples import SampleFile
from qad.evals.setting import Mismatch, Setting, agreed, names_served
from qad.evals.shift import LABELS, Label, shift_of
from qad.evals.task import Task
from qad.evals.text import chunks_of, text_quality
from qad.files import check_output
from qad.final_answer import same
from qad.runtimes import is_url


@dataclass(frozen=True)
class TaskRequest:
    """A task that was asked for.

    Attributes:
        name: Of ``tasks.load``.
        label: What it is to the model; None if nobody says.
        path: Local file of its items.
    """

    name: str
    label: Label | None = None
    path: Path | None = None


@dataclass(frozen=True)
class Options:
    """What is evaluated and how.

    Attributes:
        tasks: In order.
        asking: How items are asked.
        methods: How K answers become one: ``vote``, ``weighted``, ``best``; besides ``deliberate``.
        limit: Most items of a task.
        task_seed: Of generated items.
        output: Folder of the samples.
        fit: Of confidences; by the number of answers if None.
        margin: Loss that still counts as as good.
        after: Samples or results of a model that was trained on the tasks' levels.
        text: Text for perplexity.
        chunk_tokens, chunks: How it is cut, and how many chunks count.
        model_options: Of ``open_model``.
    """

    tasks: tuple[TaskRequest, ...]
    asking: Asking
    methods: tuple[str, ...]
    limit: int | None
    task_seed: int
    output: Path
    fit: calibration.Fit | None
    margin: float
    after: Path | None
    text: Path | None
    chunk_tokens: int
    chunks: int | None
    model_options: dict[str, Any]


def short_names(sources: Sequence[str]) -> dict[str, str]:
    """Return a short name for each model: the last part of its path, or all of it where two share that."""
    last = {source: source.rstrip("/").rpartition("/")[2] or source for source in sources}
    names = list(last.values())
    return {source: name if names.count(name) == 1 else source for source, name in last.items()}


def _told_apart(sources: Sequence[str], reference: str | None) -> list[str]:
    """Return the models to evaluate, the reference first.

    Raises:
        UserError: One is named twice, or the reference is the only one.
    """
    places = {source: source if is_url(source) else os.path.realpath(source) for source in (*sources, reference or "")}
    if twice := [source for index, source in enumerate(sources) if places[source] in map(places.get, sources[:index])]:
        raise UserError(f"{twice[0]} is named twice: name each model once")
    if reference is None:
        return list(sources)
    others = [source for source in sources if places[source] != places[reference]]
    if not others:
        raise UserError(
            f"the reference {reference} is the only model, so there is nothing to hold against it: name the student as "
            "the model and its teacher with --reference, or leave --reference out"
        )
    return [reference, *others]


def file_of(folder: Path, model: str, task: str) -> Path:
    """Return where the samples of a model on a task are kept."""
    safe = [re.sub(r"[^\w.@+-]+", "_", part).lstrip(".") or "_" for part in (model, task)]
    return folder / safe[0] / f"{safe[1]}.jsonl"


class Evaluation:
    """Evaluates models one after another, and keeps what was found.

    Args:
        sources: Models; the first is what others are compared with, unless there is a reference.
        reference: The model that the others are held against; it is evaluated too.
        options: See there.
        console: For progress.

    Raises:
        UserError: A model or a task is missing, the reference has nothing to be held against, or the results of after
            training are of other items or were judged otherwise.
    """

    def __init__(self, sources: Sequence[str], reference: str | None, options: Options, console: Console) -> None:
        ordered = _told_apart(sources, reference)
        names = short_names(ordered)
        self._models = [Model(source, names[source], options.model_options) for source in ordered]
        self._reference = self._models[0] if reference else None
        self._options = options
        self._console = console
        self._tasks = [(request, self._load(request)) for request in options.tasks]
        twice = [task.name for _, task in self._tasks]
        if repeated := sorted({name for name in twice if twice.count(name) > 1}):
            raise UserError(f"{', '.join(repeated)} is asked for twice: name each task once")
        self._after = {} if options.after is None else results.of_one_model(options.after)
        for _, task in self._tasks:
            if task.name in self._after:
                ours, theirs = known_of_task(task), known_of(self._after[task.name])
                check_alike(task.name, ours, theirs, ("this evaluation", str(options.after)))
        self._results: dict[tuple[str, str], list[ItemResult]] = {}
        self.rows: list[dict[str, Any]] = []
        self.texts: list[dict[str, Any]] = []

    @property
    def has_reference(self) -> bool:
        """Whether models are held against one."""
        return self._reference is not None

    def _load(self, request: TaskRequest) -> Task:
        loaded = tasks.load(request.name, path=request.path, limit=self._options.limit, seed=self._options.task_seed)
        if not loaded.items:
            raise UserError(f"{request.name} has no items")
        for note in loaded.notes:
            self._say(f"{loaded.name}: {note}")
        return loaded

    def _say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    @property
    def kept(self) -> bool:
        """Whether there are answers on the disk, of now or of earlier."""
        files = [self._place(model, task) for model in self._models for _, task in self._tasks]
        return any(file.is_file() and file.stat().st_size for file in files)

    def run(self) -> None:
        """Ask every model everything.

        Raises:
            Mismatch: Some of the answers that are there were asked for otherwise; nothing was asked.
            UserError: A model, a judge or the disk fails; what was answered is kept.
        """
        for model in self._models:
            if self._tasks and is_url(model.source):
                self._identify(model)
            for _, task in self._tasks:
                # The last of them before hours are spent on the first.
                agreed(self._place(model, task), self._setting(model, task))
        for model in self._models:
            with model:
                for request, task in self._tasks:
                    self._run_task(model, request, task)
                self._read_text(model)

    def _identify(self, model: Model) -> None:
        """Find out which model a server has, and say so where it, or kept answers, do not tell."""
        places = [self._place(model, task) for _, task in self._tasks]
        try:
            served = model.served or {}
        except Unreachable as error:
            if not any(place.is_file() and place.stat().st_size for place in places):
                raise
            # What is kept needs no model, to be shown or judged anew.
            self._say(f"{error}; until then kept answers are taken as those of its model")
            model.settle()
            return
        if "id" not in served:
            self._say(f"{model.source} does not tell which model it serves: kept answers are taken as those of it")
            return
        for place in places:
            if not names_served(place):
                self._say(
                    f"{place} does not tell which model of the server its answers are of: they are taken as those of "
                    f"{served['id']}, which it serves now; choose another folder with -o if they are not"
                )

    def _run_task(self, model: Model, request: TaskRequest, task: Task) -> None:
        options = self._options
        with self._samples(model, task) as file:
            if file.cut:
                self._say(f"{file.path}: {file.cut} torn row was cut off")
            if outdated := file.outdated(task):
                self._say(f"{file.path}: {outdated} kept answers are judged anew, for the rules have changed")
            with ItemProgress(self._console, f"{model.name}, {task.name}", len(task.items)) as progress:
                found = run_task(
                    model, task, file, options.asking, lambda result, asked: progress.item(result.final, asked)
                )
            chosen = set(options.methods)
            found = [
                replace(one, chosen={name: right for name, right in one.chosen.items() if name in chosen})
                for one in found
            ]
            self._results[model.name, task.name] = found
            self.rows.append(self._row(model, request, task, found, file))

    def _row(
        self, model: Model, request: TaskRequest, task: Task, found: list[ItemResult], file: SampleFile
    ) -> dict[str, Any]:
        kind = task.kind
        baseline = None
        # No two programs are the same: the most frequent one says nothing.
        if kind is not None and kind != "code":
            baseline = majority_baseline(
                [item.accepted for item in task.items], lambda one, other: same(one, other, kind)
            )
        after = self._after.get(task.name)
        notes = []
        if kind is None and "vote" in self._options.methods and self._options.asking.k > 1:
            notes.append("answers of this task cannot be compared, so there is no vote: --methods deliberate")
        if self._after and after is None:
            notes.append(f"{self._options.after} has no results of this task")
        elif after is not None and not {one.id for one in after} & {one.id for one in found}:
            notes.append(
                f"{self._options.after} has results of other items of this task: give both the same items and --seed"
            )
        cut = cut_off(found)
        if cut["unanswered"] > 0.5:
            notes.append(
                f"{cut['unanswered']:.0%} of the answers were cut off before they marked an answer and count as wrong: "
                f"the figures tell how short --new-tokens {self._options.asking.new_tokens} is, rather than what the "
                "model knows"
            )
        report = diagnose(
            found,
            trained=request.label == "trained",
            chance=None if baseline is None else baseline[0],
            after={one.id: one for one in after} if after else None,
        )
        return {
            "model": model.name,
            "file": model.source,
            "sha256": model.sha256,
            "served": model.served,
            "task": task.name,
            "label": request.label,
            "items": len(found),
            "k": self._options.asking.k,
            "samples": str(file.path),
            "metrics": {name: one.to_dict() for name, one in metrics_of(found).items()},
            "pass": {str(k): one.to_dict() for k, one in pass_curve(found).items()},
            "costs": {name: one.to_dict() for name, one in costs_of(found).items()},
            "cut_off": cut,
            "baseline": None if baseline is None else {"value": baseline[0], "answer": baseline[1]},
            "calibration": self._calibration(found),
            "similarity": self._similarity(model, task, file),
            "failures": report.to_dict(),
            "notes": notes,
            "per_item": [asdict(one) for one in found],
        }

    def _calibration(self, found: list[ItemResult]) -> dict[str, Any]:
        judged: dict[str, list[Judged]] = {}
        for one in found:
            # A text without an answer has none to be sure of.
            if one.share is not None and any(one.answered) and one.k > 1 and "vote" in one.chosen:
                judged.setdefault("vote_share", []).append(Judged(one.id, one.share, one.chosen["vote"]))
            for logprob, right, answered in zip(one.mean_logprobs, one.correct, one.answered, strict=True):
                if logprob is not None and answered:
                    judged.setdefault("mean_logprob", []).append(Judged(one.id, confidence_of(logprob), right))
        return {name: calibration.to_dict(answers, self._options.fit) for name, answers in judged.items()}

    def _similarity(self, model: Model, task: Task, file: SampleFile) -> dict[str, Any]:
        found = {"worked solution": likeness_to_solutions(task, file)}
        if self._reference is not None and model is not self._reference:
            with self._samples(self._reference, task) as teacher:
                found[self._reference.name] = likeness_to_samples(task, file, teacher)
        return {name: likeness.to_dict() for name, likeness in found.items() if likeness is not None}

    def _samples(self, model: Model, task: Task) -> SampleFile:
        """Return the opened samples of a model on a task."""
        return SampleFile(self._place(model, task), self._setting(model, task))

    def _place(self, model: Model, task: Task) -> Path:
        return file_of(self._options.output, model.name, task.name)

    def _setting(self, model: Model, task: Task) -> Setting:
        return self._options.asking.setting(task, self._options.task_seed, model)

    def _read_text(self, model: Model) -> None:
        options = self._options
        if options.text is None:
            return
        text = _read(options.text)
        other = self._reference if model is not self._reference else None
        try:
            total = len(chunks_of(model.session, text, options.chunk_tokens, options.chunks))
            with StepProgress(self._console, f"{model.name}, {options.text.name}", total) as progress:
                found = text_quality(
                    model.session,
                    text,
                    None if other is None else other.session,
                    chunk_tokens=options.chunk_tokens,
                    limit=options.chunks,
                    on_chunk=lambda done, total: progress.step(),
                )
        finally:
            if other is not None:
                other.close()
        self.texts.append(
            {
                "model": model.name,
                "file": model.source,
                "text": options.text.name,
                "reference": None if other is None else other.name,
                "chunk_tokens": options.chunk_tokens,
                **found.to_dict(),
            }
        )

    def shifts(self) -> list[dict[str, Any]]:
        """Return for each model what is lost away from what it was trained on, if tasks have labels."""
        found = []
        for model in self._models:
            labelled: dict[Label, list[ItemResult]] = {
                label: [
                    item
                    for request, task in self._tasks
                    if request.label == label
                    for item in self._results[model.name, task.name]
                ]
                for label in LABELS
            }
            found += [{"model": model.name, **group.to_dict()} for group in shift_of(labelled)]
        return found

    def results(self) -> list[Result]:
        """Return what became of each model on each task."""
        return [Result(model, task, items) for (model, task), items in self._results.items()]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): check the path") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: save it as such") from error


def eval_command(
    sources: Sequence[str],
    reference: str | None,
    options: Options,
    *,
    plots: Path | None,
    json_file: Path | None,
    command: str,
) -> int:
    """Evaluate models, print what was found, and return the exit code.

    Args:
        sources, reference, options: See ``Evaluation``.
        plots: Folder for reliability plots.
        json_file: Where to write everything.
        command: What was typed, for the record.

    Returns:
        0; 130 after an interrupt, which keeps every answer that was complete.

    Raises:
        UserError: A model, a task or an option is impossible; a model, a judge or the disk fails. Answers that were
            complete are kept.
    """
    if not options.tasks and options.text is None:
        raise UserError("nothing to evaluate on: give --task, --trained, --near, --far or --text")
    if json_file is not None:
        check_output(json_file, "--json")
    if plots is not None and plots.exists() and not plots.is_dir():
        raise UserError(f"{plots} is a file: name a folder with --plots")
    began = time.time()
    progress = Console(stderr=True)
    evaluation: Evaluation | None = None
    kept = f"the answers so far are kept in {options.output}"
    again = "the same command goes on from there"
    try:
        with interrupts.remembered():
            evaluation = Evaluation(sources, reference, options, progress)
            evaluation.run()
            _finish(evaluation, options, plots=plots, json_file=json_file, command=command, began=began)
    except KeyboardInterrupt:
        if evaluation is None:
            told = "nothing was asked yet"
        else:
            told = f"{kept}: {again}" if evaluation.kept else "no answer was complete yet, so nothing is kept"
        progress.print(f"interrupted: {told}", markup=False, highlight=False, soft_wrap=True)
        return 130
    except UserError as error:
        # What stands there for other settings, the same command would not go on with.
        if evaluation is not None and evaluation.kept and not isinstance(error, Mismatch):
            raise UserError(f"{error} ({kept}; once that is mended {again})") from error
        raise
    return 0


def _finish(
    evaluation: Evaluation, options: Options, *, plots: Path | None, json_file: Path | None, command: str, began: float
) -> None:
    """Compare, plot, write and print what was found."""
    compared = differences(evaluation.results(), options.margin, base_last=evaluation.has_reference)
    shifts = evaluation.shifts()
    if plots is not None:
        for row in evaluation.rows:
            if row["calibration"]:
                name = file_of(plots, row["model"], row["task"]).with_suffix(".svg")
                reliability_plot(name, f"{row['model']}, {row['task']}", row["calibration"])
                row["plot"] = str(name)
    if json_file is not None:
        content = {
            "sampling": asdict(options.asking),
            "rows": evaluation.rows,
            "comparisons": plain(compared),
            "shift": shifts,
            "text": evaluation.texts,
        }
        write_record(json_file, command, began, content)
    console = Console()
    names = table.names_of(evaluation.rows, evaluation.texts)
    table.print_rows(console, evaluation.rows, names)
    table.print_differences(console, compared, names)
    table.print_failures(console, evaluation.rows, names)
    table.print_calibration(console, evaluation.rows, names)
    table.print_similarity(console, evaluation.rows, names)
    table.print_shift(console, shifts, names)
    table.print_text(console, evaluation.texts, names)
