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
# Rows that are converted to float64 at a time.
ROWS = 4096


def whitening(
    features: np.ndarray,
    rows: np.ndarray,
    labels: np.ndarray,
    dim: int,
    *,
    shrinkage: float = SHRINKAGE,
) -> tuple[np.ndarray, np.ndarray]:
    r"""Compute the mean of features and their whitening projection, in float64.

    The within-class covariance $S$ is shrunk towards the scaled identity, $S_\lambda =
    (1 - \lambda) S + \lambda \, \mathrm{tr}(S) / f \, I$. The columns of the projection
    $W$ satisfy $W^\top S_\lambda W = I$ and are ordered by the total variance. If no
    two rows have the same label, or all such rows are equal, $S$ is the identity, and
    the columns are the principal directions.

    Args:
        features: ``[n, f]``.
        rows: rows of features with a known class, ``[m]``, perhaps repeated.
        labels: the classes of these rows, ``[m]``.
        dim: number of columns. Columns beyond f are zero.
        shrinkage: the share $\lambda$, above 0 and at most 1.

    Returns:
        The mean ``[f]`` and the projection ``[f, dim]``.

    >>> features = np.array([[0.0, 0], [4, 0], [0, 1], [4, 1]])
    >>> mean, kernel = whitening(features, np.arange(4), np.array([0, 0, 1, 1]), 2)
    >>> print(np.abs(kernel.round(2)) + 0.0)
    [[0.82 0.  ]
     [0.   1.41]]
    """
    f = features.shape[1]
    mean = features.mean(axis=0, dtype=np.float64)
    total = sum((x.T @ x for x in _centred(features, mean)), np.zeros((f, f)))
    within = sum((x.T @ x for x in _deviations(features, rows, labels)), 0 * total)
    scale = np.trace(within) / f
    if scale > 0:
        # Their own scale does not matter, since embeddings have unit norm.
        within = (1 - shrinkage) * within / scale + shrinkage * np.eye(f)
    else:
        within = np.eye(f)
    count = min(dim, f)
    solved = linalg.eigh(total, within, subset_by_index=(f - count, f - 1))
    kernel = np.zeros((f, dim))
    kernel[:, :count] = np.flip(np.asarray(solved[1]), axis=1)
    return mean, kernel


def _centred(features: np.ndarray, mean: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(features), ROWS):
        yield features[start : start + ROWS].astype(np.float64) - mean


def _deviations(
    features: np.ndarray, rows: np.ndarray, labels: np.ndarray
) -> Iterator[np.ndarray]:
    """Deviations from the means of classes, of classes of several rows."""
    _, classes, counts = np.unique(labels, return_inverse=True, return_counts=True)
    order = np.argsort(classes, kind="stable")
    order = order[counts[classes[order]] > 1]
    ends = np.cumsum(counts[counts > 1])
    start = 0
    # Whole classes, so that each chunk has its means.
    while start < len(ends):
        first = ends[start - 1] if start else 0
        stop = max(start + 1, np.searchsorted(ends, first + ROWS, side="right"))
        x = features[rows[order[first : ends[stop - 1]]]].astype(np.float64)
        starts = np.concatenate([[first], ends[start : stop - 1]]) - first
        sizes = np.diff(np.append(starts, len(x)))
        means = np.add.reduceat(x, starts, axis=0) / sizes[:, None]
        yield x - np.repeat(means, sizes, axis=0)
        start = stop
