"""A whole training run, from the name of a dataset to a run directory and back.

A run directory holds

- ``config.json``: what was asked for, and every choice that was made (`RunRecord`);
- ``backbone.safetensors``: a copy of the weights that it began with, if any;
- ``metrics.jsonl``: a line of numbers every few steps, validations and evaluations;
- ``checkpoints/``: the last two states, from which a run goes on;
- ``best/``: the model that did best in validation, and the one before;
- ``checkpoints.digests.json``, ``best.digests.json``: digests of their files;
- ``summary.json``: the evaluations, the number of parameters, and how many images
  there were of what, once the run has finished;
- ``training.png``: loss and share of active triplets over the steps;
- ``neighbors.png``: images that were never trained on, and their nearest neighbours;
- ``triplets.png`` instead, of given triplets: those held out, in the order of distance;
- ``tensorboard/``, if asked for: the numbers of ``metrics.jsonl`` for TensorBoard.
"""

import dataclasses
import functools
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from jax import Array
from jax.sharding import Mesh

from tripletjax.learn import backbones, plots, pretrained, record, tasks, training
from tripletjax.learn.checkpoints import Checkpoints
from tripletjax.learn.config import Config
from tripletjax.learn.defaults import Start
from tripletjax.learn.embedder import (
    BACKBONE,
    as_floats,
    build_model,
    embed_images,
    fill_backbone,
    load_model,
)
from tripletjax.learn.features import AnyView, FeatureCache, views_of
from tripletjax.learn.image_cache import (
    ImageArray,
    KeptFeatures,
    StoredImages,
    part_of,
    pixels_of,
)
from tripletjax.learn.image_io import ImageSource
from tripletjax.learn.metrics_log import MetricsLog, summary_writer
from tripletjax.learn.models import Standardized
from tripletjax.learn.placement import Placement
from tripletjax.learn.plan import ClassBatchPlan, Plan
from tripletjax.learn.record import ImageRecord, RunRecord, write_json
from tripletjax.learn.weights import Frozen, digest_of_file

# So many images tell the mean and the standard deviation of all, so many at a time.
SAMPLE, LOOK = 4096, 256
# A head begins with how features of so many images are spread.
HEAD_SAMPLE = 2048
# Images of more bytes than this are not compared as raw pixels.
RAW = 2**28


# The largest Euclidean distance of unit vectors.
FARTHEST = 2.0
# Options that say where data are.
PLACES = ("data", "triplets", "backbone")


class RunExistsError(FileExistsError):
    """The run directory already holds something."""


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
        mesh: devices to train on, as in `training.fit`; a run goes on with any. Of
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
    config = _normalized(config)
    old, finished = on.of_first(lambda: _found(out, config, resume))
    if finished is not None:
        return finished
    start = _start(config, old)
    made, task = _planned(config, old, start, out, on, progress)
    plan = made.plan
    # What is asked for and cannot be is told before anything is written.
    batches = task.batches(plan, on)

    def write() -> None:
        if made != old:
            out.mkdir(parents=True, exist_ok=True)
            made.write(out)
        if start is not None and start.digest is not None:
            _keep_backbone(config, start.digest, out)

    on.of_first(write)
    if not (out / record.FILE).exists():
        raise FileNotFoundError(
            f"{out} is not the run directory of the first process: all processes must "
            "have it, on a file system that they share."
        )
    if progress:
        counts = (f"{n:,} {part.replace('_', ' ')}" for part, n in task.counts.items())
        print(
            f"{task.description} ({', '.join(counts)}); the run is in {out}", flush=True
        )
        for note in (*made.notes, *_told_of(on)):
            print(f"- {note}", flush=True)

    model = build_model(made)
    if plan.pretrained:
        fill_backbone(model, made, out)
    if plan.frozen:
        images = task
        task = on.in_turn(lambda: _on_features(images, model, plan, progress=progress))
        batches = task.batches(plan, on)
    trained = pretrained.trained_part(model, plan.backbone_training)
    log = _Log(out, tensorboard) if on.first else None
    checkpoints, best = Checkpoints(out / "checkpoints"), Checkpoints(out / "best")
    begins = not checkpoints.steps
    before, embed = _before(model, plan)
    embeddings: dict[str, tasks.Embed] = {"raw pixels": _flat, before: embed}
    pixels = pixels_of(task.images)
    if isinstance(pixels, StoredImages) or pixels.nbytes > RAW:
        del embeddings["raw pixels"]
    evaluations: dict[str, Any] = {}

    def begin() -> None:
        if log is None:
            return
        evaluations.update(log.evaluations())
        for name, embed in embeddings.items():
            if name not in evaluations:
                evaluations[name] = task.evaluate(embed)
                log.evaluated(0, name, evaluations[name])
        if begins:
            if plan.pretrained:
                _fit_head(model, task)
            log.begin_again(plan, progress=progress)

    on.of_first(begin)
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=plan.learning_rate,
        warmup_steps=min(50, plan.steps // 10),
        decay_steps=plan.steps,
    )
    tx = optax.adamw(schedule, weight_decay=plan.weight_decay)
    if plan.pretrained and not plan.frozen:
        tx = pretrained.slowed(schedule, plan.weight_decay)
    with training.Interrupts() as interrupts:
        for line in training.fit(
            trained,
            tx,
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
            best=task.selection_metric,
            checkpoints=checkpoints,
            checkpoint_every=plan.checkpoint_every,
            best_checkpoints=best,
            interrupts=interrupts,
            progress=progress,
        ):
            if log is not None:
                log.add_line(line)

    model, _ = load_model(out, on)

    def finish() -> dict[str, Any]:
        if log is None:
            return {}
        trained = pretrained.trained_part(model, plan.backbone_training)
        embeddings["trained"] = functools.partial(embed_images, trained)
        evaluations["trained"] = task.evaluate(embeddings["trained"])
        log.truncate_after(plan.steps)
        log.evaluated(plan.steps, "trained", evaluations["trained"])
        plots.training(log.lines, out / "training.png")
        del embeddings[before]
        task.draw(embeddings, out)
        parameters = jax.tree.leaves(nnx.state(model, nnx.Any(nnx.Param, Frozen)))
        summary = {
            "evaluations": evaluations,
            "parameters": sum(x.size for x in parameters),
            "counts": task.counts | {"skipped": len(task.dataset.skipped)},
        }
        write_json(out / "summary.json", summary)
        log.close()
        return evaluations

    evaluations = on.of_first(finish)
    for opened in (checkpoints, best):
        opened.close()
    return evaluations


def _planned(
    config: Config,
    old: RunRecord | None,
    start: Start | None,
    out: Path,
    on: Placement,
    progress: bool,
) -> tuple[RunRecord, tasks.Task]:
    """The record of the run, and its images as the network sees them."""
    size = config.size if start is None else start.size(config)
    # What the first process makes of data to read them faster, others find.
    task = on.in_turn(lambda: tasks.load(config, size=size, progress=progress))
    if old is None:
        plan, notes = on.of_first(lambda: task.plan(config, start))
        seen = task.seen(plan)
        made = on.of_first(lambda: _begin(config, task, seen, plan, notes, start))
    else:
        made = on.of_first(lambda: _go_on(old, config, task, out))
        seen = task.seen(made.plan)
    if task.dataset.key != made.data_key:
        raise ValueError(
            f"{task.dataset.name!r} is not the same here and in the first process."
        )
    return made, seen


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
        """A line of `training.fit`."""
        if "resumed" not in line:
            self.add(line)
            return
        self.truncate_after(line["step"])
        for damage in line["damaged"]:
            print(f"{damage}; going on from step {line['step']}.", flush=True)


def _found(
    out: Path, config: Config, resume: bool
) -> tuple[RunRecord | None, dict[str, Any] | None]:
    """The record of the run that is to go on, and its evaluations if it is finished."""
    old = _old_run(out, config, resume)
    longer = old is not None and config.steps not in (None, old.plan.steps)
    if old is not None and not longer and (out / "summary.json").exists():
        return old, json.loads((out / "summary.json").read_text())["evaluations"]
    return old, None


def _told_of(on: Placement) -> list[str]:
    if on.mesh is None:
        return []
    of = f" of {on.processes} processes" if on.processes > 1 else ""
    return [f"every batch is split over {on.count} devices{of}"]


def _memory_of(plan: Plan) -> dict[str, Any]:
    """Options of `training.fit`, of a run with a memory."""
    of = plan.batches
    if not isinstance(of, ClassBatchPlan) or not of.memory:
        return {}
    return {
        "memory": of.memory,
        "memory_warmup": int(of.memory_warmup * plan.steps),
        "memory_momentum": of.memory_momentum,
    }


def _start(config: Config, old: RunRecord | None) -> Start | None:
    """What the network begins with, None if it is one of this library's own."""
    if old is not None:
        plan = old.plan.backbone
        if plan is None:
            return None
        if config.backbone is not None and Path(config.backbone).exists():
            _check_same(config.backbone, plan.digest)
        return Start(backbones.Backbone(plan.family, plan.options), plan.digest)
    if config.model in backbones.UNTRAINED:
        options = backbones.UNTRAINED[config.model]
        return Start(backbones.Backbone("resnet", options), None)
    if config.backbone is None:
        return None
    backbone = backbones.recognise(config.backbone)
    _, loaded = backbones.load(config.backbone)
    told = (
        f"{config.backbone} is {backbone.title}, {loaded.parameters:,} parameters",
        *loaded.notes,
    )
    return Start(backbone, digest_of_file(config.backbone), told)


def _check_same(file: str | Path, digest: str | None) -> None:
    if digest_of_file(file) != digest:
        raise ValueError(f"{file} is no longer what the run began with.")


def _keep_backbone(config: Config, digest: str, out: Path) -> None:
    """Copies the weights that a run begins with into its directory, once."""
    kept = out / BACKBONE
    if kept.exists() or config.backbone is None:
        return
    part = kept.with_name(f"{BACKBONE}.part")
    shutil.copyfile(config.backbone, part)
    _check_same(part, digest)
    part.replace(kept)


def _on_features(
    task: tasks.Task, model: Standardized, plan: Plan, *, progress: bool
) -> tasks.Task:
    """What is learnt from with features of the backbone in place of its images."""
    backbone = plan.backbone
    if backbone is None:
        raise ValueError("plan must have a backbone, got none.")
    key = json.dumps([backbone.digest, plan.bfloat16, model.mean, model.std])
    cache = FeatureCache(pretrained.features_of(model), key)
    drawn = views_of(plan.mirror, plan.augment, backbone.views)
    fixed = drawn[: 1 + plan.mirror]

    def features(images: ImageArray, what: str) -> ImageArray:
        views = drawn if what == "train" else fixed
        return cache.of(
            pixels_of(images), views, what=f"{what} images", progress=progress
        )

    made = task.on_features(features)
    if progress:
        print(f"- features are kept in {cache.directory}", flush=True)
    return made


def _before(model: Standardized, plan: Plan) -> tuple[str, tasks.Embed]:
    """What there is before training, and its name."""
    if not plan.pretrained:
        if plan.backbone is not None:
            # Statistics that are kept, not those of what is embedded.
            model.eval()
        return "untrained", functools.partial(embed_images, model)
    alone: nnx.Module = pretrained.MeanDirection(1 + plan.mirror)
    if not plan.frozen:
        features = pretrained.Features(pretrained.backbone_of(model))
        alone = Standardized(features, model.mean, model.std, mirror=plan.mirror)
        alone.eval()
    return "pretrained", functools.partial(embed_images, alone)


def _fit_head(model: Standardized, task: tasks.Task) -> None:
    """Begins a head with how features of some images are spread."""
    images = task.images
    some = part_of(images, np.arange(0, len(images), -(-len(images) // HEAD_SAMPLE)))
    if isinstance(some, KeptFeatures):
        features = some.features[:, 0]
    else:
        features = np.asarray(embed_images(pretrained.features_of(model), some))
    whole: Any = model.model
    whole.head.fit(features)


def _begin(
    config: Config,
    task: tasks.Task,
    seen: tasks.Task,
    plan: Plan,
    notes: list[str],
    start: Start | None,
) -> RunRecord:
    """The record of a run that is to begin, with its images as the network sees them.

    These are those of `seen`; those of `task` are as they were read.
    """
    if plan.margin >= FARTHEST:
        notes = [
            *notes,
            f"warning: no triplet can satisfy a margin of {plan.margin:g}: unit "
            f"vectors are at most {FARTHEST:g} apart",
        ]
    dataset = task.dataset
    _, height, width, channels = task.images.shape
    if start is None:
        mean, std = _statistics(seen.images)
    else:
        mean, std = (
            np.array(x) for x in (start.backbone.of.mean, start.backbone.of.std)
        )
    return RunRecord(
        requested=config,
        plan=plan,
        images=ImageRecord(
            shape=(height, width, channels),
            white=dataset.white,
            background=dataset.background,
            mean=tuple(mean.tolist()),
            std=tuple(np.maximum(std, 1e-3).tolist()),
        ),
        data_key=dataset.key,
        label_names=task.label_names,
        seen_names=task.seen_names,
        skipped=dataset.skipped,
        notes=(*dataset.notes, *notes),
    )


def _go_on(old: RunRecord, config: Config, task: tasks.Task, out: Path) -> RunRecord:
    """The record of a run that goes on, or is lengthened.

    What another version would choose otherwise stays as it was.
    """
    if old.data_key != task.dataset.key:
        raise ValueError(
            f"{task.dataset.name!r} is no longer what the run in {out} was made with."
        )
    places = {name: getattr(config, name) for name in PLACES}
    requested = dataclasses.replace(old.requested, **places)
    steps = config.steps or old.plan.steps
    if steps == old.plan.steps:
        return dataclasses.replace(old, requested=requested)
    told = (
        f"lengthened from {old.plan.steps} to {steps} steps: from where it goes on, "
        "the learning rate is that of a run of this length"
    )
    return dataclasses.replace(
        old,
        requested=dataclasses.replace(requested, steps=steps),
        plan=dataclasses.replace(old.plan, steps=steps),
        notes=(*old.notes, told),
    )


def _statistics(images: ImageArray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each channel, of images from 0 to 1."""
    sums, n = np.zeros((2, images.shape[-1])), 0
    places = np.arange(0, len(images), -(-len(images) // SAMPLE))
    for start in range(0, len(places), LOOK):
        x = images[places[start : start + LOOK]] / 255
        sums += [x.sum(axis=(0, 1, 2)), (x * x).sum(axis=(0, 1, 2))]
        n += x[..., 0].size
    mean, square = sums / n
    return mean, np.sqrt(np.maximum(square - mean**2, 0))


def _flat(images: ImageSource) -> Array:
    return as_floats(pixels_of(images)[:]).reshape(len(images), -1)


def _old_run(out: Path, config: Config, resume: bool) -> RunRecord | None:
    """The record of the run that is to go on, or None if it is to begin."""
    if not out.exists():
        return None
    if not out.is_dir():
        raise RunExistsError(f"{out} already exists and is not a directory.")
    # What a run that was killed at its start may leave behind.
    begun = [path.name for path in out.iterdir() if path.name != f"{record.FILE}.part"]
    if not begun:
        return None
    if not resume:
        again = " To go on with it, resume it." if record.FILE in begun else ""
        raise RunExistsError(
            f"{out} already exists and is not an empty directory.{again}"
        )
    if record.FILE not in begun:
        raise RunExistsError(f"{out} is not the directory of a run: no {record.FILE}.")
    old = RunRecord.read(out)
    changed = []
    for field in dataclasses.fields(Config):
        was, now = (getattr(x, field.name) for x in (old.requested, config))
        # Data may have moved: what they hold is compared when they are read.
        moved = field.name in PLACES and None not in (was, now)
        if was != now and field.name != "steps" and not moved:
            changed.append(f"{field.name} was {was!r}, got {now!r}")
    if changed:
        raise ValueError(
            f"the run in {out} has another configuration: {', '.join(changed)}."
        )
    if config.steps is not None and config.steps < old.plan.steps:
        raise ValueError(
            f"the run in {out} was made with {old.plan.steps} steps, got steps "
            f"{config.steps}: a run can be lengthened, not shortened."
        )
    return old


def _normalized(config: Config) -> Config:
    """The same, from wherever it is resumed and however it is written."""
    changes: dict[str, Any] = {}
    if config.data != "digits" and Path(config.data).is_dir():
        changes["data"] = str(Path(config.data).resolve())
    for name in ("triplets", "backbone"):
        if (value := getattr(config, name)) is not None:
            changes[name] = str(Path(value).resolve())
    # As they are read back.
    for name in ("channels", "box"):
        if (value := getattr(config, name)) is not None:
            changes[name] = tuple(value)
    return dataclasses.replace(config, **changes)
