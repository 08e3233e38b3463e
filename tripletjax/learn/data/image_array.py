"""Arrays of images: in memory, in files, or with features."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from tripletjax.learn.errors import one_line_errors

if TYPE_CHECKING:  # Pillow, which arrays do without.
    from tripletjax.learn.data.image_shape import View

# The number of images that are read from disk at a time.
READ = 4096


class ImageSource(Protocol):
    """Images ``[n, height, width, channels]`` by index, such as an array."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any, /) -> np.ndarray: ...


class ImageArray(ImageSource, Protocol):
    """Images of a dataset, wherever they are."""

    @property
    def pixels(self) -> "ImageArray":
        """The images themselves, uint8 ``[n, height, width, channels]``."""
        ...

    def part(self, index: Any) -> "ImageArray":
        """Images by their indices or a slice, where they are."""
        ...

    def crop(self, view: "View") -> "ImageArray":
        """The part that a network sees of each image."""
        ...


class ArrayImages(np.ndarray):
    """Images in memory, an array with the methods of an `ImageArray`."""

    @classmethod
    def of(cls, images: np.ndarray) -> "ArrayImages":
        """The same images, not copied."""
        return np.asarray(images).view(cls)

    @property
    def pixels(self) -> "ArrayImages":
        return self

    def part(self, index: Any) -> "ArrayImages":
        return self[index]

    def crop(self, view: "View") -> "ArrayImages":
        return ArrayImages.of(view(self))


@dataclasses.dataclass(frozen=True, eq=False)
class StoredImages:
    """Images on disk that are read when they are indexed.

    Attributes:
        source: a data source of tensorflow-datasets.
        indices: the records of the images, ``[n]``.
        shape: ``(n, height, width, channels)`` after the view.
        stored: ``(height, width, channels)`` on disk.
        view: the part that a network sees; the whole image if None.
        directory: the folder of the files, for errors.
    """

    source: Any
    indices: np.ndarray
    shape: tuple[int, int, int, int]
    stored: tuple[int, int, int]
    view: "View | None" = None
    directory: Path = Path()

    dtype = np.dtype(np.uint8)
    ndim = 4

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: Any) -> np.ndarray:
        indices = self.indices[index]
        images = np.empty((indices.size, *self.shape[1:]), np.uint8)
        for start in range(0, indices.size, READ):
            keys = indices.ravel()[start : start + READ].tolist()
            some = np.empty((len(keys), *self.stored), np.uint8)
            with one_line_errors(self.directory, "read"):
                for row, record in enumerate(self.source.__getitems__(keys)):
                    some[row] = record["image"]
            cropped = some if self.view is None else self.view(some)
            images[start : start + READ] = cropped
        return images.reshape(*indices.shape, *self.shape[1:])

    @property
    def pixels(self) -> "StoredImages":
        return self

    def part(self, index: Any) -> "StoredImages":
        indices = self.indices[index]
        shape = len(indices), *self.shape[1:]
        return dataclasses.replace(self, indices=indices, shape=shape)

    def crop(self, view: "View") -> "StoredImages":
        shape = len(self), view.height, view.width, self.shape[-1]
        return dataclasses.replace(self, shape=shape, view=view)


@dataclasses.dataclass(frozen=True, eq=False)
class KeptFeatures:
    """Images with features of a backbone; training uses features instead of pixels.

    Attributes:
        pixels: uint8 ``[n, height, width, channels]``.
        features: float32 ``[n, views, f]``: of the image, of its mirror image if
            mirrored images are used, and of randomly changed copies.
    """

    pixels: ImageArray
    features: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        return self.features.shape

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, index: Any) -> np.ndarray:
        return self.features[index]

    def part(self, index: Any) -> "KeptFeatures":
        return KeptFeatures(self.pixels.part(index), self.features[index])

    def crop(self, view: "View") -> "KeptFeatures":
        """Unchanged: features are of the cropped images already."""
        return self
