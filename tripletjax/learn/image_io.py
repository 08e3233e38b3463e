"""Image files and pictures: found, opened, and made into arrays of one shape."""

import contextlib
import dataclasses
import functools
import importlib
import json
import re
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

# Formats that are opened, as Pillow names them; those that other files resemble come
# last. Others may start a program, as PostScript does, or have no signature.
FORMATS = (
    *("PNG", "JPEG", "GIF", "BMP", "DIB", "TIFF", "WEBP", "AVIF", "HEIF", "PPM"),
    *("JPEG2000", "ICO", "CUR", "ICNS", "PCX", "DCX", "SGI", "SUN", "DDS", "QOI"),
    *("PSD", "FITS", "PIXAR", "MSP", "XBM", "XPM", "TGA"),
)
# Files that are often among images, by their first bytes.
START = 1024
HEIC = rb".{4}ftyp(hei[cmsx]|hev[cx]|mif1|msf1)"
FOREIGN = {
    HEIC: "a HEIC image: pip install pillow-heif adds its decoder",
    rb".{4}ftyp|\x1aE\xdf\xa3|RIFF.{4}AVI |\0\0\x01[\xb3\xba]": "a video",
    rb"%!PS|\xc5\xd0\xd3\xc6": "PostScript, which is not opened: convert it to PNG",
    rb"%PDF-": "a PDF document: convert it to PNG",
    rb"\s*(<\?xml[^>]*>\s*)?(<!.*?>\s*)*<svg": "an SVG drawing: convert it to PNG",
    rb"\s*(<!doctype html|<html)": "a web page",
    rb"version https://git-lfs": "a Git LFS pointer: git lfs pull fetches the image",
    rb"PK\x03\x04|\x1f\x8b|7z\xbc\xaf|Rar!": "an archive: unpack it",
    rb"\Z": "an empty file",
}
# The largest values that grey of more than 8 bits may have, from 1 to 16 bits.
WHITES = (1, 255, 1023, 4095, 16383, 65535)
# The reason why an image of nothing is left out.
BLANK = "blank: all of its pixels are the same"
# How many frames an image's file has, in its `info`.
FRAMES = "tripletjax frames"
QUIET = threading.Lock()


class ImageError(OSError):
    """The content of a file is no image that can be used."""


class ImageTooLargeError(ImageError):
    """An image has more pixels than are decoded."""


@functools.cache
def formats() -> tuple[str, ...]:
    """Formats that can be opened here, HEIF with the package pillow-heif."""
    Image.init()
    with contextlib.suppress(ImportError):
        importlib.import_module("pillow_heif").register_heif_opener()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def is_image(file: Path) -> bool:
    """Whether a file begins as an image does."""
    try:
        check_regular(file)
        with file.open("rb") as opened:
            _guarded(_identify, opened)
            return True
    except OSError:
        return False


def read_image_file(file: Path) -> bytes:
    """Read the content of a file that begins as an image does.

    Raises:
        ImageError: if the file begins otherwise, by its first bytes alone.
        OSError: if it is not a regular file, or cannot be read.
    """
    check_regular(file)
    with file.open("rb") as opened:
        _guarded(_identify, opened)
        opened.seek(0)
        return opened.read()


@functools.cache
def image_suffixes() -> frozenset[str]:
    """Suffixes of image files, such as ``.png``, in lower case."""
    registered = Image.registered_extensions().items()
    return frozenset(suffix for suffix, name in registered if name in formats())


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

    @classmethod
    def read(cls, file: str | Path) -> "ImageSpec":
        """Read the JSON that `tripletjax export` writes beside a file.

        Raises:
            OSError: if it cannot be read.
            ValueError: if it is not such a file.
        """
        try:
            return cls(**json.loads(Path(file).read_text(encoding="utf-8")))
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{file} must be written by tripletjax export: {error}."
            ) from None

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


def open_image(
    file: str | Path | BinaryIO, *, most_pixels: int | None = None
) -> Image.Image:
    """An image file, upright and decoded; of several frames the first.

    Args:
        file: the file, known by its content and not by its name.
        most_pixels: more are refused before they are decoded. If not given, Pillow's
            own limit holds, 179 megapixels.

    Raises:
        ImageTooLargeError: if it has more pixels.
        ImageError: if its content is no image, or broken.
        OSError: if it is not a regular file, or cannot be read.
    """
    decode = functools.partial(_decoded, most_pixels=most_pixels)
    if not isinstance(file, str | Path):
        return _guarded(decode, file)
    check_regular(file)
    with open(file, "rb") as opened:
        return _guarded(decode, opened)


Result = TypeVar("Result")


def _guarded(function: Callable[[BinaryIO], Result], file: BinaryIO) -> Result:
    """Call a function of an image file, and raise its errors as `ImageError`."""
    try:
        try:
            return function(file)
        except Warning:
            # Where warnings are errors, what is odd is still an image. Filters are
            # shared by threads, which wait for one another here.
            file.seek(0)
            with QUIET, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return function(file)
    except UnidentifiedImageError as error:
        raise ImageError(_describe(file)) from error
    except Image.DecompressionBombError as error:
        raise ImageTooLargeError("it has more pixels than Pillow opens") from error
    except MemoryError as error:
        # Later there may be enough.
        raise OSError("not enough memory to decode it") from error
    except ImageError:
        raise
    except OSError as error:
        if error.errno is not None:
            raise
        # Pillow's own errors of broken images have no number.
        raise ImageError(str(error)) from error
    except Exception as error:
        # Broken files make Pillow's decoders raise whatever they come across.
        raise ImageError(f"{type(error).__name__}: {error}") from error


def _describe(file: BinaryIO) -> str:
    """Why a file is no image, by its first bytes."""
    file.seek(0)
    start = file.read(START)
    for signature, description in FOREIGN.items():
        if re.match(signature, start, re.DOTALL | re.IGNORECASE):
            if signature == HEIC and "HEIF" in formats():
                return "it is a HEIC image that is broken"
            return f"it is {description}"
    return "it is no image that can be read"


def _identify(file: BinaryIO) -> None:
    with Image.open(file, formats=formats()):
        pass


def _decoded(file: BinaryIO, *, most_pixels: int | None) -> Image.Image:
    with Image.open(file, formats=formats()) as image:
        width, height = image.size
        if most_pixels is not None and width * height > most_pixels:
            raise ImageTooLargeError(
                f"it has {width:,} x {height:,} pixels, more than {most_pixels:,}"
            )
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
    """Raise ImageError for an image ``[height, width, channels]`` of nothing."""
    if (pixels == pixels[0, 0]).all():
        raise ImageError(BLANK)


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
