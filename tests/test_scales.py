"""Grids of minimums and super-blocks: what is stored, how it is found, and that forward uses nothing else.

Shapes: N output features, K input features, G blocks along K, S super-blocks along K.
"""

import math

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from qad.errors import UserError
from qad.fake_quant import fake_quantize, fake_quantize_backward
from qad.grid import GRIDS, Grid, get_grid
from qad.noise import HARD, NOISE_MODES, Noise
from qad.ops import fake_quantize_op
from qad.scale_search import find_scales
from qad.scales import StoredScales, range_scales, to_half
from qad.tensor import as_blocks, block_offsets, block_scales, dequantize, quantize
from tests.helpers_ggml import GGUF_TYPES, ggml_quantize
from tests.helpers_grids import random_stored, random_tensor

# The plain ones are in test_tensor.py and test_fake_quant.py.
GRIDS_HERE = [grid for grid in GRIDS.values() if not grid.is_plain]
every_grid = pytest.mark.parametrize("grid", GRIDS_HERE, ids=lambda grid: grid.name)
SOFT = [mode for mode in NOISE_MODES if mode != "none"]


def gaussian(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.int32)


def each(decoded: Tensor | None, grid: Grid) -> Tensor:
    """Return a number per block as one per weight, 0 for none."""
    return torch.zeros(()) if decoded is None else decoded.repeat_interleave(grid.block, dim=1)


def unit_errors(weight: Tensor, decoded: Tensor, grid: Grid, importance_K: Tensor | None = None) -> Tensor:
    error = (decoded.double() - weight.double()).square()
    error = error if importance_K is None else error * importance_K.double()
    return error.unflatten(1, (-1, grid.unit)).sum(dim=-1)


def test_the_table() -> None:
    wanted = {"q4_1": 5.0, "q5_0": 5.5, "q8_0_fp16": 8.5, "q4_k": 4.5, "q5_k": 5.5, "q6_k": 6.5625}
    assert {name: get_grid(name).bits_per_weight for name in wanted} == wanted
    assert [grid.name for grid in GRIDS_HERE] == ["q4_1", "q4_k", "q5_k", "q6_k"]
    assert get_grid("q6_k").parts == ("scales", "super_scales")
    assert get_grid("q4_k").parts == ("scales", "minimums", "super_scales", "super_minimums")
    for grid in GRIDS_HERE:
        assert grid.unit == gguf.GGML_QUANT_SIZES[GGUF_TYPES[grid.name]][0]
        assert grid.code_max - grid.code_min == (1 << grid.bits) - 1
    with pytest.raises(
        UserError, match=r"rows of 320 values, which blocks of 256 \(q6_k\) do not divide; grids that fit"
    ):
        quantize(torch.zeros(2, 320), get_grid("q6_k"))


def test_products_of_8_bit_codes_and_4_bit_scales_are_exact_in_fp16() -> None:
    grid = get_grid("q8_0_fp16")
    significands = torch.arange(8, 16, dtype=torch.float64)
    scales = (significands * 2.0 ** (torch.arange(-14, 16, dtype=torch.float64).unsqueeze(1) - 3)).flatten()
    codes = torch.arange(grid.code_min, grid.code_max + 1, dtype=torch.float64)
    exact = scales.unsqueeze(1) * codes
    inside = exact.abs() <= 65504
    got = scales.half().unsqueeze(1) * codes.half()
    assert torch.equal(got.double()[inside], exact[inside])


# ---------------------------------------------------------------------------------------------------- decoding


@every_grid
def test_weights_are_rounded_once(grid: Grid) -> None:
    """Exact in float64: no product has more than 23 bits, nothing stored is finer than 2^-24 or beyond 2^29."""
    quantized = random_tensor(32, 4 * grid.unit, grid, seed=1)
    parts = {name: tensor.double() for name, tensor in quantized.parts.items()}
    wide = {name: parts[name].repeat_interleave(grid.columns_of(name), dim=1) for name in grid.parts}
    exact = parts["codes"] * wide["scales"] * wide.get("super_scales", 1.0)
    if grid.minimum:
        exact += wide["minimums"] * (-wide["super_minimums"] if grid.super_block else 1.0)
    got = dequantize(quantized)
    assert torch.equal(got, exact.float())
    buffer = torch.full_like(got, math.nan)
    assert dequantize(quantized, out=buffer) is buffer
    assert torch.equal(bits(buffer), bits(got))


@every_grid
def test_blocks_without_a_scale_are_their_offset(grid: Grid) -> None:
    weight = gaussian(4, 2 * grid.unit)
    stored = range_scales(weight, grid)
    stored.scales_NG[1, 0], stored.scales_NG[2, 1] = 0, 0
    quantized = quantize(weight, grid, stored)
    codes, values = as_blocks(quantized.codes_NK, grid), as_blocks(dequantize(quantized), grid)
    for n, g in ((1, 0), (2, 1)):
        assert not codes[n, g].any()
        offsets = block_offsets(quantized)
        assert bool((values[n, g] == (0.0 if offsets is None else offsets[n, g])).all())
    assert torch.equal(bits(forward(weight, stored)), bits(dequantize(quantized)))


def forward(weight: Tensor, stored: StoredScales, noise: Noise = HARD) -> Tensor:
    scales_NG, offsets_NG = stored.decode()
    return fake_quantize(weight, scales_NG, stored.grid, noise, offsets_NG=offsets_NG)


def test_stored_scales_check_their_parts() -> None:
    grid = get_grid("q4_k")
    parts = random_stored(grid, 2, 512, seed=0).parts
    assert {name: (tensor.shape[1], tensor.dtype) for name, tensor in parts.items()} == {
        "scales": (16, torch.uint8),
        "minimums": (16, torch.uint8),
        "super_scales": (2, torch.float16),
        "super_minimums": (2, torch.float16),
    }
    StoredScales.of(grid, parts)
    for part in parts:
        for wrong in (parts[part].float(), parts[part][:, :1], parts[part][:1]):
            with pytest.raises(AssertionError):
                StoredScales.of(grid, {**parts, part: wrong})
        with pytest.raises(AssertionError):
            StoredScales.of(grid, {other: parts[other] for other in parts if other != part})
    moved = StoredScales.of(grid, parts).map(lambda rows: rows.flip(0))
    assert all(torch.equal(moved.parts[part][1], parts[part][0]) for part in parts)


# ---------------------------------------------------------------------------------------------------- finding scales


@every_grid
def test_range_scales_span_the_range(grid: Grid) -> None:
    weight = gaussian(64, 4 * grid.unit)
    quantized = quantize(weight, grid)
    assert int(quantized.codes_NK.min()) == grid.code_min
    assert int(quantized.codes_NK.max()) == grid.code_max
    # No value is further off than its rounding, the clipping by scales rounded down, and minimums rounded.
    blocks = as_blocks(weight, grid)
    span = (blocks.amax(-1).clamp(min=0) - blocks.amin(-1).clamp(max=0)).unsqueeze(-1)
    error = (as_blocks(dequantize(quantized), grid) - blocks).abs() / span
    assert float(error.max()) < {4: 0.07, 5: 0.05, 6: 0.02}[grid.bits]
    if grid.signed_scale:
        assert int(quantized.scales_NG.min()) == grid.sub_scale_range[0]
        assert bool((as_blocks(quantized.scales_NG, grid_of(16)).min(dim=-1).values == -128).all())


def grid_of(block: int) -> Grid:
    return Grid("blocks", 8, block, -128, 127, signed_scale=False)


@every_grid
@given(data=st.data())
def test_the_search_is_never_worse_than_the_range_and_always_stored(grid: Grid, data: st.DataObject) -> None:
    elements = data.draw(
        st.sampled_from(
            [
                st.floats(width=32, min_value=-(2.0**26), max_value=2.0**26),
                st.floats(-4, 4, width=32),
                st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0**-24, 1e-40, 65504.0, -1e6, 2.0**-14, 0.5]),
            ]
        )
    )
    shape = (data.draw(st.integers(1, 2)), max(256, grid.unit))
    weight = torch.from_numpy(data.draw(hnp.arrays(np.float32, shape, elements=elements, fill=st.just(0.0))))
    errors = []
    for method in ("range", "mse"):
        found = quantize(weight, grid, find_scales(weight, grid, method))
        assert all(bool(part.float().isfinite().all()) for part in found.parts.values())
        errors.append(unit_errors(weight, dequantize(found), grid))
    assert bool((errors[1] <= errors[0] * (1 + 1e-4) + 1e-30).all())


@pytest.mark.parametrize("name", ["q4_1", "q5_0", "q4_k", "q5_k", "q6_k"])
def test_the_search_beats_llama_cpp_s(name: str) -> None:
    grid, weight = get_grid(name), gaussian(128, 2048)
    weight[:, ::37] *= 4  # outliers, as real weights have them
    theirs = torch.from_numpy(gguf.dequantize(ggml_quantize(weight.numpy(), GGUF_TYPES[name]), GGUF_TYPES[name]))
    ours = dequantize(quantize(weight, grid, find_scales(weight, grid, "mse")))
    ratio = float((ours - weight).norm() / (theirs - weight).norm())
    assert ratio < 0.99, ratio


@every_grid
def test_importance_moves_the_error_to_where_it_matters_less(grid: Grid) -> None:
    weight = gaussian(32, 4 * max(256, grid.unit))
    importance = torch.where(torch.arange(weight.shape[1]) % 16 < 3, 100.0, 1.0)
    plain, weighted, tiny = (
        dequantize(quantize(weight, grid, find_scales(weight, grid, "mse", given)))
        for given in (None, importance, importance * 2.0**-60)
    )
    errors = [unit_errors(weight, decoded, grid, importance).sum() for decoded in (plain, weighted)]
    assert errors[1] < 0.9 * errors[0]
    assert torch.equal(weighted, tiny)


@every_grid
def test_scales_stay_where_new_ones_are_no_better(grid: Grid) -> None:
    weight = gaussian(16, 4 * grid.unit)
    found = find_scales(weight, grid, "mse")
    on_grid = dequantize(quantize(weight, grid, found))
    again = find_scales(on_grid, grid, "mse", start=found)
    assert all(torch.equal(again.parts[name], found.parts[name]) for name in found.parts)
    # And by themselves, super-block by super-block: the start of one row is spoilt.
    start = find_scales(weight, grid, "mse")
    for part in start.parts.values():
        part[3] = 0
    repaired = find_scales(on_grid, grid, "mse", start=start)
    errors = unit_errors(on_grid, dequantize(quantize(on_grid, grid, repaired)), grid)
    assert not errors[:3].any()
    assert float(errors[3].max()) < float(on_grid[3].square().sum()) * 1e-2


@every_grid
@pytest.mark.parametrize("method", ["range", "mse"])
def test_a_damaged_block_does_not_harm_the_others(grid: Grid, method: str) -> None:
    weight = gaussian(3, 2 * max(256, grid.unit))
    clean = weight.clone()
    clean[:, : grid.block] = 0.0
    for row, bad in enumerate((math.nan, math.inf, -math.inf)):
        weight[row, 5] = bad
    found, expected = find_scales(weight, grid, method), find_scales(clean, grid, method)
    assert all(torch.equal(found.parts[name], expected.parts[name]) for name in found.parts)


@every_grid
def test_zeros_decode_to_positive_zeros(grid: Grid) -> None:
    for method in ("range", "mse"):
        quantized = quantize(
            torch.zeros(3, 2 * grid.unit), grid, find_scales(torch.zeros(3, 2 * grid.unit), grid, method)
        )
        assert not bits(dequantize(quantized)).any()


def test_numbers_beyond_fp16_become_its_largest() -> None:
    assert to_half(torch.tensor([1e30, -1e30, 65519.9, 2.0**-25, 2.0**-24])).tolist() == [
        65504.0,
        -65504.0,
        65504.0,
        0.0,
        2.0**-24,
    ]


# ---------------------------------------------------------------------------------------------------- forward


@every_grid
@pytest.mark.parametrize("scales", ["range", "mse", "any"])
def test_hard_rounding_is_what_the_device_decodes(grid: Grid, scales: str) -> None:
    weight = gaussian(24, 3 * grid.unit)
    weight[0], weight[1], weight[2, ::2], weight[3], weight[4, 5] = 0.0, -0.0, -0.0, 1e-30, 1e30
    stored = random_stored(grid, 24, 3 * grid.unit, 2) if scales == "any" else find_scales(weight, grid, scales)
    quantized = quantize(weight, grid, stored)
    expected = dequantize(quantized)
    assert torch.equal(bits(forward(weight, stored)), bits(expected))
    scales_NG, offsets_NG = block_scales(quantized), block_offsets(quantized)
    out, used = torch.full_like(weight, math.nan), torch.empty_like(scales_NG)
    assert fake_quantize(weight, scales_NG, grid, HARD, out, used, offsets_NG) is out
    assert torch.equal(bits(out), bits(expected))
    assert torch.equal(used, scales_NG)
    if scales == "range":
        assert torch.equal(bits(fake_quantize(weight, None, grid)), bits(expected))
        operator = fake_quantize_op(weight, scales_NG, grid.name, "none", 0.0, 0, 0, 0, offsets_NG)
        assert torch.equal(bits(operator[0]), bits(expected))
    half = torch.empty(weight.shape, dtype=torch.bfloat16)
    fake_quantize(weight, scales_NG, grid, HARD, half, offsets_NG=offsets_NG)
    assert torch.equal(half, expected.to(torch.bfloat16))


@every_grid
@pytest.mark.parametrize("mode", SOFT)
def test_noise_is_about_a_step_and_within_the_range(grid: Grid, mode: str) -> None:
    weight = gaussian(48, 2 * max(256, grid.unit))
    stored = range_scales(weight * 1.2, grid)  # what the range cuts off is not of interest here
    scales_NG, offsets_NG = stored.decode()
    steps, offsets = each(scales_NG, grid), each(offsets_NG, grid)
    hard = forward(weight, stored)
    got = forward(weight, stored, Noise(mode, 0.3, seed=5))
    moved = (got - weight) / steps.abs()
    if mode == "stochastic":
        codes = (got - offsets) / steps
        assert torch.allclose(codes, codes.round(), atol=1e-3)
        assert float(moved.abs().max()) < 1.001
    else:
        assert float(moved.abs().max()) < 0.501
    is_hard = (as_blocks(got, grid) == as_blocks(hard, grid)).all(dim=-1).float().mean()
    assert abs(float(is_hard) - 0.3) < 0.06  # at least 768 blocks: standard error 0.017
    assert abs(float(moved.mean())) < 0.01
    wide = forward(3 * weight, stored, Noise(mode, 0.3, seed=5))
    codes = (wide - offsets) / steps
    assert float(codes.max()) == pytest.approx(grid.code_max, rel=1e-4)
    assert float(codes.min()) == pytest.approx(grid.code_min, abs=1e-3)


@every_grid
@pytest.mark.parametrize("given", [True, False])
def test_damage_shows_and_stays_in_its_block(grid: Grid, given: bool) -> None:
    weight, noise = gaussian(8, 2 * max(256, grid.unit)), Noise("uniform", 0.3, 1, 2, 3)
    for row, bad in enumerate((math.nan, math.inf, -math.inf)):
        weight[row, (row + 1) * grid.block - 1] = bad
    scales_NG, offsets_NG = range_scales(weight, grid).decode() if given else (None, None)
    got = as_blocks(fake_quantize(weight, scales_NG, grid, noise, offsets_NG=offsets_NG), grid)
    damaged = torch.zeros(got.shape[:2], dtype=torch.bool)
    damaged[[0, 1, 2], [0, 1, 2]] = True
    assert bool(got[damaged].isnan().all())
    assert bool(got[~damaged].isfinite().all())
    grad = torch.ones_like(weight)
    fake_quantize_backward(grad, weight, scales_NG, grid, noise, learn_scales=False, offsets_NG=offsets_NG)
    assert not as_blocks(grad, grid)[damaged].any()
    assert bool(as_blocks(grad, grid)[~damaged].any(dim=-1).all())


# ---------------------------------------------------------------------------------------------------- backward


@every_grid
@pytest.mark.parametrize("mode", NOISE_MODES)
def test_gradients_follow_their_formula(grid: Grid, mode: str) -> None:
    """Element by element in plain Python, from the forward weights alone."""
    weight = gaussian(2, 256) * 1.5
    stored = range_scales(weight * 0.6, grid)  # some values lie outside
    stored.scales_NG[1, 1] = 0
    scales, offsets = stored.decode()
    noise = Noise(mode, 0.4, 7, 1, 2)
    grad = gaussian(2, 256, seed=3)
    used = forward(weight, stored, noise)
    got = grad.clone()
    by_scale = fake_quantize_backward(got, weight, scales, grid, noise, learn_scales=True, offsets_NG=offsets)
    assert by_scale is not None
    outside = 0
    for n in range(2):
        for g in range(scales.shape[1]):
            scale, offset = float(scales[n, g]), 0.0 if offsets is None else float(offsets[n, g])
            total = 0.0
            for k in range(g * grid.block, (g + 1) * grid.block):
                if scale == 0.0:  # nothing is clipped where there is no range
                    assert float(got[n, k]) == float(grad[n, k])
                    continue
                position = (float(weight[n, k]) - offset) / scale
                inside = grid.code_min - 0.5 <= position <= grid.code_max + 0.5
                outside += not inside
                assert float(got[n, k]) == (float(grad[n, k]) if inside else 0.0)
                code = (float(used[n, k]) - offset) / scale
                total += float(grad[n, k]) * (code - (position if inside else 0.0))
            assert scale == 0.0 or float(by_scale[n, g]) == pytest.approx(total, rel=1e-3, abs=1e-3)
    assert outside > 5


@every_grid
def test_the_operator_is_differentiable(grid: Grid) -> None:
    weight = gaussian(3, 256).requires_grad_()
    scales_NG, offsets_NG = range_scales(weight.detach() * 0.7, grid).decode()
    settings = (grid.name, "uniform", 0.5, 3, 4, 5)
    torch.library.opcheck(fake_quantize_op, (weight, scales_NG, *settings, offsets_NG))
    out, _ = torch.ops.qad.fake_quantize(weight, scales_NG, *settings, offsets_NG)
    slope = gaussian(3, 256, seed=9)
    out.backward(slope)
    expected = slope.clone()
    fake_quantize_backward(
        expected,
        weight.detach(),
        scales_NG,
        grid,
        Noise("uniform", 0.5, 3, 4, 5),
        learn_scales=False,
        offsets_NG=offsets_NG,
    )
    assert weight.grad is not None
    assert torch.equal(weight.grad, expected)
    assert not torch.equal(expected, slope)
