"""Trajectories become one answer, by the method that was asked for."""

from qad.errors import UserError
from qad.runtimes import Session
from qad.think.best import Scorer, best_of, reply
from qad.think.confidence import weight
from qad.think.deliberation import deliberate_in_rounds
from qad.think.events import OnEvent
from qad.think.judge import Judge
from qad.think.options import ThinkOptions
from qad.think.pool import Pool
from qad.think.thought import Thought


def conclude(
    session: Session,
    question: str,
    options: ThinkOptions,
    judge: Judge,
    pool: Pool,
    scorer: Scorer | None,
    on_event: OnEvent | None,
) -> Thought:
    """Return the thought that follows from trajectories."""
    answers = [pool.states[one.index].answer for one in pool.trajectories]
    confidences = [pool.states[one.index].running.value for one in pool.trajectories]
    thought = Thought(
        answer=None,
        text="",
        method=options.method,
        vote=None,
        trajectories=pool.trajectories,
        answers=answers,
        confidences=confidences,
        deliberations=[],
        tokens=sum(len(one.tokens) for one in pool.trajectories),
        tokens_saved=_saved(pool, options.k),
        seconds=0.0,
        works=pool.works,
        notes=judge.notes,
        interrupted=pool.interrupted,
    )
    if pool.failure:
        thought.notes.append(f"not all was sampled, what had ended was judged: {pool.failure}")
    try:
        if pool.ended:
            _decide(session, question, options, judge, pool, thought, scorer, on_event)
    except KeyboardInterrupt:
        thought.interrupted = True
        thought.notes.append("interrupted while the answers were compared: there is no result")
    return thought


def _decide(
    session: Session,
    question: str,
    options: ThinkOptions,
    judge: Judge,
    pool: Pool,
    thought: Thought,
    scorer: Scorer | None,
    on_event: OnEvent | None,
) -> None:
    """Put into a thought what follows from the trajectories that have ended, of which there are some."""
    answers, confidences = thought.answers, thought.confidences
    if options.method == "auto":
        thought.method = "vote" if judge.comparable(answers, options.k) else "deliberate"
    if thought.method == "deliberate":
        if pool.interrupted or pool.failure:
            thought.notes.append("not deliberated: what had ended was judged without")
        else:
            try:
                deliberate_in_rounds(session, question, options, judge, thought, on_event)
            except (UserError, KeyboardInterrupt) as error:
                thought.interrupted |= isinstance(error, KeyboardInterrupt)
                further = "not deliberated further" if thought.deliberations else "not deliberated"
                thought.notes.append(f"{further}: {error if isinstance(error, UserError) else 'interrupted'}")
        if thought.deliberations:
            return
        thought.method = "vote" if judge.comparable(answers, len(pool.ended)) else "best"
    if thought.method in ("vote", "weighted"):
        weights = [weight(value) for value in confidences] if thought.method == "weighted" else None
        thought.vote = judge.vote(answers, weights)
        if thought.vote.index is not None:
            thought.answer, thought.text = (
                answers[thought.vote.index],
                reply(pool.trajectories[thought.vote.index].text),
            )
            return
        thought.notes.append("no trajectory has an answer to vote on: the text that the model was surest of is shown")
        thought.method = "best"
    best = best_of(question, pool.ended, judge, scorer)
    thought.answer, thought.text = pool.states[best].answer, reply(pool.states[best].text)


def _saved(pool: Pool, k: int) -> int:
    """Return about how many tokens the trajectories that were stopped or never begun would have had more."""
    lengths = [len(one.tokens) for one in pool.ended.values()]
    if not lengths or pool.interrupted or pool.failure:
        return 0
    usual = sum(lengths) / len(lengths)
    stopped = [len(one.tokens) for one in pool.trajectories if one.reason == "dropped"]
    missing = [0] * (k - len(pool.trajectories))
    return round(sum(max(0.0, usual - made) for made in (*stopped, *missing)))
