"""What ``qad eval --json`` wrote."""

from dataclasses import dataclass
from typing import Any

from qad.report.fields import Fields
from qad.report.source import Machine, Provenance, Source, last_part, read_provenance

KIND = "evaluation (qad eval)"
REMEDY = "make it again with `qad eval --json`"
_SHARED = "reasoning_gym:"


@dataclass(frozen=True)
class Estimate:
    """A figure and its 95 % interval, if it has one."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Bin:
    """Answers of similar confidence: how many, their mean confidence, the share of them that is right."""

    count: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class Calibration:
    """How true a confidence is.

    Attributes:
        answers, ece, brier, base: Answers; expected calibration error; Brier score, and that of a constant.
        bins: Of all answers.
        fit: The kind of curve that was fitted on half of the items, or why none was.
        before, after: ECE of the other half without and with it.
    """

    answers: int
    ece: float
    brier: float
    base: float
    bins: tuple[Bin, ...]
    fit: str
    before: float | None
    after: float | None


@dataclass(frozen=True)
class Level:
    """The items of a level: how many, how many wrong, by cause; share with a right answer among K, after training."""

    level: int | None
    trained: bool
    items: int
    wrong: int
    causes: dict[str, float]
    potential: float
    after: float | None


@dataclass(frozen=True)
class EvalRow:
    """A model on a task with K samples of each item.

    Attributes:
        model, file, sha256, task, label, items, k: Which; ``label`` is what the task is to the model.
        metrics, costs: By their names.
        curve: k -> P@k.
        baseline: Share of items that the most frequent right answer solves.
        calibration: By confidence.
        similarity: Reference -> figure -> estimate.
        levels: Its failures.
        falling: Kendall's tau of level and P@K.
        notes: What the evaluation had to say.
    """

    model: str
    file: str
    sha256: str | None
    task: str
    label: str | None
    items: int
    k: int
    metrics: dict[str, Estimate]
    costs: dict[str, Estimate]
    curve: dict[int, Estimate]
    baseline: float | None
    calibration: dict[str, Calibration]
    similarity: dict[str, dict[str, Estimate]]
    levels: tuple[Level, ...]
    falling: float | None
    notes: tuple[str, ...]

    @property
    def title(self) -> str:
        """The task, shortly, and what it is to the model."""
        return short_task(self.task) + (f" ({self.label})" if self.label else "")


@dataclass(frozen=True)
class Difference:
    """First minus second model in one metric, item by item; ``p`` of its test and what one alone has right.

    The test is McNemar's where answers are right or wrong, else that of flipped signs, which older records lack.
    """

    task: str
    first_model: str
    second_model: str
    metric: str
    items: int
    first: float
    second: float
    difference: Estimate
    only_first: int | None
    only_second: int | None
    p: float | None
    verdict: str
    margin: float
    items_needed: int | None


@dataclass(frozen=True)
class Shift:
    """What a model has right of trained, near and far tasks."""

    model: str
    label: str
    items: int
    accuracy: Estimate
    potential: Estimate
    change: Estimate | None


@dataclass(frozen=True)
class TextRow:
    """A model on a text."""

    model: str
    text: str
    reference: str | None
    tokens: int
    perplexity: Estimate
    kl: Estimate | None
    same_top: float | None


@dataclass(frozen=True)
class EvalRecord:
    """A run of ``qad eval``: by what it was made, when and where; rows, paired differences, shifts, texts."""

    source: Source
    made: Provenance
    rows: tuple[EvalRow, ...]
    differences: tuple[Difference, ...]
    shifts: tuple[Shift, ...]
    texts: tuple[TextRow, ...]

    @property
    def machine(self) -> Machine:
        """That measured."""
        return self.made.machine


def short_task(name: str) -> str:
    """Return a task's name without what all of its kind share."""
    return last_part(name.removeprefix(_SHARED))


def recognizes(values: Any) -> bool:
    """Return whether this is one, damaged or not."""
    return isinstance(values, dict) and values.get("kind") == "eval"


def read(values: Any, source: Source) -> EvalRecord:
    """Return the record.

    Raises:
        UserError: It is damaged.
    """
    fields = Fields(values, source.path, "", REMEDY)
    return EvalRecord(
        source,
        read_provenance(fields),
        tuple(_row(one) for one in fields.children("rows")),
        tuple(
            _difference(pair, one)
            for pair in fields.maybe_children("comparisons")
            for one in pair.children("differences")
        ),
        tuple(_shift(one) for one in fields.maybe_children("shift")),
        tuple(_text(one) for one in fields.maybe_children("text")),
    )


def _estimate(fields: Fields) -> Estimate:
    return Estimate(fields.number("value"), fields.maybe_number("low"), fields.maybe_number("high"))


def _maybe_estimate(fields: Fields, name: str) -> Estimate | None:
    return _estimate(fields.child(name)) if fields.has(name) else None


def _estimates(fields: Fields) -> dict[str, Estimate]:
    return {name: _estimate(fields.child(name)) for name in fields.names()}


def _shares(fields: Fields) -> dict[str, Estimate]:
    for name in fields.names():
        fields.child(name).share("value")
    return _estimates(fields)


def _row(fields: Fields) -> EvalRow:
    curve = _shares(fields.child("pass"))
    calibration, similarity, failures = (
        fields.child("calibration"),
        fields.child("similarity"),
        fields.child("failures"),
    )
    return EvalRow(
        model=fields.text("model"),
        file=fields.text("file"),
        sha256=fields.maybe_text("sha256"),
        task=fields.text("task"),
        label=fields.maybe_text("label"),
        items=fields.whole("items"),
        k=fields.whole("k"),
        metrics=_shares(fields.child("metrics")),
        costs=_estimates(fields.child("costs")),
        curve={fields.as_whole(size, "pass"): one for size, one in curve.items()},
        baseline=fields.child("baseline").number("value") if fields.has("baseline") else None,
        calibration={name: _calibration(calibration.child(name)) for name in calibration.names()},
        similarity={name: _likeness(similarity.child(name)) for name in similarity.names()},
        levels=tuple(_level(one) for one in failures.children("cells")),
        falling=failures.maybe_number("falling"),
        notes=tuple(map(str, fields.items("notes"))),
    )


def _calibration(fields: Fields) -> Calibration:
    fit = fields.child("fit")
    told = fit.text("reason") if fit.has("reason") else fit.child("curve").text("kind")
    bins = [Bin(one.whole("count"), one.share("confidence"), one.share("accuracy")) for one in fields.children("bins")]
    return Calibration(
        fields.whole("answers"),
        fields.share("ece"),
        fields.share("brier"),
        fields.share("base"),
        tuple(bins),
        told,
        fit.child("before").number("ece") if fit.has("before") else None,
        fit.child("after").number("ece") if fit.has("after") else None,
    )


def _likeness(fields: Fields) -> dict[str, Estimate]:
    names = ("rouge_l", "steps", "numbers")
    return {name: _estimate(fields.child(name)) for name in names if fields.has(name)}


def _level(fields: Fields) -> Level:
    return Level(
        fields.whole("level") if fields.has("level") else None,
        fields.flag("trained"),
        fields.whole("items"),
        fields.whole("wrong"),
        fields.child("causes").numbers(),
        fields.number("potential"),
        fields.maybe_number("after"),
    )


def _difference(pair: Fields, fields: Fields) -> Difference:
    test = fields.child("mcnemar") if fields.has("mcnemar") else None
    told = test or (fields.child("sign_flip") if fields.has("sign_flip") else None)
    return Difference(
        task=pair.text("task"),
        first_model=pair.text("first"),
        second_model=pair.text("second"),
        metric=fields.text("metric"),
        items=fields.whole("items"),
        first=fields.number("first"),
        second=fields.number("second"),
        difference=_estimate(fields.child("difference")),
        only_first=test.whole("only_first") if test else None,
        only_second=test.whole("only_second") if test else None,
        p=told.number("p") if told else None,
        verdict=fields.text("verdict"),
        margin=fields.number("margin"),
        items_needed=fields.whole("items_needed") if fields.has("items_needed") else None,
    )


def _shift(fields: Fields) -> Shift:
    return Shift(
        fields.text("model"),
        fields.text("label"),
        fields.whole("items"),
        _estimate(fields.child("accuracy")),
        _estimate(fields.child("potential")),
        _maybe_estimate(fields, "change"),
    )


def _text(fields: Fields) -> TextRow:
    return TextRow(
        fields.text("model"),
        fields.text("text"),
        fields.maybe_text("reference"),
        fields.whole("tokens"),
        _estimate(fields.child("perplexity")),
        _maybe_estimate(fields, "kl"),
        fields.maybe_number("same_top1"),
    )
