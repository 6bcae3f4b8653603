"""A question is asked K times, side by side, and becomes one answer.

Trajectories run in waves: a vote that half of them can decide need not begin the other half. Trajectory i draws from
the i-th random stream whatever wave it is in, so that waves and early stopping change what is sampled, never what an
answer would have been (as far as the engine gives the same bits, see the runtime's ``sample``).

What can be compared: an answer that a text marks as one (``qad.final_answer``), or, where the kind is given, one that
could be found in a text that ended by itself. ``auto`` votes if more than half of K have one. A text that was cut off
has the answer that it marks, or none.
"""

import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from qad import interrupts
from qad.algebra import is_installed
from qad.errors import UserError
from qad.final_answer import Kind, answer_of, groups, strip_thinking
from qad.runtimes import Reason, Sampling, Session, Step, Trajectory, Work
from qad.think.confidence import Running, weight
from qad.think.consensus import chance_unchanged, is_decided
from qad.think.deliberate import Draft, check_room, make_prompt
from qad.think.options import ThinkOptions
from qad.think.thoughts import opening, with_opening
from qad.think.vote import Vote, vote

Printer = Callable[[str], str | None]
"""Returns what a program prints, None if it fails. To run what a model wrote takes a sandbox: ``qad.evals.sandbox``."""

Scorer = Callable[[str, str], float]
"""Returns how good a text is as an answer to a question: of a reward model, higher is better."""

State = Literal["running", "stop", "length", "context", "lost", "dropped", "interrupted", "spared"]
"""What is known of a trajectory: that it runs, why it ended (see ``Trajectory``), or that it was never begun."""

# Reasons of trajectories that did not come to an end of their own: they have no vote.
UNENDED = ("dropped", "lost", "interrupted")

# Trajectories that must have ended before another is dropped for its confidence.
_ENDED_BEFORE_DROPPING = 3


@dataclass(frozen=True)
class Event:
    """What is told while a question is thought over.

    Attributes:
        phase: What runs.
        round: Of deliberations, from 0.
        index: Which trajectory or deliberation.
        tokens: That it has.
        confidence: Its confidence so far, a mean log-probability.
        text: What is new.
        state: Whether it runs, or why not.
        answer: That was found in it when it ended.
    """

    phase: Literal["trajectory", "deliberation"]
    round: int
    index: int
    tokens: int
    confidence: float
    text: str
    state: State
    answer: str | None = None


OnEvent = Callable[[Event], None]


@dataclass
class Thought:
    """What came of a question.

    Attributes:
        answer: The answer in short, where one was found.
        text: The reply: of the representative of a vote, of the best, or of the deliberation, without its thoughts.
        method: That gave it; never ``auto``.
        vote: Over trajectories, or over deliberations; None where nothing was voted on.
        trajectories: Those that were begun, by index. Those with the reason ``dropped``, ``lost`` or
            ``interrupted`` have no vote.
        answers: Of each trajectory.
        confidences: Of each trajectory, a mean log-probability.
        deliberations: Of all rounds, in order.
        tokens: That were made, deliberations included.
        tokens_saved: Tokens that early stopping did not make, a low estimate: those that were stopped or never begun
            are taken to become as long as those that ended are on average, which were the quicker ones.
        seconds: All in all.
        works: What each call of the engine cost.
        notes: What the user should know: what was not done, and why.
        interrupted: An interrupt ended the sampling; what had ended by then was judged.
    """

    answer: str | None
    text: str
    method: str
    vote: Vote | None
    trajectories: list[Trajectory]
    answers: list[str | None]
    confidences: list[float]
    deliberations: list[Trajectory]
    tokens: int
    tokens_saved: int
    seconds: float
    works: list[Work] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    interrupted: bool = False


def think(
    session: Session,
    question: str,
    options: ThinkOptions | None = None,
    *,
    kind: Kind | None = None,
    scorer: Scorer | None = None,
    printer: Printer | None = None,
    on_event: OnEvent | None = None,
) -> Thought:
    """Ask a model a question K times and return one answer.

    Args:
        session: The opened model.
        question: The user's message, complete.
        options: How.
        kind: How answers are compared; None: those that are marked as answers, as mathematics.
        scorer: What ``best`` goes by, in place of confidence. Every trajectory is then sampled to its end.
        printer: How answers of the kind ``code`` are compared: by what they print, those that print nothing by their
            text. Without it by their form, see ``qad.final_answer.same``.
        on_event: Called with every token and ending. A KeyboardInterrupt that it or the engine raises ends the
            sampling: what had ended is judged, and the thought says so. One while answers are compared ends that: then
            there is no vote, and the texts are there.

    Raises:
        UserError: No question, or no room for what was asked; the message says what fits. What goes wrong once
            trajectories have ended is told in the notes.
    """
    options = options or ThinkOptions()
    if not question.strip():
        raise UserError("the question is empty: say what to ask")
    if scorer is not None and options.method != "best":
        raise UserError(f"the method {options.method} has no use for a scorer: use it with best")
    began = time.perf_counter()
    prompt = session.chat_prompt(question)
    if options.method == "deliberate":
        # Before K trajectories are sampled in vain.
        _check_room(session, question, options)
    judge = _Judge(options, kind, scored=scorer is not None, printer=printer)
    pool = _Pool(session, prompt, options, judge, on_event)
    pool.run(options.k, options.at_once, early=True)
    thought = _conclude(session, question, options, judge, pool, scorer, on_event)
    thought.seconds = time.perf_counter() - began
    return thought


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
    pool = _deliberation(session, question, drafts, options, _Judge(options, None), round_, on_event)
    if pool.interrupted:
        raise KeyboardInterrupt
    return pool.trajectories


def _deliberation(
    session: Session,
    question: str,
    drafts: Sequence[Draft],
    options: ThinkOptions,
    judge: "_Judge",
    round_: int,
    on_event: OnEvent | None,
) -> "_Pool":
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
    pool = _Pool(session, prompt, own, judge, on_event, round_)
    pool.run(options.summary_k, options.summary_k, early=False)
    return pool


def lacks_room(session: Session, question: str, options: ThinkOptions) -> str | None:
    """Return why a deliberation, should one be needed, would have no room; None if it has, or none can be needed.

    A question that has no room itself is left to the sampling, which refuses it.
    """
    if options.method not in ("deliberate", "auto"):
        return None
    if session.context is not None and len(session.chat_prompt(question)) >= session.context:
        return None
    try:
        _check_room(session, question, options)
    except UserError as error:
        return str(error)
    return None


def _check_room(session: Session, question: str, options: ThinkOptions) -> None:
    for count in {options.k, options.summary_k} if options.iterations > 1 else {options.k}:
        check_room(
            session,
            question,
            count,
            new_tokens=options.new_tokens,
            side_by_side=options.summary_k,
            budget=options.budget,
        )


class _Judge:
    """What answers are, and when they suffice.

    Attributes:
        kind: How they are compared.
        notes: What the user should know of that.
    """

    def __init__(
        self, options: ThinkOptions, kind: Kind | None, *, scored: bool = False, printer: Printer | None = None
    ) -> None:
        self.options = options
        self._printer = printer
        self._printed: dict[str, str | None] = {}
        self.given: Kind | None = kind
        self.scored = scored
        self.notes: list[str] = []
        self.kind: Kind = kind or "math"
        if self.kind == "math" and not is_installed():
            if kind == "math":
                raise UserError("comparing answers as mathematics needs math-verify: pip install 'qad[eval]'")
            self.kind = "text"
            self.notes.append("answers were compared as text, because math-verify is missing: pip install 'qad[eval]'")

    @property
    def needs_confidence(self) -> bool:
        """Whether the result goes by confidence."""
        options = self.options
        return options.drop or options.method == "weighted" or (options.method == "best" and not self.scored)

    def answer(self, text: str, reason: str) -> str | None:
        """Return the answer in a text that ended for a reason."""
        return answer_of(text, reason, self.given)

    def suffices(self, states: "dict[int, _State]", k: int) -> bool:
        """Return whether the trajectories that have ended decide the result, whatever the others of k become."""
        options = self.options
        ended = {index: state for index, state in sorted(states.items()) if state.ended}
        if options.certainty is None or self.scored or not ended:
            return False
        if options.method == "best":
            return not self.contenders(states, k)
        if options.method not in ("vote", "weighted", "auto"):
            return False
        if options.method == "auto" and not self.comparable([state.answer for state in ended.values()], k):
            return False
        classes = groups(*self.ballots([state.answer for state in ended.values()]))
        votes = dict(zip(ended, classes, strict=True))
        undecided = [index for index in range(k) if index not in states or states[index].reason is None]
        weights = ceilings = None
        if options.method == "weighted":
            weights = {index: weight(state.running.value) for index, state in ended.items()}
            ceilings = {index: weight(states[index].running.ceiling) if index in states else 1.0 for index in undecided}
        if options.certainty < 1:
            return chance_unchanged(votes, len(undecided), weights) >= options.certainty
        return is_decided(votes, undecided, weights, ceilings)

    def contenders(self, states: "dict[int, _State]", k: int) -> list[int]:
        """Return the undecided trajectories of k that may still become the best."""
        best = max(((self.rank(state), -index) for index, state in states.items() if state.ended), default=None)
        found = []
        for index in range(k):
            state = states.get(index)
            if state is None or state.reason is None:
                ceiling = 0.0 if state is None else state.running.ceiling
                if best is None or ((True, True, ceiling), -index) > best:
                    found.append(index)
        return found

    def rank(self, state: "_State") -> tuple[bool, bool, float]:
        """Return what makes a trajectory the best: it ended by itself, has an answer where one is due, is confident."""
        return state.reason == "stop", self.given is None or state.answer is not None, state.running.value

    def ballots(self, answers: Sequence[str | None]) -> tuple[list[str | None], Kind]:
        """Return what stands for each answer in a vote, and how it is compared."""
        if self.given != "code" or self._printer is None:
            return list(answers), self.kind
        return [
            self._print(answer) or answer if self._print(answer) is not None else None for answer in answers
        ], "text"

    def _print(self, program: str | None) -> str | None:
        """Return what a program prints; None if it fails or is none."""
        if program is None or self._printer is None:
            return None
        if program not in self._printed:
            printed = self._printer(program)
            self._printed[program] = None if printed is None else printed.strip()
        return self._printed[program]

    def comparable(self, answers: Sequence[str | None], k: int) -> bool:
        """Return whether enough of k trajectories have answers that can be compared."""
        # Two programs are seldom written alike: only what they print can be compared.
        found = [self._print(answer) or None for answer in answers] if self.given == "code" else answers
        return 2 * sum(answer is not None for answer in found) > k

    def vote(self, answers: Sequence[str | None], weights: Sequence[float] | None = None) -> Vote:
        """Return the vote over answers."""
        ballots, kind = self.ballots(answers)
        return vote(ballots, kind, weights)


@dataclass
class _State:
    """A trajectory as its steps tell it."""

    running: Running
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    reason: Reason | None = None
    answer: str | None = None

    @property
    def ended(self) -> bool:
        """Whether it has ended by itself."""
        return self.reason is not None and self.reason not in UNENDED


class _NoConfidence(UserError):
    """A method needs log-probabilities that there are not."""


class _Pool:
    """Trajectories of one prompt, those that have ended and those that run.

    Attributes:
        trajectories: Those that have begun, by index.
        states: The same, as their steps told them.
        works: What each call of the engine cost.
        interrupted: An interrupt came.
        failure: Why the engine failed when some had ended already.
    """

    def __init__(
        self,
        session: Session,
        prompt: Sequence[int],
        options: ThinkOptions,
        judge: _Judge,
        on_event: OnEvent | None,
        round_: int | None = None,
    ) -> None:
        self._session = session
        self._prompt = prompt
        self._opening = opening(session, prompt)
        self._options = options
        self._judge = judge
        self._on_event = on_event
        self._round = round_
        self._k = 0
        self._early = False
        self.trajectories: list[Trajectory] = []
        self.states: dict[int, _State] = {}
        self.works: list[Work] = []
        self.interrupted = False
        self.failure: UserError | None = None

    def run(self, k: int, at_once: int, *, early: bool) -> None:
        """Sample k trajectories, some at a time; ``early``: stop when the judge has enough."""
        self._k, self._early = k, early
        try:
            for first in range(0, k, at_once):
                if self.interrupted or self.failure or (early and self._judge.suffices(self.states, k)):
                    break
                self._wave(first, min(at_once, k - first))
        except KeyboardInterrupt:
            # Between two calls of the engine, while answers were compared.
            self.interrupted = True
            for index in range(len(self.trajectories), len(self.states)):
                self.trajectories.append(self._cut_off(index, 0.0))
                self.states[index].reason = self.trajectories[-1].reason
        for index in range(len(self.trajectories), k):
            self._tell(index, None, "", "spared")

    @property
    def ended(self) -> dict[int, _State]:
        """Those that have ended by themselves, by index."""
        return {index: one for index, one in self.states.items() if one.ended}

    def _wave(self, first: int, count: int) -> None:
        options = self._options
        for index in range(first, first + count):
            self.states[index] = _State(Running(options.measure, options.window, options.new_tokens))
        began = time.perf_counter()
        try:
            made = self._session.sample(
                self._prompt,
                count,
                dataclasses.replace(options.sampling, first=options.sampling.first + first),
                new_tokens=options.new_tokens,
                on_token=lambda step: self._take(first, count, step),
                stop=options.stop,
            )
        except (KeyboardInterrupt, UserError) as error:
            if isinstance(error, UserError):
                if not self.ended or isinstance(error, _NoConfidence):
                    raise
                self.failure = error
            self.interrupted = self.failure is None
            made = [self._cut_off(index, time.perf_counter() - began) for index in range(first, first + count)]
        else:
            for trajectory in made:
                trajectory.index += first
                trajectory.text = with_opening(self._opening, trajectory.text)
        self.works.append(self._session.work)
        self.trajectories += made
        for trajectory in made:
            state = self.states[trajectory.index]
            if state.reason is None:
                state.reason = self._why_unended()
                self._tell(trajectory.index, state, "", state.reason)

    def _why_unended(self) -> Literal["dropped", "lost", "interrupted"]:
        """Return why trajectories that were running when a call of the engine ended have no end of their own."""
        if self.interrupted:
            return "interrupted"
        return "lost" if self.failure else "dropped"

    def _cut_off(self, index: int, seconds: float) -> Trajectory:
        """Return a trajectory of a call that did not return."""
        state = self.states[index]
        read = len(self._prompt)
        reason = state.reason or self._why_unended()
        return Trajectory(index, state.tokens, state.logprobs, state.text, reason, read, seconds, seconds, seconds)

    def _take(self, first: int, count: int, step: Step) -> Iterable[int] | None:
        # One that was lost in a callback of the engine.
        interrupts.check()
        index = first + step.index
        state = self.states[index]
        state.text += step.text if state.text else with_opening(self._opening, step.text)
        if step.token is not None:
            state.tokens.append(step.token)
            state.logprobs.append(step.logprob)
            state.running.add(step.logprob)
        if step.reason is None:
            self._tell(index, state, step.text, "running")
            if self._is_hopeless(index, state):
                state.reason = "dropped"
                self._tell(index, state, "", "dropped")
                return [step.index]
            return None
        if step.reason == "lost":
            state.reason = step.reason
            self._tell(index, state, step.text, "lost")
            return None
        if self._judge.needs_confidence and not state.running.known and state.tokens:
            raise _NoConfidence(
                f"the method {self._options.method}{' with --drop' if self._options.drop else ''} goes by "
                "log-probabilities, which this server does not tell: use --method vote"
            )
        state.reason = step.reason
        state.answer = self._judge.answer(state.text, step.reason)
        self._tell(index, state, step.text, step.reason)
        running = any(one.reason is None for one in self.states.values())
        if self._early and running and self._judge.suffices(self.states, self._k):
            return range(count)
        return None

    def _is_hopeless(self, index: int, state: _State) -> bool:
        """Return whether a running trajectory is not worth its tokens, by its confidence."""
        options = self._options
        if not self._early or self._judge.scored:
            return False
        if options.drop:
            ended = [one.running.value for one in self.ended.values()]
            return len(ended) >= _ENDED_BEFORE_DROPPING and state.running.ceiling < min(ended)
        if options.method == "best" and options.certainty is not None and self.ended:
            return index not in self._judge.contenders(self.states, self._k)
        return False

    def _tell(
        self,
        index: int,
        state: _State | None,
        text: str,
        what: State,
    ) -> None:
        if self._on_event is not None:
            self._on_event(
                Event(
                    phase="trajectory" if self._round is None else "deliberation",
                    round=self._round or 0,
                    index=index,
                    tokens=0 if state is None else len(state.tokens),
                    confidence=-float("inf") if state is None else state.running.value,
                    text=text,
                    state=what,
                    answer=None if state is None else state.answer,
                )
            )


def _conclude(
    session: Session,
    question: str,
    options: ThinkOptions,
    judge: _Judge,
    pool: _Pool,
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
    judge: _Judge,
    pool: _Pool,
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
                _deliberate(session, question, options, judge, thought, on_event)
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
                _reply(pool.trajectories[thought.vote.index].text),
            )
            return
        thought.notes.append("no trajectory has an answer to vote on: the text that the model was surest of is shown")
        thought.method = "best"
    best = _best(question, pool, judge, scorer)
    thought.answer, thought.text = pool.states[best].answer, _reply(pool.states[best].text)


def _best(question: str, pool: _Pool, judge: _Judge, scorer: Scorer | None) -> int:
    """Return the index of the best trajectory of those that ended; of equals, the first."""
    ended = pool.ended
    if scorer is None:
        return max(ended, key=lambda index: (judge.rank(ended[index]), -index))
    scores = {index: scorer(question, _reply(state.text)) for index, state in ended.items()}
    return max(ended, key=lambda index: (scores[index], -index))


def _deliberate(
    session: Session,
    question: str,
    options: ThinkOptions,
    judge: _Judge,
    thought: Thought,
    on_event: OnEvent | None,
) -> None:
    """Deliberate over a thought's trajectories, round after round, and put the result into it."""
    drafts = [Draft(one.text, one.reason == "stop") for one in thought.trajectories if one.reason not in UNENDED]
    drafts = [draft for draft in drafts if draft.text.strip()]
    if not drafts:
        raise UserError("no trajectory wrote anything: there is nothing to deliberate on")
    for round_ in range(options.iterations):
        pool = _deliberation(session, question, drafts, options, judge, round_, on_event)
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
        thought.vote, best = None, _best(question, pool, judge, None)
        thought.answer, thought.text = pool.states[best].answer, _reply(pool.states[best].text)
        if options.summary_k > 1 and judge.comparable(answers, options.summary_k):
            thought.vote = judge.vote(answers)
            if thought.vote.index is not None:
                thought.answer, thought.text = answers[thought.vote.index], _reply(pool.states[thought.vote.index].text)
        if pool.interrupted or pool.failure:
            return


def _saved(pool: _Pool, k: int) -> int:
    """Return about how many tokens the trajectories that were stopped or never begun would have had more."""
    lengths = [len(one.tokens) for one in pool.ended.values()]
    if not lengths or pool.interrupted or pool.failure:
        return 0
    usual = sum(lengths) / len(lengths)
    stopped = [len(one.tokens) for one in pool.trajectories if one.reason == "dropped"]
    missing = [0] * (k - len(pool.trajectories))
    return round(sum(max(0.0, usual - made) for made in (*stopped, *missing)))


def _reply(text: str) -> str:
    """Return a text without its thoughts; all of it, if it has nothing else."""
    return strip_thinking(text) or text.strip()


__all__ = ["Event", "OnEvent", "Sampling", "Scorer", "ThinkOptions", "Thought", "deliberate", "think"]
