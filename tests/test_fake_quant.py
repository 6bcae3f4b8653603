"""Fake quantization: hard rounding is the device's, noise is what it says, gradients are straight through.

Shapes: N output features, K input features, G blocks along K.
"""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qad.errors import UserError
from qad.fake_quant import fake_quantize, fake_quantize_backward, fold_sum
from qad.grid import GRIDS, Grid, get_grid
from qad.noise import HARD, NOISE_MODES, Noise
from qad.philox import uniform16
from qad.tensor import absmax_scales, as_blocks, dequantize, mse_scales, quantize, round_scales

SOFT = [mode for mode in NOISE_MODES if mode != "none"]
# Those that are not plain are in test_scales.py.
PLAIN = {name: grid for name, grid in GRIDS.items() if grid.is_plain}
every_grid = pytest.mark.parametrize("grid", PLAIN.values(), ids=PLAIN.keys())


def weights(rows: int = 24, columns: int = 384, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05


def inside_scales(weight: Tensor, grid: Grid) -> Tensor:
    """Return scales under which every value lies more than half a step inside the range."""
    rounding = 1 + 2.0**-grid.scale_bits  # what a scale may lose
    return round_scales(as_blocks(weight, grid).abs().amax(dim=-1) * rounding / (grid.code_max - 1.5), grid)


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.int32)


# ---------------------------------------------------------------------------------------------------- hard rounding


@every_grid
@pytest.mark.parametrize("scales", ["absmax", "mse", "negative", "tiny", "huge"])
def test_hard_rounding_is_what_the_device_decodes(grid: Grid, scales: str) -> None:
    weight = weights()
    weight[0, : grid.block] = 0.0
    weight[1, : grid.block] = -0.0
    weight[2, ::2] = -0.0
    weight[3, : 2 * grid.block] = 1e-30
    weight[4, 5] = 1e30
    chosen = {
        "absmax": lambda: absmax_scales(weight, grid),
        "mse": lambda: mse_scales(weight.clamp(-1, 1), grid),
        "negative": lambda: -absmax_scales(weight, grid),
        "tiny": lambda: torch.full((24, 384 // grid.block), 1e-30),
        "huge": lambda: torch.full((24, 384 // grid.block), -1e30),
    }[scales]()
    expected = dequantize(quantize(weight, grid, chosen))
    assert torch.equal(bits(fake_quantize(weight, chosen, grid)), bits(expected))
    out = torch.full_like(weight, math.nan)
    assert fake_quantize(weight, chosen, grid, HARD, out=out) is out
    assert torch.equal(bits(out), bits(expected))


@every_grid
def test_hard_rounding_of_ties_goes_to_even(grid: Grid) -> None:
    codes = torch.arange(grid.code_min - 2, grid.code_max + 2, dtype=torch.float32) + 0.5
    weight = torch.cat([codes, codes.new_zeros(-len(codes) % grid.block)]).view(1, -1) * 2.0**-5
    scales = torch.full((1, weight.shape[1] // grid.block), 2.0**-5)
    got = fake_quantize(weight, scales, grid)
    assert torch.equal(bits(got), bits(dequantize(quantize(weight, grid, scales))))
    assert torch.equal((got * 2.0**5)[0, : len(codes)], codes.round().clamp(grid.code_min, grid.code_max))


@given(
    st.sampled_from(list(PLAIN)),
    st.lists(st.floats(-1e6, 1e6, width=32), min_size=32, max_size=32),
    st.floats(-1e5, 1e5, width=32),
)
def test_hard_rounding_of_any_block(name: str, values: list[float], scale: float) -> None:
    grid = get_grid(name)
    weight, scales = torch.tensor([values * (grid.block // 32)]), torch.tensor([[scale]])
    expected = dequantize(quantize(weight, grid, scales))
    assert torch.equal(bits(fake_quantize(weight, scales, grid)), bits(expected))


@every_grid
@pytest.mark.parametrize("mode", SOFT)
def test_a_hard_share_of_one_is_hard(grid: Grid, mode: str) -> None:
    weight = weights()
    scales = absmax_scales(weight, grid)
    hard = fake_quantize(weight, scales, grid)
    assert torch.equal(bits(fake_quantize(weight, scales, grid, Noise(mode, 1.0, 3, 4, 5))), bits(hard))
    assert torch.equal(bits(fake_quantize(weight, scales, grid, Noise("none", 0.0, 3, 4, 5))), bits(hard))


@every_grid
@pytest.mark.parametrize("mode", NOISE_MODES)
def test_without_scales_they_are_absmax(grid: Grid, mode: str) -> None:
    weight, noise = weights(), Noise(mode, 0.3, 1, 2, 3)
    scales = absmax_scales(weight, grid)
    used = torch.empty_like(scales)
    got = fake_quantize(weight, None, grid, noise, used_scales_NG=used)
    assert torch.equal(bits(got), bits(fake_quantize(weight, scales, grid, noise)))
    assert torch.equal(used, scales)
    grads = [torch.ones_like(weight) for _ in range(2)]
    by_scale = [
        fake_quantize_backward(grad, weight, given, grid, noise, learn_scales=True)
        for grad, given in zip(grads, (None, scales), strict=True)
    ]
    assert torch.equal(grads[0], grads[1])
    assert torch.equal(by_scale[0], by_scale[1])  # type: ignore[arg-type]


@every_grid
def test_given_scales_are_rounded_and_handed_back_in_place(grid: Grid) -> None:
    weight = weights()
    scales = absmax_scales(weight, grid) * 1.003 - 1e-9
    rounded = round_scales(scales, grid)
    assert not torch.equal(scales, rounded)
    expected = fake_quantize(weight, rounded, grid)
    assert torch.equal(bits(fake_quantize(weight, scales, grid, used_scales_NG=scales)), bits(expected))
    assert torch.equal(scales, rounded)


@every_grid
@pytest.mark.parametrize("mode", NOISE_MODES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_floats_are_computed_in_float32_and_rounded_once(grid: Grid, mode: str, dtype: torch.dtype) -> None:
    weight, noise = weights().to(dtype), Noise(mode, 0.3, 1, 2, 3)
    expected = fake_quantize(weight.float(), None, grid, noise)
    got = fake_quantize(weight, None, grid, noise)
    assert got.dtype == dtype
    assert torch.equal(got, expected.to(dtype))
    assert torch.equal(fake_quantize(weight, None, grid, noise, out=torch.empty_like(expected)), expected)
    grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(4)).to(dtype)
    wide = grad.float()
    by_scale = fake_quantize_backward(grad, weight, None, grid, noise, learn_scales=True)
    expected_by_scale = fake_quantize_backward(wide, weight.float(), None, grid, noise, learn_scales=True)
    assert torch.equal(grad, wide.to(dtype))
    assert by_scale is not None
    assert by_scale.dtype == torch.float32
    assert torch.equal(by_scale, expected_by_scale)  # type: ignore[arg-type]


@every_grid
@pytest.mark.parametrize("mode", NOISE_MODES)
@pytest.mark.parametrize("given", [True, False])
def test_damage_shows_and_stays_in_its_block(grid: Grid, mode: str, given: bool) -> None:
    weight, noise = weights(), Noise(mode, 0.3, 1, 2, 3)
    scales = absmax_scales(weight, grid) if given else None
    whole = fake_quantize(weight, scales, grid, noise)
    damaged = torch.zeros(24, 384 // grid.block, dtype=torch.bool)
    for row, bad in enumerate((math.nan, math.inf, -math.inf)):
        weight[row, (row + 1) * grid.block - 1] = bad
        damaged[row, row] = True
    if scales is not None:
        scales[5, 1] = math.nan
        scales[6, 1] = math.inf  # no damage: the ceiling
        damaged[5, 1] = True
    got = as_blocks(fake_quantize(weight, scales, grid, noise), grid)
    assert bool(got[damaged].isnan().all())
    sound = ~damaged
    sound[6, 1] = not given
    assert torch.equal(got[sound], as_blocks(whole, grid)[sound])
    assert bool(got[6, 1].isfinite().all())
    grad = torch.ones_like(weight)
    by_scale = fake_quantize_backward(grad, weight, scales, grid, noise, learn_scales=True)
    assert by_scale is not None
    assert not by_scale[damaged].any()
    assert bool(by_scale.isfinite().all())
    assert not as_blocks(grad, grid)[damaged].any()
    assert bool(as_blocks(grad, grid)[sound].any())


# ---------------------------------------------------------------------------------------------------- noise


@every_grid
@pytest.mark.parametrize("mode", SOFT)
def test_noise_depends_on_seed_tensor_and_step_alone(grid: Grid, mode: str) -> None:
    weight = weights()
    scales = absmax_scales(weight, grid)

    def draw(seed: int, tensor: int, step: int) -> Tensor:
        return fake_quantize(weight, scales, grid, Noise(mode, 0.5, seed, tensor, step))

    first = draw(1, 2, 3)
    torch.manual_seed(99)
    assert torch.equal(bits(draw(1, 2, 3)), bits(first))
    for other in ((2, 2, 3), (1, 3, 3), (1, 2, 4), (1 + (1 << 32), 2, 3)):
        assert not torch.equal(draw(*other), first), other


@every_grid
def test_uniform_noise_is_half_a_step_either_way(grid: Grid) -> None:
    weight = weights(64, 512)
    scales = inside_scales(weight, grid)
    step = scales.abs().repeat_interleave(grid.block, dim=1)
    noise = (fake_quantize(weight, scales, grid, Noise("uniform", 0.0, seed=1)) - weight) / step
    assert float(noise.abs().max()) <= 0.5 + 1e-4
    assert float(noise.max()) > 0.499
    assert float(noise.min()) < -0.499
    # 32768 uniform values: the standard error of the mean is 1 / sqrt(12 n) = 0.0016, that of the variance 0.0004.
    assert abs(float(noise.mean())) < 0.008
    assert abs(float(noise.var()) - 1 / 12) < 0.002


@every_grid
def test_uniform_noise_is_rounded_once(grid: Grid) -> None:
    weight = weights(64, 512) * 2
    scales = inside_scales(weight, grid) * 0.5  # some values lie outside, and others reach the ends by noise
    if grid.signed_scale:
        scales[::2] *= -1
    scales = round_scales(scales, grid)
    got = fake_quantize(weight, scales, grid, Noise("uniform", 0.0, 1, 2, 3)).double()
    steps = scales.double().repeat_interleave(grid.block, dim=1)
    ends = steps * grid.code_min, steps * grid.code_max
    significand, exponent = torch.frexp(steps)
    cut = torch.ldexp((significand * 256).trunc() / 256, exponent)
    assert torch.equal(cut, steps) == (grid.scale_bits <= 8)
    random = uniform16(weight.numel(), seed=1, tensor=2, step=3).view(weight.shape).double() - 0.5
    exact = (weight + cut * random).clamp(torch.minimum(*ends), torch.maximum(*ends))  # in 53 bits: exact
    assert torch.equal(got, exact.float().double())
    assert 0.01 < float(((got == ends[0]) | (got == ends[1])).double().mean()) < 0.5


@every_grid
def test_stochastic_rounding_is_unbiased_and_rounds_to_a_neighbour(grid: Grid) -> None:
    weight = weights(512 // grid.block, grid.block)
    scales = inside_scales(weight, grid)
    step = scales.repeat_interleave(grid.block, dim=1)
    exact = weight * scales.reciprocal().repeat_interleave(grid.block, dim=1)
    draws = torch.stack(
        [fake_quantize(weight, scales, grid, Noise("stochastic", 0.0, seed=2, step=n)) for n in range(1000)]
    )
    codes = draws / step
    assert torch.equal(codes, codes.round())
    assert bool(((codes == exact.floor()) | (codes == exact.ceil())).all())
    fraction = exact - exact.floor()
    deviation = (codes.mean(dim=0) - exact) / (fraction * (1 - fraction) / 1000).sqrt().clamp_min(1e-3)
    assert float(deviation.abs().max()) < 5.0  # standard errors; 512 elements
    assert abs(float(deviation.mean())) < 0.25


@every_grid
def test_partial_noise_leaves_the_other_blocks_as_they_are(grid: Grid) -> None:
    weight = weights(2048 // (512 // grid.block), 512)
    scales = inside_scales(weight, grid)
    hard = as_blocks(fake_quantize(weight, scales, grid), grid)
    got = as_blocks(fake_quantize(weight, scales, grid, Noise("partial", 0.3, seed=5)), grid)
    is_hard = (got == hard).all(dim=-1)
    untouched = ((got - as_blocks(weight, grid)).abs() <= 1e-6 * as_blocks(weight, grid).abs()).all(dim=-1)
    assert bool((is_hard ^ untouched).all())
    assert abs(float(is_hard.float().mean()) - 0.3) < 0.05  # 2048 blocks: standard error 0.01
    nothing = fake_quantize(weight, scales, grid, Noise("partial", 0.0, seed=5))
    assert torch.allclose(nothing, weight, rtol=1e-6, atol=0)


@every_grid
@pytest.mark.parametrize("mode", ["uniform", "stochastic"])
def test_the_hard_share_of_blocks_is_rounded_in_every_mode(grid: Grid, mode: str) -> None:
    weight = weights(2048 // (512 // grid.block), 512)
    scales = inside_scales(weight, grid)
    hard = as_blocks(fake_quantize(weight, scales, grid), grid)
    got = as_blocks(fake_quantize(weight, scales, grid, Noise(mode, 0.6, seed=5)), grid)
    assert abs(float((got == hard).all(dim=-1).float().mean()) - 0.6) < 0.05


@every_grid
@pytest.mark.parametrize("mode", SOFT)
def test_noise_is_clipped_to_the_range(grid: Grid, mode: str) -> None:
    weight = weights() * 3
    scales = round_scales(absmax_scales(weight, grid) / 2, grid)
    codes = fake_quantize(weight, scales, grid, Noise(mode, 0.2, seed=1)) / scales.repeat_interleave(grid.block, dim=1)
    assert float(codes.max()) == pytest.approx(grid.code_max, rel=1e-6)
    assert float(codes.min()) == pytest.approx(grid.code_min, rel=1e-6)


def test_an_unknown_noise_mode() -> None:
    with pytest.raises(UserError, match="unknown noise mode 'pink'; known: none, partial, stochastic, uniform"):
        Noise("pink")


# ---------------------------------------------------------------------------------------------------- gradients


@every_grid
@pytest.mark.parametrize("mode", NOISE_MODES)
@pytest.mark.parametrize("share", [0.0, 0.4])
def test_gradients_follow_their_formula(grid: Grid, mode: str, share: float) -> None:
    """Element by element in plain Python, from the forward weights alone."""
    weight = weights(6, 2 * grid.block) * 1.5
    scales = round_scales(absmax_scales(weight, grid) * 0.6, grid)  # some values lie outside
    if grid.signed_scale:
        scales[::2] *= -1
    noise = Noise(mode, share, 7, 1, 2)
    grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(3))
    forward = fake_quantize(weight, scales, grid, noise)
    got = grad.clone()
    by_scale = fake_quantize_backward(got, weight, scales, grid, noise, learn_scales=True)
    assert by_scale is not None
    outside = 0
    for n in range(weight.shape[0]):
        for g in range(scales.shape[1]):
            total, scale, slack = 0.0, float(scales[n, g]), 1e-3
            for k in range(g * grid.block, (g + 1) * grid.block):
                position = float(weight[n, k]) / scale
                inside = grid.code_min - 0.5 <= position <= grid.code_max + 0.5
                outside += not inside
                assert float(got[n, k]) == (float(grad[n, k]) if inside else 0.0)
                total += float(grad[n, k]) * (float(forward[n, k]) / scale - (position if inside else 0.0))
                if mode == "uniform" and grid.scale_bits > 8:  # noise is of 8 bits of a scale, its gradient of all
                    slack += abs(float(grad[n, k])) * 2.0**-8
            assert float(by_scale[n, g]) == pytest.approx(total, rel=1e-4, abs=slack)
    assert outside > 5


@every_grid
def test_gradients_of_scales_are_left_out_unless_learned(grid: Grid) -> None:
    weight = weights()
    grad = torch.ones_like(weight)
    assert fake_quantize_backward(grad, weight, absmax_scales(weight, grid), grid, learn_scales=False) is None


def by_finite_differences(weight: Tensor, scales: Tensor, grid: Grid, noise: Noise, cotangent: Tensor) -> Tensor:
    """Differentiate sum(cotangent * forward) by the scales in float64, with the forward written out anew.

    Steps are relative: the noise of a block is recovered from one forward pass and held.
    """
    drawn = as_blocks(fake_quantize(weight, scales, grid, noise), grid).double()
    blocks = as_blocks(weight, grid).double()
    base = scales.double().unsqueeze(-1)
    offset = drawn / base - blocks / base  # noise in steps: what stays when the scale moves

    def value(scale: Tensor) -> Tensor:
        codes = (blocks / scale + offset).clamp(grid.code_min, grid.code_max)
        return (codes * scale * as_blocks(cotangent, grid).double()).sum(dim=-1)

    return ((value(base * (1 + 1e-6)) - value(base * (1 - 1e-6))) / (2e-6 * base.squeeze(-1))).float()


@every_grid
@pytest.mark.parametrize("mode", ["uniform", "partial"])
def test_gradients_of_scales_are_true_derivatives_where_forward_is_smooth(grid: Grid, mode: str) -> None:
    """With noise in place of rounding, forward is differentiable by the scale inside the range."""
    weight = weights(8, 3 * grid.block)
    scales = inside_scales(weight, grid)
    cotangent = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    noise = Noise(mode, 0.0, seed=3)
    expected = by_finite_differences(weight, scales, grid, noise, cotangent)
    got = fake_quantize_backward(cotangent.clone(), weight, scales, grid, noise, learn_scales=True)
    assert got is not None
    if mode == "partial":
        assert float(got.abs().max()) < 1e-3  # the scale does not matter inside the range
    slack = 2e-3
    if mode == "uniform" and grid.scale_bits > 8:  # noise is of 8 bits of a scale, its gradient of all
        slack += float(as_blocks(cotangent, grid).abs().sum(dim=-1).max()) * 2.0**-8
    assert torch.allclose(got, expected, rtol=2e-3, atol=slack)


@every_grid
def test_gradients_of_scales_are_true_derivatives_outside_the_range(grid: Grid) -> None:
    """A block that lies wholly outside is code times scale, whatever the noise."""
    weight = torch.where(weights() > 0, 1.0, -1.0)
    scales = torch.full((24, 384 // grid.block), 2.0**-9)
    cotangent = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    got = fake_quantize_backward(cotangent.clone(), weight, scales, grid, HARD, learn_scales=True)
    codes = torch.where(weight > 0, float(grid.code_max), float(grid.code_min))
    assert got is not None
    assert torch.allclose(got, as_blocks(codes * cotangent, grid).sum(dim=-1), rtol=1e-4, atol=1e-3)


def test_sums_are_folded_in_halves() -> None:
    """In float32 the order shows: 1 is lost beside 2^24 unless it meets another 1 first."""
    values = torch.tensor([[2.0**24, 1.0, -(2.0**24), 1.0], [2.0**24, 1.0, 1.0, 1.0], [1.0, 2.0**24, 1.0, 0.0]])
    assert fold_sum(values).tolist() == [2.0, 2.0**24 + 2, 2.0**24 + 2]
    assert fold_sum(torch.ones(3, 2, 128)).tolist() == [[128.0, 128.0]] * 3


@every_grid
def test_masters_at_the_edge_of_the_range_are_trained(grid: Grid) -> None:
    """Up to half a step beyond the last code the rounding is no clipping."""
    edges = [grid.code_min - 0.75, grid.code_min - 0.25, 0.0, grid.code_max + 0.25, grid.code_max + 0.75]
    weight = torch.zeros(1, grid.block)
    weight[0, :5] = torch.tensor(edges) * 2.0**-5
    grad = torch.ones(1, grid.block)
    fake_quantize_backward(grad, weight, torch.full((1, 1), 2.0**-5), grid, learn_scales=False)
    assert grad[0, :5].tolist() == [0.0, 1.0, 1.0, 1.0, 0.0]
