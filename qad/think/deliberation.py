"""Deliberations: trajectories over what other trajectories wrote, round after round."""

import dataclasses
from collections.abc import Sequence

from qad.errors import UserError
from qad.runtimes import Session, Trajectory
from qad.think.best import best_of, reply
from qad.think.deliberation_prompt import Draft, check_room, make_prompt
from qad.think.events import OnEvent
from qad.think.judge import Judge
from qad.think.options import ThinkOptions
from qad.think.pool import Pool
from qad.think.thought import Thought
from qad.think.trajectory_state import UNENDED


def deliberate(
    session: Session,
    question: str,
    drafts: Sequence[Draft],
    options: ThinkOptions,
    *,
    round_: int = 0,
    on_event: OnEvent | None = None,
) -> list[Trajectory]:
    """Return ``summary_k`` deliberations over what was written about a question.

    Args:
        session: The opened model.
        question: As it was asked.
        drafts: What was written.
        options: ``summary_k``, ``new_tokens``, ``sampling``, ``budget`` and ``stop`` count.
        round_: Of how many before: it chooses random streams of its own.
        on_event: As in ``think``.

    Raises:
        UserError: No room in the context.
    """
    pool = _sampled_round(session, question, drafts, options, Judge(options, None), round_, on_event)
    if pool.interrupted:
        raise KeyboardInterrupt
    return pool.trajectories


def _sampled_round(
    session: Session,
    question: str,
    drafts: Sequence[Draft],
    options: ThinkOptions,
    judge: Judge,
    round_: int,
    on_event: OnEvent | None,
) -> Pool:
    prompt = make_prompt(
        session,
        question,
        drafts,
        new_tokens=options.new_tokens,
        side_by_side=options.summary_k,
        budget=options.budget,
        seed=options.sampling.seed + round_,
    )
    # Streams that no trajectory has.
    first = options.sampling.first + options.k + round_ * options.summary_k
    own = dataclasses.replace(options, sampling=dataclasses.replace(options.sampling, first=first))
    pool = Pool(session, prompt, own, judge, on_event, round_)
    pool.run(options.summary_k, options.summary_k, early=False)
    return pool


def deliberate_in_rounds(
    session: Session,
    question: str,
    options: ThinkOptions,
    judge: Judge,
    thought: Thought,
    on_event: OnEvent | None,
) -> None:
    """Deliberate over a thought's trajectories, round after round, and put the result into it."""
    drafts = [Draft(one.text, one.reason == "stop") for one in thought.trajectories if one.reason not in UNENDED]
    drafts = [draft for draft in drafts if draft.text.strip()]
    if not drafts:
        raise UserError("no trajectory wrote anything: there is nothing to deliberate on")
    for round_ in range(options.iterations):
        pool = _sampled_round(session, question, drafts, options, judge, round_, on_event)
        thought.works += pool.works
        thought.tokens += sum(len(one.tokens) for one in pool.trajectories)
        thought.interrupted |= pool.interrupted
        ended = pool.ended
        if pool.interrupted or pool.failure:
            thought.notes.append(
                f"{pool.failure or 'interrupted'} while deliberating: "
                + ("what had ended was judged" if ended else "this round gave nothing, what was there before it counts")
            )
        if not ended:
            return
        thought.deliberations += pool.trajectories
        drafts = [Draft(one.text, one.reason == "stop") for one in ended.values()]
        answers = [state.answer for state in pool.states.values()]
        thought.vote, best = None, best_of(question, ended, judge, None)
        thought.answer, thought.text = pool.states[best].answer, reply(pool.states[best].text)
        if options.summary_k > 1 and judge.comparable(answers, options.summary_k):
            thought.vote = judge.vote(answers)
            if thought.vote.index is not None:
                thought.answer, thought.text = answers[thought.vote.index], reply(pool.states[thought.vote.index].text)
        if pool.interrupted or pool.failure:
            return


def lacks_room(session: Session, question: str, options: ThinkOptions) -> str | None:
    """Return why a deliberation, should one be needed, would have no room; None if it has, or none can be needed.

    A question that has no room itself is left to the sampling, which refuses it.
    """
    if options.method not in ("deliberate", "auto"):
        return None
    if session.context is not None and len(session.chat_prompt(question)) >= session.context:
        return None
    try:
        check_deliberations(session, question, options)
    except UserError as error:
        return str(error)
    return None


def check_deliberations(session: Session, question: str, options: ThinkOptions) -> None:
    """Raise a UserError that says what fits unless every round has room, whatever the trajectories will be."""
    for count in {options.k, options.summary_k} if options.iterations > 1 else {options.k}:
        check_room(
            session,
            question,
            count,
            new_tokens=options.new_tokens,
            side_by_side=options.summary_k,
            budget=options.budget,
        )
