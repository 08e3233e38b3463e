"""Likely label errors: images that are far nearer to another class than to their own.

The distance of an image to a class is the mean distance to its NEAREST nearest images
of the class. The ratio of an image is its distance to the nearest other class, divided
by the distance to its own class. Wrongly labelled images have the lowest ratios.
"""

import dataclasses

import numpy as np

# Images of a class whose distances count.
NEAREST = 3
# Neighbours of an image among which other classes are compared.
NEIGHBORS = 32
# The largest ratio of a likely label error.
RATIO = 0.7
# Rows of distances within a class in memory at a time.
ROWS = 256


@dataclasses.dataclass(frozen=True)
class LabelErrors:
    """Images that are likely to be labelled wrongly, the likeliest first.

    Attributes:
        images: integers ``[e]``.
        labels: integers ``[e]``, the nearest other class of each image.
        nearest: integers ``[e]``, the nearest image of this class.
        own: distances ``[e]`` to the own class.
        other: distances ``[e]`` to the nearest other class.
    """

    images: np.ndarray
    labels: np.ndarray
    nearest: np.ndarray
    own: np.ndarray
    other: np.ndarray

    @property
    def ratio(self) -> np.ndarray:
        """Distances to the other class, divided by those to the own class."""
        return self.other / self.own


def find_label_errors(
    x: np.ndarray,
    labels: np.ndarray,
    distances: np.ndarray,
    neighbors: np.ndarray,
    *,
    ratio: float = RATIO,
) -> LabelErrors:
    """Find images that are far nearer to another class than to their own.

    Copies of an image show nothing about its own class. An image without another one of
    its class, but copies, is not judged.

    Args:
        x: vectors ``[n, d]``; copies have equal vectors.
        labels: integers ``[n]``.
        distances: of the k nearest images of each image, ``[n, k]``, in order.
        neighbors: indices of these images, ``[n, k]``.
        ratio: the largest ratio of a likely label error.
    """
    own = _distances_to_own(x, labels)
    other, of_class, nearest = _nearest_class(labels, distances, neighbors)
    found = np.flatnonzero(other <= ratio * np.where(np.isfinite(own), own, -1))
    found = found[np.argsort(other[found] / own[found], kind="stable")]
    return LabelErrors(found, of_class[found], nearest[found], own[found], other[found])


def _distances_to_own(x: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The distance ``[n]`` of each image to its own class; infinite without one."""
    own = np.full(len(x), np.inf)
    order = np.argsort(labels, kind="stable")
    ends = np.cumsum(np.unique(labels, return_counts=True)[1])
    for members in np.split(order, ends[:-1]):
        y = np.asarray(x[members], np.float64)
        squares = np.sum(y * y, axis=1)
        # Copies are found by their vectors: a product rounds their distances.
        copy = np.unique(y, axis=0, return_inverse=True)[1].ravel()
        for start in range(0, len(y), ROWS):
            rows = slice(start, start + ROWS)
            squared = squares[rows, None] + squares - 2 * y[rows] @ y.T
            d = np.sqrt(np.maximum(squared, 0))
            d[copy[rows, None] == copy] = np.inf
            d = np.partition(d, min(NEAREST, len(y)) - 1, axis=1)[:, :NEAREST]
            exists = np.isfinite(d)
            count = exists.sum(axis=1)
            mean = np.sum(d, axis=1, where=exists) / np.maximum(count, 1)
            own[members[rows]] = np.where(count, mean, np.inf)
    return own


def _nearest_class(
    labels: np.ndarray, distances: np.ndarray, neighbors: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The nearest other class of each image among its neighbours.

    A class with fewer neighbours has the distance of the last neighbour for the rest.

    Returns:
        Distances ``[n]`` to this class, its label, and its nearest image.
    """
    n, k = neighbors.shape
    of_neighbors = labels[neighbors]
    best = np.full(n, np.inf)
    place = np.zeros(n, int)
    for first in range(k):
        same = of_neighbors == of_neighbors[:, first, None]
        # Later neighbours of the same class have the same or a larger mean.
        same[:, :first] = False
        rank = np.cumsum(same, axis=1)
        counted = same & (rank <= NEAREST)
        missing = NEAREST - counted.sum(axis=1)
        total = np.sum(distances, axis=1, where=counted) + missing * distances[:, -1]
        mean = np.where(of_neighbors[:, first] == labels, np.inf, total / NEAREST)
        better = mean < best
        best, place = np.where(better, mean, best), np.where(better, first, place)
    rows = np.arange(n)
    return best, of_neighbors[rows, place], neighbors[rows, place]
