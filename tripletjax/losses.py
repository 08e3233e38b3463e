"""Triplet losses over a distance matrix, or over explicit triplets.

All losses are one formula, the cost of a triplet,

$$\\ell(a, p, n) = h(d_{ap} - d_{an} + \\text{margin}),$$

summed per anchor over its triplets into `TripletTerms`, and reduced.

>>> import jax
>>> import jax.numpy as jnp
>>> import tripletjax as tj
>>> x = jnp.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.2], [3.0, 0.0]])
>>> labels = jnp.array([0, 0, 1, 1])
>>> print(f"{tj.batch_all_loss(tj.euclidean(x), labels, margin=0.5):.4f}")
1.4925
>>> print(tj.batch_all_loss(tj.euclidean(x), labels, margin=0.5, reduce_fn=None).active)
[1. 0. 2. 2.]

Sweep the margin, or differentiate through to the embeddings:

>>> loss = lambda x, margin: tj.batch_hard_loss(tj.euclidean(x), labels, margin=margin)
>>> print(jax.vmap(loss, in_axes=(None, 0))(x, jnp.array([0.0, 0.5, 1.0])).round(2))
[0.82 1.14 1.63]
>>> print(jax.grad(loss)(x, 0.5).shape)
(4, 2)
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from tripletjax._api import jitted, own_promotion, unjitted
from tripletjax._closures import canonical, closes_over_tracers
from tripletjax._matrices import (
    as_distances,
    check_not_embeddings,
    for_each_true_column,
    take,
    values_at_hand,
)
from tripletjax.distances import Metric, euclidean
from tripletjax.mining import (
    CountedTriplets,
    Triplets,
    as_triplets,
    batch_hard_triplets,
    batch_semi_hard_triplets,
)
from tripletjax.pairs import PairMasks, masks_for


class TripletTerms(NamedTuple):
    """Sums of a loss per anchor, which add up over blocks, devices and steps.

    The counts are floating-point numbers, which do not wrap: 4,096 items of 8 classes
    already make 7.5e9 triplets. ``active.sum() / valid.sum()`` is the share of triplets
    that still have a gradient.

    Attributes:
        total: summed cost ``[..., n]``.
        active: number of triplets with a positive cost ``[..., n]``.
        valid: number of triplets ``[..., n]``.
    """

    total: Array
    active: Array
    valid: Array


# A function from `TripletTerms`, or from the terms of another loss.
Reduction = Callable[[Any], Any]


@dataclasses.dataclass(frozen=True, repr=False)
class SumReduction:
    """A reduction that needs only the sums of the terms over the anchors.

    `mean_valid` and `mean_active` are such reductions. `tripletjax.blockwise` computes
    their value and gradient in one walk over the pairs. Any other reduction takes a
    second walk for its gradient.

    Reductions of the same function are equal and hash alike.

    Args:
        of_sums: a function from `TripletTerms` ``[...]``, or from the terms of another
            loss, summed over the anchors, to the result.

    >>> import jax.numpy as jnp
    >>> import tripletjax as tj
    >>> @tj.SumReduction
    ... def loss_and_active_share(sums):
    ...     return tj.mean_valid.of_sums(sums), sums.active / sums.valid
    >>> x = jnp.array([[0.0], [2.0], [1.0], [3.5]])
    >>> loss, share = tj.blockwise.batch_all_loss(
    ...     x, jnp.array([0, 0, 1, 1]), margin=0.5, reduce_fn=loss_and_active_share)
    >>> print(loss, share)
    1.1875 0.75
    """

    of_sums: Callable[[Any], Any]

    def __post_init__(self) -> None:
        object.__setattr__(self, "of_sums", canonical(self.of_sums))
        object.__setattr__(self, "__doc__", self.of_sums.__doc__)

    def __call__(self, terms: Any) -> Any:
        """The result of `TripletTerms` ``[..., n]``, or of the terms of one anchor."""
        return self.of_sums(sums_over_anchors(terms))

    def __repr__(self) -> str:
        name = getattr(self.of_sums, "__name__", repr(self.of_sums))
        return f"SumReduction({name.strip('_')})"


def sums_over_anchors(terms: Any) -> Any:
    """Terms ``[..., n]`` summed over the anchors; terms of one anchor as they are."""
    return jax.tree.map(lambda x: jnp.sum(x, axis=-1) if jnp.ndim(x) else x, terms)


# The docstrings of these functions are those of the public reductions.


def _mean_valid(sums: TripletTerms) -> Array:
    r"""Mean cost of all triplets, 0 if there are none.

    $$\frac{\sum_a \text{total}_a}{\sum_a \text{valid}_a}$$

    Memory: O(1).

    Args:
        terms: `TripletTerms` ``[..., n]``.

    Returns:
        The mean over the last axis, ``[...]``.

    >>> import jax.numpy as jnp
    >>> import tripletjax as tj
    >>> terms = tj.TripletTerms(*jnp.array([[1.0, 2.0], [1.0, 2.0], [4.0, 2.0]]))
    >>> print(tj.mean_valid(terms), tj.mean_active(terms))
    0.5 1.0
    """
    return sums.total / jnp.maximum(sums.valid, 1)


def _mean_active(sums: TripletTerms) -> Array:
    r"""Mean cost of the triplets with a positive cost, 0 if there are none.

    $$\frac{\sum_a \text{total}_a}{\sum_a \text{active}_a}$$

    Unlike `mean_valid` it does not fade as triplets become satisfied.

    Memory: O(1).

    Args:
        terms: `TripletTerms` ``[..., n]``.

    Returns:
        The mean over the last axis, ``[...]``.

    References:
        Hermans, Beyer, Leibe. In Defense of the Triplet Loss for Person
        Re-Identification. 2017. arXiv:1703.07737 (there: $\mathcal{L}_{BA\ne0}$)

    >>> import jax.numpy as jnp
    >>> import tripletjax as tj
    >>> print(tj.mean_active(tj.TripletTerms(*jnp.zeros((3, 5)))))
    0.0
    """
    return sums.total / jnp.maximum(sums.active, 1)


mean_valid = SumReduction(_mean_valid)
mean_active = SumReduction(_mean_active)


def reduced(terms: TripletTerms, reduce_fn: Reduction | None) -> Any:
    """The result of a reduction; the terms themselves if it is None."""
    if reduce_fn is None:
        return terms
    check_reduction(reduce_fn)
    return reduce_fn(terms)


def check_reduction(reduce_fn: Reduction) -> None:
    """Raise for functions of one array, such as ``jnp.mean`` and ``sum``."""
    function: Any = reduce_fn
    while isinstance(function, functools.partial):
        function = function.func
    module = getattr(function, "__module__", None) or ""
    if module.partition(".")[0] in ("jax", "numpy", "builtins"):
        name = f"{module}.{getattr(function, '__name__', function)}"
        raise TypeError(
            f"reduce_fn must take TripletTerms, got {name}; use "
            "reduce_fn=tripletjax.mean_valid, or a function of the terms such as "
            "lambda terms: jnp.mean(terms.total)."
        )


@dataclasses.dataclass(frozen=True)
class TripletCost:
    """A `hinge` of both distances, for costs that are no function of their gap.

    Args:
        function: elementwise ``(d_ap, d_an, margin) -> cost``.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import tripletjax as tj
    >>> ratio = tj.TripletCost(lambda ap, an, margin: jax.nn.relu(1 + margin - an / ap))
    >>> d = jnp.array([[0.0, 2.0, 3.0], [2.0, 0.0, 1.0], [3.0, 1.0, 0.0]])
    >>> print(tj.batch_hard_loss(d, jnp.array([0, 0, 1]), hinge=ratio))
    0.3
    """

    function: Callable[[Array, Array, Array], Array]

    def __post_init__(self) -> None:
        object.__setattr__(self, "function", canonical(self.function))


@dataclasses.dataclass(frozen=True)
class GapCost:
    """A cost of the gap ``d_ap - d_an + margin`` alone, with its properties.

    Attributes:
        function: elementwise ``gap -> cost``.
        vanishes: whether cost and slope are 0 at minus infinity.
        counts: whether the slope is 1 where the cost is positive, and else 0.
    """

    function: Callable[[Array], Array]
    vanishes: bool = False
    counts: bool = False


RELU = GapCost(jax.nn.relu, vanishes=True, counts=True)
SOFTPLUS = GapCost(jax.nn.softplus, vanishes=True)

Cost = GapCost | TripletCost


def as_cost(hinge: Any) -> Cost:
    """The cost of a hinge: `RELU` and `SOFTPLUS` for ``jax.nn.relu`` and ``softplus``.

    Any other function is a `GapCost` of unknown properties.
    """
    if isinstance(hinge, TripletCost):
        return hinge
    if not callable(hinge):
        raise TypeError(f"hinge must be callable, got {hinge!r}.")
    for cost in (RELU, SOFTPLUS):
        if hinge is cost.function:
            return cost
    return GapCost(hinge)


def closes_over_arrays(cost: Cost, dtype: DTypeLike) -> bool:
    """Whether a cost closes over traced arrays, such as a learned temperature."""
    if cost in (RELU, SOFTPLUS):
        return False
    count = 3 if isinstance(cost, TripletCost) else 1
    return closes_over_tracers(
        cost.function, *[jax.ShapeDtypeStruct((1, 1), dtype)] * count
    )


@functools.lru_cache
def selectively_contrastive(
    *, hard_weight: float = 1.0, temperature: float = 0.1
) -> TripletCost:
    r"""A cost that keeps hard negatives from collapsing the embedding.

    $$\ell = \begin{cases}
      \lambda\, s_{an} & \text{if } s_{an} > s_{ap} \\
      \log(1 + \exp((s_{an} - s_{ap}) / \tau)) & \text{otherwise}
      \end{cases}, \qquad s = 1 - d$$

    for cosine distances d. If the negative is nearer than the positive, pulling the
    positive also pulls the negative, so this cost only pushes the negative. It does
    not use the margin. Use it with the nearest negative and the nearest positive::

        triplets = tj.batch_easy_hard_triplets(d, labels, negative=hardest_negative)
        tj.triplet_loss(d, triplets, hinge=tj.selectively_contrastive())

    Memory: O(1) for each triplet.

    Args:
        hard_weight: λ, the weight of triplets with a hard negative.
        temperature: τ, in units of cosine similarity.

    Returns:
        A `TripletCost` for the option `hinge`.

    Raises:
        ValueError: if an option is not finite and positive.

    References:
        Xuan, Stylianou, Liu, Pless. Hard Negative Examples are Hard, but Useful. 2020.
        arXiv:2007.12749

    >>> import jax.numpy as jnp
    >>> import tripletjax as tj
    >>> d = jnp.array([[0.0, 0.5, 0.2], [0.5, 0.0, 0.9], [0.2, 0.9, 0.0]])
    >>> cost = tj.selectively_contrastive()
    >>> terms = tj.batch_hard_loss(d, jnp.array([0, 0, 1]), hinge=cost, reduce_fn=None)
    >>> print([f"{total:.4f}" for total in terms.total])
    ['0.8000', '0.0181', '0.0000']
    """
    for name, value in (("hard_weight", hard_weight), ("temperature", temperature)):
        if not 0 < value < float("inf"):
            raise ValueError(f"{name} must be finite and positive, got {value!r}.")

    def cost(d_ap: Array, d_an: Array, margin: Array) -> Array:
        contrast = jax.nn.softplus((d_ap - d_an) / temperature)
        return jnp.where(d_an < d_ap, hard_weight * (1 - d_an), contrast)

    return TripletCost(cost)


Hinge = Callable[[Array], Array] | TripletCost


@jitted(
    callables=("metric", "reduce_fn"),
    flags=("swap",),
    static=("hinge",),
    nonnegative=("margin",),
    optional=("reduce_fn",),
)
def triplet_margin_loss(
    anchors: ArrayLike,
    positives: ArrayLike,
    negatives: ArrayLike,
    *,
    margin: ArrayLike = 0.1,
    metric: Metric = euclidean,
    swap: bool = False,
    hinge: Hinge = jax.nn.relu,
    where: ArrayLike | None = None,
    reduce_fn: Reduction | None = mean_valid,
) -> Any:
    r"""The triplet loss of given triplets.

    $$\ell = h(d(a, p) - d(a, n) + \text{margin})$$

    Memory: O(n d).

    Args:
        anchors: vectors ``[..., t, d]``, or one vector ``[d]``.
        positives: vectors of the same shape.
        negatives: vectors of the same shape.
        margin: a scalar, in units of the metric.
        metric: a distance between vectors.
        swap: whether the positive takes the anchor's place where it is nearer to the
            negative: d(a, n) becomes min(d(a, n), d(p, n)).
        hinge: the cost of a gap: ``jax.nn.relu``, ``jax.nn.softplus`` (soft margin,
            usually with ``margin=0``), any elementwise function, or a `TripletCost`.
        where: bool ``[..., t]``, False for triplets that do not count.
        reduce_fn: from `TripletTerms` ``[..., t]`` to the result; None returns the
            terms.

    Returns:
        With the default `reduce_fn` the mean over the last axis of triplets, ``[...]``.

    Raises:
        TypeError: if an argument has the wrong dtype or is not callable.
        ValueError: if shapes differ, or the margin is negative or not finite.

    Requirements:
        Triplets of vectors. Easy triplets have no gradient with ``jax.nn.relu``: mine
        again during training.

    Settings:
        FaceNet (arXiv:1503.03832): margin 0.2 with `squared_euclidean` and unit norm.
        The code of Balntas et al. 2016 has margin 2 with swap, without unit norm.

    Relations:
        It equals `triplet_loss` of the same triplets. It is near PyTorch's
        ``TripletMarginLoss``, whose default margin is 1.

    References:
        Wang et al. Learning Fine-Grained Image Similarity with Deep Ranking. 2014.
        arXiv:1404.4661
        Balntas et al. Learning local feature descriptors with triplets and shallow
        convolutional neural networks. BMVC 2016 (swap)

    >>> import jax.numpy as jnp
    >>> import tripletjax as tj
    >>> a, p, n = jnp.zeros((2, 3)), jnp.ones((2, 3)), 2 * jnp.ones((2, 3))
    >>> print(f"{tj.triplet_margin_loss(a, p, n, margin=2.0):.4f}")
    0.2679
    """
    cost = as_cost(hinge)
    a, p, n = (jnp.asarray(x) for x in (anchors, positives, negatives))
    if not a.shape == p.shape == n.shape:
        raise ValueError(
            "anchors, positives and negatives must have one shape, got "
            f"{a.shape}, {p.shape} and {n.shape}."
        )
    d_ap, d_an = metric.paired(a, p), metric.paired(a, n)
    if swap:
        d_pn = metric.paired(p, n)
        d_an = jnp.where(d_pn < d_an, d_pn, d_an)
    valid = jnp.ones(d_ap.shape, bool)
    if where is not None:
        where = jnp.asarray(where)
        if where.dtype != bool:
            raise TypeError(f"where must be boolean, got dtype {where.dtype}.")
        if where.shape != d_ap.shape:
            raise ValueError(
                f"where must have one entry per triplet, {d_ap.shape}, got shape "
                f"{where.shape}."
            )
        valid = where
    costs = costs_of(d_ap, d_an, valid, as_margin(margin, d_ap), cost)
    return reduced(sums_of(costs[..., None], valid[..., None]), reduce_fn)


def check_indices(triplets: Any, n: int, m: int, *, hint: str) -> None:
    """Raise for indices that are out of range, if their values are on the host.

    Args:
        triplets: the triplets. Any other value is left to `as_triplets`.
        n: number of anchors.
        m: number of references.
        hint: end of the message.
    """
    if not isinstance(triplets, Triplets | CountedTriplets):
        return
    valid = values_at_hand(triplets.valid)
    if valid is None:
        return
    for name, indices, limit in zip(triplets._fields, triplets, (n, m, m)):
        indices = values_at_hand(indices)
        if (
            indices is None
            or indices.shape != valid.shape
            or indices.dtype.kind not in "iu"
        ):
            continue
        wrong = indices[valid.astype(bool) & ((indices < 0) | (indices >= limit))]
        if wrong.size:
            raise ValueError(
                f"triplets.{name} must be from 0 to {limit - 1}, got {wrong[0]}: {hint}"
            )


def check_triplets(triplets: Triplets, lead: tuple[int, ...], *, of: str) -> None:
    """Raise for triplets whose shapes or dtypes are wrong.

    Args:
        triplets: the triplets.
        lead: batch dimensions, with which their shape has to begin.
        of: the array that has these dimensions, and its shape.
    """
    shape = jnp.shape(triplets.valid)
    if any(jnp.shape(field) != shape for field in triplets):
        raise ValueError(
            "the fields of triplets must have one shape, got "
            f"{', '.join(str(jnp.shape(field)) for field in triplets)}."
        )
    if shape[: len(lead)] != lead or len(shape) == len(lead):
        raise ValueError(
            f"triplets must begin with the batch dimensions of {of}, got shape {shape}."
        )
    expected = (*[("integers", jnp.integer)] * 3, ("boolean", jnp.bool_))
    for name, field, (word, dtype) in zip(triplets._fields, triplets, expected):
        if not jnp.issubdtype(jnp.result_type(field), dtype):
            raise TypeError(
                f"triplets.{name} must be {word}, got dtype {jnp.result_type(field)}."
            )


def outside_as(limit: int, index: Array) -> Array:
    """Indices with `limit` instead of negative ones, which JAX would wrap."""
    return jnp.where(index < 0, jnp.asarray(limit, index.dtype), index)


def _check_triplets_of_distances(distances: Any, triplets: Any, **options: Any) -> None:
    shape = np.shape(distances)
    if len(shape) >= 2:
        hint = (
            f"distances has shape {shape}. If these are embeddings, use "
            "tripletjax.blockwise.triplet_loss."
        )
        check_indices(triplets, *shape[-2:], hint=hint)


@jitted(
    callables=("reduce_fn",),
    static=("hinge",),
    nonnegative=("margin",),
    check=_check_triplets_of_distances,
    optional=("reduce_fn",),
)
def triplet_loss(
    distances: ArrayLike,
    triplets: Triplets | CountedTriplets,
    *,
    margin: ArrayLike = 0.1,
    hinge: Hinge = jax.nn.relu,
    reduce_fn: Reduction | None = mean_valid,
) -> Any:
    r"""The triplet loss of mined triplets.

    $$\ell = h(d_{ap} - d_{an} + \text{margin})$$

    Memory: O(n m) for the gradient, and O(1) for each triplet.

    Args:
        distances: ``[..., n, m]``.
        triplets: `Triplets` of any miner: ``[..., k]`` or ``[..., n, k]``, where the
            leading dimensions are those of `distances`. Indices out of range give an
            error; those that are traced, over 65,536, or on an accelerator give NaN.
        margin: a scalar, in units of the distances.
        hinge: as in `triplet_margin_loss`.
        reduce_fn: from `TripletTerms` ``[..., n]`` to the result; None returns the
            terms.

    Returns:
        With the default `reduce_fn` the mean over all valid triplets, ``[...]``.

    Raises:
        TypeError: if an argument has the wrong dtype or is not callable.
        ValueError: if shapes do not fit, the margin is negative or not finite, or
            indices are out of range.

    Requirements:
        Triplets of a miner, such as `batch_hard_triplets`. Triplets that are not valid
        have no loss.

    Settings:
        FaceNet (arXiv:1503.03832): margin 0.2 with squared Euclidean distances of unit
        norm.

    Relations:
        With all triplets of a batch, the semi-hard or the hard ones, it equals
        `batch_all_loss`, `batch_semi_hard_loss` or `batch_hard_loss`.
        `triplet_margin_loss` takes vectors instead of indices.

    >>> import jax.numpy as jnp
    >>> import tripletjax as tj
    >>> d = tj.euclidean(jnp.array([[0.0], [1.0], [1.5]]))
    >>> triplets = tj.all_triplets(jnp.array([0, 0, 1]), size=10)
    >>> print(tj.triplet_loss(d, triplets, reduce_fn=None).total)
    [0.  0.6 0. ]
    """
    cost = as_cost(hinge)
    distances = as_distances(distances)
    triplets = as_triplets(triplets)
    batch = distances.shape[:-2]
    check_triplets(triplets, batch, of=f"distances, whose shape is {distances.shape}")

    # Indices out of range would be clipped, wrapped or dropped: they give NaN instead.
    def one(distances: Array, a: Array, p: Array, n: Array, valid: Array) -> tuple:
        at, (rows, columns) = distances.at, distances.shape
        a, p, n = map(outside_as, (rows, columns, columns), (a, p, n))
        d_ap = at[a, p].get(mode="fill", fill_value=jnp.nan)
        d_an = at[a, n].get(mode="fill", fill_value=jnp.nan)
        costs = costs_of(d_ap, d_an, valid, as_margin(margin, distances), cost)
        none = jnp.zeros_like(distances[:, 0])
        sums = (costs, costs > 0, valid)
        a = jnp.minimum(a, rows - 1)
        return tuple(none.at[a].add(x.astype(none.dtype)) for x in sums)

    flat = [jnp.reshape(field, (*batch, -1)) for field in triplets]
    terms = jnp.vectorize(one, signature="(n,m),(k),(k),(k),(k)->(n),(n),(n)")(
        distances, *flat
    )
    return reduced(TripletTerms(*terms), reduce_fn)


@jitted(
    callables=("reduce_fn",),
    static=("hinge",),
    nonnegative=("margin",),
    optional=("reduce_fn",),
    check=check_not_embeddings,
)
def batch_hard_loss(
    distances: ArrayLike,
    labels: ArrayLike | PairMasks,
    *,
    margin: ArrayLike = 0.1,
    hinge: Hinge = jax.nn.relu,
    reference_labels: ArrayLike | None = None,
    positions: ArrayLike | None = None,
    where: ArrayLike | None = None,
    reference_where: ArrayLike | None = None,
    reduce_fn: Reduction | None = mean_valid,
) -> Any:
    r"""The triplet loss of each anchor's farthest positive and nearest negative.

    $$\ell_a = h\Bigl(\max_{p \in P_a} d_{ap} - \min_{n \in N_a} d_{an}
      + \text{margin}\Bigr)$$

    From a cold start it is prone to collapse to one point, where every triplet costs
    the margin: warm up with `batch_all_loss`, or see `selectively_contrastive`.

    Memory: O(n m), at most the size of the distances.

    Args:
        distances: ``[..., n, m]``.
        labels: integers ``[..., n]``, or `PairMasks`.
        margin: a scalar, in units of the distances.
        hinge: as in `triplet_margin_loss`.
        reference_labels, positions, where, reference_where: as in `pair_masks`.
        reduce_fn: from `TripletTerms` ``[..., n]`` to the result; None returns the
            terms.

    Returns:
        With the default `reduce_fn` the mean over anchors that have a positive and a
        negative, ``[...]``.

    Raises:
        TypeError: if an argument has the wrong dtype or is not callable.
        ValueError: if shapes do not fit, there is no distance, or the margin is
            negative or not finite.

    Requirements:
        Two classes, and two items of one of them. An anchor without a positive or a
        negative has no loss.

    Settings:
        Hermans et al. 2017: ``hinge=jax.nn.softplus`` with ``margin=0``, 18 classes of
        4 images, and Adam with a learning rate of 3e-4 for a pretrained network. They
        take Euclidean distances without unit norm.

    Relations:
        It equals `triplet_loss` of `batch_hard_triplets`.
        `generalized_lifted_structure_loss` has a soft maximum and minimum instead.

    References:
        Hermans, Beyer, Leibe. In Defense of the Triplet Loss for Person
        Re-Identification. 2017. arXiv:1703.07737

    >>> import jax.numpy as jnp
    >>> import tripletjax as tj
    >>> d = tj.euclidean(jnp.array([[0.0], [1.0], [3.0], [3.5]]))
    >>> print(tj.batch_hard_loss(d, jnp.array([0, 0, 0, 1]), margin=1.0))
    1.5
    """
    cost = as_cost(hinge)
    distances = as_distances(distances)
    triplets = unjitted(batch_hard_triplets)(
        distances,
        labels,
        reference_labels=reference_labels,
        positions=positions,
        where=where,
        reference_where=reference_where,
    )
    d_ap = take(distances, triplets.positive)
    d_an = take(distances, triplets.negative)
    costs = costs_of(d_ap, d_an, triplets.valid, as_margin(margin, distances), cost)
    return reduced(sums_of(costs[..., None], triplets.valid[..., None]), reduce_fn)


@jitted(
    callables=("reduce_fn",),
    flags=("fallback",),
    static=("hinge",),
    nonnegative=("margin",),
    optional=("reduce_fn",),
    check=check_not_embeddings,
)
def batch_semi_hard_loss(
    distances: ArrayLike,
    labels: ArrayLike | PairMasks,
    *,
    margin: ArrayLike = 0.1,
    hinge: Hinge = jax.nn.relu,
    fallback: bool = True,
    reference_labels: ArrayLike | None = None,
    positions: ArrayLike | None = None,
    where: ArrayLike | None = None,
    reference_where: ArrayLike | None = None,
    reduce_fn: Reduction | None = mean_valid,
) -> Any:
    r"""The triplet loss of each positive pair with the nearest negative beyond it.

    $$\ell_a = \sum_{p \in P_a} h(d_{ap} - d_{a n_{ap}} + \text{margin})$$

    where $n_{ap}$ is the nearest negative strictly farther than the positive, and the
    farthest negative if there is none. `tripletjax.mining` lists the other published
    meanings of semi-hard.

    Memory: O(n m), at most 8 times the size of the distances.

    Args:
        distances: ``[..., n, m]``.
        labels: integers ``[..., n]``, or `PairMasks`.
        margin: a scalar, in units of the distances.
        hinge: as in `triplet_margin_loss`.
        fallback: if False, a pair without a negative beyond has no triplet.
        reference_labels, positions, where, reference_where: as in `pair_masks`.
        reduce_fn: from `TripletTerms` ``[..., n]`` to the result; None returns the
            terms.

    Returns:
        With the default `reduce_fn` the mean over anchor-positive pairs, ``[...]``.

    Raises:
        TypeError: if an argument has the wrong dtype or is not callable.
        ValueError: if shapes do not fit, there is no distance, or the margin is
            negative or not finite.

    Requirements:
        Two classes, and two items of one of them. Larger batches have nearer negatives.

    Settings:
        Schroff et al. 2015: margin 0.2 with `squared_euclidean` and unit norm, and
        AdaGrad with a learning rate of 0.05. Their batches had about 1,800 images, with
        about 40 of each person.

    Relations:
        It equals `triplet_loss` of `batch_semi_hard_triplets`. `batch_hard_loss` has
        one triplet for each anchor instead.

    References:
        Schroff, Kalenichenko, Philbin. FaceNet: A Unified Embedding for Face
        Recognition and Clustering. 2015. arXiv:1503.03832

    >>> import jax.numpy as jnp
    >>> import tripletjax as tj
    >>> d = tj.euclidean(jnp.array([[0.0], [2.0], [1.0], [3.0]]))
    >>> print(tj.batch_semi_hard_loss(d, jnp.array([0, 0, 1, 2]), margin=1.5))
    1.5
    """
    cost = as_cost(hinge)
    distances = as_distances(distances)
    triplets = unjitted(batch_semi_hard_triplets)(
        distances,
        labels,
        fallback=fallback,
        reference_labels=reference_labels,
        positions=positions,
        where=where,
        reference_where=reference_where,
    )
    # The positive of entry (a, p) is p.
    d_an = take(distances, triplets.negative)
    costs = costs_of(
        distances, d_an, triplets.valid, as_margin(margin, distances), cost
    )
    return reduced(sums_of(costs, triplets.valid), reduce_fn)


@jitted(
    callables=("reduce_fn",),
    static=("hinge",),
    nonnegative=("margin",),
    optional=("reduce_fn",),
    check=check_not_embeddings,
)
def batch_all_loss(
    distances: ArrayLike,
    labels: ArrayLike | PairMasks,
    *,
    margin: ArrayLike = 0.1,
    hinge: Hinge = jax.nn.relu,
    reference_labels: ArrayLike | None = None,
    positions: ArrayLike | None = None,
    where: ArrayLike | None = None,
    reference_where: ArrayLike | None = None,
    reduce_fn: Reduction | None = mean_active,
) -> Any:
    r"""The triplet loss of all triplets.

    $$\ell_a = \sum_{p \in P_a} \sum_{n \in N_a} h(d_{ap} - d_{an} + \text{margin})$$

    Exact in O(n m) memory: the positives of all anchors are taken one at a time, as
    many times as the anchor with the most of them has.

    Memory: O(n m), at most twice the size of the distances.

    Args:
        distances: ``[..., n, m]``.
        labels: integers ``[..., n]``, or `PairMasks`.
        margin: a scalar, in units of the distances.
        hinge: as in `triplet_margin_loss`.
        reference_labels, positions, where, reference_where: as in `pair_masks`.
        reduce_fn: from `TripletTerms` ``[..., n]`` to the result; None returns the
            terms.

    Returns:
        With the default `reduce_fn` the mean over triplets that cost anything,
        ``[...]``.

    Raises:
        TypeError: if an argument has the wrong dtype or is not callable.
        ValueError: if shapes do not fit, there is no distance, or the margin is
            negative or not finite.

    Requirements:
        Two classes, and two items of one of them. An anchor without a positive or a
        negative has no loss.

    Settings:
        Hermans et al. 2017: the mean over active triplets, the default, was better than
        the mean over all. Margins from 0.1 to 1 differed by at most 1.2 points of MAP.

    Relations:
        It equals `triplet_loss` of `all_triplets` with the same `reduce_fn`.
        `batch_hard_loss` takes only the hardest triplet of each anchor.

    References:
        Hermans, Beyer, Leibe. In Defense of the Triplet Loss for Person
        Re-Identification. 2017. arXiv:1703.07737

    >>> import jax.numpy as jnp
    >>> import tripletjax as tj
    >>> d = tj.euclidean(jnp.array([[0.0], [2.0], [1.0], [3.0]]))
    >>> print(tj.batch_all_loss(d, jnp.array([0, 0, 1, 1]), margin=0.5))
    1.5
    """
    cost = as_cost(hinge)
    distances = as_distances(distances)
    masks = masks_for(
        distances,
        labels,
        reference_labels=reference_labels,
        positions=positions,
        where=where,
        reference_where=reference_where,
    )
    # The margin per anchor, so that its gradient is known per anchor as well.
    margins = jnp.broadcast_to(as_margin(margin, distances), distances.shape[:-1])
    own = not closes_over_arrays(cost, distances.dtype)
    sums = batch_all_sums if own else batch_all_sums_by_autodiff
    total, active = sums(cost, distances, margins, *masks)
    return reduced(TripletTerms(total, active, count_all(masks, total)), reduce_fn)


def count_all(masks: PairMasks, like: Array) -> Array:
    """Number of triplets of each anchor, in the dtype of an array."""
    positives, negatives = (jnp.sum(mask, axis=-1, dtype=like.dtype) for mask in masks)
    return positives * negatives


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def batch_all_sums(
    cost: Cost, distances: Array, margins: Array, positive: Array, negative: Array
) -> tuple[Array, Array]:
    """Summed cost and number of active triplets per anchor."""

    def add(sums: tuple[Array, Array], column: Array, exists: Array):
        costs = _costs_with(cost, column, exists, distances, margins, negative)
        active = jnp.sum(costs > 0, axis=-1, dtype=costs.dtype)
        return sums[0] + jnp.sum(costs, axis=-1), sums[1] + active

    none = jnp.zeros_like(distances[..., 0])
    return for_each_true_column(positive, add, (none, none))


@batch_all_sums.defjvp
@own_promotion
def _batch_all_sums_jvp(cost: Cost, primals: tuple, tangents: tuple) -> tuple:
    # An anchor's loss depends on its own row and margin alone, so its derivative is a
    # product with one row of weights: that is all that reverse mode has to keep.
    distances_dot, margins_dot, *_ = tangents
    weights, margin_weights = _batch_all_weights(cost, *primals)
    total, active = batch_all_sums(cost, *primals)
    total_dot = jnp.sum(weights * distances_dot, axis=-1) + margin_weights * margins_dot
    return (total, active), (total_dot, jnp.zeros_like(active))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _batch_all_weights(
    cost: Cost, distances: Array, margins: Array, positive: Array, negative: Array
) -> tuple[Array, Array]:
    """The derivatives of an anchor's summed cost by its distances and its margin."""

    def add(weights: tuple[Array, Array], column: Array, exists: Array):
        def costs(distances: Array, margins: Array) -> Array:
            return _costs_with(cost, column, exists, distances, margins, negative)

        _, pull = jax.vjp(costs, distances, margins)
        return jax.tree.map(jnp.add, weights, pull(jnp.ones_like(distances)))

    none = (jnp.zeros_like(distances), jnp.zeros_like(distances[..., 0]))
    return for_each_true_column(positive, add, none)


@_batch_all_weights.defjvp
@own_promotion
def _batch_all_weights_jvp(cost: Cost, primals: tuple, tangents: tuple) -> tuple:
    # For second derivatives: over all columns in turn, a loop that can be
    # differentiated any number of times in either mode, but takes O(n m^2) time.
    distances, margins, positive, negative = primals

    def total(distances: Array, margins: Array) -> Array:
        @jax.checkpoint
        def add(total: Array, column: Array) -> tuple[Array, None]:
            exists = positive[..., column]
            columns = jnp.broadcast_to(column, exists.shape)
            costs = _costs_with(cost, columns, exists, distances, margins, negative)
            return total + jnp.sum(costs), None

        none = jnp.zeros_like(distances.ravel()[0])
        return jax.lax.scan(add, none, jnp.arange(distances.shape[-1]))[0]

    return jax.jvp(
        jax.grad(total, argnums=(0, 1)), (distances, margins), tuple(tangents[:2])
    )


# The numbers of positives for which `batch_all_sums_by_autodiff` has a loop: powers.
_LOOP_BASE = 8


def batch_all_sums_by_autodiff(
    cost: Cost, distances: Array, margins: Array, positive: Array, negative: Array
) -> tuple[Array, Array]:
    """`batch_all_sums` of a cost that closes over traced arrays.

    Reverse mode needs loops of a known length. The one that runs is the shortest that
    is long enough for the anchor with the most positives.
    """
    rank = jnp.cumsum(positive, axis=-1, dtype=jnp.int32)
    count = rank[..., -1]
    most = jnp.max(count)
    none = (jnp.zeros_like(distances[..., 0]),) * 2

    def of_positive(r: Array) -> tuple[Array, Array]:
        column = jnp.argmax(positive & (rank == r + 1), axis=-1)
        costs = _costs_with(cost, column, r < count, distances, margins, negative)
        active = jnp.sum(costs > 0, axis=-1, dtype=costs.dtype)
        return jnp.sum(costs, axis=-1), active

    @jax.checkpoint
    def of_positive_if_any(r: Array) -> tuple[Array, Array]:
        return jax.lax.cond(r < most, of_positive, lambda r: none, r)

    def loop(length: int) -> Callable[[], tuple[Array, Array]]:
        def add(sums: tuple, r: Array) -> tuple[tuple, None]:
            return jax.tree.map(jnp.add, sums, of_positive_if_any(r)), None

        return lambda: jax.lax.scan(add, none, jnp.arange(length))[0]

    lengths = [_LOOP_BASE]
    while lengths[-1] < distances.shape[-1]:
        lengths.append(lengths[-1] * _LOOP_BASE)
    lengths[-1] = min(lengths[-1], distances.shape[-1])
    which = jnp.searchsorted(jnp.asarray(lengths), most)
    return jax.lax.switch(which, [loop(length) for length in lengths])


def _costs_with(
    cost: Cost,
    column: Array,
    exists: Array,
    distances: Array,
    margins: Array,
    negative: Array,
) -> Array:
    """Costs of one positive of each anchor, where it exists, with all negatives."""
    d_ap = take(distances, column)[..., None]
    valid = negative & exists[..., None]
    return costs_of(d_ap, distances, valid, margins[..., None], cost)


def as_margin(margin: ArrayLike, distances: Array) -> Array:
    margin = jnp.asarray(margin)
    if margin.ndim:
        raise ValueError(
            f"margin must be a scalar, got shape {margin.shape}; use jax.vmap to sweep "
            "over several."
        )
    return margin.astype(distances.dtype)


def costs_of(
    d_ap: Array, d_an: Array, valid: Array, margin: Array, cost: Cost
) -> Array:
    """The cost of each triplet, 0 and without gradient where it is not valid."""
    d_ap, d_an = jnp.where(valid, d_ap, 0), jnp.where(valid, d_an, 0)
    if isinstance(cost, TripletCost):
        costs = cost.function(d_ap, d_an, margin)
    else:
        costs = cost.function(d_ap - d_an + margin)
    check_elementwise(costs, d_ap)
    return jnp.where(valid, costs, 0)


def check_elementwise(costs: Array, gaps: Array, *, name: str = "hinge") -> None:
    """Raise for costs of a function that have another shape than its argument."""
    shape = getattr(costs, "shape", None)
    if shape == gaps.shape:
        return
    result = f"a {type(costs).__name__}" if shape is None else f"shape {shape}"
    raise ValueError(
        f"{name} must be elementwise: for shape {gaps.shape} it returned {result}."
    )


def sums_of(costs: Array, valid: Array) -> TripletTerms:
    """The terms of anchors that have a row of triplets each."""
    terms = (costs, costs > 0, valid)
    return TripletTerms(*(jnp.sum(t, axis=-1, dtype=costs.dtype) for t in terms))
