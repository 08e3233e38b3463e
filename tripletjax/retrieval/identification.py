"""Identification: the nearest classes of a gallery, FNIR and FPIR."""

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
    """The k nearest classes of each query, the nearest first.

    Attributes:
        distances: ``[n, k]``, to the nearest reference of each class.
        labels: integers ``[n, k]``, the classes; -1 where there are fewer than k.
        indices: integers ``[n, k]``, the nearest reference of each class, or -1.
    """

    distances: Array
    labels: Array
    indices: Array


class IdentificationMetrics(NamedTuple):
    """Closed-set and open-set identification rates, each from 0 to 1.

    Attributes:
        rate_at_rank: ``[len(ranks)]``, the identification rate: the share of known
            queries whose class is among the nearest classes up to this rank.
        fnir_at_fpir: ``[len(fpirs)]``, the FNIR at the largest threshold whose FPIR is
            not above each of `fpirs`.
        thresholds: ``[len(fpirs)]``, these thresholds, in units of the distances. A
            negative threshold accepts no query (minus infinity if a distance may be
            negative).
        known: the number of queries whose class is in the gallery.
        unknown: the number of queries whose class is not in the gallery.
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
    r"""Find the k nearest classes of each query, each by its nearest reference.

    $$d(q, c) = \min_{j : y_j = c} d(q, r_j)$$

    with references $r_j$ of class $y_j$. The classes come in order of d, ties by the
    lower index of the nearest reference. The search is exact. To compare with class
    means, pass the means as references.

    Memory: O(n k + m d), and up to 512 rows of distances.

    Args:
        queries: vectors ``[n, d]``.
        references: vectors ``[m, d]``.
        reference_labels: integers ``[m]``, the class of each reference.
        k: the number of classes, 1 to m.
        metric: the `Metric` that defines d.
        reference_where: bool ``[m]``, False for padding.

    Returns:
        `NearestClasses`. If there are fewer than k classes, the rest have an infinite
        distance. A query that is not finite has distances NaN.

    Raises:
        TypeError: if an argument has the wrong dtype.
        ValueError: if shapes do not fit, or k is not from 1 to m.

    References:
        Cover, Hart. Nearest Neighbor Pattern Classification. 1967. IEEE Transactions on
        Information Theory 13(1)

    >>> import jax.numpy as jnp
    >>> import tripletjax as tj
    >>> gallery, classes = jnp.array([[0.0], [1.0], [5.0]]), jnp.array([7, 7, 8])
    >>> nearest = tj.retrieval.nearest_classes(
    ...     jnp.array([[1.5]]), gallery, classes, k=2)
    >>> print(nearest.labels, nearest.distances)
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
        raise ValueError(f"k must be from 1 to {m}, the number of references, got {k}.")
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
    r"""Compute closed-set and open-set identification rates against a gallery.

    Let $c_q$ be the nearest class of query q, at distance $d_q$ (`nearest_classes`),
    and $y_q$ its true class. A query with $d_q \le t$ is accepted as $c_q$, any other
    is rejected as unknown. K is the set of queries with a class in the gallery
    (known), U that of the others (unknown):

    $$\text{FPIR}(t) = \frac{|\{q \in U : d_q \le t\}|}{|U|}, \qquad
      \text{FNIR}(t) = 1 - \frac{|\{q \in K : d_q \le t,\; c_q = y_q\}|}{|K|}$$

    FNIR at an FPIR f takes the largest t with FPIR(t) at most f. FPIR grows with the
    gallery. The identification rate at rank r is the share of K whose class is one of
    the r nearest classes, without a threshold.

    Memory: O(n max(ranks) + m d), and up to 512 rows of distances.

    Args:
        embeddings: vectors ``[n, d]``, the queries.
        labels: integers ``[n]``. An unknown query has a label of no reference.
        references: vectors ``[m, d]``, the gallery.
        reference_labels: integers ``[m]``.
        ranks: ranks of the identification rate, integers of at least 1.
        fpirs: FPIRs at which to report the FNIR, over 0 and up to 1.
        metric: the `Metric` that defines d.
        where: bool ``[n]``, False for padding.
        reference_where: bool ``[m]``, False for padding.

    Returns:
        `IdentificationMetrics`. Rates and FNIRs are NaN without a known query. An FNIR
        is NaN at an FPIR below $1 / |U|$. All are NaN if a distance $d_q$ is NaN.

    Raises:
        TypeError: if an argument has the wrong dtype.
        ValueError: if shapes do not fit, a rank is less than 1, or an FPIR is not over
            0 and up to 1.

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
        raise TypeError(
            f"ranks must be a sequence of integers, got {ranks!r}; use ({ranks!r},)."
        )
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
    nearest = unjitted(nearest_classes)(
        jnp.where(real[:, None], x, 0),
        y,
        reference_labels,
        k=min(max(ranks), m),
        metric=metric,
        reference_where=reference_where,
    )
    in_gallery = _contains(jnp.asarray(reference_labels), reference_where, labels)
    known, unknown = real & in_gallery, real & ~in_gallery
    correct = same_labels(nearest.labels, labels[:, None]) & (nearest.indices >= 0)
    knowns, unknowns = jnp.sum(known), jnp.sum(unknown)

    def share_of_known(hit: Array) -> Array:
        share = jnp.sum(hit & known) / jnp.maximum(knowns, 1)
        return jnp.where(knowns > 0, share, jnp.nan)

    distance = nearest.distances[:, 0]
    thresholds = _thresholds_at(fpirs, distance, unknown, real)
    fnirs = [1 - share_of_known(correct[:, 0] & (distance <= t)) for t in thresholds]
    rates = jnp.stack([share_of_known(correct[:, :r].any(1)) for r in ranks])
    measurable = (unknowns * jnp.asarray(fpirs) >= 1 - 1e-6) & (knowns > 0)
    broken = jnp.any(real & jnp.isnan(distance))
    return IdentificationMetrics(
        jnp.where(broken, jnp.nan, rates),
        jnp.where(measurable & ~broken, jnp.stack(fnirs), jnp.nan),
        jnp.where(measurable & ~broken, thresholds, jnp.nan),
        knowns,
        unknowns,
    )


def _thresholds_at(
    fpirs: tuple[float, ...], distance: Array, unknown: Array, real: Array
) -> Array:
    """The largest threshold ``[len(fpirs)]`` whose FPIR is not above each of `fpirs`.

    It lies between the last accepted distance and the first rejected one.
    """
    unknowns = jnp.sum(unknown)
    of_unknown = jnp.sort(jnp.where(unknown, distance, jnp.inf))
    # The number of unknown queries that may be accepted; the next one is rejected.
    accepted = jnp.floor(jnp.asarray(fpirs) * unknowns + 1e-6).astype(int)
    rejected = of_unknown[jnp.minimum(accepted, len(distance) - 1)]
    rejected = jnp.where(accepted < unknowns, rejected, jnp.inf)
    nearer = real & (distance < rejected[:, None])
    last = jnp.max(jnp.where(nearer, distance, -jnp.inf), axis=1, initial=-jnp.inf)
    return between(last, rejected)


def _contains(gallery: Array, where: ArrayLike | None, labels: Array) -> Array:
    """Whether a gallery ``[m]`` has each of the labels ``[n]``, in O(n + m) memory."""
    padding = jnp.zeros(len(gallery), bool) if where is None else ~jnp.asarray(where)
    # Among equal labels, real ones come before padding.
    gallery, padding = lax.sort((gallery, padding), num_keys=2)
    index = jnp.searchsorted(gallery, labels.astype(gallery.dtype))
    index = jnp.minimum(index, len(gallery) - 1)
    return same_labels(gallery[index], labels) & ~padding[index]
