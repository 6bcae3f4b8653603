"""What runs inside the sandbox. Not imported: ``sandbox`` passes this file's text to an isolated interpreter.

Three roles, each in a sandbox of its own:

- ``run``: a program that reads its input and prints.
- ``serve``: a program whose functions are called from outside. It gets arguments and gives results.
- ``check``: tests that call these functions through a socket. Program and tests never share a process, and only plain
  data comes back, so that nothing a program does (printing, exiting, patching ``assert``, objects that equal
  everything) can make its tests pass.

Arguments: the role, six limits, then the descriptors of the socket and of the pipe for the verdict, and the names of
the functions. On the standard input come two lengths of eight bytes, the setup and the source that they count, and then
what the program may read.

Few imports: every program pays for them, and most of a check's time is Python's start.
"""

# Without the module in Python, which imports regular expressions.
import _pickle as pickle
import builtins
import io
import itertools
import os
import resource
import sys
import types

_PLAIN: tuple[type, ...] = (dict, list, tuple, set, frozenset, str, bytes, bytearray, bool, int, float)
_KNOWN = {
    "builtins": {"complex", "range", "slice", *(kind.__name__ for kind in _PLAIN)},
    "collections": {"deque"},
    "datetime": {"date", "datetime", "time", "timedelta"},
    "decimal": {"Decimal"},
    "fractions": {"Fraction"},
}
_LONGEST_MESSAGE = 64 << 20  # bytes
_LONGEST_ITERATOR = 100_000
_LONGEST_DETAIL = 300


def _limit(limits: list[int]) -> None:
    for name, limit in zip(("AS", "CPU", "FSIZE", "NOFILE", "NPROC", "CORE"), limits, strict=True):
        # At the soft limit of time comes a signal of its own, at the hard one the same as for any end.
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (limit, limit + (name == "CPU")))


def _read(descriptor: int, size: int) -> bytes:
    parts = []
    while size:
        part = os.read(descriptor, min(size, 1 << 20))
        if not part:
            raise EOFError
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _send(descriptor: int, message: bytes) -> None:
    data = memoryview(len(message).to_bytes(8, "little") + message)
    while data:
        data = data[os.write(descriptor, data) :]


def _receive(descriptor: int) -> bytes:
    size = int.from_bytes(_read(descriptor, 8), "little")
    if size > _LONGEST_MESSAGE:
        raise EOFError
    return _read(descriptor, size)


class _PlainPickler(pickle.Pickler):
    """Sends what derives from a plain type as that type: its own methods would be gone on the other side anyway."""

    def reducer_override(self, obj):
        for kind in _PLAIN:
            if isinstance(obj, kind) and type(obj) is not kind:
                return kind, (kind(obj),)
        return NotImplemented


class _PlainUnpickler(pickle.Unpickler):
    """Makes plain data only: what a program sends names no class or function of its own choice."""

    def find_class(self, module: str, name: str) -> object:
        if name not in _KNOWN.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name} is no plain data")
        __import__(module)
        return getattr(sys.modules[module], name)


def _plain(value: object) -> bytes:
    buffer = io.BytesIO()
    _PlainPickler(buffer, protocol=4).dump(value)
    return buffer.getvalue()


def _described(error: BaseException) -> tuple[str, str]:
    try:
        return type(error).__name__, str(error)[:_LONGEST_DETAIL]
    except Exception:
        return type(error).__name__, ""


def _module(name: str) -> types.ModuleType:
    """Return a module to execute a source in. Dataclasses look theirs up by its name."""
    module = types.ModuleType(name)
    sys.modules[name] = module
    return module


def _answer(module: types.ModuleType, request: bytes) -> bytes:
    """Call a function of the program and return what it did."""
    name, arguments, keywords = pickle.loads(request)
    try:
        # The class first: programs of contests import names such as `add` from everywhere.
        if hasattr(getattr(module, "Solution", None), name):
            function = getattr(module.Solution(), name)
        else:
            function = getattr(module, name, None)
        if function is None:
            return _plain(("raise", "NameError", f"{name} is not defined"))
        value = function(*arguments, **keywords)
        views = (type({}.keys()), type({}.values()), type({}.items()))
        if isinstance(value, views) or (hasattr(type(value), "__next__") and hasattr(type(value), "__iter__")):
            return _plain(("iterator", list(itertools.islice(value, _LONGEST_ITERATOR))))
        return _plain(("value", value))
    except pickle.PicklingError:
        return _plain(("raise", "TypeError", f"{name} returns what is no plain data"))
    except BaseException as error:
        return _plain(("raise", *_described(error)))


def _serve(source: str, channel: int) -> None:
    module = _module("candidate")
    try:
        exec(compile(source, "<candidate>", "exec"), module.__dict__)
    except BaseException as error:
        _send(channel, _plain(("raise", *_described(error))))
        return
    _send(channel, _plain(("value", None)))
    while True:
        try:
            request = _receive(channel)
        except EOFError:
            return
        _send(channel, _answer(module, request))


class _Failed(BaseException):
    """The program itself failed, not a call of it."""


def _result(channel: int) -> object:
    """Return what came of a call, or raise what it raised."""
    try:
        message = _receive(channel)
    except (EOFError, OSError):
        raise _Failed("the program ended") from None
    try:
        kind, *rest = _PlainUnpickler(io.BytesIO(message)).load()
        if kind == "value":
            (value,) = rest
            return value
        if kind == "iterator":
            return iter(list(rest[0]))
        name, text = (str(part)[:_LONGEST_DETAIL] for part in rest)
    except Exception as error:
        raise _Failed(f"a result cannot be compared: {_described(error)[1]}") from None
    known = getattr(builtins, name, None)
    if isinstance(known, type) and issubclass(known, Exception):
        try:
            raised = known(text)
        except Exception:
            raised = RuntimeError(f"{name}: {text}")
    else:
        raised = RuntimeError(f"{name}: {text}")
    raise raised


class _RequestPickler(pickle.Pickler):
    """Refuses what the tests define themselves, which the program's side could not find."""

    def reducer_override(self, obj):
        if isinstance(obj, types.FunctionType | type) and obj.__module__ == "tests":
            raise pickle.PicklingError(f"{obj.__qualname__} is the tests' own")
        return NotImplemented


def _request(call: tuple[object, ...]) -> bytes:
    buffer = io.BytesIO()
    _RequestPickler(buffer, protocol=4).dump(call)
    return buffer.getvalue()


def _stand_in(channel: int, name: str) -> object:
    def call(*arguments: object, **keywords: object) -> object:
        try:
            request = _request((name, arguments, keywords))
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            # Not the program's fault, and nothing that a test may catch.
            raise _Failed(f"cannot be judged: the tests pass {name} what is no plain data ({error})") from None
        _send(channel, request)
        return _result(channel)

    call.__name__ = name
    return call


def _place(error: BaseException, tests: str) -> str:
    """Return the line of the tests that failed."""
    line, trace = 0, error.__traceback__
    while trace:
        if trace.tb_frame.f_code.co_filename == "<tests>":
            line = trace.tb_lineno
        trace = trace.tb_next
    return tests.split("\n")[line - 1].strip() if line else ""


def _check(setup: str, tests: str, channel: int, names: list[str]) -> str:
    """Run tests and return where they did not pass, empty if they did."""
    module = _module("tests")
    try:
        _result(channel)
        exec(compile(setup, "<setup>", "exec"), module.__dict__)
        for name in names:
            module.__dict__[name] = _stand_in(channel, name)
        exec(compile(tests, "<tests>", "exec"), module.__dict__)
    except _Failed as failure:
        return str(failure)
    except BaseException as error:
        return ": ".join(part for part in (*_described(error), _place(error, tests)) if part)
    return ""


def _main() -> None:
    role, *rest = sys.argv[1:]
    sys.argv = [""]
    _limit([int(limit) for limit in rest[:6]])
    sizes = [int.from_bytes(_read(0, 8), "little") for _ in range(2)]
    setup, source = (_read(0, size).decode() for size in sizes)
    if role == "run":
        exec(compile(source, "<program>", "exec"), _module("__main__").__dict__)
    elif role == "serve":
        _serve(source, int(rest[6]))
    else:
        failure = _check(setup, source, int(rest[6]), rest[8:])
        os.write(int(rest[7]), (f"failed {failure[:_LONGEST_DETAIL]}" if failure else "passed").encode())


if __name__ == "__main__":
    _main()
