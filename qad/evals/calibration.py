"""Whether a confidence is what it says: of the answers given at 70 %, are 70 % right?

Two confidences of an answer are judged: the share of the trajectories that agree on it, and the mean probability of
its tokens (e to the mean log-probability). Where there is no answer there is nothing to be sure of, and nothing is
judged. A confidence that only ranks answers can be turned into one that is true: by
an isotonic or a Platt fit. What a fit was made on says nothing of it, so the items are parted into two halves by their
ids: one is fitted, the other is reported, before and after the fit.

Shapes: N answers, B bins.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from qad.errors import UserError
from qad.evals.extras import needed

Fit = Literal["isotonic", "platt"]

BINS = 10
# Fewer answers than this overfit an isotonic curve; so scikit-learn's guide to calibration says.
_ISOTONIC_FROM = 1000
# Answers of each half, right ones and wrong ones among them, below which a fit would be one of noise.
_LEAST = 20


@dataclass(frozen=True)
class Judged:
    """An answer with its confidence.

    Attributes:
        item: Id of its item.
        confidence: In [0, 1].
        correct: Whether it is right.
    """

    item: str
    confidence: float
    correct: bool


@dataclass(frozen=True)
class Bin:
    """Answers of similar confidence.

    Attributes:
        low, high: Ends of the bin.
        count: Answers in it.
        confidence: Their mean confidence.
        accuracy: Share of them that are right.
    """

    low: float
    high: float
    count: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class Calibration:
    """How true a confidence is.

    Attributes:
        answers: How many were judged.
        ece: Expected calibration error: mean distance of confidence and accuracy over ``BINS`` bins of equal width,
            weighted by their answers (torchmetrics). An answer of confidence 1 has a bin of its own.
        brier: Mean squared distance of confidence and outcome (scikit-learn).
        base: Brier of a constant confidence, the share of right answers: what a confidence must be below to be of use.
        bins: Those with answers.
    """

    answers: int
    ece: float
    brier: float
    base: float
    bins: tuple[Bin, ...]


def confidence_of(mean_logprob: float) -> float:
    """Return the geometric mean of the tokens' probabilities."""
    return math.exp(min(mean_logprob, 0.0))


def _arrays(judged: Sequence[Judged]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    confidence_N = np.array([one.confidence for one in judged], dtype=np.float64)
    assert ((confidence_N >= 0) & (confidence_N <= 1)).all(), "a confidence outside of [0, 1]"
    return confidence_N, np.array([one.correct for one in judged], dtype=np.int64)


def calibration_of(judged: Sequence[Judged]) -> Calibration:
    """Return how true the confidence of some answers is.

    Args:
        judged: At least one.
    """
    confidence_N, correct_N = _arrays(judged)
    torch = needed("torch")
    ece = needed("torchmetrics.functional.classification").binary_calibration_error(
        torch.from_numpy(confidence_N), torch.from_numpy(correct_N), n_bins=BINS, norm="l1"
    )
    edges = torch.linspace(0, 1, BINS + 1, dtype=torch.float64).numpy()
    where_N = np.searchsorted(edges, confidence_N, side="right") - 1
    bins = []
    for index in np.unique(where_N):
        inside = where_N == index
        high = float(edges[min(index + 1, BINS)])
        bins.append(
            Bin(
                float(edges[index]),
                high,
                int(inside.sum()),
                float(confidence_N[inside].mean()),
                float(correct_N[inside].mean()),
            )
        )
    share = float(correct_N.mean())
    return Calibration(
        answers=len(judged),
        ece=float(ece),
        brier=float(needed("sklearn.metrics").brier_score_loss(correct_N, confidence_N, pos_label=1)),
        base=share * (1 - share),
        bins=tuple(bins),
    )


@dataclass(frozen=True)
class Curve:
    """A fitted map from a confidence to a true one.

    Attributes:
        kind: ``isotonic``: between points, constant beyond them; ``platt``: 1 / (1 + e^-(slope x logit + offset)).
        points: Of an isotonic curve: confidence, true confidence.
        slope, offset: Of Platt's.
    """

    kind: Fit
    points: tuple[tuple[float, float], ...] = ()
    slope: float = 0.0
    offset: float = 0.0

    def __call__(self, confidence: float) -> float:
        """Return the true confidence."""
        if self.kind == "isotonic":
            known, true = zip(*self.points, strict=True)
            return float(np.interp(confidence, known, true))
        return float(1 / (1 + np.exp(-(self.slope * _logit(np.array([confidence]))[0] + self.offset))))


def _logit(confidence_N: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the log odds; confidences of 0 and 1, as a unanimous vote has them, count as a thousandth less."""
    inside_N = np.clip(confidence_N, 1e-3, 1 - 1e-3)
    return np.log(inside_N) - np.log1p(-inside_N)


def fit(judged: Sequence[Judged], kind: Fit) -> Curve:
    """Fit a curve to answers.

    ``platt`` is a logistic regression on the log odds, without a penalty (J. Platt 1999, without his smoothed targets).

    Args:
        judged: Right and wrong answers.
        kind: Which.
    """
    confidence_N, correct_N = _arrays(judged)
    if kind == "isotonic":
        model = needed("sklearn.isotonic").IsotonicRegression(y_min=0.0, y_max=1.0, out_of_bounds="clip")
        model.fit(confidence_N, correct_N)
        points = zip(model.X_thresholds_.tolist(), model.y_thresholds_.tolist(), strict=True)
        return Curve("isotonic", points=tuple(points))
    model = needed("sklearn.linear_model").LogisticRegression(C=np.inf, max_iter=1000)
    model.fit(_logit(confidence_N)[:, None], correct_N)
    return Curve("platt", slope=float(model.coef_[0, 0]), offset=float(model.intercept_[0]))


def held_out(item: str, seed: int = 0) -> bool:
    """Return whether an item belongs to the half that is reported; a matter of its id alone."""
    return hashlib.sha256(f"{seed}\0calibration\0{item}".encode()).digest()[0] % 2 == 1


@dataclass(frozen=True)
class Fitted:
    """A curve, and what it does to answers that it was not fitted to.

    Attributes:
        curve: The curve.
        fitted_on: Answers it was fitted to.
        before, after: The other half's calibration without and with it.
    """

    curve: Curve
    fitted_on: int
    before: Calibration
    after: Calibration


def fit_and_report(judged: Sequence[Judged], kind: Fit | None = None, seed: int = 0) -> Fitted | str:
    """Fit on one half of the items and report on the other.

    Args:
        judged: Answers; all answers of an item go into the same half.
        kind: Which fit; isotonic from 1000 answers on, else Platt, if None.
        seed: Of the halves.

    Returns:
        The outcome, or the reason why there is none.

    Raises:
        UserError: Unknown kind of fit.
    """
    if kind not in (None, "isotonic", "platt"):
        raise UserError(f"unknown fit {kind!r}: isotonic or platt")
    halves: tuple[list[Judged], list[Judged]] = ([], [])
    for one in judged:
        halves[held_out(one.item, seed)].append(one)
    if min(map(len, halves)) < _LEAST:
        return f"{len(judged)} answers are too few to fit on one half and report on the other"
    if any(len({one.correct for one in half}) < 2 for half in halves):
        return "one half of the items has only right or only wrong answers: nothing to fit"
    kind = kind or ("isotonic" if len(halves[0]) >= _ISOTONIC_FROM else "platt")
    curve = fit(halves[0], kind)
    after = [Judged(one.item, curve(one.confidence), one.correct) for one in halves[1]]
    return Fitted(curve, len(halves[0]), calibration_of(halves[1]), calibration_of(after))


def to_dict(judged: Sequence[Judged], kind: Fit | None = None, seed: int = 0) -> dict[str, Any]:
    """Return the calibration of answers and that of a fit, for JSON."""
    fitted = fit_and_report(judged, kind, seed)
    return {
        **asdict(calibration_of(judged)),
        "fit": {"reason": fitted} if isinstance(fitted, str) else asdict(fitted),
    }
