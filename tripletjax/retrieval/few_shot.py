"""Few-shot classification by the nearest support vector or class mean."""

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
    r"""Compute the accuracy of classification by the nearest support, per episode.

    $$\frac{1}{|Q|} \sum_{q \in Q} [y_{s(q)} = y_q], \qquad
      s(q) = \arg\min_{s \in S} d(q, s)$$

    with queries Q and support S; ties by the lower index. With n classes of k support
    vectors each, the result is the n-way k-shot accuracy.

    Memory: O((s + q) d), and up to 512 rows of distances, per episode.

    Args:
        support: vectors ``[..., s, d]``, the labelled examples of each episode.
        support_labels: integers ``[..., s]``.
        queries: vectors ``[..., q, d]``.
        query_labels: integers ``[..., q]``.
        metric: the `Metric` that defines d.
        class_means: whether S has the mean vector of each class instead of every
            support vector.
        support_where: bool ``[..., s]``, False for padding.
        where: bool ``[..., q]``, False for padding.

    Returns:
        Shares ``[...]`` from 0 to 1. NaN for an episode without a query, without
        support, or with a vector that is not finite.

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

    labels = _for_each(x, "query_labels", query_labels, "queries", jnp.integer)
    support_labels = _for_each(
        y, "support_labels", support_labels, "support vectors", jnp.integer
    )
    real, real_support = jnp.ones(x.shape[:-1], bool), jnp.ones(y.shape[:-1], bool)
    if where is not None:
        real = _for_each(x, "where", where, "queries", jnp.bool_)
        x = jnp.where(real[..., None], x, 0)
    if support_where is not None:
        real_support = _for_each(
            y, "support_where", support_where, "support vectors", jnp.bool_
        )
        y = jnp.where(real_support[..., None], y, 0)
    if class_means:
        y = jnp.vectorize(_class_means, signature="(s,d),(s),(s)->(s,d)")(
            y, support_labels, real_support
        )
    nearest = jnp.vectorize(
        functools.partial(nearest_one, metric=metric),
        signature="(q,d),(s,d),(s)->(q)",
    )(x, y, real_support)
    predicted = jnp.take_along_axis(support_labels, nearest, axis=-1)
    correct = same_labels(predicted, labels)
    count = jnp.sum(real, axis=-1)
    share = jnp.sum(correct & real, axis=-1) / jnp.maximum(count, 1)
    finite = [jnp.isfinite(v).all(axis=(-2, -1)) for v in (x, y)]
    defined = (count > 0) & jnp.any(real_support, axis=-1) & finite[0] & finite[1]
    return jnp.where(defined, share, jnp.nan)


def _for_each(vectors: Array, name: str, values: Any, what: str, dtype: type) -> Array:
    """Checked values ``[...]``, one for each of some vectors ``[..., d]``."""
    values = per_item(name, values, vectors.shape[-2], what, dtype)
    if values.ndim > vectors.ndim - 1:
        raise ValueError(
            f"{name} must have one entry for each of the {what}, "
            f"{vectors.shape[:-1]}, got shape {values.shape}."
        )
    return jnp.broadcast_to(values, vectors.shape[:-1])


def _class_means(x: Array, labels: Array, where: Array) -> Array:
    """The mean ``[s, d]`` of the real vectors of each vector's class."""
    # The number of a class is the position of its first label in sorted order.
    of_class = jnp.searchsorted(jnp.sort(labels), labels)
    add_up = functools.partial(
        jax.ops.segment_sum, segment_ids=of_class, num_segments=len(labels)
    )
    count = add_up(where.astype(x.dtype))
    means = add_up(jnp.where(where[:, None], x, 0)) / jnp.maximum(count, 1)[:, None]
    return means[of_class]
