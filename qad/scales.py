"""The scales of a weight as a device stores them: what they are, what they decode to, how they are found from ranges.

A grid has one scale per block (and one minimum, if it is asymmetric), in fp16; or small integers per block that
multiply fp16 numbers shared by a super-block. Everything above this module works with what the stored numbers decode
to, so that no weight is ever computed from a scale that a device could not store. What is given up is a gradient: no
optimizer moves an integer sub-scale, so grids of more than plain scales are searched anew now and then.

Shapes: N output features (rows), K input features (columns), G blocks along K, S super-blocks along K.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from qad.grid import Grid

_LARGEST_HALF = 65504.0


@dataclass(frozen=True)
class StoredScales:
    """What a weight stores beside its codes; ``grid.parts`` says which of these a grid has.

    Attributes:
        grid: The format.
        scales_NG: float16; of two levels int8 (signed) or uint8 sub-scales.
        minimums_NG: float16, what a code of 0 decodes to; of two levels uint8 sub-minimums.
        super_scales_NS: float16, what sub-scales multiply.
        super_minimums_NS: float16, what sub-minimums multiply; their product is subtracted.
    """

    grid: Grid
    scales_NG: Tensor
    minimums_NG: Tensor | None = None
    super_scales_NS: Tensor | None = None
    super_minimums_NS: Tensor | None = None

    def __post_init__(self) -> None:
        found = {"scales": self.scales_NG, "minimums": self.minimums_NG}
        found |= {"super_scales": self.super_scales_NS, "super_minimums": self.super_minimums_NS}
        rows, groups = self.scales_NG.shape
        columns = groups * self.grid.block
        for part, tensor in found.items():
            assert (tensor is not None) == (part in self.grid.parts), (part, self.grid)
            if tensor is not None:
                shape = (rows, columns // self.grid.columns_of(part))
                assert tensor.shape == shape, (part, tensor.shape, shape)
                assert tensor.dtype == part_dtype(self.grid, part), (part, tensor.dtype)

    @classmethod
    def of(cls, grid: Grid, parts: dict[str, Tensor]) -> Self:
        """Put together what ``parts`` takes apart."""
        assert set(parts) == set(grid.parts), (parts.keys(), grid)
        supers = (parts.get("super_scales"), parts.get("super_minimums"))
        return cls(grid, parts["scales"], parts.get("minimums"), *supers)

    @property
    def parts(self) -> dict[str, Tensor]:
        """The stored tensors by the names of ``grid.parts``."""
        found = (self.scales_NG, self.minimums_NG, self.super_scales_NS, self.super_minimums_NS)
        names = ("scales", "minimums", "super_scales", "super_minimums")
        return {name: tensor for name, tensor in zip(names, found, strict=True) if tensor is not None}

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """Return the same with every tensor changed, for one that moves or picks whole rows."""
        return type(self).of(self.grid, {part: change(tensor) for part, tensor in self.parts.items()})

    def decode(self) -> tuple[Tensor, Tensor | None]:
        """Return float32 scales_NG and, for a grid with minimums, offsets_NG: a weight is code * scale + offset."""
        scales_NG, minimums_NG = self.scales_NG.to(torch.float32), self.minimums_NG
        offsets_NG = None if minimums_NG is None else minimums_NG.to(torch.float32)
        if self.super_scales_NS is not None:
            share = self.grid.super_block // self.grid.block
            scales_NG = scales_NG * self.super_scales_NS.to(torch.float32).repeat_interleave(share, dim=1)
        if self.super_minimums_NS is not None:
            assert offsets_NG is not None
            share = self.grid.super_block // self.grid.block
            offsets_NG = -(offsets_NG * self.super_minimums_NS.to(torch.float32).repeat_interleave(share, dim=1))
        return scales_NG, offsets_NG


def part_dtype(grid: Grid, part: str) -> torch.dtype:
    """Return the type in which a grid stores one of its parts."""
    if part.startswith("super") or not grid.super_block:
        return torch.float16
    return torch.int8 if grid.signed_scale else torch.uint8


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


def to_half(values: Tensor) -> Tensor:
    """Round to fp16, those beyond its range to its largest number."""
    return values.clamp(-_LARGEST_HALF, _LARGEST_HALF).to(torch.float16)


def reciprocals(scales: Tensor) -> Tensor:
    """Return 1 / scale, and 0 for a scale of 0, under which every code is 0."""
    return torch.where(scales == 0, scales.new_zeros(()), scales.reciprocal())


def _over(values: Tensor, divisor: int) -> Tensor:
    # A tensor, not a number, as divisor: CUDA multiplies by a number's reciprocal, which rounds differently.
    return values / torch.tensor(float(divisor), device=values.device)


def _shared(wanted_NG: Tensor, share: int, grid: Grid) -> tuple[Tensor, Tensor]:
    """Return (integers, fp16 numbers) whose products come near wanted block scales, the largest at its range's end."""
    low, high = grid.sub_scale_range
    wanted_NSb = wanted_NG.unflatten(1, (-1, share))
    if low < 0:
        index = wanted_NSb.abs().argmax(dim=-1, keepdim=True)
        super_NS = to_half(_over(wanted_NSb.gather(-1, index).squeeze(-1), low))
    else:
        super_NS = to_half(_over(wanted_NSb.amax(dim=-1), high))
    whole = (wanted_NSb * reciprocals(super_NS.to(torch.float32)).unsqueeze(-1)).round_().clamp_(low, high)
    return whole.flatten(1).to(part_dtype(grid, "scales")), super_NS


def store(scales_NG: Tensor, offsets_NG: Tensor | None, grid: Grid) -> StoredScales:
    """Return the stored scales next to wanted block scales and offsets (float32, finite; offsets of two levels <= 0).

    Each number is rounded alone; two levels map a super-block's largest to the end of the integers.
    """
    if not grid.super_block:
        minimums_NG = None if offsets_NG is None else to_half(offsets_NG)
        return StoredScales(grid, round_scales(scales_NG, grid).to(torch.float16), minimums_NG)
    share = grid.super_block // grid.block
    whole_NG, super_NS = _shared(scales_NG, share, grid)
    if offsets_NG is None:
        return StoredScales(grid, whole_NG, super_scales_NS=super_NS)
    minimums_NG, super_minimums_NS = _shared(-offsets_NG, share, grid)
    return StoredScales(grid, whole_NG, minimums_NG, super_NS, super_minimums_NS)


def range_scales(weight_NK: Tensor, grid: Grid) -> StoredScales:
    """Return the stored scales whose codes span each block's range: what absmax scales are to a plain grid.

    With a minimum, code 0 maps to the block's lowest value and the highest code to its highest. A block that holds an
    infinity or a NaN counts as one of zeros, so that it harms none beside it.
    """
    blocks = weight_NK.to(torch.float32).unflatten(1, (-1, grid.block))
    low_NG, high_NG = blocks.aminmax(dim=-1)
    sound_NG = low_NG.isfinite() & high_NG.isfinite()
    low_NG, high_NG = (edge.masked_fill(~sound_NG, 0.0) for edge in (low_NG, high_NG))
    if not grid.minimum:
        extreme_NG = torch.where(high_NG >= -low_NG, high_NG, low_NG)
        if not grid.signed_scale:
            return store(_over(extreme_NG.abs(), grid.code_max), None, grid)
        return store(_over(extreme_NG, grid.code_min), None, grid)
    # Two levels subtract their minimums, which have no sign.
    low_NG = low_NG.clamp(max=0.0) if grid.super_block else to_half(low_NG).to(torch.float32)
    span_NG = (high_NG - low_NG).clamp(min=0.0)  # a minimum may be rounded beyond the highest value
    return store(_over(span_NG, grid.code_max), low_NG, grid)
