"""The section on training: loss and held-out figures, step after step."""

import itertools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from qad.report.blocks import Figure, Group, Remark, Section, Table
from qad.report.frame import Axis
from qad.report.line_chart import Line, Point, line_chart
from qad.report.marks import Look, key
from qad.report.numerals import NONE, percent, short
from qad.report.reading import Record, of_kind
from qad.report.run_record import RunRecord, Step, run_names

ANCHOR = "training"
_STEP = Axis("optimizer step", low=0, pad=0.03)
_TOP = Axis("same first token as the teacher, %")
# Runs whose held-out figures differ by more, such as 4 and 8 bits, would be flat lines in one plot.
_APART = 5.0
# More points than that are not seen on a page; they are told as means.
POINTS = 200


@dataclass(frozen=True)
class _Measure:
    """What training is judged by.

    Attributes:
        name: Of plots in the page.
        title: What it is.
        head: Of its column.
        axis: Of its plots.
        batch, held_out: Its value at a step.
    """

    name: str
    title: str
    head: str
    axis: Axis
    batch: Callable[[Step], float | None]
    held_out: Callable[[Step], float | None]


_KL = _Measure(
    "kl",
    "KL to the teacher",
    "KL, nats",
    Axis("KL to the teacher, nats per token, log scale", log=True),
    # Runs with another loss as well have the KL beside the loss.
    lambda step: step.kl if step.kl is not None else step.loss,
    lambda step: step.eval_kl,
)
_PERPLEXITY = _Measure(
    "perplexity",
    "Perplexity",
    "perplexity",
    Axis("perplexity, log scale", log=True),
    lambda step: step.perplexity,
    lambda step: step.eval_perplexity,
)


def section(records: Sequence[Record]) -> Section | None:
    """Return the section, None without a training log."""
    runs = [run for run in of_kind(records, RunRecord) if run.trained]
    if not runs:
        return None
    taught, alone = [run for run in runs if run.taught], [run for run in runs if not run.taught]
    leads = []
    if taught:
        leads.append(
            "Distillation on the grid, step after step: KL to the teacher on the batch (thin) and on held-out text "
            "(marks)."
        )
    if alone:
        leads.append(
            "Training on the grid without a teacher, step after step: perplexity of the batch (thin) and of held-out "
            "text (marks)."
        )
    leads.append("The artifact holds the weights of the best held-out step.")
    made = Section(ANCHOR, "Training", " ".join(leads))
    looks = {run.source.path: Look(index) for index, run in enumerate(runs)}
    names = run_names(runs)
    for measure, judged in ((_KL, taught), (_PERPLEXITY, alone)):
        for index, alike in enumerate(_alike(judged, measure)):
            _figure(made, measure, alike, names, looks, f"training-{measure.name}{index}")
        if measure is _KL:
            _top_figure(made, judged, names, looks)
        _tables(made, measure, judged, names)
    for run in runs:
        reached = run.trained[-1].step
        if not run.stages:
            made.remarks.append(
                Remark(f"{names[run.source.path]} has not ended: {reached:,} of {run.planned:,} steps are done.")
            )
    return made


def _tables(made: Section, measure: _Measure, runs: Sequence[RunRecord], names: dict[str, str]) -> None:
    if not runs:
        return
    taught = measure is _KL
    heads = ("step", *(("KL, nats",) if taught else ()), "perplexity", *(("same first token",) if taught else ()))
    groups = []
    for run in runs:
        rows = []
        for step in run.held_out:
            perplexity = NONE if step.eval_perplexity is None else f"{step.eval_perplexity:,.3f}"
            figures = [short(step.eval_kl), perplexity, percent(step.eval_same_top)] if taught else [perplexity]
            rows.append([f"{step.step:,}{' (best)' if step.step == run.best_step else ''}", *figures])
        groups.append(Group(names[run.source.path], rows))
    apart = "" if taught else ", no teacher"
    made.tables.append(Table(f"Held-out text{apart}", heads, groups))
    means = f", means of {POINTS} spans of steps" if any(len(run.trained) > POINTS for run in runs) else ""
    batches = [
        Group(names[run.source.path], [[f"{point.x:,.0f}", short(point.y)] for point in _batch(run, measure)])
        for run in runs
    ]
    made.tables.append(Table(f"Batches{apart}{means}", ("step", measure.head), batches, folded=True))


def _alike(runs: Sequence[RunRecord], measure: _Measure) -> list[list[RunRecord]]:
    """Return runs that can share a scale, in their order."""

    def level(run: RunRecord) -> float:
        figures = [measure.held_out(step) for step in run.held_out] or [measure.batch(step) for step in run.trained]
        return min((figure for figure in figures if figure is not None and figure > 0), default=0.0)

    panels: list[list[RunRecord]] = []
    for run in sorted(runs, key=level):
        if panels and level(run) <= _APART * level(panels[-1][0]):
            panels[-1].append(run)
        else:
            panels.append([run])
    order = {run.source.path: index for index, run in enumerate(runs)}
    panels = [sorted(panel, key=lambda run: order[run.source.path]) for panel in panels]
    return sorted(panels, key=lambda panel: order[panel[0].source.path])


def _tell_step(value: float) -> str:
    return f"step {value:.0f}"


def _figure(
    made: Section,
    measure: _Measure,
    runs: Sequence[RunRecord],
    names: dict[str, str],
    looks: dict[str, Look],
    anchor: str,
) -> None:
    lines = [
        Line(f"{names[run.source.path]}, batch", _batch(run, measure), _thin(looks[run.source.path])) for run in runs
    ]
    lines += [
        Line(
            f"{names[run.source.path]}, held out",
            [Point(step.step, figure) for step in run.held_out if (figure := measure.held_out(step)) is not None],
            looks[run.source.path],
        )
        for run in runs
    ]
    title = measure.title
    if len(runs) < len(names):
        title += f": {', '.join(names[run.source.path] for run in runs)}"
    drawing = line_chart(anchor, f"{title} against steps", _STEP, measure.axis, lines, tell_x=_tell_step)
    if drawing is not None:
        legend = tuple(key(line.name, line.look) for line in lines)
        made.figures.append(Figure(title, "batches and held-out text", drawing, legend))


def _top_figure(made: Section, runs: Sequence[RunRecord], names: dict[str, str], looks: dict[str, Look]) -> None:
    lines = [
        Line(
            names[run.source.path],
            [Point(step.step, 100 * step.eval_same_top) for step in run.held_out if step.eval_same_top is not None],
            looks[run.source.path],
        )
        for run in runs
    ]
    title = "Same first token as the teacher"
    drawing = line_chart(
        "training-top", title, _STEP, _TOP, lines, tell_x=_tell_step, tell_y=lambda value: f"{value:.1f} %"
    )
    if drawing is not None:
        legend = tuple(key(line.name, line.look) for line in lines)
        made.figures.append(Figure(title, "held-out text", drawing, legend))


def _thin(look: Look) -> Look:
    return Look(look.index, mark="none", faint=True)


def _batch(run: RunRecord, measure: _Measure) -> list[Point]:
    """Return figures of batches over steps, in at most ``POINTS`` means."""
    points = [Point(step.step, figure) for step in run.trained if (figure := measure.batch(step)) is not None]
    if len(points) <= POINTS:
        return points
    edges = [round(index * len(points) / POINTS) for index in range(POINTS + 1)]
    spans = [points[low:high] for low, high in itertools.pairwise(edges)]
    return [Point(span[-1].x, statistics.fmean(point.y for point in span)) for span in spans]
