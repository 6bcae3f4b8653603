"""How the next token is chosen, from the logits of any engine and for any number of sequences.

One pass over the vocabulary per row gives the log-probability of what is chosen; what a rule cuts away is found by
comparing against a threshold, so that no row of 50 000 logits is ever sorted. Rows are worked on one after another:
a row and its exponentials fit the second-level cache, a matrix of them does not. A row's choice depends on that row
and on its own random numbers alone, so that a trajectory is the same whatever runs beside it. What a random number
draws is read off the cumulated probabilities in the order of the vocabulary, and not of likelihood: tokens that change
their ranks, with logits that differ in their last bits, do not change places.

Given up: a rule that has to look at more than one row, or at what was chosen before (penalties).

Shapes: R rows, V vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qad.errors import UserError

# Probabilities are summed within blocks, then over blocks: a token is found by two short searches.
_BLOCK = 256
# How far below the best a token is first looked for, in logits over temperature: e^-8 of the best's probability.
_REACH = 8.0
# Sums of float32 exponentials are that exact: a nucleus whose sum is top_p but for rounding is complete.
_ROUNDING = 1e-6


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. The rules apply in the order in which they stand here.

    Attributes:
        temperature: Divides the logits; 0 takes the most likely token.
        top_p: Keeps the fewest most likely tokens whose probabilities reach this sum (nucleus sampling), of those
            that top_k keeps.
        top_k: Keeps that many most likely tokens; 0 keeps all. It comes before top_p.
        seed: Of the random choice. Trajectory i of a call draws from a stream of its own, made from seed and i.
        min_p: Keeps tokens that are at least this share as likely as the likeliest; 0 keeps all. Comes last.
        first: Random stream of a call's first trajectory, where a call makes some of those of a larger one: trajectory
            i of the call is trajectory ``first + i`` of a call that begins at 0.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    min_p: float = 0.0
    first: int = 0

    def __post_init__(self) -> None:
        for name, possible, told in (
            ("temperature", 0 <= self.temperature < math.inf, "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "more than 0 and at most 1, which is all tokens"),
            ("top_k", self.top_k >= 0, "0, which is all tokens, or more"),
            ("min_p", 0 <= self.min_p <= 1, "0 to 1"),
            ("seed", self.seed >= 0, "0 or more"),
            ("first", self.first >= 0, "0 or more"),
        ):
            if not possible:
                raise UserError(f"sampling with {name} {getattr(self, name)} is impossible: give {told}")


GREEDY = Sampling()


class Chooser:
    """Chooses tokens under one rule; holds the memory that this takes."""

    def __init__(self, sampling: Sampling, vocabulary: int) -> None:
        self._sampling = sampling
        padded = -(-vocabulary // _BLOCK) * _BLOCK
        self._below_V = np.zeros(vocabulary, dtype=np.float32)
        # The tail beyond the vocabulary stays nought and is never found.
        self._weights = np.zeros(padded, dtype=np.float32)
        self._weights_V = self._weights[:vocabulary]
        self._blocks = self._weights.reshape(-1, _BLOCK)

    def choose(self, logits_V: NDArray[np.float32], generator: np.random.Generator) -> tuple[int, float]:
        """Return a token and its log-probability under the model: at temperature 1, with nothing cut away.

        Raises:
            UserError: A logit is not a number: the model is damaged, or overflowed.
        """
        best = int(logits_V.argmax())
        top = float(logits_V[best])
        if not math.isfinite(top):
            raise UserError("the model's output is not a number: its file is damaged, or its values overflow")
        np.subtract(logits_V, top, out=self._below_V)
        np.exp(self._below_V, out=self._weights_V)
        sums = self._blocks.sum(axis=1)
        total = float(sums.sum(dtype=np.float64))
        token = best if self._sampling.temperature == 0 else self._draw(sums, total, generator.random())
        return token, float(self._below_V[token]) - math.log(total)

    def _draw(self, sums: NDArray[np.float32], total: float, chance: float) -> int:
        """Return the token at which the cumulated probabilities pass ``chance``, in [0, 1).

        The weights hold the exponentials at temperature 1, ``sums`` and ``total`` their sums.
        """
        rule = self._sampling
        if rule.temperature != 1 and (rule.top_p < 1 or not (rule.top_k or rule.min_p)):
            np.divide(self._below_V, rule.temperature, out=self._weights_V)
            np.exp(self._weights_V, out=self._weights_V)
            sums = self._blocks.sum(axis=1)
            total = float(sums.sum(dtype=np.float64))
        if rule.top_p < 1 or rule.top_k or rule.min_p:
            return self._draw_kept(total, chance)
        heights = np.cumsum(sums, dtype=np.float64)
        block = min(int(np.searchsorted(heights, chance * heights[-1], side="right")), len(heights) - 1)
        inside = np.cumsum(self._blocks[block], dtype=np.float64)
        # As a share of the block's own sum: rounding may not carry the search beyond its last token.
        rest = chance * heights[-1] - (heights[block - 1] if block else 0.0)
        found = int(np.searchsorted(inside, max(rest, 0.0), side="right"))
        if found == _BLOCK:
            found = int(np.flatnonzero(self._blocks[block])[-1])
        return block * _BLOCK + found

    def _draw_kept(self, total: float, chance: float) -> int:
        """Return a token of those that the rule keeps; ``total`` is the sum of the weights at its temperature."""
        rule = self._sampling
        tokens = self._likeliest(total)
        scaled = self._below_V[tokens].astype(np.float64) / rule.temperature
        weights = np.exp(scaled)
        if rule.top_k:
            weights = weights[: rule.top_k]
            total = float(weights.sum())
        heights = np.cumsum(weights)
        kept = len(weights)
        if rule.top_p < 1:
            # A token stays if the likelier ones do not yet reach top_p: the first always does.
            kept = min(kept, int(np.searchsorted(heights, rule.top_p * total * (1 - _ROUNDING))) + 1)
        if rule.min_p:
            kept = min(kept, int(np.searchsorted(-weights, -rule.min_p * weights[0], side="right")))
        # In the order of the vocabulary: two tokens that change their ranks would change what a number draws.
        order = np.argsort(tokens[:kept])
        heights = np.cumsum(weights[order])
        return int(tokens[order[min(int(np.searchsorted(heights, chance * heights[-1], side="right")), kept - 1)]])

    def _likeliest(self, total: float) -> NDArray[np.intp]:
        """Return tokens from the likeliest on, equals in their order: at least as many as the rule can keep."""
        rule = self._sampling
        # The sum of which top_p takes its share is that of all that top_k keeps, those below min_p included.
        sums_all = rule.top_k and rule.top_p < 1
        limit = -rule.temperature * math.log(rule.min_p) if rule.min_p and not sums_all else math.inf
        reach = _REACH * rule.temperature
        while True:
            reach = min(reach, limit)
            tokens = np.flatnonzero(self._below_V >= -reach)
            # What min_p cuts, or all that there is, needs no second look.
            if reach == limit or len(tokens) == len(self._below_V):
                break
            if rule.top_k:
                enough = len(tokens) >= rule.top_k
            else:
                enough = float(self._weights_V[tokens].sum(dtype=np.float64)) >= rule.top_p * total
            if enough:
                break
            reach = reach * 2 if reach < 256 * rule.temperature else math.inf
        return tokens[np.argsort(-self._below_V[tokens], kind="stable")]


def generators(sampling: Sampling, k: int) -> list[np.random.Generator]:
    """Return the random streams of a call's k trajectories; the i-th does not depend on k."""
    return [np.random.default_rng([sampling.seed, sampling.first + index]) for index in range(k)]


def choose(logits_V: NDArray[np.float32], sampling: Sampling, generator: np.random.Generator) -> int:
    """Return the next token under a sampling rule."""
    return Chooser(sampling, len(logits_V)).choose(logits_V, generator)[0]


def choose_rows(
    chooser: Chooser, logits_RV: NDArray[np.float32], streams: Sequence[np.random.Generator]
) -> tuple[list[int], list[float]]:
    """Return the next token of each row and its log-probability."""
    chosen = [chooser.choose(row, stream) for row, stream in zip(logits_RV, streams, strict=True)]
    return [token for token, _ in chosen], [logprob for _, logprob in chosen]
