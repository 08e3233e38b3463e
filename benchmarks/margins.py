"""MAP@R on unseen classes over margins of the triplet loss.

    python benchmarks/margins.py --data digits --steps 200
    python benchmarks/margins.py --data FOLDER --size 24 --steps 200 --images 10

A random half of the classes trains an embedding by the defaults of `tripletjax train`.
The other half measures its last checkpoint. The next seed swaps the halves: two seeds
measure every class once. The table compares every margin with the first one. It has the
mean over classes of the difference of MAP@R in points, its 95 % interval (Student's t
over classes), and the difference at each seed.
"""

import argparse
import dataclasses
import functools
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import optax
from scipy.special import stdtrit

import tripletjax as tj
from tripletjax import learn
from tripletjax.learn.data import datasets
from tripletjax.learn.data.image_array import ArrayImages
from tripletjax.learn.runs import tasks
from tripletjax.learn.runs.model import build_model
from tripletjax.learn.runs.record import ImageRecord, RunRecord
from tripletjax.learn.training.losses import find_loss
from tripletjax.learn.training.optimizer import learning_rates

CONFIDENCE = 0.95
# MAP@R in percent by class, at each seed.
Scores = list[dict[int, float]]


class WithMargin:
    """Batches whose labels carry the margin, so that one program serves all margins."""

    def __init__(self, batches: Any, margin: float):
        self.batches, self.margin = batches, np.float32(margin)

    def __getitem__(self, step: int) -> tuple[np.ndarray, Any]:
        images, labels = self.batches[step]
        return images, (labels, self.margin)


@functools.cache
def loss_of(name: str):
    """Triplet loss of labels that carry the margin."""
    one = find_loss(name)
    return lambda x, labels: one.function(
        x, labels[0], margin=labels[1], reduce_fn=one.mean
    )


@functools.cache
def optimizer(learning_rate: float, weight_decay: float, steps: int):
    """The optimizer of `learn.run`, one object for all margins."""
    return optax.adamw(learning_rates(learning_rate, steps), weight_decay=weight_decay)


def load(arguments: argparse.Namespace) -> tuple[datasets.Dataset, datasets.Images]:
    """Load all images of classes of two or more, at most `--images` of each class."""
    dataset = datasets.load(arguments.data, size=arguments.size)
    parts = dataset.train, dataset.validation, dataset.test
    pixels = ArrayImages.of(np.concatenate([part.images[:] for part in parts]))
    images = datasets.Images(pixels, np.concatenate([part.labels for part in parts]))
    order = np.random.default_rng(0).permutation(len(images))
    rows = []
    for label in np.unique(images.labels):
        members = order[images.labels[order] == label]
        if len(members) > 1:
            rows.extend(members[: arguments.images])
    return dataset, images.part(np.sort(rows))


def train(
    config: learn.Config, dataset: datasets.Dataset, images: datasets.Images
) -> tuple[Any, tasks.LabelTask]:
    """Train on the training images of a dataset. Return the model and the task."""
    task: Any = tasks.LabelTask(dataset)
    plan, _ = task.plan(config)
    seen = task.seen(plan)
    # Statistics of all images are the same for both halves, and so is the program.
    values = np.asarray(images.images) / np.float32(255)
    _, height, width, channels = images.images.shape
    record = RunRecord(
        requested=config,
        plan=plan,
        images=ImageRecord(
            shape=(height, width, channels),
            white=dataset.decoding.white,
            background=dataset.decoding.background,
            mean=tuple(values.mean(axis=(0, 1, 2)).tolist()),
            std=tuple(values.std(axis=(0, 1, 2)).tolist()),
        ),
        data_key=dataset.key,
        label_names=task.label_names,
        seen_names=task.seen_names,
        skipped=(),
        notes=(),
    )
    model = build_model(record)
    losses = [(0, loss_of(config.loss))]
    if config.loss == "hard":
        warm = int(config.batch_all_fraction * plan.steps)
        losses = [(0, loss_of("all")), (warm, loss_of("hard"))]
    lines = learn.fit(
        model,
        optimizer(plan.learning_rate, plan.weight_decay, plan.steps),
        WithMargin(seen.batches(plan), config.margin),
        steps=plan.steps,
        loss=losses,
        augment=plan.augment,
        seed=plan.seed,
        ema_decay=plan.ema_decay,
        log_every=plan.steps,
        progress=False,
    )
    for _ in lines:
        pass
    return model, seen


def map_of_classes(model: Any, held_out: datasets.Images) -> dict[int, float]:
    """Measure MAP@R of each class in percent."""
    x = learn.embed_images(model, held_out.images)
    scores = tj.retrieval.evaluate(x, held_out.labels, reduce_fn=None).map_at_r
    return {
        int(label): 100 * float(np.mean(np.asarray(scores)[held_out.labels == label]))
        for label in np.unique(held_out.labels)
    }


def measure(arguments: argparse.Namespace) -> dict[float, Scores]:
    """Train with every margin and seed, and measure the unseen classes."""
    dataset, images = load(arguments)
    labels = np.unique(images.labels)
    print(f"{len(labels)} classes, {len(images)} images")
    measured = defaultdict(list)
    for seed in range(arguments.seeds):
        order = np.random.default_rng(seed // 2).permutation(labels)
        chosen = np.isin(images.labels, order[seed % 2 :: 2])
        halves = dataclasses.replace(
            dataset,
            train=images.part(np.flatnonzero(chosen)),
            validation=images.part(np.zeros(0, int)),
            test=images.part(np.flatnonzero(~chosen)),
        )
        for margin in arguments.margins:
            start = time.perf_counter()
            config = learn.Config(
                data=arguments.data,
                loss=arguments.loss,
                margin=margin,
                seed=seed,
                size=arguments.size,
                steps=arguments.steps,
            )
            model, task = train(config, halves, images)
            measured[margin].append(map_of_classes(model, task.dataset.test))
            mean = np.mean([*measured[margin][-1].values()])
            seconds = time.perf_counter() - start
            print(
                f"margin {margin:g}, seed {seed}: MAP@R {mean:.2f} %, {seconds:.0f} s",
                flush=True,
            )
    return measured


def half_width(differences: np.ndarray) -> float:
    """Half of the interval of the mean over classes."""
    n = len(differences)
    quantile = stdtrit(n - 1, (1 + CONFIDENCE) / 2)
    return float(quantile * np.std(differences, ddof=1) / np.sqrt(n))


def by_class(seeds: Sequence[dict[int, float]]) -> np.ndarray:
    """The mean over seeds of each class."""
    values = defaultdict(list)
    for scores in seeds:
        for label, score in scores.items():
            values[label].append(score)
    return np.array([np.mean(values[label]) for label in sorted(values)])


def report(measured: dict[float, Scores]) -> None:
    """Print the table of margins."""
    first = next(iter(measured))
    print(f"| margin | MAP@R | difference to {first:g} | by seed |")
    print("| --- | --- | --- | --- |")
    for margin, seeds in measured.items():
        pairs = zip(seeds, measured[first], strict=True)
        differences = [{c: s[c] - base[c] for c in s} for s, base in pairs]
        of_classes = by_class(differences)
        of_seeds = (f"{np.mean([*d.values()]):+.1f}" for d in differences)
        print(
            f"| {margin:g} | {by_class(seeds).mean():.1f} | {of_classes.mean():+.1f} "
            f"± {half_width(of_classes):.1f} | {', '.join(of_seeds)} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--margins", type=float, nargs="+", default=[0.2, 0.4, 0.8])
    parser.add_argument(
        "--loss", choices=["semi-hard", "hard", "all"], default="semi-hard"
    )
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--images", type=int, help="largest number of each class")
    parser.add_argument("--size", type=int, help="longer side in pixels")
    parser.add_argument("--steps", type=int)
    report(measure(parser.parse_args()))


if __name__ == "__main__":
    main()
