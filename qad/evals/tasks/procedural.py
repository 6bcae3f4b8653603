"""Every task of reasoning-gym: endless questions that a program makes and judges, at levels of difficulty.

``reasoning_gym:chain_sum`` is the task as the package configures it; ``reasoning_gym:chain_sum@2`` is level 2 of its
curriculum, counted from 0. A level holds the questions of that level alone, not the easier ones too, so that accuracy
by level says how a model's ability falls.

The package's scorers give partial credit; right means at least 0.999 of it. Three things are not left to the package:

- An item depends on seed + index, so that two neighbouring seeds share all items but one. Seeds are spread here.
- The items of some tasks depend on Python's hash seed, which differs from process to process: those are made in a
  process with a fixed one.
- Some scorers hand a model's answer to ``eval`` or to sympy, which calls ``eval``. See ``guard``.
"""

import contextlib
import functools
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qad.errors import UserError, unknown_name
from qad.evals.task import Item, Score
from qad.evals.tasks.forms import BOXED, BOXED_TEXT, Form
from qad.evals.tasks.guard import harmless
from qad.evals.tasks.items import CUT_OFF, NO_ANSWER, digest, distinct, item_id
from qad.final_answer import Kind, answer_of, extract

PREFIX = "reasoning_gym:"
_ENOUGH = 0.999
_SHOWN = 80  # characters of a solution, as evidence
_ITEMS = 100  # where no limit is given
_SPACING = 1_000_003  # between seeds: more items than anybody asks of one
_TRAINING = 500_000  # first index of the training split
_SIZE = 1000  # some tasks make other items if their number is another
_FAILURES = 10  # items in a row that a task cannot make

# It mixes other tasks by a configuration of its own.
_LEFT_OUT = {"composite"}
# What the scorers hand to sympy, of this what may hold calls of functions, and what they hand to eval.
_CALLING = {"simple_integration", "intermediate_integration"}
_PARSED = {*_CALLING, "polynomial_multiplication", "puzzle24", "countdown"}
_EVALUATED = {*_PARSED, "string_insertion", "spiral_matrix", "binary_matrix", "n_queens"}
_HASH_ORDERED = {"isomorphic_strings", "polynomial_multiplication", "ransom_note"}
# Every answer is a number: seen in 30 of each.
_NUMBERS = frozenset(
    [
        "aiw",
        "basic_arithmetic",
        "binary_alternation",
        "chain_sum",
        "circuit_logic",
        "coin_flip",
        "count_bits",
        "count_primes",
        "decimal_arithmetic",
        "decimal_chain_sum",
        "dice",
        "gcd",
        "gsm_symbolic",
        "largest_island",
        "lcm",
        "leg_counting",
        "letter_counting",
        "maze",
        "number_format",
        "number_sequence",
        "products",
        "rectangle_count",
        "rotten_oranges",
        "self_reference",
        "simple_equations",
        "simple_geometry",
    ]
)


def _package() -> Any:
    try:
        import reasoning_gym.factory
    except ImportError as error:
        raise UserError(
            "tasks of reasoning_gym need the package reasoning-gym: run `pip install 'qad[eval]'`"
        ) from error
    return reasoning_gym.factory


def names() -> list[str]:
    """Return the names of all tasks, none where the package is not installed."""
    try:
        factory = _package()
    except UserError:
        return []
    return [PREFIX + name for name in sorted(factory.DATASETS) if name not in _LEFT_OUT]


def _curriculum_configuration(name: str, level: int) -> Any:
    from reasoning_gym.coaching.base_curriculum import DefaultCurriculumContext, RangeAttributeMode

    curriculum = _package().create_curriculum(name)
    curriculum.set_global_level(level)
    return curriculum.generate_configuration(
        {"seed": 0, "size": _SIZE}, DefaultCurriculumContext(mode=RangeAttributeMode.UPPER_BOUND)
    )


@functools.cache
def levels(name: str) -> int:
    """Return how many levels a task (without the prefix) has, 0 if it has no curriculum.

    The levels at the end that change nothing, as where the last two bounds make one interval, are not counted.
    """
    factory = _package()
    if not factory.has_curriculum(name):
        return 0
    count = max(len(attribute.levels) for attribute in factory.create_curriculum(name).attributes.values())
    while count > 1 and _curriculum_configuration(name, count - 1) == _curriculum_configuration(name, count - 2):
        count -= 1
    return count


@functools.lru_cache(maxsize=4)
def _dataset(name: str, level: int | None, seed: int) -> Any:
    factory = _package()
    try:
        if level is None:
            configuration = factory.DATASETS[name][1](seed=seed, size=_SIZE)
        else:
            configuration = replace(_curriculum_configuration(name, level), seed=seed)
        return factory.DATASETS[name][0](configuration)
    except (AssertionError, ValueError) as error:
        raise UserError(
            f"reasoning_gym refuses its own configuration of {_named(name, level)} ({error}): take another level"
        ) from error


def _named(name: str, level: int | None) -> str:
    return name if level is None else f"{name}@{level}"


def _make(name: str, level: int | None, seed: int, index: int) -> dict[str, Any]:
    """Return one entry as the package makes it. Blocks of indices have seeds of their own: some tasks make a list."""
    block, inside = divmod(index, _SIZE)
    dataset = _dataset(name, level, (seed * _SPACING + block * _SIZE) % 2**31)
    # A compiler within the package prints its progress.
    with contextlib.redirect_stdout(io.StringIO()):
        return dataset[inside]


def _entries(name: str, level: int | None, seed: int, first: int, count: int) -> list[tuple[int, dict[str, Any]]]:
    """Return (index, entry) of so many items from an index on. An index of which the task makes nothing is left out."""
    if name in _HASH_ORDERED and sys.flags.hash_randomization:
        return _entries_elsewhere(name, level, seed, first, count)
    entries: list[tuple[int, dict[str, Any]]] = []
    failures = 0
    index = first
    while len(entries) < count:
        try:
            entries.append((index, _make(name, level, seed, index)))
            failures = 0
        except UserError:
            raise
        except Exception as error:  # whatever a generator raises that found no item
            failures += 1
            if failures == _FAILURES:
                raise UserError(
                    f"reasoning_gym makes no items of {_named(name, level)} ({str(error)[:100]}): take another level"
                ) from error
        index += 1
    return entries


def _entries_elsewhere(
    name: str, level: int | None, seed: int, first: int, count: int
) -> list[tuple[int, dict[str, Any]]]:
    """Do what ``_entries`` does in a process in which strings have the same hash on every run."""
    wanted = json.dumps([name, level, seed, first, count])
    code = (
        "import json, sys; from qad.evals.tasks.procedural import _entries;"
        "made = _entries(*json.loads(sys.argv[1])); print(json.dumps(made))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, wanted],
        env={**os.environ, "PYTHONHASHSEED": "0", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise UserError(f"making items of {_named(name, level)} failed: {done.stderr.strip().splitlines()[-1]}")
    return [(index, entry) for index, entry in json.loads(done.stdout)]


def entry(meta: Mapping[str, Any]) -> dict[str, Any]:
    """Return the package's entry of an item by its ``meta``."""
    ((_, made),) = _entries(meta["dataset"], meta["level"], meta["seed"], meta["index"], 1)
    return made


def score_answer(name: str, answer: str, made: Mapping[str, Any]) -> tuple[float, str]:
    """Return the credit that the package's scorer gives to an answer, and why it could not, if it could not."""
    if name == "game_of_life_halting":
        # The scorer takes every answer for right: the text "False" is true as well.
        return float(answer.strip().lower() == str(made["answer"]).lower()), ""
    if name == "puzzle24":
        # The scorer takes any four numbers that make 24, not those that were given.
        given = sorted(made["metadata"]["numbers"])
        if sorted(int(found) for found in re.findall(r"\d+", answer)) != given:
            return 0.0, f"does not use {given}"
    if name in _EVALUATED and not harmless(answer, calls=name in _CALLING):
        # None of these scorers gives full credit to anything but the very answer.
        return float(name not in _PARSED and answer == made["answer"]), "not an expression"
    try:
        # Some of them print.
        with contextlib.redirect_stdout(io.StringIO()):
            return float(_dataset(name, None, 0).score_answer(answer, made)), ""
    except Exception as error:  # whatever a scorer raises that was not made for such an answer
        return 0.0, f"{type(error).__name__}: {str(error)[:80]}"


@dataclass(frozen=True)
class ProceduralTask:
    """Items of one task at one level.

    Attributes:
        name: With prefix and level.
        kind: ``math`` where every answer is a number, else ``text``.
        items: The questions.
        dataset: The package's name of the task.
        entries: The package's entries, by item.
    """

    name: str
    kind: Kind
    items: Sequence[Item]
    dataset: str
    entries: Mapping[str, dict[str, Any]]
    notes: Sequence[str] = ()

    def judge(self, item: Item) -> str:
        """Return the task without its level, on which the scorer does not depend."""
        return PREFIX + self.dataset

    def score(self, item: Item, text: str, reason: str = "stop") -> Score:
        """Judge a text by the package's scorer: right means full credit."""
        answer = answer_of(text, reason, self.kind)
        kept = _form(self.dataset).kept_by(text)
        if answer is None:
            return Score(False, None, kept, NO_ANSWER if reason == "stop" else CUT_OFF)
        made = self.entries[item.id] if item.id in self.entries else entry(item.meta)
        credit, failure = score_answer(self.dataset, answer, made)
        if credit < _ENOUGH and made["answer"] is not None:
            # What extraction takes away, such as a full stop at the end, it takes from the package's answer too.
            expected = extract(f"\\boxed{{{made['answer']}}}", self.kind)
            if answer == expected:
                credit, failure = score_answer(self.dataset, str(made["answer"]), made)
        detail = ""
        if credit < _ENOUGH:
            expected = f", expected {item.solution[:_SHOWN]}" if item.solution else ""
            detail = f"{failure or f'credit {credit:.2f}'}{expected}"
        return Score(credit >= _ENOUGH, answer, kept, detail)


def _form(name: str) -> Form:
    return BOXED if name in _NUMBERS else BOXED_TEXT


def parse(name: str) -> tuple[str, int | None]:
    """Return the package's name and the level of ``reasoning_gym:NAME[@LEVEL]``.

    Raises:
        UserError: An unknown task or level.
    """
    dataset, at, told = name.removeprefix(PREFIX).partition("@")
    _package()
    known = [each.removeprefix(PREFIX) for each in names()]
    if dataset not in known:
        raise unknown_name("task of reasoning_gym", dataset, known)
    if not at:
        return dataset, None
    count = levels(dataset)
    if not count:
        raise UserError(f"reasoning_gym gives {dataset} no levels: leave @{told} out")
    if not told.isdecimal() or int(told) >= count:
        raise UserError(f"{dataset} has the levels 0 to {count - 1}, not {told!r}")
    return dataset, int(told)


def _items(dataset: str, level: int | None, seed: int, made: Any) -> list[Item]:
    form = _form(dataset)
    items = []
    for index, each in made:
        prompt = form.ask(each["question"])
        items.append(
            Item(
                id=item_id(f"{seed}-{index}", prompt),
                prompt=prompt,
                solution="" if each["answer"] is None else str(each["answer"]),
                level=level,
                chain=each["metadata"].get("answer_cot"),
                meta={"dataset": dataset, "level": level, "seed": seed, "index": index},
            )
        )
    return items


def load(name: str, *, limit: int | None = None, seed: int = 0, split: str = "test") -> ProceduralTask:
    """Return items of ``reasoning_gym:NAME[@LEVEL]``.

    Questions that come twice, as in small tasks, are asked once, so that there may be fewer items than asked for. The
    split ``train`` holds other questions than ``test`` of the same seed and at most the same limit.

    Args:
        name: With the prefix.
        limit: How many items, 100 if not given.
        seed: Other seeds, other items.
        split: ``test`` or ``train``.

    Raises:
        UserError: An unknown name or level, or the package is not installed.
    """
    dataset, level = parse(name)
    count = limit or _ITEMS
    test = _entries(dataset, level, seed, 0, count)
    made, others = test, []
    if split == "train":
        made, others = _entries(dataset, level, seed, _TRAINING, count), _items(dataset, level, seed, test)
    items = distinct(_items(dataset, level, seed, made), others)
    by_index = dict(made)
    entries = {item.id: by_index[item.meta["index"]] for item in items}
    return ProceduralTask(name, "math" if dataset in _NUMBERS else "text", items, dataset, entries)


def training(name: str, *, seed: int = 0, besides: int) -> Iterator[tuple[Item, dict[str, Any]]]:
    """Yield distinct items to train on, each with the package's entry, until a task has no new ones.

    Args:
        name: With the prefix.
        seed: Other seeds, other items.
        besides: What the test split of seed 0 asks in so many items is left out.

    Raises:
        UserError: See ``load``.
    """
    dataset, level = parse(name)
    tested: list[tuple[int, dict[str, Any]]] = []
    for first in range(0, besides, _SIZE):
        tested += _entries(dataset, level, 0, first, min(_SIZE, besides - first))
    seen = {digest(item.prompt) for item in _items(dataset, level, 0, tested)}
    for first in range(_TRAINING, _SPACING - _SIZE, _SIZE):
        made = _entries(dataset, level, seed, first, _SIZE)
        new = 0
        for item, (_, each) in zip(_items(dataset, level, seed, made), made, strict=True):
            if (key := digest(item.prompt)) not in seen:
                seen.add(key)
                new += 1
                yield item, each
        if not new:
            return


def judge(name: str) -> ProceduralTask:
    """Return a task without items, to judge items that were kept elsewhere by their ``meta``."""
    dataset, _ = parse(name)
    return ProceduralTask(name, "math" if dataset in _NUMBERS else "text", (), dataset, {})
