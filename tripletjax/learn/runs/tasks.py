"""Tasks of training: images with labels, or given triplets of images.

A task has its batches, its losses and its evaluation.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

import tripletjax as tj
from tripletjax.learn import plots
from tripletjax.learn.data import datasets, hierarchy, sampling, triplet_files
from tripletjax.learn.data.image_array import ImageArray
from tripletjax.learn.distributed.placement import ONE_DEVICE, Placement
from tripletjax.learn.networks.embedding import embed_images
from tripletjax.learn.runs import defaults, rounds
from tripletjax.learn.runs.config import Config
from tripletjax.learn.runs.defaults import Start
from tripletjax.learn.runs.plan import ClassBatchPlan, Plan, TripletBatchPlan
from tripletjax.learn.training import loop, objectives
from tripletjax.learn.training.losses import find_loss
from tripletjax.learn.training.optimizer import learning_rates
from tripletjax.learn.training.selection import (
    Validation,
    class_means,
    interval_over_classes,
    note_of,
)

# The largest number of images of validation and of pictures.
GALLERY = 2048

Embed = Callable[[ImageArray], Array]
# By metric, one value per item in percent, and the class of each item.
Measured = dict[str, tuple[np.ndarray, np.ndarray]]
# From images, and the name of their part, to images or features instead.
OfImages = Callable[[ImageArray, str], ImageArray]


@dataclasses.dataclass(frozen=True)
class LabelTask:
    """Images with labels, of which triplets are mined in each batch."""

    dataset: datasets.Dataset
    unit = "classes"

    @property
    def images(self) -> ImageArray:
        """The training images."""
        return self.dataset.train.images

    @property
    def label_names(self) -> tuple[str, ...]:
        return self.dataset.label_names

    @property
    def seen_names(self) -> tuple[str, ...]:
        """Names of the classes of training and of validation."""
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
        plan, notes = defaults.plan_for_classes(config, self.dataset, start)
        if plan.steps:
            notes = [*notes, *note_of(self.validation_classes, "class")]
        return plan, notes

    @property
    def labelled_rows(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows of training images, and their classes."""
        labels = self.dataset.train.labels
        return np.arange(len(labels)), labels

    @property
    def _several(self) -> np.ndarray:
        """Labels of the classes of several training images."""
        labels, counts = np.unique(self.dataset.train.labels, return_counts=True)
        return labels[counts > 1]

    @property
    def trained_classes(self) -> int:
        """The number of classes of several training images."""
        return len(self._several)

    def folds(self, count: int) -> Iterator["LabelTask"]:
        """Tasks whose validation has a part of the training classes each."""
        train = self.dataset.train
        labels = np.random.default_rng(0).permutation(self._several)
        for first in range(count):
            held_out = np.isin(train.labels, labels[first::count])
            parts = train.part(~held_out), train.part(held_out)
            yield LabelTask(
                dataclasses.replace(self.dataset, train=parts[0], validation=parts[1])
            )

    def limited(self, plan: Plan) -> Plan:
        """The plan with no more classes in a batch than the task has."""
        of = _batches_of(plan, ClassBatchPlan)
        classes = min(of.classes, len(self._several))
        batches = dataclasses.replace(of, classes=classes)
        return dataclasses.replace(plan, batches=batches)

    def seen(self, plan: Plan) -> "LabelTask":
        """The task with images as the network sees them."""
        view = plan.view_of(self.images.shape[1:])
        if view is None:
            return self
        return self._with(lambda images, what: images.crop(view))

    def on_features(self, features: OfImages) -> "LabelTask":
        """The task with features of its images, by part: train, validation or test."""
        return self._with(features)

    def _with(self, of: OfImages) -> "LabelTask":
        parts = {
            name: dataclasses.replace(part, images=of(part.images, name))
            for name in ("train", "validation", "test")
            for part in [getattr(self.dataset, name)]
        }
        return LabelTask(dataclasses.replace(self.dataset, **parts))

    def _trained(self, of: ClassBatchPlan) -> datasets.Images:
        """Training images: without classes of one image, which have no positive."""
        train = self.dataset.train
        values, counts = np.unique(train.labels, return_counts=True)
        several = values[counts > 1]
        if of.rotation_classes == 1 and len(several) >= of.classes:
            train = train.part(np.flatnonzero(np.isin(train.labels, several)))
        return train

    def mine_round(self, plan: Plan, embed: Embed, step: int) -> rounds.Round:
        """Mine the training images for the round that begins with a step."""
        train = self._trained(_batches_of(plan, ClassBatchPlan))
        return rounds.mine_round(embed(train.images), train.labels, step)

    def _levels(self, of: ClassBatchPlan) -> np.ndarray:
        """Groups ``[levels, k]`` of the labels of batches, none but by folders."""
        labels = np.unique(self._trained(of).labels)
        if of.relevance != "folders":
            return np.zeros((0, len(labels) * of.rotation_classes), np.int32)
        levels = hierarchy.levels_of([self.label_names[label] for label in labels])
        return hierarchy.with_turns(levels, of.rotation_classes)

    def batches(
        self, plan: Plan, on: Placement = ONE_DEVICE, mined: Sequence[rounds.Round] = ()
    ) -> loop.Batches:
        """Batches, or the parts of this process, with the groups of mined rounds."""
        of = _batches_of(plan, ClassBatchPlan)
        _check_splits(on, "classes * per_class", of.classes * of.per_class)
        levels, turns = self._levels(of), of.rotation_classes
        first = self._batches_in_groups(plan, on, levels[0] if len(levels) else None)
        if not mined:
            return first
        later = []
        for one in mined:
            (groups,) = hierarchy.with_turns(np.array([one.groups]), turns)
            later.append((one.step, self._batches_in_groups(plan, on, groups)))
        return rounds.RoundBatches([(0, first), *later])

    def _batches_in_groups(
        self, plan: Plan, on: Placement, groups: np.ndarray | None
    ) -> loop.Batches:
        """Batches in which classes of a group come together."""
        of = _batches_of(plan, ClassBatchPlan)
        train = self._trained(of)
        return sampling.ImageBatches(
            train.images,
            train.labels,
            of.classes,
            of.per_class,
            plan.seed,
            of.rotation_classes,
            of.class_sampling,
            on.shard,
            groups=groups,
        )

    def loss(self, plan: Plan, on: Placement = ONE_DEVICE) -> objectives.Objective:
        """The loss, or several with the steps from which they hold."""
        of = _batches_of(plan, ClassBatchPlan)
        options: dict[str, Any] = {"margin": plan.margin, "axis_name": on.axis_name}
        levels = tuple(map(tuple, self._levels(of).tolist()))
        if levels:
            make = functools.partial(
                objectives.relevance_loss, levels=levels, **options
            )
        else:
            options |= {"temperature": of.temperature, "scale": of.scale}
            make = functools.partial(objectives.batch_loss, **options)
        if of.learn_loss or find_loss(of.loss).class_vectors:
            labels = np.unique(self._trained(of).labels)
            return objectives.learned_loss(
                of.loss,
                classes=len(labels) * of.rotation_classes,
                dim=plan.dim,
                learning_rate=learning_rates(plan.learning_rate, plan.steps),
                seed=plan.seed,
                **options,
            )
        warm = int(of.batch_all_fraction * plan.steps)
        if of.loss != "hard" or warm == 0:
            return make(of.loss)
        return [(0, make("all")), (warm, make(of.loss))]

    def evaluate(self, embed: Embed) -> dict[str, Any]:
        """Evaluate an embedding on the test images, in percent.

        Args:
            embed: from uint8 images to embeddings ``[n, d]``.

        Returns:
            MAP@R, R-precision and recall@1 within the test images. If the classes are
            trained on, also the share of test images whose nearest training image is
            of their class. Metrics without enough test images are left out. Further,
            ``classes``, the number of classes of the test images, and ``intervals``
            over classes, by metric.
        """
        train, test = self.dataset.train, self.dataset.test
        if not len(test):
            return {}
        x, labels = embed(test.images), test.labels
        measured: Measured = {}
        if len(test) > 1:
            within = tj.retrieval.evaluate(x, labels, reduce_fn=None)
            measured = _of_queries(within, labels)
        metrics = _summary(measured, self.unit)
        if np.isin(test.labels, train.labels).any():
            recall = tj.retrieval.recall_at_k(
                x,
                test.labels,
                ks=(1,),
                references=embed(train.images),
                reference_labels=train.labels,
            )
            metrics["gallery_recall_at_1"] = 100 * float(recall[1])
        return metrics

    @property
    def validation_classes(self) -> int:
        """The number of classes of validation images that have positives."""
        held_out, gallery = self._validation_rows
        labels = self.dataset.validation.labels[held_out]
        classes, counts = np.unique(labels, return_counts=True)
        if gallery is None:
            return int((counts > 1).sum())
        return int(np.isin(classes, self.dataset.train.labels[gallery]).sum())

    @property
    def _validation_rows(self) -> tuple[np.ndarray, np.ndarray | None]:
        """Rows of validation images, and of the training images that they search.

        None if the classes are not trained on: images then search one another.
        """
        train, held_out = self.dataset.train, self.dataset.validation
        rows = _fixed_subsample(len(held_out))
        if not np.isin(held_out.labels[rows], train.labels).any():
            return rows, None
        return rows, _fixed_subsample(len(train))

    def validate(self, model: nnx.Module) -> Validation:
        """Validate a model: MAP@R and recall@1 in percent, and MAP@R by class.

        Validation images search one another if their classes are not trained on, or
        else training images. Empty if too few images are held out.
        """
        if not len(self.dataset.validation):
            return Validation({})
        rows, gallery = self._validation_rows
        held_out = self.dataset.validation.part(rows)
        options: dict[str, Any] = {}
        if gallery is not None:
            known = self.dataset.train.part(gallery)
            options = {
                "references": embed_images(model, known.images),
                "reference_labels": known.labels,
            }
        x = embed_images(model, held_out.images)
        of_queries = tj.retrieval.evaluate(
            x, held_out.labels, reduce_fn=None, **options
        )
        measured = _of_queries(of_queries, held_out.labels)
        if not measured:
            return Validation({})
        metrics = {
            name: float(np.mean(measured[name][0]))
            for name in ("map_at_r", "recall_at_1")
        }
        return Validation(metrics, class_means(*measured["map_at_r"]))

    def draw(self, embeddings: dict[str, Embed], out: Path) -> None:
        """Draw held-out images and their nearest neighbours into a directory."""
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
    """Given triplets of images."""

    dataset: triplet_files.TripletDataset
    unit = "anchors"

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
        plan, notes = defaults.plan_for_triplets(config, self.dataset, start)
        if plan.steps:
            notes = [*notes, *note_of(self.validation_classes, "anchor")]
        return plan, notes

    @property
    def labelled_rows(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows of anchors and positives; each pair is a class of its own."""
        pairs = self.dataset.train[:, :2]
        return pairs.ravel(), np.repeat(np.arange(len(pairs)), 2)

    @property
    def trained_classes(self) -> int:
        """The number of anchors of training triplets."""
        return len(np.unique(self.dataset.train[:, 0]))

    def folds(self, count: int) -> Iterator["TripletTask"]:
        """Tasks whose validation has a part of the training anchors each.

        Their training triplets contain none of these anchors.
        """
        train = self.dataset.train
        anchors = np.random.default_rng(0).permutation(np.unique(train[:, 0]))
        for first in range(count):
            held_out = np.isin(train, anchors[first::count])
            known, unseen = train[~held_out.any(axis=1)], train[held_out[:, 0]]
            if len(known):
                yield TripletTask(
                    dataclasses.replace(self.dataset, train=known, validation=unseen)
                )

    def limited(self, plan: Plan) -> Plan:
        """The plan with no more triplets in a batch than the task has."""
        of = _batches_of(plan, TripletBatchPlan)
        count = min(of.triplets_per_batch, len(self.dataset.train))
        batches = dataclasses.replace(of, triplets_per_batch=count)
        return dataclasses.replace(plan, batches=batches)

    def seen(self, plan: Plan) -> "TripletTask":
        """The task with images as the network sees them."""
        view = plan.view_of(self.images.shape[1:])
        return self if view is None else self._with(self.images.crop(view))

    def on_features(self, features: OfImages) -> "TripletTask":
        """The task with features of its images."""
        return self._with(features(self.images, "train"))

    def _with(self, images: ImageArray) -> "TripletTask":
        return TripletTask(dataclasses.replace(self.dataset, images=images))

    def batches(self, plan: Plan, on: Placement = ONE_DEVICE) -> loop.Batches:
        """Batches, or the parts of this process."""
        of = _batches_of(plan, TripletBatchPlan)
        _check_splits(on, "triplets_per_batch", of.triplets_per_batch)
        return sampling.TripletBatches(
            self.images, self.dataset.train, of.triplets_per_batch, plan.seed, on.shard
        )

    def loss(self, plan: Plan, on: Placement = ONE_DEVICE) -> objectives.Objective:
        assert plan.margin is not None
        return objectives.given_loss(margin=plan.margin, parts=on.processes)

    def evaluate(self, embed: Embed) -> dict[str, Any]:
        """Evaluate an embedding: the share of test triplets in the right order.

        In percent, with its interval over anchors; empty if no triplet is held out.
        """
        test = self.dataset.test
        if not len(test):
            return {}
        right = self._are_right(embed, test)
        return _summary({"triplet_accuracy": (right, test[:, 0])}, self.unit)

    @property
    def _validation_triplets(self) -> np.ndarray:
        held_out = self.dataset.validation
        return held_out[_fixed_subsample(len(held_out))]

    @property
    def validation_classes(self) -> int:
        """The number of anchors of validation triplets."""
        return len(np.unique(self._validation_triplets[:, 0]))

    def validate(self, model: nnx.Module) -> Validation:
        """Validate a model: the same share of validation triplets, also by anchor."""
        held_out = self._validation_triplets
        if not len(held_out):
            return Validation({})
        right = self._are_right(functools.partial(embed_images, model), held_out)
        metrics = {"triplet_accuracy": float(np.mean(right))}
        return Validation(metrics, class_means(right, held_out[:, 0]))

    def draw(self, embeddings: dict[str, Embed], out: Path) -> None:
        """Draw held-out triplets in the order of distance into a directory."""
        held_out = len(self.dataset.test) > 0
        shown = self.dataset.test if held_out else self.dataset.train
        shown = shown[_fixed_subsample(len(shown))]
        distances = {
            name: self._distances(embed, shown) for name, embed in embeddings.items()
        }
        what = "test triplets" if held_out else "training triplets"
        pixels = self.images.pixels
        plots.triplets(pixels, shown, distances, out / "triplets.png", what=what)

    def _are_right(self, embed: Embed, triplets: np.ndarray) -> np.ndarray:
        """100 where the positive is nearer than the negative, or else 0."""
        positive, negative = self._distances(embed, triplets)
        return 100.0 * (positive < negative)

    def _distances(self, embed: Embed, triplets: np.ndarray) -> np.ndarray:
        """Distances of anchors to positives and to negatives, ``[2, t]``."""
        indices, rows = np.unique(triplets, return_inverse=True)
        x = embed(self.images.part(indices))
        a, p, n = jnp.moveaxis(x[rows.reshape(-1, 3)], 1, 0)
        return np.stack([tj.euclidean.paired(a, p), tj.euclidean.paired(a, n)])


Task = LabelTask | TripletTask


def load(config: Config, *, size: int | None, progress: bool) -> Task:
    """Load the task of a request, with images of a size if one is given."""
    options: dict[str, Any] = {"size": size, "kind": config.kind, "progress": progress}
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


def _of_queries(of: tj.retrieval.RetrievalMetrics, labels: np.ndarray) -> Measured:
    """Metrics in percent of the queries that have a positive."""
    where = np.asarray(of.queries) > 0
    if not where.any():
        return {}
    columns = {
        "map_at_r": of.map_at_r,
        "r_precision": of.r_precision,
        "recall_at_1": of.precision_at_1,
    }
    return {
        name: (100 * np.asarray(values, float)[where], labels[where])
        for name, values in columns.items()
    }


def _summary(measured: Measured, unit: str) -> dict[str, Any]:
    """Means, their intervals over classes or anchors, and the number of these."""
    if not measured:
        return {}
    summary: dict[str, Any] = {
        name: float(x.mean()) for name, (x, _) in measured.items()
    }
    _, labels = next(iter(measured.values()))
    summary[unit] = len(np.unique(labels))
    intervals = {name: interval_over_classes(*of) for name, of in measured.items()}
    return summary | {"intervals": {k: list(v) for k, v in intervals.items() if v}}


def _fixed_subsample(n: int) -> np.ndarray:
    """At most `GALLERY` random indices, always the same."""
    return np.sort(np.random.default_rng(0).permutation(n)[:GALLERY])
