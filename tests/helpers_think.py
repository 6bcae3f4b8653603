"""What the tests of thinking share."""

from pathlib import Path

from qad import export
from qad.runtimes import Sampling, Trajectory
from tests.helpers_models import make_artifact

WARM = Sampling(temperature=0.8, top_p=0.95, seed=3)
# With these the random model gives short texts, some of them the same: answers of the kind "text".
BRIEF = {"new_tokens": 14, "stop": ("a",)}
SUM = "What is 2 + 3? Reply with the number only."


def make_random_run(run: Path) -> Path:
    """Make a run with a GGUF file: a model with random weights, quick and never at a loss for words."""
    artifact = make_artifact(run, "llama-tied", max_position_embeddings=2048)
    export.get("gguf").write(artifact, run / "model.gguf")
    return run


def cool(seed: int) -> Sampling:
    return Sampling(temperature=0.4, seed=seed)


def tokens(trajectories: list[Trajectory]) -> list[list[int]]:
    return [one.tokens for one in trajectories]
