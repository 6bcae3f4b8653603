"""When trajectories are stopped: those that have ended decide the result, or one is not worth its tokens."""

from collections.abc import Mapping

from qad.final_answer import groups
from qad.think.confidence import weight
from qad.think.consensus import chance_unchanged, is_decided
from qad.think.judge import Judge
from qad.think.trajectory_state import TrajectoryState

# Trajectories that must have ended before another is dropped for its confidence.
_ENDED_BEFORE_DROPPING = 3


def suffices(judge: Judge, states: Mapping[int, TrajectoryState], k: int) -> bool:
    """Return whether the trajectories that have ended decide the result, whatever the others of k become."""
    options = judge.options
    ended = {index: state for index, state in sorted(states.items()) if state.ended}
    if options.certainty is None or judge.scored or not ended:
        return False
    if options.method == "best":
        return not contenders(judge, states, k)
    if options.method not in ("vote", "weighted", "auto"):
        return False
    if options.method == "auto" and not judge.comparable([state.answer for state in ended.values()], k):
        return False
    classes = groups(*judge.ballots([state.answer for state in ended.values()]))
    votes = dict(zip(ended, classes, strict=True))
    undecided = [index for index in range(k) if index not in states or states[index].reason is None]
    weights = ceilings = None
    if options.method == "weighted":
        weights = {index: weight(state.running.value) for index, state in ended.items()}
        ceilings = {index: weight(states[index].running.ceiling) if index in states else 1.0 for index in undecided}
    if options.certainty < 1:
        return chance_unchanged(votes, len(undecided), weights) >= options.certainty
    return is_decided(votes, undecided, weights, ceilings)


def contenders(judge: Judge, states: Mapping[int, TrajectoryState], k: int) -> list[int]:
    """Return the undecided trajectories of k that may still become the best."""
    best = max(((judge.rank(state), -index) for index, state in states.items() if state.ended), default=None)
    found = []
    for index in range(k):
        state = states.get(index)
        if state is None or state.reason is None:
            ceiling = 0.0 if state is None else state.running.ceiling
            if best is None or ((True, True, ceiling), -index) > best:
                found.append(index)
    return found


def is_hopeless(judge: Judge, index: int, states: Mapping[int, TrajectoryState], k: int) -> bool:
    """Return whether a running trajectory is not worth its tokens, by its confidence."""
    options = judge.options
    if judge.scored:
        return False
    if options.drop:
        ended = [one.running.value for one in states.values() if one.ended]
        return len(ended) >= _ENDED_BEFORE_DROPPING and states[index].running.ceiling < min(ended)
    if options.method == "best" and options.certainty is not None and any(one.ended for one in states.values()):
        return index not in contenders(judge, states, k)
    return False
