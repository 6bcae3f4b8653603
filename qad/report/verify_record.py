"""What ``qad verify --json`` wrote."""

from dataclasses import dataclass
from typing import Any

from qad.report.fields import Fields
from qad.report.source import Provenance, Source, last_part, maybe_provenance

KIND = "proof (qad verify)"
REMEDY = "make it again with `qad verify --json`"
_MISMATCHES = 5


@dataclass(frozen=True)
class Proved:
    """A file that was compared with its run.

    Attributes:
        file: Its path.
        ok, verdict: What came of it.
        trouble: Why it could not be read or run, if so.
        quantized, exact, kept, kept_exact: Tensors, and those of them that are equal bit for bit; None if unreadable.
        half: Tensors that the format holds as fp16 only.
        mismatches: What is wrong with which tensor.
        kl, same_top, tokens: Of the runtime on the file against torch on the artifact; None if it was not run.
        greedy_same, greedy_tokens: Tokens that both answers share from the beginning; the longer answer's.
    """

    file: str
    ok: bool
    verdict: str
    trouble: str | None
    quantized: int | None
    exact: int | None
    kept: int | None
    kept_exact: int | None
    half: int | None
    mismatches: tuple[str, ...]
    kl: float | None
    same_top: float | None
    tokens: int | None
    greedy_same: int | None
    greedy_tokens: int | None

    @property
    def name(self) -> str:
        """The last part of the path."""
        return last_part(self.file)


@dataclass(frozen=True)
class VerifyRecord:
    """A run of ``qad verify``.

    Attributes:
        source: The JSON file.
        version: Of qad.
        made: By what, when and where; None in older files.
        run, run_hash: The run folder.
        ok: Whether everything holds.
        files: That were compared.
    """

    source: Source
    version: str
    made: Provenance | None
    run: str
    run_hash: str
    ok: bool
    files: tuple[Proved, ...]


def recognizes(values: Any) -> bool:
    """Return whether this is one, damaged or not."""
    return isinstance(values, dict) and {"qad_version", "run_hash", "files"} <= values.keys()


def read(values: Any, source: Source) -> VerifyRecord:
    """Return the record.

    Raises:
        UserError: It is damaged.
    """
    fields = Fields(values, source.path, "", REMEDY)
    return VerifyRecord(
        source,
        fields.text("qad_version"),
        maybe_provenance(fields),
        fields.text("run"),
        fields.text("run_hash"),
        fields.flag("ok"),
        tuple(_file(one) for one in fields.children("files")),
    )


def _file(fields: Fields) -> Proved:
    proof = fields.child("proof") if fields.has("proof") else None
    agreement = fields.child("agreement") if fields.has("agreement") else None
    mismatches = [f"{one.text('name')}: {one.text('reason')}" for one in proof.children("mismatches")] if proof else []
    if len(mismatches) > _MISMATCHES:
        mismatches = [*mismatches[:_MISMATCHES], f"and {len(mismatches) - _MISMATCHES} more"]
    return Proved(
        file=fields.text("file"),
        ok=fields.flag("ok"),
        verdict=fields.text("verdict"),
        trouble=fields.maybe_text("error") or fields.maybe_text("not_run"),
        quantized=proof.whole("quantized") if proof else None,
        exact=proof.whole("exact") if proof else None,
        kept=proof.whole("kept") if proof else None,
        kept_exact=proof.whole("kept_exact") if proof else None,
        half=len(proof.child("half").names()) if proof else None,
        mismatches=tuple(mismatches),
        kl=agreement.number("kl") if agreement else None,
        same_top=agreement.number("same_top") if agreement else None,
        tokens=agreement.whole("tokens") if agreement else None,
        greedy_same=agreement.whole("greedy_same") if agreement else None,
        greedy_tokens=agreement.whole("greedy_tokens") if agreement else None,
    )
