"""Results that were made before: what ``qad eval --json`` wrote, or a file of samples."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qad.errors import UserError
from qad.evals.item_results import read_results
from qad.evals.metrics import ItemResult
from qad.evals.task import JUDGING

FORMAT = 1


@dataclass(frozen=True)
class Result:
    """A model on a task.

    Attributes:
        model, task: Their names.
        items: What became of each item.
    """

    model: str
    task: str
    items: list[ItemResult]


def load(path: Path) -> list[Result]:
    """Return the results in a file.

    Args:
        path: What ``--json`` wrote, or a file of samples (``.jsonl``).

    Raises:
        UserError: It is missing, damaged, or neither.
    """
    if path.suffix == ".jsonl":
        return [Result(*read_results(path))]
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): check the path") from error
    except ValueError as error:
        raise UserError(f"{path} is no JSON: give what `qad eval --json` wrote, or a .jsonl of samples") from error
    if not isinstance(stored, dict) or stored.get("kind") != "eval":
        raise UserError(f"{path} is no result of an evaluation: give what `qad eval --json` wrote, or samples")
    if stored.get("format") != FORMAT:
        raise UserError(
            f"{path} has format {stored.get('format')!r}, not {FORMAT}: make it again with `qad eval --json`"
        )
    if stored.get("judging") != JUDGING:
        raise UserError(
            f"{path} was judged by the rules of another qad: give the `qad eval` that made it once more, which judges "
            "the kept texts anew and asks no model"
        )
    try:
        loaded = [Result(row["model"], row["task"], [_item(one) for one in row["per_item"]]) for row in stored["rows"]]
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}): make it again with `qad eval --json`") from error
    if any(not item.judge for one in loaded for item in one.items):
        raise UserError(
            f"{path} does not tell what judged its items, as results of an earlier qad: give the `qad eval` that made "
            "it once more, which asks no model for kept answers"
        )
    return loaded


def _item(values: dict[str, Any]) -> ItemResult:
    fixed: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    return ItemResult(**fixed)


def of_one_model(path: Path) -> dict[str, list[ItemResult]]:
    """Return the results of the one model in a file, by task.

    Raises:
        UserError: As ``load``, or there are several models.
    """
    found = load(path)
    models = sorted({one.model for one in found})
    if len(models) != 1:
        raise UserError(f"{path} has results of {len(models)} models ({', '.join(models)}): give those of one")
    return {one.task: one.items for one in found}


def load_all(paths: Sequence[Path]) -> list[Result]:
    """Return the results of several files; models that share a name are told apart by their files.

    Raises:
        UserError: As ``load``.
    """
    loaded = [(path, one) for path in paths for one in load(path)]
    homes: dict[tuple[str, str], list[Path]] = {}
    for path, one in loaded:
        homes.setdefault((one.model, one.task), []).append(path)
    shared = {model for (model, _), files in homes.items() if len(files) > 1}
    return [
        Result(f"{one.model} ({path})" if one.model in shared else one.model, one.task, one.items)
        for path, one in loaded
    ]
