"""Re-ranking of nearest neighbours and expansion of queries."""

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from tripletjax._api import jitted, unjitted
from tripletjax.distances import Metric, as_vectors, cosine, euclidean
from tripletjax.pairs import per_item
from tripletjax.retrieval.neighbors import _nearest_neighbors, check_vectors

# Items whose encodings are computed at a time.
ITEMS = 64


@jitted(nonnegative=("alpha",), sizes=("k",))
def expand_queries(
    queries: ArrayLike,
    references: ArrayLike,
    *,
    k: int = 10,
    alpha: ArrayLike = 3.0,
    positions: ArrayLike | None = None,
    reference_where: ArrayLike | None = None,
) -> Array:
    r"""Expand queries by their nearest references: alpha query expansion.

    $$q' = \frac{u}{\lVert u \rVert}, \qquad
      u = q + \sum_{i=1}^{k} \max(q \cdot r_i, 0)^\alpha\, r_i$$

    All vectors are scaled to unit norm first, and $r_1, \dots, r_k$ are the nearest
    references by `tripletjax.cosine`. ``alpha=0`` is the plain average of average query
    expansion.

    Memory: O(n k d + b m), with blocks of b <= 512 queries.

    Args:
        queries: vectors ``[n, d]``.
        references: vectors ``[m, d]``.
        k: the number of references in the average, at least 1.
        alpha: the exponent of similarities, a scalar of at least 0.
        positions: integers ``[n]``, the index of each query among the references, or
            -1; see `nearest_neighbors`.
        reference_where: bool ``[m]``, False for padding.

    Returns:
        Unit-norm vectors ``[n, d]``; NaN for a query that is not finite.

    Raises:
        TypeError: if an argument has the wrong dtype.
        ValueError: if shapes do not fit, k exceeds the number of references, or alpha
            is negative.

    References:
        Radenović, Tolias, Chum. Fine-tuning CNN Image Retrieval with No Human
        Annotation. 2018. arXiv:1711.02512

    >>> import jax.numpy as jnp
    >>> import tripletjax as tj
    >>> x = jnp.array([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
    >>> (expanded,) = tj.retrieval.expand_queries(x[:1], x[1:], k=1)
    >>> print([f"{value:.3f}" for value in expanded])
    ['0.977', '0.213']

    Database augmentation is the same function over the references:

    >>> augmented = tj.retrieval.expand_queries(x, x, k=1, positions=jnp.arange(3))
    >>> print(augmented.shape)
    (3, 2)
    """
    queries, references = as_vectors(
        ("queries", queries), ("references", references), rank=2
    )
    _, indices = unjitted(_nearest_neighbors)(
        queries,
        references,
        k=k,
        metric=cosine,
        positions=positions,
        reference_where=reference_where,
    )
    unit = cosine.inner_products.vectors
    q, partners = unit(queries), unit(references)[indices]
    similarity = jnp.maximum(
        jnp.einsum("qd,qkd->qk", q, partners, precision="highest"), 0
    )
    # Missing neighbours and references that are not finite have no weight.
    exists = (indices >= 0) & jnp.isfinite(similarity)
    similarity = jnp.where(exists, similarity, 0)
    weights = jnp.where(exists, similarity ** jnp.asarray(alpha, q.dtype), 0)
    partners = jnp.where(exists[..., None], partners, 0)
    return unit(q + jnp.einsum("qk,qkd->qd", weights, partners, precision="highest"))


@jitted(
    callables=("metric",), sizes=("k", "k1", "k2"), nonnegative=("distance_weight",)
)
def k_reciprocal_distances(
    queries: ArrayLike,
    references: ArrayLike | None = None,
    *,
    k: int,
    k1: int = 20,
    k2: int = 6,
    distance_weight: ArrayLike = 0.3,
    metric: Metric = euclidean,
    where: ArrayLike | None = None,
    reference_where: ArrayLike | None = None,
) -> tuple[Array, Array]:
    r"""Re-rank the k nearest references of each query by k-reciprocal neighbours.

    $$d^*(q, r) = (1 - \lambda)\, d_J(q, r) + \lambda\, d(q, r), \qquad
      d_J(q, r) = 1 - \frac{\sum_j \min(V_{qj}, V_{rj})}{\sum_j \max(V_{qj}, V_{rj})}$$

    All queries and references are one set of items. N(p, k) are an item p and its k
    nearest other items. The steps of the paper are:

    1. Reciprocal neighbours: $R(p, k) = \{g \in N(p, k) : p \in N(g, k)\}$.
    2. Expansion: $R^*(p)$ is $R(p, k_1)$ with $R(q, k_1 / 2)$ of every
       $q \in R(p, k_1)$ that has at least two thirds of it in $R(p, k_1)$.
    3. Encoding: $V_{pj} = e^{-d(p, j)}$ for $j \in R^*(p)$, otherwise 0.
    4. Local query expansion: $V_p$ is the mean of the encodings of p and of its
       $k_2 - 1$ nearest other items.

    Distances should be of order 1, as those of unit-norm vectors are.

    Memory: O((n + m) k1^2 k2 + b m) for sparse encodings and blocks of b <= 512 items.

    Args:
        queries: vectors ``[n, d]``.
        references: vectors ``[m, d]``; if None, the queries, each without itself.
        k: the number of references to re-rank for each query, at least 1.
        k1: the number of neighbours for reciprocity, at least 1.
        k2: the number of encodings in each mean, at least 1; 1 for no local expansion.
        distance_weight: lambda, from 0 to 1: the weight of the original distance.
        metric: the `Metric` that defines d.
        where: bool ``[n]``, False for padding among the queries.
        reference_where: bool ``[m]``, the same for references.

    Returns:
        Distances ``[n, k]`` in ascending order, ties by the lower index, and indices of
        references, integers ``[n, k]``. If fewer than k references are left, the rest
        have an infinite distance and index -1. Queries that are padding have none. A
        query that is not finite has distances NaN and indices -1. References that are
        not finite are left out.

    Raises:
        TypeError: if an argument has the wrong dtype.
        ValueError: if shapes do not fit, k exceeds the number of references, or a
            number is out of range.

    References:
        Zhong, Zheng, Cao, Li. Re-ranking Person Re-identification with k-reciprocal
        Encoding. 2017. arXiv:1701.08398

    >>> import jax.numpy as jnp
    >>> import tripletjax as tj
    >>> x = jnp.array([[0.0], [0.2], [0.3], [0.35], [-0.19], [-0.3], [-0.35], [-0.4]])
    >>> print(tj.retrieval.nearest_neighbors(x, x, 2, positions=jnp.arange(8))[1][0])
    [4 1]
    >>> distances, indices = tj.retrieval.k_reciprocal_distances(x, k=2, k1=3, k2=1)
    >>> print(indices[0])
    [1 4]
    """
    square = references is None
    x, y = _as_items(queries, references)
    n, m = len(x), len(y)
    if square and reference_where is not None:
        raise ValueError("reference_where requires references; pass where.")
    _check_numbers(k, m - 1 if square else m, k1=k1, k2=k2)
    real = _real(x, "where", where, "queries")
    real_references = (
        real if square else _real(y, "reference_where", reference_where, "references")
    )
    search = unjitted(_nearest_neighbors)
    _, candidates = search(
        x,
        y,
        k=k,
        metric=metric,
        positions=jnp.arange(n) if square else None,
        reference_where=real_references,
    )
    candidates = jnp.where(real[:, None], candidates, -1)
    items = x if square else jnp.concatenate([x, y])
    real_items = real if square else jnp.concatenate([real, real_references])
    items = jnp.where(real_items[:, None], items, 0)
    itself = jnp.arange(len(items))
    others = min(max(k1, k2 - 1, 1), len(items) - 1)
    _, nearest = search(
        items,
        items,
        k=others,
        metric=metric,
        positions=itself,
        reference_where=real_items,
    )
    nearest = jnp.concatenate([itself[:, None], nearest], axis=1)
    nearest = jnp.where(real_items[:, None], nearest, -1)
    vectors = metric.products.vectors(items) if metric.products else items
    encodings = _mean_encodings(*_encodings(metric, vectors, nearest, k1), nearest, k2)
    partners = jnp.where(candidates < 0, -1, candidates + (0 if square else n))
    jaccard, original = _jaccard_distances(metric, vectors, *encodings, partners)
    weight = jnp.asarray(distance_weight, original.dtype)
    distances = (1 - weight) * jaccard + weight * original
    distances = jnp.where(candidates < 0, jnp.inf, distances)
    indices = jnp.where(candidates < 0, m, candidates)
    distances, indices = lax.sort((distances, indices), num_keys=2)
    indices = jnp.where(indices < m, indices, -1)
    broken = ~jnp.isfinite(x).all(axis=1)
    if where is not None:
        broken &= jnp.asarray(where)
    return jnp.where(broken[:, None], jnp.nan, distances), indices


def _as_items(queries: ArrayLike, references: ArrayLike | None) -> tuple[Array, Array]:
    """Checked queries and references; without references, the queries twice."""
    x, y = as_vectors(
        ("queries", queries),
        ("references", queries if references is None else references),
        rank=2,
    )
    check_vectors(queries=x, references=y)
    if x.shape[1] != y.shape[1]:
        raise ValueError(
            "queries and references must have vectors of one length, got "
            f"{x.shape} and {y.shape}."
        )
    return x, y


def _check_numbers(k: int, choices: int, **others: int) -> None:
    if not 1 <= k <= choices:
        raise ValueError(f"k must be from 1 to {choices}, got {k}.")
    for name, value in others.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")


def _real(x: Array, name: str, where: ArrayLike | None, what: str) -> Array:
    """Vectors that are finite and no padding."""
    finite = jnp.isfinite(x).all(axis=1)
    if where is None:
        return finite
    return finite & per_item(name, where, len(x), what, jnp.bool_)


def _encodings(
    metric: Metric, vectors: Array, nearest: Array, k1: int
) -> tuple[Array, Array]:
    """Items ``[count, width]`` of each expanded set, and their weights.

    `count` stands for no item. Less than a third of each set that is added is new.
    """
    count = len(vectors)
    half = max(k1 // 2, 1)
    own = nearest[:, : k1 + 1]
    width = own.shape[1] * (1 + (min(half, own.shape[1] - 1) + 1) // 3)

    def reciprocal(k: int) -> Array:
        def one(item: tuple[Array, Array]) -> Array:
            i, near = item
            back = jnp.any(nearest[near, : k + 1] == i, axis=1)
            return (near >= 0) & back

        near = nearest[:, : k + 1]
        return lax.map(one, (jnp.arange(count), near), batch_size=ITEMS)

    of_k1, of_half = reciprocal(k1), reciprocal(half)

    def one(i: Array) -> tuple[Array, Array]:
        near, mutual = nearest[i, : k1 + 1], of_k1[i]
        neighbors = nearest[near, : half + 1]
        exists = of_half[near] & mutual[:, None]
        inside = jnp.any((neighbors[..., None] == near) & mutual, axis=-1) & exists
        added = 3 * jnp.sum(inside, 1) >= 2 * jnp.sum(exists, 1)
        new = exists & ~inside & added[:, None]
        ids = jnp.concatenate(
            [jnp.where(mutual, near, count), jnp.where(new, neighbors, count).ravel()]
        )
        ids = jnp.sort(ids)
        again = jnp.concatenate([jnp.zeros(1, bool), ids[1:] == ids[:-1]])
        ids = jnp.sort(jnp.where(again, count, ids))[:width]
        partners = vectors[jnp.minimum(ids, count - 1)]
        d = jax.vmap(metric._paired_checked, (None, 0))(vectors[i], partners)
        return ids, jnp.where(ids < count, jnp.exp(-d), 0)

    return lax.map(one, jnp.arange(count), batch_size=ITEMS)


def _mean_encodings(
    ids: Array, values: Array, nearest: Array, k2: int
) -> tuple[Array, Array]:
    """The means of the encodings of each item and its nearest, every item once."""
    count = len(ids)

    def one(near: Array) -> tuple[Array, Array]:
        exists = near >= 0
        share = exists / jnp.maximum(jnp.sum(exists), 1)
        weights = (values[near] * share[:, None].astype(values.dtype)).ravel()
        items = jnp.where(exists[:, None], ids[near], count).ravel()
        items, weights = lax.sort((items, weights), num_keys=1)
        total = weights
        for shift in range(1, len(near)):
            same = items[shift:] == items[:-shift]
            total = total.at[:-shift].add(jnp.where(same, weights[shift:], 0))
        again = jnp.concatenate([jnp.zeros(1, bool), items[1:] == items[:-1]])
        keep = ~again & (items < count)
        return jnp.where(keep, items, count), jnp.where(keep, total, 0)

    return lax.map(one, nearest[:, :k2], batch_size=ITEMS)


def _jaccard_distances(
    metric: Metric, vectors: Array, ids: Array, values: Array, partners: Array
) -> tuple[Array, Array]:
    """Jaccard and original distances of the first items to partners, ``[n, k]`` each.

    `partners` are items, or -1.
    """
    count = len(vectors)
    sums = jnp.sum(values, axis=1)

    def one(item: tuple[Array, Array]) -> tuple[Array, Array]:
        i, others = item
        dense = jnp.zeros(count + 1, values.dtype).at[ids[i]].add(values[i])
        shared = jnp.sum(jnp.minimum(dense[ids[others]], values[others]), axis=1)
        union = sums[i] + sums[others] - shared
        original = jax.vmap(metric._paired_checked, (None, 0))(
            vectors[i], vectors[others]
        )
        return 1 - shared / jnp.maximum(union, 1e-30), original

    items = jnp.arange(len(partners)), jnp.maximum(partners, 0)
    return lax.map(one, items, batch_size=ITEMS)
