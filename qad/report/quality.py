"""The section on quality at size: how close files and rivals stay to their teacher."""

from collections.abc import Callable, Sequence

from qad.report.blocks import Cell, Figure, Group, Remark, Section, Table
from qad.report.frame import Axis
from qad.report.line_chart import Line, Point, line_chart
from qad.report.marks import Look, key
from qad.report.numerals import count_of, percent, short
from qad.report.quality_record import TEACHER, QualityRecord, QualityRow
from qad.report.reading import Record, of_kind
from qad.report.run_record import RunRecord, Stage, run_names
from qad.report.source import last_part

ANCHOR = "quality"
_MB = Axis("size, MB", pad=0.14)
_KL = Axis("KL to the teacher, nats per token, log scale", log=True)
_TOP = Axis("same first token as the teacher, %", high=100)
_PERPLEXITY = Axis("perplexity on held-out text, log scale", log=True)
_RULER = Look(line="dashed", mark="none", neutral=True)


def section(records: Sequence[Record]) -> Section | None:
    """Return the section, None without a record for it."""
    judged, runs = of_kind(records, QualityRecord), [run for run in of_kind(records, RunRecord) if run.stages]
    if not judged and not runs:
        return None
    leads = []
    if judged or any(run.taught for run in runs):
        leads.append(
            "How far each file is from its teacher on text that training never saw: KL divergence over the whole "
            "vocabulary (lower is closer; 0 is the teacher itself), and how often both rank the same next token first."
        )
    if any(not run.taught for run in runs):
        leads.append(
            "Of runs without a teacher: perplexity on text that training never saw, of the model as it was, of its "
            "rounding, and trained."
        )
    made = Section(ANCHOR, "Quality at size", " ".join(leads))
    for index, record in enumerate(judged):
        _judged(made, record, f"quality{index}")
    for index, same in enumerate(_comparable(runs)):
        _runs(made, same, f"held-out{index}")
    return made


def _judged(made: Section, record: QualityRecord, name: str) -> None:
    text = record.texts[-1] if record.texts else ""
    rows = [row for row in record.on(text) if row.file != TEACHER]
    teacher = next((row for row in record.on(text) if row.file == TEACHER), None)
    ours, rivals = [row for row in rows if not row.rival], [row for row in rows if row.rival]
    looks = {row.file: Look(index, line="none") for index, row in enumerate(ours)}
    looks |= {row.file: Look(index + len(ours), line="none", mark="hollow") for index, row in enumerate(rivals)}
    conditions = f"judged by llama.cpp on the files, {text}, {count_of(rows[0].tokens if rows else 0, 'token')}"
    upright = [Line("the teacher's file", [Point(teacher.megabytes, 0.0)], _RULER)] if teacher else []
    legend = tuple(key(row.file, looks[row.file]) for row in (*ours, *rivals))
    legend += tuple(key(line.name, line.look) for line in upright)
    for title, axis, lines, tell in (
        (
            "KL against size",
            _KL,
            [
                Line(r.file, [Point(r.megabytes, r.kl, r.kl - r.kl_error, r.kl + r.kl_error)], looks[r.file])
                for r in (*rivals, *ours)
            ],
            short,
        ),
        (
            "Same first token against size",
            _TOP,
            [Line(r.file, [Point(r.megabytes, 100 * r.same_top)], looks[r.file]) for r in (*rivals, *ours)],
            lambda value: f"{value:.1f} %",
        ),
    ):
        anchor = f"{name}-{'kl' if axis is _KL else 'top'}"
        drawing = line_chart(
            anchor, title, _MB, axis, lines, tell_x=lambda value: f"{value:,.1f} MB", tell_y=tell, upright=upright
        )
        if drawing is not None:
            note = "Bars: the standard error of the mean." if axis is _KL else ""
            made.figures.append(Figure(title, conditions, drawing, legend, note))
    made.tables.append(
        Table(
            f"Judged by llama.cpp against {last_part(record.teacher)} ({record.source.name})",
            ("file", "MB", "KL, nats", "± error", "perplexity", "same first token", "KL ÷ rival's"),
            [Group(text, [_judged_row(row, record) for row in record.on(text)]) for text in record.texts],
        )
    )


def rival_of(row: QualityRow, record: QualityRecord) -> QualityRow | None:
    """Return llama.cpp's own quantization of the nearest size, within a tenth; None if there is none."""
    near = [
        other
        for other in record.on(row.text)
        if other.rival and abs(other.megabytes - row.megabytes) <= 0.1 * row.megabytes
    ]
    return min(near, key=lambda other: abs(other.megabytes - row.megabytes), default=None)


def _judged_row(row: QualityRow, record: QualityRecord) -> list[str | Cell]:
    rival = None if row.rival or row.file == TEACHER else rival_of(row, record)
    ratio = f"{row.kl / rival.kl:.2f} of {rival.file.split()[-1]}" if rival and rival.kl > 0 else "–"
    return [
        row.file,
        f"{row.megabytes:,.1f}",
        short(row.kl),
        short(row.kl_error),
        f"{row.perplexity:,.3f}",
        percent(row.same_top),
        ratio,
    ]


def _comparable(runs: Sequence[RunRecord]) -> list[list[RunRecord]]:
    """Return runs by what they were judged on: one teacher, to which the text was equally hard, is one text."""
    found: dict[tuple[bool, str, float, int], list[RunRecord]] = {}
    for run in runs:
        first = run.stages[0]
        found.setdefault((run.taught, run.teacher, first.nll, first.tokens), []).append(run)
    return list(found.values())


def stage_name(run: RunRecord, index: int) -> str:
    """Return what a row of a run's result is called in a plot."""
    if index == 0:
        return run.stages[0].what
    if len(run.stages) == 2:  # qad quantize, by whichever way of rounding
        return "rounded"
    return "plain rounding" if index == 1 else "trained"


def _distance(stage: Stage) -> float:
    """Return what is compared: the KL, or the next-token loss where there was no teacher."""
    return stage.nll if stage.kl is None else stage.kl


def _runs(made: Section, runs: Sequence[RunRecord], name: str) -> None:
    names = run_names(runs)
    taught = runs[0].taught
    conditions = f"held-out text of the runs, {count_of(runs[0].stages[0].tokens, 'token')}, judged by torch"
    aim = "What training gains over rounding" if any(len(run.stages) > 2 for run in runs) else "What rounding costs"
    plots: list[tuple[str, str, Axis, Callable[[Stage], float | None], Callable[[float], str]]]
    if taught:
        plots = [
            ("kl", f"{aim}: KL", _KL, lambda stage: stage.kl, short),
            (
                "top",
                f"{aim}: same first token",
                _TOP,
                lambda stage: None if stage.same_top is None else 100 * stage.same_top,
                lambda value: f"{value:.1f} %",
            ),
        ]
    else:
        title = f"{aim}: perplexity"
        plots = [("perplexity", title, _PERPLEXITY, lambda stage: stage.perplexity, lambda value: f"{value:,.3f}")]
    for anchor, title, axis, value, tell in plots:
        lines: list[Line] = []
        for index, run in enumerate(runs):
            points = [Point(stage.bytes / 1e6, y) for stage in run.stages[1:] if (y := value(stage)) is not None]
            lines.append(Line(names[run.source.path], points, Look(index, line="dashed", mark="none")))
            for at, point in enumerate(points, start=1):
                look = Look(index, line="none", mark="filled" if at == 2 else "hollow")
                lines.append(Line(f"{names[run.source.path]}, {stage_name(run, at)}", [point], look))
        legend = tuple(key(line.name, line.look) for line in lines if line.look.mark != "none")
        drawing = line_chart(
            f"{name}-{anchor}", title, _MB, axis, lines, tell_x=lambda mb: f"{mb:,.1f} MB", tell_y=tell
        )
        if drawing is not None:
            made.figures.append(Figure(title, conditions, drawing, legend))
    heads = (
        "weights",
        "MB",
        *(("KL, nats",) if taught else ()),
        "perplexity",
        *(("same first token",) if taught else ()),
    )
    groups = []
    for run in runs:
        rows = []
        for stage in run.stages:
            figures = [f"{stage.perplexity:,.3f}"]
            if taught:
                figures = [short(stage.kl), *figures, percent(stage.same_top)]
            rows.append([stage.what, f"{stage.bytes / 1e6:,.1f}", *figures])
        whose = f"teacher {last_part(run.teacher)}" if taught else f"of {last_part(run.teacher)}, no teacher"
        groups.append(Group(f"{names[run.source.path]} ({whose})", rows))
    made.tables.append(Table(f"Figures at the end of each run, {conditions}", heads, groups))
    for run in runs:
        if len(run.stages) > 2 and _distance(run.stages[2]) > _distance(run.stages[1]):
            made.remarks.append(Remark(f"{names[run.source.path]}: training made it worse than plain rounding.", "bad"))
        elif run.best_step == 0 and run.planned > 0:
            made.remarks.append(
                Remark(f"{names[run.source.path]}: no step improved on the initialisation, which the artifact holds.")
            )
