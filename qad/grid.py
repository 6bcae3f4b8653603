"""Grids: the number formats that a student is trained on and a device stores.

A grid is data, not code. ``tensor.py`` computes with it, ``pack.py`` lays its codes out in bytes, exporters list the
grids that they can carry. To add a grid, add an entry to ``GRIDS``.
"""

from dataclasses import dataclass

from qad.errors import UserError, unknown_name


@dataclass(frozen=True)
class Grid:
    """One block-wise number format: ``weight = code * scale``, or ``fl32(code * scale + offset)`` with a minimum.

    On one level, ``scale`` is a stored fp16 number and ``offset`` another, the minimum. On two levels (llama.cpp's
    K-quants) each block stores a small integer sub-scale (and sub-minimum), and each super-block the fp16 numbers that
    those multiply: ``scale = d * sub_scale``, ``offset = -(dmin * sub_minimum)``. All products are exact in float32;
    what rounds is the final sum alone.

    Attributes:
        name: Name in plans, recipes and on the command line.
        bits: Bits of a stored code.
        block: Consecutive input features that share one scale.
        code_min, code_max: Inclusive range of the codes.
        signed_scale: Whether a block's scale may be negative. If so, the element of largest magnitude maps to
            ``code_min``, the one code without a mirror image, which lowers the rounding error of an asymmetric code
            range (the choice of llama.cpp's Q4_0).
        scale_bits: Significand bits (the implicit one included) to which a scale is rounded. With 8, the product
            of a 4-bit code and a scale fits the 11 bits of fp16, so that even runtimes that multiply in fp16 decode
            the exact weight.
        scale_floor: Smallest magnitude of a scale: the smallest normal fp16 number, so that no decoder that flushes
            subnormals can differ.
        scale_ceiling: Largest magnitude of a scale: the largest fp16 number of ``scale_bits`` significand bits.
        minimum: Whether a block has an offset beside its scale.
        super_block: Consecutive input features whose blocks share the fp16 scale of the second level; 0: one level.
            There every fp16 number may be stored, subnormal ones too: floor, ceiling and bits above do not apply.
        sub_scale_bits: Bits of a stored sub-scale, and of a sub-minimum; unsigned unless ``signed_scale``.
    """

    name: str
    bits: int
    block: int
    code_min: int
    code_max: int
    signed_scale: bool
    scale_bits: int = 8
    scale_floor: float = 2.0**-14
    scale_ceiling: float = 65280.0
    minimum: bool = False
    super_block: int = 0
    sub_scale_bits: int = 0

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight, scales and minimums included."""
        kinds = 2 if self.minimum else 1
        if self.super_block:
            return self.bits + kinds * (self.sub_scale_bits / self.block + 16 / self.super_block)
        return self.bits + kinds * 16 / self.block

    @property
    def unit(self) -> int:
        """Consecutive input features that are stored together: what must divide a row."""
        return self.super_block or self.block

    @property
    def is_plain(self) -> bool:
        """Whether a weight is its code times a stored fp16 number, nothing else."""
        return not self.minimum and not self.super_block

    @property
    def parts(self) -> tuple[str, ...]:
        """What is stored beside the codes, as the fields of ``qad.scales.StoredScales`` without their shapes."""
        first = ("scales", "minimums") if self.minimum else ("scales",)
        return (*first, *(f"super_{part}" for part in first)) if self.super_block else first

    def columns_of(self, part: str) -> int:
        """Return how many input features share one number of one of ``parts``."""
        return self.unit if part.startswith("super") else self.block

    @property
    def sub_scale_range(self) -> tuple[int, int]:
        """Inclusive range of the sub-scales."""
        if self.signed_scale:
            return -(1 << (self.sub_scale_bits - 1)), (1 << (self.sub_scale_bits - 1)) - 1
        return 0, (1 << self.sub_scale_bits) - 1


def _whole_fp16(name: str, bits: int, *, minimum: bool) -> Grid:
    """Return a grid of GGUF alone, whose decoders multiply in float32: scales keep all bits that fp16 has."""
    codes = (0, (1 << bits) - 1) if minimum else (-(1 << (bits - 1)), (1 << (bits - 1)) - 1)
    return Grid(name, bits, 32, *codes, not minimum, scale_bits=11, scale_ceiling=65504.0, minimum=minimum)


def _k_quant(name: str, bits: int, block: int, *, minimum: bool, sub_scale_bits: int) -> Grid:
    """Return a two-level grid of super-blocks of 256."""
    codes = (0, (1 << bits) - 1) if minimum else (-(1 << (bits - 1)), (1 << (bits - 1)) - 1)
    return Grid(
        name,
        bits,
        block,
        *codes,
        signed_scale=not minimum,
        minimum=minimum,
        super_block=256,
        sub_scale_bits=sub_scale_bits,
    )


GRIDS: dict[str, Grid] = {
    grid.name: grid
    for grid in (
        Grid("q4_0", bits=4, block=32, code_min=-8, code_max=7, signed_scale=True),
        Grid("q8_0", bits=8, block=32, code_min=-127, code_max=127, signed_scale=False),
        # With 4 significand bits, the product of an 8-bit code and its scale fits fp16 as well. Absmax scales may be
        # rounded down by a 17th, and clip: search this grid's scales.
        Grid("q8_0_fp16", 8, 32, -127, 127, signed_scale=False, scale_bits=4, scale_ceiling=61440.0),
        _whole_fp16("q4_1", 4, minimum=True),
        _whole_fp16("q5_0", 5, minimum=False),
        _k_quant("q4_k", 4, 32, minimum=True, sub_scale_bits=6),
        _k_quant("q5_k", 5, 32, minimum=True, sub_scale_bits=6),
        _k_quant("q6_k", 6, 16, minimum=False, sub_scale_bits=8),
        # The group sizes of GPTQ and ONNX files beyond 32.
        Grid("int4_g64", bits=4, block=64, code_min=-8, code_max=7, signed_scale=True),
        Grid("int4_g128", bits=4, block=128, code_min=-8, code_max=7, signed_scale=True),
        Grid("int8_g64", bits=8, block=64, code_min=-127, code_max=127, signed_scale=False),
        Grid("int8_g128", bits=8, block=128, code_min=-127, code_max=127, signed_scale=False),
    )
}


def get_grid(name: str) -> Grid:
    """Return the grid of that name.

    Raises:
        UserError: No such grid; the message lists those there are.
    """
    if name not in GRIDS:
        raise unknown_name("grid", name, list(GRIDS))
    return GRIDS[name]


def grid_for_bits(bits: int) -> Grid:
    """Return the portable grid for ``--bits``: the one whose codes fit every export format losslessly.

    Raises:
        UserError: No portable grid of that width.
    """
    portable = {4: "q4_0", 8: "q8_0"}
    if bits not in portable:
        raise UserError(f"there is no portable {bits}-bit grid; --bits takes {' or '.join(map(str, portable))}")
    return GRIDS[portable[bits]]


def grids_that_fit(columns: int) -> list[str]:
    """Return the names of the grids whose blocks, or super-blocks, divide a row of that many input features."""
    return [grid.name for grid in GRIDS.values() if columns % grid.unit == 0]
