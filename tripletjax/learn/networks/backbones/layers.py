"""Layers as PyTorch has them, in forms that are fast on CPUs and can be exported.

`options` are ``dtype`` and ``rngs`` of the layers, here and in the networks.
"""

import contextlib
import contextvars
import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from tripletjax.learn.networks.convolution import HE_NORMAL, Padding, convolution, pad


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
    """A convolution.

    Args:
        in_channels: of what comes in.
        out_channels: of what comes out.
        size: of the kernel, height and width if they differ.
        stride: how far apart its outputs are.
        padding: number of zeros at each end, down and across if they differ; or
            ``"SAME"`` of TensorFlow.
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
        padding: int | tuple[int, int] | str = 0,
        *,
        bias: bool = False,
        dtype: DTypeLike | None,
        rngs: nnx.Rngs,
    ):
        height, width = (size, size) if isinstance(size, int) else size
        shape = height, width, in_channels, out_channels
        self.kernel = nnx.Param(HE_NORMAL(rngs.params(), shape))
        self.bias = nnx.Param(jnp.zeros(out_channels)) if bias else None
        self.stride, self.dtype = stride, dtype
        self.padding: str | Padding
        if isinstance(padding, str):
            self.padding = padding
        else:
            down, across = (padding, padding) if isinstance(padding, int) else padding
            self.padding = (down, down), (across, across)

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
    """A convolution of each channel by itself.

    A sum of shifted images: XLA's own takes many times longer on CPUs.

    Args:
        channels: of the input.
        size: of the kernel.
        stride: distance of two outputs in pixels.
        padding: number of zeros at each end, or ``"SAME"`` of TensorFlow.
        bias: whether one is added.
        dtype: of the computation; parameters stay float32.
        rngs: Flax random number streams, with ``params``.
    """

    def __init__(
        self,
        channels: int,
        size: int,
        stride: int = 1,
        padding: int | str = "SAME",
        *,
        bias: bool = True,
        dtype: DTypeLike | None,
        rngs: nnx.Rngs,
    ):
        shape = size, size, 1, channels
        self.kernel = nnx.Param(HE_NORMAL(rngs.params(), shape))
        self.bias = nnx.Param(jnp.zeros(channels)) if bias else None
        self.stride, self.padding, self.dtype = stride, padding, dtype

    def __call__(self, x: Array) -> Array:
        x, kernel = nnx.nn.dtypes.promote_dtype((x, self.kernel[...]), dtype=self.dtype)
        size, stride = kernel.shape[0], self.stride
        if isinstance(self.padding, str):
            pads = jax.lax.padtype_to_pads(
                x.shape[1:3], (size, size), (stride, stride), self.padding
            )
        else:
            pads = [(self.padding, self.padding)] * 2
        if _whole.get():
            y = jax.lax.conv_general_dilated(
                *(x, kernel, (stride, stride), pads),
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
                feature_group_count=x.shape[-1],
            )
        else:
            y = _sum_of_shifts(x, kernel, stride, pads)
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)


def _sum_of_shifts(
    x: Array, kernel: Array, stride: int, pads: Sequence[tuple[int, int]]
) -> Array:
    size = kernel.shape[0]
    for axis, (before, after) in zip((1, 2), pads):
        x = pad(x, axis, before, after)
    # Between the first and the last pixel, in steps of the stride.
    rows, columns = ((n - size) // stride * stride + 1 for n in x.shape[1:3])
    parts = (
        x[:, i : i + rows : stride, j : j + columns : stride] * kernel[i, j, 0]
        for i in range(size)
        for j in range(size)
    )
    return functools.reduce(jnp.add, parts)


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

    def __init__(self, width: int, hidden: int, **options: Any):
        self.fc1 = nnx.Linear(width, hidden, **options)
        self.fc2 = nnx.Linear(hidden, width, **options)

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
