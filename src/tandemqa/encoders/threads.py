"""Threads that share the work of an encoder, each with cores of its own.

Encoders of this size keep one core busy, but not the threads that PyTorch gives to a single operation: they wait for
each other hundreds of times a second. So every thread takes some of the batches and computes them alone.
"""

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch

from tandemqa.encoders.inputs import token_budget_batches

# In training, each thread holds a gradient of its own for the time of a step.
MOST = 4
# Work of less than so many full batches a thread is cut evenly, in one of so many ways: more rounds, less padding,
# but each costs as much as some tokens.
LITTLE, ROUNDS, OVERHEAD = 4, 3, 64

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


def batches(lengths: npt.NDArray[np.int64], most: int, device: torch.device) -> list[npt.NDArray[np.int64]]:
    """Rows of these lengths in batches of about `most` tokens at the most: arrays of row numbers, longest rows first.

    Little work, as that of a single question, is cut so that all threads have done their part at the same time.
    """
    wide = count() if device.type == "cpu" else 1
    if wide == 1 or not 0 < lengths.sum() < LITTLE * wide * most:
        return list(token_budget_batches(lengths, most))
    order = np.argsort(-lengths, kind="stable")
    falling = lengths[order].tolist()
    least = math.ceil(sum(falling) / (wide * most))
    cuts = [_even(falling, rounds * wide) for rounds in range(least, least + ROUNDS)]
    best = min(cuts, key=lambda starts: _cost(falling, starts, wide))
    return np.split(order, best[1:])


def _even(lengths: Sequence[int], parts: int) -> list[int]:
    """Where rows of falling lengths begin anew in at most so many parts, the largest of which, padding included, is
    as small as can be."""
    low, high = lengths[0], lengths[0] * len(lengths)
    while low < high:
        middle = (low + high) // 2
        if len(_starts(lengths, middle)) <= parts:
            high = middle
        else:
            low = middle + 1
    return _starts(lengths, low)


def _starts(lengths: Sequence[int], limit: int) -> list[int]:
    starts = [0]
    while (start := starts[-1] + max(1, limit // max(1, lengths[starts[-1]]))) < len(lengths):
        starts.append(start)
    return starts


def _cost(lengths: Sequence[int], starts: Sequence[int], wide: int) -> int:
    """Tokens that one thread computes if in each round it has the largest of `wide` parts."""
    ends = [*starts[1:], len(lengths)]
    costs = [lengths[start] * (end - start) for start, end in zip(starts, ends, strict=True)]
    return sum(max(costs[first : first + wide]) + OVERHEAD for first in range(0, len(costs), wide))


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
