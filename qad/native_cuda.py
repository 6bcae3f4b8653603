"""The kernels of csrc/cuda: compiled for the GPU at hand on first use, cached, launched through the driver's own API.

Nothing happens on import. The compiler is NVRTC, called through ctypes: every CUDA build of torch brings it along, it
needs no toolkit, no headers and no host compiler, and compiles without a GPU. Where it is missing, an nvcc on the PATH
does the same. The result is machine code for one kind of GPU; where the compiler is older than the GPU, PTX that the
driver finishes. It is kept in the user's cache folder under a hash of sources, options and compiler, written to a
temporary file and renamed, so that processes which start at once can share it without a lock.

Modules are loaded into the primary context, the one torch uses, and kernels are launched on torch's current stream, so
that they are ordered with everything else and can be captured in graphs. What is given up: Windows, and GPUs older than
compute capability 8.0, which have no instruction to round to bfloat16.

Shapes: N output features, K input features, G blocks along K, T tokens, V vocabulary.
"""

import contextlib
import ctypes
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from qad.grid import Grid
from qad.native import SOURCES, NativeUnavailable, cache_folder
from qad.noise import HARD, NOISE_MODES, Noise

DIVERGENCES = ("forward", "reverse", "jsd")
MINIMUM_CAPABILITY = 80
# Each product and sum rounds on its own, as in the reference.
OPTIONS = ("--std=c++17", "--fmad=false")
_TYPES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
_LOGITS = (torch.float32, torch.bfloat16)
_BLOCK_THREADS, _ROW_THREADS = 256, 1024
_OCTET = 8  # elements of a thread


class BlockArguments(ctypes.Structure):
    """The struct of that name in csrc/cuda/fake_quant.cu."""

    _fields_ = (
        ("weights", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("scales_out", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("codes", ctypes.c_void_p),
        ("stored_scales", ctypes.c_void_p),
        ("damaged", ctypes.c_void_p),
        ("blocks", ctypes.c_int64),
        ("code_min", ctypes.c_float),
        ("code_max", ctypes.c_float),
        ("scale_bits", ctypes.c_uint32),
        ("signed_scale", ctypes.c_uint32),
        ("floor_bits", ctypes.c_uint32),
        ("ceiling_bits", ctypes.c_uint32),
        ("lanes_log2", ctypes.c_uint32),
        ("mode", ctypes.c_uint32),
        ("hard_share", ctypes.c_float),
        ("seed_low", ctypes.c_uint32),
        ("seed_high", ctypes.c_uint32),
        ("tensor", ctypes.c_uint32),
        ("step", ctypes.c_uint32),
        ("aligned", ctypes.c_uint32),
    )


class RowArguments(ctypes.Structure):
    """The struct of that name in csrc/cuda/divergence.cu."""

    _fields_ = (
        ("student", ctypes.c_void_p),
        ("teacher", ctypes.c_void_p),
        ("labels", ctypes.c_void_p),
        ("divergence", ctypes.c_void_p),
        ("nll", ctypes.c_void_p),
        ("student_stride", ctypes.c_int64),
        ("teacher_stride", ctypes.c_int64),
        ("tokens", ctypes.c_int64),
        ("vocabulary", ctypes.c_int64),
        ("beta", ctypes.c_float),
        ("temperature", ctypes.c_float),
        ("next_token_weight", ctypes.c_float),
        ("keep_logits", ctypes.c_uint32),
    )


@dataclass(frozen=True)
class Launch:
    """One kernel launch.

    Attributes:
        source: Name of the file in csrc/cuda, without suffix.
        kernel: Name of the function.
        arguments: Its one argument.
        threads: Threads of a CTA.
        ctas: CTAs after which more would find nothing to do; fewer take turns.
    """

    source: str
    kernel: str
    arguments: ctypes.Structure
    threads: int
    ctas: int


def kernel_names() -> dict[str, list[str]]:
    """Return the kernels of each source file."""
    names: list[str] = []
    for master in _TYPES.values():
        names += [f"qad_quantize_{master}", f"qad_dequantize_{master}"]
        for other in _TYPES.values():
            names += [f"qad_fake_quantize_{master}_{other}_{mode}" for mode in NOISE_MODES]
            names += [f"qad_fake_quantize_backward{scales}_{master}_{other}" for scales in ("", "_scales")]
    rows = [f"qad_divergence_{kind}_{_TYPES[dtype]}" for kind in DIVERGENCES for dtype in _LOGITS]
    return {"fake_quant": names, "divergence": rows}


# --- compilers -------------------------------------------------------------------------------------------------------


class Compiler(Protocol):
    """What turns a source file into a GPU's code."""

    name: str  # with its version: part of the cache's key

    def architectures(self) -> list[int]:
        """Return the compute capabilities it knows, times ten."""
        ...

    def compile(self, source: Path, target: str) -> tuple[bytes, str]:
        """Return code for ``sm_90`` or PTX for ``compute_90``, and warnings.

        Raises:
            NativeUnavailable: It does not compile; the message holds the log.
        """
        ...


class Nvrtc:
    """NVIDIA's run-time compiler.

    Args:
        path: The library.
    """

    def __init__(self, path: str) -> None:
        # It opens its second half by name alone, which the loader finds only if somebody has loaded it before.
        for half in Path(path).parent.glob("libnvrtc-builtins.so.*") if "/" in path else ():
            with contextlib.suppress(OSError):
                ctypes.CDLL(str(half))
        self._library = ctypes.CDLL(path)
        self._library.nvrtcGetErrorString.restype = ctypes.c_char_p
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
        self.name = f"NVRTC {major.value}.{minor.value}"

    def _call(self, function: str, *arguments: Any) -> None:
        if status := getattr(self._library, function)(*arguments):
            raise NativeUnavailable(f"{function}: {self._library.nvrtcGetErrorString(status).decode()}")

    def architectures(self) -> list[int]:
        """See ``Compiler``."""
        count = ctypes.c_int()
        self._call("nvrtcGetNumSupportedArchs", ctypes.byref(count))
        found = (ctypes.c_int * count.value)()
        self._call("nvrtcGetSupportedArchs", found)
        return list(found)

    def _read(self, program: ctypes.c_void_p, what: str) -> bytes:
        size = ctypes.c_size_t()
        self._call(f"nvrtcGet{what}Size", program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        self._call(f"nvrtcGet{what}", program, buffer)
        return buffer.raw

    def compile(self, source: Path, target: str) -> tuple[bytes, str]:
        """See ``Compiler``."""
        options = [*OPTIONS, f"--gpu-architecture={target}", f"--include-path={source.parent}"]
        program = ctypes.c_void_p()
        text, name = source.read_bytes(), source.name.encode()
        self._call("nvrtcCreateProgram", ctypes.byref(program), text, name, 0, None, None)
        try:
            encoded = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
            status = self._library.nvrtcCompileProgram(program, len(options), encoded)
            log = self._read(program, "ProgramLog").rstrip(b"\0\n").decode(errors="replace")
            if status:
                raise NativeUnavailable(f"{self.name} cannot compile {source} for {target}:\n{log}")
            return self._read(program, "CUBIN" if target.startswith("sm_") else "PTX"), log
        finally:
            self._library.nvrtcDestroyProgram(ctypes.byref(program))


class Nvcc:
    """NVIDIA's compiler of the toolkit, which needs a host compiler beside it.

    Args:
        path: The program.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        release = re.search(r"release ([\d.]+)", self._run("--version"))
        self.name = f"nvcc {release[1] if release else 'of unknown version'}"

    def _run(self, *arguments: str) -> str:
        try:
            done = subprocess.run([self._path, *arguments], capture_output=True, text=True, check=False)
        except OSError as error:
            raise NativeUnavailable(f"{self._path} cannot be run: {error}") from None
        if done.returncode:
            raise NativeUnavailable(f"{self._path} failed:\n{done.stderr.strip() or done.stdout.strip()}")
        return done.stdout + done.stderr

    def architectures(self) -> list[int]:
        """See ``Compiler``."""
        return [int(number) for number in re.findall(r"^sm_(\d+)$", self._run("--list-gpu-code"), re.MULTILINE)]

    def compile(self, source: Path, target: str) -> tuple[bytes, str]:
        """See ``Compiler``."""
        kind = "--cubin" if target.startswith("sm_") else "--ptx"
        with tempfile.TemporaryDirectory(prefix="qad-nvcc-") as folder:
            output = Path(folder) / "code"
            log = self._run(*OPTIONS, kind, f"--gpu-architecture={target}", "-o", str(output), str(source))
            return output.read_bytes(), log.strip()


def _nvrtc_libraries() -> list[str]:
    """Return where NVRTC may be, best first: torch's own packages, the loader's path, a toolkit."""
    found: list[str] = []
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        found += sorted(str(file) for file in Path(folder).glob("*/lib/libnvrtc.so.*"))
    found += ["libnvrtc.so.13", "libnvrtc.so.12"]
    toolkit = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    found += sorted(str(file) for file in toolkit.glob("lib64/libnvrtc.so.*"))
    found = [path for path in found if re.search(r"libnvrtc\.so\.\d+$", path)]
    # The version of torch's own CUDA first: that is the one the driver is known to work with.
    major = (torch.version.cuda or "").partition(".")[0]
    return sorted(found, key=lambda path: not path.endswith(f".so.{major}"))


@cache
def find_nvrtc() -> Nvrtc | None:
    """Return the run-time compiler, None if there is none."""
    for path in _nvrtc_libraries():
        with contextlib.suppress(OSError, AttributeError, NativeUnavailable):
            return Nvrtc(path)
    return None


@cache
def find_nvcc() -> Nvcc | None:
    """Return the toolkit's compiler, None if there is none."""
    toolkit = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"
    path = shutil.which("nvcc") or shutil.which("nvcc", path=toolkit)
    with contextlib.suppress(NativeUnavailable):
        return Nvcc(path) if path else None
    return None


def target_for(capability: int, known: Sequence[int]) -> str:
    """Return what to compile for: the GPU itself, or PTX of the newest kind before it that the compiler knows.

    Args:
        capability: Compute capability of the GPU, times ten.
        known: Those that the compiler knows.

    Raises:
        NativeUnavailable: The GPU is too old, or the compiler.
    """
    if capability < MINIMUM_CAPABILITY:
        raise NativeUnavailable(f"the GPU is of compute capability {capability / 10}; the kernels need 8.0 (Ampere)")
    if capability in known:
        return f"sm_{capability}"
    older = [number for number in known if MINIMUM_CAPABILITY <= number < capability]
    if not older:
        raise NativeUnavailable(f"the CUDA compiler knows no GPU of compute capability 8.0 to {capability / 10}")
    return f"compute_{max(older)}"


@dataclass(frozen=True)
class Code:
    """A compiled source file.

    Attributes:
        image: Machine code or PTX.
        origin: Compiler and target, for people.
        cached: Whether it was found in the cache folder.
    """

    image: bytes
    origin: str
    cached: bool


def compile_source(source: str, capability: int, compiler: Compiler | None = None) -> Code:
    """Return a source file's code, from the cache if it holds it. Needs no GPU.

    Args:
        source: Name of the file in csrc/cuda, without suffix.
        capability: Compute capability, times ten.
        compiler: NVRTC if None, else nvcc.

    Raises:
        NativeUnavailable: No compiler, or it fails.
    """
    compiler = compiler or find_nvrtc() or find_nvcc()
    if compiler is None:
        raise NativeUnavailable(
            "no CUDA compiler: pip install nvidia-cuda-nvrtc (CUDA 13) or nvidia-cuda-nvrtc-cu12, "
            "or put the toolkit's nvcc on the PATH"
        )
    target = target_for(capability, compiler.architectures())
    digest = hashlib.sha256(repr((compiler.name, OPTIONS)).encode())
    for file in sorted([*SOURCES.glob("*.h"), *SOURCES.glob("cuda/*.cuh"), SOURCES / f"cuda/{source}.cu"]):
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    path = cache_folder() / f"cuda-{digest.hexdigest()[:16]}" / f"{source}.{target}"
    origin = f"{compiler.name} for {target}"
    with contextlib.suppress(OSError):
        return Code(path.read_bytes(), origin, cached=True)
    image, _ = compiler.compile(SOURCES / f"cuda/{source}.cu", target)
    # A cache folder that cannot be written costs time on the next start, nothing else.
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(image)
            Path(temporary).replace(path)
        finally:
            Path(temporary).unlink(missing_ok=True)
    return Code(image, origin, cached=False)


# --- driver ----------------------------------------------------------------------------------------------------------


@cache
def _driver() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise NativeUnavailable(f"no NVIDIA driver: {error}") from None
    # Handles are pointers: without these declarations ctypes would cut them to 32 bits.
    pointer, number = ctypes.c_void_p, ctypes.c_uint
    library.cuDevicePrimaryCtxRetain.argtypes = [ctypes.POINTER(pointer), ctypes.c_int]
    library.cuCtxPushCurrent_v2.argtypes = [pointer]
    library.cuCtxPopCurrent_v2.argtypes = [ctypes.POINTER(pointer)]
    library.cuModuleLoadData.argtypes = [ctypes.POINTER(pointer), ctypes.c_char_p]
    library.cuModuleGetFunction.argtypes = [ctypes.POINTER(pointer), pointer, ctypes.c_char_p]
    library.cuOccupancyMaxActiveBlocksPerMultiprocessor.argtypes = [
        ctypes.POINTER(ctypes.c_int),
        pointer,
        ctypes.c_int,
        ctypes.c_size_t,
    ]
    library.cuLaunchKernel.argtypes = [pointer, *[number] * 7, pointer, ctypes.POINTER(pointer), pointer]
    library.cuGetErrorString.argtypes = [ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)]
    return library


def _check(status: int, what: str) -> None:
    if status:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(status, ctypes.byref(text))
        raise NativeUnavailable(f"{what}: {(text.value or b'unknown error').decode()} (CUDA error {status})")


@dataclass(frozen=True)
class _Kernel:
    function: ctypes.c_void_p
    resident_ctas: int  # that the whole GPU runs at a time


class _Gpu:
    """One GPU: its context, the modules loaded into it, their kernels."""

    def __init__(self, index: int) -> None:
        torch.cuda.init()
        self._index = index
        major, minor = torch.cuda.get_device_capability(index)
        self._capability = 10 * major + minor
        # torch numbers the devices that CUDA_VISIBLE_DEVICES leaves, and so does the driver.
        device, self._context = ctypes.c_int(), ctypes.c_void_p()
        _check(_driver().cuInit(0), "cuInit")
        _check(_driver().cuDeviceGet(ctypes.byref(device), index), "cuDeviceGet")
        _check(_driver().cuDevicePrimaryCtxRetain(ctypes.byref(self._context), device), "cuDevicePrimaryCtxRetain")
        self._kernels: dict[str, _Kernel] = {}
        self.codes: dict[str, Code] = {}
        for source, names in kernel_names().items():
            self._load(source, names)

    @contextlib.contextmanager
    def _current(self) -> Iterator[None]:
        """Make this GPU's context the current one: a thread of autograd may not have any yet."""
        _check(_driver().cuCtxPushCurrent_v2(self._context), "cuCtxPushCurrent")
        try:
            yield
        finally:
            _driver().cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))

    def _load(self, source: str, names: list[str]) -> None:
        code = self.codes[source] = compile_source(source, self._capability)
        threads = _BLOCK_THREADS if source == "fake_quant" else _ROW_THREADS
        processors = torch.cuda.get_device_properties(self._index).multi_processor_count
        with self._current():
            module = ctypes.c_void_p()
            # PTX is text and must end with a zero, which a cubin does not mind.
            status = _driver().cuModuleLoadData(ctypes.byref(module), code.image + b"\0")
            _check(status, f"the driver cannot load what {code.origin} compiled; a newer driver may")
            for name in names:
                function, resident = ctypes.c_void_p(), ctypes.c_int()
                _check(_driver().cuModuleGetFunction(ctypes.byref(function), module, name.encode()), name)
                _check(
                    _driver().cuOccupancyMaxActiveBlocksPerMultiprocessor(ctypes.byref(resident), function, threads, 0),
                    name,
                )
                if not resident.value:
                    raise NativeUnavailable(f"{name} does not fit on this GPU with {threads} threads")
                self._kernels[name] = _Kernel(function, resident.value * processors)

    def run(self, launch: Launch) -> None:
        kernel = self._kernels[launch.kernel]
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(launch.arguments))
        stream = torch.cuda.current_stream(self._index).cuda_stream
        ctas = min(launch.ctas, kernel.resident_ctas)
        with self._current():
            status = _driver().cuLaunchKernel(
                kernel.function, ctas, 1, 1, launch.threads, 1, 1, 0, stream, pointers, None
            )
        _check(status, launch.kernel)


@cache
def _gpu(index: int) -> _Gpu | str:
    """Return a GPU, its kernels loaded, or why they cannot be. Asked once per process."""
    try:
        return _Gpu(index)
    except NativeUnavailable as error:
        return str(error)


def _index_of(device: torch.device | None) -> int:
    return torch.cuda.current_device() if device is None or device.index is None else device.index


def available(device: torch.device | None = None) -> str | None:
    """Return None if the kernels can run on a GPU, else the reason.

    The first call on a machine compiles for some seconds.
    """
    if torch.version.cuda is None:
        return "this torch is built without CUDA: install a CUDA build of it"
    if not torch.cuda.is_available():
        return "no usable GPU: nvidia-smi says more"
    loaded = _gpu(_index_of(device))
    return loaded if isinstance(loaded, str) else None


def describe(device: torch.device | None = None) -> str:
    """Return in a few words which kernels run on a GPU, or why none do."""
    if reason := available(device):
        return f"plain torch ({reason})"
    gpu = _gpu(_index_of(device))
    assert isinstance(gpu, _Gpu)
    codes = list(gpu.codes.values())
    return f"native, {codes[0].origin}, {'cached' if all(code.cached for code in codes) else 'compiled just now'}"


def _run(device: torch.device, launch: Launch) -> None:
    assert device.type == "cuda", device
    gpu = _gpu(_index_of(device))
    if isinstance(gpu, str):
        raise NativeUnavailable(gpu)
    gpu.run(launch)


# --- operations ------------------------------------------------------------------------------------------------------


def supports(*tensors: Tensor | None) -> bool:
    """Return whether all these are contiguous CUDA tensors of a float type that the kernels know."""
    return all(t is None or (t.device.type == "cuda" and t.is_contiguous() and t.dtype in _TYPES) for t in tensors)


def _address(tensor: Tensor | None, count: int, dtype: torch.dtype, device: torch.device) -> int | None:
    """Return a tensor's address, after making sure that a kernel may walk over it."""
    if tensor is None:
        return None
    assert tensor.device == device, (tensor.device, device)
    assert tensor.is_contiguous(), (tensor.shape, tensor.stride())
    assert tensor.numel() == count, (tensor.shape, count)
    assert tensor.dtype == dtype, (tensor.dtype, dtype)
    return tensor.data_ptr()


def _float_bits(value: float) -> int:
    return ctypes.c_uint32.from_buffer_copy(ctypes.c_float(value)).value


def _run_blocks(
    kernel: str,
    first: Tensor,
    grid: Grid,
    noise: Noise,
    damaged: Tensor | None,
    **arrays: tuple[Tensor | None, torch.dtype],
) -> None:
    """Launch a kernel of fake_quant.cu.

    Args:
        kernel: Its name.
        first: A tensor of one element per weight: says how many there are, and where.
        grid, noise: Numbers to give it.
        damaged: The counter to give it.
        arrays: Tensor and dtype of each pointer of ``BlockArguments``; those of scales hold one element per block.
    """
    device, count = first.device, first.numel()
    assert first.shape[-1] % grid.block == 0, (first.shape, grid)
    blocks = count // grid.block
    seed = noise.seed & 0xFFFFFFFFFFFFFFFF
    addresses = {
        name: _address(tensor, blocks if "scales" in name else count, dtype, device)
        for name, (tensor, dtype) in arrays.items()
    }
    arguments = BlockArguments(
        damaged=_address(damaged, 1, torch.int64, device),
        blocks=blocks,
        code_min=grid.code_min,
        code_max=grid.code_max,
        scale_bits=grid.scale_bits,
        signed_scale=grid.signed_scale,
        floor_bits=_float_bits(grid.scale_floor),
        ceiling_bits=_float_bits(grid.scale_ceiling),
        lanes_log2=(grid.block // _OCTET).bit_length() - 1,
        mode=NOISE_MODES.index(_mode(noise)),
        hard_share=noise.hard_share,
        seed_low=seed & 0xFFFFFFFF,
        seed_high=seed >> 32,
        tensor=noise.tensor & 0xFFFFFFFF,
        step=noise.step & 0xFFFFFFFF,
        aligned=all((address or 0) % 16 == 0 for address in addresses.values()),
        **addresses,
    )
    if blocks:
        ctas = -(-count // (_OCTET * _BLOCK_THREADS))
        _run(device, Launch("fake_quant", kernel, arguments, _BLOCK_THREADS, ctas))


def _mode(noise: Noise) -> str:
    return "none" if noise.is_hard else noise.mode


def fake_quantize(
    master_NK: Tensor,
    scales_NG: Tensor | None,
    grid: Grid,
    noise: Noise,
    out: Tensor,
    used_scales_NG: Tensor | None = None,
    damaged: Tensor | None = None,
) -> None:
    """Write the weights that forward uses to ``out``; see ``qad.fake_quant.fake_quantize``.

    Args:
        master_NK, scales_NG, grid, noise, out, used_scales_NG: As there, on one GPU.
        damaged: None, or an int64 tensor of one element to which the number of blocks that hold a number that is not
            finite is added. Not returned, because the CPU would have to wait for it.
    """
    _run_blocks(
        f"qad_fake_quantize_{_TYPES[master_NK.dtype]}_{_TYPES[out.dtype]}_{_mode(noise)}",
        master_NK,
        grid,
        noise,
        damaged,
        weights=(master_NK, master_NK.dtype),
        scales=(scales_NG, torch.float32),
        scales_out=(used_scales_NG, torch.float32),
        values=(out, out.dtype),
    )


def fake_quantize_backward(
    grad_NK: Tensor,
    master_NK: Tensor,
    scales_NG: Tensor | None,
    grid: Grid,
    noise: Noise,
    grad_scales_NG: Tensor | None,
    damaged: Tensor | None = None,
) -> None:
    """Mask ``grad_NK`` in place; fill ``grad_scales_NG`` if given. See ``qad.fake_quant.fake_quantize_backward``.

    Args:
        grad_NK, master_NK, scales_NG, grid, noise: As there, on one GPU.
        grad_scales_NG: None, or a float32 buffer.
        damaged: As in ``fake_quantize``.
    """
    which = "" if grad_scales_NG is None else "_scales"
    _run_blocks(
        f"qad_fake_quantize_backward{which}_{_TYPES[master_NK.dtype]}_{_TYPES[grad_NK.dtype]}",
        master_NK,
        grid,
        noise,
        damaged,
        weights=(master_NK, master_NK.dtype),
        scales=(scales_NG, torch.float32),
        scales_out=(grad_scales_NG, torch.float32),
        values=(grad_NK, grad_NK.dtype),
    )


def quantize(
    weight_NK: Tensor,
    scales_NG: Tensor | None,
    grid: Grid,
    codes_NK: Tensor,
    stored_NG: Tensor,
    damaged: Tensor | None = None,
) -> None:
    """Write int8 codes and float16 scales; see ``qad.tensor.quantize``. ``damaged``: as in ``fake_quantize``."""
    _run_blocks(
        f"qad_quantize_{_TYPES[weight_NK.dtype]}",
        weight_NK,
        grid,
        HARD,
        damaged,
        weights=(weight_NK, weight_NK.dtype),
        scales=(scales_NG, torch.float32),
        codes=(codes_NK, torch.int8),
        stored_scales=(stored_NG, torch.float16),
    )


def dequantize(codes_NK: Tensor, scales_NG: Tensor, grid: Grid, out: Tensor) -> None:
    """Write the weights that a device decodes to ``out``; see ``qad.tensor.dequantize``."""
    _run_blocks(
        f"qad_dequantize_{_TYPES[out.dtype]}",
        codes_NK,
        grid,
        HARD,
        None,
        codes=(codes_NK, torch.int8),
        stored_scales=(scales_NG, torch.float16),
        values=(out, out.dtype),
    )


def divergence(
    student_TV: Tensor,
    teacher_TV: Tensor,
    labels_T: Tensor | None,
    *,
    kind: str,
    beta: float,
    temperature: float,
    next_token_weight: float,
    keep_logits: bool,
) -> tuple[Tensor, Tensor]:
    """Overwrite student logits with the gradient of the distillation loss; see csrc/qad.h.

    Args:
        student_TV, teacher_TV: Logits, both float32 or both bfloat16; rows may lie apart, a row's entries may not.
        labels_T: int64 next tokens, negative for none; None: none at all.
        kind: One of ``DIVERGENCES``.
        beta, temperature, next_token_weight: See ``qad.losses.LossSettings``.
        keep_logits: Leave the student's logits as they are.

    Returns:
        float64 divergence_T at that temperature and nll_T at temperature 1; NaN for a label outside the vocabulary.
    """
    tokens, vocabulary = student_TV.shape
    device = student_TV.device
    assert kind in DIVERGENCES, kind
    assert student_TV.dtype in _LOGITS, student_TV.dtype
    for logits in (student_TV, teacher_TV):
        assert logits.device == device, (logits.device, device)
        assert logits.shape == student_TV.shape, (logits.shape, student_TV.shape)
        assert logits.dtype == student_TV.dtype, (logits.dtype, student_TV.dtype)
        assert logits.stride(1) == 1 or vocabulary == 1, logits.stride()
    value_T = torch.empty(tokens, dtype=torch.float64, device=device)
    nll_T = torch.empty(tokens, dtype=torch.float64, device=device)
    arguments = RowArguments(
        student=student_TV.data_ptr(),
        teacher=teacher_TV.data_ptr(),
        labels=_address(labels_T, tokens, torch.int64, device),
        divergence=value_T.data_ptr(),
        nll=nll_T.data_ptr(),
        student_stride=student_TV.stride(0),
        teacher_stride=teacher_TV.stride(0),
        tokens=tokens,
        vocabulary=vocabulary,
        beta=beta,
        temperature=temperature,
        next_token_weight=next_token_weight,
        keep_logits=keep_logits,
    )
    if tokens:
        kernel = f"qad_divergence_{kind}_{_TYPES[student_TV.dtype]}"
        _run(device, Launch("divergence", kernel, arguments, _ROW_THREADS, tokens))
    return value_T, nll_T
