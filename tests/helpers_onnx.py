"""Exported ONNX models, read and changed."""

from pathlib import Path
from typing import Any

import pytest

onnx: Any = pytest.importorskip("onnx")
pytest.importorskip("onnx_ir")
pytest.importorskip("onnxruntime_genai")

NORM = "model.norm.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"


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
