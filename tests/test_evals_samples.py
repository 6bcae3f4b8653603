"""Samples on disk: nothing is asked for twice and nothing is lost, whatever ends the program."""

import json
import random
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qad import export
from qad.artifact import open_artifact
from qad.errors import UserError
from qad.evals.item_results import read_results, representative, result_of
from qad.evals.results import load
from qad.evals.runner import Asking, Model, run_task
from qad.evals.samples import Rows, Sample, SampleFile, fingerprint
from qad.evals.setting import Mismatch, Setting, setting_beside
from qad.evals.task import JUDGING, Item, Task
from qad.evals.tasks import load as load_task
from qad.runtimes import Sampling, remote
from tests.helpers_commands import interrupted
from tests.helpers_models import make_artifact
from tests.helpers_rows import write_rows
from tests.helpers_runtimes import needs
from tests.helpers_server import Fault, Script, serving

SETTING = Setting("sums", 0, "tiny", "ab" * 32, 2, {"temperature": 0.6, "seed": 0}, 16, kind="math")
ITEMS = [Item(f"item-{index}", f"{index} + {index}?", str(2 * index)) for index in range(6)]


def sample(item: Item, index: int, *, k: int = 2, correct: bool = True, **changes: Any) -> Sample:
    fields: dict[str, Any] = {
        "id": item.id,
        "task": "sums",
        "model": "tiny",
        "k": k,
        "index": index,
        "text": f'It is\n{item.solution}\u2028 ½ "quoted"',
        "answer": item.solution if correct else "0",
        "correct": correct,
        "format_ok": True,
        "detail": "",
        "level": None,
        "n_tokens": 5,
        "mean_logprob": -0.25,
        "lowest_window_logprob": -0.5,
        "reason": "stop",
        "seconds": 0.5,
        "item": fingerprint(item),
        "judged": f"{JUDGING} math",
    }
    return Sample(**(fields | changes))


def fill(path: Path, items: list[Item]) -> None:
    with SampleFile(path, SETTING) as file:
        for item in items:
            file.append([sample(item, 0), sample(item, 1)])


def test_rows_come_back_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "sums.jsonl"
    fill(path, ITEMS)
    with SampleFile(path, SETTING) as file:
        assert file.cut == 0
        for item in reversed(ITEMS):
            assert file.samples(item) == (sample(item, 0), sample(item, 1))
        assert file.samples(Item("new", "?")) == ()
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [row["text"] for row in rows] == [sample(item, 0).text for item in ITEMS for _ in range(2)]
    # The columns that others read.
    assert list(rows[0]) == [
        *("id", "task", "model", "k", "index", "text", "answer", "correct", "format_ok", "detail", "level", "n_tokens"),
        *("mean_logprob", "lowest_window_logprob", "reason", "seconds", "item", "judged"),
    ]


def test_deliberations_stand_beside_trajectories(tmp_path: Path) -> None:
    path = tmp_path / "sums.jsonl"
    with SampleFile(path, SETTING) as file:
        file.append([sample(ITEMS[0], 0, correct=False), sample(ITEMS[0], 1)])
        file.append([sample(ITEMS[0], 0, k=1, deliberation=True)])
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [row.get("pass") for row in rows] == [None, None, "deliberation"]
    with SampleFile(path, SETTING) as file:
        assert [one.deliberation for one in file.samples(ITEMS[0], deliberation=True)] == [True]
    _, _, (result,) = read_results(path)
    assert (result.correct, result.deliberated) == ((False, True), (True,))


@pytest.mark.parametrize("missing", [1, 7, 150])
def test_a_torn_end_is_cut_off_and_asked_for_again(tmp_path: Path, missing: int) -> None:
    path = tmp_path / "sums.jsonl"
    fill(path, ITEMS[:3])
    whole = path.read_bytes()
    path.write_bytes(whole[:-missing])
    with SampleFile(path, SETTING) as file:
        assert file.cut == 1
        # The row before it is whole, and stays.
        assert file.samples(ITEMS[2]) == (sample(ITEMS[2], 0),)
        file.append([sample(ITEMS[2], 1)])
    assert path.read_bytes() == whole


def test_a_file_that_was_killed_at_its_first_row_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "sums.jsonl"
    fill(path, [])
    path.write_bytes(b'{"id": "item-0", "ta')
    with SampleFile(path, SETTING) as file:
        assert (file.cut, file.samples(ITEMS[0])) == (1, ())
    assert path.read_bytes() == b""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: [lines[0], b"garbage\n", *lines[1:]], "line 2 of .* is damaged"),
        (lambda lines: [lines[0], lines[1][:40], *lines[2:]], "line 2 of .* is damaged"),
        (lambda lines: [*lines, lines[1]], "line 5 of .* is there twice"),
        (lambda lines: [b'{"prompt": "?"}\n', *lines], "is no file of samples"),
    ],
)
def test_damage_is_told_and_left_alone(
    tmp_path: Path, change: Callable[[list[bytes]], list[bytes]], message: str
) -> None:
    path = tmp_path / "sums.jsonl"
    fill(path, ITEMS[:2])
    path.write_bytes(b"".join(change(path.read_bytes().splitlines(keepends=True))))
    before = path.read_bytes()
    with pytest.raises(UserError, match=message):
        SampleFile(path, SETTING)
    assert path.read_bytes() == before


DELIBERATING = replace(SETTING, deliberation={"count": 1, "new_tokens": 16, "budget": None})


@pytest.mark.parametrize(
    ("stored", "changes", "told", "remedy"),
    [
        (SETTING, {"task": "products"}, "the task: stored sums, asked for products", None),
        (SETTING, {"task_seed": 1}, "the task's seed: stored 0, asked for 1", "--seed 0"),
        (SETTING, {"k": 4}, "k: stored 2, asked for 4", "--k 2"),
        (
            SETTING,
            {"kv_type": "q8_0"},
            "the type of the key-value cache: stored f16, asked for q8_0",
            "--kv-type f16",
        ),
        (
            SETTING,
            {"sampling": {"temperature": 1.0, "seed": 0}},
            "the sampling's temperature: stored 0.6, asked for 1.0",
            "--temperature 0.6",
        ),
        (
            SETTING,
            {"sampling": {"temperature": 1.0, "seed": 7}, "task_seed": 7, "new_tokens": 32},
            (
                "the task's seed: stored 0, asked for 7; the sampling's temperature: stored 0.6, asked for 1.0; "
                "the sampling's seed: stored 0, asked for 7; the number of new tokens: stored 16, asked for 32"
            ),
            "--seed 0 --temperature 0.6 --new-tokens 16",
        ),
        (
            SETTING,
            {"sha256": "cd" * 32},
            f"the SHA-256 of the model's file: stored {'ab' * 32}, asked for {'cd' * 32}",
            None,
        ),
        (
            replace(SETTING, served={"address": "http://a/v1", "id": "toy", "size": 1}),
            {"served": {"address": "http://a/v1", "id": "other", "size": 2}},
            "the served model's id: stored toy, asked for other; the served model's size: stored 1, asked for 2",
            None,
        ),
        (
            # Both begin with the same and end with the same: what is shown is what differs.
            replace(SETTING, model=f"{'x' * 80}/four/{'y' * 200}"),
            {"model": f"{'x' * 80}/eight/{'y' * 200}"},
            f"the model's name: stored …{'x' * 11}/four/{'y' * 55}…, asked for …{'x' * 11}/eight/{'y' * 54}…",
            None,
        ),
        (
            DELIBERATING,
            {"deliberation": {"count": 2, "new_tokens": 16, "budget": None}},
            "the deliberation's count: stored 1, asked for 2",
            "--summary-k 1",
        ),
    ],
)
def test_other_settings_are_not_mixed_in_and_the_remedy_works(
    tmp_path: Path, stored: Setting, changes: dict[str, Any], told: str, remedy: str | None
) -> None:
    path = tmp_path / "sums.jsonl"
    with SampleFile(path, stored) as file:
        file.append([sample(ITEMS[0], 0), sample(ITEMS[0], 1)])
    before = path.read_bytes()
    with pytest.raises(Mismatch) as raised:
        SampleFile(path, replace(stored, **changes))
    delete = f"choose another folder with -o, or delete {path} and sums.json"
    again = f"give {remedy} to go on with them, {delete}" if remedy else delete
    assert str(raised.value) == f"{path} has samples of another setting ({told}): {again}"
    assert path.read_bytes() == before
    # What it says to delete suffices.
    path.unlink()
    (tmp_path / "sums.json").unlink()
    SampleFile(path, replace(stored, **changes)).close()


def test_settings_of_before_a_cache_could_be_chosen_are_read(tmp_path: Path) -> None:
    path = tmp_path / "sums.jsonl"
    fill(path, ITEMS[:1])
    beside = json.loads((tmp_path / "sums.json").read_text())
    assert beside["setting"].pop("kv_type") == "f16"
    (tmp_path / "sums.json").write_text(json.dumps(beside))
    with pytest.raises(Mismatch, match="--kv-type f16"):
        SampleFile(path, replace(SETTING, kv_type="q4_0"))
    SampleFile(path, SETTING).close()
    assert setting_beside(path) == SETTING


def test_a_setting_without_an_answer_binds_nobody(tmp_path: Path) -> None:
    SampleFile(tmp_path / "sums.jsonl", SETTING).close()
    with SampleFile(tmp_path / "sums.jsonl", replace(SETTING, k=4)) as file:
        file.append([sample(ITEMS[0], 0, k=4)])
    assert setting_beside(tmp_path / "sums.jsonl").k == 4


def test_deliberations_may_join_later(tmp_path: Path) -> None:
    path = tmp_path / "sums.jsonl"
    fill(path, ITEMS[:1])
    SampleFile(path, DELIBERATING).close()
    SampleFile(path, SETTING).close()
    assert setting_beside(path) == DELIBERATING


def test_a_changed_item_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "sums.jsonl"
    fill(path, ITEMS[:1])
    with (
        SampleFile(path, SETTING) as file,
        pytest.raises(UserError, match="another item 'item-0': the task has changed"),
    ):
        file.samples(replace(ITEMS[0], prompt="0 - 0?"))


def test_samples_without_their_setting_are_not_trusted(tmp_path: Path) -> None:
    path = tmp_path / "sums.jsonl"
    fill(path, ITEMS[:1])
    (tmp_path / "sums.json").write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        SampleFile(path, SETTING)
    (tmp_path / "sums.json").unlink()
    with pytest.raises(UserError, match="is missing, which says what sums.jsonl was made with"):
        SampleFile(path, SETTING)
    with pytest.raises(UserError, match="keep both files together"):
        load(path)


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "sums.jsonl"
    with SampleFile(path, SETTING), pytest.raises(UserError, match="being written by another qad eval"):
        SampleFile(path, SETTING)
    SampleFile(path, SETTING).close()


def test_a_full_disk_costs_what_does_not_fit_and_nothing_else(small_disk: Path) -> None:
    path = small_disk / "sums.jsonl"
    big = "x" * 60_000
    items = [Item(f"big-{index}", "?") for index in range(100)]
    with SampleFile(path, SETTING) as file:
        for item in items[:4]:
            file.append([sample(item, index, text=big) for index in range(2)])
        with pytest.raises(UserError, match="the disk is full"):
            file.append([sample(items[4], index, text=big) for index in range(2)])
    with path.open("rb") as opened:
        rows = Rows(opened, path)
        assert (rows.torn, len(rows.ids())) == (0, 4)
    with SampleFile(path, SETTING) as file:
        assert len(file.samples(Item("big-3", "?"))) == 2
        file.append([sample(ITEMS[0], index) for index in range(2)])


def test_votes_of_stored_samples() -> None:
    item = ITEMS[3]
    made = [
        sample(item, 0, k=4, correct=False, lowest_window_logprob=-0.1),
        sample(item, 1, k=4, correct=True, lowest_window_logprob=-3.0),
        sample(item, 2, k=4, correct=True, answer="6.0", lowest_window_logprob=-3.0),
        # Cut off before an answer: it votes for none and is not the best, however sure.
        sample(item, 3, k=4, correct=False, answer=None, reason="length", lowest_window_logprob=-0.01),
    ]
    found = result_of(made, (), "math")
    # Two for 6, one for 0; by weight 0 has e^-0.1 against 2 e^-3.
    assert found.chosen == {"vote": True, "weighted": False, "best": False}
    assert found.share == 0.5
    assert (found.answered, found.cut_off) == ((True, True, True, False), (False, False, False, True))
    assert found.seconds == 0.5
    assert result_of(made, (), None).chosen == {"best": False}
    # Nobody has an answer to vote for: as `qad think`, the most confident text counts.
    cut = [replace(one, answer=None, reason="length", correct=False) for one in made]
    assert result_of(cut, (), "math").chosen == {"vote": False, "weighted": False, "best": False}
    assert result_of(cut, (), "math").share == 0.0
    assert [representative(cut, kind).index for kind in ("math", None)] == [3, 0]
    # The best ended by itself, then has an answer, then is sure: as `qad think` has it.
    ended = [replace(one, answer=None) for one in made[:3]]
    assert result_of([*ended[:2], made[2], made[3]], (), "math").chosen["best"] is True
    assert representative([*ended, replace(made[3], answer="6")], "math").index == 3
    assert result_of([*ended, replace(made[3], answer="6", correct=True)], (), None).chosen["best"] is False
    unknown = [replace(one, lowest_window_logprob=None) for one in made]
    assert set(result_of(unknown, (), "math").chosen) == {"vote"}


def old_run(path: Path, task: Task) -> None:
    """Write a file as a qad with other rules made it, which took the last number of any text."""
    setting = replace(SETTING, task=task.name, k=2)
    with SampleFile(path, setting) as file:
        for item in task.items:
            cut = sample(item, 0, text=f"So far {item.solution}", answer=item.solution, reason="length", judged="")
            empty = sample(item, 1, text="It is \\boxed{}.", answer="\\boxed{}", correct=False, judged="")
            thought = sample(
                item, 0, k=1, text=f"\\boxed{{{item.solution}}}", deliberation=True, correct=False, judged=""
            )
            file.append([cut, empty, thought])


def test_samples_that_were_judged_by_other_rules_are_judged_anew_and_not_asked_for(run: Path, tmp_path: Path) -> None:
    task = save_task(tmp_path / "say.jsonl", 3)
    path = tmp_path / "old.jsonl"
    old_run(path, task)
    before = [json.loads(line) for line in path.read_text().splitlines()]
    with pytest.raises(UserError, match="3 of 3 items in .* were judged by the rules of another qad: .* asks no model"):
        read_results(path)
    some = replace(task, items=task.items[:2])  # type: ignore[type-var]
    for items, results in ((some, 2), (task, 3)):
        with Model(str(run), "tiny", {}) as model, SampleFile(path, replace(SETTING, task="say")) as file:
            assert file.outdated(items) == (6 if items is some else 3)
            asked = set[bool]()
            found = run_task(model, items, file, replace(ASKING, k=2), lambda _, now, asked=asked: asked.add(now))
            assert asked == {False}
            assert file.outdated(items) == 0
            # The file is still locked, and still takes rows.
            with pytest.raises(UserError, match="being written by another"):
                SampleFile(path, replace(SETTING, task="say"))
        assert [one.correct for one in found] == [(False, False)] * results
        assert [one.answered for one in found] == [(False, False)] * results
        assert [one.deliberated for one in found] == [(True,)] * results
        if items is some:
            with pytest.raises(UserError, match="1 of 3 items"):
                read_results(path)
    assert read_results(path)[2] == found
    after = [json.loads(line) for line in path.read_text().splitlines()]
    assert {row["judged"] for row in after} == {f"{JUDGING} math"}
    verdict = {"answer", "correct", "format_ok", "detail", "judged"}
    kept = [[{name: row[name] for name in row if name not in verdict} for row in rows] for rows in (before, after)]
    assert kept[0] == kept[1]


def test_rows_that_are_compared_in_another_way_now_are_judged_anew(run: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "Say 4.", "solution": "4", "task": "text"}]
    (tmp_path / "say.jsonl").write_text(json.dumps(rows[0]) + "\n")
    path = tmp_path / "samples.jsonl"
    item = load_task(str(tmp_path / "say.jsonl")).items[0]
    with SampleFile(path, replace(SETTING, task="say", k=1, kind="text")) as file:
        file.append([sample(item, 0, k=1, text="\\boxed{4.0}", answer="4.0", correct=False, judged=f"{JUDGING} text")])
    for judge, right in (("text", False), ("math", True)):
        (tmp_path / "say.jsonl").write_text(json.dumps({**rows[0], "task": judge}) + "\n")
        task = load_task(str(tmp_path / "say.jsonl"))
        setting = replace(SETTING, task="say", k=1, kind=task.kind)
        with Model(str(run), "tiny", {}) as model, SampleFile(path, setting) as file:
            (found,) = run_task(model, task, file, replace(ASKING, k=1), lambda result, now: None)
        assert found.correct == (right,)


def test_judging_anew_leaves_the_file_alone_until_it_is_done(tmp_path: Path) -> None:
    task = save_task(tmp_path / "say.jsonl", 3)
    path = tmp_path / "old.jsonl"
    old_run(path, task)
    before = path.read_bytes()

    def judge(item: Item, one: Sample) -> Sample:
        if item == task.items[-1]:
            raise KeyboardInterrupt
        return replace(one, answer=None)

    with SampleFile(path, replace(SETTING, task="say")) as file:
        with pytest.raises(KeyboardInterrupt):
            file.judge_anew(task, judge)
        changed = replace(task.items[1], solution="another")
        with pytest.raises(UserError, match="has samples of another item"):
            file.judge_anew(replace(task, items=[changed]), lambda item, one: one)  # type: ignore[type-var]
    assert path.read_bytes() == before
    assert not list(tmp_path.glob(".*"))


# ------------------------------------------------------------------------------------------------------ a real model


def save_task(path: Path, count: int) -> Task:
    rows = [{"prompt": f"Say {index}.", "solution": str(index), "task": "math"} for index in range(count)]
    return load_task(str(write_rows(path, rows)))


ASKING = Asking(3, Sampling(temperature=1.0, seed=5), 8)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run's folder: random weights."""
    folder = tmp_path_factory.mktemp("evals") / "tiny"
    make_artifact(folder, "llama-tied", max_position_embeddings=1024)
    return folder


def ask(run: Path, task: Task, path: Path, asking: Asking = ASKING) -> tuple[list[bool], list[Any]]:
    """Return whether each item was asked now, and the results."""
    asked = []
    with Model(str(run), "tiny", {"threads": 1}) as model, SampleFile(path, asking.setting(task, 0, model)) as file:
        results = run_task(model, task, file, asking, lambda result, now: asked.append(now))
    return asked, results


def test_what_was_answered_is_not_asked_again(run: Path, tmp_path: Path) -> None:
    task = save_task(tmp_path / "say.jsonl", 6)
    path, whole = tmp_path / "say-tiny.jsonl", tmp_path / "whole.jsonl"
    asked, expected = ask(run, task, whole)
    assert asked == [True] * 6
    half = replace(task, items=task.items[:3])  # type: ignore[type-var]
    ask(run, half, path)
    # One answer of the third item is lost.
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))
    before = path.read_bytes()
    asked, found = ask(run, task, path)
    assert asked == [False, False, True, True, True, True]
    assert path.read_bytes().startswith(before)
    assert [one.correct for one in found] == [one.correct for one in expected]
    texts = [{(row["id"], row["index"]): row["text"] for row in map(json.loads, file.open())} for file in (path, whole)]
    # The answer that was lost is made again as it was: it has its own random stream.
    assert texts[0] == texts[1]
    assert len(set(texts[0].values())) > 12
    assert ask(run, task, path)[0] == [False] * 6


def test_a_deliberation_without_room_is_told_before_anybody_is_asked(run: Path, tmp_path: Path) -> None:
    lines = [{"prompt": text, "solution": "1", "task": "math"} for text in ("Say 1.", "Say so. " * 150)]
    write_rows(tmp_path / "say.jsonl", lines)
    task = load_task(str(tmp_path / "say.jsonl"))
    asking = replace(ASKING, k=2, new_tokens=4, deliberations=1)
    with pytest.raises(UserError, match=r"item 1-\w+ of say: no room to deliberate: .* for qad eval --methods vote"):
        ask(run, task, tmp_path / "samples.jsonl", asking)
    assert (tmp_path / "samples.jsonl").read_bytes() == b""
    assert ask(run, task, tmp_path / "samples.jsonl", replace(asking, deliberations=0))[0] == [True, True]


@needs("llamacpp")
def test_an_evaluation_that_was_interrupted_ends_with_the_bits_of_one_that_was_not(run: Path, tmp_path: Path) -> None:
    # Prompts that begin alike: llama.cpp would compute what differs alone, in kernels that round otherwise.
    lines = [{"prompt": f"{'Think well. ' * 6}Say {index}.", "solution": "1", "task": "math"} for index in range(4)]
    write_rows(tmp_path / "say.jsonl", lines)
    task = load_task(str(tmp_path / "say.jsonl"))
    model = tmp_path / "tiny.gguf"
    export.get("gguf").write(open_artifact(run), model)
    asking = replace(ASKING, new_tokens=6, deliberations=2, budget=120)
    ask(model, task, tmp_path / "whole.jsonl", asking)
    parts = tmp_path / "parts.jsonl"
    for count in range(1, 5):
        ask(model, replace(task, items=task.items[:count]), parts, asking)  # type: ignore[type-var]
        # The last item loses its deliberations, then also a trajectory.
        rows = parts.read_bytes().splitlines(keepends=True)
        parts.write_bytes(b"".join(rows[: len(rows) - {2: 2, 3: 3}.get(count, 0)]))

    def found(path: Path) -> dict[Any, Any]:
        rows = [json.loads(line) for line in path.open(encoding="utf-8")]
        return {
            (row["id"], row.get("pass"), row["index"]): {k: v for k, v in row.items() if k != "seconds"} for row in rows
        }

    assert len(found(parts)) == 4 * (3 + 2)
    assert found(parts) == found(tmp_path / "whole.jsonl")


def test_deliberations_are_made_of_what_is_stored(run: Path, tmp_path: Path) -> None:
    task = save_task(tmp_path / "say.jsonl", 2)
    path = tmp_path / "say-tiny.jsonl"
    ask(run, task, path, replace(ASKING, new_tokens=4))
    before = path.read_bytes()
    asked, found = ask(run, task, path, replace(ASKING, new_tokens=4, deliberations=2, budget=80))
    assert asked == [True, True]
    assert path.read_bytes().startswith(before)
    rows = [json.loads(line) for line in path.read_bytes()[len(before) :].splitlines()]
    assert [(row["pass"], row["k"], row["index"]) for row in rows] == [
        ("deliberation", 2, 0),
        ("deliberation", 2, 1),
    ] * 2
    assert [len(one.deliberated) for one in found] == [2, 2]
    assert ask(run, task, path, replace(ASKING, new_tokens=4, deliberations=2, budget=80))[0] == [False, False]
    # Deliberations that are there still count when none are asked for.
    assert len(ask(run, task, path, replace(ASKING, new_tokens=4))[1][0].deliberated) == 2


def test_sigkill_at_random_moments_repeats_and_loses_nothing(run: Path, tmp_path: Path) -> None:
    seed = time.time_ns() % 100_000
    print(f"seed of the moments: {seed}")
    moments = random.Random(seed)
    count = 20
    save_task(tmp_path / "say.jsonl", count)
    command = [
        *(sys.executable, "-m", "qad.cli", "eval", str(run), "--task", str(tmp_path / "say.jsonl"), "--k", "3"),
        *("--new-tokens", "24", "--temperature", "1", "--threads", "1", "-o", str(tmp_path / "samples")),
    ]
    path = tmp_path / "samples" / "tiny" / "say.jsonl"
    before = b""
    for rows in (moments.randint(1, 12), moments.randint(20, 30)):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        limit = time.monotonic() + 300
        while time.monotonic() < limit and process.poll() is None:
            if path.is_file() and path.read_bytes().count(b"\n") >= rows:
                break
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.05))
        assert process.poll() is None, process.communicate()[0].decode()
        process.send_signal(signal.SIGKILL)
        process.communicate()
        now = path.read_bytes()
        # What an earlier process had finished is there, byte for byte.
        assert now.startswith(before)
        before = now[: now.rfind(b"\n") + 1]
        assert 0 < before.count(b"\n") < 3 * count
    # As if the kill had come in the middle of a write.
    path.write_bytes(before + b'{"id": "half a ro')
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "1 torn row was cut off" in done.stderr
    assert "from before" in done.stderr
    after = path.read_bytes()
    assert after.startswith(before)
    keys = [(row["id"], row["index"]) for row in map(json.loads, after.splitlines())]
    assert len(keys) == len(set(keys)) == 3 * count


def test_ctrl_c_keeps_samples_and_tells_how_to_go_on(run: Path, tmp_path: Path) -> None:
    save_task(tmp_path / "say.jsonl", 60)
    path = tmp_path / "samples" / "tiny" / "say.jsonl"
    done = interrupted(
        *("eval", run, "--task", tmp_path / "say.jsonl", "--k", "2"),
        *("--new-tokens", "48", "--threads", "1", "-o", tmp_path / "samples"),
        when=lambda: path.is_file() and path.read_bytes().count(b"\n") >= 4,
    )
    out = done.stdout + done.stderr
    assert done.returncode == 130, out
    assert f"kept in {tmp_path / 'samples'}: the same command goes on from there" in " ".join(out.split())
    with path.open("rb") as file:
        rows = Rows(file, path)
    assert rows.torn == 0
    assert 2 <= len(rows.ids()) < 60


def test_a_server_that_fails_half_way_loses_nothing(tmp_path: Path) -> None:
    task = save_task(tmp_path / "say.jsonl", 5)
    path = tmp_path / "server.jsonl"
    asking = replace(ASKING, k=4, new_tokens=6)
    # Each item is one request for four answers. In the third item's the connection breaks after some tokens, and the
    # server does not come back.
    script = Script(owner="vllm", faults=deque([None, None, Fault(after=22), *[Fault(503)] * 20]))
    with serving(script) as url:

        def attempt() -> None:
            with Model(url, "server", {}) as model:
                model._session = remote.open(url, retries=0)  # type: ignore[arg-type]
                with SampleFile(path, asking.setting(task, 0, model)) as file:
                    run_task(model, task, file, asking, lambda result, now: None)

        with pytest.raises(UserError, match=r"item 2-\w+ of say: "):
            attempt()
        broken = path.read_bytes()
        kept = [json.loads(line) for line in broken.splitlines()]
        assert [(row["id"][0], row["index"]) for row in kept[:8]] == [(i, k) for i in "01" for k in range(4)]
        whole = len(kept) - 8
        assert 0 < whole < 4, "the break shall come when some answers are whole: move it"
        asked = len(script.bodies)
        script.faults.clear()
        attempt()
        after = path.read_bytes()
        assert after.startswith(broken)
        rows = [json.loads(line) for line in after.splitlines()]
        assert sorted((row["id"][0], row["index"]) for row in rows) == [(i, k) for i in "01234" for k in range(4)]
        assert {row["reason"] for row in rows} <= {"stop", "length"}
        # Never the first two items again.
        prompts = [tuple(body["prompt"]) for body in script.bodies]
        assert set(prompts[:2]).isdisjoint(prompts[asked:])
        assert sum(body.get("n", 1) for body in script.bodies[asked:]) == 4 - whole + 8
