"""Code that a model wrote, run where it can do no harm: in bubblewrap, with limits, and judged from outside.

- Reach: namespaces of their own for users, processes, network, memory segments and names; the file system holds
  Python's standard library and the system's shared libraries, read-only, and one small folder in memory; the
  environment is empty; no capability is left. See bwrap(1).
- Amount: limits of address space, processor time, size and number of files, and output; a clock outside that kills all
  there is. New processes are forbidden (``seccomp``), so that one limit of memory is the limit of all.
- Verdict: tests run in a second sandbox and call the program's functions through a socket (``inside_sandbox``). What a
  program prints, or that it exits, is no verdict.

Where bubblewrap is missing or not allowed to do this, nothing is run: ``refusal`` gives the reason. Nothing here ever
runs such code without a sandbox.

What is given up: two starts of Python for a check (about 60 ms on one core); programs that start processes; and what
functions cannot give back as plain data, such as objects of the program's own classes.
"""

import ast
import builtins
import contextlib
import functools
import os
import selectors
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from qad.errors import UserError
from qad.evals import seccomp

_INSIDE = Path(__file__).with_name("inside_sandbox.py")
_WORK = "/work"
_SIGNALLED = 128  # bubblewrap's exit status for a signal, less its number
_LONGEST_VERDICT = 1 << 16  # bytes
_LAST_MOMENT = 1.0  # seconds from the end of a connection to that of its process
ENDED = "the program ended"  # as inside_sandbox says it


@dataclass(frozen=True)
class Limits:
    """What a program may take.

    Attributes:
        seconds: Of its processor time.
        wall_seconds: Of the clock, start included. Much more than ``seconds``: other programs may use the machine.
        memory: Bytes of address space.
        files: Bytes that its folder may hold, and that one file may.
        output: Bytes that it may print.
    """

    seconds: int = 5
    wall_seconds: float = 30.0
    memory: int = 1 << 30
    files: int = 16 << 20
    output: int = 1 << 20


DEFAULT_LIMITS = Limits()


@dataclass(frozen=True)
class Run:
    """What became of a program.

    Attributes:
        status: Its exit status; negative: the signal that ended it; None: it was ended from outside.
        stdout: What it printed, up to the limit.
        stderr: What it printed as errors, up to the limit.
        ended: Why it was ended, or by which signal; empty if it ended by itself.
    """

    status: int | None
    stdout: str
    stderr: str
    ended: str = ""


@dataclass(frozen=True)
class Verdict:
    """What tests said of a program: whether it passed all, and what failed."""

    passed: bool
    detail: str = ""


def _library_binds() -> list[str]:
    """Return the options that show Python's standard library and the system's shared libraries, nothing else."""
    options: list[str] = []
    for name in ("/usr/lib", "/usr/lib32", "/usr/lib64", "/etc/ld.so.cache"):
        options += ["--ro-bind-try", name, name]
    for name in ("/lib", "/lib32", "/lib64"):
        path = Path(name)
        options += ["--symlink", str(path.readlink()), name] if path.is_symlink() else ["--ro-bind-try", name, name]
    executable = os.path.realpath(sys.executable)
    own = Path(sys.base_prefix) / "lib"
    if own != Path("/usr/lib"):
        options += ["--ro-bind", str(own), str(own), "--ro-bind-try", f"{own}64", f"{own}64"]
    for folder in {Path("/usr/lib"), Path("/usr/lib64"), own}:
        for packages in sorted(folder.glob("python3*/*-packages")):
            options += ["--tmpfs", str(packages)]
    return [*options, "--ro-bind", executable, executable]


def _command(bwrap: str, limits: Limits, filter_descriptor: int, role: str, rest: Sequence[str]) -> list[str]:
    # Address space, processor time, one file, open files, threads (on old kernels those of all of a user's processes),
    # a dump of memory.
    bounds = (limits.memory, limits.seconds, limits.files, 64, 512, 0)
    return [
        *(bwrap, "--unshare-user", "--unshare-all", "--uid", "65534", "--gid", "65534", "--cap-drop", "ALL"),
        *("--new-session", "--die-with-parent", "--hostname", "sandbox", "--clearenv"),
        # Otherwise every thread takes 64 MiB of address space for its own memory.
        *("--setenv", "MALLOC_ARENA_MAX", "1"),
        *("--seccomp", str(filter_descriptor)),
        *_library_binds(),
        *("--dev", "/dev", "--remount-ro", "/dev"),
        *("--size", str(limits.files), "--tmpfs", _WORK, "--symlink", _WORK, "/tmp", "--remount-ro", "/"),
        *("--chdir", _WORK, "--"),
        *(os.path.realpath(sys.executable), "-I", "-S", "-B", "-X", "utf8", "-c", _inside_source()),
        *(role, *map(str, bounds), *rest),
    ]


@functools.cache
def _inside_source() -> str:
    return _INSIDE.read_text()


@functools.cache
def refusal() -> str | None:
    """Return why programs cannot be run here, None if they can. Found out by running one."""
    if sys.platform != "linux":
        return "bubblewrap needs Linux"
    if shutil.which("bwrap") is None:
        return "bwrap is not installed: install the package bubblewrap"
    if seccomp.program() is None:
        return f"the system calls of {os.uname().machine} are not known: use x86_64 or aarch64"
    try:
        done = _run("print(6 * 7)", "", Limits(wall_seconds=60))
    except OSError as error:
        return f"bwrap does not start ({error})"
    if (done.status, done.stdout) != (0, "42\n"):
        lines = (done.stderr or done.ended or f"exit status {done.status}").strip().splitlines()
        return f"bwrap does not work here ({lines[-1][:200]}): allow user namespaces, or use another machine"
    return None


def require() -> None:
    """Raise the user's error where programs cannot be run.

    Raises:
        UserError: There is no working sandbox; the message says why.
    """
    if (reason := refusal()) is not None:
        raise UserError(f"this task runs code that a model writes, and only in a sandbox: {reason}")


@contextlib.contextmanager
def _started(
    limits: Limits,
    role: str,
    source: str,
    setup: str = "",
    stdin: str = "",
    descriptors: Sequence[int] = (),
    rest: Sequence[str] = (),
    output: int = subprocess.DEVNULL,
) -> Iterator["subprocess.Popen[bytes]"]:
    """Start a role in a sandbox of its own, and kill all that is in it at the end."""
    bwrap = shutil.which("bwrap")
    filtered = seccomp.program()
    assert bwrap is not None
    assert filtered is not None
    reading, writing = os.pipe()
    with tempfile.TemporaryFile() as given, open(reading, "rb") as rules:  # noqa: PTH123
        with open(writing, "wb") as pipe:  # noqa: PTH123
            pipe.write(filtered)
        parts = [part.encode(errors="replace") for part in (setup, source, stdin)]
        given.write(struct.pack("<QQ", len(parts[0]), len(parts[1])) + b"".join(parts))
        given.flush()
        # Opened again, because a program may not write into a file that lies outside.
        with open(f"/proc/self/fd/{given.fileno()}", "rb", buffering=0) as readable:  # noqa: PTH123
            process = subprocess.Popen(
                _command(bwrap, limits, rules.fileno(), role, [*map(str, descriptors), *rest]),
                stdin=readable,
                stdout=output,
                stderr=output,
                pass_fds=[rules.fileno(), *descriptors],
                env={},
            )
    try:
        yield process
    finally:
        # Its child dies with it, and with this first process of their namespace all others.
        process.kill()
        process.wait()
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                stream.close()


def _collect(streams: Sequence[IO[bytes]], deadline: float, most: int) -> tuple[list[bytes], str]:
    """Read streams to their ends, up to a time and a number of bytes of each; return them and why it stopped early."""
    found = [bytearray() for _ in streams]
    with selectors.DefaultSelector() as selector:
        for number, stream in enumerate(streams):
            selector.register(stream, selectors.EVENT_READ, number)
        while selector.get_map():
            left = deadline - time.monotonic()
            ready = selector.select(left) if left > 0 else []
            if not ready:
                return [bytes(part) for part in found], "time"
            for key, _ in ready:
                part = os.read(key.fd, 1 << 16)
                if not part:
                    selector.unregister(key.fileobj)
                found[key.data] += part
                if len(found[key.data]) > most:
                    return [bytes(part[:most]) for part in found], "output"
    return [bytes(part) for part in found], ""


def _status(code: int) -> int:
    """Return bubblewrap's exit status as that of the program: negative for a signal."""
    return -(code - _SIGNALLED) if code > _SIGNALLED else code


def _how_it_ended(status: int, limits: Limits) -> str:
    if status == -signal.SIGXCPU:
        return f"more than {limits.seconds} s of processor time"
    return f"{ENDED}: {signal.Signals(-status).name if status < 0 else f'exit status {status}'}"


def _run(source: str, stdin: str, limits: Limits) -> Run:
    deadline = time.monotonic() + limits.wall_seconds
    with _started(limits, "run", source, stdin=stdin, output=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        (out, error), ended = _collect([process.stdout, process.stderr], deadline, limits.output)
        status = None
        if not ended:
            try:
                # Both streams may have been closed by the program.
                status = _status(process.wait(max(0.0, deadline - time.monotonic())))
            except subprocess.TimeoutExpired:
                ended = "time"
        if status is not None and status < 0:
            reason = _how_it_ended(status, limits)
        else:
            reason = {
                "": "",
                "time": f"no end within {limits.wall_seconds:g} s",
                "output": f"more than {limits.output} bytes of output",
            }[ended]
        return Run(status, out.decode(errors="replace"), error.decode(errors="replace"), reason)


def _wanted(setup: str, tests: str) -> set[str]:
    """Return the names that tests read and that neither they, nor their setup, nor Python give a value to.

    Only these are the program's to define: one that brings its own ``len`` must not have tests use it.
    """
    given: set[str] = set(dir(builtins))
    read: set[str] = set()
    try:
        parts = [*ast.walk(ast.parse(setup)), *ast.walk(ast.parse(tests))]
    except SyntaxError:
        return set()  # the tests will say so
    for node in parts:
        if isinstance(node, ast.Name):
            (read if isinstance(node.ctx, ast.Load) else given).add(node.id)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            given.add(node.name)
        elif isinstance(node, ast.arg):
            given.add(node.arg)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            given |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ExceptHandler) and node.name:
            given.add(node.name)
    return read - given


def run(source: str, stdin: str = "", limits: Limits = DEFAULT_LIMITS) -> Run:
    """Run a Python program in a sandbox.

    Args:
        source: The program; it is ``__main__``.
        stdin: What it reads.
        limits: What it may take.

    Raises:
        UserError: There is no working sandbox.
    """
    require()
    return _run(source, stdin, limits)


def check(
    source: str, tests: str, *, setup: str = "", names: Sequence[str] = (), limits: Limits = DEFAULT_LIMITS
) -> Verdict:
    """Run tests on the functions of a program, each side in a sandbox of its own.

    Args:
        source: The program that defines the functions, or methods of a class ``Solution``.
        tests: Python that calls them and raises if a result is wrong.
        setup: Python that the tests need and that is not the program's: imports, helpers.
        names: The functions; if none are given, those that the tests call and nothing defines.
        limits: What each side may take.

    Raises:
        UserError: There is no working sandbox.
    """
    require()
    deadline = time.monotonic() + limits.wall_seconds
    reading, writing = os.pipe()
    with contextlib.ExitStack() as stack:
        told = stack.enter_context(open(reading, "rb", buffering=0))  # noqa: PTH123
        telling = stack.enter_context(open(writing, "wb", buffering=0))  # noqa: PTH123
        program_end, tests_end = (stack.enter_context(end) for end in socket.socketpair())
        program = stack.enter_context(_started(limits, "serve", source, descriptors=[program_end.fileno()]))
        stack.enter_context(
            _started(
                limits,
                "check",
                tests,
                setup,
                descriptors=[tests_end.fileno(), telling.fileno()],
                rest=names or sorted(_wanted(setup, tests)),
            )
        )
        # Held open here, they would never end for the other side.
        for end in (program_end, tests_end, telling):
            end.close()
        (message,), ended = _collect([told], deadline, _LONGEST_VERDICT)
        if ended:
            return Verdict(False, f"no result within {limits.wall_seconds:g} s")
        if not message:
            return Verdict(False, "the tests ended without a verdict")
        word, _, detail = message.decode(errors="replace").partition(" ")
        if detail == ENDED:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return Verdict(False, _how_it_ended(_status(program.wait(_LAST_MOMENT)), limits))
        return Verdict(word == "passed", detail)
