"""The training run: step, loop, evaluation, and what it leaves behind.

A run directory holds

- ``config.json``: every choice that the run was made with;
- ``metrics.jsonl``: a line of numbers every few steps, and the evaluations;
- ``checkpoint/``: the trained parameters (orbax);
- ``training.png``: loss and share of active triplets over the steps;
- ``neighbors.png``: images that were never trained on, and their nearest neighbours.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array
from orbax.checkpoint import v1 as ocp
from tqdm import tqdm

import tripletjax as tj
from tripletjax.learn import augment, data, models, plots, sampling

# How triplets are mined and their costs averaged.
MINING: dict[str, tuple[Callable, Callable]] = {
    "all": (tj.blockwise.batch_all_loss, tj.mean_active),
    "semi-hard": (tj.blockwise.batch_semi_hard_loss, tj.mean_valid),
    "hard": (tj.blockwise.batch_hard_loss, tj.mean_valid),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that a run depends on.

    Attributes:
        data: name of the dataset.
        mining: which triplets to train on: all, semi-hard or hard.
        steps: how many steps to train.
        seed: of the initial parameters, the batches and the augmentation.
        margin: of the triplet loss, in Euclidean distance between unit vectors.
        warm_start: share of the steps that hard mining leaves to all triplets first,
            without which it collapses.
        classes: how many classes there are in a batch.
        per_class: how many images of each.
        learning_rate: at its peak.
        weight_decay: of AdamW.
        dim: number of dimensions of the embedding.
        channels: number of channels of each stage of the network.
        shift: augmentation, in pixels.
        rotation: augmentation, in degrees.
        zoom: augmentation, as a share of the size.
        shear: augmentation, as a share of the size.
        log_every: how many steps between two lines of metrics.
    """

    data: str = "digits"
    mining: str = "all"
    steps: int = 600
    seed: int = 0
    margin: float = 0.2
    warm_start: float = 0.5
    classes: int = 10
    per_class: int = 8
    learning_rate: float = 2e-3
    weight_decay: float = 1e-4
    dim: int = 64
    channels: tuple[int, ...] = (32, 64)
    shift: float = 1.0
    rotation: float = 10.0
    zoom: float = 0.1
    shear: float = 0.1
    log_every: int = 10

    def __post_init__(self) -> None:
        if self.mining not in MINING:
            known = ", ".join(MINING)
            raise ValueError(f"mining must be one of {known}, got {self.mining!r}.")
        for name in ("steps", "log_every", "dim"):
            if getattr(self, name) < 1:
                value = getattr(self, name)
                raise ValueError(f"{name} must be at least 1, got {value!r}.")
        if not 0 <= self.margin < float("inf"):
            raise ValueError(f"margin must be finite and >= 0, got {self.margin!r}.")
        if not 0 <= self.warm_start <= 1:
            raise ValueError(f"warm_start must be 0 to 1, got {self.warm_start!r}.")


class RunExistsError(FileExistsError):
    """The run directory already holds something."""


def run(config: Config, out: str | Path, *, progress: bool = True) -> dict[str, Any]:
    """Trains an embedding and writes its run directory.

    Args:
        config: what to do.
        out: the run directory, which must not exist or be empty.
        progress: whether to show a progress bar.

    Returns:
        The evaluations by name, ``{"raw pixels": ..., "untrained": ..., "trained":
        ...}``, each as from `evaluate`.

    Raises:
        RunExistsError: if `out` is not an empty directory.
        ValueError: if the dataset does not exist or has too few classes.
        FloatingPointError: if the loss becomes infinite or NaN.
    """
    dataset = data.load(config.data)
    batches = sampling.ClassBatches(
        dataset.train.labels, config.classes, config.per_class, config.seed
    )
    out = _new_directory(out)
    settings = dataclasses.asdict(config) | {"label_names": dataset.label_names}
    settings["in_channels"] = dataset.train.images.shape[-1]
    (out / "config.json").write_text(json.dumps(settings, indent=2) + "\n")

    model = build_model(settings)
    embed = functools.partial(embed_images, model)
    evaluations = {
        "raw pixels": evaluate(_flat, dataset),
        "untrained": evaluate(embed, dataset),
    }
    lines = []
    with (out / "metrics.jsonl").open("w") as file:

        def log(line: dict[str, Any]) -> None:
            lines.append(line)
            file.write(json.dumps(line) + "\n")
            file.flush()

        for name, metrics in evaluations.items():
            log({"step": 0, "evaluation": name} | metrics)
        for line in fit(model, config, dataset.train, batches, progress=progress):
            log(line)
        evaluations["trained"] = evaluate(embed, dataset)
        log({"step": config.steps, "evaluation": "trained"} | evaluations["trained"])

    ocp.save(out / "checkpoint", nnx.state(model))
    plots.training([line for line in lines if "loss" in line], out / "training.png")
    plots.neighbors(
        dataset.test.images,
        dataset.test.labels,
        {
            "raw pixels": _flat(dataset.test.images),
            "trained": embed(dataset.test.images),
        },
        dataset.label_names,
        out / "neighbors.png",
    )
    return evaluations


def fit(
    model: nnx.Module,
    config: Config,
    images: data.Images,
    batches: sampling.ClassBatches,
    *,
    progress: bool = True,
) -> Iterator[dict[str, float]]:
    """Trains a model in place.

    Args:
        model: from float images to embeddings.
        config: how to train.
        images: what to train on.
        batches: the indices of the images of each step.
        progress: whether to show a progress bar.

    Yields:
        Every `log_every` steps and after the last, the step, the loss, the share of
        active triplets and the mean distance between embeddings (which tends to 0 when
        training collapses).

    Raises:
        FloatingPointError: if the loss becomes infinite or NaN.
    """
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.learning_rate,
        warmup_steps=min(50, config.steps // 10),
        decay_steps=config.steps,
    )
    tx = optax.adamw(schedule, weight_decay=config.weight_decay)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    key = jax.random.key(config.seed)
    warm = config.warm_start * config.steps if config.mining == "hard" else 0
    steps = tqdm(
        range(config.steps), desc="training", unit="step", disable=not progress
    )
    for step in steps:
        mining = "all" if step < warm else config.mining
        chosen = batches[step]
        metrics = train_step(
            model,
            optimizer,
            images.images[chosen],
            images.labels[chosen],
            jax.random.fold_in(key, step),
            config=config,
            mining=mining,
        )
        if (step + 1) % config.log_every == 0 or step + 1 == config.steps:
            line = {name: float(value) for name, value in metrics.items()}
            if not np.isfinite(line["loss"]):
                raise FloatingPointError(
                    f"the loss is {line['loss']} at step {step + 1}: training stopped. "
                    "A lower learning rate usually helps."
                )
            steps.set_postfix({k: f"{v:.3f}" for k, v in line.items()})
            yield {"step": step + 1, "mining": mining} | line


@functools.partial(nnx.jit, static_argnames=("config", "mining"))
def train_step(
    model: nnx.Module,
    optimizer: nnx.Optimizer,
    images: Array,
    labels: Array,
    key: Array,
    *,
    config: Config,
    mining: str,
) -> dict[str, Array]:
    """One step of training, in place; returns its metrics."""
    loss_of, mean = MINING[mining]
    images = augment.random_affine(
        key,
        as_floats(images),
        shift=config.shift,
        rotation=config.rotation,
        zoom=config.zoom,
        shear=config.shear,
    )

    def loss_fn(model: nnx.Module) -> tuple[Array, dict[str, Array]]:
        x = model(images)
        # The root of the mean squared distance of two of them.
        spread = jnp.sqrt(2 * jnp.sum(jnp.var(x, axis=0, ddof=1)))
        loss, active = loss_of(
            x,
            labels,
            margin=config.margin,
            reduce_fn=tj.SumReduction(
                lambda sums: (mean(sums), sums.active / jnp.maximum(sums.valid, 1))
            ),
        )
        return loss, {"active": active, "spread": spread}

    (loss, metrics), gradients = nnx.value_and_grad(loss_fn, has_aux=True)(model)
    optimizer.update(model, gradients)
    return {"loss": loss} | metrics


def evaluate(
    embed: Callable[[np.ndarray], Array], dataset: data.Dataset
) -> dict[str, float]:
    """How well an embedding finds test images of the same class, in percent.

    Args:
        embed: from uint8 images to embeddings ``[n, d]``.
        dataset: its test images are queries; among themselves, and for
            `nearest_in_train` with the training images as the gallery.

    Returns:
        MAP@R, R-precision and recall@1 within the test images, and the share of test
        images whose nearest training image is of their class.
    """
    test, train = embed(dataset.test.images), embed(dataset.train.images)
    within = tj.retrieval.evaluate(test, dataset.test.labels)
    across = tj.retrieval.evaluate(
        test,
        dataset.test.labels,
        references=train,
        reference_labels=dataset.train.labels,
    )
    return {
        "map_at_r": 100 * float(within.map_at_r),
        "r_precision": 100 * float(within.r_precision),
        "recall_at_1": 100 * float(within.precision_at_1),
        "nearest_in_train": 100 * float(across.precision_at_1),
    }


def build_model(settings: dict[str, Any]) -> nnx.Module:
    """The untrained model of a run's settings."""
    return models.EmbeddingCNN(
        settings["dim"],
        channels=settings["channels"],
        in_channels=settings["in_channels"],
        rngs=nnx.Rngs(settings["seed"]),
    )


def load_embedder(run_dir: str | Path) -> Callable[[np.ndarray], Array]:
    """The trained embedding of a run.

    Args:
        run_dir: a run directory.

    Returns:
        A function from uint8 images ``[n, height, width]`` or ``[n, height, width,
        channels]`` to unit vectors ``[n, d]``.

    Raises:
        FileNotFoundError: if there is no finished run.
    """
    run_dir = Path(run_dir).resolve()
    for part in ("config.json", "checkpoint"):
        if not (run_dir / part).exists():
            raise FileNotFoundError(f"no finished run in {run_dir}: no {part}.")
    settings = json.loads((run_dir / "config.json").read_text())
    model = build_model(settings)
    nnx.update(model, ocp.load(run_dir / "checkpoint", nnx.state(model)))

    def embed(images: np.ndarray) -> Array:
        images = np.asarray(images)
        if images.ndim == 3:
            images = images[..., None]
        channels = settings["in_channels"]
        if images.ndim != 4 or images.shape[-1] != channels:
            raise ValueError(
                f"images must be [n, height, width, {channels}], got shape "
                f"{images.shape}."
            )
        if images.dtype != np.uint8:
            raise TypeError(f"images must be uint8, got dtype {images.dtype}.")
        return embed_images(model, images)

    return embed


@nnx.jit
def _embed(model: nnx.Module, images: Array) -> Array:
    return model(as_floats(images))


def embed_images(
    model: nnx.Module, images: np.ndarray, *, batch_size: int = 256
) -> Array:
    """Embeds uint8 images ``[n, height, width, channels]``, a batch at a time."""
    embeddings = []
    for start in range(0, len(images), batch_size):
        batch = images[start : start + batch_size]
        # The last batch is filled up, so that one size is compiled.
        missing = min(batch_size, len(images)) - len(batch)
        padded = np.pad(batch, [(0, missing)] + [(0, 0)] * (images.ndim - 1))
        embeddings.append(_embed(model, padded)[: len(batch)])
    return jnp.concatenate(embeddings)


def as_floats(images: Array) -> Array:
    """uint8 images as floats from 0 to 1."""
    return jnp.asarray(images, jnp.float32) / 255


def _flat(images: np.ndarray) -> Array:
    return as_floats(images).reshape(len(images), -1)


def _new_directory(out: str | Path) -> Path:
    out = Path(out).resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunExistsError(f"{out} already exists and is not an empty directory.")
    out.mkdir(parents=True, exist_ok=True)
    return out
