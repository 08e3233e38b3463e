"""From images to vectors: the embedding of a run, or any function."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from jax.typing import ArrayLike
from PIL import Image

from tripletjax.learn.data.image_shape import to_rgb
from tripletjax.learn.embedder import ImageEmbedder, load_embedder

Function = Callable[[list[Image.Image]], ArrayLike]


@dataclasses.dataclass(frozen=True)
class FunctionEmbedder:
    """A function from a list of images in RGB to vectors, as an `ImageEmbedder`."""

    key: str
    function: Function

    def prepare(self, image: Image.Image, /) -> Image.Image:
        return to_rgb(image)

    def embed(self, prepared: Sequence[Image.Image], /) -> np.ndarray:
        x = np.asarray(self.function([*prepared]), np.float32)
        n = len(prepared)
        if x.ndim != 2 or len(x) != n:
            raise ValueError(
                f"the function must return vectors [{n}, d] for {n} images, got "
                f"{x.shape}."
            )
        return x


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
        # Another number refuses indexes of images that were prepared otherwise.
        return FunctionEmbedder(f"function {key}, preparation 2", source)
    if key is not None:
        raise ValueError(f"key is for functions, got {key!r} for the run {source}.")
    return load_embedder(source)


def vectors_of(embedder: ImageEmbedder, images: Sequence[Image.Image]) -> np.ndarray:
    """Vectors ``[n, d]`` of some images."""
    return embedder.embed([embedder.prepare(image) for image in images])
