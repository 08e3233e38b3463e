"""Is it any good, ranked: neighbours, and metrics of how early the right ones come.

Every query ranks the references by distance, the nearest first and ties by the lower
index; references with the query's label are relevant. A query is never its own
reference, and one without any relevant reference is left out of the means and counted.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from tripletjax.distances import Metric, euclidean
from tripletjax.pairs import pair_masks
from tripletjax.public import as_integer, public

# Queries are ranked this many at a time, to bound the memory.
BLOCK = 256


class RetrievalMetrics(NamedTuple):
    """Means over the queries that have a relevant reference, between 0 and 1.

    Attributes:
        recall_at_k: ``[len(ks)]``, for each k the share of queries with a relevant
            reference among the first k.
        precision_at_1: the share of queries whose nearest reference is relevant.
        r_precision: the share of relevant references among the first R, where R is how
            many the query has.
        map_at_r: the precision at each relevant place among the first R, over R.
        mean_average_precision: the precision at each relevant place, over R.
        mean_reciprocal_rank: one over the rank of the first relevant reference.
        queries: the number of queries that have a relevant reference.
    """

    recall_at_k: Array
    precision_at_1: Array
    r_precision: Array
    map_at_r: Array
    mean_average_precision: Array
    mean_reciprocal_rank: Array
    queries: Array


def nearest_neighbors(
    queries: ArrayLike,
    references: ArrayLike,
    k: int,
    *,
    metric: Metric = euclidean,
    positions: ArrayLike | None = None,
) -> tuple[Array, Array]:
    """The k nearest references of each query, nearest first.

    Args:
        queries: vectors ``[n, d]``.
        references: vectors ``[m, d]``.
        k: how many neighbours.
        metric: how far two vectors are apart.
        positions: integers ``[n]``, the place of each query among the references, so
            that it is not its own neighbour; -1 for nowhere.

    Returns:
        Distances and indices of the references, both ``[n, k]``.

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
        queries, references, k=k, metric=metric, positions=positions
    )


@public(callables=("metric",), static=("k",))
def _nearest_neighbors(
    queries: ArrayLike,
    references: ArrayLike,
    *,
    k: int,
    metric: Metric,
    positions: ArrayLike | None,
) -> tuple[Array, Array]:
    queries, references = jnp.asarray(queries), jnp.asarray(references)
    _check_vectors(queries=queries, references=references)
    n, m = len(queries), len(references)
    choices = m if positions is None else m - 1
    if not 1 <= k <= choices:
        but = "" if positions is None else " but the query itself"
        raise ValueError(
            f"k must be from 1 to {choices}, all references{but}; got {k}."
        )
    positions = _positions(positions, n)

    def rank(query_and_position: tuple[Array, Array]) -> Array:
        query, position = query_and_position
        distances = metric(query[None], references)[0]
        distances = jnp.where(jnp.arange(m) == position, jnp.inf, distances)
        return jax.lax.top_k(-distances, k)[1]

    indices = jax.lax.map(rank, (queries, positions), batch_size=BLOCK)
    partners = jnp.broadcast_to(queries[:, None], (n, k, queries.shape[-1]))
    return metric.paired(partners, references[indices]), indices


def evaluate(
    embeddings: ArrayLike,
    labels: ArrayLike,
    *,
    ks: Sequence[int] = (1, 2, 4, 8),
    references: ArrayLike | None = None,
    reference_labels: ArrayLike | None = None,
    positions: ArrayLike | None = None,
    metric: Metric = euclidean,
) -> RetrievalMetrics:
    r"""How well the nearest references share the label of the query.

    With rel(i) whether the i-th nearest reference is relevant, P(i) the share of
    relevant ones among the first i, and R the number of relevant references,

    $$\text{MAP@R} = \frac{1}{R} \sum_{i=1}^{R} P(i)\, \text{rel}(i), \qquad
      \text{AP} = \frac{1}{R} \sum_{i=1}^{m} P(i)\, \text{rel}(i).$$

    Args:
        embeddings: queries ``[n, d]``.
        labels: integers ``[n]``.
        ks: at which ranks to report recall.
        references: vectors ``[m, d]`` to rank. If not given, all other queries.
        reference_labels: integers ``[m]``, with `references`.
        positions: integers ``[n]``, the place of each query among the references, or
            -1; nowhere if `references` are given without it.
        metric: how far two vectors are apart.

    Returns:
        `RetrievalMetrics`; all 0 if no query has a relevant reference.

    Raises:
        TypeError: if an argument has the wrong dtype.
        ValueError: if shapes do not fit, `ks` are not positive integers, or only one of
            `references` and `reference_labels` is given.

    References:
        Musgrave, Belongie, Lim. A Metric Learning Reality Check. 2020.
        arXiv:2003.08505 (MAP@R, R-precision)

    >>> import jax.numpy as jnp
    >>> import tripletjax as tj
    >>> x = jnp.array([[0.0], [1.0], [1.5], [2.6]])
    >>> metrics = tj.retrieval.evaluate(x, jnp.array([0, 0, 1, 1]), ks=(1, 2))
    >>> print(metrics.recall_at_k, metrics.map_at_r)
    [0.5 1. ] 0.5
    """
    return _evaluate(
        embeddings,
        labels,
        ks=_ranks(ks),
        references=references,
        reference_labels=reference_labels,
        positions=positions,
        metric=metric,
    )


@public(callables=("metric",), static=("ks",))
def _evaluate(
    embeddings: ArrayLike,
    labels: ArrayLike,
    *,
    ks: tuple[int, ...],
    references: ArrayLike | None,
    reference_labels: ArrayLike | None,
    positions: ArrayLike | None,
    metric: Metric,
) -> RetrievalMetrics:
    embeddings = jnp.asarray(embeddings)
    if (references is None) != (reference_labels is None):
        raise ValueError("references and reference_labels go together: give both.")
    labels = jnp.asarray(labels)
    if references is None:
        references, reference_labels = embeddings, labels
        if positions is None:
            positions = jnp.arange(len(embeddings))
    references, reference_labels = (
        jnp.asarray(references),
        jnp.asarray(reference_labels),
    )
    _check_vectors(embeddings=embeddings, references=references)
    for name, rows, array in (
        ("labels", labels, embeddings),
        ("reference_labels", reference_labels, references),
    ):
        if rows.shape != array.shape[:1]:
            raise ValueError(
                f"{name} must have one entry per vector, got shapes {rows.shape} and "
                f"{array.shape}."
            )
    m = len(references)
    positions = _positions(positions, len(embeddings))

    def one(query: tuple[Array, Array, Array]) -> tuple[Array, ...]:
        x, label, position = query
        relevant = pair_masks(
            label[None], reference_labels, positions=position[None]
        ).positive[0]
        distances = metric(x[None], references)[0]
        # The query itself comes after everything else.
        distances = jnp.where(jnp.arange(m) == position, jnp.inf, distances)
        return _of_ranking(relevant[jnp.argsort(distances)], ks)

    values = jax.lax.map(one, (embeddings, labels, positions), batch_size=BLOCK)
    *values, has_relevant = values
    queries = jnp.sum(has_relevant)

    def mean(value: Array) -> Array:
        # Queries without a relevant reference have only zeros.
        return jnp.sum(value, axis=0) / jnp.maximum(queries, 1)

    return RetrievalMetrics(*map(mean, values), queries)


def _of_ranking(relevant: Array, ks: Sequence[int]) -> tuple[Array, ...]:
    """The metrics of one query from which of its ranked references are relevant."""
    rank = jnp.arange(1, len(relevant) + 1)
    count = jnp.sum(relevant)
    divisor = jnp.maximum(count, 1)
    precision = jnp.cumsum(relevant) / rank
    within = relevant & (rank <= count)
    first = jnp.argmax(relevant) + 1
    found = count > 0
    return (
        jnp.array([found & (first <= k) for k in ks], precision.dtype),
        relevant[0].astype(precision.dtype),
        jnp.sum(within) / divisor,
        jnp.sum(precision * within) / divisor,
        jnp.sum(precision * relevant) / divisor,
        jnp.where(found, 1 / first, 0),
        found,
    )


def _ranks(ks: Sequence[int]) -> tuple[int, ...]:
    if not isinstance(ks, Iterable):
        raise TypeError(f"ks must be a sequence of integers, got {ks!r}.")
    ks = tuple(as_integer("ks", k) for k in ks)
    if any(k < 1 for k in ks):
        raise ValueError(f"ks must be positive, got {ks}.")
    return ks


def _positions(positions: ArrayLike | None, n: int) -> Array:
    if positions is None:
        return jnp.full(n, -1)
    positions = jnp.asarray(positions)
    if not jnp.issubdtype(positions.dtype, jnp.integer):
        raise TypeError(f"positions must be integers, got dtype {positions.dtype}.")
    if positions.shape != (n,):
        raise ValueError(
            f"positions must have one entry for each of the {n} queries, got shape "
            f"{positions.shape}."
        )
    return positions


def _check_vectors(**named: Array) -> None:
    for name, array in named.items():
        if array.ndim != 2 or array.size == 0:
            raise ValueError(f"{name} must be [n, d], got shape {array.shape}.")
