"""Triplet mining: indices of triplets, selected from a distance matrix.

Every miner takes distances ``[..., n, m]`` of n anchors to m references and their
labels (or `PairMasks`). It returns `Triplets` of indices: a row for the anchor, columns
for the positive and the negative. Gradients do not flow through the selection, but
through the loss of the selected triplets (`tripletjax.triplet_loss`). An anchor without
a positive or without a negative has no triplet. Among equal distances the lowest index
wins.

"Semi-hard" has five published meanings. FaceNet's text requires negatives that are
farther than the positive but within the margin, and the libraries read it differently:

- per anchor-positive pair, the nearest negative farther than the positive, or else the
  farthest negative (TensorFlow Addons, sentence-transformers):
  `batch_semi_hard_triplets`;
- a variant in this library alone: the same, but a pair without such a negative has no
  triplet: `batch_semi_hard_triplets` with ``fallback=False``;
- all triplets with 0 < d_an - d_ap <= margin (pytorch-metric-learning's
  TripletMarginMiner): `all_triplets` with `semi_hard_band`;
- per anchor, the nearest negative farther than its nearest positive
  (pytorch-metric-learning's BatchEasyHardMiner): `batch_easy_hard_triplets`;
- per anchor, the nearest negative farther than its farthest positive, or else the
  farthest negative (TensorFlow Similarity): `batch_easy_hard_triplets` with
  `hardest_positive` and ``fallback=True``;
- per anchor-positive pair, a random negative farther than the positive by less than the
  margin (siamese-triplet): `random_semi_hard_triplets`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from tripletjax._api import jitted, unjitted
from tripletjax._closures import canonical
from tripletjax._matrices import (
    SortedNegatives,
    columns_by_weight,
    columns_of,
    for_each_true_column,
    frozen_distances,
    ordered_bits,
    take,
)
from tripletjax._pairwise.class_index import ClassIndex
from tripletjax.pairs import PairMasks, Pairs, masks_for

# With at most this many positives per anchor, comparing each positive with all
# negatives is faster than sorting the negatives.
MAX_COMPARED = 64


class Triplets(NamedTuple):
    """Indices of triplets, meaningless if `valid` is False.

    Attributes:
        anchor: integers, rows of the distance matrix; ``[..., k]`` or ``[..., n, k]``.
        positive: integers of the same shape, columns of the distance matrix.
        negative: integers of the same shape, columns of the distance matrix.
        valid: bool of the same shape.
    """

    anchor: Array
    positive: Array
    negative: Array
    valid: Array


class CountedTriplets(NamedTuple):
    """Triplets compacted to a fixed size, and the number of triplets before that.

    `tripletjax.triplet_loss` takes them like `Triplets`; `as_triplets` drops the count.

    Attributes:
        anchor: integers ``[..., size]``, rows of the distance matrix.
        positive: integers ``[..., size]``, columns of the distance matrix.
        negative: integers ``[..., size]``, columns of the distance matrix.
        valid: bool ``[..., size]``, True for the first ``min(count, size)``.
        count: int32 ``[...]``, the number of triplets, at most 2**31 - 1. A count
            above the size means that the remaining triplets were left out.
    """

    anchor: Array
    positive: Array
    negative: Array
    valid: Array
    count: Array


def as_triplets(triplets: Triplets | CountedTriplets) -> Triplets:
    """Convert the result of any miner to `Triplets`.

    Args:
        triplets: `Triplets`, or `CountedTriplets`, whose count is dropped.

    Returns:
        `Triplets` with the same indices.

    Raises:
        TypeError: if `triplets` is neither.

    >>> import jax.numpy as jnp
    >>> import tripletjax as tj
    >>> counted = tj.all_triplets(jnp.array([7, 7, 8]), size=2)
    >>> anchor, positive, negative, valid = tj.mining.as_triplets(counted)
    >>> print(anchor, positive, negative, valid)
    [0 1] [1 0] [2 2] [ True  True]
    """
    if isinstance(triplets, CountedTriplets):
        return Triplets(*triplets[:4])
    if not isinstance(triplets, Triplets):
        raise TypeError(
            "triplets must be Triplets or CountedTriplets, got "
            f"{type(triplets).__name__}; use a miner such as batch_hard_triplets."
        )
    return triplets


@jitted()
def batch_hard_triplets(
    distances: ArrayLike,
    labels: ArrayLike | PairMasks,
    *,
    reference_labels: ArrayLike | None = None,
    positions: ArrayLike | None = None,
    where: ArrayLike | None = None,
    reference_where: ArrayLike | None = None,
) -> Triplets:
    r"""Mine the farthest positive and the nearest negative of each anchor.

    $$p_a = \arg\max_{p \in P_a} d_{ap}, \qquad n_a = \arg\min_{n \in N_a} d_{an}$$

    Memory: O(n m), at most the size of the distances.

    Args:
        distances: ``[..., n, m]``.
        labels: integers ``[..., n]``, or `PairMasks`.
        reference_labels, positions: integers ``[..., m]``, ``[..., n]``; `pair_masks`.
        where, reference_where: bool ``[..., n]``, ``[..., m]``; see `pair_masks`.

    Returns:
        Triplets ``[..., n]``, one per anchor.

    Raises:
        TypeError: if an argument has the wrong dtype.
        ValueError: if shapes do not fit, or `distances` is empty.

    References:
        Hermans, Beyer, Leibe. In Defense of the Triplet Loss for Person
        Re-Identification. 2017. arXiv:1703.07737

    >>> import jax.numpy as jnp
    >>> import tripletjax as tj
    >>> x = jnp.array([[0.0], [1.0], [3.0], [4.0]])
    >>> triplets = tj.batch_hard_triplets(tj.euclidean(x), jnp.array([0, 0, 0, 1]))
    >>> print(triplets.positive[:3], triplets.negative[:3], triplets.valid)
    [2 2 0] [3 3 3] [ True  True  True False]
    """
    return unjitted(batch_easy_hard_triplets)(
        distances,
        labels,
        positive=hardest_positive,
        negative=hardest_negative,
        reference_labels=reference_labels,
        positions=positions,
        where=where,
        reference_where=reference_where,
    )


SelectorFunction = Callable[[Array, Array, Any], tuple[Array, Array]]


@dataclasses.dataclass(frozen=True)
class Selector:
    """Selection of a positive or of a negative, for `batch_easy_hard_triplets`.

    A selector maps ``(distances, candidates, other)`` to ``(index, exists)``:

    - `distances`: floats ``[..., n, m]``;
    - `candidates`: bool ``[..., n, m]``, the positives or the negatives of each anchor;
    - `other`: floats ``[..., n]``, the distance from each anchor to its other partner,
      if the selector is relative, else None;
    - `index`: integers ``[..., n]``, the selected columns; ``[..., n, m]`` selects
      several candidates of each anchor, as `all_candidates` does;
    - `exists`: bool of the same shape, False where no candidate fits.

    Write comparisons so that a NaN is selected and reaches the loss:
    ``~(distances <= other)``, not ``distances > other``.

    Selectors with equal functions are equal and share a compiled program. A plain
    function of the same form is a selector that is not relative and has no fallback.

    Args:
        function: the selection.
        relative: whether the selection depends on the distance of the other partner,
            which is then selected first.
        fallback: the selector for anchors without a fitting candidate, used with
            ``batch_easy_hard_triplets(..., fallback=True)``.

    Raises:
        TypeError: if an argument has the wrong type.

    >>> import jax.numpy as jnp
    >>> import tripletjax as tj
    >>> def farthest_in_reach(distances, candidates, other):
    ...     nearer = candidates & ~(distances >= other[..., None] - 1.5)
    ...     return tj.mining.hardest_positive(distances, nearer)
    >>> positive_in_reach = tj.mining.Selector(
    ...     farthest_in_reach, relative=True, fallback=tj.mining.easiest_positive)
    >>> d = tj.euclidean(jnp.array([[0.0], [1.0], [4.0], [3.0]]))
    >>> triplets = tj.batch_easy_hard_triplets(
    ...     d, jnp.array([0, 0, 0, 1]), positive=positive_in_reach,
    ...     negative=tj.mining.hardest_negative, fallback=True)
    >>> print(triplets.positive[:3], triplets.valid[:3])
    [1 0 1] [ True  True  True]
    """

    function: SelectorFunction
    _: dataclasses.KW_ONLY
    relative: bool = False
    fallback: "Selector | SelectorFunction | None" = None

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise TypeError(f"function must be callable, got {self.function!r}.")
        if not isinstance(self.relative, bool):
            raise TypeError(f"relative must be a bool, got {self.relative!r}.")
        if self.fallback is not None and not callable(self.fallback):
            raise TypeError(
                f"fallback must be a Selector or None, got {self.fallback!r}."
            )
        # Functions that a loop makes anew from the same code are made equal.
        object.__setattr__(self, "function", canonical(self.function))
        object.__setattr__(self, "fallback", canonical(self.fallback))
        if self.function.__doc__:
            object.__setattr__(self, "__doc__", self.function.__doc__)

    def __call__(
        self, distances: Array, candidates: Array, other: Array | None = None
    ) -> tuple[Array, Array]:
        return self.function(distances, candidates, other)


def _easiest_positive(distances: Array, candidates: Array, _: None) -> tuple:
    r"""Select the nearest positive.

    $$p_a = \arg\min_{p \in P_a} d_{ap}$$
    """
    return _nearest(distances, candidates)


def _semi_hard_positive(distances: Array, candidates: Array, other: Array) -> tuple:
    r"""Select the farthest positive that is strictly nearer than the negative.

    $$p_a = \arg\max_{p \in P_a,\; d_{ap} < d_{an}} d_{ap}$$

    Relative to the negative; the fallback is `easiest_positive`.
    """
    return _farthest(distances, candidates & ~(distances >= other[..., None]))


def _hardest_positive(distances: Array, candidates: Array, _: None) -> tuple:
    r"""Select the farthest positive.

    $$p_a = \arg\max_{p \in P_a} d_{ap}$$
    """
    return _farthest(distances, candidates)


def _easiest_negative(distances: Array, candidates: Array, _: None) -> tuple:
    r"""Select the farthest negative.

    $$n_a = \arg\max_{n \in N_a} d_{an}$$
    """
    return _farthest(distances, candidates)


def _semi_hard_negative(distances: Array, candidates: Array, other: Array) -> tuple:
    r"""Select the nearest negative that is strictly farther than the positive.

    $$n_a = \arg\min_{n \in N_a,\; d_{an} > d_{ap}} d_{an}$$

    Relative to the positive; the fallback is `easiest_negative`.
    """
    return _nearest(distances, candidates & ~(distances <= other[..., None]))


def _hardest_negative(distances: Array, candidates: Array, _: None) -> tuple:
    r"""Select the nearest negative.

    $$n_a = \arg\min_{n \in N_a} d_{an}$$
    """
    return _nearest(distances, candidates)


def _all_candidates(distances: Array, candidates: Array, _: None) -> tuple:
    r"""Select every candidate, which makes one triplet of each.

    $$p_a \in P_a \quad \text{or} \quad n_a \in N_a$$
    """
    index = jnp.broadcast_to(columns_of(distances), distances.shape)
    return index, candidates


easiest_positive = Selector(_easiest_positive)
semi_hard_positive = Selector(
    _semi_hard_positive, relative=True, fallback=easiest_positive
)
hardest_positive = Selector(_hardest_positive)
easiest_negative = Selector(_easiest_negative)
semi_hard_negative = Selector(
    _semi_hard_negative, relative=True, fallback=easiest_negative
)
hardest_negative = Selector(_hardest_negative)
all_candidates = Selector(_all_candidates)

# These select something wherever there is a candidate, and need no fallback.
_COMPLETE = frozenset(
    {
        easiest_positive,
        hardest_positive,
        easiest_negative,
        hardest_negative,
        all_candidates,
    }
)


@jitted(callables=("positive", "negative"), flags=("fallback",))
def batch_easy_hard_triplets(
    distances: ArrayLike,
    labels: ArrayLike | PairMasks,
    *,
    positive: Selector | SelectorFunction = easiest_positive,
    negative: Selector | SelectorFunction = semi_hard_negative,
    fallback: bool = False,
    reference_labels: ArrayLike | None = None,
    positions: ArrayLike | None = None,
    where: ArrayLike | None = None,
    reference_where: ArrayLike | None = None,
) -> Triplets:
    r"""Mine a positive and a negative of chosen difficulty for each anchor.

    | difficulty | `positive`                  | `negative`                  |
    | ---------- | --------------------------- | --------------------------- |
    | easy       | `mining.easiest_positive`   | `mining.easiest_negative`   |
    | semi-hard  | `mining.semi_hard_positive` | `mining.semi_hard_negative` |
    | hard       | `mining.hardest_positive`   | `mining.hardest_negative`   |
    | all        | `mining.all_candidates`     | `mining.all_candidates`     |

    A semi-hard selector is relative: the other partner is selected first, and the
    semi-hard one such that $0 < d_{an} - d_{ap}$. The selectors are `mining.Selector`
    objects. You can pass your own, or a plain function of the same form.

    To leave pairs out by their distance, change the masks:
    ``masks._replace(negative=masks.negative & (distances > 0.5))``.

    Memory: O(n m), at most the size of the distances.

    Args:
        distances: ``[..., n, m]``.
        labels: integers ``[..., n]``, or `PairMasks`.
        positive: selector of the positive.
        negative: selector of the negative.
        fallback: whether an anchor without a fitting candidate uses the fallback of
            the selector. If False, the anchor has no triplet.
        reference_labels, positions: integers ``[..., m]``, ``[..., n]``; `pair_masks`.
        where, reference_where: bool ``[..., n]``, ``[..., m]``; see `pair_masks`.

    Returns:
        Triplets ``[..., n]``, one per anchor, or ``[..., n, m]`` with `all_candidates`.

    Raises:
        TypeError: if an argument has the wrong dtype or a selector is not callable.
        ValueError: if shapes do not fit, or `distances` is empty. If both selectors
            are relative, both select all candidates (use `all_triplets`), or one is
            relative to a selector of all candidates. If `fallback` is True and the
            selectors have none.

    References:
        Xuan, Stylianou, Pless. Improved Embeddings with Easy Positive Triplet Mining.
        2019. arXiv:1904.04370

    >>> import jax.numpy as jnp
    >>> import tripletjax as tj
    >>> d = tj.euclidean(jnp.array([[0.0], [2.0], [1.0], [3.0]]))
    >>> labels = jnp.array([0, 0, 1, 2])
    >>> easy_semi_hard = tj.batch_easy_hard_triplets(d, labels)
    >>> print(easy_semi_hard.valid, easy_semi_hard.negative[0])
    [ True False False False] 3
    >>> easy_hard = tj.batch_easy_hard_triplets(
    ...     d, labels, negative=tj.mining.hardest_negative)
    >>> print(easy_hard.valid, easy_hard.negative[:2])
    [ True  True False False] [2 2]
    """
    positive, negative = _as_selector(positive), _as_selector(negative)
    _check_selectors(positive, negative, fallback)
    distances = frozen_distances(distances)
    masks = masks_for(
        distances,
        labels,
        reference_labels=reference_labels,
        positions=positions,
        where=where,
        reference_where=reference_where,
    )
    if positive.relative:
        n, has_n = _select(negative, distances, masks.negative, fallback)
        p, has_p = _select(positive, distances, masks.positive, fallback, partner=n)
    else:
        p, has_p = _select(positive, distances, masks.positive, fallback)
        n, has_n = _select(negative, distances, masks.negative, fallback, partner=p)
    if p.ndim == n.ndim == distances.ndim:
        raise ValueError(
            "positive and negative cannot both select all candidates; use all_triplets."
        )
    if p.ndim != n.ndim:
        # One side selects all candidates: a triplet for each, with the same partner.
        p, has_p, n, has_n = (
            x if x.ndim == distances.ndim else x[..., None]
            for x in (p, has_p, n, has_n)
        )
    return _triplets(distances, p, n, has_p & has_n)


def _as_selector(selector: Selector | SelectorFunction) -> Selector:
    return selector if isinstance(selector, Selector) else Selector(selector)


def _check_selectors(positive: Selector, negative: Selector, fallback: bool) -> None:
    if positive.relative and negative.relative:
        raise ValueError(
            "positive and negative cannot both be relative (semi-hard): one of them "
            "must be selected first."
        )
    without_fallback = positive.fallback is None and negative.fallback is None
    if fallback and without_fallback and not {positive, negative} <= _COMPLETE:
        raise ValueError(
            "fallback=True requires a selector with a fallback, such as "
            f"mining.semi_hard_negative, got positive={positive} and "
            f"negative={negative}."
        )


def _select(
    selector: Selector,
    distances: Array,
    candidates: Array,
    fallback: bool,
    partner: Array | None = None,
) -> tuple[Array, Array]:
    """The selected columns, and whether they exist.

    `partner` has the columns of the other side, if that was selected first.
    """
    other = None
    if selector.relative and partner is not None:
        if partner.ndim == distances.ndim:
            raise ValueError(
                "a relative (semi-hard) selector cannot be combined with "
                "all_candidates: the other partner must be one; use all_triplets with "
                "semi_hard_band."
            )
        other = take(distances, partner)
    index, exists = selector(distances, candidates, other)
    if fallback and selector.fallback is not None:
        easier, easier_exists = selector.fallback(distances, candidates, other)
        index, exists = jnp.where(exists, index, easier), exists | easier_exists
    return index, exists


@jitted(flags=("fallback",))
def batch_semi_hard_triplets(
    distances: ArrayLike,
    labels: ArrayLike | PairMasks,
    *,
    fallback: bool = True,
    reference_labels: ArrayLike | None = None,
    positions: ArrayLike | None = None,
    where: ArrayLike | None = None,
    reference_where: ArrayLike | None = None,
) -> Triplets:
    r"""Mine the nearest negative beyond the positive of each anchor-positive pair.

    $$n_{ap} = \arg\min_{n \in N_a,\; d_{an} > d_{ap}} d_{an}$$

    If no negative is strictly farther than the positive, the farthest negative.

    Memory: O(n m), at most 8 times the size of the distances.

    Args:
        distances: ``[..., n, m]``.
        labels: integers ``[..., n]``, or `PairMasks`.
        fallback: if False, a pair without a negative beyond has no triplet.
        reference_labels, positions: integers ``[..., m]``, ``[..., n]``; `pair_masks`.
        where, reference_where: bool ``[..., n]``, ``[..., m]``; see `pair_masks`.

    Returns:
        Triplets ``[..., n, m]``: entry (a, p) is valid if p is a positive of a.

    Raises:
        TypeError: if an argument has the wrong dtype.
        ValueError: if shapes do not fit, or `distances` is empty.

    References:
        Schroff, Kalenichenko, Philbin. FaceNet: A Unified Embedding for Face
        Recognition and Clustering. 2015. arXiv:1503.03832

    >>> import jax.numpy as jnp
    >>> import tripletjax as tj
    >>> x = jnp.array([[0.0], [2.0], [1.0], [3.0]])
    >>> triplets = tj.batch_semi_hard_triplets(tj.euclidean(x), jnp.array([0, 0, 1, 2]))
    >>> print(triplets.valid[0], triplets.negative[0, 1], triplets.negative[1, 0])
    [False  True False False] 3 2
    """
    distances = frozen_distances(distances)
    masks = masks_for(
        distances,
        labels,
        reference_labels=reference_labels,
        positions=positions,
        where=where,
        reference_where=reference_where,
    )
    most = jnp.max(jnp.sum(masks.positive, axis=-1))
    few = most <= MAX_COMPARED
    index, exists = jax.lax.cond(
        few,
        # Under vmap both branches run: with False, `_beyond_few` ends after no step.
        lambda: _beyond_few(distances, masks, few),
        lambda: _beyond_all(distances, masks.negative),
    )
    farthest, has_negative = _farthest(distances, masks.negative)
    index = jnp.where(exists, index, farthest[..., None])
    # No negative compares as farther than a NaN. Such a pair stays valid, so that the
    # NaN reaches the loss.
    exists |= has_negative[..., None] & (fallback | jnp.isnan(distances))
    return _triplets(distances, columns_of(distances), index, masks.positive & exists)


def _beyond_few(
    distances: Array, masks: PairMasks, wanted: Array
) -> tuple[Array, Array]:
    """The nearest negative beyond each positive, and whether it exists.

    One loop step per positive, and none if `wanted` is False.
    """
    columns = columns_of(distances)
    bits = ordered_bits(distances)
    last = jnp.iinfo(bits.dtype).max
    key = jnp.where(masks.negative, bits, last)

    def visit(state: tuple, column: Array, _: Array) -> tuple[Array, Array]:
        index, exists = state  # Both [..., n, m], by anchor and positive.
        beyond = key > take(bits, column[..., None])
        nearest = jnp.min(jnp.where(beyond, key, last), axis=-1, keepdims=True)
        hit = jnp.where(key == nearest, columns, len(columns) - 1)
        pair = columns == column[..., None]
        index = jnp.where(pair, jnp.min(hit, axis=-1, keepdims=True), index)
        return index, jnp.where(pair, nearest < last, exists)

    index = jnp.zeros_like(distances, columns.dtype)
    exists = jnp.zeros_like(distances, bool)
    return for_each_true_column(masks.positive & wanted, visit, (index, exists))


def _beyond_all(distances: Array, negative: Array) -> tuple[Array, Array]:
    """The nearest negative beyond each reference, by sorting the negatives once."""
    negatives = SortedNegatives.of(distances, negative)
    beyond = negatives.rank(distances, side="right")
    return negatives.at(beyond), beyond < negatives.count[..., None]


class Band(NamedTuple):
    """Interval of the gap between a triplet's distances, low < d_an - d_ap <= high.

    Attributes:
        low: a scalar, the excluded lower end, in units of the distances.
        high: a scalar, the included upper end.
    """

    low: ArrayLike
    high: ArrayLike


def hard_band() -> Band:
    """The band d_an - d_ap <= 0: triplets whose negative is not the farther one."""
    return Band(-jnp.inf, 0.0)


def semi_hard_band(margin: ArrayLike = 0.1) -> Band:
    """The band 0 < d_an - d_ap <= margin: the negative is farther, within the margin.

    Args:
        margin: a scalar, in units of the distances.
    """
    return Band(0.0, margin)


def easy_band(margin: ArrayLike = 0.1) -> Band:
    """The band margin < d_an - d_ap: triplets that satisfy the margin.

    Args:
        margin: a scalar, in units of the distances.
    """
    return Band(margin, jnp.inf)


def violating_band(margin: ArrayLike = 0.1) -> Band:
    """The band d_an - d_ap <= margin: hard and semi-hard triplets together.

    Args:
        margin: a scalar, in units of the distances.
    """
    return Band(-jnp.inf, margin)


@jitted(sizes=("size",))
def all_triplets(
    labels: ArrayLike | PairMasks,
    *,
    size: int,
    distances: ArrayLike | None = None,
    band: Band | None = None,
    reference_labels: ArrayLike | None = None,
    positions: ArrayLike | None = None,
    where: ArrayLike | None = None,
    reference_where: ArrayLike | None = None,
) -> CountedTriplets:
    r"""Mine all triplets, or all triplets of a band, compacted to a fixed size.

    $$\{(a, p, n) : p \in P_a,\; n \in N_a,\;
      \text{low} < d_{an} - d_{ap} \le \text{high}\}$$

    Like ``jnp.nonzero(..., size=size)``, without the n x m x m mask.

    Memory: O(n m + size), at most 10 times the size of the distances.

    Args:
        labels: integers ``[..., n]``, or `PairMasks`.
        size: the length of the result, at least 1.
        distances: ``[..., n, m]``; required with `band`.
        band: a `Band` of the gap $d_{an} - d_{ap}$: `hard_band()`,
            `semi_hard_band(margin)`, `easy_band(margin)`, `violating_band(margin)`, or
            any other. If not given, all triplets.
        reference_labels, positions: integers ``[..., m]``, ``[..., n]``; `pair_masks`.
        where, reference_where: bool ``[..., n]``, ``[..., m]``; see `pair_masks`.

    Returns:
        `CountedTriplets` ``[..., size]``, in order of anchor, then positive, then
        negative by index, or by distance with `distances`. The first `count` are valid.
        A `count` above `size` means that the remaining triplets were left out.

    Raises:
        TypeError: if an argument has the wrong dtype, or `band` is not a `Band`.
        ValueError: if shapes do not fit, if there are no labels, if `size` is not
            positive, or if `band` is given without `distances`.

    >>> import jax.numpy as jnp
    >>> import tripletjax as tj
    >>> triplets = tj.all_triplets(jnp.array([7, 7, 8]), size=4)
    >>> print(triplets.anchor[:2], triplets.positive[:2], triplets.negative[:2])
    [0 1] [1 0] [2 2]
    >>> print(triplets.count, triplets.valid)
    2 [ True  True False False]
    """
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}.")
    options = {
        "reference_labels": reference_labels,
        "positions": positions,
        "where": where,
        "reference_where": reference_where,
    }
    if distances is None:
        if band is not None:
            raise ValueError("band requires distances; pass distances=metric(x).")
        masks = Pairs.alone(labels, **options).masks()
        # With equal distances, sorting keeps the order of the indices.
        distances = jnp.zeros(masks.positive.shape)
    else:
        distances = frozen_distances(distances)
        masks = masks_for(distances, labels, **options)
    if band is None:
        band = Band(-jnp.inf, jnp.inf)
    elif not isinstance(band, Band):
        raise TypeError(
            f"band must be a Band, got {band!r}; use Band(low, high) or "
            "semi_hard_band(margin)."
        )
    compact = jnp.vectorize(
        lambda d, p, n: tuple(_compact(d, PairMasks(p, n), band, size)),
        signature=f"(n,m),(n,m),(n,m)->({size}),({size}),({size}),({size}),()",
    )
    return CountedTriplets(*compact(distances, *masks))


def _compact(distances: Array, masks: PairMasks, band: Band, size: int) -> tuple:
    n, m = distances.shape
    negatives = SortedNegatives.of(distances, masks.negative)
    first = negatives.rank(distances + band.low, side="right")
    last = negatives.rank(distances + band.high, side="right")
    # An infinite end lies beyond every negative, even an infinitely far one.
    first = jnp.where(band.low == -jnp.inf, 0, first)
    last = jnp.where(band.high == jnp.inf, m, last)
    last = jnp.minimum(last, negatives.count[:, None])
    per_pair = jnp.where(masks.positive, jnp.maximum(last - first, 0), 0)
    # Search by anchor, then by positive: an index of all n m pairs may exceed int32.
    ends_in_row = jax.lax.associative_scan(_saturating_add, per_pair, axis=1)
    per_anchor = ends_in_row[:, -1]
    ends = jax.lax.associative_scan(_saturating_add, per_anchor)
    slot = jnp.arange(size)
    anchor = jnp.minimum(jnp.searchsorted(ends, slot, side="right"), n - 1)
    within = slot - (ends[anchor] - per_anchor[anchor])
    positive = _first_above(ends_in_row, anchor, within)
    within -= ends_in_row[anchor, positive] - per_pair[anchor, positive]
    rank = jnp.clip(first[anchor, positive] + within, 0, m - 1)
    return anchor, positive, negatives.order[anchor, rank], slot < ends[-1], ends[-1]


def _first_above(sorted_rows: Array, row: Array, values: Array) -> Array:
    """For each value and its row, the first column above it; the last if none is."""
    m = sorted_rows.shape[1]

    def halve(_: Array, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends  # The first and the last column that may be the result.
        middle = (low + high) // 2
        above = sorted_rows[row, middle] > values
        return jnp.where(above, low, middle + 1), jnp.where(above, middle, high)

    low = jnp.zeros_like(row)
    steps = (m - 1).bit_length()
    return jax.lax.fori_loop(0, steps, halve, (low, jnp.full_like(row, m - 1)))[1]


def _saturating_add(a: Array, b: Array) -> Array:
    most = jnp.iinfo(a.dtype).max
    return jnp.where(a > most - b, most, a + b)


@jitted(sizes=("per_anchor",))
def random_triplets(
    key: Array,
    labels: ArrayLike | PairMasks,
    *,
    per_anchor: int = 1,
    reference_labels: ArrayLike | None = None,
    positions: ArrayLike | None = None,
    where: ArrayLike | None = None,
    reference_where: ArrayLike | None = None,
) -> Triplets:
    """Random triplets: each anchor with positives and negatives drawn uniformly.

    Memory: O(m + n per_anchor); masks are read in blocks of rows.

    Args:
        key: a random key, ``jax.random.key(seed)``.
        labels: integers ``[..., n]``, or `PairMasks`.
        per_anchor: how many triplets to draw for each anchor, with replacement.
        reference_labels, positions, where, reference_where: as in `pair_masks`.

    Returns:
        Triplets ``[..., n, per_anchor]``.

    Raises:
        TypeError: if an argument has the wrong dtype.
        ValueError: if shapes do not fit, if there are no labels, or if `per_anchor` is
            not positive.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import tripletjax as tj
    >>> triplets = tj.random_triplets(jax.random.key(0), jnp.array([7, 7, 8]))
    >>> print(triplets.positive[:2, 0], triplets.negative[:2, 0], triplets.valid[:, 0])
    [1 0] [2 2] [ True  True False]
    """
    if per_anchor < 1:
        raise ValueError(f"per_anchor must be at least 1, got {per_anchor}.")
    pairs = Pairs.alone(
        labels,
        reference_labels=reference_labels,
        positions=positions,
        where=where,
        reference_where=reference_where,
    )
    if isinstance(pairs.labels, PairMasks):
        candidates_of, of_labels = _masked_candidates, pairs.labels.positive[..., 0]
    else:
        candidates_of, of_labels = _class_candidates, pairs.labels
    *lead, n = of_labels.shape

    def draw(key: Array, pairs: Pairs) -> Triplets:
        sides = candidates_of(pairs)
        drawn, valid = [], jnp.ones((per_anchor, n), bool)
        for side_key, (count, column_at) in zip(jax.random.split(key), sides):
            most = jnp.maximum(count, 1)
            rank = jax.random.randint(side_key, (per_anchor, n), 0, most)
            drawn.append(column_at(rank))
            valid &= count > 0
        anchor = jnp.broadcast_to(jnp.arange(n), valid.shape)
        return Triplets(*(x.T for x in (anchor, *drawn, valid)))

    for _ in lead:
        draw = jax.vmap(draw)
    return draw(jax.random.split(key, tuple(lead)), pairs)


# The number of an anchor's candidates ``[n]``, and their columns by rank ``[k, n]``.
Candidates = tuple[Array, Callable[[Array], Array]]

# As many pairs of anchors and references at a time do not take much memory.
PAIRS_AT_ONCE = 2**20


def _class_candidates(pairs: Pairs) -> list[Candidates]:
    """Positives and negatives by integer labels, which are sorted once."""
    classes, n = ClassIndex.of_pairs(pairs), len(pairs.labels)
    return [
        (classes.positives, lambda rank: classes.positive(rank, 0, n)[0]),
        (classes.negatives, lambda rank: classes.negative(rank, 0, n)[0]),
    ]


def _masked_candidates(pairs: Pairs) -> list[Candidates]:
    """Positives and negatives by masks, of which some rows are read at a time."""
    _, _, _, where, reference_where = pairs
    real = True if reference_where is None else reference_where

    def candidates(mask: Array) -> Candidates:
        n, m = mask.shape
        over_rows = functools.partial(
            jax.lax.map, batch_size=max(1, PAIRS_AT_ONCE // m)
        )

        def column_at(rank: Array) -> Array:
            def columns(row: tuple[Array, Array]) -> Array:
                anchor, rank = row
                running = jnp.cumsum(mask[anchor] & real)
                column = jnp.searchsorted(running, rank, side="right")
                return jnp.minimum(column, m - 1)

            return over_rows(columns, (jnp.arange(n), rank.T)).T

        # One sum of all rows would first make integers of the whole mask.
        count = over_rows(lambda a: jnp.sum(mask[a] & real), jnp.arange(n))
        return count if where is None else count * where, column_at

    return [candidates(mask) for mask in pairs.labels]


@jitted(nonnegative=("margin",))
def random_semi_hard_triplets(
    key: Array,
    distances: ArrayLike,
    labels: ArrayLike | PairMasks,
    *,
    margin: ArrayLike = 0.1,
    reference_labels: ArrayLike | None = None,
    positions: ArrayLike | None = None,
    where: ArrayLike | None = None,
    reference_where: ArrayLike | None = None,
) -> Triplets:
    r"""Draw a random negative within the margin for each anchor-positive pair.

    $$n_{ap} \sim
      \text{Uniform}\{n \in N_a : d_{ap} < d_{an} < d_{ap} + \text{margin}\}$$

    A pair without such a negative has no triplet.

    Memory: O(n m), at most 14 times the size of the distances.

    Args:
        key: a random key, ``jax.random.key(seed)``.
        distances: ``[..., n, m]``.
        labels: integers ``[..., n]``, or `PairMasks`.
        margin: a scalar, in units of the distances.
        reference_labels, positions: integers ``[..., m]``, ``[..., n]``; `pair_masks`.
        where, reference_where: bool ``[..., n]``, ``[..., m]``; see `pair_masks`.

    Returns:
        Triplets ``[..., n, m]``: entry (a, p) is valid if p is a positive of a with
        such a negative.

    Raises:
        TypeError: if an argument has the wrong dtype.
        ValueError: if shapes do not fit, `distances` is empty, or the margin is
            negative.

    References:
        Schroff, Kalenichenko, Philbin. FaceNet: A Unified Embedding for Face
        Recognition and Clustering. 2015. arXiv:1503.03832

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import tripletjax as tj
    >>> d = tj.euclidean(jnp.array([[0.0], [1.0], [1.05], [2.0]]))
    >>> labels = jnp.array([0, 0, 1, 2])
    >>> triplets = tj.random_semi_hard_triplets(jax.random.key(0), d, labels)
    >>> print(triplets.valid[0, 1], triplets.negative[0, 1], triplets.valid[1, 0])
    True 2 False
    """
    distances = frozen_distances(distances)
    masks = masks_for(
        distances,
        labels,
        reference_labels=reference_labels,
        positions=positions,
        where=where,
        reference_where=reference_where,
    )
    negatives = SortedNegatives.of(distances, masks.negative)
    first = negatives.rank(distances, side="right")
    last = negatives.rank(distances + margin, side="left")
    last = jnp.minimum(last, negatives.count[..., None])
    rank = first + jax.random.randint(
        key, distances.shape, 0, jnp.maximum(last - first, 1)
    )
    return _triplets(
        distances,
        columns_of(distances),
        negatives.at(rank),
        masks.positive & (last > first),
    )


@jitted(sizes=("dim",), nonnegative=("cutoff", "furthest"))
def distance_weighted_triplets(
    key: Array,
    distances: ArrayLike,
    labels: ArrayLike | PairMasks,
    *,
    dim: int,
    cutoff: ArrayLike = 0.5,
    furthest: ArrayLike = 1.4,
    reference_labels: ArrayLike | None = None,
    positions: ArrayLike | None = None,
    where: ArrayLike | None = None,
    reference_where: ArrayLike | None = None,
) -> Triplets:
    r"""Draw a distance-weighted negative for each anchor-positive pair.

    $$P(n \mid a) \propto 1 / q(\max(d_{an}, \text{cutoff})), \qquad
      q(d) \propto d^{D - 2} (1 - d^2 / 4)^{(D - 3) / 2}$$

    q is the density of Euclidean distances between uniform random points on the unit
    sphere in D dimensions. The weights 1 / q draw near and far negatives equally often.

    Memory: O(n m), at most 7 times the size of the distances.

    Args:
        key: a random key, ``jax.random.key(seed)``.
        distances: Euclidean distances of unit-norm vectors ``[..., n, m]``.
        labels: integers ``[..., n]``, or `PairMasks`.
        dim: D, the number of dimensions of the embeddings, at least 2.
        cutoff: the least distance in the weights, at least 0: nearer negatives have
            the weight of this distance.
        furthest: negatives at this distance or farther are not drawn. An anchor that
            has no nearer negative draws uniformly from all its negatives.
        reference_labels, positions: integers ``[..., m]``, ``[..., n]``; `pair_masks`.
        where, reference_where: bool ``[..., n]``, ``[..., m]``; see `pair_masks`.

    Returns:
        Triplets ``[..., n, m]``: entry (a, p) is valid if p is a positive of a.

    Raises:
        TypeError: if an argument has the wrong dtype.
        ValueError: if shapes do not fit, `distances` is empty, `dim` is less than 2,
            or `cutoff` or `furthest` is negative or not finite.

    References:
        Wu, Manmatha, Smola, Krähenbühl. Sampling Matters in Deep Embedding Learning.
        2017. arXiv:1706.07567

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import tripletjax as tj
    >>> x = jnp.array([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0], [-1.0, 0.0]])
    >>> triplets = tj.distance_weighted_triplets(
    ...     jax.random.key(0), tj.euclidean(x), jnp.array([0, 0, 1, 1]), dim=2)
    >>> print(triplets.negative[1, 0], triplets.valid[1])
    2 [ True False False False]
    """
    if dim < 2:
        raise ValueError(f"dim must be at least 2, got {dim}.")
    distances = frozen_distances(distances)
    masks = masks_for(
        distances,
        labels,
        reference_labels=reference_labels,
        positions=positions,
        where=where,
        reference_where=reference_where,
    )
    # Unit-norm vectors are at most 2 apart, where the density is 0 or infinite.
    d = jnp.clip(distances, jnp.maximum(cutoff, 1e-3), 2 - 1e-3)
    log_density = (dim - 2) * jnp.log(d) + (dim - 3) / 2 * jnp.log1p(-d * d / 4)
    drawn = masks.negative & (distances < furthest)
    log_weights = jnp.where(drawn, -log_density, -jnp.inf)
    most = jnp.max(log_weights, axis=-1, keepdims=True)
    weights = jnp.exp(log_weights - jnp.where(jnp.isfinite(most), most, 0))
    weights = jnp.where(jnp.any(drawn, -1, keepdims=True), weights, masks.negative)
    index = columns_by_weight(weights, jax.random.uniform(key, distances.shape))
    has_negative = jnp.any(masks.negative, axis=-1, keepdims=True)
    return _triplets(
        distances, columns_of(distances), index, masks.positive & has_negative
    )


def _farthest(distances: Array, mask: Array) -> tuple[Array, Array]:
    index = jnp.argmax(jnp.where(mask, distances, -jnp.inf), axis=-1)
    return index, jnp.any(mask, axis=-1)


def _nearest(distances: Array, mask: Array) -> tuple[Array, Array]:
    index = jnp.argmin(jnp.where(mask, distances, jnp.inf), axis=-1)
    return index, jnp.any(mask, axis=-1)


def _triplets(
    matrix: Array, positive: Array, negative: Array, valid: Array
) -> Triplets:
    """Triplets of a matrix's rows, ``[..., n]`` or ``[..., n, k]`` as `valid` is."""
    anchor = jnp.arange(matrix.shape[-2])
    if valid.ndim == matrix.ndim:
        anchor = anchor[:, None]
    return Triplets(*jnp.broadcast_arrays(anchor, positive, negative, valid))
