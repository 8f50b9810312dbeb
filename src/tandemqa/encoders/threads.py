"""Threads that share the work of an encoder, each with cores of its own.

Encoders of this size keep one core busy, but not the threads that PyTorch gives to a single operation: they wait for
each other hundreds of times a second. So every thread takes some of the batches and computes them alone.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

import torch

# In training, each thread holds a gradient of its own for the time of a step.
MOST = 4
# Tokens that are worth a thread.
LEAST = 512

Share = TypeVar("Share")
Result = TypeVar("Result")


def count() -> int:
    """How many threads there are to share work between: as many as PyTorch may use, but no more than `MOST`."""
    return min(MOST, torch.get_num_threads())


def shares(costs: Sequence[int], number: int) -> list[list[int]]:
    """Numbers of work shared out so that the shares cost about the same; each in rising order, none empty."""
    made: list[list[int]] = [[] for _ in range(number)]
    totals = [0] * number
    for work in sorted(range(len(costs)), key=lambda work: -costs[work]):
        least = totals.index(min(totals))
        made[least].append(work)
        totals[least] += costs[work]
    return [sorted(share) for share in made if share]


def in_threads(do: Callable[[Share], Result], work: Sequence[Share]) -> list[Result]:
    """`do` of each share of the work, at once; a single share is done here, with all threads of PyTorch.

    Threads begin with PyTorch's own modes: `do` sets autocast and whether there is a gradient.
    """
    if len(work) < 2:
        return [do(share) for share in work]
    with _starting:
        pool = _pool(len(work), torch.get_num_threads() // len(work))
    return list(pool.map(do, work))


def without_gradient(do: Callable[[Share], Result], work: Sequence[Share], device: torch.device) -> Iterator[Result]:
    """`do` of each piece of work, in order, as many at once as there are threads; on a GPU one after the other."""
    wide = count() if device.type == "cpu" else 1
    for start in range(0, len(work), wide):
        yield from in_threads(torch.inference_mode()(do), work[start : start + wide])


def budget(tokens: int, longest: int, most: int, device: torch.device) -> int:
    """The token budget of a batch, at most `most`, with which every thread gets some of so many tokens."""
    if device.type != "cpu":
        return most
    # A tenth more, so that rows of unequal length leave no rest.
    return min(most, max(LEAST, int(1.1 * tokens / count()) + longest))


_starting = threading.Lock()


@cache
def _pool(threads: int, cores: int) -> ThreadPoolExecutor:
    """Threads that compute on so many cores each."""
    own = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads, "encoder", initializer=torch.set_num_threads, initargs=(cores,))
    started = threading.Barrier(threads + 1)
    for _ in range(threads):
        pool.submit(started.wait)
    started.wait()
    # What one thread sets, threads that start later begin with.
    torch.set_num_threads(own)
    return pool
