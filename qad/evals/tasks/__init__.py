"""The tasks by their names, and files of questions.

A name stands for a published set (``gsm8k``, ``ifeval``, …), for a task of reasoning-gym at a level of difficulty
(``reasoning_gym:chain_sum@2``), or for a file (``FILE.jsonl``). In each, a question that comes twice is asked once: in
published sets with its first solution, white space and case aside, in files to the letter and where both solutions
agree.
"""

from pathlib import Path

from qad.errors import UserError, unknown_name
from qad.evals.task import Task
from qad.evals.tasks import following, jsonl, procedural, programs, published
from qad.evals.tasks.items import distinct

__all__ = ["distinct", "load", "names"]


def names() -> list[str]:
    """Return every name that ``load`` knows, without levels and files."""
    return [*following.names(), *published.names(), *programs.names(), *procedural.names()]


def load(name: str, *, path: Path | None = None, limit: int | None = None, seed: int = 0, split: str = "test") -> Task:
    """Return a task by its name.

    Args:
        name: One of ``names()``, with ``@LEVEL`` if it is one of reasoning-gym, or a file that ends in ``.jsonl``.
        path: A file with the rows of a published set, in its shape, to be read instead of the hub; or a folder with
            a file for each split.
        limit: How many items at most.
        seed: Of generated items, and of the order of choices.
        split: ``test``, or ``train``: other questions than those of ``test``.

    Raises:
        UserError: An unknown name, a file that cannot be read or has other columns, no network, or a missing package.
    """
    if split not in ("test", "train"):
        raise UserError(f"unknown split {split!r}: take test or train")
    if limit is not None and limit < 1:
        raise UserError(f"a limit of {limit} leaves no item: take 1 or more")
    if name.startswith(procedural.PREFIX):
        return procedural.load(name, limit=limit, seed=seed, split=split)
    if name.endswith(".jsonl"):
        if not Path(name).is_file():
            raise UserError(f"the file {name} does not exist: check the path")
        return jsonl.load(Path(name), limit=limit)
    if name in following.names():
        return following.load(name, path, limit, split)
    if name in programs.names():
        return programs.load(name, path, limit, split)
    if name in published.names():
        return published.load(name, path, limit, seed, split)
    known = [each for each in names() if not each.startswith(procedural.PREFIX)]
    raise unknown_name("task", name, [*known, f"{procedural.PREFIX}NAME", "FILE.jsonl"])
