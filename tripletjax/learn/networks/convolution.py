"""Convolutions of images, in forms that are fast on CPUs and that ONNX has."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.nn.initializers import Initializer
from jax.sharding import PartitionSpec

from tripletjax._pairwise.mesh import vary_alike

Padding = tuple[tuple[int, int], tuple[int, int]]
NONE: Padding = ((0, 0), (0, 0))
# Pixels of the largest image that is convolved as one product: XLA's convolution of
# 2 x 2 pixels of 512 channels takes 40 times as long on CPUs (jax 0.10.2).
SMALL = 9
# Pixels whose part of a kernel's gradient is one product on CPUs: their copies stay in
# the cache.
PIXELS = 4096
# An option of XLA. Versions of JAX that do not know an option reject it, so that it is
# passed up to the last version that was tried.
WITHOUT_YNNPACK = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"}
KNOWN_UNTIL = (0, 12)


def jit(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """`jax.jit` without the convolutions and products of YNNPACK on CPUs.

    These take 1.3 to 2 times as long as XLA's own (jax 0.10.2).

    Args:
        function: a function that no other jitted function calls.
        options: options of `jax.jit`.
    """
    jitted = jax.jit(function, **options)
    if jax.__version_info__[:2] > KNOWN_UNTIL:
        return jitted
    jitted_for_cpus = jax.jit(function, compiler_options=WITHOUT_YNNPACK, **options)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        on_cpu = jax.default_backend() == "cpu"
        return (jitted_for_cpus if on_cpu else jitted)(*args, **kwargs)

    return call


def draw_as_matrix(initializer: Initializer) -> Initializer:
    """Draw the kernels of an initializer as matrices; their values stay the same.

    XLA compiles a draw of two axes on CPUs in a tenth of the seconds that it takes for
    four axes (jax 0.10.2 to 0.12).

    Args:
        initializer: of `jax.nn.initializers`.
    """

    def draw(key: Array, shape: Sequence[int], *args: Any, **kwargs: Any) -> Array:
        matrix = math.prod(shape[:-1]), shape[-1]
        return initializer(key, matrix, *args, **kwargs).reshape(shape)

    return draw


HE_NORMAL = draw_as_matrix(jax.nn.initializers.he_normal())
LECUN_NORMAL = draw_as_matrix(jax.nn.initializers.lecun_normal())


def convolution(
    x: Array, kernel: Array, stride: int = 1, padding: str | Padding = NONE
) -> Array:
    """Convolve images with a kernel.

    ``y[n, r, c] = sum over i, j of x[n, stride r + i, stride c + j] @ kernel[i, j]``

    On CPUs, this module computes the gradients of kernels, and all gradients with a
    stride. With XLA's gradients, a step of `EmbeddingResNet` takes 1.2 to 1.4 times as
    long by `jit`, and 1.4 to 1.5 times by `jax.jit` (jax 0.10.2, `benchmarks/step.py
    --gradients`). A convolution has no forward-mode derivative.

    Args:
        x: images ``[n, height, width, channels]``.
        kernel: ``[height, width, channels, output channels]``, of the dtype of x.
        stride: distance of two outputs in pixels, down and across.
        padding: numbers of zeros before and after, down and across; or a name of
            `jax.lax.conv_general_dilated`, such as ``"SAME"``.

    Returns:
        Images ``[n, output height, output width, output channels]``.
    """
    size = kernel.shape[:2]
    if isinstance(padding, str):
        strides = stride, stride
        pads = jax.lax.padtype_to_pads(x.shape[1:3], size, strides, padding)
    else:
        pads = padding
    down, across = pads
    zeros: Padding = tuple(down), tuple(across)
    small = x.shape[1] * x.shape[2] <= SMALL * stride**2
    if stride > 1 and (small or max(size) <= stride):
        x, kernel = _without_stride(x, kernel, stride, zeros)
        return convolution(x, kernel)
    if size == (1, 1) and zeros == NONE:
        # On CPUs faster than a convolution; with its gradients, a third of the time.
        return x @ kernel[0, 0]
    if small:
        return _as_product(x, kernel, zeros)
    return _convolve(*vary_alike(x, kernel), stride, zeros)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _convolve(x: Array, kernel: Array, stride: int, padding: Padding) -> Array:
    return _by_xla(x, kernel, stride, padding)


def _by_xla(x: Array, kernel: Array, stride: int, padding: Padding) -> Array:
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def _convolve_forward(
    x: Array, kernel: Array, stride: int, padding: Padding
) -> tuple[Array, tuple[Array, Array]]:
    return _by_xla(x, kernel, stride, padding), (x, kernel)


def _convolve_back(
    stride: int, padding: Padding, inputs: tuple[Array, Array], along: Array
) -> tuple[Array, Array]:
    def by_xla(x: Array, kernel: Array, along: Array) -> tuple[Array, Array]:
        convolve = functools.partial(_by_xla, stride=stride, padding=padding)
        return jax.vjp(convolve, x, kernel)[1](along)

    def on_cpus(x: Array, kernel: Array, along: Array) -> tuple[Array, Array]:
        def convolve(x: Array) -> Array:
            if stride == 1:
                return _by_xla(x, kernel, stride, padding)
            return convolution(*_without_stride(x, kernel, stride, padding))

        along_x = jax.vjp(convolve, x)[1](along)
        return *along_x, _gradient_of_kernel(x, kernel, along, stride, padding)

    if is_split(inputs[0]):
        # With explicit shardings, each product of parts of the batch would need one.
        return by_xla(*inputs, along)
    return jax.lax.platform_dependent(*inputs, along, cpu=on_cpus, default=by_xla)


_convolve.defvjp(_convolve_forward, _convolve_back)


def _gradient_of_kernel(
    x: Array, kernel: Array, along: Array, stride: int, padding: Padding
) -> Array:
    """Gradient of a kernel, from the gradient ``along`` of the convolved images.

    ``dk[i, j] = sum over n, r, c of x[n, s r + i, s c + j]^T along[n, r, c]``

    With a stride, these are products of the pixels of x at each (i, j) and ``along``.
    Without one, they are products of the rows i of x and ``along``, shifted by j
    columns, which copies less.

    A product takes images far apart in the batch: on several devices, each has
    a share of every product.
    """
    (height, width), (n, rows, columns) = kernel.shape[:2], along.shape[:3]
    at_once = max(PIXELS // (rows * columns), 1)
    at_once = max(size for size in range(1, at_once + 1) if n % size == 0)
    x, along = (a.reshape(at_once, n // at_once, *a.shape[1:]) for a in (x, along))
    left, end = padding[1][0], x.shape[3]
    dtype = jnp.promote_types(x.dtype, jnp.float32)

    def product(index: Array) -> Array:
        images, back = (
            jax.lax.dynamic_index_in_dim(a, index, 1, keepdims=False)
            for a in (x, along)
        )
        if stride == 1:
            images = jnp.pad(images, ((0, 0), padding[0], (0, 0), (0, 0)))
            windows = [images[:, i : i + rows] for i in range(height)]
            before, after = (max(width - 1 - zeros, 0) for zeros in padding[1])
            back = jnp.pad(back, ((0, 0), (0, 0), (before, after), (0, 0)))
            starts = [before + left - j for j in range(width)]
            back = jnp.concatenate([back[:, :, i : i + end] for i in starts], axis=-1)
        else:
            images = jnp.pad(images, ((0, 0), *padding, (0, 0)))
            down, across = (stride * (size - 1) + 1 for size in (rows, columns))
            windows = [
                images[:, i : i + down : stride, j : j + across : stride]
                for i in range(height)
                for j in range(width)
            ]
        windows = jnp.concatenate(windows, axis=-1)
        return jnp.matmul(
            windows.reshape(-1, windows.shape[-1]).T,
            back.reshape(-1, back.shape[-1]),
            preferred_element_type=dtype,
        )

    first, last = kernel.shape[2:]
    shape = kernel.size // last, last
    if stride == 1:
        shape = height * first, width * last
    zero, *_ = vary_alike(jnp.zeros(shape, dtype), x, along)
    total = jax.lax.fori_loop(
        0, n // at_once, lambda index, total: total + product(index), zero
    ).astype(kernel.dtype)
    if stride == 1:
        total = total.reshape(height, first, width, last).transpose(0, 2, 1, 3)
    return total.reshape(kernel.shape)


def _as_product(x: Array, kernel: Array, padding: Padding) -> Array:
    """A convolution without stride as one product, for small images."""
    (height, width), (down, across) = kernel.shape[:2], padding
    x = pad(pad(x, 1, *down), 2, *across)
    rows, columns = x.shape[1] - height + 1, x.shape[2] - width + 1
    windows = [
        x[:, top : top + rows, left : left + columns]
        for top in range(height)
        for left in range(width)
    ]
    return jnp.concatenate(windows, axis=-1) @ kernel.reshape(-1, kernel.shape[-1])


def _without_stride(
    x: Array, kernel: Array, stride: int, padding: Padding
) -> tuple[Array, Array]:
    """Images and a kernel with the same convolution, without stride or padding.

    Every ``stride x stride`` pixels become one pixel with all of their channels.
    """
    if kernel.shape[:2] == (1, 1) and padding == NONE:
        return x[:, ::stride, ::stride], kernel
    kernel_blocks = []
    for axis, (before, after) in zip((1, 2), padding):
        length, size = x.shape[axis], kernel.shape[axis - 1]
        outputs = (length + before + after - size) // stride + 1
        blocks = -(-size // stride)
        x_blocks = outputs + blocks - 1
        x = pad(x, axis, before, x_blocks * stride - length - before)
        kernel = pad(kernel, axis - 1, 0, blocks * stride - size)
        kernel_blocks.append(blocks)
    down, across = kernel_blocks
    channels = x.shape[-1]
    x = space_to_depth(x, stride)
    kernel = kernel.reshape(down, stride, across, stride, channels, -1)
    kernel = kernel.transpose(0, 2, 1, 3, 4, 5)
    return x, kernel.reshape(down, across, stride * stride * channels, -1)


def space_to_depth(x: Array, size: int) -> Array:
    """Merge every ``size x size`` pixels into one pixel with all of their channels.

    Args:
        x: images ``[n, height, width, channels]``.
        size: divisor of height and width.

    Returns:
        Images ``[n, height / size, width / size, size * size * channels]``.
    """
    _, height, width, channels = x.shape
    height, width = height // size, width // size
    x = reshape_images(x, height, size, width, size, channels).transpose(
        0, 1, 3, 2, 4, 5
    )
    return reshape_images(x, height, width, size * size * channels)


def is_split(x: Array) -> bool:
    """Whether the type of x splits it over axes of an Explicit mesh."""
    return any(axes is not None for axes in jax.typeof(x).sharding.spec)


def reshape_images(x: Array, *sizes: int) -> Array:
    """Reshape images ``[n, ...]`` to ``[n, *sizes]``, split over devices as before."""
    shape = x.shape[0], *sizes
    if not is_split(x):
        return x.reshape(shape)
    split = PartitionSpec(jax.typeof(x).sharding.spec[0], *[None] * len(sizes))
    return jax.lax.reshape(x, shape, out_sharding=split)


def pad(
    x: Array, axis: int, before: int, after: int, *, value: float | None = 0.0
) -> Array:
    """Pad one axis, as `jnp.pad`, whose form jax2onnx cannot convert.

    Args:
        x: any array.
        axis: the axis to pad.
        before: number of values in front.
        after: number of values behind; below 0, that many are cut off instead.
        value: value to pad with; None repeats the first and the last one.
    """
    if after < 0:
        x = jax.lax.slice_in_dim(x, 0, x.shape[axis] + after, axis=axis)
    ends = [(0, before), (x.shape[axis] - 1, after)]
    first, last = ([jax.lax.slice_in_dim(x, i, i + 1, axis=axis)] * n for i, n in ends)
    if value is not None:
        first, last = ([jnp.full_like(e, value) for e in end] for end in (first, last))
    return jnp.concatenate([*first, x, *last], axis=axis)
