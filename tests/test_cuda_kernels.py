"""The CUDA kernels on a GPU: the bits of the plain-torch reference on the CPU and on the GPU itself.

Needs torch, numpy and pytest alone: ``pytest --noconftest tests/test_cuda_kernels.py`` where the rest is not installed.
"""

import pytest
import torch

from qad import native_cuda
from qad.grid import GRIDS, get_grid
from qad.noise import HARD, NOISE_MODES, Noise
from tests.helpers_kernels import (
    CPU,
    DTYPES,
    assert_same_bits,
    awkward_weights,
    check_divergence,
    check_fake_quantize,
    check_quantize,
    given_scales,
)

CUDA = torch.device("cuda", 0)
SEED = 0xFEDCBA9876543210
PLAIN = [name for name, grid in GRIDS.items() if grid.is_plain]  # what kernels know


@pytest.fixture(autouse=True, scope="module")
def _gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    # With a GPU, kernels that cannot be compiled or loaded are a failure and no reason to skip.
    reason = native_cuda.available(CUDA)
    if reason is not None and "need 8.0" in reason:
        pytest.skip(reason)
    assert reason is None, reason


@pytest.mark.parametrize("reference_device", [CPU, CUDA], ids=str)
@pytest.mark.parametrize("mode", NOISE_MODES)
@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("grid", PLAIN)
def test_fake_quantize(
    grid: str, dtype: torch.dtype, out_dtype: torch.dtype, mode: str, reference_device: torch.device
) -> None:
    for hard_share in (0.0, 0.5, 1.0):
        noise = Noise(mode, hard_share, seed=SEED, tensor=3, step=70000)
        for damaged in (False, True):
            weight = awkward_weights(get_grid(grid), dtype, damaged)
            for scales in (None, given_scales(weight, get_grid(grid), damaged)):
                for shift in (0, 1, 2):
                    check_fake_quantize(weight, scales, get_grid(grid), noise, out_dtype, CUDA, shift, reference_device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("grid", PLAIN)
def test_quantize(grid: str, dtype: torch.dtype) -> None:
    for damaged in (False, True):
        weight = awkward_weights(get_grid(grid), dtype, damaged)
        for scales in (None, given_scales(weight, get_grid(grid), damaged)):
            for shift in (0, 1):
                check_quantize(weight, scales, get_grid(grid), CUDA, shift, damaged)


@pytest.mark.parametrize("mode", NOISE_MODES)
@pytest.mark.parametrize("grid", PLAIN)
def test_a_tensor_over_which_the_whole_gpu_strides(grid: str, mode: str) -> None:
    # More than 32 tiles of 256 elements for each warp of the largest GPUs, and a tail.
    rows = 40_000_000 // 1024 + 1
    weight = torch.randn(rows, 1024, device=CUDA, generator=torch.Generator(CUDA).manual_seed(1))
    noise = Noise(mode, 0.4, SEED, 1, 2)
    check_fake_quantize(weight, None, get_grid(grid), noise, torch.bfloat16, CUDA, 0, CUDA)


def test_masters_at_every_bf16_and_f16_number() -> None:
    everything = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(-1, 128)
    for dtype in (torch.bfloat16, torch.float16):
        weight = everything.view(dtype)
        for grid in map(get_grid, PLAIN):
            for out_dtype in DTYPES:
                check_fake_quantize(weight, None, grid, HARD, out_dtype, CUDA)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocabulary", [1, 7, 4096, 49152, 50257, 151_936])
@pytest.mark.parametrize("kind", native_cuda.DIVERGENCES)
def test_divergence(kind: str, vocabulary: int, dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(vocabulary)
    tokens = 5
    labels = torch.tensor([0, -100, vocabulary - 1, vocabulary // 2, -100])
    for closeness in (10.0, 1.0, 0.1):
        teacher = torch.randn(tokens, vocabulary, generator=random) * 4
        student = teacher + closeness * torch.randn(tokens, vocabulary, generator=random) + 3.0
        for temperature, weight in ((1.0, 0.0), (2.0, 0.25)):
            for padding in (0, 1):
                check_divergence(
                    student.to(dtype),
                    teacher.to(dtype),
                    labels,
                    CUDA,
                    kind=kind,
                    temperature=temperature,
                    next_token_weight=weight,
                    padding=padding,
                )


def test_divergence_of_more_rows_than_the_gpu_runs_at_a_time() -> None:
    random = torch.Generator().manual_seed(1)
    student, teacher = torch.randn(2, 5000, 600, generator=random)
    labels = torch.randint(-1, 600, (5000,), generator=random)
    check_divergence(student, teacher, labels.where(labels >= 0, -100), CUDA, kind="forward", next_token_weight=1.0)


def test_kernels_run_on_the_current_stream_and_in_graphs() -> None:
    grid = get_grid("q4_0")
    weight = torch.randn(4096, 1024, device=CUDA)
    expected = torch.empty_like(weight)
    native_cuda.fake_quantize(weight, None, grid, HARD, expected)
    master, out = torch.zeros_like(weight), torch.empty_like(weight)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        native_cuda.fake_quantize(master, None, grid, HARD, out)
    master.copy_(weight)
    graph.replay()
    assert_same_bits(out, expected, "weights from a graph")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        master.neg_()
        native_cuda.fake_quantize(master, None, grid, HARD, out)
    stream.synchronize()
    again = torch.empty_like(weight)
    native_cuda.fake_quantize(-weight, None, grid, HARD, again)
    assert_same_bits(out, again, "weights from a stream")


def test_the_description_names_compiler_and_gpu() -> None:
    major, minor = torch.cuda.get_device_capability(CUDA)
    assert native_cuda.describe(CUDA).startswith("native, ")
    assert f"{major}{minor}" in native_cuda.describe(CUDA) or "compute_" in native_cuda.describe(CUDA)
