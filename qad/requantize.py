"""Rounding a trained artifact again, for a format that does not carry its grid: the promise is given up, and said so.

The decoded weights are put on the nearest grid that the format has. What is made is an artifact like any other but for
its run hash: ``export.REQUANTIZED`` and the hash of the run. Exporters write it to their files, so that nobody can take
such a file for the trained weights, and ``qad verify`` reports it.

Shapes: N output features, K input features, T tokens, V vocabulary.
"""

import gc
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig

from qad import export
from qad.artifact import Artifact, save_artifact
from qad.errors import UserError
from qad.grid import Grid, get_grid
from qad.measure import Quality, measure, shifted_labels
from qad.model import load_model, load_tokenizer
from qad.runtimes.reference import build_model
from qad.tensor import QuantizedTensor, mse_scales, quantize

_TOKENS = 512
_CHUNK = 256
# Embedding and head may have a grid of their own where linear layers must share one.
_ENDS = ("model.embed_tokens.weight", "lm_head.weight")


@dataclass(frozen=True)
class Cost:
    """What rounding again cost on the built-in text.

    Attributes:
        teacher: The recipe's teacher, None if it cannot be loaded.
        before: KL(teacher || trained student) in nats per token, None without a teacher.
        after: KL(teacher || requantized student); without a teacher KL(trained student || requantized student).
        same_top: Share of the tokens for which the requantized student still ranks first what the other does.
        tokens: How many were compared.
    """

    teacher: str | None
    before: float | None
    after: float
    same_top: float
    tokens: int

    def __str__(self) -> str:
        if self.before is None:
            return (
                f"KL of the requantized to the trained student {self.after:.3g} nats per token, same top-1 "
                f"{self.same_top:.1%} ({self.tokens} tokens; the teacher cannot be loaded)"
            )
        return (
            f"KL to the teacher {self.before:.3g} as trained, {self.after:.3g} after rounding again "
            f"({self.tokens} tokens)"
        )


def nearest_grid(trained: Grid, columns: int, known: tuple[str, ...]) -> Grid | None:
    """Return the grid of a format that is nearest to a trained one, None if none fits the rows.

    Only plain grids are considered, whose scales can be searched. Nearest is the smallest width that holds at least as
    many bits (else the widest), and of these the smallest block.
    """
    fitting = [grid for grid in map(get_grid, known) if grid.is_plain and columns % grid.unit == 0]
    enough = [grid for grid in fitting if grid.bits >= trained.bits]
    if enough:
        return min(enough, key=lambda grid: (grid.bits, grid.block))
    return max(fitting, key=lambda grid: (grid.bits, -grid.block), default=None)


def _choose(artifact: Artifact, format_name: str) -> dict[str, str]:
    """Return the grid of each tensor: its own where the format carries it, else the nearest.

    Raises:
        UserError: A row that no grid of the format fits.
    """
    known = export.get(format_name).GRIDS
    chosen = {}
    for name, grid_name in artifact.grids.items():
        columns = artifact.shape(name)[1]
        grid = get_grid(grid_name) if grid_name in known else nearest_grid(get_grid(grid_name), columns, known)
        if grid is None:
            raise UserError(f"{name} has rows of {columns} values, which no grid of {format_name} divides")
        chosen[name] = grid.name
    return chosen


def _of_one_grid(chosen: dict[str, str]) -> dict[str, str]:
    """Return the same with all linear layers on the finest of their grids."""
    linear = {name for name in chosen if name not in _ENDS}
    finest = max((get_grid(chosen[name]) for name in linear), key=lambda grid: (grid.bits, -grid.block))
    return {name: finest.name if name in linear else grid for name, grid in chosen.items()}


def _save(artifact: Artifact, chosen: dict[str, str], run: Path) -> Artifact:
    """Save the artifact that an artifact becomes on other grids."""
    quantized: dict[str, QuantizedTensor] = {}
    for name, grid_name in chosen.items():
        if artifact.grids[name] == grid_name:
            # Saved when the file that it is a view of has long been asked for others.
            quantized[name] = artifact.quantized(name)
            continue
        grid, weight_NK = get_grid(grid_name), artifact.weight(name)
        quantized[name] = quantize(weight_NK, grid, mse_scales(weight_NK, grid), name=name)
    made = save_artifact(
        run,
        config=AutoConfig.from_pretrained(artifact.folder),
        tokenizer=load_tokenizer(str(artifact.folder)),
        quantized=quantized,
        kept={name: artifact.weight(name) for name in artifact.kept},
        tied_head=artifact.tied_head,
        forward_sha256=artifact.forward_sha256,
        recipe=artifact.recipe,
    )
    return replace(made, run_hash=export.REQUANTIZED + artifact.run_hash)


def requantized(artifact: Artifact, format_name: str, run: Path) -> tuple[Artifact, dict[str, str]]:
    """Put an artifact's weights on grids that a format carries.

    Args:
        artifact: As trained.
        format_name: The format.
        run: Folder to put what is made.

    Returns:
        The new artifact, and the new grid of each tensor that was rounded again.

    Raises:
        UserError: What keeps the format from carrying the artifact is not its grids.
    """
    chosen = _choose(artifact, format_name)
    trial = replace(artifact, grids=chosen)
    try:
        export.get(format_name).check(trial)
    except UserError:
        if len({grid for name, grid in chosen.items() if name not in _ENDS}) < 2:
            raise
        chosen = _of_one_grid(chosen)
        export.get(format_name).check(replace(artifact, grids=chosen))
    made = _save(artifact, chosen, run)
    return made, {name: grid for name, grid in chosen.items() if artifact.grids[name] != grid}


def _batches(artifact: Artifact, limit: int) -> list[dict[str, Any]]:
    text = resources.files("qad.data").joinpath("verify.txt").read_text(encoding="utf-8")
    tokens = load_tokenizer(str(artifact.folder))(text, add_special_tokens=False)["input_ids"][:_TOKENS]
    length = min(_CHUNK, limit, len(tokens))
    ids_BT = torch.tensor(tokens[: len(tokens) // length * length]).view(-1, length)
    ones_BT = torch.ones_like(ids_BT)
    return [{"input_ids": ids_BT, "attention_mask": ones_BT, "labels": shifted_labels(ids_BT, ones_BT)}]


def measure_cost(artifact: Artifact, made: Artifact) -> Cost:
    """Measure what rounding again cost, against the recipe's teacher where it can be loaded."""
    batches = _batches(artifact, artifact.config["max_position_embeddings"])
    teacher: nn.Module | None = None
    source = artifact.recipe.get("teacher")
    if isinstance(source, str):
        try:
            teacher = load_model(source).model
        except UserError:
            teacher = None

    def quality(student: Artifact, judge: nn.Module) -> Quality:
        found = measure(build_model(student), judge, batches)
        gc.collect()  # a model's weights, before the next one is made
        return found

    trained = None if teacher is None else quality(artifact, teacher)
    after = quality(made, build_model(artifact) if teacher is None else teacher)
    return Cost(
        teacher=str(source) if trained is not None else None,
        before=None if trained is None else trained.kl,
        after=after.kl,
        same_top=after.same_top1,
        tokens=after.tokens,
    )
