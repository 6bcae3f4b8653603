"""The figures to remember, at the top of the page: each with its subject and what to hold it against."""

from collections.abc import Sequence

from qad.report import evaluation, proof, quality, speed
from qad.report.bench_record import BenchRecord, BenchRow
from qad.report.blocks import Tile
from qad.report.eval_record import EvalRecord
from qad.report.numerals import count_of, megabytes, percent, short
from qad.report.quality import rival_of
from qad.report.quality_record import TEACHER, QualityRecord, QualityRow
from qad.report.reading import Record, of_kind
from qad.report.run_record import RunRecord, run_names
from qad.report.source import Machine
from qad.report.verify_record import VerifyRecord

_MOST = 3  # lines below a figure


def tiles(records: Sequence[Record]) -> list[Tile]:
    """Return the headlines that the records have."""
    judged = _judged(of_kind(records, QualityRecord)) or _ended(of_kind(records, RunRecord))
    found = [*judged, *_proved(of_kind(records, VerifyRecord)), *_fast(of_kind(records, BenchRecord))]
    return found + _right(of_kind(records, EvalRecord))


def _judged(records: Sequence[QualityRecord]) -> list[Tile]:
    """Return size and closeness of the smallest file that was judged beside a rival, or of the smallest."""
    pairs: list[tuple[QualityRow, QualityRow | None, QualityRow | None]] = []
    for record in records:
        for row in record.on(record.texts[-1]) if record.texts else []:
            if not row.rival and row.file != TEACHER:
                teacher = next((one for one in record.on(row.text) if one.file == TEACHER), None)
                pairs.append((row, rival_of(row, record), teacher))
    if not pairs:
        return []
    row, rival, teacher = min(pairs, key=lambda pair: (pair[1] is None, pair[0].megabytes))
    lines = [(rival.file, short(rival.kl))] if rival else []
    closer = rival is not None and 0 < row.kl < rival.kl
    others = [(one.file, one) for one, _, _ in pairs if one is not row][: _MOST - 1]
    size_lines = [("teacher's file", f"{teacher.megabytes:,.1f} MB")] if teacher else []
    return [
        Tile(
            "Size",
            f"{row.megabytes:,.1f}",
            "MB",
            row.file,
            quality.ANCHOR,
            [*size_lines, *((name, f"{one.megabytes:,.1f} MB") for name, one in others)],
        ),
        Tile(
            "KL to the teacher",
            short(row.kl),
            "nats",
            f"{row.file}, {row.text}"
            + (f": {rival.kl / row.kl:.1f} times closer than {rival.file.split()[-1]}" if rival and closer else ""),
            quality.ANCHOR,
            [*lines, *((name, short(one.kl)) for name, one in others)],
        ),
        Tile(
            "Same next token",
            f"{row.same_top:.1%}".rstrip("%"),
            "%",
            f"as the teacher: {row.file}",
            quality.ANCHOR,
            [
                *([(rival.file, percent(rival.same_top))] if rival else []),
                *((name, percent(one.same_top)) for name, one in others),
            ],
        ),
    ]


def _ended(runs: Sequence[RunRecord]) -> list[Tile]:
    """Return size and closeness of the smallest run that has ended, of those with a teacher if there are any."""
    ended = sorted((run for run in runs if run.stages), key=lambda run: run.stages[-1].bytes)
    ended = [run for run in ended if run.taught] or ended
    if not ended:
        return []
    names = run_names(ended)
    first, others = ended[0], ended[1:_MOST]
    teacher, last = first.stages[0], first.stages[-1]
    name = names[first.source.path]
    rounded = [("plain rounding", first.stages[1])] if len(first.stages) > 2 else []
    beside = [(names[run.source.path], run.stages[-1]) for run in others]
    whole = "teacher" if first.taught else "before"
    size = Tile(
        "Size",
        f"{last.bytes / 1e6:,.1f}",
        "MB",
        name,
        quality.ANCHOR,
        [
            (f"{whole} at 16 bits", f"{teacher.bytes / 1e6:,.1f} MB"),
            *((other, f"{stage.bytes / 1e6:,.1f} MB") for other, stage in beside),
        ],
    )
    if not first.taught:
        told = [(what, f"{stage.perplexity:,.3f}") for what, stage in (("before", teacher), *rounded, *beside)]
        return [size, Tile("Perplexity", f"{last.perplexity:,.3f}", "", f"{name}, held-out text", quality.ANCHOR, told)]
    return [
        size,
        Tile(
            "KL to the teacher",
            short(last.kl),
            "nats",
            f"{name}, held-out text",
            quality.ANCHOR,
            [(what, short(stage.kl)) for what, stage in (*rounded, *beside)],
        ),
        Tile(
            "Same next token",
            percent(last.same_top).removesuffix(" %"),
            "%",
            f"as the teacher: {name}",
            quality.ANCHOR,
            [(what, percent(stage.same_top)) for what, stage in (*rounded, *beside)],
        ),
    ]


def _proved(records: Sequence[VerifyRecord]) -> list[Tile]:
    files = [file for record in records for file in record.files]
    if not files:
        return []
    good = sum(file.ok for file in files)
    exact, quantized = sum(file.exact or 0 for file in files), sum(file.quantized or 0 for file in files)
    return [
        Tile(
            "Tensors bit-exact",
            f"{exact:,}",
            f"of {quantized:,}",
            f"{good} of {count_of(len(files), 'file')} verified",
            proof.ANCHOR,
            [(file.name, file.verdict) for file in files[:_MOST]],
            "good" if good == len(files) else "bad",
        )
    ]


def _fast(records: Sequence[BenchRecord]) -> list[Tile]:
    """Return for each machine the fastest K of all, beside one trajectory of the same file."""
    rows: dict[Machine, list[BenchRow]] = {}
    for record in records:
        rows.setdefault(record.machine, []).extend(row for row in record.rows if row.reason is None)
    found = []
    for machine, measured in rows.items():
        told = [row for row in measured if row.rate is not None]
        if not told:
            continue
        best = max(told, key=lambda row: row.rate or 0.0)
        alike = [
            row
            for row in told
            if (row.file, row.runtime, row.prompt_tokens, row.new_tokens, row.threads)
            == (best.file, best.runtime, best.prompt_tokens, best.new_tokens, best.threads)
        ]
        lines = [("one at a time", short(row.rate)) for row in alike if row.k == 1 < best.k]
        lines += [("of the roofline", percent(best.share))] if best.share is not None else []
        lines += [("peak memory", f"{megabytes(best.peak)} MB")] if best.peak is not None else []
        where = f", {machine.processor}" if len(rows) > 1 else ""
        found.append(
            Tile(
                f"Speed, {best.k} answers at once" if best.k > 1 else "Speed, one answer",
                short(best.rate),
                "tokens/s",
                f"{best.label}{where}, {best.threads_told}",
                speed.ANCHOR,
                lines,
                "bad" if any(row.outside for row in told) else "",
            )
        )
    return found


def _right(records: Sequence[EvalRecord]) -> list[Tile]:
    """Return the highest vote of a model, of those held against another if there are any, beside that other's."""
    rows = [row for record in records for row in record.rows if evaluation.VOTE in row.metrics]
    against = {one.first_model: one.second_model for record in records for one in record.differences}
    rows = [row for row in rows if row.model in against] or rows
    if not rows:
        return []
    best = max(rows, key=lambda row: row.metrics[evaluation.VOTE].value)
    lines = [(name, percent(best.metrics[name].value)) for name in ("M@K", "P@K") if name in best.metrics]
    other = against.get(best.model)
    lines += [
        (f"{other}, vote", percent(row.metrics[evaluation.VOTE].value))
        for record in records
        for row in record.rows
        if best in record.rows and (row.model, row.task) == (other, best.task) and evaluation.VOTE in row.metrics
    ]
    return [
        Tile(
            f"Right by vote of {best.k}",
            f"{best.metrics[evaluation.VOTE].value:.1%}".rstrip("%"),
            "%",
            f"{best.model} on {best.title}, {count_of(best.items, 'item')}",
            evaluation.ANCHOR,
            lines[:_MOST],
        )
    ]
