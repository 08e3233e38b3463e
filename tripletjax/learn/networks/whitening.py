"""Within-class whitening of features, in closed form.

Features are projected so that they vary equally in all directions within a class, as in
within-class covariance normalisation (WCCN).

References:
    Hatch, Kajarekar, Stolcke. Within-class covariance normalization for SVM-based
    speaker recognition. Interspeech 2006.
"""

from collections.abc import Iterator

import numpy as np
from scipy import linalg

# Share of the scaled identity in the within-class covariance (benchmarks/frozen.py).
SHRINKAGE = 0.5
# A class counts as at most this number of images, so that a few large classes do not
# make up the covariances.
MOST = 10
# Rows that are converted to float64 at a time.
ROWS = 4096


def whitening(
    features: np.ndarray, labels: np.ndarray, dim: int, *, shrinkage: float = SHRINKAGE
) -> tuple[np.ndarray, np.ndarray]:
    r"""Compute the mean of features and their whitening projection, in float64.

    The within-class covariance $S$ is shrunk towards the scaled identity, $S_\lambda =
    (1 - \lambda) S + \lambda \, \mathrm{tr}(S) / f \, I$. The columns of the projection
    $W$ satisfy $W^\top S_\lambda W = I$ up to a common factor and are ordered by the
    total variance. If no two rows have the same label, or all such rows are equal, $S$
    is the identity, and the columns are the principal directions.

    A row of a class of n rows has the weight $\min(1, 10 / n)$.

    Args:
        features: ``[n, f]``.
        labels: classes ``[n]``.
        dim: number of columns. Columns beyond f are zero.
        shrinkage: the share $\lambda$, above 0 and at most 1.

    Returns:
        The mean ``[f]`` and the projection ``[f, dim]``.

    >>> features = np.array([[0.0, 0], [4, 0], [0, 1], [4, 1]])
    >>> mean, kernel = whitening(features, np.array([0, 0, 1, 1]), 2)
    >>> print(np.abs(kernel.round(2)) + 0.0)
    [[0.82 0.  ]
     [0.   1.41]]
    """
    f = features.shape[1]
    mean, weight = np.zeros(f), 0.0
    for x, _, weights in _by_class(features, labels):
        mean += weights @ x
        weight += weights.sum()
    mean /= weight
    total, within = np.zeros((2, f, f))
    for x, deviations, weights in _by_class(features, labels):
        x -= mean
        total += (x * weights[:, None]).T @ x
        within += (deviations * weights[:, None]).T @ deviations
    scale = np.trace(within) / f
    if scale > 0:
        # Its own scale does not matter, since embeddings have unit norm.
        within = (1 - shrinkage) * within / scale + shrinkage * np.eye(f)
    else:
        within = np.eye(f)
    count = min(dim, f)
    solved = linalg.eigh(total, within, subset_by_index=(f - count, f - 1))
    kernel = np.zeros((f, dim))
    kernel[:, :count] = np.flip(np.asarray(solved[1]), axis=1)
    return mean, kernel


def _by_class(
    features: np.ndarray, labels: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Chunks of whole classes: rows, deviations from class means, and weights."""
    _, classes, counts = np.unique(labels, return_inverse=True, return_counts=True)
    order = np.argsort(classes, kind="stable")
    ends = np.cumsum(counts)
    start = 0
    while start < len(counts):
        first = ends[start] - counts[start]
        stop = max(start + 1, int(np.searchsorted(ends, first + ROWS, side="right")))
        x = features[order[first : ends[stop - 1]]].astype(np.float64)
        sizes = counts[start:stop]
        sums = np.add.reduceat(x, np.cumsum(sizes) - sizes, axis=0)
        means = np.repeat(sums / sizes[:, None], sizes, axis=0)
        yield x, x - means, np.repeat(np.minimum(1, MOST / sizes), sizes)
        start = stop
