"""The processes that train together, one for each device, as torchrun starts them; without torchrun, one alone.

What is the same for all (files, messages, everything but training itself) is done by the main one.
"""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING

from tandemqa.errors import TandemError

if TYPE_CHECKING:
    from torch import Tensor

# The others wait this long for what the main one does alone, such as mining.
PATIENCE = timedelta(days=2)
# How Gloo and NCCL say that another process is gone.
LOST = re.compile("closed by peer|reset by peer|broken pipe|remote process exited", re.IGNORECASE)


def count() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """The number of this process, from 0."""
    return int(os.environ.get("RANK", "0"))


def is_main() -> bool:
    return rank() == 0


def add_up(tensors: Sequence["Tensor"]) -> None:
    """Replace each tensor, in every process, by its sum over the processes; all must call with the same shapes."""
    if count() == 1:
        return
    import torch.distributed

    join()
    try:
        for work in [torch.distributed.all_reduce(tensor, async_op=True) for tensor in tensors]:
            work.wait()
    except RuntimeError as error:
        if not LOST.search(str(error)):
            raise
        raise TandemError(
            "Another process of this training has stopped (if it could say why, that stands near this message); "
            "give the same command again, it goes on from the last checkpoint."
        ) from error


def wait() -> None:
    """Go on when all processes have come here."""
    decided(True)


def decided(value: bool) -> bool:
    """The main process's `value`, in every process."""
    return anywhere(value and is_main())


def anywhere(value: bool) -> bool:
    """Whether `value` is true in any process, in every process."""
    if count() == 1:
        return value
    import torch

    join()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    answer = torch.tensor(int(value), device=device)
    add_up([answer])
    return bool(answer)


@contextmanager
def main_first() -> Iterator[None]:
    """Run the block in the main process, then in the others, which find what it left in the cache."""
    if not is_main():
        wait()
    yield
    if is_main():
        wait()


@cache
def join() -> None:
    """Meet the other processes: over NCCL with GPUs (never run by us: no GPU was at hand), else over Gloo.

    Each then has a GPU of its own as its current device: models are to be loaded after this.
    """
    if count() == 1:
        return
    import torch
    from accelerate import PartialState

    PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)
