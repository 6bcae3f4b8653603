"""``qad report``: figures of the records and no others, machines apart, damage named, a page that a browser shows."""

import json
import math
import platform
import random
import re
import shutil
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, strategies
from typer.testing import CliRunner

import qad.report
from qad.cli import app
from qad.errors import UserError
from qad.files import sha256_of_file
from qad.report.command import report_command
from qad.report.frame import Axis
from qad.report.line_chart import Line, Point, line_chart
from qad.report.marks import COLOURS, Look, key
from qad.report.page import page
from qad.report.reading import read
from qad.report.ticks import linear_ticks, log_ticks
from tests.helpers_report import KS, NEW, PROMPTS, Made
from tests.helpers_runtimes import needs

pytestmark = needs("llamacpp")


@pytest.fixture(name="made")
def _made(report_records: Made) -> Made:
    return report_records


def page_of(paths: list[Path], folder: Path, **options: Any) -> str:
    """Return the page of some records."""
    output = folder / "page.html"
    report_command(paths, output, **{"title": None, "command": "qad report", **options})
    return output.read_text(encoding="utf-8")


def changed(file: Path, folder: Path, change: Callable[[Any], Any], name: str = "changed.json") -> Path:
    """Return a copy of a JSON file in which something is changed."""
    values = json.loads(file.read_text())
    values = change(values) or values
    target = folder / name
    target.write_text(json.dumps(values))
    return target


class Reader(HTMLParser):
    """What a browser without styles shows: tables as lists of cells by their captions, and all text.

    Attributes:
        tables: Caption -> rows; tables of one caption are joined.
        text: Of everything but the style sheet.
        links: What the page would load.
        ids: Of all elements.
        scripts: How many.
    """

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.text, self.links, self.ids, self.scripts = "", [], [], 0
        self._open: list[str] = []
        self._caption, self._in_caption, self._row = "", False, list[str]()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self._open.append(tag)
        self.scripts += tag == "script"
        self.ids += [values["id"]] if "id" in values else []
        self.links += [values[name] for name in ("href", "src", "srcset", "data") if name in values]
        if values.get("class") == "caption":
            self._caption, self._in_caption = "", True
        elif tag == "tr":
            self._row = []
        elif tag in ("td", "th"):
            self._row.append("")

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass
        if self._in_caption:
            self._in_caption = False
            self.tables.setdefault(self._caption, [])
        elif tag == "tr":
            self.tables[self._caption].append([" ".join(cell.split()) for cell in self._row])

    def handle_data(self, data: str) -> None:
        if "style" in self._open:
            return
        self.text += data
        if self._in_caption:
            self._caption += data
        elif {"td", "th"} & set(self._open):
            self._row[-1] += data

    def rows(self, caption: str) -> list[list[str]]:
        """Return the rows of the one table whose caption has these words."""
        (found,) = [rows for name, rows in self.tables.items() if caption in name]
        return found


def test_figures_of_the_bench_are_in_the_tables(made: Made, tmp_path: Path) -> None:
    shown = Reader(page_of(made.all, tmp_path))
    rows = [row for row in json.loads(made.bench.read_text())["rows"] if row["reason"] is None]
    assert len(rows) == len(PROMPTS) * len(KS)
    named = {
        (Path(row["file"]).name, row["prompt_tokens"], row["k"]): row["share_of_bound"]["aggregate_tokens_per_s"]
        for row in rows
    }
    seen: list[tuple[str, int, int]] = []
    file, rest = "", ""
    for line in shown.rows("Speed"):
        if len(line) == 1:
            file, _, rest = line[0].partition(" · llamacpp, prompt ")
        elif line[0] != "K":
            share = named[file, int(rest), int(line[0])]
            # A machine that is busy enough shows shares that one decimal does not tell.
            told = 0.0005 if line[6] == "<0.1 %" else float(line[6].removesuffix(" %")) / 100
            assert told == pytest.approx(share, abs=0.00051)
            seen.append((file, int(rest), int(line[0])))
    assert sorted(seen) == sorted(named)
    assert f"All {4 * len(rows)} figures of {len(rows)} rows" in shown.text
    assert "gone.gguf is missing" in shown.text
    memory = shown.rows("Memory")
    assert {line[1] for line in memory if len(line) > 1} == {"tokens each", *(str(p + NEW) for p in PROMPTS)}


def test_quality_proof_and_training_are_those_of_the_records(made: Made, tmp_path: Path) -> None:
    shown = Reader(page_of(made.all, tmp_path))
    judged = json.loads(made.quality.read_text())["rows"]
    lines = [line for line in shown.rows("Judged by llama.cpp") if len(line) > 1][1:]
    assert [line[0] for line in lines] == [row["file"] for row in judged]
    assert [line[4] for line in lines] == [f"{row['perplexity']:,.3f}" for row in judged]
    # Ours of the rival's size is held against it; the 8-bit one has none near.
    ratios = {line[0]: line[-1] for line in lines}
    kl = {row["file"]: row["kl"] for row in judged}
    assert ratios["four.gguf"] == f"{kl['four.gguf'] / kl['llama.cpp q4_0']:.2f} of q4_0"
    assert ratios["eight.gguf"] == ratios["teacher"] == "–"
    proof = [line for line in shown.rows("Files against their runs") if len(line) > 1][1:]
    told = json.loads(made.verify.read_text())["files"]
    assert [line[1] for line in proof] == ["✓ exact", "▲ not exact"]
    assert [line[2] for line in proof] == [f"{f['proof']['exact']} of {f['proof']['quantized']}" for f in told]
    assert "1 of 2 files not verified" in shown.text
    assert f"{made.bad}: {told[1]['proof']['mismatches'][0]['name']}" in shown.text
    held_out = shown.rows("Held-out text")
    evaluated = [
        json.loads(line) for line in (made.run / "run.jsonl").read_text().splitlines() if "eval_kl" in json.loads(line)
    ]
    first = [line for line in held_out if len(line) > 1][1 : 1 + len(evaluated)]
    assert [int(line[0].split()[0]) for line in first] == [row["step"] for row in evaluated] == [0, 2, 4]
    result = json.loads((made.run / "result.json").read_text())
    assert [line[0] for line in first if "(best)" in line[0]] == [f"{result['best_step']} (best)"]
    ends = [line for line in shown.rows("at the end of each run") if len(line) > 1][1:4]
    assert [line[3] for line in ends] == [f"{row['perplexity']:,.3f}" for row in result["rows"]]


def test_a_run_without_a_teacher(made: Made, tmp_path: Path) -> None:
    result = json.loads((made.alone / "result.json").read_text())
    assert [row["kl"] for row in result["rows"]] == [None] * 3
    page = page_of([made.alone], tmp_path)
    shown = Reader(page)
    head, group, *ends = shown.rows("at the end of each run")
    assert head == ["weights", "MB", "perplexity"]
    assert group == ["alone (of teacher, no teacher)"]
    assert ends == [[row["what"], f"{row['bytes'] / 1e6:,.1f}", f"{row['perplexity']:,.3f}"] for row in result["rows"]]
    logged = [json.loads(line) for line in (made.alone / "run.jsonl").read_text().splitlines()]
    held_out = [line for line in shown.rows("Held-out text") if len(line) > 1][1:]
    told = [[str(row["step"]), f"{row['eval_perplexity']:,.3f}"] for row in logged if "eval_perplexity" in row]
    assert [[line[0].split()[0], line[1]] for line in held_out] == told
    assert [row[0] for row in told] == ["0", "1", "2"]
    batches = [line[0] for line in shown.rows("Batches") if len(line) > 1][1:]
    assert batches == [str(row["step"]) for row in logged if "loss" in row]
    assert "q4_0" in shown.rows("Artifacts")[1][1]
    assert len(re.findall(r'<svg class="plot"', page)) == 2
    assert 'href="#quality"' in page
    assert "KL to the teacher" not in shown.text
    assert "same first token" not in shown.text
    # Beside a run with one each is told by its own figures.
    both = Reader(page_of([made.run, made.alone], tmp_path))
    assert len(both.tables["Held-out text"][0]) == 4
    assert both.tables["Held-out text, no teacher"] == shown.tables["Held-out text, no teacher"]
    assert "KL to the teacher" in both.text
    # One that has not ended yet, of which the log alone knows that there is no teacher.
    half = tmp_path / "half"
    shutil.copytree(made.alone, half, ignore=shutil.ignore_patterns("result.json"))
    shown = Reader(page_of([half], tmp_path))
    assert "half has not ended: 2 of 2 steps are done" in shown.text
    assert "KL to the teacher" not in shown.text


def test_an_evaluation_is_told_as_it_was_stored(made: Made, tmp_path: Path) -> None:
    def spread(values: Any) -> None:
        """Give each figure another value: random weights have nothing right, and noughts would hide a mix-up."""
        for index, row in enumerate(values["rows"]):
            for number, one in enumerate([*row["metrics"].values(), *row["pass"].values()]):
                one["value"] = (10 * index + number + 1) / 100
            for number, one in enumerate(row["failures"]["cells"]):
                one.update(items=10, wrong=3, causes={"format": 2, "mismatch": 0, "capacity": 0, "undecided": 1})
                one["potential"] = (number + 1) / 8
        for number, one in enumerate(values["comparisons"][0]["differences"]):
            one["difference"].update(value=-number / 100, low=-0.5, high=0.25)
            one["verdict"] = ("worse", "as good")[number % 2]
        mean, old, *_ = values["comparisons"][0]["differences"]
        mean.update(mcnemar=None, sign_flip={"differ": 8, "p": 0.037, "test": "sign-flip"})
        # As records were before means had a test.
        old.update(mcnemar=None)
        del old["sign_flip"]

    file = changed(made.evaluation, tmp_path, spread)
    stored = json.loads(file.read_text())
    page = page_of([file], tmp_path)
    shown = Reader(page)
    head, *lines = [line for line in shown.rows("Accuracy;") if len(line) > 1]
    assert [line[0] for line in lines] == [row["model"] for row in stored["rows"]] == ["eight.gguf", "four.gguf"]
    names = [name for name in head if name in stored["rows"][0]["metrics"]]
    assert set(names) == stored["rows"][0]["metrics"].keys() - {"format"}
    for line, row in zip(lines, stored["rows"], strict=True):
        for name in names:
            one = row["metrics"][name]
            told = f"{100 * one['value']:.1f} % ({100 * one['low']:.0f} to {100 * one['high']:.0f})"
            assert line[head.index(name)] == told
        assert line[head.index("most frequent answer")] == f"{100 * row['baseline']['value']:.1f} %"
    _, *lines = [line for line in shown.rows("Any of k answers right") if len(line) > 1]
    for line, row in zip(lines, stored["rows"], strict=True):
        assert [cell.split(" %")[0] for cell in line[1:]] == [
            f"{100 * one['value']:.1f}" for one in row["pass"].values()
        ]
    _, *lines = [line for line in shown.rows("four.gguf minus eight.gguf") if len(line) > 1]
    differences = stored["comparisons"][0]["differences"]
    assert [line[0] for line in lines] == [one["metric"] for one in differences]
    assert [line[5] for line in lines] == [
        f"{100 * one['difference']['value']:+.1f} (-50 to +25)" for one in differences
    ]
    assert [line[1] for line in lines] == [("▲ worse", "✓ as good")[n % 2] for n in range(len(differences))]
    assert [line[6:] for line in lines[:2]] == [["–", "0.0370"], ["–", "–"]]
    assert "–" not in lines[2][6:]
    _, *lines = [line for line in shown.rows("Wrong items by cause") if len(line) > 1]
    levels = [one for row in stored["rows"] for one in row["failures"]["cells"]]
    assert [line[:8] for line in lines] == [[str(one["level"]), "yes", "10", "3", "2", "0", "0", "1"] for one in levels]
    # Of ten items seven are right, two lack the form, one is open: so wide are the bars.
    bars = re.findall(r'<rect class="bar s\d"[^>]* x="([\d.]+)"[^>]* width="([\d.]+)"><title>', page)
    assert len(bars) == 3 * len(levels)
    starts, widths = zip(*((float(start), float(width)) for start, width in bars[:3]), strict=True)
    assert [width / sum(widths) for width in widths] == pytest.approx([0.7, 0.2, 0.1], abs=0.01)
    assert list(starts[1:]) == pytest.approx([starts[0] + widths[0], starts[0] + widths[0] + widths[1]], abs=0.2)
    _, *lines = [line for line in shown.rows("Calibration (") if len(line) > 1]
    found = [one for row in stored["rows"] for one in row["calibration"].values()]
    assert [line[2] for line in lines] == [f"{one['ece']:.3f}" for one in found]
    bins = [line for line in shown.rows("Bins of confidence") if len(line) > 1][1:]
    assert [line[2] for line in bins] == [str(one["count"]) for each in found for one in each["bins"]]
    texts = shown.rows("Text (")[1:]
    assert [line[0] for line in texts] == [one["model"] for one in stored["text"]]
    assert "K = 2" in shown.text


def test_every_record_is_named_with_its_hash(made: Made, tmp_path: Path) -> None:
    shown = Reader(page_of(made.all, tmp_path, title="a & b <i>"))
    read = shown.rows("Read for this page")[1:]
    assert [line[0] for line in read] == [str(path) for path in made.all]
    assert [line[2] for line in read[2:]] == [sha256_of_file(path) for path in made.all[2:]]
    files = [line[1] for line in shown.rows("Measured files") if len(line) == 3][1:]
    # Of the bench, then of the evaluation, whose reference comes first.
    assert files == [sha256_of_file(made.bench.parent / f"{name}.gguf") for name in ("four", "eight", "four")]
    assert "a & b <i>" in shown.text
    commands = {line[0]: line[1] for line in shown.rows("Commands")}
    assert commands["bench.json"] == "qad bench four.gguf gone.gguf"
    assert commands["verify.json"] == "qad verify four"
    assert "--teacher-f32" in commands["quality.json"]
    versions = {line[0]: line[1] for line in shown.rows("Versions")}
    assert versions.keys() == {"bench.json", "verify.json", "quality.json", "eval.json", "record"}
    assert all(f"torch {metadata.version('torch')}" in versions[name] for name in ("bench.json", "verify.json"))


def test_records_of_before_they_told_their_machine(made: Made, tmp_path: Path) -> None:
    def older(values: Any) -> None:
        for name in ("command", "when", "machine", "versions"):
            del values[name]

    paths = [changed(made.verify, tmp_path, older, "verify.json"), changed(made.quality, tmp_path, older, "q.json")]
    shown = Reader(page_of(paths, tmp_path))
    assert {"proof", "quality"} <= set(shown.ids)
    assert "Machines" not in shown.tables
    assert shown.rows("Versions")[1:] == [["verify.json", f"qad {metadata.version('qad')}"]]
    shown = Reader(page_of([made.verify, made.quality], tmp_path))
    (machine,) = shown.rows("Machines")[1:]
    assert machine[0] == platform.node()


def test_the_page_stands_alone(made: Made, tmp_path: Path) -> None:
    page = page_of(made.all, tmp_path)
    shown = Reader(page)
    assert shown.scripts == 0
    assert all(link.startswith(("#", "data:")) for link in shown.links)
    assert {link[1:] for link in shown.links if link.startswith("#")} <= set(shown.ids)
    assert len(shown.ids) == len(set(shown.ids))
    assert "default-src 'none'" in page
    assert not re.search(r"url\(|@import|https?:", page[page.index("<style>") : page.index("</style>")])
    plots = re.findall(r"<svg class=\"plot\".*?</svg>", page, re.DOTALL)
    # Quality and held-out text two each; K and prompts two each, of speed and of memory; KL of both runs, same token;
    # accuracy, P@k, a pair of models, two confidences, wrong items of two models.
    assert len(plots) == 15 + 7
    for plot in plots:
        assert re.search(r"<title id=.*?>[^<]+</title><desc id=.*?>[^<]+</desc>", plot)
        titled = len(re.findall(r'class="axis">[^<]+</text>', plot))
        # Rows with names need no title.
        assert titled == (1 if re.search('id="(accuracy|pair|failures)', plot) else 2)
        assert not re.search("nan|inf", plot.replace("information", ""))
    assert len(page.encode()) < 300_000


def test_a_page_of_one_record_has_its_section_only(made: Made, tmp_path: Path) -> None:
    sections = {
        made.run: {"quality", "training"},
        made.bench: {"speed", "memory"},
        made.verify: {"proof"},
        made.quality: {"quality"},
        made.evaluation: {"accuracy", "comparison", "calibration", "failures"},
    }
    known = set().union(*sections.values())
    for path, wanted in sections.items():
        assert known & set(Reader(page_of([path], tmp_path)).ids) == wanted


def test_machines_stand_apart(made: Made, tmp_path: Path) -> None:
    def elsewhere(values: Any) -> None:
        values["machine"]["node"] = "elsewhere"
        for row in values["rows"]:
            row["file"] = "far.gguf"

    other = changed(made.bench, tmp_path, elsewhere)
    shown = Reader(page_of([made.bench, other], tmp_path))
    tables = {name: rows for name, rows in shown.tables.items() if name.startswith("Speed")}
    assert len(tables) == 2
    for name, rows in tables.items():
        far = ["far.gguf" in line[0] for line in rows if len(line) == 1]
        assert far
        assert all(far) == any(far) == ("(elsewhere)" in name)
    # The same machine a second time is one plot, with both measurements in it and told apart.
    again = changed(made.bench, tmp_path, lambda values: None, "again.json")
    shown = Reader(page_of([made.bench, again], tmp_path))
    titles = [line[0] for line in shown.rows("Speed") if len(line) == 1]
    assert len(titles) == len(set(titles)) == 2 * len(PROMPTS)
    assert sum("again.json" in title for title in titles) == len(PROMPTS)


def test_a_share_outside_is_marked(made: Made, tmp_path: Path) -> None:
    def too_fast(values: Any) -> None:
        values["rows"][1]["share_of_bound"]["aggregate_tokens_per_s"] = 1.25
        values["rows"][2]["share_of_bound"]["first_token_s"] = -0.5

    shown = Reader(page_of([changed(made.bench, tmp_path, too_fast)], tmp_path))
    marked = [line[6] for line in shown.rows("Speed") if len(line) > 6 and "outside" in line[6]]
    assert marked[0] == "▲ 125.0 %: outside 0 to 100 % (tokens/s)"
    assert marked[1].endswith("outside 0 to 100 % (first token)")
    assert len(marked) == 2
    assert f"2 of {len(PROMPTS) * len(KS)} rows lie outside" in shown.text


def test_an_unfinished_run_and_a_line_that_is_being_written(made: Made, tmp_path: Path) -> None:
    run = tmp_path / "half"
    shutil.copytree(made.run, run, ignore=shutil.ignore_patterns("artifact", "data", "checkpoint*", "result.json"))
    lines = (run / "run.jsonl").read_text().splitlines(keepends=True)
    steps = [number for number, line in enumerate(lines) if '"loss"' in line]
    (run / "run.jsonl").write_text("".join(lines[: steps[1] + 1]) + lines[steps[2]][:9])
    shown = Reader(page_of([run], tmp_path))
    assert "half has not ended: 2 of 4 steps are done" in shown.text
    assert "quality" not in shown.ids
    (run / "run.jsonl").write_text(lines[0] + lines[1][:9] + "\n" + lines[2])
    with pytest.raises(UserError, match=r"run.jsonl is damaged: line 2 is no JSON"):
        read(run)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("bench", lambda v: v["rows"][1].pop("k"), r"rows\[1\].k is missing; make it again with `qad bench --json`"),
        ("bench", lambda v: v["rows"][0].update(aggregate_tokens_per_s="9"), r"rows\[0\].aggregate.* not a number"),
        ("bench", lambda v: v["rows"][0].update(aggregate_tokens_per_s=None), r"rows\[0\].aggregate.* not a number"),
        ("bench", lambda v: v["rows"][0]["spread"].update(aggregate_tokens_per_s=[1]), "not two numbers"),
        (
            "bench",
            lambda v: v["rows"][1].update(aggregate_tokens_per_s=-9.5),
            r"rows\[1\].aggreg.* -9.5, not a .* above 0",
        ),
        (
            "bench",
            lambda v: v["rows"][1].update(all_done_s=math.inf),
            r"all_done_s is inf, not a finite number above 0",
        ),
        (
            "bench",
            lambda v: v["rows"][1].update(prefill_tokens_per_s=math.nan),
            r"prefill_\w+ is nan, not a finite number",
        ),
        (
            "bench",
            lambda v: v["rows"][1].update(first_token_s=1e9),
            "first_token_s is 1000000000.0, later than all were",
        ),
        ("bench", lambda v: v["rows"][1].update(kv_bytes=-1), "kv_bytes is -1, not a finite number from 0 on"),
        ("bench", lambda v: v["rows"][1].update(k=0), r"rows\[1\].k is 0, not a whole number from 1 on"),
        (
            "bench",
            lambda v: v["rows"][1].update(new_tokens=10**400),
            r"rows\[1\].new_tokens is 1000.*, more than can be",
        ),
        (
            "bench",
            lambda v: v["rows"][1].update(peak_bytes=10**400),
            r"rows\[1\].peak_bytes is a number of more digits",
        ),
        (
            "bench",
            lambda v: v["rows"][1]["spread"].update(aggregate_tokens_per_s=[1e9, 2e9]),
            "a median that is not in",
        ),
        ("bench", lambda v: v["rows"][1].update(per_trajectory_tokens_per_s=1e9), "times K = 2 is not the rate of all"),
        ("bench", lambda v: v["machine"].update(memory=-1), "machine.memory is -1, not a finite number above 0"),
        ("bench", lambda v: v.update(machine=[]), "machine is .*not an object"),
        ("bench", lambda v: v.update(rows=[3]), r"rows\[0\] is no object"),
        ("verify", lambda v: v["files"][0].update(ok="yes"), r"files\[0\].ok .* neither true nor false"),
        ("verify", lambda v: v["files"][0]["proof"].update(exact=True), r"files\[0\].proof.exact .*not a whole number"),
        ("quality", lambda v: v["rows"][2].update(file=7), r"rows\[2\].file is 7, not a text"),
        (
            "evaluation",
            lambda v: v["rows"][1]["metrics"]["M@K"].pop("value"),
            r"metrics.M@K.value is missing",
        ),
        ("evaluation", lambda v: v["rows"][1].update({"pass": {"two": {"value": 1}}}), "pass.two is not named by"),
        ("evaluation", lambda v: v["comparisons"][0].pop("task"), r"comparisons\[0\].task is missing"),
        (
            "quality",
            lambda v: v.pop("skip"),
            r"another kind \(with command, .*\): the report takes run folders and what",
        ),
        (
            "quality",
            lambda v: [v],
            r"JSON of another kind \(a list\): the report takes run folders and what `qad bench",
        ),
        (
            "evaluation",
            lambda v: v["rows"][0]["metrics"]["accuracy"].update(value=7.5),
            r"rows\[0\].metrics.accuracy.value is 7.5, not a share from 0 to 1",
        ),
        ("quality", lambda v: v.update(kind="think", skip=1, rows=1) or v.pop("teacher"), "it calls itself 'think'"),
    ],
)
def test_damage_is_named(made: Made, tmp_path: Path, kind: str, change: Callable[[Any], Any], message: str) -> None:
    def only(values: Any) -> Any:
        result = change(values)
        return result if isinstance(result, list) else None

    file = changed(getattr(made, kind), tmp_path, only)
    output = tmp_path / "page.html"
    output.write_text("before")
    with pytest.raises(UserError, match=message) as told:
        report_command([made.run, file], output, title=None, command="")
    assert str(file) in str(told.value)
    assert output.read_text() == "before"


def places(values: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the place of each value of a JSON file, of lists the first two."""
    if place:
        yield place
    inside = values.items() if isinstance(values, dict) else enumerate(values[:2]) if isinstance(values, list) else ()
    for name, value in inside:
        yield from places(value, (*place, name))


@pytest.mark.parametrize("kind", ["bench", "verify", "quality", "evaluation"])
def test_whatever_stands_in_a_record_there_is_a_page_or_an_error(made: Made, tmp_path: Path, kind: str) -> None:
    text = getattr(made, kind).read_text()
    draw = random.Random(0)
    strange = [None, "x", "<b>", True, -1, 0, 1e308, float("nan"), float("inf"), [], {}]
    everywhere = [place for place in places(json.loads(text)) if "per_item" not in place]
    told: list[str] = []
    for place in draw.choices(everywhere, k=50):
        values = json.loads(text)
        inside = values
        for name in place[:-1]:
            inside = inside[name]
        inside[place[-1]] = draw.choice(strange)
        file = tmp_path / "strange.json"
        file.write_text(json.dumps(values))
        try:
            assert "<h1>" in page([read(file)], title="", command="")
        except UserError as error:
            told.append(str(error))
    assert len(told) > 10
    assert all(str(tmp_path / "strange.json") in error for error in told)


def test_what_is_no_record_is_told(made: Made, tmp_path: Path) -> None:
    (tmp_path / "cut.json").write_text(made.bench.read_text()[:200])
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    (tmp_path / "empty").mkdir()
    for name, message in (
        ("cut.json", "no JSON, or a damaged one"),
        ("bytes.json", "no JSON, or a damaged one"),
        ("deep.json", "no JSON, or a damaged one"),
        ("gone.json", "is missing"),
        ("empty", "is no run: it has no recipe.json"),
    ):
        with pytest.raises(UserError, match=message) as told:
            read(tmp_path / name)
        assert str(tmp_path / name) in str(told.value)
    with pytest.raises(UserError, match="is one of the records"):
        report_command([made.bench], made.bench, title=None, command="")
    assert read(made.bench)


def test_the_verb(made: Made, tmp_path: Path) -> None:
    output = tmp_path / "out.html"
    arguments = ["report", str(made.bench), str(made.bench), "-o", str(output), "--title", "Speed of two files"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert re.search(r"out\.html: \d+ kB from 1 record$", done.output.strip())
    assert "<h1>Speed of two files</h1>" in output.read_text()


@given(values=strategies.lists(strategies.floats(1e-9, 1e9), min_size=1, max_size=6))
def test_ticks_are_round_rise_and_hold_all_values(values: list[float]) -> None:
    for ticks in (linear_ticks(min(values), max(values)), log_ticks(min(values), max(values))):
        assert ticks == sorted(set(ticks))
        assert 2 <= len(ticks) <= 9
        assert ticks[0] <= min(values) * (1 + 1e-6)
        assert ticks[-1] >= max(values) * (1 - 1e-6)
    for tick in log_ticks(min(values), max(values)):
        assert f"{tick:e}"[:8] in ("1.000000", "2.000000", "3.000000", "5.000000")


def test_places_are_where_the_values_say() -> None:
    line = Line("a", [Point(1, 10), Point(10, 1000), Point(100, float("nan")), Point(0, 10)], Look())
    x, y = Axis("x", log=True, ticks=(1.0, 10.0)), Axis("y", log=True)
    drawing = str(line_chart("p", "t", x, y, [line]))
    places = re.findall(r"translate\(([\d.]+) ([\d.]+)\)", drawing)
    # What has no place on an axis is left out; more is further right and higher.
    assert len(places) == 2
    assert float(places[0][0]) < float(places[1][0])
    assert float(places[0][1]) > float(places[1][1])
    ticks = dict(re.findall(r'y="([\d.]+)" text-anchor="end">([\d,]+)<', drawing))
    at = {float(place) - 4: float(text.replace(",", "")) for place, text in ticks.items()}
    for (_, place), value in zip(places, (10, 1000), strict=True):
        assert min(at, key=lambda tick: abs(tick - float(place))) == pytest.approx(float(place), abs=0.2)
        assert at[min(at, key=lambda tick: abs(tick - float(place)))] == value
    assert line_chart("p", "t", x, y, [Line("a", [Point(1, 0.0)], Look())]) is None


def test_each_look_is_another() -> None:
    drawn = {str(key("", Look(index)).swatch) for index in range(56)}
    assert len(drawn) == 56


def channel(value: int) -> float:
    share = value / 255
    return share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4


def contrast(one: str, other: str) -> float:
    """Return the contrast of two colours as WCAG 2.1 defines it."""
    lights = []
    for colour in (one, other):
        red, green, blue = (channel(int(colour[at : at + 2], 16)) for at in (1, 3, 5))
        lights.append(0.2126 * red + 0.7152 * green + 0.0722 * blue + 0.05)
    return max(lights) / min(lights)


def test_colours_can_be_read_in_light_dark_and_print() -> None:
    style = (Path(qad.report.__file__).parent / "page.css").read_text()
    themes = re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    assert len(themes) == 3
    for theme in themes:
        colours = dict(re.findall(r"--([\w]+): (#[0-9a-f]{6});", theme))
        for name in ("ink", "soft", "accent", "good", "bad"):
            assert contrast(colours[name], colours["card"]) >= 4.5, name
            assert contrast(colours[name], colours["page"]) >= 4.5, name
        for number in range(1, COLOURS + 1):
            assert contrast(colours[f"s{number}"], colours["card"]) >= 3, number
