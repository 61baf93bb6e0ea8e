"""Where installed packages lie."""

import importlib.util
from pathlib import Path

from data_gen.errors import InputError


def package_folder(name: str, what: str) -> Path:
    """The folder of an installed package, found without importing it.

    Raises InputError, which begins with `what` asked for it, when there is none.
    """
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):  # of a package that the name would lie in; no name at all
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise InputError(f"{what}: the package {name} is not installed")
    return Path(spec.submodule_search_locations[0])
