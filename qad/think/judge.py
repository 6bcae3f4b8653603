"""What the answers of trajectories are, and how they are compared.

What can be compared: an answer that a text marks as one (``qad.final_answer``), or, where the kind is given, one that
could be found in a text that ended by itself. ``auto`` votes if more than half of K have one. A text that was cut off
has the answer that it marks, or none.
"""

from collections.abc import Callable, Sequence

from qad.algebra import is_installed
from qad.errors import UserError
from qad.final_answer import Kind, answer_of
from qad.think.options import ThinkOptions
from qad.think.trajectory_state import TrajectoryState
from qad.think.vote import Vote, vote

Printer = Callable[[str], str | None]
"""Returns what a program prints, None if it fails. To run what a model wrote takes a sandbox: ``qad.evals.sandbox``."""


class Judge:
    """What answers are, and which of them is the result.

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

    def rank(self, state: TrajectoryState) -> tuple[bool, bool, float]:
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
