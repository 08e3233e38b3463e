"""Layers of embedding networks in Flax NNX.

`options` are ``dtype`` and ``rngs`` of the layers of Flax.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from tripletjax.learn.networks.convolution import (
    HE_NORMAL,
    LECUN_NORMAL,
    convolution,
    pad,
    reshape_images,
)

# Orientations of the edges that `EmbeddingPhotoNet` sees.
ORIENTATIONS = 8


def resized(images: Array, side: int) -> Array:
    """Resize images to squares, linearly, as `jax.image.resize` does.

    Products with matrices can be exported for any number of images.
    """
    rows, columns = (_interpolation(n, side) for n in images.shape[1:3])
    return jnp.einsum("ih,nhwc,jw->nijc", rows, images, columns, precision="highest")


def _interpolation(n: int, side: int) -> np.ndarray:
    """Weights ``[side, n]`` of n pixels for each of `side` cells."""
    scale = n / side
    centre = (np.arange(side) + 0.5) * scale - 0.5
    near = 1 - np.abs(np.arange(n) - centre[:, None]) / max(scale, 1)
    near = np.maximum(near, 0)
    return (near / near.sum(axis=1, keepdims=True)).astype(np.float32)


class Stages(nnx.Module):
    """Stages of two layers, with pooling by half between; then mean and maximum."""

    def __init__(self, channels: Sequence[int], in_channels: int, **options: Any):
        stages = []
        for out in channels:
            layers = [Layer(width, out, **options) for width in (in_channels, out)]
            stages.append(nnx.List(layers))
            in_channels = out
        self.stages = nnx.List(stages)

    def __call__(self, x: Array) -> Array:
        for index, stage in enumerate(self.stages):
            if index:
                x = halved(x)
            for layer in stage:
                x = layer(x)
        return jnp.concatenate([x.mean(axis=(1, 2)), largest(x, (1, 2))], axis=-1)


class Residual(nnx.Module):
    def __init__(
        self, in_channels: int, out_channels: int, stride: int, **options: Any
    ):
        self.first = Layer(in_channels, out_channels, stride=stride, **options)
        self.second = Layer(out_channels, out_channels, active=False, **options)
        changes = stride > 1 or in_channels != out_channels
        self.shortcut = (
            _conv(in_channels, out_channels, (1, 1), stride, **options)
            if changes
            else None
        )

    def __call__(self, x: Array) -> Array:
        short = x if self.shortcut is None else self.shortcut(x)
        return jax.nn.relu(short + self.second(self.first(x)))


class Layer(nnx.Module):
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        size: tuple[int, int] = (3, 3),
        stride: int = 1,
        *,
        active: bool = True,
        **options: Any,
    ):
        self.convolution = _conv(in_channels, out_channels, size, stride, **options)
        self.norm = GroupNorm(out_channels)
        self.active = active

    def __call__(self, x: Array) -> Array:
        x = self.norm(self.convolution(x))
        return jax.nn.relu(x) if self.active else x


def _convolved(
    x: Array, kernel: Array, strides: Sequence[int], padding: Any, **_: Any
) -> Array:
    """Convolution as Flax calls it, one function for all layers and networks."""
    return convolution(x, kernel, strides[0], padding)


_conv = functools.partial(
    nnx.Conv, use_bias=False, kernel_init=LECUN_NORMAL, conv_general_dilated=_convolved
)


class GroupNorm(nnx.Module):
    """Group normalisation of images, with a scale and a shift of each channel.

    Over the pixels and the channels of a group, ``y = (x - mean) / sqrt(var + eps)``.
    Sums over the pixels of each channel come first, which vectorises. With its gradient
    it takes a fifth of the time of `nnx.GroupNorm` on CPUs.

    Args:
        channels: number of channels of the images.
        groups: number of groups of channels.
        eps: added to the variance.

    References:
        Wu, He. Group Normalization. 2018. arXiv:1803.08494
    """

    def __init__(self, channels: int, *, groups: int = 8, eps: float = 1e-6):
        if channels % groups:
            raise ValueError(
                f"channels must be a multiple of {groups}, got {channels}."
            )
        self.scale = nnx.Param(jnp.ones(channels))
        self.shift = nnx.Param(jnp.zeros(channels))
        self.groups, self.eps = groups, eps

    def __call__(self, x: Array) -> Array:
        exact = x.astype(jnp.float32)
        sums = exact.mean(axis=(1, 2)), (exact * exact).mean(axis=(1, 2))
        mean, square = (
            jnp.repeat(
                total.reshape(x.shape[0], self.groups, -1).mean(axis=-1),
                x.shape[-1] // self.groups,
                axis=-1,
            )
            for total in sums
        )
        variance = jnp.maximum(square - mean * mean, 0)
        scale = self.scale[...] * jax.lax.rsqrt(variance + self.eps)
        shift = self.shift[...] - mean * scale
        scale, shift = (v[:, None, None, :].astype(x.dtype) for v in (scale, shift))
        return x * scale + shift


class StandardizedConv(nnx.Module):
    """A convolution whose kernels have mean 0 and preserve the variance."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        size: int,
        *,
        dtype: DTypeLike | None,
        rngs: nnx.Rngs,
    ):
        shape = size, size, in_channels, out_channels
        self.kernel = nnx.Param(HE_NORMAL(rngs.params(), shape))
        self.gain = nnx.Param(jnp.ones(out_channels))
        self.bias = nnx.Param(jnp.zeros(out_channels))
        self.dtype = dtype

    def __call__(self, x: Array) -> Array:
        kernel = self.kernel[...]
        kernel = kernel - kernel.mean(axis=(0, 1, 2))
        fan_in = kernel[..., 0].size
        kernel *= self.gain[...] * jax.lax.rsqrt(
            fan_in * jnp.mean(kernel * kernel, axis=(0, 1, 2)) + 1e-4
        )
        x, kernel, bias = nnx.nn.dtypes.promote_dtype(
            (x, kernel, self.bias[...]), dtype=self.dtype
        )
        return convolution(x, kernel, padding="SAME") + bias


class StandardizedBlock(nnx.Module):
    def __init__(self, channels: int, **options: Any):
        self.first = StandardizedConv(channels, channels, 3, **options)
        self.second = StandardizedConv(channels, channels, 3, **options)
        # A block begins close to the identity.
        self.scale = nnx.Param(jnp.array(0.2))

    def __call__(self, x: Array) -> Array:
        y = self.second(jax.nn.relu(self.first(x)))
        return x + self.scale[...].astype(y.dtype) * y


def oriented_edges(images: Array, orientations: int = ORIENTATIONS) -> Array:
    """Strength of edges of each orientation, relative to the edges around.

    ``e = max(0, dx cos(t) + dy sin(t))`` is averaged over every 2 x 2 pixels, and
    divided by the root mean square over 9 x 9 such positions. The result is the square
    root, minus 0.5. Local brightness and contrast hardly change it.

    Args:
        images: floats ``[n, height, width, channels]``; the channels' mean counts.
        orientations: number of orientations.

    Returns:
        Floats ``[n, height / 2, width / 2, orientations]``, rounded up.

    References:
        Dalal, Triggs. Histograms of Oriented Gradients for Human Detection. 2005.
    """
    grey = images.mean(axis=-1)
    for axis in (1, 2):
        grey = pad(grey, axis, 1, 1, value=None)
    right = grey[:, 1:-1, 2:] - grey[:, 1:-1, :-2]
    down = grey[:, 2:, 1:-1] - grey[:, :-2, 1:-1]
    angles = 2 * jnp.pi * jnp.arange(orientations) / orientations
    edges = jax.nn.relu(
        right[..., None] * jnp.cos(angles) + down[..., None] * jnp.sin(angles)
    )
    edges = halved(edges, jnp.mean)
    energy = (edges * edges).mean(axis=-1)
    for axis in (1, 2):
        wide, n = pad(energy, axis, 4, 4, value=None), energy.shape[axis]
        shifted = [
            jax.lax.slice_in_dim(wide, index, index + n, axis=axis)
            for index in range(9)
        ]
        energy = functools.reduce(jnp.add, shifted)
    around = jax.lax.rsqrt(energy[..., None] / 81 + 1e-3)
    return jnp.sqrt(edges * around + 1e-4) - 0.5


def pad_to_even(x: Array) -> Array:
    """Pad the odd sides of images ``[n, height, width, channels]``."""
    for axis in (1, 2):
        x = pad(x, axis, 0, x.shape[axis] % 2, value=None)
    return x


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def largest(x: Array, axis: tuple[int, ...]) -> Array:
    """The maximum over some axes, with a gradient that is never 0 / 0.

    The gradient of `jnp.max` goes to the positions that equal the maximum. XLA may
    compute the argument twice, rounded in two ways, and then no position equals it.
    Here positions within a few roundings share the gradient.
    """
    return jnp.max(x, axis=axis)


@largest.defjvp
def _largest_jvp(axis: tuple[int, ...], primals: tuple, tangents: tuple) -> tuple:
    (x,), (dot,) = primals, tangents
    most = jnp.max(x, axis=axis, keepdims=True)
    near = 4 * jnp.finfo(x.dtype).eps * jnp.maximum(jnp.abs(most), 1)
    here = (x >= most - near).astype(x.dtype)
    count = jnp.maximum(jnp.sum(here, axis=axis), 1)
    return jnp.squeeze(most, axis), jnp.sum(dot * here, axis=axis) / count


def halved(x: Array, of: Callable[..., Array] = largest) -> Array:
    """Pool every 2 x 2 pixels by the maximum or ``of``; odd sides repeat a pixel.

    XLA's gradient of pooling by windows takes 7 times as long on CPUs.
    """
    x = pad_to_even(x)
    _, height, width, channels = x.shape
    return of(reshape_images(x, height // 2, 2, width // 2, 2, channels), (2, 4))


def unit_norm(x: Array) -> Array:
    """Scale vectors to unit norm, in float32; below 1e-6 they stay short."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    squared = jnp.sum(x * x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(squared, 1e-12))
