"""QuantizedTensor, quantize and dequantize in plain torch: the one numeric truth.

Everything that touches a quantized number (trainer, kernels, packers, decoders, tests) is held to the functions here,
bit for bit. All arithmetic is float32, in an order that a C or CUDA kernel can repeat exactly: one correctly rounded
reciprocal per block, one product per element (after one difference, where blocks have an offset), round half to even.
A reciprocal and not a division per element, because
a division would cost a fused kernel its memory-bound speed; what is given up is at most one code where ``w / s`` lies
within a rounding error of a tie.

Shapes: N output features (rows), K input features (columns), G blocks along K (G = K / block).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from qad.errors import UserError
from qad.grid import Grid, grids_that_fit
from qad.scales import StoredScales, range_scales, reciprocals, round_scales

# Factors of the absmax scale that the mse search tries: the best clip of a block of 32 lies among them. The negative
# ones (signed grids only) turn the longer end of the code range to the other side.
_MSE_FACTORS = (1.0, 0.97, 0.94, 0.91, 0.88, 0.85, 0.82, 0.79, 0.76, 0.73, 0.7, 1.03, 1.07, 1.11, 1.15)
_MSE_CHUNK = 1 << 20  # candidate values computed at a time: temporaries of 4 MiB stay in the cache


@dataclass(frozen=True)
class QuantizedTensor:
    """A weight as the device stores it.

    Attributes:
        codes_NK: int8, within the grid's code range.
        scales_NG: float16, each one representable in the grid's significand bits; of two levels int8 or uint8.
        grid: The format both belong to.
        minimums_NG, super_scales_NS, super_minimums_NS: What else the grid stores; see ``qad.scales.StoredScales``.
    """

    codes_NK: Tensor
    scales_NG: Tensor
    grid: Grid
    minimums_NG: Tensor | None = None
    super_scales_NS: Tensor | None = None
    super_minimums_NS: Tensor | None = None

    def __post_init__(self) -> None:
        rows, columns = self.codes_NK.shape
        assert self.codes_NK.dtype == torch.int8, self.codes_NK.dtype
        assert columns % self.grid.unit == 0, (self.codes_NK.shape, self.grid)
        assert self.scales_NG.shape == (rows, columns // self.grid.block), (self.codes_NK.shape, self.scales_NG.shape)
        assert self.stored.scales_NG is self.scales_NG  # checks the other parts

    @classmethod
    def of(cls, codes_NK: Tensor, stored: StoredScales) -> Self:
        """Put codes and stored scales together."""
        parts = (stored.minimums_NG, stored.super_scales_NS, stored.super_minimums_NS)
        return cls(codes_NK, stored.scales_NG, stored.grid, *parts)

    @property
    def stored(self) -> StoredScales:
        """All but the codes."""
        parts = (self.minimums_NG, self.super_scales_NS, self.super_minimums_NS)
        return StoredScales(self.grid, self.scales_NG, *parts)

    @property
    def parts(self) -> dict[str, Tensor]:
        """Every stored tensor by its name in an artifact: ``codes`` and those of ``grid.parts``."""
        return {"codes": self.codes_NK, **self.stored.parts}

    def map_rows(self, change: Callable[[Tensor], Tensor]) -> Self:
        """Return the same with every tensor changed by a function that moves or picks whole rows."""
        return type(self).of(change(self.codes_NK), self.stored.map(change))


def check_weight(weight_NK: Tensor, grid: Grid, name: str = "the weight") -> None:
    """Check that a weight can be put on a grid.

    Raises:
        UserError: Not a matrix, a row not divisible by the block, or NaN or infinity among the values.
    """
    if weight_NK.ndim != 2:
        raise UserError(f"{name} has shape {tuple(weight_NK.shape)}; only matrices can be quantized")
    columns = weight_NK.shape[1]
    if columns % grid.unit:
        fits = grids_that_fit(columns)
        raise UserError(
            f"{name} has rows of {columns} values, which blocks of {grid.unit} ({grid.name}) do not divide; "
            + (f"grids that fit: {', '.join(fits)}" if fits else "no grid fits: keep this tensor unquantized")
        )
    # A sum is not finite if any term is not; it may also overflow, so only then look at each value.
    if not bool(torch.isfinite(weight_NK.sum(dtype=torch.float64))) and not bool(torch.isfinite(weight_NK).all()):
        bad = int((~torch.isfinite(weight_NK)).sum())
        raise UserError(
            f"{name} holds {bad} NaN or infinite values; the checkpoint is damaged or its training diverged: "
            "use an intact or an earlier checkpoint"
        )


def as_blocks(weight_NK: Tensor, grid: Grid) -> Tensor:
    """View a weight as blocks, shape [N, G, block]."""
    rows, columns = weight_NK.shape
    return weight_NK.view(rows, columns // grid.block, grid.block)


def absmax_scales(weight_NK: Tensor, grid: Grid) -> Tensor:
    """Return rounded scales that map each block's largest magnitude to the end of the code range.

    With a signed scale the value of largest magnitude maps to ``code_min`` (of two that are equal but for their sign,
    the positive one); else to ``code_max``.

    Returns:
        float32 scales_NG, representable in the grid; NaN for a block that holds an infinity or a NaN.
    """
    low_NG, high_NG = as_blocks(weight_NK.to(torch.float32), grid).aminmax(dim=-1)
    if grid.signed_scale:
        end, extreme_NG = grid.code_min, torch.where(high_NG >= -low_NG, high_NG, low_NG)
    else:
        end, extreme_NG = grid.code_max, torch.maximum(high_NG, -low_NG)
    # A tensor, not a number, as divisor: CUDA multiplies by a number's reciprocal, which rounds differently.
    scales_NG = round_scales(extreme_NG / torch.tensor(float(end), device=weight_NK.device), grid)
    return scales_NG.masked_fill_(~extreme_NG.isfinite(), torch.nan)


def damaged_blocks(weight_NK: Tensor, scales_NG: Tensor, grid: Grid) -> Tensor:
    """Return which blocks hold an infinity or a NaN or have a scale that is NaN: bool [N, G]."""
    low_NG, high_NG = as_blocks(weight_NK, grid).aminmax(dim=-1)
    return ~(low_NG.isfinite() & high_NG.isfinite()) | scales_NG.isnan()


def mse_scales(weight_NK: Tensor, grid: Grid, importance_K: Tensor | None = None) -> Tensor:
    """Return rounded scales that minimize the squared rounding error of each block over a search.

    Candidates are the absmax scale times fixed factors.

    Args:
        weight_NK: The weight.
        grid: Its grid.
        importance_K: Optional weight of each input feature's squared error.

    Returns:
        float32 scales_NG, representable in the grid.
    """
    weight_NK = weight_NK.to(torch.float32)
    rows, columns = weight_NK.shape
    importance = None if importance_K is None else importance_K.view(1, -1, grid.block)
    factors_S = torch.tensor(_MSE_FACTORS, device=weight_NK.device)
    # An unsigned grid has no mirror images to try, and wants a finer search: near its best clip twice as many factors.
    more_S = -factors_S if grid.signed_scale else factors_S - 0.015
    factors_S = torch.cat([factors_S, more_S])
    best_NG = torch.empty(rows, columns // grid.block, device=weight_NK.device)
    for start in range(0, rows, step := max(1, _MSE_CHUNK // (columns * len(factors_S)))):
        blocks = as_blocks(weight_NK[start : start + step], grid)
        candidates_SNG = round_scales(
            factors_S.view(-1, 1, 1) * absmax_scales(weight_NK[start : start + step], grid), grid
        )
        scales = candidates_SNG.unsqueeze(-1)
        error = (blocks * scales.reciprocal()).round_().clamp_(grid.code_min, grid.code_max).mul_(scales).sub_(blocks)
        error.square_()
        if importance is not None:
            error.mul_(importance)
        best = error.sum(dim=-1).argmin(dim=0, keepdim=True)
        best_NG[start : start + step] = candidates_SNG.gather(0, best)[0]
    return best_NG


def block_scales(quantized: QuantizedTensor) -> Tensor:
    """Return the float32 number that each block's codes multiply, [N, G]."""
    return quantized.stored.decode()[0]


def block_offsets(quantized: QuantizedTensor) -> Tensor | None:
    """Return the float32 number that is added to each block's products, [N, G], or None where a grid has none."""
    return quantized.stored.decode()[1]


def scale_blocks(blocks: Tensor, scales_NG: Tensor, offsets_NG: Tensor | None) -> Tensor:
    """Return values of blocks [N, G, block] in steps of their scale, from their offset: codes not yet rounded."""
    if offsets_NG is not None:
        blocks = blocks - offsets_NG.unsqueeze(-1)
    return blocks * reciprocals(scales_NG).unsqueeze(-1)


def quantize(
    weight_NK: Tensor, grid: Grid, scales: Tensor | StoredScales | None = None, name: str = "the weight"
) -> QuantizedTensor:
    """Put a weight on a grid: ``code = clamp(round_half_even((w - offset) * (1 / scale)))``.

    Args:
        weight_NK: Any float dtype; computed in float32.
        grid: The grid.
        scales: Scales to use, float32 [N, G] that are rounded to the grid first, or stored ones, which alone can be
            had for a grid that is not plain. None: absmax scales; those of the range if the grid is not plain.
        name: What errors call the weight.

    Raises:
        UserError: See ``check_weight``.
    """
    check_weight(weight_NK, grid, name)
    weight_NK = weight_NK.detach().to(torch.float32)
    if scales is None:
        scales = absmax_scales(weight_NK, grid) if grid.is_plain else range_scales(weight_NK, grid)
    if isinstance(scales, Tensor):
        assert grid.is_plain, grid
        scales = StoredScales(grid, round_scales(scales, grid).to(torch.float16))
    assert scales.grid == grid, (scales.grid, grid)
    codes = scale_blocks(as_blocks(weight_NK, grid), *scales.decode()).round_().clamp_(grid.code_min, grid.code_max)
    return QuantizedTensor.of(codes.to(torch.int8).view(weight_NK.shape), scales)


def dequantize(quantized: QuantizedTensor, out: Tensor | None = None) -> Tensor:
    """Return the weight that every device decodes: ``code * scale``, exact in float32, plus the offset, rounded once.

    Args:
        quantized: The stored tensor.
        out: float32 buffer of shape [N, K] to write to.
    """
    if out is None:
        out = torch.empty(quantized.codes_NK.shape, dtype=torch.float32, device=quantized.codes_NK.device)
    out.copy_(quantized.codes_NK)
    scales_NG, offsets_NG = quantized.stored.decode()
    blocks = as_blocks(out, quantized.grid).mul_(scales_NG.unsqueeze(-1))
    if offsets_NG is not None:
        blocks.add_(offsets_NG.unsqueeze(-1))
    return out
