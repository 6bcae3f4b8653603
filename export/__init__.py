"""Exporters: one module per file format, each satisfying ``Exporter``. The folder listing is the registry."""

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol, cast

import numpy as np
from numpy.typing import NDArray

from qad.artifact import Artifact
from qad.errors import UserError, unknown_name

OnProgress = Callable[[int, int], None]


class Weights(Protocol):
    """Tensors of an exported file by Hugging Face name, decoded one at a time when asked for."""

    def __getitem__(self, name: str, /) -> NDArray[np.float32]:
        """Return one tensor in the row order of the Hugging Face model."""
        ...

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""
        ...

    def __len__(self) -> int:
        """Return the number of tensors."""
        ...


class Exporter(Protocol):
    """What a module of this folder offers."""

    @property
    def SUFFIX(self) -> str:
        """Ending of the files it writes, with the dot."""
        ...

    @property
    def GRIDS(self) -> tuple[str, ...]:
        """Names of the grids whose codes it can carry unchanged."""
        ...

    def write(self, artifact: Artifact, path: Path, on_progress: OnProgress | None = None) -> None:
        """Write an artifact's codes and scales, whole or not at all.

        Args:
            artifact: What to write.
            path: Where.
            on_progress: Called with the bytes written so far and in all.

        Raises:
            UserError: The format cannot carry the artifact, or the disk is full; a previous file survives.
        """
        ...

    def read(self, path: Path) -> Weights:
        """Return the weights that an independent decoder finds in a file.

        Raises:
            UserError: Not such a file, truncated or damaged.
        """
        ...

    def run_hash(self, path: Path) -> str | None:
        """Return the hash of the run that a file says it was exported from, None if it says nothing."""
        ...


def names() -> list[str]:
    """Return the names of the formats."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def get(name: str) -> Exporter:
    """Return the exporter of that name.

    Raises:
        UserError: No such format; the message lists those there are.
    """
    if name not in names():
        raise unknown_name("format", name, names())
    return cast(Exporter, importlib.import_module(f"{__name__}.{name}"))


def exporter_for(path: Path) -> Exporter:
    """Return the exporter that writes and reads files with a path's ending.

    Raises:
        UserError: No format has that ending.
    """
    endings = {get(name).SUFFIX: name for name in names()}
    if path.suffix not in endings:
        raise UserError(f"{path} has none of the known endings: {', '.join(sorted(endings))}")
    return get(endings[path.suffix])


def check_grids(artifact: Artifact, exporter: Exporter) -> None:
    """Check that a format can carry every grid of an artifact.

    Raises:
        UserError: It cannot; the message lists the formats that can.
    """
    grids = set(artifact.grids.values())
    missing = sorted(grids - set(exporter.GRIDS))
    if missing:
        able = [name for name in names() if grids <= set(get(name).GRIDS)]
        raise UserError(
            f"this format cannot carry the grid {', '.join(missing)} without rounding again (it carries "
            f"{', '.join(exporter.GRIDS)}); "
            + (f"formats that can: {', '.join(able)}" if able else "no format can: train on another grid")
        )
