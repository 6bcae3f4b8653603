"""The doctor tells the truth about this machine and about a model, from its header alone."""

import importlib.metadata
import re
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from qad import doctor, export
from qad.doctor import doctor_command, requirements
from qad.errors import UserError
from qad.model import resolve_source
from qad.runtimes import names
from tests.helpers_models import MODELS, make_artifact, make_model, make_tokenizer


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the terminal wide, so that no line of a table is folded."""
    monkeypatch.setenv("COLUMNS", "400")


def _row(output: str, label: str) -> str:
    return next(line for line in output.splitlines() if line.startswith(f"│ {label} "))


def test_machine_libraries_kernels_runtimes(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor_command() == 0
    output = capsys.readouterr().out
    assert importlib.metadata.version("torch") in _row(output, "torch")
    # The reason is told where the kernels do not run, but the machines that run these tests have a compiler.
    assert re.search(r"native, (portable|avx2|avx512|avx512bf16|neon) ", _row(output, "on the CPU"))
    assert ("not available" in _row(output, "on a GPU")) if not torch.cuda.is_available() else _row(output, "GPU")
    for name in names():
        assert _row(output, name)
    assert "ready" in _row(output, "reference")


def test_a_file_that_cannot_be_read_is_told_first(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF")
    with pytest.raises(UserError):
        doctor_command(str(broken))
    assert capsys.readouterr().out == ""


def test_a_missing_library_names_its_extra(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    declared = requirements()
    assert ("torch", None) in declared
    assert ("llama-cpp-python", "llama") in declared
    assert ("bitsandbytes", "cuda") in declared
    assert len(declared) == len({name for name, _ in declared})  # though several extras may want the same one
    assert not {"ruff", "qad"} & {name for name, _ in declared}
    monkeypatch.setattr(doctor, "requirements", lambda: [("no-such-library", "llama"), ("no-such-base", None)])
    assert doctor_command() == 1
    output = capsys.readouterr().out
    assert "pip install 'qad[llama]'" in _row(output, "no-such-library")
    assert "missing: no-such-base" in output


def test_the_default_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor_command("smollm2") == 0
    output = capsys.readouterr().out
    assert resolve_source(None) in output
    assert "llama, 30 layers, width 576" in _row(output, "architecture")
    assert "134,515,008, 211 tensors" in _row(output, "parameters")
    assert "tied" in _row(output, "output head")
    assert "smollm" in _row(output, "tokenizer splits as")
    assert "all 211 tensors fit" in _row(output, "grid q4_0")
    # 24 bytes for each of the 134,515,008 parameters.
    assert "3.2 GB = (4 masters" in _row(output, "memory to train")


@pytest.mark.parametrize("case", ["llama-untied", "qwen2", "qwen3"])
def test_a_folder_and_its_gguf_say_the_same(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export.get("gguf").write(make_artifact(tmp_path, case), tmp_path / "model.gguf")
    make_model(case).save_pretrained(tmp_path / "hf")
    make_tokenizer(MODELS[case].tokenizer).save_pretrained(tmp_path / "hf")
    doctor_command(str(tmp_path / "model.gguf"))
    from_gguf = capsys.readouterr().out
    doctor_command(str(tmp_path / "hf"))
    from_folder = capsys.readouterr().out
    for label in ("architecture", "parameters", "output head", "grid q4_0", "grid q8_0"):
        assert _row(from_gguf, label) == _row(from_folder, label)
    words = [_row(output, "tokenizer splits as").split("│")[2].split()[0] for output in (from_gguf, from_folder)]
    assert words[0] == words[1]
    tied = make_model(case).config.tie_word_embeddings
    assert ("tied to the embedding" if tied else "of its own") in _row(from_folder, "output head")


def test_a_grid_that_falls_back_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    make_model("llama-tied").save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    assert doctor_command(str(tmp_path)) == 0
    output = capsys.readouterr().out
    assert "all 15 tensors fit" in _row(output, "grid q4_1")
    assert "15 of 15 tensors do not fit and get q4_1 in its place" in _row(output, "grid q4_k")


def test_rows_that_no_block_divides_and_padding_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    model = make_model("llama-tied", intermediate_size=100, vocab_size=len(tiny_tokenizer) + 13)
    model.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    assert doctor_command(str(tmp_path)) == 0
    output = capsys.readouterr().out
    assert "2 of 15 tensors do not fit" in _row(output, "grid q4_0")
    assert "model.layers.0.mlp.down_proj.weight: rows of 100 values" in _row(output, "grid q4_0")
    assert "15 of 15 tensors do not fit" in _row(output, "grid q4_k")  # not what takes its place either
    assert "13 rows of padding" in _row(output, "vocabulary")
    assert "gpt-2 (detected)" in _row(output, "tokenizer splits as")


def test_what_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no config.json"):
        doctor_command(str(tmp_path))
    with pytest.raises(UserError, match="missing"):
        doctor_command(str(tmp_path / "none.gguf"))
