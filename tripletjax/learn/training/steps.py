"""One training step, as a jitted function from one `TrainState` to the next."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array
from jax.typing import ArrayLike

import tripletjax as tj
from tripletjax.learn.distributed.placement import ONE_DEVICE, Placement
from tripletjax.learn.networks.convolution import jit
from tripletjax.learn.networks.embedding import as_inputs, rows_of, strongly_typed
from tripletjax.learn.training.objectives import Loss
from tripletjax.learn.training.selection import Candidate
from tripletjax.memory import Memory


class Params(NamedTuple):
    """Parameters that training learns.

    Attributes:
        model: `nnx.State` of the model.
        loss: learned parameters of the loss, by name; None if it has none.
    """

    model: Any
    loss: Any = None


class TrainState(NamedTuple):
    """The state of a training between two steps.

    Attributes:
        params: of the model and of the loss.
        rest: other variables of the model, such as batch statistics.
        optimizer: state of the optimizer.
        average: exponential moving average (EMA) of `params`, or None.
        finite: whether all losses and gradients so far are finite.
        candidate: the model that the last one is compared with, or None.
        memory: embeddings of earlier batches, or None.
        slow: EMA of the model's parameters, which embeds the batch for the memory; None
            if the memory takes the embeddings of the batch.
    """

    params: Params
    rest: nnx.State
    optimizer: optax.OptState
    average: Params | None
    finite: Array
    candidate: Candidate | None = None
    memory: Memory | None = None
    slow: nnx.State | None = None


@functools.partial(
    jit,
    static_argnames=["graph", "tx", "loss", "augment", "ema_decay", "memory_momentum"],
    donate_argnames="state",
)
def train_step(
    state: TrainState,
    inputs: Any,
    labels: Array,
    key: Array,
    remember: ArrayLike = True,
    *,
    graph: nnx.GraphDef,
    tx: optax.GradientTransformation,
    loss: Loss,
    augment: Callable[[Array, Any], Any] | None,
    ema_decay: float,
    memory_momentum: float = 0.0,
) -> tuple[TrainState, dict[str, Array]]:
    """Take one training step.

    Args:
        state: the state before the step, whose buffers are donated.
        inputs: uint8 or float images ``[n, ...]``, or a pytree of arrays with n rows.
        labels: integers ``[n]``, or the labels that `loss` requires.
        key: random key of the augmentation.
        remember: whether the memory keeps the batch.
        graph: graph of the model.
        tx: optimizer of `Params`.
        loss: from embeddings and labels to a loss, with or without metrics; first its
            parameters, if it has any.
        augment: augmentation of the inputs, or None.
        ema_decay: share of `state.average` that a step keeps.
        memory_momentum: share of `state.slow` that a step keeps.

    Returns:
        The state after the step, and scalar metrics with ``"loss"``.
    """
    inputs = _augment(inputs, key, augment=augment)

    def loss_of(params: Params) -> tuple[Array, tuple]:
        x, rest = _train_embed(params.model, state.rest, inputs, graph=graph)
        value, metrics = _compute_loss(x, params.loss, labels, state.memory, loss)
        return value, (x, rest, metrics)

    (value, (x, rest, metrics)), gradients = jax.value_and_grad(loss_of, has_aux=True)(
        state.params
    )
    if state.slow is not None:
        x, _ = _train_embed(state.slow, state.rest, inputs, graph=graph)
    state = state._replace(rest=rest, memory=_push(state.memory, x, labels, remember))
    state = _next_state(
        state,
        value,
        gradients,
        tx=tx,
        ema_decay=ema_decay,
        memory_momentum=memory_momentum,
    )
    return state, {"loss": value} | metrics


@jax.jit
def _push(
    memory: Memory | None, x: Array, labels: Array, remember: ArrayLike
) -> Memory | None:
    if memory is None:
        return None
    where = jnp.broadcast_to(remember, labels.shape)
    return tj.memory.push(memory, x, labels, where=where)


def train_step_in_chunks(
    state: TrainState,
    inputs: Any,
    labels: Array,
    key: Array,
    remember: ArrayLike = True,
    *,
    graph: nnx.GraphDef,
    tx: optax.GradientTransformation,
    loss: Loss,
    augment: Callable[[Array, Any], Any] | None,
    ema_decay: float,
    memory_momentum: float = 0.0,
    embed_chunk_size: int,
    on: Placement = ONE_DEVICE,
) -> tuple[TrainState, dict[str, Array]]:
    """Take the step of `train_step`, embedding a chunk of inputs at a time.

    The backward pass computes the activations of each chunk again. The loop runs in
    Python, since XLA runs convolutions within its own loops many times slower on CPUs.

    Args:
        state, inputs, labels, key, remember: as in `train_step`.
        graph, tx, loss, augment, ema_decay, memory_momentum: as in `train_step`.
        embed_chunk_size: inputs of a chunk, taken evenly from every device.
        on: devices that the batch is split over.

    Returns:
        The state after the step, and scalar metrics with ``"loss"``.
    """
    inputs = _augment(inputs, key, augment=augment)
    devices = on.count
    size, per_device = max(1, embed_chunk_size // devices), rows_of(inputs) // devices
    ends = tuple(range(size, per_device, size))
    chunks = _split(inputs, ends, devices)
    params = state.params
    parts, rests = [], [state.rest]
    for chunk in chunks:
        x, rest = _train_embed_jitted(params.model, rests[-1], chunk, graph=graph)
        parts.append(on.paced(x))
        rests.append(rest)
    x = _join(parts, devices)
    value, metrics, (along_x, along_loss) = _loss_gradient(
        x, params.loss, labels, state.memory, loss=loss
    )
    gradients = jax.tree.map(jnp.zeros_like, params.model)
    for chunk, rest, along in zip(chunks, rests, _split(along_x, ends, devices)):
        gradients = _add_gradient(
            gradients, params.model, rest, chunk, along, graph=graph
        )
        on.paced(gradients)
    if state.slow is not None:
        slow = [
            on.paced(_train_embed_jitted(state.slow, rest, chunk, graph=graph)[0])
            for chunk, rest in zip(chunks, rests)
        ]
        x = _join(slow, devices)
    memory = _push(state.memory, x, labels, remember)
    state = _next_state_jitted(
        state._replace(rest=rests[-1], memory=memory),
        value,
        Params(gradients, along_loss),
        tx=tx,
        ema_decay=ema_decay,
        memory_momentum=memory_momentum,
    )
    return state, {"loss": value} | metrics


@functools.partial(jax.jit, static_argnames=("ends", "devices"))
def _split(batch: Any, ends: tuple[int, ...], devices: int) -> list[Any]:
    """Chunks of a batch, which end at rows `ends` of every device."""

    def split(x: Array) -> list[Array]:
        parts = jnp.split(x.reshape(devices, -1, *x.shape[1:]), ends, axis=1)
        return [part.reshape(-1, *x.shape[1:]) for part in parts]

    leaves, treedef = jax.tree.flatten(batch)
    return [treedef.unflatten(chunk) for chunk in zip(*map(split, leaves))]


@functools.partial(jax.jit, static_argnames="devices")
def _join(parts: list[Array], devices: int) -> Array:
    """The batch of the chunks of `_split`."""
    batch = [part.reshape(devices, -1, *part.shape[1:]) for part in parts]
    return jnp.concatenate(batch, axis=1).reshape(-1, *parts[0].shape[1:])


@functools.partial(jax.jit, static_argnames="augment")
def _augment(
    inputs: Any, key: Array, *, augment: Callable[[Array, Any], Any] | None
) -> Any:
    inputs = as_inputs(inputs)
    return inputs if augment is None else augment(key, inputs)


def _train_embed(
    params: nnx.State, rest: nnx.State, inputs: Any, *, graph: nnx.GraphDef
) -> tuple[Array, nnx.State]:
    """Embeddings, and the other variables of the model after them."""
    model = nnx.merge(graph, params, rest, copy=True)
    x = model(inputs)
    return x, nnx.state(model, nnx.Not(nnx.Param))


_train_embed_jitted = jit(_train_embed, static_argnames="graph")


@functools.partial(jit, static_argnames="graph", donate_argnames="gradients")
def _add_gradient(
    gradients: nnx.State,
    params: nnx.State,
    rest: nnx.State,
    inputs: Any,
    along_x: Array,
    *,
    graph: nnx.GraphDef,
) -> nnx.State:
    """Add the gradient of a chunk, from that of its embeddings."""
    _, pull_back = jax.vjp(
        lambda params: _train_embed(params, rest, inputs, graph=graph)[0], params
    )
    return jax.tree.map(jnp.add, gradients, *pull_back(along_x))


@functools.partial(jax.jit, static_argnames="loss")
def _loss_gradient(
    x: Array, params: Any, labels: Array, memory: Memory | None, *, loss: Loss
) -> tuple[Array, dict[str, Array], tuple[Array, Any]]:
    """The loss, its metrics, and its gradients for embeddings and parameters."""
    (value, metrics), along = jax.value_and_grad(_compute_loss, (0, 1), has_aux=True)(
        x, params, labels, memory, loss
    )
    return value, metrics, along


def _compute_loss(
    x: Array, params: Any, labels: Array, memory: Memory | None, loss: Loss
) -> tuple[Array, dict[str, Array]]:
    """The loss of a batch, and its metrics."""
    pairs = {} if memory is None else tj.memory.references(memory, x, labels)
    learned = () if params is None else (params,)
    value = loss(*learned, x, labels, **pairs)
    value, metrics = value if isinstance(value, tuple) else (value, {})
    # The root mean square distance between two embeddings of the batch.
    spread = jnp.sqrt(2 * jnp.sum(jnp.var(x, axis=0, ddof=1)))
    length = jnp.sqrt(jnp.mean(jnp.sum(x * x, axis=-1)))
    return value, metrics | {"spread": spread, "length": length}


def _next_state(
    state: TrainState,
    value: Array,
    gradients: Params,
    *,
    tx: optax.GradientTransformation,
    ema_decay: float,
    memory_momentum: float,
) -> TrainState:
    updates, optimizer = tx.update(gradients, state.optimizer, state.params)
    params: Any = optax.apply_updates(state.params, updates)
    averaged: Any = state.average
    if averaged is not None:
        averaged: Any = optax.incremental_update(params, averaged, 1 - ema_decay)
    slow: Any = state.slow
    if slow is not None:
        slow: Any = optax.incremental_update(params.model, slow, 1 - memory_momentum)
    finite = state.finite
    for x in jax.tree.leaves((value, gradients)):
        finite &= jnp.isfinite(x).all()
    return strongly_typed(
        state._replace(
            params=params,
            optimizer=optimizer,
            average=averaged,
            finite=finite,
            slow=slow,
        )
    )


_next_state_jitted = jax.jit(
    _next_state,
    static_argnames=("tx", "ema_decay", "memory_momentum"),
    donate_argnames="state",
)
