"""Who is it, if anybody known: identification among the classes of a gallery."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from tripletjax._api import as_integer, jitted, unjitted
from tripletjax._thresholds import as_rates, between
from tripletjax.distances import Metric, as_vectors, euclidean
from tripletjax.pairs import per_item, same_labels
from tripletjax.retrieval.neighbors import check_vectors, nearest_of_classes


class NearestClasses(NamedTuple):
    """The classes nearest to each query, the nearest first.

    Attributes:
        distances: ``[n, k]``, to the nearest reference of each class.
        labels: integers ``[n, k]``, of the classes; -1 where there are fewer than k.
        indices: integers ``[n, k]``, these references; -1 likewise.
    """

    distances: Array
    labels: Array
    indices: Array


class IdentificationMetrics(NamedTuple):
    """How well queries are named by the nearest class of a gallery, or as unknown.

    Attributes:
        rate_at_rank: ``[len(ranks)]``, the identification rates: of known queries the
            share whose class is among so many nearest classes.
        fnir_at_fpir: ``[len(fpirs)]``, the false negative identification rates: of
            known queries the share that are not named, or not rightly, at the largest
            threshold whose false positive identification rate is not above each.
        thresholds: ``[len(fpirs)]``, at most which distances get a name then; negative
            if none does, and minus infinity where distances may be negative.
        known: the number of queries whose class is in the gallery.
        unknown: the number of others.
    """

    rate_at_rank: Array
    fnir_at_fpir: Array
    thresholds: Array
    known: Array
    unknown: Array


@jitted(callables=("metric",), sizes=("k",), keep_dtypes=True)
def nearest_classes(
    queries: ArrayLike,
    references: ArrayLike,
    reference_labels: ArrayLike,
    *,
    k: int = 1,
    metric: Metric = euclidean,
    reference_where: ArrayLike | None = None,
) -> NearestClasses:
    """The k classes nearest to each query, each by its nearest reference.

    Exact; of equally far classes, the one whose nearest reference comes first. For
    class means, give these as references.

    Memory: O(n k + m d), and up to 512 rows of distances.

    Args:
        queries: vectors ``[n, d]``.
        references: vectors ``[m, d]``.
        reference_labels: integers ``[m]``, their classes.
        k: how many classes.
        metric: how far two vectors are apart.
        reference_where: bool ``[m]``, False for padding.

    Returns:
        `NearestClasses`. Where there are fewer than k classes, the rest are infinitely
        far. A query that is not finite has distances NaN.

    Raises:
        TypeError: if an argument has the wrong dtype.
        ValueError: if shapes do not fit, or k is not from 1 to m.

    >>> import jax.numpy as jnp
    >>> import tripletjax as tj
    >>> gallery, classes = jnp.array([[0.0], [1.0], [5.0]]), jnp.array([7, 7, 8])
    >>> found = tj.retrieval.nearest_classes(
    ...     jnp.array([[1.5]]), gallery, classes, k=2)
    >>> print(found.labels, found.distances)
    [[7 8]] [[0.5 3.5]]
    """
    queries, references = as_vectors(
        ("queries", queries), ("references", references), rank=2
    )
    check_vectors(queries=queries, references=references)
    m = len(references)
    labels = per_item(
        "reference_labels", reference_labels, m, "references", jnp.integer
    )
    real = jnp.ones(m, bool) if reference_where is None else reference_where
    real = per_item("reference_where", real, m, "references", jnp.bool_)
    if not 1 <= k <= m:
        raise ValueError(f"k must be from 1 to {m}, the references; got {k}.")
    distances, index = nearest_of_classes(
        queries, references, labels, k=k, metric=metric, reference_where=real
    )
    return NearestClasses(distances, jnp.where(index < 0, -1, labels[index]), index)


def evaluate_identification(
    embeddings: ArrayLike,
    labels: ArrayLike,
    *,
    references: ArrayLike,
    reference_labels: ArrayLike,
    ranks: Sequence[int] = (1, 5),
    fpirs: Sequence[float] = (0.1, 0.01),
    metric: Metric = euclidean,
    where: ArrayLike | None = None,
    reference_where: ArrayLike | None = None,
) -> IdentificationMetrics:
    """Identification against a gallery, of which some queries are not.

    A query gets the name of the nearest class if that is at most as far as a threshold,
    and is unknown else. Of queries whose class is not in the gallery, the share that
    get a name is the false positive identification rate (FPIR), which grows with the
    gallery; of the others the share that do not get the right one is the false negative
    identification rate (FNIR).

    Memory: O(n max(ranks) + m d), and up to 512 rows of distances.

    Args:
        embeddings: vectors ``[n, d]``, the queries.
        labels: integers ``[n]``; of unknown ones any that no reference has.
        references: vectors ``[m, d]``, the gallery.
        reference_labels: integers ``[m]``.
        ranks: at which to report the identification rate.
        fpirs: false positive identification rates at which to report the FNIR.
        metric: how far two vectors are apart.
        where: bool ``[n]``, False for padding.
        reference_where: bool ``[m]``, likewise.

    Returns:
        `IdentificationMetrics`. What no query says anything about is NaN: every rate of
        no known query, false negative rates at an FPIR finer than one of the unknown
        queries, and everything if the distance of a query is NaN.

    Raises:
        TypeError: if an argument has the wrong dtype.
        ValueError: if shapes do not fit, or a rank or rate is none.

    References:
        Grother, Ngan, Hanaoka. Face Recognition Vendor Test (FRVT) Part 2:
        Identification. 2019. NIST Interagency Report 8271 (FNIR and FPIR, with rank 1)

    >>> import jax.numpy as jnp
    >>> import tripletjax as tj
    >>> gallery, classes = jnp.array([[0.0], [5.0]]), jnp.array([0, 1])
    >>> queries, labels = jnp.array([[1.0], [4.5], [2.0]]), jnp.array([0, 1, 2])
    >>> metrics = tj.retrieval.evaluate_identification(
    ...     queries, labels, references=gallery, reference_labels=classes, fpirs=(1.0,))
    >>> print(metrics.rate_at_rank, metrics.fnir_at_fpir, metrics.unknown)
    [1. 1.] [0.] 1
    """
    if not isinstance(ranks, Iterable):
        raise TypeError(f"ranks must be a sequence of integers, got {ranks!r}.")
    ranks = tuple(as_integer("ranks", rank) for rank in ranks)
    if not ranks or min(ranks) < 1:
        raise ValueError(f"ranks must be at least 1, got {ranks}.")
    return _evaluate_identification(
        embeddings,
        labels,
        references=references,
        reference_labels=reference_labels,
        ranks=ranks,
        fpirs=as_rates("fpirs", fpirs),
        metric=metric,
        where=where,
        reference_where=reference_where,
    )


@jitted(callables=("metric",), static=("ranks", "fpirs"))
def _evaluate_identification(
    embeddings: ArrayLike,
    labels: ArrayLike,
    *,
    references: ArrayLike,
    reference_labels: ArrayLike,
    ranks: tuple[int, ...],
    fpirs: tuple[float, ...],
    metric: Metric,
    where: ArrayLike | None = None,
    reference_where: ArrayLike | None = None,
) -> IdentificationMetrics:
    x, y = as_vectors(("embeddings", embeddings), ("references", references), rank=2)
    check_vectors(embeddings=x, references=y)
    n, m = len(x), len(y)
    labels = per_item("labels", labels, n, "embeddings", jnp.integer)
    real = jnp.ones(n, bool) if where is None else where
    real = per_item("where", real, n, "embeddings", jnp.bool_)
    found = unjitted(nearest_classes)(
        jnp.where(real[:, None], x, 0),
        y,
        reference_labels,
        k=min(max(ranks), m),
        metric=metric,
        reference_where=reference_where,
    )
    there = _among(labels, jnp.asarray(reference_labels), reference_where)
    known, unknown = real & there, real & ~there
    right = same_labels(found.labels, labels[:, None]) & (found.indices >= 0)
    count, others = jnp.sum(known), jnp.sum(unknown)
    share = lambda hit: jnp.sum(hit & known) / jnp.maximum(count, 1)  # noqa: E731

    nearest = found.distances[:, 0]
    of_others = jnp.sort(jnp.where(unknown, nearest, jnp.inf))
    fnirs, thresholds = [], []
    for fpir in fpirs:
        # So many of the unknown may get a name, and the next must not.
        may = jnp.floor(fpir * others + 1e-6).astype(int)
        beyond = jnp.where(may < others, of_others[jnp.minimum(may, n - 1)], jnp.inf)
        last = jnp.max(
            jnp.where(real & (nearest < beyond), nearest, -jnp.inf), initial=-jnp.inf
        )
        threshold = between(last, beyond)
        shown = (others * fpir >= 1 - 1e-6) & (count > 0)
        fnir = 1 - share(right[:, 0] & (nearest <= threshold))
        fnirs.append(jnp.where(shown, fnir, jnp.nan))
        thresholds.append(jnp.where(shown, threshold, jnp.nan))
    rates = [jnp.where(count > 0, share(right[:, :r].any(1)), jnp.nan) for r in ranks]
    broken = jnp.any(real & jnp.isnan(nearest))
    rates, fnirs, thresholds = (
        jnp.where(broken, jnp.nan, jnp.stack(x)) for x in (rates, fnirs, thresholds)
    )
    return IdentificationMetrics(rates, fnirs, thresholds, count, others)


def _among(labels: Array, others: Array, where: ArrayLike | None) -> Array:
    """Which labels are among others ``[m]`` that are real, in O(n + m) memory."""
    padding = jnp.zeros(len(others), bool) if where is None else ~jnp.asarray(where)
    # Of equal ones, a real one comes first.
    others, padding = lax.sort((others, padding), num_keys=2)
    index = jnp.searchsorted(others, labels.astype(others.dtype))
    index = jnp.minimum(index, len(others) - 1)
    return same_labels(others[index], labels) & ~padding[index]
