"""Pretrained networks, from the user's own files of weights.

backbone = backbones.recognise("resnet50.safetensors")
network, loaded = backbones.load("resnet50.safetensors")
features = network(images)
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from flax import nnx
from jax.typing import DTypeLike

from tripletjax.learn import choices
from tripletjax.learn.networks.backbones import convnext, inception_resnet, resnet, vit
from tripletjax.learn.networks.weights import (
    Loaded,
    Rules,
    WeightsError,
    load_weights,
    shapes_of,
)

Shapes = Mapping[str, tuple[int, ...]]
# Mean and standard deviation of ImageNet's photographs, from 0 to 1.
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# (x - 127.5) / 128 of x from 0 to 255.
FACENET = (0.5, 0.5, 0.5), (128 / 255, 128 / 255, 128 / 255)


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of networks.

    Attributes:
        network: builds a network from options.
        options_of: from the shapes of a file's arrays to options; None for a file of
            another family.
        rules_of: from the shapes of a file's arrays to the rules of `load_weights`.
        title_of: from options to the name of a network.
        mean: per channel, of the training images, from 0 to 1.
        std: standard deviation per channel, of the same images.
        size: of the training images, in pixels.
        least: smallest side of images, in pixels.
    """

    network: Callable[..., nnx.Module]
    options_of: Callable[[Shapes], dict[str, Any] | None]
    rules_of: Callable[[Shapes], Rules]
    title_of: Callable[[Mapping[str, Any]], str]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    size: int
    least: int


def _family(
    network: Callable[..., nnx.Module], module: Any, pixels: Any, size: int, least: int
) -> Family:
    mean, std = pixels
    return Family(
        network=network,
        options_of=module.options_of,
        rules_of=module.rules_of,
        title_of=module.title_of,
        mean=mean,
        std=std,
        size=size,
        least=least,
    )


FAMILIES = {
    "resnet": _family(resnet.ResNet, resnet, IMAGENET, 224, 8),
    "vit": _family(vit.ViT, vit, IMAGENET, 224, 1),
    "convnext": _family(convnext.ConvNeXt, convnext, IMAGENET, 224, 32),
    "inception-resnet-v1": _family(
        inception_resnet.InceptionResNetV1, inception_resnet, FACENET, 160, 75
    ),
}
# Networks to train from scratch, by the name of a model.
UNTRAINED: dict[str, dict[str, Any]] = {
    f"resnet{depth}": {
        "blocks": blocks,
        "widths": (64, 128, 256, 512),
        "bottleneck": bottleneck,
    }
    for (blocks, bottleneck), depth in resnet.DEPTHS.items()
    if f"resnet{depth}" in choices.UNTRAINED
}


@dataclasses.dataclass(frozen=True)
class Backbone:
    """A network of a family.

    Attributes:
        family: of `FAMILIES`.
        options: of the network.
    """

    family: str
    options: dict[str, Any]

    @property
    def of(self) -> Family:
        return FAMILIES[self.family]

    @property
    def title(self) -> str:
        """Name of the network."""
        return self.of.title_of(self.options)

    @property
    def multiple(self) -> int:
        """Divisor of the sides of images, in pixels."""
        return self.options.get("patch", 1)

    @property
    def least(self) -> int:
        """The smallest side of images, in pixels."""
        return max(self.of.least, self.multiple)

    def build(
        self, *, dtype: DTypeLike | None = None, rngs: nnx.Rngs, **options: Any
    ) -> nnx.Module:
        """Build the network with random parameters."""
        options = self.options | options
        return self.of.network(**options, dtype=dtype, rngs=rngs)

    @property
    def features(self) -> int:
        """Number of features."""
        network: Any = nnx.eval_shape(lambda: self.build(rngs=nnx.Rngs(0)))
        return network.features

    def fill(self, network: nnx.Module, path: str | Path) -> Loaded:
        """Load a file of weights into a network that `build` built."""
        return load_weights(network, path, self.of.rules_of(shapes_of(path)))


def recognise(path: str | Path) -> Backbone:
    """Recognise the network of a safetensors file by the names of its arrays.

    Raises:
        FileNotFoundError: if there is no such file.
        WeightsError: if it is no whole safetensors file, or of an unknown network.
    """
    shapes = shapes_of(path)
    if (backbone := _by_names(shapes)) is not None:
        return backbone
    for prefix in _prefixes(shapes):
        rest = {
            name.removeprefix(prefix): shape
            for name, shape in shapes.items()
            if name.startswith(prefix)
        }
        if (backbone := _by_names(rest)) is not None:
            raise WeightsError(
                f"{path} is {backbone.title}, but its names have the prefix "
                f"{prefix!r}. Save the arrays with this prefix under names without it."
            )
    some = ", ".join(sorted(shapes)[:5]) or "none"
    raise WeightsError(
        f"{path} is of no known network ({', '.join(FAMILIES)}). It has "
        f"{len(shapes):,} arrays: {some}{', ...' if len(shapes) > 5 else ''}."
    )


def _by_names(shapes: Shapes) -> Backbone | None:
    for family, of in FAMILIES.items():
        if (options := of.options_of(shapes)) is not None:
            return Backbone(family, options)
    return None


def _prefixes(names: Iterable[str]) -> list[str]:
    """Beginnings of names, up to three parts, in order of the names; short ones first.

    Wrappers of a network put them there: ``module.``, ``_orig_mod.``,
    ``teacher.backbone.``.
    """
    parts = [name.split(".") for name in names]
    prefixes = [
        ".".join(of[:length]) + "."
        for length in (1, 2, 3)
        for of in parts
        if len(of) > length
    ]
    return [*dict.fromkeys(prefixes)]


def load(
    path: str | Path, *, dtype: DTypeLike | None = None
) -> tuple[nnx.Module, Loaded]:
    """Load a pretrained network from a file of weights.

    Args:
        path: a safetensors file.
        dtype: of the computation; parameters are float32.

    Returns:
        The network, from images ``[n, height, width, 3]``, standardised by its family's
        mean and deviation, to features ``[n, f]``; and the record of the file.

    Raises:
        FileNotFoundError: if there is no such file.
        WeightsError: if it is no whole safetensors file, of an unknown network, or
            does not fit its network.
    """
    backbone = recognise(path)
    # Parameters that are read need not be drawn first.
    network = nnx.eval_shape(lambda: backbone.build(dtype=dtype, rngs=nnx.Rngs(0)))
    loaded = backbone.fill(network, path)
    network.eval()
    return network, loaded
