"""Features of a frozen backbone, computed once per image and kept on disk.

The key of a feature is the digest of its image, in a folder for the weights, the size
and the view. Files are only added, each complete or not at all: an interrupted run
loses little, and several runs may share a cache.
"""

import dataclasses
import functools
import uuid
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tensorflow_datasets as tfds
from flax import nnx
from jax import Array
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from tqdm import tqdm

from tripletjax.learn.data.augment import Augment
from tripletjax.learn.data.image_array import ImageArray, KeptFeatures
from tripletjax.learn.errors import one_line_errors
from tripletjax.learn.files import digest_of, digest_of_image, replaced
from tripletjax.learn.networks.embedding import as_floats, batch_size_for, embed_images

# The number rises with every change of the features, which are then computed again.
FORMAT = 1
# Pixels of the images of one file; their features take some minutes.
PIXELS = 2**25


@dataclasses.dataclass(frozen=True)
class AnyView:
    """Draw one view of each image: ``[n, views, f]`` to ``[n, f]``."""

    def __call__(self, key: Array, features: Array) -> Array:
        n, views, _ = features.shape
        view = jax.random.randint(key, (n,), 0, views)
        return features[jnp.arange(n), view]


@dataclasses.dataclass(frozen=True)
class View:
    """A change of an image before its features are computed.

    Attributes:
        mirrored: whether the image is mirrored, left to right.
        augment: random augmentation, a function of the image and `number`.
        number: number of the random draw.
    """

    mirrored: bool = False
    augment: Augment | None = None
    number: int = 0


def views_of(mirror: bool, augment: Augment, views: int) -> tuple[View, ...]:
    """The image itself, its mirror image, and random views.

    Args:
        mirror: whether the mirror image is a view.
        augment: augmentation of the random views.
        views: number of all views.
    """
    fixed = (View(), View(mirrored=True)) if mirror else (View(),)
    count = views - len(fixed)
    return fixed + tuple(View(augment=augment, number=i) for i in range(count))


class FeatureCache:
    """Features of one network, on disk.

    Args:
        network: from float images to features.
        key: name of the network, its weights and the preparation of images.
        data_dir: root of the cache, as in `image_cache.cache_directory`.
    """

    def __init__(
        self, network: nnx.Module, key: str, *, data_dir: str | Path | None = None
    ):
        root = Path(data_dir or tfds.core.constants.DATA_DIR) / "tripletjax-features"
        self.network, self.directory = network, root / digest_of([f"{FORMAT} {key}"])

    def of(
        self, images: ImageArray, views: Sequence[View], *, what: str, progress: bool
    ) -> KeptFeatures:
        """Read the features of images, and compute those that are missing.

        Args:
            images: uint8 ``[n, height, width, channels]``.
            views: views of each image.
            what: name of the images, for the progress bar.
            progress: whether to show a progress bar.

        Returns:
            Features ``[n, views, f]``.
        """
        n, *shape = images.shape
        if not n:
            return KeptFeatures(images, np.zeros((0, len(views), 1), np.float32))
        size = max(1, PIXELS // int(np.prod(shape[:2])))
        digests = [
            digest_of_image(image)
            for start in range(0, n, size)
            for image in images[start : start + size]
        ]
        features = []
        for view in views:
            title = f"features of {what}, view {len(features) + 1} of {len(views)}"
            features.append(
                self._of_view(
                    images, digests, view, size=size, title=title, progress=progress
                )
            )
        return KeptFeatures(images, np.stack(features, axis=1))

    def _of_view(
        self,
        images: ImageArray,
        digests: Sequence[str],
        view: View,
        *,
        size: int,
        title: str,
        progress: bool,
    ) -> np.ndarray:
        """Features ``[n, f]`` of a view; each new file has those of `size` images."""
        folder = self.directory / digest_of([f"{view} {tuple(images.shape[1:])}"])
        features = _read(folder)
        rows = {d: row for row, d in enumerate(digests) if d not in features}
        missing = list(rows)
        disable = not progress or not missing
        with tqdm(total=len(missing), desc=title, unit="image", disable=disable) as bar:
            for start in range(0, len(missing), size):
                part = missing[start : start + size]
                pixels = images[np.array([rows[digest] for digest in part])]
                computed = self._compute(pixels, part, view)
                _write(folder, part, computed)
                features |= dict(zip(part, computed))
                bar.update(len(part))
        return np.stack([features[digest] for digest in digests])

    def _compute(
        self, images: np.ndarray, digests: Sequence[str], view: View
    ) -> np.ndarray:
        if view.mirrored:
            images = images[:, :, ::-1]
        if view.augment is None:
            return np.asarray(embed_images(self.network, images))
        # One seed per image: a feature does not depend on the rest of its batch.
        seeds = np.array([int(digest[:8], 16) for digest in digests], np.uint32)
        size, parts = batch_size_for(images), []
        for start in range(0, len(images), size):
            augmented = _augment(
                images[start : start + size],
                seeds[start : start + size],
                view.number,
                augment=view.augment,
            )
            parts.append(np.asarray(embed_images(self.network, np.asarray(augmented))))
        return np.concatenate(parts)


@functools.partial(jax.jit, static_argnames="augment")
def _augment(images: Array, seeds: Array, number: int, *, augment: Augment) -> Array:
    def one(image: Array, seed: Array) -> Array:
        key = jax.random.fold_in(jax.random.key(number), seed)
        return augment(key, image[None])[0]

    return jax.vmap(one)(as_floats(images), seeds)


def _read(folder: Path) -> dict[str, np.ndarray]:
    """Features of the files of a folder, by the digests of their images."""
    features = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            arrays = load_file(file)
        except (OSError, SafetensorError):
            # A damaged file; its features are computed again.
            file.unlink(missing_ok=True)
            continue
        digests = [digest.tobytes().hex() for digest in arrays["digests"]]
        features |= dict(zip(digests, arrays["features"]))
    return features


def _write(folder: Path, digests: Sequence[str], features: np.ndarray) -> None:
    file = folder / f"{uuid.uuid4().hex}.safetensors"
    numbers = np.frombuffer(bytes.fromhex("".join(digests)), np.uint8)
    arrays = {"digests": numbers.reshape(len(digests), -1), "features": features}
    with one_line_errors(folder, "written"):
        folder.mkdir(parents=True, exist_ok=True)
        with replaced(file) as part:
            save_file(arrays, part)
