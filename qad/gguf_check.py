"""Read the header of a GGUF file with every length checked, before a C++ or NumPy reader trusts it.

llama.cpp and gguf-py take a header at its word: a truncated or damaged file ends in an abort, an exception that names
an internal array, or an allocation of terabytes. The parser here bounds each count and offset by what the file holds,
so that the user reads what is wrong with it. What is given up: files split into several parts are checked one by one.

Layout (ggml's ``gguf.md``): magic, version, tensor count, pair count; pairs; tensor descriptions; padding; data.
"""

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from qad.errors import UserError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MAX_DIMENSIONS = 4
_DEFAULT_ALIGNMENT = 32
# Value type number -> struct code of a scalar. 8 is a string, 9 an array.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class GGUFTensor:
    """One tensor's description.

    Attributes:
        name: Its GGUF name.
        shape: Rows first, as NumPy and torch count (the file stores the reverse).
        type: The ggml type of its blocks.
        start, size: Where its bytes lie in the file.
    """

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    start: int
    size: int


@dataclass(frozen=True)
class GGUFHeader:
    """What stands before the data of a GGUF file: metadata as Python values, and where each tensor lies."""

    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]


class _Damaged(Exception):
    """The header contradicts itself or the size of the file."""


class _Cursor:
    """A reading position in the mapped file that cannot pass its end."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.position = 0

    def left(self) -> int:
        return len(self.data) - self.position

    def need(self, size: int, what: str) -> None:
        if size > self.left():
            raise _Damaged(f"it ends within {what} (byte {len(self.data)})")

    def scalar(self, code: str, what: str) -> Any:
        size = struct.calcsize("<" + code)
        self.need(size, what)
        (value,) = struct.unpack_from("<" + code, self.data, self.position)
        self.position += size
        return value

    def string(self, what: str) -> str:
        size = self.scalar("Q", what)
        self.need(size, what)
        raw = self.data[self.position : self.position + size]
        self.position += size
        # Token texts may be any bytes; only names must be text, and those are compared, not decoded further.
        return raw.decode("utf-8", errors="replace")

    def value(self, kind: int, what: str) -> Any:
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind], what)
        if kind == _STRING:
            return self.string(what)
        if kind != _ARRAY:
            raise _Damaged(f"{what} has the unknown value type {kind}")
        item = self.scalar("I", what)
        count = self.scalar("Q", what)
        if item in _SCALARS:
            code = _SCALARS[item]
            size = count * struct.calcsize("<" + code)
            self.need(size, what)
            values = list(struct.unpack_from(f"<{count}{code}", self.data, self.position))
            self.position += size
            return values
        if item != _STRING:
            raise _Damaged(f"{what} is an array of the unsupported value type {item}")
        self.need(8 * count, what)
        return [self.string(what) for _ in range(count)]


def _read_tensor(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name = cursor.string("the tensor list")
    what = f"the description of tensor {name!r}"
    dimensions = cursor.scalar("I", what)
    if not 1 <= dimensions <= _MAX_DIMENSIONS:
        raise _Damaged(f"{what} counts {dimensions} dimensions")
    shape = tuple(reversed([cursor.scalar("Q", what) for _ in range(dimensions)]))
    return name, shape, cursor.scalar("I", what), cursor.scalar("Q", what)


def _place_tensor(name: str, shape: tuple[int, ...], kind: int, offset: int, base: int, end: int) -> GGUFTensor:
    try:
        ggml_type = GGMLQuantizationType(kind)
        block, block_bytes = GGML_QUANT_SIZES[ggml_type]
    except (ValueError, KeyError):
        raise _Damaged(f"tensor {name!r} has the unknown type {kind}") from None
    elements = 1
    for length in shape:
        elements *= length
    if elements == 0 or shape[-1] % block:
        raise _Damaged(f"tensor {name!r} has shape {shape}, which blocks of {block} ({ggml_type.name}) do not divide")
    size = elements // block * block_bytes
    start = base + offset
    if start + size > end:
        raise _Damaged(f"tensor {name!r} should end at byte {start + size}, but the file has {end} bytes")
    return GGUFTensor(name, shape, ggml_type, start, size)


def _parse(data: mmap.mmap) -> GGUFHeader:
    cursor = _Cursor(data)
    cursor.need(4, "the magic number")
    cursor.position = 4
    version = cursor.scalar("I", "the version")
    if version not in _VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in _VERSIONS
        raise _Damaged("it is big-endian" if swapped else f"it has GGUF version {version}, not {_VERSIONS}")
    tensor_count = cursor.scalar("Q", "the counts")
    pair_count = cursor.scalar("Q", "the counts")
    # A tensor's description takes at least 32 bytes and a pair at least 13: larger counts are noise.
    if tensor_count * 32 + pair_count * 13 > cursor.left():
        raise _Damaged(f"it announces {tensor_count} tensors and {pair_count} metadata entries in {len(data)} bytes")
    metadata: dict[str, Any] = {}
    for _ in range(pair_count):
        key = cursor.string("the metadata")
        if key in metadata:
            raise _Damaged(f"metadata {key!r} appears twice")
        metadata[key] = cursor.value(cursor.scalar("I", f"metadata {key!r}"), f"metadata {key!r}")
    if not isinstance(metadata.get("general.architecture"), str):
        raise _Damaged("its metadata lacks general.architecture")
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
        raise _Damaged(f"its alignment is {alignment!r}, not a power of two")
    described = [_read_tensor(cursor) for _ in range(tensor_count)]
    base = -(-cursor.position // alignment) * alignment
    tensors: dict[str, GGUFTensor] = {}
    for name, shape, kind, offset in described:
        if name in tensors:
            raise _Damaged(f"tensor {name!r} appears twice")
        if offset % alignment:
            raise _Damaged(f"tensor {name!r} starts at the unaligned offset {offset}")
        tensors[name] = _place_tensor(name, shape, kind, offset, base, len(data))
    return GGUFHeader(metadata, tensors)


def read_header(path: Path) -> GGUFHeader:
    """Return the metadata and tensor positions of a GGUF file, all of them checked.

    Raises:
        UserError: No such file, not a GGUF file, truncated, or damaged; the message says where.
    """
    if not path.is_file():
        raise UserError(f"{path} is {'a folder, not a GGUF file' if path.is_dir() else 'missing'}: give a .gguf file")
    remedy = "copy, download or export it again"
    try:
        with path.open("rb") as file:
            magic = file.read(len(_MAGIC))
            if magic != _MAGIC:
                reason = "is empty" if not magic else f"is not a GGUF file (it begins with {magic!r})"
                raise UserError(f"{path} {reason}: {remedy}, or give a .gguf file")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _parse(data)
    except _Damaged as error:
        raise UserError(f"{path} is truncated or damaged: {error}; {remedy}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from error


def check_gguf(path: Path) -> None:
    """Check that a file is a whole GGUF file: magic, header, and every tensor's bytes within the file.

    Raises:
        UserError: See ``read_header``.
    """
    read_header(path)
