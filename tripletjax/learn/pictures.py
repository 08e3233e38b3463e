"""Image files and pictures: found, opened, and made into arrays of one shape."""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
# The longer side that images are seen at: lines need fewer pixels than photographs,
# which are kept at twice the size, for a part of them to be looked at.
GREY_SIZE, COLOUR_SIZE, DETAIL = 32, 64, 2


def image_files(folder: Path) -> Iterator[Path]:
    """The images in a folder and in those within, in no particular order.

    Raises:
        OSError: if a folder cannot be read.
    """
    seen = set()
    for directory, folders, files in os.walk(folder, onerror=_fail, followlinks=True):
        # A link may lead back to where it is.
        real = os.path.realpath(directory)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in files:
            if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                yield Path(directory) / name


def _fail(error: OSError) -> None:
    raise error


@dataclasses.dataclass(frozen=True)
class Shape:
    """What every image of a dataset, or of a run, is made into.

    Attributes:
        height: in pixels.
        width: in pixels.
        channels: 1 for grey, 3 for colour.
    """

    height: int
    width: int
    channels: int

    @classmethod
    def of(
        cls,
        sizes: Sequence[tuple[int, int]],
        colour: bool,
        size: int | None,
        *,
        photos: bool = False,
    ) -> "Shape":
        """The shape of the median image, its longer side at most `size`.

        Photographs are kept larger, if they are.
        """
        width, height = np.median(np.array(sizes), axis=0)
        longest = max(width, height)
        if size is None:
            target = min(COLOUR_SIZE if colour or photos else GREY_SIZE, longest)
        else:
            target = size
        if photos:
            target = max(target, min(DETAIL * (size or COLOUR_SIZE), longest))
        scale = target / longest
        height, width = (max(1, round(scale * side)) for side in (height, width))
        return cls(height, width, 3 if colour else 1)

    def fit(self, image: Image.Image) -> np.ndarray:
        """An image as uint8 ``[height, width, channels]``, never distorted.

        What is left at two sides has the mean colour of the image's border.
        """
        image = flat(image).convert("RGB" if self.channels == 3 else "L")
        scale = min(self.width / image.width, self.height / image.height)
        width, height = (max(1, round(scale * side)) for side in image.size)
        if (width, height) != image.size:
            image = image.resize((width, height), Image.Resampling.LANCZOS)
        pixels = np.asarray(image).reshape(height, width, self.channels)
        if (height, width) == (self.height, self.width):
            return pixels
        border = pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]
        mean = np.concatenate(border).mean(axis=0).round().astype(np.uint8)
        whole = np.broadcast_to(mean, (self.height, self.width, self.channels)).copy()
        top, left = (self.height - height) // 2, (self.width - width) // 2
        whole[top : top + height, left : left + width] = pixels
        return whole


@dataclasses.dataclass(frozen=True)
class View:
    """What a network sees of images of one shape: a part, at another size.

    Attributes:
        box: top, left, bottom and right of the part, as shares of height and width.
        height: of what is seen, in pixels.
        width: likewise.
    """

    box: tuple[float, float, float, float]
    height: int
    width: int

    @classmethod
    def of(
        cls,
        shape: Sequence[int],
        box: tuple[float, float, float, float],
        size: int,
    ) -> "View":
        """A box of images ``height, width``, its longer side `size` pixels."""
        top, left, bottom, right = box
        height, width = (bottom - top) * shape[0], (right - left) * shape[1]
        scale = size / max(height, width)
        return cls(box, *(max(1, round(scale * side)) for side in (height, width)))

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Parts of uint8 images ``[n, height, width, channels]``."""
        n, height, width, channels = images.shape
        top, left, bottom, right = self.box
        box = left * width, top * height, right * width, bottom * height
        seen = np.empty((n, self.height, self.width, channels), np.uint8)
        if seen.shape == images.shape and box == (0, 0, width, height):
            return images

        def see(place: int) -> None:
            image = images[place]
            part = Image.fromarray(image[..., 0] if channels == 1 else image).resize(
                (self.width, self.height), Image.Resampling.LANCZOS, box
            )
            seen[place] = np.asarray(part).reshape(seen.shape[1:])

        with ThreadPoolExecutor() as pool:
            # The list raises what went wrong.
            list(pool.map(see, range(n)))
        return seen


def flat(image: Image.Image) -> Image.Image:
    """Without what Pillow would lose: 16 bits are scaled, transparency is white."""
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, np.float64)
        top = 65535 if values.max() > 255 else 255
        return Image.fromarray(np.uint8(np.clip(values * (255 / top), 0, 255)))
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image


def is_colour(image: Image.Image) -> bool:
    """Whether it shows any colour, whatever its format could show."""
    image = flat(image)
    if image.mode in ("1", "L"):
        return False
    small = image.convert("RGB")
    small.thumbnail((256, 256))
    pixels = np.asarray(small, np.int16)
    # Lossy formats leave a little where there is none.
    return bool(np.ptp(pixels, axis=-1).mean() > 2)


def open_image(file: str | Path) -> Image.Image:
    """An image file, upright and decoded.

    Raises:
        OSError: if it is no image, or broken.
    """
    try:
        with Image.open(file) as image:
            return ImageOps.exif_transpose(image)
    except OSError:
        raise
    except Exception as error:
        # Broken files make Pillow's decoders raise whatever they come across.
        raise OSError(f"{type(error).__name__}: {error}") from error
