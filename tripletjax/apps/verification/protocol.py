"""Pairs of images that a protocol lists, by file name."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tripletjax.apps.verification.lfw import PairsFile
from tripletjax.learn import evaluation
from tripletjax.learn.counts import counted
from tripletjax.learn.data.sources import parse_source


@contextlib.contextmanager
def folder_of(data: str) -> Iterator[Path]:
    """A folder, or a temporary one with the images of a dataset ``tfds:NAME``."""
    if not parse_source(data).in_tfds:
        yield Path(data)
        return
    # The import takes a second, for tensorflow-datasets.
    from tripletjax.learn.data.tfds_catalogue import Catalogue

    with tempfile.TemporaryDirectory() as directory:
        Catalogue.open(data).write(Path(directory))
        yield Path(directory)


def find_pairs(
    protocol: PairsFile, folder: Path, images: evaluation.Embedded
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Find the images of a protocol by their paths without suffixes.

    Returns:
        Numbers of the images of each pair ``[n, 2]``; whether each pair is the same
        ``[n]``; the fold of each ``[n]``; and the number of pairs of skipped images.

    Raises:
        FileNotFoundError: if an image does not exist.
    """
    paths = [file.relative_to(images.root).as_posix() for file in images.files]
    outer = images.root.relative_to(folder.resolve()).as_posix() + "/"
    index_of = {stem(path): number for number, path in enumerate(paths)}
    skipped = {
        stem(line.partition(": ")[0].removeprefix(outer)) for line in images.skipped
    }
    known = index_of.keys() | skipped

    def resolve(path: str) -> str:
        # All images may lie in one folder, without folders of classes.
        name = path.rpartition("/")[2]
        return name if path not in known and name in known else path

    pairs = [
        tuple(map(resolve, both))
        for both in zip(map(stem, protocol.first), map(stem, protocol.second))
    ]
    missing = sorted({p for both in pairs for p in both} - known)
    if missing:
        raise FileNotFoundError(
            "the file of pairs names "
            + counted(len(missing), "image that does", "images that do")
            + f" not exist in {folder}, such as {missing[0]}."
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


def stem(path: str) -> str:
    return path.rpartition(".")[0]
