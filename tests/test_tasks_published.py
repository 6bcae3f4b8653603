"""Published sets in their published shapes, in rows that are made up."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qad.errors import UserError
from qad.evals import tasks
from qad.evals.tasks import published
from tests.helpers_rows import write_rows

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
