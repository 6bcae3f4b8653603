"""Codes to bytes: decoded again by gguf-py, which shares no code with qad, or one bit after another from the text."""

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize as gguf_dequantize
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qad import native
from qad.grid import GRIDS, Grid
from qad.pack import gguf_block_bytes, pack_gguf, pack_gptq, pack_onnx
from qad.tensor import QuantizedTensor, dequantize, quantize, round_scales

GGUF_TYPES = {"q4_0": GGMLQuantizationType.Q4_0, "q8_0": GGMLQuantizationType.Q8_0}

# The grids that GGUF has a type for.
every_grid = pytest.mark.parametrize("grid", [GRIDS[name] for name in GGUF_TYPES], ids=lambda grid: grid.name)


def random_tensor(rows: int, columns: int, grid: Grid, seed: int) -> QuantizedTensor:
    """Codes over the whole range, scales over the whole range of fp16, of both signs where the grid has both."""
    random = np.random.default_rng(seed)
    codes = random.integers(grid.code_min, grid.code_max, (rows, columns), dtype=np.int8, endpoint=True)
    groups = columns // grid.block
    scales = np.ldexp(random.uniform(1, 2, (rows, groups)), random.integers(-16, 16, (rows, groups)))
    scales *= random.choice([-1, 1], (rows, groups))
    rounded = round_scales(torch.from_numpy(scales.astype(np.float32)), grid)
    return QuantizedTensor(torch.from_numpy(codes), rounded.to(torch.float16), grid)


def assert_decodes_alike(quantized: QuantizedTensor) -> None:
    decoded = gguf_dequantize(pack_gguf(quantized), GGUF_TYPES[quantized.grid.name])
    np.testing.assert_array_equal(decoded.view(np.uint32), dequantize(quantized).numpy().view(np.uint32))


@every_grid
@pytest.mark.parametrize(("rows", "columns"), [(1, 32), (3, 64), (7, 96), (17, 576), (64, 1536)])
def test_gguf_decodes_the_same_bits(grid: Grid, rows: int, columns: int) -> None:
    assert_decodes_alike(random_tensor(rows, columns, grid, seed=rows))


@every_grid
@given(
    weight=hnp.arrays(
        np.float32,
        st.tuples(st.integers(1, 4), st.sampled_from([32, 64])),
        elements=st.floats(width=32, allow_nan=False, allow_infinity=False),
        fill=st.just(0.0),
    )
)
def test_any_weight_survives_the_way_through_bytes(grid: Grid, weight: np.ndarray) -> None:
    assert_decodes_alike(quantize(torch.from_numpy(weight), grid))


@every_grid
def test_a_transposed_tensor_packs_alike(grid: Grid) -> None:
    plain = random_tensor(64, 96, grid, seed=1)
    strided = QuantizedTensor(plain.codes_NK.t().contiguous().t(), plain.scales_NG.t().contiguous().t(), grid)
    assert not strided.codes_NK.is_contiguous()
    np.testing.assert_array_equal(pack_gguf(strided), pack_gguf(plain))


@every_grid
def test_sizes_are_those_of_the_format(grid: Grid) -> None:
    block, size = gguf.GGML_QUANT_SIZES[GGUF_TYPES[grid.name]]
    assert (grid.block, gguf_block_bytes(grid)) == (block, size)
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
    quantized = random_tensor(2, 64, grid, seed=3)
    blob = pack_gguf(quantized)
    blob[1, 9] ^= 0x10
    decoded = gguf_dequantize(blob, GGUF_TYPES[grid.name])
    assert int((decoded != dequantize(quantized).numpy()).sum()) == 1


# ------------------------------------------------------------------------------------ GPTQ and ONNX: any grid

any_grid = pytest.mark.parametrize("grid", GRIDS.values(), ids=lambda grid: grid.name)
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
