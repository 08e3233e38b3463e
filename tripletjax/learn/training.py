"""The loop that trains a model in place, for any model and images.

model = MyModel(rngs=nnx.Rngs(0))
batches = sampling.ImageBatches(images, labels, classes=8, per_class=4)
for line in training.fit(model, optax.adam(1e-3), batches, steps=1000):
    print(line)
embeddings = training.embed_images(model, images)
"""

import contextlib
import functools
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array
from tqdm import tqdm

import tripletjax as tj
from tripletjax.learn.checkpoints import Checkpoints
from tripletjax.learn.embedder import as_floats as as_floats
from tripletjax.learn.embedder import embed_images as embed_images

# How triplets are mined and their costs averaged.
MINING: dict[str, tuple[Callable, Callable]] = {
    "all": (tj.blockwise.batch_all_loss, tj.mean_active),
    "semi-hard": (tj.blockwise.batch_semi_hard_loss, tj.mean_valid),
    "hard": (tj.blockwise.batch_hard_loss, tj.mean_valid),
}

# Embeddings that are so close together, in multiples of their length, have collapsed.
COLLAPSED = 0.02

# From embeddings ``[n, d]`` and labels ``[n]`` to a scalar, or a scalar and metrics by
# name.
Loss = Callable[[Array, Array], Array | tuple[Array, dict[str, Array]]]


class Batches(Protocol):
    """``batches[step]`` is images ``[n, h, w, c]`` and labels ``[n]``.

    Images are uint8, or floats from 0 to 1.
    """

    def __getitem__(self, step: int) -> tuple[np.ndarray, np.ndarray]: ...


class CollapseWarning(UserWarning):
    """All embeddings have become nearly the same."""


class TrainState(NamedTuple):
    """Everything that one step hands to the next.

    Attributes:
        params: of the model.
        rest: what else the model holds, such as statistics.
        optimizer: the state of the optimizer.
        average: an exponential average of the parameters, or None.
        finite: whether all losses and gradients have been finite.
        best: the best validation so far.
    """

    params: nnx.State
    rest: nnx.State
    optimizer: optax.OptState
    average: nnx.State | None
    finite: Array
    best: Array


class Interrupts:
    """Notes that the process was asked to stop; a second time stops it at once.

    Attributes:
        asked: whether it was, by SIGINT or SIGTERM.
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interrupts":
        # Only the main thread is told of signals.
        if threading.current_thread() is threading.main_thread():
            numbers = signal.SIGINT, signal.SIGTERM
            self._before = {n: signal.signal(n, self._note) for n in numbers}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves signals to who had them before."""
        self.__exit__()
        try:
            yield
        finally:
            self.__enter__()

    def _note(self, number: int, frame: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


@functools.lru_cache
def mined_loss(mining: str = "semi-hard", *, margin: float = 0.2) -> Loss:
    """A triplet loss within the batch, with the share of active triplets as a metric.

    Args:
        mining: which triplets: all, semi-hard or hard.
        margin: in Euclidean distance.

    Raises:
        ValueError: if there is no such mining.
    """
    if mining not in MINING:
        raise ValueError(f"mining must be one of {', '.join(MINING)}, got {mining!r}.")
    loss_of, mean = MINING[mining]
    return functools.partial(loss_of, margin=margin, reduce_fn=_with_active(mean))


@functools.lru_cache
def given_loss(*, margin: float = 0.2) -> Loss:
    """The mean loss of the triplets of a `sampling.TripletBatches`.

    Args:
        margin: in Euclidean distance.
    """
    reduce_fn = _with_active(tj.mean_valid)

    def loss(x: Array, places: Array) -> tuple[Array, dict[str, Array]]:
        return tj.triplet_margin_loss(
            *jnp.split(x, 3), margin=margin, reduce_fn=reduce_fn
        )

    return loss


def _with_active(mean: Callable) -> tj.SumReduction:
    return tj.SumReduction(
        lambda sums: (mean(sums), {"active": sums.active / jnp.maximum(sums.valid, 1)})
    )


def fit(
    model: nnx.Module,
    tx: optax.GradientTransformation,
    batches: Batches,
    *,
    steps: int,
    loss: Loss | Sequence[tuple[int, Loss]] | None = None,
    augment: Callable[[Array, Array], Array] | None = None,
    seed: int = 0,
    ema_decay: float = 0.0,
    embed_chunk_size: int | None = None,
    log_every: int = 10,
    validate: Callable[[nnx.Module], dict[str, float]] | None = None,
    validate_every: int | None = None,
    best: str | None = None,
    checkpoints: Checkpoints | None = None,
    checkpoint_every: int = 100,
    best_checkpoints: Checkpoints | None = None,
    interrupts: Interrupts | None = None,
    progress: bool = True,
) -> Iterator[dict[str, Any]]:
    """Trains a model in place, step by step, as its lines are asked for.

    The model has what was learnt when it is validated, at the end, and when the loop
    over the lines is left before.

    The loop goes on from the newest of its checkpoints, and gives what it would have
    given had it never stopped, bit by bit. On an interrupt (Ctrl-C, SIGTERM) it
    finishes the step, saves the state and raises KeyboardInterrupt.

    Args:
        model: from float images from 0 to 1 to embeddings ``[n, d]``.
        tx: the optimizer.
        batches: ``batches[step]``, a pure function of the step.
        steps: how many steps to train.
        loss: of embeddings and labels; several with the steps from which they hold, the
            first from 0. Semi-hard triplets with margin 0.2 if not given.
        augment: from a random key and float images to images.
        seed: of the augmentation.
        ema_decay: how much of the averaged parameters a step keeps, such as 0.99; the
            average is then what is validated and what the model has at the end.
        embed_chunk_size: how many images to embed at a time, to bound the memory;
            the loss is always of the whole batch.
        log_every: how many steps there are between two lines.
        validate: metrics of a model, made every `validate_every` steps and at the end.
        validate_every: see there; only at the end if not given.
        best: the metric of which the largest is best; if not given, or where there is
            none, the last validation is.
        checkpoints: where states are kept.
        checkpoint_every: how many steps there are between two states.
        best_checkpoints: where the parameters of the best validation are kept.
        interrupts: what notes that the process is asked to stop, if the caller watches
            itself; if not given, signals are watched while a step is in progress.
        progress: whether to show a progress bar.

    Yields:
        First, if it goes on from a checkpoint, ``{"step": ..., "resumed": True,
        "damaged": [...]}``. Then, every `log_every` steps and after the last, the step,
        the loss, its metrics, and the spread of the embeddings of the batch: the root
        of their mean squared distance. After every validation, the step and
        ``"validation"``.

    Raises:
        FloatingPointError: if the loss or a gradient becomes infinite or NaN; the last
            checkpoint is from before.
        KeyboardInterrupt: on an interrupt.
        OSError: if a checkpoint cannot be written, or all are damaged.
        ValueError: if an option is out of range.
    """
    for name, value in (
        ("steps", steps),
        ("log_every", log_every),
        ("checkpoint_every", checkpoint_every),
        ("embed_chunk_size", 1 if embed_chunk_size is None else embed_chunk_size),
        ("validate_every", 1 if validate_every is None else validate_every),
    ):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value!r}.")
    if not 0 <= ema_decay < 1:
        raise ValueError(
            f"ema_decay must be at least 0 and below 1, got {ema_decay!r}."
        )
    if not hasattr(batches, "__getitem__"):
        raise TypeError(f"batches must have batches[step], got {batches!r}.")
    losses = loss if isinstance(loss, list | tuple) else [(0, loss or mined_loss())]
    if not all(callable(of) for _, of in losses):
        raise TypeError(
            f"loss must be a function, or such as mined_loss, got {loss!r}."
        )
    if losses[0][0] != 0:
        raise ValueError(f"the first loss must hold from step 0, not {losses[0][0]}.")

    model.train()
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    state = TrainState(
        params=params,
        rest=rest,
        optimizer=tx.init(params),
        average=jax.tree.map(jnp.copy, params) if ema_decay else None,
        finite=jnp.array(True),
        best=jnp.array(-jnp.inf, jnp.float32),
    )
    # The model's own arrays are not given away.
    state, start = jax.tree.map(jnp.copy, state), 0
    if checkpoints is not None and (found := checkpoints.restore(state)) is not None:
        start, state, damaged = found
        yield {"step": start, "resumed": True, "damaged": damaged}

    def update_model() -> None:
        params = state.params if state.average is None else state.average
        nnx.update(model, *jax.tree.map(jnp.copy, (params, state.rest)))
        model.eval()

    key = jax.random.key(seed)
    options = {"graph": graph, "tx": tx, "augment": augment, "ema_decay": ema_decay}
    bar = tqdm(
        _prefetched(batches, start, steps),
        desc="training",
        initial=start,
        total=steps,
        unit="step",
        disable=not progress,
    )
    warned = False
    # What is done with a line is the caller's, and so is its Ctrl-C.
    given, interrupts = interrupts is not None, interrupts or Interrupts()
    watched = contextlib.nullcontext() if given else interrupts
    outside = contextlib.nullcontext if given else interrupts.paused
    with watched, _when_left(update_model):
        for step, (images, labels) in enumerate(bar, start=start):
            now = [of for first, of in losses if first <= step][-1]
            batch = images, labels, jax.random.fold_in(key, step)
            if embed_chunk_size is None or embed_chunk_size >= len(images):
                state, metrics = _train_step(state, *batch, loss=now, **options)
            else:
                state, metrics = _train_step_in_chunks(
                    state,
                    *batch,
                    loss=now,
                    embed_chunk_size=embed_chunk_size,
                    **options,
                )
            done, last = step + 1, step + 1 == steps
            if done % log_every == 0 or last:
                line = {name: float(value) for name, value in metrics.items()}
                _check_finite(state, done)
                length = line.pop("length")
                if line["spread"] < COLLAPSED * length and not warned:
                    warned = True
                    warnings.warn(
                        f"collapsed at step {done}: the embeddings of a batch are "
                        f"{line['spread']:.1e} apart. Train on all triplets "
                        "(mining all), or lower the learning rate.",
                        CollapseWarning,
                        stacklevel=2,
                    )
                rate = (bar.format_dict["rate"] or 0) * len(labels)
                shown = {name: f"{value:.3f}" for name, value in line.items()}
                bar.set_postfix(shown | {"images/s": f"{rate:.0f}"})
                with outside():
                    yield {"step": done} | line
            if validate and (last or (validate_every and done % validate_every == 0)):
                _check_finite(state, done)
                update_model()
                values = validate(model)
                model.train()
                # Of equals the last, which was trained the longest; without a number,
                # the last of all.
                value = np.float32(values.get(best, np.nan))
                if not value < state.best:
                    state = state._replace(best=jnp.maximum(state.best, value))
                    if best_checkpoints is not None:
                        best_checkpoints.save(done, nnx.state(model))
                with outside():
                    yield {"step": done, "validation": values}
            stop = interrupts.asked
            if checkpoints is not None and (
                done % checkpoint_every == 0 or last or stop
            ):
                _check_finite(state, done)
                checkpoints.save(done, state)
            if stop and not last:
                update_model()
                raise KeyboardInterrupt(f"stopped after step {done}")
    update_model()


@functools.partial(
    jax.jit,
    static_argnames=("graph", "tx", "loss", "augment", "ema_decay"),
    donate_argnames="state",
)
def _train_step(
    state: TrainState,
    images: Array,
    labels: Array,
    key: Array,
    *,
    graph: nnx.GraphDef,
    tx: optax.GradientTransformation,
    loss: Loss,
    augment: Callable[[Array, Array], Array] | None,
    ema_decay: float,
) -> tuple[TrainState, dict[str, Array]]:
    """One step of training, and its metrics."""
    images = _augmented(images, key, augment=augment)

    def loss_of(params: nnx.State) -> tuple[Array, tuple[nnx.State, dict[str, Array]]]:
        x, rest = _train_embed(params, state.rest, images, graph=graph)
        value, metrics = _measured(x, labels, loss)
        return value, (rest, metrics)

    (value, (rest, metrics)), gradients = jax.value_and_grad(loss_of, has_aux=True)(
        state.params
    )
    state = state._replace(rest=rest)
    state = _updated(state, value, gradients, tx=tx, ema_decay=ema_decay)
    return state, {"loss": value} | metrics


def _train_step_in_chunks(
    state: TrainState,
    images: Array,
    labels: Array,
    key: Array,
    *,
    graph: nnx.GraphDef,
    tx: optax.GradientTransformation,
    loss: Loss,
    augment: Callable[[Array, Array], Array] | None,
    ema_decay: float,
    embed_chunk_size: int,
) -> tuple[TrainState, dict[str, Array]]:
    """The same step, embedding so many images at a time.

    Activations are made again on the way back, and not kept. The loop is Python's: XLA
    runs convolutions in its own loops many times slower on CPUs.
    """
    images = _augmented(images, key, augment=augment)
    ends = list(range(embed_chunk_size, len(images), embed_chunk_size))
    chunks = jnp.split(images, ends)
    parts, rests = [], [state.rest]
    for some in chunks:
        x, rest = _train_embed(state.params, rests[-1], some, graph=graph)
        parts.append(x)
        rests.append(rest)
    value, metrics, along_x = _loss_gradient(jnp.concatenate(parts), labels, loss=loss)
    gradients = jax.tree.map(jnp.zeros_like, state.params)
    for some, rest, along in zip(chunks, rests, jnp.split(along_x, ends)):
        gradients = _add_gradient(
            gradients, state.params, rest, some, along, graph=graph
        )
    state = state._replace(rest=rests[-1])
    state = _update(state, value, gradients, tx=tx, ema_decay=ema_decay)
    return state, {"loss": value} | metrics


@functools.partial(jax.jit, static_argnames="augment")
def _augmented(
    images: Array, key: Array, *, augment: Callable[[Array, Array], Array] | None
) -> Array:
    images = as_floats(images)
    return images if augment is None else augment(key, images)


@functools.partial(jax.jit, static_argnames="graph")
def _train_embed(
    params: nnx.State, rest: nnx.State, images: Array, *, graph: nnx.GraphDef
) -> tuple[Array, nnx.State]:
    """Embeddings, and what else the model then holds."""
    model = nnx.merge(graph, params, rest, copy=True)
    x = model(images)
    return x, nnx.state(model, nnx.Not(nnx.Param))


@functools.partial(jax.jit, static_argnames="graph", donate_argnames="gradients")
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
    x: Array, labels: Array, *, loss: Loss
) -> tuple[Array, dict[str, Array], Array]:
    (value, metrics), along_x = jax.value_and_grad(_measured, has_aux=True)(
        x, labels, loss
    )
    return value, metrics, along_x


def _measured(x: Array, labels: Array, loss: Loss) -> tuple[Array, dict[str, Array]]:
    """The loss of a batch, and its metrics."""
    value = loss(x, labels)
    value, metrics = value if isinstance(value, tuple) else (value, {})
    # The root of the mean squared distance of two of them.
    spread = jnp.sqrt(2 * jnp.sum(jnp.var(x, axis=0, ddof=1)))
    length = jnp.sqrt(jnp.mean(jnp.sum(x * x, axis=-1)))
    return value, metrics | {"spread": spread, "length": length}


def _updated(
    state: TrainState,
    value: Array,
    gradients: nnx.State,
    *,
    tx: optax.GradientTransformation,
    ema_decay: float,
) -> TrainState:
    updates, optimizer = tx.update(gradients, state.optimizer, state.params)
    params = optax.apply_updates(state.params, updates)
    averaged = state.average
    if averaged is not None:
        averaged = optax.incremental_update(params, averaged, 1 - ema_decay)
    finite = state.finite
    for x in jax.tree.leaves((value, gradients)):
        finite &= jnp.isfinite(x).all()
    return state._replace(
        params=params,
        optimizer=optimizer,
        average=averaged,
        finite=finite,
    )


_update = jax.jit(
    _updated, static_argnames=("tx", "ema_decay"), donate_argnames="state"
)


def _check_finite(state: TrainState, step: int) -> None:
    if not state.finite:
        raise FloatingPointError(
            f"the loss or a gradient is not finite at step {step}, or just before: "
            "training stopped. A lower learning rate usually helps."
        )


class _Steps:
    """What is left of some batches, as Grain takes it."""

    def __init__(self, batches: Batches, start: int, steps: int):
        self.batches, self.start, self.steps = batches, start, steps

    def __len__(self) -> int:
        return self.steps - self.start

    def __getitem__(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        return self.batches[self.start + int(step)]


def _prefetched(batches: Batches, start: int, steps: int) -> Iterator:
    """Batches in order, made ahead of time by other threads."""
    if start >= steps:
        return iter(())
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
    source = grain.MapDataset.source(_Steps(batches, start, steps))
    return iter(source.to_iter_dataset(options))


@contextlib.contextmanager
def _when_left(act: Callable[[], None]) -> Iterator[None]:
    """Acts if a generator is left before its end, as by a break."""
    try:
        yield
    except GeneratorExit:
        act()
        raise
