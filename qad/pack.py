"""Codes to bytes and back: bit and nibble order, nothing else.

Shapes: N rows, K columns, G blocks along K, S bytes of a stored block.
"""

import numpy as np
from numpy.typing import NDArray

from qad.grid import Grid
from qad.tensor import QuantizedTensor


def gguf_block_bytes(grid: Grid) -> int:
    """Return the bytes of one stored GGUF block of a one-scale grid: an fp16 scale and the codes."""
    return 2 + grid.block * grid.bits // 8


def pack_gguf(quantized: QuantizedTensor) -> NDArray[np.uint8]:
    """Lay a tensor out as GGUF Q4_0 or Q8_0 blocks.

    Q4_0: fp16 scale, then 16 bytes; byte j holds code j + 8 in its low and code j + 16 (+ 8) in its high nibble.
    Q8_0: fp16 scale, then 32 signed bytes. Source: ggml's ``block_q4_0`` and ``block_q8_0``.

    Returns:
        uint8 array of shape [N, G * S].
    """
    grid = quantized.grid
    rows, columns = quantized.codes_NK.shape
    codes = quantized.codes_NK.numpy().reshape(rows, columns // grid.block, grid.block)
    blocks = np.empty((rows, columns // grid.block, gguf_block_bytes(grid)), dtype=np.uint8)
    blocks[:, :, :2] = quantized.scales_NG.contiguous().numpy().view(np.uint8).reshape(rows, -1, 2)
    if grid.bits == 8:
        blocks[:, :, 2:] = codes.view(np.uint8)
    elif grid.bits == 4:
        nibbles = (codes + np.int8(8)).view(np.uint8)
        half = grid.block // 2
        np.left_shift(nibbles[:, :, half:], 4, out=blocks[:, :, 2:])
        blocks[:, :, 2:] |= nibbles[:, :, :half]
    else:
        raise AssertionError(f"no GGUF layout for {grid.bits}-bit codes")
    return blocks.reshape(rows, -1)


def _fields(quantized: QuantizedTensor) -> NDArray[np.uint8]:
    """Return the codes as unsigned fields (2^(bits-1) added), one after another, lowest bits first.

    Returns:
        uint8 array of shape [N, K * bits / 8].
    """
    bits = quantized.grid.bits
    assert bits in (4, 8), bits
    # Modulo 256: adding 128 turns int8 into offset binary, adding 8 does the same for codes -8..7.
    fields = np.ascontiguousarray(quantized.codes_NK.numpy()).view(np.uint8) + np.uint8(1 << (bits - 1))
    if bits == 8:
        return fields
    packed = fields[:, 1::2] << np.uint8(4)
    packed |= fields[:, ::2]
    return packed


def pack_gptq(quantized: QuantizedTensor) -> NDArray[np.int32]:
    """Lay codes out as the ``qweight`` of a GPTQ checkpoint.

    Word [i, n] holds codes i * 32 / bits and following of output feature n, the first in its lowest bits, each with
    2^(bits-1) added. Source: AutoGPTQ's ``QuantLinear.pack``.

    Returns:
        int32 array of shape [K * bits / 32, N].
    """
    return np.ascontiguousarray(_fields(quantized).view("<i4").T)


def pack_onnx(quantized: QuantizedTensor) -> NDArray[np.uint8]:
    """Lay codes out as the ``B`` of ONNX Runtime's MatMulNBits and GatherBlockQuantized.

    Byte j of a 4-bit block holds code 2j in its low and code 2j + 1 in its high nibble; 2^(bits-1) is added, which is
    the default zero point. Source: ONNX Runtime's ContribOperators.md.

    Returns:
        uint8 array of shape [N, G, block * bits / 8].
    """
    return _fields(quantized).reshape(*quantized.scales_NG.shape, -1)
