"""Error-compensating rounding of one weight matrix onto a grid, given how its inputs correlate.

Round-to-nearest treats every weight alone. Here the error of a column is compensated by the columns that are still to
be rounded (GPTQ: Frantar et al., arXiv 2210.17323), each block's scale is searched when its turn comes, on the
compensated weights; then scales are refitted in closed form to the chosen codes, and codes are revisited one column at
a time (coordinate descent), which undoes rounding that later columns made needless.

The measure throughout is tr((W - Q) H (W - Q)^T), the squared error of the layer's outputs, H = sum of x x^T.

Shapes: N output features, K input features, G blocks along K.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from qad.grid import Grid
from qad.tensor import QuantizedTensor, as_blocks, dequantize, mse_scales, quantize, round_scales

_PANEL = 128  # columns whose updates to the rest of the matrix are gathered into one matrix product


@dataclass(frozen=True)
class RoundingSettings:
    """How hard to try.

    Attributes:
        damping: Share of H's mean diagonal that is added to it, for the directions the calibration text never took.
        refits: Rounds of scale refit and coordinate descent after GPTQ.
    """

    damping: float = 0.01
    refits: int = 1


@dataclass(frozen=True)
class Rounded:
    """Outcome for one matrix.

    Attributes:
        quantized: Codes and scales.
        target_NK: The compensated weights that the codes were last rounded from; masters that start there keep the
            information which codes were close calls.
    """

    quantized: QuantizedTensor
    target_NK: Tensor


def damped(hessian_KK: Tensor, damping: float) -> Tensor:
    """Return H plus damping; an input that is always zero gets the mean diagonal, so that H can be inverted."""
    diagonal = hessian_KK.diagonal()
    mean = diagonal.mean().clamp_min(torch.finfo(hessian_KK.dtype).tiny)
    extra = torch.where(diagonal == 0, mean, diagonal.new_zeros(())) + damping * mean
    return hessian_KK + torch.diag(extra)


def inverse_factor(hessian_KK: Tensor) -> Tensor:
    """Return the upper Cholesky factor of the inverse of a positive definite matrix."""
    lower = torch.linalg.cholesky(hessian_KK)
    return torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)


def output_error(weight_NK: Tensor, quantized: QuantizedTensor, hessian_KK: Tensor) -> float:
    """Return tr((W - Q) H (W - Q)^T)."""
    residual = weight_NK - dequantize(quantized)
    return float(((residual @ hessian_KK) * residual).sum())


def gptq(weight_NK: Tensor, hessian_KK: Tensor, grid: Grid) -> Rounded:
    """Round with error compensation; ``hessian_KK`` is damped already.

    Blocks are visited in descending order of their inputs' energy, so that the heaviest are compensated by the most
    columns, and the columns of a block stay together, because they share a scale.
    """
    rows, columns = weight_NK.shape
    block = grid.block
    order = hessian_KK.diagonal().view(-1, block).sum(dim=1).argsort(descending=True)
    permutation = (order.unsqueeze(1) * block + torch.arange(block)).view(-1)
    inverse = inverse_factor(hessian_KK[permutation][:, permutation])
    # Transposed, so that a column of the weight is contiguous.
    work_KN = weight_NK.t()[permutation]
    codes_KN, target_KN = torch.empty_like(work_KN), torch.empty_like(work_KN)
    scales_GN = torch.empty(columns // block, rows)
    for panel in range(0, columns, _PANEL):
        panel_end = min(panel + _PANEL, columns)
        errors = torch.empty(panel_end - panel, rows)
        for start in range(panel, panel_end, block):
            stop = start + block
            # Within GPTQ's recursion an error in column i costs 1 / factor_ii^2.
            importance = inverse.diagonal()[start:stop].reciprocal().square()
            scale_N = mse_scales(work_KN[start:stop].t().contiguous(), grid, importance)[:, 0]
            scales_GN[start // block] = scale_N
            reciprocal_N = scale_N.reciprocal()
            for column in range(start, stop):
                value_N = target_KN[column].copy_(work_KN[column])
                code_N = torch.mul(value_N, reciprocal_N, out=codes_KN[column])
                code_N.round_().clamp_(grid.code_min, grid.code_max)
                error_N = errors[column - panel].copy_(value_N)
                error_N.addcmul_(code_N, scale_N, value=-1).div_(inverse[column, column])
                work_KN[column + 1 : stop].addr_(inverse[column, column + 1 : stop], error_N, alpha=-1)
            inside = errors[start - panel : stop - panel]
            work_KN[stop:panel_end].addmm_(inverse[start:stop, stop:panel_end].t(), inside, alpha=-1)
        work_KN[panel_end:].addmm_(inverse[panel:panel_end, panel_end:].t(), errors, alpha=-1)
    back = permutation.argsort()
    quantized = QuantizedTensor(
        codes_KN[back].t().to(torch.int8).contiguous(),
        scales_GN[order.argsort()].t().to(torch.float16).contiguous(),
        grid,
    )
    return Rounded(quantized, target_KN[back].t().contiguous())


def refit_scales(weight_NK: Tensor, hessian_KK: Tensor, quantized: QuantizedTensor) -> QuantizedTensor:
    """Return the same codes with the scales of least output error, each row's G scales solved for together."""
    grid = quantized.grid
    rows, columns = weight_NK.shape
    groups = columns // grid.block
    codes = quantized.codes_NK.to(torch.float32)
    coded = as_blocks(codes, grid)
    old = quantized.scales_NG.to(torch.float32)
    residual_by_H = (weight_NK - dequantize(quantized)) @ hessian_KK
    right_NG = (as_blocks(residual_by_H, grid) * coded).sum(dim=-1)
    system = torch.empty(rows, groups, groups)
    for g in range(groups):
        columns_g = slice(g * grid.block, (g + 1) * grid.block)
        by_H = coded[:, g] @ hessian_KK[columns_g]
        system[:, g] = (as_blocks(by_H, grid) * coded).sum(dim=-1)
    # A block of zero codes has an empty row and column; a little ridge keeps its scale and the system solvable.
    ridge = system.diagonal(dim1=1, dim2=2).mean(dim=1).clamp_min(1e-30) * 1e-4
    system.diagonal(dim1=1, dim2=2).add_(ridge.unsqueeze(-1))
    step_NG = torch.linalg.solve(system, right_NG)
    scales = round_scales(old + step_NG, grid).to(torch.float16)
    return QuantizedTensor(quantized.codes_NK, scales, grid)


def descend(weight_NK: Tensor, hessian_KK: Tensor, quantized: QuantizedTensor) -> Rounded:
    """Revisit every code once, each time choosing the best one while all others stand."""
    grid = quantized.grid
    columns = weight_NK.shape[1]
    current = dequantize(quantized)
    by_H_KN = hessian_KK @ (weight_NK - current).t()
    current_KN = current.t().contiguous()
    codes_KN, target_KN = torch.empty_like(current_KN), torch.empty_like(current_KN)
    scales_GN = quantized.scales_NG.t().to(torch.float32).contiguous()
    change = torch.empty(grid.block, weight_NK.shape[0])
    for panel in range(0, columns, grid.block):
        stop = panel + grid.block
        hessian_panel = hessian_KK[panel:stop, panel:stop]
        steps = hessian_panel.diagonal().reciprocal().tolist()
        scale_N = scales_GN[panel // grid.block]
        reciprocal_N = scale_N.reciprocal()
        local = by_H_KN[panel:stop]
        for i in range(grid.block):
            column = panel + i
            wanted_N = torch.add(current_KN[column], local[i], alpha=steps[i], out=target_KN[column])
            code_N = torch.mul(wanted_N, reciprocal_N, out=codes_KN[column])
            code_N.round_().clamp_(grid.code_min, grid.code_max)
            change_N = torch.mul(code_N, scale_N, out=change[i]).sub_(current_KN[column])
            local[i + 1 :].addr_(hessian_panel[i, i + 1 :], change_N, alpha=-1)
        by_H_KN[stop:].addmm_(hessian_KK[stop:, panel:stop], change, alpha=-1)
    codes = codes_KN.t().to(torch.int8).contiguous()
    return Rounded(QuantizedTensor(codes, quantized.scales_NG, grid), target_KN.t().contiguous())


def round_with_hessian(weight_NK: Tensor, hessian_KK: Tensor, grid: Grid, settings: RoundingSettings) -> Rounded:
    """Round a matrix so that its outputs change least.

    Args:
        weight_NK: float32 weights.
        hessian_KK: float32 sum of outer products of the inputs, not damped.
        grid: The grid.
        settings: How hard to try.
    """
    hessian_KK = damped(hessian_KK, settings.damping)
    best = gptq(weight_NK, hessian_KK, grid)
    best_error = output_error(weight_NK, best.quantized, hessian_KK)
    for _ in range(settings.refits):
        tried = descend(weight_NK, hessian_KK, refit_scales(weight_NK, hessian_KK, best.quantized))
        tried_error = output_error(weight_NK, tried.quantized, hessian_KK)
        if not tried_error < best_error:  # so written, a refit that came out as NaN ends the search as well
            break
        best, best_error = tried, tried_error
    return best


def round_without_hessian(weight_NK: Tensor, grid: Grid, method: str, name: str) -> Rounded:
    """Round to nearest, with absmax (``rtn``) or searched (``mse``) scales."""
    scales = mse_scales(weight_NK, grid) if method == "mse" else None
    # A copy, because callers overwrite the weight with its rounded self.
    return Rounded(quantize(weight_NK, grid, scales, name), weight_NK.clone())
