"""Networks from images to embeddings, trained from scratch."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from tripletjax.learn import choices
from tripletjax.learn.networks.convolution import reshape_images, space_to_depth
from tripletjax.learn.networks.layers import (
    ORIENTATIONS,
    Layer,
    Residual,
    Stages,
    StandardizedBlock,
    StandardizedConv,
    halved,
    largest,
    oriented_edges,
    pad_to_even,
    resized,
    unit_norm,
)


class EmbeddingCNN(nnx.Module):
    """A small convolutional network from images of any size to unit vectors.

    Each stage is two 3 x 3 convolutions with group normalisation, and all but the last
    end in pooling by half. The mean and the maximum over the image feed a linear layer.

    Args:
        dim: dimensions of the embedding.
        channels: number of channels of each stage, multiples of 8.
        in_channels: number of channels of the images.
        dtype: of the computation; parameters stay float32.
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
        self.stages = Stages(channels, in_channels, dtype=dtype, rngs=rngs)
        self.head = nnx.Linear(2 * channels[-1], dim, dtype=dtype, rngs=rngs)

    def __call__(self, images: Array) -> Array:
        """Unit vectors ``[n, dim]`` of images ``[n, height, width, c]`` from 0 to 1."""
        return unit_norm(self.head(self.stages(images)))


class EmbeddingResNet(nnx.Module):
    """A residual network from images of any size to unit vectors.

    After a first convolution, each stage has residual blocks of two 3 x 3 convolutions
    with group normalisation. All stages but the first halve the image. The mean over
    the image feeds a linear layer.

    Args:
        dim: dimensions of the embedding.
        channels: number of channels of each stage, multiples of 8.
        blocks: number of blocks of a stage.
        stride: of the first convolution. 2 takes at most a quarter of the time; 1 is
            for images of about 32 pixels, which have no detail to lose.
        in_channels: number of channels of the images.
        dtype: of the computation; parameters stay float32.
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
        self.stem = Layer(in_channels, channels[0], (size, size), stride, **options)
        layers, width = [], channels[0]
        for index, out in enumerate(channels):
            for block in range(blocks):
                halves = index > 0 and block == 0
                layers.append(Residual(width, out, 1 + halves, **options))
                width = out
        self.blocks = nnx.List(layers)
        self.head = nnx.Linear(width, dim, **options)

    def __call__(self, images: Array) -> Array:
        """Unit vectors ``[n, dim]`` of images ``[n, height, width, c]`` from 0 to 1."""
        x = self.stem(images)
        for block in self.blocks:
            x = block(x)
        return unit_norm(self.head(x.mean(axis=(1, 2))))


class EmbeddingPhotoNet(nnx.Module):
    """A residual network from photographs of one size to unit vectors, fast on CPUs.

    The network sees `oriented_edges` of the images, and their means over 2 x 2 pixels.
    Stages of residual blocks of two 3 x 3 convolutions follow a first convolution.
    Between stages every 2 x 2 positions become one with four times the channels, which
    a 1 x 1 convolution reduces. This is three times as fast on CPUs as a convolution of
    stride 2. Kernels are standardised; activations are normalised before the head only.

    Args:
        dim: dimensions of the embedding.
        size: height and width of the images, in pixels.
        head: ``"grid"`` is a linear layer over all positions of the last feature map,
            for images of one layout, such as faces. ``"mean"`` takes the mean and the
            maximum over all positions.
        channels: number of channels of the first convolution and of each stage.
        blocks: number of blocks of a stage.
        in_channels: number of channels of the images.
        dtype: of the computation; parameters stay float32.
        rngs: Flax random number streams, with ``params``.

    Raises:
        ValueError: if head has another value; when called, for images of another size.

    References:
        He, Zhang, Ren, Sun. Deep Residual Learning for Image Recognition. 2015.
        arXiv:1512.03385
        Qiao, Wang, Liu, Shen, Yuille. Micro-Batch Training with Batch-Channel
        Normalization and Weight Standardization. 2019. arXiv:1903.10520
    """

    def __init__(
        self,
        dim: int = 128,
        *,
        size: tuple[int, int] = (64, 64),
        head: str = "grid",
        channels: Sequence[int] = (16, 32, 64, 128),
        blocks: int = 1,
        in_channels: int = 1,
        dtype: DTypeLike | None = None,
        rngs: nnx.Rngs,
    ):
        if head not in choices.HEADS:
            words = ", ".join(choices.HEADS)
            raise ValueError(f"head must be one of {words}, got {head!r}.")
        options = {"dtype": dtype, "rngs": rngs}
        self.size, self.grid = tuple(size), head == "grid"
        stem_in = ORIENTATIONS + in_channels
        self.stem = StandardizedConv(stem_in, channels[0], 3, **options)
        stages, width = [], channels[0]
        sides = [-(-side // 2) for side in size]
        for out in channels[1:]:
            sides = [-(-side // 2) for side in sides]
            layers = [StandardizedConv(4 * width, out, 1, **options)]
            layers += [StandardizedBlock(out, **options) for _ in range(blocks)]
            stages.append(nnx.List(layers))
            width = out
        self.stages = nnx.List(stages)
        self.norm = nnx.LayerNorm(width, dtype=dtype, rngs=rngs)
        features = sides[0] * sides[1] if self.grid else 2
        self.head = nnx.Linear(features * width, dim, **options)

    def __call__(self, images: Array) -> Array:
        """Unit vectors ``[n, dim]`` of images of its size, floats from 0 to 1."""
        if images.shape[1:3] != self.size:
            raise ValueError(
                f"images must be {self.size[0]} x {self.size[1]} pixels, got "
                f"{images.shape[1]} x {images.shape[2]}."
            )
        small = halved(images, jnp.mean)
        x = jnp.concatenate([oriented_edges(images), small], axis=-1)
        x = jax.nn.relu(self.stem(x))
        for stage in self.stages:
            x = space_to_depth(pad_to_even(x), 2)
            for layer in stage:
                x = jax.nn.relu(layer(x))
        x = self.norm(x)
        if self.grid:
            x = reshape_images(x, math.prod(x.shape[1:]))
        else:
            x = jnp.concatenate([x.mean(axis=(1, 2)), largest(x, (1, 2))], axis=-1)
        return unit_norm(self.head(x))


class MultiScaleCNN(nnx.Module):
    """Deep Ranking: a deep path and two shallow paths at low resolution.

    The deep path is an `EmbeddingCNN` without its head. The shallow paths see the image
    at 64 and 32 pixels through one wide convolution. The vectors of all paths have unit
    norm before the head joins them.

    Args:
        dim: dimensions of the embedding.
        channels: number of channels of each stage of the deep path, multiples of 8.
        shallow: number of channels of each shallow path, a multiple of 8.
        in_channels: number of channels of the images.
        dtype: of the computation; parameters stay float32.
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
        self.deep = Stages(channels, in_channels, **options)
        self.paths = nnx.List(
            [Layer(in_channels, shallow, (8, 8), 4, **options) for _ in range(2)]
        )
        self.head = nnx.Linear(2 * channels[-1] + 2 * 16 * shallow, dim, **options)

    def __call__(self, images: Array) -> Array:
        """Unit vectors ``[n, dim]`` of images ``[n, height, width, c]`` from 0 to 1."""
        parts = [unit_norm(self.deep(images))]
        for path, side in zip(self.paths, (64, 32)):
            # Coarse images of one size, whatever the size of the images.
            x = path(resized(images, side))
            _, height, _, channels = x.shape
            # The mean of each of 4 x 4 positions.
            x = reshape_images(x, 4, height // 4, 4, height // 4, channels).mean((2, 4))
            parts.append(unit_norm(reshape_images(x, 16 * channels)))
        return unit_norm(self.head(jnp.concatenate(parts, axis=-1)))


class Standardized(nnx.Module):
    """A model whose images have mean 0 and standard deviation 1.

    Args:
        model: from images to unit vectors.
        mean: of each channel.
        std: standard deviation of each channel.
        mirror: whether the embeddings of an image and its mirror image are averaged
            after training.
    """

    def __init__(
        self,
        model: nnx.Module,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        mirror: bool = False,
    ):
        self.model, self.mirror = model, mirror
        self.mean, self.std = tuple(mean), tuple(std)
        # `train` and `eval` of Flax set this attribute.
        self.deterministic = False

    def __call__(self, images: Array) -> Array:
        images = (images - jnp.array(self.mean)) / jnp.array(self.std)
        x = self.model(images)
        if self.mirror and self.deterministic:
            x = unit_norm(x + self.model(images[:, :, ::-1]))
        return x


MODELS = {name: globals()[network] for name, network in choices.MODELS.items()}
