"""Tasks whose answers are programs: they are run, in a sandbox."""

import base64
import json
import pickle
import zlib
from pathlib import Path
from typing import Any

import pytest

from qad.evals import sandbox, tasks
from qad.evals.tasks import programs
from tests.helpers_rows import write_rows

needs_sandbox = pytest.mark.skipif(sandbox.refusal() is not None, reason=str(sandbox.refusal()))


def code_block(source: str) -> str:
    return f"Here it is:\n\n```python\n{source}\n```\nIt works."


@needs_sandbox
def test_humaneval_completes_or_replaces_the_function(tmp_path: Path) -> None:
    row = {
        "task_id": "HumanEval/999",
        "entry_point": "twice",
        "canonical_solution": "    return [x, x]\n",
        "prompt": 'from typing import List\n\n\ndef twice(x: int) -> List[int]:\n    """Say it twice."""\n',
        "test": "def check(candidate):\n    assert candidate(3) == [3, 3]\n",
    }
    task = tasks.load("humaneval", path=write_rows(tmp_path / "rows.jsonl", [row]))
    (item,) = task.items
    assert "from typing import List" in item.prompt
    # The whole function, without the import that the prompt has, and its body alone.
    for source in ("def twice(x: int) -> List[int]:\n    return [x] * 2", "    return [x, x]", item.solution):
        assert task.score(item, code_block(source)).correct, source
    score = task.score(item, code_block("def twice(x):\n    return x"))
    assert (score.correct, score.format_ok) == (False, True)
    assert "candidate(3)" in score.detail
    assert task.score(item, "I do not know.").detail == "no code found"
    assert not task.score(item, "I do not know.").format_ok


@needs_sandbox
def test_mbpp_runs_its_tests(tmp_path: Path) -> None:
    row = {
        "task_id": 11,
        "text": "Remove the first and last occurrence.",
        "code": "def remove(s, c):\r\n  return s",
        "test_list": ['assert remove("hello", "l") == "heo"'],
        "test_setup_code": "",
        "challenge_test_list": [],
    }
    sanitized = {key: value for key, value in row.items() if key != "text"} | {"prompt": row["text"]}
    for shape in (row, sanitized):
        task = tasks.load("mbpp", path=write_rows(tmp_path / "rows.jsonl", [shape]))
        (item,) = task.items
        assert 'assert remove("hello", "l") == "heo"' in item.prompt
        assert task.score(item, code_block("def remove(s, c):\n    return s.replace(c, '')")).correct
        assert not task.score(item, code_block(item.solution)).correct


def contest_row(**changes: Any) -> dict[str, Any]:
    private = [{"input": "4\n1 2 3 4\n", "output": "10\n", "testtype": "stdin"}]
    packed = base64.b64encode(zlib.compress(pickle.dumps(json.dumps(private)))).decode()
    return {
        "question_title": "Sum",
        "question_content": "Print the sum.",
        "platform": "atcoder",
        "question_id": "abc_a",
        "contest_id": "abc",
        "contest_date": "2025-01-04T00:00:00",
        "starter_code": "",
        "difficulty": "easy",
        "public_test_cases": json.dumps([{"input": "2\n1 2\n", "output": "3.0\n", "testtype": "stdin"}]),
        "private_test_cases": packed,
        "metadata": "{}",
    } | changes


@needs_sandbox
def test_livecodebench_compares_output_and_results(tmp_path: Path) -> None:
    task = tasks.load("livecodebench", path=write_rows(tmp_path / "rows.jsonl", [contest_row()]))
    (item,) = task.items
    assert item.level == 0
    assert task.score(item, code_block("n = int(input())\nprint(sum(map(int, input().split())))")).correct
    assert task.score(item, code_block("print(3)")).detail == "test 2: wrong output"
    assert "NameError" in task.score(item, code_block("print(x)")).detail
    assert not task.score(item, code_block("print(3)\nexit(1)")).correct
    functional = contest_row(
        starter_code="class Solution:\n    def add(self, a: List[int], b: int) -> List[int]:\n        ",
        public_test_cases=json.dumps([{"input": "[1, 2]\n3", "output": "[4, 5]", "testtype": "functional"}]),
        private_test_cases=json.dumps([{"input": "[]\n3", "output": "[]", "testtype": "functional"}]),
        metadata=json.dumps({"func_name": "add"}),
        difficulty="hard",
    )
    task = tasks.load("livecodebench", path=write_rows(tmp_path / "more.jsonl", [functional]))
    (item,) = task.items
    assert item.level == 2
    head = "class Solution:\n    def add(self, a: List[int], b: int) -> List[int]:\n        return "
    assert task.score(item, code_block(head + "tuple(x + b for x in a)")).correct
    assert "test 2" in task.score(item, code_block(head + "[x + b for x in a] or None")).detail


def test_tests_of_contests_are_text_and_no_code() -> None:
    class Attack:
        def __reduce__(self) -> tuple[Any, ...]:
            return print, ("attack",)

    packed = base64.b64encode(zlib.compress(pickle.dumps(Attack()))).decode()
    with pytest.raises(pickle.UnpicklingError, match="is no text"):
        programs.contest_tests(packed)


@needs_sandbox
def test_a_file_may_hold_tests_of_code(tmp_path: Path) -> None:
    rows = [{"prompt": "Write f.", "task": "code", "meta": {"tests": ["assert f(g) == 2"], "setup": "g = 1"}}]
    task = tasks.load(str(write_rows(tmp_path / "rows.jsonl", rows)))
    assert task.kind == "code"
    assert task.score(task.items[0], code_block("def f(x):\n    return x + 1")).correct
    assert not task.score(task.items[0], code_block("def f(x):\n    return x")).correct


@needs_sandbox
@pytest.mark.parametrize(
    ("before", "argument"),
    [("", "lambda x: x"), ("def g(x): return x\n", "g"), ("class A: pass\n", "[A()]"), ("", "(x for x in [1])")],
)
def test_tests_that_pass_functions_are_said_to_judge_nothing(before: str, argument: str, tmp_path: Path) -> None:
    # Tests may catch errors of the program, but this is none.
    tests = f"{before}try:\n    f({argument})\nexcept Exception:\n    pass\n"
    rows = [{"prompt": "Write f.", "task": "code", "meta": {"tests": tests}}]
    task = tasks.load(str(write_rows(tmp_path / "rows.jsonl", rows)))
    found = task.score(task.items[0], code_block("def f(x):\n    return 1"))
    assert not found.correct
    assert found.detail.startswith("cannot be judged: the tests pass f what is no plain data (")
