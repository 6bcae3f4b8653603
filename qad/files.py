"""Safe writing: a file or folder appears whole under its name or not at all, and what stood there before survives."""

import contextlib
import errno
import glob
import hashlib
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from io import BufferedWriter
from pathlib import Path

from qad.errors import UserError
from qad.locks import locked

_NEARLY_FULL = 1 << 20  # bytes
_DROPPINGS = {".ds_store", "thumbs.db", "ehthumbs.db", "desktop.ini", ".directory"}
# How long another writer of the same target is waited for: records are written in a moment, models are not.
_PATIENCE = 2.0  # seconds
_FLUSH = 1 << 23  # bytes of which it is worth telling the system


def explain(error: BaseException, target: Path) -> UserError | None:
    """Return the user's error for a place that cannot be written, None for anything else.

    Args:
        error: What writing raised. torch.save and the Rust libraries wrap the system's error in their own.
        target: What was to be written.
    """
    number = error.errno if isinstance(error, OSError) else None
    text = str(error)
    full = number in (errno.ENOSPC, errno.EDQUOT) or "No space left" in text or "os error 28" in text
    if not full and isinstance(error, RuntimeError) and "inline_container" in text:
        # torch.save notices that bytes are missing, not why.
        with contextlib.suppress(OSError):
            full = shutil.disk_usage(target.parent).free < _NEARLY_FULL
    if full:
        return UserError(
            f"the disk is full while writing {target}; what was there before is untouched: free some space"
        )
    if number in (errno.EACCES, errno.EROFS, errno.EPERM):
        return UserError(f"no permission to write {target}: choose another output with -o")
    if number in (errno.ENOTDIR, errno.EEXIST):
        return UserError(f"{target} lies under something that is no folder: choose another output with -o")
    if number == errno.ENAMETOOLONG:
        return UserError(f"{target} is too long a name: choose another output with -o")
    return None


def _explain_here(error: Exception, target: Path, temporary: Path | None) -> UserError | None:
    """Return ``explain``'s error, or that of a writer whose temporary file or folder somebody else deleted."""
    if temporary is not None:
        missing = error.filename if isinstance(error, FileNotFoundError) else None
        within = missing is not None and Path(os.fsdecode(missing)).is_relative_to(temporary)
        if within or not temporary.exists():
            return UserError(
                f"{target} is being written by another process too, which deleted what this one had written so far: "
                "write one after the other, or name another place with -o"
            )
    return explain(error, target)


def cache_folder() -> Path:
    """Return where qad keeps what it can make again: ``$XDG_CACHE_HOME/qad`` or ``~/.cache/qad``.

    Raises:
        UserError: There is no home folder.
    """
    if chosen := os.environ.get("XDG_CACHE_HOME"):
        return Path(chosen) / "qad"
    try:
        return Path.home() / ".cache" / "qad"
    except RuntimeError:  # a user that the machine does not know, as containers have them
        raise UserError("there is no home folder for qad's cache: set XDG_CACHE_HOME") from None


def _takes_nothing(folder: Path) -> UserError:
    """Return the error for a folder that is there but is one of the system's, such as /proc."""
    return UserError(f"{folder} takes no files: choose another output with -o")


def _followed(target: Path) -> Path:
    """Return what a link points to, there or not; any other path, and a link that leads to itself, as it is."""
    return Path(os.path.realpath(target)) if target.is_symlink() else target


def _usual_permissions(path: Path) -> None:
    """Give a file or folder the permissions of any new one: temporary ones, and those of safetensors, are private."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)


def check_output(target: Path, option: str) -> None:
    """Raise now what ``replacing_file`` would raise at the end of long work.

    Args:
        target: File that will be written.
        option: What the user named it with.

    Raises:
        UserError: ``target`` is a folder, a device or a pipe, or lies in no folder, as a slip of the fingers would have
            it, or in one where this process may not write.
    """
    if target.is_dir():
        raise UserError(f"{target} is a folder: name a file with {option}")
    if target.exists() and not target.is_file():
        raise UserError(f"{target} is a device or a pipe: name a file with {option}")
    folder = target.absolute().parent
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder: make it, or name another file with {option}")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = "takes no files" if isinstance(error, FileNotFoundError) else os.strerror(error.errno or 0).lower()
        raise UserError(
            f"{target} cannot be written ({folder}: {reason}): choose another file with {option}"
        ) from error


@contextlib.contextmanager
def replacing_file(target: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``target``; on success flush it to disk and rename it over ``target``.

    Temporary files that a killed writer of the same target left are deleted.

    Raises:
        UserError: The disk is full, the place is not writable, ``target`` is a folder, a device or a pipe, or another
            process writes it. What stood there is untouched.
    """
    temporary: Path | None = None
    lock = contextlib.ExitStack()
    try:
        if target.is_dir():
            raise UserError(f"{target} is a folder: name a file with -o")
        if target.exists() and not target.is_file():
            # A rename would put a file in the place of /dev/null, for every process of the machine.
            raise UserError(f"{target} is a device or a pipe: name a file with -o")
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = _alone(target, _temporary_file, lock)
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        _usual_permissions(temporary)
        temporary.replace(target)
    except Exception as error:
        explained = _explain_here(error, target, temporary)
        if explained is None:
            raise
        raise explained from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        lock.close()
        if temporary is None:  # an interrupt may have come between its making and its name
            _others_write(target)


@contextlib.contextmanager
def replacing_folder(target: Path) -> Iterator[Path]:
    """Yield a temporary folder beside ``target``; on success rename it to ``target``.

    A ``target`` that is a link stays one: what it points to is replaced.
    A previous ``target`` is moved aside first and deleted last. A crash between the two renames leaves it under
    ``.<name>.previous``, from where ``recover_folder`` brings it back.

    Raises:
        UserError: The disk is full, the place is not writable, ``target`` is a file, or another process writes it. The
            previous folder is untouched.
    """
    target = _followed(target)
    temporary: Path | None = None
    lock = contextlib.ExitStack()
    previous = target.parent / f".{target.name}.previous"
    try:
        if target.is_file():
            raise UserError(f"{target} is a file: name a folder with -o")
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = _alone(target, _temporary_folder, lock)
        _recover(target)
        yield temporary
        for path in temporary.rglob("*"):
            if path.is_file():
                with path.open("rb+") as file:
                    os.fsync(file.fileno())
            _usual_permissions(path)
        _usual_permissions(temporary)
        if target.exists():
            target.rename(previous)
        temporary.rename(target)
        shutil.rmtree(previous, ignore_errors=True)
    except Exception as error:
        explained = _explain_here(error, target, temporary)
        if explained is None:
            raise
        raise explained from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        lock.close()
        if temporary is None:  # as above
            _others_write(target)


def recover_folder(target: Path) -> None:
    """Finish what a crash within ``replacing_folder`` left half done, and delete its temporary folders.

    Where another process writes the folder just now, nothing is done: it is about to finish that itself.
    """
    target = _followed(target)
    if not _others_write(target):
        _recover(target)


def _recover(target: Path) -> None:
    """Bring back a previous folder that has no successor, and delete one that has."""
    previous = target.parent / f".{target.name}.previous"
    if previous.exists():
        if target.exists():
            shutil.rmtree(previous, ignore_errors=True)
        else:
            previous.rename(target)


def _temporary_file(target: Path) -> Path:
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
    os.close(handle)
    return Path(name)


def _temporary_folder(target: Path) -> Path:
    return Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp"))


def _alone(target: Path, make: Callable[[Path], Path], lock: contextlib.ExitStack) -> Path:
    """Return a temporary file or folder for a target that nobody else writes.

    A writer is known by the lock on its temporary: what has none was left by a killed one and is deleted.

    Args:
        target: What will be written.
        make: Makes the temporary.
        lock: Gets the lock on it.

    Raises:
        UserError: Another process writes the target.
    """
    until = time.monotonic() + _PATIENCE
    while True:
        if not _others_write(target):
            try:
                temporary = make(target)
            except FileNotFoundError as error:
                raise _takes_nothing(target.parent) from error
            # Somebody else may take it for a leftover until it is locked, and both may have begun at once.
            with contextlib.suppress(FileNotFoundError):
                lock.enter_context(locked(temporary, wait=True))
            if temporary.exists() and not _others_write(target, besides=temporary):
                return temporary
            _delete(temporary)
            lock.close()
        if time.monotonic() > until:
            raise UserError(
                f"{target} is being written by another process: wait until it has ended, or name another place with -o"
            )
        time.sleep(random.uniform(0.02, 0.1))


def _others_write(target: Path, besides: Path | None = None) -> bool:
    """Return whether a process writes a target, and delete what killed ones left."""
    # Eight characters are what mkstemp draws: the temporary files of "a.b" are not those of "a".
    for temporary in target.parent.glob(f".{glob.escape(target.name)}.????????.tmp"):
        # By name: of a folder that was given as a relative path tempfile tells the whole one.
        if besides is None or temporary.name != besides.name:
            try:
                with locked(temporary):
                    _delete(temporary)
            except BlockingIOError:
                return True
            except OSError:  # gone by now, or somebody else's
                continue
    return False


def _delete(temporary: Path) -> None:
    if temporary.is_dir():
        shutil.rmtree(temporary, ignore_errors=True)
    else:
        temporary.unlink(missing_ok=True)


def is_dropping(path: Path) -> bool:
    """Return whether a file is what a file manager leaves in folders that it shows, and nobody's work.

    Finder's ``.DS_Store`` and, on file systems of others, its ``._`` files, which hold what these do not (Apple's
    AppleDouble); Explorer's ``Thumbs.db`` and ``desktop.ini``; Dolphin's ``.directory``.
    """
    return path.name.lower() in _DROPPINGS or (path.name.startswith("._") and path.is_file())


def begin_flush(file: BufferedWriter, start: int) -> int:
    """Let the system begin to bring a growing file to the disk, so that a flush at its end has little to wait for.

    Linux starts to write out what it is told that nobody will read soon. What it has not written yet it must keep, so a
    reader that comes at once still finds nearly all of it in memory.

    Args:
        file: The file, at its end.
        start: Where the part begins that was not begun with yet: 0, then what the last call returned.

    Returns:
        Where that part begins now.
    """
    end = file.tell()
    if end - start < _FLUSH or not hasattr(os, "posix_fadvise"):
        return start
    file.flush()
    with contextlib.suppress(OSError):  # advice that a file system does not take
        os.posix_fadvise(file.fileno(), start, end - start, os.POSIX_FADV_DONTNEED)
    return end


def sha256_of_file(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
