"""Build tests/native_fuzz.cpp against the kernels and run it."""

import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from qad import cpu_compiler

_SOURCE = Path(__file__).with_name("native_fuzz.cpp")
_FLAGS = ("-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off")


@dataclass(frozen=True)
class Outcome:
    """What a run of the fuzzer came to."""

    cases: int
    elements: int
    damaged: int
    outside: int
    mismatches: int
    instruction_sets: list[str]
    text: str


def compiler_or_skip() -> list[str]:
    try:
        return cpu_compiler.find_compiler()
    except cpu_compiler.NativeUnavailable as error:
        pytest.skip(str(error))


def build_fuzzer(
    folder: Path, compiler: Sequence[str], flags: Sequence[str] = (), machine: str | None = None
) -> list[str]:
    """Compile the kernels, as qad does, and the fuzzer; return its command."""
    library, program = folder / "libqad.so", folder / "native_fuzz"
    cpu_compiler.build(library, compiler, flags, machine)
    command = [*compiler, *_FLAGS, *flags, str(_SOURCE), str(library), f"-Wl,-rpath,{folder}", "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [str(program)]


def fuzz(command: Sequence[str], *arguments: str, environment: dict[str, str] | None = None) -> Outcome:
    """Run the fuzzer to its summary; it reports mismatches there, and crashes and sanitizers by their own text."""
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, env=environment, check=False)
    text = done.stdout + done.stderr
    summary = re.search(
        r"^(\d+) cases, (\d+) elements, (\d+) damaged blocks, (\d+) elements outside, (\d+) mismatches on(.*)$",
        done.stdout,
        re.MULTILINE,
    )
    assert summary, f"exit status {done.returncode}\n{text}"
    cases, elements, damaged, outside, mismatches = map(int, summary.groups()[:5])
    outcome = Outcome(cases, elements, damaged, outside, mismatches, summary[6].split(), text)
    assert done.returncode == (1 if outcome.mismatches else 0), text
    return outcome
