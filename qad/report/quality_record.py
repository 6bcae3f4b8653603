"""What ``bench/quality.py --json`` wrote: how close files stay to their teacher."""

from dataclasses import dataclass
from typing import Any

from qad.report.fields import Fields
from qad.report.source import Provenance, Source, maybe_provenance

KIND = "quality at size (bench/quality.py)"
REMEDY = "make it again with bench/quality.py --json"
TEACHER = "teacher"
_RIVAL = "llama.cpp "


@dataclass(frozen=True)
class QualityRow:
    """One file on one text.

    Attributes:
        text, file: Which.
        megabytes: 10^6 bytes.
        tokens: Judged.
        kl, kl_error: Mean KL(teacher || file) in nats a token, and its standard error.
        perplexity: On the text.
        same_top: Share of tokens where both rank the same one first.
    """

    text: str
    file: str
    megabytes: float
    tokens: int
    kl: float
    kl_error: float
    perplexity: float
    same_top: float

    @property
    def rival(self) -> bool:
        """Whether llama.cpp quantized it on the spot."""
        return self.file.startswith(_RIVAL)


@dataclass(frozen=True)
class QualityRecord:
    """A run of bench/quality.py.

    Attributes:
        source: The JSON file.
        made: By what, when and where; None in older files.
        teacher: Its file.
        skip: Context-only tokens of a chunk.
        rows: One per file and text.
    """

    source: Source
    made: Provenance | None
    teacher: str
    skip: int
    rows: tuple[QualityRow, ...]

    @property
    def texts(self) -> list[str]:
        """Names of the texts; the sum of several is the last."""
        return list(dict.fromkeys(row.text for row in self.rows))

    def on(self, text: str) -> list[QualityRow]:
        """Return the rows of a text, the teacher's own among them."""
        return [row for row in self.rows if row.text == text]


def recognizes(values: Any) -> bool:
    """Return whether this is one, damaged or not."""
    return isinstance(values, dict) and {"teacher", "skip", "rows"} <= values.keys()


def read(values: Any, source: Source) -> QualityRecord:
    """Return the record.

    Raises:
        UserError: It is damaged.
    """
    fields = Fields(values, source.path, "", REMEDY)
    rows = [
        QualityRow(
            one.text("text"),
            one.text("file"),
            one.number("megabytes"),
            one.whole("tokens"),
            one.number("kl"),
            one.number("kl_error"),
            one.number("perplexity"),
            one.number("same_top"),
        )
        for one in fields.children("rows")
    ]
    return QualityRecord(source, maybe_provenance(fields), fields.text("teacher"), fields.whole("skip"), tuple(rows))
