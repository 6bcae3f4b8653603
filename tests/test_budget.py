"""The plan under a budget: never over it, never worse than what brute force finds by more than its last step."""

import itertools
import random

import hypothesis
import pytest
from hypothesis import strategies as st

from qad.budget import choose

SIZES = {"small": 4, "middle": 5, "large": 8}


def cost_of(chosen: dict[str, str], costs: dict[str, dict[str, float]]) -> float:
    return sum(costs[name][grid] for name, grid in chosen.items())


def size_of(chosen: dict[str, str], sizes: dict[str, dict[str, int]]) -> int:
    return sum(sizes[name][grid] for name, grid in chosen.items())


def brute_force(costs: dict[str, dict[str, float]], sizes: dict[str, dict[str, int]], budget: float) -> float:
    plans = (dict(zip(costs, grids, strict=True)) for grids in itertools.product(*costs.values()))
    return min(cost_of(plan, costs) for plan in plans if size_of(plan, sizes) <= budget)


def test_the_sensitive_tensor_gets_the_bits() -> None:
    costs = {"calm": {"small": 0.1, "large": 0.0}, "touchy": {"small": 10.0, "large": 0.5}}
    sizes = {name: {"small": 400, "large": 800} for name in costs}
    assert choose(costs, sizes, 1200) == {"calm": "small", "touchy": "large"}
    assert choose(costs, sizes, 1199) == {"calm": "small", "touchy": "small"}
    assert choose(costs, sizes, 1600) == {"calm": "large", "touchy": "large"}


def test_savings_count_by_the_bit() -> None:
    """A large tensor that saves more in all gives way to small ones that save more for each bit."""
    costs = {"huge": {"small": 5.0, "large": 0.0}, **{f"t{n}": {"small": 1.0, "large": 0.0} for n in range(4)}}
    sizes = {"huge": {"small": 4000, "large": 8000}, **{f"t{n}": {"small": 400, "large": 800} for n in range(4)}}
    chosen = choose(costs, sizes, 5600 + 1600)
    assert chosen == {"huge": "small", **{f"t{n}": "large" for n in range(4)}}


def test_a_grid_that_is_larger_and_no_better_is_not_taken() -> None:
    costs = {"a": {"small": 1.0, "middle": 1.5, "large": 1.0}}
    assert choose(costs, {"a": SIZES}, 100) == {"a": "small"}


def test_what_is_left_over_is_spent() -> None:
    """The hull's next step does not fit any more; a smaller one off the hull does."""
    costs = {"a": {"small": 10.0, "middle": 9.5, "large": 0.0}}
    assert choose(costs, {"a": SIZES}, 8) == {"a": "large"}
    assert choose(costs, {"a": SIZES}, 7) == {"a": "middle"}


@hypothesis.given(st.integers(0, 2**32 - 1))
@hypothesis.settings(max_examples=60)
def test_against_brute_force(seed: int) -> None:
    draw = random.Random(seed)
    names = [f"t{n}" for n in range(draw.randint(1, 5))]
    weights = {name: draw.randint(1, 20) for name in names}
    sizes = {name: {grid: size * weights[name] for grid, size in SIZES.items()} for name in names}
    costs = {name: {grid: draw.random() * 4.0 ** (5 - size) for grid, size in SIZES.items()} for name in names}
    lowest, highest = (sum(end(of.values()) for of in sizes.values()) for end in (min, max))
    budget = draw.randint(lowest, highest)
    chosen = choose(costs, sizes, budget)
    best = brute_force(costs, sizes, budget)
    assert size_of(chosen, sizes) <= budget
    # Lagrange: no plan of at most the same size is better than one of the hull by more than one step.
    step = max(max(of.values()) - min(of.values()) for of in costs.values())
    assert best - 1e-9 <= cost_of(chosen, costs) <= best + step + 1e-9
    # Where the budget is a size that the greedy path meets exactly, the plan is the best there is.
    exact = size_of(chosen, sizes)
    if chosen == choose(costs, sizes, exact + 0.5) and len(names) == 1:
        assert cost_of(chosen, costs) == pytest.approx(brute_force(costs, sizes, exact))
