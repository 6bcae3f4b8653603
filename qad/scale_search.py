"""Search of stored scales by squared error, for every grid.

A plain grid's blocks are independent: ``tensor.mse_scales``. Where blocks have minimums, a block's best scale and
offset are found by trying ranges and fitting a line through the codes each gives (least squares). Where blocks share
super-scales, the best block scales are stored as well as the integers can, and then integers and super-scales are
improved in turn for the codes at hand, and the codes anew under what the integers decode to; the best state that was
seen is kept. Every error is that of decoded weights. Given up: the search is local, and finds no better than a good
minimum of each super-block.

Shapes: N output features, K input features, G blocks along K, S super-blocks along K; M super-blocks (or blocks, of
one level) of a chunk of rows, B blocks in each, J elements in a block, C candidates.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from qad.grid import Grid
from qad.scales import StoredScales, range_scales, reciprocals, store, to_half
from qad.tensor import absmax_scales, mse_scales

_CHUNK = 1 << 18  # weights searched at a time: the temporaries stay in the cache
_ROUNDS = 4  # of improving integers, super-scales and codes in turn
# Steps of the code range that the tried ranges are wider than the true one: clipping pays where codes are few.
_WIDER = (-1.2, -0.6, 0.0, 0.6, 1.2)


def find_scales(
    weight_NK: Tensor,
    grid: Grid,
    method: str,
    importance_K: Tensor | None = None,
    start: StoredScales | None = None,
) -> StoredScales:
    """Return stored scales for a weight.

    Args:
        weight_NK: The weight; computed in float32.
        grid: Its grid.
        method: ``range`` (absmax scales of a plain grid) or ``mse``.
        importance_K: Optional weight of each input feature's squared error.
        start: For ``mse`` on a grid that is not plain: where the new scales of a super-block are no better than
            these, these stay.
    """
    assert method in ("range", "mse"), method
    if grid.is_plain:
        scales_NG = absmax_scales(weight_NK, grid) if method == "range" else mse_scales(weight_NK, grid, importance_K)
        return StoredScales(grid, scales_NG.to(torch.float16))
    if method == "range":
        return range_scales(weight_NK, grid)
    rows, columns = weight_NK.shape
    importance = torch.ones(columns, device=weight_NK.device) if importance_K is None else importance_K
    # Scaled to a mean of 1, so that sums of squares stay within float32 whatever the importance's unit.
    importance = (importance / importance.mean().clamp_min(torch.finfo(torch.float32).tiny)).clamp_min(1e-12)
    found = []
    for first in range(0, max(rows, 1), step := max(1, _CHUNK // columns)):
        part = slice(first, first + step)
        given = None if start is None else start.map(lambda tensor, part=part: tensor[part])
        found.append(_search(weight_NK[part].to(torch.float32), grid, importance, given))
    return StoredScales.of(grid, {name: torch.cat([each.parts[name] for each in found]) for name in grid.parts})


def _codes(x: Tensor, scales: Tensor, offsets: Tensor | None, grid: Grid) -> Tensor:
    """Return the codes of x [..., J] under block scales and offsets [...], as float32."""
    moved = x if offsets is None else x - offsets.unsqueeze(-1)
    return (moved * reciprocals(scales).unsqueeze(-1)).round_().clamp_(grid.code_min, grid.code_max)


class _Sums:
    """Weighted sums over the elements of each block: all that fitting scales to given codes needs to know."""

    def __init__(self, x: Tensor, weight: Tensor, codes: Tensor) -> None:
        weighted = codes * weight
        self.w = weight.sum(dim=-1)
        self.q, self.qq = weighted.sum(dim=-1), (weighted * codes).sum(dim=-1)
        self.xq, self.x = (weighted * x).sum(dim=-1), (x * weight).sum(dim=-1)

    def line(self, grid: Grid, scales: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scale and offset of least error for the codes; the given ones where codes do not tell."""
        determinant = self.w * self.qq - self.q.square()
        told = determinant > 1e-6 * self.w * self.qq
        safe = determinant.masked_fill(~told, 1.0)
        scale = (self.w * self.xq - self.q * self.x) / safe
        offset = (self.qq * self.x - self.q * self.xq) / safe
        if grid.super_block:  # which subtracts minimums of no sign
            above = offset > 0
            offset = offset.clamp(max=0.0)
            scale = torch.where(above, self.xq / self.qq.clamp_min(1e-20), scale)
        told &= scale > 0
        return torch.where(told, scale, scales), torch.where(told, offset, offsets)

    def slope(self, scales: Tensor) -> Tensor:
        """Return the scale of least error for the codes without an offset."""
        return torch.where(self.qq > 0, self.xq / self.qq.clamp_min(1e-20), scales)


def _error(x: Tensor, weight: Tensor, codes: Tensor, scales: Tensor, offsets: Tensor | None) -> Tensor:
    """Return each block's weighted squared error."""
    decoded = codes * scales.unsqueeze(-1)
    if offsets is not None:
        decoded += offsets.unsqueeze(-1)
    return decoded.sub_(x).square_().mul_(weight).sum(dim=-1)


def _best_blocks(x: Tensor, weight: Tensor, grid: Grid) -> tuple[Tensor, Tensor | None]:
    """Return each block's best scale and offset in float32, as if they were stored exactly."""
    low, high = x.aminmax(dim=-1)
    if not grid.minimum:
        extreme = torch.where(high >= -low, high, low)
        ends = [end for wider in _WIDER for end in (grid.code_min - wider, grid.code_max + wider)]
        starts = [(extreme / end, None) for end in ends]
    else:
        low = low.clamp(max=0.0) if grid.super_block else low
        span = (high - low).clamp(min=0.0)
        starts = [(span / (grid.code_max + wider), low) for wider in _WIDER]
    best, best_scale, best_offset = None, starts[0][0], starts[0][1]
    for scale, offset in starts:
        for _ in range(2):
            sums = _Sums(x, weight, _codes(x, scale, offset, grid))
            if offset is None:
                scale = sums.slope(scale)
            else:
                scale, offset = sums.line(grid, scale, offset)
        error = _error(x, weight, _codes(x, scale, offset, grid), scale, offset)
        if best is None:
            best, best_scale, best_offset = error, scale, offset
            continue
        better = error < best
        best = torch.where(better, error, best)
        best_scale = torch.where(better, scale, best_scale)
        if offset is not None:
            assert best_offset is not None
            best_offset = torch.where(better, offset, best_offset)
    return best_scale, best_offset


def _search(weight_NK: Tensor, grid: Grid, importance_K: Tensor, start: StoredScales | None) -> StoredScales:
    """Return the stored scales of least error that the search meets, for a chunk of rows."""
    rows, columns = weight_NK.shape
    shape = (columns // grid.unit, grid.unit // grid.block, grid.block)
    # What fp16 scales cannot reach is clipped before its square leaves float32; a damaged block harms none beside it.
    blocks_NG = weight_NK.unflatten(1, (-1, grid.block))
    sound_NG = blocks_NG.isfinite().all(dim=-1, keepdim=True)
    x = torch.where(sound_NG, blocks_NG, 0.0).clamp_(-1e9, 1e9).view(rows, *shape)
    weight = importance_K.view(1, *shape).expand_as(x)
    scales, offsets = _best_blocks(x, weight, grid)
    stored = store(scales.flatten(1), None if offsets is None else offsets.flatten(1), grid)
    now = _better(_state(x, weight, stored), _state(x, weight, range_scales(x.view(rows, columns), grid)))
    best = now if start is None else _better(_state(x, weight, start), now)
    if grid.super_block:
        for _ in range(_ROUNDS):
            now = _state(x, weight, _improved(x, weight, now))
            best = _better(best, now)
    return best.stored


@dataclass(frozen=True)
class _State:
    """Stored scales of a chunk, their codes [n, S, B, J] and the error of each super-block [n, S]."""

    stored: StoredScales
    codes: Tensor
    error: Tensor


def _state(x: Tensor, weight: Tensor, stored: StoredScales) -> _State:
    scales, offsets = (None if each is None else each.view(x.shape[:-1]) for each in stored.decode())
    assert scales is not None
    codes = _codes(x, scales, offsets, stored.grid)
    return _State(stored, codes, _error(x, weight, codes, scales, offsets).sum(dim=-1))


def _better(one: _State, other: _State) -> _State:
    """Return, super-block by super-block, the state of less error, the first of two that are as good."""
    better = other.error < one.error
    parts = {}
    for name, tensor in one.stored.parts.items():
        chosen = better.unsqueeze(-1).expand(*better.shape, tensor.shape[1] // better.shape[1])
        parts[name] = torch.where(chosen.flatten(1), other.stored.parts[name], tensor)
    return _State(
        StoredScales.of(one.stored.grid, parts),
        torch.where(better[..., None, None], other.codes, one.codes),
        torch.where(better, other.error, one.error),
    )


def _improved(x: Tensor, weight: Tensor, state: _State) -> StoredScales:
    """Return super-scales fitted to the integers and codes of a state, and the integers anew under those."""
    grid, parts = state.stored.grid, state.stored.parts
    low, high = grid.sub_scale_range
    sums = _Sums(x, weight, state.codes)
    whole = parts["scales"].view(x.shape[:-1]).to(torch.float32)
    # Each super-block's error is a quadratic in its super-scales.
    a, right = (whole.square() * sums.qq).sum(dim=-1), (whole * sums.xq).sum(dim=-1)
    old = parts["super_scales"].to(torch.float32)
    if not grid.minimum:
        super_scale = to_half(torch.where(a > 0, right / a.clamp_min(1e-30), old))
        step = super_scale.to(torch.float32).unsqueeze(-1)
        wanted = sums.slope(whole * step) * reciprocals(step)
        found = wanted.round_().clamp_(low, high).to(parts["scales"].dtype)
        return StoredScales(grid, found.flatten(1), super_scales_NS=super_scale)
    least = parts["minimums"].view(x.shape[:-1]).to(torch.float32)
    old_least = parts["super_minimums"].to(torch.float32)
    b, c = (whole * least * sums.q).sum(dim=-1), (least.square() * sums.w).sum(dim=-1)
    right_least = -(least * sums.x).sum(dim=-1)
    determinant = a * c - b.square()
    told = determinant > 1e-6 * a * c
    safe = determinant.masked_fill(~told, 1.0)
    super_scale = to_half(torch.where(told, (right * c + b * right_least) / safe, old).clamp(min=0.0))
    super_least = to_half(torch.where(told, (a * right_least + b * right) / safe, old_least).clamp(min=0.0))
    step, step_least = (each.to(torch.float32).unsqueeze(-1) for each in (super_scale, super_least))
    scale, _ = sums.line(grid, whole * step, -(least * step_least))
    wanted = (scale * reciprocals(step)).clamp_(low, high)
    best = None
    for tried in (wanted.floor(), wanted.ceil()):
        fitting = (tried * step * sums.q - sums.x) / sums.w * reciprocals(step_least)
        fitting = fitting.round_().clamp_(low, high)
        error = (tried * step).square() * sums.qq - 2 * tried * step * (sums.xq + fitting * step_least * sums.q)
        error += (fitting * step_least).square() * sums.w + 2 * fitting * step_least * sums.x
        if best is None:
            best, whole, least = error, tried, fitting
        else:
            better = error < best
            whole, least = torch.where(better, tried, whole), torch.where(better, fitting, least)
    kind = parts["scales"].dtype
    return StoredScales(grid, whole.flatten(1).to(kind), least.flatten(1).to(kind), super_scale, super_least)
