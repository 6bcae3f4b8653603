"""The plan that a recipe means for a model: made once, told, saved with the run.

``plan.json`` in the run folder is the resolved plan, tensor by tensor. A resumed run reads it instead of measuring
again, and ``--plan RUN/plan.json`` uses it for another run.
"""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from torch import Tensor, nn

from qad import export
from qad.budget import choose
from qad.errors import UserError
from qad.files import replacing_file
from qad.grid import get_grid, grid_for_bits, grids_that_fit
from qad.plan import KEEP, Plan, find_misfits, is_tied, model_weights, plan_of_grid, read_rules
from qad.plans import named_rules
from qad.prepare import progress_bar
from qad.recipe import Recipe
from qad.sensitivity import measure_costs

PLAN_FILE = "plan.json"
_ONE_GRID = ("gptq",)


def plan_from_recipe(recipe: Recipe, run: Path, model: nn.Module, console: Console) -> Plan | None:
    """Return the plan that a run has saved or that its recipe names; None if it is to be measured.

    Raises:
        UserError: The plan does not fit the model; see ``plan.plan_of_grid``.
    """
    if (run / PLAN_FILE).exists():
        return _saved(run / PLAN_FILE, model)
    if recipe.budget:
        _candidates(recipe, model)  # what cannot be shall be said before anything is measured
        return None
    grid = recipe.grid or grid_for_bits(recipe.bits).name
    rules = recipe.rules
    if recipe.plan:
        layers = model.config.num_hidden_layers  # type: ignore[union-attr]
        rules = named_rules(recipe.plan, layers, is_tied(model))  # type: ignore[arg-type]
    plan, notes = plan_of_grid(model, grid, rules)
    for note in notes:
        console.print(f"plan: {note}")
    return plan


def measured_plan(recipe: Recipe, model: nn.Module, calibration_BT: Tensor, console: Console) -> Plan:
    """Return the plan of least expected KL under the recipe's budget.

    Raises:
        UserError: The budget is too small for any plan.
    """
    candidates = _candidates(recipe, model)
    with progress_bar(console, "sensitivity", None) as update:
        costs = measure_costs(
            model,
            candidates,
            calibration_BT,
            mode=recipe.init,
            seed=recipe.seed,
            on_progress=update,
        )
    sizes = _sizes(model, candidates)
    weights = sum(weight.rows * weight.columns for weight in model_weights(model).values() if weight is not None)
    chosen = choose(costs, sizes, recipe.budget * weights)
    console.print(
        f"plan: expected KL of the rounding {sum(costs[name][grid] for name, grid in chosen.items()):.3g}",
        highlight=False,
    )
    return {name: chosen.get(name, KEEP) for name in model_weights(model)}


def save_plan(plan: Plan, run: Path, model: nn.Module, console: Console) -> None:
    """Tell a plan in one line and save it with the run."""
    parameters = dict(model.named_parameters())
    counts = Counter(grid for grid in plan.values() if grid != KEEP)
    kept = sum(plan[name] == KEEP for name, weight in model_weights(model).items() if weight is not None)
    listed = [f"{count} {grid}" for grid, count in sorted(counts.items())] + [f"{kept} kept"] * bool(kept)
    bits = sum(parameters[name].numel() * get_grid(grid).bits_per_weight for name, grid in plan.items() if grid != KEEP)
    weights = sum(parameters[name].numel() for name, grid in plan.items() if grid != KEEP)
    console.print(f"plan: {', '.join(listed)}; {bits / weights:.2f} bits per weight", highlight=False)
    with replacing_file(run / PLAN_FILE) as path:
        path.write_text(json.dumps(plan, indent=1) + "\n")


def _saved(file: Path, model: nn.Module) -> Plan:
    plan = dict(read_rules(file))
    weights = model_weights(model)
    if plan.keys() != weights.keys():
        raise UserError(f"{file} is the plan of another model: start the run anew with another -o")
    columns = {name: weight.columns for name, weight in weights.items() if weight is not None}
    if misfits := find_misfits(plan, columns):
        raise UserError(f"{file} does not fit the model ({misfits[0]}): start the run anew with another -o")
    return plan


def _candidates(recipe: Recipe, model: nn.Module) -> dict[str, list[str]]:
    """Return for each weight the grids that all of the recipe's formats carry and its rows allow.

    Raises:
        UserError: An unknown format, one that mixes no grids, none that fits, or a budget below the smallest plan.
    """
    for name in recipe.formats:
        if name in _ONE_GRID:
            raise UserError(f"--budget mixes grids, and {name} has one grid for all linear layers: use --grid")
    carried = [set(export.get(name).GRIDS) for name in recipe.formats]
    common = set.intersection(*carried)
    weights = {name: weight for name, weight in model_weights(model).items() if weight is not None}
    candidates = {name: [g for g in grids_that_fit(weight.columns) if g in common] for name, weight in weights.items()}
    for name, grids in candidates.items():
        if not grids:
            raise UserError(
                f"{name}: rows of {weights[name].columns} values fit no grid that {' and '.join(recipe.formats)} carry"
            )
    sizes = _sizes(model, candidates)
    smallest = sum(min(of.values()) for of in sizes.values())
    total = sum(weight.rows * weight.columns for weight in weights.values())
    if recipe.budget * total < smallest:
        raise UserError(
            f"--budget {recipe.budget:g} is less than the {smallest / total:.3f} bits per weight of the smallest plan "
            "for this model"
        )
    return candidates


def _sizes(model: nn.Module, candidates: Mapping[str, list[str]]) -> dict[str, dict[str, int]]:
    """Return the stored bits of each weight on each of its grids."""
    parameters = dict(model.named_parameters())
    return {
        name: {grid: round(parameters[name].numel() * get_grid(grid).bits_per_weight) for grid in grids}
        for name, grids in candidates.items()
    }
