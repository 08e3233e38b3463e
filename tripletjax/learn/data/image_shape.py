"""Size, colour and background of images: from decoded pixels to network input."""

import dataclasses
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from tripletjax.learn.data.image_files import ImageError, open_image

# The longer side of images for a network: lines need fewer pixels than photographs.
# Photographs are cached at twice the size, so that a network can look at a part.
GREY_SIZE, COLOUR_SIZE, DETAIL = 32, 64, 2
# The largest values that grey of more than 8 bits may have, from 1 to 16 bits.
WHITES = (1, 255, 1023, 4095, 16383, 65535)
# The reason for skipping an image without content.
BLANK = "blank: all of its pixels are the same"


@dataclasses.dataclass(frozen=True)
class ImageSpec:
    """The shape of all images of a dataset or a run.

    Attributes:
        height: in pixels.
        width: in pixels.
        channels: 1 for grey, 3 for colour.
        white: the value that is white in grey images of more than 8 bits.
        background: the colour behind transparency, black or white.
    """

    height: int
    width: int
    channels: int
    white: float = 65535
    background: str = "white"

    @classmethod
    def of(
        cls,
        sizes: Sequence[tuple[int, int]],
        colour: bool,
        size: int | None,
        *,
        photos: bool = False,
        white: float = 65535,
        background: str = "white",
    ) -> "ImageSpec":
        """The shape of the median image, with a longer side of at most `size`.

        Photographs have up to twice the size.
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
        return cls(height, width, 3 if colour else 1, white, background)

    @classmethod
    def read(cls, file: str | Path) -> "ImageSpec":
        """Read the JSON that `tripletjax export` writes beside a file.

        Raises:
            OSError: if the file cannot be read.
            ValueError: if another program wrote the file.
        """
        try:
            return cls(**json.loads(Path(file).read_text(encoding="utf-8")))
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{file} must be written by tripletjax export: {error}."
            ) from None

    def fit(self, image: Image.Image) -> np.ndarray:
        """Fit an image to uint8 ``[height, width, channels]`` without distortion.

        The margins at two sides have the mean colour of the image's border.
        """
        image = flat(image, white=self.white, background=self.background)
        image = image.convert("RGB" if self.channels == 3 else "L")
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


def prepare_images(
    files: Sequence[str | Path | BinaryIO], spec: ImageSpec | str | Path
) -> np.ndarray:
    """Prepare image files as a run does, for a file that `tripletjax export` wrote.

    Images are turned upright, reduced to 8 bits, laid on the background, and fitted
    without distortion. Needs JAX, NumPy and Pillow.

    Args:
        files: paths of image files, or open binary files.
        spec: of the images, or the path of the JSON file beside the exported one.

    Returns:
        uint8 ``[n, height, width, channels]``.

    Raises:
        OSError: if a file cannot be read as an image.
        ValueError: if there are no files.
    """
    if not files:
        raise ValueError("files must not be empty.")
    spec = spec if isinstance(spec, ImageSpec) else ImageSpec.read(spec)
    return np.stack([spec.fit(open_image(file)) for file in files])


# Top, left, bottom and right of a part of an image, as shares of height and width.
Box = tuple[float, float, float, float]
WHOLE: Box = (0.0, 0.0, 1.0, 1.0)


@dataclasses.dataclass(frozen=True)
class View:
    """A part of images of one shape, resized for a network.

    Attributes:
        box: the part, as shares of the image.
        height: after resizing, in pixels.
        width: after resizing, in pixels.
    """

    box: Box
    height: int
    width: int

    @classmethod
    def of(
        cls, shape: Sequence[int], box: Box, size: int, *, multiple: int = 1
    ) -> "View":
        """The view of a box, with a longer side of `size` pixels.

        Args:
            shape: height and width of the images.
            box: the part.
            size: longer side of the view, in pixels.
            multiple: sides are rounded to a multiple of it.
        """
        top, left, bottom, right = box
        height, width = (bottom - top) * shape[0], (right - left) * shape[1]
        scale = size / max(height, width)
        sides = (
            multiple * max(1, round(scale * side / multiple))
            for side in (height, width)
        )
        return cls(box, *sides)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Crop and resize uint8 images ``[n, height, width, channels]``."""
        n, height, width, channels = images.shape
        top, left, bottom, right = self.box
        box = left * width, top * height, right * width, bottom * height
        seen = np.empty((n, self.height, self.width, channels), np.uint8)
        if seen.shape == images.shape and box == (0, 0, width, height):
            return images

        def see(index: int) -> None:
            image = images[index]
            part = Image.fromarray(image[..., 0] if channels == 1 else image).resize(
                (self.width, self.height), Image.Resampling.LANCZOS, box
            )
            seen[index] = np.asarray(part).reshape(seen.shape[1:])

        with ThreadPoolExecutor() as pool:
            # The list raises errors of the threads.
            list(pool.map(see, range(n)))
        return seen


def flat(
    image: Image.Image, *, white: float | None = None, background: str = "white"
) -> Image.Image:
    """Scale an image to 8 bits, and lay it on a background if it is transparent.

    If `white` is None, it follows from the image alone.
    """
    if is_wide(image):
        values = np.nan_to_num(np.asarray(image, np.float64))
        top = white_of(peak(image)) if white is None else white
        bright = np.rint(np.clip(values / top, 0, 1) * 255)
        return Image.fromarray(bright.astype(np.uint8))
    if has_alpha(image):
        image = image.convert("RGBA")
        behind = Image.new("RGBA", image.size, background)
        return Image.alpha_composite(behind, image).convert("RGB")
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image to RGB by itself alone.

    White is the largest value of the least number of bits that holds the image's
    values. The background of transparency is the one with more contrast.
    """
    background = "white"
    if has_alpha(image):
        background = background_of([image.resize((64, 64))])
    return flat(image, background=background).convert("RGB")


def is_wide(image: Image.Image) -> bool:
    """Whether an image is grey of more than 8 bits."""
    return image.mode.startswith("I") or image.mode == "F"


def has_alpha(image: Image.Image) -> bool:
    return "A" in image.getbands() or "transparency" in image.info


def peak(image: Image.Image) -> float:
    """The largest value of an image that is grey of more than 8 bits."""
    values = np.asarray(image, np.float64)
    return float(np.max(values, where=np.isfinite(values), initial=0))


def white_of(peak: float) -> float:
    """The white of values up to a peak: the largest value of the fewest bits."""
    return next((white for white in WHITES if peak <= white), peak)


def background_of(images: Sequence[Image.Image]) -> str:
    """The background of transparent images: black if white would leave no contrast."""
    extents = {
        background: [
            np.ptp(np.asarray(flat(image, background=background).convert("L")))
            for image in images
        ]
        for background in ("white", "black")
    }
    blank = {name: np.median(values) < 8 for name, values in extents.items() if values}
    return "black" if blank.get("white") and not blank["black"] else "white"


def is_colour(image: Image.Image) -> bool:
    """Whether an image shows any colour, whatever its format."""
    image = flat(image)
    if image.mode in ("1", "L"):
        return False
    small = image.convert("RGB")
    small.thumbnail((256, 256))
    pixels = np.asarray(small, np.int16)
    # Lossy formats add a little colour to grey images.
    return bool(np.ptp(pixels, axis=-1).mean() > 2)


def check_not_blank(pixels: np.ndarray) -> None:
    """Raise ImageError if all pixels ``[height, width, channels]`` are the same."""
    if (pixels == pixels[0, 0]).all():
        raise ImageError(BLANK)
