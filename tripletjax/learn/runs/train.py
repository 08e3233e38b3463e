"""A whole training run, from the name of a dataset to a run directory and back.

A run directory holds

- ``config.json``: what was asked for, and every choice that was made (`RunRecord`);
- ``backbone.safetensors``: a copy of the weights that it began with, if any;
- ``metrics.jsonl``: a line of numbers every few steps, validations and evaluations;
- ``checkpoints/``: the last two states, from which a run goes on;
- ``best/``: the model that the rule of `selection` keeps, at each of the last two
  validations;
- ``checkpoints.digests.json``, ``best.digests.json``: digests of their files;
- ``summary.json``: the evaluations, the number of steps, the step of the kept model,
  the number of parameters, and how many images there were of what, once the run has
  finished;
- ``training.png``: loss and share of active triplets over the steps;
- ``neighbors.png``: images that were never trained on, and their nearest neighbours;
- ``triplets.png`` instead, of given triplets: those held out, in the order of distance;
- ``tensorboard/``, if asked for: the numbers of ``metrics.jsonl`` for TensorBoard.
"""

import functools
import json
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from jax import Array
from jax.sharding import Mesh

from tripletjax.learn import plots
from tripletjax.learn.data.image_array import (
    ImageArray,
    KeptFeatures,
    StoredImages,
)
from tripletjax.learn.distributed.placement import Placement
from tripletjax.learn.files import write_json
from tripletjax.learn.networks import heads
from tripletjax.learn.networks.embedding import as_floats, embed_images
from tripletjax.learn.networks.embedding_networks import Standardized
from tripletjax.learn.networks.weights import Frozen
from tripletjax.learn.runs import preparation, record, tasks
from tripletjax.learn.runs.config import Config
from tripletjax.learn.runs.model import build_model, fill_backbone, load_model
from tripletjax.learn.runs.plan import ClassBatchPlan, Plan
from tripletjax.learn.runs.record import RunRecord
from tripletjax.learn.training import loop, optimizer
from tripletjax.learn.training.checkpoints import Checkpoints
from tripletjax.learn.training.feature_cache import AnyView, FeatureCache, views_of
from tripletjax.learn.training.interrupts import Interrupts
from tripletjax.learn.training.metrics_log import MetricsLog, summary_writer

# A head begins with how features of so many images are spread.
HEAD_SAMPLE = 2048
# What is compared with by this name, unless images have more bytes than this.
RAW_PIXELS, MOST_RAW = "raw pixels", 2**28


class _Log(MetricsLog):
    """The numbers of a run, as it begins, goes on and ends."""

    def __init__(self, out: Path, tensorboard: bool):
        super().__init__(out / "metrics.jsonl")
        if tensorboard:
            self.show_in(out / "tensorboard")

    def evaluations(self) -> dict[str, Any]:
        """Those from before training, by name."""
        return {
            line["evaluation"]: line["metrics"]
            for line in self.lines
            if "evaluation" in line and line["step"] == 0
        }

    def evaluated(self, step: int, name: str, metrics: dict[str, float]) -> None:
        self.add({"step": step, "evaluation": name, "metrics": metrics})

    def begin_again(self, plan: Plan, *, progress: bool) -> None:
        """Forgets what there was before the first state."""
        reached = max((line["step"] for line in self.lines), default=0)
        if reached > plan.checkpoint_every:
            raise ValueError(
                f"the run in {self.path.parent} has reached step {reached} but has no "
                "checkpoint left to go on from: bring it back (damaged ones lie beside "
                "checkpoints/), or begin in another directory."
            )
        if reached and progress:
            print(f"- no checkpoint yet at step {reached}: it begins again", flush=True)
        # It was killed before its first state.
        self.truncate_after(0)

    def add_line(self, line: dict[str, Any]) -> None:
        """A line of `learn.fit`."""
        if "resumed" not in line:
            self.add(line)
            return
        self.truncate_after(line["step"])
        for damage in line["damaged"]:
            print(f"{damage}; going on from step {line['step']}.", flush=True)


def run(
    config: Config,
    out: str | Path,
    *,
    resume: bool = False,
    tensorboard: bool = False,
    mesh: Mesh | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Trains an embedding and writes its run directory.

    Args:
        config: what to do.
        out: the run directory, which must not exist or be empty, but to go on.
        resume: whether to go on with the run that is there, if there is one; with more
            steps, it is lengthened.
        tensorboard: whether to write what TensorBoard reads, too; needs tensorboardX.
        mesh: devices to train on, as in `learn.fit`; a run goes on with any. Of
            several processes (`processes.joined`), which all call this, all read the
            data and share the run directory; the first one alone writes there, but for
            checkpoints, of which each writes a part.
        progress: whether to show progress bars.

    Returns:
        The evaluations by name, ``{"raw pixels": ..., "untrained": ..., "trained":
        ...}``, each as from `evaluate` of the task; without raw pixels where the images
        are more than 256 MiB or do not fit in memory.

    Raises:
        RunExistsError: if `out` is not an empty directory, without `resume`.
        ValueError: if the dataset does not exist or has too few classes, or if the run
            to go on with has another configuration.
        FloatingPointError: if the loss becomes infinite or NaN.
        KeyboardInterrupt: on an interrupt; `resume` then goes on.
        OSError: if something cannot be written.
        ImportError: if `tensorboard` is asked for and tensorboardX is not installed.
    """
    if tensorboard:
        summary_writer()
    on = Placement(mesh)
    progress = progress and on.first
    out = on.of_first(lambda given=out: Path(given).resolve())
    config = preparation.normalized(config)
    old, finished = on.of_first(lambda: preparation.find_run(out, config, resume))
    if finished is not None:
        return finished
    start = preparation.start_of(config, old)
    made, task = preparation.planned(config, old, start, out, on, progress)
    plan = made.plan
    # What is asked for and cannot be is told before anything is written.
    batches = task.batches(plan, on)
    on.of_first(lambda: preparation.write(made, old, start, out))
    if not (out / record.FILE).exists():
        raise FileNotFoundError(
            f"{out} is not the run directory of the first process: all processes must "
            "have it, on a file system that they share."
        )
    if progress:
        _announce(made, task, on, out)

    model = build_model(made)
    if plan.pretrained:
        fill_backbone(model, made, out)
    if plan.frozen:
        images = task
        task = on.in_turn(lambda: _on_features(images, model, plan, progress=progress))
        batches = task.batches(plan, on)
    trained = heads.trained_part(model, plan.backbone_training)
    # The first process alone has one.
    log: Any = _Log(out, tensorboard) if on.first else None
    checkpoints, best = Checkpoints(out / "checkpoints"), Checkpoints(out / "best")
    begins = not checkpoints.steps
    compared = _compared_with(task, model, plan)
    before = on.of_first(lambda: _evaluated_before(log, task, compared))
    on.of_first(lambda: begins and _begin(log, task, model, plan, progress=progress))
    with Interrupts() as interrupts:
        for line in loop.fit(
            trained,
            _optimizer(plan),
            batches,
            steps=plan.steps,
            loss=task.losses(plan, on),
            mesh=mesh,
            augment=AnyView() if plan.frozen else plan.augment,
            seed=plan.seed,
            ema_decay=plan.ema_decay,
            **_memory_of(plan),
            embed_chunk_size=plan.embed_chunk_size,
            log_every=plan.log_every,
            validate=task.validate,
            validate_every=plan.validate_every,
            validation_classes=task.validation_classes,
            checkpoints=checkpoints,
            checkpoint_every=plan.checkpoint_every,
            kept_model=best,
            interrupts=interrupts,
            progress=progress,
        ):
            if log is not None:
                log.add_line(line)
    model, _ = load_model(out, on)
    evaluations = on.of_first(
        lambda: _finish(log, task, model, plan, compared, before, out)
    )
    for opened in (checkpoints, best):
        opened.close()
    return evaluations


def _announce(made: RunRecord, task: tasks.Task, on: Placement, out: Path) -> None:
    """Says what was decided, and what was skipped."""
    counts = (f"{n:,} {part.replace('_', ' ')}" for part, n in task.counts.items())
    print(f"{task.description} ({', '.join(counts)}); the run is in {out}", flush=True)
    for note in (*made.notes, *_told_of(on)):
        print(f"- {note}", flush=True)


def _compared_with(
    task: tasks.Task, model: Standardized, plan: Plan
) -> dict[str, tasks.Embed]:
    """What there is before training, by name."""
    name, embed = _before(model, plan)
    pixels = task.images.pixels
    if isinstance(pixels, StoredImages) or math.prod(pixels.shape) > MOST_RAW:
        return {name: embed}
    return {RAW_PIXELS: _flat, name: embed}


def _evaluated_before(
    log: _Log, task: tasks.Task, compared: dict[str, tasks.Embed]
) -> dict[str, Any]:
    """Evaluations from before training, those of a run that goes on as they were."""
    evaluations = log.evaluations()
    for name, embed in compared.items():
        if name not in evaluations:
            evaluations[name] = task.evaluate(embed)
            log.evaluated(0, name, evaluations[name])
    return evaluations


def _begin(
    log: _Log, task: tasks.Task, model: Standardized, plan: Plan, *, progress: bool
) -> None:
    """Makes all ready for the first step."""
    if plan.pretrained:
        _fit_head(model, task)
    log.begin_again(plan, progress=progress)


def _optimizer(plan: Plan) -> optax.GradientTransformation:
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=plan.learning_rate,
        warmup_steps=min(50, plan.steps // 10),
        decay_steps=plan.steps,
    )
    if plan.pretrained and not plan.frozen:
        return optimizer.slow_backbone(schedule, plan.weight_decay)
    return optax.adamw(schedule, weight_decay=plan.weight_decay)


def _finish(
    log: _Log,
    task: tasks.Task,
    model: Standardized,
    plan: Plan,
    compared: dict[str, tasks.Embed],
    before: dict[str, Any],
    out: Path,
) -> dict[str, Any]:
    """Evaluates what was trained, draws, and writes the summary."""
    trained = heads.trained_part(model, plan.backbone_training)
    embed = functools.partial(embed_images, trained)
    evaluations = before | {"trained": task.evaluate(embed)}
    log.truncate_after(plan.steps)
    kept_step = [line["kept_step"] for line in log.lines if "kept_step" in line][-1]
    log.evaluated(plan.steps, "trained", evaluations["trained"])
    plots.training(log.lines, out / "training.png")
    shown = {name: e for name, e in compared.items() if name == RAW_PIXELS}
    task.draw(shown | {"trained": embed}, out)
    parameters = jax.tree.leaves(nnx.state(model, nnx.Any(nnx.Param, Frozen)))
    skipped, entries = (
        {name: n for name, n in counts.items() if n}
        for counts in (task.dataset.skip_counts, task.dataset.entry_counts)
    )
    summary = {
        "steps": plan.steps,
        "kept_step": kept_step,
        "evaluations": evaluations,
        "parameters": sum(x.size for x in parameters),
        "counts": task.counts | {"skipped": sum(skipped.values())},
        "skipped": skipped,
        "skipped_entries": entries,
    }
    write_json(out / record.SUMMARY, summary)
    log.close()
    return evaluations


def _told_of(on: Placement) -> list[str]:
    if on.mesh is None:
        return []
    of = f" of {on.processes} processes" if on.processes > 1 else ""
    return [f"every batch is split over {on.count} devices{of}"]


def _memory_of(plan: Plan) -> dict[str, Any]:
    """Options of `learn.fit`, of a run with a memory."""
    of = plan.batches
    if not isinstance(of, ClassBatchPlan) or not of.memory:
        return {}
    return {
        "memory": of.memory,
        "memory_warmup_steps": int(of.memory_warmup * plan.steps),
        "memory_momentum": of.memory_momentum,
    }


def _on_features(
    task: tasks.Task, model: Standardized, plan: Plan, *, progress: bool
) -> tasks.Task:
    """What is learnt from with features of the backbone in place of its images."""
    backbone = plan.backbone
    if backbone is None:
        raise ValueError("plan must have a backbone, got none.")
    key = json.dumps([backbone.digest, plan.bfloat16, model.mean, model.std])
    cache = FeatureCache(heads.features_of(model), key)
    drawn = views_of(plan.mirror, plan.augment, backbone.views)
    fixed = drawn[: 1 + plan.mirror]

    def features(images: ImageArray, what: str) -> ImageArray:
        views = drawn if what == "train" else fixed
        return cache.of(images.pixels, views, what=f"{what} images", progress=progress)

    made = task.on_features(features)
    if progress:
        print(f"- features are kept in {cache.directory}", flush=True)
    return made


def _before(model: Standardized, plan: Plan) -> tuple[str, tasks.Embed]:
    """What there is before training, and its name."""
    if not plan.pretrained:
        # As it is evaluated after training: by the same program, too.
        model.eval()
        return "untrained", functools.partial(embed_images, model)
    alone: nnx.Module = heads.MeanDirection(1 + plan.mirror)
    if not plan.frozen:
        features = heads.Features(heads.backbone_of(model))
        alone = Standardized(features, model.mean, model.std, mirror=plan.mirror)
        alone.eval()
    return "pretrained", functools.partial(embed_images, alone)


def _fit_head(model: Standardized, task: tasks.Task) -> None:
    """Begins a head with how features of some images are spread."""
    images = task.images
    some = images.part(np.arange(0, len(images), -(-len(images) // HEAD_SAMPLE)))
    if isinstance(some, KeptFeatures):
        features = some.features[:, 0]
    else:
        features = np.asarray(embed_images(heads.features_of(model), some))
    whole: Any = model.model
    whole.head.fit(features)


def _flat(images: ImageArray) -> Array:
    return as_floats(images.pixels[:]).reshape(len(images), -1)
