"""A safetensors file mapped once, its tensors read as views of the mapping.

The library's own reader keeps every page it has touched for as long as the file is open, and opening it takes a
millisecond; exporters ask for hundreds of tensors and promise to hold one at a time. Here the file stays open and pages
are given back on request. The library's parser checks the header first.

Layout (https://huggingface.co/docs/safetensors, "Format"): 8 bytes with the header's length, the header as JSON, data.
"""

import json
import math
import mmap
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qad.errors import UserError

DTYPES = {"I8": torch.int8, "U8": torch.uint8, "F16": torch.float16, "F32": torch.float32}


@dataclass(frozen=True)
class Entry:
    """One tensor: the format's name of its type, its shape, and where its bytes lie in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class TensorFile:
    """An opened safetensors file.

    Attributes:
        entries: Name -> description of each tensor.
    """

    def __init__(self, path: Path) -> None:
        """Map a file.

        Raises:
            UserError: Missing, truncated or damaged; the message ends before the remedy, which the caller knows.
        """
        try:
            with safe_open(path, framework="numpy"):
                pass  # the offsets are whole, in order and within the file
            with path.open("rb") as file:
                # Copy on write: torch asks for memory that may be written, and the file must never be.
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            length = int.from_bytes(self._map[:8], "little")
            header = json.loads(self._map[8 : 8 + length])
        except (OSError, ValueError, RecursionError, SafetensorError) as error:
            raise UserError(f"{path.name} is missing, truncated or damaged: {error}") from error
        header.pop("__metadata__", None)
        self.entries = {
            name: Entry(
                entry["dtype"],
                tuple(entry["shape"]),
                *(8 + length + offset for offset in entry["data_offsets"]),
            )
            for name, entry in header.items()
        }
        self._read: list[Entry] = []

    def tensor(self, name: str) -> Tensor:
        """Return a tensor as a view of the file, which is not to be written to."""
        entry = self.entries[name]
        self._read.append(entry)
        dtype, count = DTYPES[entry.dtype], math.prod(entry.shape)
        if count == 0:
            return torch.empty(entry.shape, dtype=dtype)
        if entry.start % dtype.itemsize:
            return torch.frombuffer(bytearray(self._map[entry.start : entry.stop]), dtype=dtype).view(entry.shape)
        return torch.frombuffer(self._map, dtype=dtype, count=count, offset=entry.start).view(entry.shape)

    def give_back(self) -> None:
        """Free the memory of all tensors read so far. Views of them stay valid: they read the file again."""
        if not hasattr(mmap, "MADV_DONTNEED"):
            return
        for entry in self._read:
            # Whole pages within; those at the edges may be a neighbour's.
            start = -(-entry.start // mmap.PAGESIZE) * mmap.PAGESIZE
            stop = entry.stop // mmap.PAGESIZE * mmap.PAGESIZE
            if start < stop:
                self._map.madvise(mmap.MADV_DONTNEED, start, stop - start)
        self._read.clear()
