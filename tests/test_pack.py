"""Codes to bytes: decoded again by gguf-py, which shares no code with qad, or one bit after another from the text."""

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize as gguf_dequantize
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qad import native
from qad.grid import GRIDS, Grid
from qad.pack import gguf_block_bytes, pack_gguf, pack_gptq, pack_onnx
from qad.scale_search import find_scales
from qad.tensor import QuantizedTensor, dequantize, quantize
from tests.helpers_ggml import GGUF_TYPES, ggml_dequantize
from tests.helpers_grids import random_tensor

# The grids that GGUF has a type for.
every_grid = pytest.mark.parametrize("grid", [GRIDS[name] for name in GGUF_TYPES], ids=lambda grid: grid.name)


def assert_decodes_alike(quantized: QuantizedTensor) -> None:
    blob, kind = pack_gguf(quantized), GGUF_TYPES[quantized.grid.name]
    expected = dequantize(quantized).numpy().view(np.uint32)
    np.testing.assert_array_equal(gguf_dequantize(blob, kind).view(np.uint32), expected)
    np.testing.assert_array_equal(ggml_dequantize(blob, kind).view(np.uint32), expected)


@every_grid
@pytest.mark.parametrize(("rows", "units"), [(1, 1), (3, 2), (7, 3), (17, 18), (64, 48)])
def test_gguf_decodes_the_same_bits(grid: Grid, rows: int, units: int) -> None:
    assert_decodes_alike(random_tensor(rows, units * grid.unit, grid, seed=rows))


@every_grid
@given(
    weight=hnp.arrays(
        np.float32,
        st.tuples(st.integers(1, 4), st.sampled_from([256, 512])),
        elements=st.floats(width=32, allow_nan=False, allow_infinity=False),
        fill=st.just(0.0),
    )
)
def test_any_weight_survives_the_way_through_bytes(grid: Grid, weight: np.ndarray) -> None:
    for method in ("range", "mse"):
        # Weights whose squared error float32 can hold; any real weight is far inside.
        tensor = torch.from_numpy(weight).clamp(-1e15, 1e15) if method == "mse" else torch.from_numpy(weight)
        assert_decodes_alike(quantize(tensor, grid, find_scales(tensor, grid, method)))


@every_grid
def test_a_transposed_tensor_packs_alike(grid: Grid) -> None:
    plain = random_tensor(64, 3 * grid.unit, grid, seed=1)
    strided = plain.map_rows(lambda rows: rows.t().contiguous().t())
    assert not strided.codes_NK.is_contiguous()
    np.testing.assert_array_equal(pack_gguf(strided), pack_gguf(plain))


@every_grid
def test_sizes_are_those_of_the_format(grid: Grid) -> None:
    block, size = gguf.GGML_QUANT_SIZES[GGUF_TYPES[grid.name]]
    assert (grid.unit, gguf_block_bytes(grid)) == (block, size)
    blob = pack_gguf(random_tensor(5, 3 * block, grid, seed=2))
    assert blob.dtype == np.uint8
    assert blob.shape == (5, 3 * size)
    assert grid.bits_per_weight == size * 8 / block


def test_the_order_of_nibbles() -> None:
    """Spelled out once: byte j holds code j low and code j + 16 high, both stored with 8 added."""
    codes = torch.arange(-8, 8, dtype=torch.int8).repeat_interleave(2).view(1, 32)
    blob = pack_gguf(QuantizedTensor(codes, torch.tensor([[-0.5]], dtype=torch.float16), GRIDS["q4_0"]))
    assert blob[0, :2].tolist() == [0x00, 0xB8]
    assert blob[0, 2:6].tolist() == [0x80, 0x80, 0x91, 0x91]
    assert blob[0, -1] == 0xF7


@every_grid
def test_one_flipped_bit_is_seen(grid: Grid) -> None:
    quantized = quantize(torch.randn(2, 2 * grid.unit, generator=torch.Generator().manual_seed(3)), grid)
    blob = pack_gguf(quantized)
    blob[1, {"q4_k": 20, "q5_k": 60}.get(grid.name, 9)] ^= 0x10  # a byte of codes
    for decode in (gguf_dequantize, ggml_dequantize):
        decoded = decode(blob, GGUF_TYPES[grid.name])
        assert int((decoded != dequantize(quantized).numpy()).sum()) == 1


# ------------------------------------------------------------------------------------ GPTQ and ONNX: any grid

WHOLE_NIBBLES = [grid for grid in GRIDS.values() if grid.is_plain and grid.bits in (4, 8)]
any_grid = pytest.mark.parametrize("grid", WHOLE_NIBBLES, ids=lambda grid: grid.name)
some_shapes = pytest.mark.parametrize(("rows", "groups"), [(1, 1), (3, 2), (40, 3)])


def gptq_code(words: np.ndarray, row: int, column: int, bits: int) -> int:
    """Return one code as the format describes it: in word column * bits / 32, lowest first, 2^(bits-1) added."""
    word = int(words[column * bits // 32, row]) & 0xFFFFFFFF
    return (word >> (column * bits % 32)) % 2**bits - 2 ** (bits - 1)


def onnx_code(packed: np.ndarray, row: int, column: int, grid: Grid) -> int:
    """Return one code as MatMulNBits documents it."""
    inside = column % grid.block
    byte = int(packed[row, column // grid.block, inside * grid.bits // 8])
    if grid.bits == 4:
        byte = byte // 16 if inside % 2 else byte % 16
    return byte - 2 ** (grid.bits - 1)


@any_grid
@some_shapes
def test_each_code_is_where_gptq_and_onnx_look_for_it(grid: Grid, rows: int, groups: int) -> None:
    quantized = random_tensor(rows, groups * grid.block, grid, seed=rows)
    words, packed = pack_gptq(quantized), pack_onnx(quantized)
    assert (words.dtype, words.shape) == (np.int32, (groups * grid.block * grid.bits // 32, rows))
    assert (packed.dtype, packed.shape) == (np.uint8, (rows, groups, grid.block * grid.bits // 8))
    places = [(row, column) for row in range(rows) for column in range(groups * grid.block)]
    codes = quantized.codes_NK.flatten().tolist()
    assert [gptq_code(words, row, column, grid.bits) for row, column in places] == codes
    assert [onnx_code(packed, row, column, grid) for row, column in places] == codes


@pytest.mark.skipif("native.available() is not None", reason="there are no kernels here")
@any_grid
@some_shapes
def test_kernel_and_reference_pack_alike(grid: Grid, rows: int, groups: int) -> None:
    quantized = random_tensor(rows, groups * grid.block, grid, seed=rows)
    for layout, pack in (("gguf", pack_gguf), ("gptq", pack_gptq), ("onnx", pack_onnx)):
        if layout == "gguf" and grid.block != 32:
            continue
        expected = native.pack(quantized.codes_NK, quantized.scales_NG, grid, layout).numpy()
        np.testing.assert_array_equal(pack(quantized), expected, strict=True)


@any_grid
def test_a_transposed_tensor_packs_alike_in_every_layout(grid: Grid) -> None:
    plain = random_tensor(8, 2 * grid.block, grid, seed=1)
    strided = QuantizedTensor(plain.codes_NK.t().contiguous().t(), plain.scales_NG.t().contiguous().t(), grid)
    np.testing.assert_array_equal(pack_gptq(strided), pack_gptq(plain))
    np.testing.assert_array_equal(pack_onnx(strided), pack_onnx(plain))
