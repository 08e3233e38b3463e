"""What a run learns from: images with labels, or given triplets of images.

Either knows which choices suit it, its batches and losses, and how to tell what an
embedding is worth.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

import tripletjax as tj
from tripletjax.learn import data, image_analysis, plots, sampling, training
from tripletjax.learn.augment import Augment
from tripletjax.learn.config import Config
from tripletjax.learn.embedder import embed_images, view_of
from tripletjax.learn.image_cache import StoredImages
from tripletjax.learn.image_io import COLOUR_SIZE as PHOTO_SIZE

# From here on there are many classes, which take longer to learn.
MANY = 32
# Classes of fewer images, in the median, are too small to learn from as they are.
SCARCE = 30
# Validation and pictures have at most so many images, of all.
GALLERY = 2048

GREY = Augment(shift=0.1, rotation=12.0, zoom=0.15, shear=0.15, elastic=0.05)
# Of few images of a class there is little to see how far it reaches.
SCARCE_GREY = Augment(shift=0.1, rotation=20.0, zoom=0.25, shear=0.3, elastic=0.05)
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

Embed = Callable[[np.ndarray], Array]


@dataclasses.dataclass(frozen=True)
class Classes:
    """Images with labels, of which triplets are mined in each batch."""

    dataset: data.Dataset
    # By which the best model is chosen.
    best = "map_at_r"

    @property
    def images(self) -> data.ImageArray:
        """What is trained on."""
        return self.dataset.train.images

    @property
    def label_names(self) -> tuple[str, ...]:
        return self.dataset.label_names

    @property
    def what(self) -> str:
        names = self.label_names
        return f"images of {len(names):,} classes, {names[0]} to {names[-1]}"

    @property
    def counts(self) -> dict[str, int]:
        parts = "train", "validation", "test"
        return {part: len(getattr(self.dataset, part)) for part in parts}

    def choose(self, config: Config) -> tuple[Config, list[str]]:
        """The same with all choices made, and what is worth telling of them."""
        _, height, width, channels = self.images.shape
        _, counts = np.unique(self.dataset.train.labels, return_counts=True)
        photos = self.dataset.kind == "photos"
        several = int((counts > 1).sum())
        scarce = np.median(counts) < SCARCE and len(counts) >= MANY
        # Many classes of few drawings: turned and mirrored ones are classes of their
        # own. Photographs are mirrored at random, and stay of their class.
        turns = config.rotation_classes or 1
        if config.rotation_classes is None and scarce and not photos:
            labels = self.dataset.train.labels
            turns = image_analysis.most_turns(self.images, labels)
        # A class of one image has no positive; enough others teach more.
        paired = several if turns == 1 and several > 1 else len(counts)
        kinds = turns * paired
        many = kinds >= MANY
        per_class = config.per_class or (4 if many else 8)
        augment = config.augment
        if augment is None:
            augment = PHOTOS if photos else SCARCE_GREY if scarce else GREY
            augment = dataclasses.replace(augment, flip=augment.flip and turns < 8)
        if turns == 8 and augment.flip:
            raise ValueError(
                "rotation_classes is 8, which makes mirror images classes of "
                "their own, but augment mirrors images at random: one excludes "
                "the other."
            )
        notes = [f"images are taken for {self.dataset.kind}: {self.dataset.kind_by}"]
        if turns > 1:
            notes.append(f"{turns - 1} turned copies of each class are its own classes")
        if paired < len(counts):
            notes.append(
                f"{len(counts) - paired:,} classes of one training image are not "
                "trained on: no positive"
            )
        chosen = _filled(
            config,
            steps=1200 if turns > 1 else 800 if many else 600,
            per_class=per_class,
            classes=min(kinds, max(2, (160 if many else 128) // per_class)),
            rotation_classes=turns,
            learning_rate=4e-3 if turns > 1 else 2e-3,
            weight_decay=1e-3,
            dim=128 if many else 64,
            validate_every=100,
            augment=augment,
        )
        if photos:
            layout = image_analysis.layout_of(self.images, self.dataset.train.labels)
            chosen, more = _of_photos(config, chosen, layout, self.images.shape, many)
            notes += more
        return _filled(chosen, **_drawn(height, width, channels)), notes

    def seen(self, config: Config) -> "Classes":
        """The same with images as the network sees them."""
        parts = {
            name: dataclasses.replace(part, images=_seen(part.images, config))
            for name in ("train", "validation", "test")
            for part in [getattr(self.dataset, name)]
        }
        return Classes(dataclasses.replace(self.dataset, **parts))

    def batches(self, config: Config) -> training.Batches:
        train = self.dataset.train
        values, counts = np.unique(train.labels, return_counts=True)
        several = values[counts > 1]
        if config.rotation_classes == 1 and len(several) >= config.classes:
            train = train.part(np.flatnonzero(np.isin(train.labels, several)))
        return sampling.ImageBatches(
            train.images,
            train.labels,
            config.classes,
            config.per_class,
            config.seed,
            config.rotation_classes,
            config.class_sampling,
        )

    def losses(self, config: Config) -> list[tuple[int, training.Loss]]:
        """Losses, and the steps from which they hold."""
        loss = training.mined_loss(config.mining, margin=config.margin)
        warm = int(config.batch_all_fraction * config.steps)
        if config.mining != "hard" or warm == 0:
            return [(0, loss)]
        return [(0, training.mined_loss("all", margin=config.margin)), (warm, loss)]

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
            found = tj.retrieval.recall_at_k(
                x,
                test.labels,
                ks=(1,),
                references=embed(train.images),
                reference_labels=train.labels,
            )
            metrics["gallery_recall_at_1"] = 100 * float(found[0])
        return _known(metrics)

    def validate(self, model: nnx.Module) -> dict[str, float]:
        """MAP@R and recall@1 of the validation images, in percent.

        Among themselves where their classes are not trained on, and else against
        training images. Nothing if too few images are held out for validation.
        """
        train, held_out = self.dataset.train, self.dataset.validation
        if not len(held_out):
            return {}
        held_out = held_out.part(_some(len(held_out)))
        options = {}
        if np.isin(held_out.labels, train.labels).any():
            gallery = _some(len(train))
            references = embed_images(model, train.images[gallery])
            labels = train.labels[gallery]
            options = {"references": references, "reference_labels": labels}
        x = embed_images(model, held_out.images)
        metrics = tj.retrieval.evaluate(x, held_out.labels, **options)
        return _known(
            {
                "map_at_r": 100 * float(metrics.map_at_r),
                "recall_at_1": 100 * float(metrics.precision_at_1),
            }
        )

    def draw(self, embeddings: dict[str, Embed], out: Path) -> None:
        """Draws held-out images and their nearest neighbours into a directory."""
        held_out = len(self.dataset.test) > 1
        shown = self.dataset.test if held_out else self.dataset.train
        shown = shown.part(_some(len(shown)))
        images = shown.images[:]
        plots.neighbors(
            images,
            shown.labels,
            {name: embed(images) for name, embed in embeddings.items()},
            self.dataset.label_names,
            out / "neighbors.png",
            what="test images" if held_out else "training images",
            k=min(8, len(shown) - 1),
        )


@dataclasses.dataclass(frozen=True)
class GivenTriplets:
    """Triplets that somebody has chosen, trained on as they are."""

    dataset: data.Triplets
    best = "triplet_accuracy"

    @property
    def images(self) -> data.ImageArray:
        return self.dataset.images

    @property
    def label_names(self) -> tuple[str, ...]:
        return ()

    @property
    def what(self) -> str:
        return f"triplets of {len(self.images):,} images"

    @property
    def counts(self) -> dict[str, int]:
        parts = "train", "validation", "test"
        counts = {part: len(getattr(self.dataset, part)) for part in parts}
        return counts | {"left_out": self.dataset.left_out}

    def choose(self, config: Config) -> tuple[Config, list[str]]:
        """The same with all choices made, and what is worth telling of them."""
        n, height, width, channels = self.images.shape
        photos = self.dataset.kind == "photos"
        many = n >= 8 * MANY
        chosen = _filled(
            config,
            steps=800 if many else 600,
            triplets_per_batch=min(48, len(self.dataset.train)),
            learning_rate=2e-3,
            weight_decay=1e-3,
            dim=128 if many else 64,
            validate_every=100,
            augment=PHOTOS if photos else GREY,
        )
        notes = [f"images are taken for {self.dataset.kind}: {self.dataset.kind_by}"]
        if photos:
            layout = image_analysis.Layout(
                image_analysis.WHOLE, False, "nothing tells where classes differ"
            )
            chosen, more = _of_photos(config, chosen, layout, self.images.shape, many)
            notes += more
        return _filled(chosen, **_drawn(height, width, channels)), notes

    def seen(self, config: Config) -> "GivenTriplets":
        """The same with images as the network sees them."""
        images = _seen(self.images, config)
        return GivenTriplets(dataclasses.replace(self.dataset, images=images))

    def batches(self, config: Config) -> training.Batches:
        return sampling.TripletBatches(
            self.images, self.dataset.train, config.triplets_per_batch, config.seed
        )

    def losses(self, config: Config) -> list[tuple[int, training.Loss]]:
        return [(0, training.given_loss(margin=config.margin))]

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
        held_out = held_out[_some(len(held_out))]
        return {"triplet_accuracy": self._triplet_accuracy(embed, held_out)}

    def draw(self, embeddings: dict[str, Embed], out: Path) -> None:
        """Draws held-out triplets in the order of distance into a directory."""
        held_out = len(self.dataset.test) > 0
        shown = self.dataset.test if held_out else self.dataset.train
        shown = shown[_some(len(shown))]
        distances = {
            name: self._distances(embed, shown) for name, embed in embeddings.items()
        }
        what = "test triplets" if held_out else "training triplets"
        plots.triplets(self.images, shown, distances, out / "triplets.png", what=what)

    def _triplet_accuracy(self, embed: Embed, triplets: np.ndarray) -> float:
        positive, negative = self._distances(embed, triplets)
        return 100 * float(np.mean(positive < negative))

    def _distances(self, embed: Embed, triplets: np.ndarray) -> np.ndarray:
        """From anchors to positives and to negatives, ``[2, t]``."""
        places, rows = np.unique(triplets, return_inverse=True)
        a, p, n = jnp.moveaxis(embed(self.images[places])[rows.reshape(-1, 3)], 1, 0)
        return np.stack([tj.euclidean.paired(a, p), tj.euclidean.paired(a, n)])


Task = Classes | GivenTriplets


def load(config: Config, *, progress: bool) -> Task:
    """What a configuration asks to learn from."""
    options = {"size": config.size, "kind": config.kind, "progress": progress}
    if config.triplets is not None:
        return GivenTriplets(data.load_triplets(config.triplets, **options))
    options |= {"split": config.split, "classes_from": config.classes_from}
    return Classes(data.load(config.data, **options))


def _seen(images: data.ImageArray, config: Config) -> data.ImageArray:
    view = view_of(images.shape[1:], config)
    if view is None:
        return images
    return images.seen(view) if isinstance(images, StoredImages) else view(images)


def _filled(config: Config, **choices: object) -> Config:
    """A configuration with choices for what it leaves open."""
    given = {name: getattr(config, name) for name in choices}
    given = {name: value for name, value in given.items() if value is not None}
    return dataclasses.replace(config, **choices | given)


def _of_photos(
    asked: Config,
    chosen: Config,
    layout: image_analysis.Layout,
    shape: Sequence[int],
    many: bool,
) -> tuple[Config, list[str]]:
    """Choices for photographs, in place of others that were not asked for."""
    box = asked.box or layout.box
    top, left, bottom, right = box
    sides = sorted(((bottom - top) * shape[1], (right - left) * shape[2]))
    # A narrow part is seen longer, so that there are as many pixels.
    longest = min(PHOTO_SIZE * math.sqrt(sides[1] / sides[0]), 2 * PHOTO_SIZE, sides[1])
    steps = asked.steps or (1500 if many else 1000)
    choices = {
        "box": box,
        "size": asked.size or max(8, round(longest)),
        "model": asked.model or "photo",
        "head": asked.head or ("grid" if layout.aligned else "mean"),
        "mirror": chosen.augment.flip if asked.mirror is None else asked.mirror,
        "dim": asked.dim or 128,
        "steps": steps,
        "weight_decay": 1e-2 if asked.weight_decay is None else asked.weight_decay,
        "validate_every": asked.validate_every or max(100, steps // 8),
    }
    told = "asked for" if asked.box is not None else layout.why
    rows, columns = (
        f"{100 * a:.0f} to {100 * b:.0f} %" for a, b in ((top, bottom), (left, right))
    )
    notes = [f"what is seen is {rows} of the height, {columns} of the width: {told}"]
    chosen = dataclasses.replace(chosen, **choices)
    if chosen.model == "photo":
        chosen = _filled(chosen, channels=(16, 32, 64, 128))
    return chosen, notes


def _drawn(height: int, width: int, channels: int) -> dict[str, object]:
    """Choices for what is no photograph, and what other networks need."""
    side = max(height, width)
    return {
        "model": "resnet" if channels > 1 else "cnn",
        "channels": (32, 64) if side <= 16 else (32, 64, 128),
        "stride": 1 if side <= 32 else 2,
        "head": "mean",
        "mirror": False,
    }


def _known(metrics: dict[str, float]) -> dict[str, float]:
    """Without those that are NaN, because no item has another of its class."""
    return {name: value for name, value in metrics.items() if not math.isnan(value)}


def _some(n: int) -> np.ndarray:
    """At most so many places as are looked at while training, always the same."""
    return np.sort(np.random.default_rng(0).permutation(n)[:GALLERY])
