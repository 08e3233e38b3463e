"""The losses of `pair_losses` straight from embeddings, for `tripletjax.blockwise`."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from tripletjax import pair_losses, separable_losses, smooth_ap, softmax_losses
from tripletjax._api import as_integer
from tripletjax._engine.log_sum_exp import LOG_SUM_EXP
from tripletjax._engine.pair_losses import PairSpec, TileWalk, pair_terms
from tripletjax._engine.separable import SEPARABLE
from tripletjax._engine.smooth_ap import SMOOTH_AP
from tripletjax._matrices import check_not_distances
from tripletjax._pairwise.batch import Batch, as_batch, for_each_batch
from tripletjax._pairwise.mesh import AxisName, gather_terms
from tripletjax._pairwise.over_mesh import over_mesh, without_padding
from tripletjax.distances import Metric, cosine
from tripletjax.losses import (
    Reduction,
    SumReduction,
    mean_active,
    mean_valid,
    reduced,
    sums_over_anchors,
)
from tripletjax.pair_losses import (
    DEFINITIONS,
    AnchorPairs,
    LogSumExp,
    PairLoss,
    PairOptions,
    Parameters,
    Separable,
    both_sides,
    is_per_anchor,
    mean_active_by_side,
    mean_of_anchors,
    mean_valid_by_side,
)
from tripletjax.pairs import PairMasks

P = ParamSpec("P")
R = TypeVar("R")

# Lines of the docstring of a loss of distances, and those of its form of embeddings.
_PAIRS = "    reference_labels, positions, where, reference_where: as in `pair_masks`."
_LINES = {
    "Memory: O(n m), at most 6 times the size of the distances.": (
        "Memory: O(n d + m d + block_size^2), also of the gradient.",
    ),
    "    distances: ``[..., n, m]``.": (
        "    embeddings: vectors of anchors ``[..., n, d]``.",
    ),
    _PAIRS: (
        "    metric: a distance between vectors.",
        "    references: vectors ``[..., m, d]``, or None, as in `batch_all_loss`.",
        _PAIRS,
        "    axis_name, block_size: as in `batch_all_loss`.",
    ),
}


# The walks over tiles of each shape of losses.
WALKS: dict[type, TileWalk] = {
    LogSumExp: LOG_SUM_EXP,
    Separable: SEPARABLE,
    smooth_ap.SmoothAP: SMOOTH_AP,
}


class Blocks(NamedTuple):
    """Arguments of every loss of embeddings, besides those of pairs."""

    metric: Metric
    references: ArrayLike | None
    axis_name: AxisName | None
    block_size: int | None


def _of_embeddings(
    of_distances: Callable[..., Any],
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Define the form of a loss of distances that takes embeddings.

    The docstring of the form is its first line, followed by that of the loss.
    """
    definition = DEFINITIONS[of_distances]

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        function.__doc__ = _docstring(function, of_distances)
        reduce_default = inspect.signature(function).parameters["reduce_fn"].default
        compiled = definition.jitted(
            function,
            check=check_not_distances,
            callables=("metric",),
            static=("axis_name", "block_size"),
        )

        def together(result: Any, n: int, options: dict[str, Any]) -> Any:
            """Terms of anchors lose the rows of padding; others have zeros there."""
            reduce_fn = options.get("reduce_fn", reduce_default)
            if reduce_fn is not None or not definition.by_anchor:
                return result
            return without_padding(result, n, options)

        return over_mesh(
            together=together,
            parameters=definition.checks,
            of_anchors=definition.of_anchors,
        )(compiled)

    return decorate


def _docstring(function: Callable[..., Any], of_distances: Callable[..., Any]) -> str:
    text = inspect.cleandoc(of_distances.__doc__ or "")
    _, _, text = text.partition("\n\n")
    for line, own in _LINES.items():
        assert text.count(line) == 1, (of_distances, line)
        text = text.replace(line, "\n".join(own))
    # The example has distances.
    text, _, _ = text.partition("\n\n>>>")
    name = of_distances.__name__
    reference = f"`tripletjax.{name}` without the distance matrix."
    before, memory, after = text.partition("Memory: ")
    return f"{function.__doc__}\n\n{before}{reference}\n\n{memory}{after}\n"


def _blockwise(
    loss: PairLoss,
    embeddings: ArrayLike,
    labels: ArrayLike | PairMasks,
    pairs: PairOptions,
    blocks: Blocks,
    reduce_fn: Reduction | None,
) -> Any:
    metric, references, axis_name, block_size = blocks
    if block_size is not None:
        block_size = as_integer("block_size", block_size)
        if block_size < 1:
            raise ValueError(f"block_size must be at least 1, got {block_size}.")
    loss.check_pairs(labels, pairs)
    summed = isinstance(reduce_fn, SumReduction)
    options: dict[str, Any] = {
        "references": references,
        "axis_name": axis_name,
        **pairs._asdict(),
    }
    # Over a mesh, anchors are split and their references gathered: each direction has
    # a batch of its own.
    apart = loss.symmetric and axis_name is not None
    sides = [] if loss.swapped else [(embeddings, labels, options)]
    if loss.swapped or apart:
        sides.append(_other_side(embeddings, labels, options))
    checked = [
        as_batch(metric, x, y, reverse_mode=True, **side) for x, y, side in sides
    ]
    batches, lead = [batch for batch, _ in checked], checked[0][1]
    anchors = batches[0].anchors
    parameters = loss.parameters_for(anchors.dtype, anchors.shape[:-1])
    # Every batch of the leading dimensions has the parameters that are not per anchor.
    parameters = jax.tree.map(
        lambda x: x if is_per_anchor(x) else jnp.broadcast_to(x, (*lead, *x.shape)),
        parameters,
        is_leaf=is_per_anchor,
    )
    symmetric = loss.symmetric and not apart
    spec = PairSpec(loss.shape, metric, symmetric, summed, block_size=block_size)
    walk = WALKS[type(loss.shape)]

    def one(inputs: tuple[list[Batch], Any]) -> Any:
        batches, parameters = inputs
        each = [pair_terms(spec, walk, *_varying(x, parameters)) for x in batches]
        if not summed:
            if axis_name is not None:
                each = [gather_terms(terms, axis_name) for terms in each]
            return reduced(both_sides(*each), reduce_fn)
        sums = sums_over_anchors(both_sides(*each))
        if axis_name is not None:
            sums = lax.psum(sums, axis_name)
        return reduce_fn.of_sums(sums)

    return for_each_batch(lead, one, (batches, parameters))


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


@_of_embeddings(pair_losses.log_sum_exp_loss)
def log_sum_exp_loss(
    embeddings: ArrayLike,
    labels: ArrayLike | PairMasks,
    *,
    metric: Metric = cosine,
    logit: Callable[[Array, Parameters], Array],
    cost: Callable[[AnchorPairs, Parameters], Any],
    limits: Callable[[Array, Array, Parameters], tuple[Array, Array]] | None = None,
    parameters: Parameters = (),
    references: ArrayLike | None = None,
    reference_labels: ArrayLike | None = None,
    positions: ArrayLike | None = None,
    where: ArrayLike | None = None,
    reference_where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
    block_size: int | None = None,
    reduce_fn: Reduction | None = mean_valid,
) -> Any:
    """Any loss of positives' distances and the log-sum-exp of negatives' logits."""
    loss = PairLoss(LogSumExp(logit, cost, limits), parameters)
    pairs = PairOptions(reference_labels, positions, where, reference_where)
    blocks = Blocks(metric, references, axis_name, block_size)
    return _blockwise(loss, embeddings, labels, pairs, blocks, reduce_fn)


@_of_embeddings(pair_losses.separable_loss)
def separable_loss(
    embeddings: ArrayLike,
    labels: ArrayLike | PairMasks,
    *,
    metric: Metric = cosine,
    positive_cost: Callable[[Array, Parameters], Array],
    negative_cost: Callable[[Array, Parameters], Array],
    parameters: Parameters = (),
    references: ArrayLike | None = None,
    reference_labels: ArrayLike | None = None,
    positions: ArrayLike | None = None,
    where: ArrayLike | None = None,
    reference_where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
    block_size: int | None = None,
    reduce_fn: Reduction | None = mean_of_anchors,
) -> Any:
    """Any sum of costs of positive pairs and of costs of negative pairs."""
    loss = PairLoss(Separable(positive_cost, negative_cost), parameters)
    pairs = PairOptions(reference_labels, positions, where, reference_where)
    blocks = Blocks(metric, references, axis_name, block_size)
    return _blockwise(loss, embeddings, labels, pairs, blocks, reduce_fn)


@_of_embeddings(separable_losses.contrastive_loss)
def contrastive_loss(
    embeddings: ArrayLike,
    labels: ArrayLike | PairMasks,
    *,
    metric: Metric = cosine,
    positive_margin: ArrayLike = 0.0,
    negative_margin: ArrayLike = 1.0,
    references: ArrayLike | None = None,
    reference_labels: ArrayLike | None = None,
    positions: ArrayLike | None = None,
    where: ArrayLike | None = None,
    reference_where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
    block_size: int | None = None,
    reduce_fn: Reduction | None = mean_active_by_side,
) -> Any:
    """Contrastive loss: positives within one margin, negatives beyond the other."""
    loss = separable_losses.define_contrastive(positive_margin, negative_margin)
    pairs = PairOptions(reference_labels, positions, where, reference_where)
    blocks = Blocks(metric, references, axis_name, block_size)
    return _blockwise(loss, embeddings, labels, pairs, blocks, reduce_fn)


@_of_embeddings(separable_losses.margin_loss)
def margin_loss(
    embeddings: ArrayLike,
    labels: ArrayLike | PairMasks,
    *,
    metric: Metric = cosine,
    margin: ArrayLike = 0.2,
    beta: ArrayLike = 1.2,
    references: ArrayLike | None = None,
    reference_labels: ArrayLike | None = None,
    positions: ArrayLike | None = None,
    where: ArrayLike | None = None,
    reference_where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
    block_size: int | None = None,
    reduce_fn: Reduction | None = mean_active,
) -> Any:
    """Margin loss around a boundary that can be learned."""
    loss = separable_losses.define_margin(margin, beta)
    pairs = PairOptions(reference_labels, positions, where, reference_where)
    blocks = Blocks(metric, references, axis_name, block_size)
    return _blockwise(loss, embeddings, labels, pairs, blocks, reduce_fn)


@_of_embeddings(separable_losses.sigmoid_loss)
def sigmoid_loss(
    embeddings: ArrayLike,
    labels: ArrayLike | PairMasks,
    *,
    metric: Metric = cosine,
    scale: ArrayLike = 10.0,
    bias: ArrayLike = -10.0,
    references: ArrayLike | None = None,
    reference_labels: ArrayLike | None = None,
    positions: ArrayLike | None = None,
    where: ArrayLike | None = None,
    reference_where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
    block_size: int | None = None,
    reduce_fn: Reduction | None = mean_of_anchors,
) -> Any:
    """Sigmoid loss of all pairs (SigLIP), of similarities $s = 1 - d$."""
    loss = separable_losses.define_sigmoid(scale, bias)
    pairs = PairOptions(reference_labels, positions, where, reference_where)
    blocks = Blocks(metric, references, axis_name, block_size)
    return _blockwise(loss, embeddings, labels, pairs, blocks, reduce_fn)


@_of_embeddings(softmax_losses.supcon_loss)
def supcon_loss(
    embeddings: ArrayLike,
    labels: ArrayLike | PairMasks,
    *,
    metric: Metric = cosine,
    temperature: ArrayLike = 0.1,
    false_negative_margin: ArrayLike | None = None,
    false_negative_share: ArrayLike | None = None,
    references: ArrayLike | None = None,
    reference_labels: ArrayLike | None = None,
    positions: ArrayLike | None = None,
    where: ArrayLike | None = None,
    reference_where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
    block_size: int | None = None,
    reduce_fn: Reduction | None = mean_valid,
) -> Any:
    """Supervised contrastive loss."""
    guard = false_negative_margin, false_negative_share
    loss = softmax_losses.define_supcon(temperature, *guard)
    pairs = PairOptions(reference_labels, positions, where, reference_where)
    blocks = Blocks(metric, references, axis_name, block_size)
    return _blockwise(loss, embeddings, labels, pairs, blocks, reduce_fn)


@_of_embeddings(softmax_losses.nt_xent_loss)
def nt_xent_loss(
    embeddings: ArrayLike,
    labels: ArrayLike | PairMasks,
    *,
    metric: Metric = cosine,
    temperature: ArrayLike = 0.1,
    false_negative_margin: ArrayLike | None = None,
    false_negative_share: ArrayLike | None = None,
    references: ArrayLike | None = None,
    reference_labels: ArrayLike | None = None,
    positions: ArrayLike | None = None,
    where: ArrayLike | None = None,
    reference_where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
    block_size: int | None = None,
    reduce_fn: Reduction | None = mean_valid,
) -> Any:
    """Normalised temperature-scaled cross entropy of each positive pair."""
    guard = false_negative_margin, false_negative_share
    loss = softmax_losses.define_nt_xent(temperature, *guard)
    pairs = PairOptions(reference_labels, positions, where, reference_where)
    blocks = Blocks(metric, references, axis_name, block_size)
    return _blockwise(loss, embeddings, labels, pairs, blocks, reduce_fn)


@_of_embeddings(softmax_losses.decoupled_contrastive_loss)
def decoupled_contrastive_loss(
    embeddings: ArrayLike,
    labels: ArrayLike | PairMasks,
    *,
    metric: Metric = cosine,
    temperature: ArrayLike = 0.1,
    false_negative_margin: ArrayLike | None = None,
    false_negative_share: ArrayLike | None = None,
    references: ArrayLike | None = None,
    reference_labels: ArrayLike | None = None,
    positions: ArrayLike | None = None,
    where: ArrayLike | None = None,
    reference_where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
    block_size: int | None = None,
    reduce_fn: Reduction | None = mean_valid,
) -> Any:
    """Decoupled contrastive loss, whose denominator has negatives alone."""
    guard = false_negative_margin, false_negative_share
    loss = softmax_losses.define_decoupled_contrastive(temperature, *guard)
    pairs = PairOptions(reference_labels, positions, where, reference_where)
    blocks = Blocks(metric, references, axis_name, block_size)
    return _blockwise(loss, embeddings, labels, pairs, blocks, reduce_fn)


@_of_embeddings(softmax_losses.nca_loss)
def nca_loss(
    embeddings: ArrayLike,
    labels: ArrayLike | PairMasks,
    *,
    metric: Metric = cosine,
    temperature: ArrayLike = 0.1,
    false_negative_margin: ArrayLike | None = None,
    false_negative_share: ArrayLike | None = None,
    references: ArrayLike | None = None,
    reference_labels: ArrayLike | None = None,
    positions: ArrayLike | None = None,
    where: ArrayLike | None = None,
    reference_where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
    block_size: int | None = None,
    reduce_fn: Reduction | None = mean_valid,
) -> Any:
    """Neighbourhood components analysis: the probability of any positive."""
    guard = false_negative_margin, false_negative_share
    loss = softmax_losses.define_nca(temperature, *guard)
    pairs = PairOptions(reference_labels, positions, where, reference_where)
    blocks = Blocks(metric, references, axis_name, block_size)
    return _blockwise(loss, embeddings, labels, pairs, blocks, reduce_fn)


@_of_embeddings(softmax_losses.info_nce_loss)
def info_nce_loss(
    embeddings: ArrayLike,
    labels: ArrayLike | PairMasks,
    *,
    metric: Metric = cosine,
    temperature: ArrayLike = 0.05,
    symmetric: bool = False,
    false_negative_margin: ArrayLike | None = None,
    false_negative_share: ArrayLike | None = None,
    references: ArrayLike | None = None,
    reference_labels: ArrayLike | None = None,
    positions: ArrayLike | None = None,
    where: ArrayLike | None = None,
    reference_where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
    block_size: int | None = None,
    reduce_fn: Reduction | None = mean_valid,
) -> Any:
    """InfoNCE of two sides, such as questions and answers or images and captions."""
    guard = false_negative_margin, false_negative_share
    loss = softmax_losses.define_info_nce(temperature, symmetric, *guard)
    pairs = PairOptions(reference_labels, positions, where, reference_where)
    blocks = Blocks(metric, references, axis_name, block_size)
    return _blockwise(loss, embeddings, labels, pairs, blocks, reduce_fn)


@_of_embeddings(softmax_losses.multi_similarity_loss)
def multi_similarity_loss(
    embeddings: ArrayLike,
    labels: ArrayLike | PairMasks,
    *,
    metric: Metric = cosine,
    alpha: ArrayLike = 2.0,
    beta: ArrayLike = 50.0,
    base: ArrayLike = 0.5,
    epsilon: ArrayLike | None = None,
    references: ArrayLike | None = None,
    reference_labels: ArrayLike | None = None,
    positions: ArrayLike | None = None,
    where: ArrayLike | None = None,
    reference_where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
    block_size: int | None = None,
    reduce_fn: Reduction | None = mean_of_anchors,
) -> Any:
    """Multi-similarity loss, of similarities $s = 1 - d$."""
    loss = softmax_losses.define_multi_similarity(alpha, beta, base, epsilon)
    pairs = PairOptions(reference_labels, positions, where, reference_where)
    blocks = Blocks(metric, references, axis_name, block_size)
    return _blockwise(loss, embeddings, labels, pairs, blocks, reduce_fn)


@_of_embeddings(softmax_losses.circle_loss)
def circle_loss(
    embeddings: ArrayLike,
    labels: ArrayLike | PairMasks,
    *,
    metric: Metric = cosine,
    margin: ArrayLike = 0.4,
    scale: ArrayLike = 80.0,
    references: ArrayLike | None = None,
    reference_labels: ArrayLike | None = None,
    positions: ArrayLike | None = None,
    where: ArrayLike | None = None,
    reference_where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
    block_size: int | None = None,
    reduce_fn: Reduction | None = mean_valid,
) -> Any:
    """Circle loss, of similarities $s = 1 - d$."""
    loss = softmax_losses.define_circle(margin, scale)
    pairs = PairOptions(reference_labels, positions, where, reference_where)
    blocks = Blocks(metric, references, axis_name, block_size)
    return _blockwise(loss, embeddings, labels, pairs, blocks, reduce_fn)


@_of_embeddings(softmax_losses.generalized_lifted_structure_loss)
def generalized_lifted_structure_loss(
    embeddings: ArrayLike,
    labels: ArrayLike | PairMasks,
    *,
    metric: Metric = cosine,
    margin: ArrayLike = 1.0,
    references: ArrayLike | None = None,
    reference_labels: ArrayLike | None = None,
    positions: ArrayLike | None = None,
    where: ArrayLike | None = None,
    reference_where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
    block_size: int | None = None,
    reduce_fn: Reduction | None = mean_valid,
) -> Any:
    """Lifted structure loss, generalised to all positives of an anchor."""
    loss = softmax_losses.define_generalized_lifted_structure(margin)
    pairs = PairOptions(reference_labels, positions, where, reference_where)
    blocks = Blocks(metric, references, axis_name, block_size)
    return _blockwise(loss, embeddings, labels, pairs, blocks, reduce_fn)


@_of_embeddings(softmax_losses.cosface_loss)
def cosface_loss(
    embeddings: ArrayLike,
    labels: ArrayLike | PairMasks,
    *,
    metric: Metric = cosine,
    margin: ArrayLike = 0.35,
    scale: ArrayLike = 64.0,
    references: ArrayLike | None = None,
    reference_labels: ArrayLike | None = None,
    positions: ArrayLike | None = None,
    where: ArrayLike | None = None,
    reference_where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
    block_size: int | None = None,
    reduce_fn: Reduction | None = mean_valid,
) -> Any:
    """CosFace: softmax over class vectors, with a margin on the similarity."""
    loss = softmax_losses.define_cosface(margin, scale)
    pairs = PairOptions(reference_labels, positions, where, reference_where)
    blocks = Blocks(metric, references, axis_name, block_size)
    return _blockwise(loss, embeddings, labels, pairs, blocks, reduce_fn)


@_of_embeddings(softmax_losses.arcface_loss)
def arcface_loss(
    embeddings: ArrayLike,
    labels: ArrayLike | PairMasks,
    *,
    metric: Metric = cosine,
    margin: ArrayLike = 0.5,
    scale: ArrayLike = 64.0,
    references: ArrayLike | None = None,
    reference_labels: ArrayLike | None = None,
    positions: ArrayLike | None = None,
    where: ArrayLike | None = None,
    reference_where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
    block_size: int | None = None,
    reduce_fn: Reduction | None = mean_valid,
) -> Any:
    """ArcFace: softmax over class vectors, with a margin on the angle."""
    loss = softmax_losses.define_arcface(margin, scale)
    pairs = PairOptions(reference_labels, positions, where, reference_where)
    blocks = Blocks(metric, references, axis_name, block_size)
    return _blockwise(loss, embeddings, labels, pairs, blocks, reduce_fn)


@_of_embeddings(softmax_losses.proxy_anchor_loss)
def proxy_anchor_loss(
    embeddings: ArrayLike,
    labels: ArrayLike | PairMasks,
    *,
    metric: Metric = cosine,
    margin: ArrayLike = 0.1,
    scale: ArrayLike = 32.0,
    references: ArrayLike | None = None,
    reference_labels: ArrayLike | None = None,
    positions: ArrayLike | None = None,
    where: ArrayLike | None = None,
    reference_where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
    block_size: int | None = None,
    reduce_fn: Reduction | None = mean_valid_by_side,
) -> Any:
    """Proxy-anchor loss: class vectors are the anchors, embeddings their references."""
    loss = softmax_losses.define_proxy_anchor(margin, scale)
    pairs = PairOptions(reference_labels, positions, where, reference_where)
    blocks = Blocks(metric, references, axis_name, block_size)
    return _blockwise(loss, embeddings, labels, pairs, blocks, reduce_fn)


@_of_embeddings(smooth_ap.smooth_ap_loss)
def smooth_ap_loss(
    embeddings: ArrayLike,
    labels: ArrayLike | PairMasks,
    *,
    metric: Metric = cosine,
    temperature: ArrayLike = 0.01,
    include_anchor: bool = True,
    references: ArrayLike | None = None,
    reference_labels: ArrayLike | None = None,
    positions: ArrayLike | None = None,
    where: ArrayLike | None = None,
    reference_where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
    block_size: int | None = None,
    reduce_fn: Reduction | None = mean_valid,
) -> Any:
    """One minus the smooth average precision of each anchor (SmoothAP)."""
    loss = smooth_ap.define_smooth_ap(temperature, include_anchor)
    pairs = PairOptions(reference_labels, positions, where, reference_where)
    blocks = Blocks(metric, references, axis_name, block_size)
    return _blockwise(loss, embeddings, labels, pairs, blocks, reduce_fn)
