"""One text out of several without a vote: the best, and what of it is the reply."""

from collections.abc import Callable, Mapping

from qad.final_answer import strip_thinking
from qad.think.judge import Judge
from qad.think.trajectory_state import TrajectoryState

Scorer = Callable[[str, str], float]
"""Returns how good a text is as an answer to a question: of a reward model, higher is better."""


def best_of(question: str, ended: Mapping[int, TrajectoryState], judge: Judge, scorer: Scorer | None) -> int:
    """Return the index of the best of some trajectories, all of which have ended; of equals, the first."""
    if scorer is None:
        return max(ended, key=lambda index: (judge.rank(ended[index]), -index))
    scores = {index: scorer(question, reply(state.text)) for index, state in ended.items()}
    return max(ended, key=lambda index: (scores[index], -index))


def reply(text: str) -> str:
    """Return a text without its thoughts; all of it, if it has nothing else."""
    return strip_thinking(text) or text.strip()
