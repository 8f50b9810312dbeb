"""Packages that only some options need."""

from importlib import import_module
from typing import Any

from tandemqa.errors import TandemError


def needed(package: str, extra: str, what: str) -> Any:
    """The package, imported; one that is missing is a `TandemError` that says what needs it and how to install it."""
    try:
        return import_module(package)
    except ImportError as error:
        missing = f"{what} needs the package {package.partition('.')[0]}, which is not installed"
        raise TandemError(f"{missing}; run: pip install 'tandemqa[{extra}]'") from error
