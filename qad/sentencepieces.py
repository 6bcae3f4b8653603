"""Whether llama.cpp can cut text as a sentencepiece-like tokenizer does, and with which scores.

Such a tokenizer (Llama 2, Mistral, Phi-3, Gemma) marks spaces with U+2581 and merges characters of the whole text; what
it has no token for becomes bytes. Hugging Face applies a list of merges in their order. llama.cpp has no such list: it
merges whatever neighbours make a token, the token of the highest score first, the leftmost first among equals. Both do
the same if every two tokens that make a third are a merge, and if the merges of one token follow each other, which then
gives it its score. Both are checked here, because a vocabulary that breaks either is cut wrongly without any message.

What is given up: where a text itself holds U+2581, an added token of nothing but these is not cut out of it first.

Source: ``llm_tokenizer_spm`` of llama.cpp, ``BPE`` of the tokenizers library.
"""

import heapq
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from qad.errors import UserError

SPACE = "\u2581"
_PREPEND = {"type": "Prepend", "prepend": SPACE}
_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
_WITHOUT = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")


@dataclass(frozen=True)
class SentencePieces:
    """What a GGUF file says of such a tokenizer.

    Attributes:
        scores: Token -> score, of the tokens that merges make.
        space_prefix: Whether a space is put before text, at the start and after each special token.
    """

    scores: Mapping[str, float]
    space_prefix: bool


def is_sentencepieces(tokenizer: Tokenizer) -> bool:
    """Return whether a tokenizer is of this kind."""
    return type(tokenizer.model).__name__ == "BPE" and bool(tokenizer.model.byte_fallback)


def byte_token(value: int) -> str:
    """Return the token of a byte."""
    return f"<0x{value:02X}>"


def read_pieces(tokenizer: Tokenizer, texts: list[str]) -> SentencePieces:
    """Return scores under which llama.cpp cuts text as a tokenizer does.

    Args:
        tokenizer: A sentencepiece-like tokenizer.
        texts: Every token that the file will hold, added and unused ones included.

    Raises:
        UserError: There are none; the message says why.
    """
    description = json.loads(tokenizer.to_str())
    space_prefix = _space_prefix(description)
    model = description["model"]
    if strange := [key for key in _WITHOUT if model.get(key)]:
        raise _refusal(f"it sets {strange[0]}, which llama.cpp does not know")
    if missing := [byte_token(value) for value in range(256) if byte_token(value) not in model["vocab"]]:
        raise _refusal(f"it has no token {missing[0]}, and llama.cpp takes bytes for what has no token")
    merges = [tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    order = _order(merges)
    _check_complete(merges, _formed_by_text(description, texts))
    _check_ties(tokenizer, merges, order)
    return SentencePieces({token: float(-rank) for token, rank in order.items()}, space_prefix)


def _refusal(reason: str) -> UserError:
    return UserError(f"llama.cpp would cut text differently from the model's tokenizer: {reason}")


def _flat(part: dict[str, Any] | None, inside: str) -> list[dict[str, Any]]:
    if part is None:
        return []
    return list(part[inside]) if part["type"] == "Sequence" else [part]


def _space_prefix(description: dict[str, Any]) -> bool:
    """Return whether text gets a leading space, if spaces are treated in a way that llama.cpp knows."""
    normalizers = _flat(description["normalizer"], "normalizers")
    splitters = _flat(description["pre_tokenizer"], "pretokenizers")
    # Nothing is left to split at when all spaces are replaced.
    if _REPLACE in normalizers:
        splitters = [part for part in splitters if part.get("pattern") != {"String": " "}]
    metaspace = [part for part in splitters if part["type"] == "Metaspace"]
    if normalizers in ([_PREPEND, _REPLACE], [_REPLACE]) and not splitters:
        prefix = _PREPEND in normalizers
    elif not normalizers and splitters == metaspace and len(metaspace) == 1 and not metaspace[0].get("split", True):
        scheme = metaspace[0].get("prepend_scheme", "always")
        if scheme != "never":
            raise _refusal(
                f"it puts a space before text ({scheme!r}) where there is none, llama.cpp at the start and after each "
                "special token in any case. Before training, set in its tokenizer.json pre_tokenizer to null and "
                "normalizer to the sequence Prepend, Replace (as of Phi-3), and in tokenizer_config.json "
                "tokenizer_class to TokenizersBackend"
            )
        prefix = False
    else:
        named = ", ".join(part["type"] for part in (*normalizers, *splitters)) or "nothing"
        raise _refusal(f"it prepares text by {named}, and llama.cpp by replacing spaces only")
    normalized = [token for token in description["added_tokens"] if token["normalized"]]
    if normalized and (prefix or any(" " in token["content"] for token in normalized)):
        raise _refusal(f"it looks for {normalized[0]['content']!r} in the text after its spaces are marked")
    return prefix


def _order(merges: list[tuple[str, ...]]) -> dict[str, int]:
    """Return the rank of each token among those that merges make; the merges of each must stand together."""
    order: dict[str, int] = {}
    last = ""
    for left, right in merges:
        token = left + right
        if token != last and token in order:
            raise _refusal(f"the merges of {token!r} stand apart in its list, so that no score can order them")
        order.setdefault(token, len(order))
        last = token
    return order


def _formed_by_text(description: dict[str, Any], texts: list[str]) -> set[str]:
    """Return the tokens that merging could meet: added ones are cut out of the text before, unless they hold spaces."""
    added = {token["content"] for token in description["added_tokens"]}
    return {text for text in texts if text not in added or SPACE in text}


def _splits(token: str) -> Iterator[tuple[str, str]]:
    return ((token[:position], token[position:]) for position in range(1, len(token)))


def _check_complete(merges: list[tuple[str, ...]], tokens: set[str]) -> None:
    """Check that any two tokens that make a third are a merge."""
    known = set(merges)
    for token in tokens:
        for pair in _splits(token):
            if pair not in known and pair[0] in tokens and pair[1] in tokens:
                raise _refusal(
                    f"it does not merge {pair[0]!r} and {pair[1]!r} although {token!r} is a token, and llama.cpp would"
                )


def _check_ties(tokenizer: Tokenizer, merges: list[tuple[str, ...]], order: Mapping[str, int]) -> None:
    """Check runs of a repeated text, in which two overlapping pairs may make the same token.

    There llama.cpp takes the leftmost and a list of merges the first. Where these differ, both are tried on runs of
    every length up to twice the token's.
    """
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    rights: dict[str, list[str]] = {}
    for left, right in merges:
        token = left + right
        if token.startswith(right) and ranks.get((right, token[len(right) :]), ranks[left, right]) < ranks[left, right]:
            rights.setdefault(token, []).append(left)
    for token, units in rights.items():
        for unit in units:
            for length in range(len(token) + 1, 2 * len(token) + len(unit) + 1):
                run = (unit * (length // len(unit) + 1))[:length]
                if [piece.value for piece in tokenizer.model.tokenize(run)] != merge_by_score(run, order):
                    raise _refusal(f"it cuts runs such as {run!r} by other merges than the leftmost")


def merge_by_score(text: str, order: Mapping[str, int]) -> list[str]:
    """Return the pieces into which llama.cpp merges a text, of which every character is a token."""
    pieces = list(text)
    following = [*range(1, len(pieces)), -1]
    before = list(range(-1, len(pieces) - 1))
    queue: list[tuple[int, int, int, str]] = []

    def consider(left: int, right: int) -> None:
        if left >= 0 and right >= 0 and (token := pieces[left] + pieces[right]) in order:
            heapq.heappush(queue, (order[token], left, right, token))

    for index in range(1, len(pieces)):
        consider(index - 1, index)
    while queue:
        _, left, right, token = heapq.heappop(queue)
        if not pieces[left] or not pieces[right] or pieces[left] + pieces[right] != token:
            continue
        pieces[left], pieces[right] = token, ""
        following[left] = following[right]
        if following[right] >= 0:
            before[following[right]] = left
        consider(before[left], left)
        consider(left, following[left])
    return [piece for piece in pieces if piece]
