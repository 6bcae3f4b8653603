"""Recipes: one file each, whose function ``recipe`` returns a ``Recipe``. The folder listing is the registry."""

import importlib
import pkgutil

from qad.errors import unknown_name
from qad.recipe import Recipe


def names() -> list[str]:
    """Return the names of all recipes."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def get(name: str) -> Recipe:
    """Return a recipe by name.

    Raises:
        UserError: No such recipe; the message lists those there are.
    """
    if name not in names():
        raise unknown_name("recipe", name, names())
    return importlib.import_module(f"{__name__}.{name}").recipe()
