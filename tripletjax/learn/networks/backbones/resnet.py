"""ResNet, as torchvision and timm have it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from tripletjax.learn.networks.backbones.layers import (
    BatchNorm,
    Conv,
    max_pool,
    through,
)
from tripletjax.learn.networks.weights import Rules, Shapes

# A bottleneck block multiplies its channels by this factor.
EXPANSION = 4


class ResNet(nnx.Module):
    """A residual network, without its classifier.

    Args:
        blocks: how many each stage has; 2, 2, 2, 2 for ResNet-18, 3, 4, 6, 3 for 34
            and 50.
        widths: number of channels of each stage, within blocks.
        bottleneck: whether a block is of three convolutions, as in ResNet-50, or two.
        learn_statistics: as of `BatchNorm`.
        dtype: what is computed in; parameters stay float32.
        rngs: Flax random number streams, with ``params``.

    References:
        He, Zhang, Ren, Sun. Deep Residual Learning for Image Recognition. 2015.
        arXiv:1512.03385
    """

    def __init__(
        self,
        *,
        blocks: Sequence[int] = (3, 4, 6, 3),
        widths: Sequence[int] = (64, 128, 256, 512),
        bottleneck: bool = True,
        learn_statistics: bool = False,
        dtype: DTypeLike | None = None,
        rngs: nnx.Rngs,
    ):
        options: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        self.conv1 = Conv(3, widths[0], 7, 2, 3, **options)
        self.bn1 = BatchNorm(widths[0], learn_statistics=learn_statistics)
        options["learn_statistics"] = learn_statistics
        block_type: Callable[..., nnx.Module] = _Bottleneck if bottleneck else _Basic
        stages, incoming = [], widths[0]
        for stage, (depth, width) in enumerate(zip(blocks, widths)):
            made = []
            for block in range(depth):
                stride = 2 if stage and not block else 1
                made.append(block_type(incoming, width, stride, **options))
                incoming = width * (EXPANSION if bottleneck else 1)
            stages.append(nnx.List(made))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.features = incoming

    @property
    def top(self) -> tuple[str, ...]:
        """Paths of the last stage."""
        return ("layer4",)

    def __call__(self, images: Array) -> Array:
        """Features ``[n, features]`` of images ``[n, height, width, 3]``."""
        x = jax.nn.relu(self.bn1(self.conv1(images)))
        x = max_pool(x, 3, 2, 1)
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = through(stage, x)
        return x.mean(axis=(1, 2))


class _Basic(nnx.Module):
    def __init__(
        self,
        incoming: int,
        width: int,
        stride: int,
        *,
        learn_statistics: bool,
        **options: Any,
    ):
        self.conv1 = Conv(incoming, width, 3, stride, 1, **options)
        self.conv2 = Conv(width, width, 3, 1, 1, **options)
        norms = [BatchNorm(width, learn_statistics=learn_statistics) for _ in range(2)]
        self.bn1, self.bn2 = norms
        self.downsample = _shortcut(
            incoming, width, stride, learn_statistics, **options
        )

    def __call__(self, x: Array) -> Array:
        y = jax.nn.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return jax.nn.relu(y + through(self.downsample, x))


class _Bottleneck(nnx.Module):
    def __init__(
        self,
        incoming: int,
        width: int,
        stride: int,
        *,
        learn_statistics: bool,
        **options: Any,
    ):
        out = EXPANSION * width
        self.conv1 = Conv(incoming, width, 1, **options)
        self.conv2 = Conv(width, width, 3, stride, 1, **options)
        self.conv3 = Conv(width, out, 1, **options)
        self.bn1, self.bn2, self.bn3 = (
            BatchNorm(n, learn_statistics=learn_statistics) for n in (width, width, out)
        )
        self.downsample = _shortcut(incoming, out, stride, learn_statistics, **options)

    def __call__(self, x: Array) -> Array:
        y = jax.nn.relu(self.bn1(self.conv1(x)))
        y = jax.nn.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return jax.nn.relu(y + through(self.downsample, x))


def _shortcut(
    incoming: int, out: int, stride: int, learn_statistics: bool, **options: Any
) -> nnx.List:
    """The projection of a shortcut; empty if the shapes are equal."""
    if stride == 1 and incoming == out:
        return nnx.List([])
    norm = BatchNorm(out, learn_statistics=learn_statistics)
    return nnx.List([Conv(incoming, out, 1, stride, **options), norm])


RULES: Rules = {
    r"(.*conv\d|.*downsample\.0)\.weight": r"\1.kernel",
    r"(.*bn\d|.*downsample\.1)\.weight": r"\1.scale",
    r"(.*bn\d|.*downsample\.1)\.bias": r"\1.bias",
    r"(.*)\.running_mean": r"\1.mean",
    r"(.*)\.running_var": r"\1.var",
    r".*\.num_batches_tracked": None,
    r"fc\..*": None,
}


def options_of(shapes: Shapes, file: str) -> dict[str, Any] | None:
    """The network that arrays of these names and shapes are of; None if no ResNet's."""
    firsts = [f"layer{stage}.0.conv1.weight" for stage in range(1, 5)]
    if not {"conv1.weight", "bn1.weight", *firsts} <= set(shapes):
        return None
    blocks = []
    for stage in range(1, 5):
        depth = 0
        while f"layer{stage}.{depth}.conv1.weight" in shapes:
            depth += 1
        blocks.append(depth)
    return {
        "blocks": tuple(blocks),
        "widths": tuple(shapes[name][0] for name in firsts),
        "bottleneck": "layer1.0.conv3.weight" in shapes,
    }


def rules_of(shapes: Shapes) -> Rules:
    return RULES


# Of blocks, and whether they are bottlenecks.
DEPTHS = {
    ((2, 2, 2, 2), False): 18,
    ((3, 4, 6, 3), False): 34,
    ((3, 4, 6, 3), True): 50,
    ((3, 4, 23, 3), True): 101,
    ((3, 8, 36, 3), True): 152,
}


def title_of(options: Mapping[str, Any]) -> str:
    depth = DEPTHS.get((tuple(options["blocks"]), options["bottleneck"]))
    return f"ResNet-{depth or 'like'}"
