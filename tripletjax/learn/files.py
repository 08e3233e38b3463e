"""Digests of files, files written aside and renamed, and free paths."""

import contextlib
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
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


def part_within(folder: Path) -> Path:
    """The directory within a directory at which `filled` writes its new files."""
    return folder / "unfinished.part"


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Write a file, or a new directory, whole or not at all.

    The body writes to the path that it receives. Its end flushes the content to disk
    and renames it to `path`. After an exception, `path` is as before and no part is
    left. A part of a killed process is removed by the next call.

    Args:
        path: replaced if it is a file; a directory must not exist at the end.
    """
    with replaced_together() as part:
        yield part(path)


@contextlib.contextmanager
def replaced_together() -> Iterator[Callable[[Path], Path]]:
    """Write several files or new directories, all of them or none, as `replaced`.

    Yields:
        A function from a path to the path beside it that the body writes to. It creates
        the folder of the path.
    """
    parts: dict[Path, Path] = {}

    def part(path: Path) -> Path:
        if path not in parts:
            path.parent.mkdir(parents=True, exist_ok=True)
            parts[path] = part_of(path)
            _remove(parts[path])
        return parts[path]

    try:
        with _naming(parts):
            yield part
            for written in parts.values():
                _flush(written)
            for path, written in parts.items():
                written.replace(path)
    except BaseException:
        for written in parts.values():
            _remove(written)
        raise


@contextlib.contextmanager
def filled(folder: Path) -> Iterator[Path]:
    """Fill a new or empty directory with files, all of them or none.

    The directory itself stays: it may be a link, or the root of a file system.

    Yields:
        The directory within that the body writes to.
    """
    is_new, part = not folder.exists(), part_within(folder)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        _remove(part)
        part.mkdir()
        with _naming({folder: part}):
            yield part
            _flush(part)
            for file in part.iterdir():
                file.replace(folder / file.name)
        part.rmdir()
    except BaseException:
        _remove(part)
        if is_new and not any(folder.iterdir()):
            folder.rmdir()
        raise


@contextlib.contextmanager
def _naming(parts: Mapping[Path, Path]) -> Iterator[None]:
    """Name the paths in OSErrors of the body, instead of their parts."""
    try:
        yield
    except OSError as error:
        if isinstance(error.filename, str | os.PathLike):
            name = os.fspath(error.filename)
            for path, part in parts.items():
                name = name.replace(str(part), str(path))
            error.filename = name
        elif error.errno is not None and parts:
            # Errors of writing, such as a full disk, name no file.
            error.filename = str([*parts][-1])
        raise


def _flush(path: Path) -> None:
    """Flush a file, or those of a directory, to disk."""
    for file in (path, *path.rglob("*")):
        if file.is_file():
            with file.open("rb+") as opened:
                os.fsync(opened.fileno())


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
