"""What a question is thought over with, and what suits which model."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from qad.errors import UserError, unknown_name
from qad.runtimes import Sampling
from qad.think.confidence import Measure

Method = Literal["vote", "weighted", "best", "deliberate", "auto"]
METHODS: tuple[str, ...] = get_args(Method)

# tiny: at temperature 1 the votes of SmolLM2-135M are no better than its greedy answer (LOG.md); 0.6 and 0.95 are also
# what the makers of the R1 distillations, of 1.5B parameters and more, advise. large: HeavySkill's (arXiv 2605.02396).
PRESETS = {
    "tiny": Sampling(temperature=0.6, top_p=0.95),
    "large": Sampling(temperature=1.0, top_p=0.95, top_k=10),
}
_LARGE = 7e9
# A model that is sold as one of seven billions may have a few less.
_TOLERANCE = 0.9


@dataclass(frozen=True)
class ThinkOptions:
    """How a question is thought over.

    Attributes:
        k: Trajectories.
        method: ``vote``: the answer that most gave; ``weighted``: the same, by confidence; ``best``: the text with the
            highest confidence, or the highest score; ``deliberate``: one more pass over all; ``auto``: ``vote`` where
            more than half of the trajectories give answers that can be compared, else ``deliberate``.
        sampling: Rule and seed.
        new_tokens: Most tokens of a trajectory, and of a deliberation.
        certainty: When to stop early: 1 when the undecided cannot change the result, below 1 when they change it with
            at most that much less probability, None never.
        wave: Trajectories at a time; None: half of k (rounded up) where a vote may stop early, else k.
        drop: Drop a trajectory whose confidence falls below that of all that have ended. It then has no vote, so that
            the result may be another: not with certainty 1.
        measure, window: Of confidence, see ``qad.think.confidence``.
        summary_k: Deliberations side by side; their answers are voted on where they can be compared.
        iterations: Rounds of deliberation, each over the texts of the one before.
        budget: Tokens of all trajectories in a deliberation's prompt; None: what the context has left.
        stop: Texts at which a trajectory ends.
    """

    k: int = 8
    method: Method = "auto"
    sampling: Sampling = PRESETS["tiny"]
    new_tokens: int = 512
    certainty: float | None = 1.0
    wave: int | None = None
    drop: bool = False
    measure: Measure = "lowest"
    window: int = 64
    summary_k: int = 1
    iterations: int = 1
    budget: int | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise unknown_name("method", self.method, list(METHODS))
        for name in ("k", "new_tokens", "window", "summary_k", "iterations"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} = {getattr(self, name)} is impossible: 1 or more")
        if self.wave is not None and self.wave < 1:
            raise UserError(f"waves of {self.wave} trajectories are impossible: 1 or more")
        if self.certainty is not None and not 0.5 <= self.certainty <= 1:
            raise UserError(
                f"a confidence of {self.certainty} is impossible: at least 0.5, and 1 to stop only when sure"
            )
        if self.drop and self.certainty == 1:
            raise UserError(
                "dropping trajectories may change the vote, so it does not go with exact stopping: give a confidence "
                "below 1, such as 0.95, or switch early stopping off with --full"
            )
        if self.method not in ("deliberate", "auto") and (self.summary_k > 1 or self.iterations > 1 or self.budget):
            raise UserError(
                f"the method {self.method} deliberates on nothing, so a number of deliberations, of rounds or of their "
                "tokens means nothing: leave it out, or give --method deliberate"
            )
        if self.k > 1 and self.sampling.temperature == 0:
            raise UserError(f"{self.k} trajectories at temperature 0 are all the same: give a temperature above 0")
        if self.measure not in get_args(Measure):
            raise unknown_name("measure of confidence", self.measure, list(get_args(Measure)))

    @property
    def at_once(self) -> int:
        """How many trajectories run side by side."""
        if self.wave is not None:
            return min(self.wave, self.k)
        early = self.certainty is not None and self.method in ("vote", "weighted", "auto")
        return math.ceil(self.k / 2) if early else self.k


def preset_for(source: str | Path) -> tuple[str, str]:
    """Return the name of the preset that suits a model, and why."""
    from qad.model_facts import model_facts

    try:
        facts = model_facts(Path(source))
    except UserError:
        return "tiny", "the number of its parameters is not known"
    parameters = facts.parameters + (0 if facts.tied_head else facts.embedding_parameters)
    name = "large" if parameters >= _TOLERANCE * _LARGE else "tiny"
    return name, f"{parameters / 1e6:,.0f}M parameters"
