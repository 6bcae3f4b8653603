"""QuantizedTensor, quantize and dequantize in plain torch: the one numeric truth.

Everything that touches a quantized number (trainer, kernels, packers, decoders, tests) is held to the functions here,
bit for bit. All arithmetic is float32, in an order that a C or CUDA kernel can repeat exactly: one correctly rounded
reciprocal per block, one product per element, round half to even. A reciprocal and not a division per element, because
a division would cost a fused kernel its memory-bound speed; what is given up is at most one code where ``w / s`` lies
within a rounding error of a tie.

Shapes: N output features (rows), K input features (columns), G blocks along K (G = K / block).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from qad.errors import UserError
from qad.grid import Grid, grids_that_fit

# Factors of the absmax scale that the mse search tries: the best clip of a block of 32 lies among them. The negative
# ones (signed grids only) turn the longer end of the code range to the other side.
_MSE_FACTORS = (1.0, 0.97, 0.94, 0.91, 0.88, 0.85, 0.82, 0.79, 0.76, 0.73, 0.7, 1.03, 1.07, 1.11, 1.15)
_MSE_CHUNK = 1 << 20  # candidate values computed at a time: temporaries of 4 MiB stay in the cache


@dataclass(frozen=True)
class QuantizedTensor:
    """A weight as the device stores it.

    Attributes:
        codes_NK: int8, within the grid's code range.
        scales_NG: float16, each one representable in the grid's significand bits.
        grid: The format both belong to.
    """

    codes_NK: Tensor
    scales_NG: Tensor
    grid: Grid

    def __post_init__(self) -> None:
        rows, columns = self.codes_NK.shape
        assert self.codes_NK.dtype == torch.int8, self.codes_NK.dtype
        assert self.scales_NG.dtype == torch.float16, self.scales_NG.dtype
        assert self.scales_NG.shape == (rows, columns // self.grid.block), (self.codes_NK.shape, self.scales_NG.shape)


def check_weight(weight_NK: Tensor, grid: Grid, name: str = "the weight") -> None:
    """Check that a weight can be put on a grid.

    Raises:
        UserError: Not a matrix, a row not divisible by the block, or NaN or infinity among the values.
    """
    if weight_NK.ndim != 2:
        raise UserError(f"{name} has shape {tuple(weight_NK.shape)}; only matrices can be quantized")
    columns = weight_NK.shape[1]
    if columns % grid.block:
        fits = grids_that_fit(columns)
        raise UserError(
            f"{name} has rows of {columns} values, which blocks of {grid.block} ({grid.name}) do not divide; "
            + (f"grids that fit: {', '.join(fits)}" if fits else "no grid fits: keep this tensor unquantized")
        )
    # A sum is not finite if any term is not; it may also overflow, so only then look at each value.
    if not bool(torch.isfinite(weight_NK.sum(dtype=torch.float64))) and not bool(torch.isfinite(weight_NK).all()):
        bad = int((~torch.isfinite(weight_NK)).sum())
        raise UserError(
            f"{name} holds {bad} NaN or infinite values; the checkpoint is damaged or its training diverged: "
            "use an intact or an earlier checkpoint"
        )


def round_scales(scales: Tensor, grid: Grid) -> Tensor:
    """Round scales to those the grid can store, as float32.

    Rounds to ``grid.scale_bits`` significand bits, half to even, and clamps the magnitude to
    [``scale_floor``, ``scale_ceiling``]; zero becomes ``+scale_floor``, NaN stays NaN. Unsigned grids take the
    magnitude.

    Args:
        scales: float32, any shape.

    Returns:
        float32, same shape, each value exactly representable in fp16.
    """
    scales = scales.to(torch.float32)
    bits = scales.contiguous().view(torch.int32)
    drop = 24 - grid.scale_bits
    magnitude = bits & 0x7FFFFFFF
    half_minus_one = (1 << (drop - 1)) - 1
    magnitude = ((magnitude + half_minus_one + ((magnitude >> drop) & 1)) >> drop) << drop
    rounded = magnitude.view(torch.float32).clamp(grid.scale_floor, grid.scale_ceiling)
    if grid.signed_scale:
        rounded = torch.where(scales < 0, -rounded, rounded)
    # The rounding above carries a NaN of large payload into the sign bit.
    return rounded.masked_fill_(scales.isnan(), torch.nan)


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


def _round_blocks(blocks: Tensor, scales_NG: Tensor, grid: Grid) -> Tensor:
    """Return the codes of blocks [N, G, block] under given scales, as float32."""
    return (blocks * scales_NG.reciprocal().unsqueeze(-1)).round_().clamp_(grid.code_min, grid.code_max)


def quantize(
    weight_NK: Tensor, grid: Grid, scales_NG: Tensor | None = None, name: str = "the weight"
) -> QuantizedTensor:
    """Put a weight on a grid: ``code = clamp(round_half_even(w * (1 / scale)))``.

    Args:
        weight_NK: Any float dtype; computed in float32.
        grid: The grid.
        scales_NG: Scales to use, rounded to the grid first; absmax scales if None.
        name: What errors call the weight.

    Raises:
        UserError: See ``check_weight``.
    """
    check_weight(weight_NK, grid, name)
    weight_NK = weight_NK.detach().to(torch.float32)
    scales = absmax_scales(weight_NK, grid) if scales_NG is None else round_scales(scales_NG, grid)
    codes = _round_blocks(as_blocks(weight_NK, grid), scales, grid)
    return QuantizedTensor(codes.to(torch.int8).view(weight_NK.shape), scales.to(torch.float16), grid)


def dequantize(quantized: QuantizedTensor, out: Tensor | None = None) -> Tensor:
    """Return the weight that every device decodes: ``code * float32(scale)``, exact in float32.

    Args:
        quantized: The stored tensor.
        out: float32 buffer of shape [N, K] to write to.
    """
    if out is None:
        out = torch.empty(quantized.codes_NK.shape, dtype=torch.float32, device=quantized.codes_NK.device)
    out.copy_(quantized.codes_NK)
    as_blocks(out, quantized.grid).mul_(quantized.scales_NG.to(torch.float32).unsqueeze(-1))
    return out
