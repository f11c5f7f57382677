"""Where the standard library and installed packages lie."""

from __future__ import annotations

import sysconfig
from importlib.util import find_spec
from pathlib import Path

from _corpus import DataError

STANDARD_LIBRARY = "python"  # in place of a package's name


def folder_of(package: str) -> Path:
    """The folder of a package, which is not imported.

    Raises:
        DataError: It is not there.
    """
    if package == STANDARD_LIBRARY:
        return Path(sysconfig.get_paths()["stdlib"])
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise DataError(f"{package}: no such package is installed")
    return Path(spec.submodule_search_locations[0])
