"""Recipes: one file each, whose function ``recipe`` returns a ``Recipe``. The folder listing is the registry."""

from qad.recipe import Recipe
from qad.registry import module_named, module_names


def names() -> list[str]:
    """Return the names of all recipes."""
    return module_names(__name__)


def get(name: str) -> Recipe:
    """Return a recipe by name.

    Raises:
        UserError: No such recipe; the message lists those there are.
    """
    return module_named(__name__, name, "recipe").recipe()
