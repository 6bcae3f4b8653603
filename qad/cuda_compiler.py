"""Compilers of the CUDA kernels: NVRTC or nvcc, and the cache of what they made.

NVRTC comes first, called through ctypes: every CUDA build of torch brings it along, it needs no toolkit, no headers and
no host compiler, and compiles without a GPU. Where it is missing, an nvcc on the PATH does the same. The result is
machine code for one kind of GPU; where the compiler is older than the GPU, PTX that the driver finishes. It is kept in
the user's cache folder under a hash of sources, options and compiler, written to a temporary file and renamed, so that
processes which start at once can share it without a lock.
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
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch

from qad.cpu_compiler import SOURCES, NativeUnavailable, cache_folder

MINIMUM_CAPABILITY = 80
# Each product and sum rounds on its own, as in the reference.
OPTIONS = ("--std=c++17", "--fmad=false")


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


def _in_packages(pattern: str) -> list[str]:
    """Return the files that match in NVIDIA's packages (``pip install nvidia-cuda-nvrtc``, say)."""
    spec = importlib.util.find_spec("nvidia")
    folders = (spec.submodule_search_locations or ()) if spec else ()
    return sorted(str(file) for folder in folders for file in Path(folder).glob(pattern))


def _nvrtc_libraries() -> list[str]:
    """Return where NVRTC may be, best first: torch's own packages, the loader's path, a toolkit."""
    found = _in_packages("*/lib/libnvrtc.so.*")
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


def nvcc_path() -> str | None:
    """Return where nvcc is, None if nowhere: on the PATH, in a toolkit, in NVIDIA's packages."""
    toolkit = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"
    return shutil.which("nvcc") or shutil.which("nvcc", path=toolkit) or next(iter(_in_packages("*/bin/nvcc")), None)


@cache
def find_nvcc() -> Nvcc | None:
    """Return NVIDIA's compiler, None if there is none."""
    path = nvcc_path()
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
