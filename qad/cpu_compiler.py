"""The library of csrc/cpu: compiled with the system's C++ compiler, cached by content.

csrc/ is compiled for the best instruction set that this processor has, and the library is kept in the user's cache
folder under a hash of sources, flags and compiler. Another processor finds another name there, so a cache may be shared
between machines. Each process that finds no library builds its own in a temporary folder and renames it into place: no
lock can go stale, and what is given up is the work of those that come second.
"""

import errno
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from qad import files
from qad.errors import UserError

SOURCES = Path(__file__).with_name("csrc")
# No contraction: a fused product and sum would round once where the reference rounds twice.
_FLAGS = ("-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-exceptions", "-fno-rtti")
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")
_BF16 = "-mavx512bf16"  # of GCC 10 and clang 9; without it, the first set is the second under another name
_X86 = {"avx512bf16": (*_AVX512, _BF16), "avx512": _AVX512, "avx2": _AVX2, "portable": ()}


class NativeUnavailable(Exception):
    """There is no library to call; the message says why and what would help."""


@dataclass(frozen=True)
class _Unit:
    """One object file."""

    source: str
    name: str
    flags: tuple[str, ...]


def _sets_of(machine: str) -> dict[str, tuple[str, ...]]:
    """Return the instruction sets there are kernels for on a kind of processor, best first, and their flags."""
    if machine in ("x86_64", "amd64"):
        return _X86
    if machine in ("aarch64", "arm64"):
        return {"neon": (), "portable": ()}
    return {"portable": ()}


def _units(machine: str, sets: Sequence[str]) -> list[_Unit]:
    """Return what is compiled for a kind of processor, in this order."""
    units: list[_Unit] = []
    known = _sets_of(machine)
    for name in sets:
        flags = (*known[name], f"-DQAD_USE_{name.upper()}", f"-DQAD_SET={name}")
        units += [_Unit(f"cpu/{part}.cpp", f"{part}-{name}", flags) for part in ("kernels", "more_kernels")]
    api = ("-DQAD_HAVE_X86",) if "avx2" in known else ("-DQAD_HAVE_NEON",) if "neon" in known else ()
    return [*units, _Unit("cpu/api.cpp", "api", api)]


@cache
def instruction_sets() -> list[str]:
    """Return the instruction sets that kernels are written for and this machine can run, the best last."""
    sets = _sets_of(platform.machine().lower())
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    # Not asked of the library, because what it is built for depends on the answer; it checks again when it is loaded.
    flags = next((set(line.split()) for line in lines if line.startswith("flags")), set())
    avx2 = {"avx2", "fma", "f16c"} <= flags
    avx512 = avx2 and {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= flags
    able = {"avx512bf16": avx512 and "avx512_bf16" in flags, "avx512": avx512, "avx2": avx2}
    return [name for name in reversed(sets) if able.get(name, True)]


def find_compiler() -> list[str]:
    """Return the command of the C++ compiler: ``$CXX``, c++, g++ or clang++.

    Raises:
        NativeUnavailable: There is none.
    """
    if chosen := os.environ.get("CXX", "").strip():
        try:
            return shlex.split(chosen)
        except ValueError as error:
            raise NativeUnavailable(f"CXX is no command of a shell: {chosen} ({error})") from None
    for name in ("c++", "g++", "clang++"):
        if path := shutil.which(name):
            return [path]
    raise NativeUnavailable("no C++ compiler found: install g++ or clang++ (Debian: apt install g++), or set CXX")


def _run(commands: Sequence[list[str]]) -> None:
    """Run commands at the same time and wait for all of them.

    Raises:
        NativeUnavailable: One failed.
    """
    environment = {**os.environ, "LC_ALL": "C"}  # what it says is looked into
    try:
        running = [
            subprocess.Popen(command, stderr=subprocess.PIPE, text=True, errors="replace", env=environment)
            for command in commands
        ]
    except OSError as error:
        raise NativeUnavailable(f"the C++ compiler cannot be run: {error}; CXX can name another") from None
    failures = [
        f"{shlex.join(command)}\n{errors.strip()}"
        for command, process in zip(commands, running, strict=True)
        if (errors := process.communicate()[1]) is not None and process.returncode
    ]
    if any(os.strerror(errno.ENOSPC) in failure for failure in failures):
        raise NativeUnavailable(
            "the kernels cannot be compiled, for the disk is full: free some space, or name other places with "
            "XDG_CACHE_HOME and TMPDIR"
        )
    if failures:
        raise NativeUnavailable("the kernels do not compile; CXX can name another C++ compiler\n" + failures[0])


def _takes(command: Sequence[str], flag: str) -> bool:
    """Return whether a compiler knows a flag; one that cannot be run will be told of when it shall compile."""
    try:
        nothing = [*command, flag, "-E", "-x", "c++", os.devnull]
        return subprocess.run(nothing, capture_output=True, check=False).returncode == 0
    except OSError:
        return True


def build(
    target: Path,
    compiler: Sequence[str] | None = None,
    flags: Sequence[str] = (),
    machine: str | None = None,
    sets: Sequence[str] | None = None,
) -> None:
    """Compile csrc/cpu to a shared library.

    Args:
        target: The library to write; appears whole or not at all.
        compiler: Command of the compiler; found if None.
        flags: More flags, for every file and the linker.
        machine: Kind of processor, as ``platform.machine()`` names it; this one if None.
        sets: Instruction sets to include; all there are for the processor if None.

    Raises:
        NativeUnavailable: No compiler, or it fails.
    """
    kind = (machine or platform.machine()).lower()
    command = list(compiler or find_compiler())
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".build-", dir=target.parent) as folder:
        units = _units(kind, list(_sets_of(kind)) if sets is None else sets)
        unknown = {_BF16} if any(_BF16 in unit.flags for unit in units) and not _takes(command, _BF16) else set()
        objects = [str(Path(folder) / f"{unit.name}.o") for unit in units]
        _run(
            [
                [
                    *command,
                    *_FLAGS,
                    *(flag for flag in unit.flags if flag not in unknown),
                    *flags,
                    "-c",
                    str(SOURCES / unit.source),
                    "-o",
                    compiled,
                ]
                for unit, compiled in zip(units, objects, strict=True)
            ]
        )
        linked = Path(folder) / target.name
        _run([[*command, *flags, "-shared", "-pthread", "-o", str(linked), *objects]])
        seal(linked)
        linked.replace(target)


def seal(library: Path) -> None:
    """Append the hash of a library to it, which loaders do not mind."""
    with library.open("r+b") as file:
        file.write(hashlib.sha256(file.read()).digest())


def is_whole(library: Path) -> bool:
    """Return whether a library is as it was built. To load one that is not may end the process without a word."""
    try:
        content = library.read_bytes()
    except FileNotFoundError:
        return False
    return content[-32:] == hashlib.sha256(content[:-32]).digest()


def cache_folder() -> Path:
    """Return where built libraries are kept; see ``qad.files``.

    Raises:
        NativeUnavailable: There is no home folder.
    """
    try:
        return files.cache_folder()
    except UserError:
        raise NativeUnavailable("there is no home folder to keep built kernels in: set XDG_CACHE_HOME") from None


def library_path(compiler: Sequence[str], sets: Sequence[str] | None = None) -> Path:
    """Return where the library of these sources, flags, instruction sets and compiler belongs.

    Args:
        compiler: Command of the compiler.
        sets: Instruction sets it includes; the best that this machine can run if None.
    """
    units = _units(platform.machine().lower(), instruction_sets()[-1:] if sets is None else sets)
    digest = hashlib.sha256()
    for file in sorted([*SOURCES.glob("*.h"), *SOURCES.glob("cpu/*")]):
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    try:
        asked = subprocess.run([*compiler, "--version"], capture_output=True, text=True, errors="replace", check=False)
        version = asked.stdout
    except OSError as error:
        raise NativeUnavailable(
            f"the C++ compiler {shlex.join(compiler)} cannot be run: {error}; CXX can name another"
        ) from None
    digest.update(repr((_FLAGS, units, sys.platform, list(compiler), version)).encode())
    return cache_folder() / f"native-{digest.hexdigest()[:16]}" / "libqad.so"
