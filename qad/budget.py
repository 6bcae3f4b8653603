"""The plan of least cost under a budget of bits.

Each tensor chooses among grids of known cost and size. Taking always the step that saves most per bit, along the lower
convex hull of each tensor's choices, is Lagrange's solution wherever the budget is met exactly; what is left over at
the end is spent on single steps that still fit.
"""

import itertools
from collections.abc import Mapping

Choice = tuple[int, float, str]  # size in bits, cost, grid


def _hull(choices: list[Choice]) -> list[Choice]:
    """Return the lower convex hull of a tensor's choices, from the smallest on; costs fall along it."""
    hull: list[Choice] = []
    for choice in sorted(choices):
        if hull and choice[1] >= hull[-1][1]:
            continue
        while len(hull) > 1 and _rate(hull[-2], choice) >= _rate(hull[-2], hull[-1]):
            hull.pop()
        hull.append(choice)
    return hull


def _rate(before: Choice, after: Choice) -> float:
    """Return the cost saved per bit."""
    return (before[1] - after[1]) / max(after[0] - before[0], 1e-9)


def choose(
    costs: Mapping[str, Mapping[str, float]], sizes: Mapping[str, Mapping[str, int]], budget: float
) -> dict[str, str]:
    """Return a grid for each tensor.

    Args:
        costs: Tensor -> grid -> cost.
        sizes: Tensor -> grid -> stored bits.
        budget: Stored bits of all tensors at most; at least those of the smallest choices.
    """
    choices = {name: [(sizes[name][grid], cost, grid) for grid, cost in of.items()] for name, of in costs.items()}
    hulls = {name: _hull(of) for name, of in choices.items()}
    chosen = {name: hull[0] for name, hull in hulls.items()}
    left = budget - sum(choice[0] for choice in chosen.values())
    assert left >= 0, left
    steps = [
        (-_rate(before, after), name, after)
        for name, hull in hulls.items()
        for before, after in itertools.pairwise(hull)
    ]
    # Along a hull the rates fall, so a tensor's steps come in their order.
    for _, name, after in sorted(steps):
        if after[0] - chosen[name][0] <= left:
            left -= after[0] - chosen[name][0]
            chosen[name] = after
    while True:
        possible = [
            (-_rate(chosen[name], choice), name, choice)
            for name, of in choices.items()
            for choice in of
            if choice[1] < chosen[name][1] and choice[0] - chosen[name][0] <= left
        ]
        if not possible:
            return {name: choice[2] for name, choice in chosen.items()}
        _, name, choice = min(possible)
        left -= choice[0] - chosen[name][0]
        chosen[name] = choice
