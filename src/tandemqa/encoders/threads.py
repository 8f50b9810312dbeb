"""Threads that share the work of a step, each with a core of its own.

Encoders of this size keep one core busy, but not the threads that PyTorch gives to a single operation: they wait for
each other hundreds of times a second. So every thread takes some of the parts of a step and computes them alone.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

import torch

# Each thread holds a gradient of its own for the time of a step.
MOST = 4

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
    return list(_pool(count(), torch.get_num_threads() // count()).map(do, work))


@cache
def _pool(threads: int, cores: int) -> ThreadPoolExecutor:
    """Threads that compute on so many cores each."""
    return ThreadPoolExecutor(threads, "step", initializer=torch.set_num_threads, initargs=(cores,))
