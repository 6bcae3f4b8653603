"""Votes, confidence and early consensus on plain data, against brute force and examples worked by hand."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qad.errors import UserError
from qad.runtimes import Sampling
from qad.think.confidence import Running, confidence, lowest_window, mean_logprob, weight
from qad.think.consensus import chance_unchanged, is_decided
from qad.think.options import ThinkOptions
from qad.think.vote import vote

# --- votes


def test_the_most_frequent_answer_wins() -> None:
    found = vote(["7", "8", None, "7.0", "8 apples", "$7$"], "math")
    assert (found.answer, found.index, found.share) == ("7", 0, 0.5)
    assert found.counts == {"7": 3, "8": 2}
    assert found.weights == {"7": 3.0, "8": 2.0}
    assert found.members == {"7": (0, 3, 5), "8": (1, 4)}


@pytest.mark.parametrize(
    ("answers", "winner"),
    [
        (["A", "B"], 0),
        ([None, "B", "A"], 1),
        (["A", "B", "B", "A"], 0),
        (["C", "B", "A", "A", "B"], 1),
    ],
)
def test_of_equals_the_one_with_the_lowest_index_wins(answers: list[str | None], winner: int) -> None:
    found = vote(answers, "choice")
    assert found.answer == answers[winner]
    assert found.index == winner


def test_nobody_has_an_answer() -> None:
    for answers in ([], [None, None]):
        found = vote(answers, "math")
        assert (found.answer, found.index, found.share, found.counts) == (None, None, 0.0, {})


def test_weights() -> None:
    # Two unsure votes for A against one sure for B; the surest of a class speaks for it.
    found = vote(["A", "B", "(a)", None], "choice", [0.2, 0.9, 0.3, 0.6])
    assert (found.answer, found.index) == ("B", 1)
    assert found.share == pytest.approx(0.45)
    assert found.weights == pytest.approx({"A": 0.5, "B": 0.9})
    assert vote(["A", "B", "(a)"], "choice", [0.4, 0.7, 0.5]).index == 2
    # Without any weight the first class wins: every share is 0.
    assert vote(["A", "B"], "choice", [0.0, 0.0]).answer == "A"


@given(st.lists(st.sampled_from(["A", "B", "C", None]), max_size=9))
def test_votes_are_those_of_a_counter(answers: list[str | None]) -> None:
    found = vote(answers, "choice")
    counter = Counter(answer for answer in answers if answer)
    assert found.counts == counter
    if counter:
        # Counter keeps the order of first occurrences among equals.
        assert found.answer == counter.most_common(1)[0][0]
        assert found.share == counter.most_common(1)[0][1] / len(answers)


# --- confidence


def test_confidence_by_hand() -> None:
    logprobs = [-0.1, -0.3, -2.0, -1.0, -0.2]
    assert mean_logprob(logprobs) == pytest.approx(-0.72)
    # Windows of two: -0.2, -1.15, -1.5, -0.6.
    assert lowest_window(logprobs, 2) == pytest.approx(-1.5)
    assert lowest_window(logprobs, 1) == pytest.approx(-2.0)
    assert lowest_window(logprobs, 5) == lowest_window(logprobs, 99) == pytest.approx(-0.72)
    assert weight(mean_logprob([math.log(0.5), math.log(0.125)])) == pytest.approx(0.25)
    assert confidence(logprobs, "mean") == mean_logprob(logprobs)
    for empty in (mean_logprob([]), lowest_window([], 4)):
        assert empty == -math.inf
    assert weight(-math.inf) == 0.0


_LOGPROBS = st.lists(st.floats(-20, 0), min_size=1, max_size=40)


@given(_LOGPROBS, st.integers(1, 12), st.sampled_from(["lowest", "mean"]), st.integers(0, 10))
def test_running_confidence(logprobs: list[float], window: int, measure: str, more: int) -> None:
    limit = len(logprobs) + more
    running = Running(measure, window, limit)  # type: ignore[arg-type]
    assert running.value == -math.inf
    ceilings = [running.ceiling]
    for place, logprob in enumerate(logprobs, 1):
        running.add(logprob)
        wanted = confidence(logprobs[:place], measure, window)  # type: ignore[arg-type]
        assert running.value == pytest.approx(wanted, abs=1e-9)
        ceilings.append(running.ceiling)
    # What a trajectory ends with is never above what was held possible at any time before, not by a bit.
    assert all(running.value <= ceiling for ceiling in ceilings)
    assert ceilings == sorted(ceilings, reverse=True)


# --- exact consensus


def _class(answers: tuple[int | None, ...], weights: list[float] | None = None) -> int | None:
    """Return the class that wins a whole vote, by the vote itself."""
    found = vote([None if place is None else f"answer {place}" for place in answers], "text", weights)
    return None if found.index is None else answers[found.index]


@st.composite
def _halves(draw: st.DrawFn) -> tuple[dict[int, int | None], list[int]]:
    k = draw(st.integers(1, 6))
    undecided = draw(st.lists(st.integers(0, k - 1), max_size=4, unique=True))
    decided = [index for index in range(k) if index not in undecided]
    return {index: draw(st.none() | st.integers(0, 2)) for index in decided}, undecided


def _completions(votes: dict[int, int | None], undecided: list[int]) -> set[int | None]:
    """Return who can win: every completion, with an answer that nobody gave and with none."""
    k = len(votes) + len(undecided)
    winners = set()
    for rest in itertools.product([None, 0, 1, 2, 3], repeat=len(undecided)):
        whole = {**votes, **dict(zip(undecided, rest, strict=True))}
        winners.add(_class(tuple(whole[index] for index in range(k))))
    return winners


@given(_halves())
def test_exact_consensus_is_what_brute_force_finds(half: tuple[dict[int, int | None], list[int]]) -> None:
    votes, undecided = half
    assert is_decided(votes, undecided) == (len(_completions(votes, undecided)) == 1)


@pytest.mark.parametrize(
    ("votes", "undecided", "decided"),
    [
        # Half of eight suffices if the first is among them: the others can only draw level, later.
        ({0: 0, 1: 0, 2: 0, 3: 0}, [4, 5, 6, 7], True),
        ({4: 0, 5: 0, 6: 0, 7: 0}, [0, 1, 2, 3], False),
        ({0: 0, 1: 0, 2: 0, 3: 1}, [4, 5, 6, 7], False),
        ({0: 0, 1: 0, 2: 0, 3: 1}, [4, 5], True),
        ({0: 1, 1: 0, 2: 0, 3: 0}, [4, 5], False),
        ({0: None, 1: None}, [2], False),
        ({0: None, 1: None}, [], True),
        ({}, [0], False),
    ],
)
def test_exact_consensus_by_hand(votes: dict[int, int | None], undecided: list[int], decided: bool) -> None:
    assert is_decided(votes, undecided) is decided


@given(_halves(), st.data())
def test_exact_consensus_of_weighted_votes(half: tuple[dict[int, int | None], list[int]], data: st.DataObject) -> None:
    votes, undecided = half
    k = len(votes) + len(undecided)
    eighths = st.integers(0, 8).map(lambda part: part / 8)
    weights = {index: data.draw(eighths) for index in votes}
    ceilings = {index: data.draw(eighths) for index in undecided}
    decided = is_decided(votes, undecided, weights, ceilings)
    now = _class(tuple(votes.get(index) for index in range(k)), [weights.get(index, 0.0) for index in range(k)])
    winners = set()
    for rest in itertools.product([None, 0, 1, 2, 3], repeat=len(undecided)):
        whole = {**votes, **dict(zip(undecided, rest, strict=True))}
        for scale in (0.0, 0.5, 1.0):
            heavy = [weights[index] if index in votes else scale * ceilings[index] for index in range(k)]
            winners.add(_class(tuple(whole[index] for index in range(k)), heavy))
    if decided:
        assert winners == {now}
    elif undecided:
        # Not decided means that another answer can win, or that nobody has one yet.
        assert len(winners) > 1 or now is None


# --- consensus that is likely


def _chance_by_counting(votes: dict[int, int | None], undecided: int) -> float:
    """Return the probability that the leader stays, restaurant by restaurant, all rivals taken as one."""
    counts = Counter(place for place in votes.values() if place is not None)
    leader, ours = counts.most_common(1)[0]
    rival = max((count for place, count in counts.items() if place != leader), default=0)
    total = 0.0
    for rest in itertools.product([True, False], repeat=undecided):
        probability, seen, for_us = 1.0, len(votes), ours
        for is_ours in rest:
            share = for_us / (seen + 1.0)
            probability *= share if is_ours else 1 - share
            seen += 1
            for_us += is_ours
        if ours + sum(rest) > rival + undecided - sum(rest):
            total += probability
    return total


@given(st.dictionaries(st.integers(0, 9), st.none() | st.integers(0, 2), min_size=1, max_size=6), st.integers(1, 6))
def test_the_chance_is_that_of_the_restaurant(votes: dict[int, int | None], undecided: int) -> None:
    if all(place is None for place in votes.values()):
        assert chance_unchanged(votes, undecided) == 0.0
        return
    votes = dict(sorted(votes.items()))
    assert chance_unchanged(votes, undecided) == pytest.approx(_chance_by_counting(votes, undecided))


def test_the_chance_by_hand() -> None:
    # Four of four, four to come: lost only if all are against it: (1/5)(2/6)(3/7)(4/8) = 1/70.
    assert chance_unchanged(dict.fromkeys(range(4), 0), 4) == pytest.approx(69 / 70)
    assert chance_unchanged({0: 0, 1: 1}, 0) == 1.0
    assert chance_unchanged({0: None}, 0) == 1.0
    # Weights of one are no weights.
    votes: dict[int, int | None] = {0: 0, 1: 0, 2: 1, 3: None}
    assert chance_unchanged(votes, 3, dict.fromkeys(votes, 1.0)) == chance_unchanged(votes, 3)
    assert chance_unchanged(votes, 3, {0: 1.0, 1: 1.0, 2: 0.1, 3: 0.5}) > chance_unchanged(votes, 3)


@pytest.mark.parametrize("certainty", [0.8, 0.95])
def test_stopping_when_likely_keeps_its_promise(certainty: float) -> None:
    """On questions like the model the result changes at most as often as was allowed, looked at after every vote."""
    random = np.random.default_rng(0)
    k, wrong, stopped, rounds = 12, 0, 0, 4000
    for _ in range(rounds):
        answers: list[int | None] = []
        for seen in range(k):
            # The restaurant: one of those that sit there, or a new one.
            place = int(random.integers(0, seen + 1))
            answers.append(answers[place] if place < seen else seen)
        for seen in range(1, k):
            votes = dict(enumerate(answers[:seen]))
            if chance_unchanged(votes, k - seen) >= certainty:
                stopped += 1
                now = _class(tuple(answers[:seen]))
                wrong += now != _class(tuple(answers))
                break
    assert stopped > rounds / 4
    # Three standard deviations above what is allowed.
    allowed = 1 - certainty
    assert wrong / stopped < allowed + 3 * math.sqrt(allowed * certainty / stopped)


# --- options


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"k": 0}, "k = 0"),
        ({"method": "votes"}, "did you mean vote"),
        ({"certainty": 0.3}, "at least 0.5"),
        ({"drop": True}, "exact stopping: .* off with --full"),
        ({"wave": 0}, "waves of 0"),
        ({"sampling": Sampling()}, "temperature 0"),
        ({"measure": "tail"}, "lowest, mean"),
        ({"summary_k": 0}, "summary_k = 0"),
    ],
)
def test_impossible_options(changes: dict[str, object], says: str) -> None:
    with pytest.raises(UserError, match=says):
        ThinkOptions(**changes)  # type: ignore[arg-type]


def test_how_many_run_at_once() -> None:
    assert ThinkOptions(k=8, method="vote").at_once == 4
    assert ThinkOptions(k=5).at_once == 3
    assert ThinkOptions(k=8, method="vote", certainty=None).at_once == 8
    assert ThinkOptions(k=8, method="deliberate").at_once == 8
    assert ThinkOptions(k=8, method="best").at_once == 8
    assert ThinkOptions(k=8, method="vote", wave=3).at_once == 3
    assert ThinkOptions(k=2, wave=3).at_once == 2
    assert ThinkOptions(k=1, sampling=Sampling()).at_once == 1
