"""Digests of files, files written aside and renamed, and free paths."""

import hashlib
import json
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

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


def free_path(wanted: Path) -> Path:
    """`wanted`, or the first of wanted-2, wanted-3, ... that does not exist."""
    path, number = wanted, 1
    while path.exists():
        number += 1
        path = wanted.with_name(f"{wanted.name}-{number}")
    return path


def write_json(path: Path, values: Any) -> None:
    """Writes a file of JSON whole or not at all, in a folder that need not be there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(values, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    part = path.with_name(path.name + ".part")
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
