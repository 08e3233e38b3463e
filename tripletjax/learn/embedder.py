"""The embedding of a run, as a function of images.

It needs neither the data that it was trained on nor what reads data or draws.
"""

import dataclasses
import functools
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.typing import ArrayLike
from PIL import Image

from tripletjax.learn.augment import Augment
from tripletjax.learn.checkpoints import Checkpoints
from tripletjax.learn.config import MODELS, Config
from tripletjax.learn.image_io import ImageSpec, View, open_image, upright
from tripletjax.learn.models import Standardized


def load_model(run_dir: str | Path) -> tuple[nnx.Module, dict[str, Any]]:
    """The best model of a run, and the run's settings.

    Raises:
        FileNotFoundError: if there is none yet.
    """
    run_dir = Path(run_dir).resolve()
    for part in ("config.json", "best"):
        if not (run_dir / part).exists():
            raise FileNotFoundError(f"no trained model in {run_dir}: no {part}.")
    settings = json.loads((run_dir / "config.json").read_text())
    model = build_model(settings)
    best = Checkpoints(run_dir / "best", writable=False)
    found = best.restore(nnx.state(model))
    best.close()
    if found is None:
        raise FileNotFoundError(f"no trained model in {run_dir}: best is empty.")
    nnx.update(model, found[1])
    model.eval()
    return model, settings


Pictures = ArrayLike | Sequence[np.ndarray | str | Path | Image.Image]


@dataclasses.dataclass(frozen=True)
class Embedder:
    """The trained embedding of a run, as a function of images.

    Attributes:
        model: from float images, as the network sees them, to unit vectors.
        shape: what every image is made into.
        view: the part of it that the network sees, all of it if None.
        settings: what the run was made with.
    """

    model: nnx.Module
    shape: ImageSpec
    view: View | None
    settings: dict[str, Any]

    def __call__(self, images: Pictures) -> Array:
        """Unit vectors ``[n, d]`` of images of any kind."""
        return self.of_shape(_ready(images, self.shape))

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
    model, settings = load_model(run_dir)
    shape = ImageSpec(*settings["shape"], settings["white"], settings["background"])
    view = view_of(settings["shape"], config_of(settings))
    return Embedder(model, shape, view, settings)


def _ready(images: Pictures, shape: ImageSpec) -> np.ndarray:
    """Images of any kind as uint8 ``[n, height, width, channels]``."""
    if isinstance(images, str | Path | Image.Image):
        raise TypeError("images must be several, got one; put it into a list.")
    if not hasattr(images, "dtype") or images.dtype.kind == "U":
        images = list(images)
    if len(images) == 0:
        raise ValueError("images must not be empty.")
    if getattr(images, "ndim", 0) == 3 and images.shape[-1] in (3, 4):
        raise ValueError(
            f"images {images.shape} look like one image in colour; images[None] makes "
            "it several."
        )
    with ThreadPoolExecutor() as pool:
        fitted = pool.map(lambda image: shape.fit(_picture(image)), images)
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


def build_model(settings: dict[str, Any]) -> nnx.Module:
    """The untrained model of a run's settings."""
    config = config_of(settings)
    shape = settings["shape"]
    view = view_of(shape, config)
    height, width = shape[:2] if view is None else (view.height, view.width)
    options = {
        "resnet": {"stride": config.stride},
        "photo": {"size": (height, width), "head": config.head},
    }
    model = MODELS[config.model](
        config.dim,
        channels=config.channels,
        in_channels=shape[-1],
        dtype=jnp.bfloat16 if config.bfloat16 else None,
        rngs=nnx.Rngs(config.seed),
        **options.get(config.model, {}),
    )
    return Standardized(
        model, settings["mean"], settings["deviation"], mirror=config.mirror
    )


def config_of(settings: dict[str, Any]) -> Config:
    """The configuration in the settings of a run, with all its choices."""
    values = {field.name: settings[field.name] for field in dataclasses.fields(Config)}
    values["augment"] = Augment(**values["augment"])
    values["channels"] = tuple(values["channels"])
    values["box"] = values["box"] and tuple(values["box"])
    return Config(**values)


def view_of(shape: Sequence[int], config: Config) -> View | None:
    """What the network sees of images ``height, width, channels``."""
    if config.box is None:
        return None
    return View.of(shape, config.box, config.size)


@functools.partial(jax.jit, static_argnames="graph")
def _embed(graph: nnx.GraphDef, state: nnx.State, images: Array) -> Array:
    return nnx.merge(graph, state)(as_floats(images))


def embed_images(
    model: nnx.Module, images: np.ndarray, *, batch_size: int = 256
) -> Array:
    """Embeds images ``[n, height, width, channels]``, a batch at a time.

    They are uint8, or floats from 0 to 1.
    """
    graph, state = nnx.split(model)
    embeddings = []
    for start in range(0, len(images), batch_size):
        batch = images[start : start + batch_size]
        # The last batch is filled up, so that one size is compiled.
        missing = min(batch_size, len(images)) - len(batch)
        padded = np.pad(batch, [(0, missing)] + [(0, 0)] * (images.ndim - 1))
        embeddings.append(_embed(graph, state, padded)[: len(batch)])
    return jnp.concatenate(embeddings)


def as_floats(images: Array) -> Array:
    """Images from 0 to 255 as floats from 0 to 1; floats stay as they are."""
    images = jnp.asarray(images)
    if jnp.issubdtype(images.dtype, jnp.floating):
        return images.astype(jnp.float32)
    return images.astype(jnp.float32) / 255
