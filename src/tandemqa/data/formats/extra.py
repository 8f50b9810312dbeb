"""Packages that only some formats need."""

from importlib import import_module
from typing import Any

from tandemqa.errors import TandemError


def needed(package: str) -> Any:
    """The package, imported; if it is not installed, a `TandemError` that says how to install it."""
    try:
        return import_module(package)
    except ImportError as error:
        what = f"This format needs the package {package}, which is not installed"
        raise TandemError(f"{what}; run: pip install 'tandemqa[data]'") from error
