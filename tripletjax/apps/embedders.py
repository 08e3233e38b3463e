"""Embedders: the embedding of a run, or any function from images to vectors."""

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
    """An `ImageEmbedder` of a function from RGB images to vectors."""

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
    """Load the embedder of a run directory, or wrap a function.

    Args:
        source: a run directory, or a function from a list of RGB Pillow images to
            vectors ``[n, d]``, such as your own pretrained network.
        key: a name of the function and its weights. Runs have their own key.

    Returns:
        The `ImageEmbedder`.

    Raises:
        FileNotFoundError: if the directory has no trained model.
        ValueError: if a function has no key, or a run has one.
    """
    if callable(source):
        if not key:
            raise ValueError(
                "key must name the function, such as 'my-network-v1', so that no index "
                "mixes two functions."
            )
        # Indexes whose images had another preparation are refused.
        return FunctionEmbedder(f"function {key}, preparation 2", source)
    if key is not None:
        raise ValueError(f"key is for functions, got {key!r} for the run {source}.")
    return load_embedder(source)


def vectors_of(embedder: ImageEmbedder, images: Sequence[Image.Image]) -> np.ndarray:
    """Embed images, vectors ``[n, d]``."""
    return embedder.embed([embedder.prepare(image) for image in images])
