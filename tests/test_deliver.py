"""qad export: several formats at once, the manifest beside them, names that fit, and grids that do not."""

import hashlib
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from qad import export, files
from qad.artifact import open_artifact
from qad.bench_run import digest
from qad.deliver import MANIFEST, export_command
from qad.errors import UserError
from qad.files import is_dropping, replacing_file
from qad.locks import locked
from qad.requantize import requantized
from qad.tensor import dequantize, mse_scales, quantize
from qad.verify import verify
from qad.verify_command import verify_command
from tests.helpers_commands import interrupted
from tests.helpers_exports import seal
from tests.helpers_models import make_artifact
from tests.helpers_runs import SIZES as SMALL
from tests.helpers_runs import save_model

WIDE: dict[str, Any] = {**SMALL, "intermediate_size": 128}  # rows that blocks of 64 divide


def fold(text: str) -> str:
    return text.replace("\n", "")


def test_two_formats_and_their_manifest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    artifact = make_artifact(tmp_path / "run", "llama-tied", **SMALL)
    out = tmp_path / "out"
    export_command(tmp_path / "run", "gguf, gptq,gguf", out, requantize=False)
    assert sorted(path.name for path in out.iterdir()) == [MANIFEST, "student-gptq", "student.gguf"]
    assert "student.gguf: 0." in capsys.readouterr().out
    manifest = json.loads((out / MANIFEST).read_text())
    assert manifest["run_hash"] == artifact.run_hash
    assert manifest["grids"] == artifact.grids
    described = {}
    for entry in manifest["exports"]:
        assert entry["exact"]
        assert verify(tmp_path / "run", out / entry["path"]).ok
        described |= {file["path"]: file for file in entry["files"]}
        assert entry["bytes"] == sum(file["bytes"] for file in entry["files"])
    there = {path.relative_to(out).as_posix(): path for path in out.rglob("*") if path.is_file()}
    assert described.keys() == there.keys() - {MANIFEST}
    for name, file in described.items():
        content = there[name].read_bytes()
        assert (file["bytes"], file["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
    gguf, gptq = manifest["exports"]
    assert (gguf["format"], gguf["held_as_fp16"]) == ("gguf", {})
    exporter = export.get("gptq")
    assert gptq["held_as_fp16"].keys() == exporter.only_half(artifact)
    assert 0 < gptq["held_as_fp16"]["model.embed_tokens.weight"]["largest_relative_error"] < 2**-10


def test_without_a_place_they_go_to_the_run(tmp_path: Path) -> None:
    make_artifact(tmp_path, "llama-tied", **SMALL)
    export_command(tmp_path, "gptq,gguf", None, requantize=False)
    assert {MANIFEST, "student-gptq", "student.gguf"} <= {path.name for path in tmp_path.iterdir()}


def test_one_format_is_one_file(tmp_path: Path) -> None:
    make_artifact(tmp_path / "run", "llama-tied", **SMALL)
    export_command(tmp_path / "run", "gguf", tmp_path / "out" / "Model.GGUF", requantize=False)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["Model.GGUF"]
    assert verify(tmp_path / "run", tmp_path / "out" / "Model.GGUF").ok


@pytest.mark.parametrize("several", [False, True])
def test_a_file_of_something_else_is_left_alone(tmp_path: Path, several: bool) -> None:
    make_artifact(tmp_path / "run", "llama-tied", **SMALL)
    file = tmp_path / "out" / "student.gguf"
    file.parent.mkdir()
    file.write_bytes(b"GGUF, but somebody else's")
    formats, output = ("gptq,gguf", file.parent) if several else ("gguf", file)
    with pytest.raises(UserError, match=r"student.gguf was not exported by qad: delete it, or name another place"):
        export_command(tmp_path / "run", formats, output, requantize=False)
    assert file.read_bytes() == b"GGUF, but somebody else's"
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    file.unlink()
    for _ in range(2):  # what it wrote itself is replaced
        export_command(tmp_path / "run", "gguf", file, requantize=False)


@pytest.mark.parametrize("format", ["gptq", "onnx"])  # the last one, so that the GGUF file would have been written
def test_somebody_s_own_file_in_an_earlier_export_is_kept(tmp_path: Path, format: str) -> None:  # noqa: A002
    if format == "onnx":
        pytest.importorskip("onnxruntime_genai", reason="ONNX Runtime GenAI is not installed")
    make_artifact(tmp_path / "run", "llama-tied", **SMALL)
    out = tmp_path / "out"
    export_command(tmp_path / "run", f"gguf,{format}", out, requantize=False)
    export_command(tmp_path / "run", f"gguf,{format}", out, requantize=False)
    notes = out / f"student-{format}" / "notes.txt"
    notes.write_text("mine")
    (out / "student.gguf").unlink()
    with pytest.raises(UserError, match=r"notes\.txt in it did not come from qad: move that elsewhere"):
        export_command(tmp_path / "run", f"gguf,{format}", out, requantize=False)
    assert notes.read_text() == "mine"
    assert not (out / "student.gguf").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such locks on Windows")
def test_exports_to_one_folder_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_artifact(tmp_path / "run", "llama-tied", **SMALL)
    run, out = tmp_path / "run", tmp_path / "out"
    export_command(run, "gguf,gptq", out, requantize=False)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    told = r"another export writes to .*out: wait until it has ended, or name another folder"
    # Beside several formats nothing is written; beside a single one another may be, but no several.
    with locked(out):
        for formats, target in (("gguf,gptq", out), ("gguf", out / "student.gguf"), ("gptq", out / "student-gptq")):
            with pytest.raises(UserError, match=told):
                export_command(run, formats, target, requantize=False)
    with locked(out, shared=True), pytest.raises(UserError, match=told):
        export_command(run, "gguf,gptq", out, requantize=False)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    with locked(out, shared=True):
        export_command(run, "gguf", out / "other.gguf", requantize=False)
    # The same file: whoever began keeps it.
    monkeypatch.setattr(files, "_PATIENCE", 0.1)
    with (
        replacing_file(out / "other.gguf") as first,
        pytest.raises(UserError, match=r"other.gguf is being written by another process: wait until it has ended"),
    ):
        export_command(run, "gguf", out / "other.gguf", requantize=False)
    assert not first.exists()
    export_command(run, "gguf,gptq", out, requantize=False)


@pytest.mark.parametrize("format", ["gptq", "onnx"])
def test_what_file_managers_leave_stops_no_export_and_changes_no_run(tmp_path: Path, format: str) -> None:  # noqa: A002
    if format == "onnx":
        pytest.importorskip("onnxruntime_genai", reason="ONNX Runtime GenAI is not installed")
    run, out = tmp_path / "run", tmp_path / "out"
    artifact = make_artifact(run, "llama-tied", **SMALL)
    before = digest(run)
    out.mkdir()
    for folder in (run / "artifact", out):
        for name in (".DS_Store", "Thumbs.db", "desktop.ini", "._model.safetensors", ".directory"):
            (folder / name).write_bytes(b"\0\0\0\1Bud1")
    # Of a place that was only looked at, and of an earlier export.
    export_command(run, format, out, requantize=False)
    names = sorted(path.name for path in out.iterdir())
    assert "config.json" in names
    assert not any(is_dropping(path) for path in out.iterdir())
    (out / ".DS_Store").touch()
    export_command(run, format, out, requantize=False)
    assert sorted(path.name for path in out.iterdir()) == names
    # The run is the run that it was.
    assert artifact.is_whole()
    assert digest(run) == before
    # A folder of that name is somebody's work.
    (out / "._mine").mkdir()
    with pytest.raises(UserError, match=r"\._mine in it did not come from qad"):
        export_command(run, format, out, requantize=False)


@pytest.mark.parametrize(
    ("formats", "name", "message"),
    [
        ("gguf", "out.txt", "does not end in .gguf"),
        ("gguf", "out", "does not end in .gguf"),
        ("gptq", "out.GGUF", "ends like a gguf file, and gptq is a folder"),
        ("gguf,gptq", "file", "is a file: for several formats name a folder"),
        (" , ", "out.gguf", "--format names none"),
        ("gguf,nope", "out", "unknown format 'nope'"),
    ],
)
def test_names_that_do_not_fit(tmp_path: Path, formats: str, name: str, message: str) -> None:
    make_artifact(tmp_path / "run", "llama-tied", **SMALL)
    (tmp_path / "file").write_text("precious")
    with pytest.raises(UserError, match=message):
        export_command(tmp_path / "run", formats, tmp_path / name, requantize=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "run"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"wide_inputs": "most"}, "no wide inputs 'most'"),
        ({"accuracy_level": 7}, "no accuracy level 7"),
        ({"accuracy_level": 1, "wide_inputs": "all"}, "at accuracy level 4"),
    ],
    ids=str,
)
def test_options_are_checked_before_the_first_format(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    make_artifact(tmp_path / "run", "llama-tied", **SMALL)
    with pytest.raises(UserError, match=message):
        export_command(tmp_path / "run", "gguf,onnx", tmp_path / "out", requantize=False, onnx=options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", ["{", "[]", ""])
def test_damaged_generation_settings(tmp_path: Path, content: str) -> None:
    artifact = make_artifact(tmp_path / "run", "llama-tied", **SMALL)
    (artifact.folder / "generation_config.json").write_text(content)
    seal(artifact.folder)
    with pytest.raises(UserError, match=r"generation_config.json cannot be read .*: copy it again, or delete it"):
        export_command(tmp_path / "run", "gptq", tmp_path / "out", requantize=False)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def _flip_a_code(folder: Path) -> None:
    file = folder / "weights.safetensors"
    content = bytearray(file.read_bytes())
    content[-2000] ^= 4
    file.write_bytes(content)


@pytest.mark.parametrize(
    "change",
    [
        _flip_a_code,
        lambda folder: (folder / "notes.txt").write_text("mine"),
        lambda folder: (folder / "tokenizer_config.json").unlink(),
        lambda folder: (folder / "config.json").write_text((folder / "config.json").read_text() + "\n"),
    ],
    ids=["weights", "added", "lost", "configuration"],
)
@pytest.mark.parametrize("formats", ["gguf", "gguf,gptq"])
def test_nothing_vouches_for_an_artifact_that_was_changed(tmp_path: Path, formats: str, change: Any) -> None:
    artifact = make_artifact(tmp_path / "run", "llama-tied", **SMALL)
    change(artifact.folder)
    with pytest.raises(
        UserError,
        match=r"a file in it was changed, added or lost; take out what was put there, or else copy the run again",
    ):
        export_command(tmp_path / "run", formats, tmp_path / "out.gguf", requantize=False)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_what_an_interrupted_export_left_in_the_artifact_does_not_change_it(tmp_path: Path) -> None:
    folder = make_artifact(tmp_path / "run", "llama-tied", **SMALL).folder
    for name in (".student.gguf.ab12cd34.tmp", ".gitattributes"):
        (folder / name).write_bytes(b"half")
    export_command(folder, "gguf", None, requantize=False)
    assert verify(tmp_path / "run", folder / "student.gguf").ok
    export_command(folder, "gguf,gptq", None, requantize=False)


def test_a_grid_that_one_of_them_cannot_carry(tmp_path: Path) -> None:
    make_artifact(tmp_path / "run", "llama-tied", linear_grid="int4_g64", **WIDE)
    with pytest.raises(UserError, match=r"gguf: this format cannot carry the grid int4_g64.*formats that can: gptq"):
        export_command(tmp_path / "run", "gptq,gguf", tmp_path / "out", requantize=False)
    assert not (tmp_path / "out").exists()


def test_an_old_manifest_does_not_outlive_what_it_describes(tmp_path: Path) -> None:
    make_artifact(tmp_path / "run", "llama-tied", **SMALL)
    out = tmp_path / "out"
    export_command(tmp_path / "run", "gguf,gptq", out, requantize=False)
    settings = tmp_path / "run" / "artifact" / "generation_config.json"
    settings.write_text("{")  # no GGUF file holds it
    seal(settings.parent)
    with pytest.raises(UserError, match="cannot be read"):
        export_command(tmp_path / "run", "gguf,gptq", out, requantize=False)
    assert not (out / MANIFEST).exists()
    settings.unlink()
    seal(settings.parent)
    assert verify(tmp_path / "run", out / "student.gguf").ok


@pytest.mark.parametrize("content", ['{"name": "an app"}', "[]", "{"])
def test_a_manifest_of_something_else_is_left_alone(tmp_path: Path, content: str) -> None:
    make_artifact(tmp_path / "run", "llama-tied", **SMALL)
    (tmp_path / MANIFEST).write_text(content)
    with pytest.raises(UserError, match="no manifest of qad"):
        export_command(tmp_path / "run", "gguf,gptq", tmp_path, requantize=False)
    assert (tmp_path / MANIFEST).read_text() == content
    assert sorted(path.name for path in tmp_path.iterdir()) == [MANIFEST, "run"]


def test_the_last_table_breaks_no_verdict_at_80_columns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    make_artifact(tmp_path / "run", "llama-tied", **SMALL)
    export_command(tmp_path / "run", "gguf,gptq", tmp_path, requantize=False)
    files = [tmp_path / "student.gguf", tmp_path / "student-gptq", tmp_path / "missing.gguf"]
    assert verify_command(tmp_path / "run", files, runtime=False) == 2
    summary = capsys.readouterr().out.partition("summary")[2]  # the table
    assert "unreadable" in summary
    assert "exact, not" in summary
    assert max(map(len, summary.splitlines())) <= 80


def test_requantized_is_said_everywhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    artifact = make_artifact(tmp_path / "run", "llama-tied", linear_grid="int4_g64", **WIDE)
    out = tmp_path / "out"
    export_command(tmp_path / "run", "gguf,gptq", out, requantize=True)
    told = fold(capsys.readouterr().out)
    linear = [name for name in artifact.grids if name != "model.embed_tokens.weight"]
    assert f"NOT the trained weights: {len(linear)} tensors were rounded again ({len(linear)} to q4_0)" in told
    assert "KL of the requantized to the trained student" in told
    exact = {entry["format"]: entry for entry in json.loads((out / MANIFEST).read_text())["exports"]}
    assert (exact["gguf"]["exact"], exact["gptq"]["exact"]) == (False, True)
    assert exact["gguf"]["requantized"]["tensors"] == dict.fromkeys(linear, "q4_0")
    assert 0 < exact["gguf"]["requantized"]["cost"]["after"] < 1

    assert verify(tmp_path / "run", out / "student-gptq").ok
    result = verify(tmp_path / "run", out / "student.gguf")
    assert result.requantized
    assert not result.ok
    assert result.file_run_hash == f"requantized:{artifact.run_hash}"
    assert {mismatch.name for mismatch in result.mismatches} <= set(linear)
    assert verify_command(tmp_path / "run", [out / "student.gguf"], runtime=False) == 1
    assert "NOT EXACT: the file says that its weights were rounded again" in fold(capsys.readouterr().out)


def test_requantized_weights_are_those_of_the_nearest_grid(tmp_path: Path) -> None:
    artifact = make_artifact(tmp_path / "run", "llama-untied", linear_grid="int8_g64", **WIDE)
    made, changed = requantized(artifact, "gguf", tmp_path / "made")
    assert set(changed.values()) == {"q8_0"}
    for name in artifact.grids:
        weight = artifact.weight(name)
        grid = made.quantized(name).grid
        expected = weight if name not in changed else dequantize(quantize(weight, grid, mse_scales(weight, grid)))
        assert torch.equal(made.weight(name), expected)
    assert [made.weight(name).tolist() for name in made.kept] == [artifact.weight(n).tolist() for n in artifact.kept]


def test_mixed_grids_become_the_finest_for_a_format_of_one(tmp_path: Path) -> None:
    mixed = {"model.layers.1.mlp.down_proj.weight": "q8_0"}
    artifact = make_artifact(tmp_path / "run", "llama-tied", grids=mixed, **SMALL)
    with pytest.raises(UserError, match="one width and one group size"):
        export.get("gptq").check(artifact)
    made, changed = requantized(artifact, "gptq", tmp_path / "made")
    assert set(changed.values()) == {"q8_0"}
    assert mixed.keys().isdisjoint(changed)
    export.get("gptq").check(made)


def test_the_cost_is_measured_against_the_teacher(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teacher = save_model(tmp_path / "teacher", intermediate_size=128)
    artifact = make_artifact(tmp_path / "run", "llama-tied", linear_grid="int4_g64", **WIDE)
    description = artifact.folder / "artifact.json"
    content = json.loads(description.read_text())
    content["recipe"]["teacher"] = teacher
    description.write_text(json.dumps(content))
    seal(artifact.folder)
    assert open_artifact(tmp_path / "run").recipe["teacher"] == teacher
    export_command(tmp_path / "run", "gguf", tmp_path / "x.gguf", requantize=True)
    told = fold(capsys.readouterr().out)
    assert "KL to the teacher" in told
    before, after = (float(told.split(mark)[0].split()[-1]) for mark in (" as trained,", " after rounding again"))
    assert 0 < before < 1
    assert 0 < after < 1
    assert before != after


def test_nothing_to_requantize(tmp_path: Path) -> None:
    make_artifact(tmp_path / "run", "llama-tied", **SMALL)
    export_command(tmp_path / "run", "gguf", tmp_path / "x.gguf", requantize=True)
    assert verify(tmp_path / "run", tmp_path / "x.gguf").ok


@pytest.mark.parametrize(
    ("formats", "sign", "said", "left"),
    [
        # The sign is what stands there when the moment has come: the tokenizer is being read then, or ONNX's libraries.
        ("gguf", ".student.gguf.*", "interrupted: gguf not written", []),
        (
            "gguf,onnx",
            "student.gguf",
            "interrupted: gguf is written and whole ({out}/student.gguf); onnx not written; no manifest.json",
            ["student.gguf"],
        ),
    ],
    ids=["one", "the second of two"],
)
def test_an_interrupt_says_what_was_finished(
    formats: str, sign: str, said: str, left: list[str], tmp_path: Path
) -> None:
    if "onnx" in formats and importlib.util.find_spec("onnxruntime_genai") is None:
        pytest.skip("onnxruntime-genai is not installed")
    make_artifact(tmp_path / "run", "llama-tied", **SMALL)
    out = tmp_path / "out"
    output = out / "student.gguf" if formats == "gguf" else out
    done = interrupted(
        *("export", tmp_path / "run", "--format", formats, "-o", output), when=lambda: bool(list(out.glob(sign)))
    )
    assert done.returncode == 130, done.stderr
    assert done.stdout.splitlines()[-1] == said.format(out=out)
    assert done.stderr == ""
    assert [path.name for path in out.iterdir()] == left
    if left:
        assert verify(tmp_path / "run", out / left[0]).ok
