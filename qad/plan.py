"""Plans: which tensor gets which grid, and whether it can.

A plan maps every parameter name of a model to a grid's name or to ``KEEP``. Names are those of the Hugging Face model
(``model.layers.0.mlp.up_proj.weight``). A tied output head has no entry of its own: it is the embedding.

Plans are made from rules: pairs of a glob pattern and a grid, of which the first that matches a tensor's name counts.
Only the weights of linear layers and embeddings can be quantized; norms and biases are kept whatever a pattern says.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from torch import nn

from qad.errors import UserError
from qad.grid import GRIDS, get_grid, grid_for_bits, grids_that_fit

KEEP = "keep"
EMBEDDING_GRID = "q8_0"
# What takes the place of a grid whose blocks do not divide a tensor's rows: blocks of 32, at least as many bits.
FALLBACKS = {"q4_k": "q4_1", "q5_k": "q5_0", "q6_k": "q8_0"}

Plan = dict[str, str]
Rules = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Misfit:
    """A tensor that the plan's grid cannot carry, with the grids that could."""

    name: str
    columns: int
    grid: str
    fits: tuple[str, ...]

    def __str__(self) -> str:
        keep = f'no grid fits this width: keep it with --plan FILE that says {{"{self.name}": "keep"}}'
        remedy = f"grids that fit: {', '.join(self.fits)}" if self.fits else keep
        block = get_grid(self.grid).unit
        return f"{self.name}: rows of {self.columns} values are no multiple of {block} ({self.grid}); {remedy}"


@dataclass(frozen=True)
class Weight:
    """A weight that a plan may quantize.

    Attributes:
        rows, columns: Its shape.
        is_end: Whether it is the embedding or the output head.
    """

    rows: int
    columns: int
    is_end: bool


def is_tied(model: nn.Module) -> bool:
    """Return whether the model's output head is its embedding."""
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight  # type: ignore[operator]


def model_weights(model: nn.Module) -> dict[str, Weight | None]:
    """Return every parameter by name, a shared one once; None for those that a plan must keep."""
    ends = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}  # type: ignore[operator]
    found: dict[str, Weight | None] = {}
    seen: set[int] = set()
    for module_name, module in model.named_modules():
        for own_name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            name = f"{module_name}.{own_name}" if module_name else own_name
            if own_name == "weight" and isinstance(module, (nn.Linear, nn.Embedding)):
                found[name] = Weight(*parameter.shape, is_end=id(module) in ends)
            else:
                found[name] = None
    return found


def make_plan(model: nn.Module, bits: int) -> Plan:
    """Return the default plan: linear layers on the portable grid of that width, embedding and head on 8 bits.

    Raises:
        UserError: No portable grid of that width, or a tensor that its grid does not fit; each is named.
    """
    plan, _ = plan_of_grid(model, grid_for_bits(bits).name)
    return plan


def plan_of_grid(model: nn.Module, grid: str, rules: Rules = ()) -> tuple[Plan, list[str]]:
    """Return the plan that rules and a grid for what they leave make, with sentences about fallbacks.

    The embedding and the output head get at least 8 bits unless a rule says otherwise, because their errors reach
    every logit directly, while they are a small share of a large model. Norms and biases are kept.

    Args:
        model: The model.
        grid: For the linear layers that no rule matches.
        rules: Patterns of names, and a grid or ``KEEP`` for each.

    Raises:
        UserError: A rule that matches nothing, nothing left to quantize, or a tensor that its grid does not fit and
            that has no fallback; each is named.
    """
    ends = EMBEDDING_GRID if get_grid(grid).bits < 8 else grid
    weights = model_weights(model)
    unused = {pattern for pattern, _ in rules}
    plan: Plan = {}
    for name, weight in weights.items():
        matching = [(pattern, chosen) for pattern, chosen in rules if fnmatchcase(name, pattern)]
        unused -= {pattern for pattern, chosen in matching if weight is not None or chosen == KEEP}
        if weight is None:
            plan[name] = KEEP
        elif matching:
            plan[name] = matching[0][1]
        else:
            plan[name] = ends if weight.is_end else grid
    if unused:
        pattern = next(pattern for pattern, _ in rules if pattern in unused)
        some = next(name for name, weight in weights.items() if weight is not None and not weight.is_end)
        raise UserError(
            f"the plan's pattern {pattern!r} matches no weight of this model that can be quantized; its names are such "
            f"as {some}"
        )
    return fit_plan(plan, {name: weight.columns for name, weight in weights.items() if weight is not None})


def fit_plan(plan: Plan, columns: dict[str, int]) -> tuple[Plan, list[str]]:
    """Return a plan with fallbacks where blocks do not divide rows, and sentences that say where.

    Raises:
        UserError: A tensor that its grid does not fit and that has no fallback, or nothing to quantize.
    """
    if set(plan.values()) == {KEEP}:
        raise UserError("the plan keeps every tensor: nothing is left to quantize")
    fitted: Plan = {}
    fallen: dict[tuple[str, str, int], int] = {}
    for name, grid in plan.items():
        fitted[name] = grid
        fallback = FALLBACKS.get(grid, "")
        if grid != KEEP and not _fits(columns[name], grid) and fallback in GRIDS and _fits(columns[name], fallback):
            fitted[name] = fallback
            case = grid, fallback, columns[name]
            fallen[case] = fallen.get(case, 0) + 1
    misfits = find_misfits(fitted, columns)
    if misfits:
        raise UserError(
            f"{len(misfits)} tensors do not fit their grid:\n  " + "\n  ".join(str(misfit) for misfit in misfits[:5])
        )
    notes = [
        f"{count} tensors have rows of {width} values, which blocks of {grid} do not divide: {fallback} in its place"
        for (grid, fallback, width), count in fallen.items()
    ]
    return fitted, notes


def _fits(columns: int, grid: str) -> bool:
    return grid in grids_that_fit(columns)


def stored_bytes(model: nn.Module, plan: Plan) -> int:
    """Return the bytes of a model's weights as stored under a plan, float32 for what is kept."""
    bits = 0.0
    for name, parameter in model.named_parameters():
        if name in plan:
            bits += parameter.numel() * (32.0 if plan[name] == KEEP else get_grid(plan[name]).bits_per_weight)
    return round(bits / 8)


def find_misfits(plan: Plan, columns: dict[str, int]) -> list[Misfit]:
    """Return the quantized tensors of a plan whose rows their grid's block does not divide."""
    return [
        Misfit(name, columns[name], grid, tuple(grids_that_fit(columns[name])))
        for name, grid in plan.items()
        if grid != KEEP and not _fits(columns[name], grid)
    ]


def check_rules(rules: Sequence[tuple[str, str]], source: str) -> Rules:
    """Return rules, checked.

    Raises:
        UserError: A pattern whose grid is none.
    """
    for pattern, grid in rules:
        if grid != KEEP and grid not in GRIDS:
            known = ", ".join(sorted([*GRIDS, KEEP]))
            raise UserError(f"{source}: the pattern {pattern!r} has the grid {grid!r}; known: {known}")
    return tuple((pattern, grid) for pattern, grid in rules)


def _pairs(entries: list[tuple[str, object]]) -> list[tuple[str, object]]:
    names = [name for name, _ in entries]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"the pattern {min(twice)!r} stands there twice")
    return entries


def read_rules(file: Path) -> Rules:
    """Read rules from a JSON object of patterns and grids; a plan that a run saved is one too.

    Raises:
        UserError: Missing, no such object, or a grid that is none; the pattern is named.
    """
    try:
        entries = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=_pairs)
    except FileNotFoundError as error:
        raise UserError(f"the plan {file} does not exist: name a JSON file, or a plan that qad knows") from error
    except (OSError, ValueError) as error:
        raise UserError(f"the plan {file} cannot be read as JSON ({error})") from error
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, tuple) for entry in entries):
        raise UserError(f'the plan {file} is no JSON object of patterns and grids, such as {{"*.v_proj.*": "q8_0"}}')
    for pattern, grid in entries:
        if not isinstance(grid, str):
            raise UserError(f"{file}: the pattern {pattern!r} has no grid's name beside it but {json.dumps(grid)}")
    return check_rules(entries, str(file))
