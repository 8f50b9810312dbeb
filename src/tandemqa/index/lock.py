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
    descriptor = _locked(folder / LOCK, name)
    try:
        yield
    finally:
        os.close(descriptor)


def _locked(path: Path, name: Path) -> int:
    """The descriptor of the lock file, locked. A build may put another index in the place of this one between the
    moment it is opened and the moment it is locked; then the lock is that of an index which is gone."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(descriptor).st_ino == path.stat().st_ino:
                return descriptor
        except BlockingIOError as error:
            os.close(descriptor)
            raise TandemError(
                f"Another command is writing to the index {name}; give this one again when that has ended."
            ) from error
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


@contextmanager
def only_calibrating(bundle: Path) -> Iterator[None]:
    """Hold the lock of a bundle for the time in which its ranges are measured, after whoever else does."""
    descriptor = os.open(bundle / CALIBRATING, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
