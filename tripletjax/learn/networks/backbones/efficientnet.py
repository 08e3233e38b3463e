"""EfficientNet and EfficientNet-Lite, under the names of four PyTorch libraries.

The libraries are timm, torchvision, efficientnet-pytorch and efficientnet-lite-pytorch.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from tripletjax.learn.networks.backbones.images import IMAGENET, Images
from tripletjax.learn.networks.backbones.layers import (
    BatchNorm,
    Conv,
    DepthwiseConv,
    through,
)
from tripletjax.learn.networks.weights import Rules, Shapes

# By stage: size of the depthwise kernel, and stride of the first block.
KERNELS = (3, 3, 5, 3, 5, 5, 3)
STRIDES = (1, 2, 2, 2, 1, 2, 1)
# Blocks and output channels by stage, of B0.
DEPTHS = (1, 2, 2, 3, 3, 4, 1)
WIDTHS = (16, 24, 40, 80, 112, 192, 320)
# A block has this many times as many channels inside as outside. The first stage has
# as many.
EXPANSION = 6
# Inside squeeze and excitation, a block has its input channels divided by this.
SQUEEZE = 4
# Epsilon of batch normalisation: of PyTorch, and of TensorFlow's original.
EPS, ORIGINAL_EPS = 1e-5, 1e-3


class EfficientNet(nnx.Module):
    """EfficientNet or EfficientNet-Lite, without its classifier.

    Args:
        depths: number of blocks of each of the seven stages; the default is B0.
        widths: number of output channels of each stage.
        stem: number of channels of the first convolution.
        features: number of features.
        lite: whether blocks have ReLU6 and no squeeze and excitation, instead of SiLU
            with it.
        padding: ``"SAME"`` of TensorFlow, which pads more behind than in front, or
            ``"symmetric"`` of PyTorch.
        eps: of batch normalisation.
        dtype: of the computation; parameters stay float32.
        rngs: Flax random number streams, with ``params``.

    References:
        Tan, Le. EfficientNet: Rethinking Model Scaling for Convolutional Neural
        Networks. 2019. arXiv:1905.11946
    """

    def __init__(
        self,
        *,
        depths: Sequence[int] = DEPTHS,
        widths: Sequence[int] = WIDTHS,
        stem: int = 32,
        features: int = 1280,
        lite: bool = False,
        padding: str = "SAME",
        eps: float = ORIGINAL_EPS,
        dtype: DTypeLike | None = None,
        rngs: nnx.Rngs,
    ):
        options: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        around = 1 if padding == "symmetric" else padding
        self.conv_stem = Conv(3, stem, 3, 2, around, **options)
        self.bn_stem = BatchNorm(stem, eps=eps)
        stages, incoming = [], stem
        for stage, (depth, width) in enumerate(zip(depths, widths)):
            blocks = []
            for index in range(depth):
                block = _Block(
                    incoming,
                    width,
                    KERNELS[stage],
                    1 if index else STRIDES[stage],
                    expansion=EXPANSION if stage else 1,
                    lite=lite,
                    padding=padding,
                    eps=eps,
                    **options,
                )
                blocks.append(block)
                incoming = width
            stages.append(nnx.List(blocks))
        self.stages = nnx.List(stages)
        self.conv_head = Conv(incoming, features, 1, **options)
        self.bn_head = BatchNorm(features, eps=eps)
        self.features, self.lite = features, lite

    @property
    def top(self) -> tuple[str, ...]:
        """Paths of the stages with the smallest images."""
        return "stages.5", "stages.6", "conv_head", "bn_head"

    def __call__(self, images: Array) -> Array:
        """Features ``[n, features]`` of images ``[n, height, width, 3]``."""
        x = _active(self.bn_stem(self.conv_stem(images)), self.lite)
        for stage in self.stages:
            x = through(stage, x)
        x = _active(self.bn_head(self.conv_head(x)), self.lite)
        return x.mean(axis=(1, 2))


class _Block(nnx.Module):
    """An inverted residual block: expand, convolve each channel, project."""

    def __init__(
        self,
        incoming: int,
        out: int,
        size: int,
        stride: int,
        *,
        expansion: int,
        lite: bool,
        padding: str,
        eps: float,
        **options: Any,
    ):
        inside = expansion * incoming
        self.expands = expansion > 1
        if self.expands:
            self.expand_conv = Conv(incoming, inside, 1, **options)
            self.bn0 = BatchNorm(inside, eps=eps)
        around = size // 2 if padding == "symmetric" else padding
        self.depthwise_conv = DepthwiseConv(
            inside, size, stride, around, bias=False, **options
        )
        self.bn1 = BatchNorm(inside, eps=eps)
        if not lite:
            squeezed = max(1, incoming // SQUEEZE)
            self.se_reduce = Conv(inside, squeezed, 1, bias=True, **options)
            self.se_expand = Conv(squeezed, inside, 1, bias=True, **options)
        self.project_conv = Conv(inside, out, 1, **options)
        self.bn2 = BatchNorm(out, eps=eps)
        self.lite = lite
        self.residual = stride == 1 and incoming == out

    def __call__(self, x: Array) -> Array:
        y = x
        if self.expands:
            y = _active(self.bn0(self.expand_conv(y)), self.lite)
        y = _active(self.bn1(self.depthwise_conv(y)), self.lite)
        if not self.lite:
            weights = self.se_reduce(y.mean(axis=(1, 2), keepdims=True))
            y *= jax.nn.sigmoid(self.se_expand(jax.nn.silu(weights)))
        y = self.bn2(self.project_conv(y))
        return x + y if self.residual else y


def _active(x: Array, lite: bool) -> Array:
    return jnp.clip(x, 0, 6) if lite else jax.nn.silu(x)


@dataclasses.dataclass(frozen=True)
class Naming:
    """Names of a library's layers.

    Attributes:
        ends: convolution and normalisation before the stages, then after them.
        block: a block, with its ``{stage}`` and its ``{index}`` there, or its number
            ``{flat}`` among all blocks.
        first_stage: stage number of the first stage.
        layers: layers of a block, in the order of `LAYERS`.
        unexpanded: the same for blocks of the first stage, which do not expand.
        classifier: the classifier.
        original: whether padding and epsilon are always those of TensorFlow's original.
    """

    ends: tuple[str, str, str, str]
    block: str
    first_stage: int
    layers: tuple[str, ...]
    unexpanded: tuple[str, ...]
    classifier: str
    original: bool = False

    def block_name(self, stage: int, index: int, flat: int) -> str:
        return self.block.format(stage=stage + self.first_stage, index=index, flat=flat)


ENDS = "conv_stem", "bn_stem", "conv_head", "bn_head"
LAYERS = (
    *("expand_conv", "bn0", "depthwise_conv", "bn1"),
    *("se_reduce", "se_expand", "project_conv", "bn2"),
)
ORIGINAL_LAYERS = tuple(f"_{layer}" for layer in LAYERS)
# efficientnet-pytorch and efficientnet-lite-pytorch.
BY_ORIGINAL = Naming(
    ends=("_conv_stem", "_bn0", "_conv_head", "_bn1"),
    block="_blocks.{flat}",
    first_stage=0,
    layers=ORIGINAL_LAYERS,
    unexpanded=ORIGINAL_LAYERS[2:],
    classifier="_fc",
    original=True,
)
TIMM = Naming(
    ends=("conv_stem", "bn1", "conv_head", "bn2"),
    block="blocks.{stage}.{index}",
    first_stage=0,
    layers=(
        *("conv_pw", "bn1", "conv_dw", "bn2"),
        *("se.conv_reduce", "se.conv_expand", "conv_pwl", "bn3"),
    ),
    unexpanded=(
        *("conv_dw", "bn1", "se.conv_reduce", "se.conv_expand"),
        *("conv_pw", "bn2"),
    ),
    classifier="classifier",
)
TORCHVISION = Naming(
    ends=("features.0.0", "features.0.1", "features.8.0", "features.8.1"),
    block="features.{stage}.{index}.block",
    first_stage=1,
    layers=("0.0", "0.1", "1.0", "1.1", "2.fc1", "2.fc2", "3.0", "3.1"),
    unexpanded=("0.0", "0.1", "1.fc1", "1.fc2", "2.0", "2.1"),
    classifier="classifier",
)
NAMINGS = BY_ORIGINAL, TIMM, TORCHVISION
# Part of the names of files of timm with TensorFlow's original weights.
ORIGINAL_IN_TIMM = "tf_efficientnet"
# Number of blocks from which on torchvision has the epsilon of the original: B5's.
LARGE = 39


def _depths_of(shapes: Shapes, naming: Naming) -> list[int]:
    """The number of blocks of each stage.

    Blocks that are numbered throughout belong to one stage while their output channels
    stay the same.
    """
    depths: list[int] = []
    for stage in range(len(KERNELS)):
        widths: list[int] = []
        project = (naming.layers if stage else naming.unexpanded)[-2]
        while True:
            block = naming.block_name(stage, len(widths), sum(depths) + len(widths))
            shape = shapes.get(f"{block}.{project}.weight")
            if shape is None or (widths and shape[0] != widths[0]):
                break
            widths.append(shape[0])
        depths.append(len(widths))
    return depths


def _blocks(depths: Sequence[int], naming: Naming) -> list[tuple[int, int, str]]:
    """Stage, index and name of each block."""
    places = [(stage, i) for stage, depth in enumerate(depths) for i in range(depth)]
    return [
        (stage, index, naming.block_name(stage, index, flat))
        for flat, (stage, index) in enumerate(places)
    ]


def _naming_of(shapes: Shapes) -> Naming | None:
    """The naming of an EfficientNet with these arrays; None if there is none.

    Other networks of timm have the names of its EfficientNet, with other kernels.
    """
    for naming in NAMINGS:
        if not {f"{name}.weight" for name in naming.ends} <= set(shapes):
            continue
        depths = _depths_of(shapes, naming)
        kernels = []
        for stage, _, block in _blocks(depths, naming):
            depthwise = naming.layers[2] if stage else naming.unexpanded[0]
            shape = shapes.get(f"{block}.{depthwise}.weight", ())
            kernels.append(shape[1:] == (1, KERNELS[stage], KERNELS[stage]))
        if all(depths) and all(kernels):
            return naming
    return None


def options_of(shapes: Shapes, file: str) -> dict[str, Any] | None:
    """The network that arrays of these names are of; None if no EfficientNet's.

    Two sorts of networks in timm have the same names of arrays: those of TensorFlow's
    original weights, ``tf_efficientnet_*``, and its own. The name of the file decides.
    """
    naming = _naming_of(shapes)
    if naming is None:
        return None
    depths = _depths_of(shapes, naming)
    blocks = _blocks(depths, naming)
    widths = [
        shapes[f"{block}.{(naming.layers if stage else naming.unexpanded)[-2]}.weight"]
        for stage, index, block in blocks
        if index == 0
    ]
    squeeze = f"{blocks[0][2]}.{naming.unexpanded[2]}.weight"
    stem, _, head, _ = naming.ends
    original = naming.original or (naming is TIMM and ORIGINAL_IN_TIMM in file)
    large = naming is TORCHVISION and sum(depths) >= LARGE
    return {
        "depths": tuple(depths),
        "widths": tuple(shape[0] for shape in widths),
        "stem": shapes[f"{stem}.weight"][0],
        "features": shapes[f"{head}.weight"][0],
        "lite": squeeze not in shapes,
        "padding": "SAME" if original else "symmetric",
        "eps": ORIGINAL_EPS if original or large else EPS,
    }


def rules_of(shapes: Shapes) -> Rules:
    naming = _naming_of(shapes)
    assert naming is not None
    rules: dict[str, str | None] = {
        r".*\.num_batches_tracked": None,
        rf"{re.escape(naming.classifier)}\..*": None,
    }
    for name, path in zip(naming.ends, ENDS):
        rules |= _rules_of_layer(name, path)
    for stage, index, block in _blocks(_depths_of(shapes, naming), naming):
        names, layers = naming.layers, LAYERS
        if stage == 0:
            names, layers = naming.unexpanded, LAYERS[2:]
        for name, layer in zip(names, layers):
            path = f"stages.{stage}.{index}.{layer}"
            rules |= _rules_of_layer(f"{block}.{name}", path)
    return rules


# By the end of an array's name, the variable of a normalisation.
NORMALISATION = {
    "weight": "scale",
    "bias": "bias",
    "running_mean": "mean",
    "running_var": "var",
}


def _rules_of_layer(name: str, path: str) -> dict[str, str]:
    convolves = "bn" not in path.rpartition(".")[2]
    ends = {"weight": "kernel", "bias": "bias"} if convolves else NORMALISATION
    return {re.escape(f"{name}.{end}"): f"{path}.{to}" for end, to in ends.items()}


# (x - 127) / 128 of x from 0 to 255.
ORIGINAL_LITE = Images(3 * (127 / 255,), 3 * (128 / 255,), 224)
# Factors of widths and depths, and the sizes of images in pixels, of B0 to B7 and of
# Lite0 to Lite4.
VARIANTS = (
    (1.0, 1.0, 224, 224),
    (1.0, 1.1, 240, 240),
    (1.1, 1.2, 260, 260),
    (1.2, 1.4, 300, 280),
    (1.4, 1.8, 380, 300),
    (1.6, 2.2, 456, None),
    (1.8, 2.6, 528, None),
    (2.0, 3.1, 600, None),
)


def _scaled(width: float, depth: float, lite: bool) -> tuple[Any, Any]:
    """Depths and widths of a variant."""
    depths = [math.ceil(depth * blocks) for blocks in DEPTHS]
    if lite:
        # The first and the last stage stay as they are.
        depths[0], depths[-1] = DEPTHS[0], DEPTHS[-1]
    return tuple(depths), tuple(_round(width * channels) for channels in WIDTHS)


def _round(channels: float) -> int:
    """A multiple of 8 near a number of channels, at least 90 % of it."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


def _variant_of(options: Mapping[str, Any]) -> tuple[str, int]:
    """Name and image size of a network."""
    lite = options["lite"]
    shape = tuple(options["depths"]), tuple(options["widths"])
    prefix = "-Lite" if lite else "-B"
    for number, (width, depth, *sizes) in enumerate(VARIANTS):
        if _scaled(width, depth, lite) == shape and (size := sizes[lite]) is not None:
            return f"{prefix}{number}", size
    return "-Lite-like" if lite else "-like", 224


def title_of(options: Mapping[str, Any]) -> str:
    by = "TensorFlow" if options["padding"] == "SAME" else "PyTorch"
    return f"EfficientNet{_variant_of(options)[0]} (padded as in {by})"


def images_of(options: Mapping[str, Any]) -> Images:
    """The images that a variant was trained on."""
    original_lite = options["lite"] and options["padding"] == "SAME"
    images = ORIGINAL_LITE if original_lite else IMAGENET
    return dataclasses.replace(images, size=_variant_of(options)[1])
