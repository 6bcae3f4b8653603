"""ggml's own C code, from llama-cpp-python's library: decodes our blocks, and quantizes to compare with.

Shapes: N rows, K columns, G blocks along K, S bytes of a stored block.
"""

import ctypes
from functools import cache
from pathlib import Path

import llama_cpp
import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from qad.grid import Grid
from qad.scales import StoredScales, part_dtype, round_scales
from qad.tensor import QuantizedTensor

GGUF_TYPES = {
    "q4_0": GGMLQuantizationType.Q4_0,
    "q4_1": GGMLQuantizationType.Q4_1,
    "q5_0": GGMLQuantizationType.Q5_0,
    "q8_0": GGMLQuantizationType.Q8_0,
    "q8_0_fp16": GGMLQuantizationType.Q8_0,
    "q4_k": GGMLQuantizationType.Q4_K,
    "q5_k": GGMLQuantizationType.Q5_K,
    "q6_k": GGMLQuantizationType.Q6_K,
}


@cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(Path(llama_cpp.__file__).parent / "lib" / "libggml-base.so"))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    whole, pointer = ctypes.c_int64, ctypes.c_void_p
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, whole, whole, whole, pointer]
    return library


def ggml_dequantize(blob: NDArray[np.uint8], kind: GGMLQuantizationType) -> NDArray[np.float32]:
    """Decode rows of blocks [N, G * S] with ``dequantize_row_*``."""
    block, size = GGML_QUANT_SIZES[kind]
    out = np.empty((len(blob), blob.shape[1] // size * block), dtype=np.float32)
    blob = np.ascontiguousarray(blob)
    decode = getattr(_library(), f"dequantize_row_{kind.name.replace('Q', 'q', 1)}")
    decode(ctypes.c_void_p(blob.ctypes.data), ctypes.c_void_p(out.ctypes.data), ctypes.c_int64(out.size))
    return out


def ggml_quantize(weight: NDArray[np.float32], kind: GGMLQuantizationType) -> NDArray[np.uint8]:
    """Quantize rows as llama.cpp's own tool does without an importance matrix."""
    block, size = GGML_QUANT_SIZES[kind]
    weight = np.ascontiguousarray(weight, dtype=np.float32)
    out = np.empty((len(weight), weight.shape[1] // block * size), dtype=np.uint8)
    written = _library().ggml_quantize_chunk(
        int(kind), weight.ctypes.data, out.ctypes.data, 0, len(weight), weight.shape[1], None
    )
    assert written == out.size, (written, out.size)
    return out


def random_stored(grid: Grid, rows: int, columns: int, seed: int) -> StoredScales:
    """Return scales over the whole range of what is stored: every integer, every finite fp16 number of both signs.

    A plain grid's are those that it may store.
    """
    random = np.random.default_rng(seed)
    parts: dict[str, torch.Tensor] = {}
    for part in grid.parts:
        dtype = part_dtype(grid, part)
        shape = (rows, columns // grid.columns_of(part))
        if dtype != torch.float16:
            low, high = grid.sub_scale_range
            whole = random.integers(low, high, shape, dtype=np.int16, endpoint=True)
            parts[part] = torch.from_numpy(whole).to(dtype)
        elif grid.is_plain:
            wide = np.ldexp(random.uniform(1, 2, shape), random.integers(-16, 16, shape)) * random.choice(
                [-1, 1], shape
            )
            parts[part] = round_scales(torch.from_numpy(wide.astype(np.float32)), grid).to(torch.float16)
        else:
            # Below 0x7C00 every pattern is finite: zero, subnormal and normal numbers up to the largest.
            word = random.integers(0, 0x7C00, shape, dtype=np.uint16) | (random.integers(0, 2, shape, np.uint16) << 15)
            word.flat[:6] = np.array([0x0000, 0x8000, 0x0001, 0x83FF, 0x7BFF, 0xFBFF], np.uint16)[: word.size]
            parts[part] = torch.from_numpy(word.view(np.float16).copy())
    return StoredScales.of(grid, parts)


def random_tensor(rows: int, columns: int, grid: Grid, seed: int) -> QuantizedTensor:
    """Return codes over the whole range under ``random_stored`` scales."""
    codes = np.random.default_rng(seed + 1).integers(
        grid.code_min, grid.code_max, (rows, columns), dtype=np.int8, endpoint=True
    )
    return QuantizedTensor.of(torch.from_numpy(codes), random_stored(grid, rows, columns, seed))
