"""What a record of measurements says of itself: what was typed and when, on which machine, with which versions."""

import platform
import time
from collections.abc import Sequence
from importlib import metadata
from typing import Any

from qad import __version__
from qad.host import describe

_LIBRARIES = ("llama-cpp-python", "onnxruntime", "gptqmodel", "torch", "transformers")


def versions(libraries: Sequence[str] = _LIBRARIES) -> dict[str, str]:
    """Return the versions of qad, of Python and of those libraries that are installed."""
    found = {"qad": __version__, "python": platform.python_version()}
    for library in libraries:
        try:
            found[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
    return found


def provenance(command: str, began: float, libraries: Sequence[str] = _LIBRARIES) -> dict[str, Any]:
    """Return ``command``, ``when`` (UTC), ``machine`` and ``versions``, for JSON.

    Args:
        command: What was typed.
        began: ``time.time()`` when it began.
        libraries: Whose versions matter.
    """
    return {
        "command": command,
        "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(began)),
        "machine": describe(),
        "versions": versions(libraries),
    }
