"""Thinking with real models: waves that change nothing, votes that stop early, deliberations that reuse the prompt."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from qad import export
from qad.cli import main
from qad.errors import OtherModel, UserError
from qad.evals import sandbox
from qad.final_answer import extract
from qad.model import resolve_source
from qad.runtimes import Sampling, Session, Trajectory, get, llamacpp, open_model, remote
from qad.runtimes._remote_stream import first_seed
from qad.think import Event, ThinkOptions, deliberate, think, vote
from qad.think.command import think_command, write_json
from qad.think.confidence import confidence
from qad.think.deliberation import lacks_room
from qad.think.deliberation_prompt import CUT, CUT_OFF, Draft, make_prompt, prompt_text, prune, shares
from qad.think.options import PRESETS, preset_for
from qad.think.show import print_thought
from tests.helpers_models import make_artifact
from tests.helpers_server import Script, answer, interrupting, serving, text_of, tokens_of

_REASON = llamacpp.available()
needs_llama = pytest.mark.skipif(_REASON is not None, reason=str(_REASON))
needs_client = pytest.mark.skipif(remote.available() is not None, reason=str(remote.available()))
WARM = Sampling(temperature=0.8, top_p=0.95, seed=3)
# With these the random model gives short texts, some of them the same: answers of the kind "text".
BRIEF = {"new_tokens": 14, "stop": ("a",)}
SUM = "What is 2 + 3? Reply with the number only."


@pytest.fixture(scope="module")
def smollm() -> Iterator[llamacpp.LlamaSession]:
    if _REASON is not None:
        pytest.skip(_REASON)
    try:
        path = Path(resolve_source("smollm2"))
    except UserError as error:
        pytest.skip(str(error))
    with llamacpp.open(path, threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run with a GGUF file: a model with random weights, quick and never at a loss for words."""
    run = tmp_path_factory.mktemp("think")
    artifact = make_artifact(run, "llama-tied", max_position_embeddings=2048)
    export.get("gguf").write(artifact, run / "model.gguf")
    return run


@pytest.fixture(scope="module")
def quick(run: Path) -> Iterator[llamacpp.LlamaSession]:
    if _REASON is not None:
        pytest.skip(_REASON)
    with llamacpp.open(run / "model.gguf", threads=1) as opened:
        yield opened


@pytest.fixture(params=["llamacpp", "reference"])
def tiny(request: pytest.FixtureRequest, run: Path) -> Iterator[Session]:
    if request.param == "llamacpp" and _REASON is not None:
        pytest.skip(_REASON)
    with get(request.param).open(run / "model.gguf" if request.param == "llamacpp" else run, threads=1) as opened:
        yield opened


def tokens(trajectories: list[Trajectory]) -> list[list[int]]:
    return [one.tokens for one in trajectories]


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


def cool(seed: int) -> Sampling:
    return Sampling(temperature=0.4, seed=seed)


@needs_llama
@pytest.mark.parametrize("measure", ["lowest", "mean"])
@pytest.mark.parametrize("method", ["vote", "weighted", "best", "auto"])
def test_stopping_early_gives_the_same_answer(quick: llamacpp.LlamaSession, method: str, measure: str) -> None:
    saved = early_ends = 0
    for seed in range(25):
        options = {"k": 8, "method": method, "sampling": cool(seed), "measure": measure, "window": 3, **BRIEF}
        full = think(quick, "Hi?", ThinkOptions(**options, certainty=None), kind="text")  # type: ignore[arg-type]
        assert full.tokens_saved == 0
        assert {one.reason for one in full.trajectories} <= {"stop", "length"}
        for wave in (None, 8, 3):
            early = think(quick, "Hi?", ThinkOptions(**options, wave=wave), kind="text")  # type: ignore[arg-type]
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


@needs_llama
def test_a_wave_that_decides_is_the_last(quick: llamacpp.LlamaSession) -> None:
    seen: list[Event] = []
    options = ThinkOptions(k=8, method="vote", sampling=Sampling(temperature=0.01), **BRIEF)  # type: ignore[arg-type]
    thought = think(quick, "Hi?", options, kind="text", on_event=seen.append)
    # So cold, all are the same: four of eight decide, the first among them.
    assert len(thought.trajectories) == 4
    assert thought.vote is not None
    assert thought.vote.share == 1.0
    assert thought.tokens_saved == 4 * len(thought.trajectories[0].tokens)
    assert [event.index for event in seen if event.state == "spared"] == [4, 5, 6, 7]
    # In one wave the first four to end decide, and the others are stopped.
    thought = think(quick, "Hi?", dataclasses.replace(options, wave=8), kind="text")
    assert [one.reason for one in thought.trajectories] == ["stop"] * 4 + ["dropped"] * 4


@needs_llama
def test_likely_consensus_stops_before_certain_consensus(quick: llamacpp.LlamaSession) -> None:
    cold = Sampling(temperature=0.01)
    sure = ThinkOptions(k=12, method="vote", sampling=cold, wave=1, **BRIEF)  # type: ignore[arg-type]
    # By hand: six of twelve for sure. After three, five or more of nine against have a chance of 0.08, after four, six
    # or more of eight have one of 0.02 (a tie counts as lost).
    assert len(think(quick, "Hi?", sure, kind="text").trajectories) == 6
    assert len(think(quick, "Hi?", dataclasses.replace(sure, certainty=0.95), kind="text").trajectories) == 4


@needs_llama
def test_dropping_the_unsure(quick: llamacpp.LlamaSession) -> None:
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
        thought = think(quick, "Hi?", options, kind="text")
        full = think(quick, "Hi?", dataclasses.replace(options, drop=False), kind="text")
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


@needs_llama
def test_votes_are_over_what_was_sampled(smollm: llamacpp.LlamaSession) -> None:
    options = ThinkOptions(k=6, method="vote", sampling=WARM, new_tokens=24, certainty=None)
    thought = think(smollm, SUM, options, kind="math")
    assert thought.answers == [extract(one.text, "math", marked=one.reason != "stop") for one in thought.trajectories]
    assert thought.vote == vote(thought.answers, "math")
    assert thought.vote is not None
    assert thought.vote.index is not None
    assert thought.text == thought.trajectories[thought.vote.index].text
    assert thought.method == "vote"


@needs_llama
def test_a_scorer_chooses_the_best(quick: llamacpp.LlamaSession) -> None:
    def shortest(question: str, text: str) -> float:
        assert question == "Hi?"
        return -len(text)

    options = ThinkOptions(k=4, method="best", sampling=WARM, **BRIEF)  # type: ignore[arg-type]
    thought = think(quick, "Hi?", options, scorer=shortest)
    assert all(one.reason != "dropped" for one in thought.trajectories)
    assert len(thought.text) == min(len(one.text.strip()) for one in thought.trajectories)
    with pytest.raises(UserError, match="use it with best"):
        think(quick, "Hi?", ThinkOptions(method="vote"), scorer=shortest)


@needs_llama
def test_auto_votes_where_answers_can_be_compared(smollm: llamacpp.LlamaSession) -> None:
    options = ThinkOptions(k=4, sampling=WARM, new_tokens=20)
    told = think(smollm, SUM, options, kind="math")
    assert told.method == "vote"
    assert told.deliberations == []


@needs_llama
def test_auto_deliberates_where_nothing_is_marked_as_an_answer(quick: llamacpp.LlamaSession) -> None:
    free = think(quick, "Hi?", ThinkOptions(k=4, sampling=WARM, new_tokens=20))
    assert free.method == "deliberate"
    assert len(free.deliberations) == 1
    assert free.vote is None
    assert free.tokens == sum(len(one.tokens) for one in (*free.trajectories, *free.deliberations))


@needs_llama
def test_programs_are_not_voted_on_unasked(quick: llamacpp.LlamaSession) -> None:
    options = ThinkOptions(k=2, sampling=WARM, new_tokens=9)
    assert think(quick, "Write a program.", options, kind="code").method == "deliberate"


@needs_llama
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


@needs_llama
def test_nobody_has_an_answer(quick: llamacpp.LlamaSession) -> None:
    options = ThinkOptions(k=3, method="vote", sampling=WARM, new_tokens=6)
    thought = think(quick, "Hi?", options)
    assert thought.answer is None
    assert thought.method == "best"
    best = max(range(3), key=lambda place: thought.confidences[place])
    assert thought.text == thought.trajectories[best].text.strip()
    assert any("no trajectory has an answer" in note for note in thought.notes)


# --- deliberation


@needs_llama
def test_a_deliberation_reuses_the_questions_prompt(quick: llamacpp.LlamaSession) -> None:
    question = "A farmer has 12 cows, sells 5 of them and buys 3 sheep. How many animals are on the farm now?"
    options = ThinkOptions(
        k=4,
        method="deliberate",
        sampling=cool(0),
        summary_k=3,
        iterations=2,
        **BRIEF,  # type: ignore[arg-type]
    )
    seen: list[Event] = []
    quick.sample(quick.tokenize("something else"), 1, new_tokens=1)
    thought = think(quick, question, options, kind="text", on_event=seen.append)
    prompt = quick.chat_prompt(question)
    closing = len(quick.tokenize("<|im_end|>\n<|im_start|>assistant\n"))
    assert len(thought.works) == 3
    assert thought.works[0].reused_tokens == 0
    for work in thought.works[1:]:
        # All but what closes the turn; the question's last token may have grown by what follows.
        assert len(prompt) - closing - 1 <= work.reused_tokens
        # And the rest is run once for the three.
        whole = work.reused_tokens + work.prompt_tokens
        assert {one.prompt_tokens for one in thought.deliberations} >= {whole}
    assert [one.index for one in thought.deliberations] == [0, 1, 2] * 2
    assert len(seen) == sum(len(one.tokens) + 1 for one in (*thought.trajectories, *thought.deliberations))
    assert {(event.phase, event.round) for event in seen} == {
        ("trajectory", 0),
        ("deliberation", 0),
        ("deliberation", 1),
    }
    # The last round decides, by vote where more than half of it has an answer.
    second = thought.deliberations[3:]
    answers = [extract(one.text, "text", marked=one.reason != "stop") for one in second]
    assert sum(answer is not None for answer in answers) > 1, "no vote here: take another seed"
    assert thought.vote == vote(answers, "text")
    assert thought.vote is not None
    assert thought.answer == thought.vote.answer


@needs_llama
def test_deliberations_over_stored_texts(quick: llamacpp.LlamaSession) -> None:
    options = ThinkOptions(k=2, method="deliberate", sampling=WARM, new_tokens=20, summary_k=2)
    drafts = [Draft("I think 5."), Draft("It is 6, because")]
    found = deliberate(quick, SUM, drafts, options)
    assert len(found) == 2
    assert tokens(found) == tokens(deliberate(quick, SUM, drafts, options))
    assert tokens(found) != tokens(deliberate(quick, SUM, drafts, options, round_=1))
    # Streams of their own: other tokens than trajectories of the same prompt have.
    prompt = make_prompt(quick, SUM, drafts, new_tokens=20, side_by_side=2, seed=WARM.seed)
    own = quick.sample(prompt, 4, WARM, new_tokens=20)
    assert tokens(own)[2:] == tokens(found)


@needs_llama
def test_a_prompt_holds_question_and_thinkers(quick: llamacpp.LlamaSession) -> None:
    drafts = [Draft(f"<think>thought {place}</think>answer {place}") for place in range(5)] + [Draft("unfin", False)]
    texts, shown = set(), ""
    for seed in range(4):
        text = quick.detokenize(make_prompt(quick, SUM, drafts, new_tokens=50, seed=seed))
        assert text.index(SUM) < text.index("Thinker #1") < text.index("Thinker #6") < text.index("After </think>")
        shown = text[text.index("### Thinker #1") : text.index("Now answer the question yourself")]
        assert "<think>" not in shown
        for place in range(5):
            assert f"thought {place}answer {place}" in shown
        assert shown.count("cut off here") == 1
        texts.add(shown)
    assert len(texts) == 4
    again = quick.detokenize(make_prompt(quick, SUM, drafts, new_tokens=50, seed=3))
    assert shown in again


@pytest.mark.parametrize(
    ("lengths", "budget", "given"),
    [
        ([10, 10, 10], 60, [10, 10, 10]),
        ([100, 100, 100], 60, [20, 20, 20]),
        ([5, 100, 100], 60, [5, 27, 28]),
        ([100, 5, 30], 90, [55, 5, 30]),
        ([1, 2], 0, [0, 0]),
    ],
)
def test_shares(lengths: list[int], budget: int, given: list[int]) -> None:
    assert shares(lengths, budget) == given


@needs_llama
def test_pruning_keeps_the_end(quick: llamacpp.LlamaSession) -> None:
    steps = [f"Step {number}: add {number} and go on." for number in range(60)]
    text = "<think>\n" + "\n".join(steps) + "\n</think>\n\nThe total is 1770."
    short = "It is 7."
    for budget in (60, 120, 300):
        long, kept = prune(quick, [Draft(text), Draft(short)], budget)
        assert kept == short
        assert len(quick.tokenize(long)) <= budget
        assert long.startswith(CUT)
        assert long.endswith("The total is 1770.")
        # What is kept of the thoughts are whole steps, the last ones.
        inside = long.removeprefix(CUT).removesuffix("The total is 1770.").strip().splitlines()
        assert inside == steps[len(steps) - len(inside) :]
        assert len(inside) >= budget // 50
    # An answer that is too long itself loses its beginning.
    (end,) = prune(quick, [Draft("<think>x</think>" + " ".join(steps))], 40)
    assert end.startswith(CUT)
    assert end.endswith(steps[-1])
    # All of it, where there is room.
    assert prune(quick, [Draft("a\n\nb")], 1000) == ["a\n\nb"]
    # Characters of several tokens are not cut in two.
    (emoji,) = prune(quick, [Draft("👍🏽 " * 200)], 50)
    assert "\ufffd" not in emoji


@needs_llama
def test_too_small_a_context(quick: llamacpp.LlamaSession) -> None:
    whole = 2048
    assert quick.context == whole
    frame = len(quick.chat_prompt(prompt_text("Hi?", [CUT_OFF] * 3)))
    fits = whole - frame - 3 * 24
    with pytest.raises(UserError, match=f"--new-tokens {fits} fits"):
        think(quick, "Hi?", ThinkOptions(k=3, method="deliberate", sampling=WARM, new_tokens=fits + 1))
    # What it says that fits does fit, and texts that are longer are cut to what is left.
    options = ThinkOptions(k=3, method="deliberate", sampling=WARM, new_tokens=fits)
    for draft in (Draft("word " * 400), Draft("word " * 400, ended=False), Draft("½ ¾ " * 99, ended=False)):
        prompt = make_prompt(quick, "Hi?", [draft] * 3, new_tokens=fits)
        assert whole - 110 <= len(prompt) + fits <= whole
    with pytest.raises(UserError, match="--k 3 fits"):
        think(quick, "Hi?", dataclasses.replace(options, k=8))
    # auto says that it did not deliberate, and shows the best instead.
    thought = think(quick, "Hi?", ThinkOptions(k=3, sampling=WARM, new_tokens=fits + 400, stop=("a",)))
    assert thought.method == "best"
    assert any("not deliberated: no room" in note for note in thought.notes)
    # Short texts may find the room that long ones have not, so that it can only be warned of before.
    thought = think(quick, "Hi?", ThinkOptions(k=3, sampling=WARM, new_tokens=fits + 1, stop=("a",)))
    assert thought.method == "deliberate"
    assert f"--new-tokens {fits} fits" in str(
        lacks_room(quick, "Hi?", dataclasses.replace(options, method="auto", new_tokens=fits + 1))
    )
    assert lacks_room(quick, "Hi?", dataclasses.replace(options, method="auto")) is None
    assert lacks_room(quick, "Hi? " * 2000, dataclasses.replace(options, method="auto")) is None
    assert lacks_room(quick, "Hi?", dataclasses.replace(options, method="vote", new_tokens=fits + 1)) is None
    with pytest.raises(UserError, match="budget of 30 tokens"):
        think(quick, "Hi?", dataclasses.replace(options, new_tokens=9, budget=30))
    with pytest.raises(UserError, match="question is empty"):
        think(quick, " \n", ThinkOptions())


# --- interrupts


@needs_llama
@pytest.mark.parametrize("method", ["vote", "deliberate"])
def test_an_interrupt_leaves_what_had_ended(quick: llamacpp.LlamaSession, method: str) -> None:
    ended: list[int] = []
    states: dict[int, str] = {}

    def impatient(event: Event) -> None:
        states[event.index] = event.state
        if event.state == "stop":
            ended.append(event.index)
        elif len(ended) == 2 and event.state == "running":
            raise KeyboardInterrupt

    options = ThinkOptions(k=6, method=method, sampling=cool(1), certainty=None, **BRIEF)  # type: ignore[arg-type]
    thought = think(quick, "Hi?", options, kind="text", on_event=impatient)
    assert thought.interrupted
    assert [one.index for one in thought.trajectories if one.reason == "stop"] == sorted(ended)
    assert {one.reason for one in thought.trajectories if one.index not in ended} == {"interrupted"}
    assert states == {one.index: one.reason for one in thought.trajectories}
    assert thought.deliberations == []
    assert thought.vote is not None
    assert sum(thought.vote.counts.values()) == 2
    assert thought.text in [one.text.strip() for one in thought.trajectories if one.index in ended]
    # The session is as good as before.
    whole = think(quick, "Hi?", options, kind="text")
    assert not whole.interrupted
    assert tokens([whole.trajectories[index] for index in ended]) == tokens(
        [thought.trajectories[index] for index in ended]
    )


@needs_llama
def test_an_engine_that_fails_loses_what_ran(quick: llamacpp.LlamaSession) -> None:
    ended: list[int] = []
    states: dict[int, str] = {}

    def fail(event: Event) -> None:
        states[event.index] = event.state
        if event.state == "stop":
            ended.append(event.index)
        elif len(ended) == 2 and event.state == "running":
            raise UserError("no memory left")

    options = ThinkOptions(k=6, method="vote", sampling=cool(1), certainty=None, **BRIEF)  # type: ignore[arg-type]
    thought = think(quick, "Hi?", options, kind="text", on_event=fail)
    assert not thought.interrupted
    assert {one.reason for one in thought.trajectories if one.index not in ended} == {"lost"}
    assert states == {one.index: one.reason for one in thought.trajectories}
    assert thought.vote is not None
    assert sum(thought.vote.counts.values()) == 2


@needs_llama
def test_an_interrupt_of_a_deliberation_leaves_the_trajectories(quick: llamacpp.LlamaSession) -> None:
    def impatient(event: Event) -> None:
        if event.phase == "deliberation" and event.tokens == 2 and event.state == "running":
            raise KeyboardInterrupt

    options = ThinkOptions(k=3, method="deliberate", sampling=cool(0), **BRIEF)  # type: ignore[arg-type]
    thought = think(quick, "Hi?", options, kind="text", on_event=impatient)
    assert thought.interrupted
    assert thought.text in [one.text.strip() for one in thought.trajectories]
    assert any("while deliberating" in note for note in thought.notes)


@needs_llama
def test_an_interrupt_before_anything_ended_shows_how_far_it_came(
    quick: llamacpp.LlamaSession, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def at_once(event: Event) -> None:
        if event.index == 2 and event.tokens == 5:
            raise KeyboardInterrupt

    sampling = Sampling(temperature=2.0, seed=2)
    options = ThinkOptions(k=5, sampling=sampling, new_tokens=200, certainty=None, wave=3)
    thought = think(quick, "Hi?", options, on_event=at_once)
    assert (thought.interrupted, thought.answer, thought.text, thought.vote) == (True, None, "", None)
    assert [len(one.tokens) for one in thought.trajectories] == [5, 5, 5]
    assert thought.tokens == 15
    whole = think(quick, "Hi?", dataclasses.replace(options, new_tokens=5))
    assert [one.tokens for one in thought.trajectories] == [one.tokens for one in whole.trajectories[:3]]
    for unfinished in (True, False):
        print_thought(thought, Console(stderr=True, width=200), 5, unfinished=unfinished)
        out, err = capsys.readouterr()
        assert out == ""
        assert "interrupted: 0 of 5 trajectories had ended, 15 tokens were sampled; there is nothing to judge" in err
        shown = "trajectory 2, not ended, 5 tokens:\n" + thought.trajectories[1].text.strip()
        assert (shown in err) == unfinished
        # Stopped early is what a vote that is decided does.
        assert "0 of 5 trajectories ended, 3 interrupted, 2 not begun" in err
        assert "stopped" not in err
    write_json(tmp_path / "o.json", thought, source="m", question="Hi?", options=options, command="qad think")
    told = json.loads((tmp_path / "o.json").read_text())
    assert told["interrupted"]
    assert [row["text"] for row in told["trajectories"]] == [one.text for one in thought.trajectories]
    assert [row["reason"] for row in told["trajectories"]] == ["interrupted"] * 3


@needs_llama
def test_an_interrupt_while_answers_are_judged_leaves_the_texts(quick: llamacpp.LlamaSession) -> None:
    def scorer(question: str, text: str) -> float:
        raise KeyboardInterrupt

    thought = think(quick, "Hi?", ThinkOptions(k=2, method="best", sampling=WARM, new_tokens=4), scorer=scorer)
    assert thought.interrupted
    assert [one.reason for one in thought.trajectories] == ["length", "length"]
    assert all(one.text for one in thought.trajectories)
    assert (thought.text, thought.answer) == ("", None)
    assert any("interrupted while the answers were compared" in note for note in thought.notes)


@needs_client
def test_an_interrupt_while_the_model_loads_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with interrupting() as url:
        try:
            status = command(url, output=tmp_path / "out.json", threads=None)
        except KeyboardInterrupt:
            pytest.fail("the interrupt went through")
    assert status == 130
    _, err = capsys.readouterr()
    assert "interrupted: none of 4 trajectories had begun, so there is no answer" in err
    assert "out.json was not written" in err
    assert list(tmp_path.iterdir()) == []


# --- servers


@needs_client
@pytest.mark.parametrize("logprobs", [True, False])
def test_a_server_is_asked_and_votes_stop_early(logprobs: bool) -> None:
    # Each trajectory is the toy model's own: that of the seed and its index.
    with serving(Script(logprobs=logprobs)) as url, open_model(url) as session:
        options = ThinkOptions(k=6, method="vote", sampling=WARM, new_tokens=40, certainty=None)
        full = think(session, "what", options, kind="text")
        wanted = [answer(tokens_of("what?"), first_seed(WARM) + index, 40) for index in range(6)]
        assert [one.text for one in full.trajectories] == [text_of(made) for made, _ in wanted]
        assert full.answers == [(text_of(made).strip() or None) if why == "stop" else None for made, why in wanted]
        assert full.answer is not None
        early = think(session, "what", dataclasses.replace(options, certainty=1.0), kind="text")
        assert (early.answer, early.text) == (full.answer, full.text)
        deliberated = think(session, "what", dataclasses.replace(options, method="deliberate", summary_k=2))
        assert len(deliberated.deliberations) == 2
        assert deliberated.notes == []


@needs_client
def test_without_logprobs_nothing_is_weighted() -> None:
    with serving(Script(logprobs=False)) as url, open_model(url) as session:
        for changes in ({"method": "weighted"}, {"method": "best"}, {"method": "vote", "drop": True, "certainty": 0.9}):
            with pytest.raises(UserError, match="log-probabilities, which this server does not tell"):
                think(session, "what", ThinkOptions(k=4, sampling=WARM, new_tokens=9, **changes))  # type: ignore[arg-type]


@needs_client
def test_trajectories_of_two_models_are_not_voted_on() -> None:
    script = Script()
    with serving(script) as url, open_model(url) as session:

        def restart(event: Event) -> None:
            # Between the waves.
            script.models = ("other",) if event.index == 1 and event.state != "running" else script.models

        options = ThinkOptions(k=4, method="vote", sampling=WARM, new_tokens=20, certainty=None, wave=2)
        with pytest.raises(OtherModel, match="had toy first and has other now"):
            think(session, "what", options, kind="text", on_event=restart)


@needs_client
def test_what_had_ended_when_a_server_died_is_judged() -> None:
    script = Script(pause=0.02)
    with serving(script) as url, remote.open(url, retries=1) as session:

        def die(event: Event) -> None:
            script.dead = script.dead or event.state == "stop"

        sampling = Sampling(temperature=0.9, top_p=0.9, seed=7)
        options = ThinkOptions(k=4, method="vote", sampling=sampling, new_tokens=30, certainty=None)
        thought = think(session, "what", options, kind="text", on_event=die)
        lengths = [len(answer(tokens_of("what?"), first_seed(sampling) + index, 30)[0]) for index in range(4)]
        shortest = lengths.index(min(lengths))
        assert [one.reason for one in thought.trajectories] == [
            "stop" if index == shortest else "lost" for index in range(4)
        ]
        assert thought.text == thought.trajectories[shortest].text.strip()
        assert any("503 shutting down" in note for note in thought.notes)
        assert not thought.interrupted
        with pytest.raises(UserError, match="503"):
            think(session, "what", options, kind="text")


@needs_client
def test_a_server_that_dies_while_it_deliberates_costs_no_trajectory() -> None:
    script = Script(pause=0.01)
    with serving(script) as url, remote.open(url, retries=0) as session:

        def die(event: Event) -> None:
            script.dead = script.dead or event.phase == "deliberation"

        options = ThinkOptions(k=2, method="deliberate", sampling=WARM, new_tokens=40)
        thought = think(session, "what", options, kind="text", on_event=die)
        assert thought.deliberations == []
        assert thought.method in ("vote", "best")
        assert thought.text in [one.text.strip() for one in thought.trajectories]
        assert any(note.startswith("not deliberated: ") and url in note for note in thought.notes), thought.notes
        assert len(thought.trajectories) == 2


# --- presets


def test_presets_go_by_parameters(run: Path) -> None:
    assert preset_for(run)[0] == "tiny"
    assert "M parameters" in preset_for(run)[1]
    assert preset_for("http://nowhere:1/v1") == ("tiny", "the number of its parameters is not known")
    assert PRESETS["tiny"].temperature <= 0.6
    assert PRESETS["large"] == Sampling(temperature=1.0, top_p=0.95, top_k=10)


def test_the_preset_of_a_model_of_seven_billions(tmp_path: Path) -> None:
    # Headers are all that is read: a folder in the sizes of a 7B model, whose weights are a hole in the file.
    config = {
        "model_type": "qwen2",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "max_position_embeddings": 32768,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    shapes = {"model.embed_tokens.weight": (152064, 3584), "lm_head.weight": (152064, 3584)}
    for layer in range(28):
        for name, shape in (("gate", (18944, 3584)), ("up", (18944, 3584)), ("down", (3584, 18944))):
            shapes[f"model.layers.{layer}.mlp.{name}_proj.weight"] = shape
    at, header = 0, {}
    for name, (rows, columns) in shapes.items():
        header[name] = {"dtype": "BF16", "shape": [rows, columns], "data_offsets": [at, at + 2 * rows * columns]}
        at += 2 * rows * columns
    text = json.dumps(header).encode()
    with (tmp_path / "model.safetensors").open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + at)
    name, why = preset_for(tmp_path)
    assert name == "large", why


# --- the verb


def command(
    source: Path | str, question: str = SUM, output: Path | None = None, threads: int | None = 1, **changes: object
) -> int:
    options: dict[str, object] = {"k": 4, "new_tokens": 24, **changes}
    return think_command(
        str(source),
        question,
        options=ThinkOptions(**options),  # type: ignore[arg-type]
        sampling={"temperature": 0.7, "seed": 1},
        preset=None,
        kind="math",
        threads=threads,
        gpu=False,
        kv_type="f16",
        json_file=output,
        command="qad think",
    )


@needs_llama
def test_the_verb(smollm: llamacpp.LlamaSession, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(resolve_source("smollm2"))
    assert command(path, output=tmp_path / "out.json", method="vote", certainty=None) == 0
    told = json.loads((tmp_path / "out.json").read_text())
    out, err = capsys.readouterr()
    assert out == told["text"] + "\n"
    assert "preset tiny (134M parameters)" in err.replace("135M", "134M")
    for row in told["trajectories"]:
        assert f"trajectory {row['index'] + 1}: {row['n_tokens']} tokens" in err
        assert row["mean_logprob"] <= 0
        assert row["lowest_window_logprob"] <= row["mean_logprob"] + 1e-9
        assert row["answer"] == extract(row["text"], "math", marked=row["reason"] != "stop")
    assert "4 of 4 trajectories ended" in err
    assert f"{told['tokens']} tokens" in err
    assert told["options"]["sampling"] == {
        "temperature": 0.7,
        "top_p": 0.95,
        "top_k": 0,
        "seed": 1,
        "min_p": 0.0,
        "first": 0,
    }
    assert told["vote"]["answer"] == told["answer"]
    # The same seed, the same text.
    session_text = smollm.sample(
        smollm.chat_prompt(SUM), 1, Sampling(temperature=0.7, top_p=0.95, seed=1), new_tokens=24
    )[0].text
    assert told["trajectories"][0]["text"] == session_text


def test_bad_input_is_told(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="gone.gguf is missing"):
        command(tmp_path / "gone.gguf")
    assert capsys.readouterr().err == ""
    with pytest.raises(UserError, match="deep is no folder: make it"):
        command(run, output=tmp_path / "deep" / "out.json")
    with pytest.raises(UserError, match="question is empty"):
        command(run, "  ")
    with pytest.raises(UserError, match="not UTF-8"):
        command(run, "\udce4")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--k", "0"], "--k"),
        (["--method", "votes"], "did you mean vote"),
        (["--kind", "maths"], "did you mean math"),
        (["--preset", "huge"], "known: large, tiny"),
        (["--drop"], "exact"),
        (["--full", "--confidence", "0.9"], "--full stops nothing early"),
        (["--full", "--confidence", "1"], "--full stops nothing early"),
        (["--method", "vote", "--summary-k", "2"], "the method vote deliberates on nothing"),
        (["--method", "best", "--iterations", "2"], "the method best deliberates on nothing"),
        (["--temperature", "0"], "all the same"),
    ],
)
def test_impossible_flags_are_told(
    run: Path,
    arguments: list[str],
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["qad", "think", str(run), "Hi?", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert says in capsys.readouterr().err


@needs_llama
def test_ctrl_c(run: Path) -> None:
    # Two of eight have ended when the signal comes: they are voted on, and it is said. The others would take seconds.
    arguments = ["think", str(run / "model.gguf"), "Hi?", "--kind", "text", "--k", "8", "--method", "vote", "--full"]
    arguments += ["--temperature", "2", "--top-p", "1", "--new-tokens", "1900", "--threads", "1"]
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "qad.cli", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stderr is not None
    guard = threading.Timer(180, process.kill)
    guard.start()
    told, ended = "", 0
    for line in process.stderr:
        told += line
        ended += "done" in line
        if ended == 2:
            os.killpg(process.pid, signal.SIGINT)
            break
    out, rest = process.communicate()
    guard.cancel()
    assert process.returncode == 130, told + rest
    assert "interrupted:" in rest
    assert "of 8 trajectories had ended" in rest
    assert "what follows is a partial vote, of these alone" in rest
    assert "votes (partial)" in rest
    assert "nothing is kept: --json FILE does that" in rest
    assert out.strip()
    assert "Traceback" not in rest
