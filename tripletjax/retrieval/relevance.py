"""Are images in the order of their relevance: the measures of Deep Ranking."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from tripletjax._api import jitted
from tripletjax.distances import Metric, as_vectors, euclidean
from tripletjax.pairs import per_item

# So many values of differences are made at a time.
VALUES = 2**22


class ScoreAtTopK(NamedTuple):
    """How triplets are ordered whose images are found early.

    Attributes:
        score: those in the right order less those that are not.
        count: how many there are.
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
    r"""The share of triplets whose positive is nearer than their negative.

    $$\frac{1}{|T|} \sum_{(a, p, n) \in T} [d(a, p) < d(a, n)]$$

    Memory: O(n d + t d).

    Args:
        embeddings: vectors ``[n, d]``.
        triplets: integers ``[t, 3]``, the indices of each query, of an image that is
            more relevant to it, and of one that is less.
        metric: how far two vectors are apart.
        where: bool ``[t]``, False for padding.

    Returns:
        A scalar; NaN if there is no triplet, or a distance is NaN.

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
    right = jnp.sum((near < far) & real)
    known = (count > 0) & ~jnp.any(real & (jnp.isnan(near) | jnp.isnan(far)))
    return jnp.where(known, right / jnp.maximum(count, 1), jnp.nan)


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
    """How many triplets are in order, less those that are not, of what is found early.

    A triplet counts if its positive or its negative is among the k images that are
    nearest to its query, of equally near ones those of lower indices.

    Memory: O(n d + t d), and a block of distances.

    Args:
        embeddings: vectors ``[n, d]``.
        triplets: integers ``[t, 3]``, as in `similarity_precision`.
        k: how many nearest images.
        groups: integers ``[n]``: only images of the query's group are ranked, such as
            those that one search by text has found. If not given, all are.
        metric: how far two vectors are apart.
        where: bool ``[t]``, False for padding.

    Returns:
        `ScoreAtTopK`; a score of NaN if a distance of a triplet is NaN.

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
    >>> found = tj.retrieval.score_at_top_k(x, triplets, k=1)
    >>> print(found.score, found.count)
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

    def early(triplet: Array) -> tuple[Array, Array, Array]:
        query, *both = triplet
        distances = metric.paired(jnp.broadcast_to(x[query], x.shape), x)
        ranked = (groups == groups[query]) & (indices != query)

        def rank(one: Array) -> Array:
            before = distances < distances[one]
            before |= (distances == distances[one]) & (indices < one)
            return jnp.sum(before & ranked)

        inside = [(rank(one) < k) & ranked[one] for one in both]
        positive, negative = both
        return inside[0] | inside[1], distances[positive], distances[negative]

    block = max(1, VALUES // x.size)
    counted, near, far = lax.map(early, triplets, batch_size=block)
    counted &= real
    score = jnp.sum(jnp.where(near < far, 1.0, -1.0), where=counted)
    broken = jnp.any(real & (jnp.isnan(near) | jnp.isnan(far)))
    return ScoreAtTopK(jnp.where(broken, jnp.nan, score), jnp.sum(counted))


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
    # Whatever padding holds, it names somebody.
    return x, jnp.where(real[:, None], triplets, 0), real
