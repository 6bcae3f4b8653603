"""bench/kernels.py: what it measures, writes and draws, on the smallest shape; what it refuses before it measures."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from qad import native

SCRIPT = Path(__file__).parents[1] / "bench/kernels.py"
SMALLEST = "SmolLM2 q_proj 576 x 576"


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), "--no-rivals", "--rounds", "1", "--shapes", SMALLEST, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_figures_of_every_operation(tmp_path: Path) -> None:
    figures, plot = tmp_path / "figures.json", tmp_path / "plot.png"
    done = bench("--dtypes", "bf16", "--json", str(figures), "--plot", str(plot))
    assert done.returncode == 0, done.stderr
    record = json.loads(figures.read_text())
    assert record["machine"]["kernels"] == native.describe()
    operations = [row["operation"] for row in record["rows"]]
    assert operations[:3] == ["copy", "copy out of memory", "forward"]
    assert {"backward", "backward, learned scales", "quantize", "dequantize"} < set(operations)
    for row in record["rows"]:
        assert (row["shape"], row["dtype"]) == (SMALLEST, "bf16")
        assert row["milliseconds"] > 0
        assert f" {row['operation']} " in done.stdout
        moved = row["gigabytes_per_s"] * row["milliseconds"] * 1e6
        if row["operation"] == "copy out of memory":
            assert moved == pytest.approx(2 * 256 * 2**20)  # read and written
        else:
            assert 3 * 576 * 576 - 1 < moved < 7 * 576 * 576
        for yardstick, share in (("copy", "copy_share"), ("copy out of memory", "memory_share")):
            rate = next(other["gigabytes_per_s"] for other in record["rows"] if other["operation"] == yardstick)
            assert row[share] == pytest.approx(row["gigabytes_per_s"] / rate)
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_measured_is_said_before_anything_is(tmp_path: Path) -> None:
    done = bench("--grid", "int4_g128")
    assert (done.returncode, done.stdout) == (2, "")
    assert f"{SMALLEST}: blocks of 128 do not divide its rows" in done.stderr
    done = bench("--json", str(tmp_path / "missing/figures.json"))
    assert (done.returncode, done.stdout) == (2, "")
    assert f"there is no folder {tmp_path / 'missing'}" in done.stderr
