"""Few-shot classification, by the nearest of a few labelled vectors."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from tripletjax._api import jitted
from tripletjax.distances import Metric, as_vectors, euclidean
from tripletjax.pairs import per_item, same_labels
from tripletjax.retrieval.neighbors import nearest_one


@jitted(callables=("metric",), flags=("class_means",))
def few_shot_accuracy(
    support: ArrayLike,
    support_labels: ArrayLike,
    queries: ArrayLike,
    query_labels: ArrayLike,
    *,
    metric: Metric = euclidean,
    class_means: bool = False,
    support_where: ArrayLike | None = None,
    where: ArrayLike | None = None,
) -> Array:
    """The share of queries whose nearest support has their label, per episode.

    With n classes of k support vectors each, n-way k-shot accuracy.

    Memory: O((s + q) d), and up to 512 rows of distances, per episode.

    Args:
        support: vectors ``[..., s, d]``, the labelled ones of each episode.
        support_labels: integers ``[..., s]``.
        queries: vectors ``[..., q, d]``.
        query_labels: integers ``[..., q]``.
        metric: how far two vectors are apart.
        class_means: whether to compare with the mean vector of each class instead of
            every support vector.
        support_where: bool ``[..., s]``, False for padding.
        where: bool ``[..., q]``, likewise.

    Returns:
        ``[...]``; NaN for an episode without a query or without support, or with a
        vector that is not finite.

    Raises:
        TypeError: if an argument has the wrong dtype.
        ValueError: if shapes do not fit.

    References:
        Vinyals et al. Matching Networks for One Shot Learning. 2016. arXiv:1606.04080
        Snell, Swersky, Zemel. Prototypical Networks for Few-shot Learning. 2017.
        arXiv:1703.05175 (class means)

    >>> import jax.numpy as jnp
    >>> import tripletjax as tj
    >>> support, labels = jnp.array([[0.0], [1.0], [5.0]]), jnp.array([0, 0, 1])
    >>> queries, expected = jnp.array([[0.2], [2.9], [6.0]]), jnp.array([0, 1, 1])
    >>> for means in (False, True):
    ...     accuracy = tj.retrieval.few_shot_accuracy(
    ...         support, labels, queries, expected, class_means=means)
    ...     print(f"{accuracy:.2f}")
    0.67
    1.00
    """
    x, y = as_vectors(("queries", queries), ("support", support), rank=2)
    lead = x.shape[:-2]
    if y.shape[:-2] != lead or y.shape[-1] != x.shape[-1]:
        raise ValueError(
            "support must be vectors of the same length and episodes as queries, got "
            f"{y.shape} and {x.shape}."
        )

    def each(name: str, values: Any, of: Array, what: str, dtype: type) -> Array:
        values = per_item(name, values, of.shape[-2], what, dtype)
        if values.ndim > of.ndim - 1:
            raise ValueError(
                f"{name} has shape {values.shape}, but {what} have {of.shape[:-1]}."
            )
        return jnp.broadcast_to(values, of.shape[:-1])

    ours = each("query_labels", query_labels, x, "queries", jnp.integer)
    theirs = each("support_labels", support_labels, y, "support vectors", jnp.integer)
    ones = jnp.ones(x.shape[:-1], bool), jnp.ones(y.shape[:-1], bool)
    real, known = ones
    if where is not None:
        real = each("where", where, x, "queries", jnp.bool_)
        x = jnp.where(real[..., None], x, 0)
    if support_where is not None:
        known = each("support_where", support_where, y, "support vectors", jnp.bool_)
        y = jnp.where(known[..., None], y, 0)
    if class_means:
        y = jnp.vectorize(_class_means, signature="(s,d),(s),(s)->(s,d)")(
            y, theirs, known
        )
    nearest = jnp.vectorize(
        functools.partial(nearest_one, metric=metric),
        signature="(q,d),(s,d),(s)->(q)",
    )(x, y, known)
    right = same_labels(jnp.take_along_axis(theirs, nearest, axis=-1), ours)
    count = jnp.sum(real, axis=-1)
    share = jnp.sum(right & real, axis=-1) / jnp.maximum(count, 1)
    finite = [jnp.isfinite(v).all(axis=(-2, -1)) for v in (x, y)]
    told = (count > 0) & jnp.any(known, axis=-1) & finite[0] & finite[1]
    return jnp.where(told, share, jnp.nan)


def _class_means(x: Array, labels: Array, where: Array) -> Array:
    """For each vector ``[s, d]`` the mean of the real ones of its class."""
    # The class of a label is the place of the first of its kind in sorted order.
    of_class = jnp.searchsorted(jnp.sort(labels), labels)
    add_up = functools.partial(
        jax.ops.segment_sum, segment_ids=of_class, num_segments=len(labels)
    )
    count = add_up(where.astype(x.dtype))
    means = add_up(jnp.where(where[:, None], x, 0)) / jnp.maximum(count, 1)[:, None]
    return means[of_class]
