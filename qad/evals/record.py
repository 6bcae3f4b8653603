"""What `qad eval --json` writes: what was found, and with what."""

import json
import platform
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from qad import __version__
from qad.evals import results
from qad.evals.task import JUDGING
from qad.files import replacing_file
from qad.host import describe

_LIBRARIES = ("llama-cpp-python", "torch", "transformers", "onnxruntime-genai", "gptqmodel", "reasoning-gym")


def _versions() -> dict[str, str]:
    found = {"qad": __version__, "python": platform.python_version()}
    for library in (*_LIBRARIES, "math-verify", "scikit-learn", "torchmetrics", "rouge-score"):
        try:
            found[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
    return found


def write_record(json_file: Path, command: str, began: float, content: Mapping[str, Any]) -> None:
    """Write what was found, with the command, the machine and the libraries that it was found with.

    Args:
        json_file: Where to.
        command: What was typed.
        began: When, in seconds since the epoch.
        content: The rest.
    """
    values = {
        "format": results.FORMAT,
        "kind": "eval",
        "judging": JUDGING,
        "command": command,
        "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(began)),
        "machine": describe(),
        "versions": _versions(),
        **content,
    }
    with replacing_file(json_file) as temporary:
        temporary.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
