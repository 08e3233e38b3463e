"""Defaults derived from the data, for options left unset.

`RECIPES` is the table of starting points: one row for each sort of data. The functions
below choose the row, adapt it to the images, and say in a note why.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import numpy as np

from tripletjax.learn.counts import counted
from tripletjax.learn.data import image_analysis
from tripletjax.learn.data.augment import Augment
from tripletjax.learn.data.datasets import Dataset
from tripletjax.learn.data.hierarchy import levels_of
from tripletjax.learn.data.image_cache import Decoding
from tripletjax.learn.data.image_shape import COLOUR_SIZE as PHOTO_SIZE
from tripletjax.learn.data.image_shape import WHOLE, Box
from tripletjax.learn.data.triplet_files import TripletDataset
from tripletjax.learn.networks import backbones
from tripletjax.learn.runs.config import Config
from tripletjax.learn.runs.options import OptionError
from tripletjax.learn.runs.plan import (
    BackbonePlan,
    ClassBatchPlan,
    Plan,
    TripletBatchPlan,
)
from tripletjax.learn.training.losses import find_loss

# Data have many classes from this number on, which take longer to learn.
MANY = 32
# Classes are scarce below this median number of images.
SCARCE = 30

CHARACTERS = Augment(shift=0.1, rotation=12.0, zoom=0.15, shear=0.15, elastic=0.05)
# A few images of a class do not show how much its drawings vary.
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


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A starting point of training, for one sort of data.

    Attributes:
        augment: random changes of images.
        batch: largest number of images in a batch.
        per_class: images of each class in a batch.
        dim: dimensions of the embedding.
        steps: training steps.
        learning_rate: at its peak.
        weight_decay: of AdamW.
    """

    augment: Augment
    batch: int
    per_class: int
    dim: int
    steps: int
    learning_rate: float
    weight_decay: float


RECIPES = {
    "characters": Recipe(CHARACTERS, 128, 8, 64, 600, 2e-3, 1e-3),
    "characters, 32 classes or more": Recipe(CHARACTERS, 160, 4, 128, 800, 2e-3, 1e-3),
    "photos": Recipe(PHOTOS, 128, 8, 128, 1000, 2e-3, 1e-2),
    "photos, 32 classes or more": Recipe(PHOTOS, 160, 4, 128, 1500, 2e-3, 1e-2),
}
# Changes of a recipe, and their reasons.
CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "scarce characters": (
        {"augment": SCARCE_CHARACTERS},
        "the median class has under 30 images: augmentation stands in for more",
    ),
    "turned characters": (
        {"steps": 1200, "learning_rate": 4e-3},
        "turned and mirrored copies are further classes to learn",
    ),
    "turned photos": (
        {"learning_rate": 4e-3},
        "turned and mirrored copies are further classes to learn",
    ),
    "frozen backbone": (
        {"dim": 512, "steps": 200, "learning_rate": 2e-4},
        "a head alone is trained, from its closed form",
    ),
    "trained backbone": (
        {"steps": 300, "learning_rate": 1e-3},
        "pretrained stages change little, and each step is expensive",
    ),
}

# A backbone is frozen on CPUs with fewer images than this.
FEW_IMAGES = 5000
# Photographs are few to train from scratch below this number.
FEW_PHOTOS = 5000
# Views of each image whose features a frozen backbone computes.
VIEWS = 2
# Pixels that a trained backbone embeds at a time, and in a batch, about.
CHUNK_PIXELS, BATCH_PIXELS = 2**20, 2**22
# Momentum of the slow copy of the network whose embeddings a memory holds.
MEMORY_MOMENTUM = 0.99

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Start:
    """A network of a known family that a run begins with.

    Attributes:
        backbone: the network.
        digest: of the file of weights; None to train from scratch.
        notes: facts about the file.
    """

    backbone: backbones.Backbone
    digest: str | None
    notes: tuple[str, ...] = ()

    def size(self, config: Config) -> int | None:
        """Image size in pixels; None if it is unset and there are no weights."""
        if config.size is not None or self.digest is None:
            return config.size
        return self.backbone.images.size


def plan_for_classes(
    config: Config, dataset: Dataset, start: Start | None = None
) -> tuple[Plan, list[str]]:
    """Plan a run on images with labels.

    Returns:
        The plan, and notes on its choices.

    Raises:
        ValueError: if requested options contradict each other, or the data.
    """
    images, labels = dataset.train.images, dataset.train.labels
    kind = dataset.decoding.kind
    sizes = np.unique(labels, return_counts=True)[1]
    scarce = len(sizes) >= MANY and np.median(sizes) < SCARCE
    turns = config.rotation_classes or 1
    if config.rotation_classes is None and scarce and kind != "photos" and not start:
        turns = image_analysis.most_turns(images, labels)
    # A class of one image has no positive; enough other classes teach more.
    several = int((sizes > 1).sum())
    classes = several if turns == 1 and several > 1 else len(sizes)
    changes = [f"turned {kind}"] if turns > 1 else []
    recipe = recipe_of(
        kind,
        many=turns * classes >= MANY,
        changes=[f"scarce {kind}", *changes] if scarce else changes,
    )
    augment = recipe.augment
    augment = dataclasses.replace(augment, flip=augment.flip and turns < 8)
    augment = config.augment or augment
    backbone = _backbone_plan(config, start, len(images))
    recipe = _recipe_on_backbone(recipe, start, backbone)
    _check_turns(turns, augment, backbone)
    batches = _plan_batches(config, recipe, turns, classes, start, backbone)
    plan, notes = _plan(
        config,
        recipe,
        images.shape[1:],
        count=len(images),
        batches=batches,
        augment=augment,
        layout=image_analysis.layout_of(images, labels) if kind == "photos" else None,
        start=start,
        backbone=backbone,
    )
    return plan, [
        _note_on_kind(dataset.decoding),
        *_notes_on_classes(sizes, classes, turns),
        *_notes_on_head(sizes, plan),
        *_notes_on_relevance(config, dataset.label_names),
        *_notes_on_memory(batches),
        *notes,
    ]


def plan_for_triplets(
    config: Config, dataset: TripletDataset, start: Start | None = None
) -> tuple[Plan, list[str]]:
    """Plan a run on given triplets.

    Returns:
        The plan, and notes on its choices.

    Raises:
        ValueError: if requested options contradict each other, or the data.
    """
    kind = dataset.decoding.kind
    recipe = recipe_of(kind, many=len(dataset.images) >= 8 * MANY)
    layout = None
    if kind == "photos":
        reason = "triplets do not tell where classes differ"
        layout = image_analysis.Layout(WHOLE, False, reason)
    batch = config.triplets_per_batch or min(48, len(dataset.train))
    backbone = _backbone_plan(config, start, len(dataset.images))
    recipe = _recipe_on_backbone(recipe, start, backbone)
    plan, notes = _plan(
        config,
        recipe,
        dataset.images.shape[1:],
        count=len(dataset.images),
        batches=TripletBatchPlan(triplets_per_batch=batch),
        augment=config.augment or recipe.augment,
        layout=layout,
        start=start,
        backbone=backbone,
    )
    return plan, [_note_on_kind(dataset.decoding), *notes]


def recipe_of(kind: str, *, many: bool, changes: Sequence[str] = ()) -> Recipe:
    """The starting point for photos or characters, with changes that it knows."""
    recipe = RECIPES[f"{kind}, {MANY} classes or more" if many else kind]
    for name in changes:
        options, _ = CHANGES.get(name, ({}, ""))
        recipe = dataclasses.replace(recipe, **options)
    return recipe


def _recipe_on_backbone(
    recipe: Recipe, start: Start | None, backbone: BackbonePlan | None
) -> Recipe:
    """The recipe with the changes for a pretrained backbone."""
    if start is None or backbone is None or start.digest is None:
        return recipe
    part = "frozen" if backbone.training == "frozen" else "trained"
    changes, _ = CHANGES[f"{part} backbone"]
    recipe = dataclasses.replace(recipe, **changes)
    return dataclasses.replace(recipe, dim=min(recipe.dim, start.backbone.features))


def _check_turns(turns: int, augment: Augment, backbone: BackbonePlan | None) -> None:
    if turns == 8 and augment.flip:
        raise ValueError(
            "rotation_classes is 8, which makes mirror images classes of their own, "
            "but augment mirrors images at random: one excludes the other."
        )
    if turns > 1 and backbone is not None and backbone.training == "frozen":
        raise ValueError(
            "rotation_classes must be 1 with a frozen backbone, whose features cannot "
            f"be turned; got {turns}."
        )


def _plan_batches(
    config: Config,
    recipe: Recipe,
    turns: int,
    classes: int,
    start: Start | None,
    backbone: BackbonePlan | None,
) -> ClassBatchPlan:
    """P classes with K images each, of as many images as the recipe has."""
    batch = recipe.batch
    if start is not None and backbone is not None and backbone.training != "frozen":
        pixels = (start.size(config) or PHOTO_SIZE) ** 2
        batch = min(batch, max(32, BATCH_PIXELS // pixels))
    per_class = config.per_class or recipe.per_class
    # Momentum 0 stands for the network itself, whose embeddings are soon out of date.
    momentum = _either(config.memory_momentum, MEMORY_MOMENTUM) or None
    in_batch = config.classes or min(turns * classes, max(2, batch // per_class))
    if config.rounds and in_batch >= turns * classes:
        raise OptionError(
            f"{{rounds}} requires {{classes}} below {turns * classes}, the number of "
            f"classes, got {in_batch}: a batch would hold all of them."
        )
    return ClassBatchPlan(
        loss=config.loss,
        temperature=_number(config, "temperature"),
        scale=_number(config, "scale"),
        learn_loss=config.learn_loss,
        batch_all_fraction=config.batch_all_fraction,
        classes=in_batch,
        per_class=per_class,
        class_sampling=config.class_sampling,
        relevance=config.relevance,
        rotation_classes=turns,
        rounds=config.rounds,
        memory=config.memory,
        memory_warmup=config.memory_warmup if config.memory else 0.0,
        memory_momentum=momentum if config.memory else None,
    )


def _plan(
    config: Config,
    recipe: Recipe,
    shape: Sequence[int],
    *,
    count: int,
    batches: ClassBatchPlan | TripletBatchPlan,
    augment: Augment,
    layout: image_analysis.Layout | None,
    start: Start | None,
    backbone: BackbonePlan | None,
) -> tuple[Plan, list[str]]:
    """Plan what classes and triplets have in common.

    Args:
        config: the request.
        recipe: the starting point.
        shape: height, width and channels of images.
        count: number of training images.
        batches: the plan of a batch.
        augment: random changes of images.
        layout: of photographs; None of other images.
        start: the network to begin with, if not one of this library's own.
        backbone: the plan of this network.
    """
    photos = layout is not None
    mirror = _either(config.mirror, photos and augment.flip)
    box, size, notes = _choose_view(config, shape, layout)
    if photos and (start is None or start.digest is None):
        notes += _notes_on_scratch(count, aligned=layout.aligned)
    if start is not None and backbone is not None:
        size = _backbone_size(config, start, size, shape, box)
        if backbone.training == "frozen":
            # Features of an image, and of its mirror image where both are averaged.
            views = max(backbone.views, 1 + mirror)
            backbone = dataclasses.replace(backbone, views=views)
        notes += _notes_on_backbone(start, backbone, shape, size)
    model, channels = _choose_model(config, shape, photos, start)
    longest = max(shape[:2])
    steps = _either(config.steps, recipe.steps)
    _check_steps(steps, backbone)
    return Plan(
        batches=batches,
        box=box,
        # Drawings have had their size since they were decoded.
        size=config.size or (size if photos or config.box or start else longest),
        model=model,
        backbone=backbone,
        head=config.head or ("grid" if layout and layout.aligned else "mean"),
        channels=config.channels or channels,
        stride=config.stride or (1 if longest <= 32 else 2),
        dim=config.dim or recipe.dim,
        mirror=mirror,
        bfloat16=config.bfloat16,
        augment=augment,
        margin=_number(config, "margin"),
        steps=steps,
        seed=config.seed,
        learning_rate=_either(config.learning_rate, recipe.learning_rate),
        weight_decay=_either(config.weight_decay, recipe.weight_decay),
        ema_decay=config.ema_decay,
        embed_chunk_size=_choose_chunk(config, batches.size, size, backbone),
        log_every=config.log_every,
        validate_every=config.validate_every
        or (max(100, steps // 8) if photos else 100),
        checkpoint_every=config.checkpoint_every,
    ), notes


def _check_steps(steps: int, backbone: BackbonePlan | None) -> None:
    if steps == 0 and (backbone is None or backbone.training != "frozen"):
        raise ValueError(
            "steps must be at least 1 with a trained backbone, got 0; the closed form "
            "needs backbone_training frozen."
        )


def _choose_view(
    config: Config, shape: Sequence[int], layout: image_analysis.Layout | None
) -> tuple[Box, int, list[str]]:
    """The part of images that the network sees, and its longer side in pixels."""
    box = config.box or (layout.box if layout else WHOLE)
    shorter, longer = _sides_of(box, shape)
    if layout is None:
        return box, max(1, round(longer)), []
    # A narrow part is seen longer, so that there are as many pixels.
    most = min(PHOTO_SIZE * math.sqrt(longer / shorter), 2 * PHOTO_SIZE, longer)
    top, left, bottom, right = (100 * share for share in box)
    reason = "requested" if config.box is not None else layout.why
    return (
        box,
        max(8, round(most)),
        [
            f"the network sees {top:.0f} to {bottom:.0f} % of the height, {left:.0f} "
            f"to {right:.0f} % of the width: {reason}"
        ],
    )


def _sides_of(box: Box, shape: Sequence[int]) -> tuple[float, float]:
    """The shorter and the longer side of a part of images, in pixels."""
    top, left, bottom, right = box
    height, width = (bottom - top) * shape[0], (right - left) * shape[1]
    return min(height, width), max(height, width)


def _choose_model(
    config: Config, shape: Sequence[int], photos: bool, start: Start | None
) -> tuple[str, tuple[int, ...]]:
    """The network, and the number of channels of each stage from scratch."""
    network = "photo" if photos else "resnet" if shape[-1] > 1 else "cnn"
    model = "backbone" if start is not None else config.model or network
    if model == "photo":
        return model, (16, 32, 64, 128)
    return model, (32, 64) if max(shape[:2]) <= 16 else (32, 64, 128)


def _choose_chunk(
    config: Config, batch: int, size: int, backbone: BackbonePlan | None
) -> int:
    """The number of images that are embedded at a time."""
    if config.embed_chunk_size:
        return config.embed_chunk_size
    if backbone is None or backbone.training == "frozen":
        return batch
    return min(batch, max(8, CHUNK_PIXELS // size**2))


def _backbone_size(
    config: Config, start: Start, size: int, shape: Sequence[int], box: Box
) -> int:
    """The longer side of images, whose shorter one is long enough for a backbone."""
    shorter, longer = _sides_of(box, shape)
    least = math.ceil(start.backbone.least * longer / shorter)
    if config.size is not None and config.size < least:
        raise ValueError(
            f"size must be at least {least} for {start.backbone.title}, got "
            f"{config.size}."
        )
    return max(start.size(config) or size, least)


def _backbone_plan(config: Config, start: Start | None, n: int) -> BackbonePlan | None:
    if start is None:
        return None
    training = config.backbone_training
    if start.digest is None:
        training = "all"
    elif training is None:
        few = n < FEW_IMAGES and jax.default_backend() == "cpu"
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


def _note_on_kind(decoding: Decoding) -> str:
    return f"images are {decoding.kind}: {decoding.kind_by}"


def _notes_on_classes(sizes: np.ndarray, classes: int, turns: int) -> list[str]:
    """Notes on turned copies, and on classes of one image."""
    notes = []
    if turns > 1:
        notes.append(
            counted(
                turns - 1,
                "turned copy of each class is a further class",
                "turned copies of each class are further classes",
            )
        )
    alone = int((sizes == 1).sum())
    if classes < len(sizes):
        notes.append(
            counted(
                alone,
                "class of one training image is not trained on",
                "classes of one training image are not trained on",
            )
            + ": no positive"
        )
    elif alone:
        notes.append(
            f"warning: {alone:,} of {len(sizes):,} classes "
            f"{'has' if alone == 1 else 'have'} one training image: their positives "
            "are copies of it, which differ by augmentation alone"
        )
    return notes


def _notes_on_head(sizes: np.ndarray, plan: Plan) -> list[str]:
    """A note on a head that cannot begin with within-class whitening."""
    if not plan.pretrained or max(sizes) > 1:
        return []
    return [
        "the head begins with the principal directions of the features: no class has "
        "two training images"
    ]


def _notes_on_relevance(config: Config, names: Sequence[str]) -> list[str]:
    if config.relevance != "folders":
        return []
    levels = levels_of(names)
    if not len(levels):
        raise OptionError(
            "{relevance} folders requires folders of folders of classes, such as "
            "Greek/character01; the data have one level."
        )
    groups = ", ".join(counted(1 + int(level.max()), "group") for level in levels)
    classes = counted(len(names), "class")
    return [
        f"relevance by folders: {classes} in {groups}; images of a group "
        "come nearer to each other than to all others"
    ]


def _notes_on_memory(batches: ClassBatchPlan) -> list[str]:
    if not batches.memory:
        return []
    source = "the network itself"
    if batches.memory_momentum is not None:
        source = f"a slow copy of the network (momentum {batches.memory_momentum:g})"
    return [
        "batches are also compared with the last "
        f"{counted(batches.memory, 'embedding')} of {source}, kept after "
        f"{100 * batches.memory_warmup:g} % of the steps"
    ]


def _notes_on_scratch(count: int, *, aligned: bool) -> list[str]:
    if count >= FEW_PHOTOS:
        return []
    example = "efficientnet-lite0 of the extra pretrained"
    if aligned:
        example += ", or a network for faces if these are faces (docs/faces.md)"
    return [
        f"{count:,} photographs are few to train from scratch; a pretrained network is "
        f"better: --backbone with {example}"
    ]


def _notes_on_backbone(
    start: Start, backbone: BackbonePlan, shape: Sequence[int], size: int
) -> list[str]:
    title, images = start.backbone.title, start.backbone.images
    trained = {
        "frozen": "the backbone is frozen: a head is trained on its features, of "
        f"{backbone.views} views of each image",
        "top": "the last stages of the backbone are trained, at a tenth of the "
        "learning rate of the head",
        "all": "the whole backbone is trained, at a tenth of the learning rate of the "
        "head",
    }[backbone.training]
    if start.digest is None:
        notes = [f"{title}, from scratch"]
    else:
        notes = [*start.notes, trained]
    mean, std = ([round(x, 3) for x in part] for part in (images.mean, images.std))
    notes.append(
        f"the network sees images of {size} pixels, of mean {mean} and deviation {std}"
    )
    if shape[-1] == 1:
        notes.append("grey images are repeated in three channels for the network")
    if max(shape[:2]) < size:
        notes.append(f"images of {shape[0]} x {shape[1]} pixels are enlarged for it")
    return notes


def _number(config: Config, name: str) -> float | None:
    """The requested margin, temperature or scale, or the default of the loss."""
    return _either(getattr(config, name), find_loss(config.loss).numbers.get(name))


def _either(requested: T | None, default: T) -> T:
    """The requested value, which may be 0, or the default."""
    return default if requested is None else requested
