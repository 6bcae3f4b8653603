"""Where a server is, and with which key it is asked.

A key is taken from the environment and from nowhere else: a command line is seen by every process of a machine and kept
in histories and results. It goes into the header of requests, and is cut out of whatever a server says back.
"""

import os
from dataclasses import dataclass
from urllib.parse import urlsplit

from qad.errors import UserError
from qad.runtimes import plain_url

KEY = "QAD_API_KEY"
# OpenAI's own variable is for its own servers: whoever has it set for them does not want it sent elsewhere.
_OPENAI_KEY, _OPENAI_HOST = "OPENAI_API_KEY", "api.openai.com"


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


def key_of(host: str) -> str | None:
    """Return the key for a machine's server, None if there is none."""
    if key := os.environ.get(KEY):
        return key
    return os.environ.get(_OPENAI_KEY) if host == _OPENAI_HOST else None
