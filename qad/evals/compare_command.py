"""``qad eval --compare``: results that were made before, held against each other."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from rich.console import Console

from qad.errors import UserError
from qad.evals import results, table
from qad.evals.alike import check_alike, known_of
from qad.evals.differences import differences, plain
from qad.evals.record import write_record
from qad.evals.results import Result
from qad.files import check_output


def compare_command(files: Sequence[Path], *, margin: float, json_file: Path | None, command: str) -> int:
    """Compare results that were made before, print the differences, and return the exit code 0.

    Args:
        files: What ``--json`` wrote, or files of samples; the first model is held against each other.
        margin: Loss that still counts as as good.
        json_file: Where to write the differences.
        command: What was typed, for the record.

    Raises:
        UserError: A file is missing, damaged or given twice, there is one model only, no item that two share, or one
            that is another question or was judged in two ways.
    """
    began = time.time()
    if json_file is not None:
        check_output(json_file, "--json")
    if twice := [
        file for index, file in enumerate(files) if file.resolve() in [one.resolve() for one in files[:index]]
    ]:
        raise UserError(f"{twice[0]} is given twice: give the results of different models")
    found = results.load_all(files)
    tasks_of: dict[str, list[str]] = {}
    for one in found:
        tasks_of.setdefault(one.model, []).append(one.task)
    if len(tasks_of) < 2:
        _refuse_one_model(files, found)
    base, *others = tasks_of
    apart = [model for model in others if not set(tasks_of[model]) & set(tasks_of[base])]
    ours = {one.task: known_of(one.items) for one in found if one.model == base}
    for one in found:
        if one.model != base and one.task in ours:
            check_alike(one.task, ours[one.task], known_of(one.items), (base, one.model))
    compared = differences(found, margin, base_last=False)
    if not compared:
        told = "; ".join(f"{model} has {', '.join(tasks)}" for model, tasks in tasks_of.items())
        if len(apart) == len(others):
            raise UserError(f"the models share no task ({told}): give results of the same tasks")
        raise UserError(
            f"the models share no item of a task ({told}): evaluate them on the same tasks, with the same --seed"
        )
    if json_file is not None:
        write_record(json_file, command, began, {"rows": [], "comparisons": plain(compared)})
    console = Console()
    table.print_differences(console, compared, table.names_of(compared))
    for model in apart:
        told = f"{model} is not compared: it has {', '.join(tasks_of[model])}, of which {base} has none"
        console.print(told, style="yellow", markup=False, soft_wrap=True)
    return 0


def _refuse_one_model(files: Sequence[Path], found: Sequence[Result]) -> NoReturn:
    """Raise the error for results that are all of one model, or of none."""
    if not found:
        raise UserError(f"{', '.join(map(str, files))}: no results of a task: evaluate two models on the same tasks")
    model = found[0].model
    if len(files) == 1:
        raise UserError(f"{files[0]} has results of one model only ({model}): give those of another beside it")
    told = "; ".join(f"{file} has {', '.join(one.task for one in results.load(file)) or 'none'}" for file in files)
    raise UserError(
        f"the files share no task ({told}), and all are of the model {model}: give results of two models on the same "
        "tasks"
    )
