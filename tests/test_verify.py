"""qad verify: proves what is exact, and finds one wrong bit, wherever it sits."""

import json
import platform
import struct
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from qad import export
from qad.agreement import Agreement, Answer
from qad.artifact import open_artifact
from qad.errors import UserError
from qad.gguf_check import read_header
from qad.verify import verify
from qad.verify_command import verify_command
from tests.helpers_models import MODELS, make_artifact
from tests.helpers_runtimes import needs

needs_llama = needs("llamacpp")


@pytest.fixture
def exported(tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    def make(case: str = "llama-tied", **changes: Any) -> tuple[Path, Path]:
        run = tmp_path / f"run-{len(list(tmp_path.iterdir()))}"
        export.get("gguf").write(make_artifact(run, case, **changes), run / "model.gguf")
        return run, run / "model.gguf"

    return make


def flip(file: Path, tensor: str, byte: int, bits: int) -> None:
    position = read_header(file).tensors[tensor].start + byte
    with file.open("rb+") as stream:
        stream.seek(position)
        (old,) = stream.read(1)
        stream.seek(position)
        stream.write(bytes([old ^ bits]))


@needs_llama
def test_a_good_file(exported: Callable[..., tuple[Path, Path]], capsys: pytest.CaptureFixture[str]) -> None:
    run, file = exported()
    assert verify_command(run, [file], threads=1) == 0
    out = capsys.readouterr().out
    count = sum(".weight" in name and "norm" not in name for name in read_header(file).tensors)
    assert f"bit-exact: {count} of {count} tensors" in out
    assert "in both" in out
    assert "mean KL" in out
    assert "torch on the artifact" in out


@pytest.mark.parametrize("case", ["llama-tied", "qwen2", "qwen3"])
@pytest.mark.parametrize(("byte", "bits", "row", "column"), [(2, 0x01, 0, 0), (2 + 15, 0x40, 0, 31), (20, 0x80, 0, 48)])
def test_one_flipped_nibble(
    case: str,
    byte: int,
    bits: int,
    row: int,
    column: int,
    exported: Callable[..., tuple[Path, Path]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, file = exported(case)
    flip(file, "blk.1.ffn_down.weight", byte, bits)
    result = verify(run, file)
    (mismatch,) = result.mismatches
    assert mismatch.name == "model.layers.1.mlp.down_proj.weight"
    assert (mismatch.differing, mismatch.first) == (1, (row, column))
    assert verify_command(run, [file], runtime=False) == 1
    out = capsys.readouterr().out
    assert f"bit-exact: {result.quantized - 1} of {result.quantized} tensors" in out
    assert "model.layers.1.mlp.down_proj.weight" in out


def test_a_flipped_bit_of_a_scale_and_of_a_norm(exported: Callable[..., tuple[Path, Path]]) -> None:
    run, file = exported()
    flip(file, "blk.0.attn_v.weight", 0, 0x80)
    flip(file, "output_norm.weight", 4 * 7, 0x01)
    result = verify(run, file)
    assert {mismatch.name: mismatch.differing <= 32 for mismatch in result.mismatches} == {
        "model.layers.0.self_attn.v_proj.weight": True,
        "model.norm.weight": True,
    }
    norm = next(mismatch for mismatch in result.mismatches if "norm" in mismatch.name)
    assert (norm.differing, norm.first) == (1, (7,))
    assert (result.quantized - result.exact, result.kept - result.kept_exact) == (1, 1)


def test_permuted_rows_are_named_as_in_the_model(exported: Callable[..., tuple[Path, Path]]) -> None:
    run, file = exported()
    row_bytes = 192 // 32 * 18
    # Head width 32: the file's row 1 is the model's row 16, the first of a head's second half.
    flip(file, "blk.0.attn_q.weight", row_bytes + 2, 0x01)
    assert verify(run, file).mismatches[0].first == (16, 0)


def test_another_runs_file(exported: Callable[..., tuple[Path, Path]], capsys: pytest.CaptureFixture[str]) -> None:
    run, _ = exported()
    _, other = exported("llama-linear")
    assert verify_command(run, [other], runtime=False) == 0
    assert "exported from another run" in capsys.readouterr().out.replace("\n", " ")


@needs_llama
def test_a_file_of_another_model(
    exported: Callable[..., tuple[Path, Path]], capsys: pytest.CaptureFixture[str]
) -> None:
    run, _ = exported()
    _, other = exported("qwen2")
    assert verify_command(run, [other], threads=1) == 1
    out = capsys.readouterr().out
    assert "bit-exact: 0 of 15 tensors" in out
    assert "not compared in the runtime: the file's model has" in out


@needs_llama
def test_a_wrong_file_that_no_runtime_loads(
    exported: Callable[..., tuple[Path, Path]], capsys: pytest.CaptureFixture[str]
) -> None:
    run, file = exported()
    data = file.read_bytes()
    file.write_bytes(data.replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_no.weight"))
    assert verify_command(run, [file], threads=1) == 1
    out = capsys.readouterr().out
    assert "mlp.up_proj.weight: missing in the file" in out
    assert "not compared in the runtime: llama.cpp cannot load" in out


def test_missing_and_added_tensors(exported: Callable[..., tuple[Path, Path]]) -> None:
    small, small_file = exported()
    large, large_file = exported(num_hidden_layers=3)
    missing = [mismatch for mismatch in verify(large, small_file).mismatches if "missing" in mismatch.reason]
    added = [mismatch for mismatch in verify(small, large_file).mismatches if "not in the artifact" in mismatch.reason]
    assert len(missing) == len(added) == 9
    assert all(mismatch.name.startswith("model.layers.2.") for mismatch in (*missing, *added))


def test_the_trainers_hash_is_part_of_the_proof(exported: Callable[..., tuple[Path, Path]]) -> None:
    run, file = exported()
    description = json.loads((run / "artifact" / "artifact.json").read_text())
    name = next(iter(description["forward_sha256"]))
    description["forward_sha256"][name] = "0" * 64
    (run / "artifact" / "artifact.json").write_text(json.dumps(description))
    (mismatch,) = verify(run, file).mismatches
    assert mismatch.name == name
    assert "trainer's forward" in mismatch.reason


@needs_llama
def test_silently_wrong_metadata_is_noticed(
    exported: Callable[..., tuple[Path, Path]], capsys: pytest.CaptureFixture[str]
) -> None:
    run, file = exported()
    data = file.read_bytes()
    key = b"llama.rope.freq_base" + struct.pack("<I", 6)
    position = data.index(key) + len(key)
    file.write_bytes(data[:position] + struct.pack("<f", 100.0) + data[position + 4 :])
    assert verify_command(run, [file], threads=1) == 1
    out = capsys.readouterr().out
    assert "bit-exact: 15 of 15 tensors" in out
    assert "not rounding" in out


def test_bad_arguments(exported: Callable[..., tuple[Path, Path]], tmp_path: Path) -> None:
    run, file = exported()
    with pytest.raises(UserError, match="no artifact"):
        verify(tmp_path / "none", file)
    with pytest.raises(UserError, match="known endings"):
        verify(run, run / "artifact" / "weights.safetensors")
    for missing in ("none.gguf", "none"):  # a folder format has no ending to go by
        with pytest.raises(UserError, match=f"{missing} is missing"):
            verify(run, run / missing)
    with pytest.raises(UserError, match="--text"):
        verify_command(run, [file], text=tmp_path / "none.txt")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 au lait")
    with pytest.raises(UserError, match="latin.txt is not UTF-8"):
        verify_command(run, [file], text=tmp_path / "latin.txt")


@needs_llama
def test_own_text(exported: Callable[..., tuple[Path, Path]], tmp_path: Path) -> None:
    run, file = exported()
    (tmp_path / "text.txt").write_text("x")
    with pytest.raises(UserError, match="too short"):
        verify_command(run, [file], text=tmp_path / "text.txt", threads=1)
    (tmp_path / "text.txt").write_text("The gulls follow the boats past the breakwater.")
    assert verify_command(run, [file], text=tmp_path / "text.txt", threads=1) == 0


def test_every_architecture_is_among_the_cases() -> None:
    from qad.architectures import ARCHITECTURES

    assert {tiny.model_type for tiny in MODELS.values()} == set(ARCHITECTURES)


# ---------------------------------------------------------------------------------------------------- several files


def test_several_files_and_their_summary(
    exported: Callable[..., tuple[Path, Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, file = exported()
    folder, broken = tmp_path / "out-gptq", tmp_path / "broken.gguf"
    export.get("gptq").write(open_artifact(run), folder)
    broken.write_bytes(file.read_bytes())
    flip(broken, "blk.1.ffn_down.weight", 2, 0x01)
    found = tmp_path / "found.json"
    assert verify_command(run, [file, folder], runtime=False, json_file=found) == 0
    content = json.loads(found.read_text())
    assert content["ok"]
    assert content["run_hash"] == open_artifact(run).run_hash
    assert content["machine"]["node"] == platform.node()
    assert content["versions"]["torch"] == metadata.version("torch")
    assert [entry["file"] for entry in content["files"]] == [str(file), str(folder)]
    assert all(entry["verdict"] == "exact, not run" for entry in content["files"])
    assert "summary" in capsys.readouterr().out

    assert verify_command(run, [file, broken], runtime=False, json_file=found) == 1
    content = json.loads(found.read_text())
    assert not content["ok"]
    assert [entry["ok"] for entry in content["files"]] == [True, False]
    (mismatch,) = content["files"][1]["proof"]["mismatches"]
    assert mismatch["name"] == "model.layers.1.mlp.down_proj.weight"
    assert mismatch["differing"] == 1


def test_an_unreadable_file_among_others(
    exported: Callable[..., tuple[Path, Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, file = exported()
    (tmp_path / "cut.gguf").write_bytes(file.read_bytes()[:1000])
    assert verify_command(run, [tmp_path / "cut.gguf", file], runtime=False, json_file=tmp_path / "j.json") == 2
    assert "truncated or damaged" in capsys.readouterr().out.replace("\n", " ")
    first, second = json.loads((tmp_path / "j.json").read_text())["files"]
    assert (first["verdict"], first["ok"], second["ok"]) == ("unreadable", False, True)


@needs_llama
def test_torch_is_loaded_once_for_all_files(
    exported: Callable[..., tuple[Path, Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, file = exported()
    twin = tmp_path / "twin.gguf"
    twin.write_bytes(file.read_bytes())
    assert verify_command(run, [file, twin], threads=1, json_file=tmp_path / "j.json") == 0
    first, second = json.loads((tmp_path / "j.json").read_text())["files"]
    assert first["agreement"] == second["agreement"]
    assert first["verdict"] == "exact"
    assert 0 <= first["agreement"]["greedy_same"] <= first["agreement"]["greedy_tokens"] <= 64
    assert len(first["agreement"]["torch_answer"]["tokens"]) == first["agreement"]["greedy_tokens"]
    assert "greedy answers: the first" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("ours", "theirs", "same", "longest"),
    [([1, 2, 3], [1, 2, 3], 3, 3), ([1, 2, 3], [1, 9, 3], 1, 3), ([1, 2], [1, 2, 3], 2, 3), ([], [], 0, 0)],
)
def test_greedy_agreement(ours: list[int], theirs: list[int], same: int, longest: int) -> None:
    agreement = Agreement(1, 0.0, 1.0, True, Answer(ours, ""), Answer(theirs, ""))
    assert (agreement.greedy_same, agreement.greedy_tokens) == (same, longest)
    assert Agreement(1, 0.0, 1.0, True, None, None).greedy_tokens == 0


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json"])
def test_a_file_of_the_artifact_that_was_changed(
    name: str, exported: Callable[..., tuple[Path, Path]], capsys: pytest.CaptureFixture[str]
) -> None:
    run, file = exported()
    changed = run / "artifact" / name
    changed.write_text(changed.read_text() + "\n")  # the same JSON, in other bytes
    result = verify(run, file)
    assert result.artifact_changed
    assert not result.mismatches
    assert verify_command(run, [file], runtime=False) == 1
    assert "was changed after it was made" in " ".join(capsys.readouterr().out.split())
