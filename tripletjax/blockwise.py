r"""What it costs, straight from embeddings: exact losses without a distance matrix.

The losses and miners of `tripletjax.losses` and `tripletjax.mining` with embeddings in
place of distances, in O(n d + n block) memory:

>>> import jax
>>> import jax.numpy as jnp
>>> import tripletjax as tj
>>> x = jax.random.normal(jax.random.key(0), (1000, 16))
>>> labels = jnp.arange(1000) // 4
>>> print(f"{tj.batch_hard_loss(tj.euclidean(x), labels, margin=0.2):.4f}")
3.5414
>>> print(f"{tj.blockwise.batch_hard_loss(x, labels, margin=0.2):.4f}")
3.5414

They keep digits that a distance matrix does not have: distances of positives and of
mined pairs are taken from the differences of the vectors, so that they are right also
where two vectors nearly coincide. Of negatives that are equally far up to rounding, the
two forms may choose different ones.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from tripletjax import blocks, losses
from tripletjax._api import as_integer, jitted, own_promotion
from tripletjax.blocks import Batch, Gradients, Kind, Task
from tripletjax.distances import Metric, as_vectors, euclidean
from tripletjax.losses import (
    Hinge,
    Reduction,
    TripletTerms,
    as_hinge,
    as_margin,
    mean_active,
    mean_valid,
    needs_sums_alone,
    reduced,
)
from tripletjax.mining import CountedTriplets, Triplets
from tripletjax.pairs import PairMasks, as_boolean, as_labels, per_item

AxisName = str | tuple[str, ...]

FLOATS = Gradients._fields


@jitted(
    callables=("metric", "reduce_fn"),
    static=("hinge", "axis_name", "block_size"),
    nonnegative=("margin",),
    optional=("reduce_fn",),
)
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

    Args:
        embeddings: vectors of anchors ``[..., n, d]``.
        labels: integers ``[..., n]``, or `PairMasks`.
        metric: how far two vectors are apart.
        margin: a scalar, in units of the metric.
        hinge: as in `triplet_margin_loss`.
        references: vectors ``[..., m, d]``, with `reference_labels`. If not given, the
            anchors are their own references.
        reference_labels, positions, where, reference_where: as in `pair_masks`.
        axis_name: inside ``jax.shard_map``, the mesh axes over which the batch is
            split: every device mines against the references of all, and all get the
            same result. `positions` count along the references of all.
        block_size: how many vectors are compared with how many at a time. The result
            does not depend on it.
        reduce_fn: from `TripletTerms` ``[..., n]`` to the result; None returns the
            terms. With `mean_valid`, `mean_active` and any `SumReduction` the gradient
            is made along with the value, with others by a second pass and in reverse
            mode only.

    Returns:
        With the default `reduce_fn` the mean over triplets that cost anything,
        ``[...]``.

    Raises:
        TypeError: if an argument has the wrong dtype or is not callable.
        ValueError: if shapes do not fit, or the margin is negative or not finite.

    References:
        Hermans, Beyer, Leibe. In Defense of the Triplet Loss for Person
        Re-Identification. 2017. arXiv:1703.07737

    >>> import jax.numpy as jnp
    >>> import tripletjax as tj
    >>> x = jnp.array([[0.0], [2.0], [1.0], [3.0]])
    >>> print(tj.blockwise.batch_all_loss(x, jnp.array([0, 0, 1, 1]), margin=0.5))
    1.5
    """
    return _loss(
        Kind.ALL,
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


@jitted(
    callables=("metric", "reduce_fn"),
    static=("hinge", "axis_name", "block_size"),
    nonnegative=("margin",),
    optional=("reduce_fn",),
)
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

    Args:
        embeddings: vectors of anchors ``[..., n, d]``.
        labels: integers ``[..., n]``, or `PairMasks`.
        metric: how far two vectors are apart.
        margin: a scalar, in units of the metric.
        hinge: as in `triplet_margin_loss`.
        references: vectors ``[..., m, d]``, with `reference_labels`. If not given, the
            anchors are their own references.
        reference_labels, positions, where, reference_where: as in `pair_masks`.
        axis_name: inside ``jax.shard_map``, the mesh axes over which the batch is
            split: every device mines against the references of all, and all get the
            same result. `positions` count along the references of all.
        block_size: how many vectors are compared with how many at a time. The result
            does not depend on it.
        reduce_fn: from `TripletTerms` ``[..., n]`` to the result; None returns the
            terms. With `mean_valid`, `mean_active` and any `SumReduction` the gradient
            is made along with the value, with others by a second pass and in reverse
            mode only.

    Returns:
        With the default `reduce_fn` the mean over anchors that have a positive and a
        negative, ``[...]``.

    Raises:
        TypeError: if an argument has the wrong dtype or is not callable.
        ValueError: if shapes do not fit, or the margin is negative or not finite.

    References:
        Hermans, Beyer, Leibe. In Defense of the Triplet Loss for Person
        Re-Identification. 2017. arXiv:1703.07737

    >>> import jax.numpy as jnp
    >>> import tripletjax as tj
    >>> x = jnp.array([[0.0], [1.0], [3.0], [3.5]])
    >>> print(tj.blockwise.batch_hard_loss(x, jnp.array([0, 0, 0, 1]), margin=1.0))
    1.5
    """
    return _loss(
        Kind.HARD,
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


@jitted(
    callables=("metric", "reduce_fn"),
    flags=("fallback",),
    static=("hinge", "axis_name", "block_size"),
    nonnegative=("margin",),
    optional=("reduce_fn",),
)
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

    `tripletjax.batch_semi_hard_loss` without the distance matrix. There it says which
    negative that is.

    Args:
        embeddings: vectors of anchors ``[..., n, d]``.
        labels: integers ``[..., n]``, or `PairMasks`.
        metric: how far two vectors are apart.
        margin: a scalar, in units of the metric.
        hinge: as in `triplet_margin_loss`.
        fallback: if False, a pair without a negative beyond has no triplet.
        references: vectors ``[..., m, d]``, with `reference_labels`. If not given, the
            anchors are their own references.
        reference_labels, positions, where, reference_where: as in `pair_masks`.
        axis_name: inside ``jax.shard_map``, the mesh axes over which the batch is
            split: every device mines against the references of all, and all get the
            same result. `positions` count along the references of all.
        block_size: how many vectors are compared with how many at a time. The result
            does not depend on it.
        reduce_fn: from `TripletTerms` ``[..., n]`` to the result; None returns the
            terms. With `mean_valid`, `mean_active` and any `SumReduction` the gradient
            is made along with the value, with others by a second pass and in reverse
            mode only.

    Returns:
        With the default `reduce_fn` the mean over anchor-positive pairs, ``[...]``.

    Raises:
        TypeError: if an argument has the wrong dtype or is not callable.
        ValueError: if shapes do not fit, or the margin is negative or not finite.

    References:
        Schroff, Kalenichenko, Philbin. FaceNet: A Unified Embedding for Face
        Recognition and Clustering. 2015. arXiv:1503.03832

    >>> import jax.numpy as jnp
    >>> import tripletjax as tj
    >>> x = jnp.array([[0.0], [2.0], [1.0], [3.0]])
    >>> print(tj.blockwise.batch_semi_hard_loss(x, jnp.array([0, 0, 1, 2]), margin=1.5))
    1.5
    """
    return _loss(
        Kind.SEMI_HARD,
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

    Args:
        embeddings: vectors of anchors ``[..., n, d]``.
        labels: integers ``[..., n]``, or `PairMasks`.
        metric, references, axis_name, block_size: as in `batch_hard_loss`.
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
    task = _task(Kind.HARD, metric, block_size=block_size)
    batch, lead = as_batch(
        task,
        embeddings,
        labels,
        references=references,
        reference_labels=reference_labels,
        positions=positions,
        where=where,
        reference_where=reference_where,
        axis_name=axis_name,
    )
    return _each(lead, lambda batch: blocks.hard_triplets(task, batch), batch)


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

    Args:
        embeddings: vectors of anchors ``[..., n, d]``.
        labels: integers ``[..., n]``, or `PairMasks`.
        size: how many triplets there is room for: n (K - 1) for classes of K.
        fallback: if False, a pair without a negative beyond has no triplet.
        metric, references, axis_name, block_size: as in `batch_semi_hard_loss`.
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
    task = _task(Kind.SEMI_HARD, metric, fallback=fallback, block_size=block_size)
    batch, lead = as_batch(
        task,
        embeddings,
        labels,
        references=references,
        reference_labels=reference_labels,
        positions=positions,
        where=where,
        reference_where=reference_where,
        axis_name=axis_name,
    )
    return _each(
        lead, lambda batch: blocks.semi_hard_triplets(task, batch, size), batch
    )


def _task(
    kind: Kind,
    metric: Metric,
    *,
    hinge: Hinge = jax.nn.relu,
    fallback: bool = True,
    block_size: int | None,
) -> Task:
    hinge = as_hinge(hinge)
    if block_size is None:
        block_size = blocks.BLOCK_SIZE
    block_size = as_integer("block_size", block_size)
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size}.")
    return Task(kind, metric, hinge, fallback, block_size)


def _loss(
    kind: Kind,
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
    **pairs: ArrayLike | None,
) -> Any:
    task = _task(kind, metric, hinge=hinge, fallback=fallback, block_size=block_size)
    batch, lead = as_batch(
        task, embeddings, labels, axis_name=axis_name, margin=margin, **pairs
    )

    def one(batch: Batch) -> Any:
        batch = _varying(batch)
        n = len(batch.anchors)
        if axis_name is not None:
            n *= lax.axis_size(axis_name)
        if reduce_fn is not None and needs_sums_alone(
            reduce_fn, n, batch.anchors.dtype
        ):
            # It treats all anchors alike, so that the gradient of the plain total is
            # its own but for a factor. The first stands for all.
            sums = _total(task, batch)
            if axis_name is not None:
                sums = lax.psum(sums, axis_name)
            return reduce_fn(
                TripletTerms(*(jnp.pad(x[None], (0, n - 1)) for x in sums))
            )
        terms = _terms(task, batch)
        if axis_name is not None:
            terms = TripletTerms(*(_gathered(x, axis_name) for x in terms))
        return reduced(terms, reduce_fn)

    return _each(lead, one, batch)


def as_batch(
    task: Task,
    embeddings: ArrayLike,
    labels: ArrayLike | PairMasks,
    *,
    references: ArrayLike | None = None,
    reference_labels: ArrayLike | None = None,
    positions: ArrayLike | None = None,
    where: ArrayLike | None = None,
    reference_where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
    margin: ArrayLike = 0.0,
) -> tuple[Batch, tuple[int, ...]]:
    """Checks the arguments; a batch with leading dimensions in front, and these."""
    masks = labels if isinstance(labels, PairMasks) else None
    named = [("embeddings", embeddings)]
    if references is not None:
        named.append(("references", references))
    x, *rest = as_vectors(*named, rank=2)
    y = rest[0] if rest else None
    lead, (n, d) = x.shape[:-2], x.shape[-2:]
    if y is not None and (y.shape[-1] != d or y.shape[:-2] != lead):
        raise ValueError(
            "references must be vectors of the same length and batch dimensions as "
            f"embeddings, got {y.shape} and {x.shape}."
        )
    if masks is not None and not (reference_labels is None and positions is None):
        raise ValueError(
            "reference_labels and positions do not go with labels that are PairMasks: "
            "the masks already say it."
        )
    if masks is None and (y is None) != (reference_labels is None):
        raise ValueError("references and reference_labels go together: give both.")

    def each(name: str, values: Any, kind: type, of: str, size: int) -> Array | None:
        if values is None:
            return None
        if name.endswith("labels"):
            values = as_labels(name, values, None)
            if values.shape[-1] != size:
                raise ValueError(
                    f"{name} has shape {values.shape}, but there are {size} {of}: "
                    "there must be one label for each."
                )
        else:
            values = per_item(name, values, size, of, kind)
        return _broadcast(name, values, (*lead, size))

    m = n if y is None else y.shape[-2]
    if masks is None:
        labels = each("labels", labels, jnp.integer, "embeddings", n)
    reference_labels = each(
        "reference_labels", reference_labels, jnp.integer, "references", m
    )
    if reference_labels is not None:
        labels, reference_labels = _of_one_dtype(labels, reference_labels)
    positions = each("positions", positions, jnp.integer, "embeddings", n)
    where = each("where", where, jnp.bool_, "embeddings", n)
    reference_where = each(
        "reference_where", reference_where, jnp.bool_, "references", m
    )

    products = task.metric.products
    vectors = (lambda x: x) if products is None else products.vectors

    def ready(x: Array, where: Array | None) -> Array:
        # Whatever padding holds, it must not reach the products.
        return vectors(x if where is None else jnp.where(where[..., None], x, 0))

    x = ready(x, where)
    plain = axis_name is None and positions is None and reference_where is None
    if y is not None:
        y = ready(y, reference_where)
    elif not plain:
        # Else the anchors are their own references, and half the matrix is enough.
        y, reference_labels = x, labels if masks is None else None
        reference_where = where if reference_where is None else reference_where
        if positions is None and masks is None:
            positions = jnp.broadcast_to(jnp.arange(n), (*lead, n))
            if axis_name is not None:
                positions += lax.axis_index(axis_name) * n
    if axis_name is not None:
        gather = functools.partial(
            lax.all_gather, axis_name=axis_name, axis=len(lead), tiled=True
        )
        y, reference_labels, reference_where = jax.tree.map(
            gather, (y, reference_labels, reference_where)
        )
    if masks is not None:
        m = n if y is None else y.shape[-2]
        checked = []
        for name, mask in masks._asdict().items():
            mask = as_boolean(f"labels.{name}", mask)
            if mask.shape[-2:] != (n, m):
                raise ValueError(
                    f"labels.{name} has shape {mask.shape}, but there are {n} vectors "
                    f"and {m} references: the last two dimensions must be {(n, m)}."
                )
            checked.append(_broadcast(f"labels.{name}", mask, (*lead, n, m)))
        labels = PairMasks(*checked)
    margin = jnp.broadcast_to(as_margin(margin, x), lead)
    batch = Batch(
        x, y, margin, labels, reference_labels, positions, where, reference_where
    )
    return batch, lead


def _of_one_dtype(labels: Array, reference_labels: Array) -> list[Array]:
    """Both as integers of one dtype, for labels to be sorted and searched."""
    dtype = jnp.promote_types(labels.dtype, reference_labels.dtype)
    for x in (labels, reference_labels):
        if jnp.iinfo(x.dtype).max > jnp.iinfo(dtype).max:
            raise TypeError(
                "labels and reference_labels must have integers that fit into one "
                f"dtype, got {labels.dtype} and {reference_labels.dtype}."
            )
    return [labels.astype(dtype), reference_labels.astype(dtype)]


def _broadcast(name: str, values: Array, shape: tuple[int, ...]) -> Array:
    try:
        return jnp.broadcast_to(values, shape)
    except ValueError:
        raise ValueError(
            f"{name} has shape {values.shape}, which does not broadcast to {shape}."
        ) from None


def _each(lead: tuple[int, ...], function: Any, batch: Batch) -> Any:
    """Applies a function of one batch over leading dimensions."""
    if not lead:
        return function(batch)
    # One after the other: under vmap, both sides of every choice would be computed.
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[len(lead) :]), batch)
    out = lax.map(function, flat)
    return jax.tree.map(lambda x: x.reshape(*lead, *x.shape[1:]), out)


def _varying(batch: Batch) -> Batch:
    """The same batch; inside shard_map, all of it varies over the same mesh axes."""
    zero = sum(
        jnp.zeros_like(leaf[(0,) * leaf.ndim]).astype(batch.anchors.dtype)
        for leaf in jax.tree.leaves(batch)
    )
    return batch._replace(
        **{k: v + zero for k in FLOATS if (v := getattr(batch, k)) is not None}
    )


def _gathered(x: Array, axis_name: AxisName) -> Array:
    """All devices' parts of an array, in order, the same on every device."""
    n = len(x)
    parts = jnp.zeros((n * lax.axis_size(axis_name),), x.dtype) + jnp.zeros_like(x[0])
    start = lax.axis_index(axis_name) * n
    return lax.psum(lax.dynamic_update_slice(parts, x, (start,)), axis_name)


# Derivatives. The total over all anchors is what the common reductions need; it comes
# together with its gradient, in either mode of differentiation.


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _total(task: Task, batch: Batch) -> TripletTerms:
    terms, _ = blocks.sums(task, batch, gradient=False)
    return TripletTerms(*map(jnp.sum, terms))


@_total.defjvp
@own_promotion
def _total_jvp(task: Task, primals: tuple, tangents: tuple) -> tuple:
    (batch,), (dot,) = primals, tangents
    terms, gradients = _with_gradients(task, batch, None)
    total_dot = sum(
        jnp.sum(gradient * dot)
        for gradient, dot in zip(gradients, dot[: len(gradients)])
        if gradient is not None
    )
    terms = TripletTerms(*map(jnp.sum, terms))
    none = jnp.zeros_like(terms.total)
    return terms, TripletTerms(total_dot, none, none)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _terms(task: Task, batch: Batch) -> TripletTerms:
    """The terms per anchor: differentiated in reverse mode only, by a second pass."""
    return blocks.sums(task, batch, gradient=False)[0]


@own_promotion
def _terms_forward(task: Task, batch: Batch) -> tuple[TripletTerms, Batch]:
    return _terms(task, batch), batch


@own_promotion
def _terms_backward(task: Task, batch: Batch, cotangents: TripletTerms) -> tuple:
    _, gradients = _with_gradients(task, batch, cotangents.total)
    return (Batch(*gradients, *[None] * (len(batch) - len(gradients))),)


_terms.defvjp(_terms_forward, _terms_backward)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _with_gradients(
    task: Task, batch: Batch, weights: Array | None
) -> tuple[TripletTerms, Gradients]:
    return blocks.sums(task, batch, weights, gradient=True)


@_with_gradients.defjvp
@own_promotion
def _with_gradients_jvp(task: Task, primals: tuple, tangents: tuple) -> tuple:
    """Second derivatives go through the matrix."""
    out = _with_gradients(task, *primals)
    (batch, weights), (dot, weights_dot) = primals, tangents
    if weights is None:
        weights = jnp.ones_like(batch.anchors[:, 0])
        weights_dot = jnp.zeros_like(weights)

    def by_matrix(vectors: tuple, weights: Array) -> tuple[TripletTerms, Gradients]:
        def total(vectors: tuple) -> tuple[Array, TripletTerms]:
            terms = _by_matrix(task, batch._replace(**dict(zip(FLOATS, vectors))))
            return jnp.sum(weights * terms.total), terms

        gradients, terms = jax.grad(total, has_aux=True)(vectors)
        return terms, Gradients(*gradients)

    k = len(FLOATS)
    _, out_dot = jax.jvp(by_matrix, (batch[:k], weights), (tuple(dot[:k]), weights_dot))
    return out, out_dot


MATRIX_LOSSES = {
    Kind.ALL: losses.batch_all_loss,
    Kind.HARD: losses.batch_hard_loss,
    Kind.SEMI_HARD: losses.batch_semi_hard_loss,
}


def _by_matrix(task: Task, batch: Batch) -> TripletTerms:
    x = batch.anchors
    y = x if batch.square else batch.references
    products = task.metric.products
    if products is None:
        itself = jnp.arange(len(x)) if batch.square else jnp.full(len(x), -1)
        distances = task.metric.against(x, y, itself)
    else:
        distances = products.matrix(x, y)
    options = {"fallback": task.fallback} if task.kind is Kind.SEMI_HARD else {}
    return MATRIX_LOSSES[task.kind](
        distances,
        batch.labels,
        margin=batch.margin,
        hinge=task.hinge,
        reference_labels=batch.reference_labels,
        positions=batch.positions,
        where=batch.where,
        reference_where=batch.reference_where,
        reduce_fn=None,
        **options,
    )
