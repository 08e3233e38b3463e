"""Layers as PyTorch has them, in forms that are fast on CPUs and can be exported."""

import contextlib
import contextvars
import functools
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from tripletjax.learn.networks.convolution import HE_NORMAL, convolution, pad


class BatchNorm(nnx.Module):
    """Batch normalisation with frozen or learned statistics.

    ``y = (x - mean) / sqrt(var + eps) * scale + bias``

    Args:
        channels: of the input, its last axis.
        eps: added to the variance.
        learn_statistics: whether training uses the statistics of the batch, and the
            kept ones follow them: for networks trained from scratch.
    """

    def __init__(
        self, channels: int, *, eps: float = 1e-5, learn_statistics: bool = False
    ):
        self.scale = nnx.Param(jnp.ones(channels))
        self.bias = nnx.Param(jnp.zeros(channels))
        self.mean = nnx.BatchStat(jnp.zeros(channels))
        self.var = nnx.BatchStat(jnp.ones(channels))
        self.eps, self.learn_statistics = eps, learn_statistics
        # What `train` and `eval` of Flax set.
        self.deterministic = False

    def __call__(self, x: Array) -> Array:
        mean, var = self.mean[...], self.var[...]
        if self.learn_statistics and not self.deterministic:
            axes = tuple(range(x.ndim - 1))
            exact = x.astype(jnp.float32)
            mean = exact.mean(axes)
            var = jnp.maximum((exact * exact).mean(axes) - mean * mean, 0)
            n = x.size // x.shape[-1]
            # As PyTorch: the kept variance is without bias.
            for kept, new in ((self.mean, mean), (self.var, var * (n / max(n - 1, 1)))):
                kept[...] = 0.9 * kept[...] + 0.1 * jax.lax.stop_gradient(new)
        scale = self.scale[...] * jax.lax.rsqrt(var + self.eps)
        shift = self.bias[...] - mean * scale
        return x * scale.astype(x.dtype) + shift.astype(x.dtype)


class Conv(nnx.Module):
    """A convolution whose padding is the same at both ends.

    Args:
        in_channels: of what comes in.
        out_channels: of what comes out.
        size: of the kernel, height and width if they differ.
        stride: how far apart its outputs are.
        padding: how many zeros are added at each end, down and across if they differ.
        bias: whether one is added.
        dtype: what is computed in; parameters stay float32.
        rngs: Flax random number streams, with ``params``.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        size: int | tuple[int, int],
        stride: int = 1,
        padding: int | tuple[int, int] = 0,
        *,
        bias: bool = False,
        dtype: DTypeLike | None,
        rngs: nnx.Rngs,
    ):
        height, width = (size, size) if isinstance(size, int) else size
        down, across = (padding, padding) if isinstance(padding, int) else padding
        shape = height, width, in_channels, out_channels
        self.kernel = nnx.Param(HE_NORMAL(rngs.params(), shape))
        self.bias = nnx.Param(jnp.zeros(out_channels)) if bias else None
        self.stride, self.padding = stride, ((down, down), (across, across))
        self.dtype = dtype

    def __call__(self, x: Array) -> Array:
        x, kernel = nnx.nn.dtypes.promote_dtype((x, self.kernel[...]), dtype=self.dtype)
        y = convolution(x, kernel, self.stride, self.padding)
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)


_whole = contextvars.ContextVar("whole", default=False)


@contextlib.contextmanager
def whole_depthwise() -> Iterator[None]:
    """Trace depthwise convolutions as one operation each, for export formats.

    Otherwise a 7 x 7 kernel is a sum of 49 shifted images, hundreds of operations.
    """
    token = _whole.set(True)
    try:
        yield
    finally:
        _whole.reset(token)


class DepthwiseConv(nnx.Module):
    """A convolution of each channel by itself, of an odd size, as large as the image.

    A sum of shifted images: XLA's own takes many times longer on CPUs.

    Args:
        channels: of what comes in.
        size: of the kernel.
        dtype: what is computed in.
        rngs: Flax random number streams, with ``params``.
    """

    def __init__(
        self, channels: int, size: int, *, dtype: DTypeLike | None, rngs: nnx.Rngs
    ):
        shape = size, size, 1, channels
        self.kernel = nnx.Param(HE_NORMAL(rngs.params(), shape))
        self.bias = nnx.Param(jnp.zeros(channels))
        self.dtype = dtype

    def __call__(self, x: Array) -> Array:
        x, kernel, bias = nnx.nn.dtypes.promote_dtype(
            (x, self.kernel[...], self.bias[...]), dtype=self.dtype
        )
        if _whole.get():
            y = jax.lax.conv_general_dilated(
                *(x, kernel, (1, 1), "SAME"),
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
                feature_group_count=x.shape[-1],
            )
            return y + bias
        size, _, height, width = *kernel.shape[:2], *x.shape[1:3]
        wide, side = x, size // 2
        for axis in (1, 2):
            wide = pad(wide, axis, side, side)
        total = jnp.zeros_like(x)
        for down in range(size):
            for right in range(size):
                part = wide[:, down : down + height, right : right + width]
                total += part * kernel[down, right, 0]
        return total + bias


def max_pool(x: Array, size: int, stride: int, padding: int = 0) -> Array:
    """The maximum over windows of images ``[n, height, width, channels]``.

    The maximum over rows comes first, then that over columns. A window of XLA has a
    slow gradient on CPUs. Padding is less than every number.
    """
    lowest = float(jnp.finfo(x.dtype).min)
    for axis in (1, 2):
        x = pad(x, axis, padding, padding, value=lowest)
        outputs = (x.shape[axis] - size) // stride + 1
        parts = [
            jax.lax.slice_in_dim(
                x, start, start + (outputs - 1) * stride + 1, stride, axis=axis
            )
            for start in range(size)
        ]
        x = functools.reduce(jnp.maximum, parts)
    return x


def through(layers: Iterable[Any], x: Array) -> Array:
    """Apply layers one after the other."""
    for layer in layers:
        x = layer(x)
    return x


class LayerScale(nnx.Module):
    """A factor for each channel of what a block adds."""

    def __init__(self, channels: int, value: float = 1e-6):
        self.gamma = nnx.Param(jnp.full(channels, value))

    def __call__(self, x: Array) -> Array:
        return x * self.gamma[...].astype(x.dtype)


class Mlp(nnx.Module):
    """Two linear layers with a GELU between."""

    def __init__(
        self, width: int, hidden: int, *, dtype: DTypeLike | None, rngs: nnx.Rngs
    ):
        self.fc1 = nnx.Linear(width, hidden, dtype=dtype, rngs=rngs)
        self.fc2 = nnx.Linear(hidden, width, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.fc2(jax.nn.gelu(self.fc1(x), approximate=False))


def cubic_weights(
    size: int, out: int, *, antialias: bool = False, offset: float = 0.0
) -> np.ndarray:
    """Weights of `size` pixels for each of `out`, as PyTorch interpolates cubically.

    Args:
        size: of what is interpolated.
        out: of what is made of it.
        antialias: whether, made smaller, all that a pixel covers counts.
        offset: added to `out` for the scale, as DINOv2's own code does.

    Returns:
        Weights ``[out, size]``, whose rows sum to 1.
    """
    scale = size / (out + offset)
    centre = (np.arange(out) + 0.5) * scale
    spread = max(scale, 1.0) if antialias else 1.0
    # Their two filters differ in this.
    a = -0.5 if antialias else -0.75
    weights = np.zeros((out, size))
    for row, middle in enumerate(centre):
        first = int(np.floor(middle - 2 * spread - 1))
        pixels = np.arange(first, int(np.ceil(middle + 2 * spread + 1)))
        if antialias:
            pixels = pixels[(pixels >= 0) & (pixels < size)]
        x = np.abs(pixels + 0.5 - middle) / spread
        near = np.where(
            x < 1,
            ((a + 2) * x - (a + 3)) * x * x + 1,
            np.where(x < 2, ((a * x - 5 * a) * x + 8 * a) * x - 4 * a, 0),
        )
        np.add.at(weights[row], np.clip(pixels, 0, size - 1), near / near.sum())
    return weights
