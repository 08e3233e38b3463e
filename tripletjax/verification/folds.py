"""Accuracy at a threshold that other folds choose."""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from tripletjax._api import jitted
from tripletjax._thresholds import between
from tripletjax.pairs import per_item
from tripletjax.verification.curve import (
    Curve,
    exactly,
    next_distance,
    share,
)
from tripletjax.verification.pairs import as_pairs


class KFold(NamedTuple):
    """Accuracy of each fold with the threshold of the other folds.

    Attributes:
        accuracy: the mean over the folds.
        standard_error: of the mean, the standard deviation over sqrt(folds).
        accuracies: of each fold ``[folds]``.
        thresholds: of each fold ``[folds]``.
    """

    accuracy: Array
    standard_error: Array
    accuracies: Array
    thresholds: Array


def k_fold_accuracy(
    distances: ArrayLike,
    same: ArrayLike,
    *,
    folds: int = 10,
    fold: ArrayLike | None = None,
    where: ArrayLike | None = None,
) -> KFold:
    r"""K-fold accuracy: each fold is decided by the threshold of the other folds.

    The protocol of Labeled Faces in the Wild. With a_k the share of correct decisions
    in fold k, at the threshold of the best accuracy on all other folds,

    .. math::

        \text{accuracy} = \frac{1}{K} \sum_k a_k, \quad
        \text{standard error} = \frac{\mathrm{std}(a)}{\sqrt{K}}

    where std divides by K - 1. If several thresholds have the best accuracy, the
    smallest one counts, in the middle between two distances.

    Memory: O(n).

    Args:
        distances: of each pair ``[n]``.
        same: bool ``[n]``, True for pairs of the same item.
        folds: K, the number of folds, at least 2.
        fold: integers ``[n]`` from 0, the fold of each pair. If not given, consecutive
            pairs make folds of equal size, up to one pair.
        where: bool ``[n]``, False for padding.

    Returns:
        `KFold`; the accuracy of a fold without a pair is NaN.

    Raises:
        TypeError: if an argument has the wrong dtype.
        ValueError: if shapes do not fit, or folds is below 2.

    References:
        Huang, Ramesh, Berg, Learned-Miller. Labeled Faces in the Wild: A Database for
        Studying Face Recognition in Unconstrained Environments. 2007. UMass Amherst
        Technical Report 07-49

    >>> import jax.numpy as jnp
    >>> import tripletjax as tj
    >>> distances = jnp.array([0.2, 0.8, 0.3, 0.7])
    >>> same = jnp.array([True, False, True, False])
    >>> result = tj.verification.k_fold_accuracy(distances, same, folds=2)
    >>> print(result.accuracy, result.standard_error, result.thresholds)
    1.0 0.0 [0.5 0.5]
    """
    return exactly(
        _k_fold_accuracy, distances, same, folds=folds, fold=fold, where=where
    )


@jitted(sizes=("folds",))
def _k_fold_accuracy(
    distances: ArrayLike,
    same: ArrayLike,
    *,
    folds: int,
    fold: ArrayLike | None = None,
    where: ArrayLike | None = None,
) -> KFold:
    distances, positive, negative = as_pairs(distances, same, where)
    n = len(distances)
    if folds < 2:
        raise ValueError(f"folds must be at least 2, got {folds}.")
    if fold is None:
        sizes = [len(part) for part in np.array_split(np.arange(n), folds)]
        fold = np.repeat(np.arange(folds), sizes)
    fold = per_item("fold", fold, n, "pairs", jnp.integer)

    def one(k: Array) -> tuple[Array, Array]:
        held_out = fold == k
        curve = Curve.of_pairs(distances, positive & ~held_out, negative & ~held_out)
        _, last = curve.best()
        others = jnp.sort(
            jnp.where((positive | negative) & ~held_out, distances, jnp.inf)
        )
        following = next_distance(others, last)
        threshold = jnp.where(
            (last == -jnp.inf) & (following > 0),
            following / 2,
            between(last, following),
        )
        accepted = distances <= threshold
        right = jnp.where(positive, accepted, negative & ~accepted) & held_out
        count = jnp.sum((positive | negative) & held_out)
        return share(jnp.sum(right), count), threshold

    accuracies, thresholds = lax.map(one, jnp.arange(folds))
    error = jnp.std(accuracies, ddof=1) / math.sqrt(folds)
    return KFold(jnp.mean(accuracies), error, accuracies, thresholds)
