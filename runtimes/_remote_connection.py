"""Requests to a server, made in an event loop of their own."""

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

from qad.runtimes._remote_address import Address, key_of
from qad.runtimes._remote_errors import Explainer

_NO_KEY = "none"
_CONNECT_SECONDS = 10.0
_T = TypeVar("_T")


class Connection:
    """OpenAI's client for one server, and the thread in which it works.

    Args:
        address: Where the server is.
        timeout: Longest silence in seconds: before the first byte of an answer, and between two pieces of it.
        retries: How often a request is repeated, with growing pauses, after an error that may pass.

    Attributes:
        client: OpenAI's, asynchronous: to be used within the loop.
        explainer: What its errors mean.
    """

    def __init__(self, address: Address, timeout: float, retries: int) -> None:
        import openai

        key = key_of(address.host)
        connect_seconds = min(_CONNECT_SECONDS, timeout)
        self.explainer = Explainer(address.base, key, timeout, connect_seconds)
        self.client = openai.AsyncOpenAI(
            # Never None: the client would look for OpenAI's own key.
            api_key=key or _NO_KEY,
            base_url=address.base,
            timeout=openai.Timeout(timeout, connect=connect_seconds),
            max_retries=retries,
        )
        # A loop of its own: the caller may be in one, as notebooks are.
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="qad-remote", daemon=True)
        self._thread.start()
        self._closed = False

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

    def close(self) -> None:
        """Close all connections. May be called twice."""
        if self._closed:
            return
        self._closed = True
        self.wait(_shut(self.client))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _shut(client: Any) -> None:
    """Cancel everything else in the loop, then close the client."""
    others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    await client.close()
