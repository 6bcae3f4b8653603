"""What the formats that are folders share: what lies beside the weights, and which folder may be replaced."""

import json
import shutil
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from qad.artifact import Artifact
from qad.errors import UserError
from qad.files import is_dropping
from qad.hf_tokenizer import one_line

# Written anew, or read by nobody but qad.
_OWN_FILES = {"artifact.json", "weights.safetensors", "config.json", "generation_config.json"}
# Files that tokenizers of transformers consist of: an earlier export may have come from a run with another one.
_TOKENIZER_FILES = {
    "added_tokens.json",
    "chat_template.jinja",
    "merges.txt",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
}


def copy_companions(artifact: Artifact, tokenizer: Any, folder: Path) -> None:
    """Copy the tokenizer's files and the chat template, and write the generation settings."""
    for file in artifact.folder.iterdir():
        if file.is_file() and file.name not in _OWN_FILES and not is_dropping(file):
            shutil.copyfile(file, folder / file.name)
    _generation_config(artifact, tokenizer).save_pretrained(folder)


def _generation_config(artifact: Artifact, tokenizer: Any) -> GenerationConfig:
    """Return the artifact's generation settings; made from special tokens where it has none of its own.

    Raises:
        UserError: Its own are damaged.
    """
    file = artifact.folder / "generation_config.json"
    if file.is_file():
        try:
            return GenerationConfig.from_pretrained(artifact.folder)
        except Exception as error:  # whatever a damaged file makes transformers raise
            raise UserError(f"{file} cannot be read ({one_line(error)}): copy it again, or delete it") from error
    ends = artifact.config.get("eos_token_id")
    known = [*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id]
    unique = list(dict.fromkeys(token for token in known if token is not None))
    return GenerationConfig(
        bos_token_id=artifact.config.get("bos_token_id"),
        eos_token_id=unique[0] if len(unique) == 1 else (unique or None),
        pad_token_id=tokenizer.pad_token_id,
    )


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Write an object as indented JSON."""
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def check_target(
    artifact: Artifact,
    folder: Path,
    run_hash: Callable[[Path], str | None],
    format: str,  # noqa: A002
    files: Iterable[str],
) -> None:
    """Check that replacing a folder destroys nothing but an earlier export.

    Args:
        artifact: What is to be written there.
        folder: Where.
        run_hash: Returns the run that an export of the format comes from.
        format: What the message calls the format.
        files: Patterns of the names that the format gives to its own files.

    Raises:
        UserError: It is a file, or holds something else.
    """
    if folder.is_file():
        raise UserError(f"{folder} is a file, and {format} is a folder: name it otherwise with -o")
    entries = [entry for entry in folder.iterdir() if not is_dropping(entry)] if folder.is_dir() else []
    if not entries:
        return
    try:
        ours = run_hash(folder) is not None
    except UserError:
        ours = False
    if not ours or artifact.folder.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{folder} holds something that is no {format} export of qad: name another folder with -o")
    known = _TOKENIZER_FILES | {file.name for file in artifact.folder.iterdir()}
    others = sorted(
        entry.name
        for entry in entries
        if not entry.is_file() or not (entry.name in known or any(fnmatchcase(entry.name, name) for name in files))
    )
    if others:
        listed = ", ".join(others[:3]) + (f" and {len(others) - 3} more" if len(others) > 3 else "")
        raise UserError(
            f"{folder} is an earlier export and would be replaced, but {listed} in it did not come from qad: "
            "move that elsewhere, or name another folder with -o"
        )
