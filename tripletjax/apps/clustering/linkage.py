"""Average linkage of vectors on the graph of their nearest neighbours.

Two groups A and B are at the root mean square of the distances of their pairs:

    d(A, B)^2 = mean |a - b|^2 = var A + var B + |mean A - mean B|^2

Sums of vectors are enough for this distance, so that no matrix of pairs is needed. The
nearest groups merge first. In the end, no two groups are within the threshold.
"""

import dataclasses

import numpy as np
from tqdm import tqdm

import tripletjax as tj

# Nearest neighbours of each group. Groups with more neighbours within the threshold are
# searched again.
NEIGHBORS = 16
# Groups that are searched at a time, and pairs whose distances are computed at a time.
BLOCK, PAIRS = 4096, 2**16
# The number of groups to search in is padded to a power of two, at least to this.
LEAST = 256


def group_vectors(
    x: np.ndarray,
    threshold: float,
    *,
    neighbors: int = NEIGHBORS,
    progress: bool = False,
) -> np.ndarray:
    """Group vectors by average linkage.

    Memory: O(n k + n d), with k nearest neighbours of each vector.

    Args:
        x: vectors ``[n, d]``.
        threshold: largest distance of two groups that merge: the root mean square of
            the Euclidean distances of their pairs.
        neighbors: number of nearest groups that are compared at a time, at least 1.
        progress: whether to show a progress bar.

    Returns:
        Integers ``[n]``: the lowest index in the group of each vector.

    Raises:
        ValueError: if shapes do not fit, a vector is not finite, or a number is out of
            range.
    """
    x = np.asarray(x, np.float32)
    if x.ndim != 2:
        raise ValueError(f"x must be vectors [n, d], got shape {x.shape}.")
    if not np.isfinite(x).all():
        raise ValueError("x must be finite.")
    if not threshold >= 0:
        raise ValueError(f"threshold must be at least 0, got {threshold}.")
    if neighbors < 1:
        raise ValueError(f"neighbors must be at least 1, got {neighbors}.")
    if not len(x):
        return np.zeros(0, int)
    # Copies would fill the lists of neighbours.
    _, first, copies = np.unique(x, axis=0, return_index=True, return_inverse=True)
    order = np.argsort(first)
    rank = np.argsort(order)
    groups = _Groups.of(x[first[order]], np.bincount(copies)[order])
    pending = groups.alive
    with tqdm(desc="grouping", unit="group", disable=not progress) as bar:
        while len(pending) and len(groups.alive) > 1:
            bar.total = bar.n + len(pending)
            a, b = groups.find_nearest(pending, neighbors, threshold, bar)
            pending = groups.merge(a, b, threshold)
    return first[order][groups.root[rank[copies]]]


@dataclasses.dataclass
class _Groups:
    """Groups of vectors, numbered by one of their vectors.

    Attributes:
        root: number of the group of each vector ``[n]``.
        sums: of the vectors of each group ``[n, d]``.
        squares: sums of squared norms ``[n]``.
        counts: of the vectors of each group ``[n]``.
        known: squared distance up to which the neighbours of each group are known
            ``[n]``.
    """

    root: np.ndarray
    sums: np.ndarray
    squares: np.ndarray
    counts: np.ndarray
    known: np.ndarray

    @classmethod
    def of(cls, x: np.ndarray, counts: np.ndarray) -> "_Groups":
        """Groups of one vector each, with the number of its copies."""
        x, counts = x.astype(np.float64), counts.astype(np.float64)
        squares = counts * np.einsum("nd,nd->n", x, x)
        sums, known = counts[:, None] * x, np.zeros(len(x))
        return cls(np.arange(len(x)), sums, squares, counts, known)

    @property
    def alive(self) -> np.ndarray:
        """Numbers of the groups."""
        return np.flatnonzero(self.root == np.arange(len(self.root)))

    def squared_distances(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Mean squared distances ``[p]`` of pairs of groups."""
        parts = [np.zeros(0)]
        for start in range(0, len(a), PAIRS):
            i, j = a[start : start + PAIRS], b[start : start + PAIRS]
            products = np.einsum("pd,pd->p", self.sums[i], self.sums[j])
            products /= self.counts[i] * self.counts[j]
            means = self.squares[i] / self.counts[i] + self.squares[j] / self.counts[j]
            parts.append(means - 2 * products)
        return np.concatenate(parts)

    def find_nearest(
        self, pending: np.ndarray, neighbors: int, threshold: float, bar: tqdm
    ) -> tuple[np.ndarray, np.ndarray]:
        """Find the nearest groups of some groups: pairs within the threshold."""
        alive = self.alive
        m = len(alive)
        means = self.sums[alive] / self.counts[alive, None]
        variances = self.squares[alive] / self.counts[alive]
        variances -= np.einsum("nd,nd->n", means, means)
        spread = np.sqrt(np.maximum(variances, 0))[:, None]
        queries = np.concatenate([means, 0 * spread], axis=1).astype(np.float32)
        references = np.concatenate([means, spread], axis=1).astype(np.float32)
        # Few shapes are compiled.
        size = 2 ** max(m - 1, neighbors, LEAST - 1).bit_length()
        references = np.pad(references, ((0, size - m), (0, 0)))
        real = np.arange(size) < m
        block = min(BLOCK, size)
        places = np.searchsorted(alive, pending)
        a, b = [], []
        for start in range(0, len(places), block):
            some = places[start : start + block]
            padded = np.resize(some, block)
            _, near = tj.retrieval.nearest_neighbors(
                queries[padded],
                references,
                neighbors,
                positions=padded,
                reference_where=real,
            )
            near = np.asarray(near)[: len(some)].ravel()
            i = np.repeat(alive[some], neighbors)
            j = alive[near]
            d = self.squared_distances(i, j)
            close = (near >= 0) & (d <= threshold**2)
            a.append(i[close])
            b.append(j[close])
            # Beyond a list that is full, there may be more within the threshold.
            full = close.reshape(-1, neighbors).all(axis=1)
            farthest = d.reshape(-1, neighbors).max(axis=1)
            self.known[alive[some]] = np.where(full, farthest, np.inf)
            bar.update(len(some))
        return np.concatenate(a), np.concatenate(b)

    def merge(self, a: np.ndarray, b: np.ndarray, threshold: float) -> np.ndarray:
        """Merge pairs of groups that are each other's nearest, until none is known.

        No other merge brings two such groups apart or another group between them, so
        that all of them merge at once. A pair beyond the threshold can be left out: a
        mean over its pairs and closer ones is within the threshold by the closer ones.

        Returns:
            Groups whose neighbours must be searched again.
        """
        n, limit = len(self.root), threshold**2
        changed = np.zeros(n, bool)
        a, b = _unique_pairs(a, b, n)
        d = self.squared_distances(a, b)
        while True:
            close = d <= limit
            a, b, d = a[close], b[close], d[close]
            rank = np.empty(len(a), int)
            rank[np.lexsort((b, a, d))] = np.arange(len(a))
            best = np.full(n, len(a))
            np.minimum.at(best, a, rank)
            np.minimum.at(best, b, rank)
            mutual = (best[a] == rank) & (best[b] == rank)
            mutual &= d <= np.minimum(self.known[a], self.known[b])
            to, gone = a[mutual], b[mutual]
            if not len(to):
                break
            for values in (self.sums, self.squares, self.counts):
                values[to] += values[gone]
            self.known[to] = np.minimum(self.known[to], self.known[gone])
            new = np.arange(n)
            new[gone] = to
            self.root = new[self.root]
            a, b = new[a], new[b]
            merged = np.zeros(n, bool)
            merged[to] = True
            changed |= merged
            again = merged[a] | merged[b]
            i, j = _unique_pairs(a[again & (a != b)], b[again & (a != b)], n)
            a, b = np.concatenate([a[~again], i]), np.concatenate([b[~again], j])
            d = np.concatenate([d[~again], self.squared_distances(i, j)])
        alive = self.alive
        waiting = np.zeros(n, bool)
        waiting[a] = waiting[b] = True
        waiting |= changed | np.isfinite(self.known)
        return alive[waiting[alive]]


def _unique_pairs(
    a: np.ndarray, b: np.ndarray, n: int
) -> tuple[np.ndarray, np.ndarray]:
    """Pairs once each, the lower number first."""
    pairs = np.unique(np.minimum(a, b).astype(np.int64) * n + np.maximum(a, b))
    return pairs // n, pairs % n
