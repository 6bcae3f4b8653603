"""A server that speaks OpenAI's interface and one model of it: what it told of itself, and its tokenizer."""

import asyncio
import importlib.util
from collections.abc import Sequence
from typing import Any

from qad.errors import UserError
from qad.runtimes._remote_address import address_of
from qad.runtimes._remote_connection import Connection
from qad.runtimes._remote_errors import patience
from qad.runtimes._remote_identity import Identity, place_of
from qad.runtimes._remote_kinds import LLAMA_SERVER, VLLM, kind_of
from qad.runtimes._remote_models import find_model, told_of

# As many answers as a call may ask for at a time, each over a connection of its own; the others wait for theirs.
_MOST_CONNECTIONS = 256
# Name in a server's refusal -> what is left out then.
_OPTIONAL = {"logprobs": {"logprobs", "top_logprobs"}, "stream_options": {"stream_options"}}


def available() -> str | None:
    """Return None if servers can be asked, else the reason and the remedy."""
    if importlib.util.find_spec("openai") is None:
        return "openai, the client for servers, is not installed: pip install 'qad[remote]'"
    return None


class Server:
    """A server and one model of it.

    Args:
        url: See ``address_of``.
        timeout: Longest silence in seconds: before the first byte of an answer, and between two pieces of it.
        retries: How often a request is repeated, with growing pauses, after an error that may pass.

    Attributes:
        address: Where it is.
        connection: Over which it is asked.
        explainer: What its errors mean.
        model: Name of the model.
        served: What it tells of that model: see ``told_of``. Empty where it names none.
        kind: What is known of the server's kind.
        context: Tokens that prompt and answer may have together, None if it does not tell.
        identity: Whether it still has that model.
        vocabulary: Number of the model's tokens, None if it does not tell.
        several: Whether it may give several answers to one request; False once it did not.
        turn: Who may have a connection.
        refused: Parts of a request that it does not take, and that can be left out.
        length_word: What it calls the most tokens of an answer.

    Raises:
        UserError: The client is not installed, the server does not answer, the key is wrong, or there is no such model,
            or several and none was named.
    """

    def __init__(self, url: str, timeout: float, retries: int) -> None:
        if reason := available():
            raise UserError(reason)
        self.address = address_of(url)
        self.retries = retries
        self.connection = Connection(self.address, timeout, retries)
        self.explainer = self.connection.explainer
        try:
            entry = find_model(self.connection, self.address)
        except BaseException:
            self.close()
            raise
        self.length_word = "max_tokens"
        self.refused: set[str] = set()
        self.served = told_of(entry)
        self.model = str(entry.get("id", self.address.model))
        self.kind = kind_of(entry.get("owned_by"))
        self.several = not self.kind.serial
        self.turn = asyncio.Semaphore(1 if self.kind.serial else _MOST_CONNECTIONS)
        meta = entry.get("meta")
        self.vocabulary = _whole(meta.get("n_vocab") if isinstance(meta, dict) else None)
        self.context = _whole(entry.get("max_model_len"))
        where = f"{self.address.root}/props"
        if self.kind is LLAMA_SERVER:
            props = self.ask(where)
            settings = props.get("default_generation_settings") if isinstance(props, dict) else None
            self.context = _whole(settings.get("n_ctx") if isinstance(settings, dict) else None)
            self.served |= place_of(props)
        told = where if "path" in self.served else None
        self.identity = Identity(self.connection, self.address.base, self.model, self.served, told)

    async def post(self, url: str, body: dict[str, Any]) -> Any:
        """Return the JSON that a request without a stream gives."""
        return await self.connection.client.post(url, body={"model": self.model, **body}, cast_to=object)

    def ask(self, url: str, body: dict[str, Any] | None = None) -> Any:
        """Return the JSON at a URL, asked for with a body if there is one.

        Raises:
            UserError: What went wrong, in the user's terms.
        """
        work = self.connection.client.get(url, cast_to=object) if body is None else self.post(url, body)
        try:
            return self.connection.wait(_awaited(work, self.explainer.timeout))
        except Exception as error:
            raise self.explainer.told(error) from None

    def tokenize(self, text: str, *, special: bool = False) -> list[int]:
        """Return a text's tokens, for a kind that has a tokenizer.

        Args:
            text: What to cut.
            special: Whether to put before it what the model expects before a text.
        """
        return self._tokens(self.ask(f"{self.address.root}/tokenize", _to_cut(text, special=special)))

    def template(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Return the tokens of messages under the model's chat template, ready for the answer."""
        if self.kind is VLLM:
            body = {"messages": list(messages), "add_generation_prompt": True}
            return self._tokens(self.ask(f"{self.address.root}/tokenize", body))
        rendered = self.ask(f"{self.address.root}/apply-template", {"messages": list(messages)})
        return self.tokenize(str(rendered["prompt"]), special=True)

    def detokenize(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens, for a kind that has a tokenizer."""
        found = self.ask(f"{self.address.root}/detokenize", {"tokens": list(tokens)})
        return str(found.get("content", found.get("prompt", "")))

    async def tokens_of(self, text: str) -> list[int]:
        """Return a text's tokens, from within the loop."""
        return self._tokens(await self.post(f"{self.address.root}/tokenize", _to_cut(text, special=False)))

    def without(self, body: dict[str, Any], error: Any) -> dict[str, Any] | None:
        """Return a refused request without what was refused and can be left out; None if there is nothing such."""
        words = str(error).lower()
        if "max_completion_tokens" in words and self.length_word in body and self.length_word == "max_tokens":
            # OpenAI's reasoning models have a new word for it.
            self.length_word = "max_completion_tokens"
            changed = {name: value for name, value in body.items() if name != "max_tokens"}
            return changed | {self.length_word: body["max_tokens"]}
        for name, parts in _OPTIONAL.items():
            if name in words and parts & body.keys():
                self.refused |= parts
                return {part: value for part, value in body.items() if part not in parts}
        return None

    def close(self) -> None:
        """Close all connections. May be called twice."""
        self.connection.close()

    def _tokens(self, found: Any) -> list[int]:
        tokens = found.get("tokens") if isinstance(found, dict) else None
        if not isinstance(tokens, list):
            raise UserError(f"{self.address.root}/tokenize gave no tokens: update the server")
        return [int(token) for token in tokens]


def _to_cut(text: str, *, special: bool) -> dict[str, Any]:
    # llama-server's words and vLLM's, each of which the other leaves aside.
    return {
        "content": text,
        "parse_special": True,
        "add_special": special,
        "prompt": text,
        "add_special_tokens": special,
    }


async def _awaited(work: Any, seconds: float) -> Any:
    # The client repeats what is not answered, and waits as long each time.
    async with patience(seconds):
        return await work


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and value > 0 else None
