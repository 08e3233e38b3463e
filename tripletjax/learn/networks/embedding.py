"""Embeddings of many images in batches, compiled once."""

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

# Pixels that are embedded at a time.
PIXELS = 2**20


@functools.partial(jit, static_argnames="graph")
def _embed(graph: nnx.GraphDef, state: nnx.State, images: Array) -> Array:
    return nnx.merge(graph, state)(as_floats(images))


def check_static(graph: nnx.GraphDef) -> None:
    """Raise TypeError for a model whose structure cannot be hashed."""
    try:
        hash(graph)
    except TypeError as error:
        raise TypeError(
            f"model has a static attribute that cannot be hashed ({error}): make lists "
            "of numbers tuples, lists of modules nnx.List."
        ) from None


def batch_size_for(images: ImageSource) -> int:
    """The default number of images that are embedded at a time."""
    if len(images.shape) != 4:
        return 4096
    return max(1, min(256, PIXELS // (images.shape[1] * images.shape[2])))


def embed_images(
    model: nnx.Module, images: ImageSource, *, batch_size: int | None = None
) -> Array:
    """Embed images, a batch at a time.

    Args:
        model: from float images ``[n, height, width, channels]`` to embeddings
            ``[n, d]``.
        images: uint8 or floats from 0 to 1, ``[n, height, width, channels]``, at least
            one.
        batch_size: images that are embedded at a time. If not given, as many as have
            2^20 pixels, at most 256.

    Returns:
        Embeddings ``[n, d]``.

    Raises:
        TypeError: if a static attribute of the model cannot be hashed.
        ValueError: if there are no images.
    """
    if not len(images):
        raise ValueError(f"images must not be empty, got shape {images.shape}.")
    graph, state = nnx.split(model)
    check_static(graph)
    state = strongly_typed(state)
    batch_size = batch_size or batch_size_for(images)
    # Fewer images are padded to a power of two, so that few sizes are compiled.
    batch_size = min(batch_size, 2 ** (len(images) - 1).bit_length())
    embeddings = []
    for start in range(0, len(images), batch_size):
        batch = images[start : start + batch_size]
        missing = batch_size - len(batch)
        padded = np.pad(batch, [(0, missing)] + [(0, 0)] * (batch.ndim - 1))
        embeddings.append(_embed(graph, state, padded)[: len(batch)])
    return jnp.concatenate(embeddings)


def as_floats(images: ArrayLike) -> Array:
    """Convert images from 0 to 255 to floats from 0 to 1; floats keep their values."""
    x = jnp.asarray(images)
    if jnp.issubdtype(x.dtype, jnp.floating):
        return x.astype(jnp.float32)
    return x.astype(jnp.float32) / 255


def strongly_typed(tree: Tree) -> Tree:
    """Replace weakly typed arrays, such as ``jnp.asarray(1.0)``.

    A training step returns strong types, and would be compiled again for weak ones.
    """

    def strong(x: Any) -> Any:
        weak = getattr(jax.typeof(x), "weak_type", False)
        return lax.convert_element_type(x, jnp.result_type(x)) if weak else x

    return jax.tree.map(strong, tree)
