"""Any server that speaks OpenAI's interface, llama-server and vLLM among them, asked with OpenAI's client.

What a server keeps to itself stays unknown, and nothing is made up in its place:

- Prompts and tokens. llama-server and vLLM have a tokenizer and tell tokens: a prompt is the model's own tokens, sent
  as such, and so is what comes back. Other servers have none that can be used: text is cut into pieces here (words,
  signs, three digits at most), which have negative numbers, and a chat is a token for its beginning, the pieces of the
  message, and a token for the answer that follows; it is sent as messages. A piece of a streamed answer is a token
  then, as it is at most servers, and where the server counts more than it sends, tokens without text make up for it.
  ``tokenize``, ``detokenize``, ``chat_prompt``, slices and lengths work alike, so that callers need not know which.
- Log-probabilities are the server's; where it has none, and for tokens that are a part of a character, they are NaN.
- Logits are not to be had.
- Choosing. A server draws by itself. Parts of a rule that OpenAI's interface has no word for (top_k, min_p) are sent to
  llama-server, llama_cpp.server and vLLM always, and to others when they are asked for. Trajectory i has its own seed
  whatever K is; whether a seed repeats an answer is the server's affair (batches round differently).

Finish reasons: ``length`` where the answer has the tokens that were asked for, ``context`` where the server ended it
with fewer for want of room, ``stop`` for everything else by which a server ends an answer.
"""

import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qad.closing import Closing
from qad.errors import UserError
from qad.runtimes import GREEDY, URL, Ending, Lost, OnToken, Piece, Sampling, Trajectory, Work, plain_url
from qad.runtimes._remote_server import Server, available
from qad.runtimes._remote_stream import Ask, Event, Flow, Given, first_seed
from qad.runtimes._trajectories import Ledger, Live, Reason, check_request

__all__ = ["FORMATS", "RemoteSession", "available", "open"]

FORMATS = (URL,)
TIMEOUT, RETRIES = 600.0, 4

# Tokens that stand for the beginning of a message of the user's, and for the answer that follows it.
_USER, _ANSWER = -1, -2
_FIRST_PIECE = -3
# Words with the space before them, numbers of up to three digits, signs, spaces: as tokenizers cut, roughly.
_PIECES = re.compile(r" ?[^\W\d_]+| ?\d{1,3}| ?[^\w\s]|\s|.", re.DOTALL)
# What else servers say: tool_calls, function_call, content_filter.
_REASONS: dict[str, Reason] = {"length": "length"}
# vLLM's words for an answer that was given up.
_GIVEN_UP = ("abort", "error")


class RemoteSession(Closing):
    """A model of a server.

    Args:
        server: The server.

    Attributes:
        exact: Whether tokens are the model's own; if not, they are pieces of text.
    """

    def __init__(self, server: Server) -> None:
        self._server = server
        self._work = Work()
        self.exact = server.kind.tokens
        self._pieces: list[str] = []
        self._numbers: dict[str, int] = {}

    @property
    def address(self) -> str:
        """Where the server is and which of its models this is, as it can be given on a command line."""
        return f"{self._server.address.base}#{self._server.model}"

    @property
    def served(self) -> dict[str, Any]:
        """What the server tells of the model, ``id`` first; empty where it names none."""
        return dict(self._server.served)

    @property
    def kind(self) -> str:
        """Name of the server's program, as far as it is known."""
        return self._server.kind.name

    def forget(self) -> None:
        """Leave the server's cache alone: OpenAI's interface has no word for it."""

    @property
    def work(self) -> Work:
        """What the latest call of ``sample`` cost, as far as the server tells; see ``sample``."""
        return self._work

    @property
    def vocabulary(self) -> int:
        """Number of the model's tokens.

        Raises:
            UserError: The server does not tell.
        """
        if self._server.vocabulary is None:
            raise UserError(f"{self.address} does not tell its vocabulary: use the model's file")
        return self._server.vocabulary

    @property
    def context(self) -> int | None:
        """Tokens that a prompt and an answer may have together; None where the server does not tell."""
        return self._server.context

    def _number(self, piece: str) -> int:
        """Return the token that stands for a piece of text."""
        if piece not in self._numbers:
            self._numbers[piece] = _FIRST_PIECE - len(self._pieces)
            self._pieces.append(piece)
        return self._numbers[piece]

    def tokenize(self, text: str) -> list[int]:
        """Return a text's tokens, none of them added around it: the model's own, or pieces of text."""
        if self.exact:
            return self._server.tokenize(text)
        return [self._number(piece) for piece in _PIECES.findall(text)]

    def detokenize(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens, special ones included."""
        parts: list[str] = []
        own: list[int] = []
        for token in (*tokens, _ANSWER):
            if token >= 0:
                own.append(token)
                continue
            if own:
                parts.append(self._server.detokenize(own))
                own = []
            if token <= _FIRST_PIECE:
                parts.append(self._pieces[_FIRST_PIECE - token])
        return "".join(parts)

    def chat_prompt(self, text: str) -> list[int]:
        """Return one user message, ready for the answer: tokens under the model's template, or a chat's own tokens."""
        if self.exact:
            return self._server.template([{"role": "user", "content": text}])
        return [_USER, *self.tokenize(text), _ANSWER]

    def logits(self, tokens_BT: ArrayLike) -> NDArray[np.float32]:
        """Raise: no server tells them.

        Raises:
            UserError: Always.
        """
        raise UserError(f"{self.address} is a server, which tells no logits: use the model's file")

    def _prompt(self, prompt_T: Sequence[int]) -> list[int] | str | list[dict[str, str]]:
        """Return a prompt as the server takes it.

        Raises:
            UserError: It goes on behind the beginning of an answer, which a chat cannot.
        """
        prompt = [int(token) for token in prompt_T]
        assert prompt, "no tokens"
        if _USER in prompt or _ANSWER in prompt:
            if prompt[0] != _USER or prompt.index(_ANSWER) != len(prompt) - 1 or _USER in prompt[1:]:
                raise UserError(
                    f"{self.address} takes whole messages: an answer cannot be begun for it; use llama-server, vLLM or "
                    "the model's file"
                )
            return [{"role": "user", "content": self.detokenize(prompt)}]
        if self.exact:
            return prompt if min(prompt) >= 0 else self._server.tokenize(self.detokenize(prompt))
        return self.detokenize(prompt)

    def _ask(self, prompt_T: Sequence[int], new_tokens: int, sampling: Sampling, ignore_end: bool) -> Ask:
        """Return what to ask for.

        Raises:
            UserError: No room in the model's context, as far as it is known.
        """
        prompt = self._prompt(prompt_T)
        context = self._server.context
        if context is not None and self.exact:
            if len(prompt) >= context:
                raise UserError(
                    f"a prompt of {len(prompt)} tokens leaves no room in the context of {context} at {self.address}: "
                    "shorten it, or start the server with a larger one"
                )
            new_tokens = min(new_tokens, context - len(prompt))
        return Ask(prompt, sampling, first_seed(sampling), new_tokens, ignore_end)

    def stream(self, prompt_T: Sequence[int], new_tokens: int, sampling: Sampling = GREEDY) -> Iterator[Piece]:
        """Yield an answer piece by piece; the last piece holds the ending. Closing it closes the connection.

        Raises:
            UserError: The server refuses, went away and did not come back, or has another model than when it was
                opened.
        """
        began = time.perf_counter()
        ask = self._ask(prompt_T, new_tokens, sampling, False)
        first: float | None = None
        made, counted = 0, len(prompt_T)
        reason = "length"
        with Flow(self._server, ask, 1, watched=True) as flow:
            for event in flow:
                if event.error is not None:
                    raise self._server.explainer.told(event.error, tokens=made) from None
                for given in event.tokens:
                    first = time.perf_counter() if first is None else first
                    made += 1
                    yield Piece(given.text, self._token(given))
                if event.finish is not None:
                    self._check_finish(event)
                    reason = "length" if event.finish == "length" else "stop"
                    made = max(made, _completed(event))
                    counted = _counted(event.usage, "prompt_tokens") or counted
        ended = time.perf_counter()
        self._server.identity.check()
        first = ended if first is None else first
        yield Piece("", None, Ending(reason, counted, made, first - began, ended - first))

    def _token(self, given: Given) -> int:
        return given.id if given.id is not None else self._number(given.text)

    def _check_finish(self, event: Event) -> None:
        if event.finish in _GIVEN_UP:
            raise UserError(f"{self.address} gave an answer up ({event.finish}): look at its log")

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

        Without a callback the server is asked for all of them at once, if it can; with one each has a connection of its
        own, which is closed when the trajectory is dropped or a stop text came: servers then free its slot.
        llama_cpp.server answers one request at a time, so that its trajectories come one after the other.

        ``work``: tokens of prompts as the server counts them, 0 where it does not; ``calls`` are requests;
        ``prompt_seconds`` last until each trajectory has its first token; ``cache_bytes`` is unknown and 0.

        Raises:
            UserError: The server refuses, cannot do what was asked for, or does not answer.
            OtherModel: It has another model than when it was opened, also where some answers came before that.
            Lost: It went away in the middle of an answer and did not come back; what came is in the exception.
        """
        words = check_request(k, new_tokens, stop)
        began = time.perf_counter()
        self._work = work = Work()
        ask = self._ask(prompt_T, new_tokens, sampling, ignore_end)
        errors: dict[int, BaseException] = {}
        flow = Flow(self._server, ask, k, watched=on_token is not None, stop=words)
        ledger = Ledger(k, on_token, words, len(prompt_T), began, lambda index: "", flow.cancel)
        with flow:
            for event in flow:
                if event.index < 0:
                    self._count(work, event.usage)
                    continue
                live = ledger.all[event.index]
                self._take(ledger, live, event)
                if event.error is not None:
                    if not live.ended:
                        errors[event.index] = event.error
                        ledger.finish(live, "lost")
                elif event.finish is not None:
                    self._finish(ledger, live, event, ask, new_tokens)
                    self._count(work, event.usage)
                if all(one.ended for one in ledger.all):
                    break
        work.calls = flow.requests
        done = [live.result for live in ledger.all]
        self._account(work, done)
        self._server.identity.check()
        if errors:
            unfinished = sum(len(one.tokens) for one in done if one.reason == "lost")
            told = self._server.explainer.told(next(iter(errors.values())), tokens=unfinished)
            if not any(one.tokens or one.reason != "lost" for one in done):
                raise told from None
            whole = sum(one.reason not in ("lost", "dropped") for one in done)
            raise Lost(f"{told}; {whole} of {k} answers were whole by then", done)
        return done

    def _take(self, ledger: Ledger, live: Live, event: Event) -> None:
        """Put new tokens into the ledger."""
        if live.ended:
            return
        if event.anew:
            ledger.forget(live)
        if event.tokens and not live.result.tokens:
            live.result.first_seconds = live.result.prompt_seconds = ledger.seconds()
        for given in event.tokens:
            if not live.ended:
                ledger.add(live, self._token(given), given.logprob, given.text)

    def _finish(self, ledger: Ledger, live: Live, event: Event, ask: Ask, new_tokens: int) -> None:
        """End a trajectory as its server ended it."""
        if live.ended:
            return
        self._check_finish(event)
        result = live.result
        if not result.tokens:
            result.first_seconds = result.prompt_seconds = ledger.seconds()
        for _ in range(_completed(event) - len(result.tokens)):
            # The server counted tokens that it sent together with others.
            ledger.add(live, self._number(""), float("nan"), "")
            if live.ended:
                return
        result.prompt_tokens = _counted(event.usage, "prompt_tokens") or result.prompt_tokens
        reason = _REASONS.get(str(event.finish), "stop")
        short = ask.new_tokens < new_tokens or _completed(event) < new_tokens
        if reason == "length" and short and len(result.tokens) < new_tokens:
            reason = "context"
        ledger.finish(live, reason)

    def _count(self, work: Work, usage: dict[str, Any] | None) -> None:
        """Add what the server counted."""
        details = (usage or {}).get("prompt_tokens_details")
        cached = _counted(details if isinstance(details, dict) else None, "cached_tokens")
        work.reused_tokens += cached
        work.prompt_tokens += max(_counted(usage, "prompt_tokens") - cached, 0)

    def _account(self, work: Work, done: Sequence[Trajectory]) -> None:
        """Put what was received, and the times."""
        work.new_tokens = sum(len(one.tokens) for one in done)
        work.prompt_seconds = max(one.prompt_seconds for one in done)
        work.decode_seconds = max(0.0, max(one.seconds for one in done) - work.prompt_seconds)

    def close(self) -> None:
        """Close all connections. May be called twice."""
        self._server.close()


def _counted(usage: dict[str, Any] | None, name: str) -> int:
    value = (usage or {}).get(name)
    return value if isinstance(value, int) else 0


def _completed(event: Event) -> int:
    """Return how many tokens the server counted in an answer, but for the one that ended it; 0 if it does not tell."""
    counted = _counted(event.usage, "completion_tokens")
    return max(counted - (event.finish == "stop"), 0)


def open(  # noqa: A001
    path: Path | str,
    device: str = "cpu",
    threads: int | None = None,
    *,
    timeout: float = TIMEOUT,
    retries: int = RETRIES,
) -> RemoteSession:
    """Open a model of a server.

    Args:
        path: The server's address, ``http://host:8000/v1``, with ``#model`` behind it if it has several. A key is taken
            from QAD_API_KEY in the environment, or OPENAI_API_KEY for api.openai.com.
        device: ``cpu``, for nothing: the server has its own.
        threads: None, likewise.
        timeout: Longest silence of the server, in seconds.
        retries: How often a request is repeated after an error that may pass.

    Raises:
        UserError: The client is not installed, the server does not answer, refuses the key, or has no such model; or an
            option that is the server's to choose.
    """
    if device != "cpu" or threads is not None:
        raise UserError(f"{plain_url(path)} is a server, which chooses threads and device: leave out --threads, --gpu")
    return RemoteSession(Server(plain_url(path), timeout, retries))
