"""The prompt of a deliberation: a model reads what several trajectories wrote and answers anew.

The method is HeavySkill's (arXiv 2605.02396): trajectories are pruned to what the context can hold, shuffled, labelled
as thinkers, and judged in one more pass of the same model, several of which may run side by side. The words are this
project's. The question comes first, as it was asked, so that the prompt begins with the tokens of the question's own
prompt, up to where that closes the user's turn: what a runtime kept of it in its cache is not run again. What is asked
for comes last, where models heed it best.

Pruning keeps the end. Of what a trajectory wrote, the answer behind its thoughts comes first: it is kept whole if the
trajectory's share holds it, else its end; what is then left of the share goes to the end of the thoughts, from the
beginning of a line or a sentence on. What was cut is marked. Shares are even, and what a short trajectory does not use
goes to the long ones.
"""

import bisect
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qad.errors import UserError
from qad.final_answer import strip_thinking
from qad.runtimes import Session

CUT = "[…]"
# Below what a trajectory wrote that did not end by itself.
CUT_OFF = "\n(It was cut off here, before it ended.)"
# Of one trajectory; with fewer tokens than these there is nothing to judge.
LEAST_SHARE = 24
# Where the engine does not tell its context.
_USUAL_BUDGET = 16384
_TAGS = re.compile(r"</?think(?:ing)?>|<\|(?:begin|end)_of_(?:thought|solution)\|>")
_BOUNDARY = re.compile(r"\n|(?<=[.!?])\s")


@dataclass(frozen=True)
class Draft:
    """What a trajectory brings into a deliberation.

    Attributes:
        text: All that it wrote.
        ended: Whether it ended by itself, or was cut off.
    """

    text: str
    ended: bool = True


# What is not known yet may take all that there is.
_LONG = Draft("", ended=False)


def prompt_text(question: str, thinkers: Sequence[str]) -> str:
    """Return the user's message of a deliberation.

    Args:
        question: As it was asked.
        thinkers: What each wrote, in the order in which they are shown.
    """
    shown = "\n\n".join(f"### Thinker #{place}\n{text}" for place, text in enumerate(thinkers, 1))
    return (
        f"{question}\n\n"
        "---\n"
        f"Everything above this line is a question. {len(thinkers)} thinkers have worked on it, none knowing of the "
        f"others. Their work follows in random order. {CUT} stands where a long text was shortened.\n\n"
        f"{shown}\n\n"
        "---\n"
        "Now answer the question yourself. Begin with an examination between <think> and </think>: take the thinkers "
        "one after another, check each step and each figure, and hold the result against every demand of the question; "
        "name the first mistake of each who made one. Do not count heads: many may share one mistake, and one alone "
        "may be right. If none is right, work it out anew from what holds.\n"
        "After </think> write the reply to the question and nothing else: complete, in exactly the form, length and "
        "language that the question asks for, without a word about thinkers."
    )


def make_prompt(
    session: Session,
    question: str,
    drafts: Sequence[Draft],
    *,
    new_tokens: int,
    side_by_side: int = 1,
    budget: int | None = None,
    seed: int = 0,
) -> list[int]:
    """Return the tokens of a deliberation's prompt.

    Args:
        session: Whose tokenizer, chat template and context count.
        question: As it was asked.
        drafts: By index; they are shuffled by the seed.
        new_tokens: Of the deliberation, for which room is left.
        side_by_side: How many deliberations share the context.
        budget: Tokens that all drafts may have together; None: what the context has left.
        seed: Of the order.

    Raises:
        UserError: The context has no room for a useful part of each; the message says what would fit.
    """
    assert drafts
    order = np.random.default_rng([seed, len(drafts)]).permutation(len(drafts))
    shuffled = [drafts[place] for place in order]
    _check_budget(budget, len(drafts))
    texts = [_TAGS.sub("", draft.text).strip() for draft in drafts]
    # What was promised before they were sampled is kept, though it may come out a few tokens short.
    least = sum(min(len(session.tokenize(text)), LEAST_SHARE // 2) for text in texts)
    allowed = _USUAL_BUDGET if budget is None else budget
    if session.context is not None:
        left = session.context - _frame(session, question, drafts) - side_by_side * new_tokens
        allowed = left if budget is None else min(left, budget)
    while allowed >= least:
        texts = prune(session, shuffled, allowed)
        prompt = session.chat_prompt(prompt_text(question, texts))
        # Tokens of parts do not add up exactly to those of the whole.
        over = len(prompt) + side_by_side * new_tokens - session.context if session.context is not None else 0
        if over <= 0:
            return prompt
        allowed -= max(over, 8)
    raise _no_room(session, question, len(drafts), new_tokens, side_by_side)


def check_room(
    session: Session,
    question: str,
    count: int,
    *,
    new_tokens: int,
    side_by_side: int = 1,
    budget: int | None = None,
) -> None:
    """Raise unless a deliberation over some drafts has room, whatever they will be.

    Raises:
        UserError: It may have none; the message says what fits.
    """
    _check_budget(budget, count)
    if session.context is None:
        return
    left = session.context - _frame(session, question, [_LONG] * count) - side_by_side * new_tokens
    if left < _least(new_tokens) * count:
        raise _no_room(session, question, count, new_tokens, side_by_side)


def _least(new_tokens: int) -> int:
    """Return how many tokens of a trajectory there must be room for, if it can have that many."""
    return min(LEAST_SHARE, new_tokens)


def _check_budget(budget: int | None, count: int) -> None:
    if budget is not None and budget < LEAST_SHARE * count:
        raise UserError(
            f"a budget of {budget} tokens leaves {count} trajectories less than {LEAST_SHARE} each: give "
            f"{LEAST_SHARE * count} or more, or leave it out"
        )


def _no_room(session: Session, question: str, count: int, new_tokens: int, side_by_side: int) -> UserError:
    context = session.context
    assert context is not None
    frame = _frame(session, question, [_LONG] * count)
    left = context - frame - _least(new_tokens) * count
    answers = (
        f"{side_by_side} answers of {new_tokens} tokens" if side_by_side > 1 else f"an answer of {new_tokens} tokens"
    )
    fits = [f"--new-tokens {left // side_by_side} fits"] if left >= side_by_side else []

    def is_too_many(fewer: int) -> bool:
        rest = context - _frame(session, question, [_LONG] * fewer) - side_by_side * new_tokens
        return rest < _least(new_tokens) * fewer

    if fewer := bisect.bisect_left(range(1, count), True, key=is_too_many):
        fits.append(f"--k {fewer} fits")
    return UserError(
        f"no room to deliberate: the model's context of {context} tokens has to hold the question and the "
        f"instructions ({frame}), {answers}, and at least {_least(new_tokens)} of each of {count} trajectories: "
        f"{', or '.join(fits) or 'shorten the question'}, or vote (--method vote, for qad eval --methods vote)"
    )


def _frame(session: Session, question: str, drafts: Sequence[Draft]) -> int:
    """Return the tokens of a prompt without what the thinkers wrote, but with what is said of those cut off."""
    texts = ["" if draft.ended else CUT_OFF for draft in drafts]
    return len(session.chat_prompt(prompt_text(question, texts)))


def prune(session: Session, drafts: Sequence[Draft], budget: int) -> list[str]:
    """Return the texts of drafts, shortened so that they have about ``budget`` tokens together."""
    texts = [_TAGS.sub("", draft.text).strip() for draft in drafts]
    lengths = [len(session.tokenize(text)) for text in texts]
    pruned = []
    for draft, text, length, share in zip(drafts, texts, lengths, shares(lengths, budget), strict=True):
        shown = text if length <= share else _shorten(session, draft.text, share)
        pruned.append(shown if draft.ended else f"{shown}{CUT_OFF}")
    return pruned


def shares(lengths: Sequence[int], budget: int) -> list[int]:
    """Return how many tokens each text may keep: the same for all, and what short ones leave goes to the others."""
    given = [0] * len(lengths)
    left = budget
    for rest, place in enumerate(sorted(range(len(lengths)), key=lengths.__getitem__)):
        given[place] = min(lengths[place], left // (len(lengths) - rest))
        left -= given[place]
    return given


def _shorten(session: Session, text: str, share: int) -> str:
    """Return the answer of a text, whole if it fits, and as much of the end of its thoughts as then fits."""
    answer = strip_thinking(text)
    thoughts = text[: text.rfind(answer)] if answer else text
    thoughts, answer = (_TAGS.sub("", part).strip() for part in (thoughts, answer))
    needed = len(session.tokenize(answer))
    if needed >= share:
        return _end(session, answer, share)
    end = _end(session, thoughts, share - needed) if thoughts else ""
    return "\n\n".join(part for part in (end, answer) if part)


def _end(session: Session, text: str, tokens: int) -> str:
    """Return the end of a text, from the beginning of a line or sentence on if one is near."""
    everything = session.tokenize(text)
    room_left = tokens - len(session.tokenize(CUT + " "))
    if len(everything) <= tokens:
        return text
    if room_left <= 0:
        return ""
    # The first token may be a part of a character.
    end = session.detokenize(everything[-room_left:]).lstrip("\ufffd")
    boundary = _BOUNDARY.search(end, 0, len(end) // 2)
    return f"{CUT} {end[boundary.end() :] if boundary else end}".strip()
