"""Exact nearest-neighbour search."""

import functools
from collections.abc import Callable, Sequence

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from tripletjax._api import jitted
from tripletjax._pairwise.batch import single_batch
from tripletjax.distances import Metric, as_vectors, euclidean
from tripletjax.pairs import per_item
from tripletjax.retrieval.rankings import Rankings, masks_of, per_query, with_masks


def nearest_neighbors(
    queries: ArrayLike,
    references: ArrayLike,
    k: int,
    *,
    metric: Metric = euclidean,
    positions: ArrayLike | None = None,
    reference_where: ArrayLike | None = None,
) -> tuple[Array, Array]:
    r"""Find the k nearest references of each query.

    $$i_1, \dots, i_k = \text{the } k \text{ indices } j \text{ of least } d(q, r_j)$$

    The nearest comes first, ties by the lower index. The search is exact and takes
    O(n k + b m) memory, with blocks of b <= 512 queries.

    Memory: O(n k + m d), and up to 512 rows of distances.

    Args:
        queries: vectors ``[n, d]``.
        references: vectors ``[m, d]``.
        k: the number of neighbours, at least 1.
        metric: the `Metric` that defines d. If it is made of inner products, these
            select the neighbours, and distances of differences order them.
        positions: integers ``[n]``, the index of each query among the references, so
            that it is not its own neighbour; -1 if it is not among them.
        reference_where: bool ``[m]``, False for padding; or bool ``[n, m]``, True for
            the references that each query may have.

    Returns:
        Distances ``[n, k]`` and indices of references, integers ``[n, k]``. If fewer
        than k references are left, the rest have an infinite distance and index -1. A
        query that is not finite has distances NaN and indices -1. References that are
        not finite come last.

    Raises:
        TypeError: if an argument has the wrong dtype.
        ValueError: if shapes do not fit, or k exceeds the number of references.

    >>> import jax.numpy as jnp
    >>> import tripletjax as tj
    >>> x = jnp.array([[0.0], [1.0], [3.0]])
    >>> distances, indices = tj.retrieval.nearest_neighbors(x[:1], x[1:], 2)
    >>> print(distances, indices)
    [[1. 3.]] [[0 1]]
    """
    return _nearest_neighbors(
        queries,
        references,
        k=k,
        metric=metric,
        positions=positions,
        reference_where=reference_where,
    )


@jitted(callables=("metric",), sizes=("k",))
def _nearest_neighbors(
    queries: ArrayLike,
    references: ArrayLike,
    *,
    k: int,
    metric: Metric,
    positions: ArrayLike | None = None,
    reference_where: ArrayLike | None = None,
) -> tuple[Array, Array]:
    queries, references = as_vectors(
        ("queries", queries), ("references", references), rank=2
    )
    check_vectors(queries=queries, references=references)
    m = len(references)
    choices = m if positions is None else m - 1
    if not 1 <= k <= choices:
        without = "" if positions is None else " without the query itself"
        raise ValueError(
            f"k must be from 1 to {choices}, the number of references{without}, got "
            f"{k}."
        )
    rankings = _rankings(metric, queries, references, positions, reference_where)
    neighbors = functools.partial(rankings.nearest, rankings.tiles(), k)
    return _with_broken(rankings, neighbors)


def nearest_one(
    queries: Array, references: Array, reference_where: Array, *, metric: Metric
) -> Array:
    """The index ``[n]`` of the nearest reference of each query, -1 if there is none.

    The arguments must be checked before.
    """
    rankings = _rankings(metric, queries, references, None, reference_where)
    nearest = functools.partial(rankings.nearest, rankings.tiles(), 1)
    return _with_broken(rankings, nearest)[1][:, 0]


def nearest_of_classes(
    queries: Array,
    references: Array,
    labels: Array,
    *,
    k: int,
    metric: Metric,
    reference_where: Array,
) -> tuple[Array, Array]:
    """Distances and indices of the nearest reference of each of the k nearest classes.

    The arguments must be checked before.
    """
    rankings = _rankings(metric, queries, references, None, reference_where)
    tiles = rankings.tiles()
    nearest = functools.partial(rankings.nearest_of_classes, tiles, labels, k)
    return _with_broken(rankings, nearest)


def _rankings(
    metric: Metric,
    queries: Array,
    references: Array,
    positions: ArrayLike | None,
    reference_where: ArrayLike | None,
) -> Rankings:
    n, m = len(queries), len(references)
    each, reference_where = per_query(reference_where, n, m)
    if positions is None:
        positions = jnp.full(n, -1)
    positions = per_item("positions", positions, n, "queries", jnp.integer)
    batch = single_batch(
        metric,
        queries,
        jnp.zeros(n, int),
        references=references,
        reference_labels=jnp.zeros(m, int),
        positions=positions,
        reference_where=reference_where,
    )
    if each is not None:
        batch = with_masks(batch, masks_of(batch, each))
    return Rankings.of(metric, batch)


def _with_broken(
    rankings: Rankings, nearest: Callable[[Array], Sequence[Array]]
) -> tuple[Array, Array]:
    """Distances and indices for all queries; NaN and -1 for those not finite."""
    distances, indices = rankings.fill(nearest)
    broken = ~jnp.isfinite(rankings.batch.anchors).all(axis=-1, keepdims=True)
    return jnp.where(broken, jnp.nan, distances), jnp.where(broken, -1, indices)


def check_vectors(**named: Array) -> None:
    for name, array in named.items():
        if array.ndim != 2 or array.size == 0:
            raise ValueError(f"{name} must be [n, d], got shape {array.shape}.")
