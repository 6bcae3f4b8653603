"""``qad eval`` as it is typed: what it prints and writes, on tiny models whose answers are known beforehand."""

import io
import json
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from qad.cli import app
from qad.errors import UserError
from qad.evals import results, sandbox, table
from qad.evals.command import file_of, short_names
from qad.evals.compare import compare
from qad.evals.metrics import CHOSEN, metrics_of
from qad.evals.names import shortened
from qad.evals.plots import reliability_plot
from qad.evals.runner import Model
from qad.runtimes import GREEDY, Trajectory, open_model, remote
from qad.think import ThinkOptions, think
from tests.helpers_models import make_artifact, verify_text
from tests.helpers_rows import write_rows
from tests.helpers_server import Script, interrupting, serving

PROMPTS = [f"Say {index} and {index * 7}." for index in range(8)]
NEW = 6


def invoke(*arguments: str, code: int = 0) -> str:
    done = CliRunner().invoke(app, ["eval", *arguments], env={"COLUMNS": "80"})
    if isinstance(done.exception, UserError):
        raise done.exception
    assert done.exit_code == code, done.output
    return done.output


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return runs: a teacher, and a student of other weights."""
    folder = tmp_path_factory.mktemp("models")
    return {
        "teacher": ending(folder / "teacher", hidden_size=384),
        "student": ending(folder / "student"),
    }


def ending(folder: Path, **changes: Any) -> Path:
    """Save a model of random weights that ends each of its greedy answers by itself, and return its folder."""
    endless = folder.with_name(f"{folder.name}-endless")
    make_artifact(endless, "llama-tied", eos_token_id=[0], **changes)
    answers = [one.tokens for one in greedy(endless)]
    # What comes late in each is made a token that ends a text, unless another one begins with it.
    early = {token for tokens in answers for token in tokens[:2]}
    ends = {next(token for token in reversed(tokens) if token not in early) for tokens in answers}
    make_artifact(folder, "llama-tied", eos_token_id=sorted(ends), **changes)
    assert {one.reason for one in greedy(folder)} == {"stop"}
    return folder


def greedy(model: Path) -> list[Trajectory]:
    with open_model(model, threads=1) as session:
        return [session.sample(session.chat_prompt(one), 1, GREEDY, new_tokens=NEW)[0] for one in PROMPTS]


def save_task(file: Path, solutions: list[str], **columns: Any) -> str:
    rows = [
        {"prompt": prompt, "solution": solution, "task": "text", **columns}
        for prompt, solution in zip(PROMPTS, solutions, strict=True)
    ]
    return str(write_rows(file, rows))


@pytest.fixture(scope="module")
def evaluated(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str, Path]:
    """Return the JSON and the printed text of two models on two tasks, and the folder."""
    folder = tmp_path_factory.mktemp("evaluated")
    theirs, ours = ([one.text for one in greedy(models[name])] for name in ("teacher", "student"))
    assert all(text.strip() for text in (*theirs, *ours))
    assert len(set(theirs)) > 6
    assert not set(theirs) & set(ours)
    # The teacher is right on five of eight, the student on two others: as nobody else can be, for texts differ.
    mixed = [*theirs[:5], *ours[5:7], "neither of both"]
    own = save_task(folder / "own.jsonl", theirs, level=1, chain="First 7.\n\nThen 14.")
    task = save_task(folder / "mixed.jsonl", mixed, level=2)
    (folder / "text.txt").write_text(verify_text()[:400])
    out = invoke(
        *(str(models["student"]), "--reference", str(models["teacher"]), "--trained", own, "--near", task, "--k", "1"),
        *("--new-tokens", str(NEW), "--threads", "1", "-o", str(folder / "samples"), "--json", str(folder / "e.json")),
        *("--plots", str(folder / "plots"), "--text", str(folder / "text.txt"), "--chunk-tokens", "40"),
    )
    return json.loads((folder / "e.json").read_text(encoding="utf-8")), out, folder


def row_of(values: dict[str, Any], model: str, task: str) -> dict[str, Any]:
    (found,) = (row for row in values["rows"] if (row["model"], row["task"]) == (model, task))
    return found


def test_accuracy_is_what_it_was_made_to_be(evaluated: tuple[dict[str, Any], str, Path]) -> None:
    values, out, _ = evaluated
    assert (values["format"], values["kind"]) == (1, "eval")
    assert {"command", "machine", "versions", "when"} <= values.keys()
    expected = {
        ("teacher", "own"): 1.0,
        ("student", "own"): 0.0,
        ("teacher", "mixed"): 5 / 8,
        ("student", "mixed"): 2 / 8,
    }
    for (model, task), accuracy in expected.items():
        row = row_of(values, model, task)
        metric = row["metrics"]["accuracy"]
        assert metric["value"] == accuracy == row["metrics"]["V@K"]["value"] == row["metrics"]["P@K"]["value"]
        assert metric["low"] <= accuracy <= metric["high"]
        assert (row["items"], row["k"], metric["interval"]) == (8, 1, "wilson")
        # Every solution is another text.
        assert row["baseline"]["value"] == 1 / 8
        assert len(row["per_item"]) == 8
        lengths = [item["n_tokens"][0] for item in row["per_item"]]
        assert row["costs"]["tokens"]["value"] == pytest.approx(sum(lengths) / 8)
        assert 0 < max(lengths) <= NEW
    assert "62.5" in out


def test_the_paired_comparison_is_the_one_worked_by_hand(evaluated: tuple[dict[str, Any], str, Path]) -> None:
    values, out, _ = evaluated
    (found,) = (one for one in values["comparisons"] if one["task"] == "mixed")
    assert (found["first"], found["second"]) == ("student", "teacher")
    (accuracy,) = (one for one in found["differences"] if one["metric"] == "accuracy")
    assert accuracy["difference"]["value"] == -3 / 8
    assert (accuracy["mcnemar"]["only_first"], accuracy["mcnemar"]["only_second"]) == (2, 5)
    # Of seven throws of a coin, five or more of one side: 2 (21 + 7 + 1) / 128.
    assert accuracy["mcnemar"]["p"] == pytest.approx(58 / 128)
    assert accuracy["verdict"] == "open"
    # Every difference has one test, by what its values are.
    tests = {one["metric"]: (one["mcnemar"], one["sign_flip"]) for one in found["differences"]}
    assert all((first is None) != (second is None) for first, second in tests.values())
    (own,) = (one for one in values["comparisons"] if one["task"] == "own")
    assert {one["verdict"] for one in own["differences"]} == {"worse"}
    (both,) = (one for one in values["comparisons"] if one["task"] == "all tasks")
    (accuracy,) = (one for one in both["differences"] if one["metric"] == "accuracy")
    assert (accuracy["items"], accuracy["difference"]["value"]) == (16, (2 - 13) / 16)
    assert "-37.5" in out
    assert "2:5" in out


def test_failures_calibration_shift_likeness_and_text_are_there(
    evaluated: tuple[dict[str, Any], str, Path],
) -> None:
    values, out, folder = evaluated
    failures = row_of(values, "student", "own")["failures"]
    assert [(cell["level"], cell["wrong"], cell["trained"]) for cell in failures["cells"]] == [(1, 8, True)]
    assert failures["cells"][0]["causes"]["capacity"] == 8
    assert row_of(values, "student", "mixed")["failures"]["cells"][0]["causes"]["undecided"] == 6
    teacher = row_of(values, "teacher", "mixed")
    judged = teacher["calibration"]["mean_logprob"]
    assert judged["answers"] == 8
    assert "too few" in judged["fit"]["reason"]
    assert Path(teacher["plot"]).read_text().startswith("<?xml")
    likeness = row_of(values, "student", "own")["similarity"]
    assert likeness["worked solution"]["chains"] == 8
    assert likeness["teacher"]["chains"] == 8
    assert row_of(values, "student", "mixed")["similarity"]["teacher"]["chains"] == 5
    assert "teacher" not in teacher["similarity"]
    shifts = {(one["model"], one["label"]): one for one in values["shift"]}
    assert shifts["teacher", "near"]["change"]["value"] == 5 / 8 - 1
    texts = {one["model"]: one for one in values["text"]}
    assert texts["teacher"]["kl"] is None
    assert texts["student"]["kl"]["value"] > 0.01
    assert texts["student"]["reference"] == "teacher"
    for heading in ("wrong items", "calibration", "away from what was trained on", "likeness of chains", "text"):
        assert heading in out
    assert max(map(len, out.splitlines())) <= 80
    assert len(list((folder / "samples").rglob("*.jsonl"))) == 4


def test_results_are_compared_later_from_json_or_samples(
    evaluated: tuple[dict[str, Any], str, Path], tmp_path: Path
) -> None:
    values, _, folder = evaluated
    out = invoke("--compare", str(folder / "e.json"), "--json", str(tmp_path / "c.json"))
    assert "-37.5" not in out
    assert "+37.5" in out
    again = invoke("--compare", *(str(folder / "samples" / model / "mixed.jsonl") for model in ("student", "teacher")))
    assert "-37.5" in again
    (stored,) = (one for one in json.loads((tmp_path / "c.json").read_text())["comparisons"] if one["task"] == "mixed")
    ones = {one.model: one.items for one in results.load(folder / "e.json") if one.task == "mixed"}
    direct = [one.to_dict() for one in compare(ones["teacher"], ones["student"], 0.05)]
    assert json.loads(json.dumps(direct)) == stored["differences"]
    row = row_of(values, "teacher", "mixed")
    assert {name: asdict(one) for name, one in metrics_of(ones["teacher"]).items()} == row["metrics"]
    (stored_samples,) = results.load(folder / "samples" / "teacher" / "mixed.jsonl")
    # The command kept the vote alone.
    assert [replace(one, chosen={"vote": one.chosen["vote"]}) for one in stored_samples.items] == ones["teacher"]


def test_models_without_a_common_task_are_named_and_the_others_compared(
    evaluated: tuple[dict[str, Any], str, Path], tmp_path: Path
) -> None:
    values, _, _ = evaluated
    files = []
    for model, task in (("a", "own"), ("b", "mixed"), ("c", "own")):
        files.append(tmp_path / f"{model}.json")
        rows = [{**row_of(values, "student" if model == "c" else "teacher", task), "model": model}]
        files[-1].write_text(json.dumps({**values, "rows": rows}))
    out = invoke("--compare", *map(str, files))
    assert "a (first) against c (second)" in out
    assert "b is not compared: it has mixed, of which a has none" in out


def test_a_setting_that_differs_is_refused_before_anybody_is_asked(
    models: dict[str, Path], tmp_path: Path, evaluated: tuple[dict[str, Any], str, Path]
) -> None:
    task = str(evaluated[2] / "own.jsonl")
    common = ("--task", task, "--limit", "1", "--new-tokens", "2", "--threads", "1", "-o", str(tmp_path / "samples"))
    invoke(str(models["student"]), *common, "--k", "1")
    before = {file: file.read_bytes() for file in tmp_path.rglob("*.json*")}
    with pytest.raises(UserError) as raised:
        invoke(str(models["teacher"]), str(models["student"]), *common, "--k", "2", "--temperature", "1")
    assert "give --k 1 --temperature 0.0 to go on with them, choose another folder with -o" in str(raised.value)
    # It is not said that the same command goes on.
    assert "the same command" not in str(raised.value)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*.json*")} == before
    invoke(str(models["teacher"]), str(models["student"]), *common, "--k", "1", "--temperature", "0.0")


def test_another_model_behind_the_same_address_gets_no_answers_of_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A server that is away is not waited for.
    monkeypatch.setattr(remote, "open", partial(remote.open, retries=0))
    save_task(tmp_path / "own.jsonl", ["7"] * 8)
    samples = tmp_path / "samples" / "v1" / "own.jsonl"
    beside = samples.with_suffix(".json")

    def ask(url: str, *arguments: str) -> str:
        """Return what is printed, in one line."""
        return " ".join(
            invoke(
                *(url, "--task", str(tmp_path / "own.jsonl"), "--limit", "2", "--k", "1", "--new-tokens", "4"),
                *("-o", str(tmp_path / "samples"), *arguments),
            ).split()
        )

    script = Script(owner="vllm", told={"root": "/models/first"})
    with serving(script) as url:
        assert "does not tell" not in ask(url)
        stored = json.loads(beside.read_text())
        assert stored["setting"]["served"] == {"address": url, "id": "toy", "root": "/models/first"}
        kept = samples.read_bytes()
        asked = len(script.bodies)
        for changes, told in (
            ({"models": ("second",)}, "the served model's id: stored toy, asked for second"),
            ({"told": {"root": "/models/second"}}, "model's root: stored /models/first, asked for /models/second"),
        ):
            before = {name: getattr(script, name) for name in changes}
            for name, value in changes.items():
                setattr(script, name, value)
            with pytest.raises(UserError, match=re.escape(told)) as raised:
                ask(url)
            assert f"choose another folder with -o, or delete {samples} and own.json" in str(raised.value)
            for name, value in before.items():
                setattr(script, name, value)
        ask(url, "--json", str(tmp_path / "e.json"))
        assert json.loads((tmp_path / "e.json").read_text())["rows"][0]["served"]["id"] == "toy"
        # Of before it was noted: it is said, and noted now.
        del stored["setting"]["served"]
        beside.write_text(json.dumps(stored))
        told = f"{samples} does not tell which model of the server its answers are of: they are taken as those of toy"
        assert told in ask(url)
        assert told not in ask(url)
        # A server without a list is told of.
        script.models = ()
        named = f"{url}#any"
        told = f"{named} does not tell which model it serves: kept answers are taken as those of it"
        assert ask(named).count(told) == 1
        beside_nameless = tmp_path / "samples" / "v1_any" / "own.json"
        assert json.loads(beside_nameless.read_text())["setting"]["served"] == {"address": named}
        assert len(script.bodies) == asked + 2
    # What is whole needs no server; what is not does.
    assert "no server answers" in (out := ask(url))
    assert "until then kept answers are taken as those of its model" in out
    with pytest.raises(UserError, match="no server answers"):
        ask(url, "--limit", "3")
    assert samples.read_bytes() == kept
    assert json.loads(beside.read_text())["setting"]["served"]["id"] == "toy"


def test_a_model_that_changes_behind_its_address_is_noticed_when_it_is_asked() -> None:
    script = Script()
    with serving(script) as url, Model(url, "server", {}) as model:
        assert model.served == {"address": url, "id": "toy"}
        script.models = ("second",)
        with pytest.raises(UserError, match=r"tells another model now \(second\) than when this began \(toy\)"):
            _ = model.session


def test_an_interrupt_before_the_first_answer_says_that_nothing_is_kept(
    evaluated: tuple[dict[str, Any], str, Path], tmp_path: Path
) -> None:
    with interrupting() as url:
        try:
            out = invoke(
                *(url, "--task", str(evaluated[2] / "own.jsonl"), "-o", str(tmp_path), "--json", str(tmp_path / "e")),
                code=130,
            )
        except KeyboardInterrupt:
            pytest.fail("the interrupt went through")
    assert "interrupted: no answer was complete yet, so nothing is kept" in " ".join(out.split())
    assert not (tmp_path / "e").exists()


@pytest.mark.parametrize(
    ("names", "width", "short"),
    [
        (["tiny", "small"], 12, ["tiny", "small"]),
        (["SmolLM2-135M-Instruct-q4_0.gguf"], 15, ["SmolLM2…_0.gguf"]),
        # The middle would be the same for both: what tells them apart is kept.
        (["a-very-long-run-q4_0-00000000.gguf", "a-very-long-run-q8_0-00000000.gguf"], 26, None),
        (["run-a-0000000000000000000000000000", "run-b-0000000000000000000000000000"], 12, None),
        (["00000000000000000000000000000-a", "00000000000000000000000000000-b"], 12, None),
        (
            ["a-very-long-teacher-of-november.q4", "a-very-long-student-of-november.q4"],
            12,
            ["…-teacher-o…", "…-student-o…"],
        ),
        # In twelve characters some of these are the same, whatever is left out.
        (
            [f"{i * 'x'}.{(60 - i) * 'x'}" for i in (15, 30, 31)],
            12,
            [f"{i * 'x'}.{(60 - i) * 'x'}" for i in (15, 30, 31)],
        ),
    ],
)
def test_long_names_lose_their_middle_and_stay_different(names: list[str], width: int, short: list[str] | None) -> None:
    found = shortened(names, width)
    assert list(found) == names
    assert len(set(found.values())) == len(names)
    if short is not None:
        assert list(found.values()) == short
        return
    for whole, cut in found.items():
        begin, end = cut.split("…")
        assert len(cut) == width
        assert whole.startswith(begin)
        assert whole.endswith(end)


def test_tables_do_not_fold_long_names(evaluated: tuple[dict[str, Any], str, Path]) -> None:
    values, _, _ = evaluated
    long = {name: f"SmolLM2-135M-Instruct-distilled-{name}-of-november.q4_0.gguf" for name in ("teacher", "student")}
    rows = [{**row, "model": long[row["model"]]} for row in values["rows"]]
    console = Console(width=80, record=True, file=io.StringIO())
    names = table.names_of(rows)
    table.print_rows(console, rows, names)
    table.print_failures(console, rows, names)
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 80 or all(line.startswith("in full: ") for line in lines if len(line) > 80)
    for name in long.values():
        assert lines.count(f"in full: {name}") == 1
    pieces = [line.split()[0] for line in lines if "…" in line]
    assert len(pieces) > len(rows)
    # One way in each table.
    assert len(set(pieces)) == 4
    # Task, model, interval: no row has a third line.
    assert all("teacher" in piece or "student" in piece for piece in pieces), pieces


def test_training_on_a_level_tells_what_failures_were(
    evaluated: tuple[dict[str, Any], str, Path], models: dict[str, Path], tmp_path: Path
) -> None:
    _, _, folder = evaluated
    common = ("--k", "1", "--new-tokens", str(NEW), "--threads", "1", "-o", str(folder / "samples"))
    after = str(folder / "samples" / "teacher" / "mixed.jsonl")
    invoke(
        *(str(models["student"]), "--task", str(folder / "mixed.jsonl"), "--after", after, *common),
        *("--json", str(tmp_path / "after.json")),
    )
    (row,) = json.loads((tmp_path / "after.json").read_text())["rows"]
    cells = row["failures"]["cells"]
    assert row["notes"] == []
    # Of six wrong ones five are right after, as if the teacher were the student after training.
    assert cells[0]["causes"] == {"format": 0, "mismatch": 5, "capacity": 0, "undecided": 1}
    with pytest.raises(UserError, match="2 models"):
        invoke(
            str(models["student"]), "--task", str(folder / "mixed.jsonl"), "--after", str(folder / "e.json"), *common
        )
    # The same prompts with other solutions, and other prompts, under the same name.
    (tmp_path / "mixed").mkdir()
    other = save_task(tmp_path / "mixed" / "mixed.jsonl", ["7"] * 8)
    common = (*common[:-2], "-o", str(tmp_path / "samples"))
    with pytest.raises(UserError, match="8 of the 8 items of mixed that this evaluation and .* and another question"):
        invoke(str(models["student"]), "--task", other, "--after", after, *common)
    write_rows(Path(other), [{"prompt": "Anything else?", "solution": "7", "task": "text"}])
    invoke(str(models["student"]), "--task", other, "--after", after, *common, "--json", str(tmp_path / "else.json"))
    (row,) = json.loads((tmp_path / "else.json").read_text())["rows"]
    assert row["notes"][0] == f"{after} has results of other items of this task: give both the same items and --seed"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "no model is named"),
        (("nowhere.gguf",), "nothing to evaluate on"),
        (("nowhere.gguf", "--task", "own.jsonl"), "nowhere.gguf is missing"),
        (("{student}", "--task", "nowhere.jsonl"), "nowhere.jsonl does not exist"),
        (("{student}", "--task", "{own}", "--methods", "vote,majority"), "unknown method 'majority'"),
        (("{student}", "--task", "{own}", "--fit", "spline"), "unknown fit 'spline'"),
        (("{student}", "--task", "{own}", "--near", "{own}"), "own is asked for twice"),
        (("{student}", "--task", "{own}", "--task-file", "other=x"), "which is no task of this evaluation"),
        (("{student}", "--task", "{own}", "--json", "/nowhere/at/all.json"), "/nowhere/at is no folder"),
        (("{student}", "{student}", "--task", "{own}"), "student is named twice"),
        (("{student}", "--task", "{own}", "--plots", "{own}"), "own.jsonl is a file: name a folder with --plots"),
        (("{student}", "--task", "{own}", "--methods", ","), "--methods names none"),
        (("--compare", "{a1}", "{b1}", "--task", "{own}"), "--compare asks no model, so --task means nothing"),
        (("--compare", "{a1}", "{b1}", "--k", "8", "--plots", "p"), "so --k, --plots mean nothing: leave out the one"),
        (("--compare", "{a1}", "{b1}", "-o", "x"), "--compare asks no model, so --output means nothing"),
        (("--compare", "{a1}", "{b1}", "--reference", "x"), "--compare asks no model, so --reference means nothing"),
        (("--compare", "{a1}", "nowhere.jsonl"), "nowhere.jsonl is missing: check the path"),
        (("{student}", "--reference", "{student}/", "--task", "{own}"), "the reference .* is the only model"),
        (("--reference", "{student}", "--task", "{own}"), "the reference .* is the only model"),
        (("--compare", "{own}"), "own.jsonl is no file of samples, for it holds no answers of `qad eval`"),
        (("--compare", "{line}"), "line.jsonl is no file of samples, for it holds no answers of `qad eval`"),
        (("--compare", "{json}"), "is no result of an evaluation"),
        (
            ("--compare", "{a1}", "{a2}"),
            "files share no task .*a1.json has own; .*a2.json has mixed.* of the model a",
        ),
        (("--compare", "{a1}", "{b2}"), "the models share no task .a has own; b has mixed.: give results of the same"),
        (("--compare", "{a1}", "{b1}"), "the models share no item of a task .a has own; b has own.*same --seed"),
        (("--compare", "{a1}"), "a1.json has results of one model only .a.: give those of another beside it"),
        (("--compare", "{a1}", "{a1}"), "a1.json is given twice"),
        (("--compare", "{a1}", "{b1}", "--json", "/nowhere/at/all.json"), "/nowhere/at is no folder"),
    ],
)
def test_bad_input_is_one_clear_error(
    arguments: tuple[str, ...],
    message: str,
    evaluated: tuple[dict[str, Any], str, Path],
    models: dict[str, Path],
    tmp_path: Path,
) -> None:
    names = {"student": models["student"], "own": evaluated[2] / "own.jsonl", "json": tmp_path / "other.json"}
    (tmp_path / "other.json").write_text("{}")
    (values, _, _) = evaluated
    for name, (model, task, items) in {
        "a1": ("a", "own", slice(4)),
        "a2": ("a", "mixed", slice(4)),
        "b1": ("b", "own", slice(4, 8)),
        "b2": ("b", "mixed", slice(4)),
    }.items():
        row = row_of(values, "teacher", task)
        names[name] = tmp_path / f"{name}.json"
        rows = [{**row, "model": model, "per_item": row["per_item"][items]}]
        names[name].write_text(json.dumps({**values, "rows": rows}))
    # Without an end of its one line, it could also be samples whose writing was interrupted.
    names["line"] = tmp_path / "line.jsonl"
    names["line"].write_text('{"prompt": "?"}')
    folder = () if "--compare" in arguments else ("-o", str(tmp_path / "samples"))
    with pytest.raises(UserError, match=message):
        invoke(*(one.format(**names) for one in arguments), *folder)
    assert list(tmp_path.rglob("*.jsonl")) == [names["line"]]


def test_a_seeds_sampling_is_the_same_for_every_model_and_another_for_every_item(
    models: dict[str, Path], tmp_path: Path
) -> None:
    task = save_task(tmp_path / "say.jsonl", PROMPTS)
    common = ("--task", task, "--k", "3", "--new-tokens", "4", "--temperature", "1.2", "--threads", "1", "--limit", "3")
    for name in ("one", "two"):
        invoke(str(models["student"]), *common, "-o", str(tmp_path / name))
    one, two = (
        [json.loads(line)["text"] for line in (tmp_path / name / "student" / "say.jsonl").open(encoding="utf-8")]
        for name in ("one", "two")
    )
    assert one == two
    assert len(set(one)) > 6


def test_texts_that_were_cut_off_have_no_answer_and_the_evaluation_says_so(
    models: dict[str, Path], tmp_path: Path
) -> None:
    new = 2
    with open_model(models["student"], threads=1) as session:
        cut = [session.sample(session.chat_prompt(one), 1, GREEDY, new_tokens=new)[0] for one in PROMPTS]
    assert {one.reason for one in cut} == {"length"}
    task = save_task(tmp_path / "cut.jsonl", [one.text for one in cut], task=None)
    common = ("--new-tokens", str(new), "--threads", "1", "-o", str(tmp_path / "samples"))
    arguments = (str(models["student"]), "--task", task, "--k", "2", "--methods", "vote,weighted,best,deliberate")
    out = invoke(*arguments, "--temperature", "0.01", *common, "--json", str(tmp_path / "cut.json"))
    (row,) = json.loads((tmp_path / "cut.json").read_text())["rows"]
    # Each of them is its item's solution, word for word.
    assert {row["metrics"][name]["value"] for name in row["metrics"] if name != "format"} == {0.0}
    assert {item["share"] for item in row["per_item"]} == {0.0}
    assert row["calibration"] == {}
    assert row["failures"]["cells"][0]["wrong"] == 8
    said = " ".join(out.split())
    assert "8 of 8 rows have no `task`: compared as text" in said
    assert row["cut_off"] == {"answers": 1.0, "unanswered": 1.0}
    assert "100% of the answers were cut off before they marked an answer and count as wrong" in said
    assert re.search(r"^cut .* 100 +100 +\d+ +2\.00 ", out, re.MULTILINE), "the columns form and cut"
    # Every way that was asked for is shown, in words too.
    for name, meaning in (
        ("V@2", "V: vote;"),
        ("W@2", "W: vote weighted"),
        ("B@2", "B: best"),
        ("HM@2", "HM: mean of"),
    ):
        assert name in out
        assert meaning in said
    assert max(len(line) for line in out.splitlines() if not line.startswith("cut: ")) <= 80


def test_thoughts_that_the_chat_template_opens_are_no_answer_until_they_end(
    models: dict[str, Path], tmp_path: Path
) -> None:
    thinker = tmp_path / "thinker"
    shutil.copytree(models["student"], thinker)
    template = thinker / "artifact" / "chat_template.jinja"
    template.write_text(template.read_text() + "{% if add_generation_prompt %}<think>\n{% endif %}")
    new = 60
    with open_model(thinker, threads=1) as session:
        made = [session.sample(session.chat_prompt(one), 1, GREEDY, new_tokens=new)[0] for one in PROMPTS]
        # One that ended by itself, as if all that it wrote were its answer.
        ended = next(index for index, one in enumerate(made) if one.reason == "stop" and one.text.strip())
        options = ThinkOptions(k=1, method="best", sampling=GREEDY, new_tokens=new)
        thought = think(session, PROMPTS[ended], options, kind="text")
    # Nothing that it writes says that it thinks.
    assert not any("think" in one.text for one in made)
    task = save_task(tmp_path / "own.jsonl", [one.text.strip() or "nothing" for one in made])
    common = ("--k", "1", "--new-tokens", str(new), "--threads", "1", "-o", str(tmp_path / "samples"))
    invoke(str(thinker), "--task", task, *common)
    rows = [json.loads(line) for line in (tmp_path / "samples" / "thinker" / "own.jsonl").open(encoding="utf-8")]
    # Where it wrote nothing there is nothing, thoughts neither.
    assert [row["text"] for row in rows] == [one.text and f"<think>{one.text}" for one in made]
    assert {(row["answer"], row["correct"]) for row in rows} == {(None, False)}
    assert thought.trajectories[0].text == f"<think>{made[ended].text}"
    assert thought.answers == [None]


def test_results_of_other_rules_are_not_compared(evaluated: tuple[dict[str, Any], str, Path], tmp_path: Path) -> None:
    values = {**evaluated[0], "judging": 1}
    for old in (values, {name: value for name, value in values.items() if name != "judging"}):
        (tmp_path / "old.json").write_text(json.dumps(old))
        with pytest.raises(UserError, match="judged by the rules of another qad: give the `qad eval` that made it"):
            invoke("--compare", str(tmp_path / "old.json"))


def test_items_that_were_judged_in_two_ways_are_not_compared(models: dict[str, Path], tmp_path: Path) -> None:
    for name, kind in (("a", "math"), ("b", "text")):
        (tmp_path / name).mkdir()
        task = save_task(tmp_path / name / "s.jsonl", ["7"] * 8, task=kind)
        invoke(
            *(str(models["student"]), "--task", task, "--limit", "2", "--k", "1", "--new-tokens", "2"),
            *("--threads", "1", "-o", str(tmp_path / name), "--json", str(tmp_path / f"{name}.json")),
        )
        (row,) = json.loads((tmp_path / f"{name}.json").read_text())["rows"]
        assert {item["judge"] for item in row["per_item"]} == {kind}
    told = r"2 of the 2 items of s .* were judged differently .*: by math for .*, by text for .*: give the `qad eval`"
    ours, theirs = ([f"{name}.json", f"{name}/student/s.jsonl"] for name in "ab")
    for one, other in zip(ours, theirs, strict=True):
        with pytest.raises(UserError, match=told):
            invoke("--compare", str(tmp_path / one), str(tmp_path / other))
        # Nor is one said to be what training made of the other; which is known before a model is asked.
        folder = tmp_path / "nothing"
        with pytest.raises(UserError, match=told):
            invoke(
                *(str(models["student"]), "--task", str(tmp_path / "a" / "s.jsonl"), "--after", str(tmp_path / other)),
                *("--k", "1", "--new-tokens", "2", "-o", str(folder)),
            )
        assert not folder.exists()
    # What it says to do helps, and asks nobody: an answer that was asked for would have another text.
    samples = tmp_path / "b" / "student" / "s.jsonl"
    samples.write_text(samples.read_text().replace('"text": "', '"text": "kept '))
    shutil.copy(tmp_path / "a" / "s.jsonl", tmp_path / "b" / "s.jsonl")
    invoke(
        *(str(models["student"]), "--task", str(tmp_path / "b" / "s.jsonl"), "--limit", "2", "--k", "1"),
        *("--new-tokens", "2", "--threads", "1", "-o", str(tmp_path / "b")),
    )
    assert samples.read_text().count('"text": "kept ') == 2
    invoke("--compare", *(str(tmp_path / name / "student" / "s.jsonl") for name in "ab"))


def test_results_that_do_not_tell_their_judge_are_not_compared(
    evaluated: tuple[dict[str, Any], str, Path], tmp_path: Path
) -> None:
    values = json.loads(json.dumps(evaluated[0]))
    del values["rows"][0]["per_item"][0]["judge"]
    (tmp_path / "old.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match="old.json does not tell what judged its items, .* give the `qad eval` that"):
        invoke("--compare", str(tmp_path / "old.json"))


def test_the_published_responses_of_ifeval_have_a_manual() -> None:
    script = Path(__file__).parent.parent / "bench" / "ifeval_published.py"
    done = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "prompts responses" in done.stdout


def test_programs_have_no_most_frequent_answer(models: dict[str, Path], tmp_path: Path) -> None:
    if reason := sandbox.refusal():
        pytest.skip(reason)
    task = save_task(tmp_path / "code.jsonl", ["x = 1"] * 8, task="code", meta={"tests": "assert x == 1"})
    out = invoke(
        *(str(models["student"]), "--task", task, "--k", "1", "--new-tokens", "1", "--threads", "1", "--limit", "2"),
        *("-o", str(tmp_path / "samples"), "--json", str(tmp_path / "code.json")),
    )
    (row,) = json.loads((tmp_path / "code.json").read_text())["rows"]
    assert row["baseline"] is None
    assert row["failures"]["chance"] is None
    line = next(line for line in out.splitlines() if line.startswith("code "))
    assert " - " in line


def test_the_manual_names_every_metric() -> None:
    manual = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    section = manual.split("\n## Evaluation\n")[1].split("\n## ")[0]
    for name in ("accuracy", "M@K", "P@K", *CHOSEN.values(), "HM@K", "HP@K", "form", "base"):
        assert re.search(rf"^\| `{name}`", section, re.MULTILINE), name


def test_names_stay_apart(tmp_path: Path) -> None:
    assert short_names(["a/x.gguf", "b/y.gguf/"]) == {"a/x.gguf": "x.gguf", "b/y.gguf/": "y.gguf"}
    assert short_names(["a/x.gguf", "b/x.gguf"]) == {"a/x.gguf": "a/x.gguf", "b/x.gguf": "b/x.gguf"}
    assert (
        file_of(tmp_path, "../a b/x.gguf", "reasoning_gym:gcd@2")
        == tmp_path / "_a_b_x.gguf" / "reasoning_gym_gcd@2.jsonl"
    )


def test_a_plot_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    judged = {
        "ece": 0.1,
        "brier": 0.2,
        "answers": 3,
        "bins": [{"low": 0.5, "high": 0.6, "count": 3, "confidence": 0.55, "accuracy": 1 / 3}],
    }
    reliability_plot(tmp_path / "deep" / "one.svg", "a title", {"vote_share": judged})
    assert "<svg" in (tmp_path / "deep" / "one.svg").read_text()
    reliability_plot(tmp_path / "one.png", "a title", {"vote_share": judged, "mean_logprob": judged})
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")
