"""Embedders of run directories and of functions."""

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
    """A function as an `ImageEmbedder`.

    Attributes:
        key: name of the function, its weights and its preparation of images.
        function: from a list of RGB images to vectors ``[n, d]``.
    """

    key: str
    function: Function

    def prepare(self, image: Image.Image, /) -> Image.Image:
        return to_rgb(image)

    def embed(self, prepared: Sequence[Image.Image], /) -> np.ndarray:
        x = np.asarray(self.function([*prepared]), np.float32)
        n = len(prepared)
        if x.ndim != 2 or len(x) != n:
            raise ValueError(
                f"function must return vectors [{n}, d] for {n} images, got shape "
                f"{x.shape}."
            )
        return x


def embedder_of(
    source: str | Path | Function, *, key: str | None = None
) -> ImageEmbedder:
    """Load the embedder of a run directory, or wrap a function.

    Args:
        source: a run directory, or a function from a list of RGB images of Pillow to
            vectors ``[n, d]``, such as your own pretrained network.
        key: name of the function and its weights; required for a function, None for a
            run directory.

    Returns:
        The `ImageEmbedder`.

    Raises:
        FileNotFoundError: if the directory has no trained model.
        ValueError: if a function has no key, or a run directory has one.
    """
    if callable(source):
        if not key:
            raise ValueError(
                "key must name the function and its weights, such as 'my-network-v1', "
                f"got {key!r}; an index keeps the vectors of each key apart."
            )
        # The number rises with every change of `to_rgb`, so that older indexes do not
        # match.
        return FunctionEmbedder(f"function {key}, preparation 2", source)
    if key is not None:
        raise ValueError(
            f"key requires a function, got {key!r} with the run directory {source}."
        )
    return load_embedder(source)


def vectors_of(embedder: ImageEmbedder, images: Sequence[Image.Image]) -> np.ndarray:
    """Prepare and embed images.

    Args:
        embedder: of a run directory or a function.
        images: n images of any size.

    Returns:
        Vectors ``[n, d]``.
    """
    return embedder.embed([embedder.prepare(image) for image in images])
