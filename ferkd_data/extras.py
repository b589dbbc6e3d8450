"""Optional packages: imported when first used, and named with their pip line when they are missing."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from types import ModuleType

from ferkd_data.errors import MissingExtraError


def require(module: str, *, extra: str, what_for: str) -> ModuleType:
    """Import `module`, or raise MissingExtraError that names the extra which brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        # The package is there, and one that it imports is not: installing our extra again would not help.
        if error.name is not None and error.name.split(".")[0] != module.split(".")[0]:
            raise
        raise _missing(module.split(".")[0], extra, what_for) from error


def package_folder(package: str, *, extra: str, what_for: str) -> Path:
    """Return the folder of an installed package, without running its code. Raises MissingExtraError."""
    # Of a top-level name this imports nothing; of a dotted one it would import the packages above it.
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise _missing(package, extra, what_for)
    return Path(spec.submodule_search_locations[0])


def _missing(package: str, extra: str, what_for: str) -> MissingExtraError:
    return MissingExtraError(
        f"{what_for} needs the package {package}, which is not installed; run: pip install 'ferkd-data[{extra}]'"
    )
