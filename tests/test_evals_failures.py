"""Why items are wrong, and what is lost away from training, on results worked by hand."""

import itertools

import pytest

from qad.evals.failures import diagnose
from qad.evals.metrics import ItemResult
from qad.evals.shift import shift_of

_ids = itertools.count()


def item(
    correct: str, *, level: int | None = 1, vote: bool | None = None, form: str = "", name: str = "", cut: str = ""
) -> ItemResult:
    """Return an item whose trajectories are right at an x, lack the form at a dash and were cut off at a bar."""
    right = tuple(letter == "x" for letter in correct)
    return ItemResult(
        id=name or f"item {next(_ids)}",
        item="",
        level=level,
        correct=right,
        answered=(True,) * len(right),
        cut_off=tuple(letter == "|" for letter in cut or correct),
        format_ok=tuple(letter != "-" for letter in form or correct),
        n_tokens=(5,) * len(right),
        mean_logprobs=(None,) * len(right),
        seconds=1.0,
        chosen={} if vote is None else {"vote": vote},
    )


def causes(items: list[ItemResult], **options: object) -> list[tuple[str, str]]:
    return [(one.cause, one.evidence) for one in diagnose(items, **options).items]  # type: ignore[arg-type]


def test_the_form_comes_first() -> None:
    wrong = item("x---", vote=False)
    assert causes([wrong], trained=True) == [("format", "3 of 4 without the form asked for")]
    # Then it is not the form that has to be taught.
    cut = item("x---", vote=False, cut=".||.")
    assert causes([cut], trained=True) == [("format", "3 of 4 without the form asked for, 2 cut off")]
    # Half of them are not most.
    assert causes([item("xx--", vote=False)], trained=True)[0][0] == "mismatch"


def test_an_answer_within_reach_is_a_mismatch() -> None:
    assert causes([item("x...", vote=False)], trained=True) == [("mismatch", "1 of 4 right, 0.0 by chance")]
    # A model that always gave the most frequent answer would be right that often by itself.
    trained = [item("x...", vote=False), *[item("....") for _ in range(9)]]
    assert causes(trained, trained=True, chance=0.3)[0] == (
        "capacity",
        "1 of 4 right; trained, and P@4 is 0.10 on level 1",
    )


def test_capacity_needs_a_trained_level_where_hardly_any_item_is_ever_right() -> None:
    easy = [item("xxxx", level=0, vote=True) for _ in range(9)] + [item("....", level=0, vote=False)]
    hard = [item("....", level=3, vote=False) for _ in range(9)] + [item("xx..", level=3, vote=True)]
    found = diagnose([*hard, *easy], trained=True)
    assert [(cell.level, cell.items, cell.wrong, cell.potential) for cell in found.cells] == [
        (0, 10, 1, 0.9),
        (3, 10, 9, 0.1),
    ]
    assert found.cells[0].causes == {"format": 0, "mismatch": 0, "capacity": 0, "undecided": 1}
    assert found.cells[1].causes == {"format": 0, "mismatch": 0, "capacity": 9, "undecided": 0}
    assert found.items[0].evidence == "0 of 4 right, though P@4 is 0.90 on level 0: more items or samples tell"
    # Kendall's tau-b by hand: 81 pairs agree that harder is worse, 1 disagrees; 100 pairs differ in level, 9 + 9 ties
    # of outcome within them do not count: 10 right and 10 wrong ones make 100 pairs.
    assert found.falling == pytest.approx((1 * 1 - 9 * 9) / 100)
    # Nobody trained on it: no matter how hopeless, it cannot be told.
    told = diagnose(hard, trained=False)
    assert told.cells[0].causes["undecided"] == 9
    assert "not trained on level 3: train, and give the result as --after" in told.items[0].evidence
    assert told.falling is None


def test_training_on_the_level_decides() -> None:
    before = [
        item("....", name="a", vote=False),
        item("....", name="b", vote=False),
        item("....", name="c", vote=False),
    ]
    after = {
        "a": item("xx..", name="a", vote=True),
        "b": item("....", name="b", vote=False),
        **{f"other {n}": item("....", name=f"other {n}") for n in range(3)},
    }
    found = diagnose(before, trained=False, after=after)
    assert [one.cause for one in found.items] == ["mismatch", "undecided", "undecided"]
    assert found.items[0].evidence == "right after training on the level"
    # P@4 is counted on the items of this level: one of two.
    assert found.cells[0].after == 0.5
    assert "though P@4 is 0.50 on level 1" in found.items[1].evidence
    hopeless = {name: item("....", name=name, vote=False) for name in "abc"}
    assert [one.cause for one in diagnose(before, trained=False, after=hopeless).items] == ["capacity"] * 3


def test_right_items_are_no_failures_and_every_wrong_one_has_one_cause() -> None:
    marks = [item("".join(letters), vote=letters.count("x") > 1) for letters in itertools.product("x.-", repeat=3)]
    for trained in (True, False):
        found = diagnose(marks, trained=trained, chance=0.1)
        wrong = [one.id for one in marks if not one.final]
        assert [one.id for one in found.items] == wrong
        assert sum(found.cells[0].causes.values()) == len(wrong) == found.cells[0].wrong


def test_shift_holds_each_label_against_what_was_trained_on() -> None:
    trained = [item("xx", vote=True) for _ in range(30)] + [item("x.", vote=False) for _ in range(10)]
    far = [item("xx", vote=True) for _ in range(10)] + [item("..", vote=False) for _ in range(30)]
    groups = shift_of({"trained": trained, "far": far, "near": []})
    assert [(one.label, one.items, one.accuracy.value, one.potential.value) for one in groups] == [
        ("trained", 40, 0.75, 1.0),
        ("far", 40, 0.25, 0.25),
    ]
    assert groups[0].change is None
    change = groups[1].change
    assert change is not None
    assert change.value == -0.5
    # Two independent shares of 40: 1.96 sqrt(2 x 0.75 x 0.25 / 40) to either side.
    assert (change.low, change.high) == (pytest.approx(-0.69, abs=0.03), pytest.approx(-0.31, abs=0.03))
    assert shift_of({"far": far})[0].change is None
