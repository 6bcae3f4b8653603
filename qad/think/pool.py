"""Trajectories of one prompt are sampled side by side, and no more of them than the result needs.

They run in waves: a vote that half of them can decide need not begin the other half. Trajectory i draws from the i-th
random stream whatever wave it is in, so that waves and early stopping change what is sampled, never what an answer
would have been (as far as the engine gives the same bits, see the runtime's ``sample``).
"""

import dataclasses
import time
from collections.abc import Iterable, Sequence
from typing import Literal

from qad import interrupts
from qad.errors import OtherModel, UserError
from qad.runtimes import Session, Step, Trajectory, Work
from qad.think.confidence import Running
from qad.think.early_stop import is_hopeless, suffices
from qad.think.events import Event, OnEvent, State
from qad.think.judge import Judge
from qad.think.opening_tag import opening, with_opening
from qad.think.options import ThinkOptions
from qad.think.trajectory_state import TrajectoryState


class NoConfidenceError(UserError):
    """A method needs log-probabilities that there are not."""


class Pool:
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
        judge: Judge,
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
        self.states: dict[int, TrajectoryState] = {}
        self.works: list[Work] = []
        self.interrupted = False
        self.failure: UserError | None = None

    def run(self, k: int, at_once: int, *, early: bool) -> None:
        """Sample k trajectories, some at a time; ``early``: stop when the judge has enough."""
        self._k, self._early = k, early
        try:
            for first in range(0, k, at_once):
                if self.interrupted or self.failure or (early and suffices(self._judge, self.states, k)):
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
    def ended(self) -> dict[int, TrajectoryState]:
        """Those that have ended by themselves, by index."""
        return {index: one for index, one in self.states.items() if one.ended}

    def _wave(self, first: int, count: int) -> None:
        options = self._options
        for index in range(first, first + count):
            self.states[index] = TrajectoryState(Running(options.measure, options.window, options.new_tokens))
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
                if not self.ended or isinstance(error, (NoConfidenceError, OtherModel)):
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
            if self._early and is_hopeless(self._judge, index, self.states, self._k):
                state.reason = "dropped"
                self._tell(index, state, "", "dropped")
                return [step.index]
            return None
        if step.reason == "lost":
            state.reason = step.reason
            self._tell(index, state, step.text, "lost")
            return None
        if self._judge.needs_confidence and not state.running.known and state.tokens:
            raise NoConfidenceError(
                f"the method {self._options.method}{' with --drop' if self._options.drop else ''} goes by "
                "log-probabilities, which this server does not tell: use --method vote"
            )
        state.reason = step.reason
        state.answer = self._judge.answer(state.text, step.reason)
        self._tell(index, state, step.text, step.reason)
        running = any(one.reason is None for one in self.states.values())
        if self._early and running and suffices(self._judge, self.states, self._k):
            return range(count)
        return None

    def _tell(
        self,
        index: int,
        state: TrajectoryState | None,
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
