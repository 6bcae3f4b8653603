"""What sessions share whose engine knows tokens only: the model's own tokenizer, and the loop that makes an answer.

Shapes: V vocabulary.
"""

import time
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from jinja2 import TemplateError
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from qad.closing import Closing
from qad.errors import UserError
from qad.runtimes import GREEDY, Ending, OnToken, Piece, Sampling, Trajectory, Work, choose
from qad.runtimes._memory import check_caches, free_bytes
from qad.runtimes._trajectories import Request, Rows, check_request, never, sample_rows


class TokenizerText:
    """Text of the tokens of one sequence, special ones left out."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._shown = ""

    def _text(self) -> str:
        return self._tokenizer.decode(self._tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def add(self, token: int) -> str:
        """Return what is complete with this token and was not before."""
        self._tokens.append(token)
        # A replacement character at the end may be the first bytes of a longer character: it waits.
        whole = self._text().rstrip("\ufffd")
        new, self._shown = whole[len(self._shown) :], whole
        return new

    def end(self) -> str:
        """Return what is left, complete or not."""
        return self._text()[len(self._shown) :]


class TokenizerSession(Closing):
    """A session with a tokenizer of transformers.

    Args:
        tokenizer: Of the model.
        ends: Tokens that end an answer, besides the tokenizer's own; None is left out.
        context: Tokens that prompt and answer may have together.
    """

    # Of the keys and values of a token of a sequence; 0 where they lie in another memory than this machine's.
    _token_bytes: float = 0.0

    def __init__(self, tokenizer: PreTrainedTokenizerBase, ends: Iterable[int | None], context: int) -> None:
        self._tokenizer: Any = tokenizer
        own: Any = tokenizer.eos_token_id
        self._ends = {int(token) for token in (*ends, own) if token is not None}
        self._context = context
        self._work = Work()

    @abstractmethod
    def _cache(self, tokens: int) -> Any:
        """Return an empty key-value cache that takes that many tokens."""

    @abstractmethod
    def _next(self, tokens: Sequence[int], cache: Any) -> tuple[NDArray[np.float32], Any]:
        """Return the logits after the last token, shape [V], and the cache that includes them all."""

    @property
    def context(self) -> int:
        """Tokens that a prompt and an answer may have together."""
        return self._context

    def tokenize(self, text: str) -> list[int]:
        """Return a text's tokens: special tokens in it are recognized, none is added around it."""
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def detokenize(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens, special ones included."""
        return self._tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False)

    def first_token(self) -> int | None:
        """Return the token that the model expects before a text, None if it expects none."""
        tokens = self._tokenizer("")["input_ids"]
        return int(tokens[0]) if tokens else None

    def boundary_token(self) -> int | None:
        """Return the token that begins a text or, if there is none, ends one."""
        known = (self._tokenizer.bos_token_id, self._tokenizer.eos_token_id)
        return next((int(token) for token in known if token is not None), None)

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
        text = TokenizerText(self._tokenizer)
        made = 0
        reason = "length"
        while made < new_tokens:
            token = choose(logits, sampling, generator)
            if token in self._ends:
                reason = "stop"
                break
            made += 1
            yield Piece(text.add(token), token)
            if made < new_tokens:
                logits, cache = self._next([token], cache)
        ending = Ending(reason, len(prompt_T), made, read - began, time.perf_counter() - read)
        yield Piece(text.end(), None, ending)

    def forget(self) -> None:
        """Let go of what is kept of earlier prompts, which is nothing."""
        return

    @property
    def work(self) -> Work:
        """What the latest call of ``sample`` cost; while one runs, what it has cost so far."""
        return self._work

    @abstractmethod
    def _rows(self, prompt_T: Sequence[int], k: int, tokens: int, work: Work) -> tuple[Rows, NDArray[np.float32]]:
        """Return k sequences at the end of a prompt, each with room for some tokens, and the logits [V] there."""

    def sample(
        self,
        prompt_T: Sequence[int],
        k: int,
        sampling: Sampling = GREEDY,
        *,
        new_tokens: int,
        on_token: OnToken | None = None,
        stop: Sequence[str] = (),
        ignore_end: bool = False,
    ) -> list[Trajectory]:
        """Return k continuations of one prompt; see ``qad.runtimes.Session.sample``.

        Raises:
            UserError: The prompt fills the model's context, or no memory for all of them.
        """
        words = check_request(k, new_tokens, stop)
        began = time.perf_counter()
        room = self._context - len(prompt_T)
        if room < 1:
            raise UserError(
                f"a prompt of {len(prompt_T)} tokens leaves no room in the model's context of {self._context}: "
                "shorten it"
            )
        check_caches(
            lambda count, tokens, kind: count * (len(prompt_T) + tokens) * self._token_bytes,
            free_bytes(),
            prompt=len(prompt_T),
            k=k,
            new_tokens=min(new_tokens, room),
            kv_type="f16",
        )
        self._work = Work()
        rows, logits_V = self._rows(prompt_T, k, len(prompt_T) + min(new_tokens, room), self._work)
        request = Request(
            k=k,
            sampling=sampling,
            new_tokens=new_tokens,
            on_token=on_token,
            stop=words,
            prompt_tokens=len(prompt_T),
            room=room,
            ends=never if ignore_end else self._ends.__contains__,
            text=lambda: TokenizerText(self._tokenizer),
            began=began,
        )
        return sample_rows(request, rows, logits_V)
