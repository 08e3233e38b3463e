"""Hard examples of a whole data set: exact, in blocks, without a distance matrix.

The miners of `tripletjax.mining` select from one batch. The functions here search all
references for each anchor and return the k hardest examples. Some of the hardest
negatives are wrongly labelled positives: ranges and margins exclude them, and every
result counts the exclusions of each rule.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from tripletjax._api import check_finite, jitted
from tripletjax._matrices import (
    check_not_distances,
    ordered_bits,
)
from tripletjax._pairwise.batch import single_batch
from tripletjax._pairwise.cancellation import refine
from tripletjax._pairwise.mesh import AxisName
from tripletjax._pairwise.over_mesh import over_mesh, without_padding
from tripletjax._pairwise.slices import RUN, materialize
from tripletjax.distances import Metric, cosine, euclidean
from tripletjax.mining import Triplets
from tripletjax.pairs import PairMasks
from tripletjax.retrieval.rankings import (
    Rankings,
    ReferenceTiles,
    as_floats,
    least_of_panel,
    with_masks,
)

# Half squared distances below this share of the vectors' halves are computed from
# differences: inner products have less than three digits left there. Such pairs are
# rare; a tile with more than MOST_NEAR of them in a row is computed as a whole.
NEAR_SHARE, MOST_NEAR = 1e-3, 32


class Exclusions(NamedTuple):
    """Numbers of candidates that each rule excludes, per anchor.

    Candidates are the negatives of an anchor, or its positives in
    `mine_hard_positives`. A candidate counts once, under the first of these rules that
    excludes it.

    Attributes:
        not_finite: integers ``[n]``, candidates without a finite distance.
        duplicates: integers ``[n]``, candidates at distance 0.
        margin: integers ``[n]``, candidates that `margin` excludes.
        relative_margin: integers ``[n]``, candidates that `relative_margin` excludes.
        range_min: integers ``[n]``, candidates of ranks below `range_min`.
        range_max: integers ``[n]``, candidates of ranks from `range_max` on.
    """

    not_finite: Array
    duplicates: Array
    margin: Array
    relative_margin: Array
    range_min: Array
    range_max: Array


class HardExamples(NamedTuple):
    """The hardest examples of each anchor, the hardest first.

    Attributes:
        indices: integers ``[n, k]``, indices of references; -1 if not valid.
        distances: ``[n, k]``, distances from the anchor; infinite if not valid.
        valid: bool ``[n, k]``. Slots are not valid if fewer than k candidates are left.
        excluded: `Exclusions`, the numbers of candidates that each rule excludes.
    """

    indices: Array
    distances: Array
    valid: Array
    excluded: Exclusions


class HardTriplets(NamedTuple):
    """Triplets of a whole data set, k for each anchor.

    Attributes:
        anchor: integers ``[n, k]``, indices of anchors.
        positive: integers ``[n, k]``, indices of references; -1 if not valid.
        negative: integers ``[n, k]``, indices of references; -1 if not valid.
        valid: bool ``[n, k]``.
        positive_distances: ``[n, k]``, from the anchor; infinite if not valid.
        negative_distances: ``[n, k]``, from the anchor; infinite if not valid.
        excluded: `Exclusions` of negatives.
    """

    anchor: Array
    positive: Array
    negative: Array
    valid: Array
    positive_distances: Array
    negative_distances: Array
    excluded: Exclusions

    @property
    def triplets(self) -> Triplets:
        """The indices alone, for `tripletjax.triplet_loss`."""
        return Triplets(self.anchor, self.positive, self.negative, self.valid)


def _check_options(embeddings: Any, labels: Any, **options: Any) -> None:
    """Check `margin` and `relative_margin` whose values are known."""
    check_not_distances(embeddings, labels, **options)
    for name in ("margin", "relative_margin"):
        if (value := options.get(name)) is not None:
            check_finite(name, value)


def _same(result: Any, first: Array) -> Any:
    return result


def _with_first(triplets: HardTriplets, first: Array) -> HardTriplets:
    return triplets._replace(anchor=triplets.anchor + first)


@over_mesh(of_device=_same, together=without_padding, nonnegative=())
@jitted(
    callables=("metric",),
    flags=("farthest_positive",),
    sizes=("k", "range_min", "range_max"),
    static=("axis_name",),
    check=_check_options,
)
def mine_hard_negatives(
    embeddings: ArrayLike,
    labels: ArrayLike | PairMasks,
    *,
    k: int,
    range_min: int = 0,
    range_max: int | None = None,
    margin: ArrayLike | None = None,
    relative_margin: ArrayLike | None = None,
    farthest_positive: bool = False,
    key: Array | None = None,
    metric: Metric = euclidean,
    references: ArrayLike | None = None,
    reference_labels: ArrayLike | None = None,
    positions: ArrayLike | None = None,
    where: ArrayLike | None = None,
    reference_where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> HardExamples:
    r"""Find the k nearest negatives of each anchor among all references.

    $$n_1, \dots, n_k = \text{the } k \text{ indices } n \text{ of least } d_{an}
      \text{ with } d_{an} \ge t_a,\; \text{range\_min} \le \text{rank}(n) <
      \text{range\_max}$$

    The search is exact. Ties go to the lower index. Negatives at distance 0 are
    duplicates of the anchor: they are excluded and have no rank. Rank 0 is the nearest
    other negative, whether a margin excludes it or not.

    Margins exclude negatives that are probably wrongly labelled positives. With the
    distance $d_{ap}$ of the anchor's nearest positive that is no duplicate, a negative
    is excluded if $d_{an}$ is less than

    $$t_a = d_{ap} + \text{margin}, \qquad
      t_a = d_{ap} + \text{relative\_margin} \cdot
      \begin{cases} |1 - d_{ap}| & \text{cosine} \\ d_{ap} & \text{other metrics}
      \end{cases}$$

    For the cosine similarity $s = 1 - d$, these are the rules of NV-Retriever:
    ``margin=0.05`` keeps negatives with $s_{an} \le s_{ap} - 0.05$, and
    ``relative_margin=0.05`` those with $s_{an} \le 0.95 s_{ap}$. The rule of Qwen3
    Embedding, which excludes negatives with $s_{an} > s_{ap} + 0.1$, is
    ``margin=-0.1``. An anchor without a positive has no margins.

    Memory: O(n k + b m), with blocks of b <= 512 anchors of at most 2**25 distances.
    Random draws add O(b range_max).

    Args:
        embeddings: vectors of anchors ``[n, d]``.
        labels: integers ``[n]``, or `PairMasks` ``[n, m]``.
        k: the number of negatives of each anchor, at least 1.
        range_min: the first rank to return; skips the nearest negatives.
        range_max: the rank to stop before; None for no limit.
        margin: a scalar in units of the distances, of any sign; or None.
        relative_margin: a scalar without unit; or None.
        farthest_positive: if True, margins start from the farthest positive, as in
            sentence-transformers.
        key: a random key, ``jax.random.key(seed)``, to draw k of the candidates with
            equal probability, without replacement. Requires `range_max`. If None, the k
            hardest.
        metric: the `Metric` that defines d.
        references: vectors ``[m, d]``; if None, the embeddings.
        reference_labels, positions: integers ``[m]``, ``[n]``; `pair_masks`.
        where, reference_where: bool ``[n]``, ``[m]``; see `pair_masks`.
        axis_name: mesh axes over which embeddings and references are split by rows.
            Every device searches all references for its own anchors.

    Returns:
        `HardExamples` ``[n, k]``, the nearest first.

    Raises:
        TypeError: if an argument has the wrong dtype.
        ValueError: if shapes do not fit, a rank or k is out of range, a margin is not
            finite, or `key` is given without `range_max`.

    References:
        Moreira, Osmulski, Xu, Ak, Schifferer, Oldridge. NV-Retriever: Improving Text
        Embedding Models with Effective Hard-Negative Mining. 2024. arXiv:2407.15831

        Zhang, Li, Long, et al. Qwen3 Embedding: Advancing Text Embedding and Reranking
        Through Foundation Models. 2025. arXiv:2506.05176

    >>> import jax.numpy as jnp
    >>> import tripletjax as tj
    >>> x = jnp.array([[0.0], [2.0], [1.0], [3.0], [5.0]])
    >>> labels = jnp.array([0, 0, 1, 1, 2])
    >>> negatives = tj.mine_hard_negatives(x, labels, k=2, margin=0.5)
    >>> print(negatives.indices[0], negatives.distances[0])
    [3 4] [3. 5.]
    >>> print(negatives.excluded.margin)
    [1 2 2 2 0]
    """
    mined = _mine(
        embeddings,
        labels,
        k=k,
        range_min=range_min,
        range_max=range_max,
        margins=(margin, relative_margin),
        farthest_positive=farthest_positive,
        key=key,
        metric=metric,
        references=references,
        reference_labels=reference_labels,
        positions=positions,
        where=where,
        reference_where=reference_where,
        axis_name=axis_name,
    )
    return mined.examples


@over_mesh(of_device=_same, together=without_padding)
@jitted(
    callables=("metric",),
    sizes=("k", "range_min", "range_max"),
    static=("axis_name",),
    check=_check_options,
)
def mine_hard_positives(
    embeddings: ArrayLike,
    labels: ArrayLike | PairMasks,
    *,
    k: int,
    range_min: int = 0,
    range_max: int | None = None,
    key: Array | None = None,
    metric: Metric = euclidean,
    references: ArrayLike | None = None,
    reference_labels: ArrayLike | None = None,
    positions: ArrayLike | None = None,
    where: ArrayLike | None = None,
    reference_where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> HardExamples:
    r"""Find the k farthest positives of each anchor among all references.

    $$p_1, \dots, p_k = \text{the } k \text{ indices } p \text{ of greatest } d_{ap}$$

    The search is exact. Ties go to the lower index. Positives at distance 0 are
    duplicates of the anchor: they are excluded and have no rank. Rank 0 is the farthest
    positive.

    Memory: O(n k + b m), with blocks of b <= 512 anchors of at most 2**25 distances.

    Args:
        embeddings: vectors of anchors ``[n, d]``.
        labels: integers ``[n]``, or `PairMasks` ``[n, m]``.
        k: the number of positives of each anchor, at least 1.
        range_min: the first rank to return; skips the farthest positives, which may be
            labelled wrongly.
        range_max: the rank to stop before; None for no limit.
        key: a random key, ``jax.random.key(seed)``, to draw k of the candidates with
            equal probability, without replacement. Requires `range_max`. If None, the k
            hardest.
        metric: the `Metric` that defines d.
        references: vectors ``[m, d]``; if None, the embeddings.
        reference_labels, positions: integers ``[m]``, ``[n]``; `pair_masks`.
        where, reference_where: bool ``[n]``, ``[m]``; see `pair_masks`.
        axis_name: mesh axes over which embeddings and references are split by rows.

    Returns:
        `HardExamples` ``[n, k]``, the farthest first.

    Raises:
        TypeError: if an argument has the wrong dtype.
        ValueError: if shapes do not fit, a rank or k is out of range, or `key` is given
            without `range_max`.

    >>> import jax.numpy as jnp
    >>> import tripletjax as tj
    >>> x = jnp.array([[0.0], [2.0], [1.0], [3.0]])
    >>> positives = tj.mine_hard_positives(x, jnp.array([0, 0, 0, 1]), k=2)
    >>> print(positives.indices[0], positives.distances[0])
    [1 2] [2. 1.]
    """
    mined = _mine(
        embeddings,
        labels,
        k=k,
        range_min=range_min,
        range_max=range_max,
        of_positives=True,
        key=key,
        metric=metric,
        references=references,
        reference_labels=reference_labels,
        positions=positions,
        where=where,
        reference_where=reference_where,
        axis_name=axis_name,
    )
    return mined.examples


@over_mesh(of_device=_with_first, together=without_padding, nonnegative=())
@jitted(
    callables=("metric",),
    flags=("farthest_positive",),
    sizes=("k", "range_min", "range_max"),
    static=("axis_name",),
    check=_check_options,
)
def mine_triplets(
    embeddings: ArrayLike,
    labels: ArrayLike | PairMasks,
    *,
    k: int = 1,
    range_min: int = 0,
    range_max: int | None = None,
    margin: ArrayLike | None = None,
    relative_margin: ArrayLike | None = None,
    farthest_positive: bool = False,
    key: Array | None = None,
    metric: Metric = euclidean,
    references: ArrayLike | None = None,
    reference_labels: ArrayLike | None = None,
    positions: ArrayLike | None = None,
    where: ArrayLike | None = None,
    reference_where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> HardTriplets:
    """Find hard triplets of a whole data set: k nearest negatives with one positive.

    The positive of an anchor is its nearest positive that is no duplicate, or the
    farthest. Margins start from the distance of the same positive. The negatives are
    those of `mine_hard_negatives`. An anchor without such a positive has no triplet.

    Memory: O(n k + b m), with blocks of b <= 512 anchors of at most 2**25 distances.

    Args:
        embeddings: vectors of anchors ``[n, d]``.
        labels: integers ``[n]``, or `PairMasks` ``[n, m]``.
        k: the number of negatives of each anchor, at least 1.
        range_min: the first rank of negatives; skips the nearest.
        range_max: the rank of negatives to stop before; None for no limit.
        margin: a scalar in units of the distances, of any sign; or None.
        relative_margin: a scalar without unit; or None.
        farthest_positive: if True, the farthest positive, which batch-hard mining has.
        key: a random key, to draw negatives as `mine_hard_negatives` does.
        metric: the `Metric` that defines d.
        references: vectors ``[m, d]``; if None, the embeddings.
        reference_labels, positions: integers ``[m]``, ``[n]``; `pair_masks`.
        where, reference_where: bool ``[n]``, ``[m]``; see `pair_masks`.
        axis_name: mesh axes over which embeddings and references are split by rows.

    Returns:
        `HardTriplets` ``[n, k]``.

    Raises:
        TypeError: if an argument has the wrong dtype.
        ValueError: if shapes do not fit, a rank or k is out of range, a margin is not
            finite, or `key` is given without `range_max`.

    >>> import jax.numpy as jnp
    >>> import tripletjax as tj
    >>> x = jnp.array([[0.0], [2.0], [1.0], [4.0]])
    >>> mined = tj.mine_triplets(x, jnp.array([0, 0, 1, 1]), margin=0.0)
    >>> print(mined.positive[:, 0], mined.negative[:, 0], mined.valid[:, 0])
    [ 1  0 -1  2] [ 3  3 -1  0] [ True  True False  True]
    """
    mined = _mine(
        embeddings,
        labels,
        k=k,
        range_min=range_min,
        range_max=range_max,
        margins=(margin, relative_margin),
        farthest_positive=farthest_positive,
        with_positive=True,
        key=key,
        metric=metric,
        references=references,
        reference_labels=reference_labels,
        positions=positions,
        where=where,
        reference_where=reference_where,
        axis_name=axis_name,
    )
    indices, distances, valid, excluded = mined.examples
    assert mined.positive is not None
    valid &= mined.positive.exists[:, None]
    anchor = jnp.broadcast_to(jnp.arange(len(valid))[:, None], valid.shape)
    return HardTriplets(
        anchor,
        jnp.where(valid, mined.positive.index[:, None], -1),
        jnp.where(valid, indices, -1),
        valid,
        jnp.where(valid, mined.positive.distance[:, None], jnp.inf),
        jnp.where(valid, distances, jnp.inf),
        excluded,
    )


class _Positive(NamedTuple):
    """The nearest or the farthest positive of each anchor ``[rows]``."""

    index: Array
    distance: Array
    exists: Array


class _Mined(NamedTuple):
    examples: HardExamples
    positive: _Positive | None


def _mine(
    embeddings: ArrayLike,
    labels: ArrayLike | PairMasks,
    *,
    k: int,
    range_min: int,
    range_max: int | None,
    key: Array | None,
    metric: Metric,
    axis_name: AxisName | None,
    margins: tuple[ArrayLike | None, ArrayLike | None] = (None, None),
    farthest_positive: bool = False,
    with_positive: bool = False,
    of_positives: bool = False,
    **pairs: Any,
) -> _Mined:
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}.")
    if range_min < 0:
        raise ValueError(f"range_min must be at least 0, got {range_min}.")
    if range_max is not None and range_max <= range_min:
        raise ValueError(
            f"range_max must be above range_min, got {range_max} and {range_min}."
        )
    if key is not None and range_max is None:
        raise ValueError(
            "key requires range_max, the number of nearest candidates to draw from."
        )
    batch = single_batch(metric, embeddings, labels, axis_name=axis_name, **pairs)
    batch = jax.tree.map(lax.stop_gradient, batch)
    real = batch.pairs.where
    if not batch.has_classes:
        batch = with_masks(batch, batch.pairs.masks())
    n = len(batch.anchors)
    first = 0 if axis_name is None else lax.axis_index(axis_name) * n
    rankings = Rankings.of(metric, batch)
    search = _Search(
        rankings,
        rankings.tiles(),
        jnp.ones(n, bool) if real is None else real,
        k,
        range_min,
        range_max,
        margins,
        farthest_positive,
        with_positive or margins != (None, None),
        of_positives,
        key,
        first,
    )
    return rankings.fill(search.block)


class _Pairs(NamedTuple):
    """All pairs of a block of anchors, in tiles.

    Attributes:
        values: floats ``[tiles, rows, columns]`` in the order of distances, infinite
            for references that an anchor does not rank.
        relevant: bool of the same shape, whether the pair is positive.
    """

    values: Array
    relevant: Array

    @property
    def finite(self) -> Array:
        # `as_floats` makes the largest number of overflowed distances and NaN.
        return self.values < jnp.finfo(self.values.dtype).max / 2

    @property
    def ranked(self) -> Array:
        """Pairs at a finite distance that are no duplicates."""
        return self.finite & (self.values != 0)


class _Search(NamedTuple):
    """The search for hard examples of blocks of anchors."""

    rankings: Rankings
    tiles: ReferenceTiles
    real: Array
    k: int
    range_min: int
    range_max: int | None
    margins: tuple[ArrayLike | None, ArrayLike | None]
    farthest_positive: bool
    needs_positive: bool
    of_positives: bool
    key: Array | None
    first: Array | int

    def block(self, start: Array) -> _Mined:
        """The examples of the anchors from `start`."""
        pairs = self.walk(start)
        positive = self.positive(start, pairs) if self.needs_positive else None
        below = self.below(pairs, positive)
        wanted = pairs.relevant if self.of_positives else ~pairs.relevant
        wanted &= pairs.values < jnp.inf
        eligible = wanted & pairs.ranked
        counts = _count_runs(
            wanted,
            wanted & ~pairs.finite,
            wanted & (pairs.values == 0),
            *(eligible & mask for mask in below if mask is not None),
        )
        for mask in below:
            if mask is not None:
                eligible &= ~mask
        sign = -1 if self.of_positives else 1
        columns = wanted.shape[0] * wanted.shape[2]
        most = self.range_min + self.k if self.key is None else self.range_max
        assert most is not None
        values, index = least_of_panel(
            jnp.where(eligible, sign * pairs.values, jnp.inf), min(most, columns)
        )
        indices, distances = self.in_order(start, index, values < jnp.inf)
        excluded, skipped = self.exclusions(
            counts, [mask is not None for mask in below]
        )
        chosen = self.choose(start, indices >= 0, skipped)
        pad = ((0, 0), (0, max(0, self.k - chosen.shape[1])))
        chosen = jnp.pad(chosen, pad, constant_values=-1)
        valid = chosen >= 0

        def pick(x: Array, fill: Any) -> Array:
            return jnp.where(valid, jnp.take_along_axis(x, chosen, axis=1), fill)

        examples = HardExamples(
            pick(indices, -1), pick(distances, jnp.inf), valid, excluded
        )
        return _Mined(examples, positive)

    def walk(self, start: Array) -> "_Pairs":
        """All pairs of the anchors from `start`, in tiles."""
        rankings = self.rankings
        tile_of = rankings.against(start, rankings.rows(rankings.positions, start))
        real = rankings.rows(self.real, start)[:, None]

        def visit(_: None, part: ReferenceTiles) -> tuple[None, _Pairs]:
            tile = tile_of(part.index[0], part)
            values = jnp.where(real, as_floats(tile.keys), jnp.inf)
            values = self.from_differences(start, part, materialize(values))
            return None, _Pairs(values, tile.relevant)

        return lax.scan(visit, None, self.tiles)[1]

    def positive(self, start: Array, pairs: "_Pairs") -> _Positive:
        """The positive that margins start from."""
        sign = -1 if self.farthest_positive else 1
        own = pairs.relevant & pairs.ranked
        own = jnp.where(own, sign * pairs.values, jnp.inf)
        value, index = least_of_panel(own, 1)
        exists = value[:, 0] < jnp.inf
        index = jnp.where(exists, index[:, 0], 0)
        distance = self.distances(start, index[:, None])[:, 0]
        return _Positive(index, distance, exists)

    def from_differences(
        self, start: Array, part: ReferenceTiles, values: Array
    ) -> Array:
        """The values, computed from differences where inner products have few digits.

        Duplicates are exactly 0 afterwards.
        """
        rankings = self.rankings
        products = rankings.metric.products
        if products is None:
            return values
        y = rankings.batch.reference_side[0]
        a = rankings.rows(rankings.batch.anchors, start)
        halves = products.halves(a, rankings.offset)[:, None]
        scale = halves + part.halves
        near = values < NEAR_SHARE * jnp.where(scale < jnp.inf, scale, 0)
        (count,) = _count_runs(near[None])
        b, half_square = y[part.index], products.half_square

        def one_by_one(values: Array) -> Array:
            return refine(values, near, half_square, a, b)

        def all_at_once(values: Array) -> Array:
            new = lax.map(lambda one: half_square(one, b), a)
            return jnp.where(near, new, values)

        most = jnp.max(count)
        branch = (most > 0).astype(int) + (most > MOST_NEAR)
        branches = [lambda values: values, one_by_one, all_at_once]
        return lax.switch(branch, branches, values)

    def distances(self, start: Array, index: Array) -> Array:
        """Distances ``[rows, k]`` of references by index, from differences."""
        rankings = self.rankings
        a = rankings.rows(rankings.batch.anchors, start)
        partners = rankings.batch.reference_side[0][index]
        return jax.vmap(jax.vmap(rankings.metric._paired_checked, (None, 0)))(
            a, partners
        )

    def thresholds(self, positive: _Positive | None) -> list[Array | None]:
        """The distances ``[rows]`` below which each margin excludes negatives."""
        margin, relative = self.margins
        if positive is None:
            return [None, None]
        d, exists = positive.distance, positive.exists
        unit = jnp.abs(1 - d) if self.rankings.metric == cosine else d
        return [
            None if share is None else jnp.where(exists, d + share * scale, -jnp.inf)
            for share, scale in ((margin, 1), (relative, unit))
        ]

    def below(
        self, pairs: _Pairs, positive: _Positive | None
    ) -> tuple[Array | None, Array | None]:
        """Pairs at a distance below the threshold of each margin."""
        products = self.rankings.metric.products

        def compare(threshold: Array | None) -> Array | None:
            if threshold is None:
                return None
            values = pairs.values
            return (products.distance(values) if products else values) < threshold[
                :, None
            ]

        margin, relative = self.thresholds(positive)
        return compare(margin), compare(relative)

    def in_order(
        self, start: Array, index: Array, exists: Array
    ) -> tuple[Array, Array]:
        """Indices and distances from differences, the hardest first."""
        m = len(self.rankings.batch.reference_side[0])
        distances = self.distances(start, index)
        key = ordered_bits(-distances if self.of_positives else distances)
        key = jnp.where(exists, key, jnp.iinfo(key.dtype).max)
        index = jnp.where(exists, index, m)
        _, index, distances = lax.sort((key, index, distances), num_keys=2)
        exists = index < m
        return jnp.where(exists, index, -1), jnp.where(exists, distances, jnp.inf)

    def choose(self, start: Array, exists: Array, below: Array) -> Array:
        """The places ``[rows, k]`` of the examples in the sorted list, or -1."""
        rows, count = exists.shape
        place = jnp.arange(count)
        rank = place + below[:, None]
        allowed = exists & (rank >= self.range_min)
        if self.range_max is not None:
            allowed &= rank < self.range_max
        priority = jnp.broadcast_to(place, exists.shape).astype(jnp.float32)
        if self.key is not None:
            # A function of the anchor's index alone, and not of blocks and devices.
            anchor = self.first + start + jnp.arange(rows)
            draw = jax.vmap(
                lambda i: jax.random.uniform(jax.random.fold_in(self.key, i), (count,))
            )
            priority = draw(anchor)
        priority = jnp.where(allowed, priority, jnp.inf)
        best, chosen = lax.top_k(-priority, min(self.k, count))
        last = jnp.where(best > -jnp.inf, chosen, count)
        chosen = jnp.sort(last, axis=1)
        return jnp.where(chosen < count, chosen, -1)

    def exclusions(
        self, counts: list[Array], has_margins: list[bool]
    ) -> tuple[Exclusions, Array]:
        """The exclusions, and how many ranked candidates margins exclude."""
        total, not_finite, duplicates, *by_margins = counts
        left = iter(by_margins)
        margin, relative = (
            next(left) if given else jnp.zeros_like(total) for given in has_margins
        )
        ranked = total - not_finite - duplicates
        # Each margin excludes the first ranks up to some rank.
        below = jnp.maximum(margin, relative)
        skipped = jnp.clip(self.range_min, below, jnp.maximum(ranked, below))
        beyond = jnp.zeros_like(total)
        if self.range_max is not None:
            last = jnp.maximum(skipped, self.range_max)
            beyond = jnp.maximum(ranked - last, 0)
        excluded = Exclusions(
            not_finite, duplicates, margin, below - margin, skipped - below, beyond
        )
        return excluded, below


def _count_runs(*masks: Array) -> list[Array]:
    """Count each of up to 5 masks ``[tiles, rows, columns]`` in every row.

    One pass over all: a run of RUN = 32 columns takes 6 bits of an integer per mask.
    """
    bits = RUN.bit_length()
    packed = sum(x.astype(jnp.int32) << (bits * i) for i, x in enumerate(masks))
    tiles, rows, columns = masks[0].shape
    packed = jnp.sum(jnp.reshape(packed, (tiles, rows, columns // RUN, RUN)), axis=-1)
    return [
        jnp.sum((packed >> (bits * i)) & (2**bits - 1), axis=(0, 2))
        for i in range(len(masks))
    ]
