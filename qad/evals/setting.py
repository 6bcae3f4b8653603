"""What samples were made with: what stands beside them, and what is said when something else is asked for.

Samples of two settings do not stand in one file. Who asks for another is told which value differs and how, and what to
type to go on with what is there.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qad.errors import UserError
from qad.final_answer import Kind

FORMAT = 1


@dataclass(frozen=True)
class Setting:
    """What samples were made with. Rows of two settings do not stand in one file.

    Attributes:
        task: Name of the task, without a limit: more items may join.
        task_seed: Seed of the task's items.
        model: Name of the model in the table.
        sha256: Of its file, or what else stands for it.
        k: Trajectories of an item.
        sampling: Rule and seed.
        new_tokens: Most tokens of a trajectory.
        deliberation: How deliberations were made; None while there is none.
        kind: How two answers are compared; it is noted for who reads the samples without the task.
        kv_type: Type of the key-value cache.
        served: Of a model of a server ``address``, and what the server tells of it: ``id`` and what else it knows. None
            for others, and of before it was noted.
    """

    task: str
    task_seed: int
    model: str
    sha256: str
    k: int
    sampling: dict[str, Any]
    new_tokens: int
    deliberation: dict[str, Any] | None = None
    kind: Kind | None = None
    kv_type: str = "f16"
    served: dict[str, Any] | None = None


_WORDS = {
    "task": "the task",
    "task_seed": "the task's seed",
    "model": "the model's name",
    "sha256": "the SHA-256 of the model's file",
    "served": "the served model's",
    "k": "k",
    "sampling": "the sampling's",
    "new_tokens": "the number of new tokens",
    "deliberation": "the deliberation's",
    "kv_type": "the type of the key-value cache",
}
# With what an option asks for a setting, where one does.
_OPTIONS = {
    "task_seed": "--seed",
    "k": "--k",
    "new_tokens": "--new-tokens",
    "sampling temperature": "--temperature",
    "sampling top_p": "--top-p",
    "sampling top_k": "--top-k",
    "sampling seed": "--seed",
    "kv_type": "--kv-type",
    "deliberation count": "--summary-k",
    "deliberation new_tokens": "--new-tokens",
}
# Characters of a value that are shown, and of those how many before the first that differs.
_SHOWN, _BEFORE = 72, 12


class Mismatch(UserError):
    """Samples are there that were made with something else than what is asked for now."""


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    """Return the values of a setting by name, those of what has parts by the names of both."""
    found: dict[str, Any] = {}
    for name in _WORDS:
        value = values[name]
        found |= {f"{name} {part}": one for part, one in value.items()} if isinstance(value, dict) else {name: value}
    return found


def _mismatch(path: Path, known: dict[str, Any], wanted: dict[str, Any]) -> Mismatch | None:
    """Return the error for samples that were made with another setting, which says in what; None if with the same."""
    stored, asked = _flat(known), _flat(wanted)
    differ = [name for name in (asked | stored) if stored.get(name) != asked.get(name)]
    if not differ:
        return None
    told = []
    for name in differ:
        whole, _, part = name.partition(" ")
        one, other = _sides(stored.get(name), asked.get(name))
        told.append(f"{_WORDS[whole]}{f' {part}' if part else ''}: stored {one}, asked for {other}")
    remedies = [f"choose another folder with -o, or delete {path} and {path.with_suffix('.json').name}"]
    if all(name in _OPTIONS for name in differ):
        again = dict.fromkeys(f"{_OPTIONS[name]} {stored[name]}" for name in differ if name in stored)
        remedies.insert(0, f"give {' '.join(again)} to go on with them")
    return Mismatch(f"{path} has samples of another setting ({'; '.join(told)}): {', '.join(remedies)}")


def _sides(one: Any, other: Any) -> tuple[str, str]:
    """Return two values that differ as text: whole if they are short, else what is around the first difference."""
    texts = [value if isinstance(value, str) else json.dumps(value) for value in (one, other)]
    if max(map(len, texts)) <= _SHOWN:
        return texts[0], texts[1]
    differ = next((at for at, (ours, theirs) in enumerate(zip(*texts, strict=False)) if ours != theirs), None)
    differ = min(map(len, texts)) if differ is None else differ
    start = max(0, differ - _BEFORE)
    excerpts = [
        f"{'…' if start else ''}{text[start : start + _SHOWN]}{'…' if len(text) > start + _SHOWN else ''}"
        for text in texts
    ]
    return excerpts[0], excerpts[1]


def _stored(path: Path) -> dict[str, Any] | None:
    """Return the setting that stands beside a file of samples, None if there are no samples yet.

    Raises:
        UserError: It is missing or damaged.
    """
    beside = path.with_suffix(".json")
    if not path.is_file() or not path.stat().st_size:
        return None
    try:
        stored = json.loads(beside.read_text(encoding="utf-8"))
        if stored["format"] != FORMAT:
            raise UserError(f"{beside} has format {stored['format']!r}, not {FORMAT}: made by another qad")
        # Files of before it could be chosen do not tell the type of the cache, and earlier ones no served model.
        setting = {"kv_type": "f16", "served": None, **stored["setting"]}
        _flat(setting)
        return setting
    except FileNotFoundError:
        raise UserError(
            f"{beside} is missing, which says what {path.name} was made with: bring it back, or choose another folder "
            "with -o"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{beside} is damaged: choose another folder with -o, or delete it and {path.name}") from error


def agreed(path: Path, setting: Setting) -> Setting:
    """Return what a file of samples is made with from now on: what is asked for, and what else it has already.

    Args:
        path: The file, which need not be there; nothing is written.
        setting: What is asked for.

    Raises:
        Mismatch: The file was made with something else; the message says with what.
        UserError: What says so is missing or damaged.
    """
    known = _stored(path)
    if known is None:
        return setting
    wanted = asdict(setting)
    if wanted["deliberation"] is None or known["deliberation"] is None:
        # One of both has none: nothing to disagree about.
        wanted["deliberation"] = known["deliberation"] = wanted["deliberation"] or known["deliberation"]
    if wanted["served"] or known["served"]:
        # What one of both does not tell, as a server that is away or of another version, is no difference.
        ours, theirs = wanted["served"] or {}, known["served"] or {}
        wanted["served"], known["served"] = theirs | ours, ours | theirs
    if error := _mismatch(path, known, wanted):
        raise error
    return Setting(**wanted)


def names_served(path: Path) -> bool:
    """Return whether a file of samples tells which model of a server made it; also if there are no samples yet.

    Raises:
        UserError: What says so is missing or damaged.
    """
    known = _stored(path)
    return known is None or "id" in (known["served"] or {})


def setting_beside(path: Path) -> Setting:
    """Return what a file of samples was made with.

    Raises:
        UserError: It is missing, or the file beside it is missing or damaged.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing: check the path")
    try:
        stored = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        return Setting(**stored["setting"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path.with_suffix('.json')} is missing or damaged, which says what {path.name} was made with: keep both "
            "files together"
        ) from error
