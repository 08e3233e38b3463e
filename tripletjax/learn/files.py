"""Digests of files, files written aside and renamed, and free paths."""

import contextlib
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

# The size of a digest, in bytes.
SIZE = 16


def digest_of(parts: Iterable[str | bytes | memoryview]) -> str:
    """Digest of texts and bytes, one after the other."""
    digest = hashlib.blake2b(digest_size=SIZE)
    for part in parts:
        digest.update(part.encode() if isinstance(part, str) else part)
    return digest.hexdigest()


def check_regular(path: str | Path) -> None:
    """Raise OSError for a pipe, a socket or a device, whose content may never end."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError("it is not a regular file")


def digest_of_file(path: str | Path) -> str:
    """Digest of the content of a regular file."""
    check_regular(path)
    with Path(path).open("rb") as file:
        digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=SIZE))
    return digest.hexdigest()


def digest_of_image(image: np.ndarray) -> str:
    """Digest of the pixels of an image."""
    return digest_of([np.ascontiguousarray(image).data])


def free_path(wanted: Path) -> Path:
    """`wanted`, or the first of wanted-2, wanted-3, ... that does not exist."""
    path, number = wanted, 1
    while path.exists():
        number += 1
        path = wanted.with_name(f"{wanted.name}-{number}")
    return path


def part_of(path: Path) -> Path:
    """The path beside a file at which `replaced` writes its new content."""
    return path.with_name(f"{path.name}.part")


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Write a file, or a new directory, whole or not at all.

    The body writes to the path that it receives. Its end flushes the content to disk
    and renames it to `path`. After an exception, `path` is as before and no part is
    left. A part of a killed process is removed by the next call.

    Args:
        path: replaced if it is a file; a directory must not exist at the end.
    """
    part = part_of(path)
    _remove(part)
    try:
        yield part
        for file in (part, *part.rglob("*")):
            if file.is_file():
                with file.open("rb+") as opened:
                    os.fsync(opened.fileno())
        part.replace(path)
    except BaseException:
        _remove(part)
        raise


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_json(path: Path, values: Any) -> None:
    """Write a JSON file whole or not at all, and create its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(values, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8 whole or not at all."""
    with replaced(path) as part:
        part.write_text(text, encoding="utf-8")
