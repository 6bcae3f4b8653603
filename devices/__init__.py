"""Boards: one TOML file each, with the facts that plans and runtimes need. This folder's listing is the registry.

    title = "what people call it"
    [sources.KEY]     title, url, date of what was read
    [facts]           NAME = { value = ..., source = "KEY", verified = false, note = "..." }

``verified = false`` marks a fact that the cited source was not seen to state: a vendor's page quoted from memory, a
value derived from another, an estimate. It is shown as such wherever the fact is. ``host`` is the machine this runs on:
it is measured, not listed.
"""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from qad.errors import UserError, unknown_name

HOST = "host"
GIB = 2**30

# Name of a fact -> the type of its value. Rates are dense: what a vendor states for sparse matrices is halved.
REQUIRED: dict[str, type] = {
    "memory_gib": float,
    "memory_kind": str,  # unified: one memory for CPU and GPU; gpu: the graphics card's own; system: no GPU is used
    "usable_share": float,  # of the memory, after the operating system and what runs beside it
    "bandwidth_gb_s": float,  # theoretical peak, reads
    "cores": int,
    "instruction_sets": list,
    "runtimes": list,
}
OPTIONAL: dict[str, type] = {
    "sustained_gb_s": float,  # measured by somebody
    "power_w": list,  # lowest and highest setting, or measured under load
    "gpu": str,
    "compute_capability": str,
    "gpu_int8_tops": float,
    "gpu_fp16_tflops": float,
    "cpu_int8_tops": float,
    "cpu_fp16_tflops": float,
}
_MEMORY_KINDS = ("unified", "gpu", "system")


@dataclass(frozen=True)
class Fact:
    """One fact about a board and where it comes from.

    Attributes:
        value: The value, in the unit that the fact's name ends in.
        source: Title of the source.
        url: Address of the source, empty where there is none.
        date: Date of the source, as far as it tells one.
        verified: Whether the source was seen to state it.
        note: What must be known to read it.
    """

    value: Any
    source: str
    url: str
    date: str
    verified: bool = True
    note: str = ""


@dataclass(frozen=True)
class Engine:
    """A processor that can run a model.

    Attributes:
        name: ``cpu`` or ``gpu``.
        int8_ops: Operations a second of dense int8 matrix products, a multiplication and an addition counted as two.
        fp16_ops: The same in fp16 or bf16.
    """

    name: Literal["cpu", "gpu"]
    int8_ops: float
    fp16_ops: float


@dataclass(frozen=True)
class Device:
    """A board's facts, in bytes, bytes a second and operations a second.

    Attributes:
        name: On the command line.
        title: What people call it.
        memory_bytes: Installed, where the model lies.
        memory_kind: ``unified``, ``gpu`` or ``system``.
        usable_share: Of it, what is left for a model.
        bandwidth: Peak of reads, in bytes a second.
        sustained: Reads as somebody measured them, if anybody did.
        cores: Physical ones.
        instruction_sets: Of the CPU, those that matter to kernels.
        runtimes: That fit it.
        engines: The fastest first.
        power_w: Lowest and highest, None if unknown.
        gpu: What it is, empty if there is none that a runtime uses.
        compute_capability: Of an NVIDIA GPU, else empty.
        facts: Every fact with its source.
        read_curves: Threads -> (bytes read again and again, bytes a second), rising bytes and falling rates: caches are
            faster than memory. Of ``host`` only.
    """

    name: str
    title: str
    memory_bytes: int
    memory_kind: str
    usable_share: float
    bandwidth: float
    sustained: float | None
    cores: int
    instruction_sets: tuple[str, ...]
    runtimes: tuple[str, ...]
    engines: tuple[Engine, ...]
    power_w: tuple[float, float] | None
    gpu: str
    compute_capability: str
    facts: Mapping[str, Fact] = field(repr=False)
    read_curves: Mapping[int, tuple[tuple[int, float], ...]] = field(default_factory=dict, repr=False)

    @property
    def usable_bytes(self) -> int:
        """Memory that a model may fill."""
        return int(self.memory_bytes * self.usable_share)

    @property
    def unverified(self) -> list[str]:
        """Names of the facts that no source was seen to state."""
        return [name for name, fact in self.facts.items() if not fact.verified]

    def engine(self, name: str | None = None) -> Engine:
        """Return an engine by name; the fastest if None.

        Raises:
            UserError: The board has none of that name, or its rates are not known.
        """
        for engine in self.engines:
            if name in (None, engine.name):
                return engine
        raise unknown_name(f"engine of {self.name}", str(name), [engine.name for engine in self.engines])

    def read_rate(self, size: int = 0, threads: int | None = None) -> float:
        """Return how many bytes a second can be read at most.

        Args:
            size: Bytes that are read again and again: on ``host``, what fits the caches is read faster than memory.
            threads: CPU threads that read; None: all. Only ``host`` knows what one of several cores reaches.
        """
        if not self.read_curves:
            return self.bandwidth
        curve = self.read_curves[1 if threads == 1 else max(self.read_curves)]
        fitting = [rate for points, rate in curve if points <= size]
        return fitting[-1] if fitting else curve[0][1]


def names() -> list[str]:
    """Return the names of the boards there are files for; ``host`` is another that ``load`` knows."""
    return sorted(file.stem for file in Path(__file__).parent.glob("*.toml"))


def load(name: str) -> Device:
    """Return a board, or the machine this runs on for ``host``, measured unless that was done before.

    Raises:
        UserError: No such board; the message lists those there are.
    """
    if name == HOST:
        from qad.host import host

        return host()
    if name not in names():
        raise unknown_name("board", name, [*names(), HOST])
    return read(Path(__file__).parent / f"{name}.toml")


def read(file: Path) -> Device:
    """Return the board that a file describes.

    Raises:
        UserError: The file is missing or not TOML, a fact is missing, unknown, of the wrong type, or has no source.
    """
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read as a board ({error}); the others in its folder show how") from error
    return make(file.stem, str(content.get("title", file.stem)), _facts(file, content))


def _facts(file: Path, content: Mapping[str, Any]) -> dict[str, Fact]:
    sources = content.get("sources", {})
    entries = content.get("facts", {})
    known = REQUIRED | OPTIONAL
    if missing := sorted(REQUIRED.keys() - entries.keys()):
        raise UserError(f"{file} lacks the facts {', '.join(missing)}: add them under [facts]")
    if unknown := sorted(entries.keys() - known.keys()):
        raise UserError(f"{file} has unknown facts {', '.join(unknown)}; known: {', '.join(sorted(known))}")
    facts: dict[str, Fact] = {}
    for name, entry in entries.items():
        entry = entry if isinstance(entry, dict) else {"value": entry}
        value = entry.get("value")
        accepted = (int, float) if known[name] is float else known[name]
        if not isinstance(value, accepted) or isinstance(value, bool):
            raise UserError(f"{file}: {name} must be {known[name].__name__}, not {value!r}")
        source = sources.get(entry.get("source"))
        if not isinstance(source, dict) or not {"title", "url", "date"} <= source.keys():
            raise UserError(f"{file}: {name} names no source: add one under [sources], with title, url and date")
        facts[name] = Fact(
            value,
            str(source["title"]),
            str(source["url"]),
            str(source["date"]),
            bool(entry.get("verified", True)),
            str(entry.get("note", "")),
        )
    if facts["memory_kind"].value not in _MEMORY_KINDS:
        raise UserError(f"{file}: memory_kind must be one of {', '.join(_MEMORY_KINDS)}")
    if not any(name.endswith(("_tops", "_tflops")) for name in facts):
        raise UserError(f"{file} states no compute rate: add one of the CPU or the GPU")
    return facts


def make(
    name: str,
    title: str,
    facts: Mapping[str, Fact],
    read_curves: Mapping[int, tuple[tuple[int, float], ...]] | None = None,
) -> Device:
    """Return a board made of facts that were checked; see ``REQUIRED`` and ``OPTIONAL``."""

    def value(fact: str, default: Any = None) -> Any:
        return facts[fact].value if fact in facts else default

    kinds: tuple[Literal["gpu", "cpu"], ...] = ("gpu", "cpu")
    engines: list[Engine] = []
    for kind in kinds:
        int8, fp16 = value(f"{kind}_int8_tops", 0), value(f"{kind}_fp16_tflops", 0)
        if int8 or fp16:
            # Where one is unknown the other stands in: integer units are nowhere slower than those of halves.
            engines.append(Engine(kind, max(int8, fp16) * 1e12, (fp16 or int8) * 1e12))
    sustained, power = value("sustained_gb_s"), value("power_w")
    return Device(
        name=name,
        title=title,
        memory_bytes=int(value("memory_gib") * GIB),
        memory_kind=value("memory_kind"),
        usable_share=value("usable_share"),
        bandwidth=value("bandwidth_gb_s") * 1e9,
        sustained=None if sustained is None else sustained * 1e9,
        cores=value("cores"),
        instruction_sets=tuple(value("instruction_sets")),
        runtimes=tuple(value("runtimes")),
        engines=tuple(engines),
        power_w=None if power is None else (power[0], power[1]),
        gpu=value("gpu", ""),
        compute_capability=value("compute_capability", ""),
        facts=dict(facts),
        read_curves=dict(read_curves or {}),
    )
