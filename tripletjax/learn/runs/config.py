"""Request for a run: every option of training, declared once."""

import dataclasses
import math
from functools import partial

from tripletjax.learn import choices
from tripletjax.learn.data.augment import Augment
from tripletjax.learn.runs.options import (
    OptionError,
    check_options,
    documented,
    option,
    text_of,
)
from tripletjax.learn.training.losses import LOSSES, MARGIN, find_loss

# Groups of options, in the order of the help.
DATA, NETWORK, BATCHES, TRAINING = "data", "network", "batches and loss", "training"
_data, _network, _batches, _training = (
    partial(option, group=group) for group in (DATA, NETWORK, BATCHES, TRAINING)
)
_data_of_classes = partial(_data, task="classes")
_batches_of_classes = partial(_batches, task="classes")
_api = partial(option, in_command=False)
# Commands on folders of classes have this option, too.
classes_from_option = partial(
    option,
    "nested folders that are classes: the top ones, or the leaves, which hold images "
    "(default: leaves, except folders by date or session)",
    choices=choices.CLASSES_FROM,
)


@documented
@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Request for a run. Fields left None are derived from the data (`plan.Plan`)."""

    data: str = _data_of_classes(
        "images to learn from: digits, a folder with one folder of images per class, "
        "or tfds:NAME",
        default="digits",
        metavar="DATA",
    )
    triplets: str | None = _data(
        "CSV file of triplets to learn from, instead of classes: paths of an anchor, a "
        "positive and a negative in each line",
        metavar="FILE.csv",
    )
    split: str = _data_of_classes(
        "held-out data: some images of every class, or whole classes",
        default="images",
        choices=choices.SPLITS,
    )
    classes_from: str | None = classes_from_option(group=DATA, task="classes")
    kind: str | None = _api(
        "type of the images, on which sizes and networks depend", choices=choices.KINDS
    )
    size: int | None = _data(
        "image size, longer side in pixels (default: that of the median image, at most "
        "32 for greyscale characters, else 64)",
        rule="1 to 8192",
    )
    box: tuple[float, float, float, float] | None = _api(
        "part of every image that the network sees: top, left, bottom and right, as "
        "shares of height and width",
        rule="shares from 0 to 1 with top < bottom and left < right",
    )
    rotation_classes: int | None = _data_of_classes(
        "number of classes that a class makes with its turned and mirrored copies: 1, "
        "2, 4 or 8 (default: by the images)",
        rule="1, 2, 4 or 8",
    )
    model: str | None = _network(
        "network to train from scratch; resnet18, resnet34 and resnet50 are those of "
        "torchvision",
        choices=(*choices.MODELS, *choices.UNTRAINED),
    )
    head: str | None = _api(
        "pooling of the last feature map of a photo network", choices=choices.HEADS
    )
    backbone: str | None = _network(
        "pretrained network to begin with: efficientnet-lite0 of the extra "
        "pretrained, or a file of weights of EfficientNet, ResNet, DINOv2, ConvNeXt or "
        "Inception-ResNet-v1 (.safetensors, .pt, .pth, .bin, .ckpt)",
        metavar="NAME|FILE",
    )
    backbone_training: str | None = _network(
        "part of the backbone that is trained: none (frozen), its last stages (top), "
        "or all (default: frozen with fewer than 5,000 images on CPUs, else top)",
        choices=choices.TRAININGS,
    )
    hidden: int | None = _network(
        "width of the first of two layers of the head on a backbone; 0 for one layer",
        rule="at least 0",
    )
    views: int | None = _network(
        "number of views of each image for a frozen backbone (default: 2)",
        rule="at least 1",
    )
    mirror: bool | None = _api(
        "whether an embedding is the mean of an image's and its mirror image's"
    )
    dim: int | None = _network(
        "number of dimensions of the embedding", rule="at least 1"
    )
    channels: tuple[int, ...] | None = _api(
        "number of channels of each stage of the network"
    )
    stride: int | None = _api(
        "stride of the first convolution of a residual network", rule="at least 1"
    )
    bfloat16: bool = _network("compute the network in bfloat16", default=False)
    loss: str = _batches_of_classes(
        "loss of a batch; semi-hard, hard and all are triplet losses",
        default="semi-hard",
        choices=tuple(LOSSES),
    )
    margin: float | None = _batches(
        "margin of the loss; that of triplets is a Euclidean distance between unit "
        f"vectors (default: {MARGIN} for triplets)",
        rule="finite in float32 and at least 0",
    )
    temperature: float | None = _batches_of_classes(
        "temperature of a softmax loss (default: 0.1; 0.01 for smooth-ap)",
        rule="finite in float32 and above 0",
    )
    scale: float | None = _batches_of_classes(
        "scale of similarities in circle, sigmoid, cosface, arcface and proxy-anchor",
        rule="finite in float32 and above 0",
    )
    learn_loss: bool = _batches_of_classes(
        "learn the temperature, or the scale, bias or beta of the loss", default=False
    )
    batch_all_fraction: float = _api(
        "share of the steps in which the loss hard first trains on all triplets, "
        "against collapse",
        default=0.5,
        rule="0 to 1",
    )
    classes: int | None = _batches_of_classes(
        "number of classes in a batch", rule="at least 2"
    )
    per_class: int | None = _batches_of_classes(
        "number of images of each class in a batch", rule="at least 2"
    )
    class_sampling: str = _batches_of_classes(
        "classes of a batch: each equally often, or in proportion to its number of "
        "images",
        default="uniform",
        choices=choices.CLASS_SAMPLING,
    )
    relevance: str = _batches_of_classes(
        "images to bring near: those of one class (classes), or the nearer, the more "
        "folders they share (folders)",
        default="classes",
        choices=choices.RELEVANCE,
    )
    rounds: int = _batches_of_classes(
        "number of mining rounds: training stops, mines the classes that the model "
        "confuses, and puts them into the same batches",
        default=0,
        rule="at least 0",
    )
    memory: int = _batches_of_classes(
        "number of embeddings of earlier batches in the cross-batch memory, as further "
        "references; 0 for none",
        default=0,
        rule="at least 0",
    )
    memory_warmup: float = _batches_of_classes(
        "share of the steps before the memory is used", default=0.1, rule="0 to 1"
    )
    memory_momentum: float | None = _batches_of_classes(
        "momentum of the EMA network whose embeddings the memory holds; 0 for the "
        "trained network itself (default: 0.99)",
        rule="at least 0 and below 1",
    )
    triplets_per_batch: int | None = _batches(
        "number of triplets in a batch, if triplets are given",
        rule="at least 1",
        task="triplets",
    )
    embed_chunk_size: int | None = _batches(
        "number of images of a batch embedded at a time, to save memory",
        rule="at least 1",
    )
    steps: int | None = _training(
        "number of training steps; 0 for the closed form of a head on a frozen "
        "backbone",
        rule="at least 0",
    )
    seed: int = _training(
        "seed of parameters, batches and augmentation",
        default=0,
        rule="at least 0 and below 2**63",
    )
    learning_rate: float | None = _training(
        "peak learning rate", rule="finite in float32 and at least 0"
    )
    weight_decay: float | None = _api(
        "weight decay of AdamW", rule="finite in float32 and at least 0"
    )
    ema_decay: float = _api(
        "decay of the exponential moving average of the parameters", default=0.98
    )
    augment: Augment | None = _api("random changes of the images while training")
    log_every: int = _api(
        "number of steps between two records of metrics", default=10, rule="at least 1"
    )
    validate_every: int | None = _api(
        "number of steps between two validations", rule="at least 1"
    )
    checkpoint_every: int = _api(
        "number of steps between two checkpoints", default=100, rule="at least 1"
    )

    def __post_init__(self) -> None:
        check_options(self)
        if self.memory_momentum is not None and not self.memory:
            raise OptionError(
                "{memory_momentum} requires {memory}, got "
                f"{self.memory_momentum!r}."
            )
        self._check_rounds()
        self._check_loss()
        if self.backbone is not None:
            excluded = "model", "head", "channels", "stride"
            rule = "cannot be combined with {backbone}"
        elif self.model in choices.UNTRAINED:
            excluded = "head", "channels", "stride", "backbone_training", "views"
            rule = f"cannot be combined with {{model}} {self.model}"
        else:
            excluded = "backbone_training", "hidden", "views"
            rule = "requires {backbone}"
        for name in excluded:
            if (value := getattr(self, name)) is not None:
                raise OptionError(f"{{{name}}} {rule}, got {text_of(value)}.")
        if self.steps == 0:
            if self.backbone is None:
                raise OptionError(
                    "{steps} must be at least 1 without {backbone}, got 0."
                )
            if self.hidden:
                raise OptionError(
                    "{steps} must be at least 1 with {hidden}, got 0: a head of two "
                    "layers has no closed form."
                )

    def _check_rounds(self) -> None:
        """Check the options that rounds depend on."""
        if self.rounds and self.steps is not None and self.rounds >= self.steps:
            raise OptionError(
                f"{{rounds}} must be less than {{steps}} {self.steps}, got "
                f"{self.rounds}."
            )
        for name, value in (("relevance", "classes"), ("class_sampling", "uniform")):
            if self.rounds and getattr(self, name) != value:
                raise OptionError(
                    f"{{rounds}} requires {{{name}}} {value}, got "
                    f"{getattr(self, name)}."
                )

    def _check_loss(self) -> None:
        """Check the options that only some losses have."""
        loss = find_loss(self.loss)
        for name in ("margin", "temperature", "scale"):
            if getattr(self, name) is not None and name not in loss.numbers:
                owners = ", ".join(k for k, of in LOSSES.items() if name in of.numbers)
                raise OptionError(
                    f"{{{name}}} requires {{loss}} {owners}; got {self.loss}."
                )
        if self.loss == "arcface" and (self.margin or 0) > math.pi:
            raise OptionError(
                "{margin} must be at most pi, as an angle, with {loss} arcface, got "
                f"{self.margin!r}."
            )
        if self.learn_loss and not loss.learned:
            owners = ", ".join(k for k, of in LOSSES.items() if of.learned)
            raise OptionError(
                f"{{learn_loss}} requires {{loss}} {owners}; got {self.loss}."
            )
        if self.memory and loss.class_vectors:
            raise OptionError(
                f"{{memory}} cannot be combined with {{loss}} {self.loss}, which has "
                "class vectors."
            )
        if self.relevance == "folders" and not loss.mines_triplets:
            raise OptionError(
                "{relevance} folders requires {loss} semi-hard, hard or all; got "
                f"{self.loss}."
            )
