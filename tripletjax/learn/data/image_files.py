"""Image files and pictures: found, opened, and made into arrays of one shape."""

import contextlib
import functools
import importlib
import re
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from PIL import ExifTags, Image, UnidentifiedImageError

from tripletjax.learn.files import check_regular

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
