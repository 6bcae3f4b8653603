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
from qad.scale_search import find_scales
from qad.scales import StoredScales, reciprocals, round_scales, to_half
from qad.tensor import QuantizedTensor, dequantize, quantize

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


@dataclass(frozen=True)
class _Levels:
    """What the columns of one block can decode to, row by row."""

    scale_N: Tensor
    reciprocal_N: Tensor
    offset_N: Tensor | None
    grid: Grid

    def round(self, value_N: Tensor, code_N: Tensor, decoded_N: Tensor) -> Tensor:
        """Write the codes of a column and what they decode to, with the bits of ``quantize`` and ``dequantize``."""
        if self.offset_N is not None:
            value_N = torch.sub(value_N, self.offset_N, out=code_N)
        torch.mul(value_N, self.reciprocal_N, out=code_N).round_().clamp_(self.grid.code_min, self.grid.code_max)
        torch.mul(code_N, self.scale_N, out=decoded_N)
        return decoded_N if self.offset_N is None else decoded_N.add_(self.offset_N)


def _by_block(stored: StoredScales) -> list[_Levels]:
    """Return the levels of each block."""
    scales_NG, offsets_NG = stored.decode()
    scales_GN = scales_NG.t().contiguous()
    offsets_GN = [None] * len(scales_GN) if offsets_NG is None else offsets_NG.t().contiguous()
    return [
        _Levels(scale_N, reciprocals(scale_N), offset_N, stored.grid)
        for scale_N, offset_N in zip(scales_GN, offsets_GN, strict=True)
    ]


def gptq(weight_NK: Tensor, hessian_KK: Tensor, grid: Grid) -> Rounded:
    """Round with error compensation; ``hessian_KK`` is damped already.

    Units (blocks, or super-blocks) are visited in descending order of their inputs' energy, so that the heaviest are
    compensated by the most columns, and the columns of a unit stay together, because they share scales.
    """
    rows, columns = weight_NK.shape
    block, unit = grid.block, grid.unit
    order = hessian_KK.diagonal().view(-1, unit).sum(dim=1).argsort(descending=True)
    permutation = (order.unsqueeze(1) * unit + torch.arange(unit)).view(-1)
    inverse = inverse_factor(hessian_KK[permutation][:, permutation])
    # Transposed, so that a column of the weight is contiguous.
    work_KN = weight_NK.t()[permutation]
    codes_KN, target_KN = torch.empty_like(work_KN), torch.empty_like(work_KN)
    found: list[StoredScales] = []
    levels_B: list[_Levels] = []
    step = max(_PANEL, unit)
    for panel in range(0, columns, step):
        panel_end = min(panel + step, columns)
        errors = torch.empty(panel_end - panel, rows)
        for start in range(panel, panel_end, block):
            stop = start + block
            if start % unit == 0:
                ahead = slice(start, start + unit)
                # Within GPTQ's recursion an error in column i costs 1 / factor_ii^2.
                importance = inverse.diagonal()[ahead].reciprocal().square()
                found.append(find_scales(work_KN[ahead].t().contiguous(), grid, "mse", importance))
                levels_B = _by_block(found[-1])
            levels = levels_B[start % unit // block]
            for column in range(start, stop):
                value_N = target_KN[column].copy_(work_KN[column])
                decoded_N = levels.round(value_N, codes_KN[column], errors[column - panel])
                error_N = torch.sub(value_N, decoded_N, out=decoded_N).div_(inverse[column, column])
                work_KN[column + 1 : stop].addr_(inverse[column, column + 1 : stop], error_N, alpha=-1)
            inside = errors[start - panel : stop - panel]
            work_KN[stop:panel_end].addmm_(inverse[start:stop, stop:panel_end].t(), inside, alpha=-1)
        work_KN[panel_end:].addmm_(inverse[panel:panel_end, panel_end:].t(), errors, alpha=-1)
    back, units_back = permutation.argsort(), order.argsort().tolist()
    parts = {name: torch.cat([found[i].parts[name] for i in units_back], dim=1) for name in grid.parts}
    codes = codes_KN[back].t().to(torch.int8).contiguous()
    return Rounded(QuantizedTensor.of(codes, StoredScales.of(grid, parts)), target_KN[back].t().contiguous())


def _features(quantized: QuantizedTensor) -> list[Tensor]:
    """Return, for each number that a unit stores in fp16, what multiplies it in each weight: [N, K] float32."""
    grid, parts = quantized.grid, quantized.parts
    features = [quantized.codes_NK.to(torch.float32)]
    if grid.minimum:
        features.append(torch.ones_like(features[0]))
    if grid.super_block:
        whole = [
            parts[name].to(torch.float32).repeat_interleave(grid.block, dim=1)
            for name in grid.parts
            if "super" not in name
        ]
        features[0] *= whole[0]
        if grid.minimum:
            features[1] *= -whole[1]
    return features


def refit_scales(weight_NK: Tensor, hessian_KK: Tensor, quantized: QuantizedTensor) -> QuantizedTensor:
    """Return the same codes with the fp16 numbers of least output error, all those of a row solved for together.

    These are scales and minimums; on two levels those of the super-blocks, under the integers as they are.
    """
    grid = quantized.grid
    rows, columns = weight_NK.shape
    units = columns // grid.unit
    features = [feature.unflatten(1, (units, grid.unit)) for feature in _features(quantized)]
    names = [name for name in grid.parts if not grid.super_block or "super" in name]
    residual_by_H = ((weight_NK - dequantize(quantized)) @ hessian_KK).unflatten(1, (units, grid.unit))
    right = torch.cat([(residual_by_H * feature).sum(dim=-1) for feature in features], dim=1)
    system = torch.empty(rows, len(features) * units, len(features) * units)
    for row, (feature, unit) in enumerate((feature, unit) for feature in features for unit in range(units)):
        by_H = feature[:, unit] @ hessian_KK[unit * grid.unit : (unit + 1) * grid.unit]
        by_H = by_H.unflatten(1, (units, grid.unit))
        system[:, row] = torch.cat([(by_H * other).sum(dim=-1) for other in features], dim=1)
    # A block of zero codes has an empty row and column; a little ridge keeps its scale and the system solvable.
    ridge = system.diagonal(dim1=1, dim2=2).mean(dim=1).clamp_min(1e-30) * 1e-4
    system.diagonal(dim1=1, dim2=2).add_(ridge.unsqueeze(-1))
    steps = torch.linalg.solve(system, right).split(units, dim=1)
    parts = quantized.stored.parts
    for name, step in zip(names, steps, strict=True):
        moved = parts[name].to(torch.float32) + step
        parts[name] = round_scales(moved, grid).to(torch.float16) if name == "scales" else to_half(moved)
    return QuantizedTensor.of(quantized.codes_NK, StoredScales.of(grid, parts))


def descend(weight_NK: Tensor, hessian_KK: Tensor, quantized: QuantizedTensor) -> Rounded:
    """Revisit every code once, each time choosing the best one while all others stand."""
    grid = quantized.grid
    columns = weight_NK.shape[1]
    current = dequantize(quantized)
    by_H_KN = hessian_KK @ (weight_NK - current).t()
    current_KN = current.t().contiguous()
    codes_KN, target_KN = torch.empty_like(current_KN), torch.empty_like(current_KN)
    levels = _by_block(quantized.stored)
    change = torch.empty(grid.block, weight_NK.shape[0])
    for panel in range(0, columns, grid.block):
        stop = panel + grid.block
        hessian_panel = hessian_KK[panel:stop, panel:stop]
        steps = hessian_panel.diagonal().reciprocal().tolist()
        local = by_H_KN[panel:stop]
        for i in range(grid.block):
            column = panel + i
            wanted_N = torch.add(current_KN[column], local[i], alpha=steps[i], out=target_KN[column])
            change_N = levels[panel // grid.block].round(wanted_N, codes_KN[column], change[i])
            change_N.sub_(current_KN[column])
            local[i + 1 :].addr_(hessian_panel[i, i + 1 :], change_N, alpha=-1)
        by_H_KN[stop:].addmm_(hessian_KK[stop:, panel:stop], change, alpha=-1)
    codes = codes_KN.t().to(torch.int8).contiguous()
    return Rounded(QuantizedTensor.of(codes, quantized.stored), target_KN.t().contiguous())


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
    scales = find_scales(weight_NK, grid, "mse") if method == "mse" else None
    # A copy, because callers overwrite the weight with its rounded self.
    return Rounded(quantize(weight_NK, grid, scales, name), weight_NK.clone())
