"""What is told while a question is thought over."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

State = Literal["running", "stop", "length", "context", "lost", "dropped", "interrupted", "spared"]
"""What is known of a trajectory: that it runs, why it ended (see ``Trajectory``), or that it was never begun."""


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
"""Takes an event in; what it raises ends the sampling."""
