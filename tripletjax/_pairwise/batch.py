"""Batches: checked vectors, and the pairs that match among them."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from tripletjax._api import own_promotion
from tripletjax._pairwise.block_sizes import CPU
from tripletjax._pairwise.mesh import AxisName, check_split, gather_rows
from tripletjax._pairwise.slices import Blocks, rows_at
from tripletjax.distances import Metric, as_vectors, identity
from tripletjax.pairs import PairMasks, Pairs


class Batch(NamedTuple):
    """Vectors and their pairs.

    Attributes:
        anchors: vectors ``[n, d]``, as the metric's inner-product form takes them.
        references: vectors ``[m, d]``, or None if the anchors are their own references.
        pairs: labels or masks, padding and positions. `reference_labels` are set unless
            the anchors are their own references or labels are masks.
    """

    anchors: Array
    references: Array | None
    pairs: Pairs

    @property
    def square(self) -> bool:
        return self.references is None

    @property
    def reference_side(self) -> tuple[Array, Any, Array | None]:
        """Vectors, labels and `where` of the references; of the anchors if square."""
        if self.references is None:
            return self.anchors, self.pairs.labels, self.pairs.where
        return self.references, self.pairs.reference_labels, self.pairs.reference_where

    @property
    def size(self) -> int:
        """The larger number, of anchors or of references."""
        return max(len(self.anchors), len(self.reference_side[0]))

    @property
    def has_classes(self) -> bool:
        """Whether pairs are defined by labels, which can be sorted, or by masks."""
        return not isinstance(self.pairs.labels, PairMasks)

    @property
    def labels(self) -> Array:
        """Labels of the anchors, integers ``[n]``. Batches of masks have none."""
        assert not isinstance(self.pairs.labels, PairMasks)
        return self.pairs.labels

    @property
    def own_index(self) -> Array:
        """Index ``[n]`` of each anchor among the references, -1 if it is not one."""
        n = len(self.anchors)
        if self.square:
            return jnp.arange(n)
        positions = self.pairs.positions
        return jnp.full(n, -1) if positions is None else positions

    def zeros(self, shape: tuple[int, ...] = ()) -> Array:
        """Zeros that vary over the devices of a mesh as the batch does.

        The initial state of a loop inside shard_map has to vary in this way.
        """
        none = jnp.zeros(shape, self.anchors.dtype)
        return none + jnp.zeros_like(self.anchors[0, 0])


def as_batch(
    metric: Metric,
    embeddings: ArrayLike,
    labels: ArrayLike | PairMasks,
    *,
    references: ArrayLike | None = None,
    axis_name: AxisName | None = None,
    reverse_mode: bool = False,
    **options: Any,
) -> tuple[Batch, tuple[int, ...]]:
    """Check vectors and pairs of a batch.

    Args:
        metric: a distance between vectors.
        embeddings: vectors ``[..., n, d]``.
        labels: integers ``[..., n]``, or `PairMasks`.
        references: vectors ``[..., m, d]``, or None.
        axis_name: mesh axes over which the batch is split, or None.
        reverse_mode: whether derivatives of the vectors have reverse mode alone, which
            then takes O(block) memory.
        **options: `reference_labels`, `positions`, `where` and `reference_where`.

    Returns:
        The batch, each array with the leading dimensions, and these dimensions.
    """
    x, y = _checked_vectors(metric, embeddings, references, axis_name)
    lead, n = x.shape[:-2], x.shape[-2]
    m = n if y is None else y.shape[-2]
    has_classes = not isinstance(labels, PairMasks)
    if has_classes and (y is None) != (options.get("reference_labels") is None):
        raise ValueError("references and reference_labels go together: give both.")
    pairs = Pairs.of(
        labels,
        shape=(*lead, n, m),
        anchors="embeddings",
        references="references",
        same=y is None,
        devices=1 if axis_name is None else lax.axis_size(axis_name),
        **options,
    )
    vectors = _vectors_of(metric)
    if reverse_mode and vectors is not identity:
        vectors = functools.partial(_with_gradient_in_place, vectors)
    # Padding may hold anything, which must not reach the products.
    x = vectors(_without_padding(x, pairs.where))
    if y is not None:
        y = vectors(_without_padding(y, pairs.reference_where))
        if has_classes:
            pairs = _with_one_dtype(pairs)
    elif axis_name is not None or not (
        options.get("positions") is None and options.get("reference_where") is None
    ):
        y = x
        if has_classes:
            pairs = _with_own_references(pairs, (*lead, n), axis_name)
    # Otherwise the anchors are their own references, and half the matrix is enough.
    if axis_name is not None:
        y, reference_labels, reference_where = jax.tree.map(
            lambda x: gather_rows(x, axis_name, len(lead)),
            (y, pairs.reference_labels, pairs.reference_where),
        )
        pairs = pairs._replace(
            reference_labels=reference_labels, reference_where=reference_where
        )
    return Batch(x, y, pairs), lead


def _without_padding(x: Array, where: Array | None) -> Array:
    return x if where is None else jnp.where(where[..., None], x, 0)


def _with_own_references(
    pairs: Pairs, shape: tuple[int, ...], axis_name: AxisName | None
) -> Pairs:
    """Pairs of anchors ``[..., n]`` that are their own references, by positions."""
    labels, positions = pairs.labels, pairs.positions
    assert isinstance(labels, Array)
    if positions is None:
        n = shape[-1]
        positions = jnp.broadcast_to(jnp.arange(n), shape)
        if axis_name is not None:
            positions += lax.axis_index(axis_name) * n
    return pairs._replace(reference_labels=labels, positions=positions)


def _checked_vectors(
    metric: Metric,
    embeddings: ArrayLike,
    references: ArrayLike | None,
    axis_name: AxisName | None,
) -> tuple[Array, Array | None]:
    """Embeddings ``[..., n, d]`` and references ``[..., m, d]``, if there are any."""
    if not isinstance(metric, Metric):
        raise TypeError(f"metric must be a Metric, got {metric!r}.")
    named = [("embeddings", embeddings)]
    if references is not None:
        named.append(("references", references))
    x, *rest = as_vectors(*named, rank=2)
    if axis_name is not None:
        for (what, _), vectors in zip(named, (x, *rest)):
            check_split(vectors, axis_name, what=what)
    y = rest[0] if rest else None
    if y is not None and (y.shape[-1] != x.shape[-1] or y.shape[:-2] != x.shape[:-2]):
        raise ValueError(
            "references must be vectors of the same length and batch dimensions as "
            f"embeddings, got {y.shape} and {x.shape}."
        )
    return x, y


def _vectors_of(metric: Metric) -> Callable[[Array], Array]:
    """The function from embeddings to the vectors whose products a metric takes."""
    return identity if metric.products is None else metric.products.vectors


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _with_gradient_in_place(vectors: Callable[[Array], Array], x: Array) -> Array:
    """A function of each row of ``[..., n, d]``, with one array for both gradients.

    The gradient by `x` overwrites that by the result, block by block. XLA alone keeps
    both for a norm (jax 0.10.2, ``tests/test_compiled_memory.py``).
    """
    return vectors(x)


def _in_place_forward(
    vectors: Callable[[Array], Array], x: Array
) -> tuple[Array, Array]:
    return vectors(x), x


@own_promotion
def _in_place_backward(
    vectors: Callable[[Array], Array], x: Array, gradient: Array
) -> tuple[Array]:
    rows = x.reshape(-1, x.shape[-1])
    blocks = Blocks.of(len(rows), CPU.panel // x.shape[-1])

    # The state: the gradient by vectors, and in front the one by `x`.
    def step(block: Array, gradient: Array) -> Array:
        start = blocks.start(block)
        old = rows_at(gradient, start, blocks.size)
        _, pull = jax.vjp(vectors, rows_at(rows, start, blocks.size))
        (new,) = pull(old)
        new = jnp.where(blocks.fresh(block)[:, None], new, old)
        return lax.dynamic_update_slice_in_dim(gradient, new, start, axis=0)

    gradient = lax.fori_loop(0, blocks.count, step, gradient.reshape(rows.shape))
    return (gradient.reshape(x.shape),)


_with_gradient_in_place.defvjp(_in_place_forward, _in_place_backward)


def as_pair_of_vectors(
    metric: Metric, embeddings: ArrayLike, references: ArrayLike | None
) -> tuple[Array, Array]:
    """Checked anchors and references; the anchors twice if there are no references."""
    x, y = _checked_vectors(metric, embeddings, references, None)
    vectors = _vectors_of(metric)
    x = vectors(x)
    return x, x if y is None else vectors(y)


def single_batch(
    metric: Metric,
    embeddings: ArrayLike,
    labels: ArrayLike | PairMasks,
    **options: Any,
) -> Batch:
    """A batch of `as_batch` without leading dimensions."""
    batch, lead = as_batch(metric, embeddings, labels, **options)
    if lead:
        raise ValueError(
            f"embeddings must be [n, d], got {len(lead) + 2} dimensions; use jax.vmap."
        )
    return batch


def _with_one_dtype(pairs: Pairs) -> Pairs:
    """Pairs with both labels in one integer dtype, in which they can be sorted."""
    labels, references = pairs.labels, pairs.reference_labels
    assert isinstance(labels, Array)
    assert references is not None
    dtype = jnp.promote_types(labels.dtype, references.dtype)
    for x in (labels, references):
        if jnp.iinfo(x.dtype).max > jnp.iinfo(dtype).max:
            raise TypeError(
                "labels and reference_labels must have integers that fit into one "
                f"dtype, got {labels.dtype} and {references.dtype}."
            )
    return pairs._replace(
        labels=labels.astype(dtype), reference_labels=references.astype(dtype)
    )


def for_each_batch(lead: tuple[int, ...], function: Callable, batches: Any) -> Any:
    """Applies a function of one batch over leading dimensions."""
    if not lead:
        return function(batches)
    # A loop: vmap would compute both branches of every `cond`.
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[len(lead) :]), batches)
    out = lax.map(function, flat)
    return jax.tree.map(lambda x: x.reshape(*lead, *x.shape[1:]), out)
