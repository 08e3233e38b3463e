"""Verification metrics of embeddings with labels, and of given pairs."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from tripletjax._api import as_integer, jitted
from tripletjax._pairwise.batch import Batch, single_batch
from tripletjax._pairwise.block_sizes import BlockSizes, by_platform
from tripletjax._pairwise.class_index import ClassIndex
from tripletjax._pairwise.mesh import AxisName, check_split, gather_terms
from tripletjax._pairwise.tiles import Tiles
from tripletjax._thresholds import as_rates, between
from tripletjax.distances import Metric, euclidean
from tripletjax.verification.curve import (
    Curve,
    exactly,
    next_distance,
    share,
)
from tripletjax.verification.pairs import as_pairs

# How many positive pairs are compared at a time, times their dimensions.
BLOCK = 2**19


class VerificationMetrics(NamedTuple):
    """Verification metrics of positive and negative pairs.

    Attributes:
        tar_at_far: ``[len(fars)]``, the largest TAR whose FAR is at most each of
            `fars`.
        thresholds: ``[len(fars)]``, the thresholds of these rates. If no pair is
            accepted, a negative number, or minus infinity if distances may be negative.
        equal_error_rate: the rate at which FAR = FRR, interpolated linearly between
            the points of the ROC.
        area_under_roc: the probability that a positive is nearer than a negative; ties
            count half.
        accuracy: the largest share of correct decisions at one threshold.
        threshold: the smallest threshold with this accuracy.
        positives: the number of pairs of the same item.
        negatives: the number of pairs of different items.
    """

    tar_at_far: Array
    thresholds: Array
    equal_error_rate: Array
    area_under_roc: Array
    accuracy: Array
    threshold: Array
    positives: Array
    negatives: Array


def evaluate(
    embeddings: ArrayLike,
    labels: ArrayLike,
    *,
    fars: Sequence[float] = (0.1, 0.01, 0.001),
    metric: Metric = euclidean,
    references: ArrayLike | None = None,
    reference_labels: ArrayLike | None = None,
    where: ArrayLike | None = None,
    reference_where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
    size: int | None = None,
) -> VerificationMetrics:
    """Verification metrics of all pairs of embeddings, exact and in blocks.

    `VerificationMetrics` defines TAR at FAR, equal error rate and accuracy.

    Memory: O((n + m) d + size), and a block of distances.

    Args:
        embeddings: vectors ``[n, d]``.
        labels: integers ``[n]``.
        fars: false accept rates at which to report the true accept rate.
        metric: distance of two vectors.
        references: vectors ``[m, d]``, with `reference_labels`: each pair is then an
            embedding and a reference. If not given, all pairs of embeddings.
        reference_labels: integers ``[m]``.
        where: bool ``[n]``, False for padding.
        reference_where: bool ``[m]``, False for padding.
        axis_name: inside ``jax.shard_map``, the mesh axes over which embeddings and
            references are split: each device compares its share of the pairs, and all
            devices return the metrics of all pairs.
        size: the largest number of positive pairs. If not given, the next power of two
            above their number, which requires labels that are not traced.

    Returns:
        `VerificationMetrics`, all NaN if there are more positives than `size`.

    Raises:
        TypeError: if an argument has the wrong dtype, or labels are traced and `size`
            is not given.
        ValueError: if shapes do not fit, a FAR is outside [0, 1], or 32 bits cannot
            count the pairs.

    References:
        Schroff, Kalenichenko, Philbin. FaceNet: A Unified Embedding for Face
        Recognition and Clustering. 2015. arXiv:1503.03832 (VAL and FAR, all pairs)

    >>> import jax.numpy as jnp
    >>> import tripletjax as tj
    >>> x = jnp.array([[0.0], [1.0], [1.5], [2.75]])
    >>> labels = jnp.array([0, 0, 1, 1])
    >>> metrics = tj.verification.evaluate(x, labels, fars=(0.25,))
    >>> print(metrics.tar_at_far, metrics.thresholds, metrics.negatives)
    [1.] [1.375] 4
    """
    if (references is None) != (reference_labels is None):
        raise ValueError("references and reference_labels go together: give both.")
    fars = as_rates("fars", fars)
    described = (labels, reference_labels, where, reference_where)
    if not any(isinstance(x, jax.core.Tracer) for x in described):
        if size is None:
            # A power of two, for few sizes to be compiled, if indices can count it.
            count = max(_count_positives(*described), 1)
            size = 1 << (count - 1).bit_length() if count <= 2**30 else count
    elif size is None:
        raise TypeError(
            "size must be given if labels are traced: the largest number of positive "
            "pairs."
        )
    return _evaluate(
        embeddings,
        labels,
        fars=fars,
        metric=metric,
        references=references,
        reference_labels=reference_labels,
        where=where,
        reference_where=reference_where,
        axis_name=axis_name,
        size=as_integer("size", size),
    )


@jitted(callables=("metric",), sizes=("size",), static=("fars", "axis_name"))
def _evaluate(
    embeddings: ArrayLike,
    labels: ArrayLike,
    *,
    fars: tuple[float, ...],
    metric: Metric,
    references: ArrayLike | None = None,
    reference_labels: ArrayLike | None = None,
    where: ArrayLike | None = None,
    reference_where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
    size: int,
) -> VerificationMetrics:
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}.")
    arguments: Any = {
        "embeddings": embeddings,
        "labels": labels,
        "references": references,
        "reference_labels": reference_labels,
        "where": where,
        "reference_where": reference_where,
    }
    if axis_name is not None:
        arguments = jax.tree.map(jnp.asarray, arguments)
        check_split(arguments["embeddings"], axis_name)
        arguments = gather_terms(arguments, axis_name)
    batch = single_batch(metric, **arguments)
    n, m = len(batch.anchors), len(batch.reference_side[0])
    pairs = n * (n - 1) // 2 if batch.square else n * m
    if pairs > jnp.iinfo(jax.dtypes.canonicalize_dtype(int)).max:
        raise ValueError(
            f"embeddings: {pairs} pairs are too many to count in 32 bits; enable "
            "jax_enable_x64."
        )
    distances, positives = _positives(metric, batch, size)
    # With more positives than `size`, or a NaN, every metric is NaN.
    known = (positives <= size) & ~jnp.any(jnp.isnan(distances))
    positives = jnp.where(known, positives, 0)
    distances = jnp.sort(distances)

    def over_negatives(
        visit: Callable[..., Any], state: Any, of_all: Callable[..., Any]
    ) -> Any:
        """Visit the negative pairs of this device, and combine those of all devices."""

        def of_device(sizes: BlockSizes) -> Any:
            tiles = Tiles.of(metric, batch, sizes, axis_name=axis_name)
            return tiles.distances(visit, state)

        result = by_platform(of_device, batch.size)
        return result if axis_name is None else of_all(result, axis_name)

    below, up_to, negatives = _negatives_within(over_negatives, distances)
    curve = Curve.of(distances, positives, below, up_to, negatives)

    def following(thresholds: Array) -> Array:
        def visit(least: Array, d: Array, negative: Array) -> Array:
            rest = jnp.where(negative, d, jnp.inf)
            beyond = [
                jnp.min(rest, where=rest > t, initial=jnp.inf) for t in thresholds
            ]
            return jnp.minimum(least, jnp.stack(beyond))

        none = jnp.full_like(thresholds, jnp.inf)
        return jnp.minimum(
            over_negatives(visit, none, lax.pmin), next_distance(distances, thresholds)
        )

    return metrics_of(curve, fars, following)


def _positives(metric: Metric, batch: Batch, size: int) -> tuple[Array, Array]:
    """Distances ``[size]`` of positives, padded with infinity, and their number."""
    classes = ClassIndex.of(batch)
    x, y = batch.anchors, batch.reference_side[0]
    # A pair of embeddings counts once: for the member that comes first in its class.
    before = classes.rank if batch.square else jnp.zeros_like(classes.start)
    counts = jnp.maximum(classes.positives - before, 0)
    ends = jnp.cumsum(counts)

    def distance(slot: Array) -> Array:
        anchor = jnp.searchsorted(ends, slot, side="right")
        anchor = jnp.minimum(anchor, len(ends) - 1)
        at = classes.start[anchor] + slot - (ends - counts)[anchor]
        if batch.square:
            at += before[anchor] + 1
        index = classes.order[jnp.clip(at, 0, len(y) - 1)]
        distance = metric._paired_checked(x[anchor], y[index])
        return jnp.where(slot < ends[-1], distance, jnp.inf)

    block = max(1, min(size, BLOCK // y.shape[1]))
    return lax.map(distance, jnp.arange(size), batch_size=block), ends[-1]


def _negatives_within(
    over_negatives: Callable[..., Any], thresholds: Array
) -> tuple[Array, Array, Array]:
    """Numbers of negatives below, and up to, each sorted threshold, and of all.

    All are -1 if a distance is NaN.
    """

    def visit(state: tuple[Array, ...], d: Array, negative: Array) -> tuple:
        # Negatives per interval of thresholds, counted two ways, and NaN distances.
        below, up_to, broken = state
        broken += jnp.any(negative & jnp.isnan(d))
        d, one = d.ravel(), negative.ravel().astype(below.dtype)
        below = below.at[jnp.searchsorted(thresholds, d, side="right")].add(one)
        up_to = up_to.at[jnp.searchsorted(thresholds, d, side="left")].add(one)
        return below, up_to, broken

    zeros = jnp.zeros(len(thresholds) + 1, int)
    below, up_to, broken = over_negatives(visit, (zeros, zeros, zeros[0]), lax.psum)
    below, up_to = jnp.cumsum(below), jnp.cumsum(up_to)
    below, up_to, every = below[:-1], up_to[:-1], below[-1]
    return (
        jnp.where(broken > 0, -1, below),
        jnp.where(broken > 0, -1, up_to),
        jnp.where(broken > 0, -1, every),
    )


@jitted(static=("fars",))
def _evaluate_pairs(
    distances: ArrayLike,
    same: ArrayLike,
    *,
    fars: tuple[float, ...],
    where: ArrayLike | None = None,
) -> VerificationMetrics:
    distances, positive, negative = as_pairs(distances, same, where)
    counted = jnp.sort(jnp.where(positive | negative, distances, jnp.inf))
    return metrics_of(
        Curve.of_pairs(distances, positive, negative),
        fars,
        functools.partial(next_distance, counted),
    )


def evaluate_pairs(
    distances: ArrayLike,
    same: ArrayLike,
    *,
    fars: Sequence[float] = (0.1, 0.01, 0.001),
    where: ArrayLike | None = None,
) -> VerificationMetrics:
    """Verification metrics of given pairs.

    Memory: O(n).

    Args:
        distances: of each pair ``[n]``.
        same: bool ``[n]``, True for pairs of the same item.
        fars: false accept rates at which to report the true accept rate.
        where: bool ``[n]``, False for padding.

    Returns:
        `VerificationMetrics`.

    Raises:
        TypeError: if an argument has the wrong dtype.
        ValueError: if shapes do not fit, or a FAR is outside [0, 1].

    >>> import jax.numpy as jnp
    >>> import tripletjax as tj
    >>> distances, same = jnp.array([0.1, 0.4, 0.2, 0.9]), jnp.array([1, 1, 0, 0]) > 0
    >>> metrics = tj.verification.evaluate_pairs(distances, same, fars=(0.5,))
    >>> print(metrics.tar_at_far, metrics.accuracy, f"{metrics.threshold:.2f}")
    [1.] 0.75 0.15
    """
    return exactly(
        _evaluate_pairs, distances, same, fars=as_rates("fars", fars), where=where
    )


def tar_at_far(
    distances: ArrayLike,
    same: ArrayLike,
    *,
    fars: Sequence[float] = (0.1, 0.01, 0.001),
    where: ArrayLike | None = None,
) -> Array:
    """True accept rates of given pairs at false accept rates, FaceNet's ``VAL@FAR``.

    The largest TAR whose FAR is at most each of `fars`.

    Memory: O(n).

    Args:
        distances: of each pair ``[n]``.
        same: bool ``[n]``, True for pairs of the same item.
        fars: false accept rates at which to report the true accept rate.
        where: bool ``[n]``, False for padding.

    Returns:
        True accept rates ``[len(fars)]``.

    Raises:
        TypeError: if an argument has the wrong dtype.
        ValueError: if shapes do not fit.

    References:
        Schroff, Kalenichenko, Philbin. FaceNet: A Unified Embedding for Face
        Recognition and Clustering. 2015. arXiv:1503.03832

    >>> import jax.numpy as jnp
    >>> import tripletjax as tj
    >>> distances, same = jnp.array([0.1, 0.4, 0.2, 0.9]), jnp.array([1, 1, 0, 0]) > 0
    >>> print(tj.verification.tar_at_far(distances, same, fars=(1.0, 0.5)))
    [1. 1.]
    """
    return evaluate_pairs(distances, same, fars=fars, where=where).tar_at_far


def equal_error_rate(
    distances: ArrayLike, same: ArrayLike, *, where: ArrayLike | None = None
) -> Array:
    """Equal error rate: the rate e where FAR = FRR = e.

    Interpolated linearly between the points of the ROC.

    Memory: O(n).

    Args:
        distances: of each pair ``[n]``.
        same: bool ``[n]``, True for pairs of the same item.
        where: bool ``[n]``, False for padding.

    Returns:
        The equal error rate, a scalar.

    Raises:
        TypeError: if an argument has the wrong dtype.
        ValueError: if shapes do not fit.

    >>> import jax.numpy as jnp
    >>> import tripletjax as tj
    >>> distances, same = jnp.array([0.1, 0.4, 0.2, 0.9]), jnp.array([1, 1, 0, 0]) > 0
    >>> print(tj.verification.equal_error_rate(distances, same))
    0.5
    """
    return evaluate_pairs(distances, same, fars=(1.0,), where=where).equal_error_rate


def metrics_of(
    curve: Curve, fars: tuple[float, ...], following: Callable[[Array], Array]
) -> VerificationMetrics:
    """Compute the metrics of a curve.

    Args:
        curve: counts of accepted pairs at the distances of positives.
        fars: false accept rates.
        following: from thresholds to the smallest distance above each.
    """
    positives, negatives = curve.positives, curve.negatives
    # NaN if there is nothing to take a share of.
    accept = lambda count: share(count, positives)  # noqa: E731
    false = lambda count: share(count, negatives)  # noqa: E731
    tars, thresholds = [], []
    for far in fars:
        within = jnp.sum(false(curve.up_to) <= far)
        last = jnp.maximum(within, 1) - 1
        # A FAR below one pair of all negatives cannot be measured.
        measurable = negatives * far >= 1 - 1e-6
        tar = jnp.where(within > 0, accept(curve.accepted[last]), 0 * accept(0))
        tars.append(jnp.where(measurable, tar, jnp.nan))
        threshold = jnp.where(within > 0, curve.thresholds[last], -jnp.inf)
        thresholds.append(jnp.where(measurable, threshold, jnp.nan))

    # The first vertical step of the ROC, or slope at equal distances, that ends with
    # FAR >= FRR.
    start = 1 - accept(curve.accepted_before) - false(curve.below)
    end = 1 - accept(curve.accepted) - false(curve.up_to)
    i = jnp.argmax(end <= 0)
    part = start[i] / jnp.where(start[i] > end[i], start[i] - end[i], 1)
    inside = false(curve.below[i]) + part * (
        false(curve.up_to[i]) - false(curve.below[i])
    )
    equal = jnp.where(start[i] >= 0, inside, 1 - accept(curve.accepted_before[i]))

    weights = curve.weights
    ahead = 1 - (false(curve.below) + false(curve.up_to)) / 2
    ahead = jnp.sum(jnp.where(weights > 0, weights * ahead, 0))
    area = ahead / jnp.where(positives > 0, positives, 1)
    right, threshold = curve.best()
    known = (positives > 0) & (negatives > 0)
    accepted = jnp.stack([*thresholds, threshold])
    middle = between(accepted, following(accepted))
    *thresholds, threshold = jnp.where(jnp.isnan(accepted), jnp.nan, middle)
    values = (
        jnp.stack(tars),
        jnp.stack(thresholds),
        equal,
        area,
        share(right, positives + negatives),
        threshold,
    )
    values = (jnp.where(known, value, jnp.nan) for value in values)
    counts = positives, jnp.maximum(negatives, 0)
    return VerificationMetrics._make((*values, *counts))


def _count_positives(
    labels: ArrayLike,
    reference_labels: ArrayLike | None,
    where: ArrayLike | None,
    reference_where: ArrayLike | None,
) -> int:
    """Count the positive pairs, outside jit."""

    def count(labels: ArrayLike, where: ArrayLike | None) -> tuple:
        labels = np.asarray(labels).ravel()
        if where is not None and np.shape(where) == labels.shape:
            labels = labels[np.asarray(where, bool)]
        return np.unique(labels, return_counts=True)

    values, counts = count(labels, where)
    if reference_labels is None:
        return int(np.sum(counts * (counts - 1) // 2))
    others, other_counts = count(reference_labels, reference_where)
    _, at, at_other = np.intersect1d(values, others, return_indices=True)
    return int(np.sum(counts[at] * other_counts[at_other]))
