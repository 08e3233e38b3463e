"""The loop that trains a model in place, for any model and images.

model = MyModel(rngs=nnx.Rngs(0))
batches = sampling.ImageBatches(images, labels, classes=8, per_class=4)
for line in training.fit(model, optax.adam(1e-3), batches, steps=1000):
    print(line)
embeddings = training.embed_images(model, images)
"""

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array
from jax.sharding import Mesh
from tqdm import tqdm

import tripletjax as tj
from tripletjax.learn.distributed.placement import Placement
from tripletjax.learn.networks.embedding import as_floats, check_static, strongly_typed
from tripletjax.learn.training.checkpoints import Checkpoints
from tripletjax.learn.training.interrupts import Interrupts, Stopped
from tripletjax.learn.training.objectives import Loss, mined_loss
from tripletjax.learn.training.steps import TrainState, train_step, train_step_in_chunks

# Embeddings that are so close together, in multiples of their length, have collapsed.
COLLAPSED = 0.02


class Batches(Protocol):
    """``batches[step]`` is images ``[n, h, w, c]`` and labels ``[n]``.

    Images are uint8, or floats from 0 to 1.
    """

    def __getitem__(self, step: int) -> tuple[np.ndarray, np.ndarray]: ...


class CollapseWarning(UserWarning):
    """All embeddings have become nearly the same."""


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
    memory: int = 0,
    memory_warmup_steps: int = 0,
    memory_momentum: float | None = None,
    embed_chunk_size: int | None = None,
    mesh: Mesh | None = None,
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
    finishes the step, saves the state and raises KeyboardInterrupt; of several
    processes all do if one is asked to, after the next line.

    Args:
        model: from float images from 0 to 1 to embeddings ``[n, d]``.
        tx: the optimizer.
        batches: ``batches[step]``, a pure function of the step.
        steps: how many steps to train.
        loss: of embeddings and labels; several with the steps from which they hold, the
            first from 0; `mined_loss` with its defaults if not given.
        augment: from a random key and float images to images.
        seed: of the augmentation.
        ema_decay: how much of the averaged parameters a step keeps, such as 0.99; the
            average is then what is validated and what the model has at the end.
        memory: how many embeddings of earlier batches the loss also compares the batch
            with; it is then given what `tripletjax.memory.references` makes.
        memory_warmup_steps: the number of steps before the memory stores its first
            batch, while the network changes much.
        memory_momentum: how much of its average a step keeps, such as 0.999, of a
            second network that embeds what is kept; that of the batch if not given.
        embed_chunk_size: how many images to embed at a time, to bound the memory;
            the loss is always of the whole batch.
        mesh: devices to split every batch over; the parameters are on all of them. The
            loss is still of the whole batch, and its work is split where it is made
            with the mesh's `axis_name`, as `mined_loss` can be and the default is. Of
            devices of several processes, ``batches[step]`` is this process's part, as
            with a `shard` in `sampling`; the first process alone validates, and all
            share the directories of checkpoints.
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
        KeyboardInterrupt: on an interrupt; a `Stopped` if it could finish the step.
        OSError: if a checkpoint cannot be written, or all are damaged.
        TypeError: if `batches`, `loss` or the model are not what they must be.
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
    for name, value in (
        ("memory", memory),
        ("memory_warmup_steps", memory_warmup_steps),
    ):
        if value < 0:
            raise ValueError(f"{name} must be at least 0, got {value!r}.")
    if memory_momentum is not None and not 0 <= memory_momentum < 1:
        raise ValueError(
            f"memory_momentum must be at least 0 and below 1, got {memory_momentum!r}."
        )
    for name, value in (
        ("memory_warmup_steps", memory_warmup_steps or None),
        ("memory_momentum", memory_momentum),
    ):
        if value is not None and not memory:
            raise ValueError(f"{name} requires memory > 0, got {value!r}.")
    if not hasattr(batches, "__getitem__"):
        raise TypeError(f"batches must have batches[step], got {batches!r}.")
    on = Placement(mesh)
    if loss is None:
        loss = mined_loss(axis_name=on.axis_name)
    losses = loss if isinstance(loss, list | tuple) else [(0, loss)]
    if not all(callable(of) for _, of in losses):
        raise TypeError(
            f"loss must be a function, or such as mined_loss, got {loss!r}."
        )
    if losses[0][0] != 0:
        raise ValueError(f"the first loss must hold from step 0, not {losses[0][0]}.")

    model.train()
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    check_static(graph)
    state = TrainState(
        params=params,
        rest=rest,
        optimizer=tx.init(params),
        average=jax.tree.map(jnp.copy, params) if ema_decay else None,
        finite=jnp.array(True),
        best=jnp.array(-jnp.inf, jnp.float32),
    )
    if memory:
        images, labels = batches[0]
        # A copy, since a model with statistics changes them.
        x = jax.eval_shape(
            lambda images: nnx.merge(graph, params, rest, copy=True)(as_floats(images)),
            images,
        )
        kept = tj.memory.create(
            memory, x.shape[1], label_dtype=jnp.asarray(labels).dtype
        )
        slow = None if memory_momentum is None else params
        state = state._replace(memory=kept, slow=slow)
    # The model's own arrays are not given away.
    state, start = on.everywhere(jax.tree.map(jnp.copy, strongly_typed(state))), 0
    if checkpoints is not None and (found := checkpoints.restore(state)) is not None:
        start, state, damaged = found
        yield {"step": start, "resumed": True, "damaged": damaged}

    def update_model() -> None:
        params = state.params if state.average is None else state.average
        nnx.update(model, *jax.tree.map(jnp.copy, on.here((params, state.rest))))
        model.eval()

    key = jax.random.key(seed)
    options: dict[str, Any] = {
        "graph": graph,
        "tx": tx,
        "augment": augment,
        "ema_decay": ema_decay,
        "memory_momentum": memory_momentum or 0.0,
    }
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
            remember = step >= memory_warmup_steps
            images, labels = on.split(images), on.split(labels)
            batch = images, labels, jax.random.fold_in(key, step), remember
            with on.context():
                if embed_chunk_size is None or embed_chunk_size >= len(images):
                    state, metrics = train_step(state, *batch, loss=now, **options)
                else:
                    state, metrics = train_step_in_chunks(
                        state,
                        *batch,
                        loss=now,
                        embed_chunk_size=embed_chunk_size,
                        on=on,
                        **options,
                    )
            on.paced(metrics)
            done, last = step + 1, step + 1 == steps
            if done % log_every == 0 or last:
                line = {name: float(value) for name, value in metrics.items()}
                _check_finite(state, done)
                length = line.pop("length")
                if line["spread"] < COLLAPSED * length and on.first and not warned:
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
                values = on.of_first(functools.partial(validate, model))
                model.train()
                # Of equals the last, which was trained the longest; without a number,
                # the last of all.
                value = np.float32(values.get(best or "", np.nan))
                if not value < state.best:
                    state = state._replace(best=jnp.maximum(state.best, value))
                    if best_checkpoints is not None:
                        best_checkpoints.save(done, on.everywhere(nnx.state(model)))
                with outside():
                    yield {"step": done, "validation": values}
            # Processes agree where they wait for each other anyway.
            stop = interrupts.received
            if on.processes > 1:
                stop = done % log_every == 0 and on.any_of(stop)
            if checkpoints is not None and (
                done % checkpoint_every == 0 or last or stop
            ):
                _check_finite(state, done)
                checkpoints.save(done, state)
            if stop and not last:
                update_model()
                raise Stopped(f"stopped after step {done}")
    update_model()


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
    left: Any = _Steps(batches, start, steps)
    source = grain.MapDataset.source(left)
    return iter(source.to_iter_dataset(options))


@contextlib.contextmanager
def _when_left(act: Callable[[], None]) -> Iterator[None]:
    """Acts if a generator is left before its end, as by a break."""
    try:
        yield
    except GeneratorExit:
        act()
        raise
