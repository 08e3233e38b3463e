"""Features of a frozen backbone, made of every image once and kept on disk.

They are kept by what an image holds, under a key of all else that they depend on: the
weights, the size, and how the image was changed before. Files are only ever added, each
whole or not at all, so that an interrupted run has lost little, and several may share
them.
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

# Another number makes them be made again.
FORMAT = 1
# A file has features of about so many pixels, some minutes' work.
PIXELS = 2**25


@dataclasses.dataclass(frozen=True)
class AnyView:
    """Takes one view of each image at random: ``[n, views, f]`` to ``[n, f]``."""

    def __call__(self, key: Array, features: Array) -> Array:
        n, views, _ = features.shape
        chosen = jax.random.randint(key, (n,), 0, views)
        return features[jnp.arange(n), chosen]


@dataclasses.dataclass(frozen=True)
class View:
    """How an image is changed before its features are made.

    Attributes:
        mirrored: left to right.
        augment: at random, by the image and the number alone.
        number: of several that are drawn.
    """

    mirrored: bool = False
    augment: Augment | None = None
    number: int = 0


def views_of(mirror: bool, augment: Augment, views: int) -> tuple[View, ...]:
    """The image, its mirror image if that counts, and the rest of `views` at random."""
    fixed = (View(), View(mirrored=True)) if mirror else (View(),)
    drawn = views - len(fixed)
    return fixed + tuple(View(augment=augment, number=i) for i in range(drawn))


class FeatureCache:
    """Features that are kept, of one network and size.

    Args:
        network: from float images to features.
        key: of all that features depend on but the image and its view.
        data_dir: as of `image_cache.cache_directory`.
    """

    def __init__(
        self, network: nnx.Module, key: str, *, data_dir: str | Path | None = None
    ):
        root = Path(data_dir or tfds.core.constants.DATA_DIR) / "tripletjax-features"
        self.network, self.directory = network, root / digest_of([f"{FORMAT} {key}"])

    def of(
        self, images: ImageArray, views: Sequence[View], *, what: str, progress: bool
    ) -> KeptFeatures:
        """The features of images, made now where they are not kept.

        Args:
            images: uint8 ``[n, height, width, channels]``.
            views: which of each.
            what: the images are, for the progress bar.
            progress: whether there is one.
        """
        n, *shape = images.shape
        if not n:
            return KeptFeatures(images, np.zeros((0, len(views), 1), np.float32))
        size = max(1, PIXELS // int(np.prod(shape[:2])))
        digests = []
        for start in range(0, n, size):
            digests += [
                digest_of_image(image) for image in images[start : start + size]
            ]
        made = []
        for view in views:
            folder = self.directory / digest_of([f"{view} {tuple(shape)}"])
            kept = _read(folder)
            missing: dict[str, int] = {}
            for index, digest in enumerate(digests):
                if digest not in kept:
                    missing.setdefault(digest, index)
            with tqdm(
                total=len(missing),
                desc=f"features of {what}, view {len(made) + 1} of {len(views)}",
                unit="image",
                disable=not progress or not missing,
            ) as bar:
                todo = list(missing)
                for start in range(0, len(todo), size):
                    some = todo[start : start + size]
                    pixels = images[np.array([missing[digest] for digest in some])]
                    features = self._made(pixels, some, view)
                    _write(folder, some, features)
                    kept |= dict(zip(some, features))
                    bar.update(len(some))
            made.append(np.stack([kept[digest] for digest in digests]))
        return KeptFeatures(images, np.stack(made, axis=1))

    def _made(
        self, images: np.ndarray, digests: Sequence[str], view: View
    ) -> np.ndarray:
        if view.mirrored:
            images = images[:, :, ::-1]
        if view.augment is None:
            return np.asarray(embed_images(self.network, images))
        # By the image alone, whichever others are with it.
        seeds = np.array([int(digest[:8], 16) for digest in digests], np.uint32)
        size, parts = batch_size_for(images), []
        for start in range(0, len(images), size):
            some = _changed(
                images[start : start + size],
                seeds[start : start + size],
                view.number,
                augment=view.augment,
            )
            parts.append(np.asarray(embed_images(self.network, np.asarray(some))))
        return np.concatenate(parts)


@functools.partial(jax.jit, static_argnames="augment")
def _changed(images: Array, seeds: Array, number: int, *, augment: Augment) -> Array:
    def one(image: Array, seed: Array) -> Array:
        key = jax.random.fold_in(jax.random.key(number), seed)
        return augment(key, image[None])[0]

    return jax.vmap(one)(as_floats(images), seeds)


def _read(folder: Path) -> dict[str, np.ndarray]:
    """Features by the digest of the image."""
    kept = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            arrays = load_file(file)
        except (OSError, SafetensorError):
            # Damaged: they are made again.
            file.unlink(missing_ok=True)
            continue
        names = [digest.tobytes().hex() for digest in arrays["digests"]]
        kept |= dict(zip(names, arrays["features"]))
    return kept


def _write(folder: Path, digests: Sequence[str], features: np.ndarray) -> None:
    file = folder / f"{uuid.uuid4().hex}.safetensors"
    numbers = np.frombuffer(bytes.fromhex("".join(digests)), np.uint8)
    arrays = {"digests": numbers.reshape(len(digests), -1), "features": features}
    with one_line_errors(folder, "written"):
        folder.mkdir(parents=True, exist_ok=True)
        with replaced(file) as part:
            save_file(arrays, part)
