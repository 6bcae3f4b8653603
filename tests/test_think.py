"""Thinking with real models: waves that change nothing, votes that stop early, and what each method chooses."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest

from qad.errors import UserError
from qad.evals import sandbox
from qad.final_answer import extract
from qad.runtimes import Sampling, Session, get, llamacpp
from qad.think import Event, ThinkOptions, think, vote
from qad.think.confidence import confidence
from tests.helpers_runtimes import needs, skip_without
from tests.helpers_think import BRIEF, SUM, WARM, cool, tokens


@pytest.fixture(params=["llamacpp", "reference"])
def tiny(request: pytest.FixtureRequest, random_run: Path) -> Iterator[Session]:
    if request.param == "llamacpp":
        skip_without("llamacpp")
    path = random_run / "model.gguf" if request.param == "llamacpp" else random_run
    with get(request.param).open(path, threads=1) as opened:
        yield opened


# --- waves and early stopping


def test_waves_make_the_same_trajectories(tiny: Session) -> None:
    whole = tiny.sample(tiny.chat_prompt("Hi?"), 5, WARM, new_tokens=9)
    for wave in (1, 2, 5):
        options = ThinkOptions(k=5, method="vote", sampling=WARM, new_tokens=9, certainty=None, wave=wave)
        thought = think(tiny, "Hi?", options, kind="text")
        assert tokens(thought.trajectories) == tokens(whole)
        assert [one.index for one in thought.trajectories] == [0, 1, 2, 3, 4]
        assert [one.text for one in thought.trajectories] == [one.text for one in whole]
        assert thought.tokens == sum(len(one.tokens) for one in whole)
        assert thought.tokens_saved == 0


@needs("llamacpp")
@pytest.mark.parametrize("measure", ["lowest", "mean"])
@pytest.mark.parametrize("method", ["vote", "weighted", "best", "auto"])
def test_stopping_early_gives_the_same_answer(random_llama: llamacpp.LlamaSession, method: str, measure: str) -> None:
    saved = early_ends = 0
    for seed in range(25):
        options = {"k": 8, "method": method, "sampling": cool(seed), "measure": measure, "window": 3, **BRIEF}
        full = think(random_llama, "Hi?", ThinkOptions(**options, certainty=None), kind="text")  # type: ignore[arg-type]
        assert full.tokens_saved == 0
        assert {one.reason for one in full.trajectories} <= {"stop", "length"}
        for wave in (None, 8, 3):
            early = think(random_llama, "Hi?", ThinkOptions(**options, wave=wave), kind="text")  # type: ignore[arg-type]
            assert (early.answer, early.method) == (full.answer, full.method)
            for one in early.trajectories:
                other = full.trajectories[one.index]
                if one.reason == "dropped":
                    assert one.tokens == other.tokens[: len(one.tokens)]
                    assert early.answers[one.index] is None
                else:
                    assert (one.tokens, one.text, one.reason) == (other.tokens, other.text, other.reason)
                    assert early.answers[one.index] == full.answers[one.index]
            assert early.tokens == sum(len(one.tokens) for one in (*early.trajectories, *early.deliberations))
            assert early.tokens <= full.tokens
            if len(early.trajectories) < 8:
                assert early.tokens_saved > 0
            saved += full.tokens - early.tokens
            early_ends += early.tokens < full.tokens
    assert saved > 0
    # Of these 75 many can be decided early.
    assert early_ends > 10


@needs("llamacpp")
def test_a_wave_that_decides_is_the_last(random_llama: llamacpp.LlamaSession) -> None:
    seen: list[Event] = []
    options = ThinkOptions(k=8, method="vote", sampling=Sampling(temperature=0.01), **BRIEF)  # type: ignore[arg-type]
    thought = think(random_llama, "Hi?", options, kind="text", on_event=seen.append)
    # So cold, all are the same: four of eight decide, the first among them.
    assert len(thought.trajectories) == 4
    assert thought.vote is not None
    assert thought.vote.share == 1.0
    assert thought.tokens_saved == 4 * len(thought.trajectories[0].tokens)
    assert [event.index for event in seen if event.state == "spared"] == [4, 5, 6, 7]
    # In one wave the first four to end decide, and the others are stopped.
    thought = think(random_llama, "Hi?", dataclasses.replace(options, wave=8), kind="text")
    assert [one.reason for one in thought.trajectories] == ["stop"] * 4 + ["dropped"] * 4


@needs("llamacpp")
def test_likely_consensus_stops_before_certain_consensus(random_llama: llamacpp.LlamaSession) -> None:
    cold = Sampling(temperature=0.01)
    sure = ThinkOptions(k=12, method="vote", sampling=cold, wave=1, **BRIEF)  # type: ignore[arg-type]
    # By hand: six of twelve for sure. After three, five or more of nine against have a chance of 0.08, after four, six
    # or more of eight have one of 0.02 (a tie counts as lost).
    assert len(think(random_llama, "Hi?", sure, kind="text").trajectories) == 6
    assert len(think(random_llama, "Hi?", dataclasses.replace(sure, certainty=0.95), kind="text").trajectories) == 4


@needs("llamacpp")
def test_dropping_the_unsure(random_llama: llamacpp.LlamaSession) -> None:
    drops = 0
    for seed in range(10):
        options = ThinkOptions(
            k=8,
            method="vote",
            sampling=cool(seed),
            certainty=None,
            drop=True,
            window=3,
            **BRIEF,  # type: ignore[arg-type]
        )
        thought = think(random_llama, "Hi?", options, kind="text")
        full = think(random_llama, "Hi?", dataclasses.replace(options, drop=False), kind="text")
        dropped = [one.index for one in thought.trajectories if one.reason == "dropped"]
        ended = [place for place in range(8) if place not in dropped]
        # Each was below all that had ended by then, three at least, when it was dropped.
        for place in dropped:
            length = len(thought.trajectories[place].tokens)
            before = [full.confidences[other] for other in ended if len(full.trajectories[other].tokens) <= length]
            assert len(before) >= 3
            assert full.confidences[place] < min(before)
            assert thought.answers[place] is None
        assert tokens([thought.trajectories[place] for place in ended]) == tokens(
            [full.trajectories[place] for place in ended]
        )
        assert thought.vote == vote([None if place in dropped else full.answers[place] for place in range(8)], "text")
        drops += len(dropped)
    assert drops > 0


def test_confidences_are_those_of_the_logprobs(tiny: Session) -> None:
    for measure in ("lowest", "mean"):
        options = ThinkOptions(
            k=3, method="best", sampling=WARM, new_tokens=12, certainty=None, measure=measure, window=4
        )
        thought = think(tiny, "Hi?", options)
        wanted = [confidence(one.logprobs, measure, 4) for one in thought.trajectories]
        assert thought.confidences == pytest.approx(wanted)


# --- methods


@needs("llamacpp")
def test_votes_are_over_what_was_sampled(smollm: llamacpp.LlamaSession) -> None:
    options = ThinkOptions(k=6, method="vote", sampling=WARM, new_tokens=24, certainty=None)
    thought = think(smollm, SUM, options, kind="math")
    assert thought.answers == [extract(one.text, "math", marked=one.reason != "stop") for one in thought.trajectories]
    assert thought.vote == vote(thought.answers, "math")
    assert thought.vote is not None
    assert thought.vote.index is not None
    assert thought.text == thought.trajectories[thought.vote.index].text
    assert thought.method == "vote"


@needs("llamacpp")
def test_a_scorer_chooses_the_best(random_llama: llamacpp.LlamaSession) -> None:
    def shortest(question: str, text: str) -> float:
        assert question == "Hi?"
        return -len(text)

    options = ThinkOptions(k=4, method="best", sampling=WARM, **BRIEF)  # type: ignore[arg-type]
    thought = think(random_llama, "Hi?", options, scorer=shortest)
    assert all(one.reason != "dropped" for one in thought.trajectories)
    assert len(thought.text) == min(len(one.text.strip()) for one in thought.trajectories)
    with pytest.raises(UserError, match="use it with best"):
        think(random_llama, "Hi?", ThinkOptions(method="vote"), scorer=shortest)


@needs("llamacpp")
def test_auto_votes_where_answers_can_be_compared(smollm: llamacpp.LlamaSession) -> None:
    options = ThinkOptions(k=4, sampling=WARM, new_tokens=20)
    told = think(smollm, SUM, options, kind="math")
    assert told.method == "vote"
    assert told.deliberations == []


@needs("llamacpp")
def test_auto_deliberates_where_nothing_is_marked_as_an_answer(random_llama: llamacpp.LlamaSession) -> None:
    free = think(random_llama, "Hi?", ThinkOptions(k=4, sampling=WARM, new_tokens=20))
    assert free.method == "deliberate"
    assert len(free.deliberations) == 1
    assert free.vote is None
    assert free.tokens == sum(len(one.tokens) for one in (*free.trajectories, *free.deliberations))


@needs("llamacpp")
def test_programs_are_not_voted_on_unasked(random_llama: llamacpp.LlamaSession) -> None:
    options = ThinkOptions(k=2, sampling=WARM, new_tokens=9)
    assert think(random_llama, "Write a program.", options, kind="code").method == "deliberate"


@needs("llamacpp")
def test_programs_are_voted_on_by_what_they_print(smollm: llamacpp.LlamaSession) -> None:
    if reason := sandbox.refusal():
        pytest.skip(reason)
    asked: list[str] = []

    def printed(program: str) -> str | None:
        asked.append(program)
        done = sandbox.run(program)
        return done.stdout if done.status == 0 else None

    options = ThinkOptions(k=4, method="vote", sampling=WARM, new_tokens=40, certainty=None, stop=("```\n\n",))
    thought = think(smollm, "Write print(2 + 3) in a Python block.", options, kind="code", printer=printed)
    programs = {answer for answer in thought.answers if answer is not None}
    assert programs
    # Each is run once.
    assert sorted(asked) == sorted(programs)
    ballots = []
    for program in thought.answers:
        done = None if program is None else sandbox.run(program)
        ballots.append(done.stdout.strip() or program if done is not None and done.status == 0 else None)
    assert thought.vote == vote(ballots, "text")
    assert thought.vote is not None
    if thought.vote.index is not None:
        assert thought.answer == thought.answers[thought.vote.index]


@needs("llamacpp")
def test_nobody_has_an_answer(random_llama: llamacpp.LlamaSession) -> None:
    options = ThinkOptions(k=3, method="vote", sampling=WARM, new_tokens=6)
    thought = think(random_llama, "Hi?", options)
    assert thought.answer is None
    assert thought.method == "best"
    best = max(range(3), key=lambda place: thought.confidences[place])
    assert thought.text == thought.trajectories[best].text.strip()
    assert any("no trajectory has an answer" in note for note in thought.notes)
