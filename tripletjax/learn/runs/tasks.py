"""What a run learns from: images with labels, or given triplets of images.

Either knows its batches and losses, and how to tell what an embedding is worth.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

import tripletjax as tj
from tripletjax.learn import plots
from tripletjax.learn.data import datasets, hierarchy, sampling, triplet_files
from tripletjax.learn.data.image_array import (
    ImageArray,
)
from tripletjax.learn.distributed.placement import ONE_DEVICE, Placement
from tripletjax.learn.networks.embedding import embed_images
from tripletjax.learn.runs import defaults
from tripletjax.learn.runs.config import Config
from tripletjax.learn.runs.defaults import Start
from tripletjax.learn.runs.plan import ClassBatchPlan, Plan, TripletBatchPlan
from tripletjax.learn.training import loop, objectives

# Validation and pictures have at most so many images, of all.
GALLERY = 2048

Embed = Callable[[ImageArray], Array]
# From images, and what they are for, to what is learnt from in their place.
OfImages = Callable[[ImageArray, str], ImageArray]


@dataclasses.dataclass(frozen=True)
class LabelTask:
    """Images with labels, of which triplets are mined in each batch."""

    dataset: datasets.Dataset
    # By which the best model is chosen.
    selection_metric = "map_at_r"

    @property
    def images(self) -> ImageArray:
        """What is trained on."""
        return self.dataset.train.images

    @property
    def label_names(self) -> tuple[str, ...]:
        return self.dataset.label_names

    @property
    def seen_names(self) -> tuple[str, ...]:
        """Of classes that are trained on, or that the best model is chosen by."""
        parts = self.dataset.train, self.dataset.validation
        seen = np.unique(np.concatenate([part.labels for part in parts]))
        return tuple(self.label_names[label] for label in seen)

    @property
    def description(self) -> str:
        names = self.label_names
        return f"images of {len(names):,} classes, {names[0]} to {names[-1]}"

    @property
    def counts(self) -> dict[str, int]:
        parts = "train", "validation", "test"
        return {part: len(getattr(self.dataset, part)) for part in parts}

    def plan(
        self, config: Config, start: Start | None = None
    ) -> tuple[Plan, list[str]]:
        return defaults.plan_for_classes(config, self.dataset, start)

    def seen(self, plan: Plan) -> "LabelTask":
        """The same with images as the network sees them."""
        view = plan.view_of(self.images.shape[1:])
        if view is None:
            return self
        return self._with(lambda images, what: images.crop(view))

    def on_features(self, features: OfImages) -> "LabelTask":
        """The same with features of the images, by what these are: train or others."""
        return self._with(features)

    def _with(self, of: OfImages) -> "LabelTask":
        parts = {
            name: dataclasses.replace(part, images=of(part.images, name))
            for name in ("train", "validation", "test")
            for part in [getattr(self.dataset, name)]
        }
        return LabelTask(dataclasses.replace(self.dataset, **parts))

    def _trained(self, of: ClassBatchPlan) -> datasets.Images:
        """What is trained on: classes of one image have no positive."""
        train = self.dataset.train
        values, counts = np.unique(train.labels, return_counts=True)
        several = values[counts > 1]
        if of.rotation_classes == 1 and len(several) >= of.classes:
            train = train.part(np.flatnonzero(np.isin(train.labels, several)))
        return train

    def _levels(self, of: ClassBatchPlan) -> np.ndarray:
        """Groups ``[levels, k]`` of the labels of batches, none but by folders."""
        labels = np.unique(self._trained(of).labels)
        if of.relevance != "folders":
            return np.zeros((0, len(labels) * of.rotation_classes), np.int32)
        levels = hierarchy.levels_of([self.label_names[label] for label in labels])
        return hierarchy.with_turns(levels, of.rotation_classes)

    def batches(self, plan: Plan, on: Placement = ONE_DEVICE) -> loop.Batches:
        """Batches, of which this process has its part."""
        of = _batches_of(plan, ClassBatchPlan)
        _check_splits(on, "classes * per_class", of.classes * of.per_class)
        train, levels = self._trained(of), self._levels(of)
        return sampling.ImageBatches(
            train.images,
            train.labels,
            of.classes,
            of.per_class,
            plan.seed,
            of.rotation_classes,
            of.class_sampling,
            on.shard,
            groups=levels[0] if len(levels) else None,
        )

    def losses(
        self, plan: Plan, on: Placement = ONE_DEVICE
    ) -> list[tuple[int, objectives.Loss]]:
        """Losses, and the steps from which they hold."""
        options: dict[str, Any] = {"margin": plan.margin, "axis_name": on.axis_name}
        of = _batches_of(plan, ClassBatchPlan)
        levels = tuple(map(tuple, self._levels(of).tolist()))

        def loss(mining: str) -> objectives.Loss:
            if not levels:
                return objectives.mined_loss(mining, **options)
            return objectives.relevance_loss(mining, levels, **options)

        warm = int(of.batch_all_fraction * plan.steps)
        if of.mining != "hard" or warm == 0:
            return [(0, loss(of.mining))]
        return [(0, loss("all")), (warm, loss(of.mining))]

    def evaluate(self, embed: Embed) -> dict[str, float]:
        """How well an embedding finds test images of the same class, in percent.

        Args:
            embed: from uint8 images to embeddings ``[n, d]``.

        Returns:
            MAP@R, R-precision and recall@1 within the test images, and the share of
            test images whose nearest training image is of their class, if these are of
            the same classes; without what the test images are too few for.
        """
        train, test = self.dataset.train, self.dataset.test
        if not len(test):
            return {}
        x, metrics = embed(test.images), {}
        if len(test) > 1:
            within = tj.retrieval.evaluate(x, test.labels)
            metrics = {
                "map_at_r": 100 * float(within.map_at_r),
                "r_precision": 100 * float(within.r_precision),
                "recall_at_1": 100 * float(within.precision_at_1),
            }
        if np.isin(test.labels, train.labels).any():
            recall = tj.retrieval.recall_at_k(
                x,
                test.labels,
                ks=(1,),
                references=embed(train.images),
                reference_labels=train.labels,
            )
            metrics["gallery_recall_at_1"] = 100 * float(recall[1])
        return _drop_nan(metrics)

    def validate(self, model: nnx.Module) -> dict[str, float]:
        """MAP@R and recall@1 of the validation images, in percent.

        Among themselves where their classes are not trained on, and else against
        training images. Nothing if too few images are held out for validation.
        """
        train, held_out = self.dataset.train, self.dataset.validation
        if not len(held_out):
            return {}
        held_out = held_out.part(_fixed_subsample(len(held_out)))
        options: dict[str, Any] = {}
        if np.isin(held_out.labels, train.labels).any():
            gallery = _fixed_subsample(len(train))
            references = embed_images(model, train.part(gallery).images)
            labels = train.labels[gallery]
            options = {"references": references, "reference_labels": labels}
        x = embed_images(model, held_out.images)
        metrics = tj.retrieval.evaluate(x, held_out.labels, **options)
        return _drop_nan(
            {
                "map_at_r": 100 * float(metrics.map_at_r),
                "recall_at_1": 100 * float(metrics.precision_at_1),
            }
        )

    def draw(self, embeddings: dict[str, Embed], out: Path) -> None:
        """Draws held-out images and their nearest neighbours into a directory."""
        held_out = len(self.dataset.test) > 1
        shown = self.dataset.test if held_out else self.dataset.train
        shown = shown.part(_fixed_subsample(len(shown)))
        plots.neighbors(
            shown.images.pixels[:],
            shown.labels,
            {name: embed(shown.images) for name, embed in embeddings.items()},
            self.dataset.label_names,
            out / "neighbors.png",
            what="test images" if held_out else "training images",
            k=min(8, len(shown) - 1),
        )


@dataclasses.dataclass(frozen=True)
class TripletTask:
    """Triplets that somebody has chosen, trained on as they are."""

    dataset: triplet_files.TripletDataset
    selection_metric = "triplet_accuracy"

    @property
    def images(self) -> ImageArray:
        return self.dataset.images

    @property
    def label_names(self) -> tuple[str, ...]:
        return ()

    @property
    def seen_names(self) -> tuple[str, ...]:
        return ()

    @property
    def description(self) -> str:
        return f"triplets of {len(self.images):,} images"

    @property
    def counts(self) -> dict[str, int]:
        parts = "train", "validation", "test"
        counts = {part: len(getattr(self.dataset, part)) for part in parts}
        return counts | {"left_out": self.dataset.left_out}

    def plan(
        self, config: Config, start: Start | None = None
    ) -> tuple[Plan, list[str]]:
        return defaults.plan_for_triplets(config, self.dataset, start)

    def seen(self, plan: Plan) -> "TripletTask":
        """The same with images as the network sees them."""
        view = plan.view_of(self.images.shape[1:])
        return self if view is None else self._with(self.images.crop(view))

    def on_features(self, features: OfImages) -> "TripletTask":
        """The same with features of the images."""
        return self._with(features(self.images, "train"))

    def _with(self, images: ImageArray) -> "TripletTask":
        return TripletTask(dataclasses.replace(self.dataset, images=images))

    def batches(self, plan: Plan, on: Placement = ONE_DEVICE) -> loop.Batches:
        """Batches, of which this process has its part."""
        of = _batches_of(plan, TripletBatchPlan)
        _check_splits(on, "triplets_per_batch", of.triplets_per_batch)
        return sampling.TripletBatches(
            self.images, self.dataset.train, of.triplets_per_batch, plan.seed, on.shard
        )

    def losses(
        self, plan: Plan, on: Placement = ONE_DEVICE
    ) -> list[tuple[int, objectives.Loss]]:
        return [(0, objectives.given_loss(margin=plan.margin, parts=on.processes))]

    def evaluate(self, embed: Embed) -> dict[str, float]:
        """The share of test triplets whose positive is nearer than the negative.

        In percent; nothing if no triplet is held out.
        """
        if not len(self.dataset.test):
            return {}
        return {"triplet_accuracy": self._triplet_accuracy(embed, self.dataset.test)}

    def validate(self, model: nnx.Module) -> dict[str, float]:
        """The same of validation triplets."""
        held_out = self.dataset.validation
        if not len(held_out):
            return {}
        embed = functools.partial(embed_images, model)
        held_out = held_out[_fixed_subsample(len(held_out))]
        return {"triplet_accuracy": self._triplet_accuracy(embed, held_out)}

    def draw(self, embeddings: dict[str, Embed], out: Path) -> None:
        """Draws held-out triplets in the order of distance into a directory."""
        held_out = len(self.dataset.test) > 0
        shown = self.dataset.test if held_out else self.dataset.train
        shown = shown[_fixed_subsample(len(shown))]
        distances = {
            name: self._distances(embed, shown) for name, embed in embeddings.items()
        }
        what = "test triplets" if held_out else "training triplets"
        pixels = self.images.pixels
        plots.triplets(pixels, shown, distances, out / "triplets.png", what=what)

    def _triplet_accuracy(self, embed: Embed, triplets: np.ndarray) -> float:
        positive, negative = self._distances(embed, triplets)
        return 100 * float(np.mean(positive < negative))

    def _distances(self, embed: Embed, triplets: np.ndarray) -> np.ndarray:
        """From anchors to positives and to negatives, ``[2, t]``."""
        indices, rows = np.unique(triplets, return_inverse=True)
        x = embed(self.images.part(indices))
        a, p, n = jnp.moveaxis(x[rows.reshape(-1, 3)], 1, 0)
        return np.stack([tj.euclidean.paired(a, p), tj.euclidean.paired(a, n)])


Task = LabelTask | TripletTask


def load(config: Config, *, size: int | None, progress: bool) -> Task:
    """What a configuration asks to learn from, seen at a size if one is given."""
    options: dict[str, Any] = {
        "size": size,
        "kind": config.kind,
        "progress": progress,
    }
    if config.triplets is not None:
        return TripletTask(triplet_files.load_triplets(config.triplets, **options))
    options |= {"split": config.split, "classes_from": config.classes_from}
    return LabelTask(datasets.load(config.data, **options))


BatchPlan = TypeVar("BatchPlan", ClassBatchPlan, TripletBatchPlan)


def _batches_of(plan: Plan, kind: type[BatchPlan]) -> BatchPlan:
    if not isinstance(plan.batches, kind):
        raise TypeError(f"plan must have a {kind.__name__}, got {plan.batches!r}.")
    return plan.batches


def _check_splits(on: Placement, name: str, size: int) -> None:
    if size % on.count:
        raise ValueError(
            f"{name} must be a multiple of the {on.count} devices that batches are "
            f"split over, got {size}."
        )


def _drop_nan(metrics: dict[str, float]) -> dict[str, float]:
    """Without those that are NaN, because no item has another of its class."""
    return {name: value for name, value in metrics.items() if not math.isnan(value)}


def _fixed_subsample(n: int) -> np.ndarray:
    """At most so many indices as are looked at while training, always the same."""
    return np.sort(np.random.default_rng(0).permutation(n)[:GALLERY])
