"""Embedders of functions, in the user's modules or any others."""

import dataclasses
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax.typing import ArrayLike
from PIL import Image

from tripletjax.apps.embedders.vectors import (
    BATCH,
    check_vectors,
    describe,
    to_unit_norm,
)
from tripletjax.learn.data.image_shape import to_rgb

Function = Callable[[list[Image.Image]], ArrayLike]
# The longer side of images for a function that a command names, unless an option
# gives another one: hundreds of photographs are in memory at a time.
SIDE = 640
# The number rises with every change of `to_rgb`, so that older indexes do not match.
PREPARATION = "preparation 2"


@dataclasses.dataclass(frozen=True)
class FunctionEmbedder:
    """A function as an `ImageEmbedder`.

    Attributes:
        key: name of the function, its weights and its preparation of images.
        function: from a list of at most 64 RGB images to vectors ``[n, d]``.
        name: of the function, for errors.
        side: longer side to which larger images are reduced; None for no limit.
        dim: size of the vectors; None for any.
        unit_norm: whether vectors are scaled to unit norm.
    """

    key: str
    function: Function
    name: str = "function"
    side: int | None = None
    dim: int | None = None
    unit_norm: bool = False

    def prepare(self, image: Image.Image, /) -> Image.Image:
        image = to_rgb(image)
        if self.side is not None and max(image.size) > self.side:
            scale = self.side / max(image.size)
            width, height = (max(1, round(scale * side)) for side in image.size)
            image = image.resize((width, height), Image.Resampling.LANCZOS)
        return image

    def embed(self, prepared: Sequence[Image.Image], /) -> np.ndarray:
        batches = [prepared[i : i + BATCH] for i in range(0, len(prepared), BATCH)]
        x = np.concatenate([self._call([*batch]) for batch in batches])
        return to_unit_norm(x) if self.unit_norm else x

    def _call(self, images: list[Image.Image]) -> np.ndarray:
        try:
            x = np.asarray(self.function(images))
        except (Exception, SystemExit) as error:
            raise ValueError(f"{self.name} raised {describe(error)}.") from error
        x = check_vectors(x, len(images), self.name)
        if self.dim is not None and x.shape[1] != self.dim:
            raise ValueError(
                f"{self.name} must return vectors of {self.dim} dimensions, as before, "
                f"got {x.shape[1]}."
            )
        return x


def load_function(name: str, *, size: int | None = None) -> FunctionEmbedder:
    """Load the embedder of a function, with vectors of unit norm.

    Args:
        name: ``MODULE:FUNCTION``; the module is imported from the current directory,
            too.
        size: longer side to which larger images are reduced, 640 if not given.

    Raises:
        ValueError: if the module or the function does not exist, or the function
            raises or returns no vectors.
    """
    function = _import_function(name)
    side = SIDE if size is None else size
    embedder = FunctionEmbedder("", function, f"embedder {name}", side, unit_norm=True)
    # A gradient of colours: it shows the dimension, and faults before images are read.
    ramp = np.add.outer(np.arange(64), np.arange(64))
    colours = np.stack([ramp, ramp[::-1], 126 - ramp], axis=-1)
    dim = embedder.embed([Image.fromarray((2 * colours).astype(np.uint8))]).shape[1]
    version = getattr(function, "version", None)
    return dataclasses.replace(
        embedder,
        key=f"function {name}, {dim} dimensions, version {version}, side {side}, "
        f"{PREPARATION}",
        dim=dim,
    )


def _import_function(name: str) -> Any:
    """The function of ``MODULE:FUNCTION``."""
    module_name, _, path = name.partition(":")
    parts = [*module_name.split("."), *path.split(".")]
    if not all(part.isidentifier() for part in parts):
        raise ValueError(
            f"embedder must be MODULE:FUNCTION or FILE.onnx, got {name!r}."
        )
    # As `python -m` does, and for imports that the function itself makes.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        function: Any = importlib.import_module(module_name)
    # A script may parse arguments, and exit, when it is imported.
    except (Exception, SystemExit) as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing and f"{module_name}.".startswith(f"{missing}."):
            raise ValueError(
                f"embedder {name}: module {missing} does not exist, neither in the "
                "current directory nor among the installed packages."
            ) from None
        raise ValueError(
            f"embedder {name}: the import of {module_name} raised {describe(error)}."
        ) from error
    for part in path.split("."):
        function = getattr(function, part, None)
    if not callable(function):
        raise ValueError(
            f"embedder {name}: module {module_name} has no function {path}."
        )
    return function
