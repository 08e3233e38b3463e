"""Inception-ResNet-v1 as facenet-pytorch has it: FaceNet's network, for faces."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
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

# As in TensorFlow, where it comes from.
EPS = 1e-3


class InceptionResNetV1(nnx.Module):
    """A network from photographs of faces to 512 features, without its classifier.

    Args:
        repeats: how many blocks there are of each of three kinds.
        dtype: what is computed in; parameters stay float32.
        rngs: Flax random number streams, with ``params``.

    References:
        Szegedy, Ioffe, Vanhoucke, Alemi. Inception-v4, Inception-ResNet and the Impact
        of Residual Connections on Learning. 2016. arXiv:1602.07261
        Schroff, Kalenichenko, Philbin. FaceNet. 2015. arXiv:1503.03832
    """

    def __init__(
        self,
        *,
        repeats: Sequence[int] = (5, 10, 5),
        dtype: DTypeLike | None = None,
        rngs: nnx.Rngs,
    ):
        options: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        self.conv2d_1a = _Conv(3, 32, 3, 2, **options)
        self.conv2d_2a = _Conv(32, 32, 3, **options)
        self.conv2d_2b = _Conv(32, 64, 3, padding=1, **options)
        self.conv2d_3b = _Conv(64, 80, 1, **options)
        self.conv2d_4a = _Conv(80, 192, 3, **options)
        self.conv2d_4b = _Conv(192, 256, 3, 2, **options)
        blocks35, blocks17, blocks8 = repeats
        self.repeat_1 = nnx.List([_block35(**options) for _ in range(blocks35)])
        self.mixed_6a = _Mixed(
            [[(256, 384, 3, 2, 0)]],
            [[(256, 192, 1, 1, 0), (192, 192, 3, 1, 1), (192, 256, 3, 2, 0)]],
            **options,
        )
        self.repeat_2 = nnx.List([_block17(**options) for _ in range(blocks17)])
        self.mixed_7a = _Mixed(
            [],
            [
                [(896, 256, 1, 1, 0), (256, 384, 3, 2, 0)],
                [(896, 256, 1, 1, 0), (256, 256, 3, 2, 0)],
                [(896, 256, 1, 1, 0), (256, 256, 3, 1, 1), (256, 256, 3, 2, 0)],
            ],
            **options,
        )
        self.repeat_3 = nnx.List([_block8(**options) for _ in range(blocks8)])
        self.block8 = _block8(scale=1.0, active=False, **options)
        self.last_linear = nnx.Linear(1792, 512, use_bias=False, **options)
        self.last_bn = BatchNorm(512, eps=EPS)
        self.features = 512

    @property
    def top(self) -> tuple[str, ...]:
        """Paths of the last stage."""
        return "mixed_7a", "repeat_3", "block8", "last_linear", "last_bn"

    def __call__(self, images: Array) -> Array:
        """Features ``[n, 512]`` of images ``[n, height, width, 3]``.

        Raises:
            ValueError: if a side is below 75 pixels.
        """
        if min(images.shape[1:3]) < 75:
            raise ValueError(
                "images must be at least 75 x 75 pixels, got "
                f"{images.shape[1]} x {images.shape[2]}."
            )
        x = self.conv2d_2b(self.conv2d_2a(self.conv2d_1a(images)))
        x = self.conv2d_3b(max_pool(x, 3, 2))
        x = self.conv2d_4b(self.conv2d_4a(x))
        x = through(self.repeat_1, x)
        x = self.mixed_6a(x)
        x = through(self.repeat_2, x)
        x = self.mixed_7a(x)
        x = through(self.repeat_3, x)
        x = self.block8(x).mean(axis=(1, 2))
        return self.last_bn(self.last_linear(x))


class _Conv(nnx.Module):
    """Convolution, normalisation, ReLU."""

    def __init__(
        self,
        incoming: int,
        out: int,
        size: int | tuple[int, int],
        stride: int = 1,
        padding: int | tuple[int, int] = 0,
        **options: Any,
    ):
        self.conv = Conv(incoming, out, size, stride, padding, **options)
        self.bn = BatchNorm(out, eps=EPS)

    def __call__(self, x: Array) -> Array:
        return jax.nn.relu(self.bn(self.conv(x)))


# Incoming and outgoing channels, size, stride and padding of a convolution.
Shape = tuple[int, int, Any, int, Any]


def _path(shapes: Sequence[Shape], **options: Any) -> nnx.List:
    return nnx.List([_Conv(*shape, **options) for shape in shapes])


class _Block(nnx.Module):
    """A residual block of two or three paths."""

    def __init__(
        self,
        width: int,
        first: Shape,
        paths: Sequence[Sequence[Shape]],
        scale: float,
        active: bool,
        **options: Any,
    ):
        self.branch0 = _Conv(*first, **options)
        self.branch1 = _path(paths[0], **options)
        self.branch2 = _path(paths[1] if len(paths) > 1 else [], **options)
        joined = first[1] + sum(path[-1][1] for path in paths)
        self.conv2d = Conv(joined, width, 1, bias=True, **options)
        self.scale, self.active = scale, active

    def __call__(self, x: Array) -> Array:
        parts = [self.branch0(x)]
        for path in (self.branch1, self.branch2):
            if len(path):
                parts.append(through(path, x))
        x = self.conv2d(jnp.concatenate(parts, axis=-1)) * self.scale + x
        return jax.nn.relu(x) if self.active else x


def _block35(**options: Any) -> _Block:
    first = 256, 32, 1, 1, 0
    paths = [[first, (32, 32, 3, 1, 1)], [first, *2 * [(32, 32, 3, 1, 1)]]]
    return _Block(256, first, paths, 0.17, True, **options)


def _block17(**options: Any) -> _Block:
    first = 896, 128, 1, 1, 0
    path = [first, (128, 128, (1, 7), 1, (0, 3)), (128, 128, (7, 1), 1, (3, 0))]
    return _Block(896, first, [path], 0.10, True, **options)


def _block8(*, scale: float = 0.20, active: bool = True, **options: Any) -> _Block:
    first = 1792, 192, 1, 1, 0
    path = [first, (192, 192, (1, 3), 1, (0, 1)), (192, 192, (3, 1), 1, (1, 0))]
    return _Block(1792, first, [path], scale, active, **options)


class _Mixed(nnx.Module):
    """Paths that halve the image, beside the maximum of what comes in.

    Args:
        singles: of the first branches, each one convolution.
        paths: of the others, each several.
    """

    def __init__(
        self,
        singles: Sequence[Sequence[Shape]],
        paths: Sequence[Sequence[Shape]],
        **options: Any,
    ):
        branches = [_Conv(*shape, **options) for (shape,) in singles]
        branches += [_path(path, **options) for path in paths]
        for index, branch in enumerate(branches):
            setattr(self, f"branch{index}", branch)
        self.branches = len(branches)

    def __call__(self, x: Array) -> Array:
        branches = [getattr(self, f"branch{index}") for index in range(self.branches)]
        parts = [
            through(branch, x) if isinstance(branch, nnx.List) else branch(x)
            for branch in branches
        ]
        return jnp.concatenate([*parts, max_pool(x, 3, 2)], axis=-1)


RULES: Rules = {
    r"(.*\.conv|.*\.conv2d|last_linear)\.weight": r"\1.kernel",
    r"(.*\.conv2d)\.bias": r"\1.bias",
    r"(.*\.bn|last_bn)\.weight": r"\1.scale",
    r"(.*\.bn|last_bn)\.bias": r"\1.bias",
    r"(.*)\.running_mean": r"\1.mean",
    r"(.*)\.running_var": r"\1.var",
    r".*\.num_batches_tracked": None,
    r"logits\..*": None,
}


def options_of(shapes: Shapes, file: str) -> dict[str, Any] | None:
    """The network that arrays of these names are of; None if not of this family."""
    if not {"conv2d_1a.conv.weight", "last_linear.weight"} <= set(shapes):
        return None
    repeats = []
    for stage in (1, 2, 3):
        blocks = 0
        while f"repeat_{stage}.{blocks}.conv2d.weight" in shapes:
            blocks += 1
        repeats.append(blocks)
    return {"repeats": tuple(repeats)}


def rules_of(shapes: Shapes) -> Rules:
    return RULES


def title_of(options: Mapping[str, Any]) -> str:
    return "Inception-ResNet-v1 (FaceNet)"
