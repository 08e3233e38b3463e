"""One step of training, as jitted functions of everything that changes."""

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
from tripletjax.learn.networks.embedding import as_floats, strongly_typed
from tripletjax.learn.training.objectives import Loss
from tripletjax.learn.training.selection import Candidate
from tripletjax.memory import Memory


class TrainState(NamedTuple):
    """Everything that one step hands to the next.

    Attributes:
        params: of the model.
        rest: what else the model holds, such as statistics.
        optimizer: the state of the optimizer.
        average: an exponential average of the parameters, or None.
        finite: whether all losses and gradients have been finite.
        candidate: the model that the last one is compared with, or None.
        memory: embeddings of earlier batches, or None.
        slow: an average of the parameters that the memory's embeddings are made with,
            or None for those of the batch themselves.
    """

    params: nnx.State
    rest: nnx.State
    optimizer: optax.OptState
    average: nnx.State | None
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
    images: Array,
    labels: Array,
    key: Array,
    remember: ArrayLike = True,
    *,
    graph: nnx.GraphDef,
    tx: optax.GradientTransformation,
    loss: Loss,
    augment: Callable[[Array, Array], Array] | None,
    ema_decay: float,
    memory_momentum: float = 0.0,
) -> tuple[TrainState, dict[str, Array]]:
    """One step of training, and its metrics.

    Whether the memory, if there is one, is to keep the batch, `remember` says.
    """
    images = _augmented(images, key, augment=augment)

    def loss_of(params: nnx.State) -> tuple[Array, tuple]:
        x, rest = _train_embed(params, state.rest, images, graph=graph)
        value, metrics = _measured(x, labels, state.memory, loss)
        return value, (x, rest, metrics)

    (value, (x, rest, metrics)), gradients = jax.value_and_grad(loss_of, has_aux=True)(
        state.params
    )
    if state.slow is not None:
        x, _ = _train_embed(state.slow, state.rest, images, graph=graph)
    state = state._replace(rest=rest, memory=_pushed(state.memory, x, labels, remember))
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
def _pushed(
    memory: Memory | None, x: Array, labels: Array, remember: ArrayLike
) -> Memory | None:
    if memory is None:
        return None
    where = jnp.broadcast_to(remember, labels.shape)
    return tj.memory.push(memory, x, labels, where=where)


def train_step_in_chunks(
    state: TrainState,
    images: Array,
    labels: Array,
    key: Array,
    remember: ArrayLike = True,
    *,
    graph: nnx.GraphDef,
    tx: optax.GradientTransformation,
    loss: Loss,
    augment: Callable[[Array, Array], Array] | None,
    ema_decay: float,
    memory_momentum: float = 0.0,
    embed_chunk_size: int,
    on: Placement = ONE_DEVICE,
) -> tuple[TrainState, dict[str, Array]]:
    """The same step, embedding so many images at a time.

    Activations are made again on the way back, and not kept. The loop is Python's: XLA
    runs convolutions in its own loops many times slower on CPUs. Of a batch that is
    split over devices, a chunk has as many images of each.
    """
    images = _augmented(images, key, augment=augment)
    devices = on.count
    each, own = max(1, embed_chunk_size // devices), len(images) // devices
    ends = tuple(range(each, own, each))
    chunks = _split(images, ends, devices)
    parts, rests = [], [state.rest]
    for some in chunks:
        x, rest = _train_embed_jitted(state.params, rests[-1], some, graph=graph)
        parts.append(on.paced(x))
        rests.append(rest)
    x = _joined(parts, devices)
    value, metrics, along_x = _loss_gradient(x, labels, state.memory, loss=loss)
    gradients = jax.tree.map(jnp.zeros_like, state.params)
    for some, rest, along in zip(chunks, rests, _split(along_x, ends, devices)):
        gradients = _add_gradient(
            gradients, state.params, rest, some, along, graph=graph
        )
        on.paced(gradients)
    if state.slow is not None:
        slow = [
            on.paced(_train_embed_jitted(state.slow, rest, some, graph=graph)[0])
            for some, rest in zip(chunks, rests)
        ]
        x = _joined(slow, devices)
    memory = _pushed(state.memory, x, labels, remember)
    state = _next_state_jitted(
        state._replace(rest=rests[-1], memory=memory),
        value,
        gradients,
        tx=tx,
        ema_decay=ema_decay,
        memory_momentum=memory_momentum,
    )
    return state, {"loss": value} | metrics


@functools.partial(jax.jit, static_argnames=("ends", "devices"))
def _split(x: Array, ends: tuple[int, ...], devices: int) -> list[Array]:
    """Chunks of a batch, that end at some rows of every device."""
    parts = jnp.split(x.reshape(devices, -1, *x.shape[1:]), ends, axis=1)
    return [part.reshape(-1, *x.shape[1:]) for part in parts]


@functools.partial(jax.jit, static_argnames="devices")
def _joined(parts: list[Array], devices: int) -> Array:
    """The batch that was split."""
    whole = [part.reshape(devices, -1, *part.shape[1:]) for part in parts]
    return jnp.concatenate(whole, axis=1).reshape(-1, *parts[0].shape[1:])


@functools.partial(jax.jit, static_argnames="augment")
def _augmented(
    images: Array, key: Array, *, augment: Callable[[Array, Array], Array] | None
) -> Array:
    images = as_floats(images)
    return images if augment is None else augment(key, images)


def _train_embed(
    params: nnx.State, rest: nnx.State, images: Array, *, graph: nnx.GraphDef
) -> tuple[Array, nnx.State]:
    """Embeddings, and what else the model then holds."""
    model = nnx.merge(graph, params, rest, copy=True)
    x = model(images)
    return x, nnx.state(model, nnx.Not(nnx.Param))


_train_embed_jitted = jit(_train_embed, static_argnames="graph")


@functools.partial(jit, static_argnames="graph", donate_argnames="gradients")
def _add_gradient(
    gradients: nnx.State,
    params: nnx.State,
    rest: nnx.State,
    images: Array,
    along_x: Array,
    *,
    graph: nnx.GraphDef,
) -> nnx.State:
    """Adds what some images have in the gradient, by that of their embeddings."""
    _, pull_back = jax.vjp(
        lambda params: _train_embed(params, rest, images, graph=graph)[0], params
    )
    return jax.tree.map(jnp.add, gradients, *pull_back(along_x))


@functools.partial(jax.jit, static_argnames="loss")
def _loss_gradient(
    x: Array, labels: Array, memory: Memory | None, *, loss: Loss
) -> tuple[Array, dict[str, Array], Array]:
    (value, metrics), along_x = jax.value_and_grad(_measured, has_aux=True)(
        x, labels, memory, loss
    )
    return value, metrics, along_x


def _measured(
    x: Array, labels: Array, memory: Memory | None, loss: Loss
) -> tuple[Array, dict[str, Array]]:
    """The loss of a batch, and its metrics."""
    pairs = {} if memory is None else tj.memory.references(memory, x, labels)
    value = loss(x, labels, **pairs)
    value, metrics = value if isinstance(value, tuple) else (value, {})
    # The root of the mean squared distance of two of them.
    spread = jnp.sqrt(2 * jnp.sum(jnp.var(x, axis=0, ddof=1)))
    length = jnp.sqrt(jnp.mean(jnp.sum(x * x, axis=-1)))
    return value, metrics | {"spread": spread, "length": length}


def _next_state(
    state: TrainState,
    value: Array,
    gradients: nnx.State,
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
        slow: Any = optax.incremental_update(params, slow, 1 - memory_momentum)
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
