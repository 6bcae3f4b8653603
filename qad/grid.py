"""Grids: the number formats that a student is trained on and a device stores.

A grid is data, not code. ``tensor.py`` computes with it, ``pack.py`` lays its codes out in bytes, exporters list the
grids that they can carry. To add a grid, add an entry to ``GRIDS``.
"""

from dataclasses import dataclass

from qad.errors import UserError, unknown_name


@dataclass(frozen=True)
class Grid:
    """One block-wise symmetric number format: ``weight = code * float32(scale)``.

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

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight, the fp16 scale included."""
        return self.bits + 16 / self.block


GRIDS: dict[str, Grid] = {
    grid.name: grid
    for grid in (
        Grid("q4_0", bits=4, block=32, code_min=-8, code_max=7, signed_scale=True),
        Grid("q8_0", bits=8, block=32, code_min=-127, code_max=127, signed_scale=False),
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
    """Return the names of the grids whose block divides a row of that many input features."""
    return [grid.name for grid in GRIDS.values() if columns % grid.block == 0]
