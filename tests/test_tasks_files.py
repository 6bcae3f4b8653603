"""Tasks from files of the user's own: how they are judged, and which are refused."""

from pathlib import Path
from typing import Any

import pytest

from qad.errors import UserError
from qad.evals import tasks
from qad.evals.samples import fingerprint
from tests.helpers_rows import write_rows


def test_a_file_says_how_it_is_judged_by_its_solutions(tmp_path: Path) -> None:
    rows = [{"prompt": f"What is {n} + {n}?", "solution": 2 * n, "level": n, "chain": "so"} for n in range(3)]
    task = tasks.load(str(write_rows(tmp_path / "sums.jsonl", rows)))
    assert (task.name, task.kind) == ("sums", "math")
    assert [item.level for item in task.items] == [0, 1, 2]
    assert task.items[0].chain == "so"
    assert task.score(task.items[2], "<think>5?</think> It is \\boxed{4.0}").correct
    assert not task.score(task.items[2], "\\boxed{5}").correct
    letters = [{"prompt": f"{n}: A or B?", "solution": "AB"[n % 2]} for n in range(5)]
    task = tasks.load(str(write_rows(tmp_path / "letters.jsonl", letters)), limit=3)
    assert task.kind == "choice"
    assert len(task.items) == 3
    words = [{"prompt": [{"role": "user", "content": "Capital of France?"}], "solution": "Paris"}]
    task = tasks.load(str(write_rows(tmp_path / "words.jsonl", words)))
    assert task.kind == "text"
    assert task.items[0].prompt == "Capital of France?"
    assert task.score(task.items[0], "The answer is Paris.").correct


def test_a_file_asks_nothing_twice_but_what_differs_to_the_letter(tmp_path: Path) -> None:
    prompts = ["Is 'A' a capital?", "Is 'a' a capital?", " Is 'A' a capital?\n", "Is 'A'  a capital?", "Is 'B' one?"]
    rows = [{"prompt": text, "solution": answer} for text, answer in zip(prompts, "ynyyy", strict=True)]
    path = str(write_rows(tmp_path / "rows.jsonl", rows))
    task = tasks.load(path)
    assert [item.prompt for item in task.items] == [prompts[index] for index in (0, 1, 3, 4)]
    assert [item.solution for item in task.items] == list("ynyy")
    assert "1 of 5 rows have prompt and solution of an earlier row: left out" in task.notes
    # The limit counts what is asked.
    assert [item.prompt for item in tasks.load(path, limit=3).items] == [prompts[index] for index in (0, 1, 3)]


def test_each_of_several_solutions_is_right(tmp_path: Path) -> None:
    rows = [
        {"prompt": "A root of x^2 = 4?", "solution": [2, "-2"]},
        {"prompt": "A root of x^2 = 9?", "solution": "3"},
    ]
    path = write_rows(tmp_path / "roots.jsonl", rows)
    task = tasks.load(str(path))
    first, second = task.items
    # All of them say how they are compared.
    assert task.kind == "math"
    assert (first.accepted, second.accepted) == (("2", "-2"), ("3",))
    for answer, right in (("2", True), ("-2.0", True), ("3", False)):
        assert task.score(first, f"\\boxed{{{answer}}}").correct == right
    assert task.score(first, "\\boxed{3}").detail == "expected 2 or -2"
    # Answers that were judged by other solutions are those of another item; of a single one they are as they were.
    write_rows(path, [{**rows[0], "solution": ["2"]}, rows[1]])
    again = tasks.load(str(path)).items
    assert fingerprint(again[0]) != fingerprint(first)
    write_rows(path, [{**rows[0], "solution": "2"}, rows[1]])
    assert fingerprint(tasks.load(str(path)).items[0]) == fingerprint(again[0])
    words = [{"prompt": "A sea?", "solution": ["North Sea", "7"]}]
    assert tasks.load(str(write_rows(path, words))).kind == "text"


TESTED = {"prompt": "f", "task": "code", "meta": {"tests": "f(1)"}}


@pytest.mark.parametrize(
    ("first", "second", "fault"),
    [
        (
            {"prompt": "a", "solution": "4"},
            {"prompt": "a ", "solution": 5},
            r"another `solution` \('4' and '5'\): keep one of them; if each is right, .* a list, .*: \[\"4\", \"5\"\]$",
        ),
        ({"prompt": "a", "solution": "4"}, {"prompt": "a", "solution": [5, "4"]}, "another `solution`"),
        ({"prompt": "a", "solution": ["4", "5"]}, {"prompt": "a", "solution": [5, "4", "4 "]}, None),
        ({"prompt": "a", "solution": "4", "task": "text"}, {"prompt": "a", "solution": "4"}, "another `task`"),
        (TESTED, {**TESTED, "meta": {"tests": "f(2)"}}, "other tests in `meta`"),
        (TESTED, {**TESTED, "solution": "f = abs", "meta": {"tests": "f(1)", "from": "me"}}, None),
        ({"prompt": "a", "solution": "4"}, {"prompt": "a", "solution": " 4 ", "level": 2, "task": "math"}, None),
    ],
)
def test_rows_that_contradict_one_another_are_refused(
    first: dict[str, Any], second: dict[str, Any], fault: str | None, tmp_path: Path
) -> None:
    between = {"prompt": "b", "solution": "4", "task": "math"}
    path = str(write_rows(tmp_path / "rows.jsonl", [first, between, second]))
    if fault is None:
        assert len(tasks.load(path).items) == 2
        return
    # Whatever is asked of the file: the row that is asked is as doubtful as the other.
    for limit in (None, 1):
        with pytest.raises(UserError, match=f"rows.jsonl, row 1 and .*, row 3 have the same prompt and {fault}"):
            tasks.load(path, limit=limit)


NUMBERS, LETTERS, WORDS = ["4", "1/2"], ["A", "C"], ["Paris", "7"]
SAID = {"math": "as mathematics (their", "choice": "as choices (their", "text": "as text (their"}


@pytest.mark.parametrize(
    ("declared", "undeclared", "kind"),
    [
        ([], NUMBERS, "math"),
        ([], LETTERS, "choice"),
        ([], WORDS, "text"),
        ([], [*NUMBERS, *LETTERS], "text"),
        # Whatever other rows declare, and whatever their solutions are.
        ([("text", "Paris")], NUMBERS, "math"),
        ([("text", "Paris"), ("math", "4")], LETTERS, "choice"),
        ([("math", "4"), ("choice", "A")], WORDS, "text"),
        ([("choice", "B")], NUMBERS, "math"),
    ],
)
def test_rows_that_declare_nothing_are_judged_by_themselves(
    declared: list[tuple[str, str]], undeclared: list[str], kind: str, tmp_path: Path
) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": f"Declared {n}?", "solution": solution, "task": judge}
        for n, (judge, solution) in enumerate(declared)
    ]
    # Nothing is said in three ways.
    silent: list[dict[str, Any]] = [{}, {"task": None}, {"task": ""}]
    rows += [{"prompt": f"Free {n}?", "solution": text, **silent[n % 3]} for n, text in enumerate(undeclared)]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    task = tasks.load(str(file))
    assert [task.judge(item) for item in task.items] == [*(judge for judge, _ in declared), *[kind] * len(undeclared)]
    (note,) = task.notes
    assert f"{len(undeclared)} of {len(rows)} rows have no `task`: compared {SAID[kind]}" in note
    # Fewer rows are judged in the same way: by all that the file holds.
    first = tasks.load(str(file), limit=len(declared) + 1)
    assert [first.judge(item) for item in first.items] == [*(judge for judge, _ in declared), kind]
    assert f"1 of {len(declared) + 1} rows" in first.notes[0]
    if declared:
        assert tasks.load(str(file), limit=len(declared)).notes == []


def test_a_text_that_was_cut_off_is_judged_by_what_it_marks(tmp_path: Path) -> None:
    rows = [
        {"prompt": "2 + 2?", "solution": "4", "task": "math"},
        {"prompt": "Which?", "solution": "B", "task": "choice"},
    ]
    judged = tasks.load(str(write_rows(tmp_path / "rows.jsonl", rows)))
    number, letter = judged.items
    counting = tasks.load("reasoning_gym:gcd", limit=1)
    (gcd,) = counting.items
    for task, item, bare in (
        (judged, number, "2 + 2 = 4"),
        (judged, letter, "so it is (B)"),
        (counting, gcd, f"it is {gcd.solution}"),
    ):
        assert task.score(item, bare).correct
        for reason in ("length", "context"):
            score = task.score(item, bare, reason)
            assert (score.correct, score.answer, score.detail) == (False, None, "cut off before an answer")
            assert task.score(item, f"It is \\boxed{{{item.solution}}}. To check", reason).correct


def test_a_file_of_items_of_reasoning_gym_is_judged_by_its_scorer(tmp_path: Path) -> None:
    source = tasks.load("reasoning_gym:countdown@0", limit=2, seed=5)
    rows = [
        {"prompt": item.prompt, "solution": item.solution, "task": source.name, "meta": dict(item.meta)}
        for item in source.items
    ] + [{"prompt": "1 + 1?", "solution": "2", "task": "math"}]
    task = tasks.load(str(write_rows(tmp_path / "mixed.jsonl", rows)))
    assert task.kind is None
    for item in task.items[:2]:
        # Another expression than the package's: only its scorer can tell that it is right.
        assert task.score(item, f"\\boxed{{({item.solution}) + 0 * 0}}").correct is False
        assert task.score(item, f"\\boxed{{({item.solution})}}").correct
    assert task.score(task.items[2], "\\boxed{2}").correct


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("[1]\n", "row 1 is list"),
        ('{"prompt": "a", "solution": "b"}\n{"prompt"\n', "row 2: invalid JSON"),
        ('{"prompt": "a\tb"}\n', r"row 1: invalid JSON \(Invalid control character at column 14\)"),
        ('{"question": "a"}\n', "`prompt` is missing"),
        ('{"prompt": "a"}\n', "`solution` is missing"),
        ('{"prompt": "a", "solution": {"a": 1}}\n', "`solution` is dict"),
        ('{"prompt": "a", "solution": []}\n', "`solution` is an empty list"),
        ('{"prompt": "a", "solution": ["b", null]}\n', "`solution` is a list with None in it"),
        ('{"prompt": "a", "solution": ["b", " "]}\n', "`solution` is a list with ' ' in it"),
        ('{"prompt": "a", "solution": "b", "level": "hard"}\n', "`level` is 'hard'"),
        ('{"prompt": "a", "solution": "b", "task": "maths"}\n', "unknown `task` 'maths'"),
        ('{"prompt": "a", "solution": "b", "task": ["math"]}\n', "unknown `task` .'math'."),
        ('{"prompt": "a", "solution": "b", "task": false}\n', "unknown `task` False"),
        ('{"prompt": "a", "solution": "b", "task": "reasoning_gym:gcd"}\n', "needs `meta`"),
        ('{"prompt": "a", "task": "code"}\n', "needs `meta` with tests"),
        ('{"prompt": [{"role": "system", "content": "a"}], "solution": "b"}\n', "is a conversation"),
        ("\xff\xfe", "not UTF-8"),
    ],
)
def test_files_that_are_no_task_are_refused(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=message):
        tasks.load(str(file))
