"""Arrays of images: in memory, in files, or as features."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from tripletjax.learn.errors import one_line_errors

if TYPE_CHECKING:  # Pillow, which arrays do without.
    from tripletjax.learn.data.image_shape import View

# So many images are read from disk, or decoded, at a time, where all are.
READ = 4096


@dataclasses.dataclass(frozen=True, eq=False)
class StoredImages:
    """Images on disk that are read when they are indexed, as an array would be.

    Attributes:
        source: a data source of tensorflow-datasets.
        indices: which of its records, ``[n]``.
        shape: ``(n, height, width, channels)`` of what is seen of them.
        stored: ``(height, width, channels)`` of what is stored.
        view: what is seen of them; all if not given.
        directory: where they are kept, for errors.
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
            seen = some if self.view is None else self.view(some)
            images[start : start + READ] = seen
        return images.reshape(*indices.shape, *self.shape[1:])

    def part(self, index: Any) -> "StoredImages":
        """Some of them, still on disk."""
        indices = self.indices[index]
        shape = len(indices), *self.shape[1:]
        return dataclasses.replace(self, indices=indices, shape=shape)

    def seen(self, view: "View") -> "StoredImages":
        """What is seen of them, still on disk."""
        shape = len(self), view.height, view.width, self.shape[-1]
        return dataclasses.replace(self, shape=shape, view=view)


@dataclasses.dataclass(frozen=True, eq=False)
class KeptFeatures:
    """Images, of which features are given where they are indexed.

    Attributes:
        images: uint8 ``[n, height, width, channels]``.
        features: float32 ``[n, views, f]``: of the image, of its mirror image if that
            counts, and of others at random.
    """

    images: "np.ndarray | StoredImages"
    features: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        return self.features.shape

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, index: Any) -> np.ndarray:
        return self.features[index]

    def part(self, index: Any) -> "KeptFeatures":
        """Some of them."""
        pixels: Any = part_of(self.images, index)
        return KeptFeatures(pixels, self.features[index])


# uint8 ``[n, height, width, channels]``: in memory, or on disk if they do not fit.
Pixels = np.ndarray | StoredImages
# Or with features, which are what is then learnt from.
ImageArray = Pixels | KeptFeatures


def part_of(images: ImageArray, index: Any) -> ImageArray:
    """Some images, wherever they are."""
    return images[index] if isinstance(images, np.ndarray) else images.part(index)


def pixels_of(images: Any) -> Any:
    """Images themselves, where there are features of them."""
    return images.images if isinstance(images, KeptFeatures) else images


class ImageSource(Protocol):
    """Images ``[n, height, width, channels]`` in memory or on disk, by index."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any, /) -> np.ndarray: ...
