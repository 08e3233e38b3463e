"""Bootstrap replicates of verification metrics."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from tripletjax._api import as_integer, jitted
from tripletjax._thresholds import as_rates
from tripletjax.verification.curve import Curve
from tripletjax.verification.evaluation import VerificationMetrics, metrics_of


def bootstrap(
    key: ArrayLike,
    positives: ArrayLike,
    positive_identities: ArrayLike,
    negatives: ArrayLike,
    negative_identities: ArrayLike,
    *,
    fars: Sequence[float] = (0.1, 0.01, 0.001),
    replicates: int = 1000,
    size: int | None = None,
) -> VerificationMetrics:
    """Bootstrap replicates of verification metrics, by identity.

    Pairs of one person are not independent, so a replicate draws identities, not pairs:
    as many as there are, with replacement. With w_i copies of identity i, its positive
    pairs count w_i times. Negative pairs of identities i and j count w_i w_j times.
    This is the vertex bootstrap, without pairs of two copies of one identity.

    Memory: O(p + q + size), as replicates are drawn one after the other.

    Args:
        key: of `jax.random`.
        positives: distances ``[p]`` of pairs of the same item.
        positive_identities: integers ``[p]`` from 0, the item of each pair.
        negatives: distances ``[q]`` of pairs of different items.
        negative_identities: integers ``[q, 2]``, the two items of each pair.
        fars: false accept rates at which to report the true accept rate.
        replicates: the number of replicates.
        size: the number of identities. If not given, one more than the largest, which
            requires identities that are not traced.

    Returns:
        `VerificationMetrics` with a leading axis of replicates; its quantiles make an
        interval. NaN in a replicate without a positive or without a negative pair.

    Raises:
        TypeError: if an argument has the wrong dtype, or identities are traced and
            `size` is not given.
        ValueError: if shapes do not fit, an identity is out of range, or a FAR is
            outside [0, 1].

    References:
        Snijders, Borgatti. Non-Parametric Standard Errors and Tests for Network
        Statistics. 1999 (the vertex bootstrap)
        Bolle, Ratha, Pankanti. Error analysis of pattern recognition systems: the
        subsets bootstrap. 2004

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import tripletjax as tj
    >>> same, people = jnp.array([0.1, 0.2, 0.6]), jnp.array([0, 1, 2])
    >>> others, pairs = jnp.array([0.5, 0.8, 0.9]), jnp.array([[0, 1], [0, 2], [1, 2]])
    >>> drawn = tj.verification.bootstrap(
    ...     jax.random.key(0), same, people, others, pairs, fars=(0.5,), replicates=100)
    >>> print(drawn.equal_error_rate.shape, drawn.tar_at_far.shape)
    (100,) (100, 1)
    """
    identities = (positive_identities, negative_identities)
    if not any(isinstance(x, jax.core.Tracer) for x in identities):
        last = max(int(np.max(x, initial=-1)) for x in map(np.asarray, identities))
        least = min(int(np.min(x, initial=0)) for x in map(np.asarray, identities))
        size = last + 1 if size is None else size
        if least < 0 or last >= size:
            raise ValueError(
                f"identities must be from 0 to {size - 1}, got {least} to {last}."
            )
    elif size is None:
        raise TypeError("size, the number of identities, must be given if traced.")
    return _bootstrap(
        key,
        positives,
        positive_identities,
        negatives,
        negative_identities,
        fars=as_rates("fars", fars),
        replicates=replicates,
        size=as_integer("size", size),
    )


@jitted(sizes=("replicates", "size"), static=("fars",))
def _bootstrap(
    key: ArrayLike,
    positives: ArrayLike,
    positive_identities: ArrayLike,
    negatives: ArrayLike,
    negative_identities: ArrayLike,
    *,
    fars: tuple[float, ...],
    replicates: int,
    size: int,
) -> VerificationMetrics:
    if replicates < 1:
        raise ValueError(f"replicates must be at least 1, got {replicates}.")
    same, same_identities, different, different_identities = (
        jnp.asarray(x)
        for x in (positives, positive_identities, negatives, negative_identities)
    )
    _check_pairs(same, same_identities, different, different_identities)
    order = jnp.argsort(same)
    same, same_identities = same[order], same_identities[order]
    broken = jnp.isnan(same).any() | jnp.isnan(different).any()
    # The ranks of negatives among the positives are computed once; the counts of a
    # replicate are sums of its weights.
    slots = [jnp.searchsorted(same, different, side=side) for side in ("right", "left")]
    first, last = (jnp.searchsorted(same, same, side=s) for s in ("left", "right"))

    def replicate(key: Array) -> VerificationMetrics:
        drawn = jax.random.randint(key, (size,), 0, size)
        copies = jnp.zeros(size, int).at[drawn].add(1)
        weights, others = (
            copies[same_identities],
            copies[different_identities[:, 0]] * copies[different_identities[:, 1]],
        )
        accepted = jnp.append(0, jnp.cumsum(weights))
        below, up_to = (
            jnp.cumsum(jnp.zeros(len(same) + 1, int).at[slot].add(others))[:-1]
            for slot in slots
        )
        below, up_to, all = (
            jnp.where(broken, -1, x) for x in (below, up_to, jnp.sum(others))
        )
        curve = Curve(
            weights,
            same,
            accepted[first],
            accepted[last],
            below,
            up_to,
            accepted[-1],
            all,
        )
        return metrics_of(curve, fars, lambda thresholds: thresholds)

    return lax.map(replicate, jax.random.split(key, replicates))


def _check_pairs(
    same: Array, same_identities: Array, different: Array, different_identities: Array
) -> None:
    for name, x in (("positives", same), ("negatives", different)):
        if x.ndim != 1 or x.size == 0:
            raise ValueError(f"{name} must be distances [n], got shape {x.shape}.")
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"{name} must be floats, got dtype {x.dtype}.")
    for name, x, shape in (
        ("positive_identities", same_identities, same.shape),
        ("negative_identities", different_identities, (*different.shape, 2)),
    ):
        if x.shape != shape:
            raise ValueError(f"{name} must be {list(shape)}, got shape {x.shape}.")
        if not jnp.issubdtype(x.dtype, jnp.integer):
            raise TypeError(f"{name} must be integers, got dtype {x.dtype}.")
