"""Sentencepiece-like tokenizers: llama.cpp cuts text as they do, or the export says why it would not."""

import functools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from qad import export, runtimes
from qad.architectures import _APPROXIMATED, detect_splitter
from qad.errors import UserError
from qad.model import load_tokenizer
from qad.sentencepieces import SPACE, merge_by_score, read_pieces
from tests.helpers_models import MODELS, TOKENIZERS, make_artifact, make_tokenizer, verify_text
from tests.helpers_runtimes import skip_without

FAMILIES = [name for name, family in TOKENIZERS.items() if family.prefix is not None]
_PARTS = (
    " ",
    "  ",
    "=",
    "==",
    "\n",
    "\t",
    "e",
    "th",
    "The",
    "ing",
    "12",
    "é",
    "漢",
    "👍🏽",
    "न",
    "\u0301",
    "\x00",
    "▁",
)


def hostile(family: str) -> list[str]:
    """Return texts that merging by score, or special tokens, could get wrong."""
    rest = random.Random(0)
    special = [*TOKENIZERS[family].special, *TOKENIZERS[family].plain, "<0x41>", "[PAD3]", "[INST]"]
    # Where a text holds U+2581 itself, a user-defined run of it is not cut out first (see the module).
    parts = [part for part in (*_PARTS, *special) if family != "gemma" or SPACE not in part]
    texts = [sign * length + end for sign in " =-\n" for length in range(1, 21) for end in ("", "x")]
    texts += [f"{one}{gap}word {one}" for one in special for gap in ("", " ", "\n", "  ") if one in parts]
    texts += ["".join(rest.choices(parts, k=rest.randint(1, 30))) for _ in range(300)]
    return [*texts, verify_text()]


@functools.cache
def texts_of(family: str) -> list[str]:
    return [text for text, _ in sorted(make_tokenizer(family).get_vocab().items(), key=lambda item: item[1])]


@pytest.mark.parametrize("family", FAMILIES)
def test_llamacpp_cuts_hostile_text_alike(family: str, tmp_path: Path) -> None:
    skip_without("llamacpp")
    case = next(case for case, tiny in MODELS.items() if tiny.tokenizer == family)
    file = tmp_path / "model.gguf"
    export.get("gguf").write(make_artifact(tmp_path, case), file)
    tokenizer, again = make_tokenizer(family), load_tokenizer(str(file))
    with runtimes.get("llamacpp").open(file, threads=1) as session:
        for text in hostile(family):
            wanted = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert session.tokenize(text) == wanted, repr(text)
            assert again(text, add_special_tokens=False)["input_ids"] == wanted, repr(text)


@pytest.mark.parametrize("family", FAMILIES)
def test_merging_by_score_is_merging_by_list(family: str) -> None:
    tokenizer: Any = make_tokenizer(family).backend_tokenizer
    scores = read_pieces(tokenizer, texts_of(family)).scores
    order = {token: round(-score) for token, score in scores.items()}
    known = [text for text in texts_of(family) if len(text) == 1]
    rest = random.Random(1)
    for _ in range(300):
        text = "".join(rest.choices([*known, SPACE * 2, "=", "th", "e"], k=rest.randint(1, 40)))
        assert merge_by_score(text, order) == [piece.value for piece in tokenizer.model.tokenize(text)], text


def _changed(change: Callable[[dict[str, Any]], Any]) -> Tokenizer:
    description = json.loads(make_tokenizer("mistral").backend_tokenizer.to_str())
    change(description)
    return Tokenizer.from_str(json.dumps(description))


def _metaspace(scheme: str) -> Callable[[dict[str, Any]], Any]:
    part = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": False}
    return lambda description: description.update(normalizer=None, pre_tokenizer=part)


def _drop_merge(description: dict[str, Any]) -> None:
    merges = description["model"]["merges"]
    merges.remove(next(merge for merge in merges if merges.count(merge) == 1 and len("".join(merge)) > 3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(_metaspace("first"), r"a space before text \('first'\).*Before training, set", id="first"),
        pytest.param(_metaspace("always"), r"a space before text \('always'\)", id="always"),
        pytest.param(lambda d: d.update(normalizer={"type": "NFKC"}), "prepares text by NFKC", id="normalizer"),
        pytest.param(lambda d: d["model"].update(ignore_merges=True), "sets ignore_merges", id="ignore_merges"),
        pytest.param(_drop_merge, "does not merge .* although .* is a token", id="missing merge"),
        pytest.param(
            lambda d: d["model"]["merges"].sort(key=lambda merge: merge[1]),
            "stand apart in its list",
            id="shuffled merges",
        ),
        pytest.param(lambda d: d["added_tokens"][1].update(normalized=True), "looks for '<s>'", id="normalized token"),
    ],
)
def test_what_llamacpp_would_cut_otherwise_is_refused(change: Callable[[dict[str, Any]], Any], message: str) -> None:
    tokenizer = _changed(change)
    with pytest.raises(UserError, match=message):
        read_pieces(tokenizer, texts_of("mistral"))


def test_without_a_token_for_each_byte() -> None:
    tokenizer = Tokenizer(models.BPE({"<unk>": 0, "a": 1}, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)  # type: ignore[assignment]
    with pytest.raises(UserError, match="no token <0x00>"):
        read_pieces(tokenizer, ["<unk>", "a"])


@pytest.mark.parametrize("splitter", _APPROXIMATED, ids=lambda splitter: splitter.name)
def test_splitters_that_llamacpp_only_approximates(splitter: Any) -> None:
    tokenizer = Tokenizer(models.BPE(ignore_merges=splitter.ignore_merges))
    tokenizer.pre_tokenizer = splitter.build()
    with pytest.raises(UserError, match=f"as {splitter.name} does, and llama.cpp does so for ASCII letters only"):
        detect_splitter(tokenizer)


def test_tokens_that_strip_are_phi3s_or_none(tmp_path: Path) -> None:
    artifact = make_artifact(tmp_path, "mistral")
    tokenizer = load_tokenizer(str(artifact.folder))
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False, lstrip=True)])  # type: ignore[list-item]
    backend = json.loads(tokenizer.backend_tokenizer.to_str())  # type: ignore[attr-defined]
    next(token for token in backend["added_tokens"] if token["content"] == "<tool>")["lstrip"] = True
    (artifact.folder / "tokenizer.json").write_text(json.dumps(backend))
    with pytest.raises(UserError, match="'<tool>' takes in white space"):
        export.get("gguf").write(artifact, tmp_path / "model.gguf")
