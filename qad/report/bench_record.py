"""What ``qad bench --json`` wrote."""

import math
from dataclasses import dataclass
from typing import Any

from qad.report.fields import Fields
from qad.report.numerals import count_of
from qad.report.source import Machine, Provenance, Source, last_part, read_provenance

KIND = "speed and memory (qad bench)"
REMEDY = "make it again with `qad bench --json`"
FORMAT = 1


@dataclass(frozen=True)
class BenchRow:
    """One file in one runtime with K trajectories; figures are None if ``reason`` says why there are none.

    Attributes:
        file, runtime, k, prompt_tokens, new_tokens, threads: Which; threads of a server are not known.
        reason: Why it was not measured.
        prefill, first, rate, each, all_done: Tokens a second of the prompt; seconds to the first token; tokens a second
            of all and of one; seconds until all are done.
        bound: Of ``rate``, by the roofline.
        shares: Of the bounds of all figures that were reached, by the names in the file.
        low, high: Of ``rate`` over the repeats.
        peak, kv, expected: Bytes: of the process, of the cache, and what the formula says.
        joules: A token.
    """

    file: str
    runtime: str
    k: int
    prompt_tokens: int
    new_tokens: int
    threads: int | None
    reason: str | None
    prefill: float | None
    first: float | None
    rate: float | None
    each: float | None
    all_done: float | None
    bound: float | None
    shares: dict[str, float]
    low: float | None
    high: float | None
    peak: float | None
    kv: float | None
    expected: float | None
    joules: float | None

    @property
    def share(self) -> float | None:
        """Of the bound of ``rate``."""
        return self.shares.get("aggregate_tokens_per_s")

    @property
    def served(self) -> bool:
        """Whether a server was measured, which is seen from outside."""
        return self.threads is None

    @property
    def outside(self) -> list[str]:
        """Names of the figures whose share of the bound is not between 0 and 1."""
        return [name for name, share in self.shares.items() if not 0 <= share <= 1]

    @property
    def label(self) -> str:
        """File and runtime."""
        name = self.file.partition("://")[2] or last_part(self.file)
        return " · ".join(filter(None, (name, self.runtime)))

    @property
    def threads_told(self) -> str:
        """The threads, or that a server had its own."""
        return "server" if self.threads is None else count_of(self.threads, "thread")


@dataclass(frozen=True)
class MeasuredFile:
    """A file that was measured: its path, hash, bytes."""

    file: str
    sha256: str
    bytes: float


@dataclass(frozen=True)
class BenchRecord:
    """A run of ``qad bench``.

    Attributes:
        source: The JSON file.
        made: By what, when and where.
        board: Whose bound it is.
        kv_type, gpu, repeats: Options.
        files: That were measured.
        rows: One per file, runtime, prompt and K.
        doubles: (file, runtime, tokens of the prompt) -> the K at which a step takes twice as long as for one.
    """

    source: Source
    made: Provenance
    board: str
    kv_type: str
    gpu: bool
    repeats: int
    files: tuple[MeasuredFile, ...]
    rows: tuple[BenchRow, ...]
    doubles: dict[tuple[str, str, int], float | None]

    @property
    def machine(self) -> Machine:
        """That measured."""
        return self.made.machine


def recognizes(values: Any) -> bool:
    """Return whether this is one, damaged or not."""
    return isinstance(values, dict) and {"rows", "device", "options"} <= values.keys()


def read(values: Any, source: Source) -> BenchRecord:
    """Return the record.

    Raises:
        UserError: It is damaged.
    """
    fields = Fields(values, source.path, "", REMEDY)
    options = fields.child("options")
    return BenchRecord(
        source,
        read_provenance(fields),
        fields.child("device").text("title"),
        options.text("kv_type"),
        options.flag("gpu"),
        options.count("repeats"),
        tuple(
            MeasuredFile(one.text("file"), one.text("sha256"), one.amount("bytes")) for one in fields.children("files")
        ),
        tuple(_row(one) for one in fields.children("rows")),
        {
            (one.text("file"), one.text("runtime"), one.count("prompt_tokens")): one.maybe_positive("step_doubles_at_k")
            for one in fields.children("batching")
        },
    )


def _row(fields: Fields) -> BenchRow:
    measured = not fields.has("reason")
    low, high = fields.child("spread").range("aggregate_tokens_per_s") if measured else (None, None)
    read_figure = fields.positive if measured else fields.maybe_positive
    if measured:
        _check_together(fields)
    return BenchRow(
        file=fields.text("file"),
        runtime=fields.text("runtime"),
        k=fields.count("k"),
        prompt_tokens=fields.count("prompt_tokens"),
        new_tokens=fields.count("new_tokens"),
        threads=fields.count("threads") if fields.has("threads") else None,
        reason=fields.maybe_text("reason"),
        prefill=fields.maybe_positive("prefill_tokens_per_s"),
        first=read_figure("first_token_s"),
        rate=read_figure("aggregate_tokens_per_s"),
        each=read_figure("per_trajectory_tokens_per_s"),
        all_done=read_figure("all_done_s"),
        bound=fields.maybe_positive("bound_tokens_per_s"),
        shares=fields.child("share_of_bound").numbers() if fields.has("share_of_bound") else {},
        low=low,
        high=high,
        peak=fields.maybe_positive("peak_bytes"),
        kv=fields.maybe_amount("kv_bytes"),
        expected=fields.maybe_positive("expected_bytes"),
        joules=fields.maybe_amount("joules_per_token"),
    )


def _check_together(fields: Fields) -> None:
    """Check figures of a measured row against each other.

    Raises:
        UserError: Together they are impossible.
    """
    k, rate, done = fields.count("k"), fields.positive("aggregate_tokens_per_s"), fields.positive("all_done_s")
    low, high = fields.child("spread").range("aggregate_tokens_per_s")
    fields.require(low <= rate <= high, "aggregate_tokens_per_s", f"a median that is not in {low:g} to {high:g}")
    fields.require(
        math.isclose(fields.positive("per_trajectory_tokens_per_s") * k, rate, rel_tol=1e-6),
        "per_trajectory_tokens_per_s",
        f"which times K = {k} is not the rate of all, {rate:g}",
    )
    fields.require(fields.positive("first_token_s") <= done, "first_token_s", f"later than all were done, {done:g}")
