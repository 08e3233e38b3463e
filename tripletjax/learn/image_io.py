"""Image files and pictures: found, opened, and made into arrays of one shape."""

import dataclasses
import functools
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeVar

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from tripletjax.learn.digests import check_regular

# The longer side that images are seen at: lines need fewer pixels than photographs,
# which are kept at twice the size, for a part of them to be looked at.
GREY_SIZE, COLOUR_SIZE, DETAIL = 32, 64, 2
# Files are read so many at a time.
READ = 256

# The largest values that grey of more than 8 bits may have, from 1 to 16 bits.
WHITES = (1, 255, 1023, 4095, 16383, 65535)
# The reason why an image of nothing is left out.
BLANK = "blank: all of its pixels are the same"
# How many frames an image's file has, in its `info`.
FRAMES = "tripletjax frames"
QUIET = threading.Lock()


def is_image(file: Path) -> bool:
    """Whether a file begins as an image does."""
    try:
        check_regular(file)
        with Image.open(file):
            return True
    except Exception:
        # Broken files make Pillow's decoders raise whatever they come across.
        return False


@functools.cache
def image_suffixes() -> frozenset[str]:
    """Suffixes of image files, such as ``.png``, in lower case."""
    return frozenset(Image.registered_extensions())


@dataclasses.dataclass(frozen=True)
class ImageSpec:
    """What every image of a dataset, or of a run, is made into.

    Attributes:
        height: in pixels.
        width: in pixels.
        channels: 1 for grey, 3 for colour.
        white: the value that is white in grey images of more than 8 bits.
        background: what shows through transparency, black or white.
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
        return cls(height, width, 3 if colour else 1, white, background)

    def fit(self, image: Image.Image) -> np.ndarray:
        """An image as uint8 ``[height, width, channels]``, never distorted.

        What is left at two sides has the mean colour of the image's border.
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


class ImageSource(Protocol):
    """Images ``[n, height, width, channels]`` in memory or on disk, by index."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any, /) -> np.ndarray: ...


# Top, left, bottom and right of a part of an image, as shares of height and width.
Box = tuple[float, float, float, float]
WHOLE: Box = (0.0, 0.0, 1.0, 1.0)


@dataclasses.dataclass(frozen=True)
class View:
    """What a network sees of images of one shape: a part, at another size.

    Attributes:
        box: the part.
        height: of what is seen, in pixels.
        width: likewise.
    """

    box: Box
    height: int
    width: int

    @classmethod
    def of(
        cls, shape: Sequence[int], box: Box, size: int, *, multiple: int = 1
    ) -> "View":
        """A box of images ``height, width``, its longer side `size` pixels.

        Sides are rounded to a multiple.
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
        """Parts of uint8 images ``[n, height, width, channels]``."""
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
            # The list raises what went wrong.
            list(pool.map(see, range(n)))
        return seen


def flat(
    image: Image.Image, *, white: float | None = None, background: str = "white"
) -> Image.Image:
    """Without what Pillow would lose: more than 8 bits are scaled, and background
    shows through transparency.

    If `white` is not given, it follows from the image alone.
    """
    if is_wide(image):
        values = np.asarray(image, np.float64)
        top = white_of(peak(image)) if white is None else white
        bright = np.rint(np.clip(values / top, 0, 1) * 255)
        return Image.fromarray(bright.astype(np.uint8))
    if has_alpha(image):
        image = image.convert("RGBA")
        behind = Image.new("RGBA", image.size, background)
        return Image.alpha_composite(behind, image).convert("RGB")
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """An image in RGB, prepared as for a network, but by itself alone.

    White is the least number of bits that holds its values; the background of
    transparency is the one that leaves something to see.
    """
    background = "white"
    if has_alpha(image):
        background = background_of([image.resize((64, 64))])
    return flat(image, background=background).convert("RGB")


def is_wide(image: Image.Image) -> bool:
    """Whether it is grey of more than 8 bits."""
    return image.mode.startswith("I") or image.mode == "F"


def has_alpha(image: Image.Image) -> bool:
    return "A" in image.getbands() or "transparency" in image.info


def peak(image: Image.Image) -> float:
    """The largest value of an image that is grey of more than 8 bits."""
    values = np.asarray(image, np.float64)
    return float(np.max(values, where=np.isfinite(values), initial=0))


def white_of(peak: float) -> float:
    """What is white where values go up to a peak: the least number of bits for it."""
    return next((white for white in WHITES if peak <= white), peak)


def background_of(images: Sequence[Image.Image]) -> str:
    """What is to show through transparency: black where white would leave nothing."""
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
    """Whether it shows any colour, whatever its format could show."""
    image = flat(image)
    if image.mode in ("1", "L"):
        return False
    small = image.convert("RGB")
    small.thumbnail((256, 256))
    pixels = np.asarray(small, np.int16)
    # Lossy formats leave a little where there is none.
    return bool(np.ptp(pixels, axis=-1).mean() > 2)


def open_image(file: str | Path | BinaryIO) -> Image.Image:
    """An image file, upright and decoded; of several frames the first.

    Raises:
        OSError: if it is not a regular file, no image, or broken.
    """
    if isinstance(file, str | Path):
        check_regular(file)
    try:
        try:
            return _decoded(file)
        except Warning:
            # Where warnings are errors, what is odd is still an image. Filters are
            # shared by threads, which wait for one another here.
            with QUIET, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return _decoded(file)
    except UnidentifiedImageError as error:
        # Pillow's own words may have an address of memory in place of a name.
        raise OSError("it is no image that can be read") from error
    except OSError:
        raise
    except Exception as error:
        # Broken files make Pillow's decoders raise whatever they come across.
        raise OSError(f"{type(error).__name__}: {error}") from error


def _decoded(file: str | Path | BinaryIO) -> Image.Image:
    with Image.open(file) as image:
        image.load()
        first = upright(image)
        try:
            first.info[FRAMES] = getattr(image, "n_frames", 1)
        except Warning:
            raise
        except Exception:
            # Frames that are broken are there, too.
            first.info[FRAMES] = 2
    return first


Given = TypeVar("Given")
Made = TypeVar("Made")


def read_ahead(
    items: Sequence[Given], make: Callable[[Given], Made], *, size: int = READ
) -> Iterator[tuple[range, list[Made | OSError]]]:
    """What threads make of files, some at a time, the next ones meanwhile.

    Args:
        items: the files, or whatever stands for them.
        make: of one of them.
        size: of how many at a time.

    Yields:
        Their numbers, and what was made of them or the OSError that was raised.
    """

    def tried(item: Given) -> Made | OSError:
        try:
            return make(item)
        except OSError as error:
            return error

    parts = [range(i, min(i + size, len(items))) for i in range(0, len(items), size)]
    with ThreadPoolExecutor() as pool:
        ahead = []
        for part, following in zip([range(0), *parts], [*parts, range(0)]):
            now, ahead = ahead, [pool.submit(tried, items[i]) for i in following]
            if now:
                yield part, [one.result() for one in now]


def check_not_blank(pixels: np.ndarray) -> None:
    """Raises OSError for an image ``[height, width, channels]`` of nothing."""
    if (pixels == pixels[0, 0]).all():
        raise OSError(BLANK)


# How an image comes upright, by the orientation that a camera has noted.
TRANSPOSED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def upright(image: Image.Image) -> Image.Image:
    """An image turned as its camera was held, if that can be read.

    Pillow's own function writes all other metadata again, and fails where they are
    broken.
    """
    try:
        turned: Any = image.getexif().get(ExifTags.Base.Orientation)
        method = TRANSPOSED.get(turned)
    except Exception:
        # Whatever is wrong with its metadata, it is an image.
        method = None
    return image.copy() if method is None else image.transpose(method)
