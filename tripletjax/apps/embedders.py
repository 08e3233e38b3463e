"""From images to vectors: the embedding of a run, or any function."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.typing import ArrayLike
from PIL import Image

from tripletjax.learn.embedder import load_embedder

Function = Callable[[list[Image.Image]], ArrayLike]


@dataclasses.dataclass(frozen=True)
class ImageEmbedder:
    """What makes vectors of images, in two steps.

    Attributes:
        key: a name of the embedding: vectors of two keys are not compared.
        prepare: from one image to what `embed` takes, done by several threads.
        embed: from what was prepared to vectors ``[n, d]``.
    """

    key: str
    prepare: Callable[[Image.Image], Any]
    embed: Callable[[list[Any]], np.ndarray]


def embedder_of(
    source: str | Path | Function, *, key: str | None = None
) -> ImageEmbedder:
    """The embedder of a run directory, or of any function.

    Args:
        source: a run directory, or a function from a list of Pillow's images in RGB to
            vectors ``[n, d]``, such as a pretrained network of one's own.
        key: a name of the function and its weights; not for a run, which has its own.

    Returns:
        The `ImageEmbedder`.

    Raises:
        FileNotFoundError: if there is no trained model in the directory.
        ValueError: if a function has no key, or a run is given one.
    """
    if callable(source):
        if not key:
            raise ValueError(
                "key must name the function, such as 'my-network-v1': an index is "
                "never mixed of two of them."
            )
        return ImageEmbedder(
            f"function {key}",
            lambda image: image.convert("RGB"),
            lambda images: _checked(source(images), len(images)),
        )
    if key is not None:
        raise ValueError(f"key is for functions, got {key!r} for the run {source}.")
    embedder = load_embedder(source)
    return ImageEmbedder(
        f"run {embedder.key}",
        embedder.pixels_of,
        lambda images: np.asarray(embedder.of_shape(np.stack(images))),
    )


def _checked(vectors: ArrayLike, n: int) -> np.ndarray:
    x = np.asarray(vectors, np.float32)
    if x.ndim != 2 or len(x) != n:
        raise ValueError(
            f"the function must return vectors [{n}, d] for {n} images, got {x.shape}."
        )
    return x


def vectors_of(embedder: ImageEmbedder, images: Sequence[Image.Image]) -> np.ndarray:
    """Vectors ``[n, d]`` of some images."""
    return embedder.embed([embedder.prepare(image) for image in images])
