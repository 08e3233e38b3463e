r"""Is it any good, in pairs: "are these two the same?", decided by a threshold.

A pair is accepted as the same if its distance is at most a threshold. Of all pairs of
the same item (positives) the share that is accepted is the true accept rate (TAR, in
FaceNet VAL), of all others the false accept rate (FAR); the curve of both over all
thresholds is the ROC.

>>> import jax.numpy as jnp
>>> import tripletjax as tj
>>> distances = jnp.array([0.1, 0.3, 0.8, 0.5, 0.9, 1.2])
>>> same = jnp.array([True, True, True, False, False, False])
>>> metrics = tj.verification.evaluate_pairs(distances, same, fars=(1 / 3,))
>>> print(metrics.tar_at_far, f"{metrics.area_under_roc:.4f}")
[1.] 0.8889

What no pair says anything about is NaN: every rate of no positive or of no negative
pair, true accept rates at a FAR finer than one pair of all negatives, and everything if
the distance of a pair is NaN.

Thresholds lie in the middle between two distances, so that ``distance <= threshold``
accepts on the same data what the rates say. Distances of 64 bits in NumPy arrays are
compared in 64 bits, also where jax_enable_x64 is off, and the results are NumPy arrays
of 64 bits.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from tripletjax._api import as_integer, jitted
from tripletjax._pairwise.batch import Batch, single_batch
from tripletjax._pairwise.class_index import ClassIndex
from tripletjax._pairwise.cuts import Cut, by_platform
from tripletjax._pairwise.mesh import AxisName, check_split, gather_terms
from tripletjax._pairwise.tiles import Tiles
from tripletjax._thresholds import as_rates, between
from tripletjax.distances import Metric, euclidean
from tripletjax.pairs import as_boolean, per_item

# How many positive pairs are compared at a time, times their dimensions.
BLOCK = 2**19


class VerificationMetrics(NamedTuple):
    """How well a threshold tells pairs of the same item from others.

    Attributes:
        tar_at_far: ``[len(fars)]``, for each the largest true accept rate at which the
            false accept rate is not above it.
        thresholds: ``[len(fars)]``, at most which distances are then accepted; negative
            if none is, and minus infinity where distances may be negative.
        equal_error_rate: the false accept rate where it equals the false reject rate,
            1 - TAR, on straight lines between the points of the ROC.
        area_under_roc: the chance that a positive is nearer than a negative; ties count
            half.
        accuracy: the largest share of pairs that a threshold decides rightly.
        threshold: the least one that does, likewise.
        positives: the number of pairs of the same item.
        negatives: the number of others.
    """

    tar_at_far: Array
    thresholds: Array
    equal_error_rate: Array
    area_under_roc: Array
    accuracy: Array
    threshold: Array
    positives: Array
    negatives: Array


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
    """Verification over all pairs, blockwise: exact, without their distances in memory.

    Args:
        embeddings: vectors ``[n, d]``.
        labels: integers ``[n]``.
        fars: false accept rates at which to report the true accept rate.
        metric: how far two vectors are apart.
        references: vectors ``[m, d]``, with `reference_labels`: pairs are of an
            embedding and a reference. If not given, all pairs of embeddings.
        reference_labels: integers ``[m]``.
        where: bool ``[n]``, False for padding.
        reference_where: bool ``[m]``, likewise.
        axis_name: inside ``jax.shard_map``, the mesh axes over which embeddings and
            references are split: each device goes over its share of the pairs, and all
            get the result of all.
        size: how many positive pairs there is room for. If not given, the pairs are
            counted, which takes labels that are not traced, and the next power of two
            is compiled.

    Returns:
        `VerificationMetrics`, all NaN if there are more positives than `size`.

    Raises:
        TypeError: if an argument has the wrong dtype, or labels are traced and `size`
            is not given.
        ValueError: if shapes do not fit, there are more pairs than can be counted, or a
            FAR is not a share.

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
    given = (labels, reference_labels, where, reference_where)
    if not any(isinstance(x, jax.core.Tracer) for x in given):
        if size is None:
            # A power of two, for few sizes to be compiled, if indices can count it.
            count = max(_count_positives(*given), 1)
            size = 1 << (count - 1).bit_length() if count <= 2**30 else count
    elif size is None:
        raise TypeError(
            "size must be given where labels are traced: how many pairs of the same "
            "label there may be."
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
    given: Any = {
        "embeddings": embeddings,
        "labels": labels,
        "references": references,
        "reference_labels": reference_labels,
        "where": where,
        "reference_where": reference_where,
    }
    if axis_name is not None:
        given = jax.tree.map(jnp.asarray, given)
        check_split(given["embeddings"], axis_name)
        given = gather_terms(given, axis_name)
    batch = single_batch(metric, **given)
    n, m = len(batch.anchors), len(batch.reference_side[0])
    pairs = n * (n - 1) // 2 if batch.square else n * m
    if pairs > jnp.iinfo(jax.dtypes.canonicalize_dtype(int)).max:
        raise ValueError(
            f"embeddings: {pairs} pairs are too many to count in 32 bits; enable "
            "jax_enable_x64."
        )
    distances, positives = _positives(metric, batch, size)
    # Where there are more than there is room for, or a NaN, nothing is known.
    known = (positives <= size) & ~jnp.any(jnp.isnan(distances))
    positives = jnp.where(known, positives, 0)
    distances = jnp.sort(distances)

    def over_negatives(
        visit: Callable[..., Any], state: Any, of_all: Callable[..., Any]
    ) -> Any:
        """Those of all devices put together, where each has a share."""

        def of_device(cut: Cut) -> Any:
            tiles = Tiles.of(metric, batch, cut, axis_name=axis_name)
            return tiles.distances(visit, state)

        found = by_platform(of_device, batch.size)
        return found if axis_name is None else of_all(found, axis_name)

    below, up_to, negatives = _negatives_within(over_negatives, distances)
    curve = _Curve.of(distances, positives, below, up_to, negatives)

    def following(thresholds: Array) -> Array:
        def visit(least: Array, d: Array, negative: Array) -> Array:
            rest = jnp.where(negative, d, jnp.inf)
            beyond = [
                jnp.min(rest, where=rest > t, initial=jnp.inf) for t in thresholds
            ]
            return jnp.minimum(least, jnp.stack(beyond))

        none = jnp.full_like(thresholds, jnp.inf)
        return jnp.minimum(
            over_negatives(visit, none, lax.pmin), _following(distances, thresholds)
        )

    return _metrics(curve, fars, following)


def _positives(metric: Metric, batch: Batch, size: int) -> tuple[Array, Array]:
    """The distances ``[size]`` of positive pairs, then infinity, and how many."""
    classes = ClassIndex.of(batch)
    x, y = batch.anchors, batch.reference_side[0]
    # Among themselves a pair counts once: by its member that comes first in its class.
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
        distance = metric.between(x[anchor], y[index])
        return jnp.where(slot < ends[-1], distance, jnp.inf)

    block = max(1, min(size, BLOCK // y.shape[1]))
    return lax.map(distance, jnp.arange(size), batch_size=block), ends[-1]


def _negatives_within(
    over_negatives: Callable[..., Any], thresholds: Array
) -> tuple[Array, Array, Array]:
    """How many negatives are below sorted thresholds, how many at most them, and all.

    All are -1 if a distance is NaN.
    """

    def visit(state: tuple[Array, ...], d: Array, negative: Array) -> tuple:
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
    distances, positive, negative = _pairs(distances, same, where)
    counted = jnp.sort(jnp.where(positive | negative, distances, jnp.inf))
    return _metrics(
        _Curve.of_pairs(distances, positive, negative),
        fars,
        functools.partial(_following, counted),
    )


def evaluate_pairs(
    distances: ArrayLike,
    same: ArrayLike,
    *,
    fars: Sequence[float] = (0.1, 0.01, 0.001),
    where: ArrayLike | None = None,
) -> VerificationMetrics:
    """Verification over given pairs.

    Args:
        distances: ``[n]``.
        same: bool ``[n]``, whether a pair is of the same item.
        fars: false accept rates at which to report the true accept rate.
        where: bool ``[n]``, False for padding.

    Returns:
        `VerificationMetrics`.

    Raises:
        TypeError: if an argument has the wrong dtype.
        ValueError: if shapes do not fit, or a FAR is not a share.

    >>> import jax.numpy as jnp
    >>> import tripletjax as tj
    >>> distances, same = jnp.array([0.1, 0.4, 0.2, 0.9]), jnp.array([1, 1, 0, 0]) > 0
    >>> metrics = tj.verification.evaluate_pairs(distances, same, fars=(0.5,))
    >>> print(metrics.tar_at_far, metrics.accuracy, f"{metrics.threshold:.2f}")
    [1.] 0.75 0.15
    """
    return _exactly(
        _evaluate_pairs, distances, same, fars=as_rates("fars", fars), where=where
    )


def tar_at_far(
    distances: ArrayLike,
    same: ArrayLike,
    *,
    fars: Sequence[float] = (0.1, 0.01, 0.001),
    where: ArrayLike | None = None,
) -> Array:
    """The true accept rates of given pairs at false accept rates, FaceNet's VAL@FAR.

    Args:
        distances, same, fars, where: as in `evaluate_pairs`.

    Returns:
        ``[len(fars)]``, as `VerificationMetrics.tar_at_far`.

    Raises:
        TypeError, ValueError: as `evaluate_pairs`.

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
    """The rate at which as many others are accepted as same ones rejected.

    Args:
        distances, same, where: as in `evaluate_pairs`.

    Returns:
        A scalar, as `VerificationMetrics.equal_error_rate`.

    Raises:
        TypeError, ValueError: as `evaluate_pairs`.

    >>> import jax.numpy as jnp
    >>> import tripletjax as tj
    >>> distances, same = jnp.array([0.1, 0.4, 0.2, 0.9]), jnp.array([1, 1, 0, 0]) > 0
    >>> print(tj.verification.equal_error_rate(distances, same))
    0.5
    """
    return evaluate_pairs(distances, same, fars=(1.0,), where=where).equal_error_rate


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
    return _exactly(_roc, distances, same, where=where)


@jitted()
def _roc(
    distances: ArrayLike, same: ArrayLike, *, where: ArrayLike | None = None
) -> Roc:
    distances, positive, negative = _pairs(distances, same, where)
    thresholds = jnp.sort(jnp.where(positive | negative, distances, jnp.inf))

    def rate(mask: Array) -> Array:
        values = jnp.sort(jnp.where(mask, distances, jnp.inf))
        count = jnp.sum(mask)
        accepted = jnp.searchsorted(values, thresholds, side="right")
        return _share(jnp.minimum(accepted, count), count)

    rates = [rate(mask) for mask in (positive, negative)]
    broken = jnp.any((positive | negative) & jnp.isnan(distances))
    rates = [jnp.where(broken, jnp.nan, jnp.append(0.0 * x[:1], x)) for x in rates]
    return Roc(jnp.append(-jnp.inf, thresholds), *rates)


class KFold(NamedTuple):
    """Accuracy on each fold with the threshold of all others.

    Attributes:
        accuracy: the mean over the folds.
        standard_error: of the mean.
        accuracies: ``[folds]``.
        thresholds: ``[folds]``.
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
    """The share of pairs decided rightly, each fold with a threshold from the others.

    The protocol of Labeled Faces in the Wild. The threshold is the middle between the
    farthest distance that has to be accepted for the best accuracy on the other folds,
    and the next; of several equally good, the least.

    Args:
        distances: ``[n]``.
        same: bool ``[n]``, whether a pair is of the same item.
        folds: how many folds.
        fold: integers ``[n]`` from 0 on, the fold of each pair. If not given, pairs
            are in order of folds of one size, give or take one.
        where: bool ``[n]``, False for padding.

    Returns:
        `KFold`; a fold without a pair is NaN.

    Raises:
        TypeError: if an argument has the wrong dtype.
        ValueError: if shapes do not fit, or there are not at least 2 folds.

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
    return _exactly(
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
    distances, positive, negative = _pairs(distances, same, where)
    n = len(distances)
    if folds < 2:
        raise ValueError(f"folds must be at least 2, got {folds}.")
    if fold is None:
        sizes = [len(part) for part in np.array_split(np.arange(n), folds)]
        fold = np.repeat(np.arange(folds), sizes)
    fold = per_item("fold", fold, n, "pairs", jnp.integer)

    def one(k: Array) -> tuple[Array, Array]:
        held_out = fold == k
        curve = _Curve.of_pairs(distances, positive & ~held_out, negative & ~held_out)
        _, last = curve.best()
        others = jnp.sort(
            jnp.where((positive | negative) & ~held_out, distances, jnp.inf)
        )
        following = _following(others, last)
        threshold = jnp.where(
            (last == -jnp.inf) & (following > 0),
            following / 2,
            between(last, following),
        )
        accepted = distances <= threshold
        right = jnp.where(positive, accepted, negative & ~accepted) & held_out
        count = jnp.sum((positive | negative) & held_out)
        return _share(jnp.sum(right), count), threshold

    accuracies, thresholds = lax.map(one, jnp.arange(folds))
    error = jnp.std(accuracies, ddof=1) / math.sqrt(folds)
    return KFold(jnp.mean(accuracies), error, accuracies, thresholds)


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
    """Verification of many draws of identities, for intervals of its rates.

    Pairs are not independent: all of one person's are easy, or hard, together. So in
    each replicate as many identities as there are get drawn with replacement. With w
    copies of identity i, its positive pairs count w_i times, and a pair of identities i
    and j w_i w_j times (the vertex bootstrap, without pairs of two copies of one).

    Args:
        key: of jax.random.
        positives: distances ``[p]`` of pairs of the same item.
        positive_identities: integers ``[p]`` from 0 on, the item of each.
        negatives: distances ``[q]`` of pairs of different items.
        negative_identities: integers ``[q, 2]``, the items of each.
        fars: false accept rates at which to report the true accept rate.
        replicates: how many.
        size: the number of identities; one more than the last if not given, which takes
            identities that are not traced.

    Returns:
        `VerificationMetrics` with one entry per replicate in front, of which quantiles
        are an interval; NaN where a draw has no positive, or no negative pair.

    Raises:
        TypeError: if an argument has the wrong dtype, or identities are traced and
            `size` is not given.
        ValueError: if shapes do not fit, an identity is out of range, or a FAR is not a
            share.

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
    ours, theirs = (jnp.asarray(x) for x in (positives, negatives))
    for name, x in (("positives", ours), ("negatives", theirs)):
        if x.ndim != 1 or x.size == 0:
            raise ValueError(f"{name} must be distances [n], got shape {x.shape}.")
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"{name} must be floats, got dtype {x.dtype}.")
    us, them = (jnp.asarray(x) for x in (positive_identities, negative_identities))
    for name, x, shape in (
        ("positive_identities", us, ours.shape),
        ("negative_identities", them, (*theirs.shape, 2)),
    ):
        if x.shape != shape:
            raise ValueError(f"{name} must be {list(shape)}, got shape {x.shape}.")
        if not jnp.issubdtype(x.dtype, jnp.integer):
            raise TypeError(f"{name} must be integers, got dtype {x.dtype}.")

    order = jnp.argsort(ours)
    ours, us = ours[order], us[order]
    broken = jnp.isnan(ours).any() | jnp.isnan(theirs).any()
    # The rank of every negative among the positives, and of the last equal positive,
    # are found once; what a replicate counts is sums of its weights.
    slots = [jnp.searchsorted(ours, theirs, side=side) for side in ("right", "left")]
    first, last = (jnp.searchsorted(ours, ours, side=s) for s in ("left", "right"))

    def replicate(key: Array) -> VerificationMetrics:
        drawn = jax.random.randint(key, (size,), 0, size)
        copies = jnp.zeros(size, int).at[drawn].add(1)
        weights, others = copies[us], copies[them[:, 0]] * copies[them[:, 1]]
        accepted = jnp.append(0, jnp.cumsum(weights))
        below, up_to = (
            jnp.cumsum(jnp.zeros(len(ours) + 1, int).at[slot].add(others))[:-1]
            for slot in slots
        )
        below, up_to, all = (
            jnp.where(broken, -1, x) for x in (below, up_to, jnp.sum(others))
        )
        curve = _Curve(
            weights,
            ours,
            accepted[first],
            accepted[last],
            below,
            up_to,
            accepted[-1],
            all,
        )
        return _metrics(curve, fars, lambda thresholds: thresholds)

    return lax.map(replicate, jax.random.split(key, replicates))


class _Curve(NamedTuple):
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
    ) -> "_Curve":
        before, accepted = (
            jnp.minimum(jnp.searchsorted(distances, distances, side=side), positives)
            for side in ("left", "right")
        )
        weights = (jnp.arange(len(distances)) < positives).astype(int)
        return cls(weights, distances, before, accepted, below, up_to, positives, all)

    @classmethod
    def of_pairs(cls, distances: Array, positive: Array, negative: Array) -> "_Curve":
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


def _following(distances: Array, thresholds: Array) -> Array:
    """The least of sorted distances that is over each threshold, or infinity."""
    index = jnp.searchsorted(distances, thresholds, side="right")
    return jnp.append(distances, jnp.inf)[index]


def _exactly(
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


def _metrics(
    curve: _Curve, fars: tuple[float, ...], following: Callable[[Array], Array]
) -> VerificationMetrics:
    """The metrics of a curve; `following` gives the least distance over thresholds."""
    positives, negatives = curve.positives, curve.negatives
    # NaN if there is nothing to take a share of.
    accept = lambda count: _share(count, positives)  # noqa: E731
    false = lambda count: _share(count, negatives)  # noqa: E731
    tars, thresholds = [], []
    for far in fars:
        within = jnp.sum(false(curve.up_to) <= far)
        last = jnp.maximum(within, 1) - 1
        # One negative pair is the least that can be seen.
        shown = negatives * far >= 1 - 1e-6
        tar = jnp.where(within > 0, accept(curve.accepted[last]), 0 * accept(0))
        tars.append(jnp.where(shown, tar, jnp.nan))
        threshold = jnp.where(within > 0, curve.thresholds[last], -jnp.inf)
        thresholds.append(jnp.where(shown, threshold, jnp.nan))

    # The first vertical step of the ROC, or slope where distances are equal, that ends
    # where more are falsely accepted than falsely rejected.
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
        _share(right, positives + negatives),
        threshold,
    )
    values = (jnp.where(known, value, jnp.nan) for value in values)
    counts = positives, jnp.maximum(negatives, 0)
    return VerificationMetrics._make((*values, *counts))


def _share(count: ArrayLike, of: Array) -> Array:
    return jnp.where(of > 0, count / jnp.where(of > 0, of, 1), jnp.nan)


def _pairs(
    distances: ArrayLike, same: ArrayLike, where: ArrayLike | None
) -> tuple[Array, Array, Array]:
    """Checked distances, and which of them are of positives and of negatives."""
    distances = jnp.asarray(distances)
    if distances.ndim != 1 or distances.size == 0:
        raise ValueError(f"distances must be [n], got shape {distances.shape}.")
    if jnp.issubdtype(distances.dtype, jnp.complexfloating):
        raise TypeError(f"distances must be real, got dtype {distances.dtype}.")
    distances = distances.astype(jnp.result_type(distances, jnp.float32))
    masks = [("same", same), ("where", True if where is None else where)]
    same, where = (as_boolean(name, mask) for name, mask in masks)
    for name, mask in (("same", same), ("where", where)):
        if mask.ndim and mask.shape != distances.shape:
            raise ValueError(
                f"{name} must have one entry per distance, got shapes {mask.shape} and "
                f"{distances.shape}."
            )
    return distances, same & where, ~same & where


def _count_positives(
    labels: ArrayLike,
    reference_labels: ArrayLike | None,
    where: ArrayLike | None,
    reference_where: ArrayLike | None,
) -> int:
    """How many positive pairs there are."""

    def count(labels: ArrayLike, where: ArrayLike | None) -> tuple:
        labels = np.asarray(labels).ravel()
        if where is not None and np.shape(where) == labels.shape:
            labels = labels[np.asarray(where, bool)]
        return np.unique(labels, return_counts=True)

    values, counts = count(labels, where)
    if reference_labels is None:
        return int(np.sum(counts * (counts - 1) // 2))
    others, other_counts = count(reference_labels, reference_where)
    _, ours, theirs = np.intersect1d(values, others, return_indices=True)
    return int(np.sum(counts[ours] * other_counts[theirs]))
