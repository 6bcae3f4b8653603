"""Random tensors of any grid, over the whole range of what can be stored."""

import numpy as np
import torch

from qad.grid import Grid
from qad.scales import StoredScales, part_dtype, round_scales
from qad.tensor import QuantizedTensor


def random_stored(grid: Grid, rows: int, columns: int, seed: int) -> StoredScales:
    """Return scales over the whole range of what is stored: every integer, every finite fp16 number of both signs.

    A plain grid's are those that it may store.
    """
    random = np.random.default_rng(seed)
    parts: dict[str, torch.Tensor] = {}
    for part in grid.parts:
        dtype = part_dtype(grid, part)
        shape = (rows, columns // grid.columns_of(part))
        if dtype != torch.float16:
            low, high = grid.sub_scale_range
            whole = random.integers(low, high, shape, dtype=np.int16, endpoint=True)
            parts[part] = torch.from_numpy(whole).to(dtype)
        elif grid.is_plain:
            wide = np.ldexp(random.uniform(1, 2, shape), random.integers(-16, 16, shape)) * random.choice(
                [-1, 1], shape
            )
            parts[part] = round_scales(torch.from_numpy(wide.astype(np.float32)), grid).to(torch.float16)
        else:
            # Below 0x7C00 every pattern is finite: zero, subnormal and normal numbers up to the largest.
            word = random.integers(0, 0x7C00, shape, dtype=np.uint16) | (random.integers(0, 2, shape, np.uint16) << 15)
            word.flat[:6] = np.array([0x0000, 0x8000, 0x0001, 0x83FF, 0x7BFF, 0xFBFF], np.uint16)[: word.size]
            parts[part] = torch.from_numpy(word.view(np.float16).copy())
    return StoredScales.of(grid, parts)


def random_tensor(rows: int, columns: int, grid: Grid, seed: int) -> QuantizedTensor:
    """Return codes over the whole range under ``random_stored`` scales."""
    codes = np.random.default_rng(seed + 1).integers(
        grid.code_min, grid.code_max, (rows, columns), dtype=np.int8, endpoint=True
    )
    return QuantizedTensor.of(torch.from_numpy(codes), random_stored(grid, rows, columns, seed))
