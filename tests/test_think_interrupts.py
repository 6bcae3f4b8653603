"""What is left of a question when an interrupt, an engine or a server ends it early."""

import dataclasses
import json
from pathlib import Path

import pytest
from rich.console import Console

from qad.errors import OtherModel, UserError
from qad.runtimes import Sampling, llamacpp, open_model, remote
from qad.runtimes._remote_stream import first_seed
from qad.think import Event, ThinkOptions, think
from qad.think.command import write_json
from qad.think.show import print_thought
from tests.helpers_runtimes import needs
from tests.helpers_server import Script, answer, serving, text_of, tokens_of
from tests.helpers_think import BRIEF, WARM, cool, tokens

# --- interrupts


@needs("llamacpp")
@pytest.mark.parametrize("method", ["vote", "deliberate"])
def test_an_interrupt_leaves_what_had_ended(random_llama: llamacpp.LlamaSession, method: str) -> None:
    ended: list[int] = []
    states: dict[int, str] = {}

    def impatient(event: Event) -> None:
        states[event.index] = event.state
        if event.state == "stop":
            ended.append(event.index)
        elif len(ended) == 2 and event.state == "running":
            raise KeyboardInterrupt

    options = ThinkOptions(k=6, method=method, sampling=cool(1), certainty=None, **BRIEF)  # type: ignore[arg-type]
    thought = think(random_llama, "Hi?", options, kind="text", on_event=impatient)
    assert thought.interrupted
    assert [one.index for one in thought.trajectories if one.reason == "stop"] == sorted(ended)
    assert {one.reason for one in thought.trajectories if one.index not in ended} == {"interrupted"}
    assert states == {one.index: one.reason for one in thought.trajectories}
    assert thought.deliberations == []
    assert thought.vote is not None
    assert sum(thought.vote.counts.values()) == 2
    assert thought.text in [one.text.strip() for one in thought.trajectories if one.index in ended]
    # The session is as good as before.
    whole = think(random_llama, "Hi?", options, kind="text")
    assert not whole.interrupted
    assert tokens([whole.trajectories[index] for index in ended]) == tokens(
        [thought.trajectories[index] for index in ended]
    )


@needs("llamacpp")
def test_an_engine_that_fails_loses_what_ran(random_llama: llamacpp.LlamaSession) -> None:
    ended: list[int] = []
    states: dict[int, str] = {}

    def fail(event: Event) -> None:
        states[event.index] = event.state
        if event.state == "stop":
            ended.append(event.index)
        elif len(ended) == 2 and event.state == "running":
            raise UserError("no memory left")

    options = ThinkOptions(k=6, method="vote", sampling=cool(1), certainty=None, **BRIEF)  # type: ignore[arg-type]
    thought = think(random_llama, "Hi?", options, kind="text", on_event=fail)
    assert not thought.interrupted
    assert {one.reason for one in thought.trajectories if one.index not in ended} == {"lost"}
    assert states == {one.index: one.reason for one in thought.trajectories}
    assert thought.vote is not None
    assert sum(thought.vote.counts.values()) == 2


@needs("llamacpp")
def test_an_interrupt_of_a_deliberation_leaves_the_trajectories(random_llama: llamacpp.LlamaSession) -> None:
    def impatient(event: Event) -> None:
        if event.phase == "deliberation" and event.tokens == 2 and event.state == "running":
            raise KeyboardInterrupt

    options = ThinkOptions(k=3, method="deliberate", sampling=cool(0), **BRIEF)  # type: ignore[arg-type]
    thought = think(random_llama, "Hi?", options, kind="text", on_event=impatient)
    assert thought.interrupted
    assert thought.text in [one.text.strip() for one in thought.trajectories]
    assert any("while deliberating" in note for note in thought.notes)


@needs("llamacpp")
def test_an_interrupt_before_anything_ended_shows_how_far_it_came(
    random_llama: llamacpp.LlamaSession, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def at_once(event: Event) -> None:
        if event.index == 2 and event.tokens == 5:
            raise KeyboardInterrupt

    sampling = Sampling(temperature=2.0, seed=2)
    options = ThinkOptions(k=5, sampling=sampling, new_tokens=200, certainty=None, wave=3)
    thought = think(random_llama, "Hi?", options, on_event=at_once)
    assert (thought.interrupted, thought.answer, thought.text, thought.vote) == (True, None, "", None)
    assert [len(one.tokens) for one in thought.trajectories] == [5, 5, 5]
    assert thought.tokens == 15
    whole = think(random_llama, "Hi?", dataclasses.replace(options, new_tokens=5))
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


@needs("llamacpp")
def test_an_interrupt_while_answers_are_judged_leaves_the_texts(random_llama: llamacpp.LlamaSession) -> None:
    def scorer(question: str, text: str) -> float:
        raise KeyboardInterrupt

    thought = think(random_llama, "Hi?", ThinkOptions(k=2, method="best", sampling=WARM, new_tokens=4), scorer=scorer)
    assert thought.interrupted
    assert [one.reason for one in thought.trajectories] == ["length", "length"]
    assert all(one.text for one in thought.trajectories)
    assert (thought.text, thought.answer) == ("", None)
    assert any("interrupted while the answers were compared" in note for note in thought.notes)


# --- servers


@needs("remote")
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


@needs("remote")
def test_without_logprobs_nothing_is_weighted() -> None:
    with serving(Script(logprobs=False)) as url, open_model(url) as session:
        for changes in ({"method": "weighted"}, {"method": "best"}, {"method": "vote", "drop": True, "certainty": 0.9}):
            with pytest.raises(UserError, match="log-probabilities, which this server does not tell"):
                think(session, "what", ThinkOptions(k=4, sampling=WARM, new_tokens=9, **changes))  # type: ignore[arg-type]


@needs("remote")
def test_trajectories_of_two_models_are_not_voted_on() -> None:
    script = Script()
    with serving(script) as url, open_model(url) as session:

        def restart(event: Event) -> None:
            # Between the waves.
            script.models = ("other",) if event.index == 1 and event.state != "running" else script.models

        options = ThinkOptions(k=4, method="vote", sampling=WARM, new_tokens=20, certainty=None, wave=2)
        with pytest.raises(OtherModel, match="had toy first and has other now"):
            think(session, "what", options, kind="text", on_event=restart)


@needs("remote")
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


@needs("remote")
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
