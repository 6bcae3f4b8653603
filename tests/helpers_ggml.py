"""ggml's own C code, from llama-cpp-python's library: decodes our blocks, and quantizes to compare with.

Shapes: N rows, K columns, G blocks along K, S bytes of a stored block.
"""

import ctypes
from functools import cache
from pathlib import Path

import llama_cpp
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

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
