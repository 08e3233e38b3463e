"""Embedding networks in Flax NNX."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array


class EmbeddingCNN(nnx.Module):
    """A small convolutional network from images of any size to unit vectors.

    Each stage is two 3 x 3 convolutions with group normalisation, and all but the last
    end in pooling by half. The mean and the maximum over the image feed a linear layer.

    Args:
        dim: number of dimensions of the embedding.
        channels: number of channels of each stage, multiples of 8.
        in_channels: number of channels of the images.
        rngs: Flax random number streams, with ``params``.
    """

    def __init__(
        self,
        dim: int = 64,
        *,
        channels: Sequence[int] = (32, 64),
        in_channels: int = 1,
        rngs: nnx.Rngs,
    ):
        stages = []
        for out in channels:
            stages.append(nnx.List([_Layer(in_channels, out, rngs=rngs)]))
            stages[-1].append(_Layer(out, out, rngs=rngs))
            in_channels = out
        self.stages = nnx.List(stages)
        self.head = nnx.Linear(2 * in_channels, dim, rngs=rngs)

    def __call__(self, images: Array) -> Array:
        """Embeds images.

        Args:
            images: floats from 0 to 1, ``[n, height, width, channels]``.

        Returns:
            Unit vectors ``[n, dim]``.
        """
        x = images
        for place, stage in enumerate(self.stages):
            if place:
                x = nnx.max_pool(x, (2, 2), strides=(2, 2), padding="SAME")
            for layer in stage:
                x = layer(x)
        pooled = jnp.concatenate([x.mean(axis=(1, 2)), x.max(axis=(1, 2))], axis=-1)
        return unit_norm(self.head(pooled))


class _Layer(nnx.Module):
    def __init__(self, in_channels: int, out_channels: int, *, rngs: nnx.Rngs):
        self.convolution = nnx.Conv(
            in_channels, out_channels, (3, 3), use_bias=False, rngs=rngs
        )
        self.norm = nnx.GroupNorm(out_channels, num_groups=8, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return jax.nn.relu(self.norm(self.convolution(x)))


def unit_norm(x: Array) -> Array:
    """Scales vectors to length 1; shorter ones than 1e-6 stay short."""
    squared = jnp.sum(x * x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(squared, 1e-12))
