"""Why wrong items are wrong: the form, the distribution, or the capacity of the model; and what says so.

An item counts as wrong if its one answer is: the voted one, or the first trajectory's where answers cannot be compared.
The first of these that holds is its cause:

- ``format``: most of its trajectories lack the form that was asked for. Teach the form; where they were cut off, which
  the evidence says, let them become longer first.
- ``mismatch``: the right answer is within reach. Either a model that was trained on the level has it right, or
  trajectories hit it more often than the most frequent answer of the task would by itself. Train, or vote.
- ``capacity``: the level was trained on, and there hardly any item has one right trajectory among K (P@K at most 0.2).
  A larger model, more bits, or easier levels first.
- ``undecided``: nothing of this: what would decide it stands in the evidence.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from qad.evals.extras import needed
from qad.evals.metrics import ItemResult, by_level

Cause = Literal["format", "mismatch", "capacity", "undecided"]
CAUSES: tuple[Cause, ...] = ("format", "mismatch", "capacity", "undecided")

NEAR_ZERO = 0.2


@dataclass(frozen=True)
class Failure:
    """A wrong item.

    Attributes:
        id, level: Of the item.
        cause: See above.
        evidence: What says so, in a few words.
    """

    id: str
    level: int | None
    cause: Cause
    evidence: str


@dataclass(frozen=True)
class Cell:
    """A level of a task.

    Attributes:
        level: None where the task has none.
        trained: Whether the model was trained on it.
        items, wrong: How many there are, and how many of these are wrong.
        causes: Cause -> how many of the wrong ones.
        accuracy: Share of items whose one answer is right.
        mean: M@K.
        potential: P@K.
        format: Share of trajectories in the form asked for.
        after: P@K of the model that was trained on it, if there is one.
    """

    level: int | None
    trained: bool
    items: int
    wrong: int
    causes: dict[str, int]
    accuracy: float
    mean: float
    potential: float
    format: float
    after: float | None


@dataclass(frozen=True)
class Report:
    """The failures of one model on one task.

    Attributes:
        k: Trajectories of an item.
        chance: Share of items that the most frequent answer solves; None if that is not known.
        cells: By level, from the easiest on.
        falling: Kendall's tau of level and P@K over items, from -1 (harder is worse) to 1; None without two levels.
        items: The wrong ones.
    """

    k: int
    chance: float | None
    cells: tuple[Cell, ...]
    falling: float | None
    items: tuple[Failure, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, for JSON."""
        return asdict(self)


def _potential(items: Sequence[ItemResult]) -> float:
    return sum(item.right > 0 for item in items) / len(items)


def _falling(items: Sequence[ItemResult]) -> float | None:
    known = [(item.level, item.right > 0) for item in items if item.level is not None]
    if len({level for level, _ in known}) < 2 or len({right for _, right in known}) < 2:
        return None
    return float(needed("scipy.stats").kendalltau(*zip(*known, strict=True)).statistic)


def diagnose(
    items: Sequence[ItemResult],
    *,
    trained: bool,
    chance: float | None = None,
    after: Mapping[str, ItemResult] | None = None,
) -> Report:
    """Tell why the wrong items of a task are wrong.

    Args:
        items: Results, at least one, all with the same K.
        trained: Whether the model was trained on this task at these levels.
        chance: Share of items that the most frequent right answer solves.
        after: Results of a model that was trained on these levels, by item.
    """
    after = after or {}
    cells, failures = [], []
    for level, group in by_level(items).items():
        trained_ones = [after[item.id] for item in group if item.id in after]
        after_potential = _potential(trained_ones) if trained_ones else None
        cell = Cell(
            level=level,
            trained=trained,
            items=len(group),
            wrong=sum(not item.final for item in group),
            causes={},
            accuracy=sum(item.final for item in group) / len(group),
            mean=sum(item.mean for item in group) / len(group),
            potential=_potential(group),
            format=sum(sum(item.format_ok) / item.k for item in group) / len(group),
            after=after_potential,
        )
        found = [_cause(item, cell, chance or 0.0, after.get(item.id)) for item in group if not item.final]
        cell.causes.update({cause: sum(one.cause == cause for one in found) for cause in CAUSES})
        cells.append(cell)
        failures += found
    return Report(items[0].k, chance, tuple(cells), _falling(items), tuple(failures))


def _cause(item: ItemResult, cell: Cell, chance: float, after: ItemResult | None) -> Failure:
    k = item.k
    formless = k - sum(item.format_ok)
    where = "there" if cell.level is None else f"on level {cell.level}"

    def failure(cause: Cause, evidence: str) -> Failure:
        return Failure(item.id, item.level, cause, evidence)

    if 2 * formless > k:
        cut = f", {sum(item.cut_off)} cut off" if any(item.cut_off) else ""
        return failure("format", f"{formless} of {k} without the form asked for{cut}")
    if after is not None and after.final:
        return failure("mismatch", "right after training on the level")
    if item.right > k * chance:
        return failure("mismatch", f"{item.right} of {k} right, {k * chance:.1f} by chance")
    hit = f"{item.right} of {k} right"
    if after is not None:
        assert cell.after is not None
        if cell.after <= NEAR_ZERO:
            return failure("capacity", f"{hit}; after training P@{after.k} {cell.after:.2f} {where}")
        return failure("undecided", f"{hit}, wrong after training too, though P@{after.k} is {cell.after:.2f} {where}")
    if not cell.trained:
        return failure("undecided", f"{hit}; not trained {where}: train, and give the result as --after")
    if cell.potential <= NEAR_ZERO:
        return failure("capacity", f"{hit}; trained, and P@{k} is {cell.potential:.2f} {where}")
    return failure("undecided", f"{hit}, though P@{k} is {cell.potential:.2f} {where}: more items or samples tell")
