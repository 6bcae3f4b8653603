"""Exported ONNX models, read and changed."""

from pathlib import Path
from typing import Any

import pytest

from qad.artifact import Artifact
from qad.export import onnx as onnx_module
from tests.helpers_models import make_artifact

onnx: Any = pytest.importorskip("onnx")
pytest.importorskip("onnx_ir")
pytest.importorskip("onnxruntime_genai")

NORM = "model.norm.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"


def make_export(run: Path, case: str, **options: Any) -> tuple[Artifact, Path]:
    """Make an artifact of a case of ``helpers_models`` and export it; return both."""
    artifact = make_artifact(run, case, **options)
    onnx_module.write(artifact, run / "student-onnx")
    return artifact, run / "student-onnx"


def read_model(folder: Path) -> Any:
    return onnx.load(folder / "model.onnx", load_external_data=False)


def save_model(folder: Path, model: Any) -> None:
    (folder / "model.onnx").write_bytes(model.SerializeToString())


def initializer(model: Any, name: str) -> Any:
    (found,) = [entry for entry in model.graph.initializer if entry.name == name]
    return found


def place(model: Any, name: str) -> dict[str, str]:
    return {entry.key: entry.value for entry in initializer(model, name).external_data}


def set_place(model: Any, name: str, key: str, value: str) -> None:
    for entry in initializer(model, name).external_data:
        if entry.key == key:
            entry.value = value
