"""Image files: their paths as text, as they are given, and as they are shown."""

import os
import re
from pathlib import Path

import numpy as np
from PIL import Image

from tripletjax.learn.data.image_files import open_image
from tripletjax.learn.data.image_shape import to_rgb

# The longer side of images in a picture, in pixels.
SIDE = 112


def opened(file: Path) -> Image.Image:
    """An image file that somebody has named.

    Raises:
        OSError: if it cannot be read; says which.
    """
    try:
        return open_image(file)
    except OSError as error:
        raise OSError(f"{file} cannot be read: {error}") from error


def thumbnail(file: Path) -> np.ndarray:
    """A small image on a white square; an empty one if it is no longer there."""
    try:
        return shrunk(open_image(file))
    except OSError:
        return np.full((SIDE, SIDE, 3), 255, np.uint8)


def shrunk(image: Image.Image) -> np.ndarray:
    """An image on a white square, uint8 ``[SIDE, SIDE, 3]``."""
    sheet = Image.new("RGB", (SIDE, SIDE), "white")
    image = to_rgb(image)
    image.thumbnail((SIDE, SIDE))
    if max(image.size) < SIDE:
        scale = SIDE // max(image.size)
        image = image.resize((image.width * scale, image.height * scale), 0)
    sheet.paste(image, ((SIDE - image.width) // 2, (SIDE - image.height) // 2))
    return np.asarray(sheet)


def encoded(path: Path) -> str:
    """A path as text, also where its bytes are none; undone by `decoded`."""
    text = os.fsencode(path.as_posix()).replace(b"\\", b"\\\\")
    return text.decode(errors="backslashreplace")


def decoded(text: str) -> Path:
    """The path of `encoded`."""
    parts = re.split(r"(\\\\|\\x[0-9a-f]{2})", text)
    return Path(
        os.fsdecode(
            b"".join(
                b"\\"
                if part == r"\\"
                else bytes.fromhex(part[2:])
                if part.startswith("\\x")
                else part.encode()
                for part in parts
            )
        )
    )
