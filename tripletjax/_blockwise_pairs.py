"""The losses of `pair_losses` straight from embeddings, for `tripletjax.blockwise`."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from tripletjax import pair_losses, separable_losses, softmax_losses
from tripletjax._api import as_integer
from tripletjax._engine.pair_losses import PairSpec, pair_terms
from tripletjax._matrices import check_not_distances
from tripletjax._pairwise.batch import Batch, as_batch, for_each_batch
from tripletjax._pairwise.mesh import gather_terms
from tripletjax._pairwise.over_mesh import over_mesh
from tripletjax.distances import cosine
from tripletjax.losses import SumReduction, reduced, sums_over_anchors
from tripletjax.pair_losses import DEFINITIONS, PairLoss, both_sides
from tripletjax.pairs import PairMasks

_OPTIONS = {
    "metric": cosine,
    "references": None,
    "reference_labels": None,
    "positions": None,
    "where": None,
    "reference_where": None,
    "axis_name": None,
    "block_size": None,
}

_ARGS = """\
    embeddings: vectors of anchors ``[..., n, d]``.
    labels: integers ``[..., n]``, or `PairMasks`.
    metric: a distance between vectors.
    references: vectors ``[..., m, d]``, with `reference_labels`. If not given, the
        anchors are their own references.
    reference_labels, positions, where, reference_where: as in `pair_masks`.
    axis_name, block_size: as in `batch_all_loss`.
    reduce_fn: from the terms ``[..., n]`` to the result; None returns the terms."""


def _of_embeddings(of_distances: Callable[..., Any]) -> Callable[..., Any]:
    """The form of a loss of distances that takes embeddings."""
    definition = DEFINITIONS[of_distances]

    def loss(embeddings: Any, labels: Any, *, reduce_fn: Any, **options: Any) -> Any:
        loss = definition.build(**definition.parameters_of(options))
        return _blockwise(loss, embeddings, labels, reduce_fn=reduce_fn, **options)

    function: Any = loss
    function.__signature__ = definition.signature("embeddings", _OPTIONS)
    function.__name__ = function.__qualname__ = definition.build.__name__
    function.__module__ = "tripletjax.blockwise"
    function.__doc__ = definition.docstring(
        _ARGS, "O(n d + m d + block_size^2), also of the gradient", example=False
    )

    def together(result: Any, n: int, options: dict[str, Any]) -> Any:
        """Terms of anchors lose the rows of padding; others have zeros there."""
        reduce_fn = options.get("reduce_fn", definition.reduce_fn)
        if reduce_fn is not None or not definition.by_anchor:
            return result
        return jax.tree.map(lambda x: x[:n], result)

    split = over_mesh(together=together, parameters=definition.checks)
    return split(definition.jitted(function, check=check_not_distances))


def _blockwise(
    loss: PairLoss,
    embeddings: Any,
    labels: Any,
    *,
    metric: Any,
    axis_name: Any,
    block_size: int | None,
    reduce_fn: Any,
    **pairs: Any,
) -> Any:
    if block_size is not None:
        block_size = as_integer("block_size", block_size)
        if block_size < 1:
            raise ValueError(f"block_size must be at least 1, got {block_size}.")
    loss = loss.checked(labels, pairs)
    summed = isinstance(reduce_fn, SumReduction)
    options = {"axis_name": axis_name, **pairs}
    # Over a mesh, anchors are split and their references gathered: each direction has
    # a batch of its own.
    apart = loss.symmetric and axis_name is not None
    sides = [] if loss.swapped else [(embeddings, labels, options)]
    if loss.swapped or apart:
        sides.append(_other_side(embeddings, labels, options))
    checked = [as_batch(metric, x, y, **side) for x, y, side in sides]
    batches, lead = [batch for batch, _ in checked], checked[0][1]
    parameters = loss.parameters_as(batches[0].anchors.dtype)
    symmetric = loss.symmetric and not apart
    spec = PairSpec(loss.shape, metric, symmetric, summed, block_size)

    def one(batches: list[Batch]) -> Any:
        each = [pair_terms(spec, *_varying(x, parameters)) for x in batches]
        if not summed:
            if axis_name is not None:
                each = [gather_terms(terms, axis_name) for terms in each]
            return reduced(both_sides(*each), reduce_fn)
        sums = sums_over_anchors(both_sides(*each))
        if axis_name is not None:
            sums = lax.psum(sums, axis_name)
        return reduce_fn.of_sums(sums)

    return for_each_batch(lead, one, batches)


def _other_side(
    embeddings: Any, labels: Any, options: dict[str, Any]
) -> tuple[Any, Any, dict[str, Any]]:
    """The references as embeddings, and the embeddings as their references."""
    other = options | {
        "references": embeddings,
        "where": options["reference_where"],
        "reference_where": options["where"],
    }
    references = options["references"]
    if not isinstance(labels, PairMasks):
        return (
            references,
            options["reference_labels"],
            other | {"reference_labels": labels},
        )
    if options["axis_name"] is not None:
        raise ValueError(
            "labels must be integers over a mesh where references are anchors, got "
            "PairMasks."
        )
    if references is None:
        references = embeddings
    masks = PairMasks(*(jnp.swapaxes(x, -1, -2) for x in labels))
    return references, masks, other


def _varying(batch: Batch, parameters: Any) -> tuple[Batch, Any]:
    """A batch and parameters that vary over the same mesh axes inside shard_map."""
    zero = sum(
        jnp.zeros_like(leaf[(0,) * leaf.ndim]).astype(batch.anchors.dtype)
        for leaf in jax.tree.leaves((batch, parameters))
    )
    references = batch.references
    if references is not None:
        references = references + zero
    batch = batch._replace(anchors=batch.anchors + zero, references=references)
    return batch, jax.tree.map(lambda x: x + zero, parameters)


log_sum_exp_loss = _of_embeddings(pair_losses.log_sum_exp_loss)
separable_loss = _of_embeddings(pair_losses.separable_loss)
supcon_loss = _of_embeddings(softmax_losses.supcon_loss)
nt_xent_loss = _of_embeddings(softmax_losses.nt_xent_loss)
decoupled_contrastive_loss = _of_embeddings(softmax_losses.decoupled_contrastive_loss)
nca_loss = _of_embeddings(softmax_losses.nca_loss)
info_nce_loss = _of_embeddings(softmax_losses.info_nce_loss)
multi_similarity_loss = _of_embeddings(softmax_losses.multi_similarity_loss)
circle_loss = _of_embeddings(softmax_losses.circle_loss)
generalized_lifted_structure_loss = _of_embeddings(
    softmax_losses.generalized_lifted_structure_loss
)
cosface_loss = _of_embeddings(softmax_losses.cosface_loss)
arcface_loss = _of_embeddings(softmax_losses.arcface_loss)
proxy_anchor_loss = _of_embeddings(softmax_losses.proxy_anchor_loss)
contrastive_loss = _of_embeddings(separable_losses.contrastive_loss)
margin_loss = _of_embeddings(separable_losses.margin_loss)
sigmoid_loss = _of_embeddings(separable_losses.sigmoid_loss)
