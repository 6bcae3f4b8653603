"""Answers of a server as they come: K trajectories over one connection or over one each.

``n`` answers to one request cost the server one reading of the prompt. A connection of its own lets a trajectory be
dropped: closing it is how a server is told to stop, and its slot is free. So ``n`` is used where nobody can drop, which
is a call without a callback, and where the server knows it; what it leaves out is asked for one by one.

A connection that breaks, or stays silent in the middle of an answer, is made again after a pause. Where the prompt may
be given as tokens or text, the request goes on behind what was received, and nothing is lost or said twice. Elsewhere
it is asked anew, with the same seed; where a callback has seen what was received, the answer has to begin with just
that again.

Silence is bounded in all, whatever is tried again in it, by the server's timeout. Before the first token, when the
server reads the prompt or is at other answers, it may take all of it, and is not asked again, which would only put the
request behind the others. Behind a token half of it is enough to try a new connection, which then has what is left.
"""

import asyncio
import dataclasses
import math
import queue
import random
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from qad.runtimes._remote_errors import Cut, Other, Silence, is_silence, is_transport, patience
from qad.runtimes._remote_kinds import LLAMA_CPP_PYTHON
from qad.runtimes._remote_server import Server
from qad.runtimes._sampling import Sampling

# Servers take any seed of 31 bits.
_SEEDS = 2**31 - 2**16
_LONGEST_PAUSE = 8.0
_MOST_STOPS = 4
# A server that broke a stream off may have left connections behind that are dead, which the client finds one by one.
_WHY_RETRIES = 2
# A refusal comes at once; of what takes longer there is none.
_WHY_SECONDS = 60.0
_THINK, _THINK_END = "<think>", "</think>"


@dataclass(frozen=True)
class Ask:
    """What every trajectory is asked for.

    Attributes:
        prompt: Tokens or a text to be continued, or the messages of a chat.
        sampling: The rule.
        seed: Of trajectory 0; trajectory i has the i-th after it.
        new_tokens: Most tokens of each.
        ignore_end: Go on after the end of an answer.
    """

    prompt: list[int] | str | list[dict[str, str]]
    sampling: Sampling
    seed: int
    new_tokens: int
    ignore_end: bool

    @property
    def chat(self) -> bool:
        """Whether the prompt is messages."""
        return isinstance(self.prompt, list) and bool(self.prompt) and isinstance(self.prompt[0], dict)


@dataclass(frozen=True)
class Given:
    """A token as a server sends it.

    Attributes:
        id: Its number, None if the server does not tell.
        text: What of the answer's text comes with it.
        logprob: NaN if the server does not tell.
    """

    id: int | None
    text: str
    logprob: float = math.nan


@dataclass
class Event:
    """Something that happened to a trajectory.

    Attributes:
        index: Which.
        tokens: New ones.
        finish: Why it ended, in the server's words; None while it goes on.
        usage: What the server counted, where it tells and where it counted for this trajectory alone.
        timings: llama-server's times.
        anew: What was received is void: the answer begins again.
        error: Why it cannot go on.
    """

    index: int
    tokens: list[Given] = field(default_factory=list)
    finish: str | None = None
    usage: dict[str, Any] | None = None
    timings: dict[str, Any] | None = None
    anew: bool = False
    error: BaseException | None = None


def first_seed(sampling: Sampling) -> int:
    """Return the seed of trajectory 0: far from those of other seeds, since the trajectories have the next ones."""
    return random.Random(sampling.seed).randrange(_SEEDS) + sampling.first


def body_of(server: Server, ask: Ask, seed: int, n: int, stop: Sequence[str]) -> dict[str, Any]:
    """Return the JSON of a request."""
    rule, kind = ask.sampling, server.kind
    body: dict[str, Any] = {
        "model": server.model,
        "stream": True,
        "stream_options": {"include_usage": True},
        server.length_word: ask.new_tokens,
        "temperature": rule.temperature,
        "top_p": rule.top_p,
        "seed": seed,
        **kind.body,
    }
    if kind.rule or rule.top_k:
        body["top_k"] = rule.top_k
    if kind.rule or rule.min_p:
        body["min_p"] = rule.min_p
    if ask.ignore_end:
        body |= {"min_tokens": ask.new_tokens} if kind is LLAMA_CPP_PYTHON else kind.end_ignored
    if n > 1:
        body["n"] = n
    # Where an answer has its own connection stop texts are found here, however many they are.
    if n > 1 and 0 < len(stop) <= _MOST_STOPS:
        body["stop"] = list(stop)
    if ask.chat:
        body |= {"messages": ask.prompt, "logprobs": True, "top_logprobs": 1}
    else:
        body |= {"prompt": ask.prompt, "logprobs": 1}
    return {name: value for name, value in body.items() if name not in server.refused}


def given(choice: dict[str, Any], text: str) -> list[Given]:
    """Return the tokens of a piece of an answer.

    Args:
        choice: As OpenAI's two interfaces, llama-server and vLLM shape it.
        text: All text of the piece.
    """
    told = choice.get("logprobs") or {}
    ids: list[int | None] = list(choice.get("token_ids") or ())
    texts: list[str]
    logprobs: list[float | None]
    if content := told.get("content"):
        texts = [str(entry.get("token", "")) for entry in content]
        logprobs = [entry.get("logprob") for entry in content]
        ids = ids or [entry.get("id") for entry in content]
    else:
        texts, logprobs = list(told.get("tokens") or ()), list(told.get("token_logprobs") or ())
    count = max(len(texts), len(ids)) or (1 if text else 0)
    if not count:
        return []
    if len(texts) != count or "".join(texts) != text:
        # Bytes of a character, or special tokens: the text is complete with the last of them.
        texts = [""] * (count - 1) + [text]
    ids = ids if len(ids) == count else [None] * count
    logprobs = logprobs if len(logprobs) == count else [None] * count
    return [
        Given(number, part, math.nan if logprob is None else float(logprob))
        for number, part, logprob in zip(ids, texts, logprobs, strict=True)
    ]


class _Answer:
    """One answer of a stream: its tokens in order, the one that ended it left out.

    Attributes:
        finish: Why it ended, None while it goes on.
    """

    def __init__(self) -> None:
        self.finish: str | None = None
        self._thinking = False
        # Tokens without a text: the last one may be the one that ended the answer.
        self._waiting: list[Given] = []
        self._count = 0

    def take(self, choice: dict[str, Any], timings: dict[str, Any] | None) -> list[Given]:
        """Return the tokens that a piece of the stream tells of."""
        found = given(choice, self._text(choice))
        self.finish = choice.get("finish_reason") or self.finish
        made = (timings or {}).get("predicted_n")
        if (found or self.finish) and isinstance(made, int) and made > self._count + len(found):
            # Tokens that are a part of a character are not sent: their text comes with the last of them.
            found = [Given(None, "")] * (made - self._count - len(found)) + found
        self._count += len(found)
        found = self._waiting + found
        self._waiting = []
        while found and not found[-1].text:
            self._waiting.insert(0, found.pop())
        if self.finish is not None:
            if self.finish == "stop" and self._waiting:
                self._waiting.pop()
            found, self._waiting = found + self._waiting, []
        return found

    def _text(self, choice: dict[str, Any]) -> str:
        """Return a piece's text; what a server has taken out as reasoning is put back where it was."""
        delta = choice.get("delta")
        if not isinstance(delta, dict):
            return str(choice.get("text") or "")
        thought = delta.get("reasoning_content") or delta.get("reasoning") or ""
        said = delta.get("content") or ""
        text = ""
        if thought:
            text += thought if self._thinking else f"{_THINK}\n{thought}"
            self._thinking = True
        if said:
            text += f"\n{_THINK_END}\n\n{said}" if self._thinking else said
            self._thinking = False
        return text


class Flow:
    """K answers of a server on their way. Iterating gives what happens, until all have ended or were cancelled.

    Args:
        server: The server.
        ask: What for.
        k: How many.
        watched: Whether a callback sees tokens as they come, and may drop trajectories. If not, they are asked for in
            one request where the server can.
        stop: Texts that may end an answer, for the server to find where it answers several at once.

    Attributes:
        requests: How many were made.
    """

    def __init__(self, server: Server, ask: Ask, k: int, *, watched: bool, stop: Sequence[str] = ()) -> None:
        self._server = server
        self._ask = ask
        self._watched = watched
        self._stop = tuple(stop)
        self._events: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._received: list[list[Given]] = [[] for _ in range(k)]
        timeout = server.explainer.timeout
        # Seconds that it may be silent between two pieces, and was when all were asked for at once.
        self._pause = timeout / 2 if server.retries else timeout
        self._quiet = 0.0
        self._stuck: BaseException | None = None
        self.requests = 0
        self._whole = server.connection.start(self._run(k))

    def __iter__(self) -> Iterator[Event]:
        while (event := self._events.get()) is not None:
            yield event

    def cancel(self, index: int) -> None:
        """Close the connection of an answer, if it has one of its own."""
        if (task := self._tasks.get(index)) is not None:
            self._server.connection.soon(task)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.connection.soon(self._whole)

        async def ended() -> None:
            await asyncio.gather(self._whole, return_exceptions=True)

        self._server.connection.wait(ended())

    async def _run(self, k: int) -> None:
        """Ask for all answers, and put None behind the last event."""
        try:
            missing: Sequence[int] = range(k)
            if k > 1 and not self._watched and self._server.several:
                missing = await self._all(k)
            self._tasks = {index: asyncio.create_task(self._one(index)) for index in missing}
            await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        finally:
            for task in self._tasks.values():
                task.cancel()
            await asyncio.gather(*self._tasks.values(), return_exceptions=True)
            self._events.put(None)

    async def _all(self, k: int) -> list[int]:
        """Ask for all answers at once; return the indexes of those that did not come to their end."""
        answers = [_Answer() for _ in range(k)]
        # OpenAI counts for all at the end; llama-server for each with its last piece.
        usage: dict[str, Any] | None = None
        own: dict[int, dict[str, Any]] = {}
        try:
            body = body_of(self._server, self._ask, self._ask.seed, k, self._stop)
            async for chunk in self._stream(body, self._server.explainer.timeout):
                if not chunk.get("choices"):
                    usage = chunk.get("usage") or usage
                for choice in chunk.get("choices") or ():
                    index = choice.get("index", 0)
                    if choice.get("finish_reason") and chunk.get("usage"):
                        own[index] = chunk["usage"]
                    if not 0 <= index < k or answers[index].finish is not None:
                        continue
                    tokens = answers[index].take(choice, chunk.get("timings"))
                    self._received[index] += tokens
                    self._events.put(Event(index, tokens, timings=chunk.get("timings")))
        except Exception as error:
            if _is_about_n(error):
                self._server.several = False
            elif is_silence(error) and any(self._received):
                self._quiet = self._pause
            elif not isinstance(error, Cut) or is_silence(error):
                for index in range(k):
                    self._events.put(Event(index, error=error))
                return []
        alone = not any(self._received[index] or answers[index].finish for index in range(1, k))
        if alone:
            self._server.several = False
        if usage is not None and not alone and not own:
            # Counted for all, and told once.
            self._events.put(Event(-1, usage=usage))
        for index, answer in enumerate(answers):
            if answer.finish is not None:
                counted = own.get(index, usage if alone else None)
                self._events.put(Event(index, finish=answer.finish, usage=counted))
        return [index for index, answer in enumerate(answers) if answer.finish is None]

    async def _one(self, index: int) -> None:
        """Ask for one answer until it has come to its end, or cannot."""
        async with self._server.turn:
            if self._stuck is not None:
                # Where answers wait for each other, the next one would wait as long.
                self._events.put(Event(index, error=self._stuck))
                return
            timeout, failures, quiet = self._server.explainer.timeout, 0, self._quiet
            while True:
                before = len(self._received[index])
                try:
                    await self._try(index, timeout - quiet)
                    return
                except Exception as error:
                    new = len(self._received[index]) > before
                    failures = 1 if new else failures + 1
                    if is_silence(error):
                        quiet = self._pause if new else timeout
                        self._stuck = error if quiet >= timeout else self._stuck
                    elif new:
                        quiet = 0.0
                    if not isinstance(error, Cut) or failures > self._server.retries or quiet >= timeout:
                        self._events.put(Event(index, error=error))
                        return
                pause = min(0.5 * 2 ** (failures - 1), _LONGEST_PAUSE)
                await asyncio.sleep(pause * random.uniform(0.75, 1.0))

    async def _try(self, index: int, seconds: float) -> None:
        """Ask for what is missing of an answer; ``seconds``: longest silence before its next piece.

        Raises:
            Cut: It did not come to its end.
        """
        received = self._received[index]
        ask = self._ask
        known: list[Given] = []
        if received:
            async with patience(seconds):
                prompt = await self._behind(ask, received)
            if prompt is not None:
                ask = dataclasses.replace(ask, prompt=prompt, new_tokens=ask.new_tokens - len(received))
            elif self._watched:
                known = list(received)
            else:
                received.clear()
                self._events.put(Event(index, anew=True))
        if ask.new_tokens < 1:
            # Only the word that it is complete was missing.
            self._events.put(Event(index, finish="length"))
            return
        answer = _Answer()
        usage = timings = None
        body = body_of(self._server, ask, self._ask.seed + index, 1, self._stop)
        try:
            async for chunk in self._stream(body, seconds):
                usage, timings = chunk.get("usage") or usage, chunk.get("timings") or timings
                for choice in chunk.get("choices") or ():
                    if choice.get("index", 0) != 0 or answer.finish is not None:
                        continue
                    tokens = answer.take(choice, chunk.get("timings"))
                    tokens = tokens[_seen(known, tokens) :]
                    received += tokens
                    self._events.put(Event(index, tokens))
        except Cut as error:
            if not received and not is_silence(error):
                await self._why(body)
            raise
        if known:
            raise Other
        self._events.put(Event(index, finish=answer.finish, usage=usage, timings=timings))

    async def _behind(self, ask: Ask, received: Sequence[Given]) -> list[int] | str | None:
        """Return the prompt with which an answer goes on behind what was received, None if it cannot."""
        text = "".join(one.text for one in received)
        if isinstance(ask.prompt, str):
            return ask.prompt + text
        if ask.chat:
            return None
        prompt: list[int] = [token for token in ask.prompt if isinstance(token, int)]
        ids = [one.id for one in received if one.id is not None]
        return prompt + (ids if len(ids) == len(received) else await self._server.tokens_of(text))

    async def _stream(self, body: dict[str, Any], seconds: float) -> AsyncIterator[dict[str, Any]]:
        """Yield the pieces of a streamed answer as JSON; ``seconds``: longest silence before the first.

        Raises:
            Cut: The stream broke, fell silent, or ended before every answer in it had.
        """
        import openai

        path = "/chat/completions" if "messages" in body else "/completions"
        stream = await self._asked(path, body, seconds)
        open_ends = body.get("n", 1)
        try:
            async for chunk in _paced(stream, self._pause):
                if isinstance(chunk, dict):
                    self._server.identity.check_answering(chunk.get("model"))
                    open_ends -= sum(1 for one in chunk.get("choices") or () if one.get("finish_reason"))
                    yield chunk
        except openai.APIError as error:
            raise Cut(self._server.explainer.scrub(str(error))) from error
        except Exception as error:
            if not is_transport(error) and not isinstance(error, Silence):
                raise
            raise Cut(str(error)) from error
        finally:
            await stream.close()
        if open_ends > 0:
            raise Cut("the answer ended in its middle")

    async def _asked(self, path: str, body: dict[str, Any], seconds: float) -> Any:
        """Return the stream that a request begins; what the server refuses and can be left out is left out."""
        import openai

        silence = openai.Timeout(seconds, connect=self._server.explainer.connect_seconds)
        while True:
            self.requests += 1
            try:
                # The client itself repeats what is not answered, and waits as long each time.
                async with patience(seconds):
                    return await self._server.connection.client.post(
                        path,
                        body=body,
                        options={"timeout": silence},
                        cast_to=object,
                        stream=True,
                        stream_cls=openai.AsyncStream[object],
                    )
            except openai.APIStatusError as error:
                changed = self._server.without(body, error)
                if changed is None:
                    raise
                body = changed

    async def _why(self, body: dict[str, Any]) -> None:
        """Raise the error that a stream broke with before its first token, if the server tells it without a stream."""
        import openai

        single = {name: value for name, value in body.items() if name != "stream_options"}
        single |= {"stream": False, self._server.length_word: 1}
        path = "/chat/completions" if "messages" in body else "/completions"
        try:
            async with patience(min(_WHY_SECONDS, self._server.explainer.timeout)):
                await self._server.connection.client.with_options(max_retries=_WHY_RETRIES).post(
                    path, body=single, cast_to=object
                )
        except openai.APIStatusError as error:
            if self._server.without(body, error) is None:
                raise
        except (openai.APIError, Silence):
            return


async def _paced(stream: Any, seconds: float) -> AsyncIterator[Any]:
    """Yield the pieces of a stream.

    Raises:
        Silence: After one of them the next took longer than ``seconds``.
    """
    pieces = aiter(stream)
    longest: float | None = None
    while True:
        async with patience(longest):
            piece = await anext(pieces, None)
        if piece is None:
            return
        yield piece
        longest = seconds


def _seen(known: list[Given], tokens: Sequence[Given]) -> int:
    """Return how many tokens were received before, and take them off ``known``.

    Raises:
        Other: They are not those.
    """
    count = min(len(known), len(tokens))
    for before, after in zip(known, tokens, strict=False):
        if before.text != after.text:
            raise Other
    del known[:count]
    return count


def _is_about_n(error: BaseException) -> bool:
    import openai

    if not isinstance(error, openai.APIStatusError) or error.status_code not in (400, 422, 501):
        return False
    words = str(error).lower()
    return any(word in words for word in ("n_cmpl", "slots", "'n'", '"n"', "`n`", " n "))
