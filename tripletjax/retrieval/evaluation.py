"""Metrics of how early the right references come."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from tripletjax._api import as_integer, jitted, own_promotion
from tripletjax._pairwise.batch import single_batch
from tripletjax._pairwise.class_index import ClassIndex
from tripletjax._pairwise.mesh import AxisName, gather_terms
from tripletjax._pairwise.over_mesh import over_mesh
from tripletjax.distances import Metric, euclidean
from tripletjax.pairs import PairMasks
from tripletjax.retrieval.rankings import (
    MAX_COUNTED,
    Rankings,
    masks_of,
    per_query,
    with_masks,
)


class RetrievalMetrics(NamedTuple):
    """Means over the queries that have a relevant reference, between 0 and 1.

    Attributes:
        recall_at_k: ``[len(ks)]``, for each k the share of queries with a relevant
            reference among the first k.
        precision_at_1: the share of queries whose nearest reference is relevant.
        r_precision: the share of relevant references among the first R, where R is how
            many the query has.
        map_at_r: the precision at each relevant rank among the first R, over R.
        mean_average_precision: the precision at each relevant rank, over R.
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


# From metrics per query ``[n]`` and the labels of queries to means.
Reduction = Callable[[RetrievalMetrics, Array], RetrievalMetrics]


@own_promotion
def mean_of_queries(metrics: RetrievalMetrics, labels: Array) -> RetrievalMetrics:
    """Every query counts the same.

    Memory: O(n).

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

    return RetrievalMetrics._make((*map(mean, metrics[:-1]), queries))


@own_promotion
def mean_of_classes(metrics: RetrievalMetrics, labels: Array) -> RetrievalMetrics:
    """Every class counts the same, however many queries it has.

    Memory: O(n).

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

    return RetrievalMetrics._make((*map(mean, metrics[:-1]), jnp.sum(counts)))


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
    axis_name: AxisName | None = None,
    reduce_fn: Reduction | None = mean_of_queries,
) -> RetrievalMetrics:
    r"""How well the nearest references share the label of the query.

    With rel(i) whether the i-th nearest reference is relevant, P(i) the share of
    relevant ones among the first i, and R the number of relevant references,

    $$\text{MAP@R} = \frac{1}{R} \sum_{i=1}^{R} P(i)\, \text{rel}(i), \qquad
      \text{AP} = \frac{1}{R} \sum_{i=1}^{m} P(i)\, \text{rel}(i).$$

    Other definitions of AP interpolate the precision or stop at some rank, and differ
    by a percent or more.

    Memory: O((n + m) d), and blocks of up to 512 rows of distances.

    Args:
        embeddings: queries ``[n, d]``.
        labels: integers ``[n]``, or `PairMasks` ``[n, m]`` of which references are
            relevant to each query (positive), and which others it ranks (negative).
        ks: at which ranks to report recall.
        references: vectors ``[m, d]`` to rank. If not given, all other queries.
        reference_labels: integers ``[m]``, with `references`.
        positions: integers ``[n]``, the index of each query among the references, or
            -1; nowhere if `references` are given without it.
        where: bool ``[n]``, False for padding.
        reference_where: bool ``[m]``, likewise; or ``[n, m]``, which of them each query
            ranks, as where those of the same person and camera are ignored.
        metric: how far two vectors are apart. Where it is made of inner products, so
            is the order of references.
        axis_name: the mesh axes over which queries and references are split, as in
            `tripletjax.blockwise`; not with `PairMasks` or `reference_where` of each
            query.
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
        axis_name=axis_name,
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
    axis_name: AxisName | None = None,
) -> Array:
    r"""The share of queries with a relevant reference among the first k.

    The same as `evaluate` gives, in less time: nothing is ranked but the first relevant
    reference of each query.

    Memory: O((n + m) d), and up to 512 rows of distances.

    Args:
        embeddings, labels, ks, references, reference_labels: as in `evaluate`.
        positions, where, reference_where, metric, axis_name: likewise.

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
        axis_name=axis_name,
        reduce_fn=mean_of_queries,
        first_alone=True,
    ).recall_at_k


def _by_labels(given: dict[str, Any]) -> bool:
    each = given.get("reference_where")
    masked = isinstance(given["labels"], PairMasks)
    return not masked and (each is None or jnp.ndim(each) < 2)


def _of_queries(metrics: Any, n: int, options: dict[str, Any]) -> Any:
    """The same; of metrics per query, those that are not of padding."""
    if options["reduce_fn"] is not None:
        return metrics
    return RetrievalMetrics(*(x[:n] for x in metrics))


@over_mesh(together=_of_queries, suits=_by_labels)
@jitted(
    callables=("metric", "reduce_fn"),
    flags=("first_alone",),
    static=("ks", "axis_name"),
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
    axis_name: AxisName | None = None,
    reduce_fn: Reduction | None,
    first_alone: bool,
) -> RetrievalMetrics:
    x = jnp.asarray(embeddings)
    n = x.shape[-2] if x.ndim > 1 else 0
    shape = x.shape if references is None else jnp.shape(references)
    m = shape[-2] if len(shape) > 1 else 0
    each, reference_where = per_query(reference_where, n, m)
    masked = isinstance(labels, PairMasks)
    if axis_name is not None and (masked or each is not None):
        raise ValueError(
            "axis_name does not go with labels that are PairMasks, nor with "
            "reference_where of each query."
        )
    batch = single_batch(
        metric,
        embeddings,
        labels,
        references=references,
        reference_labels=reference_labels,
        positions=positions,
        where=where,
        reference_where=reference_where,
        axis_name=axis_name,
    )
    m = len(batch.reference_side[0])
    if masked and reduce_fn is mean_of_classes:
        raise ValueError("reduce_fn: mean_of_classes takes labels, got PairMasks.")
    query_labels = jnp.zeros(n, int) if masked else batch.labels
    y = batch.reference_side[0]
    broken = ~jnp.isfinite(y).all(axis=-1)
    classes = None
    if masked or each is not None:
        masks = masks_of(batch, each)
        batch = with_masks(batch, masks)
        found = jnp.any(masks.positive, axis=1)
        # A product of booleans would be made of integers, one for each pair.
        touched = jnp.any((masks.positive | masks.negative) & broken, axis=1)
    else:
        classes = ClassIndex.of(batch)
        found = classes.positives > 0
        positions = jnp.arange(n) if batch.square else batch.pairs.positions
        itself = False
        if positions is not None:
            inside = (positions >= 0) & (positions < m)
            itself = inside & broken[jnp.clip(positions, 0, m - 1)]
        touched = jnp.sum(broken) - itself > 0
    touched |= ~jnp.isfinite(batch.anchors).all(axis=-1)
    rankings = Rankings.of(metric, batch)
    tiles = rankings.tiles()
    by_sorting = functools.partial(rankings.by_sorting, tiles)
    if classes is None:
        first, *metrics = rankings.fill(by_sorting)
    elif first_alone:
        ordered, order = rankings.by_class(classes)
        (first,) = ordered.fill(ordered.first(tiles, rankings.tiles(classes.order)))
        first = jnp.zeros_like(first).at[order].set(first, unique_indices=True)
        metrics = [jnp.zeros(n)] * 3
    else:
        counted = rankings._replace(classes=classes)
        by_counting = functools.partial(counted.by_counting, tiles)
        if m <= MAX_COUNTED:
            first, *metrics = rankings.fill(by_counting)
        else:
            first, *metrics = lax.cond(
                jnp.max(classes.positives) <= MAX_COUNTED,
                lambda: rankings.fill(by_counting),
                lambda: rankings.fill(by_sorting),
            )
    recall = first[:, None] <= jnp.asarray(ks)
    values = [recall, first == 1, *metrics, 1 / first]

    def known(x: Array) -> Array:
        column = (slice(None), *(None,) * (x.ndim - 1))
        x = jnp.where(touched[column], jnp.nan, x.astype(jnp.float32))
        return jnp.where(found[column], x, 0)

    metrics = RetrievalMetrics._make((*map(known, values), found))
    if axis_name is not None:
        metrics, query_labels = gather_terms((metrics, query_labels), axis_name)
    return metrics if reduce_fn is None else reduce_fn(metrics, query_labels)


def _ranks(ks: Sequence[int]) -> tuple[int, ...]:
    if not isinstance(ks, Iterable):
        raise TypeError(f"ks must be a sequence of integers, got {ks!r}.")
    ks = tuple(as_integer("ks", k) for k in ks)
    if any(k < 1 for k in ks):
        raise ValueError(f"ks must be positive, got {ks}.")
    return ks
