"""One at a time: writers of an index, who are told of each other, and those who calibrate a bundle, who wait."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tandemqa.errors import TandemError

LOCK = "write.lock"
CALIBRATING = "calibrate.lock"


@contextmanager
def only_writer(folder: Path, name: Path) -> Iterator[None]:
    """Hold the lock of an index in `folder`; if another process does, a `TandemError` that calls it `name`.

    The system lets go of it when the process ends, in whatever way.
    """
    path = folder / LOCK
    while True:
        with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise TandemError(
                    f"Another command is writing to the index {name}; give this one again when that has ended."
                ) from error
            # A build may have put another index in the place of this one before it was locked.
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                yield
                return


@contextmanager
def only_calibrating(bundle: Path) -> Iterator[None]:
    """Hold the lock of a bundle for the time in which its ranges are measured, after whoever else does."""
    descriptor = os.open(bundle / CALIBRATING, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
