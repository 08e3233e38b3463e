"""Search with re-ranking: the nearest images in the order of shared neighbours."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

import tripletjax as tj
from tripletjax.apps.search.index import Hit, Index

# Nearest images of a query, among which neighbours are compared.
CANDIDATES = 1000
# The least number of images that are re-ranked, of which the first k are hits.
RERANKED = 100


class RerankedHit(NamedTuple):
    """A hit and its distance by k-reciprocal neighbours.

    Attributes:
        hit: an image near the query, with its Euclidean distance.
        distance: as `tripletjax.retrieval.k_reciprocal_distances` defines it.
    """

    hit: Hit
    distance: float


def search_reranked(
    index: Index,
    vectors: np.ndarray,
    k: int = 8,
    *,
    within: float | None = None,
    classes: Sequence[str] | None = None,
    leave_out: Sequence[Sequence[str]] | None = None,
    approximate: bool = False,
) -> list[list[RerankedHit]]:
    """Find the nearest images of each query, and re-rank them.

    An image comes first if it and the query are among each other's nearest, and share
    such neighbours. Neighbours are compared among the 1,000 nearest images of the
    query, at any distance.

    Args:
        index: up to date.
        vectors: of the queries ``[q, d]``.
        k: the largest number of hits.
        within: the largest Euclidean distance of a hit.
        classes, leave_out, approximate: as in `Index.search`.

    Returns:
        Hits for each query, the nearest by k-reciprocal neighbours first.

    Raises:
        ValueError: if an argument is out of range, or a vector is not finite.
    """
    # Its checks are those of a search.
    index.search(vectors[:0], k, within=within)
    candidates = index.search(
        vectors,
        max(CANDIDATES, k),
        classes=classes,
        leave_out=leave_out,
        approximate=approximate,
    )
    paths, x = index.vectors()
    rows = {path: row for row, path in enumerate(paths)}
    return [
        _rerank(query, hits, x[[rows[hit.path] for hit in hits]], k, within)
        for query, hits in zip(np.asarray(vectors, np.float32), candidates)
    ]


def _rerank(
    query: np.ndarray, hits: list[Hit], x: np.ndarray, k: int, within: float | None
) -> list[RerankedHit]:
    if not hits:
        return []
    # All queries of an index share a shape, and so a program.
    size = max(CANDIDATES, len(hits))
    distances, order = tj.retrieval.k_reciprocal_distances(
        query[None],
        np.pad(x, ((0, size - len(x)), (0, 0))),
        k=min(max(RERANKED, 4 * k), size),
        reference_where=np.arange(size) < len(x),
    )
    reranked = [
        RerankedHit(hits[row], float(distance))
        for row, distance in zip(np.asarray(order)[0], np.asarray(distances)[0])
        if row >= 0 and (within is None or hits[row].distance <= within)
    ]
    return reranked[:k]
