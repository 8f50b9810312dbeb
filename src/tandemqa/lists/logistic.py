"""Logistic regression of chances on a few values."""

import numpy as np
from numpy.typing import NDArray

_STEPS = 100


def logistic_fit(
    values: NDArray[np.float64], targets: NDArray[np.floating | np.bool_], weights: NDArray[np.float64], ridge: float
) -> tuple[NDArray[np.float64], float]:
    """Slopes (F,) and offset with which 1 / (1 + exp(-(values · slopes + offset))) is nearest to the targets.

    values: float64 (N, F); targets: chances (N,), 0 to 1; weights: of each in the sum of cross-entropies, (N,). Half
    of `ridge` times the squared slopes, of the values at unit spread, is added to that sum. Newton's method, each
    step halved until the loss does not rise (Lin, Lin and Weng, 2007), so that it cannot leave for infinity.
    """
    mean, spread = values.mean(axis=0), values.std(axis=0)
    spread = np.where(spread > 0, spread, 1.0)
    features = np.concatenate([(values - mean) / spread, np.ones((len(values), 1))], axis=1)
    penalty = np.array([ridge] * values.shape[1] + [0.0])
    # Keeps what no value tells anything of solvable, and is far too small to be seen in what is told.
    floor = 1e-12 * weights.sum() * np.eye(len(penalty))

    def loss_of(solution: NDArray[np.float64]) -> float:
        logits = features @ solution
        return float(weights @ (np.logaddexp(0, logits) - targets * logits) + penalty @ solution**2 / 2)

    solution = np.zeros(len(penalty))
    loss = loss_of(solution)
    for _ in range(_STEPS):
        chances = np.exp(-np.logaddexp(0, -(features @ solution)))
        gradient = features.T @ (weights * (chances - targets)) + penalty * solution
        hessian = (features * (weights * chances * (1 - chances))[:, None]).T @ features + np.diag(penalty)
        direction = np.linalg.solve(hessian + floor, gradient)
        share = 1.0
        while (new := loss_of(solution - share * direction)) > loss and share > 1e-10:
            share /= 2
        solution = solution - share * direction
        if loss - new < 1e-14 * weights.sum():
            break
        loss = new
    slopes = solution[:-1] / spread
    return slopes, float(solution[-1] - slopes @ mean)
