"""What is chosen by the data where nothing is asked for."""

import dataclasses
import math
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from tripletjax.learn import image_analysis
from tripletjax.learn.augment import Augment
from tripletjax.learn.config import Config
from tripletjax.learn.datasets import Dataset
from tripletjax.learn.hierarchy import levels_of
from tripletjax.learn.image_io import COLOUR_SIZE as PHOTO_SIZE
from tripletjax.learn.image_io import WHOLE
from tripletjax.learn.plan import ClassBatchPlan, Plan, TripletBatchPlan
from tripletjax.learn.triplet_files import TripletDataset

# From here on there are many classes, which take longer to learn.
MANY = 32
# Classes of fewer images, in the median, are too small to learn from as they are.
SCARCE = 30

CHARACTERS = Augment(shift=0.1, rotation=12.0, zoom=0.15, shear=0.15, elastic=0.05)
# Of few images of a class there is little to see how far it reaches.
SCARCE_CHARACTERS = Augment(
    shift=0.1, rotation=20.0, zoom=0.25, shear=0.3, elastic=0.05
)
PHOTOS = Augment(
    shift=0.08,
    rotation=10.0,
    zoom=0.12,
    shear=0.05,
    flip=True,
    brightness=0.15,
    contrast=0.3,
    erase=0.3,
)

T = TypeVar("T")


def plan_for_classes(config: Config, dataset: Dataset) -> tuple[Plan, list[str]]:
    """The plan of a run on images with labels, and what is worth telling of it.

    Raises:
        ValueError: if what is asked for excludes itself.
    """
    images, labels = dataset.train.images, dataset.train.labels
    _, counts = np.unique(labels, return_counts=True)
    photos = dataset.kind == "photos"
    several = int((counts > 1).sum())
    scarce = np.median(counts) < SCARCE and len(counts) >= MANY
    # Many classes of few drawings: turned and mirrored ones are classes of their own.
    # Photographs are mirrored at random, and stay of their class.
    turns = config.rotation_classes or 1
    if config.rotation_classes is None and scarce and not photos:
        turns = image_analysis.most_turns(images, labels)
    # A class of one image has no positive; enough others teach more.
    paired = several if turns == 1 and several > 1 else len(counts)
    many = turns * paired >= MANY
    augment = config.augment
    if augment is None:
        augment = PHOTOS if photos else SCARCE_CHARACTERS if scarce else CHARACTERS
        augment = dataclasses.replace(augment, flip=augment.flip and turns < 8)
    if turns == 8 and augment.flip:
        raise ValueError(
            "rotation_classes is 8, which makes mirror images classes of their own, "
            "but augment mirrors images at random: one excludes the other."
        )
    notes = [f"images are taken for {dataset.kind}: {dataset.kind_by}"]
    if turns > 1:
        notes.append(f"{turns - 1} turned copies of each class are its own classes")
    if paired < len(counts):
        notes.append(
            f"{len(counts) - paired:,} classes of one training image are not trained "
            "on: no positive"
        )
    if config.relevance == "folders":
        levels = levels_of(dataset.label_names)
        if not len(levels):
            raise ValueError(
                "relevance is folders, but no folders hold several folders of classes: "
                "they are to be one within the other, as in Greek/character01."
            )
        groups = ", ".join(f"{1 + level.max():,} groups" for level in levels)
        notes.append(
            f"relevance by folders: {len(dataset.label_names):,} classes in {groups}, "
            "whose images are to be nearer to each other than to all others"
        )
    per_class = config.per_class or (4 if many else 8)
    batches = ClassBatchPlan(
        mining=config.mining,
        batch_all_fraction=config.batch_all_fraction,
        classes=config.classes
        or min(turns * paired, max(2, (160 if many else 128) // per_class)),
        per_class=per_class,
        class_sampling=config.class_sampling,
        relevance=config.relevance,
        rotation_classes=turns,
    )
    plan, more = _plan(
        config,
        images.shape[1:],
        batches=batches,
        augment=augment,
        layout=image_analysis.layout_of(images, labels) if photos else None,
        many=many,
        steps=1200 if turns > 1 else 800 if many else 600,
        learning_rate=4e-3 if turns > 1 else 2e-3,
    )
    return plan, notes + more


def plan_for_triplets(
    config: Config, dataset: TripletDataset
) -> tuple[Plan, list[str]]:
    """The plan of a run on given triplets, and what is worth telling of it."""
    photos = dataset.kind == "photos"
    many = len(dataset.images) >= 8 * MANY
    plan, notes = _plan(
        config,
        dataset.images.shape[1:],
        batches=TripletBatchPlan(
            triplets_per_batch=config.triplets_per_batch or min(48, len(dataset.train))
        ),
        augment=config.augment or (PHOTOS if photos else CHARACTERS),
        layout=image_analysis.Layout(WHOLE, False, "nothing tells where classes differ")
        if photos
        else None,
        many=many,
        steps=800 if many else 600,
        learning_rate=2e-3,
    )
    return plan, [f"images are taken for {dataset.kind}: {dataset.kind_by}", *notes]


def _plan(
    config: Config,
    shape: Sequence[int],
    *,
    batches: ClassBatchPlan | TripletBatchPlan,
    augment: Augment,
    layout: image_analysis.Layout | None,
    many: bool,
    steps: int,
    learning_rate: float,
) -> tuple[Plan, list[str]]:
    """What both have in common; `layout` is that of photographs, None of others."""
    photos, notes = layout is not None, []
    longest = max(shape[:2])
    box = config.box or (layout.box if layout else WHOLE)
    top, left, bottom, right = box
    sides = sorted(((bottom - top) * shape[0], (right - left) * shape[1]))
    if layout:
        steps = 1500 if many else 1000
        # A narrow part is seen longer, so that there are as many pixels.
        most = PHOTO_SIZE * math.sqrt(sides[1] / sides[0])
        size = max(8, round(min(most, 2 * PHOTO_SIZE, sides[1])))
        rows, columns = (
            f"{100 * a:.0f} to {100 * b:.0f} %"
            for a, b in ((top, bottom), (left, right))
        )
        told = "asked for" if config.box is not None else layout.why
        notes.append(
            f"what is seen is {rows} of the height, {columns} of the width: {told}"
        )
    else:
        size = max(1, round(sides[1]))
    model = config.model or (
        "photo" if photos else "resnet" if shape[-1] > 1 else "cnn"
    )
    channels = (32, 64) if longest <= 16 else (32, 64, 128)
    if model == "photo":
        channels = 16, 32, 64, 128
    steps = config.steps or steps
    return Plan(
        batches=batches,
        box=box,
        # Drawings have their size since they were decoded.
        size=config.size or size if photos or config.box else longest,
        model=model,
        head=config.head or ("grid" if layout and layout.aligned else "mean"),
        channels=config.channels or channels,
        stride=config.stride or (1 if longest <= 32 else 2),
        dim=config.dim or (128 if photos or many else 64),
        mirror=_either(config.mirror, photos and augment.flip),
        bfloat16=config.bfloat16,
        augment=augment,
        margin=config.margin,
        steps=steps,
        seed=config.seed,
        learning_rate=_either(config.learning_rate, learning_rate),
        weight_decay=_either(config.weight_decay, 1e-2 if photos else 1e-3),
        ema_decay=config.ema_decay,
        embed_chunk_size=config.embed_chunk_size or batches.size,
        log_every=config.log_every,
        validate_every=config.validate_every
        or (max(100, steps // 8) if photos else 100),
        checkpoint_every=config.checkpoint_every,
    ), notes


def _either(asked: T | None, chosen: T) -> T:
    """What was asked for, which may be 0, or what is chosen instead."""
    return chosen if asked is None else asked
