"""The CUDA sources without a GPU: they compile for every GPU, nothing spills, and an emulation gives the right bits."""

import ctypes
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from qad import cuda_compiler, cuda_driver, native_cuda
from qad import divergence as plain
from qad.cpu_compiler import SOURCES, NativeUnavailable
from qad.grid import GRIDS, get_grid
from qad.noise import NOISE_MODES, Noise
from tests.helpers_kernels import (
    CPU,
    DTYPES,
    assert_same_bits,
    awkward_weights,
    bits,
    check_divergence,
    check_fake_quantize,
    check_quantize,
    given_scales,
)

CAPABILITIES = (80, 87, 89, 90, 110, 121)  # A100, Orin, RTX 40, H100, Thor, DGX Spark
KERNELS = {source.name: list(source.kernels) for source in native_cuda.sources()}
FILES = list(KERNELS)
SEED = 0xFEDCBA9876543210
PLAIN = [name for name, grid in GRIDS.items() if grid.is_plain]  # what kernels know

every_file = pytest.mark.parametrize("source", FILES)


def test_every_source_file_is_loaded() -> None:
    assert sorted(file.stem for file in (SOURCES / "cuda").glob("*.cu")) == sorted(FILES)


@every_file
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_nvcc_compiles_without_warnings_and_nothing_spills(source: str, capability: int, tmp_path: Path) -> None:
    nvcc = cuda_compiler.nvcc_path()
    if nvcc is None:
        pytest.skip("no nvcc: pip install nvidia-cuda-nvcc")
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    if f"sm_{capability}" not in known:
        pytest.skip(f"this nvcc does not know sm_{capability}")
    command = [nvcc, *cuda_compiler.OPTIONS, "--cubin", f"--gpu-architecture=sm_{capability}", "-Xptxas", "-v"]
    command += ["-Werror", "all-warnings", "-o", str(tmp_path / "code"), str(SOURCES / f"cuda/{source}.cu")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    report = done.stdout + done.stderr
    assert done.returncode == 0, report
    assert "warning" not in report
    compiled = re.findall(r"Compiling entry function '(\w+)'", report)
    assert sorted(compiled) == sorted(KERNELS[source])
    memory = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert len(memory) >= len(compiled)
    assert set(memory) == {("0", "0", "0")}, report


# The code generator is nvcc's own; what can differ is the language and the headers, so the two ends will do.
@every_file
@pytest.mark.parametrize("capability", [CAPABILITIES[0], CAPABILITIES[-1]])
def test_nvrtc_compiles_without_a_word(source: str, capability: int) -> None:
    compiler = cuda_compiler.find_nvrtc()
    if compiler is None:
        pytest.skip("no NVRTC: pip install nvidia-cuda-nvrtc")
    target = cuda_compiler.target_for(capability, compiler.architectures())
    image, log = compiler.compile(SOURCES / f"cuda/{source}.cu", target)
    assert log == ""
    for name in KERNELS[source]:
        assert re.search(rb"\b" + name.encode() + rb"\b", image), name


def test_a_gpu_newer_than_the_compiler_gets_portable_code() -> None:
    assert cuda_compiler.target_for(90, [75, 80, 90, 100]) == "sm_90"
    assert cuda_compiler.target_for(121, [75, 80, 90, 100]) == "compute_100"
    with pytest.raises(NativeUnavailable, match=r"7\.5; the kernels need 8\.0"):
        cuda_compiler.target_for(75, [75, 80])


class CountingCompiler:
    """A compiler that counts how often it is asked."""

    name = "a compiler that counts"
    asked = 0

    def architectures(self) -> list[int]:
        return [90]

    def compile(self, source: Path, target: str) -> tuple[bytes, str]:
        self.asked += 1
        return f"{source.name} for {target}".encode(), ""


def test_code_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiler = CountingCompiler()
    first = cuda_compiler.compile_source("divergence", 90, compiler)
    second = cuda_compiler.compile_source("divergence", 90, compiler)
    assert (first.cached, second.cached, compiler.asked) == (False, True, 1)
    assert first.image == second.image == b"divergence.cu for sm_90"
    cuda_compiler.compile_source("fake_quant", 90, compiler)
    assert compiler.asked == 2
    assert not list(tmp_path.rglob(".*")), "temporary files are left behind"


def test_an_unwritable_cache_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    code = cuda_compiler.compile_source("divergence", 90, CountingCompiler())
    assert (code.image, code.cached) == (b"divergence.cu for sm_90", False)


def test_without_cuda_the_reason_is_given() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    reason = native_cuda.available()
    assert reason is not None
    assert reason in native_cuda.describe()


# --- the kernels themselves, run by tests/cuda_emulation.h -----------------------------------------------------------


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ctypes.CDLL]:
    """Compile the kernels for this CPU."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++: the kernels cannot be emulated")
    folder = tmp_path_factory.mktemp("emulation")
    loaded: dict[str, ctypes.CDLL] = {}
    for source in FILES:
        command = [compiler, "-std=c++17", "-O1", "-ffp-contract=off", "-shared", "-fPIC", "-Wall", "-Wextra"]
        command += ["-Wno-unknown-pragmas", "-Werror", "-include", str(Path(__file__).with_name("cuda_emulation.h"))]
        command += ["-o", str(folder / f"{source}.so"), "-x", "c++", str(SOURCES / f"cuda/{source}.cu")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        loaded[source] = ctypes.CDLL(str(folder / f"{source}.so"))
    return loaded


@pytest.fixture
def emulated(libraries: dict[str, ctypes.CDLL], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ``native_cuda`` launch on the emulation, at most two CTAs at a time, so that they have to stride."""

    def run(device: torch.device, launch: cuda_driver.Launch) -> None:
        assert device == CPU
        source = next(name for name, kernels in KERNELS.items() if launch.kernel in kernels)
        kernel = getattr(libraries[source], launch.kernel)
        # A row takes any number of threads, and fewer switch faster.
        threads = 128 if source == "divergence" else launch.threads
        assert kernel(ctypes.byref(launch.arguments), min(launch.ctas, 2), threads) == 0

    monkeypatch.setattr(native_cuda, "_run", run)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("grid", PLAIN)
def test_emulated_fake_quantize(grid: str, dtype: torch.dtype, out_dtype: torch.dtype) -> None:
    case = 0
    for mode in NOISE_MODES:
        for hard_share in (0.0, 0.5, 1.0):
            noise = Noise(mode, hard_share, seed=SEED, tensor=3, step=70000)
            case += 1
            damaged = case % 2 == 0
            weight = awkward_weights(get_grid(grid), dtype, damaged)
            scales = given_scales(weight, get_grid(grid), damaged)
            for given in (None, scales):
                check_fake_quantize(weight, given, get_grid(grid), noise, out_dtype, CPU, shift=case % 3)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("grid", PLAIN)
def test_emulated_quantize(grid: str, dtype: torch.dtype) -> None:
    for damaged in (False, True):
        weight = awkward_weights(get_grid(grid), dtype, damaged)
        scales = given_scales(weight, get_grid(grid), damaged)
        for shift in (0, 1):
            check_quantize(weight, None, get_grid(grid), CPU, shift, damaged)
            check_quantize(weight, scales, get_grid(grid), CPU, shift, damaged)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("grid", ["q4_0", "int8_g64", "int4_g128"])
def test_emulated_draws_reach_beyond_32_tiles_of_a_warp(grid: str) -> None:
    # Two CTAs are 16 warps of 256 elements; a warp draws for its next 32 tiles at once.
    columns = 1024
    weight = torch.randn(16 * 256 * 33 // columns + 3, columns, generator=torch.Generator().manual_seed(4))
    check_fake_quantize(weight, None, get_grid(grid), Noise("uniform", 0.4, 5, 6, 7), torch.bfloat16, CPU)


@pytest.mark.usefixtures("emulated")
def test_emulated_grid_that_is_in_no_table() -> None:
    odd = replace(get_grid("q4_0"), name="odd", scale_bits=5, scale_ceiling=63488.0, signed_scale=False)
    weight = awkward_weights(odd, torch.float32, damaged=True)
    check_fake_quantize(weight, None, odd, Noise("stochastic", 0.1), torch.float32, CPU)


@pytest.mark.usefixtures("emulated")
def test_emulated_gradients_that_are_not_finite_stay_where_they_are() -> None:
    grid = get_grid("q4_0")
    weight = torch.full((1, 64), 0.5)
    grad = torch.zeros(1, 64)
    grad[0, 1], grad[0, 2] = torch.nan, torch.inf
    before, by_scale = grad.clone(), torch.zeros(1, 2)
    native_cuda.fake_quantize_backward(grad, weight, torch.full((1, 2), 0.125), grid, Noise(), by_scale)
    assert_same_bits(grad, before, "gradient")
    assert by_scale.isnan().tolist() == [[True, False]]


@pytest.mark.usefixtures("emulated")
def test_emulated_nothing() -> None:
    empty = torch.empty(0, 32)
    native_cuda.fake_quantize(empty, None, get_grid("q4_0"), Noise(), empty)
    value, nll = native_cuda.divergence(
        empty, empty, None, kind="jsd", beta=0.5, temperature=1.0, next_token_weight=0.0, keep_logits=False
    )
    assert value.shape == nll.shape == (0,)


def logits(tokens: int, vocabulary: int, closeness: float, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return student's and teacher's logits; they differ by ``closeness`` times a normal number, and by a constant."""
    random = torch.Generator().manual_seed(vocabulary)
    teacher = torch.randn(tokens, vocabulary, generator=random) * 4
    student = teacher + closeness * torch.randn(tokens, vocabulary, generator=random) + 3.0
    return student.to(dtype), teacher.to(dtype)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", native_cuda.DIVERGENCES)
def test_emulated_divergence(kind: str, dtype: torch.dtype) -> None:
    labels = torch.tensor([5, -100, 0])
    for vocabulary, padding in ((1024, 0), (1024, 1), (1003, 0), (7, 0)):
        for temperature, weight in ((1.0, 0.0), (2.0, 0.25)):
            for closeness in (10.0, 1.0, 0.1):
                student, teacher = logits(3, vocabulary, closeness, dtype)
                rest = {"kind": kind, "temperature": temperature, "next_token_weight": weight, "padding": padding}
                check_divergence(student, teacher, labels, CPU, **rest)


@pytest.mark.usefixtures("emulated")
def test_emulated_divergence_shows_a_label_out_of_range() -> None:
    student, teacher = logits(2, 100, 1.0, torch.float32)
    _, nll = native_cuda.divergence(
        student,
        teacher,
        torch.tensor([100, 99]),
        kind="forward",
        beta=0.5,
        temperature=1.0,
        next_token_weight=0.0,
        keep_logits=True,
    )
    assert nll.isnan().tolist() == [True, False]


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("kind", native_cuda.DIVERGENCES)
def test_emulated_entries_that_both_models_mask_are_as_if_they_were_not_there(kind: str) -> None:
    rest = {"kind": kind, "beta": 0.3, "temperature": 2.0, "next_token_weight": 0.25, "keep_logits": False}
    labels = torch.tensor([5, -100, 0])
    for padding in (20, 1000):  # a tail and whole chunks
        student, teacher = logits(3, 80, 1.0, torch.float32)
        masked, masked_teacher = (F.pad(part, (0, padding), value=-torch.inf) for part in (student, teacher))
        expected = native_cuda.divergence(student, teacher, labels, **rest)
        actual = native_cuda.divergence(masked, masked_teacher, labels, **rest)
        torch.testing.assert_close(actual[0], expected[0], rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(actual[1], expected[1], rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(masked[:, :80], student, rtol=1e-5, atol=1e-7)
        assert not masked[:, 80:].any()


@pytest.mark.usefixtures("emulated")
def test_emulated_divergence_of_what_one_model_rules_out() -> None:
    """Infinite where the definition says so, finite where it does not."""
    full, holed = torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([[0.0, -torch.inf, 2.0]])
    rest = {"beta": 0.5, "temperature": 1.0, "next_token_weight": 0.3, "keep_logits": False}
    for kind, student, teacher in [
        (kind, *pair) for kind in native_cuda.DIVERGENCES for pair in ((holed, full), (full, holed))
    ]:
        expected, actual = student.clone(), student.clone()
        value, _ = plain.divergence(expected, teacher, torch.tensor([0]), kind=kind, **rest)
        got, nll = native_cuda.divergence(actual, teacher, torch.tensor([0]), kind=kind, **rest)
        torch.testing.assert_close(got, value, rtol=1e-6, atol=0.0)
        assert bool(torch.isfinite(nll).all())
        if bool(torch.isfinite(value)):
            torch.testing.assert_close(actual, expected, rtol=0.0, atol=1e-6)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("kind", native_cuda.DIVERGENCES)
def test_emulated_nan_spreads_over_its_row_and_no_further(kind: str) -> None:
    rest = {"kind": kind, "beta": 0.5, "temperature": 1.0, "next_token_weight": 0.0, "keep_logits": False}
    for damaged in (0, 1):
        pair = logits(3, 50, 1.0, torch.float32)
        pair[damaged][1, 33] = torch.nan
        value, _ = native_cuda.divergence(*pair, None, **rest)
        assert value.isnan().tolist() == [False, True, False]
        assert pair[0].isnan().all(dim=1).tolist() == [False, True, False]
        assert pair[0].isnan().any(dim=1).tolist() == [False, True, False]


def test_bits_tell_zeros_apart() -> None:
    assert not torch.equal(bits(torch.tensor([0.0])), bits(torch.tensor([-0.0])))
