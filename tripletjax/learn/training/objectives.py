"""Training objectives: losses of a batch of embeddings, with their metrics."""

import functools
from collections.abc import Callable

import jax.numpy as jnp
from jax import Array

import tripletjax as tj
from tripletjax.blockwise import AxisName

# The loss and the mean of each way of mining triplets.
MINING: dict[str, tuple[Callable, Callable]] = {
    "all": (tj.blockwise.batch_all_loss, tj.mean_active),
    "semi-hard": (tj.blockwise.batch_semi_hard_loss, tj.mean_valid),
    "hard": (tj.blockwise.batch_hard_loss, tj.mean_valid),
}

# From embeddings ``[n, d]`` and labels ``[n]`` to a scalar, or a scalar and metrics by
# name. With a memory, `tj.memory.references` gives further keywords.
Loss = Callable[..., Array | tuple[Array, dict[str, Array]]]

LABELS = "labels", "reference_labels"

# Default margin of training, in Euclidean distance between unit vectors.
# `benchmarks/margins.py` compares margins.
MARGIN = 0.2


@functools.lru_cache
def mined_loss(
    mining: str = "semi-hard",
    *,
    margin: float = MARGIN,
    axis_name: AxisName | None = None,
) -> Loss:
    """Triplet loss of the triplets mined in a batch.

    Args:
        mining: all, semi-hard or hard triplets.
        margin: in Euclidean distance.
        axis_name: mesh axes over which the work is split, as in
            `tripletjax.blockwise`.

    Returns:
        A function from embeddings ``[n, d]`` and labels ``[n]`` to the loss, and to
        the metric ``active``, the share of triplets with a loss above 0.

    Raises:
        ValueError: if mining has another value.
    """
    return _mined(mining, margin, axis_name)


def _mined(
    mining: str, margin: float, axis_name: AxisName | None
) -> Callable[..., tuple[Array, dict[str, Array]]]:
    if mining not in MINING:
        raise ValueError(f"mining must be one of {', '.join(MINING)}, got {mining!r}.")
    loss_of, mean = MINING[mining]
    return functools.partial(
        loss_of, margin=margin, reduce_fn=_with_active(mean), axis_name=axis_name
    )


@functools.lru_cache
def relevance_loss(
    mining: str,
    levels: tuple[tuple[int, ...], ...],
    *,
    margin: float = MARGIN,
    axis_name: AxisName | None = None,
) -> Loss:
    r"""Weighted mean of a mined loss at each level of a hierarchy of classes.

    $$\sum_{l=0}^{L} 2^{-l} \, \text{loss}(x, \text{levels}_l(\text{labels}),
      (l + 1) \cdot \text{margin}) \; / \; \sum_{l=0}^{L} 2^{-l}$$

    At level 0 positives are images of one class. At level l positives are images of
    classes in one group, with a larger margin and half the weight of the level below.

    Args:
        mining: all, semi-hard or hard triplets.
        levels: for each level from the finest, the group of each label.
        margin: of level 0, in Euclidean distance.
        axis_name: mesh axes over which the work is split.

    Returns:
        A function from embeddings ``[n, d]`` and labels ``[n]`` to the loss, and to the
        metrics ``active``, ``active_1`` and so on, one for each level.

    Raises:
        ValueError: if mining has another value.
    """
    weights = [2.0**-level for level in range(len(levels) + 1)]
    losses = [
        _mined(mining, (level + 1) * margin, axis_name)
        for level in range(len(levels) + 1)
    ]

    def loss(x: Array, labels: Array, **pairs: Array) -> tuple[Array, dict[str, Array]]:
        total, active = jnp.zeros(()), {}
        for level, one in enumerate(losses):
            of = dict(pairs, labels=labels)
            if level:
                groups = jnp.array(levels[level - 1])
                of |= {k: groups[of[k]] for k in LABELS if k in of}
            value, metrics = one(x, **of)
            total += weights[level] / sum(weights) * value
            active[f"active_{level}" if level else "active"] = metrics["active"]
        return total, active

    return loss


@functools.lru_cache
def given_loss(*, margin: float = MARGIN, parts: int = 1) -> Loss:
    """Mean triplet loss of given triplets, in batches of `sampling.TripletBatches`.

    Args:
        margin: in Euclidean distance.
        parts: number of such batches that make one, as one from each process.

    Returns:
        A function from embeddings ``[n, d]`` and indices to the loss, and to the
        metric ``active``, the share of triplets with a loss above 0.
    """
    reduce_fn = _with_active(tj.mean_valid)

    def loss(x: Array, indices: Array) -> tuple[Array, dict[str, Array]]:
        of_parts = x.reshape(parts, 3, -1, x.shape[-1])
        triplets = jnp.moveaxis(of_parts, 1, 0).reshape(3, -1, x.shape[-1])
        return tj.triplet_margin_loss(*triplets, margin=margin, reduce_fn=reduce_fn)

    return loss


def _with_active(mean: Callable) -> tj.SumReduction:
    return tj.SumReduction(
        lambda sums: (mean(sums), {"active": sums.active / jnp.maximum(sums.valid, 1)})
    )
