"""What K answers to each question say of a model: M@K, P@K, V@K and their like.

- M@K, the mean: how often one answer is right. P@K, the potential: how often at least one of K is. V@K: how often the
  answer that most trajectories agree on is. HM@K and HP@K: the same as M and P of the answers that were deliberated
  from K trajectories, over as many as there are (``--summary-k``). Names and meaning as in HeavySkill
  (arXiv 2605.02396). W@K: the vote in which each trajectory weighs as much as it is confident. B@K: the answer of the
  best one: of those that ended by themselves with an answer the most confident.
- What a trajectory answers is said in one place, ``qad.final_answer.answer_of``, for all of these: its answer is judged
  right or wrong, and the same answer votes. One without an answer is wrong and votes for none; where nobody has one,
  the vote is wrong.
- P@k for k below K is the unbiased estimator of M. Chen et al. 2021 (arXiv 2107.03374, equation 1).

Everything here works on what is stored of the samples; no model is asked.

Shapes: I items.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from qad.evals.intervals import Estimate, bootstrap_mean, mean_share


@dataclass(frozen=True)
class ItemResult:
    """What became of one item.

    Attributes:
        id: Of the item.
        item: Its fingerprint.
        level: Its difficulty, None if it has none.
        correct: Of each of the K trajectories, whether it is right.
        answered: Whether it has an answer at all; what has none is never right and votes for nothing.
        cut_off: Whether it did not end by itself.
        format_ok: Whether it has the form that was asked for.
        n_tokens: Its tokens.
        mean_logprobs: Mean log-probability of its tokens; None where the engine tells none.
        seconds: Time until the last of the K was there.
        chosen: Method (``vote``, ``weighted``, ``best``) -> whether the answer that it chose is right.
        share: Share of the trajectories that agree with the voted answer; None where answers cannot be compared.
        voted_logprob: Mean log-probability of the voted answer's representative.
        deliberated: Of each deliberation, whether it is right.
        extra_tokens: Tokens of all deliberations.
        extra_seconds: Their time.
        judge: Name of what judged the answers, see ``Task.judge``.
    """

    id: str
    item: str
    level: int | None
    correct: tuple[bool, ...]
    answered: tuple[bool, ...]
    cut_off: tuple[bool, ...]
    format_ok: tuple[bool, ...]
    n_tokens: tuple[int, ...]
    mean_logprobs: tuple[float | None, ...]
    seconds: float
    chosen: dict[str, bool]
    share: float | None = None
    voted_logprob: float | None = None
    deliberated: tuple[bool, ...] = ()
    extra_tokens: int = 0
    extra_seconds: float = 0.0
    judge: str = ""

    @property
    def k(self) -> int:
        """Number of trajectories."""
        return len(self.correct)

    @property
    def right(self) -> int:
        """Number of right trajectories."""
        return sum(self.correct)

    @property
    def mean(self) -> float:
        """Share of right trajectories."""
        return self.right / self.k

    @property
    def final(self) -> bool:
        """Whether its one answer is right: the voted one, or without a vote the first trajectory's."""
        return self.chosen.get("vote", self.correct[0])


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Return the chance that of k samples, drawn without putting back, one is right: 1 - C(n - c, k) / C(n, k).

    Args:
        samples: n.
        right: c, of the n.
        k: At most n.
    """
    assert 0 <= right <= samples >= k > 0, (samples, right, k)
    return 1 - math.comb(samples - right, k) / math.comb(samples, k)


def _powers(k: int) -> list[int]:
    """Return 1, 2, 4 ... and k itself."""
    return sorted({*(2**power for power in range(k.bit_length()) if 2**power <= k), k})


# Method -> name of the metric.
CHOSEN = {"vote": "V@K", "weighted": "W@K", "best": "B@K"}


def values_of(items: Sequence[ItemResult]) -> dict[str, list[float]]:
    """Return each metric's value per item, in [0, 1], in the order of the items.

    Args:
        items: At least one, all with the same number of trajectories.

    Returns:
        ``accuracy``: of the first trajectory; ``M@K``, ``P@K``; ``V@K``, ``W@K``, ``B@K``, ``HM@K``, ``HP@K`` where all
        items have them; ``format``: share of trajectories in the form asked for.
    """
    assert items
    assert len({item.k for item in items}) == 1
    found = {
        "accuracy": [float(item.correct[0]) for item in items],
        "M@K": [item.mean for item in items],
        "P@K": [float(item.right > 0) for item in items],
    }
    for method, name in CHOSEN.items():
        if all(method in item.chosen for item in items):
            found[name] = [float(item.chosen[method]) for item in items]
    if all(item.deliberated for item in items):
        found["HM@K"] = [sum(item.deliberated) / len(item.deliberated) for item in items]
        found["HP@K"] = [float(any(item.deliberated)) for item in items]
    found["format"] = [sum(item.format_ok) / item.k for item in items]
    return found


def metrics_of(items: Sequence[ItemResult]) -> dict[str, Estimate]:
    """Return the mean of each metric over items; see ``values_of``."""
    return {name: mean_share(values) for name, values in values_of(items).items()}


def pass_curve(items: Sequence[ItemResult]) -> dict[int, Estimate]:
    """Return P@k for k = 1, 2, 4 ... K, by the unbiased estimator."""
    k = items[0].k
    return {size: mean_share([pass_at_k(k, item.right, size) for item in items]) for size in _powers(k)}


def costs_of(items: Sequence[ItemResult]) -> dict[str, Estimate]:
    """Return what answers cost.

    Returns:
        ``tokens`` and ``seconds`` of an answer: a trajectory's tokens, and its share of the time in which K were made
        side by side; ``tokens_per_item`` and ``seconds_per_item``: of all K and the deliberations.
    """
    return {
        "tokens": bootstrap_mean([sum(item.n_tokens) / item.k for item in items]),
        "seconds": bootstrap_mean([item.seconds / item.k for item in items]),
        "tokens_per_item": bootstrap_mean([sum(item.n_tokens) + item.extra_tokens for item in items]),
        "seconds_per_item": bootstrap_mean([item.seconds + item.extra_seconds for item in items]),
    }


def cut_off(items: Sequence[ItemResult]) -> dict[str, float]:
    """Return which share of all trajectories was cut off, and which was so before it had an answer (``unanswered``)."""
    ends = [pair for item in items for pair in zip(item.cut_off, item.answered, strict=True)]
    return {
        "answers": sum(cut for cut, _ in ends) / len(ends),
        "unanswered": sum(cut and not answered for cut, answered in ends) / len(ends),
    }


def by_level(items: Sequence[ItemResult]) -> dict[int | None, list[ItemResult]]:
    """Return the items of each level, from the easiest on; those without one come last."""
    levels = sorted({item.level for item in items}, key=lambda level: (level is None, level or 0))
    return {level: [item for item in items if item.level == level] for level in levels}


def majority_baseline(accepted: Sequence[Sequence[str]], same: Callable[[str, str], bool]) -> tuple[float, str] | None:
    """Return the share of items that the most frequent right answer solves, and that answer.

    It is counted on the items themselves: the best that anybody can reach without reading the questions.

    Args:
        accepted: Right answers of each item.
        same: Tells whether two answers are the same.

    Returns:
        None if an item has no solution that is known.
    """
    if not accepted or not all(accepted):
        return None
    # Each text once: comparing answers as mathematics is slow.
    first: dict[str, str] = {}
    for solution in (text for texts in accepted for text in texts):
        if solution not in first:
            first[solution] = next(
                (known for known in dict.fromkeys(first.values()) if same(solution, known)), solution
            )
    counts: dict[str, int] = {}
    for texts in accepted:
        for answer in dict.fromkeys(first[text] for text in texts):
            counts[answer] = counts.get(answer, 0) + 1
    answer, count = max(counts.items(), key=lambda entry: entry[1])
    return count / len(accepted), answer
