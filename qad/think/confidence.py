"""How sure a model was of what it wrote, from the log-probabilities of its tokens.

After DeepConf (Fu, Wang, Tian, Zhao: Deep Think with Confidence, arXiv 2508.15260): a chain of reasoning is as good as
its weakest stretch, so that the mean over a sliding window is taken, and the lowest of these counts. What differs: the
paper's confidence of a token is the mean negative log-probability of the k likeliest candidates at its place, for which
an engine has to hand out the head of every distribution. Here it is the log-probability of the token that was chosen,
which every engine and server reports. Both fall where the distribution is flat. Ours also falls where an unlikely token
was drawn: it is noisier by one draw for each token, which the window averages out, and it sees the draw that the
paper's does not. It is taken at temperature 1 with nothing cut away, so that it does not depend on the sampling rule.

Weights of votes are exponentials of these means: geometric means of probabilities, in [0, 1], where the paper uses its
confidences, which have no upper end.

Tokens whose log-probability a server does not tell (NaN) are left out; of none the confidence is minus infinity.
"""

import math
from collections import deque
from collections.abc import Sequence
from typing import Literal

import numpy as np

Measure = Literal["lowest", "mean"]
"""What confidence is: the lowest mean over a window, or the mean over all tokens."""


def mean_logprob(logprobs: Sequence[float]) -> float:
    """Return the mean log-probability of some tokens; minus infinity of none."""
    known = [logprob for logprob in logprobs if not math.isnan(logprob)]
    return math.fsum(known) / len(known) if known else -math.inf


def lowest_window(logprobs: Sequence[float], window: int) -> float:
    """Return the lowest mean of ``window`` tokens in a row; of all, if there are fewer; minus infinity of none."""
    assert window > 0, window
    known = np.asarray(logprobs, dtype=np.float64)
    known = known[~np.isnan(known)]
    if not len(known):
        return -math.inf
    sums = np.concatenate([[0.0], np.cumsum(known)])
    size = min(window, len(known))
    return float(((sums[size:] - sums[:-size]) / size).min())


def confidence(logprobs: Sequence[float], measure: Measure = "lowest", window: int = 64) -> float:
    """Return the confidence of a trajectory, a mean log-probability."""
    return mean_logprob(logprobs) if measure == "mean" else lowest_window(logprobs, window)


def weight(value: float) -> float:
    """Return the weight of a vote by its confidence: a geometric mean of probabilities, in [0, 1]."""
    return math.exp(min(value, 0.0))


class Running:
    """Confidence of a trajectory that is on its way.

    Args:
        measure, window: As in ``confidence``.
        limit: Tokens that it may have at most.

    Attributes:
        known: How many tokens have a log-probability.
    """

    def __init__(self, measure: Measure, window: int, limit: int) -> None:
        self._measure = measure
        self._window = window
        self._limit = limit
        self._last: deque[float] = deque()
        self._in_window = 0.0
        self._sum = 0.0
        self._lowest = math.inf
        self.known = 0

    def add(self, logprob: float) -> None:
        """Take another token in."""
        if math.isnan(logprob):
            return
        self.known += 1
        self._sum += logprob
        self._last.append(logprob)
        self._in_window += logprob
        if len(self._last) > self._window:
            self._in_window -= self._last.popleft()
        if len(self._last) == self._window:
            self._lowest = min(self._lowest, self._in_window / self._window)

    @property
    def value(self) -> float:
        """The confidence if it ended here."""
        if not self.known:
            return -math.inf
        if self._measure == "mean" or self.known < self._window:
            return self._sum / self.known
        return self._lowest

    @property
    def ceiling(self) -> float:
        """The highest confidence that it can end with: every further token is certain."""
        if self._measure == "mean":
            return min(0.0, self._sum / self._limit)
        if self.known < self._window:
            return min(0.0, self._sum / min(self._window, self._limit))
        return min(0.0, self._lowest)
