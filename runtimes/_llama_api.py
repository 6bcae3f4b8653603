"""The functions of llama.cpp, as llama-cpp-python binds them, and what it logged when one of them failed."""

import collections
import ctypes
import functools
import importlib.util
from typing import Any

from qad.errors import UserError

# GGML_LOG_LEVEL_DEBUG
_DEBUG = 1
_INSTALL = "pip install llama-cpp-python (it compiles C++: a compiler, cmake and make are needed)"


def available() -> str | None:
    """Return None if llama.cpp can run here, else the reason and the remedy."""
    if importlib.util.find_spec("llama_cpp") is None:
        return f"llama-cpp-python is not installed: {_INSTALL}"
    try:
        import llama_cpp  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:
        return f"llama-cpp-python cannot be loaded ({error}): reinstall it with {_INSTALL}"
    return None


@functools.cache
def library() -> Any:
    """Return the bindings, initialized once, with their log kept silent.

    Typed as Any: the bindings take ctypes values that their annotations do not describe.
    """
    reason = available()
    if reason is not None:
        raise UserError(reason)
    import llama_cpp

    llama_cpp.llama_log_set(_log_callback(), ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    return llama_cpp


@functools.cache
def _log_lines() -> collections.deque[str]:
    """Return the latest lines that llama.cpp logged, kept to explain a failure."""
    return collections.deque(maxlen=200)


@functools.cache
def _log_callback() -> Any:
    """Return the function that llama.cpp logs to. Cached, because C keeps a bare pointer to it."""
    import llama_cpp

    lines = _log_lines()

    @llama_cpp.llama_log_callback
    def keep(level: int, text: bytes, _data: Any) -> None:
        # Debugging lines are so many that they would push out what explains a failure.
        if level != _DEBUG:
            lines.append(text.decode("utf-8", errors="replace"))

    return keep


def quiet() -> None:
    """Keep llama.cpp's log from the terminal; ``last_failure`` tells what is in it.

    Raises:
        UserError: llama.cpp is not available.
    """
    library()
    _log_lines().clear()


def last_failure() -> str:
    """Return the lines of llama.cpp's log that tell why something failed."""
    lines = "".join(_log_lines()).splitlines()
    telling = [line for line in lines if "error" in line.lower() or "fail" in line.lower()]
    return "; ".join(dict.fromkeys(line.strip() for line in (telling or lines)[-3:])) or "it gave no reason"
