"""Receiver operating characteristic of pairs, and rates read from it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from tripletjax._api import jitted
from tripletjax.verification.pairs import as_pairs


class Roc(NamedTuple):
    """The points of a ROC, from none accepted to all.

    Attributes:
        thresholds: ``[n + 1]``, sorted; the first is minus infinity.
        true_accept_rate: ``[n + 1]``.
        false_accept_rate: ``[n + 1]``.
    """

    thresholds: Array
    true_accept_rate: Array
    false_accept_rate: Array


def roc(
    distances: ArrayLike, same: ArrayLike, *, where: ArrayLike | None = None
) -> Roc:
    """The ROC of given pairs: what is accepted at every distance.

    Args:
        distances: ``[n]``.
        same: bool ``[n]``, whether a pair is of the same item.
        where: bool ``[n]``, False for padding.

    Returns:
        `Roc` ``[n + 1]``. Pairs of one distance share one point, which is repeated, as
        is the last for padding.

    Raises:
        TypeError: if an argument has the wrong dtype.
        ValueError: if shapes do not fit.

    >>> import jax.numpy as jnp
    >>> import tripletjax as tj
    >>> distances, same = jnp.array([0.1, 0.4, 0.2]), jnp.array([1, 1, 0]) > 0
    >>> curve = tj.verification.roc(distances, same)
    >>> print(curve.true_accept_rate, curve.false_accept_rate)
    [0.  0.5 0.5 1. ] [0. 0. 1. 1.]
    """
    return exactly(_roc, distances, same, where=where)


@jitted()
def _roc(
    distances: ArrayLike, same: ArrayLike, *, where: ArrayLike | None = None
) -> Roc:
    distances, positive, negative = as_pairs(distances, same, where)
    thresholds = jnp.sort(jnp.where(positive | negative, distances, jnp.inf))

    def rate(mask: Array) -> Array:
        values = jnp.sort(jnp.where(mask, distances, jnp.inf))
        count = jnp.sum(mask)
        accepted = jnp.searchsorted(values, thresholds, side="right")
        return share(jnp.minimum(accepted, count), count)

    rates = [rate(mask) for mask in (positive, negative)]
    broken = jnp.any((positive | negative) & jnp.isnan(distances))
    rates = [jnp.where(broken, jnp.nan, jnp.append(0.0 * x[:1], x)) for x in rates]
    return Roc(jnp.append(-jnp.inf, thresholds), *rates)


class Curve(NamedTuple):
    """What thresholds accept, at the sorted distances ``[p]`` of positives.

    Where there are fewer positives than p, the rest repeats that all are accepted, and
    stands for no pair.
    """

    weights: Array
    thresholds: Array
    accepted_before: Array
    accepted: Array
    below: Array
    up_to: Array
    positives: Array
    negatives: Array

    @classmethod
    def of(
        cls, distances: Array, positives: Array, below: Array, up_to: Array, all: Array
    ) -> "Curve":
        before, accepted = (
            jnp.minimum(jnp.searchsorted(distances, distances, side=side), positives)
            for side in ("left", "right")
        )
        weights = (jnp.arange(len(distances)) < positives).astype(int)
        return cls(weights, distances, before, accepted, below, up_to, positives, all)

    @classmethod
    def of_pairs(cls, distances: Array, positive: Array, negative: Array) -> "Curve":
        ours, theirs = (
            jnp.sort(jnp.where(mask, distances, jnp.inf))
            for mask in (positive, negative)
        )
        positives, negatives = jnp.sum(positive), jnp.sum(negative)
        below, up_to = (
            jnp.minimum(jnp.searchsorted(theirs, ours, side=side), negatives)
            for side in ("left", "right")
        )
        broken = jnp.any((positive | negative) & jnp.isnan(distances))
        counts = (jnp.where(broken, -1, x) for x in (below, up_to, negatives))
        return cls.of(ours, positives, *counts)

    def best(self) -> tuple[Array, Array]:
        """The most pairs decided rightly, and the least threshold that does it."""
        right = self.accepted + self.negatives - self.up_to
        most = jnp.argmax(right)
        none = self.negatives >= right[most]
        return (
            jnp.where(none, self.negatives, right[most]),
            jnp.where(none, -jnp.inf, self.thresholds[most]),
        )


def next_distance(distances: Array, thresholds: Array) -> Array:
    """The least of sorted distances that is over each threshold, or infinity."""
    index = jnp.searchsorted(distances, thresholds, side="right")
    return jnp.append(distances, jnp.inf)[index]


def exactly(
    function: Callable, distances: ArrayLike, *args: Any, **options: Any
) -> Any:
    """Runs a function of distances in 64 bits if they are a NumPy array of 64 bits."""
    plain = jax.tree.leaves((distances, args, options))
    wide = (
        isinstance(distances, np.ndarray | np.generic)
        and distances.dtype.kind in "fiu"
        and distances.dtype.itemsize == 8
        and not any(isinstance(leaf, jax.core.Tracer) for leaf in plain)
    )
    if not wide:
        return function(distances, *args, **options)
    with jax.enable_x64(True):
        return jax.tree.map(
            np.asarray, function(np.asarray(distances, np.float64), *args, **options)
        )


def share(count: ArrayLike, of: Array) -> Array:
    return jnp.where(of > 0, count / jnp.where(of > 0, of, 1), jnp.nan)
