"""A real server for the tests of the remote runtime: its model counts, and it fails as it is told to.

Token t is the text `` w<t>``, or a character for numbers from 1000 on. The next token follows from the last one, the
place and the seed, so that an answer that goes on behind a break is the answer that was broken off.
"""

import asyncio
import contextlib
import json
import math
import os
import re
import signal
import socket
import threading
from collections import deque
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

CHARACTERS = 1000
END = 0


def tokens_of(text: str) -> list[int]:
    """Return the tokens of a text."""
    found = re.findall(r" w(\d{1,3})(?!\d)|(.)", text, re.DOTALL)
    return [int(word) if word else CHARACTERS + ord(sign) for word, sign in found]


def text_of(tokens: list[int]) -> str:
    """Return the text of tokens."""
    return "".join(f" w{token}" if token < CHARACTERS else chr(token - CHARACTERS) for token in tokens)


def answer(prompt: list[int], seed: int, count: int, end: bool = True) -> tuple[list[int], str]:
    """Return the tokens that the model makes of a prompt, and why it ends."""
    tokens = list(prompt)
    for _ in range(count):
        token = (tokens[-1] * 7 + seed % 991 + len(tokens)) % 997
        if token % 41 == END and end:
            return tokens[len(prompt) :], "stop"
        tokens.append(token or 1)
    return tokens[len(prompt) :], "length"


def logprob_of(token: int) -> float:
    """Return what the model says of a token."""
    return -math.log(2 + token)


@dataclass
class Fault:
    """What goes wrong with the next request.

    Attributes:
        status: Answer with that, None to begin well.
        headers: Of such an answer.
        message: In it.
        after: How many tokens come before the stream breaks.
        stall: Seconds of silence before it breaks.
        clean: It ends in order, but for the word that the answer is complete.
    """

    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    message: str = "no"
    after: int = 0
    stall: float = 0.0
    clean: bool = False


@dataclass
class Script:
    """How the server behaves, and what happened.

    Attributes:
        owner: What it calls itself: ``vllm`` takes and tells tokens.
        models: Names; where there are none, there is no list of them either.
        told: What else it says of each.
        props: What llama-server says of itself.
        several: Whether it gives n answers to a request.
        logprobs: Whether it knows log-probabilities; if not, it refuses to be asked for them.
        usage: Whether it counts.
        key: Which one it wants.
        context: Most tokens.
        stuck: It takes requests, and answers none of them.
        pause: Seconds before each token.
        dead: Every stream breaks and every request fails.
        loading: How many requests for the list of models are answered that the model is not loaded yet.
        shift: Added to seeds: the model answers otherwise.
        answering: What answers call their model.
        faults: Of the next requests, one each; None for none.
        bodies: Of the requests for answers.
        keys: Their Authorization.
        left: Tokens sent to each client that closed its connection early.
    """

    owner: str = "someone"
    models: tuple[str, ...] = ("toy",)
    told: dict[str, Any] = field(default_factory=dict)
    props: dict[str, Any] = field(default_factory=dict)
    several: bool = True
    logprobs: bool = True
    usage: bool = True
    key: str | None = None
    context: int | None = None
    stuck: bool = False
    pause: float = 0.0
    dead: bool = False
    loading: int = 0
    shift: int = 0
    answering: str | None = None
    faults: deque[Fault | None] = field(default_factory=deque)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    left: list[int] = field(default_factory=list)

    def app(self) -> Starlette:
        """Return the application."""
        return Starlette(
            routes=[
                Route("/v1/models", self._list),
                Route("/v1/completions", self._complete, methods=["POST"]),
                Route("/v1/chat/completions", self._complete, methods=["POST"]),
                Route("/props", self._tell),
                Route("/tokenize", self._tokenize, methods=["POST"]),
                Route("/detokenize", self._detokenize, methods=["POST"]),
            ]
        )

    def _refusal(self, request: Request) -> Response | None:
        given = request.headers.get("authorization", "")
        if self.key is None or given == f"Bearer {self.key}":
            return None
        # Some servers repeat what they were given.
        return JSONResponse({"error": {"message": f"Incorrect API key provided: {given}"}}, 401)

    async def _list(self, request: Request) -> Response:
        if (refusal := self._refusal(request)) is not None:
            return refusal
        if self.loading:
            self.loading -= 1
            return JSONResponse({"error": {"message": "Loading model"}}, 503)
        entries = [{"id": name, "object": "model", "owned_by": self.owner, **self.told} for name in self.models]
        if not entries:
            return JSONResponse({"error": {"message": "Not Found"}}, 404)
        if self.context is not None:
            entries = [entry | {"max_model_len": self.context} for entry in entries]
        return JSONResponse({"object": "list", "data": entries})

    async def _tell(self, request: Request) -> Response:
        return JSONResponse(self.props)

    async def _silence(self) -> None:
        while self.stuck:
            await asyncio.sleep(0.01)

    async def _tokenize(self, request: Request) -> Response:
        await self._silence()
        body = await request.json()
        text = body["messages"][0]["content"] + "?" if "messages" in body else body["prompt"]
        return JSONResponse({"tokens": tokens_of(text), "count": len(tokens_of(text))})

    async def _detokenize(self, request: Request) -> Response:
        return JSONResponse({"prompt": text_of((await request.json())["tokens"])})

    async def _complete(self, request: Request) -> Response:
        if (refusal := self._refusal(request)) is not None:
            return refusal
        body = await request.json()
        self.bodies.append(body)
        self.keys.append(request.headers.get("authorization", ""))
        await self._silence()
        fault = self.faults.popleft() if self.faults else None
        fault = Fault(503, message="shutting down") if self.dead else fault
        if fault is not None and fault.status is not None:
            return JSONResponse({"error": {"message": fault.message}}, fault.status, fault.headers)
        if body.get("logprobs") and not self.logprobs:
            return JSONResponse({"error": {"message": "logprobs are not supported"}}, 400)
        chat = "messages" in body
        prompt = body["messages"][0]["content"] + "?" if chat else body["prompt"]
        prompt = tokens_of(prompt) if isinstance(prompt, str) else prompt
        if self.context is not None and len(prompt) >= self.context:
            error = {"message": f"maximum context length is {self.context} tokens", "code": "context_length_exceeded"}
            return JSONResponse({"error": error}, 400)
        if not body["stream"]:
            return JSONResponse({"choices": []})
        return StreamingResponse(self._pieces(request, body, chat, prompt, fault), media_type="text/event-stream")

    async def _pieces(
        self, request: Request, body: dict[str, Any], chat: bool, prompt: list[int], fault: Fault | None
    ) -> AsyncIterator[str]:
        n = body.get("n", 1) if self.several else 1
        end = not body.get("ignore_eos", False)
        made = [answer(prompt, body["seed"] + self.shift + index, body["max_tokens"], end) for index in range(n)]
        sent = 0
        try:
            for place in range(max(len(tokens) for tokens, _ in made) + 1):
                for index, (tokens, finish) in enumerate(made):
                    if self.dead:
                        raise ConnectionAbortedError
                    if fault is not None and sent == fault.after:
                        await asyncio.sleep(fault.stall)
                        if fault.clean:
                            yield "data: [DONE]\n\n"
                            return
                        raise ConnectionAbortedError
                    if place < len(tokens):
                        sent += 1
                        await asyncio.sleep(self.pause)
                        yield self._piece(body, chat, index, tokens[place], None)
                    elif place == len(tokens):
                        yield self._piece(body, chat, index, None, finish)
            if self.usage:
                completed = sum(len(tokens) + (finish == "stop") for tokens, finish in made)
                usage = {"prompt_tokens": len(prompt), "completion_tokens": completed}
                yield f"data: {json.dumps({'choices': [], 'usage': usage})}\n\n"
            yield "data: [DONE]\n\n"
        except asyncio.CancelledError:
            self.left.append(sent)
            raise

    def _piece(self, body: dict[str, Any], chat: bool, index: int, token: int | None, finish: str | None) -> str:
        text = "" if token is None else text_of([token])
        choice: dict[str, Any] = {"index": index, "finish_reason": finish}
        choice |= {"delta": {"content": text}} if chat else {"text": text}
        if token is None and finish == "stop" and self.owner == "vllm":
            choice["token_ids"] = [END]
        if token is not None and body.get("return_token_ids"):
            choice["token_ids"] = [token]
        if token is not None and body.get("logprobs"):
            told = {"content": [{"token": text, "logprob": logprob_of(token)}]}
            choice["logprobs"] = told if chat else {"tokens": [text], "token_logprobs": [logprob_of(token)]}
        named = {} if self.answering is None else {"model": self.answering}
        return f"data: {json.dumps({'choices': [choice], **named})}\n\n"


@contextlib.contextmanager
def serving(script: Script) -> Iterator[str]:
    """Run a server in a thread; yield its URL."""
    config = uvicorn.Config(script.app(), host="127.0.0.1", port=0, log_level="critical", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        thread.join(0.01)
        assert thread.is_alive()
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        # It waits for the requests that it has.
        script.stuck = False
        server.should_exit = True
        thread.join()


@contextlib.contextmanager
def interrupting() -> Iterator[str]:
    """Yield the address of a server that answers nobody: who asks it first is interrupted, as by Ctrl-C."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def interrupt() -> None:
            # A connection that is closed beforehand ends the waiting, too.
            with contextlib.suppress(OSError):
                connection, _ = server.accept()
                with connection:
                    if connection.recv(1):
                        os.kill(os.getpid(), signal.SIGINT)
                        done.wait(60)

        done = threading.Event()
        thread = threading.Thread(target=interrupt)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.getsockname()[1]}/v1"
        finally:
            done.set()
            if thread.is_alive():
                with contextlib.suppress(OSError):
                    socket.create_connection(server.getsockname()).close()
            thread.join()
