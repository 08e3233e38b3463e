"""Convolutions of images, in forms that are fast on CPUs and can be exported."""

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
# Images of so many pixels or fewer are convolved as a product: of these XLA is some
# 40 times slower on CPUs (jax 0.10.2, 2 x 2 pixels of 512 channels).
SMALL = 9
# On CPUs a kernel's gradient is added up over so many pixels at a time, whose copies
# stay in the cache.
PIXELS = 4096
# An option of XLA. Later versions of JAX may not have it, and fail for what they do not
# know.
WITHOUT_YNNPACK = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"}
KNOWN_UNTIL = (0, 12)


def jit(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """`jax.jit`, whose programs for CPUs use YNNPACK for sums alone.

    Its convolutions and products take 1.3 to 2 times as long as those of XLA (jax
    0.10.2). For functions that no other jitted function calls.
    """
    usual = jax.jit(function, **options)
    if jax.__version_info__[:2] > KNOWN_UNTIL:
        return usual
    on_cpus = jax.jit(function, compiler_options=WITHOUT_YNNPACK, **options)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        here = on_cpus if jax.default_backend() == "cpu" else usual
        return here(*args, **kwargs)

    return call


def drawn_as_matrix(initializer: Initializer) -> Initializer:
    """Kernels of an initializer of `jax.nn.initializers`, of the same numbers.

    With four axes XLA takes seconds to compile them on CPUs, with two a tenth of that
    (jax 0.10.2 to 0.12).
    """

    def draw(key: Array, shape: Sequence[int], *options: Any, **named: Any) -> Array:
        matrix = math.prod(shape[:-1]), shape[-1]
        return initializer(key, matrix, *options, **named).reshape(shape)

    return draw


HE_NORMAL = drawn_as_matrix(jax.nn.initializers.he_normal())
LECUN_NORMAL = drawn_as_matrix(jax.nn.initializers.lecun_normal())


def convolution(
    x: Array, kernel: Array, stride: int = 1, padding: str | Padding = NONE
) -> Array:
    """Images convolved with a kernel.

    ``y[n, r, c] = sum over i, j of x[n, stride r + i, stride c + j] @ kernel[i, j]``

    On CPUs the gradients of kernels, and all gradients with a stride, are not XLA's.
    With XLA's, a step of `EmbeddingResNet` takes 1.2 to 1.4 times as long by `jit`, and
    1.4 to 1.5 times as long by `jax.jit` (jax 0.10.2, `benchmarks/step.py
    --gradients`). This function has no forward-mode derivative.

    Args:
        x: images ``[n, height, width, channels]``.
        kernel: ``[height, width, channels, channels of what comes out]``, of x's dtype.
        stride: how far apart the outputs are, down and across.
        padding: how many zeros there are before and after, down and across; or as
            `jax.lax.conv_general_dilated` names it, such as ``"SAME"``.

    Returns:
        Images of the channels of what comes out.
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
        # It takes less time on CPUs, and a third with its gradients.
        return x @ kernel[0, 0]
    if small:
        return _as_product(x, kernel, zeros)
    return _convolved(*vary_alike(x, kernel), stride, zeros)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _convolved(x: Array, kernel: Array, stride: int, padding: Padding) -> Array:
    return _by_xla(x, kernel, stride, padding)


def _by_xla(x: Array, kernel: Array, stride: int, padding: Padding) -> Array:
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def _convolved_forward(
    x: Array, kernel: Array, stride: int, padding: Padding
) -> tuple[Array, tuple[Array, Array]]:
    return _by_xla(x, kernel, stride, padding), (x, kernel)


def _convolved_back(
    stride: int, padding: Padding, kept: tuple[Array, Array], along: Array
) -> tuple[Array, Array]:
    def by_xla(x: Array, kernel: Array, along: Array) -> tuple[Array, Array]:
        convolved = functools.partial(_by_xla, stride=stride, padding=padding)
        return jax.vjp(convolved, x, kernel)[1](along)

    def on_cpus(x: Array, kernel: Array, along: Array) -> tuple[Array, Array]:
        def convolved(x: Array) -> Array:
            if stride == 1:
                return _by_xla(x, kernel, stride, padding)
            return convolution(*_without_stride(x, kernel, stride, padding))

        along_x = jax.vjp(convolved, x)[1](along)
        return *along_x, _gradient_of_kernel(x, kernel, along, stride, padding)

    if lies_along(kept[0]):
        # Products of parts of the batch would have to say how they are put together.
        return by_xla(*kept, along)
    return jax.lax.platform_dependent(*kept, along, cpu=on_cpus, default=by_xla)


_convolved.defvjp(_convolved_forward, _convolved_back)


def _gradient_of_kernel(
    x: Array, kernel: Array, along: Array, stride: int, padding: Padding
) -> Array:
    """What comes back to a kernel from what comes back to its images, ``along``.

    ``dk[i, j] = sum over n, r, c of x[n, s r + i, s c + j]^T along[n, r, c]``

    Products of what x has at each (i, j) by ``along``; without a stride, of what x has
    in each row i by what ``along`` has j columns before, which is less to copy. The
    images of a product are far apart in the batch: if it is split over devices, every
    product is, too.
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
            seen = [images[:, i : i + rows] for i in range(height)]
            before, after = (max(width - 1 - zeros, 0) for zeros in padding[1])
            back = jnp.pad(back, ((0, 0), (0, 0), (before, after), (0, 0)))
            starts = [before + left - j for j in range(width)]
            back = jnp.concatenate([back[:, :, i : i + end] for i in starts], axis=-1)
        else:
            images = jnp.pad(images, ((0, 0), *padding, (0, 0)))
            down, across = (stride * (size - 1) + 1 for size in (rows, columns))
            seen = [
                images[:, i : i + down : stride, j : j + across : stride]
                for i in range(height)
                for j in range(width)
            ]
        seen = jnp.concatenate(seen, axis=-1)
        return jnp.matmul(
            seen.reshape(-1, seen.shape[-1]).T,
            back.reshape(-1, back.shape[-1]),
            preferred_element_type=dtype,
        )

    first, last = kernel.shape[2:]
    shape = kernel.size // last, last
    if stride == 1:
        shape = height * first, width * last
    none, *_ = vary_alike(jnp.zeros(shape, dtype), x, along)
    total = jax.lax.fori_loop(
        0, n // at_once, lambda index, total: total + product(index), none
    ).astype(kernel.dtype)
    if stride == 1:
        total = total.reshape(height, first, width, last).transpose(0, 2, 1, 3)
    return total.reshape(kernel.shape)


def _as_product(x: Array, kernel: Array, padding: Padding) -> Array:
    """A convolution as one product, for small images."""
    (height, width), (down, across) = kernel.shape[:2], padding
    x = padded(padded(x, 1, *down), 2, *across)
    rows, columns = x.shape[1] - height + 1, x.shape[2] - width + 1
    seen = [
        x[:, top : top + rows, left : left + columns]
        for top in range(height)
        for left in range(width)
    ]
    return jnp.concatenate(seen, axis=-1) @ kernel.reshape(-1, kernel.shape[-1])


def _without_stride(
    x: Array, kernel: Array, stride: int, padding: Padding
) -> tuple[Array, Array]:
    """Images and a kernel whose convolution without stride or padding is the same.

    Every ``stride x stride`` pixels become one with all of their channels.
    """
    if kernel.shape[:2] == (1, 1) and padding == NONE:
        return x[:, ::stride, ::stride], kernel
    blocks_of = []
    for axis, (before, after) in zip((1, 2), padding):
        length, size = x.shape[axis], kernel.shape[axis - 1]
        outputs = (length + before + after - size) // stride + 1
        blocks = -(-size // stride)
        wanted = outputs + blocks - 1
        x = padded(x, axis, before, wanted * stride - length - before)
        kernel = padded(kernel, axis - 1, 0, blocks * stride - size)
        blocks_of.append(blocks)
    down, across = blocks_of
    channels = x.shape[-1]
    x = space_to_depth(x, stride)
    kernel = kernel.reshape(down, stride, across, stride, channels, -1)
    kernel = kernel.transpose(0, 2, 1, 3, 4, 5)
    return x, kernel.reshape(down, across, stride * stride * channels, -1)


def space_to_depth(x: Array, size: int) -> Array:
    """Every ``size x size`` pixels as one with all of their channels."""
    _, height, width, channels = x.shape
    height, width = height // size, width // size
    x = cut(x, height, size, width, size, channels).transpose(0, 1, 3, 2, 4, 5)
    return cut(x, height, width, size * size * channels)


def lies_along(x: Array) -> bool:
    """Whether its type says that x is split over axes of an Explicit mesh."""
    return any(axes is not None for axes in jax.typeof(x).sharding.spec)


def cut(x: Array, *sizes: int) -> Array:
    """Images ``[n, ...]`` as ``[n, *sizes]``, split over devices as they were."""
    shape = x.shape[0], *sizes
    if not lies_along(x):
        return x.reshape(shape)
    split = PartitionSpec(jax.typeof(x).sharding.spec[0], *[None] * len(sizes))
    return jax.lax.reshape(x, shape, out_sharding=split)


def padded(
    x: Array, axis: int, before: int, after: int, *, value: float | None = 0.0
) -> Array:
    """Adds a value at both ends of an axis; what is there already, if it is None.

    As `jnp.pad` does, whose form is not understood by what converts to ONNX. Cuts the
    end where `after` is below 0.
    """
    if after < 0:
        x = jax.lax.slice_in_dim(x, 0, x.shape[axis] + after, axis=axis)
    ends = [(0, before), (x.shape[axis] - 1, after)]
    first, last = ([jax.lax.slice_in_dim(x, i, i + 1, axis=axis)] * n for i, n in ends)
    if value is not None:
        first, last = ([jnp.full_like(e, value) for e in end] for end in (first, last))
    return jnp.concatenate([*first, x, *last], axis=axis)
