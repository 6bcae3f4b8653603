"""The kernels under the compiler's sanitizers: memory, undefined behaviour, threads."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from qad import cpu_compiler
from tests.helpers_native import build_fuzzer, compiler_or_skip, fuzz

# -O1: what is watched is slow enough without the optimizer's minutes.
MEMORY = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
THREADS = ("-O1", "-g", "-fsanitize=thread")


def sanitizing_compiler_or_skip(flags: tuple[str, ...], folder: Path) -> list[str]:
    """Return the compiler if it builds programs with these flags and they run here."""
    compiler = compiler_or_skip()
    source, program = folder / "empty.cpp", folder / "empty"
    source.write_text("int main() { return 0; }\n")
    for command in ([*compiler, *flags, str(source), "-o", str(program)], [str(program)]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            last = (done.stderr.strip() or "no output").splitlines()[-1]
            pytest.skip(f"no program can be built with {flags[2]} and run here: {last}")
    return compiler


def environment() -> dict[str, str]:
    # Leaks are looked for by tracing the process, which containers forbid; the kernels allocate nothing.
    return os.environ | {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}


def test_memory_and_undefined_behaviour(tmp_path: Path) -> None:
    """Every instruction set, with buffers that end where the heap block ends, aligned to their elements and no more."""
    compiler = sanitizing_compiler_or_skip(MEMORY, tmp_path)
    program = build_fuzzer(tmp_path, compiler, MEMORY)
    outcome = fuzz(program, "--exact", "--cases", "10000", "--large", "1", environment=environment())
    assert not outcome.mismatches, outcome.text
    assert outcome.instruction_sets == cpu_compiler.instruction_sets()


def test_threads_do_not_race(tmp_path: Path) -> None:
    compiler = sanitizing_compiler_or_skip(THREADS, tmp_path)
    program = build_fuzzer(tmp_path, compiler, THREADS, machine="plain")
    outcome = fuzz(program, "--cases", "0", "--large", "2", environment=environment())
    assert not outcome.mismatches, outcome.text


def test_a_read_beyond_the_end_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without this nobody would know that the buffers are tight: the extra scale changes no result."""
    compiler = sanitizing_compiler_or_skip(MEMORY, tmp_path)
    sources = shutil.copytree(cpu_compiler.SOURCES, tmp_path / "csrc")
    kernels = sources / "cpu/scales.h"
    right, wrong = "memcpy(padded, given, (size_t)blocks * 4)", "memcpy(padded, given, (size_t)blocks * 4 + 4)"
    assert kernels.read_text().count(right) == 1, "the kernels were rewritten: plant the fault anew"
    kernels.write_text(kernels.read_text().replace(right, wrong))
    monkeypatch.setattr(cpu_compiler, "SOURCES", sources)
    program = build_fuzzer(tmp_path, compiler, MEMORY, machine="plain")
    with pytest.raises(AssertionError, match="heap-buffer-overflow"):
        fuzz(program, "--exact", "--cases", "200", environment=environment())
