"""Quantize and dequantize: held to an independent numpy implementation, to exact arithmetic and to their promises."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from qad.errors import UserError
from qad.grid import GRIDS, Grid, get_grid, grid_for_bits
from qad.tensor import (
    QuantizedTensor,
    absmax_scales,
    damaged_blocks,
    dequantize,
    mse_scales,
    quantize,
    round_scales,
)

ALL_GRIDS = list(GRIDS.values())
PLAIN_GRIDS = [grid for grid in ALL_GRIDS if grid.is_plain]
SIGNED_4_BIT = [grid for grid in PLAIN_GRIDS if grid.signed_scale and grid.bits == 4]
# With 5 significand bits the largest fp16 number is 31 * 2^11.
Q4_0_BF16 = replace(get_grid("q4_0"), name="q4_0 with 5-bit scales", scale_bits=5, scale_ceiling=63488.0)

# Those that are not plain are in test_scales.py.
every_grid = pytest.mark.parametrize("grid", PLAIN_GRIDS, ids=lambda grid: grid.name)

finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
# Ties, mirror images, zeros of both signs, subnormals, and both ends of float32.
awkward = st.sampled_from(
    [0.0, -0.0, 1.0, -1.0, 0.5, -0.5, 2.0**-24, -(2.0**-24), 1e-40, -1e-45, 65504.0, -1e6, 3e38, -3e38, 2.0**-14]
)


def blocks_of_weights(grid: Grid) -> st.SearchStrategy[np.ndarray]:
    """Matrices of whole blocks, of much the same number of weights for every block size."""
    rows = st.integers(1, max(2, 160 // grid.block))
    some, two = st.sampled_from([grid.block, 2 * grid.block, 3 * grid.block]), st.just(2 * grid.block)
    return st.one_of(
        hnp.arrays(np.float32, st.tuples(rows, some), elements=finite),
        hnp.arrays(np.float32, st.tuples(rows, some), elements=awkward),
        hnp.arrays(np.float32, st.tuples(rows, two), elements=st.floats(-4, 4, width=32), fill=st.just(0.0)),
    )


def gaussian(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def bits_of(values: Tensor) -> Tensor:
    return values.contiguous().view(torch.int32)


def numpy_round_scales(scales: np.ndarray, grid: Grid) -> np.ndarray:
    """The documented rounding by another road: split off the exponent, round the significand, join again."""
    significand, exponent = np.frexp(scales.astype(np.float64))
    rounded = np.ldexp(np.rint(significand * 2.0**grid.scale_bits), exponent - grid.scale_bits)
    magnitude = np.clip(np.abs(rounded), grid.scale_floor, grid.scale_ceiling)
    return np.where((scales < 0) & grid.signed_scale, -magnitude, magnitude).astype(np.float32)


def numpy_quantize(weight: np.ndarray, grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """Absmax quantization of one matrix, block after block, in scalar steps of float32."""
    blocks = weight.reshape(weight.shape[0], -1, grid.block)
    codes = np.empty(blocks.shape, dtype=np.int8)
    scales = np.empty(blocks.shape[:2], dtype=np.float32)
    for row, group in np.ndindex(*blocks.shape[:2]):
        block = blocks[row, group]
        magnitude = np.abs(block).max()
        extreme = magnitude if magnitude in block else -magnitude  # of a pair, the positive one
        ratio = (
            extreme / np.float32(grid.code_min) if grid.signed_scale else np.abs(extreme) / np.float32(grid.code_max)
        )
        scale = numpy_round_scales(np.asarray(ratio, dtype=np.float32), grid)[()]
        scales[row, group] = scale
        with np.errstate(over="ignore"):
            steps = np.rint(block * (np.float32(1) / scale))
        codes[row, group] = np.clip(steps, grid.code_min, grid.code_max).astype(np.int8)
    return codes.reshape(weight.shape), scales


# ---------------------------------------------------------------------------------------------------- scales


@pytest.mark.parametrize("grid", [*PLAIN_GRIDS, Q4_0_BF16], ids=lambda grid: grid.name)
@given(
    scales=hnp.arrays(np.float32, st.integers(1, 40), elements=st.one_of(finite, awkward, st.floats(-2, 2, width=32)))
)
def test_round_scales_agrees_with_numpy(grid: Grid, scales: np.ndarray) -> None:
    got = round_scales(torch.from_numpy(scales), grid).numpy()
    np.testing.assert_array_equal(got.view(np.uint32), numpy_round_scales(scales, grid).view(np.uint32))


@pytest.mark.parametrize("grid", [*PLAIN_GRIDS, Q4_0_BF16], ids=lambda grid: grid.name)
@given(scales=hnp.arrays(np.float32, st.integers(1, 40), elements=st.one_of(finite, awkward)))
def test_a_rounded_scale_is_an_fp16_number_of_few_bits(grid: Grid, scales: np.ndarray) -> None:
    rounded = round_scales(torch.from_numpy(scales), grid)
    half = rounded.to(torch.float16)
    assert torch.equal(bits_of(half.to(torch.float32)), bits_of(rounded))
    dropped = (1 << (11 - grid.scale_bits)) - 1  # fp16 has 11 significand bits
    assert int((half.view(torch.int16) & dropped).abs().max()) == 0
    assert float(rounded.abs().min()) >= grid.scale_floor
    assert torch.equal(bits_of(round_scales(rounded, grid)), bits_of(rounded))


@every_grid
def test_ties_between_scales_go_to_even(grid: Grid) -> None:
    step = 2.0 ** (1 - grid.scale_bits)
    halfway = torch.tensor([1 + 0.5 * step, 1 + 1.5 * step, 1 + 2.5 * step])
    assert round_scales(halfway, grid).tolist() == [1.0, 1 + 2 * step, 1 + 2 * step]
    above = torch.nextafter(halfway, torch.tensor(2.0))
    assert round_scales(above, grid).tolist() == [1 + step, 1 + 2 * step, 1 + 3 * step]


@every_grid
def test_zero_scales_become_the_positive_floor(grid: Grid) -> None:
    assert round_scales(torch.tensor([0.0, -0.0]), grid).tolist() == [grid.scale_floor] * 2


@every_grid
@pytest.mark.parametrize("order", [1, -1])
def test_of_two_extremes_the_positive_one_decides(grid: Grid, order: int) -> None:
    weight = torch.zeros(1, grid.block)
    weight[0, 3], weight[0, -1] = 8.0 * order, -8.0 * order
    expected = 8.0 / grid.code_min if grid.signed_scale else 8.0 / grid.code_max
    assert absmax_scales(weight, grid).tolist() == round_scales(torch.tensor([[expected]]), grid).tolist()


@every_grid
def test_scales_that_are_no_numbers(grid: Grid) -> None:
    payloads = torch.tensor([0x7FC00000, 0x7F800001, 0x7FFFFFFF, -1, -0x400000, -0x7FFFFF], dtype=torch.int32)
    assert bool(round_scales(payloads.view(torch.float32), grid).isnan().all())
    infinite = round_scales(torch.tensor([torch.inf, -torch.inf]), grid)
    assert infinite.tolist() == [grid.scale_ceiling, -grid.scale_ceiling if grid.signed_scale else grid.scale_ceiling]


@every_grid
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_damaged_block_is_seen_and_stays_alone(grid: Grid, bad: float) -> None:
    weight = gaussian(3, 3 * grid.block)
    weight[1, grid.block + 5] = bad
    healthy = absmax_scales(weight.nan_to_num(0.0, 0.0, 0.0), grid)
    found = absmax_scales(weight, grid)
    damaged = torch.zeros(3, 3, dtype=torch.bool)
    damaged[1, 1] = True
    assert torch.equal(found.isnan(), damaged)
    assert torch.equal(found[~damaged], healthy[~damaged])
    assert torch.equal(damaged_blocks(weight, healthy, grid), damaged)
    healthy[2, 0] = torch.nan
    damaged[2, 0] = True
    assert torch.equal(damaged_blocks(weight, healthy, grid), damaged)


@every_grid
def test_signs_of_scales(grid: Grid) -> None:
    got = round_scales(torch.tensor([-0.75, 0.75, -1e-9, -1e9]), grid)
    magnitudes = torch.tensor([0.75, 0.75, grid.scale_floor, grid.scale_ceiling])
    signs = torch.tensor([-1.0, 1.0, -1.0, -1.0]) if grid.signed_scale else torch.ones(4)
    assert torch.equal(got, magnitudes * signs)


def every_scale(scale_bits: int) -> Tensor:
    """All positive normal fp16 numbers with that many significand bits."""
    significands = torch.arange(1 << (scale_bits - 1), 1 << scale_bits, dtype=torch.float64)
    exponents = torch.arange(-14, 16, dtype=torch.float64) - (scale_bits - 1)
    return (significands * 2.0 ** exponents.unsqueeze(1)).flatten()


@pytest.mark.parametrize(("scale_bits", "dtype"), [(8, torch.float16), (5, torch.float16), (5, torch.bfloat16)])
def test_four_bit_products_are_exact_in_half_precision(scale_bits: int, dtype: torch.dtype) -> None:
    """Every code times every scale: a runtime that multiplies in half precision still decodes the exact weight."""
    grid = get_grid("q4_0")
    scales = every_scale(scale_bits)
    codes = torch.arange(grid.code_min, grid.code_max + 1, dtype=torch.float64)
    exact = scales.unsqueeze(1) * codes
    got = scales.to(dtype).unsqueeze(1) * codes.to(dtype)
    inside = exact.abs() <= torch.finfo(dtype).max
    assert float(inside.float().mean()) > 0.9  # the rest is beyond what fp16 can hold
    assert torch.equal(got.to(torch.float64)[inside], exact[inside])


def test_full_fp16_scales_would_not_give_exact_products() -> None:
    """The reason for cutting scales, so that nobody restores the three bits."""
    scales = every_scale(11)
    codes = torch.arange(-8, 8, dtype=torch.float64)
    exact = scales.unsqueeze(1) * codes
    got = (scales.to(torch.float16).unsqueeze(1) * codes.to(torch.float16)).to(torch.float64)
    inside = exact.abs() <= 65504
    assert 0.6 < float((got == exact)[inside].float().mean()) < 0.95


# ---------------------------------------------------------------------------------------------------- codes


@every_grid
@given(data=st.data())
def test_quantize_agrees_with_numpy(grid: Grid, data: st.DataObject) -> None:
    weight = data.draw(blocks_of_weights(grid))
    codes, scales = numpy_quantize(weight, grid)
    got = quantize(torch.from_numpy(weight), grid)
    np.testing.assert_array_equal(got.scales_NG.float().numpy().view(np.uint32), scales.view(np.uint32))
    np.testing.assert_array_equal(got.codes_NK.numpy(), codes)


@every_grid
@given(data=st.data())
def test_dequantize_is_the_exact_product(grid: Grid, data: st.DataObject) -> None:
    weight = data.draw(blocks_of_weights(grid))
    quantized = quantize(torch.from_numpy(weight), grid)
    exact = quantized.codes_NK.double() * quantized.scales_NG.double().repeat_interleave(grid.block, dim=1)
    values = dequantize(quantized)
    assert values.dtype == torch.float32
    assert torch.equal(values.double(), exact)
    buffer = torch.full_like(values, torch.nan)
    assert dequantize(quantized, out=buffer) is buffer
    assert torch.equal(bits_of(buffer), bits_of(values))


@every_grid
@given(data=st.data())
def test_quantize_keeps_what_is_already_on_the_grid(grid: Grid, data: st.DataObject) -> None:
    weight = data.draw(blocks_of_weights(grid))
    first = quantize(torch.from_numpy(weight), grid)
    values = dequantize(first)
    with_its_scales = quantize(values, grid, first.scales_NG.float())
    assert torch.equal(with_its_scales.codes_NK, first.codes_NK)
    assert torch.equal(with_its_scales.scales_NG, first.scales_NG)
    # A scale rounded up by half a step of the largest code, or more, leaves that code unused: its block finds another.
    if grid.code_max * 2.0**-grid.scale_bits >= 0.5:
        assert grid.name == "q8_0_fp16"
        return
    # Found anew, the scale of a block of tiny numbers may change its sign, and its codes with it; no value changes.
    again = quantize(values, grid)
    assert torch.equal(dequantize(again), values)
    usual_NG = first.scales_NG.float().abs() > grid.scale_floor
    assert torch.equal(again.scales_NG[usual_NG], first.scales_NG[usual_NG])


@every_grid
@given(data=st.data())
def test_codes_stay_in_range_and_extremes_map_to_the_end(grid: Grid, data: st.DataObject) -> None:
    weight = data.draw(blocks_of_weights(grid))
    quantized = quantize(torch.from_numpy(weight), grid)
    assert grid.code_min <= int(quantized.codes_NK.min())
    assert int(quantized.codes_NK.max()) <= grid.code_max
    blocks = torch.from_numpy(weight).view(weight.shape[0], -1, grid.block)
    low, high = blocks.aminmax(dim=-1, keepdim=True)
    index = torch.where(high >= -low, blocks.argmax(dim=-1, keepdim=True), blocks.argmin(dim=-1, keepdim=True))
    extreme = blocks.gather(-1, index).squeeze(-1)
    code = quantized.codes_NK.view(blocks.shape).gather(-1, index).squeeze(-1)
    end = abs(grid.code_min) if grid.signed_scale else grid.code_max
    usual = (extreme.abs() / end > grid.scale_floor) & (extreme.abs() / end < grid.scale_ceiling)
    if grid.signed_scale:
        assert bool((code[usual] == grid.code_min).all())
    elif grid.scale_bits < 8:  # a scale of 4 bits may be a 17th too small, or too large
        assert bool((code[usual].abs() >= 16 / 17 * grid.code_max - 1).all())
    else:
        assert torch.equal(code[usual].int(), (extreme[usual].sign() * grid.code_max).int())


@every_grid
def test_ties_between_codes_go_to_even(grid: Grid) -> None:
    weight = torch.zeros(1, grid.block)
    weight[0, :6] = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 3.0])
    codes = quantize(weight, grid, torch.ones(1, 1)).codes_NK
    assert codes[0, :7].tolist() == [0, 2, 2, 0, -2, 3, 0]


@every_grid
def test_a_block_of_zeros_decodes_to_positive_zeros(grid: Grid) -> None:
    quantized = quantize(torch.zeros(3, 2 * grid.block), grid)
    assert int(bits_of(dequantize(quantized)).abs().max()) == 0
    assert torch.equal(quantized.scales_NG.float(), torch.full((3, 2), grid.scale_floor))


@every_grid
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_float_types_count_as_their_float32_values(grid: Grid, dtype: torch.dtype) -> None:
    weight = gaussian(5, 2 * grid.block).to(dtype)
    one, other = quantize(weight, grid), quantize(weight.float(), grid)
    assert torch.equal(one.codes_NK, other.codes_NK)
    assert torch.equal(one.scales_NG, other.scales_NG)


@every_grid
def test_memory_layout_does_not_matter(grid: Grid) -> None:
    weight = gaussian(64, 3 * grid.block)
    transposed = weight.t().contiguous().t()
    assert not transposed.is_contiguous()
    one, other = quantize(weight, grid), quantize(transposed, grid)
    assert torch.equal(bits_of(dequantize(one)), bits_of(dequantize(other)))


@every_grid
def test_quantize_leaves_its_input_alone(grid: Grid) -> None:
    weight = gaussian(3, 2 * grid.block).requires_grad_()
    before = weight.detach().clone()
    quantized = quantize(weight, grid, mse_scales(weight, grid))
    assert torch.equal(weight.detach(), before)
    assert not dequantize(quantized).requires_grad


@every_grid
def test_no_rows(grid: Grid) -> None:
    quantized = quantize(torch.empty(0, 2 * grid.block), grid)
    assert dequantize(quantized).shape == (0, 2 * grid.block)


# ---------------------------------------------------------------------------------------------------- scale search


def block_errors(weight: Tensor, scales_NG: Tensor, grid: Grid, importance_K: Tensor | None = None) -> Tensor:
    error = (dequantize(quantize(weight, grid, scales_NG)).double() - weight.double()).square()
    if importance_K is not None:
        error = error * importance_K.double()
    return error.view(weight.shape[0], -1, grid.block).sum(-1)


@every_grid
@given(data=st.data())
def test_the_search_is_never_worse_than_absmax(grid: Grid, data: st.DataObject) -> None:
    weight = data.draw(blocks_of_weights(grid))
    # Weights whose squared error float32 can hold; any real weight is far inside.
    tensor = torch.from_numpy(weight).clamp(-1e15, 1e15)
    absmax = block_errors(tensor, absmax_scales(tensor, grid), grid)
    searched = block_errors(tensor, mse_scales(tensor, grid), grid)
    assert bool((searched <= absmax * (1 + 1e-5) + 1e-30).all())


@every_grid
def test_the_search_lowers_the_error_of_gaussian_weights(grid: Grid) -> None:
    weight = gaussian(64, 256)
    absmax = block_errors(weight, absmax_scales(weight, grid), grid).sum()
    searched = block_errors(weight, mse_scales(weight, grid), grid).sum()
    # What clipping can win at 8 bits falls with the size of the block: 0.85, 0.92, 0.95 of the error are left.
    most = {4: 0.9, 5: 0.92}.get(grid.bits) or {32: 0.9, 64: 0.94, 128: 0.97}[grid.block]
    assert searched < most * absmax


def test_importance_moves_the_error_to_where_it_matters_less() -> None:
    grid = get_grid("q4_0")
    weight = gaussian(64, 256)
    importance = torch.where(torch.arange(256) % 32 < 4, 100.0, 1.0)
    plain, weighted = mse_scales(weight, grid), mse_scales(weight, grid, importance)
    assert (
        block_errors(weight, weighted, grid, importance).sum()
        < 0.9 * block_errors(weight, plain, grid, importance).sum()
    )


@pytest.mark.parametrize("grid", SIGNED_4_BIT, ids=lambda grid: grid.name)
def test_signed_scales_lower_the_rounding_error(grid: Grid) -> None:
    """Relative error on Gaussian weights, with signed and with positive scales; by block, from numpy in float64."""
    expected = {32: (0.0859, 0.0948), 64: (0.0949, 0.1028), 128: (0.1033, 0.1108)}[grid.block]
    weight = gaussian(512, 1024)
    signed = float((dequantize(quantize(weight, grid)) - weight).norm() / weight.norm())
    # The largest magnitude halfway between the ends of the code range; 7 and 8 as divisors give 0.097 and 0.094.
    positive_NG = weight.view(512, -1, grid.block).abs().amax(-1) / 7.5
    positive = float((dequantize(quantize(weight, grid, positive_NG)) - weight).norm() / weight.norm())
    assert (signed, positive) == pytest.approx(expected, abs=0.001)


# ---------------------------------------------------------------------------------------------------- bad input


@every_grid
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_values_that_are_no_numbers(grid: Grid, bad: float) -> None:
    weight = gaussian(4, 2 * grid.block)
    weight[2, 7] = bad
    weight[3, 1] = bad
    with pytest.raises(UserError, match=r"model\.norm\.weight holds 2 NaN or infinite values.*checkpoint"):
        quantize(weight, grid, name="model.norm.weight")


@every_grid
def test_opposite_infinities_do_not_cancel(grid: Grid) -> None:
    weight = torch.zeros(1, 2 * grid.block)
    weight[0, 0], weight[0, 1] = torch.inf, -torch.inf
    with pytest.raises(UserError, match="2 NaN or infinite"):
        quantize(weight, grid)


@every_grid
@pytest.mark.parametrize("shape", [(64,), (2, 2, 64)])
def test_only_matrices(grid: Grid, shape: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match="bias has shape .* only matrices"):
        quantize(torch.zeros(shape), grid, name="bias")


@every_grid
@pytest.mark.parametrize("columns", [1, 31, 33, 48, 80])
def test_rows_that_the_block_does_not_divide(grid: Grid, columns: int) -> None:
    with pytest.raises(UserError, match=rf"up_proj has rows of {columns} values.*{grid.block}.*fit") as caught:
        quantize(torch.zeros(3, columns), grid, name="up_proj")
    fitting = [other.name for other in ALL_GRIDS if columns % other.unit == 0]
    assert all(name in str(caught.value) for name in fitting)
    assert bool(fitting) != ("no grid fits" in str(caught.value))


def test_a_quantized_tensor_checks_its_parts() -> None:
    grid = get_grid("q4_0")
    codes, scales = torch.zeros(2, 64, dtype=torch.int8), torch.ones(2, 2, dtype=torch.float16)
    QuantizedTensor(codes, scales, grid)
    for wrong in ((codes.short(), scales), (codes, scales.float()), (codes, scales[:, :1])):
        with pytest.raises(AssertionError):
            QuantizedTensor(*wrong, grid)


def test_names_and_widths_of_grids() -> None:
    assert grid_for_bits(4) is get_grid("q4_0")
    assert grid_for_bits(8) is get_grid("q8_0")
    with pytest.raises(UserError, match="no portable 3-bit grid; --bits takes 4 or 8"):
        grid_for_bits(3)
    with pytest.raises(UserError, match=r"unknown grid 'q3_k'; known: .*q4_0"):
        get_grid("q3_k")


@every_grid
def test_the_table_is_consistent(grid: Grid) -> None:
    assert GRIDS[grid.name] is grid
    assert -(1 << (grid.bits - 1)) <= grid.code_min < 0 < grid.code_max < 1 << (grid.bits - 1)
    limits = torch.tensor([grid.scale_floor, grid.scale_ceiling])
    assert torch.equal(round_scales(limits, grid), limits)
    assert float(limits[1].half()) == grid.scale_ceiling
    assert grid.bits_per_weight == grid.bits + 16 / grid.block
