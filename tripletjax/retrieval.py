"""Is it any good, ranked: neighbours, and metrics of how early the right ones come.

Every query ranks the references by distance, the nearest first and ties by the lower
index; references with the query's label are relevant. A query is never its own
reference, and one without any relevant reference is left out of the means and counted.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from tripletjax.blocks import (
    RUN,
    Batch,
    Blocks,
    Classes,
    Kind,
    Task,
    in_columns,
    in_runs,
)
from tripletjax.blockwise import as_batch
from tripletjax.distances import Metric, as_vectors, common_offset, euclidean
from tripletjax.mining import ordered_bits
from tripletjax.pairs import PairMasks, pair_masks, per_item
from tripletjax.public import as_integer, public

# Neighbours are found for this many queries at a time, to bound the memory.
BLOCK = 256
# Metrics are made for at most this many queries at a time, and of so many distances.
MOST_ROWS, PANEL = 512, 2**24
# Up to so many relevant references of a query, counting who comes before each takes
# less time than sorting all; so many at a time.
FEW, REST = 512, 128


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
) -> tuple[Array, Array]:
    """The k nearest references of each query, nearest first.

    Args:
        queries: vectors ``[n, d]``.
        references: vectors ``[m, d]``.
        k: how many neighbours.
        metric: how far two vectors are apart.
        positions: integers ``[n]``, the place of each query among the references, so
            that it is not its own neighbour; -1 for nowhere.

    Returns:
        Distances and indices of the references, both ``[n, k]``.

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
        queries, references, k=k, metric=metric, positions=positions
    )


@public(callables=("metric",), static=("k",))
def _nearest_neighbors(
    queries: ArrayLike,
    references: ArrayLike,
    *,
    k: int,
    metric: Metric,
    positions: ArrayLike | None,
) -> tuple[Array, Array]:
    queries, references = jnp.asarray(queries), jnp.asarray(references)
    _check_vectors(queries=queries, references=references)
    n, m = len(queries), len(references)
    choices = m if positions is None else m - 1
    if not 1 <= k <= choices:
        but = "" if positions is None else " but the query itself"
        raise ValueError(
            f"k must be from 1 to {choices}, all references{but}; got {k}."
        )
    positions = _positions(positions, n)

    def rank(query_and_position: tuple[Array, Array]) -> Array:
        query, position = query_and_position
        distances = metric(query[None], references)[0]
        distances = jnp.where(jnp.arange(m) == position, jnp.inf, distances)
        return jax.lax.top_k(-distances, k)[1]

    indices = jax.lax.map(rank, (queries, positions), batch_size=BLOCK)
    partners = jnp.broadcast_to(queries[:, None], (n, k, queries.shape[-1]))
    return metric.paired(partners, references[indices]), indices


# From metrics per query ``[n]`` and the labels of queries to means.
Reduction = Callable[[RetrievalMetrics, Array], RetrievalMetrics]


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
        labels: integers ``[n]``.
        ks: at which ranks to report recall.
        references: vectors ``[m, d]`` to rank. If not given, all other queries.
        reference_labels: integers ``[m]``, with `references`.
        positions: integers ``[n]``, the place of each query among the references, or
            -1; nowhere if `references` are given without it.
        where: bool ``[n]``, False for padding.
        reference_where: bool ``[m]``, likewise.
        metric: how far two vectors are apart. Where it is made of inner products, so
            is the order of references.
        reduce_fn: how queries are averaged: `mean_of_queries`, `mean_of_classes`, or
            None for the metrics ``[n]`` of every query, 0 for those without a relevant
            reference, which `queries` says.

    Returns:
        `RetrievalMetrics`.

    Raises:
        TypeError: if an argument has the wrong dtype.
        ValueError: if shapes do not fit, `ks` are not positive integers, or only one of
            `references` and `reference_labels` is given.

    References:
        Musgrave, Belongie, Lim. A Metric Learning Reality Check. 2020.
        arXiv:2003.08505 (MAP@R, R-precision)

    >>> import jax.numpy as jnp
    >>> import tripletjax as tj
    >>> x = jnp.array([[0.0], [1.0], [1.5], [2.6]])
    >>> metrics = tj.retrieval.evaluate(x, jnp.array([0, 0, 1, 1]), ks=(1, 2))
    >>> print(metrics.recall_at_k, metrics.map_at_r)
    [0.5 1. ] 0.5
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


@public(callables=("metric", "reduce_fn"), static=("ks", "first_alone"))
def _evaluate(
    embeddings: ArrayLike,
    labels: ArrayLike,
    *,
    ks: tuple[int, ...],
    references: ArrayLike | None,
    reference_labels: ArrayLike | None,
    positions: ArrayLike | None,
    where: ArrayLike | None,
    reference_where: ArrayLike | None,
    metric: Metric,
    reduce_fn: Reduction | None,
    first_alone: bool,
) -> RetrievalMetrics:
    if isinstance(labels, PairMasks):
        raise TypeError("labels must be integers, got PairMasks.")
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
    classes = Classes.of(batch)
    rankings = _Rankings.of(metric, batch, classes)
    n, found = len(batch.anchors), classes.positives > 0
    if first_alone:
        (first,) = rankings.fill(rankings.first)
        metrics = [jnp.zeros(n)] * 3
    else:
        first, *metrics = lax.cond(
            jnp.max(classes.positives) <= FEW,
            lambda: rankings.fill(rankings.by_counting),
            lambda: rankings.fill(rankings.by_sorting),
        )
    recall = first[:, None] <= jnp.asarray(ks)
    values = [recall, first == 1, *metrics, 1 / first]
    values = [
        jnp.where(found.reshape(-1, *(1,) * (x.ndim - 1)), x, 0).astype(jnp.float32)
        for x in values
    ]
    metrics = RetrievalMetrics(*values, found)
    return metrics if reduce_fn is None else reduce_fn(metrics, batch.labels)


@public(callables=("metric",), static=("class_means",))
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
        ``[...]``; NaN for an episode without a query or without support.

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
    return jnp.where((count > 0) & jnp.any(known, axis=-1), share, jnp.nan)


class _Rankings(NamedTuple):
    """The references of every query in order, some queries at a time."""

    metric: Metric
    batch: Batch
    classes: Classes
    blocks: Blocks
    offset: Array
    halves: Array

    @classmethod
    def of(cls, metric: Metric, batch: Batch, classes: Classes) -> "_Rankings":
        y = batch.others[0]
        offset = common_offset(y) if metric.products else jnp.zeros_like(y[0])
        halves = metric.products.halves(y, offset) if metric.products else offset
        rows = max(1, min(MOST_ROWS, PANEL // len(y)))
        return cls(
            metric, batch, classes, Blocks.of(len(batch.anchors), rows), offset, halves
        )

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

    def block(self, start: Array) -> tuple[Array, PairMasks]:
        """Integers in the order of distances ``[rows, m]``, and who is relevant.

        What is no reference comes after everything else.
        """
        batch, size = self.batch, self.blocks.size
        y, labels, real = batch.others
        row = start + jnp.arange(size)
        a = lax.dynamic_slice_in_dim(batch.anchors, start, size)
        if batch.square:
            positions = row
        elif batch.positions is None:
            positions = None
        else:
            positions = lax.dynamic_slice_in_dim(batch.positions, start, size)
        if self.metric.products is None:
            itself = jnp.full(size, -1) if positions is None else positions
            values = self.metric.against(a, y, itself)
        else:
            halves = self.metric.products.halves(a, self.offset)[:, None]
            products = jnp.matmul(
                a - self.offset, (y - self.offset).T, precision="highest"
            )
            values = halves + self.halves - products
            values = jnp.where(values < 0, 0, values)
        masks = pair_masks(
            lax.dynamic_slice_in_dim(batch.labels, start, size),
            labels,
            positions=positions,
            reference_where=real,
        )
        bits = ordered_bits(values)
        last = jnp.iinfo(bits.dtype).max
        return jnp.where(masks.positive | masks.negative, bits, last), masks

    def first(self, start: Array) -> tuple[Array]:
        """The rank of the first relevant reference."""
        bits, masks = self.block(start)
        last = jnp.iinfo(bits.dtype).max
        relevant = jnp.where(masks.positive, bits, last)
        nearest = jnp.min(relevant, axis=1, keepdims=True)
        columns = jnp.arange(bits.shape[1])
        place = jnp.where(relevant == nearest, columns, len(columns))
        place = jnp.min(place, axis=1, keepdims=True)
        before = (bits < nearest) | ((bits == nearest) & (columns < place))
        return (jnp.sum(before, axis=1) + 1,)

    def by_counting(self, start: Array) -> tuple[Array, ...]:
        """Rank of the first, R-precision, MAP@R and average precision.

        By counting who comes before each relevant reference.
        """
        bits, _ = self.block(start)
        rows, m = bits.shape
        last = jnp.iinfo(bits.dtype).max
        bits = jnp.pad(bits, ((0, 0), (0, -m % RUN)), constant_values=last)
        row = jnp.arange(rows)[:, None]
        nowhere = m + 1

        def rank(first: Array, size: int, ranks: Array) -> Array:
            index, found = self.classes.some(first, size, start, rows)
            own = jnp.where(found, bits[row, index], last - 1)

            def visit(run: Array, runs: list[Array], before: Array) -> Array:
                # Of equally far ones those of a lower index come before.
                limit = own + ((run + 1) * RUN <= index)
                for x in runs[0]:
                    before += (x[:, None] < limit).astype(before.dtype)
                return before

            before = in_runs([bits], visit, jnp.zeros_like(index))
            # Those of the run that has it itself are looked at one by one.
            run = (index // RUN * RUN)[..., None] + jnp.arange(RUN)
            equal = bits[row[..., None], run] == own[..., None]
            before += jnp.sum(equal & (run < index[..., None]), axis=-1)
            rank = jnp.where(found, before + 1, nowhere)
            return lax.dynamic_update_slice_in_dim(ranks, rank, first, axis=1)

        count = jnp.max(self.classes.positives)
        ranks = in_columns(count, rank, jnp.full((rows, FEW), nowhere), rest=REST)
        relevant = lax.dynamic_slice_in_dim(self.classes.positives, start, rows)

        def add(first: Array, size: int, sums: tuple[Array, ...]) -> tuple[Array, ...]:
            own = lax.dynamic_slice_in_dim(ranks, first, size, axis=1)

            def visit(_: Array, runs: list[Array], upto: Array) -> Array:
                for x in runs[0]:
                    upto += (x[:, None] <= own).astype(upto.dtype)
                return upto

            upto = in_runs([ranks], visit, jnp.zeros_like(own))
            precision = jnp.where(own < nowhere, upto / own, 0)
            within = own <= relevant[:, None]
            new = within, precision * within, precision
            return tuple(old + jnp.sum(x, axis=1) for old, x in zip(sums, new))

        sums = in_columns(count, add, (jnp.zeros(rows),) * 3, rest=REST)
        divisor = jnp.maximum(relevant, 1)
        return jnp.min(ranks, axis=1), *(x / divisor for x in sums)

    def by_sorting(self, start: Array) -> tuple[Array, ...]:
        """The same, by sorting all references."""
        bits, masks = self.block(start)
        _, relevant = lax.sort(
            (bits, masks.positive.astype(jnp.int8)), num_keys=1, is_stable=True
        )
        relevant = relevant > 0
        rank = jnp.arange(1, bits.shape[1] + 1)
        count = jnp.sum(relevant, axis=1, keepdims=True)
        precision = jnp.cumsum(relevant, axis=1) / rank
        within = relevant & (rank <= count)
        sums = within, precision * within, precision * relevant
        divisor = jnp.maximum(count[:, 0], 1)
        first = jnp.argmax(relevant, axis=1) + 1
        return first, *(jnp.sum(x, axis=1) / divisor for x in sums)


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
