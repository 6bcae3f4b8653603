"""The section on speed: tokens a second of K trajectories, beside the roofline of the board."""

from collections.abc import Callable, Sequence

from qad.report import series
from qad.report.bench_record import BenchRecord, BenchRow
from qad.report.blocks import Cell, Figure, Group, Remark, Section, Table
from qad.report.frame import Axis
from qad.report.line_chart import Line, Point, line_chart
from qad.report.marks import Look, key
from qad.report.numerals import NONE, count_of, percent, short
from qad.report.reading import Record, of_kind
from qad.report.series import Series, k_axis

ANCHOR = "speed"
_RATE = Axis("tokens/s of all K, log scale", log=True)
_SECONDS = Axis("seconds until all K are done", low=0)
_FIGURES = {
    "prefill_tokens_per_s": "prompt tokens/s",
    "first_token_s": "first token",
    "aggregate_tokens_per_s": "tokens/s",
    "all_done_s": "all done",
}
_BOUND = key("bound of the board (roofline)", Look(line="dashed", mark="none", neutral=True))


def section(records: Sequence[Record]) -> Section | None:
    """Return the section, None without a record for it."""
    groups = series.groups(of_kind(records, BenchRecord))
    if not groups:
        return None
    rows = [row for group in groups for one in group.measured for row in one.measured]
    lead = (
        "Tokens a second of K trajectories that share one prompt, sampling included; each figure is the median of its "
    )
    lead += "repeats."
    if any(row.bound is not None for row in rows):
        lead += " Dashed: the most that the board's memory bandwidth and arithmetic allow (roofline)."
    made = Section(ANCHOR, "Speed", lead)
    for index, group in enumerate(groups):
        for number, (apart, panel) in enumerate(group.panels()):
            _against_k(made, group, panel, apart, f"{index}-{number}")
        _against_prompt(made, group, index)
        _table(made, group)
    _check_shares(made, rows)
    _not_measured(made, groups)
    return made


def _tell_k(value: float) -> str:
    return f"K = {value:.0f}"


def _against_k(made: Section, group: series.Group, panel: Sequence[Series], apart: str, name: str) -> None:
    looks = {one.name: Look(index) for index, one in enumerate(panel)}
    legend = tuple(key(one.name, looks[one.name]) for one in panel)
    conditions = "; ".join(filter(None, (group.title, apart or series.prompts_of(group))))
    x = k_axis(panel)
    bounds = [
        Line(f"{one.name}, bound", _points(one, lambda row: row.bound), Look(looks[one.name].index, "dashed", "none"))
        for one in panel
    ]
    rates = [Line(one.name, _points(one, lambda row: row.rate, spread=True), looks[one.name]) for one in panel]
    title = "Tokens a second against K"
    drawing = line_chart(f"rate{name}", title, x, _RATE, [*bounds, *rates], tell_x=_tell_k)
    if drawing is not None:
        bounded = any(line.points for line in bounds)
        note = "Bars: least and most of the repeats." + f" Bound of {group.board}." * bounded
        made.figures.append(Figure(title, conditions, drawing, (*legend, *([_BOUND] * bounded)), note))
    title = "Time until all K answers are there"
    done = [Line(one.name, _points(one, lambda row: row.all_done), looks[one.name]) for one in panel]
    drawing = line_chart(f"done{name}", title, x, _SECONDS, done, tell_x=_tell_k)
    if drawing is not None:
        made.figures.append(Figure(title, conditions, drawing, legend))


def _against_prompt(made: Section, group: series.Group, index: int) -> None:
    for title, axis, value, name in (
        ("Tokens a second against the prompt", _RATE, lambda row: row.rate, "rate"),
        ("First token against the prompt", Axis("seconds to the first token", low=0), lambda row: row.first, "first"),
    ):
        swept = series.sweep(group, value)
        if swept is None:
            return
        x, lines = swept
        drawing = line_chart(
            f"{name}-prompt{index}", title, x, axis, lines, tell_x=lambda tokens: f"{tokens:,.0f} prompt tokens"
        )
        if drawing is not None:
            legend = tuple(key(line.name, line.look) for line in lines)
            made.figures.append(Figure(title, group.title, drawing, legend))


def _points(one: Series, value: Callable[[BenchRow], float | None], spread: bool = False) -> list[Point]:
    points = []
    for row in one.measured:
        figure = value(row)
        if figure is not None:
            points.append(Point(row.k, figure, row.low if spread else None, row.high if spread else None))
    return points


def _table(made: Section, group: series.Group) -> None:
    measured = group.measured
    rows = [row for one in measured for row in one.measured]
    if not rows:
        return
    # What nobody can know of any of them has no column.
    columns: dict[str, Callable[[BenchRow], str | Cell]] = {
        "K": lambda row: str(row.k),
        "prompt tokens/s": lambda row: short(row.prefill),
        "first token, s": lambda row: short(row.first),
        "tokens/s": lambda row: short(row.rate),
        "each": lambda row: short(row.each),
    }
    if any(row.bound is not None or row.shares for row in rows):
        columns |= {"bound, tokens/s": lambda row: short(row.bound), "share of bound": _share}
    columns |= {"all done, s": lambda row: short(row.all_done), "least to most tokens/s": _spread}
    if any(row.joules is not None for row in rows):
        columns["J per token"] = lambda row: short(row.joules)
    groups = [Group(one.name, [[tell(row) for tell in columns.values()] for row in one.measured]) for one in measured]
    made.tables.append(Table(f"Speed; {group.title}; {series.prompts_of(group)}", tuple(columns), groups))


def _share(row: BenchRow) -> Cell:
    if row.outside:
        which = ", ".join(_FIGURES.get(name, name) for name in row.outside)
        return Cell(f"{percent(row.share)}: outside 0 to 100 % ({which})", "bad")
    return Cell(percent(row.share))


def _spread(row: BenchRow) -> str:
    return NONE if row.low is None or row.low == row.high else f"{short(row.low)} to {short(row.high)}"


def _check_shares(made: Section, measured: Sequence[BenchRow]) -> None:
    rows = [row for row in measured if row.shares]
    outside = [row for row in rows if row.outside]
    if outside:
        made.remarks.append(
            Remark(
                f"{len(outside)} of {count_of(len(rows), 'row')} lie outside 0 to 100 % of the bound: the rates of the "
                "board were measured, or stated, too low. For `host`: `qad devices host --measure` while nothing else "
                "runs.",
                "bad",
            )
        )
    elif rows:
        figures = sum(len(row.shares) for row in rows)
        made.remarks.append(
            Remark(
                f"All {figures:,} figures of {count_of(len(rows), 'row')} (prompt, first token, tokens/s, all done) "
                "lie between 0 and 100 % of the board's bound.",
                "good",
            )
        )
    if served := sum(row.served and not row.shares for row in measured):
        made.remarks.append(
            Remark(
                f"{count_of(served, 'row')} of servers, which are seen from outside: their weights, threads and memory "
                "are not known, so that there is no roofline to hold them against. The machine named is the one that "
                "asked."
            )
        )
    if unknown := sum(not row.served and not row.shares for row in measured):
        made.remarks.append(Remark(f"Of {count_of(unknown, 'row')} no bound is known."))


def _not_measured(made: Section, groups: Sequence[series.Group]) -> None:
    reasons: dict[tuple[str, str], list[int]] = {}
    for group in groups:
        for one in group.series:
            for row in one.rows:
                if row.reason is not None:
                    reasons.setdefault((one.place, row.reason), []).append(row.k)
    for (place, reason), ks in reasons.items():
        told = ", ".join(str(k) for k in sorted(set(ks)))
        made.remarks.append(Remark(f"Not measured: {place}, K = {told}: {reason}"))
