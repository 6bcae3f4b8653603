"""Exporters: one module per file format, each satisfying ``Exporter``. The folder listing is the registry."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self, cast, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qad.artifact import Artifact
from qad.errors import UserError
from qad.registry import module_named, module_names

OnProgress = Callable[[int, int], None]
# Stands before the run's hash in files whose weights were rounded again on the way: see qad.requantize.
REQUANTIZED = "requantized:"
_CHUNK = 1 << 17  # values compared at a time: what is made of them stays in the cache
_SMALLEST = 2.0**-149  # of float32


def _as_tensor(values: NDArray[Any]) -> Tensor:
    return torch.from_numpy(values if values.flags.writeable else values.copy())


@dataclass(frozen=True)
class Rounding:
    """How far fp16 is from the exact values of a tensor, or of several.

    Attributes:
        values: How many values other than zero there are.
        changed: How many of them fp16 cannot hold.
        largest: Largest relative error of one.
        total: Sum of the relative errors.
    """

    values: int = 0
    changed: int = 0
    largest: float = 0.0
    total: float = 0.0

    @classmethod
    def of(cls, exact: NDArray[np.float32], half: NDArray[Any] | None = None) -> Self:
        """Measure the rounding of values; ``half``: what they became, the nearest fp16 if None."""
        outcome = cls()
        flat = exact.reshape(-1)
        rounded = None if half is None else half.reshape(-1)
        for start in range(0, flat.size, _CHUNK):
            outcome += cls._of_chunk(
                _as_tensor(flat[start : start + _CHUNK]),
                None if rounded is None else _as_tensor(rounded[start : start + _CHUNK]),
            )
        return outcome

    @classmethod
    def _of_chunk(cls, values: Tensor, half: Tensor | None) -> Self:
        # What fp16 does not reach becomes infinite, and so does its error. Other differences are exact in float32.
        errors = (values.half() if half is None else half).float().sub_(values).abs_()
        # NumPy compares and searches several times as fast as torch, torch adds faster.
        present, changed = values.numpy() != 0, errors.numpy() != 0
        # Zeros have no error to divide.
        errors.div_(values.abs().clamp_(min=_SMALLEST))
        return cls(
            int(np.count_nonzero(present)),
            int(np.count_nonzero(changed)),
            float(errors.numpy().max()),
            float(errors.sum()),  # pairwise, so exact to seven digits; in float64 it takes six times as long
        )

    def __add__(self, other: "Rounding") -> Self:
        return type(self)(
            self.values + other.values,
            self.changed + other.changed,
            max(self.largest, other.largest),
            self.total + other.total,
        )

    @property
    def mean(self) -> float:
        """Mean relative error."""
        return self.total / self.values if self.values else 0.0

    def __str__(self) -> str:
        return f"relative error {self.largest:.1e} at most, {self.mean:.1e} in the mean"


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


@runtime_checkable
class Computing(Protocol):
    """Weights of a format that also says how a runtime is to compute with them."""

    @property
    def computing(self) -> str:
        """That, in a line."""
        ...


class Exporter(Protocol):
    """What a module of this folder offers."""

    @property
    def SUFFIX(self) -> str:
        """Ending of what it writes, a file's with the dot: ``qad export`` writes to ``student`` with this ending."""
        ...

    @property
    def GRIDS(self) -> tuple[str, ...]:
        """Names of the grids whose codes it can carry unchanged."""
        ...

    @property
    def FP16_RUNTIMES(self) -> bool:
        """Whether runtimes multiply codes and scales in fp16, which rounds products of more than 11 bits."""
        ...

    def recognizes(self, path: Path) -> bool:
        """Return whether a path is a file or folder of this format, or one to be, judged by names alone."""
        ...

    def only_half(self, artifact: Artifact) -> frozenset[str]:
        """Return the names of the artifact's tensors that the format can hold only as fp16."""
        ...

    def check(self, artifact: Artifact) -> None:
        """Check what can be known before anything is written: grids, architecture, shapes.

        Raises:
            UserError: The format cannot carry the artifact; the message lists those that can.
        """
        ...

    def check_place(self, artifact: Artifact, path: Path) -> None:
        """Check that nothing stands where an artifact is to be written, or an earlier export and nothing else.

        Raises:
            UserError: Something else does, or lies in the folder that would be replaced.
        """
        ...

    def write(self, artifact: Artifact, path: Path, on_progress: OnProgress | None = None) -> Mapping[str, Rounding]:
        """Write an artifact's codes and scales, whole or not at all.

        Args:
            artifact: What to write.
            path: Where.
            on_progress: Called with the bytes written so far and in all.

        Returns:
            Name of each tensor that only fp16 could hold -> by how much that moved it.

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
    return module_names(__name__)


def get(name: str) -> Exporter:
    """Return the exporter of that name.

    Raises:
        UserError: No such format; the message lists those there are.
    """
    return cast(Exporter, module_named(__name__, name, "format"))


def exporter_for(path: Path) -> Exporter:
    """Return the exporter that reads a file or folder.

    Raises:
        UserError: No format knows it.
    """
    exporters = [get(name) for name in names()]
    for exporter in exporters:
        if exporter.recognizes(path):
            return exporter
    endings = ", ".join(sorted(exporter.SUFFIX for exporter in exporters if exporter.SUFFIX.startswith(".")))
    raise UserError(
        f"{path} has none of the known endings: {endings}; nor is it a GPTQ folder with its configuration "
        "or an ONNX folder with its model.onnx"
    )


def formats_that_carry(artifact: Artifact) -> list[str]:
    """Return the names of the formats that know every grid of an artifact."""
    return [name for name in names() if set(artifact.grids.values()) <= set(get(name).GRIDS)]


def check_grids(artifact: Artifact, exporter: Exporter) -> None:
    """Check that a format knows every grid of an artifact.

    Raises:
        UserError: It does not; the message lists the formats that do.
    """
    missing = sorted(set(artifact.grids.values()) - set(exporter.GRIDS))
    if missing:
        able = formats_that_carry(artifact)
        raise UserError(
            f"this format cannot carry the grid {', '.join(missing)} without rounding again (it carries "
            f"{', '.join(exporter.GRIDS)}); "
            + (f"formats that can: {', '.join(able)}" if able else "no format can: train on another grid")
        )
