"""Which noise a tensor gets in an optimizer step."""

from dataclasses import dataclass

from qad.errors import unknown_name

NOISE_MODES = ("none", "uniform", "stochastic", "partial")  # in the order of csrc/qad.h


@dataclass(frozen=True)
class Noise:
    """Which noise one tensor gets in one optimizer step; ``qad.fake_quant`` says what the modes do.

    Attributes:
        mode: One of ``NOISE_MODES``.
        hard_share: Probability that a block is rounded hard in spite of the mode, 0 to 1.
        seed: Run seed.
        tensor: Index of the tensor in the plan.
        step: Optimizer step.
    """

    mode: str = "none"
    hard_share: float = 0.0
    seed: int = 0
    tensor: int = 0
    step: int = 0

    def __post_init__(self) -> None:
        if self.mode not in NOISE_MODES:
            raise unknown_name("noise mode", self.mode, list(NOISE_MODES))

    @property
    def is_hard(self) -> bool:
        """Whether every block is rounded hard, so that no random number is drawn."""
        return self.mode == "none" or self.hard_share >= 1.0


HARD = Noise()
