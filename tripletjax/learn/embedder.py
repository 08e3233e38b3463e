"""The embedding of a run, as a function of images.

It needs neither the data that it was trained on nor what reads data or draws.
"""

import dataclasses
import functools
import itertools
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from flax import nnx
from jax import Array
from jax.typing import ArrayLike
from PIL import Image

from tripletjax.learn.data.image_files import open_image, upright
from tripletjax.learn.data.image_shape import ImageSpec, View, check_not_blank
from tripletjax.learn.files import digest_of
from tripletjax.learn.networks.embedding import (
    embed_images,
)
from tripletjax.learn.networks.embedding_networks import Standardized
from tripletjax.learn.runs.model import (
    NETWORK,
    load_model,
)
from tripletjax.learn.runs.record import RunRecord

ImageInputs = ArrayLike | Sequence[np.ndarray | str | Path | Image.Image]


class ImageEmbedder(Protocol):
    """What makes vectors of images, in two steps: of a run, or of any function.

    Attributes:
        key: a name of the embedding: vectors of two keys are not compared.
    """

    @property
    def key(self) -> str: ...

    def prepare(self, image: Image.Image, /) -> Any:
        """What `embed` takes, from one image; done by several threads."""

    def embed(self, prepared: Sequence[Any], /) -> np.ndarray:
        """Vectors ``[n, d]`` of images that are prepared."""
        ...


@dataclasses.dataclass(frozen=True)
class Embedder:
    """The trained embedding of a run, as a function of images.

    Attributes:
        model: from float images, as the network sees them, to unit vectors.
        shape: what every image is made into.
        view: the part of it that the network sees, all of it if None.
        record: what the run was made with.
        run_dir: where the run is, if it is one.
    """

    model: Standardized
    shape: ImageSpec
    view: View | None
    record: RunRecord
    run_dir: Path | None = None

    @functools.cached_property
    def key(self) -> str:
        """A digest of all that the vectors of an image depend on."""
        plan = dataclasses.asdict(self.record.plan)
        made = {name: plan[name] for name in NETWORK}
        images = dataclasses.asdict(self.record.images)
        leaves = jax.tree.leaves(nnx.state(self.model))
        arrays = (np.ascontiguousarray(x).tobytes() for x in leaves)
        return f"run {digest_of(itertools.chain([json.dumps([made, images])], arrays))}"

    def __call__(self, images: ImageInputs) -> Array:
        """Unit vectors ``[n, d]`` of images of any kind."""
        return self.of_shape(_to_batch(images, self.shape))

    def prepare(self, image: Image.Image, /) -> np.ndarray:
        """What an image is made into, uint8 ``[height, width, c]``.

        Raises:
            OSError: if there is nothing to see on it.
        """
        pixels = self.shape.fit(image)
        check_not_blank(pixels)
        return pixels

    def embed(self, prepared: Sequence[np.ndarray], /) -> np.ndarray:
        """Unit vectors ``[n, d]`` of what `prepare` made of images."""
        return np.asarray(self.of_shape(np.stack(prepared)))

    def of_shape(self, images: np.ndarray) -> Array:
        """The same of images that have the shape, uint8 ``[n, height, width, c]``."""
        seen = images if self.view is None else self.view(images)
        return embed_images(self.model, seen)


def load_embedder(run_dir: str | Path) -> Embedder:
    """The trained embedding of a run.

    Args:
        run_dir: a run directory.

    Returns:
        A function to unit vectors ``[n, d]``, from uint8 images of any size, grey or
        colour: ``[n, height, width]`` or ``[n, height, width, channels]``; or a
        sequence of arrays of different sizes, Pillow's images or paths of image files.
        Images are made into what the run was trained with.

    Raises:
        FileNotFoundError: if there is no trained model.
    """
    model, made = load_model(run_dir)
    view = made.plan.view_of(made.images.shape)
    return Embedder(model, made.images.spec, view, made, Path(run_dir).resolve())


def _to_batch(images: ImageInputs, shape: ImageSpec) -> np.ndarray:
    """Images of any kind as uint8 ``[n, height, width, channels]``."""
    if isinstance(images, str | Path | Image.Image):
        raise TypeError("images must be several, got one; put it into a list.")
    several: Any = images
    if not hasattr(several, "dtype") or several.dtype.kind == "U":
        several = list(several)
    if len(several) == 0:
        raise ValueError("images must not be empty.")
    if getattr(several, "ndim", 0) == 3 and several.shape[-1] in (3, 4):
        raise ValueError(
            f"images {several.shape} look like one image in colour; images[None] makes "
            "it several."
        )
    with ThreadPoolExecutor() as pool:
        fitted = pool.map(lambda image: shape.fit(_picture(image)), several)
        return np.stack(list(fitted))


def _picture(image: ArrayLike | str | Path | Image.Image) -> Image.Image:
    if isinstance(image, str | Path):
        return open_image(image)
    if isinstance(image, Image.Image):
        return upright(image)
    image = np.asarray(image)
    if image.dtype != np.uint8:
        raise TypeError(f"images must be uint8, got dtype {image.dtype}.")
    if image.ndim == 3 and image.shape[-1] == 1:
        image = image[..., 0]
    if image.size == 0 or not (
        image.ndim == 2 or (image.ndim == 3 and image.shape[-1] in (3, 4))
    ):
        raise ValueError(
            "images must be [n, height, width] or [n, height, width, channels] "
            f"with 1, 3 or 4 channels; one of them is {image.shape}."
        )
    return Image.fromarray(image)
