"""What a run does: every choice made, nothing left open."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from tripletjax.learn.data.augment import Augment
from tripletjax.learn.data.image_shape import WHOLE, Box, View


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassBatchPlan:
    """Batches of P classes with K images each, of which triplets are mined.

    Attributes:
        mining: which triplets to train on: all, semi-hard or hard.
        batch_all_fraction: share of the steps that hard mining leaves to all triplets
            first.
        classes: how many classes there are in a batch.
        per_class: how many images of each.
        class_sampling: of classes, as in `sampling.ClassBatches`.
        relevance: who is more alike, as in `Config`.
        rotation_classes: as in `sampling.ImageBatches`.
        memory: how many embeddings of earlier batches there are to compare with.
        memory_warmup: share of the steps before the first is kept.
        memory_momentum: of the network that embeds what is kept, as in `learn.fit`.
    """

    mining: str
    batch_all_fraction: float
    classes: int
    per_class: int
    class_sampling: str
    relevance: str
    rotation_classes: int
    memory: int = 0
    memory_warmup: float = 0.0
    memory_momentum: float | None = None

    @property
    def size(self) -> int:
        """How many images there are in a batch."""
        return self.classes * self.per_class


@dataclasses.dataclass(frozen=True, kw_only=True)
class TripletBatchPlan:
    """Batches of given triplets.

    Attributes:
        triplets_per_batch: how many there are in a batch.
    """

    triplets_per_batch: int

    @property
    def size(self) -> int:
        """How many images there are in a batch."""
        return 3 * self.triplets_per_batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class BackbonePlan:
    """A network that others have made, with a head on it.

    Attributes:
        family: of `backbones.FAMILIES`.
        options: of the network.
        training: what of it is trained: frozen, top or all.
        hidden: of a head of two layers, the width between; 0 for one layer.
        views: of each image that a frozen one sees, how many features are kept.
        digest: of the file of weights that it began with, None if with nothing.
        multiple: sides of images are multiples of this, in pixels.
    """

    family: str
    options: dict[str, Any]
    training: str
    hidden: int
    views: int
    digest: str | None
    multiple: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that training depends on but the images themselves.

    Attributes:
        batches: what makes a batch, and what of it is trained on.
        box: the part of images that is seen.
        size: of what is seen, the longer side in pixels.
        model: which network, of `embedding_networks.MODELS`, or backbone.
        backbone: which one, None of others.
        head: of a photo network, grid or mean.
        channels: number of channels of each stage.
        stride: of the first convolution of a residual network.
        dim: number of dimensions of the embedding.
        mirror: whether an embedding is the mean of an image's and its mirror image's.
        bfloat16: whether the network computes in bfloat16.
        augment: how images are changed at random.
        margin: of the triplet loss, in Euclidean distance between unit vectors.
        steps: how many steps to train.
        seed: of the initial parameters, the batches and the augmentation.
        learning_rate: at its peak.
        weight_decay: of AdamW.
        ema_decay: decay of the parameters' exponential moving average.
        embed_chunk_size: how many images are embedded at a time.
        log_every: how many steps between two lines of metrics.
        validate_every: how many steps between two validations.
        checkpoint_every: how many steps between two states on disk.
    """

    batches: ClassBatchPlan | TripletBatchPlan
    box: Box
    size: int
    model: str
    backbone: BackbonePlan | None
    head: str
    channels: tuple[int, ...]
    stride: int
    dim: int
    mirror: bool
    bfloat16: bool
    augment: Augment
    margin: float
    steps: int
    seed: int
    learning_rate: float
    weight_decay: float
    ema_decay: float
    embed_chunk_size: int
    log_every: int
    validate_every: int
    checkpoint_every: int

    def view_of(self, shape: Sequence[int]) -> View | None:
        """What the network sees of images ``height, width, channels``; None if all."""
        multiple = 1 if self.backbone is None else self.backbone.multiple
        view = View.of(shape, self.box, self.size, multiple=multiple)
        whole = self.box == WHOLE and self.size == max(shape[:2])
        if whole and (view.height, view.width) == tuple(shape[:2]):
            return None
        return view

    @property
    def backbone_training(self) -> str | None:
        """What of a backbone is trained; None of another network."""
        return None if self.backbone is None else self.backbone.training

    @property
    def pretrained(self) -> bool:
        """Whether it begins with what another network has learnt."""
        return self.backbone is not None and self.backbone.digest is not None

    @property
    def frozen(self) -> bool:
        """Whether a head alone is trained, on features that are kept."""
        return self.backbone_training == "frozen"
