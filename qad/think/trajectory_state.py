"""What is known of one trajectory while it is sampled."""

from dataclasses import dataclass, field

from qad.runtimes import Reason
from qad.think.confidence import Running

# Reasons of trajectories that did not come to an end of their own: they have no vote.
UNENDED = ("dropped", "lost", "interrupted")


@dataclass
class TrajectoryState:
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
