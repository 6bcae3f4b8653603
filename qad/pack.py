"""Codes to bytes and back: bit and nibble order, nothing else.

Shapes: N rows, K columns, G blocks along K, S bytes of a stored block.
"""

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from qad.grid import Grid
from qad.tensor import QuantizedTensor

Blocks = tuple[NDArray[np.uint8], ...]  # what a layout stores one after the other, [N, blocks, bytes] each


def gguf_block_bytes(grid: Grid) -> int:
    """Return the bytes of one stored GGUF block, or super-block."""
    return round(grid.unit * grid.bits_per_weight) // 8


def pack_gguf(quantized: QuantizedTensor) -> NDArray[np.uint8]:
    """Lay a tensor out as ggml blocks: those of Q4_0, Q8_0, Q4_1, Q5_0, Q4_K, Q5_K or Q6_K.

    Sources: ggml's ``block_q4_0`` and the other structures of ggml-common.h; each layout is described where it is made.

    Returns:
        uint8 array of shape [N, G * S].
    """
    grid = quantized.grid
    blocks = [array.reshape(-1, array.shape[-1]) for array in _LAYOUTS[grid.bits, bool(grid.super_block)](quantized)]
    assert sum(array.shape[-1] for array in blocks) == gguf_block_bytes(grid), grid
    return np.concatenate(blocks, axis=1).reshape(len(quantized.codes_NK), -1)


def _half(tensor: Tensor) -> NDArray[np.uint8]:
    """Return the bytes of fp16 numbers [N, B] as [N, B, 2]."""
    return tensor.contiguous().numpy().view(np.uint8).reshape(*tensor.shape, 2)


def _blocks(quantized: QuantizedTensor, size: int) -> NDArray[np.uint8]:
    """Return the codes, counted from the lowest, as [N, K / size, size]."""
    rows, columns = quantized.codes_NK.shape
    # Modulo 256, for codes down to -128.
    counted = quantized.codes_NK.contiguous().numpy().view(np.uint8) - np.uint8(quantized.grid.code_min % 256)
    return counted.reshape(rows, columns // size, size)


def _nibbles(fields: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the first half of the last axis in low nibbles beside the second half in high ones."""
    half = fields.shape[-1] // 2
    return (fields[..., :half] & np.uint8(15)) | (fields[..., half:] << np.uint8(4))


def _gguf_8(quantized: QuantizedTensor) -> Blocks:
    """Q8_0: fp16 scale, then 32 signed bytes."""
    codes = quantized.codes_NK.contiguous().numpy().view(np.uint8)
    return _half(quantized.scales_NG), codes.reshape(*quantized.scales_NG.shape, -1)


def _gguf_4(quantized: QuantizedTensor) -> Blocks:
    """Q4_0: fp16 scale, 16 bytes; byte j holds code j low and code j + 16 high. Q4_1: its minimum after the scale."""
    codes = _nibbles(_blocks(quantized, 32))
    return *[_half(tensor) for tensor in quantized.stored.parts.values()], codes


def _gguf_5(quantized: QuantizedTensor) -> Blocks:
    """Q5_0: fp16 scale, 32 fifth bits (bit j of a little-endian word: code j), then the low four bits as in Q4_0."""
    fields = _blocks(quantized, 32)
    fifth = np.packbits(fields >> np.uint8(4), axis=-1, bitorder="little")
    return _half(quantized.scales_NG), fifth, _nibbles(fields)


def _six_bit_pairs(scales: NDArray[np.uint8], minimums: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Lay 8 six-bit scales and minimums [..., 8] out in 12 bytes.

    Byte j of the first 4 holds scale j, of the next 4 minimum j, both with two bits of number j + 4 on top; the last 4
    hold the low nibbles of scale and minimum j + 4.
    """
    first, last = (scales[..., :4], minimums[..., :4]), (scales[..., 4:], minimums[..., 4:])
    tops = [low | (high >> np.uint8(4) << np.uint8(6)) for low, high in zip(first, last, strict=True)]
    return np.concatenate([*tops, (last[0] & np.uint8(15)) | (last[1] << np.uint8(4))], axis=-1)


def _gguf_k(quantized: QuantizedTensor) -> Blocks:
    """Q4_K and Q5_K: fp16 d and dmin, 12 bytes of six-bit scales and minimums, in Q5_K 32 bytes of fifth bits, nibbles.

    Each 32 bytes of nibbles hold an even sub-block low and the odd one after it high. Bit b of byte j of the fifth bits
    is that of code j of sub-block b.
    """
    parts = quantized.stored.parts
    shape = (*parts["super_scales"].shape, 8)
    wholes = [parts[name].contiguous().numpy().reshape(shape) for name in ("scales", "minimums")]
    head = [_half(parts["super_scales"]), _half(parts["super_minimums"]), _six_bit_pairs(*wholes)]
    fields = _blocks(quantized, 256).reshape(*shape, 32)
    if quantized.grid.bits == 5:
        head.append(np.packbits(fields >> np.uint8(4), axis=-2, bitorder="little")[..., 0, :])
    pairs = fields.reshape(*shape[:-1], 4, 64)
    return *head, _nibbles(pairs).reshape(*shape[:-1], 128)


def _gguf_6k(quantized: QuantizedTensor) -> Blocks:
    """Q6_K: 128 bytes of low nibbles, 64 bytes of high pairs of bits, 16 signed sub-scales, fp16 d.

    Of each half of 128 codes, the nibbles of codes j and j + 64 share byte j (low, high); byte j of the pairs holds
    those of codes j, j + 32, j + 64 and j + 96, from the lowest bits up.
    """
    parts = quantized.stored.parts
    supers = parts["super_scales"].shape
    halves = _blocks(quantized, 256).reshape(*supers, 2, 128)
    quarters = halves.reshape(*supers, 2, 4, 32) >> np.uint8(4)
    pairs = np.bitwise_or.reduce(quarters << (2 * np.arange(4, dtype=np.uint8)[:, None]), axis=-2)
    scales = parts["scales"].contiguous().numpy().view(np.uint8).reshape(*supers, 16)
    return _nibbles(halves).reshape(*supers, 128), pairs.reshape(*supers, 64), scales, _half(parts["super_scales"])


_LAYOUTS = {
    (4, False): _gguf_4,
    (5, False): _gguf_5,
    (8, False): _gguf_8,
    (4, True): _gguf_k,
    (5, True): _gguf_k,
    (6, True): _gguf_6k,
}


def _fields(quantized: QuantizedTensor) -> NDArray[np.uint8]:
    """Return the codes as unsigned fields (2^(bits-1) added), one after another, lowest bits first.

    Returns:
        uint8 array of shape [N, K * bits / 8].
    """
    bits = quantized.grid.bits
    assert bits in (4, 8), bits
    assert quantized.grid.is_plain, quantized.grid
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
