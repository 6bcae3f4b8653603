"""Where a record comes from, and the machine that measured it."""

from dataclasses import dataclass

from qad.report.fields import Fields
from qad.report.numerals import gibibytes


@dataclass(frozen=True)
class Source:
    """A file that was given.

    Attributes:
        path: As given.
        kind: What it is, in words.
        sha256: Of its bytes; of the recipe's for a run folder.
    """

    path: str
    kind: str
    sha256: str

    @property
    def name(self) -> str:
        """The last part of the path."""
        return last_part(self.path)


@dataclass(frozen=True)
class Machine:
    """What measured. Two are the same if all of this is.

    Attributes:
        node: Its name in the network.
        system, processor: Their names.
        cores: That the process could use.
        memory: Bytes.
        instruction_sets: Of the processor, as far as qad has kernels for them.
    """

    node: str
    system: str
    processor: str
    cores: int
    memory: float
    instruction_sets: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """What a figure is headed with."""
        cores = f"{self.cores} core{'s'[: self.cores != 1]}"
        return f"{self.processor}, {cores}, {gibibytes(self.memory)} ({self.node})"


def _machine(fields: Fields) -> Machine:
    """Return the machine that ``qad.host.describe`` wrote."""
    return Machine(
        fields.text("node"),
        fields.text("system"),
        fields.text("processor"),
        fields.count("cores"),
        fields.positive("memory"),
        tuple(map(str, fields.items("instruction_sets"))),
    )


@dataclass(frozen=True)
class Provenance:
    """What a record says of itself: what was typed, when, on which machine, with which versions."""

    command: str
    when: str
    machine: Machine
    versions: dict[str, str]


def read_provenance(fields: Fields) -> Provenance:
    """Return what ``qad.provenance`` wrote."""
    return Provenance(
        fields.text("command"),
        fields.text("when"),
        _machine(fields.child("machine")),
        fields.child("versions").texts(),
    )


def maybe_provenance(fields: Fields) -> Provenance | None:
    """Return what ``qad.provenance`` wrote, None in a file that was made before it did."""
    return read_provenance(fields) if fields.has("machine") else None


def last_part(path: str) -> str:
    """Return the name of a file or folder."""
    return path.rstrip("/\\").replace("\\", "/").rpartition("/")[2] or path
