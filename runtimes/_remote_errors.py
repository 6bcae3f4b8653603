"""What went wrong with a server, in the user's terms."""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from qad.errors import Unreachable, UserError
from qad.runtimes._remote_address import KEY

_START = (
    "start one (llama-server -m FILE.gguf --port 8000; python -m llama_cpp.server --model FILE.gguf --port 8000; "
    "vllm serve FOLDER)"
)


class Cut(Exception):
    """A stream that ended in the middle of an answer."""


class Other(Exception):
    """A server gave another answer when it was asked for the same one again."""


class Silence(Exception):
    """A server said nothing for as long as it was waited for."""


@contextlib.asynccontextmanager
async def patience(seconds: float | None) -> AsyncIterator[None]:
    """Wait for what is in the block at most some seconds in all, whatever is tried again within it.

    Raises:
        Silence: It took longer.
    """
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError as error:
        raise Silence(f"nothing for {seconds:g} s") from error


@dataclass(frozen=True)
class Explainer:
    """What errors of one server mean.

    Attributes:
        base: Its address.
        key: It was asked with; None if there is none.
        timeout: Longest silence in seconds: before the first byte of an answer, and between two pieces of it.
        connect_seconds: Longest that it may take until a connection is taken.
    """

    base: str
    key: str | None = field(repr=False)
    timeout: float
    connect_seconds: float

    def told(self, error: BaseException, *, tokens: int = 0, silence: float | None = None) -> UserError:
        """Return what an error of the client means to the user, without the key.

        Args:
            error: What it raised.
            tokens: That had come of what was asked for.
            silence: Seconds after which it gave up waiting for an answer; the usual ones if None.
        """
        import openai

        where = self.base
        silence = self.timeout if silence is None else silence
        if isinstance(error, UserError):
            return error
        if tokens and (gone := self._gone(error)) is not None:
            return UserError(
                f"the connection to {where} broke off after {tokens:,} token{'s'[: tokens != 1]}{gone}: look at the "
                "server's log, and start it again if it has ended or is stuck"
            )
        if isinstance(error, Cut) and not is_silence(error):
            return UserError(f"{where} breaks its answers off ({error}): look at its log")
        error = error.__cause__ if isinstance(error, Cut) and error.__cause__ is not None else error
        if _is_unreachable(error):
            return Unreachable(
                f"nothing at {where} takes a connection within {self.connect_seconds:g} s: the address is wrong, the "
                f"machine is off, or a firewall or VPN is in between; correct the address, or {_START}"
            )
        if _is_timeout(error):
            return Unreachable(
                f"{where} said nothing for {silence:g} s: it is overloaded or stuck, or no such server; look at its "
                "log, start it again if it is stuck, or ask for fewer trajectories or tokens"
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
            used = f"the key in {KEY} is wrong" if self.key else "it wants a key"
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
            return f", and a new one is not taken within {self.connect_seconds:g} s"
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
        return text.replace(self.key, "***") if self.key else text

    def _reason(self, error: BaseException) -> str:
        """Return the innermost cause of an error in a few words."""
        while error.__cause__ is not None or error.__context__ is not None:
            error = error.__cause__ or error.__context__ or error
        if isinstance(error, OSError) and error.errno is not None and error.errno > 0:
            # asyncio's own words say that a call failed, and not why.
            return os.strerror(error.errno)
        return self.scrub(str(error).strip() or type(error).__name__)


def is_transport(error: BaseException) -> bool:
    """Return whether an error is of the HTTP library under the client: some versions pass those of a stream on."""
    return type(error).__module__.partition(".")[0] in ("httpx", "httpx2", "httpcore", "httpcore2")


def is_silence(error: BaseException) -> bool:
    """Return whether an answer failed because nothing came for too long."""
    cause = error.__cause__ if isinstance(error, Cut) else error
    return cause is not None and _is_timeout(cause) and not _is_unreachable(cause)


def _is_timeout(error: BaseException) -> bool:
    import openai

    return isinstance(error, (openai.APITimeoutError, Silence)) or type(error).__name__.endswith("Timeout")


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
