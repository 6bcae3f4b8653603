"""What came of a question."""

from dataclasses import dataclass, field

from qad.runtimes import Trajectory, Work
from qad.think.vote import Vote


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
