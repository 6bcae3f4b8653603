"""CUDA kernels through the driver's own API: loading, and launching on torch's current stream.

Modules are loaded into the primary context, the one torch uses, and kernels are launched on torch's current stream, so
that they are ordered with everything else and can be captured in graphs.
"""

import contextlib
import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import torch

from qad.cpu_compiler import NativeUnavailable
from qad.cuda_compiler import Code, compile_source


@dataclass(frozen=True)
class Source:
    """A source file of kernels.

    Attributes:
        name: Of the file in csrc/cuda, without suffix.
        kernels: Its functions.
        threads: Threads of a CTA, the same for all of them.
    """

    name: str
    kernels: tuple[str, ...]
    threads: int


@dataclass(frozen=True)
class Launch:
    """One kernel launch.

    Attributes:
        kernel: Name of the function.
        arguments: Its one argument.
        threads: Threads of a CTA.
        ctas: CTAs after which more would find nothing to do; fewer take turns.
    """

    kernel: str
    arguments: ctypes.Structure
    threads: int
    ctas: int


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


class Gpu:
    """One GPU: its context, the modules loaded into it, their kernels.

    Args:
        index: Which, as torch counts.
        sources: What to load.

    Raises:
        NativeUnavailable: No driver, no compiler, or one of them refuses.
    """

    def __init__(self, index: int, sources: Sequence[Source]) -> None:
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
        for source in sources:
            self._load(source)

    @contextlib.contextmanager
    def _current(self) -> Iterator[None]:
        """Make this GPU's context the current one: a thread of autograd may not have any yet."""
        _check(_driver().cuCtxPushCurrent_v2(self._context), "cuCtxPushCurrent")
        try:
            yield
        finally:
            _driver().cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))

    def _load(self, source: Source) -> None:
        code = self.codes[source.name] = compile_source(source.name, self._capability)
        threads = source.threads
        processors = torch.cuda.get_device_properties(self._index).multi_processor_count
        with self._current():
            module = ctypes.c_void_p()
            # PTX is text and must end with a zero, which a cubin does not mind.
            status = _driver().cuModuleLoadData(ctypes.byref(module), code.image + b"\0")
            _check(status, f"the driver cannot load what {code.origin} compiled; a newer driver may")
            for name in source.kernels:
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
        """Launch a kernel on torch's current stream."""
        kernel = self._kernels[launch.kernel]
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(launch.arguments))
        stream = torch.cuda.current_stream(self._index).cuda_stream
        ctas = min(launch.ctas, kernel.resident_ctas)
        with self._current():
            status = _driver().cuLaunchKernel(
                kernel.function, ctas, 1, 1, launch.threads, 1, 1, 0, stream, pointers, None
            )
        _check(status, launch.kernel)
