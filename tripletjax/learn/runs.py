"""A whole training run, from the name of a dataset to a run directory and back.

A run directory holds

- ``config.json``: every choice that the run was made with;
- ``metrics.jsonl``: a line of numbers every few steps, validations and evaluations;
- ``checkpoints/``: the last two states, from which a run goes on;
- ``best/``: the model that did best in validation;
- ``summary.json``: the evaluations, once the run has finished;
- ``training.png``: loss and share of active triplets over the steps;
- ``neighbors.png``: images that were never trained on, and their nearest neighbours.
"""

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array
from jax.typing import ArrayLike
from PIL import Image

import tripletjax as tj
from tripletjax.learn import data, models, plots, sampling, training
from tripletjax.learn.augment import Augment
from tripletjax.learn.checkpoints import Checkpoints

MODELS = {
    "cnn": models.EmbeddingCNN,
    "resnet": models.EmbeddingResNet,
    "multiscale": models.MultiScaleCNN,
}
# From here on there are many classes, which take longer to learn.
MANY = 32
# Classes of fewer images, in the median, are too small to learn from as they are.
SCARCE = 30
# Validation compares with at most so many images of the training set.
GALLERY = 4096


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that a run depends on. What is None is chosen by the data.

    Attributes:
        data: name of the dataset, as `data.load` takes it.
        split: what is held out: images, or classes.
        size: of images, the longer side in pixels.
        model: cnn, resnet or multiscale.
        mining: which triplets to train on: all, semi-hard or hard.
        steps: how many steps to train.
        seed: of the initial parameters, the batches and the augmentation.
        margin: of the triplet loss, in Euclidean distance between unit vectors.
        warm_start: share of the steps that hard mining leaves to all triplets first,
            without which it collapses.
        classes: how many classes there are in a batch.
        per_class: how many images of each.
        turns: as in `sampling.ImageBatches`.
        learning_rate: at its peak.
        weight_decay: of AdamW.
        average: how much of the averaged parameters a step keeps.
        dim: number of dimensions of the embedding.
        channels: number of channels of each stage of the network.
        augment: how images are changed at random.
        bfloat16: whether the network computes in bfloat16.
        chunk: how many images are embedded at a time, to bound the memory.
        log_every: how many steps between two lines of metrics.
        validate_every: how many steps between two validations.
        checkpoint_every: how many steps between two states on disk.
    """

    data: str = "digits"
    split: str = "images"
    size: int | None = None
    model: str | None = None
    mining: str = "all"
    steps: int | None = None
    seed: int = 0
    margin: float = 0.2
    warm_start: float = 0.5
    classes: int | None = None
    per_class: int | None = None
    turns: int | None = None
    learning_rate: float = 2e-3
    weight_decay: float = 1e-3
    average: float = 0.98
    dim: int | None = None
    channels: tuple[int, ...] | None = None
    augment: Augment | None = None
    bfloat16: bool = False
    chunk: int | None = None
    log_every: int = 10
    validate_every: int = 100
    checkpoint_every: int = 100

    def __post_init__(self) -> None:
        for name, known in (
            ("mining", training.MINING),
            ("split", data.SPLITS),
            ("model", (None, *MODELS)),
        ):
            if getattr(self, name) not in known:
                words = ", ".join(str(word) for word in known if word)
                raise ValueError(
                    f"{name} must be one of {words}, got {getattr(self, name)!r}."
                )
        for name in (
            *("size", "steps", "dim", "chunk"),
            *("log_every", "validate_every", "checkpoint_every"),
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value!r}.")
        for name in ("margin", "learning_rate", "weight_decay"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(
                    f"{name} must be finite and >= 0, got {getattr(self, name)!r}."
                )
        if not 0 <= self.warm_start <= 1:
            raise ValueError(f"warm_start must be 0 to 1, got {self.warm_start!r}.")


GREY = Augment(shift=0.1, rotation=12.0, zoom=0.15, shear=0.15)
# Of few images of a class there is little to see how far it reaches.
SCARCE_GREY = Augment(shift=0.1, rotation=20.0, zoom=0.25, shear=0.3)
COLOUR = Augment(
    shift=0.1, rotation=5.0, zoom=0.1, flip=True, brightness=0.1, erase=0.25
)


def chosen(config: Config, dataset: data.Dataset) -> Config:
    """The same with all choices made."""
    _, height, width, channels = dataset.train.images.shape
    _, counts = np.unique(dataset.train.labels, return_counts=True)
    colour = channels > 1
    # Many classes of few images: turned and mirrored ones are classes of their own.
    scarce = np.median(counts) < SCARCE and len(counts) >= MANY
    turns = config.turns or (1 if not scarce else 8 if height == width else 2)
    kinds = turns * len(counts)
    many = kinds >= MANY
    per_class = config.per_class or (4 if many else 8)
    choices = {
        "model": "resnet" if colour else "cnn",
        "steps": 800 if many else 600,
        "per_class": per_class,
        "classes": min(kinds, max(2, (160 if many else 128) // per_class)),
        "turns": turns,
        "dim": 128 if many else 64,
        "channels": (32, 64) if max(height, width) <= 16 else (32, 64, 128),
        "augment": COLOUR if colour else SCARCE_GREY if scarce else GREY,
    }
    for name in choices:
        if getattr(config, name) is not None:
            choices[name] = getattr(config, name)
    return dataclasses.replace(config, **choices)


class RunExistsError(FileExistsError):
    """The run directory already holds something."""


def run(
    config: Config, out: str | Path, *, resume: bool = False, progress: bool = True
) -> dict[str, Any]:
    """Trains an embedding and writes its run directory.

    Args:
        config: what to do.
        out: the run directory, which must not exist or be empty, but to go on.
        resume: whether to go on with the run that is there, if there is one.
        progress: whether to show progress bars.

    Returns:
        The evaluations by name, ``{"raw pixels": ..., "untrained": ..., "trained":
        ...}``, each as from `evaluate`.

    Raises:
        RunExistsError: if `out` is not an empty directory, without `resume`.
        ValueError: if the dataset does not exist or has too few classes, or if the run
            to go on with was made otherwise.
        FloatingPointError: if the loss becomes infinite or NaN.
        KeyboardInterrupt: on an interrupt; `resume` then goes on.
        OSError: if something cannot be written.
    """
    out = Path(out).resolve()
    asked = json.loads(json.dumps(dataclasses.asdict(config)))
    old = _old_run(out, asked, resume)
    if old is not None and (out / "summary.json").exists():
        return json.loads((out / "summary.json").read_text())
    dataset = data.load(
        config.data, split=config.split, size=config.size, progress=progress
    )
    config = chosen(config, dataset)
    batches = sampling.ImageBatches(
        dataset.train.images,
        dataset.train.labels,
        config.classes,
        config.per_class,
        config.seed,
        config.turns,
    )
    some = dataset.train.images[:: -(-len(dataset.train) // GALLERY)] / 255
    settings = json.loads(json.dumps(dataclasses.asdict(config))) | {
        "asked": asked,
        "key": dataset.key,
        "shape": dataset.train.images.shape[1:],
        "mean": some.mean(axis=(0, 1, 2)).tolist(),
        "deviation": np.maximum(some.std(axis=(0, 1, 2)), 1e-3).tolist(),
        "label_names": dataset.label_names,
        "skipped": dataset.skipped,
    }
    if old is None:
        out.mkdir(parents=True, exist_ok=True)
        _write(out / "config.json", json.dumps(settings, indent=2) + "\n")
    elif old["key"] != settings["key"]:
        raise ValueError(
            f"data {config.data!r} is no longer what the run in {out} was made with."
        )

    model = build_model(settings)
    log = Log(out / "metrics.jsonl")
    checkpoints = Checkpoints(out / "checkpoints")
    best = Checkpoints(out / "best", keep=1)
    embed = functools.partial(training.embed_images, model)
    evaluations = {
        line["evaluation"]: line["metrics"]
        for line in log.lines
        if "evaluation" in line and line["step"] == 0
    }
    for name, function in (("raw pixels", _flat), ("untrained", embed)):
        if name not in evaluations:
            evaluations[name] = evaluate(function, dataset)
            log.add({"step": 0, "evaluation": name, "metrics": evaluations[name]})

    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.learning_rate,
        warmup_steps=min(50, config.steps // 10),
        decay_steps=config.steps,
    )
    losses = [(0, training.mined_loss(config.mining, margin=config.margin))]
    if config.mining == "hard" and (warm := int(config.warm_start * config.steps)):
        losses[0] = warm, losses[0][1]
        losses.insert(0, (0, training.mined_loss("all", margin=config.margin)))
    for line in training.fit(
        model,
        optax.adamw(schedule, weight_decay=config.weight_decay),
        batches,
        steps=config.steps,
        loss=losses,
        augment=config.augment,
        seed=config.seed,
        average=config.average,
        chunk=config.chunk,
        log_every=config.log_every,
        validate=functools.partial(validate, dataset=dataset),
        validate_every=config.validate_every,
        best="map_at_r",
        checkpoints=checkpoints,
        checkpoint_every=config.checkpoint_every,
        best_checkpoints=best,
        progress=progress,
    ):
        if "resumed" in line:
            log.keep(line["step"])
            for damage in line["damaged"]:
                print(f"{damage}; going on from step {line['step']}.", flush=True)
        else:
            log.add(line)

    model, _ = load_model(out)
    embed = functools.partial(training.embed_images, model)
    evaluations["trained"] = evaluate(embed, dataset)
    log.keep(config.steps)
    log.add(
        {
            "step": config.steps,
            "evaluation": "trained",
            "metrics": evaluations["trained"],
        }
    )
    plots.training([line for line in log.lines if "loss" in line], out / "training.png")
    shown = dataset.test if len(dataset.test) else dataset.train
    plots.neighbors(
        shown.images,
        shown.labels,
        {"raw pixels": _flat(shown.images), "trained": embed(shown.images)},
        dataset.label_names,
        out / "neighbors.png",
        k=min(8, len(shown) - 1),
    )
    _write(out / "summary.json", json.dumps(evaluations, indent=2) + "\n")
    for kept in (checkpoints, best):
        kept.close()
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
        if path.exists():
            for line in path.read_text().splitlines(keepends=True):
                if line.endswith("\n"):
                    self.lines.append(json.loads(line))
        self._write_all()

    def add(self, line: dict[str, Any]) -> None:
        self.lines.append(line)
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def keep(self, step: int) -> None:
        """Drops what comes after a step, and the evaluation at the end."""
        self.lines = [
            line
            for line in self.lines
            if line["step"] <= step and line.get("evaluation") != "trained"
        ]
        self._write_all()

    def _write_all(self) -> None:
        _write(self.path, "".join(json.dumps(line) + "\n" for line in self.lines))


def evaluate(
    embed: Callable[[np.ndarray], Array], dataset: data.Dataset
) -> dict[str, float]:
    """How well an embedding finds test images of the same class, in percent.

    Args:
        embed: from uint8 images to embeddings ``[n, d]``.
        dataset: its test images are queries; among themselves, and for
            `nearest_in_train` with the training images as the gallery, if these are of
            the same classes.

    Returns:
        MAP@R, R-precision and recall@1 within the test images, and the share of test
        images whose nearest training image is of their class; nothing if no image is
        held out.
    """
    if not len(dataset.test):
        return {}
    test = embed(dataset.test.images)
    within = tj.retrieval.evaluate(test, dataset.test.labels)
    metrics = {
        "map_at_r": 100 * float(within.map_at_r),
        "r_precision": 100 * float(within.r_precision),
        "recall_at_1": 100 * float(within.precision_at_1),
    }
    if np.isin(dataset.test.labels, dataset.train.labels).any():
        found = tj.retrieval.recall_at_k(
            test,
            dataset.test.labels,
            ks=(1,),
            references=embed(dataset.train.images),
            reference_labels=dataset.train.labels,
        )
        metrics["nearest_in_train"] = 100 * float(found[0])
    return metrics


def validate(model: nnx.Module, dataset: data.Dataset) -> dict[str, float]:
    """MAP@R and recall@1 of the validation images, in percent.

    Among themselves where their classes are not trained on, and else against training
    images. NaN if no image is held out for validation.
    """
    if not len(dataset.validation):
        return {"map_at_r": float("nan"), "recall_at_1": float("nan")}
    images, labels = dataset.validation.images, dataset.validation.labels
    embeddings = training.embed_images(model, images)
    options = {}
    if np.isin(labels, dataset.train.labels).any():
        random = np.random.default_rng(0)
        gallery = random.permutation(len(dataset.train))[:GALLERY]
        options = {
            "references": training.embed_images(model, dataset.train.images[gallery]),
            "reference_labels": dataset.train.labels[gallery],
        }
    metrics = tj.retrieval.evaluate(embeddings, labels, **options)
    return {
        "map_at_r": 100 * float(metrics.map_at_r),
        "recall_at_1": 100 * float(metrics.precision_at_1),
    }


class Standardized(nnx.Module):
    """A model whose images have mean 0 and deviation 1."""

    def __init__(
        self, model: nnx.Module, mean: Sequence[float], deviation: Sequence[float]
    ):
        self.model = model
        self.mean, self.deviation = tuple(mean), tuple(deviation)

    def __call__(self, images: Array) -> Array:
        return self.model((images - jnp.array(self.mean)) / jnp.array(self.deviation))


def build_model(settings: dict[str, Any]) -> nnx.Module:
    """The untrained model of a run's settings."""
    model = MODELS[settings["model"]](
        settings["dim"],
        channels=tuple(settings["channels"]),
        in_channels=settings["shape"][-1],
        dtype=jnp.bfloat16 if settings["bfloat16"] else None,
        rngs=nnx.Rngs(settings["seed"]),
    )
    return Standardized(model, settings["mean"], settings["deviation"])


def load_model(run_dir: str | Path) -> tuple[nnx.Module, dict[str, Any]]:
    """The best model of a run, and the run's settings.

    Raises:
        FileNotFoundError: if there is none yet.
    """
    run_dir = Path(run_dir).resolve()
    for part in ("config.json", "best"):
        if not (run_dir / part).exists():
            raise FileNotFoundError(f"no trained model in {run_dir}: no {part}.")
    settings = json.loads((run_dir / "config.json").read_text())
    model = build_model(settings)
    best = Checkpoints(run_dir / "best", keep=1, writable=False)
    found = best.restore(nnx.state(model))
    best.close()
    if found is None:
        raise FileNotFoundError(f"no trained model in {run_dir}: best is empty.")
    nnx.update(model, found[1])
    model.eval()
    return model, settings


Pictures = ArrayLike | Sequence[np.ndarray] | Sequence[str | Path]


def load_embedder(run_dir: str | Path) -> Callable[[Pictures], Array]:
    """The trained embedding of a run.

    Args:
        run_dir: a run directory.

    Returns:
        A function to unit vectors ``[n, d]``, from uint8 images of any size, grey or
        colour: ``[n, height, width]`` or ``[n, height, width, channels]``, a sequence
        of images of different sizes, or paths of image files. Images are made into what
        the run was trained with.

    Raises:
        FileNotFoundError: if there is no trained model.
    """
    model, settings = load_model(run_dir)
    shape = data.Shape(*settings["shape"])

    def embed(images: Pictures) -> Array:
        return training.embed_images(model, _ready(images, shape))

    return embed


def _ready(images: Pictures, shape: data.Shape) -> np.ndarray:
    """Images of any kind as uint8 ``[n, height, width, channels]``."""
    if isinstance(images, (str, Path)):
        raise TypeError("images must be several, got one path; put it into a list.")
    if not hasattr(images, "dtype"):
        images = list(images)
    if len(images) == 0:
        raise ValueError("images must not be empty.")
    if isinstance(images, list) and isinstance(images[0], (str, Path)):
        with ThreadPoolExecutor() as pool:
            one = lambda file: shape.fit(data.open_image(file))  # noqa: E731
            return np.stack(list(pool.map(one, images)))

    def picture(image: ArrayLike) -> Image.Image:
        image = np.asarray(image)
        if image.dtype != np.uint8:
            raise TypeError(f"images must be uint8, got dtype {image.dtype}.")
        if image.ndim == 3 and image.shape[-1] == 1:
            image = image[..., 0]
        if image.size == 0 or not (
            image.ndim == 2 or (image.ndim == 3 and image.shape[-1] in (3, 4))
        ):
            raise ValueError(
                "images must be [n, height, width] or [n, height, width, channels] "
                f"with 1, 3 or 4 channels; one of them is {image.shape}."
            )
        return Image.fromarray(image)

    if getattr(images, "ndim", 0) == 4 and images.shape[1:] == dataclasses.astuple(
        shape
    ):
        images = np.asarray(images)
        if images.dtype != np.uint8:
            raise TypeError(f"images must be uint8, got dtype {images.dtype}.")
        return images
    return np.stack([shape.fit(picture(image)) for image in images])


def _flat(images: np.ndarray) -> Array:
    return training.as_floats(images).reshape(len(images), -1)


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
        again = " To go on with it, use resume." if "config.json" in begun else ""
        raise RunExistsError(
            f"{out} already exists and is not an empty directory.{again}"
        )
    if "config.json" not in begun:
        raise RunExistsError(f"{out} is not the directory of a run: no config.json.")
    old = json.loads((out / "config.json").read_text())
    changed = [name for name in asked if asked[name] != old["asked"].get(name)]
    if changed:
        told = ", ".join(
            f"{name} was {old['asked'].get(name)!r} and is {asked[name]!r}"
            for name in changed
        )
        raise ValueError(f"the run in {out} was made otherwise: {told}.")
    return old


def _write(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    part = path.with_name(path.name + ".part")
    with part.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
