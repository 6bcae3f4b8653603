"""Tasks in files: JSON Lines with ``prompt`` and ``solution``, and ``level``, ``chain``, ``task``, ``meta`` if wanted.

``task`` says how an answer is judged: ``math``, ``choice``, ``text``; ``code`` with ``meta`` that has ``tests`` (Python
that calls the answer's functions, and ``setup`` for what it needs); or ``reasoning_gym:NAME`` with the ``meta`` that
such an item has. Where several answers are right, ``solution`` is a list of them. Prompts are taken as they are: what
form the answer shall have stands in them.

The rows without a ``task`` are compared in one way, which their own solutions say: as choices if each is one capital
letter, as mathematics if each is a number, else as text. One way for all, because answers of a single kind can be
voted on, and because a number among words is a word. It is the same whatever the other rows declare and however many
rows are asked, and ``MixedTask.notes`` tells it.

A prompt that comes twice, to the letter (white space at its ends aside), is asked once. The second row has to agree in
the solutions or, of code, in the tests: whether one of two is wrong, or both are right, nobody could say.
"""

import json
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from qad.errors import UserError
from qad.evals.task import Item, Task
from qad.evals.tasks import procedural, programs
from qad.evals.tasks.forms import AS_GIVEN
from qad.evals.tasks.items import ComparedTask, MixedTask, item_id, mixed
from qad.evals.tasks.rows import read_rows
from qad.final_answer import Kind, number

_KINDS = ("math", "choice", "text")


def _text(row: Mapping[str, Any], column: str, where: str) -> str | None:
    value = row.get(column)
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    raise UserError(f"{where}: `{column}` is {type(value).__name__}; expected a string")


def _accepted(row: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """Return the right answers of a row: of a list each, once."""
    value = row.get("solution")
    if not isinstance(value, list):
        text = _text(row, "solution", where)
        return (text,) if text else ()
    texts = []
    for entry in value:
        if not isinstance(entry, str | int | float) or isinstance(entry, bool) or not str(entry).strip():
            raise UserError(f"{where}: `solution` is a list with {entry!r} in it; expected answers as strings")
        texts.append(str(entry))
    if not texts:
        raise UserError(f"{where}: `solution` is an empty list; expected a right answer, or several")
    return tuple(dict.fromkeys(texts))


def _prompt(row: Mapping[str, Any], where: str) -> str:
    value = row.get("prompt")
    if isinstance(value, list):
        # A conversation of one message says the same as its text.
        if len(value) != 1 or not isinstance(value[0], dict) or value[0].get("role") != "user":
            raise UserError(f"{where}: `prompt` is a conversation; expected one message of the user, or a string")
        value = value[0].get("content")
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}: `prompt` is missing or empty; expected a string")
    return value


def _level(row: Mapping[str, Any], where: str) -> int | None:
    value = row.get("level")
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    raise UserError(f"{where}: `level` is {value!r}; expected a whole number")


def _meta(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    value = row.get("meta") or {}
    if not isinstance(value, dict):
        raise UserError(f"{where}: `meta` is {type(value).__name__}; expected an object")
    return value


def _guessed(solutions: Sequence[str]) -> Kind:
    """Return how solutions are compared where nobody says it."""
    if all(len(solution) == 1 and "A" <= solution <= "Z" for solution in solutions):
        return "choice"
    return "math" if all(number(solution) is not None for solution in solutions) else "text"


_SAID = {
    "choice": "choices (their solutions are single capital letters)",
    "math": "mathematics (their solutions are numbers)",
    "text": "text (their solutions are neither all capital letters nor all numbers)",
}


def load(path: Path, *, limit: int | None = None) -> MixedTask:
    """Return the rows of a file as a task: the first ``limit`` that ask something new.

    Raises:
        UserError: The file is unreadable, a row lacks a column, has a value of another type or an unknown ``task``, or
            contradicts another row.
    """
    rows = read_rows(path)
    solutions = [_accepted(row, where) for where, row in rows]
    # A row that says nothing has no task, or an empty one, as spreadsheets write it.
    undeclared = [row.get("task") in (None, "") for _, row in rows]
    # Of the whole file: a limit shall not change how the first rows are compared.
    guessed = _guessed([text for texts, free in zip(solutions, undeclared, strict=True) if free for text in texts])
    named = [guessed if free else row["task"] for (_, row), free in zip(rows, undeclared, strict=True)]
    first_rows = _first_rows(rows, solutions, named)
    asked = first_rows[:limit]
    items: list[Item] = []
    judges: dict[str, Task] = {}
    for index in asked:
        where, row = rows[index]
        prompt = _prompt(row, where)
        item = Item(
            id=item_id(index, prompt),
            prompt=prompt,
            solution=next(iter(solutions[index]), ""),
            others=solutions[index][1:],
            level=_level(row, where),
            chain=_text(row, "chain", where),
            meta=_meta(row, where),
        )
        judges[item.id] = _judge(named[index], item, where)
        items.append(item)
    notes = []
    if count := sum(undeclared[index] for index in asked):
        notes.append(f"{count} of {len(asked)} rows have no `task`: compared as {_SAID[guessed]}")
    if repeated := len(rows) - len(first_rows):
        notes.append(f"{repeated} of {len(rows)} rows have prompt and solution of an earlier row: left out")
    return mixed(path.stem, items, judges, notes)


def _first_rows(
    rows: Sequence[tuple[str, Mapping[str, Any]]], solutions: Sequence[tuple[str, ...]], named: Sequence[Any]
) -> list[int]:
    """Return the indices of the rows whose prompt no earlier row has.

    Raises:
        UserError: Two rows have one prompt, and an answer that is right by one may be wrong by the other.
    """
    found: dict[str, int] = {}
    for index, (where, row) in enumerate(rows):
        earlier = found.setdefault(_prompt(row, where).strip(), index)
        fault = remedy = None
        if named[index] != named[earlier]:
            fault = f"another `task` ({named[earlier]!r} and {named[index]!r})"
        elif named[index] == "code":
            if _judged_code(*rows[index]) != _judged_code(*rows[earlier]):
                fault = "other tests in `meta`"
        elif {text.strip() for text in solutions[index]} != {text.strip() for text in solutions[earlier]}:
            both = dict.fromkeys((*solutions[earlier], *solutions[index]))
            fault = f"another `solution` ({_short(solutions[earlier])} and {_short(solutions[index])})"
            if all(map(len, both)):
                remedy = f'; if each is right, keep one row with all of them as a list, "solution": {_listed(both)}'
        if fault:
            raise UserError(
                f"{rows[earlier][0]} and {rows[index][0]} have the same prompt and {fault}: keep one of them"
                f"{remedy or ''}"
            )
    return list(found.values())


def _judged_code(where: str, row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in _meta(row, where).items() if name in ("tests", "setup", "head", "name")}


def _short(accepted: Sequence[str]) -> str:
    told = repr(accepted[0]) if len(accepted) == 1 else repr(list(accepted)) if accepted else "none"
    return textwrap.shorten(told, 60, placeholder="…")


def _listed(texts: Iterable[str]) -> str:
    return textwrap.shorten(json.dumps(list(texts), ensure_ascii=False), 120, placeholder="…")


def _judge(judge: Any, item: Item, where: str) -> Task:
    if isinstance(judge, str) and judge in _KINDS:
        if not item.solution:
            raise UserError(f"{where}: `solution` is missing; expected the right answer")
        return ComparedTask(str(judge), cast(Kind, judge), (), AS_GIVEN)
    if judge == "code":
        if not item.meta.get("tests"):
            raise UserError(f"{where}: a row of code needs `meta` with tests")
        return programs.ProgramTask("code", ())
    if isinstance(judge, str) and judge.startswith(procedural.PREFIX):
        if not {"dataset", "level", "seed", "index"} <= item.meta.keys():
            raise UserError(f"{where}: a row of {judge} needs `meta` with dataset, level, seed and index")
        return procedural.judge(judge)
    raise UserError(f"{where}: unknown `task` {judge!r}; known: {', '.join(_KINDS)}, code, {procedural.PREFIX}NAME")
