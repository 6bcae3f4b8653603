"""Straight-through fake quantization in plain torch: the reference that every kernel is held to.

Forward puts a master weight on its grid (or adds noise of the grid's step), backward recomputes what it needs instead
of storing it. A block is rounded hard with probability ``hard_share``; the other blocks get the treatment of the noise
mode, so that one number moves training from noise to the device's rounding:

    none        every block is rounded
    uniform     the block gets w + s * (u - 1/2): pseudo-quantization noise of half a step either way, no rounding
                (Defossez et al., DiffQ, arXiv 2104.09987)
    stochastic  the block is rounded up or down at random, with the unrounded value as its mean
    partial     the block is left unquantized (Fan et al., Quant-Noise, arXiv 2004.07320)

All of them clip to the grid's range. Given up: exactness of the expected gradient; straight-through is biased, and
clipping cuts the gradient of masters that lie outside the range.

Shapes: N output features, K input features, G blocks along K.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from qad.errors import unknown_name
from qad.grid import Grid
from qad.philox import uniform16
from qad.tensor import as_blocks, round_scales

NOISE_MODES = ("none", "uniform", "stochastic", "partial")
_ELEMENT_STREAM, _BLOCK_STREAM = 0, 1


@dataclass(frozen=True)
class Noise:
    """Which noise one tensor gets in one optimizer step.

    Attributes:
        mode: One of ``NOISE_MODES``.
        hard_share: Probability that a block is rounded hard in spite of the mode, 0 to 1.
        seed: Run seed.
        tensor: Index of the tensor in the plan.
        step: Optimizer step.
    """

    mode: str = "none"
    hard_share: float = 0.0
    seed: int = 0
    tensor: int = 0
    step: int = 0

    def __post_init__(self) -> None:
        if self.mode not in NOISE_MODES:
            raise unknown_name("noise mode", self.mode, list(NOISE_MODES))

    @property
    def is_hard(self) -> bool:
        """Whether every block is rounded hard, so that no random number is drawn."""
        return self.mode == "none" or self.hard_share >= 1.0


HARD = Noise()


def _noisy_codes(scaled: Tensor, grid: Grid, noise: Noise) -> Tensor:
    """Return the (fractional, unless hard) codes of scaled blocks [N, G, block] before clipping."""
    hard = scaled.round()
    if noise.is_hard:
        return hard
    draw = {"seed": noise.seed, "tensor": noise.tensor, "step": noise.step, "device": scaled.device}
    if noise.mode == "uniform":
        soft = scaled + (uniform16(scaled.numel(), stream=_ELEMENT_STREAM, **draw).view_as(scaled) - 0.5)
    elif noise.mode == "stochastic":
        soft = (scaled + uniform16(scaled.numel(), stream=_ELEMENT_STREAM, **draw).view_as(scaled)).floor_()
    else:
        soft = scaled
    if noise.hard_share <= 0.0:
        return soft
    blocks = uniform16(scaled.shape[0] * scaled.shape[1], stream=_BLOCK_STREAM, **draw)
    return torch.where(blocks.view(*scaled.shape[:2], 1) < noise.hard_share, hard, soft)


def fake_quantize(
    master_NK: Tensor, scales_NG: Tensor, grid: Grid, noise: Noise = HARD, out: Tensor | None = None
) -> Tensor:
    """Return the weights that forward uses.

    With hard rounding these are, bit for bit, ``dequantize(quantize(master, grid, scales))``.

    Args:
        master_NK: float32 master weights.
        scales_NG: float32 scales; rounded to the grid here.
        grid: The grid.
        noise: The noise of this step.
        out: Buffer to write to; a new tensor per call costs more in page faults than the arithmetic.
    """
    scales = round_scales(scales_NG, grid).unsqueeze(-1)
    codes = _noisy_codes(as_blocks(master_NK, grid) * scales.reciprocal(), grid, noise)
    # A stored code has one zero; adding 0.0 turns -0.0 into it, or a negative scale would flip the sign bit.
    codes.clamp_(grid.code_min, grid.code_max).add_(0.0)
    out = torch.empty_like(master_NK) if out is None else out
    torch.mul(codes, scales, out=as_blocks(out, grid))
    return out


def fake_quantize_backward(
    grad_NK: Tensor, master_NK: Tensor, scales_NG: Tensor, grid: Grid, noise: Noise = HARD, *, learn_scales: bool
) -> Tensor | None:
    """Turn the gradient of the forward weights, in place, into that of the masters.

    Masters inside the range (up to half a step beyond the last code) get the gradient as it is, those outside none.

    Args:
        grad_NK: Gradient of the loss by the forward weights; overwritten.
        master_NK, scales_NG, grid, noise: As in forward.
        learn_scales: Whether to compute the gradient by the scales.

    Returns:
        grad_scales_NG, or None. By the straight-through rule of LSQ (Esser et al., arXiv 1902.08153): a block's sum of
        gradient x (code - w/s) inside and gradient x code at the ends of the range.
    """
    scales = round_scales(scales_NG, grid).unsqueeze(-1)
    scaled = as_blocks(master_NK, grid) * scales.reciprocal()
    inside = (scaled >= grid.code_min - 0.5) & (scaled <= grid.code_max + 0.5)
    grad = as_blocks(grad_NK, grid)
    grad_scales_NG = None
    if learn_scales:
        # Not in place: the codes of unquantized blocks are ``scaled`` itself.
        by_scale = _noisy_codes(scaled, grid, noise).clamp(grid.code_min, grid.code_max)
        by_scale.sub_(scaled * inside)
        grad_scales_NG = by_scale.mul_(grad).sum(dim=-1)
    grad.mul_(inside)
    return grad_scales_NG
