"""A GPTQ folder decoded as the format is described, sharing no code with the exporter: files come from anywhere.

- ``qweight`` int32 [K * bits / 32, N]: the codes of 32 / bits consecutive input features a word, lowest bits first.
- ``qzeros`` int32 [G, N * bits / 32]: the same of consecutive output features; format ``gptq`` stores zero - 1,
  ``gptq_v2`` the zero itself.
- ``scales`` float [G, N], ``g_idx`` int32 [K]: the group of each input feature.
- ``weight[n, k] = (code - zero) * scale``, here in float32.

Source: ``QuantLinear`` of AutoGPTQ, ``TorchLinear`` of GPTQModel.

Shapes: N output features, K input features, G groups along K.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from qad.errors import UserError

CONFIG_FILE = "quantize_config.json"
_MODEL_CONFIG = "config.json"
_WHOLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PARTS = ("qweight", "qzeros", "scales", "g_idx")
_ZERO_OFFSET = {"gptq": 1, "gptq_v2": 0}
# What decides how bytes are read. Loaders differ in which of the two configurations they look at.
_DECIDING = ("bits", "group_size", "checkpoint_format")


@dataclass(frozen=True)
class Layout:
    """How a folder's words are read: bits of a code, and what to add to a stored zero point."""

    bits: int
    zero_offset: int


def read_json(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        UserError: Missing, unreadable, or no object.
    """
    if not file.is_file():
        raise UserError(f"{file} is missing: the folder is no GPTQ checkpoint, or only a part of one; export it again")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} is damaged ({error}); export it again") from error
    if not isinstance(found, dict):
        raise UserError(f"{file} is damaged (it holds no object); export it again")
    return found


def read_layout(folder: Path) -> Layout:
    """Return how the words of a folder are to be read.

    Raises:
        UserError: The configuration is missing, damaged, contradicts itself, or is of no layout known here.
    """
    own = read_json(folder / CONFIG_FILE)
    embedded = read_json(folder / _MODEL_CONFIG).get("quantization_config")
    if not isinstance(embedded, dict):
        raise UserError(f"{folder / _MODEL_CONFIG} has no quantization_config; export it again")
    for key in _DECIDING:
        if own.get(key) != embedded.get(key):
            raise UserError(
                f"{folder}: {CONFIG_FILE} and {_MODEL_CONFIG} disagree about {key} ({own.get(key)!r} and "
                f"{embedded.get(key)!r}); export it again"
            )
    bits, version = own.get("bits"), own.get("checkpoint_format")
    if bits not in (2, 4, 8) or not isinstance(version, str) or version not in _ZERO_OFFSET:
        raise UserError(
            f"{folder} holds {bits!r}-bit codes in checkpoint format {version!r}; readable: 2, 4 and 8 bits in "
            f"{' or '.join(_ZERO_OFFSET)}"
        )
    return Layout(bits, _ZERO_OFFSET[version])


def unpack(words: NDArray[np.int32], bits: int, axis: int) -> NDArray[np.int32]:
    """Return the fields of 32-bit words, lowest first, side by side along an axis."""
    shifts = np.arange(0, 32, bits, dtype=np.int32)
    shifts = shifts[:, None] if axis == 0 else shifts
    # Negative words shift their sign in from above; the mask takes only the bits of the field.
    fields = (np.expand_dims(words, axis + 1) >> shifts) & np.int32(2**bits - 1)
    return fields.reshape(-1, words.shape[1]) if axis == 0 else fields.reshape(words.shape[0], -1)


def decode_linear(
    qweight: NDArray[np.int32],
    qzeros: NDArray[np.int32],
    scales: NDArray[np.floating[Any]],
    g_idx: NDArray[np.int32],
    layout: Layout,
) -> NDArray[np.float32]:
    """Return the weight [N, K] of one linear layer; see the module.

    Raises:
        ValueError: The shapes do not fit each other, or a group is out of range.
    """
    codes_KN = unpack(qweight, layout.bits, axis=0)
    zeros_GN = unpack(qzeros, layout.bits, axis=1) + np.int32(layout.zero_offset)
    if len(g_idx) != len(codes_KN) or zeros_GN.shape != scales.shape or scales.shape[1] != codes_KN.shape[1]:
        raise ValueError(f"shapes {qweight.shape}, {qzeros.shape}, {scales.shape}, {g_idx.shape} do not fit each other")
    if len(g_idx) and not 0 <= int(g_idx.min()) <= int(g_idx.max()) < len(scales):
        raise ValueError(f"g_idx names groups beyond the {len(scales)} there are")
    codes_KN -= zeros_GN[g_idx]
    weight_KN = codes_KN.astype(np.float32)
    del codes_KN
    weight_KN *= scales.astype(np.float32)[g_idx]
    return np.ascontiguousarray(weight_KN.T)


class GPTQWeights(Mapping[str, NDArray[np.float32]]):
    """A GPTQ folder's tensors by Hugging Face name, decoded in float32 when asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._layout = read_layout(folder)
        files = self._files()
        self._where: dict[str, Path] = {}
        for file in files:
            try:
                with safe_open(file, framework="numpy") as opened:
                    self._where.update(dict.fromkeys(opened.keys(), file))
            except (OSError, SafetensorError, ValueError) as error:
                raise UserError(f"{file} is missing, truncated or damaged ({error}); export it again") from error
        linear = [name.removesuffix(".qweight") for name in self._where if name.endswith(".qweight")]
        packed = {f"{layer}.{part}" for layer in linear for part in _PARTS}
        if missing := sorted(packed - self._where.keys()):
            raise UserError(f"{folder} lacks {', '.join(missing[:3])}; export it again")
        self._linear = {f"{layer}.weight": layer for layer in linear}
        self._names = [*self._linear, *(name for name in self._where if name not in packed)]

    def _files(self) -> list[Path]:
        """Return the safetensors files; each tensor of the index must be named once."""
        if not (self._folder / _INDEX).is_file():
            return [self._folder / _WHOLE]
        index = read_json(self._folder / _INDEX).get("weight_map")
        names = sorted(set(index.values())) if isinstance(index, dict) and _all_text(index.values()) else []
        if not names or any(Path(name).name != name for name in names):
            raise UserError(f"{self._folder / _INDEX} is damaged (no files named in weight_map); export it again")
        return [self._folder / name for name in names]

    def _tensor(self, name: str) -> NDArray[Any]:
        with safe_open(self._where[name], framework="numpy") as opened:
            return opened.get_tensor(name)

    def __getitem__(self, name: str) -> NDArray[np.float32]:
        try:
            if name not in self._linear:
                return self._tensor(name).astype(np.float32)
            parts = [self._tensor(f"{self._linear[name]}.{part}") for part in _PARTS]
            kinds = [(part.ndim, part.dtype.kind) for part in parts]
            if kinds != [(2, "i"), (2, "i"), (2, "f"), (1, "i")]:
                raise ValueError(f"dimensions and types {kinds}")
            qweight, qzeros, scales, g_idx = parts
            return decode_linear(qweight, qzeros, scales, g_idx, self._layout)
        except (OSError, SafetensorError, ValueError, TypeError) as error:
            raise UserError(f"{name} in {self._folder} is damaged ({error}); export it again") from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _all_text(values: Any) -> bool:
    return all(isinstance(value, str) for value in values)
