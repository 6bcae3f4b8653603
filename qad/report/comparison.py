"""The section on pairs of models: how much they differ on the same items, texts and chains, and whether by chance."""

from collections.abc import Sequence

from qad.report.blocks import Cell, Figure, Group, Section, Table
from qad.report.dot_chart import Dots, dot_chart
from qad.report.eval_record import Difference, Estimate, EvalRecord, short_task
from qad.report.evaluation import dot_of, told
from qad.report.frame import Axis
from qad.report.marks import Look, key
from qad.report.numerals import NONE, percent, short
from qad.report.reading import Record, of_kind

ANCHOR = "comparison"
_POINTS = Axis("difference in points", low=0, high=0)
_TONES = {"better": "good", "as good": "good", "worse": "bad"}
_ZERO = Look(line="dashed", mark="none", neutral=True)
_CHAINS = {"rouge_l": "ROUGE-L", "steps": "steps aligned", "numbers": "numbers shared"}


def section(records: Sequence[Record]) -> Section | None:
    """Return the section, None without a record for it."""
    evaluated = of_kind(records, EvalRecord)
    made = Section(
        ANCHOR,
        "Comparison",
        "The first model minus the second on the same items, in points, with a 95 % interval. As good: at most the "
        "margin worse, whatever in the interval is true. Open: these items do not tell.",
    )
    for number, record in enumerate(evaluated):
        _pairs(made, record, number)
        _shifts(made, record)
        _chains(made, record)
        _texts(made, record)
    return made if made.figures or made.tables else None


def _signed(value: float) -> str:
    return f"{value:+.1f}"


def _points(one: Estimate) -> str:
    if one.low is None or one.high is None:
        return _signed(100 * one.value)
    return f"{_signed(100 * one.value)} ({100 * one.low:+.0f} to {100 * one.high:+.0f})"


def _pairs(made: Section, record: EvalRecord, number: int) -> None:
    pairs: dict[tuple[str, str], list[Difference]] = {}
    for one in record.differences:
        pairs.setdefault((one.first_model, one.second_model), []).append(one)
    for index, ((first, second), differences) in enumerate(pairs.items()):
        tasks = list(dict.fromkeys(one.task for one in differences))
        metrics = list(dict.fromkeys(one.metric for one in differences))
        series = []
        for at, metric in enumerate(metrics):
            dots = [dot_of(short_task(one.task), one.difference) for one in differences if one.metric == metric]
            series.append(Dots(metric, dots, Look(at)))
        title = f"{first} minus {second}"
        drawing = dot_chart(
            f"pair{number}-{index}",
            title,
            _POINTS,
            [short_task(task) for task in tasks],
            series,
            tell=_signed,
            upright=[("no difference", 0.0, _ZERO)],
        )
        if drawing is not None:
            legend = [key(one.name, Look(one.look.index, line="none")) for one in series]
            legend.append(key("no difference", _ZERO))
            note = "Bars: 95 % intervals. Right of the line the first model is better."
            made.figures.append(Figure(title, f"the same items; {record.machine.title}", drawing, tuple(legend), note))
        made.tables.append(
            Table(
                f"{title}, margin {100 * differences[0].margin:g} points ({record.source.name})",
                (
                    *("metric", "verdict", "items", "first", "second", "difference, points"),
                    "only one right",
                    "p (McNemar, or of flipped signs)",
                ),
                [Group(short_task(task), [_row(one) for one in differences if one.task == task]) for task in tasks],
                words=2,
            )
        )


def _row(one: Difference) -> list[str | Cell]:
    verdict = one.verdict
    if verdict == "open" and one.items_needed is not None and one.items_needed > one.items:
        verdict += f" (about {one.items_needed:,} items might tell)"
    return [
        one.metric,
        Cell(verdict, _TONES.get(one.verdict, "")),
        f"{one.items:,}",
        percent(one.first),
        percent(one.second),
        _points(one.difference),
        NONE if one.only_first is None else f"{one.only_first} : {one.only_second}",
        short(one.p),
    ]


def _shifts(made: Section, record: EvalRecord) -> None:
    if not record.shifts:
        return
    models = list(dict.fromkeys(one.model for one in record.shifts))
    made.tables.append(
        Table(
            f"Away from what was trained on ({record.source.name})",
            ("tasks", "items", "right", "any of K right", "change, points"),
            [
                Group(
                    model,
                    [
                        [
                            one.label,
                            f"{one.items:,}",
                            told(one.accuracy),
                            told(one.potential),
                            NONE if one.change is None else _points(one.change),
                        ]
                        for one in record.shifts
                        if one.model == model
                    ],
                )
                for model in models
            ],
        )
    )


def _chains(made: Section, record: EvalRecord) -> None:
    groups = [
        Group(
            row.title,
            [[f"{row.model} and {name}", *(told(found.get(kind)) for kind in _CHAINS)]],
        )
        for row in record.rows
        for name, found in row.similarity.items()
    ]
    if groups:
        made.tables.append(
            Table(f"How alike chains of thought are ({record.source.name})", ("chains of", *_CHAINS.values()), groups)
        )


def _texts(made: Section, record: EvalRecord) -> None:
    if not record.texts:
        return
    rows = [
        [
            one.model,
            one.text,
            f"{one.tokens:,}",
            _figure(one.perplexity),
            _figure(one.kl),
            percent(one.same_top),
            one.reference or NONE,
        ]
        for one in record.texts
    ]
    heads = ("model", "text", "tokens", "perplexity", "KL, nats", "same first token", "against")
    made.tables.append(Table(f"Text ({record.source.name})", heads, [Group("", rows)], words=2))


def _figure(one: Estimate | None) -> str:
    if one is None:
        return NONE
    if one.low is None or one.high is None:
        return short(one.value)
    return f"{short(one.value)} ({short(one.low)} to {short(one.high)})"
