"""The plan of a run: every setting that a run needs, chosen."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from tripletjax.learn.data.augment import Augment
from tripletjax.learn.data.image_shape import WHOLE, Box, View


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassBatchPlan:
    """Batches of P classes with K images each, and their loss.

    Fields have the meaning of those of `Config`.
    """

    loss: str
    temperature: float | None
    scale: float | None
    learn_loss: bool
    batch_all_fraction: float
    classes: int
    per_class: int
    class_sampling: str
    relevance: str
    rotation_classes: int
    rounds: int = 0
    memory: int = 0
    memory_warmup: float = 0.0
    memory_momentum: float | None = None

    @property
    def size(self) -> int:
        """Number of images in a batch."""
        return self.classes * self.per_class


@dataclasses.dataclass(frozen=True, kw_only=True)
class TripletBatchPlan:
    """Batches of given triplets. Fields have the meaning of those of `Config`."""

    triplets_per_batch: int

    @property
    def size(self) -> int:
        """Number of images in a batch."""
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

    Other fields have the meaning of those of `Config`.

    Attributes:
        batches: composition of a batch, and what of it is trained on.
        model: which network, of `choices.MODELS`, or "backbone".
        backbone: the pretrained or `choices.UNTRAINED` network, None of other models.
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
    margin: float | None
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
        """The view of images ``[height, width, channels]``; None for whole images."""
        multiple = 1 if self.backbone is None else self.backbone.multiple
        view = View.of(shape, self.box, self.size, multiple=multiple)
        whole = self.box == WHOLE and self.size == max(shape[:2])
        if whole and (view.height, view.width) == tuple(shape[:2]):
            return None
        return view

    @property
    def backbone_training(self) -> str | None:
        """The trained part of a backbone; None for another network."""
        return None if self.backbone is None else self.backbone.training

    @property
    def pretrained(self) -> bool:
        """Whether it begins with what another network has learnt."""
        return self.backbone is not None and self.backbone.digest is not None

    @property
    def frozen(self) -> bool:
        """Whether a head alone is trained, on features that are kept."""
        return self.backbone_training == "frozen"

    @property
    def closed_form(self) -> bool:
        """Whether a head is trained that has a closed form."""
        return self.frozen and self.backbone is not None and not self.backbone.hidden
