"""The tokenizer of a Hugging Face folder or hub id.

Apart from ``qad.model``, because that module loads transformers' models: 130 MB of memory and some seconds, which
whoever only wants the tokenizer need not pay.
"""

import importlib.util
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from qad.errors import UserError

_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
# What a wrong conversion cuts otherwise. (White space at the beginning newer conversions cut otherwise on purpose.)
_PROBE = "The ledger says 12345 baskets, x² + ½; naïve façade — 漢字 👍\n\tdef f(x):  return [1, 2]"


def one_line(error: BaseException) -> str:
    """Return what another library's exception says, in one short line."""
    text = " ".join(str(error).split())[:300]
    return text if isinstance(error, (OSError, ValueError, RuntimeError)) else f"{type(error).__name__}: {text}"


def load_hf_tokenizer(source: str, local_only: bool = False) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a folder or hub id, with a pad token.

    Args:
        source: Folder, or hub id.
        local_only: Of a hub id, look into the cache only.

    Raises:
        UserError: It has none, it cannot be read, to convert it takes a library that is not installed, or what becomes
            of it is another tokenizer.
    """
    folder = Path(source)
    if folder.is_dir() and not any((folder / name).is_file() for name in _FILES):
        raise UserError(f"{source} holds no tokenizer ({', '.join(_FILES)}): copy those of its base model there")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=local_only)
    except Exception as error:  # whatever damaged files make transformers and tokenizers raise
        if libraries := _lacking(folder, error):
            raise UserError(
                f"the tokenizer of {source} has no tokenizer.json, and what it has instead is converted by a library "
                f"that is not installed: pip install {libraries}, or copy the tokenizer.json of a model with the same "
                "tokenizer there"
            ) from error
        raise UserError(f"the tokenizer of {source} cannot be read ({one_line(error)}): copy it again") from error
    _check_converted(folder, tokenizer)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _sentencepiece_model(folder: Path) -> Path | None:
    """Return the sentencepiece model that a folder's tokenizer is made from, None if it is made from something else."""
    file = folder / "tokenizer.model"
    if (folder / "tokenizer.json").is_file() or not file.is_file():
        return None
    with file.open("rb") as opened:
        # The tag of its first field; tiktoken's files of that name are lines of text.
        return file if opened.read(1) == b"\n" else None


def _lacking(folder: Path, error: Exception) -> str | None:
    """Return the libraries without which a tokenizer cannot be converted; None if none is missing."""
    missing = [name for name in ("sentencepiece", "tiktoken") if importlib.util.find_spec(name) is None]
    wanted = [name for name in missing if name in str(error)]
    if folder.is_dir() and "sentencepiece" in missing and _sentencepiece_model(folder) is not None:
        # transformers then takes it for tiktoken's, and asks for that.
        wanted = ["sentencepiece"]
    elif wanted and not folder.is_dir():
        wanted = missing
    # Without which sentencepiece's models are not parsed.
    return " ".join(name.replace("sentencepiece", "sentencepiece protobuf") for name in wanted) or None


def _check_converted(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that a tokenizer that was converted from a sentencepiece model cuts text as that does.

    Raises:
        UserError: It does not: its class says that it is of another kind than it is.
    """
    file = _sentencepiece_model(folder) if tokenizer.is_fast else None
    if file is None or importlib.util.find_spec("sentencepiece") is None:
        return
    import sentencepiece  # type: ignore[import-not-found]

    if sentencepiece.SentencePieceProcessor(model_file=str(file)).encode(_PROBE) != tokenizer.encode(
        _PROBE, add_special_tokens=False
    ):
        raise UserError(
            f"the tokenizer that transformers makes of {file} ({type(tokenizer).__name__}) cuts text otherwise than "
            "sentencepiece does with that file: copy the tokenizer.json of a model with the same tokenizer there"
        )
