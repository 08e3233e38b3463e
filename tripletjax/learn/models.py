"""Embedding networks in Flax NNX."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike


class EmbeddingCNN(nnx.Module):
    """A small convolutional network from images of any size to unit vectors.

    Each stage is two 3 x 3 convolutions with group normalisation, and all but the last
    end in pooling by half. The mean and the maximum over the image feed a linear layer.

    Args:
        dim: number of dimensions of the embedding.
        channels: number of channels of each stage, multiples of 8.
        in_channels: number of channels of the images.
        dtype: what is computed in; parameters stay float32.
        rngs: Flax random number streams, with ``params``.
    """

    def __init__(
        self,
        dim: int = 64,
        *,
        channels: Sequence[int] = (32, 64),
        in_channels: int = 1,
        dtype: DTypeLike | None = None,
        rngs: nnx.Rngs,
    ):
        self.stages = _Stages(channels, in_channels, dtype=dtype, rngs=rngs)
        self.head = nnx.Linear(2 * channels[-1], dim, dtype=dtype, rngs=rngs)

    def __call__(self, images: Array) -> Array:
        """Embeds images.

        Args:
            images: floats from 0 to 1, ``[n, height, width, channels]``.

        Returns:
            Unit vectors ``[n, dim]``.
        """
        return unit_norm(self.head(self.stages(images)))


class EmbeddingResNet(nnx.Module):
    """A residual network from images of any size to unit vectors.

    After a first convolution, each stage is some blocks of two 3 x 3 convolutions with
    group normalisation, added to what comes in; all but the first halve the image. The
    mean over the image feeds a linear layer.

    Args:
        dim: number of dimensions of the embedding.
        channels: number of channels of each stage, multiples of 8.
        blocks: how many blocks a stage has.
        stride: of the first convolution. 2 costs a quarter, or less; 1 is for images
            of some 32 pixels, which have no detail to lose.
        in_channels: number of channels of the images.
        dtype: what is computed in; parameters stay float32.
        rngs: Flax random number streams, with ``params``.

    References:
        He, Zhang, Ren, Sun. Deep Residual Learning for Image Recognition. 2015.
        arXiv:1512.03385
    """

    def __init__(
        self,
        dim: int = 64,
        *,
        channels: Sequence[int] = (32, 64, 128),
        blocks: int = 2,
        stride: int = 2,
        in_channels: int = 3,
        dtype: DTypeLike | None = None,
        rngs: nnx.Rngs,
    ):
        options = {"dtype": dtype, "rngs": rngs}
        size = 2 * stride + 1
        self.stem = _Layer(in_channels, channels[0], (size, size), stride, **options)
        layers, width = [], channels[0]
        for place, out in enumerate(channels):
            for block in range(blocks):
                halves = place > 0 and block == 0
                layers.append(_Residual(width, out, 1 + halves, **options))
                width = out
        self.blocks = nnx.List(layers)
        self.head = nnx.Linear(width, dim, **options)

    def __call__(self, images: Array) -> Array:
        """Embeds images.

        Args:
            images: floats from 0 to 1, ``[n, height, width, channels]``.

        Returns:
            Unit vectors ``[n, dim]``.
        """
        x = self.stem(images)
        for block in self.blocks:
            x = block(x)
        return unit_norm(self.head(x.mean(axis=(1, 2))))


class MultiScaleCNN(nnx.Module):
    """Deep Ranking: a deep path joined by two shallow ones at low resolution.

    The deep path is an `EmbeddingCNN` without its head; the shallow paths see the image
    at a quarter and an eighth of its size through one wide convolution, for what is
    visible from afar. Each is normalised before they are joined.

    Args:
        dim: number of dimensions of the embedding.
        channels: number of channels of each stage of the deep path, multiples of 8.
        shallow: number of channels of either shallow path, a multiple of 8.
        in_channels: number of channels of the images.
        dtype: what is computed in; parameters stay float32.
        rngs: Flax random number streams, with ``params``.

    References:
        Wang et al. Learning Fine-Grained Image Similarity with Deep Ranking. 2014.
        arXiv:1404.4661
    """

    def __init__(
        self,
        dim: int = 64,
        *,
        channels: Sequence[int] = (32, 64, 128),
        shallow: int = 32,
        in_channels: int = 3,
        dtype: DTypeLike | None = None,
        rngs: nnx.Rngs,
    ):
        options = {"dtype": dtype, "rngs": rngs}
        self.deep = _Stages(channels, in_channels, **options)
        self.paths = nnx.List(
            [_Layer(in_channels, shallow, (8, 8), 4, **options) for _ in range(2)]
        )
        self.head = nnx.Linear(2 * channels[-1] + 2 * 16 * shallow, dim, **options)

    def __call__(self, images: Array) -> Array:
        """Embeds images.

        Args:
            images: floats from 0 to 1, ``[n, height, width, channels]``.

        Returns:
            Unit vectors ``[n, dim]``.
        """
        parts = [unit_norm(self.deep(images))]
        n, _, _, channels = images.shape
        for path, side in zip(self.paths, (64, 32)):
            # Coarse images of one size, whatever the size of the images.
            coarse = jax.image.resize(images, (n, side, side, channels), "linear")
            x = path(coarse)
            x = nnx.avg_pool(x, (side // 16,) * 2, strides=(side // 16,) * 2)
            parts.append(unit_norm(x.reshape(n, -1)))
        return unit_norm(self.head(jnp.concatenate(parts, axis=-1)))


class _Stages(nnx.Module):
    """Stages of two layers, pooled by half between them; then mean and maximum."""

    def __init__(
        self,
        channels: Sequence[int],
        in_channels: int,
        *,
        dtype: DTypeLike | None,
        rngs: nnx.Rngs,
    ):
        stages = []
        for out in channels:
            layers = [
                _Layer(width, out, dtype=dtype, rngs=rngs)
                for width in (in_channels, out)
            ]
            stages.append(nnx.List(layers))
            in_channels = out
        self.stages = nnx.List(stages)

    def __call__(self, x: Array) -> Array:
        for place, stage in enumerate(self.stages):
            if place:
                x = halved(x)
            for layer in stage:
                x = layer(x)
        return jnp.concatenate([x.mean(axis=(1, 2)), x.max(axis=(1, 2))], axis=-1)


class _Residual(nnx.Module):
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        *,
        dtype: DTypeLike | None,
        rngs: nnx.Rngs,
    ):
        options = {"dtype": dtype, "rngs": rngs}
        self.first = _Layer(in_channels, out_channels, stride=stride, **options)
        self.second = _Layer(out_channels, out_channels, active=False, **options)
        changes = stride > 1 or in_channels != out_channels
        self.shortcut = (
            nnx.Conv(
                in_channels, out_channels, (1, 1), stride, use_bias=False, **options
            )
            if changes
            else None
        )

    def __call__(self, x: Array) -> Array:
        short = x if self.shortcut is None else self.shortcut(x)
        return jax.nn.relu(short + self.second(self.first(x)))


class _Layer(nnx.Module):
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        size: tuple[int, int] = (3, 3),
        stride: int = 1,
        *,
        active: bool = True,
        dtype: DTypeLike | None,
        rngs: nnx.Rngs,
    ):
        self.convolution = nnx.Conv(
            in_channels,
            out_channels,
            size,
            stride,
            use_bias=False,
            dtype=dtype,
            rngs=rngs,
        )
        self.norm = nnx.GroupNorm(out_channels, num_groups=8, dtype=dtype, rngs=rngs)
        self.active = active

    def __call__(self, x: Array) -> Array:
        x = self.norm(self.convolution(x))
        return jax.nn.relu(x) if self.active else x


def halved(x: Array) -> Array:
    """The maximum of every 2 x 2 pixels; of fewer at the end of an odd side.

    XLA's gradient of pooling by windows takes 7 times longer on CPUs.
    """
    n, height, width, channels = x.shape
    x = jnp.pad(x, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), "edge")
    height, width = -(-height // 2), -(-width // 2)
    return x.reshape(n, height, 2, width, 2, channels).max(axis=(2, 4))


def unit_norm(x: Array) -> Array:
    """Scales vectors to length 1, in float32; shorter ones than 1e-6 stay short."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    squared = jnp.sum(x * x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(squared, 1e-12))
