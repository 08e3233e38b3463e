"""What is minimised: losses of a batch of embeddings, with their metrics."""

import functools
from collections.abc import Callable

import jax.numpy as jnp
from jax import Array

import tripletjax as tj
from tripletjax.blockwise import AxisName

# How triplets are mined and their costs averaged.
MINING: dict[str, tuple[Callable, Callable]] = {
    "all": (tj.blockwise.batch_all_loss, tj.mean_active),
    "semi-hard": (tj.blockwise.batch_semi_hard_loss, tj.mean_valid),
    "hard": (tj.blockwise.batch_hard_loss, tj.mean_valid),
}

# From embeddings ``[n, d]`` and labels ``[n]`` to a scalar, or a scalar and metrics by
# name. With a memory it is also given what `tj.memory.references` makes, by keyword.
Loss = Callable[..., Array | tuple[Array, dict[str, Array]]]

LABELS = "labels", "reference_labels"


@functools.lru_cache
def mined_loss(
    mining: str = "semi-hard",
    *,
    margin: float = 0.2,
    axis_name: AxisName | None = None,
) -> Loss:
    """A triplet loss within the batch, with the share of active triplets as a metric.

    Args:
        mining: which triplets: all, semi-hard or hard.
        margin: in Euclidean distance.
        axis_name: the mesh axes over which the work is split, as in
            `tripletjax.blockwise`.

    Raises:
        ValueError: if there is no such mining.
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
    margin: float = 0.2,
    axis_name: AxisName | None = None,
) -> Loss:
    r"""Who shares more is nearer: a weighted mean of a mined loss at each level.

    $$\sum_{l=0}^{L} 2^{-l} \, \text{loss}(x, \text{levels}_l(\text{labels}),
      (l + 1) \cdot \text{margin}) \; / \; \sum_{l=0}^{L} 2^{-l}$$

    At level 0 images of one class are to be nearer than all others, by the margin; at
    level l images of classes of one group than those of other groups, by a margin that
    grows with the level, and with half the weight of the level below.

    Args:
        mining: which triplets: all, semi-hard or hard.
        levels: for each level from the finest, the group of each label.
        margin: of the classes themselves, in Euclidean distance.
        axis_name: as in `mined_loss`.

    Raises:
        ValueError: if there is no such mining.
    """
    weights = [2.0**-level for level in range(len(levels) + 1)]
    losses = [
        _mined(mining, (level + 1) * margin, axis_name)
        for level in range(len(levels) + 1)
    ]

    def loss(x: Array, labels: Array, **pairs: Array) -> tuple[Array, dict[str, Array]]:
        total, told = jnp.zeros(()), {}
        for level, one in enumerate(losses):
            of = dict(pairs, labels=labels)
            if level:
                groups = jnp.array(levels[level - 1])
                of |= {k: groups[of[k]] for k in LABELS if k in of}
            value, metrics = one(x, **of)
            total += weights[level] / sum(weights) * value
            told[f"active_{level}" if level else "active"] = metrics["active"]
        return total, told

    return loss


@functools.lru_cache
def given_loss(*, margin: float = 0.2, parts: int = 1) -> Loss:
    """The mean loss of the triplets of a `sampling.TripletBatches`.

    Args:
        margin: in Euclidean distance.
        parts: of how many such batches this is made, as of several processes.
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
