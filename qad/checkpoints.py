"""The checkpoints of a run as folders: where they are, which is the last whole one, whether it is what was written."""

import json
from pathlib import Path

from transformers.trainer_utils import get_last_checkpoint

from qad.errors import UserError
from qad.files import is_dropping, recover_folder, sha256_of_file

CHECKPOINTS = "checkpoints"
_FILES = "files.json"


def checkpoint_step(checkpoint: Path) -> int:
    """Return the optimizer step after which a checkpoint was written."""
    return int(checkpoint.name.rpartition("-")[2])


def last_checkpoint(run: Path) -> Path | None:
    """Return the newest whole checkpoint of a run, and clear away what a kill left half written."""
    folder = run / CHECKPOINTS
    if not folder.is_dir():
        return None
    for leftover in list(folder.glob(".checkpoint-*")):
        name = leftover.name[1:].split(".")[0]
        recover_folder(folder / name)
    found = get_last_checkpoint(str(folder))
    return None if found is None else Path(found)


def seal_checkpoint(folder: Path) -> None:
    """Write down the SHA-256 of each file of a checkpoint that is complete."""
    hashes = {path.name: sha256_of_file(path) for path in sorted(folder.iterdir())}
    (folder / _FILES).write_text(json.dumps(hashes, indent=1) + "\n")


def check_checkpoint(folder: Path) -> None:
    """Check that a checkpoint's files are those that were written.

    Training that goes on from one changed bit would end elsewhere and say nothing of it.

    Raises:
        UserError: They are not.
    """
    remedy = f"delete {folder} to start this run from its beginning, or copy the run again"
    if not (folder / _FILES).is_file():
        raise UserError(f"the checkpoint {folder.name} has no {_FILES}: it is damaged, or an older qad's; {remedy}")
    try:
        hashes = dict(json.loads((folder / _FILES).read_text()))
        there = {path.name for path in folder.iterdir() if path.name != _FILES and not is_dropping(path)}
        changed = sorted(there - hashes.keys()) + [
            name for name, wanted in hashes.items() if sha256_of_file(folder / name) != wanted
        ]
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"the checkpoint {folder.name} cannot be read ({error}); {remedy}") from error
    if changed:
        raise UserError(f"the checkpoint {folder.name} is damaged ({changed[0]} is not as it was written); {remedy}")
