"""Packages whose folder is their registry: whatever module stands there can be asked for by its name."""

import importlib
import pkgutil
import sys
from types import ModuleType

from qad.errors import unknown_name


def module_names(package: str) -> list[str]:
    """Return the names of a package's modules, without those that are its own business (``_``)."""
    path = sys.modules[package].__path__
    return sorted(module.name for module in pkgutil.iter_modules(path) if not module.name.startswith("_"))


def module_named(package: str, name: str, what: str) -> ModuleType:
    """Import a module of a package.

    Args:
        package: Which.
        name: Of the module.
        what: The package's modules are, in the user's words.

    Raises:
        UserError: No such module; the message lists those there are.
    """
    if name not in module_names(package):
        raise unknown_name(what, name, module_names(package))
    return importlib.import_module(f"{package}.{name}")
