"""Error-compensating rounding: less output error than rounding alone, always on the grid, whatever the inputs.

Shapes: N output features, K input features, T tokens.
"""

import itertools

import pytest
import torch
from torch import Tensor

from qad.grid import GRIDS, Grid
from qad.rounding import (
    RoundingSettings,
    damped,
    descend,
    gptq,
    inverse_factor,
    output_error,
    refit_scales,
    round_with_hessian,
    round_without_hessian,
)
from qad.tensor import QuantizedTensor, dequantize, quantize, round_scales

every_grid = pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS.keys())


def example(rows: int = 48, columns: int = 256, tokens: int = 600) -> tuple[Tensor, Tensor]:
    """Return a weight and the Hessian of correlated inputs, some features of which are far larger than others."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator) * 0.04
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5
    sizes = torch.randn(columns, generator=generator).mul(1.2).exp()
    x_TK = (torch.randn(tokens, columns, generator=generator) @ (mixing + 0.3 * torch.eye(columns))) * sizes
    return weight, x_TK.t() @ x_TK


def check_on_grid(quantized: QuantizedTensor, grid: Grid) -> None:
    assert int(quantized.codes_NK.min()) >= grid.code_min
    assert int(quantized.codes_NK.max()) <= grid.code_max
    scales = quantized.scales_NG.float()
    assert bool(torch.isfinite(scales).all())
    if not grid.super_block:
        assert torch.equal(round_scales(scales, grid), scales)
    else:
        low, high = grid.sub_scale_range
        assert low <= int(quantized.scales_NG.min())
        assert int(quantized.scales_NG.max()) <= high
    for name, tensor in quantized.parts.items():
        assert bool(torch.isfinite(tensor.float()).all()), name


@every_grid
def test_each_step_lowers_the_output_error(grid: Grid) -> None:
    weight, hessian = example()
    steady = damped(hessian, 0.01)
    errors = [
        output_error(weight, rounded.quantized, steady)
        for rounded in (
            round_without_hessian(weight, grid, "rtn", "w"),
            round_without_hessian(weight, grid, "mse", "w"),
            gptq(weight, steady, grid),
            round_with_hessian(weight, hessian, grid, RoundingSettings(refits=1)),
            round_with_hessian(weight, hessian, grid, RoundingSettings(refits=3)),
        )
    ]
    # The scale search of ``mse`` knows nothing of the inputs: in this measure it may lose a little to ``rtn``.
    assert errors[0] > errors[2]
    assert errors[1] > errors[2] > errors[3] >= errors[4]
    assert errors[2] < 0.7 * errors[1], errors


@every_grid
def test_codes_and_scales_lie_on_the_grid(grid: Grid) -> None:
    weight, hessian = example()
    weight[0] *= 1e6
    weight[1] = 0.0
    weight[2] *= 1e-9
    rounded = round_with_hessian(weight, hessian, grid, RoundingSettings(refits=2))
    check_on_grid(rounded.quantized, grid)
    assert rounded.target_NK.shape == weight.shape
    assert bool(torch.isfinite(rounded.target_NK).all())


@every_grid
@pytest.mark.parametrize("refits", [0, 2])
def test_masters_that_start_at_the_target_round_to_the_codes(grid: Grid, refits: int) -> None:
    """Training begins where the rounding ended."""
    weight, hessian = example()
    rounded = round_with_hessian(weight, hessian, grid, RoundingSettings(refits=refits))
    again = quantize(rounded.target_NK, grid, rounded.quantized.stored)
    assert torch.equal(again.codes_NK, rounded.quantized.codes_NK)


def test_gptq_is_the_book_s_recursion() -> None:
    """Column by column in float64, in the same order and with the same scales."""
    grid = GRIDS["q4_0"]
    weight, hessian = example(8, 160)
    steady = damped(hessian, 0.01)
    got = gptq(weight, steady, grid)
    order = steady.diagonal().view(-1, 32).sum(dim=1).argsort(descending=True)
    permutation = (order.unsqueeze(1) * 32 + torch.arange(32)).view(-1)
    factor = torch.linalg.cholesky(torch.linalg.inv(steady.double()[permutation][:, permutation]), upper=True)
    work = weight.double()[:, permutation]
    scales = got.quantized.scales_NG.double().repeat_interleave(32, dim=1)[:, permutation]
    codes = torch.empty_like(work)
    for i in range(160):
        codes[:, i] = (work[:, i] / scales[:, i]).round().clamp(-8, 7)
        error = (work[:, i] - codes[:, i] * scales[:, i]) / factor[i, i]
        work[:, i + 1 :] -= error.unsqueeze(1) * factor[i, i + 1 :]
    different = codes[:, permutation.argsort()] != got.quantized.codes_NK
    assert float(different.float().mean()) < 0.01  # float32 tips a value next to a tie, and its successors


def test_inverse_factor_is_the_factor_of_the_inverse() -> None:
    _, hessian = example(4, 64)
    upper = inverse_factor(damped(hessian, 0.01).double())
    assert torch.allclose(upper.t() @ upper @ damped(hessian, 0.01).double(), torch.eye(64).double(), atol=1e-6)
    assert not upper.tril(-1).any()


@every_grid
def test_uncorrelated_inputs_leave_nothing_to_compensate(grid: Grid) -> None:
    weight, _ = example(16, 2 * grid.unit)
    identity = torch.eye(2 * grid.unit)
    got = gptq(weight, identity, grid).quantized
    expected = round_without_hessian(weight, grid, "mse", "w").quantized
    assert all(torch.equal(got.parts[name], expected.parts[name]) for name in got.parts)


@every_grid
def test_refitted_scales_keep_the_codes_and_lower_the_error(grid: Grid) -> None:
    weight, hessian = example()
    steady = damped(hessian, 0.01)
    before = round_without_hessian(weight, grid, "rtn", "w").quantized
    after = refit_scales(weight, steady, before)
    assert torch.equal(after.codes_NK, before.codes_NK)
    if grid.scale_bits > 4:
        assert output_error(weight, after, steady) < output_error(weight, before, steady)
    else:  # scales lie so far apart that none moves
        assert torch.equal(after.scales_NG, before.scales_NG)
    check_on_grid(after, grid)


def test_refitted_scales_are_the_least_squares_solution() -> None:
    grid = GRIDS["q4_0"]
    weight, hessian = example(6, 96)
    steady = damped(hessian, 0.01)
    before = round_without_hessian(weight, grid, "rtn", "w").quantized
    after = refit_scales(weight, steady, before)
    lower = torch.linalg.cholesky(steady.double())
    for n in range(6):
        blocks = torch.zeros(96, 3, dtype=torch.float64)
        for g in range(3):
            blocks[g * 32 : g * 32 + 32, g] = before.codes_NK[n, g * 32 : g * 32 + 32].double()
        best = torch.linalg.lstsq(lower.t() @ blocks, lower.t() @ weight[n].double()).solution
        assert torch.allclose(after.scales_NG[n].double(), best, rtol=6e-3)  # 8 significand bits, and the ridge


@every_grid
@pytest.mark.parametrize("start", ["rtn", "gptq"])
def test_descent_never_raises_the_error(grid: Grid, start: str) -> None:
    weight, hessian = example()
    steady = damped(hessian, 0.01)
    now = gptq(weight, steady, grid) if start == "gptq" else round_without_hessian(weight, grid, "rtn", "w")
    errors = [output_error(weight, now.quantized, steady)]
    for _ in range(4):
        now = descend(weight, steady, now.quantized)
        errors.append(output_error(weight, now.quantized, steady))
        check_on_grid(now.quantized, grid)
    assert errors[1] < errors[0]
    assert all(after <= before * (1 + 1e-5) for before, after in itertools.pairwise(errors)), errors


def test_descent_ends_where_no_single_code_is_better() -> None:
    grid = GRIDS["q4_0"]
    weight, hessian = example(4, 64)
    steady = damped(hessian, 0.01).double()
    now = round_without_hessian(weight, grid, "rtn", "w").quantized
    for _ in range(50):
        now = descend(weight, steady.float(), now).quantized
    residual = weight.double() - dequantize(now).double()
    best = float(((residual @ steady) * residual).sum())
    scales = now.scales_NG.double().repeat_interleave(32, dim=1)
    for n in range(4):
        for k in range(64):
            for change in (-1, 1):
                if not grid.code_min <= int(now.codes_NK[n, k]) + change <= grid.code_max:
                    continue
                tried = residual.clone()
                tried[n, k] -= change * scales[n, k]
                assert float(((tried @ steady) * tried).sum()) > best - 1e-6 * best


# ---------------------------------------------------------------------------------------------------- odd inputs


@every_grid
@pytest.mark.parametrize("dead", ["some", "a block", "all"])
def test_inputs_that_are_always_zero(grid: Grid, dead: str) -> None:
    weight, hessian = example()
    columns = {"some": slice(3, 250, 7), "a block": slice(32, 64), "all": slice(0, 256)}[dead]
    hessian[columns], hessian[:, columns] = 0.0, 0.0
    rounded = round_with_hessian(weight, hessian, grid, RoundingSettings(refits=2))
    check_on_grid(rounded.quantized, grid)
    # Nothing is known about these inputs, so their weights are rounded as they are: none strays.
    error = (dequantize(rounded.quantized) - weight)[:, columns]
    assert float(error.abs().max()) < float(weight.abs().max())


@every_grid
@pytest.mark.parametrize("tokens", [1, 5])
def test_fewer_tokens_than_inputs(grid: Grid, tokens: int) -> None:
    weight, hessian = example(tokens=tokens)
    rounded = round_with_hessian(weight, hessian, grid, RoundingSettings(refits=2))
    check_on_grid(rounded.quantized, grid)
    plain = round_without_hessian(weight, grid, "rtn", "w")
    assert output_error(weight, rounded.quantized, hessian) < output_error(weight, plain.quantized, hessian)


@every_grid
@pytest.mark.parametrize("size", [1e-12, 1e8])
def test_inputs_of_any_size(grid: Grid, size: float) -> None:
    weight, hessian = example()
    here = round_with_hessian(weight, hessian * size, grid, RoundingSettings(refits=1))
    check_on_grid(here.quantized, grid)
    usual = round_with_hessian(weight, hessian, grid, RoundingSettings(refits=1))
    ratio = output_error(weight, here.quantized, hessian) / output_error(weight, usual.quantized, hessian)
    assert ratio == pytest.approx(1.0, rel=0.05)


@every_grid
def test_zero_weights_stay_zero(grid: Grid) -> None:
    _, hessian = example()
    rounded = round_with_hessian(torch.zeros(8, 256), hessian, grid, RoundingSettings(refits=2))
    assert not dequantize(rounded.quantized).any()
    check_on_grid(rounded.quantized, grid)
