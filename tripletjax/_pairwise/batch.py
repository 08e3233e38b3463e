"""A batch of vectors, and who matches whom among them, checked and made ready."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from tripletjax._pairwise.mesh import AxisName, check_split, gather_rows
from tripletjax.distances import Metric, as_vectors
from tripletjax.pairs import PairMasks, Pairs


class Batch(NamedTuple):
    """Vectors, and who matches whom among them.

    Attributes:
        anchors: ``[n, d]``; those that products are taken of, if the metric has such.
        references: ``[m, d]``, or None if the anchors are their own.
        pairs: what is said about pairs, with `reference_labels` unless the anchors are
            their own references or labels are masks.
    """

    anchors: Array
    references: Array | None
    pairs: Pairs

    @property
    def square(self) -> bool:
        return self.references is None

    @property
    def reference_side(self) -> tuple[Array, Any, Array | None]:
        """Vectors, labels and `where` of the references, whoever they are."""
        if self.references is None:
            return self.anchors, self.pairs.labels, self.pairs.where
        return self.references, self.pairs.reference_labels, self.pairs.reference_where

    @property
    def size(self) -> int:
        """Of anchors or of references, how many there are of more."""
        return max(len(self.anchors), len(self.reference_side[0]))

    @property
    def has_classes(self) -> bool:
        """Whether pairs are told by labels, which can be sorted, and not by masks."""
        return not isinstance(self.pairs.labels, PairMasks)

    @property
    def labels(self) -> Array:
        """Those of the anchors, integers ``[n]``, where pairs are told by labels."""
        assert not isinstance(self.pairs.labels, PairMasks)
        return self.pairs.labels

    def zeros(self, shape: tuple[int, ...] = ()) -> Array:
        """Zeros that vary over the devices of a mesh as the batch does.

        Inside shard_map, what a loop carries has to.
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
    **pairs: Any,
) -> tuple[Batch, tuple[int, ...]]:
    """Checks the arguments; a batch with leading dimensions in front, and these.

    Args:
        metric: how far two vectors are apart.
        embeddings: vectors ``[..., n, d]``.
        labels: integers ``[..., n]``, or `PairMasks`.
        references: vectors ``[..., m, d]``, or None.
        axis_name: of mesh axes over which the batch is split, or None.
        **pairs: `reference_labels`, `positions`, `where` and `reference_where`.
    """
    x, y = _checked_vectors(metric, embeddings, references, axis_name)
    lead, n = x.shape[:-2], x.shape[-2]
    has_classes = not isinstance(labels, PairMasks)
    if has_classes and (y is None) != (pairs.get("reference_labels") is None):
        raise ValueError("references and reference_labels go together: give both.")
    alone = y is None and axis_name is None
    alone &= pairs.get("positions") is None and pairs.get("reference_where") is None
    m = n if y is None else y.shape[-2]
    told = Pairs.of(
        labels,
        shape=(*lead, n, m),
        anchors="embeddings",
        references="references",
        same=y is None,
        devices=1 if axis_name is None else lax.axis_size(axis_name),
        **pairs,
    )
    if told.reference_labels is not None and not isinstance(told.labels, PairMasks):
        both = _of_one_dtype(told.labels, told.reference_labels)
        told = told._replace(labels=both[0], reference_labels=both[1])

    vectors = _vectors_of(metric)

    def ready(x: Array, where: Array | None) -> Array:
        # Whatever padding holds, it must not reach the products.
        return vectors(x if where is None else jnp.where(where[..., None], x, 0))

    x = ready(x, told.where)
    if y is not None:
        y = ready(y, told.reference_where)
    elif not alone:
        # Else the anchors are their own references, and half the matrix is enough.
        y = x
        if not isinstance(told.labels, PairMasks):
            positions = told.positions
            if positions is None:
                positions = jnp.broadcast_to(jnp.arange(n), (*lead, n))
                if axis_name is not None:
                    positions += lax.axis_index(axis_name) * n
            told = told._replace(reference_labels=told.labels, positions=positions)
    if axis_name is not None:
        y, reference_labels, reference_where = jax.tree.map(
            lambda x: gather_rows(x, axis_name, len(lead)),
            (y, told.reference_labels, told.reference_where),
        )
        told = told._replace(
            reference_labels=reference_labels, reference_where=reference_where
        )
    return Batch(x, y, told), lead


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
    return (lambda x: x) if metric.products is None else metric.products.vectors


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
    """A batch without leading dimensions, as `as_batch` makes it."""
    batch, lead = as_batch(metric, embeddings, labels, **options)
    if lead:
        raise ValueError(
            f"embeddings must be [n, d], got {len(lead) + 2} dimensions; use jax.vmap."
        )
    return batch


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


def for_each_batch(lead: tuple[int, ...], function: Callable, batches: Any) -> Any:
    """Applies a function of one batch over leading dimensions."""
    if not lead:
        return function(batches)
    # One after the other: under vmap, both sides of every choice would be computed.
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[len(lead) :]), batches)
    out = lax.map(function, flat)
    return jax.tree.map(lambda x: x.reshape(*lead, *x.shape[1:]), out)
