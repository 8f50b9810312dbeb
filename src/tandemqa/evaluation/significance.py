"""Is one run better than another: the interval of their difference, a test of it, and a correction for many tests.

Both runs are values of one metric on the same N queries, float64 (N,), query by query.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from tandemqa.evaluation.metrics import bootstrap_interval

PERMUTATIONS = 10_000
# Up to this many differences every pattern of signs is tried, 65 536 at most, and the p-value is exact.
EXACT = 16
# The same ranking may come out of two runs of different depth with values that differ by rounding.
ROUNDING = 1e-9
_CELLS = 1_000_000


def paired_interval(first: NDArray[np.float64], second: NDArray[np.float64], seed: int) -> tuple[float, float]:
    """95 % interval of the mean of `second - first`, by resampling queries, each with both of its values.

    Percentile bootstrap (Sakai, Evaluating evaluation metrics based on the bootstrap, SIGIR 2006).
    """
    return bootstrap_interval(second - first, seed)


def randomisation_test(first: NDArray[np.float64], second: NDArray[np.float64], seed: int) -> float:
    """Two-sided p-value of the difference in means, if on each query either run might have had either value.

    The share of sign patterns of the N differences whose sum is at least as far from zero as the observed one
    (Fisher's randomisation test; Smucker, Allan and Carterette, CIKM 2007). Over all patterns where at most 16
    queries differ; else of 10 000 random ones c are as far and p = (1 + c) / (1 + 10 000), as the observed pattern
    counts too (Phipson and Smyth, Statistical Applications in Genetics and Molecular Biology, 2010).
    """
    differences = second - first
    differences = differences[np.abs(differences) > ROUNDING]
    exact = len(differences) <= EXACT
    patterns = _all_patterns(len(differences)) if exact else _random_patterns(len(differences), seed)
    total = differences.sum()
    reached = 0
    for kept in patterns:
        sums = 2 * (kept @ differences) - total
        reached += int(np.count_nonzero(np.abs(sums) >= abs(total) - ROUNDING))
    if exact:
        return reached / (1 << len(differences))
    return (1 + reached) / (1 + PERMUTATIONS)


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values corrected for their number, in the order given (Holm, Scandinavian Journal of Statistics, 1979).

    Whoever calls those up to 0.05 significant errs in any of them with a probability of at most 0.05.
    """
    corrected = [0.0] * len(p_values)
    largest = 0.0
    for smaller, number in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, p_values[number] * (len(p_values) - smaller)))
        corrected[number] = largest
    return corrected


def _all_patterns(count: int) -> Iterator[NDArray[np.int8]]:
    """Which of `count` differences keep their sign, 0 or 1: int8 (2 to the power of count, count)."""
    yield (np.arange(2**count)[:, None] >> np.arange(count) & 1).astype(np.int8)


def _random_patterns(count: int, seed: int) -> Iterator[NDArray[np.int8]]:
    """PERMUTATIONS random rows of the same kind, a chunk at a time."""
    random = np.random.default_rng(seed)
    step = max(1, _CELLS // count)
    for start in range(0, PERMUTATIONS, step):
        yield random.integers(2, size=(min(step, PERMUTATIONS - start), count), dtype=np.int8)
