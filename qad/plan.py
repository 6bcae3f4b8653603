"""Plans: which tensor gets which grid, and whether it can.

A plan maps every parameter name of a model to a grid's name or to ``KEEP``. Names are those of the Hugging Face model
(``model.layers.0.mlp.up_proj.weight``). A tied output head has no entry of its own: it is the embedding.
"""

from dataclasses import dataclass

from torch import nn

from qad.errors import UserError
from qad.grid import get_grid, grid_for_bits, grids_that_fit

KEEP = "keep"
EMBEDDING_GRID = "q8_0"

Plan = dict[str, str]


@dataclass(frozen=True)
class Misfit:
    """A tensor that the plan's grid cannot carry, with the grids that could."""

    name: str
    columns: int
    grid: str
    fits: tuple[str, ...]

    def __str__(self) -> str:
        remedy = f"grids that fit: {', '.join(self.fits)}" if self.fits else "no grid fits this width"
        block = get_grid(self.grid).block
        return f"{self.name}: rows of {self.columns} values are no multiple of {block} ({self.grid}); {remedy}"


def is_tied(model: nn.Module) -> bool:
    """Return whether the model's output head is its embedding."""
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight  # type: ignore[operator]


def make_plan(model: nn.Module, bits: int) -> Plan:
    """Return the default plan: linear layers on the portable grid of that width, embedding and head on 8 bits.

    The embedding and the output head get 8 bits because their errors reach every logit directly, while they are a
    small share of a large model. Norms and biases are kept.

    Raises:
        UserError: No portable grid of that width, or a tensor that its grid does not fit; each is named.
    """
    grid = grid_for_bits(bits)
    ends = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}  # type: ignore[operator]
    plan: Plan = {}
    widths: dict[str, int] = {}
    seen: set[int] = set()
    for module_name, module in model.named_modules():
        for own_name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            name = f"{module_name}.{own_name}" if module_name else own_name
            quantized = own_name == "weight" and isinstance(module, (nn.Linear, nn.Embedding))
            plan[name] = (EMBEDDING_GRID if id(module) in ends else grid.name) if quantized else KEEP
            widths[name] = parameter.shape[-1]
    misfits = find_misfits(plan, widths)
    if misfits:
        raise UserError(
            f"{len(misfits)} tensors do not fit their grid:\n  " + "\n  ".join(str(misfit) for misfit in misfits[:5])
        )
    return plan


def find_misfits(plan: Plan, columns: dict[str, int]) -> list[Misfit]:
    """Return the quantized tensors of a plan whose rows their grid's block does not divide."""
    return [
        Misfit(name, columns[name], grid, tuple(grids_that_fit(columns[name])))
        for name, grid in plan.items()
        if grid != KEEP and columns[name] % get_grid(grid).block
    ]
