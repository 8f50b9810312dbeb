"""Ctrl-C, or a scheduler's SIGTERM, while models are trained: the step under way is finished first."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from tandemqa import processes

SIGNALS = (signal.SIGINT, signal.SIGTERM)
STDERR = 2
SAYING = b"\nStopping after this step; once more stops at once, without saving.\n"


@contextmanager
def postponed() -> Iterator[Callable[[], bool]]:
    """In this block the first signal only makes the function that is yielded say True; a second one interrupts.

    One that came too late for the block to heed interrupts at its end. Outside the main thread, where Python delivers
    no signals, nothing changes.
    """
    asked = threading.Event()

    def note(number: int, frame: FrameType | None) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()
        if processes.is_main():
            # Not by Python's stream, which may be in the midst of writing.
            with suppress(OSError):
                os.write(STDERR, SAYING)

    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return
    before = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if asked.is_set():
        raise KeyboardInterrupt
