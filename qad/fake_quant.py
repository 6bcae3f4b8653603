"""Straight-through fake quantization in plain torch: the reference that every kernel is held to.

Forward puts a master weight on its grid (or adds noise of the grid's step), backward recomputes what it needs instead
of storing it. A block is rounded hard with probability ``hard_share``; the other blocks get the treatment of the noise
mode, so that one number moves training from noise to the device's rounding:

    none        every block is rounded
    uniform     the block gets w + s * (u - 1/2): pseudo-quantization noise of half a step either way, no rounding
                (Defossez et al., DiffQ, arXiv 2104.09987). Of s, 8 significand bits count: all that most grids' scales
                have, and few enough for an exact product with 16 random bits, so that only the sum is rounded
    stochastic  the block is rounded up or down at random, with the unrounded value as its mean
    partial     the block is left unquantized (Fan et al., Quant-Noise, arXiv 2004.07320)

All of them clip to the grid's range. A block that holds an infinity or a NaN, or whose scale is NaN, comes out as NaN,
all of it, and passes no gradient: a damaged weight shows in the next loss instead of spreading or hiding. Given up:
exactness of the expected gradient; straight-through is biased, and clipping cuts the gradient of masters that lie
outside the range.

Grids with minimums or super-blocks take decoded scales and offsets, which somebody has searched (``qad.scale_search``),
and hold them: straight-through runs to the masters alone.

Shapes: N output features, K input features, G blocks along K.
"""

import torch
from torch import Tensor

from qad.grid import Grid
from qad.noise import HARD, Noise
from qad.philox import uniform16
from qad.scales import range_scales, round_scales
from qad.tensor import absmax_scales, as_blocks, damaged_blocks, scale_blocks

_ELEMENT_STREAM, _BLOCK_STREAM = 0, 1


def _random(count: int, stream: int, noise: Noise, device: torch.device) -> Tensor:
    return uniform16(count, seed=noise.seed, tensor=noise.tensor, step=noise.step, stream=stream, device=device)


def _centred(like: Tensor, noise: Noise) -> Tensor:
    """Return a random number between -1/2 and 1/2 for each element of blocks [N, G, block]."""
    return _random(like.numel(), _ELEMENT_STREAM, noise, like.device).view_as(like).sub_(0.5)


def _hard_unless(soft: Tensor, hard: Tensor, noise: Noise) -> Tensor:
    """Return blocks [N, G, block] of which a share is hard, the others soft."""
    if noise.hard_share <= 0.0:
        return soft
    blocks = _random(soft.shape[0] * soft.shape[1], _BLOCK_STREAM, noise, soft.device)
    return torch.where(blocks.view(*soft.shape[:2], 1) < noise.hard_share, hard, soft)


def _noisy_codes(scaled: Tensor, noise: Noise) -> Tensor:
    """Return the (fractional, unless hard) codes of scaled blocks [N, G, block] before clipping."""
    hard = scaled.round()
    if noise.is_hard:
        return hard
    if noise.mode == "uniform":
        soft = scaled + _centred(scaled, noise)
    elif noise.mode == "stochastic":
        soft = (scaled + _random(scaled.numel(), _ELEMENT_STREAM, noise, scaled.device).view_as(scaled)).floor_()
    else:
        soft = scaled
    return _hard_unless(soft, hard, noise)


def _with_uniform_noise(
    blocks: Tensor, scales_NG: Tensor, offsets_NG: Tensor | None, grid: Grid, noise: Noise
) -> Tensor:
    """Return blocks [N, G, block] of masters, moved by up to half a step and clipped to their range."""
    steps_NG = (scales_NG.view(torch.int32) & -0x10000).view(torch.float32)
    ends = torch.stack((scales_NG * grid.code_min, scales_NG * grid.code_max))
    if offsets_NG is not None:
        ends += offsets_NG
    low_NG, high_NG = ends.aminmax(dim=0)
    moved = _centred(blocks, noise).mul_(steps_NG.unsqueeze(-1)).add_(blocks)
    return moved.clamp_(low_NG.unsqueeze(-1), high_NG.unsqueeze(-1))


def _decoded(
    master_NK: Tensor, scales_NG: Tensor | None, offsets_NG: Tensor | None, grid: Grid
) -> tuple[Tensor, Tensor | None]:
    """Return the scales and offsets that forward uses, given those it was asked to use."""
    scales_NG = None if scales_NG is None else scales_NG.resolve_neg()  # their bits are looked at
    if grid.is_plain:
        assert offsets_NG is None
        return (absmax_scales(master_NK, grid) if scales_NG is None else round_scales(scales_NG, grid)), None
    if scales_NG is None:
        return range_scales(master_NK, grid).decode()
    assert (offsets_NG is not None) == grid.minimum, grid
    return scales_NG, offsets_NG


def fake_quantize(
    master_NK: Tensor,
    scales_NG: Tensor | None,
    grid: Grid,
    noise: Noise = HARD,
    out: Tensor | None = None,
    used_scales_NG: Tensor | None = None,
    offsets_NG: Tensor | None = None,
) -> Tensor:
    """Return the weights that forward uses.

    With hard rounding these are, bit for bit, ``dequantize(quantize(master, grid, scales))``.

    Args:
        master_NK: Master weights: float32, bfloat16 or float16; computed in float32.
        scales_NG: float32 scales. Of a plain grid, rounded to it here; None: each block's absmax scale. Of another,
            what stored scales decode to (``StoredScales.decode``); None: those of the range.
        grid: The grid.
        noise: The noise of this step.
        out: Buffer to write to, float32, bfloat16 or float16; a new tensor per call, of the master's dtype, costs more
            in page faults than the arithmetic. May be where the masters are.
        used_scales_NG: float32 buffer that receives the rounded scales; may be ``scales_NG`` itself.
        offsets_NG: float32, decoded as the scales are; given if they are, and the grid has minimums.
    """
    master = master_NK.to(torch.float32)
    scales_NG, offsets_NG = _decoded(master, scales_NG, offsets_NG, grid)
    soft_uniform = noise.mode == "uniform" and not noise.is_hard
    codes = scale_blocks(as_blocks(master, grid), scales_NG, offsets_NG)
    codes = codes.round_() if soft_uniform else _noisy_codes(codes, noise)
    # A stored code has one zero; adding 0.0 turns -0.0 into it, or a negative scale would flip the sign bit.
    codes.clamp_(grid.code_min, grid.code_max).add_(0.0)
    damaged_NG = damaged_blocks(master, scales_NG, grid)  # before anything is written: out may be where the masters are
    out = torch.empty_like(master_NK) if out is None else out
    blocks = as_blocks(out, grid)
    if offsets_NG is None and not soft_uniform:
        torch.mul(codes, scales_NG.unsqueeze(-1), out=blocks)
    else:
        values = codes.mul_(scales_NG.unsqueeze(-1))
        if offsets_NG is not None:
            values.add_(offsets_NG.unsqueeze(-1))
        if soft_uniform:
            moved = _with_uniform_noise(as_blocks(master, grid), scales_NG, offsets_NG, grid, noise)
            values = _hard_unless(moved, values, noise)
        blocks.copy_(values)
    blocks.masked_fill_(damaged_NG.unsqueeze(-1), torch.nan)
    if used_scales_NG is not None:
        used_scales_NG.copy_(scales_NG)
    return out


def fold_sum(values: Tensor) -> Tensor:
    """Sum the last dimension, a power of two, in halves: element i and element i + n/2, until one is left.

    A fixed order, so that every kernel can repeat it to the bit.
    """
    while (width := values.shape[-1]) > 1:
        values = values[..., : width // 2] + values[..., width // 2 :]
    return values.squeeze(-1)


def fake_quantize_backward(
    grad_NK: Tensor,
    master_NK: Tensor,
    scales_NG: Tensor | None,
    grid: Grid,
    noise: Noise = HARD,
    *,
    learn_scales: bool,
    offsets_NG: Tensor | None = None,
) -> Tensor | None:
    """Turn the gradient of the forward weights, in place, into that of the masters.

    Masters inside the range (up to half a step beyond the last code) get the gradient as it is, those outside none.

    Args:
        grad_NK: Gradient of the loss by the forward weights; float32, bfloat16 or float16; overwritten.
        master_NK, scales_NG, grid, noise, offsets_NG: As in forward.
        learn_scales: Whether to compute the gradient by the scales.

    Returns:
        float32 grad_scales_NG, or None. By the straight-through rule of LSQ (Esser et al., arXiv 1902.08153): a block's
        sum of gradient x (code - w/s) inside and gradient x code at the ends of the range (w from its offset). With
        uniform noise code - w/s is the noise, as if all bits of s had counted in forward.
    """
    master = master_NK.to(torch.float32)
    scales_NG, offsets_NG = _decoded(master, scales_NG, offsets_NG, grid)
    scaled = scale_blocks(as_blocks(master, grid), scales_NG, offsets_NG)
    damaged_NG = damaged_blocks(master, scales_NG, grid)
    outside = (scaled >= grid.code_min - 0.5) & (scaled <= grid.code_max + 0.5)
    outside = outside.logical_not_().logical_or_(damaged_NG.unsqueeze(-1))
    grad = as_blocks(grad_NK, grid)
    grad_scales_NG = None
    if learn_scales:
        # Not in place: the codes of unquantized blocks are ``scaled`` itself.
        by_scale = _noisy_codes(scaled, noise).clamp(grid.code_min, grid.code_max).add_(0.0)
        by_scale = by_scale.sub_(scaled.masked_fill_(outside, 0.0)).mul_(grad)
        grad_scales_NG = fold_sum(by_scale).masked_fill_(damaged_NG, 0.0)
    grad.masked_fill_(outside, 0.0)
    return grad_scales_NG
