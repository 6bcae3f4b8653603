"""A server that speaks OpenAI's interface: its address and key, its models, its tokenizer, what its errors mean.

A key is taken from the environment and from nowhere else: a command line is seen by every process of a machine and kept
in histories and results. It goes into the header of requests, and is cut out of whatever a server says back.
"""

import asyncio
import importlib.util
import os
import threading
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import urlsplit

from qad.errors import Unreachable, UserError, unknown_name
from qad.runtimes import plain_url

KEY = "QAD_API_KEY"
# OpenAI's own variable is for its own servers: whoever has it set for them does not want it sent elsewhere.
_OPENAI_KEY, _OPENAI_HOST = "OPENAI_API_KEY", "api.openai.com"
_NO_KEY = "none"
_START = (
    "start one (llama-server -m FILE.gguf --port 8000; python -m llama_cpp.server --model FILE.gguf --port 8000; "
    "vllm serve FOLDER)"
)
_CONNECT_SECONDS = 10.0
# For a list of models, which takes no model's work: longest silence in seconds.
_LIST_SECONDS = 60.0
_LISTED = 20
# As many answers as a call may ask for at a time, each over a connection of its own; the others wait for theirs.
_MOST_CONNECTIONS = 256
_T = TypeVar("_T")


def available() -> str | None:
    """Return None if servers can be asked, else the reason and the remedy."""
    if importlib.util.find_spec("openai") is None:
        return "openai, the client for servers, is not installed: pip install 'qad[remote]'"
    return None


@dataclass(frozen=True)
class Address:
    """Where a server is.

    Attributes:
        base: What paths like ``/completions`` are appended to.
        root: The same without ``/v1``, for what is beside OpenAI's interface.
        host: Of the machine.
        model: Name of the model, None if none was given.
    """

    base: str
    root: str
    host: str
    model: str | None


def address_of(url: str) -> Address:
    """Return the address that a URL such as ``http://host:8000/v1#model`` gives.

    Raises:
        UserError: No host, or a password or a key in it.
    """
    try:
        parts = urlsplit(plain_url(url))
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise UserError(f"the URL of a server is no URL ({error}): write it as http://host:8000/v1") from error
    if parts.username is not None or parts.password is not None or parts.query:
        # Not repeated: it may hold what must not be shown.
        raise UserError(f"the URL of a server holds its address and a model, no key: set {KEY} in the environment")
    if not host:
        raise UserError(f"{url} names no machine: write it as http://host:8000/v1")
    path = parts.path.rstrip("/") or "/v1"
    shown = f"[{host}]" if ":" in host else host
    root = f"{parts.scheme}://{shown}{'' if port is None else f':{port}'}"
    return Address(root + path, root + path.removesuffix("/v1"), host, parts.fragment or None)


def _key(host: str) -> str | None:
    if key := os.environ.get(KEY):
        return key
    return os.environ.get(_OPENAI_KEY) if host == _OPENAI_HOST else None


@dataclass(frozen=True)
class Kind:
    """What is known of a kind of server beyond OpenAI's interface.

    Attributes:
        name: Of its program.
        owner: What it calls itself in its list of models.
        tokens: Whether it takes prompts as tokens, tells tokens, and has a tokenizer.
        body: What every request says besides, so that nothing but the rule that was asked for shapes the answer.
        rule: Names of the rule's parts that OpenAI's interface has no word for.
        end_ignored: What makes it go on after an answer's end; ``{}`` where nothing does.
        serial: Whether it answers one request at a time, and drops the one that it is at for the next.
    """

    name: str
    owner: str
    tokens: bool = False
    body: dict[str, Any] = field(default_factory=dict)
    rule: bool = True
    end_ignored: dict[str, Any] = field(default_factory=lambda: {"ignore_eos": True})
    serial: bool = False


# Defaults of these servers that would change an answer: llama-server cuts at top_p before the temperature (its README,
# /completion), llama-cpp-python's punishes repetitions (llama_cpp/server/types.py), vLLM takes what the model's folder
# recommends (its documentation of --generation-config).
LLAMA_SERVER = Kind(
    "llama-server",
    "llamacpp",
    tokens=True,
    body={
        "samplers": ["temperature", "top_k", "top_p", "min_p"],
        "repeat_penalty": 1.0,
        "timings_per_token": True,
        "cache_prompt": True,
    },
)
LLAMA_CPP_PYTHON = Kind(
    "llama_cpp.server", "me", body={"repeat_penalty": 1.0}, end_ignored={"min_tokens": 0}, serial=True
)
VLLM = Kind(
    "vLLM",
    "vllm",
    tokens=True,
    body={"return_token_ids": True, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0},
)
OTHER = Kind("a server", "", rule=False)
_KINDS = (LLAMA_SERVER, LLAMA_CPP_PYTHON, VLLM)


# What tells one model from another in a server's list: its name; vLLM's words for where its weights and, of an adapter,
# those below it came from; of llama-server's ``meta`` what follows from the file, unlike the context or the time.
_TOLD = ("id", "root", "parent", "size", "n_params", "n_vocab", "n_embd")

# Name in a server's refusal -> what is left out then.
_OPTIONAL = {"logprobs": {"logprobs", "top_logprobs"}, "stream_options": {"stream_options"}}


class Cut(Exception):
    """A stream that ended in the middle of an answer."""


class Other(Exception):
    """A server gave another answer when it was asked for the same one again."""


class Server:
    """A server and one model of it.

    Args:
        url: See ``address_of``.
        timeout: Longest silence in seconds: before the first byte of an answer, and between two pieces of it.
        retries: How often a request is repeated, with growing pauses, after an error that may pass.

    Attributes:
        address: Where it is.
        model: Name of the model.
        served: What it tells of that model: ``id`` and others of ``_TOLD``. Empty where it names none.
        kind: What is known of the server's kind.
        context: Tokens that prompt and answer may have together, None if it does not tell.
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
        import openai

        self.address = address_of(url)
        self.timeout, self.retries = timeout, retries
        self._connect_seconds = min(_CONNECT_SECONDS, timeout)
        self._key = _key(self.address.host)
        self.client = openai.AsyncOpenAI(
            # Never None: the client would look for OpenAI's own key.
            api_key=self._key or _NO_KEY,
            base_url=self.address.base,
            timeout=openai.Timeout(timeout, connect=self._connect_seconds),
            max_retries=retries,
        )
        # A loop of its own: the caller may be in one, as notebooks are.
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="qad-remote", daemon=True)
        self._thread.start()
        self._closed = False
        try:
            entry = self._find_model()
        except BaseException:
            self.close()
            raise
        self.length_word = "max_tokens"
        self.refused: set[str] = set()
        self.served = _told_of(entry)
        self.model = str(entry.get("id", self.address.model))
        self.kind = next((kind for kind in _KINDS if kind.owner == entry.get("owned_by")), OTHER)
        self.several = not self.kind.serial
        self.turn = asyncio.Semaphore(1 if self.kind.serial else _MOST_CONNECTIONS)
        meta = entry.get("meta")
        self.vocabulary = _whole(meta.get("n_vocab") if isinstance(meta, dict) else None)
        self.context = _whole(entry.get("max_model_len"))
        if self.kind is LLAMA_SERVER:
            props = self.ask(f"{self.address.root}/props")
            settings = props.get("default_generation_settings") if isinstance(props, dict) else None
            self.context = _whole(settings.get("n_ctx") if isinstance(settings, dict) else None)
            # Its name is the file's without the folder: files of two runs share it.
            if isinstance(props, dict) and isinstance(props.get("model_path"), str):
                self.served["path"] = props["model_path"]

    def start(self, work: Coroutine[Any, Any, _T]) -> "asyncio.Task[_T]":
        """Begin work in the server's loop and return its task, which belongs to that loop."""

        async def begin() -> asyncio.Task[_T]:
            return asyncio.get_running_loop().create_task(work)

        return self.wait(begin())

    def wait(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Do work in the server's loop and return what it returns."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def soon(self, task: "asyncio.Task[Any]") -> None:
        """Cancel a task of the server's loop."""
        self._loop.call_soon_threadsafe(task.cancel)

    async def post(self, url: str, body: dict[str, Any]) -> Any:
        """Return the JSON that a request without a stream gives."""
        return await self.client.post(url, body={"model": self.model, **body}, cast_to=object)

    def ask(self, url: str, body: dict[str, Any] | None = None) -> Any:
        """Return the JSON at a URL, asked for with a body if there is one.

        Raises:
            UserError: What went wrong, in the user's terms.
        """
        work = self.client.get(url, cast_to=object) if body is None else self.post(url, body)
        try:
            return self.wait(_awaited(work))
        except Exception as error:
            raise self.told(error) from None

    async def _listing(self) -> Any:
        """Return the list of models; silence at the first try is the last: such an address is wrong, most likely."""
        import openai

        seconds = min(_LIST_SECONDS, self.timeout)
        once = self.client.with_options(max_retries=0, timeout=openai.Timeout(seconds, connect=self._connect_seconds))
        try:
            return await once.get("/models", cast_to=object)
        except openai.APITimeoutError:
            raise
        except openai.APIError:
            # It may be about to start, or busy.
            return await self.client.get("/models", cast_to=object)

    def _find_model(self) -> dict[str, Any]:
        """Return the entry of the model in the server's list; an empty one if there is a name and no list."""
        import openai

        wanted = self.address.model
        try:
            listing = self.wait(self._listing())
        except openai.NotFoundError:
            if wanted is not None:
                return {}
            raise UserError(
                f"{self.address.base} has no list of models: is that the address of an OpenAI-compatible server? It "
                "usually ends in /v1; name the model behind a # if the server has no list"
            ) from None
        except Exception as error:
            raise self.told(error, silence=min(_LIST_SECONDS, self.timeout)) from None
        data = listing.get("data") if isinstance(listing, dict) else None
        if not isinstance(data, list):
            raise UserError(
                f"{self.address.base}/models is no list of models: is that the address of an OpenAI-compatible server? "
                "It usually ends in /v1"
            )
        entries = [entry for entry in data if isinstance(entry, dict) and isinstance(entry.get("id"), str)]
        names = [entry["id"] for entry in entries]
        if wanted is None and len(names) == 1:
            return entries[0]
        if wanted is None:
            raise UserError(
                f"{self.address.base} serves {_listed(names)}: name one behind a #, as in "
                f"{self.address.base}#{names[0] if names else 'MODEL'}"
            )
        if wanted not in names:
            raise unknown_name(f"model of {self.address.base}", wanted, names)
        return entries[names.index(wanted)]

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

    def _tokens(self, found: Any) -> list[int]:
        tokens = found.get("tokens") if isinstance(found, dict) else None
        if not isinstance(tokens, list):
            raise UserError(f"{self.address.root}/tokenize gave no tokens: update the server")
        return [int(token) for token in tokens]

    def told(self, error: BaseException, *, tokens: int = 0, silence: float | None = None) -> UserError:
        """Return what an error of the client means to the user, without the key.

        Args:
            error: What it raised.
            tokens: That had come of what was asked for.
            silence: Seconds after which it gave up waiting for an answer; the usual ones if None.
        """
        import openai

        where = f"{self.address.base}"
        silence = self.timeout if silence is None else silence
        if isinstance(error, UserError):
            return error
        if tokens and (gone := self._gone(error)) is not None:
            return UserError(
                f"the connection to {where} broke off after {tokens:,} token{'s'[: tokens != 1]}{gone}: look at the "
                "server's log, and start it again if it has ended"
            )
        if isinstance(error, Cut) and not isinstance(error.__cause__, openai.APITimeoutError):
            return UserError(f"{where} breaks its answers off ({error}): look at its log")
        error = error.__cause__ if isinstance(error, Cut) and error.__cause__ is not None else error
        if _is_unreachable(error):
            return Unreachable(
                f"nothing at {where} takes a connection within {self._connect_seconds:g} s: the address is wrong, the "
                f"machine is off, or a firewall or VPN is in between; correct the address, or {_START}"
            )
        if _is_timeout(error):
            return Unreachable(
                f"{where} said nothing for {silence:g} s: it is overloaded or stuck, or no such server; look at its "
                "log, ask for fewer trajectories or tokens, or allow more time"
            )
        if _is_connection(error):
            return Unreachable(
                f"no server answers at {where} ({self._reason(error)}): {_START}, or correct the address"
            )
        if not isinstance(error, openai.APIError):
            return UserError(f"{where} gave an answer that cannot be read ({type(error).__name__}): update the server")
        message = self.scrub(_message(error))
        status = getattr(error, "status_code", None)
        if status in (401, 403):
            used = f"the key in {KEY} is wrong" if self._key else "it wants a key"
            return UserError(f"{where} refuses ({message}): {used}; set {KEY} in the environment")
        if is_context(error):
            return UserError(
                f"the prompt does not fit the model's context at {where} ({message}): shorten it, ask for fewer "
                "tokens, or start the server with a larger context"
            )
        if status == 404:
            return UserError(f"{where} does not know what it was asked for ({message}): see {where}/models")
        if status == 429:
            return UserError(f"{where} takes no more requests ({message}): wait, or ask for fewer trajectories")
        if status is None or status >= 500:
            return UserError(f"{where} failed ({message}): look at its log")
        return UserError(f"{where} refuses the request ({message}): leave out what it does not know")

    def _gone(self, error: BaseException) -> str | None:
        """Return how a server that had begun an answer failed to go on; None if it refuses to, with its reason."""
        if isinstance(error, Other):
            return ", and the server gave another answer when it was asked again"
        if isinstance(error, Cut):
            if error.__cause__ is None or not _is_timeout(error.__cause__):
                return f", and again each time it was made anew ({error})"
            error = error.__cause__
        if _is_unreachable(error):
            return f", and a new one is not taken within {self._connect_seconds:g} s"
        if _is_timeout(error):
            return f" and nothing more for {self.timeout:g} s"
        if _is_connection(error):
            return f", and cannot be made again ({self._reason(error)})"
        status = getattr(error, "status_code", None)
        if status is not None and status >= 500:
            return f", and the server then failed ({self.scrub(_message(error))})"
        return None

    def scrub(self, text: str) -> str:
        """Return a text without the key."""
        return text.replace(self._key, "***") if self._key else text

    def _reason(self, error: BaseException) -> str:
        """Return the innermost cause of an error in a few words."""
        while error.__cause__ is not None or error.__context__ is not None:
            error = error.__cause__ or error.__context__ or error
        if isinstance(error, OSError) and error.errno is not None and error.errno > 0:
            # asyncio's own words say that a call failed, and not why.
            return os.strerror(error.errno)
        return self.scrub(str(error).strip() or type(error).__name__)

    def close(self) -> None:
        """Close all connections. May be called twice."""
        if self._closed:
            return
        self._closed = True
        self.wait(_shut(self.client))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def _to_cut(text: str, *, special: bool) -> dict[str, Any]:
    # llama-server's words and vLLM's, each of which the other leaves aside.
    return {
        "content": text,
        "parse_special": True,
        "add_special": special,
        "prompt": text,
        "add_special_tokens": special,
    }


def _told_of(entry: dict[str, Any]) -> dict[str, Any]:
    """Return what tells a model from another one in its entry of a server's list."""
    meta = entry.get("meta")
    parts = (meta if isinstance(meta, dict) else {}) | entry
    return {name: parts[name] for name in _TOLD if isinstance(parts.get(name), str | int)}


async def _awaited(work: Any) -> Any:
    return await work


async def _shut(client: Any) -> None:
    """Cancel everything else in the loop, then close the client."""
    others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    await client.close()


def is_transport(error: BaseException) -> bool:
    """Return whether an error is of the HTTP library under the client: some versions pass those of a stream on."""
    return type(error).__module__.partition(".")[0] in ("httpx", "httpx2", "httpcore", "httpcore2")


def _is_timeout(error: BaseException) -> bool:
    import openai

    return isinstance(error, openai.APITimeoutError) or type(error).__name__.endswith("Timeout")


def _is_unreachable(error: BaseException) -> bool:
    """Return whether no connection was taken in time, rather than no answer given."""
    return "ConnectTimeout" in (type(error).__name__, type(error.__cause__).__name__)


def _is_connection(error: BaseException) -> bool:
    import openai

    return isinstance(error, openai.APIConnectionError) or is_transport(error)


def _message(error: Any) -> str:
    """Return what a server says of an error, in one line."""
    body = getattr(error, "body", None)
    message = body.get("message") if isinstance(body, dict) else None
    text = message if isinstance(message, str) and message else str(getattr(error, "message", error))
    status = getattr(error, "status_code", None)
    return " ".join(f"{status or ''} {text}".split())[:500]


def is_context(error: BaseException) -> bool:
    """Return whether a server says that a prompt is longer than its context."""
    body = getattr(error, "body", None)
    known = body if isinstance(body, dict) else {}
    if "context" in f"{known.get('code')} {known.get('type')}":
        return True
    text = _message(error).lower()
    return getattr(error, "status_code", None) == 400 and "context" in text and ("length" in text or "exceed" in text)


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and value > 0 else None


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return (", ".join(names[:_LISTED]) or "no model") + more
