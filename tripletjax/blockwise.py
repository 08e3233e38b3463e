r"""Exact losses and miners straight from embeddings, without a distance matrix.

The losses and miners of `tripletjax.losses` and `tripletjax.mining` with embeddings
instead of distances, in O(n d + n block) memory:

>>> import jax
>>> import jax.numpy as jnp
>>> import tripletjax as tj
>>> x = jax.random.normal(jax.random.key(0), (1000, 16))
>>> labels = jnp.arange(1000) // 4
>>> print(f"{tj.batch_hard_loss(tj.euclidean(x), labels, margin=0.2):.4f}")
3.5414
>>> print(f"{tj.blockwise.batch_hard_loss(x, labels, margin=0.2):.4f}")
3.5414

Distances of positives and of mined pairs come from the differences of the vectors. They
are right where two vectors nearly coincide, and a distance matrix has no digits left.
Among negatives that are equally far up to rounding, the two forms may choose different
ones.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from tripletjax import losses
from tripletjax._api import as_integer, jitted
from tripletjax._blockwise_pairs import (
    arcface_loss,
    circle_loss,
    contrastive_loss,
    cosface_loss,
    decoupled_contrastive_loss,
    generalized_lifted_structure_loss,
    info_nce_loss,
    log_sum_exp_loss,
    margin_loss,
    multi_similarity_loss,
    nca_loss,
    nt_xent_loss,
    proxy_anchor_loss,
    separable_loss,
    sigmoid_loss,
    smooth_ap_loss,
    supcon_loss,
)
from tripletjax._engine.by_autodiff import (
    needs_autodiff,
    terms_by_autodiff,
    terms_of_triplets,
)
from tripletjax._engine.derivatives import terms_per_anchor, total_terms
from tripletjax._engine.spec import LossSpec, Mining
from tripletjax._engine.terms import hard_triplets, semi_hard_triplets
from tripletjax._matrices import check_not_distances
from tripletjax._pairwise.batch import (
    Batch,
    as_batch,
    as_pair_of_vectors,
    for_each_batch,
)
from tripletjax._pairwise.mesh import AxisName, gather_terms
from tripletjax._pairwise.over_mesh import over_mesh, without_padding
from tripletjax.distances import Metric, euclidean
from tripletjax.losses import (
    Hinge,
    Reduction,
    SumReduction,
    TripletTerms,
    as_cost,
    as_margin,
    check_indices,
    check_triplets,
    mean_active,
    mean_valid,
    reduced,
)
from tripletjax.mining import CountedTriplets, Triplets, as_triplets
from tripletjax.pairs import PairMasks

__all__ = [
    "arcface_loss",
    "batch_all_loss",
    "batch_hard_loss",
    "batch_hard_triplets",
    "batch_semi_hard_loss",
    "batch_semi_hard_triplets",
    "circle_loss",
    "contrastive_loss",
    "cosface_loss",
    "decoupled_contrastive_loss",
    "generalized_lifted_structure_loss",
    "info_nce_loss",
    "log_sum_exp_loss",
    "margin_loss",
    "multi_similarity_loss",
    "nca_loss",
    "nt_xent_loss",
    "proxy_anchor_loss",
    "separable_loss",
    "sigmoid_loss",
    "smooth_ap_loss",
    "supcon_loss",
    "triplet_loss",
]

P = ParamSpec("P")
R = TypeVar("R")


def _terms_of_anchors(result: Any, n: int, options: dict[str, Any]) -> Any:
    """The result of a loss over a mesh; terms lose the rows of padding."""
    if options.get("reduce_fn", mean_valid) is not None:
        return result
    return without_padding(result, n, options)


def _with_sections(function: Callable[P, R]) -> Callable[P, R]:
    """Add the docstring of the form of distances, from Requirements to References."""
    of_distances = inspect.getdoc(getattr(losses, function.__name__)) or ""
    _, title, sections = of_distances.partition("Requirements:")
    sections, _, _ = sections.partition(">>> ")
    text, prompt, example = inspect.cleandoc(function.__doc__ or "").partition(">>> ")
    function.__doc__ = text + title + sections + prompt + example
    return function


def _blockwise_loss(
    *, flags: tuple[str, ...] = ()
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Jit a loss of embeddings, and split its work over a mesh.

    Args:
        flags: options that must be booleans.
    """
    compiled = jitted(
        callables=("metric", "reduce_fn"),
        flags=flags,
        static=("hinge", "axis_name", "block_size"),
        nonnegative=("margin",),
        optional=("reduce_fn",),
        check=check_not_distances,
    )
    split = over_mesh(together=_terms_of_anchors)
    return lambda function: split(compiled(_with_sections(function)))


@_blockwise_loss()
def batch_all_loss(
    embeddings: ArrayLike,
    labels: ArrayLike | PairMasks,
    *,
    metric: Metric = euclidean,
    margin: ArrayLike = 0.1,
    hinge: Hinge = jax.nn.relu,
    references: ArrayLike | None = None,
    reference_labels: ArrayLike | None = None,
    positions: ArrayLike | None = None,
    where: ArrayLike | None = None,
    reference_where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
    block_size: int | None = None,
    reduce_fn: Reduction | None = mean_active,
) -> Any:
    r"""The triplet loss of all triplets, straight from embeddings.

    $$\ell_a = \sum_{p \in P_a} \sum_{n \in N_a} h(d_{ap} - d_{an} + \text{margin})$$

    `tripletjax.batch_all_loss` without the distance matrix.

    Memory: O(n d + m d + block_size^2), also of the gradient.

    Args:
        embeddings: vectors of anchors ``[..., n, d]``.
        labels: integers ``[..., n]``, or `PairMasks`.
        metric: a distance between vectors.
        margin: a scalar, in units of the metric.
        hinge: as in `triplet_margin_loss`.
        references: vectors ``[..., m, d]``, with `reference_labels`. If not given, the
            anchors are their own references.
        reference_labels, positions, where, reference_where: as in `pair_masks`.
        axis_name: the mesh axes over which the batch is split. Each device mines its
            anchors against the references of all devices, and all devices get the
            same result. `positions` count along the references of all devices.
        block_size: vectors on each side of a block of pairs. If not given, 512 on CPUs
            and 2,048 on accelerators. The result does not depend on it.
        reduce_fn: from `TripletTerms` ``[..., n]`` to the result; None returns the
            terms. With a `SumReduction`, such as `mean_valid` and `mean_active`, one
            walk over the pairs gives value and gradient. With any other function, the
            gradient takes a second walk and reverse mode.

    Returns:
        With the default `reduce_fn` the mean over triplets that cost anything,
        ``[...]``.

    Raises:
        TypeError: if an argument has the wrong dtype or is not callable.
        ValueError: if shapes do not fit, or the margin is negative or not finite.

    >>> import jax.numpy as jnp
    >>> import tripletjax as tj
    >>> x = jnp.array([[0.0], [2.0], [1.0], [3.0]])
    >>> print(tj.blockwise.batch_all_loss(x, jnp.array([0, 0, 1, 1]), margin=0.5))
    1.5
    """
    return _loss(
        Mining.ALL,
        embeddings,
        labels,
        metric=metric,
        margin=margin,
        hinge=hinge,
        references=references,
        reference_labels=reference_labels,
        positions=positions,
        where=where,
        reference_where=reference_where,
        axis_name=axis_name,
        block_size=block_size,
        reduce_fn=reduce_fn,
    )


@_blockwise_loss()
def batch_hard_loss(
    embeddings: ArrayLike,
    labels: ArrayLike | PairMasks,
    *,
    metric: Metric = euclidean,
    margin: ArrayLike = 0.1,
    hinge: Hinge = jax.nn.relu,
    references: ArrayLike | None = None,
    reference_labels: ArrayLike | None = None,
    positions: ArrayLike | None = None,
    where: ArrayLike | None = None,
    reference_where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
    block_size: int | None = None,
    reduce_fn: Reduction | None = mean_valid,
) -> Any:
    r"""The triplet loss of each anchor's farthest positive and nearest negative.

    $$\ell_a = h\Bigl(\max_{p \in P_a} d_{ap} - \min_{n \in N_a} d_{an}
      + \text{margin}\Bigr)$$

    `tripletjax.batch_hard_loss` without the distance matrix.

    Memory: O(n d + m d + block_size^2), also of the gradient.

    Args:
        embeddings: vectors of anchors ``[..., n, d]``.
        labels: integers ``[..., n]``, or `PairMasks`.
        metric, margin, hinge: as in `batch_all_loss`.
        references: vectors ``[..., m, d]``, or None, as in `batch_all_loss`.
        reference_labels, positions, where, reference_where: as in `pair_masks`.
        axis_name, block_size: as in `batch_all_loss`.
        reduce_fn: from `TripletTerms` ``[..., n]`` to the result, as in
            `batch_all_loss`; None returns the terms.

    Returns:
        With the default `reduce_fn` the mean over anchors that have a positive and a
        negative, ``[...]``.

    Raises:
        TypeError: if an argument has the wrong dtype or is not callable.
        ValueError: if shapes do not fit, or the margin is negative or not finite.

    >>> import jax.numpy as jnp
    >>> import tripletjax as tj
    >>> x = jnp.array([[0.0], [1.0], [3.0], [3.5]])
    >>> print(tj.blockwise.batch_hard_loss(x, jnp.array([0, 0, 0, 1]), margin=1.0))
    1.5
    """
    return _loss(
        Mining.HARD,
        embeddings,
        labels,
        metric=metric,
        margin=margin,
        hinge=hinge,
        references=references,
        reference_labels=reference_labels,
        positions=positions,
        where=where,
        reference_where=reference_where,
        axis_name=axis_name,
        block_size=block_size,
        reduce_fn=reduce_fn,
    )


@_blockwise_loss(flags=("fallback",))
def batch_semi_hard_loss(
    embeddings: ArrayLike,
    labels: ArrayLike | PairMasks,
    *,
    metric: Metric = euclidean,
    margin: ArrayLike = 0.1,
    hinge: Hinge = jax.nn.relu,
    fallback: bool = True,
    references: ArrayLike | None = None,
    reference_labels: ArrayLike | None = None,
    positions: ArrayLike | None = None,
    where: ArrayLike | None = None,
    reference_where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
    block_size: int | None = None,
    reduce_fn: Reduction | None = mean_valid,
) -> Any:
    r"""The triplet loss of each positive pair with the nearest negative beyond it.

    $$\ell_a = \sum_{p \in P_a} h(d_{ap} - d_{a n_{ap}} + \text{margin})$$

    `tripletjax.batch_semi_hard_loss`, which defines that negative, without the distance
    matrix.

    Memory: O(n d + m d + block_size^2), also of the gradient.

    Args:
        embeddings: vectors of anchors ``[..., n, d]``.
        labels: integers ``[..., n]``, or `PairMasks`.
        metric, margin, hinge: as in `batch_all_loss`.
        fallback: if False, a pair without a negative beyond has no triplet.
        references: vectors ``[..., m, d]``, or None, as in `batch_all_loss`.
        reference_labels, positions, where, reference_where: as in `pair_masks`.
        axis_name, block_size: as in `batch_all_loss`.
        reduce_fn: from `TripletTerms` ``[..., n]`` to the result, as in
            `batch_all_loss`; None returns the terms.

    Returns:
        With the default `reduce_fn` the mean over anchor-positive pairs, ``[...]``.

    Raises:
        TypeError: if an argument has the wrong dtype or is not callable.
        ValueError: if shapes do not fit, or the margin is negative or not finite.

    >>> import jax.numpy as jnp
    >>> import tripletjax as tj
    >>> x = jnp.array([[0.0], [2.0], [1.0], [3.0]])
    >>> print(tj.blockwise.batch_semi_hard_loss(x, jnp.array([0, 0, 1, 2]), margin=1.5))
    1.5
    """
    return _loss(
        Mining.SEMI_HARD,
        embeddings,
        labels,
        metric=metric,
        margin=margin,
        hinge=hinge,
        fallback=fallback,
        references=references,
        reference_labels=reference_labels,
        positions=positions,
        where=where,
        reference_where=reference_where,
        axis_name=axis_name,
        block_size=block_size,
        reduce_fn=reduce_fn,
    )


def _check_triplets_of_embeddings(
    embeddings: Any,
    triplets: Any,
    *,
    references: Any = None,
    **options: Any,
) -> None:
    shapes = [np.shape(x) for x in (embeddings, references) if x is not None]
    if all(len(shape) >= 2 for shape in shapes):
        n, m = shapes[0][-2], shapes[-1][-2]
        hint = f"there are {n} embeddings and {m} references."
        check_indices(triplets, n, m, hint=hint)


@jitted(
    callables=("metric", "reduce_fn"),
    static=("hinge",),
    nonnegative=("margin",),
    optional=("reduce_fn",),
    check=_check_triplets_of_embeddings,
)
@_with_sections
def triplet_loss(
    embeddings: ArrayLike,
    triplets: Triplets | CountedTriplets,
    *,
    references: ArrayLike | None = None,
    metric: Metric = euclidean,
    margin: ArrayLike = 0.1,
    hinge: Hinge = jax.nn.relu,
    reduce_fn: Reduction | None = mean_valid,
) -> Any:
    r"""The triplet loss of mined triplets, straight from embeddings.

    $$\ell = h(d_{ap} - d_{an} + \text{margin})$$

    `tripletjax.triplet_loss` without the distance matrix. Only the distances of the
    triplets' pairs are computed, from the differences of their vectors, some triplets
    at a time.

    Memory: O(n d + m d), and O(d) for each triplet.

    Args:
        embeddings: vectors of anchors ``[..., n, d]``.
        triplets: `Triplets` of any miner: ``[..., k]`` or ``[..., n, k]``, where the
            leading dimensions are those of `embeddings`. Positives and negatives are
            indices of references. Indices out of range give an error; those that are
            traced, over 65,536, or on an accelerator give NaN.
        references: vectors ``[..., m, d]``. If not given, the anchors are their own
            references.
        metric: a distance between vectors.
        margin: a scalar, in units of the metric.
        hinge: as in `triplet_margin_loss`.
        reduce_fn: from `TripletTerms` ``[..., n]`` to the result; None returns the
            terms.

    Returns:
        With the default `reduce_fn` the mean over all valid triplets, ``[...]``.

    Raises:
        TypeError: if an argument has the wrong dtype or is not callable.
        ValueError: if shapes do not fit, the margin is negative or not finite, or
            indices are out of range.

    >>> import jax.numpy as jnp
    >>> import tripletjax as tj
    >>> x, labels = jnp.array([[0.0], [1.0], [1.5]]), jnp.array([0, 0, 1])
    >>> triplets = tj.blockwise.batch_hard_triplets(x, labels)
    >>> print(tj.blockwise.triplet_loss(x, triplets, reduce_fn=None).total)
    [0.  0.6 0. ]
    """
    cost = as_cost(hinge)
    x, y = as_pair_of_vectors(metric, embeddings, references)
    lead = x.shape[:-2]
    triplets = as_triplets(triplets)
    check_triplets(triplets, lead, of=f"embeddings, whose shape is {x.shape}")
    margins = jnp.broadcast_to(as_margin(margin, x), lead)
    flat = [jnp.reshape(field, (*lead, -1)) for field in triplets]

    def one(parts: tuple) -> TripletTerms:
        x, y, margin, triplets = parts
        return terms_of_triplets(metric, cost, x, y, margin, triplets)

    terms = for_each_batch(lead, one, (x, y, margins, flat))
    return reduced(terms, reduce_fn)


def _from_first_row(
    triplets: Triplets | CountedTriplets, first: Array
) -> Triplets | CountedTriplets:
    """The triplets of a device, with indices of anchors among those of all devices."""
    triplets = triplets._replace(anchor=triplets.anchor + first)
    if isinstance(triplets, CountedTriplets):
        return triplets._replace(count=triplets.count[None])
    return triplets


def _compacted(
    triplets: CountedTriplets, n: int, options: dict[str, Any]
) -> CountedTriplets:
    """The first `size` triplets of all devices, in order of the devices."""
    size = options["size"]
    (slots,) = jnp.nonzero(triplets.valid, size=size, fill_value=len(triplets.valid))
    anchor, positive, negative = (
        x.at[slots].get(mode="fill", fill_value=0) for x in triplets[:3]
    )
    count = jnp.sum(triplets.count)
    return CountedTriplets(anchor, positive, negative, jnp.arange(size) < count, count)


@over_mesh(of_device=_from_first_row, together=without_padding)
@jitted(
    callables=("metric",),
    static=("axis_name", "block_size"),
)
def batch_hard_triplets(
    embeddings: ArrayLike,
    labels: ArrayLike | PairMasks,
    *,
    metric: Metric = euclidean,
    references: ArrayLike | None = None,
    reference_labels: ArrayLike | None = None,
    positions: ArrayLike | None = None,
    where: ArrayLike | None = None,
    reference_where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
    block_size: int | None = None,
) -> Triplets:
    r"""For each anchor its farthest positive and its nearest negative.

    $$p_a = \arg\max_{p \in P_a} d_{ap}, \qquad n_a = \arg\min_{n \in N_a} d_{an}$$

    `tripletjax.batch_hard_triplets` without the distance matrix.

    Memory: O(n d + m d + block_size^2).

    Args:
        embeddings: vectors of anchors ``[..., n, d]``.
        labels: integers ``[..., n]``, or `PairMasks`.
        metric, references, axis_name, block_size: as in `batch_all_loss`.
        reference_labels, positions, where, reference_where: as in `pair_masks`.

    Returns:
        Triplets ``[..., n]``, one per anchor.

    Raises:
        TypeError: if an argument has the wrong dtype.
        ValueError: if shapes do not fit.

    References:
        Hermans, Beyer, Leibe. In Defense of the Triplet Loss for Person
        Re-Identification. 2017. arXiv:1703.07737

    >>> import jax.numpy as jnp
    >>> import tripletjax as tj
    >>> x = jnp.array([[0.0], [1.0], [3.0], [4.0]])
    >>> triplets = tj.blockwise.batch_hard_triplets(x, jnp.array([0, 0, 0, 1]))
    >>> print(triplets.positive[:3], triplets.negative[:3], triplets.valid)
    [2 2 0] [3 3 3] [ True  True  True False]
    """
    spec = _spec(Mining.HARD, metric, block_size=block_size)
    batch, lead = as_batch(
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
    return for_each_batch(lead, functools.partial(hard_triplets, spec), batch)


@over_mesh(of_device=_from_first_row, together=_compacted)
@jitted(
    callables=("metric",),
    flags=("fallback",),
    sizes=("size",),
    static=("axis_name", "block_size"),
)
def batch_semi_hard_triplets(
    embeddings: ArrayLike,
    labels: ArrayLike | PairMasks,
    *,
    size: int,
    metric: Metric = euclidean,
    fallback: bool = True,
    references: ArrayLike | None = None,
    reference_labels: ArrayLike | None = None,
    positions: ArrayLike | None = None,
    where: ArrayLike | None = None,
    reference_where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
    block_size: int | None = None,
) -> CountedTriplets:
    r"""For each anchor-positive pair the nearest negative beyond the positive.

    $$n_{ap} = \arg\min_{n \in N_a,\; d_{an} > d_{ap}} d_{an}$$

    `tripletjax.batch_semi_hard_triplets` without the distance matrix. There the
    triplets have the matrix's shape; here they are compacted to a fixed size.

    Memory: O(n d + m d + block_size^2 + size).

    Args:
        embeddings: vectors of anchors ``[..., n, d]``.
        labels: integers ``[..., n]``, or `PairMasks`.
        size: the most triplets to return: n (K - 1) for classes of K.
        fallback: if False, a pair without a negative beyond has no triplet.
        metric, references, axis_name, block_size: as in `batch_all_loss`.
        reference_labels, positions, where, reference_where: as in `pair_masks`.

    Returns:
        `CountedTriplets` ``[..., size]``, in order of anchor, then positive. A `count`
        over `size` means that the rest was left out.

    Raises:
        TypeError: if an argument has the wrong dtype.
        ValueError: if shapes do not fit, or `size` is not positive.

    References:
        Schroff, Kalenichenko, Philbin. FaceNet: A Unified Embedding for Face
        Recognition and Clustering. 2015. arXiv:1503.03832

    >>> import jax.numpy as jnp
    >>> import tripletjax as tj
    >>> x = jnp.array([[0.0], [2.0], [1.0], [3.0]])
    >>> triplets = tj.blockwise.batch_semi_hard_triplets(
    ...     x, jnp.array([0, 0, 1, 2]), size=3)
    >>> print(triplets.anchor, triplets.negative, triplets.count)
    [0 1 0] [3 2 0] 2
    """
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}.")
    spec = _spec(Mining.SEMI_HARD, metric, fallback=fallback, block_size=block_size)
    batch, lead = as_batch(
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
    mine = functools.partial(semi_hard_triplets, spec, size=size)
    return for_each_batch(lead, mine, batch)


def _spec(
    mining: Mining,
    metric: Metric,
    *,
    hinge: Hinge = jax.nn.relu,
    fallback: bool = True,
    block_size: int | None,
) -> LossSpec:
    cost = as_cost(hinge)
    if block_size is not None:
        block_size = as_integer("block_size", block_size)
        if block_size < 1:
            raise ValueError(f"block_size must be at least 1, got {block_size}.")
    return LossSpec(mining, metric, cost, fallback, block_size=block_size)


def _loss(
    mining: Mining,
    embeddings: ArrayLike,
    labels: ArrayLike | PairMasks,
    *,
    metric: Metric,
    margin: ArrayLike,
    hinge: Hinge,
    fallback: bool = True,
    axis_name: AxisName | None,
    block_size: int | None,
    reduce_fn: Reduction | None,
    **pairs: Any,
) -> Any:
    spec = _spec(mining, metric, hinge=hinge, fallback=fallback, block_size=block_size)
    batch, lead = as_batch(metric, embeddings, labels, axis_name=axis_name, **pairs)
    margin = jnp.broadcast_to(as_margin(margin, batch.anchors), lead)

    def one(batch_and_margin: tuple[Batch, Array]) -> Any:
        batch, margin = _varying(*batch_and_margin)
        by_autodiff = needs_autodiff(spec, batch)
        if isinstance(reduce_fn, SumReduction) and not by_autodiff:
            sums = total_terms(spec, batch, margin)
            if axis_name is not None:
                sums = lax.psum(sums, axis_name)
            return reduce_fn.of_sums(sums)
        terms_of = terms_by_autodiff if by_autodiff else terms_per_anchor
        terms = terms_of(spec, batch, margin)
        if axis_name is not None:
            terms = gather_terms(terms, axis_name)
        return reduced(terms, reduce_fn)

    return for_each_batch(lead, one, (batch, margin))


def _varying(batch: Batch, margin: Array) -> tuple[Batch, Array]:
    """Batch and margin, all of which vary over the same mesh axes inside shard_map."""
    zero = sum(
        jnp.zeros_like(leaf[(0,) * leaf.ndim]).astype(batch.anchors.dtype)
        for leaf in jax.tree.leaves((batch, margin))
    )
    references = batch.references
    if references is not None:
        references = references + zero
    batch = batch._replace(anchors=batch.anchors + zero, references=references)
    return batch, margin + zero
