"""A stage's folder: its result, kept for as long as what it depends on is the same."""

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

from safetensors import SafetensorError

import tandemqa
from tandemqa.errors import TandemError
from tandemqa.files import read_json, write_json


class Stage:
    """`folder` holds a stage's result, `stage.json` its key and whether it is complete.

    The key covers everything that the result depends on. A folder with another key is emptied; one with the same
    key and no result yet is left as it is, so that a training stage finds its checkpoint again.
    """

    def __init__(self, folder: Path, depends_on: Any) -> None:
        self.folder = folder
        self.key = hashlib.sha256(
            json.dumps([tandemqa.__version__, depends_on], sort_keys=True).encode()
        ).hexdigest()[:16]
        state = folder / "stage.json"
        known = read_json(state) if state.exists() else {}
        if known.get("key") != self.key:
            shutil.rmtree(folder, ignore_errors=True)
            write_json(state, {"key": self.key, "complete": False})
        self.complete: bool = known.get("key") == self.key and known.get("complete", False)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Read the result in this block; what is missing or damaged is a `TandemError` that names the folder."""
        try:
            yield
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, BadZipFile) as error:
            raise TandemError(
                f"The stage in {self.folder} is damaged ({error}); remove that folder, the stage is run again."
            ) from error

    def finish(self) -> None:
        """Declare the result whole."""
        write_json(self.folder / "stage.json", {"key": self.key, "complete": True})
        self.complete = True
