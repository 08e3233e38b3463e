"""Image files: formats, opening, and reading ahead with threads."""

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

# The number of files that are read at a time.
READ = 256

# Formats that Pillow may open. Formats that other files resemble come last. Others may
# start a program, as PostScript does, or have no signature.
FORMATS = (
    *("PNG", "JPEG", "GIF", "BMP", "DIB", "TIFF", "WEBP", "AVIF", "HEIF", "PPM"),
    *("JPEG2000", "ICO", "CUR", "ICNS", "PCX", "DCX", "SGI", "SUN", "DDS", "QOI"),
    *("PSD", "FITS", "PIXAR", "MSP", "XBM", "XPM", "TGA"),
)
# Other files that are often among images, by their first bytes.
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
# The key of the number of frames of a file, in the `info` of its image.
FRAMES = "tripletjax frames"
QUIET = threading.Lock()


class ImageError(OSError):
    """A file whose content is not a usable image."""


class ImageTooLargeError(ImageError):
    """An image with more pixels than the limit."""


@functools.cache
def formats() -> tuple[str, ...]:
    """Names of the formats that can be opened, HEIF with the package pillow-heif."""
    Image.init()
    with contextlib.suppress(ImportError):
        importlib.import_module("pillow_heif").register_heif_opener()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def is_image(file: Path) -> bool:
    """Whether the first bytes of a file are an image's."""
    try:
        check_regular(file)
        with file.open("rb") as opened:
            _guarded(_identify, opened)
            return True
    except OSError:
        return False


def read_image_file(file: Path) -> bytes:
    """Read the content of a file whose first bytes are an image's.

    Raises:
        ImageError: if the first bytes are not an image's.
        OSError: if the file is not regular or cannot be read.
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
    """Decode the first frame of an image file, upright.

    Args:
        file: an image by its content, whatever its name.
        most_pixels: the largest number of pixels, checked before decoding; Pillow's
            limit of 179 megapixels if None.

    Raises:
        ImageTooLargeError: if the image has more pixels.
        ImageError: if the content is not an image, or broken.
        OSError: if the file is not regular or cannot be read.
    """
    decode = functools.partial(_decode, most_pixels=most_pixels)
    if not isinstance(file, str | Path):
        return _guarded(decode, file)
    check_regular(file)
    with open(file, "rb") as opened:
        return _guarded(decode, opened)


# The transposition that turns an image upright, by the orientation of its EXIF data.
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
    """Turn an image upright by its EXIF data, if they can be read.

    `ImageOps.exif_transpose` also writes all other metadata, and fails if they are
    broken.
    """
    try:
        orientation: Any = image.getexif().get(ExifTags.Base.Orientation)
        method = TRANSPOSED.get(orientation)
    except Exception:
        # An image with broken metadata is still an image.
        method = None
    return image.copy() if method is None else image.transpose(method)


Result = TypeVar("Result")


def _guarded(function: Callable[[BinaryIO], Result], file: BinaryIO) -> Result:
    """Call a function of an image file, and raise its errors as `ImageError`."""
    try:
        try:
            return function(file)
        except Warning:
            # Warnings of odd images may be errors: decode again without them. Threads
            # share the filters, so that only one of them changes the filters.
            file.seek(0)
            with QUIET, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return function(file)
    except UnidentifiedImageError as error:
        raise ImageError(_describe(file)) from error
    except Image.DecompressionBombError as error:
        raise ImageTooLargeError("it has more pixels than Pillow opens") from error
    except MemoryError as error:
        # Not an ImageError: there may be enough memory later.
        raise OSError("not enough memory to decode it") from error
    except ImageError:
        raise
    except OSError as error:
        if error.errno is not None:
            raise
        # Pillow's own errors of broken images have no number.
        raise ImageError(str(error)) from error
    except Exception as error:
        # Pillow's decoders raise errors of any type for broken files.
        raise ImageError(f"{type(error).__name__}: {error}") from error


def _describe(file: BinaryIO) -> str:
    """The reason why a file is not an image, by its first bytes."""
    file.seek(0)
    start = file.read(START)
    for signature, description in FOREIGN.items():
        if re.match(signature, start, re.DOTALL | re.IGNORECASE):
            if signature == HEIC and "HEIF" in formats():
                return "it is a HEIC image that is broken"
            return f"it is {description}"
    return "it is not a readable image"


def _identify(file: BinaryIO) -> None:
    with Image.open(file, formats=formats()):
        pass


def _decode(file: BinaryIO, *, most_pixels: int | None) -> Image.Image:
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
            # An image with a broken second frame has several frames.
            first.info[FRAMES] = 2
    return first


Item = TypeVar("Item")


def read_ahead(
    items: Sequence[Item], read: Callable[[Item], Result], *, size: int = READ
) -> Iterator[tuple[range, list[Result | OSError]]]:
    """Read files in threads, a part at a time, and the next part meanwhile.

    Args:
        items: the files, or names of them.
        read: reads one of them.
        size: the number of items in a part.

    Yields:
        The numbers of a part's items, and for each the result or its OSError.
    """

    def read_or_error(item: Item) -> Result | OSError:
        try:
            return read(item)
        except OSError as error:
            return error

    parts = [range(i, min(i + size, len(items))) for i in range(0, len(items), size)]
    with ThreadPoolExecutor() as pool:
        ahead = []
        for part, following in zip([range(0), *parts], [*parts, range(0)]):
            now = ahead
            ahead = [pool.submit(read_or_error, items[i]) for i in following]
            if now:
                yield part, [future.result() for future in now]
