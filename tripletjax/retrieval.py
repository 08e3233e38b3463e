"""Is it any good, ranked: neighbours, and metrics of how early the right ones come.

Every query ranks the references by distance, the nearest first and ties by the lower
index; references with the query's label are relevant. A query is never its own
reference, and one without any relevant reference is left out of the means and counted.

A vector that is not finite cannot be ranked: metrics are NaN of every query that is one
or has one among its references, and so are their means. Padding may hold anything.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from tripletjax._api import as_integer, jitted, own_promotion
from tripletjax.blocks import (
    RUN,
    Batch,
    Blocks,
    Classes,
    Kind,
    Task,
)
from tripletjax.blockwise import as_batch
from tripletjax.distances import Metric, as_vectors, common_offset, euclidean
from tripletjax.mining import ordered_bits
from tripletjax.pairs import PairMasks, as_boolean, keep_pairs, pair_masks, per_item

# Metrics are made for at most this many queries at a time, and of so many distances,
# which come in tiles of so many references.
MOST_ROWS, PANEL, COLUMNS = 512, 2**25, 2048
# Up to so many relevant references of a query, counting who comes before each takes
# less time than sorting all; so many at a time, the last in steps.
FEW, GROUP, STEP = 512, 128, 24


class RetrievalMetrics(NamedTuple):
    """Means over the queries that have a relevant reference, between 0 and 1.

    Attributes:
        recall_at_k: ``[len(ks)]``, for each k the share of queries with a relevant
            reference among the first k.
        precision_at_1: the share of queries whose nearest reference is relevant.
        r_precision: the share of relevant references among the first R, where R is how
            many the query has.
        map_at_r: the precision at each relevant place among the first R, over R.
        mean_average_precision: the precision at each relevant place, over R.
        mean_reciprocal_rank: one over the rank of the first relevant reference.
        queries: the number of queries that have a relevant reference.
    """

    recall_at_k: Array
    precision_at_1: Array
    r_precision: Array
    map_at_r: Array
    mean_average_precision: Array
    mean_reciprocal_rank: Array
    queries: Array


def nearest_neighbors(
    queries: ArrayLike,
    references: ArrayLike,
    k: int,
    *,
    metric: Metric = euclidean,
    positions: ArrayLike | None = None,
    reference_where: ArrayLike | None = None,
) -> tuple[Array, Array]:
    """The k nearest references of each query, nearest first, ties by the lower index.

    Exact, in O(n k + block m) memory.

    Args:
        queries: vectors ``[n, d]``.
        references: vectors ``[m, d]``.
        k: how many neighbours.
        metric: how far two vectors are apart. Where it is made of inner products,
            these choose the neighbours, and differences put them in order.
        positions: integers ``[n]``, the place of each query among the references, so
            that it is not its own neighbour; -1 for nowhere.
        reference_where: bool ``[m]``, False for padding; or ``[n, m]``, which of them
            each query may have.

    Returns:
        Distances and indices of the references, both ``[n, k]``. Where padding leaves
        fewer than k, the rest are infinitely far, with index -1. A query that is not
        finite has distances NaN and indices -1; references that are not come last.

    Raises:
        TypeError: if an argument has the wrong dtype.
        ValueError: if shapes do not fit, or there are not k references to choose from.

    >>> import jax.numpy as jnp
    >>> import tripletjax as tj
    >>> x = jnp.array([[0.0], [1.0], [3.0]])
    >>> distances, indices = tj.retrieval.nearest_neighbors(x[:1], x[1:], 2)
    >>> print(distances, indices)
    [[1. 3.]] [[0 1]]
    """
    return _nearest_neighbors(
        queries,
        references,
        k=k,
        metric=metric,
        positions=positions,
        reference_where=reference_where,
    )


@jitted(callables=("metric",), sizes=("k",))
def _nearest_neighbors(
    queries: ArrayLike,
    references: ArrayLike,
    *,
    k: int,
    metric: Metric,
    positions: ArrayLike | None = None,
    reference_where: ArrayLike | None = None,
) -> tuple[Array, Array]:
    queries, references = as_vectors(
        ("queries", queries), ("references", references), rank=2
    )
    _check_vectors(queries=queries, references=references)
    n, m = len(queries), len(references)
    choices = m if positions is None else m - 1
    if not 1 <= k <= choices:
        but = "" if positions is None else " but the query itself"
        raise ValueError(
            f"k must be from 1 to {choices}, all references{but}; got {k}."
        )
    each, reference_where = _per_query(reference_where, n, m)
    batch, _ = as_batch(
        Task(Kind.ALL, metric),
        queries,
        jnp.zeros(n, int),
        references=references,
        reference_labels=jnp.zeros(m, int),
        positions=_positions(positions, n),
        reference_where=reference_where,
    )
    if each is not None:
        batch = _with_masks(batch, _masks_of(batch, each))
    rankings = _Rankings.of(metric, batch)
    neighbors = functools.partial(rankings.nearest, rankings.tiles(), k)
    distances, indices = rankings.fill(neighbors)
    broken = ~jnp.isfinite(batch.anchors).all(axis=-1, keepdims=True)
    return jnp.where(broken, jnp.nan, distances), jnp.where(broken, -1, indices)


# From metrics per query ``[n]`` and the labels of queries to means.
Reduction = Callable[[RetrievalMetrics, Array], RetrievalMetrics]


@own_promotion
def mean_of_queries(metrics: RetrievalMetrics, labels: Array) -> RetrievalMetrics:
    """Every query counts the same.

    Args:
        metrics: per query ``[n]``.
        labels: integers ``[n]``.

    Returns:
        Means over the queries that have a relevant reference, NaN if none has.
    """
    counts = metrics.queries
    queries = jnp.sum(counts)

    def mean(values: Array) -> Array:
        # Queries without a relevant reference have only zeros.
        total = jnp.sum(values, axis=0)
        return jnp.where(queries > 0, total / jnp.maximum(queries, 1), jnp.nan)

    return RetrievalMetrics(*map(mean, metrics[:-1]), queries)


@own_promotion
def mean_of_classes(metrics: RetrievalMetrics, labels: Array) -> RetrievalMetrics:
    """Every class counts the same, however many queries it has.

    Args:
        metrics: per query ``[n]``.
        labels: integers ``[n]``.

    Returns:
        Means over classes of the means over their queries that have a relevant
        reference, NaN if none has. `queries` is the number of these queries.
    """
    counts = metrics.queries
    order = jnp.argsort(labels)
    ranked, kept = labels[order], counts[order]
    total = jnp.append(0, jnp.cumsum(kept))
    first, last = (jnp.searchsorted(ranked, labels, side=s) for s in ("left", "right"))
    share = counts / jnp.maximum(total[last] - total[first], 1)
    classes = jnp.sum(share)

    def mean(values: Array) -> Array:
        shares = share.reshape(-1, *(1,) * (values.ndim - 1))
        total = jnp.sum(values * shares, axis=0)
        return jnp.where(classes > 0, total / jnp.maximum(classes, 1), jnp.nan)

    return RetrievalMetrics(*map(mean, metrics[:-1]), jnp.sum(counts))


def evaluate(
    embeddings: ArrayLike,
    labels: ArrayLike,
    *,
    ks: Sequence[int] = (1, 2, 4, 8),
    references: ArrayLike | None = None,
    reference_labels: ArrayLike | None = None,
    positions: ArrayLike | None = None,
    where: ArrayLike | None = None,
    reference_where: ArrayLike | None = None,
    metric: Metric = euclidean,
    reduce_fn: Reduction | None = mean_of_queries,
) -> RetrievalMetrics:
    r"""How well the nearest references share the label of the query.

    With rel(i) whether the i-th nearest reference is relevant, P(i) the share of
    relevant ones among the first i, and R the number of relevant references,

    $$\text{MAP@R} = \frac{1}{R} \sum_{i=1}^{R} P(i)\, \text{rel}(i), \qquad
      \text{AP} = \frac{1}{R} \sum_{i=1}^{m} P(i)\, \text{rel}(i).$$

    Other definitions of AP interpolate the precision or stop at some rank, and differ
    by a percent or more.

    Args:
        embeddings: queries ``[n, d]``.
        labels: integers ``[n]``, or `PairMasks` ``[n, m]`` of which references are
            relevant to each query (positive), and which others it ranks (negative).
        ks: at which ranks to report recall.
        references: vectors ``[m, d]`` to rank. If not given, all other queries.
        reference_labels: integers ``[m]``, with `references`.
        positions: integers ``[n]``, the place of each query among the references, or
            -1; nowhere if `references` are given without it.
        where: bool ``[n]``, False for padding.
        reference_where: bool ``[m]``, likewise; or ``[n, m]``, which of them each query
            ranks, as where those of the same person and camera are ignored.
        metric: how far two vectors are apart. Where it is made of inner products, so
            is the order of references.
        reduce_fn: how queries are averaged: `mean_of_queries`, `mean_of_classes`, or
            None for the metrics ``[n]`` of every query, 0 for those without a relevant
            reference, which `queries` says.

    Returns:
        `RetrievalMetrics`.

    Raises:
        TypeError: if an argument has the wrong dtype.
        ValueError: if shapes do not fit, `ks` are not positive integers, only one of
            `references` and `reference_labels` is given, or `mean_of_classes` is asked
            for without labels.

    References:
        Musgrave, Belongie, Lim. A Metric Learning Reality Check. 2020.
        arXiv:2003.08505 (MAP@R, R-precision)

    >>> import jax.numpy as jnp
    >>> import tripletjax as tj
    >>> x = jnp.array([[0.0], [1.0], [1.5], [2.6]])
    >>> metrics = tj.retrieval.evaluate(x, jnp.array([0, 0, 1, 1]), ks=(1, 2))
    >>> print(metrics.recall_at_k, metrics.map_at_r)
    [0.5 1. ] 0.5

    Re-identification ignores what the same camera has seen of the same person:

    >>> people, cameras = jnp.array([0, 0, 1, 0]), jnp.array([0, 0, 0, 1])
    >>> same = (people[:, None] == people) & (cameras[:, None] == cameras)
    >>> metrics = tj.retrieval.evaluate(x, people, ks=(1,), reference_where=~same)
    >>> print(metrics.recall_at_k, metrics.queries)
    [0.] 3
    """
    return _evaluate(
        embeddings,
        labels,
        ks=_ranks(ks),
        references=references,
        reference_labels=reference_labels,
        positions=positions,
        where=where,
        reference_where=reference_where,
        metric=metric,
        reduce_fn=reduce_fn,
        first_alone=False,
    )


def recall_at_k(
    embeddings: ArrayLike,
    labels: ArrayLike,
    *,
    ks: Sequence[int] = (1, 2, 4, 8),
    references: ArrayLike | None = None,
    reference_labels: ArrayLike | None = None,
    positions: ArrayLike | None = None,
    where: ArrayLike | None = None,
    reference_where: ArrayLike | None = None,
    metric: Metric = euclidean,
) -> Array:
    r"""The share of queries with a relevant reference among the first k.

    The same as `evaluate` gives, in less time: nothing is ranked but the first relevant
    reference of each query.

    Args:
        embeddings, labels, ks, references, reference_labels, positions, where,
            reference_where, metric: as in `evaluate`.

    Returns:
        ``[len(ks)]``.

    Raises:
        TypeError, ValueError: as `evaluate`.

    References:
        Jégou, Douze, Schmid. Product Quantization for Nearest Neighbor Search. 2011.
        IEEE Transactions on Pattern Analysis and Machine Intelligence 33(1)

    >>> import jax.numpy as jnp
    >>> import tripletjax as tj
    >>> x = jnp.array([[0.0], [1.0], [1.5], [2.6]])
    >>> print(tj.retrieval.recall_at_k(x, jnp.array([0, 0, 1, 1]), ks=(1, 2)))
    [0.5 1. ]
    """
    return _evaluate(
        embeddings,
        labels,
        ks=_ranks(ks),
        references=references,
        reference_labels=reference_labels,
        positions=positions,
        where=where,
        reference_where=reference_where,
        metric=metric,
        reduce_fn=mean_of_queries,
        first_alone=True,
    ).recall_at_k


@jitted(
    callables=("metric", "reduce_fn"),
    flags=("first_alone",),
    static=("ks",),
    optional=("reduce_fn",),
)
def _evaluate(
    embeddings: ArrayLike,
    labels: ArrayLike,
    *,
    ks: tuple[int, ...],
    references: ArrayLike | None = None,
    reference_labels: ArrayLike | None = None,
    positions: ArrayLike | None = None,
    where: ArrayLike | None = None,
    reference_where: ArrayLike | None = None,
    metric: Metric,
    reduce_fn: Reduction | None,
    first_alone: bool,
) -> RetrievalMetrics:
    x = jnp.asarray(embeddings)
    n = x.shape[-2] if x.ndim > 1 else 0
    shape = x.shape if references is None else jnp.shape(references)
    m = shape[-2] if len(shape) > 1 else 0
    each, reference_where = _per_query(reference_where, n, m)
    masked = isinstance(labels, PairMasks)
    batch, lead = as_batch(
        Task(Kind.ALL, metric),
        embeddings,
        labels,
        references=references,
        reference_labels=reference_labels,
        positions=positions,
        where=where,
        reference_where=reference_where,
    )
    if lead:
        raise ValueError(
            f"embeddings must be [n, d], got {len(lead) + 2} dimensions; use jax.vmap."
        )
    if masked and reduce_fn is mean_of_classes:
        raise ValueError("reduce_fn: mean_of_classes takes labels, got PairMasks.")
    query_labels = jnp.zeros(n, int) if masked else batch.labels
    y = batch.others[0]
    broken = ~jnp.isfinite(y).all(axis=-1)
    if masked or each is not None:
        masks = _masks_of(batch, each)
        batch = _with_masks(batch, masks)
        found = jnp.any(masks.positive, axis=1)
        # A product of booleans would be made of integers, one for each pair.
        touched = jnp.any((masks.positive | masks.negative) & broken, axis=1)
    else:
        classes = Classes.of(batch)
        found = classes.positives > 0
        places = jnp.arange(n) if batch.square else batch.positions
        itself = False
        if places is not None:
            itself = (places >= 0) & (places < m) & broken[jnp.clip(places, 0, m - 1)]
        touched = jnp.sum(broken) - itself > 0
    touched |= ~jnp.isfinite(batch.anchors).all(axis=-1)
    rankings = _Rankings.of(metric, batch)
    tiles = rankings.tiles()
    by_sorting = functools.partial(rankings.by_sorting, tiles)
    if masked or each is not None:
        first, *metrics = rankings.fill(by_sorting)
    elif first_alone:
        ordered, order = rankings.by_class(classes)
        (first,) = ordered.fill(ordered.first(tiles, rankings.tiles(classes.order)))
        first = jnp.zeros_like(first).at[order].set(first, unique_indices=True)
        metrics = [jnp.zeros(n)] * 3
    else:
        counted = rankings._replace(classes=classes)
        first, *metrics = lax.cond(
            jnp.max(classes.positives) <= FEW,
            lambda: rankings.fill(functools.partial(counted.by_counting, tiles)),
            lambda: rankings.fill(by_sorting),
        )
    recall = first[:, None] <= jnp.asarray(ks)
    values = [recall, first == 1, *metrics, 1 / first]

    def known(x: Array) -> Array:
        column = (slice(None), *(None,) * (x.ndim - 1))
        x = jnp.where(touched[column], jnp.nan, x.astype(jnp.float32))
        return jnp.where(found[column], x, 0)

    metrics = RetrievalMetrics(*map(known, values), found)
    return metrics if reduce_fn is None else reduce_fn(metrics, query_labels)


def _per_query(
    reference_where: ArrayLike | None, n: int, m: int
) -> tuple[Array | None, ArrayLike | None]:
    """What of `reference_where` is for each query, and what for all."""
    if reference_where is None or jnp.ndim(reference_where) != 2:
        return None, reference_where
    each = as_boolean("reference_where", reference_where)
    if each.shape != (n, m):
        raise ValueError(
            f"reference_where must be [{m}], or [{n}, {m}] for each query, got shape "
            f"{each.shape}."
        )
    return each, None


def _masks_of(batch: Batch, each: Array | None) -> PairMasks:
    """Which references are relevant to each query, and which others it ranks."""
    _, labels, real = batch.others
    if isinstance(batch.labels, PairMasks):
        masks = keep_pairs(batch.labels, batch.where, real)
    elif batch.square:
        masks = pair_masks(batch.labels, where=batch.where)
    else:
        masks = pair_masks(
            batch.labels,
            labels,
            positions=batch.positions,
            where=batch.where,
            reference_where=real,
        )
    if each is None:
        return masks
    return PairMasks(masks.positive & each, masks.negative & each)


def _with_masks(batch: Batch, masks: PairMasks) -> Batch:
    """The batch with masks in place of labels, which say all but who is a vector."""
    return Batch(
        batch.anchors, batch.others[0], batch.margin, masks, None, None, None, None
    )


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
    """The share of queries whose nearest support has their label, per episode.

    With n classes of k support vectors each, n-way k-shot accuracy.

    Args:
        support: vectors ``[..., s, d]``, the labelled ones of each episode.
        support_labels: integers ``[..., s]``.
        queries: vectors ``[..., q, d]``.
        query_labels: integers ``[..., q]``.
        metric: how far two vectors are apart.
        class_means: whether to compare with the mean vector of each class instead of
            every support vector.
        support_where: bool ``[..., s]``, False for padding.
        where: bool ``[..., q]``, likewise.

    Returns:
        ``[...]``; NaN for an episode without a query or without support, or with a
        vector that is not finite.

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

    def each(name: str, values: Any, of: Array, what: str, kind: type) -> Array:
        values = per_item(name, values, of.shape[-2], what, kind)
        if values.ndim > of.ndim - 1:
            raise ValueError(
                f"{name} has shape {values.shape}, but {what} have {of.shape[:-1]}."
            )
        return jnp.broadcast_to(values, of.shape[:-1])

    ours = each("query_labels", query_labels, x, "queries", jnp.integer)
    theirs = each("support_labels", support_labels, y, "support vectors", jnp.integer)
    ones = jnp.ones(x.shape[:-1], bool), jnp.ones(y.shape[:-1], bool)
    real, known = ones
    if where is not None:
        real = each("where", where, x, "queries", jnp.bool_)
        x = jnp.where(real[..., None], x, 0)
    if support_where is not None:
        known = each("support_where", support_where, y, "support vectors", jnp.bool_)
        y = jnp.where(known[..., None], y, 0)
    if class_means:
        alike = (theirs[..., :, None] == theirs[..., None, :]) & known[..., None, :]
        count = jnp.sum(alike, axis=-1, keepdims=True)
        y = jnp.matmul(alike.astype(y.dtype), y, precision="highest")
        y = y / jnp.maximum(count, 1)
    distances = jnp.where(known[..., None, :], metric(x, y), jnp.inf)
    nearest = jnp.argmin(distances, axis=-1)
    right = jnp.take_along_axis(theirs, nearest, axis=-1) == ours
    count = jnp.sum(real, axis=-1)
    share = jnp.sum(right & real, axis=-1) / jnp.maximum(count, 1)
    finite = [jnp.isfinite(v).all(axis=(-2, -1)) for v in (x, y)]
    told = (count > 0) & jnp.any(known, axis=-1) & finite[0] & finite[1]
    return jnp.where(told, share, jnp.nan)


class _Tile(NamedTuple):
    """Some queries against some references.

    Attributes:
        index: the place of each of these references.
        keys: integers in the order of distances ``[rows, columns]``; what is no
            reference of a query comes after everything else.
        relevant: bool, likewise.
    """

    index: Array
    keys: Array
    relevant: Array


class _Tiles(NamedTuple):
    """References in tiles ``[tiles, columns, ...]``, the last of which is filled up.

    Attributes:
        index: their places.
        vectors: less the offset.
        halves: of products.
        labels: integers.
        real: whether a reference is one.
    """

    index: Array
    vectors: Array
    halves: Array
    labels: Array
    real: Array


class _Rankings(NamedTuple):
    """The references of every query in order, some queries at a time."""

    metric: Metric
    batch: Batch
    blocks: Blocks
    offset: Array
    classes: Classes | None = None

    @classmethod
    def of(cls, metric: Metric, batch: Batch) -> "_Rankings":
        n, y = len(batch.anchors), batch.others[0]
        if batch.square:
            batch = batch._replace(
                references=y,
                reference_labels=batch.labels,
                positions=jnp.arange(n),
                reference_where=batch.where,
            )
        elif batch.positions is None:
            batch = batch._replace(positions=jnp.full(n, -1))
        offset = common_offset(y) if metric.products else jnp.zeros_like(y[0])
        rows = max(1, min(MOST_ROWS, PANEL // len(y)))
        return cls(metric, batch, Blocks.of(n, rows), offset)

    def by_class(self, classes: Classes) -> tuple["_Rankings", Array]:
        """The same with queries in the order of their classes, and that order."""
        batch = self.batch
        order = jnp.argsort(classes.start)
        batch = batch._replace(
            **{k: getattr(batch, k)[order] for k in ("anchors", "labels", "positions")}
        )
        classes = classes._replace(
            **{k: getattr(classes, k)[order] for k in ("start", "rank", "positives")}
        )
        return self._replace(batch=batch, classes=classes), order

    def tiles(self, order: Array | None = None) -> _Tiles:
        """All references, in an order."""
        y, labels, real = self.batch.others
        if isinstance(self.batch.labels, PairMasks):
            labels = jnp.zeros(len(y), int)
        index = jnp.arange(len(y)) if order is None else order
        real = jnp.ones(len(y), bool) if real is None else real
        if order is not None:
            y, labels, real = y[order], labels[order], real[order]
        products = self.metric.products
        halves = (
            products.halves(y, self.offset) if products else jnp.zeros_like(y[:, 0])
        )
        columns = min(COLUMNS, len(y) + -len(y) % RUN)

        def cut(x: Array) -> Array:
            x = jnp.pad(x, [(0, -len(x) % columns)] + [(0, 0)] * (x.ndim - 1))
            return x.reshape(-1, columns, *x.shape[1:])

        return _Tiles(*map(cut, (index, y - self.offset, halves, labels, real)))

    def rows(self, x: Array, start: Array) -> Array:
        return lax.dynamic_slice_in_dim(x, start, self.blocks.size)

    def fill(self, function: Callable[[Array], Sequence[Array]]) -> list[Array]:
        """What a function of the first of some queries says of each, for all."""
        n = self.blocks.n
        likes = jax.eval_shape(function, jnp.int32(0))

        def step(block: Array, out: list[Array]) -> list[Array]:
            start = self.blocks.start(block)
            return [
                lax.dynamic_update_slice_in_dim(old, new, start, axis=0)
                for old, new in zip(out, function(start))
            ]

        none = [jnp.zeros((n, *like.shape[1:]), like.dtype) for like in likes]
        return lax.fori_loop(0, self.blocks.count, step, none)

    def against(self, start: Array, itself: Array) -> Callable[[Array, _Tiles], _Tile]:
        """From a place and one tile there to the queries from a start on against it.

        A query is never its own reference; `itself` are their places in tiles.
        """
        products = self.metric.products
        a = self.rows(self.batch.anchors, start)
        labels = jax.tree.map(lambda x: self.rows(x, start), self.batch.labels)
        if products:
            halves = products.halves(a, self.offset)[:, None]
        a = a - self.offset

        def tile(first: Array, part: _Tiles) -> _Tile:
            own = itself - first
            if products:
                inner = jnp.matmul(a, part.vectors.T, precision="highest")
                values = halves + part.halves - inner
                values = jnp.where(values < 0, 0, values)
            else:
                values = self.metric.against(a, part.vectors, own)
            if isinstance(labels, PairMasks):
                columns = len(part.index)
                masks = PairMasks(*(_columns(x, first, columns) for x in labels))
            else:
                masks = pair_masks(
                    labels, part.labels, positions=own, reference_where=part.real
                )
            keys = ordered_bits(values)
            last = jnp.iinfo(keys.dtype).max
            keys = jnp.where(masks.positive | masks.negative, keys, last)
            return _Tile(part.index, keys, masks.positive)

        return tile

    def scan(
        self,
        start: Array,
        tiles: _Tiles,
        visit: Callable[[Any, _Tile], tuple[Any, Any]],
        state: Any,
    ) -> tuple[Any, Any]:
        """`lax.scan` over all tiles, against the queries from a start on."""
        tile = self.against(start, self.rows(self.batch.positions, start))

        def step(state: Any, part: _Tiles) -> tuple[Any, Any]:
            return visit(state, tile(part.index[0], part))

        return lax.scan(step, state, tiles)

    def first(self, tiles: _Tiles, by_class: _Tiles) -> Callable[[Array], list[Array]]:
        """The rank of the first relevant reference of queries in order of class."""
        columns = tiles.index.shape[1]
        kind = ordered_bits(tiles.halves[0, 0]).dtype
        last = jnp.iinfo(kind).max

        def nearest(start: Array) -> tuple[Array, Array]:
            """The nearest relevant reference, which only some tiles can have."""
            begin, rank, positives = (
                self.rows(x, start)
                for x in (self.classes.start, self.classes.rank, self.classes.positives)
            )
            m = len(self.classes.order)
            itself = jnp.where(rank < m, begin + rank, -1)
            end = jnp.max(jnp.where(positives > 0, begin + positives + (rank < m), 0))
            tile = self.against(start, itself)

            # The nearest in each column of tiles, the first of several.
            def visit(i: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
                least, place = state
                part = jax.tree.map(lambda x: x[i], by_class)
                index, keys, relevant = tile(i * columns, part)
                closer = relevant & (keys < least)
                return jnp.where(closer, keys, least), jnp.where(closer, index, place)

            shape = self.blocks.size, columns
            none = jnp.full(shape, last, kind), jnp.full(shape, m)
            least, place = lax.fori_loop(
                begin[0] // columns, -(-end // columns), visit, none
            )
            nearest = jnp.min(least, axis=1, keepdims=True)
            place = jnp.where(least == nearest, place, m)
            return nearest, jnp.min(place, axis=1, keepdims=True)

        def rank(start: Array) -> list[Array]:
            limit, place = nearest(start)

            def visit(before: Array, tile: _Tile) -> tuple[Array, None]:
                # Of equally far ones those of a lower index come before. That places
                # follow one another is said so that the loop is vectorised.
                lower = jnp.arange(columns) < place - tile.index[0]
                keys = jnp.where(tile.relevant, last, tile.keys)
                return before + (keys < jnp.where(lower, limit + 1, limit)), None

            before = jnp.zeros((self.blocks.size, columns), int)
            before, _ = self.scan(start, tiles, visit, before)
            return [jnp.sum(before, axis=1) + 1]

        return rank

    def nearest(self, tiles: _Tiles, k: int, start: Array) -> tuple[Array, Array]:
        """Distances and indices of the k nearest."""
        m = len(self.batch.others[0])
        _, panel = self.scan(
            start, tiles, lambda _, tile: (None, -_as_floats(tile.keys)), None
        )
        panel = jnp.moveaxis(panel, 1, 0).reshape(self.blocks.size, -1)
        # The lowest index comes first among equals.
        near, index = lax.top_k(panel, k)
        a = self.rows(self.batch.anchors, start)
        partners = self.batch.others[0][index]
        each = jax.vmap(jax.vmap(self.metric.between, (None, 0)))
        distances = each(a, partners)
        # By differences, which have more digits.
        key, found = ordered_bits(distances), near > -jnp.inf
        last = jnp.iinfo(key.dtype).max
        key, index = jnp.where(found, key, last), jnp.where(found, index, m)
        _, index, distances = lax.sort((key, index, distances), num_keys=2)
        found = index < m
        return jnp.where(found, distances, jnp.inf), jnp.where(found, index, -1)

    def by_counting(self, tiles: _Tiles, start: Array) -> tuple[Array, ...]:
        """Rank of the first, R-precision, MAP@R and average precision.

        By counting who comes before each relevant reference.
        """
        _, panel = self.scan(
            start, tiles, lambda _, tile: (None, _in_runs(tile.keys)), None
        )
        panel = panel.reshape(-1, *panel.shape[2:])
        runs, rows, _ = panel.shape
        row = jnp.arange(rows)[:, None]
        last, nowhere = jnp.iinfo(panel.dtype).max, runs * RUN + 1
        most = jnp.max(self.classes.positives)

        def rank(first: Array, size: int, ranks: Array) -> Array:
            index, found = self.classes.some(first, size, start, rows)
            run = index // RUN
            own = jnp.where(found, panel[run, row, index % RUN], last - 1)
            # Of equally far ones those of a lower index come before; those of the same
            # run are looked at one by one.
            before = _count_below(panel, lambda i: own + (i < run))
            equal = panel[run, row] == own[..., None]
            lower = jnp.arange(RUN) < (index % RUN)[..., None]
            before += jnp.sum(equal & lower, axis=-1)
            rank = jnp.where(found, before + 1, nowhere)
            return lax.dynamic_update_slice_in_dim(ranks, rank, first, axis=1)

        ranks = _in_groups(most, rank, jnp.full((rows, FEW), nowhere))
        relevant = lax.dynamic_slice_in_dim(self.classes.positives, start, rows)
        among = _in_runs(ranks)

        def add(group: Array, sums: tuple[Array, ...]) -> tuple[Array, ...]:
            own = lax.dynamic_slice_in_dim(ranks, group * GROUP, GROUP, axis=1)
            upto = _count_below(among, lambda _: own + 1)
            precision = jnp.where(own < nowhere, upto / own, 0)
            within = own <= relevant[:, None]
            new = within, precision * within, precision
            return tuple(old + jnp.sum(x, axis=1) for old, x in zip(sums, new))

        sums = lax.fori_loop(0, -(-most // GROUP), add, (jnp.zeros(rows),) * 3)
        divisor = jnp.maximum(relevant, 1)
        return jnp.min(ranks, axis=1), *(x / divisor for x in sums)

    def by_sorting(self, tiles: _Tiles, start: Array) -> tuple[Array, ...]:
        """The same, by sorting all references."""

        def visit(_: None, tile: _Tile) -> tuple[None, tuple[Array, Array]]:
            return None, (tile.keys, tile.relevant.astype(jnp.int8))

        _, panel = self.scan(start, tiles, visit, None)
        keys, relevant = (
            jnp.moveaxis(x, 1, 0).reshape(self.blocks.size, -1) for x in panel
        )
        _, relevant = lax.sort((keys, relevant), num_keys=1, is_stable=True)
        relevant = relevant > 0
        rank = jnp.arange(1, keys.shape[1] + 1)
        count = jnp.sum(relevant, axis=1, keepdims=True)
        precision = jnp.cumsum(relevant, axis=1) / rank
        within = relevant & (rank <= count)
        sums = within, precision * within, precision * relevant
        divisor = jnp.maximum(count[:, 0], 1)
        first = jnp.argmax(relevant, axis=1) + 1
        return first, *(jnp.sum(x, axis=1) / divisor for x in sums)


def _columns(mask: Array, first: Array, count: int) -> Array:
    """Some columns of a mask, False beyond its end."""
    padded = jnp.pad(mask, ((0, 0), (0, -mask.shape[1] % count)))
    return lax.dynamic_slice_in_dim(padded, first, count, axis=1)


def _as_floats(keys: Array) -> Array:
    """What `ordered_bits` made keys of; what is nowhere comes at infinity.

    Of floats XLA finds the least several times faster. Overflown distances and NaN
    come just before.
    """
    last = jnp.iinfo(keys.dtype).max
    kind = jnp.float64 if keys.dtype == jnp.int64 else jnp.float32
    bits = jnp.where(keys < 0, keys ^ last, keys)
    most = jnp.finfo(kind).max
    floats = jnp.clip(lax.bitcast_convert_type(bits, kind), -most, most)
    floats = jnp.where(jnp.isnan(floats), most, floats)
    return jnp.where(keys == last, jnp.inf, floats)


def _in_runs(x: Array) -> Array:
    """``[rows, m]`` as ``[m / RUN, rows, RUN]``."""
    return jnp.moveaxis(x.reshape(len(x), -1, RUN), 1, 0)


def _count_below(runs: Array, limit: Callable[[Array], Array]) -> Array:
    """How many of each row are below limits ``[rows, k]``, which depend on the run.

    A sum of comparisons, written out: reductions are several times slower.
    """

    def step(below: Array, run: tuple[Array, Array]) -> tuple[Array, None]:
        place, x = run
        limits = limit(place)
        for column in range(RUN):
            below += (x[:, column, None] < limits).astype(below.dtype)
        return below, None

    places = jnp.arange(len(runs))
    none = jnp.zeros(jax.eval_shape(limit, places[0]).shape, int)
    return lax.scan(step, none, (places, runs))[0]


def _in_groups(
    count: Array, visit: Callable[[Array | int, int, Any], Any], state: Any
) -> Any:
    """``visit(first, size, state)`` until all of a count have had their turn.

    Comparing with many at a time costs less for each; the last group has a size that
    wastes little.
    """
    whole = count // GROUP
    state = lax.fori_loop(0, whole, lambda i, s: visit(i * GROUP, GROUP, s), state)
    first = whole * GROUP
    sizes = (0, *range(GROUP % STEP, GROUP + 1, STEP))
    rest = [functools.partial(visit, first, size) for size in sizes[1:]]
    which = jnp.searchsorted(jnp.array(sizes), count - first)
    return lax.switch(which, [lambda state: state, *rest], state)


def _ranks(ks: Sequence[int]) -> tuple[int, ...]:
    if not isinstance(ks, Iterable):
        raise TypeError(f"ks must be a sequence of integers, got {ks!r}.")
    ks = tuple(as_integer("ks", k) for k in ks)
    if any(k < 1 for k in ks):
        raise ValueError(f"ks must be positive, got {ks}.")
    return ks


def _positions(positions: ArrayLike | None, n: int) -> Array:
    if positions is None:
        return jnp.full(n, -1)
    positions = jnp.asarray(positions)
    if not jnp.issubdtype(positions.dtype, jnp.integer):
        raise TypeError(f"positions must be integers, got dtype {positions.dtype}.")
    if positions.shape != (n,):
        raise ValueError(
            f"positions must have one entry for each of the {n} queries, got shape "
            f"{positions.shape}."
        )
    return positions


def _check_vectors(**named: Array) -> None:
    for name, array in named.items():
        if array.ndim != 2 or array.size == 0:
            raise ValueError(f"{name} must be [n, d], got shape {array.shape}.")
