"""The sandbox: what a program cannot reach, take or pretend. Every program here really runs in bubblewrap."""

import os
import platform
import secrets
import signal
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from qad.errors import UserError
from qad.evals import sandbox, seccomp
from qad.evals.sandbox import Limits, check, run
from qad.evals.tasks import load

needs_sandbox = pytest.mark.skipif(sandbox.refusal() is not None, reason=str(sandbox.refusal()))
SHORT = Limits(seconds=1, wall_seconds=30)
# Of the clock alone: starting takes seconds where others use the machine.
SLEEPING = Limits(seconds=5, wall_seconds=2)


def program(source: str) -> str:
    return textwrap.dedent(source)


def processes_of(mark: str) -> list[psutil.Process]:
    """Return the processes, in whatever namespace, in whose command line a mark stands."""
    every = psutil.process_iter(["cmdline"])
    return [process for process in every if any(mark in part for part in process.info["cmdline"] or [])]


def gone(mark: str) -> bool:
    """Wait until no process has a mark any more."""
    for _ in range(100):
        if not processes_of(mark):
            return True
        time.sleep(0.05)
    return False


@needs_sandbox
def test_a_program_reads_prints_and_ends() -> None:
    done = run("import sys\nprint(sum(map(int, sys.stdin.read().split())))\nsys.exit(3)", "1 2\n39\n")
    assert (done.status, done.stdout, done.ended) == (3, "42\n", "")
    done = run("print(input() + input())", "ab\ncd\n")
    assert done.stdout == "abcd\n"
    assert run("input()").status == 1
    assert "ZeroDivisionError" in run("1 / 0").stderr
    assert run("def main():\n    print('ä€')\nif __name__ == '__main__':\n    main()").stdout == "ä€\n"


@needs_sandbox
def test_a_program_sees_nothing_of_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = tmp_path / "secret"
    secret.write_text("token")
    monkeypatch.setenv("SECRET_TOKEN", "token")
    done = run(
        program(f"""
        import os, sys, glob
        print(sorted(os.environ))
        for place in ({str(secret)!r}, "/etc/passwd", "/etc/shadow", "/proc/self/environ", "/proc/1/environ", "/sys",
                      {str(Path.home() / ".cache")!r}, {str(Path(sandbox.__file__))!r}, "/var", "/home", "/run"):
            print(place, os.path.exists(place))
        os.symlink({str(secret)!r}, "link")
        print(os.path.exists("link"))
        print(len(glob.glob("/proc/*")), os.getpid() < 10, os.getuid(), os.uname().nodename, sys.path[-1])
        print(any("site-packages" in path for path in sys.path))
        """)
    )
    assert done.status == 0, done.stderr
    first, *lines = done.stdout.splitlines()
    assert not {"SECRET_TOKEN", "HOME", "PATH", "PYTHONPATH"} & set(eval(first))
    assert all(line.endswith("False") for line in lines[:12]), lines
    assert lines[12].startswith("0 True 65534 sandbox")
    assert lines[13] == "False"


@needs_sandbox
def test_no_installed_package_can_be_read() -> None:
    done = run(
        "import glob, sys\n"
        "print([p for root in (sys.base_prefix, '/usr') for p in glob.glob(f'{root}/lib/python3*/*-packages/*')])"
    )
    assert done.stdout == "[]\n"
    assert run("import numpy").status == 1


@needs_sandbox
@pytest.mark.parametrize(
    "where", ["/outside", "/usr/lib/outside", "/dev/shm/outside", "/etc/outside", "../outside", "/root/outside"]
)
def test_nothing_is_written_outside(where: str) -> None:
    done = run(f"open({where!r}, 'w')")
    assert done.status == 1
    assert any(word in done.stderr for word in ("Read-only", "Permission", "No such file")), done.stderr


@needs_sandbox
def test_its_folder_holds_so_much_and_is_new_each_time() -> None:
    small = Limits(files=1 << 20)
    done = run("open('a', 'w').write('x' * 1000)\nopen('/tmp/b', 'w').write('y')\nimport os\nprint(os.listdir())", "")
    assert sorted(eval(done.stdout)) == ["a", "b"]
    assert run("import os\nprint(os.listdir())").stdout == "[]\n"
    # One file, by the limit of files; many files, by the size of the folder.
    assert "File too large" in run("open('a', 'wb').write(bytes(2 << 20))", limits=small).stderr
    many = "for n in range(20): open(str(n), 'wb').write(bytes(1 << 19))"
    assert "No space left" in run(many, limits=small).stderr


@needs_sandbox
@pytest.mark.parametrize(
    "call",
    [
        "socket.create_connection(('1.1.1.1', 53), 2)",
        "socket.socket(socket.AF_INET)",
        "socket.socket(socket.AF_UNIX).connect('\\0name')",
        "urllib.request.urlopen('http://localhost')",
        "socket.getaddrinfo('example.org', 80)",
    ],
)
def test_no_network(call: str) -> None:
    done = run(f"import socket, urllib.request\n{call}")
    assert done.status == 1
    assert "PermissionError" in done.stderr or "URLError" in done.stderr or "gaierror" in done.stderr


@needs_sandbox
@pytest.mark.parametrize(
    "attack",
    [
        "while True: os.fork()",
        "os.fork()",
        "subprocess.run(['ls'])",
        "os.posix_spawn(sys.executable, ['python'], {})",
        "multiprocessing.get_context('spawn').Process(target=print).start()",
        "ctypes.CDLL(None, use_errno=True).unshare(0x10000000) and os.fork()",
        "os.memfd_create('memory')",
        "os.unshare(os.CLONE_NEWUSER) if hasattr(os, 'unshare') else os.fork()",
    ],
)
def test_no_new_processes_nor_namespaces(attack: str) -> None:
    done = run(f"import os, sys, subprocess, multiprocessing, ctypes\n{attack}", limits=SHORT)
    assert done.status == 1, done
    assert "PermissionError" in done.stderr, done.stderr


@needs_sandbox
def test_namespaces_hold_without_the_filter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seccomp, "program", lambda: seccomp._instruction(seccomp._RETURN, seccomp._ALLOW))
    done = run("import socket\nprint(socket.if_nameindex())\nsocket.create_connection(('1.1.1.1', 53), 2)")
    assert done.stdout == "[(1, 'lo')]\n"
    assert "unreachable" in done.stderr
    # What it leaves behind ends with it: both children would sleep on.
    mark = secrets.token_hex()
    source = program(f"""
        import os, sys, time
        for _ in range(2):
            if not os.fork():
                os.execv(sys.executable, [sys.executable, "-c", "import time; time.sleep(99)", "{mark}"])
        time.sleep(2)
    """)
    with ThreadPoolExecutor() as pool:
        running = pool.submit(run, source)
        while not running.done() and len(processes_of(mark)) < 2:
            time.sleep(0.02)
        assert not running.done()
    assert running.result().status == 0
    assert gone(mark)


@needs_sandbox
def test_threads_work_and_are_bounded() -> None:
    assert run("import threading\nt = threading.Thread(target=print, args=[1])\nt.start()\nt.join()").stdout == "1\n"
    bomb = "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=[99], daemon=True).start()"
    done = run(bomb, limits=SHORT)
    assert done.status == 1
    assert "can't start new thread" in done.stderr


@needs_sandbox
@pytest.mark.parametrize(
    "hoard",
    [
        "x = bytearray(10 << 30)",
        "x = []\nwhile True: x.append(bytes(1 << 20))",
        "import mmap\nx = mmap.mmap(-1, 10 << 30)",
        "x = '9' * 10**10",
    ],
)
def test_ten_gigabytes_are_refused(hoard: str) -> None:
    before = psutil.virtual_memory().available
    done = run(hoard)
    assert done.status == 1
    assert "MemoryError" in done.stderr or "Cannot allocate memory" in done.stderr
    assert before - psutil.virtual_memory().available < 4 << 30


@needs_sandbox
def test_what_never_ends_is_ended() -> None:
    mark = secrets.token_hex()
    began = time.monotonic()
    assert run("while True: pass", limits=SHORT).ended == "more than 1 s of processor time"
    done = run(f"import time\n{mark!r}\ntime.sleep(1000)", limits=SLEEPING)
    assert (done.status, done.ended) == (None, "no end within 2 s")
    assert time.monotonic() - began < 30
    done = run("import signal, time\nfor s in (2, 15, 24): signal.signal(s, lambda *_: 0)\nwhile True: pass", "", SHORT)
    assert done.status is not None
    assert done.status < 0


@needs_sandbox
def test_a_gigabyte_of_output_is_cut() -> None:
    began = time.monotonic()
    done = run("import sys\nfor _ in range(1 << 10): sys.stdout.write('x' * (1 << 20))")
    assert done.ended == "more than 1048576 bytes of output"
    assert len(done.stdout) == 1 << 20
    assert time.monotonic() - began < 20
    done = run("import sys\nsys.stderr.write('x' * (2 << 20))")
    assert done.ended == "more than 1048576 bytes of output"
    # Of functions, nobody reads what they print.
    assert check("def f():\n    print('x' * (4 << 20))\n    return 1", "assert f() == 1").passed


@needs_sandbox
@pytest.mark.parametrize(
    "crash",
    [
        "import sys\nsys.setrecursionlimit(10**9)\ndef f(): return f()\nf()",
        "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)",
        "import os, signal\nos.kill(-1, signal.SIGKILL)\nos.kill(os.getpid(), 9)",
        "import ctypes\nctypes.string_at(0)",
        "import os\nos.abort()",
    ],
)
def test_a_crash_is_the_programs_own(crash: str) -> None:
    done = run(crash, limits=SHORT)
    assert done.status is not None
    assert done.status != 0
    assert not check(f"def f():\n{textwrap.indent(crash, '    ')}", "f()", limits=SHORT).passed


@needs_sandbox
def test_a_signal_that_ended_a_program_is_named() -> None:
    done = run("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    assert (done.status, done.ended) == (-signal.SIGKILL, "the program ended: SIGKILL")


@needs_sandbox
def test_killing_all_it_sees_kills_nothing_here() -> None:
    with subprocess.Popen(["sleep", "60"]) as bystander:
        run("import os, signal\nfor pid in range(2, 40000):\n    try: os.kill(pid, 9)\n    except OSError: pass")
        assert bystander.poll() is None
        bystander.kill()


@needs_sandbox
def test_nothing_outlives_the_caller() -> None:
    mark = secrets.token_hex()
    code = program(f"""
        from qad.evals.sandbox import check, Limits
        print(check("import time\\ntime.sleep(99)", "f('{mark}')", names=["{mark}"], limits=Limits(60, 60)))
    """)
    caller = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    try:
        for _ in range(600):
            # The caller itself, bubblewrap twice or thrice, and the interpreter within.
            if len(processes_of(mark)) >= 3:
                break
            time.sleep(0.05)
        assert len(processes_of(mark)) >= 3
    finally:
        caller.send_signal(signal.SIGKILL)
        caller.wait()
    assert gone(mark)


@needs_sandbox
def test_nothing_outlives_its_time() -> None:
    mark = f"f_{secrets.token_hex()}"
    source = "import threading, time\nfor _ in range(20): threading.Thread(target=time.sleep, args=[99]).start()"
    verdict = check(source + "\ntime.sleep(99)", f"{mark}()", limits=SLEEPING)
    assert verdict.detail == "no result within 2 s"
    assert gone(mark)


GOOD = "def f(x):\n    return x + 1"
TESTS = "assert f(1) == 2\nassert [f(n) for n in range(3)] == [1, 2, 3]"


@needs_sandbox
def test_a_right_program_passes_and_a_wrong_one_tells_where() -> None:
    assert check(GOOD, TESTS) == sandbox.Verdict(True, "")
    verdict = check("def f(x):\n    return 2", TESTS)
    assert not verdict.passed
    assert verdict.detail.endswith("assert [f(n) for n in range(3)] == [1, 2, 3]")
    assert "ZeroDivisionError" in check("def f(x):\n    return 1 / 0", TESTS).detail
    assert "SyntaxError" in check("def f(x:", TESTS).detail
    assert "NameError" in check("def g(x):\n    return x + 1", TESTS).detail
    assert "processor time" in check("def f(x):\n    while True: pass", TESTS, limits=SHORT).detail
    assert "MemoryError" in check("def f(x):\n    return bytearray(10 << 30)", TESTS).detail


FORGERIES = {
    "exits": "import sys\nsys.exit(0)",
    "exits in a call": "import sys\ndef f(x):\n    sys.exit(0)",
    "ends at once": "import os\nos._exit(0)",
    "ends at once in a call": "import os\ndef f(x):\n    os._exit(0)",
    "prints": "print('passed')\nimport os\nos._exit(0)",
    "writes everywhere": """
        import os
        for fd in range(3, 64):
            for text in (b"passed", (6).to_bytes(8, "little") + b"passed"):
                try: os.write(fd, text)
                except OSError: pass
        os._exit(0)""",
    "writes everywhere in a call": """
        import os
        def f(x):
            for fd in range(3, 64):
                try: os.write(fd, b"passed")
                except OSError: pass
            os._exit(0)""",
    "equals everything": """
        class Anything:
            def __eq__(self, other): return True
        def f(x): return Anything()""",
    "equals everything as a number": """
        class Anything(int):
            def __eq__(self, other): return True
            def __hash__(self): return 0
        def f(x): return Anything(7)""",
    "patches the comparison": """
        import builtins, operator
        builtins.AssertionError = None
        builtins.all = lambda *a: True
        def f(x): return None""",
    "brings its own built-ins": "def f(x): return 7\ndef range(*a): return []\ndef len(x): return 1\nassert_ = print",
    "replaces the harness": """
        import sys
        main = sys.modules["__main__"]
        main._answer = lambda module, request: main._plain(("value", 2))
        main._result = main._check = lambda *a: ""
        def f(x): return 2""",
    "gives code to unpickle": """
        class Code:
            def __reduce__(self):
                write = "import os\\nfor fd in range(3, 64):\\n  try: os.write(fd, b'passed')\\n  except OSError: 0"
                return exec, (write + "\\nos._exit(0)",)
        def f(x): return Code()""",
    "reads the tests": """
        import gc, sys
        found = [o for o in gc.get_objects() if isinstance(o, str) and "assert f" in o]
        def f(x): return found""",
    "asks for the tests": "import sys\ntests = sys.stdin.read() + open(0).read()\ndef f(x): return tests",
    "raises what means success": "def f(x): raise StopIteration",
    "threads that end it": """
        import os, threading
        def f(x):
            threading.Timer(0.1, os._exit, [0]).start()
            while True: pass""",
}


@needs_sandbox
@pytest.mark.parametrize("name", FORGERIES)
def test_a_program_cannot_pass_by_pretending(name: str) -> None:
    # The same tests pass a right program, so that the forgery is what fails.
    assert not check(program(FORGERIES[name]), TESTS, limits=SHORT).passed


@needs_sandbox
def test_what_goes_between_program_and_tests_is_plain_data() -> None:
    source = program("""
        import collections, datetime, decimal, fractions
        Point = collections.namedtuple("Point", "x y")
        def same(x): return x
        def many():
            counts = collections.Counter("aab")
            lazy = collections.defaultdict(lambda: 0, a=1)
            return [counts, lazy, collections.OrderedDict(b=2), Point(1, 2)]
        def numbers(): yield from (1, 2)
        def forever():
            while True: yield 0
        def keyword(*, a): return a
        def wrong(): raise KeyError("k")
        class Solution:
            def __init__(self): self.calls = 0
            def add(self, x):
                self.calls += 1
                return [x, self.calls]
    """)
    tests = program("""
        import math
        for x in (1, 2.5, -0.0, "é", b"b", None, True, (1, [2, {3: {4}}]), frozenset([1]), 1j, range(3), 10**400):
            assert same(x) == x and type(same(x)) is type(x), x
        assert math.isnan(same(float("nan")))
        assert many() == [{"a": 2, "b": 1}, {"a": 1}, {"b": 2}, (1, 2)]
        assert list(numbers()) == [1, 2] and numbers() != [1, 2]
        assert next(forever()) == 0
        assert keyword(a=3) == 3
        try:
            wrong()
        except KeyError:
            pass
        else:
            raise AssertionError
        assert add(1) == [1, 1] == add(1)
    """)
    assert check(source, tests) == sandbox.Verdict(True, "")
    assert "no plain data" in check("class A: pass\ndef f(): return A()", "f()").detail
    assert not check("def f(): return lambda: 1", "f()").passed


@needs_sandbox
def test_setup_is_the_tests_own() -> None:
    setup = "def helper(x):\n    return x * 2\n\ndef f(x):\n    pass"
    tests = "assert f(helper(2)) == 5"
    assert check(GOOD, tests, setup=setup, names=["f"]).passed
    assert not check(GOOD, tests, setup=setup).passed  # f is the setup's, too
    assert "SyntaxError" in check(GOOD, "assert f(").detail


def test_the_canonical_solutions_pass_and_stubs_do_not() -> None:
    if sandbox.refusal() is not None:
        pytest.skip(str(sandbox.refusal()))
    task = load("humaneval")
    assert len(task.items) == 164

    def passes(pair: tuple[int, str]) -> bool:
        item = task.items[pair[0]]
        return task.score(item, f"<think>\nhm\n</think>\n```python\n{pair[1]}\n```").correct

    right = [(number, item.solution) for number, item in enumerate(task.items)]
    stubs = [(number, f"def {item.meta['name']}(*_, **__):\n    pass") for number, item in enumerate(task.items)]
    with ThreadPoolExecutor(2) as pool:
        assert sum(pool.map(passes, right)) == 164
        assert sum(pool.map(passes, stubs)) == 0


def test_without_a_sandbox_nothing_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    source = f"open({str(mark)!r}, 'w')"
    try:
        for path, reason in ((tmp_path, "install the package bubblewrap"), (broken_bwrap(tmp_path / "b"), "No perm")):
            monkeypatch.setenv("PATH", str(path))
            sandbox.refusal.cache_clear()
            for attempt in (lambda: run(source), lambda: check(source, ""), lambda: load("humaneval", limit=1)):
                with pytest.raises(UserError, match=reason):
                    attempt()
        assert not mark.exists()
    finally:
        monkeypatch.undo()
        sandbox.refusal.cache_clear()


def broken_bwrap(folder: Path) -> Path:
    """Return a folder with a bwrap as where user namespaces are forbidden."""
    folder.mkdir()
    script = folder / "bwrap"
    script.write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n")
    script.chmod(0o755)
    return folder


def test_the_filter_forbids_by_the_kernels_numbers() -> None:
    assert seccomp.program("riscv64") is None
    found = {machine: seccomp.program(machine) for machine in ("x86_64", "aarch64")}
    for code in found.values():
        assert code is not None
        assert len(code) % 8 == 0
        assert len(code) // 8 < 256  # jumps of one byte reach everywhere
    assert found["x86_64"] != found["aarch64"]
    # The numbers of this machine, as its C library knows them.
    header = Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")
    if platform.machine() != "x86_64" or not header.is_file():
        pytest.skip("the kernel's header of x86-64 is not installed")
    lines = (line.split() for line in header.read_text().splitlines() if line.startswith("#define __NR_"))
    numbers = {words[1].removeprefix("__NR_"): int(words[2]) for words in lines if words[2].isdigit()}
    _, clone, forbidden = seccomp._NUMBERS["x86_64"]
    assert clone == numbers["clone"]
    assert seccomp._CLONE3 == numbers["clone3"]
    for name, number in forbidden.items():
        assert numbers[name] == number, name
