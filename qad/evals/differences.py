"""Which models are held against which, on which tasks."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from qad.evals.compare import compare
from qad.evals.metrics import ItemResult
from qad.evals.results import Result

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


def plain(compared: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return differences for JSON."""
    return [{**one, "differences": [difference.to_dict() for difference in one["differences"]]} for one in compared]
