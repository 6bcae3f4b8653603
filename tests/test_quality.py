"""bench/quality.py as it is called: figures of a file against its teacher and against llama.cpp's own quantization."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from qad import export
from tests.helpers_models import make_artifact, verify_text
from tests.helpers_runtimes import needs

pytestmark = needs("llamacpp")
SCRIPT = Path(__file__).parent.parent / "bench" / "quality.py"


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    file = tmp_path / "teacher.gguf"
    export.get("gguf").write(make_artifact(tmp_path / "eight", "llama-untied"), file)
    return file


def test_table_and_figures(teacher: Path, tmp_path: Path) -> None:
    for name in ("first", "second"):
        (tmp_path / f"{name}.txt").write_text(verify_text())
    texts = ["--text", tmp_path / "first.txt", "--text", tmp_path / "second.txt"]
    sizes = ["--chunks", "2", "--chunk-tokens", "128", "--threads", "1"]
    rivals = ["--rival", "q4_0", "--rival", "q8_0", "--teacher-f32"]
    done = run(teacher, teacher, *texts, *rivals, *sizes, "--json", tmp_path / "out.json")
    assert done.returncode == 0, done.stderr + done.stdout
    assert "KL ÷ q4_0's" in done.stdout
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [row["text"] for row in rows] == [name for name in ("first.txt", "second.txt", "all texts") for _ in "1234"]
    first, second, both = (
        {row["file"]: row for row in rows if row["text"] == text} for text in ("first.txt", "second.txt", "all texts")
    )
    assert first["teacher"]["kl"] == 0
    assert first["teacher"]["same_top"] == 1
    assert first["teacher"]["tokens"] == 2 * 63
    assert both["teacher"]["tokens"] == 4 * 63
    for file, row in first.items():
        assert row["kl"] == second[file]["kl"] == pytest.approx(both[file]["kl"])
    # The teacher is 8-bit: its own file differs from its F32 form by run-time rounding alone, 4 bits lose much more.
    assert 0 < first["teacher.gguf"]["kl"] < 1e-2 < 10 * first["teacher.gguf"]["kl"] < first["llama.cpp q4_0"]["kl"]
    assert first["llama.cpp q8_0"]["kl"] == pytest.approx(first["teacher.gguf"]["kl"], rel=0.5)
    assert first["llama.cpp q4_0"]["megabytes"] < first["llama.cpp q8_0"]["megabytes"]


def test_errors_name_the_remedy(teacher: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("short")
    text = ["--text", tmp_path / "text.txt", "--threads", "1"]
    other = tmp_path / "other.gguf"
    export.get("gguf").write(make_artifact(tmp_path / "other", "qwen3"), other)
    for arguments, message in (
        ([teacher, *text], "fewer than a chunk"),
        ([tmp_path / "none.gguf", *text], "missing"),
        ([teacher, *text, "--rival", "q9_9"], "no quantization 'q9_9'"),
        ([teacher, *text, "--skip", "600"], "leaves nothing"),
        ([teacher, other, *text], "different tokenizers"),
    ):
        done = run(*arguments)
        assert done.returncode == 2, arguments
        assert message in done.stdout.replace("\n", " "), done.stdout
