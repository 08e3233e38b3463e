"""The loop that trains a model in place, for any model and inputs.

model = MyModel(rngs=nnx.Rngs(0))
batches = ImageBatches(images, labels, classes=8, per_class=4)
for record in learn.fit(model, optax.adam(1e-3), batches, steps=1000):
    print(record)
embeddings = learn.embed_images(model, images)
"""

import collections
import contextlib
import functools
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

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
from tripletjax.learn.networks.embedding import (
    as_inputs,
    check_static,
    rows_of,
    strongly_typed,
)
from tripletjax.learn.training.checkpoints import Checkpoints
from tripletjax.learn.training.interrupts import Interrupts, Stopped
from tripletjax.learn.training.objectives import (
    LearnedLoss,
    Loss,
    Objective,
    batch_loss,
)
from tripletjax.learn.training.optimizer import of_params
from tripletjax.learn.training.selection import (
    Validation,
    candidate_of,
    first_candidate,
    select,
)
from tripletjax.learn.training.steps import (
    Params,
    TrainState,
    train_step,
    train_step_in_chunks,
)

# Embeddings have collapsed if their spread is below this share of their length.
COLLAPSED = 0.02
# Threads that make batches ahead of the steps, and the number of batches ahead.
THREADS, AHEAD = 2, 4


class Batches(Protocol):
    """``batches[step]`` is inputs with n rows, and labels ``[n]``.

    Inputs are images ``[n, h, w, c]``: uint8, or floats from 0 to 1. Other inputs are
    any pytree of arrays with n rows each, such as a dict of tokens and a mask.
    """

    def __getitem__(self, step: int) -> tuple[Any, np.ndarray]: ...


class _InOrder:
    """Batches of an iterable in its order, again and again, for one thread."""

    def __init__(self, iterable: Iterable[Any]):
        self.batches = self._repeat(iterable)
        self.step: int | None = None
        self.batch: Any = None

    def __getitem__(self, step: int) -> tuple[Any, np.ndarray]:
        # The first batch is read twice, once for its shape.
        if step != self.step:
            self.step, self.batch = step, next(self.batches)
        return self.batch

    @staticmethod
    def _repeat(iterable: Iterable[Any]) -> Iterator[Any]:
        while True:
            batch = None
            for batch in iterable:
                inputs, labels = batch
                # Arrays of other libraries, such as tensors, become those of NumPy.
                yield jax.tree.map(np.asarray, inputs), np.asarray(labels)
            if batch is None:
                raise ValueError("batches must have a batch, got none.")


class CollapseWarning(UserWarning):
    """The embeddings of a batch are nearly the same."""


class Due(NamedTuple):
    """The work that is due after a step.

    Attributes:
        log: yield a record of metrics.
        validate: validate the model.
        save: save the state.
        last: this was the last step.
    """

    log: bool
    validate: bool
    save: bool
    last: bool


class Schedule(NamedTuple):
    """The steps of a training, and the intervals of work between them.

    Attributes:
        steps: number of steps.
        log_every: steps between two records.
        validate_every: steps between two validations; None for one after the last step.
        checkpoint_every: steps between two saved states.

    >>> Schedule(30, 10, None, 20).after(20)
    Due(log=True, validate=False, save=True, last=False)
    """

    steps: int
    log_every: int
    validate_every: int | None
    checkpoint_every: int

    def after(self, step: int) -> Due:
        """The work that is due after a number of steps."""
        last = step == self.steps
        return Due(
            log=last or step % self.log_every == 0,
            validate=last or step % (self.validate_every or self.steps) == 0,
            save=last or step % self.checkpoint_every == 0,
            last=last,
        )


def fit(
    model: nnx.Module,
    tx: optax.GradientTransformation,
    batches: Batches | Iterable[Any],
    *,
    steps: int,
    loss: Objective | None = None,
    augment: Callable[[Array, Any], Any] | None = None,
    seed: int = 0,
    ema_decay: float = 0.0,
    memory: int = 0,
    memory_warmup_steps: int = 0,
    memory_momentum: float | None = None,
    embed_chunk_size: int | None = None,
    mesh: Mesh | None = None,
    log_every: int = 10,
    validate: Callable[[nnx.Module], Validation] | None = None,
    validate_every: int | None = None,
    validation_classes: int = 0,
    checkpoints: Checkpoints | None = None,
    checkpoint_every: int = 100,
    kept_model: Checkpoints | None = None,
    interrupts: Interrupts | None = None,
    progress: bool = True,
) -> Iterator[dict[str, Any]]:
    """Train a model in place, as a generator: each `next` runs up to the next record.

    The model gets the trained parameters for each validation, at the end, and when the
    loop over the records is left early.

    Training goes on from the newest checkpoint, with the same numbers, bit by bit, as
    if it had never stopped. On an interrupt (Ctrl-C, SIGTERM) it finishes the step,
    saves the state and raises KeyboardInterrupt. Several processes stop together, after
    the next record.

    Args:
        model: from float images from 0 to 1, or from other inputs, to embeddings
            ``[n, d]``. `as_model` makes one of any function with parameters.
        tx: the optimizer of the model.
        batches: ``batches[step]``, a pure function of the step: inputs and labels.
            Inputs are images, or a pytree of arrays with n rows each, which the model
            gets as its one argument. It gets uint8 as floats from 0 to 1, floats as
            float32, and others as they are. Or an iterable of such pairs, such as a
            PyTorch DataLoader, which is read in its order, again and again. A resumed
            training reads an iterable from its start.
        steps: number of steps.
        loss: of embeddings and labels; a `LearnedLoss`, whose parameters are learned as
            well; or several losses, each with the step from which it holds, the first
            from 0. If not given, `batch_loss()`.
        augment: from a random key and inputs, such as float images, to inputs.
        seed: of the augmentation.
        ema_decay: of the exponential moving average (EMA) of the parameters, such as
            0.99. The average is then validated, and given to the model. 0 for none.
        memory: number of embeddings of earlier batches that the loss also compares the
            batch with, through the keywords of `tripletjax.memory.references`.
        memory_warmup_steps: the number of steps before the memory stores its first
            batch, while the network changes much.
        memory_momentum: of the EMA of the parameters that embeds images for the memory,
            such as 0.999. If not given, the network itself embeds them.
        embed_chunk_size: number of images to embed at a time, to bound the memory. The
            loss is always of the whole batch.
        mesh: devices to split every batch over; all of them hold the parameters. The
            loss is still of the whole batch. Its work is split if the loss has the
            mesh's `axis_name`, as `batch_loss` takes and the default has. With several
            processes, ``batches[step]`` is the part of this process, as with a `shard`
            in `sampling`. The first process alone validates, and all share the
            directories of checkpoints.
        log_every: steps between two records.
        validate: from a model to its `Validation`, called every `validate_every` steps
            and at the end.
        validate_every: steps between two validations. If not given, only at the end.
        validation_classes: the number of values in `Validation.by_class`. From
            `selection.MIN_CLASSES` on, the model with the highest mean over classes is
            part of the state. It replaces the last one if it is better by more than
            noise (`selection.exceeds_noise`).
        checkpoints: storage of states.
        checkpoint_every: steps between two saved states.
        kept_model: storage of the model that the rule keeps, saved by each validation.
        interrupts: the caller's own handler of signals. If not given, signals are
            handled here while a step is in progress.
        progress: whether to show a progress bar.

    Yields:
        Records. First, if training goes on from a checkpoint, ``{"step": ...,
        "resumed": True, "damaged": [...]}``. Then, every `log_every` steps and after
        the last, the step, the loss, its metrics, and ``spread``, the root mean squared
        distance of embeddings of the batch. After every validation, the step,
        ``validation`` with its metrics, and ``kept_step``, the step of the model that
        is kept so far.

    Raises:
        FloatingPointError: if the loss or a gradient becomes infinite or NaN; the last
            checkpoint is from before.
        KeyboardInterrupt: on an interrupt; a `Stopped` if it could finish the step.
        OSError: if a checkpoint cannot be written, or all are damaged.
        TypeError: if `batches`, `loss` or the model have the wrong type.
        ValueError: if an option is out of range.
    """
    _check_at_least(
        1,
        steps=steps,
        log_every=log_every,
        checkpoint_every=checkpoint_every,
        embed_chunk_size=embed_chunk_size,
        validate_every=validate_every,
    )
    _check_decays(ema_decay=ema_decay, memory_momentum=memory_momentum)
    _check_memory(memory, memory_warmup_steps, memory_momentum)
    on = Placement(mesh)
    losses, learned = _losses_of(loss, on)
    loop = _Loop(
        model,
        _by_step(batches),
        on,
        Schedule(steps, log_every, validate_every, checkpoint_every),
        losses,
        learned,
        tx=tx,
        augment=augment,
        seed=seed,
        ema_decay=ema_decay,
        memory=memory,
        memory_warmup_steps=memory_warmup_steps,
        memory_momentum=memory_momentum,
        embed_chunk_size=embed_chunk_size,
        classes=validation_classes,
        checkpoints=checkpoints,
        kept_model=kept_model,
    )
    yield from loop.run(validate, interrupts, progress=progress)


class _Loop:
    """The state of a training, and the work of `fit` on it.

    Attributes:
        state: everything that a step hands to the next.
        start: the step that the training begins with.
    """

    def __init__(
        self,
        model: nnx.Module,
        batches: Batches,
        on: Placement,
        schedule: Schedule,
        losses: Sequence[tuple[int, Loss]],
        learned: LearnedLoss | None,
        *,
        tx: optax.GradientTransformation,
        augment: Callable[[Array, Any], Any] | None,
        seed: int,
        ema_decay: float,
        memory: int,
        memory_warmup_steps: int,
        memory_momentum: float | None,
        embed_chunk_size: int | None,
        classes: int,
        checkpoints: Checkpoints | None,
        kept_model: Checkpoints | None,
    ):
        self.model, self.on, self.schedule, self.losses = model, on, schedule, losses
        self.key, self.start, self.warned = jax.random.key(seed), 0, False
        self.memory_warmup_steps = memory_warmup_steps
        self.embed_chunk_size = embed_chunk_size
        self.checkpoints, self.kept_model = checkpoints, kept_model
        self.source = batches
        model.train()
        graph, of_model, rest = nnx.split(model, nnx.Param, ...)
        check_static(graph)
        tx = of_params(tx, learned and learned.tx)
        self.step_options: dict[str, Any] = {
            "graph": graph,
            "tx": tx,
            "augment": augment,
            "ema_decay": ema_decay,
            "memory_momentum": memory_momentum or 0.0,
        }
        params: Any = Params(of_model, learned and learned.parameters)
        state = TrainState(
            params=params,
            rest=rest,
            optimizer=tx.init(params),
            average=jax.tree.map(jnp.copy, params) if ema_decay else None,
            finite=jnp.array(True),
            candidate=first_candidate(model, classes),
        )
        if memory:
            inputs, labels = batches[0]
            # A copy, since a model with statistics changes them.
            x = jax.eval_shape(
                lambda inputs: nnx.merge(graph, of_model, rest, copy=True)(
                    as_inputs(inputs)
                ),
                inputs,
            )
            label_dtype = jnp.asarray(labels).dtype
            state = state._replace(
                memory=tj.memory.create(memory, x.shape[1], label_dtype=label_dtype),
                slow=None if memory_momentum is None else of_model,
            )
        # Copies, since a step gives the memory of its state away.
        self.state = on.everywhere(jax.tree.map(jnp.copy, strongly_typed(state)))

    def run(
        self,
        validate: Callable[[nnx.Module], Validation] | None,
        interrupts: Interrupts | None,
        *,
        progress: bool,
    ) -> Iterator[dict[str, Any]]:
        """Train, and yield the records of `fit`."""
        if (resumed := self.restore()) is not None:
            yield resumed
        # Signals go to the caller while it holds a record.
        own = interrupts is None
        interrupts = interrupts or Interrupts()
        inside = interrupts if own else contextlib.nullcontext()
        outside = interrupts.paused if own else contextlib.nullcontext
        try:
            with inside:
                for step, batch in self.batches(progress=progress):
                    metrics = self.step(step, *batch)
                    due = self.schedule.after(step + 1)
                    if due.log:
                        record = self.record(step + 1, metrics, rows_of(batch[0]))
                        with outside():
                            yield record
                    if due.validate and validate is not None:
                        record = self.validated(step + 1, validate)
                        with outside():
                            yield record
                    stop = self.agree(interrupts.received, due)
                    if due.save or stop:
                        self.save(step + 1)
                    if stop and not due.last:
                        raise Stopped(f"stopped after step {step + 1}")
        except (GeneratorExit, Stopped):
            # The loop over the records was left early.
            self.update_model()
            raise
        self.update_model()

    def restore(self) -> dict[str, Any] | None:
        """Go on from the newest checkpoint, if there is one, and return a record."""
        if self.checkpoints is None:
            return None
        restored = self.checkpoints.restore(self.state)
        if restored is None:
            return None
        self.start, self.state, damaged = restored
        return {"step": self.start, "resumed": True, "damaged": damaged}

    def batches(self, *, progress: bool) -> Iterator[tuple[int, Any]]:
        """The remaining steps with their batches, under a progress bar."""
        steps = range(self.start, self.schedule.steps)
        self.bar = tqdm(
            _prefetched(self.source, steps),
            desc="training",
            initial=self.start,
            total=self.schedule.steps,
            unit="step",
            disable=not progress,
        )
        # The bar is exhausted, and closed, with the last batch.
        return enumerate(self.bar, start=self.start)

    def step(self, step: int, inputs: Any, labels: np.ndarray) -> dict[str, Array]:
        """Take one step, and return its metrics."""
        loss = [loss for first, loss in self.losses if first <= step][-1]
        key = jax.random.fold_in(self.key, step)
        batch = self.on.split(inputs), self.on.split(labels), key
        remember = step >= self.memory_warmup_steps
        options: dict[str, Any] = {"loss": loss, **self.step_options}
        # Of several processes, each has a part of the rows.
        chunk, rows = self.embed_chunk_size, rows_of(batch[0])
        with self.on.context():
            if chunk is None or chunk >= rows:
                self.state, metrics = train_step(
                    self.state, *batch, remember, **options
                )
            else:
                self.state, metrics = train_step_in_chunks(
                    self.state,
                    *batch,
                    remember,
                    embed_chunk_size=chunk,
                    on=self.on,
                    **options,
                )
        return self.on.paced(metrics)

    def record(self, done: int, metrics: dict[str, Array], rows: int) -> dict[str, Any]:
        """Check the metrics of a step, show them in the bar, and make a record."""
        numbers = {name: float(value) for name, value in metrics.items()}
        self._check_finite(done)
        length = numbers.pop("length")
        if numbers["spread"] < COLLAPSED * length and self.on.first and not self.warned:
            self.warned = True
            warnings.warn(
                f"collapsed at step {done}: the embeddings of a batch are "
                f"{numbers['spread']:.1e} apart. Train on all triplets (loss all), "
                "or lower the learning rate.",
                CollapseWarning,
                stacklevel=4,
            )
        rate = (self.bar.format_dict["rate"] or 0) * rows * self.on.processes
        shown = {name: f"{value:.3f}" for name, value in numbers.items()}
        self.bar.set_postfix(shown | {"images/s": f"{rate:.0f}"})
        return {"step": done} | numbers

    def validated(
        self, done: int, validate: Callable[[nnx.Module], Validation]
    ) -> dict[str, Any]:
        """Validate the model, keep it or an earlier one, and make a record."""
        self._check_finite(done)
        self.update_model()
        result = self.on.of_first(functools.partial(validate, self.model))
        values, by_class = result
        now = self.on.everywhere(candidate_of(self.model, done, by_class))
        self.model.train()
        candidate, kept = select(self.state.candidate, now)
        self.state = self.state._replace(candidate=candidate)
        if self.kept_model is not None:
            self.kept_model.save(done, kept.model)
        return {"step": done, "validation": values, "kept_step": int(kept.step)}

    def agree(self, received: bool, due: Due) -> bool:
        """Whether to stop: processes agree where they wait for each other anyway."""
        if self.on.processes == 1:
            return received
        return due.log and self.on.any_of(received)

    def save(self, done: int) -> None:
        """Save the state."""
        if self.checkpoints is not None:
            self._check_finite(done)
            self.checkpoints.save(done, self.state)

    def update_model(self) -> None:
        """Give the model the parameters so far, or their average."""
        state = self.state
        params = state.params if state.average is None else state.average
        arrays = self.on.here((params.model, state.rest))
        nnx.update(self.model, *jax.tree.map(jnp.copy, arrays))
        self.model.eval()

    def _check_finite(self, step: int) -> None:
        if not self.state.finite:
            raise FloatingPointError(
                f"the loss or a gradient is not finite at step {step}, or just before: "
                "training stopped. A lower learning rate usually helps."
            )


def _by_step(batches: Any) -> Any:
    """Batches by step, of such batches or of an iterable."""
    if hasattr(batches, "__getitem__"):
        return batches
    if not isinstance(batches, Iterable) or isinstance(batches, Iterator):
        raise TypeError(
            "batches must have batches[step], or be an iterable that can be read "
            f"again, such as a DataLoader, got {batches!r}."
        )
    return _InOrder(batches)


def _losses_of(
    loss: Objective | None, on: Placement
) -> tuple[Sequence[tuple[int, Loss]], LearnedLoss | None]:
    """Losses with the steps from which they hold, and the learned one."""
    if isinstance(loss, LearnedLoss):
        return [(0, loss.function)], loss
    if loss is None:
        loss = batch_loss(axis_name=on.axis_name)
    losses = loss if isinstance(loss, list | tuple) else [(0, loss)]
    if not all(callable(of) for _, of in losses):
        raise TypeError(
            f"loss must be a function, or such as batch_loss, got {loss!r}."
        )
    if losses[0][0] != 0:
        raise ValueError(f"the first loss must hold from step 0, not {losses[0][0]}.")
    return losses, None


def _check_at_least(least: int, **values: int | None) -> None:
    for name, value in values.items():
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, got {value!r}.")


def _check_decays(**values: float | None) -> None:
    for name, value in values.items():
        if value is not None and not 0 <= value < 1:
            raise ValueError(f"{name} must be at least 0 and below 1, got {value!r}.")


def _check_memory(memory: int, warmup_steps: int, momentum: float | None) -> None:
    _check_at_least(0, memory=memory, memory_warmup_steps=warmup_steps)
    if warmup_steps and not memory:
        raise ValueError(
            f"memory_warmup_steps requires memory > 0, got {warmup_steps!r}."
        )
    if momentum is not None and not memory:
        raise ValueError(f"memory_momentum requires memory > 0, got {momentum!r}.")


def _prefetched(batches: Batches, steps: range) -> Iterator[Any]:
    """Batches in order, made ahead of the steps by threads."""
    ahead: collections.deque = collections.deque()
    threads = 1 if isinstance(batches, _InOrder) else THREADS
    with ThreadPoolExecutor(threads) as pool:
        for step in steps:
            ahead.append(pool.submit(batches.__getitem__, step))
            if len(ahead) > AHEAD:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
