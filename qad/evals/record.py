"""What `qad eval --json` writes: what was found, and with what."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qad.evals import results
from qad.evals.task import JUDGING
from qad.files import replacing_file
from qad.provenance import provenance

_LIBRARIES = (
    *("llama-cpp-python", "torch", "transformers", "onnxruntime-genai", "gptqmodel", "reasoning-gym"),
    *("math-verify", "scikit-learn", "torchmetrics", "rouge-score"),
)


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
        **provenance(command, began, _LIBRARIES),
        **content,
    }
    with replacing_file(json_file) as temporary:
        temporary.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
