"""Image files that a user names: paths as text, thumbnails."""

import os
import re
from pathlib import Path

import numpy as np
from PIL import Image

from tripletjax.learn.data.image_files import open_image
from tripletjax.learn.data.image_shape import to_rgb

# The sides of a thumbnail, in pixels.
SIDE = 112


def load_image(file: Path) -> Image.Image:
    """Open an image file, with its path in errors.

    Raises:
        OSError: if the file cannot be read.
    """
    try:
        return open_image(file)
    except OSError as error:
        raise OSError(f"{file} cannot be read: {error}") from error


def thumbnail(file: Path) -> np.ndarray:
    """A small image on a white square, empty if the file cannot be read."""
    try:
        return shrink(open_image(file))
    except OSError:
        return np.full((SIDE, SIDE, 3), 255, np.uint8)


def shrink(image: Image.Image) -> np.ndarray:
    """Fit an image into a white square, uint8 ``[SIDE, SIDE, 3]``."""
    sheet = Image.new("RGB", (SIDE, SIDE), "white")
    image = to_rgb(image)
    image.thumbnail((SIDE, SIDE))
    if max(image.size) < SIDE:
        scale = SIDE // max(image.size)
        image = image.resize((image.width * scale, image.height * scale), 0)
    sheet.paste(image, ((SIDE - image.width) // 2, (SIDE - image.height) // 2))
    return np.asarray(sheet)


def encode_path(path: Path) -> str:
    """Write a path as text, even if it is not UTF-8; inverted by `decode_path`."""
    text = os.fsencode(path.as_posix()).replace(b"\\", b"\\\\")
    return text.decode(errors="backslashreplace")


def decode_path(text: str) -> Path:
    """Read a path that `encode_path` wrote."""
    parts = re.split(r"(\\\\|\\x[0-9a-f]{2})", text)
    return Path(os.fsdecode(b"".join(map(_decode_part, parts))))


def _decode_part(part: str) -> bytes:
    if part == r"\\":
        return b"\\"
    if part.startswith("\\x"):
        return bytes.fromhex(part[2:])
    return part.encode()
