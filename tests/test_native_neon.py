"""The NEON kernels: cross-compiled, and run by an emulator."""

import shutil
from pathlib import Path

import pytest

from tests.helpers_native import build_fuzzer, fuzz

SYSTEM = Path("/usr/aarch64-linux-gnu")  # where Debian puts the C library of the other machine


def test_neon_gives_the_same_bits(tmp_path: Path) -> None:
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if not (compiler and emulator and SYSTEM.is_dir()):
        pytest.skip("NEON is emulated: install qemu-user and g++-aarch64-linux-gnu")
    program = build_fuzzer(tmp_path, [compiler], machine="aarch64")
    outcome = fuzz([emulator, "-L", str(SYSTEM), *program], "--cases", "5000", "--large", "1")
    assert not outcome.mismatches, outcome.text
    assert outcome.cases == 5000
    assert outcome.instruction_sets == ["portable", "neon"]
