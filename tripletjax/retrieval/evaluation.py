"""Ranking metrics: recall@k, R-precision, MAP@R, average precision, MRR."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from tripletjax._api import as_integer, jitted, own_promotion
from tripletjax._pairwise.batch import Batch, single_batch
from tripletjax._pairwise.class_index import ClassIndex
from tripletjax._pairwise.mesh import AxisName, gather_terms
from tripletjax._pairwise.over_mesh import over_mesh, without_padding
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
    """Means over the queries that have a relevant reference, each from 0 to 1.

    With ``reduce_fn=None`` every field is ``[n]``, one number per query.

    Attributes:
        recall_at_k: for each k of `ks`, ``{k: recall@k}``: the share of queries with a
            relevant reference among the k nearest.
        precision_at_1: the share of queries whose nearest reference is relevant.
        r_precision: the share of relevant references among the R nearest, where R is
            the number of relevant references of the query.
        map_at_r: the sum of the precision at each relevant rank up to R, over R.
        mean_average_precision: the sum of the precision at each relevant rank, over R.
        mean_reciprocal_rank: one over the rank of the first relevant reference.
        queries: the number of queries that have a relevant reference.
    """

    recall_at_k: dict[int, Array]
    precision_at_1: Array
    r_precision: Array
    map_at_r: Array
    mean_average_precision: Array
    mean_reciprocal_rank: Array
    queries: Array


# From metrics per query ``[n]`` and the labels of the queries ``[n]`` to means.
Reduction = Callable[[RetrievalMetrics, Array], RetrievalMetrics]


@own_promotion
def mean_of_queries(metrics: RetrievalMetrics, labels: Array) -> RetrievalMetrics:
    r"""Average metrics over queries, each query with the same weight.

    $$\bar{x} = \frac{1}{|Q|} \sum_{q \in Q} x_q$$

    with Q the queries that have a relevant reference.

    Memory: O(n).

    Args:
        metrics: per query ``[n]``, as from ``evaluate(..., reduce_fn=None)``.
        labels: integers ``[n]``, not used here.

    Returns:
        `RetrievalMetrics` of scalars, NaN if Q is empty. `queries` is $|Q|$.

    >>> import jax.numpy as jnp
    >>> import tripletjax as tj
    >>> x = jnp.array([[0.0], [1.0], [1.4], [3.0], [3.1], [9.0]])
    >>> labels = jnp.array([0, 0, 1, 1, 1, 2])
    >>> each = tj.retrieval.evaluate(x, labels, reduce_fn=None)
    >>> print(each.precision_at_1, each.queries)
    [1. 0. 0. 1. 1. 0.] [ True  True  True  True  True False]
    >>> print(tj.retrieval.mean_of_queries(each, labels).precision_at_1)
    0.6
    """
    counts = metrics.queries
    queries = jnp.sum(counts)

    def mean(values: Array) -> Array:
        # Queries without a relevant reference have only zeros.
        return jnp.where(
            queries > 0, jnp.sum(values) / jnp.maximum(queries, 1), jnp.nan
        )

    return jax.tree.map(mean, metrics)._replace(queries=queries)


@own_promotion
def mean_of_classes(metrics: RetrievalMetrics, labels: Array) -> RetrievalMetrics:
    r"""Average metrics over classes, each class with the same weight.

    $$\bar{x} = \frac{1}{|C|} \sum_{c \in C} \frac{1}{|Q_c|} \sum_{q \in Q_c} x_q$$

    with $Q_c$ the queries of class c that have a relevant reference, and C the classes
    with such a query.

    Memory: O(n).

    Args:
        metrics: per query ``[n]``, as from ``evaluate(..., reduce_fn=None)``.
        labels: integers ``[n]``, the class of each query.

    Returns:
        `RetrievalMetrics` of scalars, NaN if C is empty. `queries` is the number of
        queries that have a relevant reference.

    >>> import jax.numpy as jnp
    >>> import tripletjax as tj
    >>> x = jnp.array([[0.0], [1.0], [1.4], [3.0], [3.1], [9.0]])
    >>> labels = jnp.array([0, 0, 1, 1, 1, 2])
    >>> each = tj.retrieval.evaluate(x, labels, reduce_fn=None)
    >>> means = tj.retrieval.mean_of_classes(each, labels)
    >>> print(f"{means.precision_at_1:.4f}")  # (1/2 + 2/3) / 2
    0.5833
    """
    counts = metrics.queries
    order = jnp.argsort(labels)
    ranked, kept = labels[order], counts[order]
    total = jnp.append(0, jnp.cumsum(kept))
    first, last = (jnp.searchsorted(ranked, labels, side=s) for s in ("left", "right"))
    share = counts / jnp.maximum(total[last] - total[first], 1)
    classes = jnp.sum(share)

    def mean(values: Array) -> Array:
        total = jnp.sum(values * share)
        return jnp.where(classes > 0, total / jnp.maximum(classes, 1), jnp.nan)

    return jax.tree.map(mean, metrics)._replace(queries=jnp.sum(counts))


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
    r"""Compute ranking metrics of labelled embeddings.

    Every query ranks the references by distance. Let rel(i) be 1 if the i-th nearest
    reference is relevant and else 0. P(i) is the mean of rel over the first i, and R
    the number of relevant references. Per query

    $$\text{MAP@R} = \frac{1}{R} \sum_{i=1}^{R} P(i)\, \text{rel}(i), \qquad
      \text{AP} = \frac{1}{R} \sum_{i=1}^{m} P(i)\, \text{rel}(i),$$

    R-precision is P(R), the reciprocal rank is 1 / i for the first i with rel(i) = 1,
    and recall@k is 1 if that i is at most k. Other definitions of AP interpolate the
    precision or stop at some rank, and differ by a percent or more.

    Memory: O((n + m) d), and blocks of up to 512 rows of distances.

    Args:
        embeddings: queries ``[n, d]``.
        labels: integers ``[n]``, or `PairMasks` ``[n, m]`` of which references are
            relevant to each query (positive), and which others it ranks (negative).
        ks: ranks at which to report recall, positive integers.
        references: vectors ``[m, d]`` to rank. If not given, all other queries.
        reference_labels: integers ``[m]``, required with `references`.
        positions: integers ``[n]``, the index of each query among the references, or
            -1 if it is not one of them. If `references` are given without `positions`,
            no query is one of them.
        where: bool ``[n]``, False for padding.
        reference_where: bool ``[m]``, False for padding; or bool ``[n, m]``, True for
            the references that each query ranks.
        metric: the `Metric` that ranks references. A metric of inner products orders
            them by these, without the refinement that losses have.
        axis_name: the mesh axes over which queries and references are split, as in
            `tripletjax.blockwise`; not with `PairMasks` or `reference_where` of each
            query.
        reduce_fn: `mean_of_queries`, `mean_of_classes`, or any function of the metrics
            and labels per query. None returns the metrics ``[n]`` of every query; they
            are 0 where `queries` is False, for lack of a relevant reference.

    Returns:
        `RetrievalMetrics`.

    Raises:
        TypeError: if an argument has the wrong dtype.
        ValueError: if shapes do not fit, `ks` are not positive integers, only one of
            `references` and `reference_labels` is given, `mean_of_classes` is used
            without labels, or `axis_name` with masks.

    References:
        Musgrave, Belongie, Lim. A Metric Learning Reality Check. 2020.
        arXiv:2003.08505 (MAP@R, R-precision)

    >>> import jax.numpy as jnp
    >>> import tripletjax as tj
    >>> x = jnp.array([[0.0], [1.0], [1.5], [2.6]])
    >>> metrics = tj.retrieval.evaluate(x, jnp.array([0, 0, 1, 1]), ks=(1, 2))
    >>> print(metrics.recall_at_k[1], metrics.recall_at_k[2], metrics.map_at_r)
    0.5 1.0 0.5

    Re-identification ignores images of the same person by the same camera:

    >>> people, cameras = jnp.array([0, 0, 1, 0]), jnp.array([0, 0, 0, 1])
    >>> same = (people[:, None] == people) & (cameras[:, None] == cameras)
    >>> metrics = tj.retrieval.evaluate(x, people, ks=(1,), reference_where=~same)
    >>> print(metrics.recall_at_k, metrics.queries)
    {1: Array(0., dtype=float32)} 3
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
        first_only=False,
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
) -> dict[int, Array]:
    r"""Compute recall@k: the share of queries with a relevant one of k references.

    $$\text{recall@}k = \frac{1}{|Q|} \sum_{q \in Q}
      [\text{a relevant reference is among the } k \text{ nearest of } q]$$

    with Q the queries that have a relevant reference. The values are those of
    `evaluate`, in less time: only the first relevant reference of each query is ranked.

    Memory: O((n + m) d), and up to 512 rows of distances.

    Args:
        embeddings, labels: ``[n, d]`` and integers ``[n]``, as in `evaluate`.
        ks: positive integers.
        references, reference_labels: ``[m, d]`` and integers ``[m]``.
        positions, where, reference_where, metric, axis_name: as in `evaluate`.

    Returns:
        ``{k: recall@k}`` of scalars from 0 to 1, NaN if Q is empty.

    Raises:
        TypeError, ValueError: as `evaluate`.

    References:
        Jégou, Douze, Schmid. Product Quantization for Nearest Neighbor Search. 2011.
        IEEE Transactions on Pattern Analysis and Machine Intelligence 33(1)

    >>> import jax.numpy as jnp
    >>> import tripletjax as tj
    >>> x = jnp.array([[0.0], [1.0], [1.5], [2.6]])
    >>> recall = tj.retrieval.recall_at_k(x, jnp.array([0, 0, 1, 1]), ks=(1, 2))
    >>> print(recall[1], recall[2])
    0.5 1.0
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
        first_only=True,
    ).recall_at_k


def _uses_labels(arguments: dict[str, Any]) -> bool:
    """Whether relevance follows from labels alone, without masks of pairs."""
    each = arguments.get("reference_where")
    masked = isinstance(arguments["labels"], PairMasks)
    return not masked and (each is None or jnp.ndim(each) < 2)


def _of_queries(metrics: Any, n: int, options: dict[str, Any]) -> Any:
    """Means as they are; of metrics per query, the first n."""
    if options["reduce_fn"] is not None:
        return metrics
    return without_padding(metrics, n, options)


@over_mesh(together=_of_queries, suits=_uses_labels)
@jitted(
    callables=("metric", "reduce_fn"),
    flags=("first_only",),
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
    first_only: bool,
) -> RetrievalMetrics:
    n, m = (
        jnp.shape(x)[-2] if jnp.ndim(x) > 1 else 0
        for x in (embeddings, embeddings if references is None else references)
    )
    each, reference_where = per_query(reference_where, n, m)
    masked = isinstance(labels, PairMasks)
    if axis_name is not None and (masked or each is not None):
        raise ValueError(
            "axis_name cannot be combined with labels that are PairMasks, nor with "
            "reference_where of each query."
        )
    if masked and reduce_fn is mean_of_classes:
        raise ValueError(
            "reduce_fn=mean_of_classes requires integer labels, got PairMasks; use "
            "mean_of_queries."
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
    query_labels = jnp.zeros(n, int) if masked else batch.labels
    if masked or each is not None:
        ranked = _ranked_by_masks(metric, batch, masks_of(batch, each))
    else:
        ranked = _ranked_by_labels(metric, batch, first_only)
    if axis_name is not None:
        ranked, query_labels = gather_terms((ranked, query_labels), axis_name)
    metrics = ranked.metrics(ks)
    return metrics if reduce_fn is None else reduce_fn(metrics, query_labels)


class _RankedQueries(NamedTuple):
    """Ranking results, one entry per query ``[n]``.

    Attributes:
        first: the rank of the first relevant reference, from 1.
        r_precision, map_at_r, average_precision: as in `RetrievalMetrics`.
        has_relevant: whether there is a relevant reference.
        finite: whether the query and all references that it ranks are finite.
    """

    first: Array
    r_precision: Array
    map_at_r: Array
    average_precision: Array
    has_relevant: Array
    finite: Array

    def metrics(self, ks: tuple[int, ...]) -> RetrievalMetrics:
        """The metrics of each query, 0 without a relevant reference."""

        def shown(x: Array) -> Array:
            x = jnp.where(self.finite, x.astype(jnp.float32), jnp.nan)
            return jnp.where(self.has_relevant, x, 0)

        return RetrievalMetrics(
            {k: shown(self.first <= k) for k in ks},
            shown(self.first == 1),
            shown(self.r_precision),
            shown(self.map_at_r),
            shown(self.average_precision),
            shown(1 / self.first),
            self.has_relevant,
        )


def _ranked_by_masks(metric: Metric, batch: Batch, masks: PairMasks) -> _RankedQueries:
    rankings = Rankings.of(metric, with_masks(batch, masks))
    ranks = rankings.fill(functools.partial(rankings.by_sorting, rankings.tiles()))
    broken = ~jnp.isfinite(batch.reference_side[0]).all(axis=-1)
    # A matrix product of booleans would make an integer of each pair.
    touched = jnp.any((masks.positive | masks.negative) & broken, axis=1)
    finite = jnp.isfinite(batch.anchors).all(axis=-1) & ~touched
    has_relevant = jnp.any(masks.positive, axis=1)
    return _RankedQueries._make((*ranks, has_relevant, finite))


def _ranked_by_labels(metric: Metric, batch: Batch, first_only: bool) -> _RankedQueries:
    n, m = len(batch.anchors), len(batch.reference_side[0])
    classes = ClassIndex.of(batch)
    rankings = Rankings.of(metric, batch)
    tiles = rankings.tiles()
    if first_only:
        ordered, order = rankings.by_class(classes)
        (first,) = ordered.fill(ordered.first(tiles, rankings.tiles(classes.order)))
        first = jnp.zeros_like(first).at[order].set(first, unique_indices=True)
        ranks = [first, *[jnp.zeros(n)] * 3]
    else:
        counted = rankings._replace(classes=classes)
        by_counting = functools.partial(counted.by_counting, tiles)
        by_sorting = functools.partial(rankings.by_sorting, tiles)
        if m <= MAX_COUNTED:
            ranks = rankings.fill(by_counting)
        else:
            ranks = lax.cond(
                jnp.max(classes.positives) <= MAX_COUNTED,
                lambda: rankings.fill(by_counting),
                lambda: rankings.fill(by_sorting),
            )
    broken = ~jnp.isfinite(batch.reference_side[0]).all(axis=-1)
    # A query does not rank itself. Its own index is outside 0 to m - 1 if it is not
    # among the references.
    index = rankings.positions
    inside = (index >= 0) & (index < m)
    own = inside & broken[jnp.clip(index, 0, m - 1)]
    touched = jnp.sum(broken) - own > 0
    finite = jnp.isfinite(batch.anchors).all(axis=-1) & ~touched
    return _RankedQueries._make((*ranks, classes.positives > 0, finite))


def _ranks(ks: Sequence[int]) -> tuple[int, ...]:
    if not isinstance(ks, Iterable):
        raise TypeError(
            f"ks must be a sequence of integers, got {ks!r}; use ks=({ks!r},)."
        )
    ks = tuple(as_integer("ks", k) for k in ks)
    if any(k < 1 for k in ks):
        raise ValueError(f"ks must be at least 1, got {ks}.")
    return ks
