"""Damaged files of every kind that qad reads: one clear error, no crash, no hang, no memory; ten thousand of them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from qad import export
from tests.helpers_models import make_artifact
from tests.helpers_runs import SIZES, save_model

# Target -> how many damaged files are read.
CASES = {"gguf": 1_200, "artifact": 5_000, "gptq": 2_500, "onnx": 1_200, "model": 100}


def make(target: str, folder: Path) -> None:
    """Write whole files of a kind."""
    if target == "model":
        save_model(folder, num_hidden_layers=1)
        return
    artifact = make_artifact(folder.parent / "run", "llama-tied", num_hidden_layers=1, **SIZES)
    if target == "artifact":
        artifact.folder.rename(folder)
        return
    if target == "gguf":
        folder.mkdir()
    export.get(target).write(artifact, folder / "model.gguf" if target == "gguf" else folder)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="limits memory through Linux's /proc")
@pytest.mark.parametrize("target", CASES)
def test_damaged_files(target: str, tmp_path: Path) -> None:
    make(target, tmp_path / "whole")
    command = [sys.executable, "-m", "tests.helpers_fuzz", target, str(tmp_path / "whole"), str(CASES[target])]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    outcome = json.loads(done.stdout.splitlines()[-1])
    assert outcome["wrong"] == []
    assert outcome["read"] + outcome["refused"] == CASES[target]
    # Damage that nobody notices is no test, and neither is damage that hides behind the first check.
    assert outcome["refused"] > CASES[target] // 4
    assert outcome["read"] > 0


def test_ten_thousand() -> None:
    assert sum(CASES.values()) >= 10_000
