"""Heads on features of a frozen backbone: closed forms and recipes, on unseen classes.

    python benchmarks/frozen.py --data FOLDER --backbone efficientnet-lite0 --size 160

FOLDER has one folder of images per class. In each fold the heads are fitted and trained
on a random half of the classes with several images, with all images of each class. They
are measured on the other half: the mean MAP@R over images and the equal error rate over
all pairs, in %.
"""

import argparse
import dataclasses
import functools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

import tripletjax as tj
from tripletjax import learn
from tripletjax.learn.data import datasets
from tripletjax.learn.data.image_array import KeptFeatures
from tripletjax.learn.distributed.placement import ONE_DEVICE
from tripletjax.learn.networks import heads, whitening
from tripletjax.learn.networks.embedding import embed_images
from tripletjax.learn.runs import comparisons, fitting, preparation, train
from tripletjax.learn.runs.model import build_model, fill_backbone
from tripletjax.learn.runs.plan import Plan
from tripletjax.learn.runs.tasks import LabelTask

# Settings that are compared: shrinkages and dimensions of the closed form, and changes
# of the default plan of training.
SHRINKAGES, DIMS = (0.3, 0.5, 0.7, 0.9), (128, 256, 512, 1280)
CHANGES: dict[str, dict[str, Any]] = {
    "default": {},
    "loss all": {"loss": "all"},
    "loss supcon": {"loss": "supcon", "temperature": 0.1, "margin": None},
    "margin 0.1": {"margin": 0.1},
    "margin 0.4": {"margin": 0.4},
    "learning rate 1e-4": {"learning_rate": 1e-4},
    "learning rate 4e-4": {"learning_rate": 4e-4},
    "400 steps": {"steps": 400},
    "1,000 steps, learning rate 1e-3": {"steps": 1000, "learning_rate": 1e-3},
    "weight decay 0.1": {"weight_decay": 0.1},
    "one view": {"views": 1},
    "four views": {"views": 4},
}


def load(options: dict[str, Any]) -> tuple[LabelTask, Plan, Any]:
    """The features of all images as training images, the plan, and the head."""
    with tempfile.TemporaryDirectory() as directory:
        config = preparation.normalize(
            learn.Config(backbone_training="frozen", views=4, **options)
        )
        start = preparation.start_of(config, None)
        record, task = preparation.make_plan(
            config, None, start, Path(directory), ONE_DEVICE, True
        )
        preparation.write(record, None, start, Path(directory))
        model: Any = build_model(record)
        fill_backbone(model, record, Path(directory))
        task = train._on_features(task, model, record.plan, progress=True)
    return _with_all_images(task), record.plan, model.model.head


def _with_all_images(task: LabelTask) -> LabelTask:
    """The task that trains on its validation and test images, too."""
    data = task.dataset
    parts = [part for part in (data.train, data.validation, data.test) if len(part)]
    # Validation and test images have no random views.
    views = data.train.images.features.shape[1]
    features = [
        np.concatenate([x] + [x[:, :1]] * (views - x.shape[1]), axis=1)
        for x in (part.images.features for part in parts)
    ]
    pixels = [part.images.pixels[:] for part in parts]
    images = KeptFeatures(np.concatenate(pixels), np.concatenate(features))
    labels = np.concatenate([part.labels for part in parts])
    train_part = datasets.Images(images, labels)
    return LabelTask(dataclasses.replace(data, train=train_part))


def measure(embed: Callable, images: datasets.Images) -> np.ndarray:
    """MAP@R and equal error rate of images among themselves, in %."""
    x = np.asarray(embed(images.images))
    of = tj.retrieval.evaluate(x, images.labels)
    pairs = np.triu_indices(len(x), 1)
    # Of unit vectors: differences of all pairs would need gigabytes.
    distances = np.sqrt(np.maximum(0, 2 - 2 * x @ x.T))[pairs]
    same = images.labels[pairs[0]] == images.labels[pairs[1]]
    eer = tj.verification.equal_error_rate(distances, same)
    return 100 * np.array([float(of.map_at_r), float(eer)])


def heads_of(
    fold: LabelTask, plan: Plan, head: heads.Head, seeds: int
) -> Iterator[tuple[str, Callable]]:
    """Names and embeddings of all settings."""
    features = fold.images.features
    yield "features", heads.MeanDirection(1 + plan.mirror)
    rows, labels = fold.labelled_rows
    for dim in DIMS:
        for shrinkage in SHRINKAGES:
            mean, kernel = whitening.whitening(
                features[rows, 0], labels, dim, shrinkage=shrinkage
            )
            one = heads.Head(len(mean), dim, mirror=plan.mirror, rngs=nnx.Rngs(0))
            one.mean[...] = np.float32(mean)
            one.out.kernel[...] = np.float32(kernel)
            yield f"closed form, {dim} dimensions, shrinkage {shrinkage}", one
    for name, changes in CHANGES.items():
        for seed in range(seeds):
            one = nnx.clone(head)
            comparisons.fit_to_features(one, fold)
            changed, task = _changed(plan, fold, changes)
            changed = task.limited(dataclasses.replace(changed, seed=seed))
            batches = task.batches(changed)
            for _ in fitting.fit(one, task, batches, changed, progress=False):
                pass
            yield name, one


def _changed(
    plan: Plan, fold: LabelTask, changes: dict[str, Any]
) -> tuple[Plan, LabelTask]:
    """The plan with changes, and the task with a number of views (2 by default)."""
    of_batches = {k: v for k, v in changes.items() if k in ("loss", "temperature")}
    of_plan = {k: v for k, v in changes.items() if k not in (*of_batches, "views")}
    views = changes.get("views", 2)
    data = fold.dataset
    images = data.train.images
    images = KeptFeatures(images.pixels, images.features[:, :views])
    data = dataclasses.replace(data, train=datasets.Images(images, data.train.labels))
    batches = dataclasses.replace(plan.batches, **of_batches)
    return dataclasses.replace(plan, batches=batches, **of_plan), LabelTask(data)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--backbone", required=True)
    parser.add_argument("--size", type=int)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--folds", type=int, default=2, choices=[1, 2])
    arguments = parser.parse_args()
    names = "data", "backbone", "size"
    task, plan, head = load({name: getattr(arguments, name) for name in names})
    rows: dict[str, list[np.ndarray]] = {}
    for number, fold in enumerate(task.folds(2)):
        if number == arguments.folds:
            break
        for name, model in heads_of(fold, plan, head, arguments.seeds):
            embed = functools.partial(embed_images, model)
            rows.setdefault(name, []).append(measure(embed, fold.dataset.validation))
    print("| head | MAP@R | EER |")
    print("| --- | --- | --- |")
    for name, values in rows.items():
        map_at_r, eer = np.mean(values, axis=0)
        print(f"| {name} | {map_at_r:.1f} | {eer:.1f} |")


if __name__ == "__main__":
    main()
