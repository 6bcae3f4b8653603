"""What sessions share whose engine knows tokens only: the model's own tokenizer, and the loop that makes an answer.

Shapes: V vocabulary.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, Self

import numpy as np
from jinja2 import TemplateError
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from qad.errors import UserError
from qad.runtimes import GREEDY, Ending, Piece, Sampling, choose


class TokenizerSession(ABC):
    """A session with a tokenizer of transformers.

    Args:
        tokenizer: Of the model.
        ends: Tokens that end an answer, besides the tokenizer's own; None is left out.
        context: Tokens that prompt and answer may have together.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, ends: Iterable[int | None], context: int) -> None:
        self._tokenizer: Any = tokenizer
        own: Any = tokenizer.eos_token_id
        self._ends = {int(token) for token in (*ends, own) if token is not None}
        self._context = context

    @abstractmethod
    def _cache(self, tokens: int) -> Any:
        """Return an empty key-value cache that takes that many tokens."""

    @abstractmethod
    def _next(self, tokens: Sequence[int], cache: Any) -> tuple[NDArray[np.float32], Any]:
        """Return the logits after the last token, shape [V], and the cache that includes them all."""

    @abstractmethod
    def close(self) -> None:
        """Free the model. May be called twice."""

    def tokenize(self, text: str) -> list[int]:
        """Return a text's tokens: special tokens in it are recognized, none is added around it."""
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def detokenize(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens, special ones included."""
        return self._tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False)

    def chat_prompt(self, text: str) -> list[int]:
        """Return the tokens of one user message under the chat template; plain tokens if there is none.

        Raises:
            UserError: The template cannot be rendered.
        """
        if not self._tokenizer.chat_template:
            return list(self._tokenizer(text)["input_ids"])
        messages = [{"role": "user", "content": text}]
        try:
            rendered = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        except (TemplateError, ValueError, TypeError) as error:
            raise UserError(
                f"the chat template of {self._tokenizer.name_or_path} cannot be rendered: {error}"
            ) from error
        return self.tokenize(rendered)

    def stream(self, prompt_T: Sequence[int], new_tokens: int, sampling: Sampling = GREEDY) -> Iterator[Piece]:
        """Yield an answer piece by piece; the last piece holds the ending.

        Raises:
            UserError: Prompt and answer do not fit the model's context.
        """
        if len(prompt_T) + new_tokens > self._context:
            raise UserError(f"{len(prompt_T) + new_tokens} tokens do not fit the model's context of {self._context}")
        generator = np.random.default_rng(sampling.seed)
        began = time.perf_counter()
        logits, cache = self._next(prompt_T, self._cache(len(prompt_T) + new_tokens))
        read = time.perf_counter()
        made: list[int] = []
        shown = ""
        reason = "length"
        while len(made) < new_tokens:
            token = choose(logits, sampling, generator)
            if token in self._ends:
                reason = "stop"
                break
            made.append(token)
            text = self._tokenizer.decode(made, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            # A replacement character at the end may be the first bytes of a longer character: it waits.
            whole = text.rstrip("\ufffd")
            yield Piece(whole[len(shown) :], token)
            shown = whole
            if len(made) < new_tokens:
                logits, cache = self._next([token], cache)
        rest = self._tokenizer.decode(made, skip_special_tokens=True, clean_up_tokenization_spaces=False)[len(shown) :]
        yield Piece(rest, None, Ending(reason, len(prompt_T), len(made), read - began, time.perf_counter() - read))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
