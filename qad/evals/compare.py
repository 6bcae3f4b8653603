"""Two models on the same items: how much they differ, and whether that is more than chance.

The items are the same, so that what is hard for both drops out of the difference: the interval is that of the mean of
the differences per item, by a bootstrap over items. The items on which the two models differ are then asked whether
they favour one: by McNemar's test for answers that are right or wrong, else by a permutation test that flips their
signs. A difference counts only if interval and test both say so: a bootstrap knows only what its few items hold.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from qad.errors import UserError
from qad.evals.extras import needed
from qad.evals.intervals import Estimate, bootstrap_ends
from qad.evals.metrics import ItemResult, values_of

Verdict = Literal["better", "worse", "as good", "open"]

_LEVEL = 0.05

# Discordant items from which McNemar's statistic is close enough to a chi-square; below, the binomial is exact.
_MANY = 25
# Items that differ up to which all their signs are gone through (8192 ways); of more, as many ways are drawn.
_FEW = 13
_DRAWS = 9999
_SEED = 20_261
_NOT_COMPARED = {"format", "HP@K"}


@dataclass(frozen=True)
class McNemar:
    """McNemar's test (Q. McNemar 1947).

    Attributes:
        only_first: Items that the first alone has right.
        only_second: Items that the second alone has right.
        p: Two-sided probability of so uneven a split, or a more uneven one, if both were equally good.
        test: ``binomial``: exact; ``chi-square``: with continuity correction.
    """

    only_first: int
    only_second: int
    p: float
    test: Literal["binomial", "chi-square"]


@dataclass(frozen=True)
class SignFlip:
    """A paired permutation test of the mean difference (R. A. Fisher 1935).

    Attributes:
        differ: Items on which the two have other values; the rest tells nothing.
        p: Two-sided probability of so large a mean difference, or a larger one, if each item were as likely to favour
            the one as the other.
        test: ``sign-flip``: exact, all ways to choose signs; ``sign-flip, drawn``: of 9999 drawn ones, the seed fixed.
    """

    differ: int
    p: float
    test: Literal["sign-flip", "sign-flip, drawn"]


@dataclass(frozen=True)
class Difference:
    """First minus second in one metric.

    Attributes:
        metric: Its name.
        items: How many both have.
        first, second: Values of both.
        difference: With its interval.
        mcnemar: Where answers are right or wrong.
        sign_flip: Of all other values.
        verdict: ``worse``: the interval lies below 0, and the test's p below 0.05; ``better``: the same above 0;
            ``as good``: no worse than by the margin that was given, whatever in the interval is true; ``open``: these
            items do not tell.
        margin: What counts as as good.
        items_needed: About how many items would tell a difference of the margin (at 80 % power); None where the
            items show no variation to reckon with.
    """

    metric: str
    items: int
    first: float
    second: float
    difference: Estimate
    mcnemar: McNemar | None
    sign_flip: SignFlip | None
    verdict: Verdict
    margin: float
    items_needed: int | None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, for JSON."""
        return asdict(self)


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> McNemar:
    """Return McNemar's test on answers to the same items, in the same order."""
    only_first = sum(one and not other for one, other in zip(first, second, strict=True))
    only_second = sum(other and not one for one, other in zip(first, second, strict=True))
    differ = only_first + only_second
    if differ < _MANY:
        p = 1.0
        if differ:
            p = float(needed("scipy.stats").binomtest(only_first, differ, 0.5).pvalue)
        return McNemar(only_first, only_second, p, "binomial")
    statistic = max(abs(only_first - only_second) - 1, 0) ** 2 / differ
    return McNemar(only_first, only_second, float(needed("scipy.stats").chi2.sf(statistic, 1)), "chi-square")


def sign_flip(change_I: NDArray[np.float64]) -> SignFlip:
    """Return the permutation test of a mean difference: what it would be if each item's sign were a coin's throw.

    Args:
        change_I: First minus second of each item.
    """
    differing = change_I[change_I != 0]
    if differing.size <= _FEW:
        sums = np.zeros(1)
        for size in np.abs(differing):
            sums = np.concatenate([sums + size, sums - size])
    else:
        # Items of one size together: how many of them are positive is binomial. Drawn item by item (as SciPy does)
        # ten thousand items take ten seconds.
        generator = np.random.default_rng(_SEED)
        sums = np.zeros(_DRAWS)
        for size, count in zip(*np.unique(np.abs(differing), return_counts=True), strict=True):
            sums += size * (2 * generator.binomial(count, 0.5, _DRAWS) - count)
    # Sums that are equal may differ by rounding.
    as_large = np.abs(sums) >= abs(differing.sum()) - 1e-9 * np.abs(differing).sum()
    if differing.size <= _FEW:
        return SignFlip(differing.size, float(as_large.mean()), "sign-flip")
    # What was found is itself one of the ways (Phipson and Smyth 2010).
    return SignFlip(differing.size, float(as_large.sum() + 1) / (_DRAWS + 1), "sign-flip, drawn")


def bonett_price(change_I: NDArray[np.float64]) -> Estimate:
    """Return a mean difference with the adjusted Wald interval of Bonett and Price (2012).

    It adds two items, of which each side has one alone, and is then close to its 95 % also where hardly any item
    differs. The formula is that of shares; of other values, which differ by less than one, it holds more.

    Args:
        change_I: First minus second of each item, in [-1, 1].
    """
    added = np.append(change_I, (1.0, -1.0))
    middle = float(added.mean())
    reach = 1.959964 * float(added.std()) / math.sqrt(added.size)
    return Estimate(float(change_I.mean()), max(middle - reach, -1.0), min(middle + reach, 1.0), "bonett-price")


def paired(metric: str, first: Sequence[float], second: Sequence[float], margin: float) -> Difference:
    """Return the difference of two models with one value per item each, in [0, 1], in the same order.

    Args:
        metric: Its name.
        first, second: Values; where all are 0 or 1 McNemar's test is made, else that of flipped signs.
        margin: Loss that still counts as as good.
    """
    one_I, two_I = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    assert one_I.shape == two_I.shape
    assert one_I.ndim == 1
    change_I = one_I - two_I
    value = float(change_I.mean())
    binary = bool(np.isin(one_I, (0, 1)).all() and np.isin(two_I, (0, 1)).all())
    test = mcnemar(one_I.astype(bool).tolist(), two_I.astype(bool).tolist()) if binary else None
    # Where no item, or one, differs, a bootstrap sees less than there may be: it would call few items proof.
    cautious = bonett_price(change_I)
    found = Estimate(value, *bootstrap_ends(change_I), "bootstrap") if np.ptp(change_I) else cautious
    verdict: Verdict = "open"
    flipped = None if test else sign_flip(change_I)
    # A bootstrap of four items that all favour one side never draws the other: the exact tests know better.
    told = any(one.p < _LEVEL for one in (test, flipped) if one)
    if found.high < 0 and told:
        verdict = "worse"
    elif found.low > 0 and told:
        verdict = "better"
    elif min(found.low, cautious.low) >= -margin:
        verdict = "as good"
    spread = float(change_I.std(ddof=1)) if change_I.size > 1 else 0.0
    # Normal approximation: two-sided 5 %, power 80 %.
    wanted = math.ceil(((1.96 + 0.8416) * spread / margin) ** 2) if spread and margin else None
    return Difference(
        metric=metric,
        items=change_I.size,
        first=float(one_I.mean()),
        second=float(two_I.mean()),
        difference=found,
        mcnemar=test,
        sign_flip=flipped,
        verdict=verdict,
        margin=margin,
        items_needed=wanted,
    )


def compare(first: Sequence[ItemResult], second: Sequence[ItemResult], margin: float) -> list[Difference]:
    """Compare two models in each metric that both have, over the items that both have.

    Args:
        first, second: Results of the same items; the order is of no matter.
        margin: Loss that still counts as as good.

    Returns:
        Empty if they share no item.

    Raises:
        UserError: Items of one name are different questions.
    """
    others = {item.id: item for item in second}
    pairs = [(item, others[item.id]) for item in first if item.id in others]
    if not pairs:
        return []
    changed = [one.id for one, two in pairs if one.item != two.item]
    if changed:
        raise UserError(
            f"{len(changed)} items have the same name and another question ({changed[0]}): both results must be of one "
            "version of the task"
        )
    one_values, two_values = (values_of([pair[side] for pair in pairs]) for side in (0, 1))
    same_k = {one.k for one, _ in pairs} == {two.k for _, two in pairs}
    # How often one of K is right depends on K; how often one is does not.
    names = [name for name in one_values if name in two_values and (same_k or name in ("accuracy", "M@K"))]
    return [paired(name, one_values[name], two_values[name], margin) for name in names if name not in _NOT_COMPARED]
