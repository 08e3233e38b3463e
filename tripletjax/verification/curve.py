"""Receiver operating characteristic (ROC) of pairs."""

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
    """Points of a ROC, from no accepted pair to all.

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
    """ROC of given pairs: TAR and FAR with every distance as the threshold.

    Memory: O(n).

    Args:
        distances: of each pair ``[n]``.
        same: bool ``[n]``, True for pairs of the same item.
        where: bool ``[n]``, False for padding.

    Returns:
        `Roc` ``[n + 1]``. Pairs of equal distance repeat one point; padding repeats the
        last point.

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
    """Counts of accepted pairs at the sorted distances ``[p]`` of positives.

    With fewer than p positives, padding repeats the counts of the last one.

    Attributes:
        weights: 1 for a positive, 0 for padding; numbers of copies in a replicate.
        thresholds: the distances.
        accepted_before: positives below the threshold.
        accepted: positives up to the threshold.
        below: negatives below the threshold.
        up_to: negatives up to the threshold.
        positives: the number of all positives.
        negatives: the number of all negatives.
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
        same, different = (
            jnp.sort(jnp.where(mask, distances, jnp.inf))
            for mask in (positive, negative)
        )
        positives, negatives = jnp.sum(positive), jnp.sum(negative)
        below, up_to = (
            jnp.minimum(jnp.searchsorted(different, same, side=side), negatives)
            for side in ("left", "right")
        )
        broken = jnp.any((positive | negative) & jnp.isnan(distances))
        counts = (jnp.where(broken, -1, x) for x in (below, up_to, negatives))
        return cls.of(same, positives, *counts)

    def best(self) -> tuple[Array, Array]:
        """The largest number of correct decisions, and its smallest threshold."""
        right = self.accepted + self.negatives - self.up_to
        most = jnp.argmax(right)
        none = self.negatives >= right[most]
        return (
            jnp.where(none, self.negatives, right[most]),
            jnp.where(none, -jnp.inf, self.thresholds[most]),
        )


def next_distance(distances: Array, thresholds: Array) -> Array:
    """The smallest of sorted distances above each threshold, or infinity."""
    index = jnp.searchsorted(distances, thresholds, side="right")
    return jnp.append(distances, jnp.inf)[index]


def exactly(
    function: Callable, distances: ArrayLike, *args: Any, **options: Any
) -> Any:
    """Call a function in 64 bits if the distances are a NumPy array of 64 bits."""
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
    """A share, NaN of nothing."""
    return jnp.where(of > 0, count / jnp.where(of > 0, of, 1), jnp.nan)
