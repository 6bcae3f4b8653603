"""A million random small shapes: torch reference = scalar code of native_fuzz.cpp = kernels, to the bit.

Shapes: N output features, K input features, G blocks along K.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from qad import cpu_compiler
from qad.fake_quant import fake_quantize, fake_quantize_backward
from qad.grid import Grid
from qad.noise import NOISE_MODES, Noise
from qad.philox import uniform16
from qad.tensor import QuantizedTensor, absmax_scales, damaged_blocks, dequantize, quantize, round_scales
from tests.helpers_native import build_fuzzer, compiler_or_skip, fuzz

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # in the order of csrc/qad.h


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return build_fuzzer(tmp_path_factory.mktemp("fuzz"), compiler_or_skip())


def test_a_million_random_shapes(fuzzer: list[str]) -> None:
    """The million takes half a minute; the large ones are split between threads."""
    outcome = fuzz(fuzzer, "--cases", "1000000", "--large", "5")
    assert not outcome.mismatches, outcome.text
    assert outcome.cases == 1_000_000
    assert outcome.instruction_sets == cpu_compiler.instruction_sets()
    # What makes the comparison worth something did occur.
    assert outcome.damaged > 100_000
    assert outcome.outside > 0.05 * outcome.elements


@pytest.mark.parametrize("on_amd", [0, 1])
def test_small_shapes_as_if_they_came_out_of_memory(tmp_path: Path, on_amd: int) -> None:
    flags = ["-DQAD_STREAMING_ELEMENTS=1", f"-DQAD_AS_ON_AMD={on_amd}"]
    outcome = fuzz(build_fuzzer(tmp_path, compiler_or_skip(), flags), "--cases", "100000", "--large", "2")
    assert not outcome.mismatches, outcome.text
    assert outcome.instruction_sets == cpu_compiler.instruction_sets()


class Reader:
    """Reads numbers off a file, in the order in which ``dump`` of native_fuzz.cpp wrote them."""

    def __init__(self, data: bytes) -> None:
        self.data, self.position = data, 0

    def array(self, dtype: str, count: int) -> np.ndarray:
        values = np.frombuffer(self.data, dtype, count, self.position)
        self.position += values.nbytes
        return values.copy()

    def tensor(self, dtype: torch.dtype, *shape: int) -> Tensor:
        if not (count := int(np.prod(shape))):
            return torch.empty(shape, dtype=dtype)
        return torch.from_numpy(self.array("u1", count * dtype.itemsize)).view(dtype).view(shape)


def cases(data: bytes) -> Iterator[tuple[Grid, Noise, list[int], Reader]]:
    reader = Reader(data)
    while reader.position < len(data):
        header = reader.array("i4", 7).tolist()
        bits, block, low_code, high_code, signed, scale_bits = reader.array("i4", 6).tolist()
        floor, ceiling = reader.array("f4", 2).tolist()
        grid = Grid("case", bits, block, low_code, high_code, bool(signed), scale_bits, floor, ceiling)
        (mode,), (share,) = reader.array("i4", 1).tolist(), reader.array("f4", 1).tolist()
        low, high, tensor, step = reader.array("u4", 4).tolist()
        yield grid, Noise(NOISE_MODES[mode], share, low + (high << 32), tensor, step), header, reader


def same(got: Tensor, expected: Tensor, *, any_nan: bool = False) -> bool:
    """Compare bits; any NaN of a gradient is as good as another: which of two comes out of a sum, no standard says."""
    assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
    if any_nan:
        got, expected = (t.masked_fill(t.isnan(), torch.nan) for t in (got, expected))
    if got.dtype == torch.bfloat16:  # numpy has none
        got, expected = got.view(torch.int16), expected.view(torch.int16)
    return got.numpy().tobytes() == expected.numpy().tobytes()


def test_the_scalar_code_is_the_reference(fuzzer: list[str], tmp_path: Path) -> None:
    outcome = fuzz(fuzzer, "--cases", "700", "--dump", str(tmp_path / "dump"))
    seen = set()
    for grid, noise, (rows, groups, in_index, out_index, grad_index, given, draws), reader in cases(
        (tmp_path / "dump").read_bytes()
    ):
        columns = groups * grid.block
        in_dtype, out_dtype, grad_dtype = DTYPES[in_index], DTYPES[out_index], DTYPES[grad_index]
        (stream,), (damaged_count,) = reader.array("u4", 1).tolist(), reader.array("i8", 1).tolist()
        weight = reader.tensor(in_dtype, rows, columns)
        scales = reader.tensor(torch.float32, rows, groups) if given else None
        grad = reader.tensor(grad_dtype, rows, columns)
        stored_codes = reader.tensor(torch.int8, rows, columns)
        stored_scales = reader.tensor(torch.float16, rows, groups)
        out = reader.tensor(out_dtype, rows, columns)
        used = reader.tensor(torch.float32, rows, groups)
        grad_after = reader.tensor(grad_dtype, rows, columns)
        grad_scales = reader.tensor(torch.float32, rows, groups)
        codes = reader.tensor(torch.int8, rows, columns)
        half_scales = reader.tensor(torch.float16, rows, groups)
        decoded = reader.tensor(out_dtype, rows, columns)
        uniform = reader.tensor(torch.float32, rows * columns if draws else 0)

        expected_used = torch.empty_like(used)
        assert same(fake_quantize(weight, scales, grid, noise, torch.empty_like(out), expected_used), out)
        assert same(expected_used, used)
        by_scale = fake_quantize_backward(grad, weight, scales, grid, noise, learn_scales=True)
        assert same(grad, grad_after, any_nan=True)
        assert by_scale is not None
        assert same(by_scale, grad_scales, any_nan=True)

        rounded = absmax_scales(weight, grid) if scales is None else round_scales(scales, grid)
        damaged = damaged_blocks(weight.float(), rounded, grid)
        assert int(damaged.sum()) == damaged_count
        sound = weight.masked_fill(damaged.repeat_interleave(grid.block, dim=1), 0.0)
        quantized = quantize(sound, grid, rounded.masked_fill(damaged, 1.0))
        assert same(quantized.codes_NK, codes)
        assert same(quantized.scales_NG.masked_fill(damaged, torch.nan), half_scales)
        # Torch converts a NaN to another NaN, which one depends on the tensor's size.
        expected_decoded = dequantize(QuantizedTensor(stored_codes, stored_scales, grid)).to(out_dtype)
        assert same(expected_decoded, decoded, any_nan=True)
        settings = {"seed": noise.seed, "tensor": noise.tensor, "step": noise.step, "stream": stream}
        assert same(uniform16(uniform.numel(), **settings), uniform)
        seen.add((grid.block, in_dtype, out_dtype, grad_dtype, noise.mode, given))
    assert outcome.cases == 700
    assert len(seen) > 300


FAULTS = {
    "of two extremes the negative one": (
        "cpu/elements.h",
        "return bit_xor(rotate_left_1(bits_of(value)), set_words(1))",
        "return rotate_left_1(bits_of(value))",
    ),
    "a scale written too many": (
        "cpu/scales.h",
        "memcpy(used + b, scale + b, (size_t)(blocks - b) * 4)",
        "memcpy(used + b, scale + b, (size_t)(blocks - b) * 4 + 4)",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without this nobody would know that the fuzzer can fail."""
    file, right, wrong = FAULTS[fault]
    sources = shutil.copytree(cpu_compiler.SOURCES, tmp_path / "csrc")
    text = (sources / file).read_text()
    assert text.count(right) == 1, "the kernels were rewritten: plant the fault anew"
    (sources / file).write_text(text.replace(right, wrong))
    monkeypatch.setattr(cpu_compiler, "SOURCES", sources)
    outcome = fuzz(build_fuzzer(tmp_path, compiler_or_skip(), machine="plain"), "--cases", "20000")
    assert outcome.instruction_sets == ["portable"]
    assert outcome.mismatches, outcome.text
