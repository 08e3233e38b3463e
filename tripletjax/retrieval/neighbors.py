"""The nearest references of each query."""

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
    """The k nearest references of each query, nearest first, ties by the lower index.

    Exact, in O(n k + block m) memory.

    Memory: O(n k + m d), and up to 512 rows of distances.

    Args:
        queries: vectors ``[n, d]``.
        references: vectors ``[m, d]``.
        k: how many neighbours.
        metric: how far two vectors are apart. Where it is made of inner products,
            these choose the neighbours, and differences put them in order.
        positions: integers ``[n]``, the index of each query among the references, so
            that it is not its own neighbour; -1 for nowhere.
        reference_where: bool ``[m]``, False for padding; or ``[n, m]``, which of them
            each query may have.

    Returns:
        Distances and indices of the references, both ``[n, k]``. Where padding leaves
        fewer than k, the rest are infinitely far, with index -1. A query that is not
        finite has distances NaN and indices -1; references that are not come last.

    Raises:
        TypeError: if an argument has the wrong dtype.
        ValueError: if shapes do not fit, or there are not k references to choose from.

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
        but = "" if positions is None else " but the query itself"
        raise ValueError(
            f"k must be from 1 to {choices}, all references{but}; got {k}."
        )
    rankings = _rankings(metric, queries, references, positions, reference_where)
    neighbors = functools.partial(rankings.nearest, rankings.tiles(), k)
    return _with_broken(rankings, neighbors)


def nearest_one(
    queries: Array, references: Array, reference_where: Array, *, metric: Metric
) -> Array:
    """The index ``[n]`` of the nearest reference of each query, -1 if there is none.

    The arguments have been checked.
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

    The arguments have been checked.
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
    """Distances and indices of all queries; NaN and -1 of those that are not finite."""
    distances, indices = rankings.fill(nearest)
    broken = ~jnp.isfinite(rankings.batch.anchors).all(axis=-1, keepdims=True)
    return jnp.where(broken, jnp.nan, distances), jnp.where(broken, -1, indices)


def check_vectors(**named: Array) -> None:
    for name, array in named.items():
        if array.ndim != 2 or array.size == 0:
            raise ValueError(f"{name} must be [n, d], got shape {array.shape}.")
