"""Embeddings of many images, or other inputs, in batches, compiled once."""

import functools
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax
from jax.typing import ArrayLike

from tripletjax.learn.data.image_array import ImageSource
from tripletjax.learn.networks.convolution import jit

Tree = TypeVar("Tree")

# Pixels that are embedded at a time, and rows of inputs that are no images.
PIXELS, ROWS = 2**20, 256


@functools.partial(jit, static_argnames="graph")
def _embed(graph: nnx.GraphDef, state: nnx.State, inputs: Any) -> Array:
    return nnx.merge(graph, state)(as_inputs(inputs))


def check_static(graph: nnx.GraphDef) -> None:
    """Raise TypeError for a model whose structure cannot be hashed."""
    try:
        hash(graph)
    except TypeError as error:
        raise TypeError(
            f"model has a static attribute that cannot be hashed ({error}): make lists "
            "of numbers tuples, lists of modules nnx.List."
        ) from None


def batch_size_for(images: ImageSource | Any) -> int:
    """The default number of images, or other inputs, that are embedded at a time."""
    if not hasattr(images, "shape"):
        return ROWS
    if len(images.shape) != 4:
        return 4096
    return max(1, min(256, PIXELS // (images.shape[1] * images.shape[2])))


def embed_images(
    model: nnx.Module, images: ImageSource | Any, *, batch_size: int | None = None
) -> Array:
    """Embed images, or other inputs, a batch at a time.

    Args:
        model: from float images ``[n, height, width, channels]``, or from other inputs,
            to embeddings ``[n, d]``.
        images: uint8 or floats from 0 to 1, ``[n, height, width, channels]``, at least
            one. Or any pytree of arrays with n rows each, such as a dict of tokens and
            a mask, prepared as in `fit`.
        batch_size: rows that are embedded at a time. If not given, as many images as
            have 2^20 pixels, at most 256; 256 rows of a pytree.

    Returns:
        Embeddings ``[n, d]``.

    Raises:
        TypeError: if a static attribute of the model cannot be hashed.
        ValueError: if there are no images, or arrays have different numbers of rows.
    """
    rows = rows_of(images)
    if not rows:
        raise ValueError("images must not be empty, got 0 rows.")
    graph, state = nnx.split(model)
    check_static(graph)
    state = strongly_typed(state)
    batch_size = batch_size or batch_size_for(images)
    # Fewer images are padded to a power of two, so that few sizes are compiled.
    batch_size = min(batch_size, 2 ** (rows - 1).bit_length())
    embeddings = []
    for start in range(0, rows, batch_size):
        size = min(batch_size, rows - start)

        def cut(x: Any, start: int = start, size: int = size) -> np.ndarray:
            part = x[start : start + size]
            return np.pad(part, [(0, batch_size - size)] + [(0, 0)] * (part.ndim - 1))

        embeddings.append(_embed(graph, state, jax.tree.map(cut, images))[:size])
    return jnp.concatenate(embeddings)


def rows_of(inputs: Any) -> int:
    """Number of rows that all arrays of a pytree have.

    Raises:
        ValueError: if there is no array, or arrays have different numbers of rows.
    """
    rows = [len(x) for x in jax.tree.leaves(inputs)]
    if len({*rows}) != 1:
        raise ValueError(
            "inputs must be arrays with the same number of rows, got "
            f"{', '.join(map(str, rows)) or 'no array'}."
        )
    return rows[0]


def as_inputs(inputs: Any) -> Any:
    """The arrays of a pytree as a model gets them, by `as_floats`."""
    return jax.tree.map(as_floats, inputs)


def as_floats(images: ArrayLike) -> Array:
    """Convert uint8 images to floats from 0 to 1, and other floats to float32.

    Other integers, such as tokens, and booleans, such as a mask, stay as they are.
    """
    x = jnp.asarray(images)
    if x.dtype == jnp.uint8:
        return x.astype(jnp.float32) / 255
    return x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x


def strongly_typed(tree: Tree) -> Tree:
    """Replace weakly typed arrays, such as ``jnp.asarray(1.0)``.

    A training step returns strong types, and would be compiled again for weak ones.
    """

    def strong(x: Any) -> Any:
        weak = getattr(jax.typeof(x), "weak_type", False)
        return lax.convert_element_type(x, jnp.result_type(x)) if weak else x

    return jax.tree.map(strong, tree)
