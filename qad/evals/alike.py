"""Whether results may be held against each other: of the same questions, and judged alike."""

from collections.abc import Mapping, Sequence

from qad.errors import UserError
from qad.evals.metrics import ItemResult
from qad.evals.samples import fingerprint
from qad.evals.task import Task

Known = Mapping[str, tuple[str, str]]
"""Id of an item -> its fingerprint and what judges it."""


def known_of(items: Sequence[ItemResult]) -> Known:
    """Return what results tell of their items."""
    return {item.id: (item.item, item.judge) for item in items}


def known_of_task(task: Task) -> Known:
    """Return what a task tells of its items."""
    return {item.id: (fingerprint(item), task.judge(item)) for item in task.items}


def check_alike(task: str, ours: Known, theirs: Known, names: tuple[str, str]) -> None:
    """Check that the items which two sides share are the same questions and judged alike.

    Args:
        task: Name of the task.
        ours, theirs: The items of both sides.
        names: What the message calls the sides.

    Raises:
        UserError: Items of one name are different questions, or an answer to the same question may be right for one
            judge and wrong for the other.
    """
    shared = [name for name in ours if name in theirs]
    changed = [name for name in shared if ours[name][0] != theirs[name][0]]
    if changed:
        raise UserError(
            f"{len(changed)} of the {len(shared)} items of {task} that {names[0]} and {names[1]} share have the same "
            f"name and another question or solution ({changed[0]}): both results must be of one version of the task"
        )
    apart = [name for name in shared if ours[name][1] != theirs[name][1]]
    if apart:
        first = apart[0]
        raise UserError(
            f"{len(apart)} of the {len(shared)} items of {task} that {names[0]} and {names[1]} share were judged "
            f"differently ({first}: by {ours[first][1]} for {names[0]}, by {theirs[first][1]} for {names[1]}): give "
            "the `qad eval` of one once more with the task of the other, which judges the kept texts anew and asks no "
            "model"
        )
