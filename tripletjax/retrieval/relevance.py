"""Metrics of graded relevance: similarity precision and score at top K."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from tripletjax._api import jitted
from tripletjax.distances import Metric, as_vectors, euclidean
from tripletjax.pairs import per_item

# The number of differences of vector components that are computed at a time.
VALUES = 2**22


class ScoreAtTopK(NamedTuple):
    """Result of `score_at_top_k`, over the triplets that count.

    Attributes:
        score: the number of triplets in the right order, minus the number of others.
        count: the number of triplets that count.
    """

    score: Array
    count: Array


@jitted(callables=("metric",))
def similarity_precision(
    embeddings: ArrayLike,
    triplets: ArrayLike,
    *,
    metric: Metric = euclidean,
    where: ArrayLike | None = None,
) -> Array:
    r"""Compute the share of triplets whose positive is nearer than their negative.

    $$\frac{1}{|T|} \sum_{(a, p, n) \in T} [d(a, p) < d(a, n)]$$

    Memory: O(n d + t d).

    Args:
        embeddings: vectors ``[n, d]``.
        triplets: integers ``[t, 3]``: indices of a query, of an item that is more
            relevant to the query, and of an item that is less relevant.
        metric: the `Metric` d.
        where: bool ``[t]``, False for padding.

    Returns:
        A scalar from 0 to 1; NaN if there is no triplet, or a distance is NaN.

    Raises:
        TypeError: if an argument has the wrong dtype.
        ValueError: if shapes do not fit.

    References:
        Wang et al. Learning Fine-Grained Image Similarity with Deep Ranking. 2014.
        arXiv:1404.4661

    >>> import jax.numpy as jnp
    >>> import tripletjax as tj
    >>> x = jnp.array([[0.0], [1.0], [3.0]])
    >>> print(tj.retrieval.similarity_precision(x, jnp.array([[0, 1, 2], [1, 2, 0]])))
    0.5
    """
    x, triplets, real = _checked(embeddings, triplets, where)
    anchor, positive, negative = (x[triplets[:, i]] for i in range(3))
    near, far = metric.paired(anchor, positive), metric.paired(anchor, negative)
    count = jnp.sum(real)
    correct = jnp.sum((near < far) & real)
    defined = (count > 0) & ~jnp.any(real & (jnp.isnan(near) | jnp.isnan(far)))
    return jnp.where(defined, correct / jnp.maximum(count, 1), jnp.nan)


@jitted(callables=("metric",), sizes=("k",))
def score_at_top_k(
    embeddings: ArrayLike,
    triplets: ArrayLike,
    *,
    k: int = 30,
    groups: ArrayLike | None = None,
    metric: Metric = euclidean,
    where: ArrayLike | None = None,
) -> ScoreAtTopK:
    r"""Compute the score at top K: correctly minus incorrectly ordered triplets.

    $$\sum_{(a, p, n) \in T_k} \begin{cases} 1 & d(a, p) < d(a, n) \\ -1 &
      \text{otherwise} \end{cases}$$

    with $T_k$ the triplets whose positive or negative is among the k items nearest to
    the query a, ties by the lower index.

    Memory: O(n d + t d), and a block of distances.

    Args:
        embeddings: vectors ``[n, d]``.
        triplets: integers ``[t, 3]``, as in `similarity_precision`.
        k: the number of nearest items, at least 1.
        groups: integers ``[n]``: a query ranks only items of its own group, such as
            the results of one text search. If not given, all items.
        metric: the `Metric` d.
        where: bool ``[t]``, False for padding.

    Returns:
        `ScoreAtTopK`; the score is NaN if a distance of a triplet is NaN.

    Raises:
        TypeError: if an argument has the wrong dtype.
        ValueError: if shapes do not fit, or k is less than 1.

    References:
        Wang et al. Learning Fine-Grained Image Similarity with Deep Ranking. 2014.
        arXiv:1404.4661 (with k = 30)

    >>> import jax.numpy as jnp
    >>> import tripletjax as tj
    >>> x = jnp.array([[0.0], [1.0], [3.0], [7.0]])
    >>> triplets = jnp.array([[0, 1, 2], [1, 2, 0], [0, 3, 2]])
    >>> result = tj.retrieval.score_at_top_k(x, triplets, k=1)
    >>> print(result.score, result.count)
    0.0 2
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}.")
    x, triplets, real = _checked(embeddings, triplets, where)
    n = len(x)
    if groups is None:
        groups = jnp.zeros(n, int)
    groups = per_item("groups", groups, n, "embeddings", jnp.integer)
    indices = jnp.arange(n)

    def score(triplet: Array) -> tuple[Array, Array, Array]:
        query, positive, negative = triplet
        distances = metric.paired(jnp.broadcast_to(x[query], x.shape), x)
        ranked = (groups == groups[query]) & (indices != query)

        def in_top_k(item: Array) -> Array:
            before = distances < distances[item]
            before |= (distances == distances[item]) & (indices < item)
            return (jnp.sum(before & ranked) < k) & ranked[item]

        counts = in_top_k(positive) | in_top_k(negative)
        return counts, distances[positive], distances[negative]

    block = max(1, VALUES // x.size)
    counted, near, far = lax.map(score, triplets, batch_size=block)
    counted &= real
    total = jnp.sum(jnp.where(near < far, 1.0, -1.0), where=counted)
    broken = jnp.any(real & (jnp.isnan(near) | jnp.isnan(far)))
    return ScoreAtTopK(jnp.where(broken, jnp.nan, total), jnp.sum(counted))


def _checked(
    embeddings: ArrayLike, triplets: ArrayLike, where: ArrayLike | None
) -> tuple[Array, Array, Array]:
    (x,) = as_vectors(("embeddings", embeddings), rank=2)
    triplets = jnp.asarray(triplets)
    if x.ndim != 2 or x.size == 0:
        raise ValueError(f"embeddings must be [n, d], got shape {x.shape}.")
    if not jnp.issubdtype(triplets.dtype, jnp.integer):
        raise TypeError(f"triplets must be integers, got dtype {triplets.dtype}.")
    if triplets.ndim != 2 or triplets.shape[1] != 3:
        raise ValueError(f"triplets must be [t, 3], got shape {triplets.shape}.")
    t = len(triplets)
    real = jnp.ones(t, bool) if where is None else where
    real = per_item("where", real, t, "triplets", jnp.bool_)
    # Indices of padding may be out of range.
    return x, jnp.where(real[:, None], triplets, 0), real
