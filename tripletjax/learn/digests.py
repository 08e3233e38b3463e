"""Digests: what files, images and settings hold, in 32 hexadecimal digits."""

import hashlib
import os
import stat
from collections.abc import Iterable
from pathlib import Path

import numpy as np

SIZE = 16


def digest_of(parts: Iterable[str | bytes | memoryview]) -> str:
    """A digest of texts and bytes, one after the other."""
    digest = hashlib.blake2b(digest_size=SIZE)
    for part in parts:
        digest.update(part.encode() if isinstance(part, str) else part)
    return digest.hexdigest()


def check_regular(path: str | Path) -> None:
    """Raise OSError for a pipe, a socket or a device, whose reading may never end."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError("it is not a regular file")


def digest_of_file(path: str | Path) -> str:
    """A digest of what a regular file holds."""
    check_regular(path)
    with Path(path).open("rb") as file:
        digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=SIZE))
    return digest.hexdigest()


def digest_of_image(image: np.ndarray) -> str:
    """A digest of the pixels of an image."""
    return digest_of([np.ascontiguousarray(image).data])
