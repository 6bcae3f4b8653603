"""The models that a server lists, and what it tells of one."""

from collections.abc import Sequence
from typing import Any

from qad.errors import UserError, unknown_name
from qad.runtimes._remote_address import Address
from qad.runtimes._remote_connection import Connection
from qad.runtimes._remote_errors import patience

# For a list of models, which takes no model's work: longest silence in seconds.
_LIST_SECONDS = 60.0
_LISTED = 20
# What tells one model from another in a server's list: its name; vLLM's words for where its weights and, of an adapter,
# those below it came from; of llama-server's ``meta`` what follows from the file, unlike the context or the time.
_TOLD = ("id", "root", "parent", "size", "n_params", "n_vocab", "n_embd")


async def _listing(connection: Connection) -> Any:
    """Return the list of models; silence at the first try is the last: such an address is wrong, most likely."""
    import openai

    seconds = min(_LIST_SECONDS, connection.explainer.timeout)
    once = connection.client.with_options(
        max_retries=0, timeout=openai.Timeout(seconds, connect=connection.explainer.connect_seconds)
    )
    try:
        return await once.get("/models", cast_to=object)
    except openai.APITimeoutError:
        raise
    except openai.APIError:
        # It may be about to start, or busy.
        async with patience(connection.explainer.timeout):
            return await connection.client.get("/models", cast_to=object)


def find_model(connection: Connection, address: Address) -> dict[str, Any]:
    """Return the entry of the model in the server's list; an empty one if there is a name and no list."""
    import openai

    wanted = address.model
    try:
        listing = connection.wait(_listing(connection))
    except openai.NotFoundError:
        if wanted is not None:
            return {}
        raise UserError(
            f"{address.base} has no list of models: is that the address of an OpenAI-compatible server? It "
            "usually ends in /v1; name the model behind a # if the server has no list"
        ) from None
    except Exception as error:
        raise connection.explainer.told(error, silence=min(_LIST_SECONDS, connection.explainer.timeout)) from None
    data = listing.get("data") if isinstance(listing, dict) else None
    if not isinstance(data, list):
        raise UserError(
            f"{address.base}/models is no list of models: is that the address of an OpenAI-compatible server? "
            "It usually ends in /v1"
        )
    entries = [entry for entry in data if isinstance(entry, dict) and isinstance(entry.get("id"), str)]
    names = [entry["id"] for entry in entries]
    if wanted is None and len(names) == 1:
        return entries[0]
    if wanted is None:
        raise UserError(
            f"{address.base} serves {listed(names)}: name one behind a #, as in "
            f"{address.base}#{names[0] if names else 'MODEL'}"
        )
    if wanted not in names:
        raise unknown_name(f"model of {address.base}", wanted, names)
    return entries[names.index(wanted)]


def told_of(entry: dict[str, Any]) -> dict[str, Any]:
    """Return what tells a model from another one in its entry of a server's list."""
    meta = entry.get("meta")
    parts = (meta if isinstance(meta, dict) else {}) | entry
    return {name: parts[name] for name in _TOLD if isinstance(parts.get(name), str | int)}


def listed(names: Sequence[str]) -> str:
    """Return names of models as a list that is not too long."""
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return (", ".join(names[:_LISTED]) or "no model") + more
