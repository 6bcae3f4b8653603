"""Whether a server still has the model that it had when it was opened."""

import asyncio
from typing import Any

from qad.errors import OtherModel
from qad.runtimes._remote_connection import Connection
from qad.runtimes._remote_models import listed, told_of

# Longest silence in seconds: who does not answer says nothing of a change.
_SECONDS = 5.0


class Identity:
    """What tells a server's model from another one, and how it is looked at again.

    Args:
        connection: Over which it is asked.
        base: Its address, for errors.
        model: Name of the model.
        served: What the server tells of it, see ``told_of`` and ``place_of``.
        props: Where llama-server tells its file; None of other kinds.
    """

    def __init__(
        self, connection: Connection, base: str, model: str, served: dict[str, Any], props: str | None
    ) -> None:
        self._connection = connection
        self._base = base
        self._model = model
        self._served = served
        self._props = props
        # What answers say of themselves, and the first change that was seen.
        self._answering: str | None = None
        self._seen: OtherModel | None = None

    def check_answering(self, name: Any) -> None:
        """Compare the model that a piece of an answer names with that of the first.

        Many servers repeat the name that they were asked for; those that name what they have loaded tell a change.

        Raises:
            OtherModel: It is another one.
        """
        if not isinstance(name, str) or not name:
            return
        self._answering = self._answering or name
        if name != self._answering:
            self._seen = self._changed(self._answering, name)
            raise self._seen

    def check(self) -> None:
        """Look whether the server still has its model, as far as it tells.

        To be called when answers have come: with the same model at both ends, what lies between is of that model.

        Raises:
            OtherModel: It has another one, or one of the answers said so.
        """
        if self._seen is None and "id" in self._served:
            self._seen = self._connection.wait(self._difference())
        if self._seen is not None:
            raise self._seen

    async def _difference(self) -> OtherModel | None:
        """Return how what is served now differs; None if it does not, or cannot be asked."""
        import openai

        seconds = min(_SECONDS, self._connection.explainer.timeout)
        once = self._connection.client.with_options(max_retries=0, timeout=openai.Timeout(seconds))
        urls = ["/models", *([self._props] if self._props else [])]
        try:
            listing, *props = await asyncio.gather(*(once.get(url, cast_to=object) for url in urls))
        except Exception:  # one that has gone away says so when it is asked for an answer
            return None
        data = listing.get("data") if isinstance(listing, dict) else None
        entries = [one for one in data if isinstance(one, dict)] if isinstance(data, list) else []
        names = [one["id"] for one in entries if isinstance(one.get("id"), str)]
        if self._model not in names:
            return self._changed(self._model, listed(names)) if names else None
        now = told_of(next(one for one in entries if one.get("id") == self._model))
        now |= place_of(props[0]) if props else {}
        apart = [name for name, value in self._served.items() if now.get(name, value) != value]
        if not apart:
            return None
        before, after = (", ".join(f"{name} {told[name]}" for name in apart) for told in (self._served, now))
        return self._changed(f"{self._model} ({before})", f"{self._model} ({after})")

    def _changed(self, before: str, after: str) -> OtherModel:
        return OtherModel(
            f"{self._base} had {before} first and has {after} now, and answers of two models are not mixed: start it "
            "with the first one again, or give the command again for the new one"
        )


def place_of(props: Any) -> dict[str, Any]:
    """Return where llama-server has its model from: its name is the file's without the folder, which two runs share."""
    path = props.get("model_path") if isinstance(props, dict) else None
    return {"path": path} if isinstance(path, str) else {}
