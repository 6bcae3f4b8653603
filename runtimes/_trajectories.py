"""K continuations of one prompt: the loop that chooses, shows, stops and drops, for any engine.

An engine offers ``Rows``: sequences that share a prompt and take one token each per call. The loop knows nothing of
caches, and an engine nothing of text and rules.

Shapes: K trajectories, R rows (live trajectories), V vocabulary.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from qad.errors import UserError
from qad.runtimes._sampling import Chooser, Sampling, choose_rows, generators

Reason = Literal["stop", "length", "context", "dropped", "lost", "interrupted"]


@dataclass
class Trajectory:
    """One continuation of a prompt.

    Attributes:
        index: Which of the k.
        tokens: Its tokens, without the one that ended the answer.
        logprobs: Log-probability of each token under the model: at temperature 1, with nothing cut away. NaN where a
            server does not tell; engines in this process always do.
        text: Text of the tokens without special ones; it ends before a stop text.
        reason: ``stop``: the model ended its answer, or a stop text came; ``length``: it has the tokens asked for;
            ``context``: no room for another token; ``dropped``: the callback dropped it; ``lost``: its server went
            away (see ``Lost``); ``interrupted``: it was running when an interrupt ended the call, which who catches the
            interrupt says.
        prompt_tokens: Of the prompt, those that were in the cache already included.
        prompt_seconds: From the call until the prompt was read; the same for all k.
        first_seconds: From the call until the first token was chosen.
        seconds: From the call until it ended.
    """

    index: int
    tokens: list[int]
    logprobs: list[float]
    text: str
    reason: Reason
    prompt_tokens: int
    prompt_seconds: float
    first_seconds: float
    seconds: float


@dataclass(frozen=True)
class Step:
    """What a callback is told: a new token, or that a trajectory ended by itself.

    Attributes:
        index: Which of the k.
        token: The token; None when the trajectory has ended.
        logprob: Of the token under the model, 0 when there is none; NaN where a server does not tell.
        text: Text that is now complete. Characters of several tokens wait for the last of them, and what may be the
            beginning of a stop text waits until it is clear.
        reason: Why it ended; None while it goes on.
    """

    index: int
    token: int | None
    logprob: float
    text: str
    reason: Reason | None = None


OnToken = Callable[[Step], Iterable[int] | None]


class Lost(UserError):
    """A server went away in the middle of a call.

    Attributes:
        trajectories: All of the call. Those that ended before are whole; the others hold what came until then, and
            their reason is ``lost``.
    """

    def __init__(self, message: str, trajectories: Sequence[Trajectory]) -> None:
        super().__init__(message)
        self.trajectories = list(trajectories)


@dataclass
class Work:
    """What a call of ``sample`` cost.

    Attributes:
        reused_tokens: Tokens of the prompt that were in the cache already.
        prompt_tokens: Tokens of prompts that the engine ran: the prompt's own, or k times that where an engine cannot
            share a cache.
        new_tokens: Tokens that the engine ran after the prompt.
        calls: Calls of the engine after the prompt.
        prompt_seconds: In the engine with the prompt.
        decode_seconds: In the engine after the prompt.
        cache_bytes: Keys and values that are claimed, live or not.
    """

    reused_tokens: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0
    calls: int = 0
    prompt_seconds: float = 0.0
    decode_seconds: float = 0.0
    cache_bytes: int = 0


class Rows(Protocol):
    """K sequences in an engine that begin with the same prompt."""

    def advance(self, rows: Sequence[int], tokens: Sequence[int]) -> NDArray[np.float32]:
        """Append a token to each of some rows, and return the logits after it, [R, V], valid until the next call."""
        ...

    def has_room(self, rows: int) -> bool:
        """Return whether that many rows can take one more token each."""
        ...

    def drop(self, row: int) -> None:
        """Free a row's cache."""
        ...


class Text(Protocol):
    """Text of the tokens of one sequence."""

    def add(self, token: int) -> str:
        """Return what is complete with this token and was not before."""
        ...

    def end(self) -> str:
        """Return what is left, complete or not."""
        ...


@dataclass
class Request:
    """What was asked for, in an engine's terms.

    Attributes:
        k, sampling, new_tokens, on_token, stop: As in ``Session.sample``.
        prompt_tokens: Of the prompt.
        room: Tokens that the model's context has left after the prompt, for each trajectory.
        ends: Returns whether a token ends an answer.
        text: Makes the text of a sequence.
        began: ``time.perf_counter()`` at the call.
    """

    k: int
    sampling: Sampling
    new_tokens: int
    on_token: OnToken | None
    stop: tuple[str, ...]
    prompt_tokens: int
    room: int
    ends: Callable[[int], bool]
    text: Callable[[], Text]
    began: float


def never(token: int) -> bool:
    """Return that a token ends no answer."""
    return False


def check_request(k: int, new_tokens: int, stop: Sequence[str]) -> tuple[str, ...]:
    """Return the stop texts of a sound request.

    Raises:
        UserError: A number below 1, or an empty stop text.
    """
    if k < 1 or new_tokens < 1:
        raise UserError(f"{k} trajectories of {new_tokens} tokens are none: ask for at least one of one token")
    texts = (stop,) if isinstance(stop, str) else tuple(stop)
    if not all(texts):
        raise UserError("an empty stop text would end every answer at once: leave it out")
    return texts


def sample_rows(request: Request, rows: Rows, logits_V: NDArray[np.float32]) -> list[Trajectory]:
    """Return the trajectories of a prompt.

    Args:
        request: What was asked for.
        rows: The sequences, all of them at the end of the prompt.
        logits_V: After the prompt's last token.
    """
    run = _Run(request, rows)
    logits_RV = np.broadcast_to(logits_V, (request.k, len(logits_V)))
    while True:
        tokens = run.take(logits_RV)
        if not tokens:
            return run.results()
        logits_RV = rows.advance(list(tokens), list(tokens.values()))


@dataclass
class Live:
    """A trajectory on its way.

    Attributes:
        result: What it has so far; its reason stands only once it has ended.
        shown: How many characters of the text were shown.
        stopped: A stop text came.
        ended: It has ended.
    """

    result: Trajectory
    shown: int = 0
    stopped: bool = False
    ended: bool = False


class Ledger:
    """The trajectories of one call as they grow: text, stop texts, what the callback is told and what it drops.

    Args:
        k, on_token, stop: As in ``Session.sample``.
        prompt_tokens: Of the prompt.
        began: ``time.perf_counter()`` at the call.
        rest: Returns the text of a trajectory, by index, that waited for another token.
        drop: Frees what an ended trajectory holds, by index.

    Attributes:
        all: Every trajectory.
    """

    def __init__(
        self,
        k: int,
        on_token: OnToken | None,
        stop: Sequence[str],
        prompt_tokens: int,
        began: float,
        rest: Callable[[int], str],
        drop: Callable[[int], None],
    ) -> None:
        self._on_token = on_token
        self._stop = stop
        self._began = began
        self._rest = rest
        self._drop = drop
        seconds = self.seconds()
        self.all = [
            Live(Trajectory(index, [], [], "", "length", prompt_tokens, seconds, seconds, seconds))
            for index in range(k)
        ]

    def seconds(self) -> float:
        """Return the time since the call."""
        return time.perf_counter() - self._began

    def add(self, live: Live, token: int, logprob: float, text: str) -> None:
        """Append a token and the text that is complete with it; the callback or a stop text may end it."""
        live.result.tokens.append(token)
        live.result.logprobs.append(logprob)
        shown = self._show(live, text)
        if self._on_token is not None:
            self._call(Step(live.result.index, token, logprob, shown))
        if live.stopped and not live.ended:
            self.finish(live, "stop")

    def finish(self, live: Live, reason: Reason) -> None:
        """End a trajectory, and tell the callback."""
        shown = live.shown
        self._end(live, reason)
        if self._on_token is not None:
            self._call(Step(live.result.index, None, 0.0, live.result.text[shown:], reason))

    def forget(self, live: Live) -> None:
        """Let a trajectory begin anew, of which no callback has seen anything."""
        assert self._on_token is None
        live.result.tokens, live.result.logprobs, live.result.text, live.shown = [], [], "", 0

    def _show(self, live: Live, new: str) -> str:
        """Append text, up to a stop text if one came; return what of it can be shown."""
        result, stop = live.result, self._stop
        result.text += new
        # What waited is searched again: the stop text may have begun there.
        places = [at for at in (result.text.find(word, live.shown) for word in stop) if at >= 0]
        live.stopped = bool(places)
        if places:
            result.text = result.text[: min(places)]
        waits = 0 if places else _waiting(result.text[live.shown :], stop)
        begun, live.shown = live.shown, len(result.text) - waits
        return result.text[begun : live.shown]

    def _end(self, live: Live, reason: Reason) -> None:
        if not live.stopped:
            # An unfinished character, which may finish a stop text.
            self._show(live, self._rest(live.result.index))
        live.ended = True
        live.result.reason = reason
        live.result.seconds = self.seconds()
        self._drop(live.result.index)

    def _call(self, step: Step) -> None:
        assert self._on_token is not None
        for index in self._on_token(step) or ():
            assert 0 <= index < len(self.all), index
            if not self.all[index].ended:
                self._end(self.all[index], "dropped")


class _Run:
    """The state of one call in an engine that gives logits."""

    def __init__(self, request: Request, rows: Rows) -> None:
        self._request = request
        self._rows = rows
        self._texts = [request.text() for _ in range(request.k)]
        self._ledger = Ledger(
            request.k,
            request.on_token,
            request.stop,
            request.prompt_tokens,
            request.began,
            lambda index: self._texts[index].end(),
            rows.drop,
        )
        self._live = list(self._ledger.all)
        self._streams = generators(request.sampling, request.k)
        self._chooser: Chooser | None = None

    def results(self) -> list[Trajectory]:
        """Return the trajectories."""
        return [live.result for live in self._ledger.all]

    def take(self, logits_RV: NDArray[np.float32]) -> dict[int, int]:
        """Choose a token for each live trajectory; return those of the trajectories that go on, by index."""
        if self._chooser is None:
            self._chooser = Chooser(self._request.sampling, logits_RV.shape[1])
        turn = self._live
        streams = [self._streams[live.result.index] for live in turn]
        tokens, logprobs = choose_rows(self._chooser, logits_RV, streams)
        now = self._ledger.seconds()
        for live, token, logprob in zip(turn, tokens, logprobs, strict=True):
            # The callback may have dropped it on the way.
            if not live.ended:
                self._add(live, token, logprob, now)
        going = [live for live in turn if not live.ended]
        if going and not self._rows.has_room(len(going)):
            for live in going:
                if not live.ended:
                    self._ledger.finish(live, "context")
        self._live = [live for live in going if not live.ended]
        return {live.result.index: live.result.tokens[-1] for live in self._live}

    def _add(self, live: Live, token: int, logprob: float, now: float) -> None:
        result, request = live.result, self._request
        if not result.tokens:
            result.first_seconds = now
        if request.ends(token):
            self._ledger.finish(live, "stop")
            return
        self._ledger.add(live, token, logprob, self._texts[result.index].add(token))
        if live.ended:
            return
        if len(result.tokens) == request.new_tokens:
            self._ledger.finish(live, "length")
        elif len(result.tokens) >= request.room:
            self._ledger.finish(live, "context")


def _waiting(text: str, stop: Sequence[str]) -> int:
    """Return how many characters at the end of a text may be the beginning of a stop text."""
    longest = 0
    for word in stop:
        for size in range(min(len(word) - 1, len(text)), longest, -1):
            if text.endswith(word[:size]):
                longest = size
                break
    return longest
