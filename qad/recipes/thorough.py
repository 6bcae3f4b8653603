"""thorough: for a GPU, or a night on a laptop: more text, more steps, noise before hard rounding."""

from qad.recipe import Recipe


def recipe() -> Recipe:
    """A hundred times the tokens of ``quick``, with checkpoints and evaluations on the way."""
    return Recipe(
        name="thorough",
        mix_tokens=2_000_000,
        steps=3000,
        batch_size=16,
        micro_batch=4,
        seq_len=512,
        calibration_tokens=65_536,
        lr=0.002,
        noise="partial",
        noise_until=0.3,
        held_out_tokens=32_768,
        eval_every=200,
        save_every=200,
    )
