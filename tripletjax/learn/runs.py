"""A whole training run, from the name of a dataset to a run directory and back.

A run directory holds

- ``config.json``: every choice that the run was made with;
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
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from jax import Array

from tripletjax.learn import plots, tasks, training
from tripletjax.learn.augment import Augment
from tripletjax.learn.checkpoints import Checkpoints
from tripletjax.learn.config import Config
from tripletjax.learn.data import ImageArray
from tripletjax.learn.embedder import (
    as_floats,
    build_model,
    config_of,
    embed_images,
    load_model,
)
from tripletjax.learn.image_cache import StoredImages

# So many images tell the mean and the deviation of all, looked at so many at a time.
SAMPLE, LOOK = 4096, 256
# Images of more bytes than this are not compared as raw pixels.
RAW = 2**28


# The largest Euclidean distance of unit vectors.
FARTHEST = 2.0
# Options that say where data are.
PLACES = ("data", "triplets")


class RunExistsError(FileExistsError):
    """The run directory already holds something."""


def run(
    config: Config,
    out: str | Path,
    *,
    resume: bool = False,
    tensorboard: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Trains an embedding and writes its run directory.

    Args:
        config: what to do.
        out: the run directory, which must not exist or be empty, but to go on.
        resume: whether to go on with the run that is there, if there is one; with more
            steps, it is lengthened.
        tensorboard: whether to write what TensorBoard reads, too; needs tensorboardX.
        progress: whether to show progress bars.

    Returns:
        The evaluations by name, ``{"raw pixels": ..., "untrained": ..., "trained":
        ...}``, each as from `evaluate` of the task; without raw pixels where the images
        are more than 256 MiB or do not fit in memory.

    Raises:
        RunExistsError: if `out` is not an empty directory, without `resume`.
        ValueError: if the dataset does not exist or has too few classes, or if the run
            to go on with was made otherwise.
        FloatingPointError: if the loss becomes infinite or NaN.
        KeyboardInterrupt: on an interrupt; `resume` then goes on.
        OSError: if something cannot be written.
        ImportError: if `tensorboard` is asked for and tensorboardX is not installed.
    """
    if tensorboard:
        _summary_writer()
    out = Path(out).resolve()
    config = _with_whole_paths(config)
    asked = json.loads(json.dumps(dataclasses.asdict(config)))
    old = _old_run(out, asked, resume)
    longer = old is not None and asked["steps"] not in (None, old["steps"])
    if longer and asked["steps"] < old["steps"]:
        raise ValueError(
            f"the run in {out} was made with {old['steps']} steps, got steps "
            f"{asked['steps']}: a run can be lengthened, not shortened."
        )
    if old is not None and not longer and (out / "summary.json").exists():
        return json.loads((out / "summary.json").read_text())["evaluations"]
    task = tasks.load(config, progress=progress)
    if old is None:
        config, notes = task.choose(config)
        if config.margin >= FARTHEST:
            notes.append(
                f"warning: no triplet can satisfy a margin of {config.margin:g}: unit "
                f"vectors are at most {FARTHEST:g} apart"
            )
        shape, task = task.images.shape[1:], task.seen(config)
        mean, deviation = _statistics(task.images)
        settings = json.loads(json.dumps(dataclasses.asdict(config))) | {
            "asked": asked,
            "key": task.dataset.key,
            "shape": shape,
            "white": task.dataset.white,
            "background": task.dataset.background,
            "notes": [*task.dataset.notes, *notes],
            "mean": mean.tolist(),
            "deviation": np.maximum(deviation, 1e-3).tolist(),
            "label_names": task.label_names,
            "skipped": task.dataset.skipped,
        }
    elif old["key"] != task.dataset.key:
        raise ValueError(
            f"{task.dataset.name!r} is no longer what the run in {out} was made with."
        )
    else:
        # What another version would choose otherwise stays as it was.
        places = {name: asked[name] for name in PLACES}
        settings = old | places | {"asked": old["asked"] | places}
        if longer:
            steps = {"steps": asked["steps"]}
            told = (
                f"lengthened from {old['steps']} to {asked['steps']} steps: from where "
                "it goes on, the learning rate is that of a run of this length"
            )
            settings |= steps | {
                "asked": settings["asked"] | steps,
                "notes": [*old["notes"], told],
            }
        config = config_of(settings)
        task = task.seen(config)
    batches = task.batches(config)
    if settings != old:
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / "config.json", json.dumps(settings, indent=2) + "\n")

    if progress:
        counts = (f"{n:,} {part.replace('_', ' ')}" for part, n in task.counts.items())
        print(f"{task.what} ({', '.join(counts)}); the run is in {out}", flush=True)
        for note in settings["notes"]:
            print(f"- {note}", flush=True)

    model = build_model(settings)
    log = Log(out / "metrics.jsonl")
    if tensorboard:
        log.show_in(out / "tensorboard")
    checkpoints = Checkpoints(out / "checkpoints")
    best = Checkpoints(out / "best")
    embeddings = {
        "raw pixels": _flat,
        "untrained": functools.partial(embed_images, model),
    }
    if isinstance(task.images, StoredImages) or task.images.nbytes > RAW:
        del embeddings["raw pixels"]
    evaluations = {
        line["evaluation"]: line["metrics"]
        for line in log.lines
        if "evaluation" in line and line["step"] == 0
    }
    for name, embed in embeddings.items():
        if name not in evaluations:
            evaluations[name] = task.evaluate(embed)
            log.add({"step": 0, "evaluation": name, "metrics": evaluations[name]})

    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.learning_rate,
        warmup_steps=min(50, config.steps // 10),
        decay_steps=config.steps,
    )
    if not checkpoints.steps:
        reached = max((line["step"] for line in log.lines), default=0)
        if reached > config.checkpoint_every:
            raise ValueError(
                f"the run in {out} has reached step {reached} but has no checkpoint "
                "left to go on from: bring it back (damaged ones lie beside "
                f"{checkpoints.directory.name}/), or begin in another directory."
            )
        if reached and progress:
            print(f"- no checkpoint yet at step {reached}: it begins again", flush=True)
        # It was killed before its first state.
        log.keep(0)
    with training.Interrupts() as interrupts:
        for line in training.fit(
            model,
            optax.adamw(schedule, weight_decay=config.weight_decay),
            batches,
            steps=config.steps,
            loss=task.losses(config),
            augment=config.augment,
            seed=config.seed,
            ema_decay=config.ema_decay,
            embed_chunk_size=config.embed_chunk_size,
            log_every=config.log_every,
            validate=task.validate,
            validate_every=config.validate_every,
            best=task.best,
            checkpoints=checkpoints,
            checkpoint_every=config.checkpoint_every,
            best_checkpoints=best,
            interrupts=interrupts,
            progress=progress,
        ):
            if "resumed" in line:
                log.keep(line["step"])
                for damage in line["damaged"]:
                    print(f"{damage}; going on from step {line['step']}.", flush=True)
            else:
                log.add(line)

    model, _ = load_model(out)
    embeddings["trained"] = functools.partial(embed_images, model)
    evaluations["trained"] = task.evaluate(embeddings["trained"])
    log.keep(config.steps)
    log.add(
        {
            "step": config.steps,
            "evaluation": "trained",
            "metrics": evaluations["trained"],
        }
    )
    plots.training(log.lines, out / "training.png")
    del embeddings["untrained"]
    task.draw(embeddings, out)
    parameters = jax.tree.leaves(nnx.state(model, nnx.Param))
    summary = {
        "evaluations": evaluations,
        "parameters": sum(x.size for x in parameters),
        "counts": task.counts | {"skipped": len(task.dataset.skipped)},
    }
    write_text(out / "summary.json", json.dumps(summary, indent=2) + "\n")
    for opened in (checkpoints, best, log):
        opened.close()
    return evaluations


class Log:
    """Lines of numbers in a file, each there as soon as it is added.

    Args:
        path: the file; lines that it has are read, and the rest of a broken one is
            dropped.
    """

    def __init__(self, path: Path):
        self.path = path
        self.lines: list[dict[str, Any]] = []
        self._board = None
        if path.exists():
            for line in path.read_text().splitlines(keepends=True):
                if line.endswith("\n"):
                    self.lines.append(json.loads(line))
        self._write_all()

    def add(self, line: dict[str, Any]) -> None:
        self.lines.append(line)
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        self._show(line)

    def keep(self, step: int) -> None:
        """Drops what comes after a step, and the evaluation at the end."""
        self.lines = [
            line
            for line in self.lines
            if line["step"] <= step and line.get("evaluation") != "trained"
        ]
        self._write_all()
        if self._board is not None:
            self.show_in(Path(self._board.logdir))

    def show_in(self, directory: Path) -> None:
        """Shows all lines to TensorBoard, too, in place of what it was shown before."""
        self.close()
        for old in directory.glob("events.out.tfevents.*"):
            old.unlink()
        self._board = _summary_writer()(str(directory), flush_secs=10)
        for line in self.lines:
            self._show(line)

    def close(self) -> None:
        if self._board is not None:
            self._board.close()

    def _show(self, line: dict[str, Any]) -> None:
        if self._board is None:
            return
        group = line.get(
            "evaluation", "validation" if "validation" in line else "train"
        )
        numbers = line.get("metrics", line.get("validation", line))
        for name, value in numbers.items():
            if name != "step":
                self._board.add_scalar(f"{group}/{name}", value, line["step"])

    def _write_all(self) -> None:
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in self.lines))


def asked_of(out: str | Path) -> dict[str, Any]:
    """The options that a run was made with, but those left to their defaults.

    Raises:
        OSError: if there is no run.
    """
    asked = json.loads((Path(out) / "config.json").read_text())["asked"]
    if asked["augment"] is not None:
        asked["augment"] = Augment(**asked["augment"])
    for name in ("channels", "box"):
        asked[name] = asked[name] and tuple(asked[name])
    defaults = dataclasses.asdict(Config())
    return {name: x for name, x in asked.items() if x != defaults[name]}


def _statistics(images: ImageArray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation of each channel, of images from 0 to 1."""
    sums, n = np.zeros((2, images.shape[-1])), 0
    places = np.arange(0, len(images), -(-len(images) // SAMPLE))
    for start in range(0, len(places), LOOK):
        x = images[places[start : start + LOOK]] / 255
        sums += [x.sum(axis=(0, 1, 2)), (x * x).sum(axis=(0, 1, 2))]
        n += x[..., 0].size
    mean, square = sums / n
    return mean, np.sqrt(np.maximum(square - mean**2, 0))


def _flat(images: np.ndarray) -> Array:
    return as_floats(images).reshape(len(images), -1)


def _summary_writer() -> type:
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise ImportError(
            'tensorboard needs tensorboardX: pip install "tripletjax[tensorboard]"'
        ) from error
    return SummaryWriter


def _old_run(out: Path, asked: dict[str, Any], resume: bool) -> dict[str, Any] | None:
    """The settings of the run that is to go on, or None if it is to begin."""
    if not out.exists():
        return None
    if not out.is_dir():
        raise RunExistsError(f"{out} already exists and is not a directory.")
    # What a run that was killed at its start may leave behind.
    begun = [path.name for path in out.iterdir() if path.name != "config.json.part"]
    if not begun:
        return None
    if not resume:
        again = " To go on with it, resume it." if "config.json" in begun else ""
        raise RunExistsError(
            f"{out} already exists and is not an empty directory.{again}"
        )
    if "config.json" not in begun:
        raise RunExistsError(f"{out} is not the directory of a run: no config.json.")
    old = json.loads((out / "config.json").read_text())
    # Data may have moved: what they hold is compared when they are read.
    changed = [
        name
        for name in asked
        if name != "steps"
        and asked[name] != old["asked"].get(name)
        and (name not in PLACES or None in (asked[name], old["asked"].get(name)))
    ]
    if changed:
        told = ", ".join(
            f"{name} was {old['asked'].get(name)!r} and is {asked[name]!r}"
            for name in changed
        )
        raise ValueError(f"the run in {out} was made otherwise: {told}.")
    return old


def _with_whole_paths(config: Config) -> Config:
    """The same, from wherever it is resumed."""
    changes = {}
    if config.data != "digits" and Path(config.data).is_dir():
        changes["data"] = str(Path(config.data).resolve())
    if config.triplets is not None:
        changes["triplets"] = str(Path(config.triplets).resolve())
    return dataclasses.replace(config, **changes)


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    part = path.with_name(path.name + ".part")
    with part.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
