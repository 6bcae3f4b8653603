"""ONNX export, refused: wrong bits, models that lie, and what cannot be exported."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qad.artifact import Artifact, open_artifact
from qad.errors import UserError
from qad.export import onnx as onnx_module
from qad.verify import verify
from qad.verify_command import verify_command
from tests.helpers_exports import make_export
from tests.helpers_models import make_artifact
from tests.helpers_onnx import DOWN, NORM, initializer, place, read_model, save_model, set_place


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Artifact, Path]:
    """Return an artifact and its folder, not to be changed."""
    return make_export(onnx_module, tmp_path_factory.mktemp("exported") / "student-onnx", "llama-tied")


def flip(folder: Path, name: str, byte: int, bits: int) -> None:
    with (folder / "model.onnx.data").open("r+b") as file:
        at = int(place(read_model(folder), name)["offset"]) + byte
        file.seek(at)
        (old,) = file.read(1)
        file.seek(at)
        file.write(bytes([old ^ bits]))


# ------------------------------------------------------------------------------------------------ one wrong bit


@pytest.mark.parametrize(
    ("name", "byte", "differing"),
    [
        (f"{DOWN}.codes", 0, 1),
        (f"{DOWN}.codes", 19, 1),
        (f"{DOWN}.scales", 4 * 7 + 2, 32),
        ("model.embed_tokens.weight.codes", 777, 1),
        ("model.layers.0.self_attn.q_proj.bias", 5, 1),
        (NORM, 4, 1),
    ],
)
def test_one_flipped_bit(name: str, byte: int, differing: int, tmp_path: Path) -> None:
    artifact, folder = make_export(onnx_module, tmp_path / "student-onnx", "llama-biases")
    flip(folder, name, byte, 1)
    (mismatch,) = verify(artifact.folder.parent, folder).mismatches
    assert mismatch.name == name.removesuffix(".codes").removesuffix(".scales")
    assert 1 <= mismatch.differing <= differing


def test_verify_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    artifact, folder = make_export(onnx_module, tmp_path / "student-onnx", "llama-untied")
    run = artifact.folder.parent
    assert verify_command(run, [folder], threads=1) == 0
    out = capsys.readouterr().out
    assert "bit-exact: 16 of 16 tensors" in out
    assert "kept in float32: 5 of 5 tensors equal" in out
    assert "same top-1" in out
    flip(folder, NORM, 4, 1)
    flip(folder, f"{DOWN}.codes", 4, 1)
    assert verify_command(run, [folder], runtime=False) == 1
    out = capsys.readouterr().out
    assert "bit-exact: 15 of 16 tensors" in out
    assert "kept in float32: 4 of 5 tensors equal" in out


def test_a_head_that_is_no_longer_tied(tmp_path: Path) -> None:
    artifact, folder = make_export(onnx_module, tmp_path / "student-onnx", "llama-tied")
    model = read_model(folder)
    offset = int(place(model, "lm_head.weight.codes")["offset"])
    set_place(model, "lm_head.weight.codes", "offset", str(offset + 64))
    save_model(folder, model)
    (mismatch,) = verify(artifact.folder.parent, folder).mismatches
    assert mismatch.name == "lm_head.weight"


def test_another_runs_folder(exported: tuple[Artifact, Path], tmp_path: Path) -> None:
    _, folder = exported
    make_artifact(tmp_path, "qwen3")
    result = verify(tmp_path, folder)
    assert not result.ok
    assert result.exact == 0
    assert result.file_run_hash != result.run_hash


# ------------------------------------------------------------------------------------------------ refusals


def test_unknown_options(tmp_path: Path) -> None:
    artifact = make_artifact(tmp_path, "llama-tied")
    with pytest.raises(UserError, match="unknown target 'npu': cpu or cuda"):
        onnx_module.write(artifact, tmp_path / "out", target="npu")
    with pytest.raises(UserError, match="no accuracy level 5"):
        onnx_module.write(artifact, tmp_path / "out", accuracy_level=5)
    with pytest.raises(UserError, match="no wide inputs 'some': none, sensitive, all"):
        onnx_module.write(artifact, tmp_path / "out", wide_inputs="some")
    elsewhere: list[dict[str, Any]] = [{"accuracy_level": 1}, {"target": "cuda"}]
    for options in elsewhere:
        with pytest.raises(UserError, match="accuracy level 4: nothing else rounds inputs"):
            onnx_module.write(artifact, tmp_path / "out", wide_inputs="all", **options)
    assert not (tmp_path / "out").exists()


def test_unknown_architecture_and_tensors(tmp_path: Path) -> None:
    artifact = make_artifact(tmp_path, "llama-tied")
    description = json.loads((artifact.folder / "config.json").read_text())

    def change(**changes: Any) -> Artifact:
        (artifact.folder / "config.json").write_text(json.dumps(description | changes))
        return open_artifact(tmp_path)

    with pytest.raises(UserError, match="'mamba' is not supported; supported: llama, qwen2, qwen3"):
        onnx_module.write(change(model_type="mamba"), tmp_path / "out")
    with pytest.raises(UserError, match=r"has no place for model.layers.1"):
        onnx_module.write(change(num_hidden_layers=1), tmp_path / "out")
    with pytest.raises(UserError, match=r"lacks model.layers.2"):
        onnx_module.write(change(num_hidden_layers=3), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_heads_that_onnx_runtime_cannot_rotate(tmp_path: Path) -> None:
    heads: dict[str, Any] = {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 36}
    artifact = make_artifact(tmp_path, "qwen3", **heads)
    with pytest.raises(UserError, match=r"rotates 36 dimensions of a head.*multiple of 16; formats that can: gguf"):
        onnx_module.write(artifact, tmp_path / "out")


def test_missing_tokenizer(tmp_path: Path) -> None:
    artifact = make_artifact(tmp_path, "llama-tied")
    for file in artifact.folder.glob("*token*"):
        file.unlink()
    with pytest.raises(UserError, match="holds no tokenizer"):
        onnx_module.write(artifact, tmp_path / "out")


# ------------------------------------------------------------------------------------------------ damaged folders


def damage(model: Any, kind: str) -> None:
    """Change a model in a way that a decoder must not follow."""
    codes = f"{DOWN}.codes"
    node = next(node for node in model.graph.node if node.op_type == "MatMulNBits")
    attributes = {attribute.name: attribute for attribute in node.attribute}
    changes: dict[str, Callable[[], Any]] = {
        "outside": lambda: set_place(model, codes, "location", "../student-onnx/model.onnx.data"),
        "absolute": lambda: set_place(model, codes, "location", "/etc/passwd"),
        "device": lambda: set_place(model, codes, "location", "pipe"),
        "link": lambda: set_place(model, codes, "location", "link"),
        "nameless": lambda: set_place(model, codes, "location", ""),
        "nul": lambda: set_place(model, codes, "location", "a\0b"),
        "below nought": lambda: set_place(model, codes, "offset", "-4096"),
        "beyond": lambda: set_place(model, codes, "offset", str(2**63 - 1)),
        "no number": lambda: set_place(model, codes, "offset", "9" * 5000),
        "other digits": lambda: set_place(model, codes, "offset", "٣"),
        "short": lambda: set_place(model, codes, "length", "1"),
        "huge": lambda: initializer(model, codes).dims.__setitem__(0, 2**40),
        "negative": lambda: initializer(model, codes).dims.__setitem__(0, -1),
        "many dimensions": lambda: initializer(model, codes).dims.extend([2] * 100000),
        "type": lambda: setattr(initializer(model, codes), "data_type", 1),
        "unknown type": lambda: setattr(initializer(model, codes), "data_type", 99),
        "inline": lambda: setattr(initializer(model, codes), "data_location", 0),
        "twice": lambda: model.graph.initializer.append(initializer(model, codes)),
        "bits": lambda: setattr(attributes["bits"], "i", 3),
        "block": lambda: setattr(attributes["block_size"], "i", 0),
        "rows": lambda: setattr(attributes["N"], "i", 2**62),
        "columns": lambda: setattr(attributes["K"], "i", -5),
        "inputs": lambda: node.input.append("zero_points"),
        "stranger": lambda: node.input.__setitem__(1, "nowhere"),
        "domain": lambda: setattr(node, "domain", "another"),
        "own operators": lambda: setattr(model.functions.add(), "name", "MatMulNBits"),
    }
    changes[kind]()


KINDS = ["outside", "absolute", "device", "link", "nameless", "nul", "below nought", "beyond", "no number", "short"]
KINDS += ["other digits", "huge", "negative", "many dimensions", "type", "unknown type", "inline", "twice", "bits"]
KINDS += ["block", "rows", "columns", "inputs", "stranger", "domain", "own operators"]


@pytest.mark.parametrize("kind", KINDS)
def test_models_that_lie(kind: str, exported: tuple[Artifact, Path], tmp_path: Path) -> None:
    artifact, source = exported
    folder = tmp_path / "student-onnx"
    folder.mkdir()
    os.link(source / "model.onnx.data", folder / "model.onnx.data")
    os.mkfifo(folder / "pipe")
    (folder / "link").symlink_to("/etc/passwd")
    model = read_model(source)
    damage(model, kind)
    save_model(folder, model)
    with pytest.raises(UserError, match="is damaged"):
        verify(artifact.folder.parent, folder)


def test_truncated_and_scrambled_files(tmp_path: Path) -> None:
    artifact, folder = make_export(onnx_module, tmp_path / "student-onnx", "llama-tied")
    run = artifact.folder.parent
    for name, message in (("model.onnx", "damaged"), ("model.onnx.data", "damaged")):
        data = (folder / name).read_bytes()
        for length in (1, 100, len(data) // 2, len(data) - 5):
            (folder / name).write_bytes(data[:length])
            with pytest.raises(UserError, match=message):
                verify(run, folder)
        (folder / name).write_bytes(data)
    data = (folder / "model.onnx").read_bytes()
    random = np.random.default_rng(0)
    for _ in range(200):
        scrambled = bytearray(data)
        for _ in range(int(random.integers(1, 4))):
            scrambled[int(random.integers(0, len(data)))] = int(random.integers(0, 256))
        (folder / "model.onnx").write_bytes(scrambled)
        try:
            verify(run, folder)
        except UserError:
            continue
    (folder / "model.onnx").write_bytes(bytes(17 << 20))
    with pytest.raises(UserError, match="more than 16 MiB"):
        verify(run, folder)
    (folder / "model.onnx").write_bytes(data)
    (folder / "model.onnx.data").unlink()
    with pytest.raises(UserError, match="is not in the folder"):
        verify(run, folder)
