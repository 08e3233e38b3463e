"""Which triplets: indices chosen from a distance matrix.

Every miner takes distances ``[..., n, m]`` of n anchors to m references and their
labels (or `PairMasks`), and returns `Triplets` of indices: of a row for the anchor, of
columns for the positive and the negative. Choosing is not differentiated; the loss of
the chosen triplets is (`tripletjax.triplet_loss`). An anchor without a positive or
without a negative has no triplet. Of equal distances the lowest index wins.

"Semi-hard" has five published meanings. FaceNet's text asks for negatives that are
farther than the positive but within the margin, and the libraries read it differently:

- per anchor-positive pair, the nearest negative farther than the positive, and if there
  is none the farthest negative (TensorFlow Addons, sentence-transformers):
  `batch_semi_hard_triplets`;
- a variant of this library: the same, but a pair without such a negative has no
  triplet: `batch_semi_hard_triplets` with ``fallback=False``;
- all triplets with 0 < d_an - d_ap <= margin (pytorch-metric-learning's
  TripletMarginMiner): `all_triplets` with `semi_hard_band`;
- per anchor, the nearest negative farther than its nearest positive
  (pytorch-metric-learning's BatchEasyHardMiner): `batch_easy_hard_triplets`;
- per anchor, the nearest negative farther than its farthest positive, and if there is
  none the farthest negative (TensorFlow Similarity): `batch_easy_hard_triplets` with
  `hardest_positive` and ``fallback=True``;
- per anchor-positive pair, a random negative farther than the positive by less than the
  margin (siamese-triplet): `random_semi_hard_triplets`.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from tripletjax._api import jitted, unjitted
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

# Up to so many positives of an anchor, comparing each with all takes less time than
# sorting.
MAX_COMPARED = 64


class Triplets(NamedTuple):
    """Indices of triplets; where `valid` is False the indices mean nothing.

    Attributes:
        anchor: rows of the distance matrix.
        positive: columns of the distance matrix, of the same shape.
        negative: the same.
        valid: bool, of the same shape.
    """

    anchor: Array
    positive: Array
    negative: Array
    valid: Array


@jax.tree_util.register_pytree_node_class
class CountedTriplets(Triplets):
    """`Triplets` compacted to a fixed size, with the number that there really were.

    Unpacked like other `Triplets`, into four: the count is an attribute beside them,
    in place of the method of tuples.

    Attributes:
        count: int32 ``[...]``; if it exceeds the size, triplets were left out. It
            stops at 2**31 - 1.
    """

    # As above: in place of the method.
    count: Array  # pyrefly: ignore[bad-override, bad-override-mutable-attribute]

    def __new__(
        cls, anchor: Any, positive: Any, negative: Any, valid: Any, count: Any
    ) -> "CountedTriplets":
        self = super().__new__(cls, anchor, positive, negative, valid)
        self.count = count
        return self

    def __getnewargs__(self) -> tuple:
        # What copy and pickle make another one of.
        return *self, self.count

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, count={self.count!r})"

    def _asdict(self) -> dict[str, Any]:
        return super()._asdict() | {"count": self.count}

    def _replace(self, **fields: Any) -> "CountedTriplets":
        if unknown := fields.keys() - self._asdict().keys():
            raise ValueError(f"CountedTriplets has no {', '.join(sorted(unknown))}.")
        return CountedTriplets(**self._asdict() | fields)

    def tree_flatten(self) -> tuple[tuple, None]:
        return (*self, self.count), None

    @classmethod
    def tree_unflatten(cls, _: None, children: Iterator) -> "CountedTriplets":
        return cls(*children)


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
    r"""For each anchor its farthest positive and its nearest negative.

    $$p_a = \arg\max_{p \in P_a} d_{ap}, \qquad n_a = \arg\min_{n \in N_a} d_{an}$$

    Memory: O(n m), at most the size of the distances.

    Args:
        distances: ``[..., n, m]``.
        labels: integers ``[..., n]``, or `PairMasks`.
        reference_labels, positions, where, reference_where: as in `pair_masks`.

    Returns:
        Triplets ``[..., n]``, one per anchor.

    Raises:
        TypeError: if an argument has the wrong dtype.
        ValueError: if shapes do not fit, or there is no distance.

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


# What `batch_easy_hard_triplets` chooses with: functions of the distances [..., n, m],
# the mask of candidates [..., n, m] and the distance [..., n] of the anchor's other
# partner, to the index of the choice and whether there is one. Comparisons are such
# that a NaN is chosen: a loss that has gone wrong must not look well.

Selector = Callable[[Array, Array, Array | None], tuple[Array, Array]]


def relative(
    *, fallback: Selector | None = None
) -> Callable[[Callable[..., tuple[Array, Array]]], Selector]:
    """Says that a choice is made relative to the other one, and after it.

    Args:
        fallback: what to choose with where there is no such choice, if that is asked
            for.

    Returns:
        A decorator of choices.

    >>> import jax.numpy as jnp
    >>> import tripletjax as tj
    >>> @tj.mining.relative(fallback=tj.mining.easiest_positive)
    ... def positive_in_reach(distances, candidates, negative):
    ...     nearer = candidates & (distances < negative[..., None] - 1.5)
    ...     return tj.mining.hardest_positive(distances, nearer, negative)
    >>> d = tj.euclidean(jnp.array([[0.0], [1.0], [4.0], [3.0]]))
    >>> triplets = tj.batch_easy_hard_triplets(
    ...     d, jnp.array([0, 0, 0, 1]), positive=positive_in_reach,
    ...     negative=tj.mining.hardest_negative, fallback=True)
    >>> print(triplets.positive[:3], triplets.valid[:3])
    [1 0 1] [ True  True  True]
    """

    def decorate(choice: Any) -> Selector:
        choice.relative, choice.fallback = True, fallback
        return choice

    return decorate


def easiest_positive(
    distances: Array, candidates: Array, other: Array | None
) -> tuple[Array, Array]:
    """The nearest positive."""
    return _nearest(distances, candidates)


@relative(fallback=easiest_positive)
def semi_hard_positive(
    distances: Array, candidates: Array, other: Array
) -> tuple[Array, Array]:
    """The farthest positive that is strictly nearer than the chosen negative."""
    return _farthest(distances, candidates & ~(distances >= other[..., None]))


def hardest_positive(
    distances: Array, candidates: Array, other: Array | None
) -> tuple[Array, Array]:
    """The farthest positive."""
    return _farthest(distances, candidates)


def easiest_negative(
    distances: Array, candidates: Array, other: Array | None
) -> tuple[Array, Array]:
    """The farthest negative."""
    return _farthest(distances, candidates)


@relative(fallback=easiest_negative)
def semi_hard_negative(
    distances: Array, candidates: Array, other: Array
) -> tuple[Array, Array]:
    """The nearest negative that is strictly farther than the chosen positive."""
    return _nearest(distances, candidates & ~(distances <= other[..., None]))


def hardest_negative(
    distances: Array, candidates: Array, other: Array | None
) -> tuple[Array, Array]:
    """The nearest negative."""
    return _nearest(distances, candidates)


def all_candidates(
    distances: Array, candidates: Array, other: Array | None
) -> tuple[Array, Array]:
    """All candidates, with a triplet each."""
    index = jnp.broadcast_to(columns_of(distances), distances.shape)
    return index, candidates


@jitted(callables=("positive", "negative"), flags=("fallback",))
def batch_easy_hard_triplets(
    distances: ArrayLike,
    labels: ArrayLike | PairMasks,
    *,
    positive: Selector = easiest_positive,
    negative: Selector = semi_hard_negative,
    fallback: bool = False,
    reference_labels: ArrayLike | None = None,
    positions: ArrayLike | None = None,
    where: ArrayLike | None = None,
    reference_where: ArrayLike | None = None,
) -> Triplets:
    r"""For each anchor a positive and a negative of the wanted difficulty.

    | difficulty | `positive`                  | `negative`                  |
    | ---------- | --------------------------- | --------------------------- |
    | easy       | `mining.easiest_positive`   | `mining.easiest_negative`   |
    | semi-hard  | `mining.semi_hard_positive` | `mining.semi_hard_negative` |
    | hard       | `mining.hardest_positive`   | `mining.hardest_negative`   |
    | all        | `mining.all_candidates`     | `mining.all_candidates`     |

    A semi-hard choice is made relative to the other one, which is made first. Any
    function of the same form can be given as well, with `mining.relative` for one that
    is made after the other. Pairs can be left out by their
    distance through the masks:
    ``masks._replace(negative=masks.negative & (distances > 0.5))``.

    Memory: O(n m), at most the size of the distances.

    Args:
        distances: ``[..., n, m]``.
        labels: integers ``[..., n]``, or `PairMasks`.
        positive: how the positive is chosen.
        negative: how the negative is chosen.
        fallback: where there is no semi-hard choice, whether to take the easiest one
            rather than none. Of other choices only those made by `mining.relative`
            with a fallback have one.
        reference_labels, positions, where, reference_where: as in `pair_masks`.

    Returns:
        Triplets ``[..., n]``, one per anchor, or ``[..., n, m]`` with `all_candidates`.

    Raises:
        TypeError: if an argument has the wrong dtype or a choice is not callable.
        ValueError: if shapes do not fit, there is no distance, or the two choices do
            not go together: both semi-hard, semi-hard with all, or both all (which is
            `all_triplets`); or if `fallback` is asked of choices that have none.

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
    distances = frozen_distances(distances)
    masks = masks_for(
        distances,
        labels,
        reference_labels=reference_labels,
        positions=positions,
        where=where,
        reference_where=reference_where,
    )
    choices = positive, negative
    after = [getattr(choice, "relative", False) for choice in choices]
    instead = [getattr(choice, "fallback", None) for choice in choices]
    own = (easiest_positive, easiest_negative, hardest_positive, hardest_negative)
    if (
        fallback
        and instead == [None, None]
        and not {*choices} <= {*own, all_candidates}
    ):
        raise ValueError(
            "fallback goes with a choice that has one, such as semi_hard_negative, got "
            f"positive={positive!r} and negative={negative!r}."
        )
    unfit = ValueError(
        "positive and negative cannot both be semi-hard, nor semi-hard and all, nor "
        "both all (see all_triplets)."
    )
    if all(after):
        raise unfit

    def choose(side: int, candidates: Array, other: Array | None) -> tuple:
        index, found = choices[side](distances, candidates, other)
        otherwise = instead[side]
        if fallback and otherwise is not None:
            second, exists = otherwise(distances, candidates, other)
            index, found = jnp.where(found, index, second), found | exists
        return index, found

    chosen: list = [None, None]
    first = 1 if after[0] else 0
    chosen[first] = choose(first, masks[first], None)
    every = chosen[first][0].ndim == distances.ndim
    if every and after[1 - first]:
        raise unfit
    other = None if every else take(distances, chosen[first][0])
    chosen[1 - first] = choose(1 - first, masks[1 - first], other)
    ranks = [index.ndim for index, _ in chosen]
    if ranks == [distances.ndim, distances.ndim]:
        raise unfit
    if max(ranks) == distances.ndim:
        alone = ranks.index(min(ranks))
        chosen[alone] = tuple(x[..., None] for x in chosen[alone])
    (p, has_p), (n, has_n) = chosen
    return _triplets(distances, p, n, has_p & has_n)


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
    r"""For each anchor-positive pair the nearest negative beyond the positive.

    $$n_{ap} = \arg\min_{n \in N_a,\; d_{an} > d_{ap}} d_{an}$$

    and where no negative is strictly farther than the positive, the farthest negative.

    Memory: O(n m), at most 8 times the size of the distances.

    Args:
        distances: ``[..., n, m]``.
        labels: integers ``[..., n]``, or `PairMasks`.
        fallback: if False, a pair without a negative beyond has no triplet.
        reference_labels, positions, where, reference_where: as in `pair_masks`.

    Returns:
        Triplets ``[..., n, m]``: entry (a, p) is valid if p is a positive of a.

    Raises:
        TypeError: if an argument has the wrong dtype.
        ValueError: if shapes do not fit, or there is no distance.

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
    index, found = jax.lax.cond(
        few,
        # Where both sides of a choice are computed, under vmap, at least one is short.
        lambda: _beyond_few(distances, masks, few),
        lambda: _beyond_all(distances, masks.negative),
    )
    farthest, has_negative = _farthest(distances, masks.negative)
    index = jnp.where(found, index, farthest[..., None])
    # A NaN is nearer than nothing; its pair stays, for the loss to show it.
    found |= has_negative[..., None] & (fallback | jnp.isnan(distances))
    return _triplets(distances, columns_of(distances), index, masks.positive & found)


def _beyond_few(
    distances: Array, masks: PairMasks, wanted: Array
) -> tuple[Array, Array]:
    """For each positive pair the nearest negative beyond it, a positive at a time."""
    columns = columns_of(distances)
    bits = ordered_bits(distances)
    last = jnp.iinfo(bits.dtype).max
    key = jnp.where(masks.negative, bits, last)

    def visit(state: tuple, column: Array, _: Array) -> tuple[Array, Array]:
        index, found = state
        beyond = key > take(bits, column[..., None])
        nearest = jnp.min(jnp.where(beyond, key, last), axis=-1, keepdims=True)
        hit = jnp.where(key == nearest, columns, len(columns) - 1)
        pair = columns == column[..., None]
        index = jnp.where(pair, jnp.min(hit, axis=-1, keepdims=True), index)
        return index, jnp.where(pair, nearest < last, found)

    none = jnp.zeros_like(distances, columns.dtype), jnp.zeros_like(distances, bool)
    return for_each_true_column(masks.positive & wanted, visit, none)


def _beyond_all(distances: Array, negative: Array) -> tuple[Array, Array]:
    """The nearest negative beyond each reference, by sorting once."""
    negatives = SortedNegatives.of(distances, negative)
    beyond = negatives.rank(distances, side="right")
    return negatives.at(beyond), beyond < negatives.count[..., None]


class Band(NamedTuple):
    """Triplets by how much farther the negative is: low < d_an - d_ap <= high.

    Attributes:
        low: the lower end, not included.
        high: the upper end, included.
    """

    low: ArrayLike
    high: ArrayLike


def hard_band() -> Band:
    """Triplets whose negative is not farther than the positive."""
    return Band(-jnp.inf, 0.0)


def semi_hard_band(margin: ArrayLike = 0.1) -> Band:
    """Triplets whose negative is farther than the positive, but within the margin."""
    return Band(0.0, margin)


def easy_band(margin: ArrayLike = 0.1) -> Band:
    """Triplets that satisfy the margin."""
    return Band(margin, jnp.inf)


def violating_band(margin: ArrayLike = 0.1) -> Band:
    """Triplets that do not satisfy the margin: the hard and the semi-hard."""
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
    r"""All triplets, or all of a kind, compacted to a fixed size.

    $$\{(a, p, n) : p \in P_a,\; n \in N_a,\;
      \text{low} < d_{an} - d_{ap} \le \text{high}\}$$

    Like ``jnp.nonzero(..., size=size)``, without the n x m x m mask.

    Memory: O(n m + size), at most 10 times the size of the distances.

    Args:
        labels: integers ``[..., n]``, or `PairMasks`.
        size: how many triplets there is room for.
        distances: ``[..., n, m]``; needed with `band`.
        band: which triplets, by their distances: `hard_band()`,
            `semi_hard_band(margin)`, `easy_band(margin)`, `violating_band(margin)`, or
            any `Band`. If not given, all.
        reference_labels, positions, where, reference_where: as in `pair_masks`.

    Returns:
        `CountedTriplets` ``[..., size]``, in order of anchor, then positive, then
        negative by index, or by distance with `distances`. The first `count` are valid;
        a `count` over `size` means that the rest was left out.

    Raises:
        TypeError: if an argument has the wrong dtype.
        ValueError: if shapes do not fit, if there are no labels, if `size` is not
            positive, or if `band` comes without `distances`.

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
            raise ValueError("band needs distances: it chooses triplets by them.")
        masks = Pairs.alone(labels, **options).masks()
        # With one distance for all, the sorted order is that of the indices.
        distances = jnp.zeros(masks.positive.shape)
    else:
        distances = frozen_distances(distances)
        masks = masks_for(distances, labels, **options)
    if band is None:
        band = Band(-jnp.inf, jnp.inf)
    elif not isinstance(band, Band):
        raise TypeError(f"band must be a Band, got {band!r}.")
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
    # An infinite end is beyond every negative, also beyond infinitely far ones.
    first = jnp.where(band.low == -jnp.inf, 0, first)
    last = jnp.where(band.high == jnp.inf, m, last)
    last = jnp.minimum(last, negatives.count[:, None])
    per_pair = jnp.where(masks.positive, jnp.maximum(last - first, 0), 0)
    # By anchor, then by positive: one index of all pairs might not fit into int32.
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
    """The first column above a value in a row of each, the last column if none is."""
    m = sorted_rows.shape[1]

    def halve(_: Array, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
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
    r"""For each anchor-positive pair a random negative from within the margin.

    $$n_{ap} \sim
      \text{Uniform}\{n \in N_a : d_{ap} < d_{an} < d_{ap} + \text{margin}\}$$

    A pair without such a negative has no triplet.

    Memory: O(n m), at most 13 times the size of the distances.

    Args:
        key: a random key, ``jax.random.key(seed)``.
        distances: ``[..., n, m]``.
        labels: integers ``[..., n]``, or `PairMasks`.
        margin: a scalar, in units of the distances.
        reference_labels, positions, where, reference_where: as in `pair_masks`.

    Returns:
        Triplets ``[..., n, m]``: entry (a, p) belongs to that pair.

    Raises:
        TypeError: if an argument has the wrong dtype.
        ValueError: if shapes do not fit, there is no distance, or the margin is
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
    r"""For each anchor-positive pair a negative drawn evenly over distances.

    $$P(n \mid a) \propto 1 / q(\max(d_{an}, \text{cutoff})), \qquad
      q(d) \propto d^{D - 2} (1 - d^2 / 4)^{(D - 3) / 2}$$

    q is how Euclidean distances between random points of the unit sphere in D
    dimensions are distributed, so that near and far negatives get equal attention.

    Memory: O(n m), at most 7 times the size of the distances.

    Args:
        key: a random key, ``jax.random.key(seed)``.
        distances: Euclidean distances of unit vectors ``[..., n, m]``.
        labels: integers ``[..., n]``, or `PairMasks`.
        dim: D, the number of dimensions of the embeddings, at least 2.
        cutoff: nearer negatives are weighted as if they were this far.
        furthest: farther negatives are not drawn, unless there are no others: then
            all negatives of the anchor are equally likely.
        reference_labels, positions, where, reference_where: as in `pair_masks`.

    Returns:
        Triplets ``[..., n, m]``: entry (a, p) is valid if p is a positive of a.

    Raises:
        TypeError: if an argument has the wrong dtype.
        ValueError: if shapes do not fit, there is no distance, or an option is out of
            range.

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
    # Unit vectors are at most 2 apart; there the density is 0 or infinite.
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
