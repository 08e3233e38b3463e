"""Training objectives: losses of a batch of embeddings, with their metrics."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

import tripletjax as tj
from tripletjax.blockwise import AxisName
from tripletjax.learn.training.losses import ACTIVE, MARGIN, find_loss

# From embeddings ``[n, d]`` and labels ``[n]`` to a scalar, or a scalar and metrics by
# name. With a memory, `tj.memory.references` gives further keywords.
Loss = Callable[..., Array | tuple[Array, dict[str, Array]]]

LABELS = "labels", "reference_labels"

# Name of the class vectors, and their learning rate as a multiple of the head's.
CLASS_VECTORS, CLASS_RATE = "class_vectors", 10.0
# Learned as logarithms, since they are positive.
POSITIVE = "temperature", "scale"


@dataclasses.dataclass(frozen=True, eq=False)
class LearnedLoss:
    """A loss with parameters that training learns, such as a temperature.

    Attributes:
        function: as a `Loss`, with the parameters before the embeddings.
        parameters: arrays by name, before the first step.
        tx: the optimizer of the parameters.
    """

    function: Loss
    parameters: dict[str, Any]
    tx: optax.GradientTransformation


# The loss of a training; of several, each holds from its step on.
Objective = Loss | LearnedLoss | Sequence[tuple[int, Loss]]


@functools.lru_cache
def batch_loss(
    name: str = "semi-hard",
    *,
    margin: float | None = None,
    temperature: float | None = None,
    scale: float | None = None,
    axis_name: AxisName | None = None,
) -> Loss:
    """A loss of labelled batches.

    Args:
        name: of `LOSSES`.
        margin: of triplets in Euclidean distance; of other losses as they define it.
        temperature: of softmax losses.
        scale: of similarities.
        axis_name: mesh axes over which the work is split, as in
            `tripletjax.blockwise`.

    Returns:
        A function from embeddings ``[n, d]`` and labels ``[n]`` to the loss, and to one
        metric: ``active``, the share of triplets or pairs with a cost above 0, or
        ``recall_at_1``, the share of anchors whose nearest reference is a positive.

    Raises:
        ValueError: if there is no such loss, the loss has no such option, or it
            requires class vectors.
    """
    if find_loss(name).class_vectors:
        raise ValueError(f"{name} requires class vectors: use learned_loss.")
    numbers = {"margin": margin, "temperature": temperature, "scale": scale}
    return _with_numbers(name, axis_name, **numbers)


@functools.lru_cache
def learned_loss(
    name: str,
    *,
    classes: int,
    dim: int,
    learning_rate: Callable[[Any], Any] | float,
    seed: int = 0,
    margin: float | None = None,
    temperature: float | None = None,
    scale: float | None = None,
    axis_name: AxisName | None = None,
) -> LearnedLoss:
    """A loss of labelled batches whose parameters are learned.

    Class vectors of CosFace, ArcFace and ProxyAnchor, or else the temperature, scale,
    bias or beta of the loss. They begin with the given values, or the defaults.

    Args:
        name: of `LOSSES`.
        classes: number of classes; labels are from 0 to classes - 1.
        dim: dimensions of embeddings.
        learning_rate: of the head, as for `optax.adam`; class vectors have 10 times it.
        seed: of the first class vectors.
        margin, temperature, scale, axis_name: as in `batch_loss`.

    Raises:
        ValueError: if the loss has no such option or nothing to learn.
    """
    one = find_loss(name)
    numbers = {"margin": margin, "temperature": temperature, "scale": scale}
    if one.class_vectors:
        return _with_class_vectors(
            name, numbers, axis_name, classes, dim, learning_rate, seed
        )
    if not one.learned:
        raise ValueError(f"{name} has no parameters to learn.")
    initial = dict(one.learned)
    initial |= {k: v for k, v in numbers.items() if k in initial and v is not None}
    fixed = {k: v for k, v in numbers.items() if k not in initial}
    loss = _with_numbers(name, axis_name, **fixed)

    def function(parameters: dict[str, Array], *args: Any, **pairs: Any) -> Any:
        values = {k: jnp.exp(v) if k in POSITIVE else v for k, v in parameters.items()}
        value, metrics = loss(*args, **values, **pairs)
        return value, metrics | values

    parameters = {
        k: jnp.asarray(np.log(v) if k in POSITIVE else v, jnp.float32)
        for k, v in initial.items()
    }
    return LearnedLoss(function, parameters, optax.adam(learning_rate))


def _with_class_vectors(
    name: str,
    numbers: dict[str, float | None],
    axis_name: AxisName | None,
    classes: int,
    dim: int,
    learning_rate: Callable[[Any], Any] | float,
    seed: int,
) -> LearnedLoss:
    loss = _with_numbers(name, axis_name, **numbers)

    def function(parameters: dict[str, Array], x: Array, labels: Array) -> Any:
        vectors = parameters[CLASS_VECTORS]
        return loss(x, labels, references=vectors, reference_labels=jnp.arange(classes))

    def fast(step: Any) -> Any:
        rate = learning_rate(step) if callable(learning_rate) else learning_rate
        return CLASS_RATE * rate

    vectors = jax.random.normal(jax.random.key(seed), (classes, dim))
    parameters = {CLASS_VECTORS: tj.normalize(vectors)}
    return LearnedLoss(function, parameters, optax.adam(fast))


def _with_numbers(
    name: str, axis_name: AxisName | None, **numbers: float | None
) -> Callable[..., tuple[Array, dict[str, Array]]]:
    """The function of a loss, with its options and metric."""
    one = find_loss(name)
    options: dict[str, Any] = dict(one.numbers)
    for option, value in numbers.items():
        if value is not None and option not in options:
            raise ValueError(f"{option} is not an option of the loss {name}.")
        if value is not None:
            options[option] = value
    if one.metric is not None:
        options["metric"] = one.metric
    reduce_fn = _with_share(one.mean, one.share)
    return functools.partial(
        one.function, **options, reduce_fn=reduce_fn, axis_name=axis_name
    )


@functools.lru_cache
def relevance_loss(
    name: str,
    levels: tuple[tuple[int, ...], ...],
    *,
    margin: float = MARGIN,
    axis_name: AxisName | None = None,
) -> Loss:
    r"""Weighted mean of a triplet loss at each level of a hierarchy of classes.

    $$\sum_{l=0}^{L} 2^{-l} \, \text{loss}(x, \text{levels}_l(\text{labels}),
      (l + 1) \cdot \text{margin}) \; / \; \sum_{l=0}^{L} 2^{-l}$$

    At level 0 positives are images of one class. At level l positives are images of
    classes in one group, with a larger margin and half the weight of the level below.

    Args:
        name: semi-hard, hard or all.
        levels: for each level from the finest, the group of each label.
        margin: of level 0, in Euclidean distance.
        axis_name: mesh axes over which the work is split.

    Returns:
        A function from embeddings ``[n, d]`` and labels ``[n]`` to the loss, and to the
        metrics ``active``, ``active_1`` and so on, one for each level.

    Raises:
        ValueError: if the loss is not one of triplets.
    """
    if not find_loss(name).mines_triplets:
        raise ValueError(f"loss must be semi-hard, hard or all, got {name!r}.")
    weights = [2.0**-level for level in range(len(levels) + 1)]
    losses = [
        _with_numbers(name, axis_name, margin=(level + 1) * margin)
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
            active[f"{ACTIVE}_{level}" if level else ACTIVE] = metrics[ACTIVE]
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
    reduce_fn = _with_share(tj.mean_valid, ACTIVE)

    def loss(x: Array, indices: Array) -> tuple[Array, dict[str, Array]]:
        of_parts = x.reshape(parts, 3, -1, x.shape[-1])
        triplets = jnp.moveaxis(of_parts, 1, 0).reshape(3, -1, x.shape[-1])
        return tj.triplet_margin_loss(*triplets, margin=margin, reduce_fn=reduce_fn)

    return loss


def _with_share(mean: Callable, name: str) -> tj.SumReduction:
    return tj.SumReduction(
        lambda sums: (mean(sums), {name: sums.active / jnp.maximum(sums.valid, 1)})
    )
