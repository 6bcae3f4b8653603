"""Artifacts of tiny models and what is exported of them."""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qad import artifact as artifacts
from qad.artifact import Artifact
from qad.export import Exporter
from tests.helpers_models import make_artifact

# All widths divide by 128.
WIDE: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
Exported = Callable[[str], tuple[Artifact, Path]]


def make_export(exporter: Exporter, place: Path, case: str, **options: Any) -> tuple[Artifact, Path]:
    """Make an artifact of a case of ``helpers_models`` and export it to a place beside it; return both."""
    artifact = make_artifact(place.parent, case, **options)
    exporter.write(artifact, place)
    return artifact, place


def seal(folder: Path) -> None:
    """Give an artifact that was changed the hash of what it is now, as if it had been trained so."""
    file = folder / "artifact.json"
    description = json.loads(file.read_text())
    del description["run_hash"]
    description["run_hash"] = artifacts._hash(description, folder)
    file.write_text(json.dumps(description))


def exports_made_once(
    exporter: Exporter,
    name: str,
    factory: pytest.TempPathFactory,
    options: Callable[[str], dict[str, Any]] = lambda _: {},
) -> Exported:
    """Return a maker of artifacts and their exports, each made once and not to be changed.

    Args:
        exporter: To which format.
        name: Of the file or folder, in a folder of the case's own.
        factory: Of such folders.
        options: Of ``make_artifact``, by case.
    """

    @functools.cache
    def make(case: str) -> tuple[Artifact, Path]:
        return make_export(exporter, factory.mktemp(case) / name, case, **options(case))

    return make
