"""What a run is asked to do."""

import dataclasses

from tripletjax.learn.choices import (
    CLASS_SAMPLING,
    CLASSES_FROM,
    KINDS,
    MINING,
    RELEVANCE,
    SPLITS,
    TRAININGS,
)
from tripletjax.learn.data.augment import Augment
from tripletjax.learn.data.image_shape import Box
from tripletjax.learn.networks import backbones
from tripletjax.learn.networks.embedding_networks import HEADS, MODELS
from tripletjax.learn.training.objectives import MARGIN


@dataclasses.dataclass(frozen=True)
class Config:
    """What a run is asked to do. What is None is chosen by the data (`plan.Plan`).

    Attributes:
        data: name of the dataset, as `datasets.load` takes it.
        triplets: a file of triplets to train on instead, as
            `triplet_files.load_triplets` takes it.
        split: what is held out: images, or classes.
        classes_from: which folders are classes, top or leaf, as in `datasets.load`.
        kind: what the images are, photos or characters: what else is chosen follows.
        size: of what is seen of images, the longer side in pixels.
        box: the part of images that is seen: top, left, bottom and right, as shares of
            their height and width.
        model: cnn, photo, resnet or multiscale; or resnet18, resnet34 or resnet50, as
            others have them, from nothing.
        head: of a photo network, grid or mean.
        backbone: a safetensors file of a pretrained network to begin with, of a family
            that `backbones` knows.
        backbone_training: what of it is trained: frozen, top or all.
        hidden: of a head of two layers on it, the width between; 0 for one layer.
        views: of each image that a frozen one sees, how many features are kept: of
            itself, of its mirror image where that counts, and the rest at random.
        mirror: whether an embedding is the mean of an image's and its mirror image's.
        mining: which triplets to train on: all, semi-hard or hard.
        steps: how many steps to train.
        seed: of the initial parameters, the batches and the augmentation.
        margin: of the triplet loss, in Euclidean distance between unit vectors.
        batch_all_fraction: share of the steps that hard mining leaves to all triplets
            first, without which it collapses.
        classes: how many classes there are in a batch.
        per_class: how many images of each.
        class_sampling: of classes, as in `sampling.ClassBatches`.
        relevance: who is more alike: images of one class, or those that share more
            folders, as in `objectives.relevance_loss`.
        rotation_classes: as in `sampling.ImageBatches`.
        memory: how many embeddings of earlier batches a batch is compared with, too.
        memory_warmup: share of the steps before the first of them is kept.
        memory_momentum: how much of its average a step keeps of a second network that
            embeds what is kept, such as 0.99; 0 for the network itself.
        triplets_per_batch: how many of the given triplets there are in a batch.
        learning_rate: at its peak.
        weight_decay: of AdamW.
        ema_decay: decay of the parameters' exponential moving average.
        dim: number of dimensions of the embedding.
        channels: number of channels of each stage of the network.
        stride: of the first convolution of a residual network.
        augment: how images are changed at random.
        bfloat16: whether the network computes in bfloat16.
        embed_chunk_size: how many images are embedded at a time, to bound the memory.
        log_every: how many steps between two lines of metrics.
        validate_every: how many steps between two validations.
        checkpoint_every: how many steps between two states on disk.
    """

    data: str = "digits"
    triplets: str | None = None
    split: str = "images"
    classes_from: str | None = None
    kind: str | None = None
    size: int | None = None
    box: Box | None = None
    model: str | None = None
    head: str | None = None
    backbone: str | None = None
    backbone_training: str | None = None
    hidden: int | None = None
    views: int | None = None
    mirror: bool | None = None
    mining: str = "semi-hard"
    steps: int | None = None
    seed: int = 0
    margin: float = MARGIN
    batch_all_fraction: float = 0.5
    classes: int | None = None
    per_class: int | None = None
    class_sampling: str = "uniform"
    relevance: str = "classes"
    rotation_classes: int | None = None
    memory: int = 0
    memory_warmup: float = 0.1
    memory_momentum: float | None = None
    triplets_per_batch: int | None = None
    learning_rate: float | None = None
    weight_decay: float | None = None
    ema_decay: float = 0.98
    dim: int | None = None
    channels: tuple[int, ...] | None = None
    stride: int | None = None
    augment: Augment | None = None
    bfloat16: bool = False
    embed_chunk_size: int | None = None
    log_every: int = 10
    validate_every: int | None = None
    checkpoint_every: int = 100

    def __post_init__(self) -> None:
        for name, known in (
            ("mining", MINING),
            ("split", SPLITS),
            ("classes_from", (None, *CLASSES_FROM)),
            ("class_sampling", CLASS_SAMPLING),
            ("relevance", RELEVANCE),
            ("model", (None, *MODELS, *backbones.UNTRAINED)),
            ("backbone_training", (None, *TRAININGS)),
            ("head", (None, *HEADS)),
            ("kind", (None, *KINDS)),
        ):
            if getattr(self, name) not in known:
                words = ", ".join(str(word) for word in known if word)
                raise ValueError(
                    f"{name} must be one of {words}, got {getattr(self, name)!r}."
                )
        for name in (
            *("size", "steps", "dim", "stride", "embed_chunk_size"),
            *("triplets_per_batch", "log_every", "validate_every", "checkpoint_every"),
            "views",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value!r}.")
        if self.box is not None:
            top, left, bottom, right = self.box
            if not (0 <= top < bottom <= 1 and 0 <= left < right <= 1):
                raise ValueError(
                    "box must be top, left, bottom, right with 0 <= top < bottom <= 1 "
                    f"and 0 <= left < right <= 1, got {self.box}."
                )
        for name in ("seed", "hidden", "memory"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name} must be at least 0, got {value!r}.")
        self._check_network()
        for name in ("margin", "learning_rate", "weight_decay"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise ValueError(f"{name} must be finite and >= 0, got {value!r}.")
        for name in ("batch_all_fraction", "memory_warmup"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must be 0 to 1, got {value!r}.")
        if self.memory_momentum is not None and not 0 <= self.memory_momentum < 1:
            raise ValueError(
                "memory_momentum must be at least 0 and below 1, got "
                f"{self.memory_momentum!r}."
            )
        if self.memory_momentum is not None and not self.memory:
            raise ValueError(
                f"memory_momentum requires memory > 0, got {self.memory_momentum!r}."
            )

    def _check_network(self) -> None:
        """Raises ValueError for options of another network than is asked for."""
        own = self.model in backbones.UNTRAINED
        if self.backbone is not None:
            wrong = "model", "head", "channels", "stride"
            rule = "cannot be combined with a backbone"
        elif own:
            wrong = "head", "channels", "stride", "backbone_training", "views"
            rule = f"cannot be combined with model {self.model}"
        else:
            wrong, rule = (
                ("backbone_training", "hidden", "views"),
                "requires a backbone",
            )
        for name in wrong:
            if (value := getattr(self, name)) is not None:
                raise ValueError(f"{name} {rule}, got {value!r}.")
