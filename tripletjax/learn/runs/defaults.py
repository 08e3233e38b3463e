"""What is chosen by the data where nothing is asked for."""

import dataclasses
import math
from collections.abc import Sequence
from typing import TypeVar

import jax
import numpy as np

from tripletjax.learn.data import image_analysis
from tripletjax.learn.data.augment import Augment
from tripletjax.learn.data.datasets import Dataset
from tripletjax.learn.data.hierarchy import levels_of
from tripletjax.learn.data.image_cache import Decoding
from tripletjax.learn.data.image_shape import COLOUR_SIZE as PHOTO_SIZE
from tripletjax.learn.data.image_shape import WHOLE
from tripletjax.learn.data.triplet_files import TripletDataset
from tripletjax.learn.networks import backbones
from tripletjax.learn.runs.config import Config
from tripletjax.learn.runs.plan import (
    BackbonePlan,
    ClassBatchPlan,
    Plan,
    TripletBatchPlan,
)

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

# On CPUs fewer images than this are learnt from with a backbone that stays as it is.
FEW = 5000
# Of each image features of so many views are kept.
VIEWS = 2
# How slowly a copy of the network follows it that embeds what a memory keeps.
MEMORY_MOMENTUM = 0.99
# By what of a backbone is trained.
STEPS = {"frozen": 1000, "top": 300, "all": 300}
# A backbone that is trained sees about so many pixels at a time, and in a batch.
CHUNK, BATCH = 2**20, 2**22

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Start:
    """What a network begins with.

    Attributes:
        backbone: which network of others.
        digest: of the file of weights, None if it begins with nothing.
        notes: what is worth telling of the file.
    """

    backbone: backbones.Backbone
    digest: str | None
    notes: tuple[str, ...] = ()

    def size(self, config: Config) -> int | None:
        """Of images, in pixels; None where it begins with nothing and none is asked."""
        if config.size is not None or self.digest is None:
            return config.size
        return self.backbone.of.size


def plan_for_classes(
    config: Config, dataset: Dataset, start: Start | None = None
) -> tuple[Plan, list[str]]:
    """The plan of a run on images with labels, and what is worth telling of it.

    Raises:
        ValueError: if what is asked for excludes itself.
    """
    images, labels = dataset.train.images, dataset.train.labels
    _, counts = np.unique(labels, return_counts=True)
    photos = dataset.decoding.kind == "photos"
    several = int((counts > 1).sum())
    scarce = np.median(counts) < SCARCE and len(counts) >= MANY
    # Many classes of few drawings: turned and mirrored ones are classes of their own.
    # Photographs are mirrored at random, and stay of their class.
    turns = config.rotation_classes or 1
    if config.rotation_classes is None and scarce and not photos and start is None:
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
    notes = [_told_of(dataset.decoding)]
    if turns > 1:
        notes.append(f"{turns - 1} turned copies of each class are its own classes")
    if paired < len(counts):
        notes.append(
            f"{len(counts) - paired:,} classes of one training image are not trained "
            "on: no positive"
        )
    elif several < len(counts):
        notes.append(
            f"warning: {len(counts) - several:,} of {len(counts):,} classes have one "
            "training image: their positives are copies of it, which differ by "
            "augmentation alone"
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
    backbone = _backbone_plan(config, start, len(images))
    if turns > 1 and backbone is not None and backbone.training == "frozen":
        raise ValueError(
            "rotation_classes must be 1 with a frozen backbone, whose features cannot "
            f"be turned; got {turns}."
        )
    size = 160 if many else 128
    if start is not None and backbone is not None and backbone.training != "frozen":
        pixels = (start.size(config) or PHOTO_SIZE) ** 2
        size = min(size, max(32, BATCH // pixels))
    per_class = config.per_class or (4 if many else 8)
    # What the network itself made of earlier batches is soon out of date.
    momentum = _either(config.memory_momentum, MEMORY_MOMENTUM) or None
    batches = ClassBatchPlan(
        mining=config.mining,
        batch_all_fraction=config.batch_all_fraction,
        classes=config.classes or min(turns * paired, max(2, size // per_class)),
        per_class=per_class,
        class_sampling=config.class_sampling,
        relevance=config.relevance,
        rotation_classes=turns,
        memory=config.memory,
        memory_warmup=config.memory_warmup if config.memory else 0.0,
        memory_momentum=momentum if config.memory else None,
    )
    if config.memory:
        kept = "the network itself"
        if momentum is not None:
            kept = f"a slow copy of the network (momentum {momentum:g})"
        notes.append(
            f"batches are also compared with the last {config.memory:,} embeddings of "
            f"{kept}, kept after {100 * config.memory_warmup:g} % of the steps"
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
        start=start,
        backbone=backbone,
    )
    return plan, notes + more


def plan_for_triplets(
    config: Config, dataset: TripletDataset, start: Start | None = None
) -> tuple[Plan, list[str]]:
    """The plan of a run on given triplets, and what is worth telling of it."""
    photos = dataset.decoding.kind == "photos"
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
        start=start,
        backbone=_backbone_plan(config, start, len(dataset.images)),
    )
    return plan, [_told_of(dataset.decoding), *notes]


def _told_of(decoding: Decoding) -> str:
    return f"images are taken for {decoding.kind}: {decoding.kind_by}"


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
    start: Start | None,
    backbone: BackbonePlan | None,
) -> tuple[Plan, list[str]]:
    """What both have in common; `layout` is that of photographs, None of others."""
    photos, notes = layout is not None, []
    mirror = _either(config.mirror, photos and augment.flip)
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
    if start is not None and backbone is not None:
        # The shorter side has to do, too.
        least = math.ceil(start.backbone.least * sides[1] / sides[0])
        if config.size is not None and config.size < least:
            raise ValueError(
                f"size must be at least {least} for {start.backbone.title}, got "
                f"{config.size}."
            )
        size = max(start.size(config) or size, least)
        if backbone.training == "frozen":
            # An image's own, and its mirror image's where that counts.
            views = max(backbone.views, 1 + mirror)
            backbone = dataclasses.replace(backbone, views=views)
        if start.digest is not None:
            steps, learning_rate = STEPS[backbone.training], 1e-3
        notes += _about_backbone(start, backbone, shape, size)
    chunk = config.embed_chunk_size or batches.size
    if (
        backbone is not None
        and backbone.training != "frozen"
        and not config.embed_chunk_size
    ):
        chunk = min(chunk, max(8, CHUNK // size**2))
    model = (config.model if start is None else "backbone") or (
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
        size=config.size or (size if photos or config.box or start else longest),
        model=model,
        backbone=backbone,
        head=config.head or ("grid" if layout and layout.aligned else "mean"),
        channels=config.channels or channels,
        stride=config.stride or (1 if longest <= 32 else 2),
        dim=config.dim or (128 if photos or many else 64),
        mirror=mirror,
        bfloat16=config.bfloat16,
        augment=augment,
        margin=config.margin,
        steps=steps,
        seed=config.seed,
        learning_rate=_either(config.learning_rate, learning_rate),
        weight_decay=_either(config.weight_decay, 1e-2 if photos else 1e-3),
        ema_decay=config.ema_decay,
        embed_chunk_size=chunk,
        log_every=config.log_every,
        validate_every=config.validate_every
        or (max(100, steps // 8) if photos else 100),
        checkpoint_every=config.checkpoint_every,
    ), notes


def _backbone_plan(config: Config, start: Start | None, n: int) -> BackbonePlan | None:
    if start is None:
        return None
    training = config.backbone_training
    if start.digest is None:
        training = "all"
    elif training is None:
        few = n < FEW and jax.default_backend() == "cpu"
        training = "frozen" if few else "top"
    return BackbonePlan(
        family=start.backbone.family,
        options=start.backbone.options,
        training=training,
        hidden=config.hidden or 0,
        views=(config.views or VIEWS) if training == "frozen" else 1,
        digest=start.digest,
        multiple=start.backbone.multiple,
    )


def _about_backbone(
    start: Start,
    backbone: BackbonePlan,
    shape: Sequence[int],
    size: int,
) -> list[str]:
    """What is worth telling of a network that others have made."""
    title, of = start.backbone.title, start.backbone.of
    trained = {
        "frozen": "it stays as it is: a head is trained on its features, "
        f"{backbone.views} of each image",
        "top": "its last stages are trained, at a tenth of the rate of the head",
        "all": "all of it is trained, at a tenth of the rate of the head",
    }[backbone.training]
    if start.digest is None:
        notes = [f"{title}, from nothing"]
    else:
        notes = [*start.notes, trained]
    mean, std = ([round(x, 3) for x in part] for part in (of.mean, of.std))
    notes.append(
        f"the network sees images of {size} pixels, of mean {mean} and deviation {std}"
    )
    if shape[-1] == 1:
        notes.append("images are grey: the network, of colour, sees them in three")
    if max(shape[:2]) < size:
        notes.append(f"images of {shape[0]} x {shape[1]} pixels are made larger for it")
    return notes


def _either(asked: T | None, chosen: T) -> T:
    """What was asked for, which may be 0, or what is chosen instead."""
    return chosen if asked is None else asked
