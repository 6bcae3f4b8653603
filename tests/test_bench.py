"""``qad bench``: tokens really made, figures in their units, reasons in place of crashes, a table that fits."""

import json
import math
import multiprocessing
import time
from pathlib import Path
from typing import Any

import pytest

from qad import export
from qad.bench import EXTRAS, KEYS, bench_command, doubles_at
from qad.bench_run import FIGURES, Measured, Task, measure
from qad.energy import Meter
from qad.errors import UserError
from qad.files import sha256_of_file
from tests.helpers_models import make_artifact
from tests.helpers_runtimes import needs

pytestmark = needs("llamacpp")
PROMPT, NEW, KS = 24, 6, (1, 3)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run with a GGUF file, an ONNX folder, and a file that is none."""
    run = tmp_path_factory.mktemp("bench")
    artifact = make_artifact(run, "llama-tied", max_position_embeddings=512)
    export.get("gguf").write(artifact, run / "model.gguf")
    export.get("onnx").write(artifact, run / "onnx")
    (run / "notes.gguf").write_bytes(b"no model" * 9)
    return run


def bench(files: list[Path], output: Path | None = None, **changes: Any) -> int:
    options: dict[str, Any] = {
        "ks": ",".join(map(str, KS)),
        "prompt_tokens": str(PROMPT),
        "new_tokens": NEW,
        "threads": 1,
        "repeats": 2,
        "kv_type": "f16",
        "gpu": False,
        "device": "raspberry-pi-5",
        "json_file": output,
        "command": "qad bench",
    }
    return bench_command(files, **options | changes)


def test_files_of_a_run(run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    files = [run / "model.gguf", run / "onnx", run / "notes.gguf", run / "gone.gguf"]
    began = time.perf_counter()
    assert bench(files, run / "out.json") == 0
    wall = time.perf_counter() - began
    told = json.loads((run / "out.json").read_text())
    rows = told["rows"]
    assert [(Path(row["file"]).name, row["runtime"], row["k"]) for row in rows] == [
        (name, runtime, k)
        for name, runtime in (("model.gguf", "llamacpp"), ("onnx", "ort"), ("notes.gguf", ""), ("gone.gguf", ""))
        for k in KS
    ]
    for row in rows:
        assert set(row) == {*KEYS, *EXTRAS}
        assert (row["prompt_tokens"], row["new_tokens"], row["threads"]) == (PROMPT, NEW, 1)
    assert "gone.gguf is missing" in rows[-1]["reason"]
    assert rows[-3]["reason"]
    assert rows[-3]["aggregate_tokens_per_s"] is None
    for row in rows[:4]:
        assert row["reason"] is None
        # Rates, times and numbers of tokens belong together; seconds are seconds of this test.
        assert 0 < row["first_token_s"] < row["all_done_s"] < wall
        assert math.isclose(row["per_trajectory_tokens_per_s"] * row["k"], row["aggregate_tokens_per_s"])
        low, high = row["spread"]["aggregate_tokens_per_s"]
        assert low <= row["aggregate_tokens_per_s"] <= high
        slowest = row["k"] * (NEW - 1) / (row["spread"]["all_done_s"][1] - row["spread"]["first_token_s"][0])
        assert slowest <= high
        assert row["spread"]["prefill_tokens_per_s"][1] >= PROMPT / row["first_token_s"]
        assert set(row["share_of_bound"]) == set(FIGURES)
        assert all(0 < share < 1 for share in row["share_of_bound"].values())
        assert 50e6 < row["peak_bytes"] < 4e9
        assert math.isclose(row["bound_tokens_per_s"], row["bounds"]["aggregate_tokens_per_s"])
    # A token's keys and values: 2 layers or so, in 2 bytes for llama.cpp's 256 cells, in 4 in each of ONNX's buffers.
    per_token = told["files"][0]["facts"]["kv_values"]
    assert [row["kv_bytes"] for row in rows[:2]] == [256 * per_token * 2] * 2
    assert [row["kv_bytes"] for row in rows[2:4]] == [k * (PROMPT + NEW) * per_token * 4 for k in KS]
    assert told["files"][0]["sha256"] == sha256_of_file(run / "model.gguf")
    assert told["versions"]["qad"]
    assert told["machine"]["cores"]
    assert told["command"] == "qad bench"
    assert [one["runtime"] for one in told["batching"]] == ["llamacpp", "ort"]
    out = capsys.readouterr().out
    table = out[: out.index("prompt of")]
    assert max(map(len, table.splitlines())) <= 80
    assert "model.gguf" in table
    assert "gone.gguf is missing" in out


def test_each_run_makes_the_tokens_that_are_counted(run: Path) -> None:
    messages = list(measure(Task(run / "model.gguf", "llamacpp", (2, 300), PROMPT, NEW, 1, 2)))
    good, bad = (message for message in messages if message is not None)
    # The warm-up and two runs of the first K; the second is above llama.cpp's limit.
    assert messages.index(good) == 3
    assert len(messages) == 5
    assert good.reason is None
    assert {len(values) for values in good.figures.values()} == {2}
    assert "300 trajectories are above this session's limit of 256" in str(bad.reason)


def test_what_does_not_fit_is_a_row(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench([run / "model.gguf"], run / "small.json", ks="1", prompt_tokens="8,510", new_tokens=9, repeats=1) == 0
    fits, full = json.loads((run / "small.json").read_text())["rows"]
    assert (fits["prompt_tokens"], fits["reason"]) == (8, None)
    assert "end after 2 of 9 tokens (context)" in full["reason"]
    assert full["aggregate_tokens_per_s"] is None
    assert full["bound_tokens_per_s"] > 0
    assert bench([run / "onnx"], None, kv_type="q8_0") == 1
    assert "fixes the type of its cache" in capsys.readouterr().out


def test_a_process_that_is_killed_is_a_reason(run: Path) -> None:
    found = []
    for message in measure(Task(run / "model.gguf", "llamacpp", (1, 2), PROMPT, 400, 1, 1000)):
        if message is None:
            for process in multiprocessing.active_children():
                process.kill()
        else:
            found.append(message)
    assert [one.k for one in found] == [1, 2]
    for one in found:
        assert isinstance(one, Measured)
        assert "killed, as systems do when memory runs out" in str(one.reason)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device": "toaster"}, "unknown board 'toaster'; known: .*raspberry-pi-5"),
        ({"ks": "1,two"}, "--k '1,two' is no list of numbers"),
        ({"ks": "0,2"}, "--k 0,2 must be numbers from 1 up"),
        ({"prompt_tokens": "-4"}, "--prompt-tokens -4 must be"),
        ({"kv_type": "q9"}, "unknown KV type 'q9'; known: f16, q4_0, q8_0"),
        ({"new_tokens": 1}, "--new-tokens must be at least 2"),
        ({"json_file": Path("/nowhere/out.json")}, "/nowhere is no folder"),
        ({"json_file": Path("/usr")}, "/usr is a folder: name a file with --json"),
    ],
)
def test_bad_options_stop_everything(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        bench([Path("any.gguf")], **changes)


def test_where_a_step_takes_twice_as_long() -> None:
    def rows(*steps: tuple[int, float]) -> list[dict[str, Any]]:
        return [{"k": k, "aggregate_tokens_per_s": k / seconds, "reason": None} for k, seconds in steps]

    assert doubles_at(rows((1, 0.1), (2, 0.1), (4, 0.15), (8, 0.25))) == pytest.approx(6)
    assert doubles_at(rows((1, 0.1), (8, 0.19))) is None
    assert doubles_at(rows((2, 0.1), (8, 0.9))) is None


def test_energy_of_a_counter_that_runs_over(tmp_path: Path) -> None:
    for name, start in (("intel-rapl:0", 900.0), ("intel-rapl:1", 5.0), ("intel-rapl:0:0", 1.0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "energy_uj").write_text(f"{start:.0f}\n")
        (tmp_path / name / "max_energy_range_uj").write_text("1000\n")
    meter = Meter(powercap=tmp_path, hwmon=tmp_path / "none")
    assert meter.source == "rapl"
    with meter:
        (tmp_path / "intel-rapl:0" / "energy_uj").write_text("50\n")
        (tmp_path / "intel-rapl:1" / "energy_uj").write_text("25\n")
    assert meter.joules == pytest.approx((150 + 20) * 1e-6)


def test_energy_of_a_board_sensor(tmp_path: Path) -> None:
    sensor = tmp_path / "hwmon4"
    sensor.mkdir()
    for name, text in (("in1_label", "VDD_IN"), ("in1_input", "5000"), ("curr1_input", "2000")):
        (sensor / name).write_text(text + "\n")
    meter = Meter(powercap=tmp_path / "none", hwmon=tmp_path)
    began = time.perf_counter()
    with meter:
        time.sleep(0.25)
    # Ten watts.
    assert meter.joules is not None
    assert 2.5 <= meter.joules <= 10 * (time.perf_counter() - began)


def test_no_energy_where_nothing_tells(tmp_path: Path) -> None:
    with Meter(powercap=tmp_path, hwmon=tmp_path) as meter:
        pass
    assert (meter.source, meter.joules) == (None, None)
