"""Every command, thin: what it takes and what it prints; the work is done elsewhere.

Whatever is heavy is imported inside the command that needs it, so that `--help` answers at once. A command registers
itself when its module is imported, and `--help` lists them in this order.
"""

from tandemqa.cli import data, training, searching, measuring, demo  # noqa: F401, I001
from tandemqa.cli.root import app, main

__all__ = ["app", "main"]
