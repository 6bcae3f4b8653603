"""``qad eval``: models on tasks and texts, one after another, and everything that follows from their answers."""

import json
import platform
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console

from qad import __version__, interrupts
from qad.errors import UserError
from qad.evals import calibration, results, table, tasks
from qad.evals.calibration import Judged, confidence_of
from qad.evals.chains import likeness_to_samples, likeness_to_solutions
from qad.evals.compare import compare
from qad.evals.failures import diagnose
from qad.evals.metrics import ItemResult, costs_of, cut_off, majority_baseline, metrics_of, pass_curve
from qad.evals.plots import reliability_plot
from qad.evals.progress import ItemProgress, StepProgress
from qad.evals.results import Result
from qad.evals.runner import Asking, Model, run_task
from qad.evals.samples import SampleFile
from qad.evals.shift import LABELS, Label, shift_of
from qad.evals.task import JUDGING, Task
from qad.evals.text import chunks_of, text_quality
from qad.files import check_output, replacing_file
from qad.final_answer import same
from qad.host import describe


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
        UserError: A model or a task is missing.
    """

    def __init__(self, sources: Sequence[str], reference: str | None, options: Options, console: Console) -> None:
        ordered: list[str] = list(dict.fromkeys(sources if reference is None else [reference, *sources]))
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
        self._results: dict[tuple[str, str], list[ItemResult]] = {}
        self.rows: list[dict[str, Any]] = []
        self.texts: list[dict[str, Any]] = []

    def _load(self, request: TaskRequest) -> Task:
        loaded = tasks.load(request.name, path=request.path, limit=self._options.limit, seed=self._options.task_seed)
        if not loaded.items:
            raise UserError(f"{request.name} has no items")
        for note in loaded.notes:
            self._say(f"{loaded.name}: {note}")
        return loaded

    def _say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def run(self) -> None:
        """Ask every model everything.

        Raises:
            UserError: A model, a judge or the disk fails; what was answered is kept.
        """
        for model in self._models:
            with model:
                for request, task in self._tasks:
                    self._run_task(model, request, task)
                self._read_text(model)

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
                [item.solution for item in task.items], lambda one, other: same(one, other, kind)
            )
        after = self._after.get(task.name)
        notes = []
        if kind is None and "vote" in self._options.methods and self._options.asking.k > 1:
            notes.append("answers of this task cannot be compared, so there is no vote: --methods deliberate")
        if self._after and after is None:
            notes.append(f"{self._options.after} has no results of this task")
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
        options = self._options
        path = file_of(options.output, model.name, task.name)
        return SampleFile(path, options.asking.setting(task, options.task_seed, model))

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


ALL = "all tasks"


def differences(found: Sequence[Result], margin: float, *, base_last: bool) -> list[dict[str, Any]]:
    """Return the paired differences of models.

    Args:
        found: Of several models.
        margin: Loss that still counts as as good.
        base_last: The first model is what each other is held against, and named second: student against teacher. If
            not, the first is held against each other.

    Returns:
        For each pair and task ``task``, ``first``, ``second`` and ``differences``; where they share several tasks, also
        for the items of all of them together, under ``ALL``.
    """
    models = list(dict.fromkeys(one.model for one in found))
    by_name = {(one.model, one.task): one.items for one in found}
    pairs = [(other, models[0]) if base_last else (models[0], other) for other in models[1:]]
    compared = []
    for first, second in pairs:
        shared = [
            task
            for task in dict.fromkeys(one.task for one in found)
            if (first, task) in by_name and (second, task) in by_name
        ]
        sides = {task: (by_name[first, task], by_name[second, task]) for task in shared}
        if len(shared) > 1:
            together = [[_of(task, item) for task in shared for item in sides[task][side]] for side in (0, 1)]
            if len({item.k for side in together for item in side}) == 1:
                sides[ALL] = (together[0], together[1])
        for task, (ours, theirs) in sides.items():
            if made := compare(ours, theirs, margin):
                compared.append({"task": task, "first": first, "second": second, "differences": made})
    return compared


def _of(task: str, item: ItemResult) -> ItemResult:
    """Return an item under a name that tells it from those of other tasks."""
    return replace(item, id=f"{task}: {item.id}")


def _plain(compared: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{**one, "differences": [difference.to_dict() for difference in one["differences"]]} for one in compared]


_LIBRARIES = ("llama-cpp-python", "torch", "transformers", "onnxruntime-genai", "gptqmodel", "reasoning-gym")


def _versions() -> dict[str, str]:
    found = {"qad": __version__, "python": platform.python_version()}
    for library in (*_LIBRARIES, "math-verify", "scikit-learn", "torchmetrics", "rouge-score"):
        try:
            found[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
    return found


def _write(json_file: Path, command: str, began: float, content: Mapping[str, Any]) -> None:
    values = {
        "format": results.FORMAT,
        "kind": "eval",
        "judging": JUDGING,
        "command": command,
        "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(began)),
        "machine": describe(),
        "versions": _versions(),
        **content,
    }
    with replacing_file(json_file) as temporary:
        temporary.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


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
    if json_file is not None and not json_file.absolute().parent.is_dir():
        raise UserError(f"{json_file.absolute().parent} is no folder: make it, or write --json elsewhere")
    if json_file is not None:
        check_output(json_file, "--json")
    began = time.time()
    progress = Console(stderr=True)
    evaluation = Evaluation(sources, reference, options, progress)
    again = f"the answers so far are kept in {options.output}: the same command goes on from there"
    try:
        with interrupts.remembered():
            evaluation.run()
    except KeyboardInterrupt:
        progress.print(f"interrupted; {again}", markup=False, soft_wrap=True)
        return 130
    except UserError as error:
        if options.tasks and options.output.is_dir():
            raise UserError(f"{error} ({again})") from error
        raise
    compared = differences(evaluation.results(), options.margin, base_last=reference is not None)
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
            "comparisons": _plain(compared),
            "shift": shifts,
            "text": evaluation.texts,
        }
        _write(json_file, command, began, content)
    console = Console()
    table.print_rows(console, evaluation.rows)
    table.print_differences(console, compared)
    table.print_failures(console, evaluation.rows)
    table.print_calibration(console, evaluation.rows)
    table.print_similarity(console, evaluation.rows)
    table.print_shift(console, shifts)
    table.print_text(console, evaluation.texts)
    return 0


def compare_command(files: Sequence[Path], *, margin: float, json_file: Path | None, command: str) -> int:
    """Compare results that were made before, print the differences, and return the exit code 0.

    Args:
        files: What ``--json`` wrote, or files of samples; the first model is held against each other.
        margin: Loss that still counts as as good.
        json_file: Where to write the differences.
        command: What was typed, for the record.

    Raises:
        UserError: A file is missing or damaged, there is one model only, or no item that two share.
    """
    began = time.time()
    found = results.load_all(files)
    if len({one.model for one in found}) < 2:
        raise UserError("there is one model only: give the results of two or more")
    compared = differences(found, margin, base_last=False)
    if not compared:
        raise UserError("the models share no item of a task: evaluate them on the same tasks with the same seed")
    if json_file is not None:
        _write(json_file, command, began, {"rows": [], "comparisons": _plain(compared)})
    table.print_differences(Console(), compared)
    return 0
