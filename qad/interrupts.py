"""Ctrl-C that is not lost.

Python raises KeyboardInterrupt wherever it happens to be, and throws it away where that is a destructor or a callback
of a C library: the program then runs on as if nobody had asked. Here the wish is remembered too, and long work asks for
it between its steps.
"""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

_asked = threading.Event()


def _remember(signum: int, frame: FrameType | None) -> None:
    _asked.set()
    raise KeyboardInterrupt


@contextlib.contextmanager
def remembered() -> Iterator[None]:
    """Remember an interrupt while the block runs. Outside the main thread, which gets no signals, nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, _remember)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        _asked.clear()


def check() -> None:
    """Raise KeyboardInterrupt if one was asked for, also if it was lost on the way."""
    if _asked.is_set():
        raise KeyboardInterrupt
