"""CPU kernels: the bits of the torch reference, on every instruction set; and how the library is built and kept.

One tensor holds blocks of every kind, so that each call meets them all, side by side. Needs torch, numpy and pytest.

Shapes: N output features, K input features, G blocks along K.
"""

import itertools
import json
import math
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from qad import cpu_compiler, native
from qad.errors import UserError
from qad.fake_quant import fake_quantize, fake_quantize_backward
from qad.grid import GRIDS, Grid
from qad.noise import HARD, NOISE_MODES, Noise
from qad.philox import uniform16
from qad.tensor import QuantizedTensor, absmax_scales, damaged_blocks, dequantize, quantize, round_scales

needs_library = pytest.mark.skipif("native.available() is not None", reason="there are no kernels here")

# Positive scales with 4 bits, an 8-bit code that mirrors no other, and the ends of what a scale may keep.
MORE_GRIDS = (
    Grid("u4", 4, 32, -7, 7, signed_scale=False),
    Grid("u4_g128", 4, 128, -8, 7, signed_scale=False, scale_bits=5, scale_ceiling=63488.0),
    Grid("s8_g64", 8, 64, -128, 127, signed_scale=True, scale_bits=11, scale_ceiling=65504.0),
    Grid("s8", 8, 32, -128, 127, signed_scale=True, scale_bits=5, scale_ceiling=63488.0),
    Grid("q4_0_fp16", 4, 32, -8, 7, signed_scale=True, scale_bits=11, scale_ceiling=65504.0),
    Grid("q4_0_2", 4, 32, -8, 7, signed_scale=True, scale_bits=2, scale_ceiling=49152.0),
)
ALL_GRIDS = (*(grid for grid in GRIDS.values() if grid.is_plain), *MORE_GRIDS)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NOISES = [
    Noise(mode, share, seed=(3 << 32) + 5, tensor=7, step=11)
    for mode in NOISE_MODES
    for share in ((0.0,) if mode == "none" else (0.0, 0.4, 1.0))
]

every_grid = pytest.mark.parametrize("grid", ALL_GRIDS, ids=lambda grid: grid.name)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


@contextmanager
def forced(name: str) -> Iterator[None]:
    native.force_instruction_set(name)
    try:
        assert native.instruction_set() == name
        yield
    finally:
        native.release_instruction_set()


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def bits(values: Tensor) -> Tensor:
    return values.contiguous().view({1: torch.int8, 2: torch.int16, 4: torch.int32}[values.dtype.itemsize])


def check(got: Tensor, expected: Tensor, what: str) -> None:
    """Compare bits, NaN included, and name the first that differs."""
    assert (got.dtype, got.shape) == (expected.dtype, expected.shape), what
    if not torch.equal(bits(got), bits(expected)):
        where = (bits(got) != bits(expected)).nonzero()
        first = tuple(where[0].tolist())
        raise AssertionError(f"{what}: {len(where)} differ, first at {first}: {got[first]} for {expected[first]}")


def from_bits(*words: int) -> Tensor:
    return torch.from_numpy(np.array(words, dtype=np.uint32).view(np.float32))


NOT_NUMBERS = from_bits(0x7FC00000, 0xFFC00000, 0x7F800001, 0xFF800001, 0x7FFFFFFF, 0xFFFFFFFF, 0x7FA00000, 0x7FC12345)


def blocks_of_every_kind(grid: Grid, dtype: torch.dtype, *, step: float = 2.0**-6) -> Tensor:
    """Return a weight [N, 3 * block], N odd, with each kind three times; under the scale ``step``, ties are exact."""
    generator = torch.Generator().manual_seed(1)
    size, end = grid.block, grid.code_min if grid.signed_scale else grid.code_max

    def bell() -> Tensor:
        return torch.randn(size, generator=generator) * step * abs(end) / 3

    def choice(values: Tensor) -> Tensor:
        return values[torch.randint(len(values), (size,), generator=generator)]

    halves = torch.arange(2 * grid.code_min - 4, 2 * grid.code_max + 5) * 0.5 * step
    near = torch.cat([halves, *(torch.nextafter(halves, halves.new_tensor(end)) for end in (-math.inf, math.inf))])
    zeros = torch.tensor([0.0, -0.0])
    kinds = [bell() for _ in range(6)]
    kinds += [choice(zeros), torch.zeros(size), -torch.zeros(size)]
    kinds += [choice(from_bits(1, 0x80000001, 0x7FFFFF, 0x807FFFFF, 0x400000)), bell() * 1e-38, bell() * 1e-6]
    kinds += [choice(from_bits(0x7F7FFFFF, 0xFF7FFFFF, 0x7F000000)), bell() * 1e30, bell() * 1e6, bell() * 65504]
    kinds += [choice(halves), choice(halves), choice(near), choice(near)]
    kinds += [torch.full((size,), value) for value in (step, -step, grid.scale_floor, 65504.0)]
    for extreme in (end * step, -end * step):  # absmax finds the step itself, or its negative
        kinds.append(choice(halves[1:-1].clamp(-abs(end) * step, abs(end) * step)))
        kinds[-1][-1] = extreme
    for first, last in ((0, -1), (-1, 0), (3, 17)):  # two extremes that differ in their sign
        kinds.append(bell())
        kinds[-1][first], kinds[-1][last] = 5 * step * abs(end), -5 * step * abs(end)
    kinds.append(torch.where(torch.rand(size, generator=generator) < 0.5, bell(), choice(zeros)))
    for index, bad in enumerate([math.inf, -math.inf, *NOT_NUMBERS]):
        kinds.append(bell())
        kinds[-1].view(torch.int32)[(index * 13) % size] = bits(torch.as_tensor(bad))
        kinds.append(bell())  # a healthy neighbour on each side
    kinds += [torch.full((size,), math.nan), bell()]
    kinds += [bell() for _ in range(-len(kinds) % 6 + 3)]
    weight = torch.stack(kinds * 3).view(-1, 3 * size).to(dtype)
    if dtype != torch.float32:  # payloads that no conversion leaves
        words = weight.view(torch.int16)
        words[2, 5], words[4, 2 * size] = (0x7F81, -1) if dtype == torch.bfloat16 else (0x7C01, -1)
    assert weight.shape[0] % 2 == 1
    return weight


def scales_of_every_kind(weight: Tensor, grid: Grid, *, step: float = 2.0**-6) -> Tensor:
    """Return scales for ``blocks_of_every_kind``: for its ties, then odd ones, then some that clip weights."""
    halfway = 1.0 + 2.0**-grid.scale_bits
    odd = torch.cat(
        [
            torch.tensor([step, -step, 0.0, -0.0, math.inf, -math.inf, 1e-40, -1e-45, 3e38, -3e38, 65504.0, 65520.0]),
            torch.tensor([halfway, 3 * halfway, halfway * (1 + 2.0**-23), -halfway * 2.0**-13, -1e-9, 1e9]),
            torch.tensor([grid.scale_floor, grid.scale_ceiling, grid.scale_floor * 0.999, grid.scale_ceiling * 1.001]),
            NOT_NUMBERS,
        ]
    )
    usual = absmax_scales(weight, grid).nan_to_num(step) * 0.6
    third = usual.numel() // 3
    repeated = odd.repeat(third // len(odd) + 1)[:third]
    assert third > len(odd)
    return torch.cat([torch.full((third,), step), repeated, usual.view(-1)[2 * third :]]).view(usual.shape)


def gradient(weight: Tensor, dtype: torch.dtype) -> Tensor:
    values = torch.randn(weight.shape, generator=torch.Generator().manual_seed(2))
    values[:, ::7] = -0.0
    values[1, 1::7], values[2, 2::7] = 1e-40, 1e30
    return values.to(dtype)


@needs_library
@every_dtype
@every_grid
@pytest.mark.parametrize("given", [False, True], ids=["absmax", "given"])
def test_forward_and_backward(grid: Grid, dtype: torch.dtype, given: bool) -> None:
    weight = blocks_of_every_kind(grid, dtype)
    scales = scales_of_every_kind(weight, grid) if given else None
    before = (weight.clone(), None if scales is None else scales.clone())
    rounded = absmax_scales(weight, grid) if scales is None else round_scales(scales, grid)
    damaged = int(damaged_blocks(weight.float(), rounded, grid).sum())
    assert damaged >= 10
    for noise in NOISES:
        for out_dtype in DTYPES:
            out, used = torch.empty(weight.shape, dtype=out_dtype), torch.empty_like(rounded)
            fake_quantize(weight, scales, grid, noise, out, used)
            grad = gradient(weight, out_dtype)
            by_scale = fake_quantize_backward(grad, weight, scales, grid, noise, learn_scales=True)
            assert by_scale is not None
            for name in cpu_compiler.instruction_sets():
                with forced(name):
                    what = f"{name}, {noise.mode}, {noise.hard_share}, {out_dtype}"
                    got, got_used = torch.full_like(out, 7.0), torch.full_like(used, 7.0)
                    assert native.fake_quantize(weight, scales, grid, noise, got, got_used) == damaged
                    check(got, out, what)
                    check(got_used, used, f"used scales, {what}")
                    got_grad, got_by_scale = gradient(weight, out_dtype), torch.full_like(used, 7.0)
                    count = native.fake_quantize_backward(got_grad, weight, scales, grid, noise, got_by_scale)
                    assert count == damaged
                    check(got_grad, grad, f"gradient, {what}")
                    check(got_by_scale, by_scale, f"gradient of scales, {what}")
                    got_grad = gradient(weight, out_dtype)
                    assert native.fake_quantize_backward(got_grad, weight, scales, grid, noise, None) == damaged
                    check(got_grad, grad, f"gradient alone, {what}")
    check(weight, before[0], "the weight is left alone")
    if scales is not None and before[1] is not None:
        check(scales, before[1], "the scales are left alone")


@needs_library
@every_dtype
@every_grid
@pytest.mark.parametrize("given", [False, True], ids=["absmax", "given"])
def test_quantize_and_dequantize(grid: Grid, dtype: torch.dtype, given: bool) -> None:
    weight = blocks_of_every_kind(grid, dtype)
    scales = scales_of_every_kind(weight, grid) if given else None
    rounded = absmax_scales(weight, grid) if scales is None else round_scales(scales, grid)
    damaged = damaged_blocks(weight.float(), rounded, grid)
    # The reference refuses what is damaged; the kernels' answer to it is code 0 and the scale NaN.
    sound = weight.masked_fill(damaged.repeat_interleave(grid.block, dim=1), 0.0)
    quantized = quantize(sound, grid, rounded.masked_fill(damaged, 1.0))
    stored = quantized.scales_NG.masked_fill(damaged, math.nan)
    decoded = dequantize(quantized).masked_fill(damaged.repeat_interleave(grid.block, dim=1), math.nan)
    for name in cpu_compiler.instruction_sets():
        with forced(name):
            got_codes, got_stored = torch.full_like(quantized.codes_NK, 99), torch.full_like(stored, 7.0)
            assert native.quantize(weight, scales, grid, got_codes, got_stored) == int(damaged.sum())
            check(got_codes, quantized.codes_NK, f"codes, {name}")
            check(got_stored, stored, f"stored scales, {name}")
            for out_dtype in DTYPES:
                out = torch.full(weight.shape, 7.0, dtype=out_dtype)
                native.dequantize(got_codes, got_stored, grid, out)
                expected = decoded.to(out_dtype).masked_fill(decoded.isnan(), math.nan)
                check(out, expected, f"dequantized, {name}, {out_dtype}")


@needs_library
def test_every_half_scale_is_decoded() -> None:
    """All finite fp16 numbers, subnormals and -0 too, though no grid stores them."""
    grid = GRIDS["q8_0"]
    halves = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    halves = halves[halves.isfinite()].view(-1, 1)
    codes = torch.arange(-16, 16, dtype=torch.int8).expand(len(halves), 32).contiguous()
    expected = dequantize(QuantizedTensor(codes, halves, grid))
    for name in cpu_compiler.instruction_sets():
        with forced(name):
            for dtype in DTYPES:
                out = torch.empty(codes.shape, dtype=dtype)
                native.dequantize(codes, halves, grid, out)
                check(out, expected.to(dtype), f"{name}, {dtype}")


@needs_library
@every_dtype
def test_every_short_float_and_all_roundings_to_one(dtype: torch.dtype) -> None:
    """All 2^16 numbers of 16 bits as weights; as results, their neighbours and what lies halfway between two."""
    grid = GRIDS["q4_0"]
    if dtype == torch.float32:
        high = torch.arange(1 << 16, dtype=torch.int32) << 16
        low = torch.tensor([0, 1, 0x0FFF, 0x1000, 0x1001, 0x2000, 0x3000, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
        words = (high.view(-1, 1) | low.to(torch.int32)).view(-1)
        words = words[: len(words) // 32 * 32]
        weight = words.view(torch.float32).view(-1, 32)
    else:
        words = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
        weight = words.view(dtype).view(-1, 32)
    # Powers of two and partial noise: what comes out is the weight, clipped to 8 steps; beyond fp16 with the larger.
    noise = Noise("partial")
    for scale, out_dtype in itertools.product((1.0, 2.0**13), DTYPES):
        scales = torch.full((len(weight), 1), scale)
        expected = fake_quantize(weight, scales, grid, noise, torch.empty(weight.shape, dtype=out_dtype))
        for name in cpu_compiler.instruction_sets():
            with forced(name):
                out = torch.empty(weight.shape, dtype=out_dtype)
                native.fake_quantize(weight, scales, grid, noise, out, None)
                check(out, expected, f"{name}, {out_dtype}")


@needs_library
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 7, 15, 16, 17, 31, 33, 63, 64, 65, 127, 128, 129, 193])
def test_any_number_of_blocks(rows: int) -> None:
    """Around the width of a vector and the batches in which the kernels work."""
    for grid in (GRIDS["q4_0"], GRIDS["int8_g64"], GRIDS["int4_g128"]):
        weight = torch.randn(rows, grid.block, generator=torch.Generator().manual_seed(rows))
        noise = Noise("stochastic", 0.4, 1, 2, 3)
        expected_used, grad = torch.empty(rows, 1), gradient(weight, torch.float32) if rows > 2 else weight + 1
        expected, expected_grad = fake_quantize(weight, None, grid, noise, None, expected_used), grad.clone()
        expected_by_scale = fake_quantize_backward(expected_grad, weight, None, grid, noise, learn_scales=True)
        quantized = quantize(weight, grid)
        assert expected_by_scale is not None
        for name in cpu_compiler.instruction_sets():
            with forced(name):
                out, used = torch.empty_like(weight), torch.empty(rows, 1)
                got_grad, by_scale = grad.clone(), torch.empty(rows, 1)
                codes, stored = torch.empty_like(quantized.codes_NK), torch.empty_like(quantized.scales_NG)
                assert native.fake_quantize(weight, None, grid, noise, out, used) == 0
                assert native.fake_quantize_backward(got_grad, weight, None, grid, noise, by_scale) == 0
                assert native.quantize(weight, None, grid, codes, stored) == 0
                check(out, expected, name)
                check(used, expected_used, name)
                check(got_grad, expected_grad, name)
                check(by_scale, expected_by_scale, name)
                check(codes, quantized.codes_NK, name)
                check(stored, quantized.scales_NG, name)


@needs_library
@every_dtype
@every_grid
def test_scales_at_the_ends_of_what_they_may_be(grid: Grid, dtype: torch.dtype) -> None:
    """Largest elements whose quotients underflow to zero, and those that the ceiling cuts off: a call for each block,
    because one of them decides for all blocks beside it how they are rounded."""
    end = -grid.code_min if grid.signed_scale else grid.code_max
    factors = torch.tensor([0.4, 0.5, 0.6, 0.9, 1.0, 1.1, 1.5, 1.7, 1.9, 1.99, 2.0, 2.1, 2.3, 2.6, 3.5, 4.0, 9.0, 99.0])
    largest = torch.cat([from_bits(*range(1, 12)), factors * end * grid.scale_ceiling])
    largest = largest.clamp(max=torch.finfo(dtype).max).view(-1, 1)
    ramp = torch.linspace(-1.0, 1.0, grid.block)
    weight = torch.cat([largest * ramp, largest * ramp.clamp(min=-0.6), largest * ramp.clamp(max=0.6)]).to(dtype)
    used = torch.empty(len(weight), 1)
    expected = fake_quantize(weight, None, grid, HARD, None, used)
    assert (used.abs() == grid.scale_floor).any()
    for name in cpu_compiler.instruction_sets():
        with forced(name):
            out, got_used = torch.empty_like(weight), torch.empty_like(used)
            for row in range(len(weight)):
                rows = slice(row, row + 1)
                assert native.fake_quantize(weight[rows], None, grid, HARD, out[rows], got_used[rows]) == 0
            check(got_used, used, f"used scales, {name}")
            check(out, expected, name)


@needs_library
@every_grid
def test_scales_next_to_every_tie(grid: Grid) -> None:
    """Largest elements whose quotient lies halfway between two scales, and their neighbours: there alone a product with
    the reciprocal of the last code, instead of the quotient, comes to another scale."""
    end = -grid.code_min if grid.signed_scale else grid.code_max
    ties = (torch.arange(1 << (grid.scale_bits - 1), 1 << grid.scale_bits) + 0.5) * 2.0**-grid.scale_bits
    words = bits(ties * end).view(-1, 1) + torch.arange(-2, 3, dtype=torch.int32)
    largest = words.view(torch.float32).view(-1, 1)
    largest[::3] *= -1.0
    weight = torch.zeros(len(largest), grid.block)
    weight[:, 5:6], weight[:, 6:7] = largest, largest * 0.4
    used = torch.empty_like(largest)
    expected = fake_quantize(weight, None, grid, HARD, None, used)
    for name in cpu_compiler.instruction_sets():
        with forced(name):
            out, got_used = torch.empty_like(weight), torch.empty_like(used)
            assert native.fake_quantize(weight, None, grid, HARD, out, got_used) == 0
            check(got_used, used, f"used scales, {name}")
            check(out, expected, name)


@needs_library
def test_infinite_and_missing_gradients_stay_where_they_are() -> None:
    """A NaN agrees with a NaN here: which of two comes out of a sum, no standard says."""
    grid = GRIDS["q4_0"]
    weight = torch.randn(9, 96, generator=torch.Generator().manual_seed(1))
    for dtype in DTYPES:
        grad = gradient(weight, dtype)
        grad[0, 3], grad[1, 40], grad[1, 41], grad[4, 5] = math.nan, math.inf, -math.inf, math.inf
        expected = grad.clone()
        by_scale = fake_quantize_backward(expected, weight, None, grid, learn_scales=True)
        assert by_scale is not None
        assert bool(expected.isnan().any())
        assert bool(by_scale.isnan().any())
        for name in cpu_compiler.instruction_sets():
            with forced(name):
                got, got_by_scale = grad.clone(), torch.empty_like(by_scale)
                assert native.fake_quantize_backward(got, weight, None, grid, Noise(), got_by_scale) == 0
                check(got.masked_fill(got.isnan(), 0.5), expected.masked_fill(expected.isnan(), 0.5), name)
                assert torch.equal(got.isnan(), expected.isnan())
                assert torch.equal(got_by_scale.nan_to_num(0.5), by_scale.nan_to_num(0.5))


@needs_library
@pytest.mark.parametrize("share", [0.5 / 65536, 123.5 / 65536, 0.4, 65535.5 / 65536, 1 - 1e-12, 1e-30, -1.0, 2.0])
def test_the_edges_of_the_hard_share(share: float) -> None:
    """A share that is one of the values drawn, and shares that float32 rounds to 0 or 1."""
    grid = GRIDS["q4_0"]
    weight = torch.randn(4000, 32, generator=torch.Generator().manual_seed(1))
    noise = Noise("uniform", share, 1, 2, 3)
    expected = fake_quantize(weight, None, grid, noise)
    for name in cpu_compiler.instruction_sets():
        with forced(name):
            out = torch.empty_like(weight)
            native.fake_quantize(weight, None, grid, noise, out, None)
            check(out, expected, name)


@needs_library
@pytest.mark.parametrize("seed", [0, 1, -1, 1 << 63, 0xFFFFFFFF, 0x123456789ABCDEF0])
@pytest.mark.parametrize("mode", ["uniform", "stochastic"])
def test_all_words_of_seed_tensor_and_step(seed: int, mode: str) -> None:
    grid = GRIDS["int8_g64"]
    weight = torch.randn(5, 192, generator=torch.Generator().manual_seed(1))
    for tensor, step in ((0, 0), (0xFFFFFFFF, 1), (1 << 31, 0xFFFFFFFF)):
        noise = Noise(mode, 0.4, seed, tensor, step)
        expected = fake_quantize(weight, None, grid, noise)
        for name in cpu_compiler.instruction_sets():
            with forced(name):
                out = torch.empty_like(weight)
                native.fake_quantize(weight, None, grid, noise, out, None)
                check(out, expected, name)


@needs_library
@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 31, 63, 65, 2047, 2048, 2049, 5001])
def test_random_values(count: int) -> None:
    for seed, tensor, step, stream in (
        (0, 0, 0, 0),
        ((1 << 64) - 1, 0xFFFFFFFF, 0xFFFFFFFF, 1),
        (0x123456789ABCDEF0, 5, 1 << 31, 7),
    ):
        expected = uniform16(count, seed=seed, tensor=tensor, step=step, stream=stream)
        for name in cpu_compiler.instruction_sets():
            with forced(name):
                got = native.uniform16(count, seed=seed, tensor=tensor, step=step, stream=stream)
                check(got, expected, name)


# ---------------------------------------------------------------------------------------------------- memory, threads


class Guarded:
    """Tensors that start at odd places, with elements before and after that must survive."""

    def __init__(self, offset: int) -> None:
        self.offset, self.kept = offset, []

    def place(self, values: Tensor) -> Tensor:
        around = self.offset + 70
        memory = torch.empty(values.numel() + around, dtype=values.dtype)
        bits(memory).fill_(0x5A)
        view = memory[self.offset : self.offset + values.numel()].view(values.shape)
        assert view.storage_offset() == self.offset
        view.copy_(values)
        if values.is_floating_point():
            bits(view).copy_(bits(values))  # a copy may change a NaN
        self.kept.append((memory, values.numel()))
        return view

    def intact(self) -> bool:
        return all(
            bool((bits(memory)[: self.offset] == 0x5A).all())
            and bool((bits(memory)[self.offset + count :] == 0x5A).all())
            for memory, count in self.kept
        )


@needs_library
@every_dtype
@pytest.mark.parametrize("offset", [1, 3, 8])
def test_unaligned_views_and_their_surroundings(dtype: torch.dtype, offset: int) -> None:
    for grid in (GRIDS["q4_0"], GRIDS["int8_g128"]):
        weight = blocks_of_every_kind(grid, dtype)
        scales, noise = scales_of_every_kind(weight, grid), Noise("stochastic", 0.4, 1, 2, 3)
        expected_used, expected_grad = torch.empty_like(scales), gradient(weight, dtype)
        expected = fake_quantize(weight, scales, grid, noise, None, expected_used)
        expected_by_scale = fake_quantize_backward(expected_grad, weight, scales, grid, noise, learn_scales=True)
        assert expected_by_scale is not None
        plain_codes, plain_stored = torch.empty(weight.shape, dtype=torch.int8), scales.to(torch.float16)
        native.quantize(weight, scales, grid, plain_codes, plain_stored)
        plain_decoded = torch.empty_like(weight)
        native.dequantize(plain_codes, plain_stored, grid, plain_decoded)
        for name in cpu_compiler.instruction_sets():
            guarded = Guarded(offset)
            with forced(name):
                at_weight, at_scales = guarded.place(weight), guarded.place(scales)
                out, used = guarded.place(torch.zeros_like(weight)), guarded.place(torch.zeros_like(scales))
                native.fake_quantize(at_weight, at_scales, grid, noise, out, used)
                check(out, expected, name)
                check(used, expected_used, name)
                grad, by_scale = guarded.place(gradient(weight, dtype)), guarded.place(torch.zeros_like(scales))
                native.fake_quantize_backward(grad, at_weight, at_scales, grid, noise, by_scale)
                check(grad, expected_grad, name)
                check(by_scale, expected_by_scale, name)
                codes = guarded.place(torch.zeros_like(plain_codes))
                stored = guarded.place(torch.zeros_like(plain_stored))
                native.quantize(at_weight, at_scales, grid, codes, stored)
                check(codes, plain_codes, name)
                check(stored, plain_stored, name)
                native.dequantize(codes, stored, grid, out)
                check(out, plain_decoded, name)
                check(at_weight, weight, "the weight is left alone")
                # In place: the rounded scales take the place of the given ones.
                native.fake_quantize(at_weight, at_scales, grid, noise, out, at_scales)
                check(at_scales, expected_used, name)
                check(out, expected, name)
            assert guarded.intact(), name


@needs_library
@every_dtype
@pytest.mark.parametrize(
    "noise",
    [HARD, Noise("uniform"), Noise("uniform", 0.4), Noise("stochastic", 0.4), Noise("partial", 0.4)],
    ids=lambda noise: f"{noise.mode} {noise.hard_share}",
)
def test_outputs_past_the_caches_have_the_same_bits(dtype: torch.dtype, noise: Noise) -> None:
    """Large outputs are stored by other instructions where their address allows it, which an odd one does not."""
    found = re.search(r"STREAMING_ELEMENTS \(1 << (\d+)\)", (cpu_compiler.SOURCES / "cpu/api.cpp").read_text())
    assert found, "large outputs are told apart in another way: size this tensor anew"
    weight = (torch.randn((1 << int(found[1])) // 4096 + 1, 4096) * 0.02).to(dtype)
    weight[3, 5], weight[-1, -1] = torch.nan, torch.inf
    scales, used = torch.full((weight.shape[0], weight.shape[1] // 32), 0.004), torch.empty(weight.shape[0], 128)
    for out_dtype, given in itertools.product({dtype, torch.bfloat16, torch.float32}, (None, scales)):
        aligned, odd = (torch.full((weight.numel() + 65,), 7.0, dtype=out_dtype) for _ in range(2))
        outs = [pool[start : start + weight.numel()] for pool, start in ((aligned, 64), (odd, 33))]
        assert aligned.data_ptr() % 64 == odd.data_ptr() % 64 == 0
        native.fake_quantize(weight, given, GRIDS["q4_0"], noise, outs[1].view_as(weight), used)
        for name in cpu_compiler.instruction_sets():
            with forced(name):
                outs[0].fill_(7.0)
                assert native.fake_quantize(weight, given, GRIDS["q4_0"], noise, outs[0].view_as(weight), used) == 2
            check(outs[0], outs[1], f"{name}, {out_dtype}")
            assert (aligned[:64] == 7).all()
            assert aligned[-1] == 7


@needs_library
def test_outputs_past_the_caches_at_every_alignment() -> None:
    """An address that is half of a vector's multiple is none: stored to it past the caches, the process would end."""
    found = re.search(r"STREAMING_ELEMENTS \(1 << (\d+)\)", (cpu_compiler.SOURCES / "cpu/api.cpp").read_text())
    assert found, "large outputs are told apart in another way: size this tensor anew"
    weight = torch.randn((1 << int(found[1])) // 4096, 4096, generator=torch.Generator().manual_seed(1)) * 0.02
    for out_dtype in (torch.float32, torch.bfloat16):
        pool = torch.empty(weight.numel() + 64, dtype=out_dtype)
        assert pool.data_ptr() % 64 == 0
        expected = None
        for name, offset in itertools.product(cpu_compiler.instruction_sets(), (0, 2, 4, 8, 16, 32)):
            with forced(name):
                out = pool[offset : offset + weight.numel()].view_as(weight)
                native.fake_quantize(weight, None, GRIDS["q4_0"], HARD, out, None)
                expected = out.clone() if expected is None else expected
                check(out, expected, f"{name}, {out_dtype}, at {offset}")


@needs_library
@pytest.mark.parametrize("name", ["q4_0", "q8_0"])
def test_sums_of_weight_and_noise_that_are_integers(name: str) -> None:
    """What random weights all but never meet: sums whose floor is themselves, and the neighbours on either side."""
    grid, noise = GRIDS[name], Noise("stochastic", 0.0, 1, 2, 3)
    end = float(grid.code_min if grid.signed_scale else grid.code_max)
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(grid.code_min + 1, grid.code_max + 1, (24, 96), generator=generator)
    weight = codes - uniform16(codes.numel(), seed=1, tensor=2, step=3).view(codes.shape)
    weight[1::3], weight[2::3] = (torch.nextafter(weight[n::3], torch.tensor(up)) for n, up in ((1, 99.0), (2, -99.0)))
    weight[:, :: grid.block] = end  # absmax scales of 1
    assert bool((absmax_scales(weight, grid) == 1.0).all())
    for out_dtype in DTYPES:
        expected = fake_quantize(weight, None, grid, noise, torch.empty(weight.shape, dtype=out_dtype))
        if out_dtype == torch.float32:  # the weights are what they shall be
            assert torch.equal(expected[::3, 1:32].to(torch.int64), codes[::3, 1:32])
        for instruction_set in cpu_compiler.instruction_sets():
            with forced(instruction_set):
                out = torch.empty(weight.shape, dtype=out_dtype)
                native.fake_quantize(weight, None, grid, noise, out, None)
                check(out, expected, f"{instruction_set}, {out_dtype}")


@needs_library
@every_dtype
def test_random_numbers_of_a_tensor_of_real_size(dtype: torch.dtype) -> None:
    """Beyond 2^20 elements, which no other test here compares with the reference: counters are wider than that."""
    weight = (torch.randn(4097, 1024, generator=torch.Generator().manual_seed(1)) * 0.02).to(dtype)
    noise, grid = Noise("uniform", 0.4, 1, 2, 3), GRIDS["q4_0"]
    expected = fake_quantize(weight, None, grid, noise)
    grad = gradient(weight, dtype)
    by_scale = fake_quantize_backward(grad, weight, None, grid, noise, learn_scales=True)
    assert by_scale is not None
    for name in cpu_compiler.instruction_sets():
        with forced(name), threads(4):
            out, got_grad, got_by_scale = torch.empty_like(weight), gradient(weight, dtype), torch.empty_like(by_scale)
            native.fake_quantize(weight, None, grid, noise, out, None)
            native.fake_quantize_backward(got_grad, weight, None, grid, noise, got_by_scale)
            check(out, expected, name)
            check(got_grad, grad, f"gradient, {name}")
            check(got_by_scale, by_scale, f"gradient of scales, {name}")


def elements_per_thread() -> int:
    found = re.search(r"ELEMENTS_PER_THREAD = 1 << (\d+);", (cpu_compiler.SOURCES / "cpu/api.cpp").read_text())
    assert found, "the kernels split their work in another way: size this tensor anew"
    return 1 << int(found[1])


@needs_library
@pytest.mark.parametrize("name", ["q4_0", "int8_g128"])
def test_any_number_of_threads_gives_the_same_bits(name: str) -> None:
    grid = GRIDS[name]
    columns = 128 * 11  # 3 threads share the batches of 2048 elements unevenly, and the last batch is not whole
    rows = (3 * elements_per_thread() // columns + 2) | 1
    assert rows * columns > 3 * elements_per_thread()
    assert rows * columns % 2048
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))
    weight[rows // 2, 7] = weight[0, 0] = weight[-1, -1] = math.nan
    noise, grad = Noise("stochastic", 0.4, 1, 2, 3), gradient(weight, torch.float32)
    scales = torch.empty(rows, columns // grid.block)
    results = []
    for count in (1, 2, 3):
        out, used, masked, by_scale = torch.empty_like(weight), scales.clone(), grad.clone(), scales.clone()
        codes, stored = torch.empty(weight.shape, dtype=torch.int8), torch.empty(scales.shape, dtype=torch.float16)
        decoded = torch.empty_like(weight)
        with threads(count):
            assert native.fake_quantize(weight, None, grid, noise, out, used) == 3
            assert native.fake_quantize_backward(masked, weight, None, grid, noise, by_scale) == 3
            assert native.quantize(weight, None, grid, codes, stored) == 3
            native.dequantize(codes, stored, grid, decoded)
        results.append((out, used, masked, by_scale, codes, stored, decoded))
    check(results[0][0], fake_quantize(weight, None, grid, noise), "reference")
    for more in results[1:]:
        for index, (got, expected) in enumerate(zip(more, results[0], strict=True)):
            check(got, expected, f"result {index}")


# ---------------------------------------------------------------------------------------------------- packing


def bit_stream(fields_NK: np.ndarray, bits: int) -> np.ndarray:
    """Return the bytes of each row's fields, one after the other, lowest bits first."""
    each = fields_NK[..., None] >> np.arange(bits, dtype=np.uint8) & 1
    return np.packbits(each.reshape(len(fields_NK), -1).astype(np.uint8), axis=1, bitorder="little")


def pack_by_bits(codes_NK: np.ndarray, scales_NG: np.ndarray, grid: Grid, layout: str) -> np.ndarray:
    rows, columns = codes_NK.shape
    fields = (codes_NK.astype(np.int16) + (1 << (grid.bits - 1))).astype(np.uint8)
    if layout == "gptq":
        return np.ascontiguousarray(bit_stream(fields, grid.bits).view("<i4").T)
    if layout == "onnx":
        return bit_stream(fields, grid.bits).reshape(rows, columns // grid.block, -1)
    if grid.bits == 4:
        # Elements j and j + 16 of a block share a byte.
        order = np.arange(32).reshape(2, 16).T.reshape(-1)
        stored = bit_stream(fields.reshape(-1, 32)[:, order], 4)
    else:
        stored = codes_NK.reshape(-1, 32).view(np.uint8)
    blocks = np.concatenate([scales_NG.reshape(-1, 1).view(np.uint8), stored], axis=1)
    return blocks.reshape(rows, -1)


@needs_library
@every_grid
@pytest.mark.parametrize("layout", native.LAYOUTS)
@pytest.mark.parametrize(("rows", "groups"), [(1, 1), (3, 2), (65, 3), (130, 1)])
def test_packing_is_the_format_s(grid: Grid, layout: str, rows: int, groups: int) -> None:
    random = np.random.default_rng(rows)
    codes = random.integers(grid.code_min, grid.code_max, (rows, groups * grid.block), np.int8, endpoint=True)
    scales = random.integers(0, 0x7C00, (rows, groups)).astype(np.uint16).view(np.float16)
    tensors = torch.from_numpy(codes), torch.from_numpy(scales)
    if (layout == "gguf" and grid.block != 32) or grid.bits not in (4, 8):
        with pytest.raises(UserError, match=f"layout {layout} cannot hold {rows} x {groups * grid.block} codes"):
            native.pack(*tensors, grid, layout)
        return
    got = native.pack(*tensors, grid, layout).numpy()
    expected = pack_by_bits(codes, scales, grid, layout)
    assert got.dtype == expected.dtype
    np.testing.assert_array_equal(got, expected)


@needs_library
@pytest.mark.parametrize("layout", native.LAYOUTS)
@pytest.mark.parametrize("grid", ["q4_0", "q8_0"])
def test_some_columns_of_a_wider_tensor(grid: str, layout: str) -> None:
    codes = torch.from_numpy(np.random.default_rng(1).integers(-8, 8, (35, 352), np.int8))
    part, scales = codes[:, 96:256], torch.ones(35, 5, dtype=torch.float16)
    assert not part.is_contiguous()
    whole = native.pack(part.contiguous(), scales, GRIDS[grid], layout)
    assert torch.equal(native.pack(part, scales, GRIDS[grid], layout), whole)


@needs_library
def test_the_order_of_nibbles() -> None:
    """Spelled out once: code j is j % 16 - 8, stored as j % 16."""
    codes = (torch.arange(32) % 16 - 8).to(torch.int8).view(1, 32)
    scale = torch.tensor([[-0.5]], dtype=torch.float16)
    grid = GRIDS["q4_0"]
    assert native.pack(codes, scale, grid, "gguf").tolist() == [[0x00, 0xB8, *(17 * j for j in range(16))]]
    words = native.pack(codes, scale, grid, "gptq").numpy().view(np.uint32)
    assert [[f"{word:08x}" for word in row] for row in words] == [["76543210"], ["fedcba98"]] * 2
    pairs = [0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]
    assert native.pack(codes, scale, grid, "onnx").tolist() == [[pairs * 2]]


@needs_library
@pytest.mark.parametrize("layout", native.LAYOUTS)
def test_what_no_layout_holds_is_refused(layout: str) -> None:
    scales = torch.ones(2, 2, dtype=torch.float16)
    three_bits = replace(GRIDS["q4_0"], name="q3", bits=3, code_min=-4, code_max=3)
    with pytest.raises(UserError, match=f"layout {layout} cannot hold 2 x 64 codes of q3"):
        native.pack(torch.zeros(2, 64, dtype=torch.int8), scales, three_bits, layout)
    with pytest.raises(UserError, match=f"layout {layout} cannot hold 2 x 80 codes of q4_0"):
        native.pack(torch.zeros(2, 80, dtype=torch.int8), scales, GRIDS["q4_0"], layout)


# ---------------------------------------------------------------------------------------------------- the library


def test_where_there_is_a_compiler_there_are_kernels() -> None:
    """Else all of these tests would skip, and nobody would see it."""
    try:
        cpu_compiler.find_compiler()
    except cpu_compiler.NativeUnavailable as error:
        pytest.skip(str(error))
    assert native.available() is None


@needs_library
def test_instruction_sets_can_be_forced() -> None:
    names = cpu_compiler.instruction_sets()
    assert names[0] == "portable"
    assert native.instruction_set() in names
    assert native.describe() == f"native, {native.instruction_set()}"
    for missing in set(native.INSTRUCTION_SETS) - set(names):
        with pytest.raises(ValueError, match=f"cannot run {missing}; it can run portable"):
            native.force_instruction_set(missing)


@needs_library
def test_what_the_kernels_can_take() -> None:
    matrix = torch.zeros(4, 64)
    assert native.supports(matrix, None, matrix.half(), matrix.bfloat16())
    assert not native.supports(matrix.t())
    assert not native.supports(matrix, matrix.double())
    assert not native.supports(matrix.to("meta"))
    with pytest.raises(AssertionError):
        native.fake_quantize(matrix.t(), None, GRIDS["q4_0"], Noise(), matrix, None)
    with pytest.raises(AssertionError):
        native.fake_quantize(matrix, torch.ones(4, 3), GRIDS["q4_0"], Noise(), matrix, None)


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Forget the library and give qad an empty cache; return a folder for the compilers of the test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    native._load.cache_clear()
    yield tmp_path
    native._load.cache_clear()


def script(path: Path, *lines: str) -> str:
    path.write_text("\n".join(("#!/bin/sh", *lines, "")))
    path.chmod(0o755)
    return str(path)


# In place of the seconds of a compiler: what is linked is a library that was built before, written in two halves, so
# that whoever loads it before it is whole fails.
QUICK_COMPILER = """
echo "$*" >> {log}
for last; do :; done
case "$*" in
*--version*) echo quick 1.0; exit ;;
*-shared*) while [ "$1" != -o ]; do shift; done
    head -c 20000 {library} > "$2"; sleep 0.3; tail -c +20001 {library} >> "$2" ;;
*) sleep 0.1; : > "$last" ;;
esac
"""


def built_library() -> Path:
    return cpu_compiler.library_path(cpu_compiler.find_compiler())


@needs_library
def test_a_library_is_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log, library = tmp_path / "log", built_library()
    monkeypatch.setenv("CXX", script(tmp_path / "c++", QUICK_COMPILER.format(log=log, library=library)))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    try:
        for _ in range(3):
            native._load.cache_clear()
            assert native.available() is None
        calls = [line for line in log.read_text().splitlines() if "--version" not in line]
        assert sum("-shared " in call for call in calls) == 1
        compiled = len(calls)
        assert compiled >= 3  # each source once, and the library
        assert len(set(calls)) == compiled
        # Another compiler is another library, and so are other sources.
        monkeypatch.setenv("CXX", script(tmp_path / "other", QUICK_COMPILER.format(log=log, library=library)))
        native._load.cache_clear()
        assert native.available() is None
        calls = [line for line in log.read_text().splitlines() if "--version" not in line]
        assert len(calls) == 2 * compiled
        assert len(list((tmp_path / "cache/qad").iterdir())) == 2
        assert not list((tmp_path / "cache/qad").glob("*/.build-*"))
    finally:
        native._load.cache_clear()


EIGHT = """
import hashlib, json, multiprocessing, time, torch
from qad import cpu_compiler, native
from qad.grid import GRIDS
from qad.noise import Noise

def work(index, barrier, answers):
    torch.set_num_threads(1)
    barrier.wait()
    time.sleep(max(0, index - 3) * 0.08)  # four at once, four while the library of these is being written
    reason = native.available()
    digest = None
    if reason is None:
        weight = torch.arange(4096.0).view(8, 512) / 977
        out = torch.empty_like(weight)
        native.fake_quantize(weight, None, GRIDS["q4_0"], Noise("uniform"), out, None)
        digest = hashlib.sha256(out.numpy().tobytes()).hexdigest()
    answers.put((reason, digest))

context = multiprocessing.get_context("fork")
barrier, answers = context.Barrier(8), context.Queue()
processes = [context.Process(target=work, args=(i, barrier, answers)) for i in range(8)]
for process in processes:
    process.start()
found = [answers.get(timeout=60) for _ in processes]
for process in processes:
    process.join(60)
print(json.dumps([found, [process.exitcode for process in processes]]))
"""


def run_python(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env=os.environ | environment,
        cwd=Path(__file__).parents[1],
    )


@needs_library
def test_eight_processes_at_once(tmp_path: Path) -> None:
    log = tmp_path / "log"
    compiler = script(tmp_path / "c++", QUICK_COMPILER.format(log=log, library=built_library()))
    done = run_python(EIGHT, CXX=compiler, XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    answers, codes = json.loads(done.stdout)
    assert codes == [0] * 8
    assert {reason for reason, _ in answers} == {None}
    assert len({digest for _, digest in answers}) == 1
    assert log.read_text().count("-shared ") > 1, "they did not meet: the test shows nothing"
    (folder,) = (tmp_path / "cache/qad").iterdir()
    assert [file.name for file in folder.iterdir()] == ["libqad.so"]


def test_no_compiler(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(fresh))
    reason = native.available()
    assert reason is not None
    assert re.search(r"no C\+\+ compiler found: install g\+\+.*or set CXX", reason)
    with pytest.raises(cpu_compiler.NativeUnavailable, match="no C\\+\\+ compiler"):
        native.library()
    assert native.describe() == f"plain torch ({reason})"


def test_a_compiler_that_is_not_there(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", str(fresh / "missing-c++"))
    reason = native.available()
    assert reason is not None
    assert re.search(r"missing-c\+\+ cannot be run: .*No such file.*; CXX can name another", reason)


def test_a_compiler_that_fails(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", script(fresh / "c++", "echo 'error: flux capacitor missing' >&2", "exit 1"))
    reason = native.available()
    assert reason is not None
    assert "do not compile; CXX can name another" in reason
    assert "flux capacitor missing" in reason
    assert not list((fresh / "cache/qad").glob("*/*"))


def test_a_full_disk_is_not_the_compilers_fault(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = "echo 'Fatal error: cannot write x.o: No space left on device' >&2"
    monkeypatch.setenv("CXX", script(fresh / "c++", said, "exit 1"))
    reason = native.available()
    assert reason is not None
    assert "the disk is full: free some space, or name other places with XDG_CACHE_HOME and TMPDIR" in reason
    assert "CXX" not in reason


@needs_library
def test_a_compiler_older_than_an_instruction(tmp_path: Path) -> None:
    if platform.machine() != "x86_64":
        pytest.skip("the instruction is one of x86-64")
    real, refused = shlex.join(cpu_compiler.find_compiler()), tmp_path / "refused"
    old = script(
        tmp_path / "c++", f'case "$*" in *-mavx512bf16*) echo >> {refused}; exit 1 ;; esac', f'exec {real} "$@"'
    )
    cpu_compiler.build(tmp_path / "kernels.so", [old], sets=["avx512bf16"])
    assert refused.read_text() == "\n"  # asked once, and not for a file
    loaded = native._bind(tmp_path / "kernels.so")
    here = "avx512bf16" in cpu_compiler.instruction_sets()
    assert loaded.qad_has_isa(native.INSTRUCTION_SETS.index("avx512bf16")) == here
    assert not loaded.qad_has_isa(native.INSTRUCTION_SETS.index("avx512"))


def test_a_cache_folder_that_cannot_be_written(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (fresh / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(fresh / "file"))
    monkeypatch.setenv("CXX", script(fresh / "c++", "exit 0"))
    reason = native.available()
    assert reason is not None
    assert re.search(rf"the cache folder is {fresh}/file/qad, and XDG_CACHE_HOME can name another", reason)


@needs_library
@pytest.mark.parametrize("kept", [0, 4, 20000])
def test_a_library_that_is_not_whole_is_built_again(tmp_path: Path, kept: int) -> None:
    # As a machine leaves it that loses its power. In a process of its own: to load such a library can end it.
    library = built_library()
    compiler = script(tmp_path / "c++", QUICK_COMPILER.format(log=tmp_path / "log", library=library))
    program = (
        "from qad import native; from qad.cpu_compiler import find_compiler, library_path; "
        "print(native.available(), library_path(find_compiler()))"
    )
    for attempt in range(2):
        done = run_python(program, CXX=compiler, XDG_CACHE_HOME=str(tmp_path / "cache"))
        assert done.returncode == 0, done.stderr
        reason, path = done.stdout.split()
        assert reason == "None"
        if attempt == 0:
            Path(path).write_bytes(library.read_bytes()[:kept])
    assert (tmp_path / "log").read_text().count("-shared ") == 2


def test_a_compiler_that_makes_nothing(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", script(fresh / "c++", "exit 0"))
    reason = native.available()
    assert reason is not None
    assert re.search(r"libqad\.so.*; the cache folder is .*, and XDG_CACHE_HOME can name another", reason)


@pytest.mark.parametrize("command", ["g++ '", "g++ \\"])
def test_a_command_that_no_shell_understands(fresh: Path, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    monkeypatch.setenv("CXX", command)
    reason = native.available()
    assert reason is not None
    assert f"CXX is no command of a shell: {command} (" in reason


def test_a_compiler_that_speaks_another_encoding(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = (
        'printf "compil\\351 \\n"',
        'case "$*" in *--version*) exit 0 ;; esac',
        'printf "\\351chec\\n" >&2',
        "exit 1",
    )
    monkeypatch.setenv("CXX", script(fresh / "c++", *lines))
    reason = native.available()
    assert reason is not None
    assert "do not compile; CXX can name another" in reason
    assert "\ufffdchec" in reason


def test_a_library_of_another_version_is_refused(fresh: Path) -> None:
    try:
        compiler = cpu_compiler.find_compiler()
    except cpu_compiler.NativeUnavailable as error:
        pytest.skip(str(error))
    source = fresh / "old.cpp"
    source.write_text(f'extern "C" int qad_api_version() {{ return {native.API_VERSION + 1}; }}\n')
    path = cpu_compiler.library_path(compiler)
    path.parent.mkdir(parents=True)
    subprocess.run([*compiler, "-shared", "-fPIC", str(source), "-o", str(path)], check=True)
    cpu_compiler.seal(path)
    reason = native.available()
    assert reason is not None
    assert re.search(rf"{path} speaks version {native.API_VERSION + 1} .*, not {native.API_VERSION}", reason)


def test_a_process_without_kernels_says_so_and_goes_on(tmp_path: Path) -> None:
    program = "from qad import native; print(native.available()); print(native.describe())"
    done = run_python(program, CXX=str(tmp_path / "missing-c++"), XDG_CACHE_HOME=str(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")
    assert "cannot be run" in done.stdout
    assert "plain torch (" in done.stdout


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root can be somebody else")
def test_a_user_without_a_home(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Containers run as users that the machine does not know."""
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME")
    monkeypatch.setenv("CXX", script(fresh / "c++", "exit 0"))
    before = os.getresuid()
    os.setresuid(54321, -1, -1)  # what the home folder is looked up by; what may be done stays root's
    try:
        reason = native.available()
    finally:
        os.setresuid(*before)
    assert reason == "there is no home folder to keep built kernels in: set XDG_CACHE_HOME"
