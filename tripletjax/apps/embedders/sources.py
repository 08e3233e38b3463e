"""Embedders of run directories, functions and ONNX files, by their names."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from tripletjax.apps.embedders.functions import (
    PREPARATION,
    Function,
    FunctionEmbedder,
    load_function,
)
from tripletjax.apps.embedders.onnx_files import load_onnx
from tripletjax.learn.embedder import ImageEmbedder, load_embedder


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
        return FunctionEmbedder(f"function {key}, {PREPARATION}", source)
    if key is not None:
        raise ValueError(
            f"key requires a function, got {key!r} with the run directory {source}."
        )
    return load_embedder(source)


def open_embedder(
    name: str,
    *,
    size: int | None = None,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
) -> ImageEmbedder:
    """Open the embedder that ``--embedder`` names.

    Args:
        name: ``MODULE:FUNCTION`` or ``FILE.onnx``. The module is imported from the
            current directory, too. The function takes a list of at most 64 upright RGB
            images of Pillow, and returns vectors ``[n, d]`` as an array or as lists.
            Its attribute ``version``, if any, is part of the key.
        size: for a file, side of the input in pixels. For a function, the longer side
            to which larger images are reduced, 640 if not given.
        mean: of pixel values from 0 to 1, for a file alone.
        std: standard deviation of pixel values, for a file alone.

    Returns:
        The embedder. Its vectors have unit norm.

    Raises:
        FileNotFoundError: if the file does not exist.
        ImportError: if ONNX Runtime is missing.
        ValueError: if the module or the function does not exist, the function raises
            or returns no vectors, or the file is no network from images to vectors.
    """
    if name.endswith(".onnx"):
        return load_onnx(name, size=size, mean=mean, std=std)
    if mean or std:
        raise ValueError(
            f"mean and std require embedder FILE.onnx, got {name}; a function scales "
            "pixels itself."
        )
    return load_function(name, size=size)


def vectors_of(embedder: ImageEmbedder, images: Sequence[Image.Image]) -> np.ndarray:
    """Prepare and embed images.

    Args:
        embedder: of a run, a function or a file.
        images: n images of any size.

    Returns:
        Vectors ``[n, d]``.
    """
    return embedder.embed([embedder.prepare(image) for image in images])
