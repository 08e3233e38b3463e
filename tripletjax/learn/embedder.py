"""The embedding of a run, as a function of images.

Needs neither the training data nor the packages that read datasets or draw.
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
from tripletjax.learn.networks.embedding import embed_images
from tripletjax.learn.networks.embedding_networks import Standardized
from tripletjax.learn.runs.model import NETWORK, load_model
from tripletjax.learn.runs.record import RunRecord

ImageInputs = ArrayLike | Sequence[np.ndarray | str | Path | Image.Image]


class ImageEmbedder(Protocol):
    """From images to vectors in two steps, of a run or of any function.

    Attributes:
        key: name of the embedding; vectors of different keys are never compared.
    """

    @property
    def key(self) -> str: ...

    def prepare(self, image: Image.Image, /) -> Any:
        """Prepare one image for `embed`; several threads call this."""

    def embed(self, prepared: Sequence[Any], /) -> np.ndarray:
        """Vectors ``[n, d]`` of prepared images."""
        ...


@dataclasses.dataclass(frozen=True)
class Embedder:
    """The trained embedding of a run, as a function of images.

    Attributes:
        model: from float images, as the network sees them, to unit vectors.
        shape: size, channels and background of prepared images.
        view: the part of prepared images that the network sees; None for all.
        record: of the run.
        run_dir: the run directory, if any.
    """

    model: Standardized
    shape: ImageSpec
    view: View | None
    record: RunRecord
    run_dir: Path | None = None

    @functools.cached_property
    def key(self) -> str:
        """Digest of everything that determines the vector of an image."""
        plan = dataclasses.asdict(self.record.plan)
        network = {name: plan[name] for name in NETWORK}
        images = dataclasses.asdict(self.record.images)
        leaves = jax.tree.leaves(nnx.state(self.model))
        arrays = (np.ascontiguousarray(x).tobytes() for x in leaves)
        return (
            f"run {digest_of(itertools.chain([json.dumps([network, images])], arrays))}"
        )

    def __call__(self, images: ImageInputs) -> Array:
        """Unit vectors ``[n, d]`` of arrays, Pillow images or paths."""
        return self.of_shape(_to_batch(images, self.shape))

    def prepare(self, image: Image.Image, /) -> np.ndarray:
        """Prepare an image as uint8 ``[height, width, c]``.

        Raises:
            OSError: if all pixels of the image are the same.
        """
        pixels = self.shape.fit(image)
        check_not_blank(pixels)
        return pixels

    def embed(self, prepared: Sequence[np.ndarray], /) -> np.ndarray:
        """Unit vectors ``[n, d]`` of prepared images."""
        return np.asarray(self.of_shape(np.stack(prepared)))

    def of_shape(self, images: np.ndarray) -> Array:
        """Unit vectors ``[n, d]`` of prepared images, ``[n, height, width, c]``."""
        seen = images if self.view is None else self.view(images)
        return embed_images(self.model, seen)


def load_embedder(run_dir: str | Path) -> Embedder:
    """Load the trained embedding of a run.

    Args:
        run_dir: a run directory.

    Returns:
        A function from images to unit vectors ``[n, d]``. Images are a uint8 array
        ``[n, height, width]`` or ``[n, height, width, channels]`` of any size, or a
        sequence of arrays of different sizes, Pillow images or paths. They are
        prepared as the images that the run was trained with.

    Raises:
        FileNotFoundError: if there is no trained model.
    """
    model, record = load_model(run_dir)
    view = record.plan.view_of(record.images.shape)
    return Embedder(model, record.images.spec, view, record, Path(run_dir).resolve())


def _to_batch(images: ImageInputs, shape: ImageSpec) -> np.ndarray:
    """Prepare images as uint8 ``[n, height, width, channels]``."""
    if isinstance(images, str | Path | Image.Image):
        raise TypeError("images must be a list or an array of images, got one image.")
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
        fitted = pool.map(lambda image: shape.fit(_open(image)), several)
        return np.stack(list(fitted))


def _open(image: ArrayLike | str | Path | Image.Image) -> Image.Image:
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
