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
# Of the photographs of ImageNet, from 0 to 1.
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# (x - 127.5) / 128 of x from 0 to 255.
FACENET = (0.5, 0.5, 0.5), (128 / 255, 128 / 255, 128 / 255)


@dataclasses.dataclass(frozen=True)
class Family:
    """Networks of one kind.

    Attributes:
        network: makes one of its options.
        options_of: the options of a file's arrays by their shapes, None if it is of
            another family.
        rules_of: how to load such a file.
        title_of: what a network of some options is called.
        mean: of each channel of images from 0 to 1, which they were trained with.
        std: likewise, the standard deviation.
        size: of the images that they were trained with, in pixels.
        least: the smallest side of images that they take.
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
# Options of networks that are trained from scratch, by the name of a model.
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
    """Which network a file of weights is of.

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
        """What the network is called."""
        return self.of.title_of(self.options)

    @property
    def multiple(self) -> int:
        """Sides of images are to be multiples of this, in pixels."""
        return self.options.get("patch", 1)

    @property
    def least(self) -> int:
        """The smallest side of images, in pixels."""
        return max(self.of.least, self.multiple)

    def build(
        self, *, dtype: DTypeLike | None = None, rngs: nnx.Rngs, **options: Any
    ) -> nnx.Module:
        """The network, with random parameters."""
        options = self.options | options
        return self.of.network(**options, dtype=dtype, rngs=rngs)

    def fill(self, network: nnx.Module, path: str | Path) -> Loaded:
        """Loads a file of such weights into a network of this kind."""
        return load_weights(network, path, self.of.rules_of(shapes_of(path)))


def recognise(path: str | Path) -> Backbone:
    """Which network a safetensors file of weights is of, by the names in it.

    Raises:
        FileNotFoundError: if there is no such file.
        WeightsError: if it is no whole safetensors file, or of no network known here.
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
        f"{path} is of no network that is known here ({', '.join(FAMILIES)}): it has "
        f"{len(shapes):,} arrays, {some}{', ...' if len(shapes) > 5 else ''}."
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
    """A pretrained network from a file of weights, to be used as it is.

    Args:
        path: a safetensors file.
        dtype: what is computed in; parameters are float32.

    Returns:
        The network, from images ``[n, height, width, 3]``, standardised by its family's
        mean and deviation, to features ``[n, f]``; and what was made of the file.

    Raises:
        FileNotFoundError: if there is no such file.
        WeightsError: if it is no whole safetensors file, of no network known here, or
            does not fit its network.
    """
    backbone = recognise(path)
    # Parameters that are read need not be drawn first.
    network = nnx.eval_shape(lambda: backbone.build(dtype=dtype, rngs=nnx.Rngs(0)))
    loaded = backbone.fill(network, path)
    network.eval()
    return network, loaded
