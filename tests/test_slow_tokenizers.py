"""Tokenizers without a tokenizer.json: sentencepiece models, which a library converts, and programs of transformers."""

import importlib.util
import json
import struct
from pathlib import Path

import pytest

from qad.artifact import open_artifact
from qad.deliver import export_command
from qad.errors import UserError
from qad.export.gptq import run_hash
from qad.hf_tokenizer import load_hf_tokenizer
from tests.helpers_exports import seal
from tests.helpers_models import make_artifact

UNIGRAM, BPE = 1, 2
NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6
# No two of them make the first, so that merges never do; as a unigram it is the best of all.
MERGES = ("dger", "▁t", "he", "▁the", "▁l", "ed", "er", "in", "on", "sk", "ets", "et", "▁b", "al", "ll", "or")


def _field(number: int, value: bytes | str | int | float) -> bytes:
    """Return a field of a message as the protobuf encoding writes it; numbers below 128."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    if isinstance(value, float):
        return _varint(number << 3 | 5) + struct.pack("<f", value)
    content = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    groups = []
    while value > 127:
        groups.append(value & 127 | 128)
        value >>= 7
    return bytes([*groups, value])


def sentencepiece_folder(folder: Path, kind: int) -> Path:
    """Write a folder with a sentencepiece model as Llama 2 has one (sentencepiece_model.proto)."""
    pieces = [("<unk>", 0.0, UNKNOWN), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL)]
    pieces += [(f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256)]
    letters = [chr(sign) for sign in range(33, 127)] + ["▁"]
    pieces += [(text, -float(rank), NORMAL) for rank, text in enumerate((*MERGES, *letters))]
    message = b"".join(
        _field(1, _field(1, text) + _field(2, score) + _field(3, type_)) for text, score, type_ in pieces
    )
    message += _field(2, _field(3, kind) + _field(35, 1))
    message += _field(3, _field(1, "identity") + _field(3, 1) + _field(4, 0) + _field(5, 1))
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(message)
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return folder


@pytest.mark.skipif(importlib.util.find_spec("sentencepiece") is not None, reason="sentencepiece is installed")
def test_what_converts_a_tokenizer_is_told_where_it_is_missing(tmp_path: Path) -> None:
    told = r"has no tokenizer.json, .*: pip install sentencepiece protobuf, or copy the tokenizer.json of"
    with pytest.raises(UserError, match=told):
        load_hf_tokenizer(str(sentencepiece_folder(tmp_path / "slow", BPE)))


@pytest.mark.skipif(
    any(map(importlib.util.find_spec, ("sentencepiece", "tiktoken"))), reason="sentencepiece or tiktoken is installed"
)
def test_the_same_of_a_file_of_tiktoken(tmp_path: Path) -> None:
    folder = sentencepiece_folder(tmp_path / "slow", BPE)
    (folder / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")
    with pytest.raises(UserError, match=r"has no tokenizer.json, .*: pip install tiktoken, or copy"):
        load_hf_tokenizer(str(folder))


def test_a_converted_tokenizer_cuts_as_sentencepiece_does(tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")
    folder = sentencepiece_folder(tmp_path / "slow", BPE)
    tokenizer = load_hf_tokenizer(str(folder))
    own = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    for text in ("the ledger tells 12 baskets", "Zoë: x²\n\tthe  end"):
        assert tokenizer.encode(text, add_special_tokens=False) == own.encode(text)
    # What is saved of it needs no library any more.
    tokenizer.save_pretrained(tmp_path / "fast")
    assert (tmp_path / "fast" / "tokenizer.json").is_file()
    # One whose class says that it is of another kind.
    with pytest.raises(
        UserError, match=r"\(LlamaTokenizer\) cuts text otherwise than sentencepiece does with that file"
    ):
        load_hf_tokenizer(str(sentencepiece_folder(tmp_path / "other", UNIGRAM)))


def test_a_tokenizer_that_is_a_program_goes_into_the_formats_that_keep_its_files(tmp_path: Path) -> None:
    artifact = make_artifact(tmp_path / "run", "llama-tied", eos_token_id=2)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (artifact.folder / name).unlink()
    words = {text: index for index, text in enumerate(("<unk>", "a@@", "b</w>", "a</w>", "b@@"))}
    (artifact.folder / "vocab.json").write_text(json.dumps(words))
    (artifact.folder / "merges.txt").write_text("#version: 0.2\na b</w>\n")
    (artifact.folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CTRLTokenizer"}))
    seal(artifact.folder)
    with pytest.raises(
        UserError, match=r"\(CTRLTokenizer\) is a program .*: use --format gptq or onnx, which keep its"
    ):
        export_command(tmp_path / "run", "gguf", tmp_path / "out.gguf", requantize=False)
    export_command(tmp_path / "run", "gptq", tmp_path / "out", requantize=False)
    assert run_hash(tmp_path / "out") == open_artifact(tmp_path / "run").run_hash
    assert (tmp_path / "out" / "vocab.json").is_file()
