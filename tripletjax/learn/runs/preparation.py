"""Preparation of a run: its request, its earlier record, its data and its plan."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tripletjax.learn import choices
from tripletjax.learn.data.augment import Augment
from tripletjax.learn.data.image_array import ImageArray
from tripletjax.learn.data.sources import parse_source
from tripletjax.learn.distributed.placement import Placement
from tripletjax.learn.files import free_path, part_of, replaced
from tripletjax.learn.networks import backbones
from tripletjax.learn.runs import record, tasks
from tripletjax.learn.runs.config import Config
from tripletjax.learn.runs.defaults import SCARCE_CHARACTERS, Start
from tripletjax.learn.runs.model import BACKBONE
from tripletjax.learn.runs.options import OptionError, options_of, text_of
from tripletjax.learn.runs.plan import ClassBatchPlan, Plan
from tripletjax.learn.runs.record import ImageRecord, RunRecord
from tripletjax.learn.training.losses import find_loss

# Sample size for mean and standard deviation, and images read per chunk.
SAMPLE, LOOK = 4096, 256
# The largest Euclidean distance of unit vectors.
FARTHEST = 2.0
# Options with the paths of data.
LOCATIONS = ("data", "triplets", "backbone")
AUGMENTS = dict(zip(choices.AUGMENTS, (Augment(), SCARCE_CHARACTERS)))


class RunExistsError(FileExistsError):
    """The run directory already holds something."""


def normalize(config: Config) -> Config:
    """Resolve the paths of a request, so that it can be resumed from any folder."""
    changes: dict[str, Any] = {"data": parse_source(config.data).name}
    for name in ("triplets", "backbone"):
        value = getattr(config, name)
        if value is not None and value not in choices.PRETRAINED:
            changes[name] = str(Path(value).resolve())
    # Tuples, as the record of a run has them.
    for name in ("channels", "box"):
        if (value := getattr(config, name)) is not None:
            changes[name] = tuple(value)
    return dataclasses.replace(config, **changes)


def make_request(
    options: Mapping[str, Any], *, augment: str | None, out: Path | None, resume: bool
) -> tuple[Config, Path]:
    """The configuration and the directory of a run, from the options of the command.

    Args:
        options: options of `Config` that the user gave.
        augment: type of the images (`choices.KINDS`), or the augmentation
            (`choices.AUGMENTS`); None if not given.
        out: run directory; None for a new one in ``runs``, named after the data.
        resume: whether the options complete those of the run in `out`, if any.

    Raises:
        OptionError: if an option has a wrong value, or excludes another.
        OSError, ValueError: if the record in `out` cannot be read.
    """
    earlier: dict[str, Any] = {}
    if resume and out is not None and (out / record.FILE).exists():
        earlier = record.requested_options(RunRecord.read(out).requested)
    merged = earlier | dict(options)
    task = "triplets" if "triplets" in merged else "classes"
    for field, declared in options_of(Config):
        if field.name in options and declared.task not in (None, task):
            rule = "cannot be combined with" if task == "triplets" else "requires"
            raise OptionError(f"{{{field.name}}} {rule} {{triplets}}.")
    if "memory_warmup" in options and not merged.get("memory"):
        raise OptionError("{memory_warmup} requires {memory}.")
    if augment in choices.KINDS:
        merged["kind"] = augment
    elif augment is not None:
        merged["augment"] = AUGMENTS[augment]
    config = Config(**merged)
    if out is None:
        label = parse_source(config.data).label
        if config.triplets is not None:
            label = Path(config.triplets).stem
        out = free_path(Path("runs") / label)
    return config, out


def find_run(
    out: Path, config: Config, resume: bool
) -> tuple[RunRecord | None, dict[str, Any] | None]:
    """The record of the run to resume, and its evaluations if the run is finished.

    A run is finished when its summary is that of its last step: a run that is being
    lengthened still has the summary of its earlier goal.
    """
    old = _old_run(out, config, resume)
    if old is None or not (out / record.SUMMARY).exists():
        return old, None
    summary = json.loads((out / record.SUMMARY).read_text(encoding="utf-8"))
    steps = old.plan.steps if config.steps is None else config.steps
    finished = summary.get("steps") == steps
    return old, summary["evaluations"] if finished else None


def is_moved(old: RunRecord, config: Config) -> bool:
    """Whether the data of a request have another path than those of a run."""
    return any(
        getattr(old.requested, name) != getattr(config, name) for name in LOCATIONS
    )


def _old_run(out: Path, config: Config, resume: bool) -> RunRecord | None:
    """The record of the run to resume; None if there is no run yet."""
    if not out.exists():
        return None
    if not out.is_dir():
        raise RunExistsError(f"{out} already exists and is not a directory.")
    # A run that was killed at its start may leave this part.
    left = part_of(out / record.FILE)
    names = [path.name for path in out.iterdir() if path != left]
    if not names:
        return None
    if not resume:
        again = " To go on with it, resume it." if record.FILE in names else ""
        raise RunExistsError(
            f"{out} already exists and is not an empty directory.{again}"
        )
    if record.FILE not in names:
        raise RunExistsError(f"{out} is not the directory of a run: no {record.FILE}.")
    old = RunRecord.read(out)
    changed = []
    for field in dataclasses.fields(Config):
        was, now = (getattr(x, field.name) for x in (old.requested, config))
        # Data may have moved; their content is compared when it is read.
        moved = field.name in LOCATIONS and None not in (was, now)
        if was != now and field.name != "steps" and not moved:
            # The command has one option for both.
            name = "augment" if field.name == "kind" else field.name
            changed.append(f"{{{name}}} was {_word_of(was)}, got {_word_of(now)}")
    if changed:
        raise OptionError(
            f"the run in {out} has another configuration: {', '.join(changed)}."
        )
    if config.steps is not None and config.steps < old.plan.steps:
        raise OptionError(
            f"{{steps}} must be at least {old.plan.steps}, the steps of the run in "
            f"{out}, got {config.steps}: a run can be lengthened, not shortened."
        )
    return old


def _word_of(value: Any) -> str:
    """A value in an error, an augmentation by its word in the command."""
    words = (word for word, augment in AUGMENTS.items() if augment == value)
    return text_of(next(words, value))


def start_of(config: Config, old: RunRecord | None) -> Start | None:
    """The network of a known family that the run begins with, if any."""
    if old is not None:
        plan = old.plan.backbone
        if plan is None:
            return None
        file = config.backbone
        # The weights of a named network may have been uninstalled since.
        named = file in choices.PRETRAINED
        if file is not None and not named and Path(file).exists():
            _check_same(backbones.open_weights(file), plan.digest)
        return Start(backbones.Backbone(plan.family, plan.options), plan.digest)
    if config.model in backbones.UNTRAINED:
        options = backbones.UNTRAINED[config.model]
        return Start(backbones.Backbone("resnet", options), None)
    if config.backbone is None:
        return None
    weights = backbones.open_weights(config.backbone)
    backbone = weights.backbone
    loaded = weights.fill(backbone.abstract())
    notes = (
        f"{config.backbone} is {backbone.title}, {loaded.parameters:,} parameters",
        *weights.notes,
        *loaded.notes,
    )
    return Start(backbone, weights.digest, notes)


def make_plan(
    config: Config,
    old: RunRecord | None,
    start: Start | None,
    out: Path,
    on: Placement,
    progress: bool,
) -> tuple[RunRecord, tasks.Task]:
    """Make the record of the run, and its task with images as the network sees them."""
    size = config.size if start is None else start.size(config)
    # The first process decodes the data, and the others read what it wrote.
    task = on.in_turn(lambda: tasks.load(config, size=size, progress=progress))
    if old is None:
        plan, notes = on.of_first(lambda: task.plan(config, start))
        seen = task.seen(plan)
        current = on.of_first(lambda: _begin(config, task, seen, plan, notes, start))
    else:
        current = on.of_first(lambda: _go_on(old, config, task, out))
        seen = task.seen(current.plan)
    if task.dataset.key != current.data_key:
        raise ValueError(
            f"{task.dataset.name!r} is not the same here and in the first process."
        )
    return current, seen


def _begin(
    config: Config,
    task: tasks.Task,
    seen: tasks.Task,
    plan: Plan,
    notes: list[str],
    start: Start | None,
) -> RunRecord:
    """Make the record of a new run.

    The images of `task` are as they were read, those of `seen` as the network sees
    them.
    """
    of = plan.batches
    triplets = not isinstance(of, ClassBatchPlan) or find_loss(of.loss).mines_triplets
    if triplets and plan.margin is not None and plan.margin >= FARTHEST:
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
        images = start.backbone.images
        mean, std = np.array(images.mean), np.array(images.std)
    return RunRecord(
        requested=config,
        plan=plan,
        images=ImageRecord(
            shape=(height, width, channels),
            white=dataset.decoding.white,
            background=dataset.decoding.background,
            mean=tuple(mean.tolist()),
            std=tuple(np.maximum(std, 1e-3).tolist()),
        ),
        data_key=dataset.key,
        label_names=task.label_names,
        seen_names=task.seen_names,
        skipped=dataset.skipped,
        notes=(*dataset.decoding.notes, *notes),
    )


def _go_on(old: RunRecord, config: Config, task: tasks.Task, out: Path) -> RunRecord:
    """Make the record of a run that goes on, or is lengthened.

    Its plan stays, whatever this version would choose.
    """
    if old.data_key != task.dataset.key:
        name = "data" if config.triplets is None else "triplets"
        before, now = getattr(old.requested, name), getattr(config, name)
        if before != now:
            raise OptionError(
                f"{{{name}}} must have the content of {before}, which the run in {out} "
                f"was trained on, got {now}."
            )
        raise ValueError(
            f"the data {task.dataset.name!r} have changed since the run in {out} began."
        )
    locations = {name: getattr(config, name) for name in LOCATIONS}
    requested = dataclasses.replace(old.requested, **locations)
    steps = old.plan.steps if config.steps is None else config.steps
    if steps == old.plan.steps:
        return dataclasses.replace(old, requested=requested)
    note = (
        f"lengthened from {old.plan.steps} to {steps} steps: from where it goes on, "
        "the learning rate is that of a run of this length"
    )
    return dataclasses.replace(
        old,
        requested=dataclasses.replace(requested, steps=steps),
        plan=dataclasses.replace(old.plan, steps=steps),
        notes=(*old.notes, note),
    )


def _statistics(images: ImageArray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each channel, of images from 0 to 1."""
    sums, n = np.zeros((2, images.shape[-1])), 0
    indices = np.arange(0, len(images), -(-len(images) // SAMPLE))
    for start in range(0, len(indices), LOOK):
        x = images[indices[start : start + LOOK]] / 255
        sums += [x.sum(axis=(0, 1, 2)), (x * x).sum(axis=(0, 1, 2))]
        n += x[..., 0].size
    mean, square = sums / n
    return mean, np.sqrt(np.maximum(square - mean**2, 0))


def write(
    current: RunRecord, old: RunRecord | None, start: Start | None, out: Path
) -> None:
    """Write the record, and a copy of the weights that the run begins with."""
    if current != old:
        out.mkdir(parents=True, exist_ok=True)
        current.write(out)
    if start is not None and start.digest is not None:
        _keep_backbone(current.requested, start.digest, out)


def _keep_backbone(config: Config, digest: str, out: Path) -> None:
    """Copy the weights that a run begins with into its directory, once."""
    kept = out / BACKBONE
    if kept.exists() or config.backbone is None:
        return
    weights = backbones.open_weights(config.backbone)
    _check_same(weights, digest)
    with replaced(kept) as part:
        weights.write(part)


def _check_same(weights: backbones.Weights, digest: str | None) -> None:
    if weights.digest != digest:
        raise ValueError(f"{weights.path} has changed since the run began.")
