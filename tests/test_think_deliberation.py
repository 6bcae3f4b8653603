"""Deliberations by a real model: what their prompts hold, reuse and have room for."""

import dataclasses
import re

import pytest

from qad.errors import UserError
from qad.final_answer import extract
from qad.runtimes import llamacpp
from qad.think import Event, ThinkOptions, deliberate, think, vote
from qad.think.deliberation import lacks_room
from qad.think.deliberation_prompt import (
    CUT,
    CUT_OFF,
    Draft,
    check_room,
    make_prompt,
    prompt_text,
    prune,
    shares,
)
from tests.helpers_runtimes import needs
from tests.helpers_think import BRIEF, SUM, WARM, cool, tokens


@needs("llamacpp")
def test_a_deliberation_reuses_the_questions_prompt(random_llama: llamacpp.LlamaSession) -> None:
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
    random_llama.sample(random_llama.tokenize("something else"), 1, new_tokens=1)
    thought = think(random_llama, question, options, kind="text", on_event=seen.append)
    prompt = random_llama.chat_prompt(question)
    closing = len(random_llama.tokenize("<|im_end|>\n<|im_start|>assistant\n"))
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


@needs("llamacpp")
def test_deliberations_over_stored_texts(random_llama: llamacpp.LlamaSession) -> None:
    options = ThinkOptions(k=2, method="deliberate", sampling=WARM, new_tokens=20, summary_k=2)
    drafts = [Draft("I think 5."), Draft("It is 6, because")]
    found = deliberate(random_llama, SUM, drafts, options)
    assert len(found) == 2
    assert tokens(found) == tokens(deliberate(random_llama, SUM, drafts, options))
    assert tokens(found) != tokens(deliberate(random_llama, SUM, drafts, options, round_=1))
    # Streams of their own: other tokens than trajectories of the same prompt have.
    prompt = make_prompt(random_llama, SUM, drafts, new_tokens=20, side_by_side=2, seed=WARM.seed)
    own = random_llama.sample(prompt, 4, WARM, new_tokens=20)
    assert tokens(own)[2:] == tokens(found)


@needs("llamacpp")
def test_a_prompt_holds_question_and_thinkers(random_llama: llamacpp.LlamaSession) -> None:
    drafts = [Draft(f"<think>thought {place}</think>answer {place}") for place in range(5)] + [Draft("unfin", False)]
    texts, shown = set(), ""
    for seed in range(4):
        text = random_llama.detokenize(make_prompt(random_llama, SUM, drafts, new_tokens=50, seed=seed))
        assert text.index(SUM) < text.index("Thinker #1") < text.index("Thinker #6") < text.index("After </think>")
        shown = text[text.index("### Thinker #1") : text.index("Now answer the question yourself")]
        assert "<think>" not in shown
        for place in range(5):
            assert f"thought {place}answer {place}" in shown
        assert shown.count("cut off here") == 1
        texts.add(shown)
    assert len(texts) == 4
    again = random_llama.detokenize(make_prompt(random_llama, SUM, drafts, new_tokens=50, seed=3))
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


@needs("llamacpp")
def test_pruning_keeps_the_end(random_llama: llamacpp.LlamaSession) -> None:
    steps = [f"Step {number}: add {number} and go on." for number in range(60)]
    text = "<think>\n" + "\n".join(steps) + "\n</think>\n\nThe total is 1770."
    short = "It is 7."
    for budget in (60, 120, 300):
        long, kept = prune(random_llama, [Draft(text), Draft(short)], budget)
        assert kept == short
        assert len(random_llama.tokenize(long)) <= budget
        assert long.startswith(CUT)
        assert long.endswith("The total is 1770.")
        # What is kept of the thoughts are whole steps, the last ones.
        inside = long.removeprefix(CUT).removesuffix("The total is 1770.").strip().splitlines()
        assert inside == steps[len(steps) - len(inside) :]
        assert len(inside) >= budget // 50
    # An answer that is too long itself loses its beginning.
    (end,) = prune(random_llama, [Draft("<think>x</think>" + " ".join(steps))], 40)
    assert end.startswith(CUT)
    assert end.endswith(steps[-1])
    # All of it, where there is room.
    assert prune(random_llama, [Draft("a\n\nb")], 1000) == ["a\n\nb"]
    # Characters of several tokens are not cut in two.
    (emoji,) = prune(random_llama, [Draft("👍🏽 " * 200)], 50)
    assert "\ufffd" not in emoji


@needs("llamacpp")
def test_what_fits_is_found_in_few_looks(random_llama: llamacpp.LlamaSession, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = []
    template = random_llama.chat_prompt

    def chat_prompt(text: str) -> list[int]:
        looks.append(text)
        return template(text)

    monkeypatch.setattr(random_llama, "chat_prompt", chat_prompt)

    def told(count: int) -> str:
        with pytest.raises(UserError) as refused:
            check_room(random_llama, "Hi?", count, new_tokens=400)
        return str(refused.value)

    (fits,) = re.findall(r"--k (\d+) fits", told(3000))
    assert len(looks) < 20
    check_room(random_llama, "Hi?", int(fits), new_tokens=400)
    assert f"--k {fits} fits" in told(int(fits) + 1)


@needs("llamacpp")
def test_too_small_a_context(random_llama: llamacpp.LlamaSession) -> None:
    whole = 2048
    assert random_llama.context == whole
    frame = len(random_llama.chat_prompt(prompt_text("Hi?", [CUT_OFF] * 3)))
    fits = whole - frame - 3 * 24
    with pytest.raises(UserError, match=f"--new-tokens {fits} fits"):
        think(random_llama, "Hi?", ThinkOptions(k=3, method="deliberate", sampling=WARM, new_tokens=fits + 1))
    # What it says that fits does fit, and texts that are longer are cut to what is left.
    options = ThinkOptions(k=3, method="deliberate", sampling=WARM, new_tokens=fits)
    for draft in (Draft("word " * 400), Draft("word " * 400, ended=False), Draft("½ ¾ " * 99, ended=False)):
        prompt = make_prompt(random_llama, "Hi?", [draft] * 3, new_tokens=fits)
        assert whole - 110 <= len(prompt) + fits <= whole
    with pytest.raises(UserError, match="--k 3 fits"):
        think(random_llama, "Hi?", dataclasses.replace(options, k=8))
    # auto says that it did not deliberate, and shows the best instead.
    thought = think(random_llama, "Hi?", ThinkOptions(k=3, sampling=WARM, new_tokens=fits + 400, stop=("a",)))
    assert thought.method == "best"
    assert any("not deliberated: no room" in note for note in thought.notes)
    # Short texts may find the room that long ones have not, so that it can only be warned of before.
    thought = think(random_llama, "Hi?", ThinkOptions(k=3, sampling=WARM, new_tokens=fits + 1, stop=("a",)))
    assert thought.method == "deliberate"
    assert f"--new-tokens {fits} fits" in str(
        lacks_room(random_llama, "Hi?", dataclasses.replace(options, method="auto", new_tokens=fits + 1))
    )
    assert lacks_room(random_llama, "Hi?", dataclasses.replace(options, method="auto")) is None
    assert lacks_room(random_llama, "Hi? " * 2000, dataclasses.replace(options, method="auto")) is None
    assert lacks_room(random_llama, "Hi?", dataclasses.replace(options, method="vote", new_tokens=fits + 1)) is None
    with pytest.raises(UserError, match="budget of 30 tokens"):
        think(random_llama, "Hi?", dataclasses.replace(options, new_tokens=9, budget=30))
    with pytest.raises(UserError, match="question is empty"):
        think(random_llama, " \n", ThinkOptions())
