"""Safe writing: a file or folder appears whole under its name or not at all, and what stood there before survives."""

import contextlib
import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from qad.errors import UserError


def _explain(error: OSError, target: Path) -> UserError | None:
    """Return the user's error for a full or read-only disk, None for anything else."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(
            f"the disk is full while writing {target}; what was there before is untouched: free some space"
        )
    if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
        return UserError(f"no permission to write {target}: choose another output with -o")
    return None


@contextlib.contextmanager
def replacing_file(target: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``target``; on success flush it to disk and rename it over ``target``.

    Raises:
        UserError: The disk is full or the place is not writable. The previous file is untouched.
    """
    temporary: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
        os.close(handle)
        temporary = Path(name)
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(target)
    except OSError as error:
        explained = _explain(error, target)
        raise explained or error from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_folder(target: Path) -> Iterator[Path]:
    """Yield a temporary folder beside ``target``; on success rename it to ``target``.

    A previous ``target`` is moved aside first and deleted last. A crash between the two renames leaves it under
    ``.<name>.previous``, from where ``recover_folder`` brings it back.

    Raises:
        UserError: The disk is full or the place is not writable. The previous folder is untouched.
    """
    temporary: Path | None = None
    previous = target.parent / f".{target.name}.previous"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        recover_folder(target)
        temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp"))
        yield temporary
        for path in temporary.rglob("*"):
            if path.is_file():
                with path.open("rb+") as file:
                    os.fsync(file.fileno())
        temporary.chmod(0o755)
        if target.exists():
            target.rename(previous)
        temporary.rename(target)
        shutil.rmtree(previous, ignore_errors=True)
    except OSError as error:
        explained = _explain(error, target)
        raise explained or error from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def recover_folder(target: Path) -> None:
    """Finish what a crash within ``replacing_folder`` left half done, and delete its temporary folders."""
    previous = target.parent / f".{target.name}.previous"
    if previous.exists():
        if target.exists():
            shutil.rmtree(previous, ignore_errors=True)
        else:
            previous.rename(target)
    for leftover in target.parent.glob(f".{target.name}.*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)


def sha256_of_file(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
