"""Pairs of images that a protocol lists, by file name."""

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tripletjax.learn import evaluation


@contextlib.contextmanager
def folder_of(data: str) -> Iterator[Path]:
    """A folder as it is, or one that a prepared dataset ``tfds:NAME`` is written to."""
    if not data.startswith("tfds:"):
        yield Path(data)
        return
    # The import takes a second, for tensorflow-datasets.
    from tripletjax.learn.data.tfds_catalogue import Catalogue

    with tempfile.TemporaryDirectory() as directory:
        Catalogue.open(data).write(Path(directory))
        yield Path(directory)


def _indices_of_pairs(
    protocol: Any, folder: Path, found: evaluation.Embedded
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Numbers of the images of given pairs, by their paths without suffixes."""
    paths = [file.relative_to(found.root).as_posix() for file in found.files]
    outer = found.root.relative_to(folder.resolve()).as_posix() + "/"
    index_of = {_stem(path): number for number, path in enumerate(paths)}
    broken = {
        _stem(line.partition(": ")[0].removeprefix(outer)) for line in found.skipped
    }
    there = index_of.keys() | broken

    def listed(path: str) -> str:
        # All images may lie in one folder, and in none of their own names.
        name = path.rpartition("/")[2]
        return name if path not in there and name in there else path

    pairs = [
        tuple(map(listed, both))
        for both in zip(_stems(protocol.first), _stems(protocol.second))
    ]
    missing = sorted({p for both in pairs for p in both} - index_of.keys() - broken)
    if missing:
        raise FileNotFoundError(
            f"the file of pairs names {len(missing):,} images that are not in "
            f"{folder}, such as {missing[0]}."
        )
    whole = np.array([all(path in index_of for path in both) for both in pairs])
    numbers = [
        [index_of[path] for path in both] for both, ok in zip(pairs, whole) if ok
    ]
    return (
        np.array(numbers, int).reshape(-1, 2),
        protocol.same[whole],
        protocol.fold[whole],
        int((~whole).sum()),
    )


def _stem(path: str) -> str:
    return path.rpartition(".")[0]


def _stems(paths: Sequence[str]) -> list[str]:
    return [_stem(path) for path in paths]
