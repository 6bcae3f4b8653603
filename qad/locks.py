"""Locks of the operating system on files and folders: they end with the process that holds them, however it ends.

Nothing is written for them, so that nothing stays behind. Where the system or a file system has none (Windows, some
network drives) they do nothing.

Source: flock(2). A lock belongs to what was opened, not to the process: a second one in the same process is another's.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


@contextlib.contextmanager
def locked(path: Path, *, shared: bool = False, wait: bool = False) -> Iterator[None]:
    """Hold a lock on a file or folder while the block runs.

    Args:
        path: Of it; it has to be there.
        shared: Let others have a shared one too.
        wait: For those who have it; if not, raise.

    Raises:
        BlockingIOError: Somebody else has it.
        OSError: It cannot be opened.
    """
    if fcntl is None:
        yield
        return
    # Network drives lock by ranges of bytes, which wants a file that is open for writing.
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        try:
            fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(handle)
