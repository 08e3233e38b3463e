"""An index of the images in a folder, and search in it by images.

The index is a table of LanceDB with one row for each image. A row has the path within
the folder, a digest of the content, a stamp of the file, the class (the folder of the
file) and the vector. Search is exact.
"""

import contextlib
import math
import os
import posixpath
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import filelock
import numpy as np

from tripletjax.apps.images import decode_path, encode_path
from tripletjax.apps.search.duplicates import group_duplicates
from tripletjax.apps.search.folder_table import FolderTable
from tripletjax.apps.search.table import Database, Table, matrix, one_of
from tripletjax.apps.search.update import Changes, Update
from tripletjax.learn.embedder import ImageEmbedder

# The share of the cells that an approximate search looks into.
PROBED = 0.05
# Images up to this distance are near-duplicates, by default.
DUPLICATE_DISTANCE = 0.1


class Hit(NamedTuple):
    """An image near a query.

    Attributes:
        path: within the folder.
        distance: Euclidean, from the query.
        label: the folder of the image, within the folder of the index; ``""`` for the
            folder of the index itself.
    """

    path: str
    distance: float
    label: str


class Index:
    """The images of a folder by their vectors.

    Args:
        folder: the folder of images, which is only read.
        database: a directory of LanceDB, created if it does not exist; it may hold the
            indexes of many folders.
        embedder: makes vectors of images.

    Raises:
        FileNotFoundError: if the folder does not exist.
        ValueError: if the folder's index was made by another embedder.
        OSError: if the index is damaged, or the database cannot be created. All methods
            raise it for a damaged index.
    """

    def __init__(
        self, folder: str | Path, database: str | Path, embedder: ImageEmbedder
    ):
        self.folder, self.database = Path(folder).resolve(), Path(database).resolve()
        self.embedder = embedder
        if not self.folder.is_dir():
            raise FileNotFoundError(f"the folder {folder} does not exist.")
        self._database = Database(self.database)
        self._rows = FolderTable(self._database, self.folder, embedder.key)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def _table(self) -> Table | None:
        return self._rows.table

    def update(
        self,
        *,
        progress: bool = False,
        waiting: Callable[[], None] | None = None,
        remove_missing: bool = False,
    ) -> Changes:
        """Bring the index to the present state of the folder.

        Images whose content is known, by whatever path, are not embedded again. An
        index that can only be read is searched as it is if nothing has changed.

        Missing files may lie on a disk that is not mounted. Their vectors are kept if
        their sub-folder is empty, a broken link or not readable. The update stops if
        more than half of the index is missing otherwise.

        Args:
            progress: whether to show a progress bar.
            waiting: called before this process waits for another one that updates an
                index of the database.
            remove_missing: whether missing images leave the index, however many they
                are. Indexes of missing folders, all of whose images are in this folder,
                are removed, too.

        Raises:
            FileNotFoundError: if more than half of the index is missing.
            OSError: if the folder cannot be read or the index cannot be written.
        """
        with self._lock(waiting):
            self._rows.refresh()
            update = Update(self._rows, self.embedder)
            return update.run(progress=progress, remove_missing=remove_missing)

    def search(
        self,
        vectors: np.ndarray,
        k: int = 8,
        *,
        within: float | None = None,
        classes: Sequence[str] | None = None,
        leave_out: Sequence[Sequence[str]] | None = None,
        approximate: bool = False,
    ) -> list[list[Hit]]:
        """Find the k nearest images of each query, ties in the order of paths.

        Args:
            vectors: of the queries, ``[q, d]``.
            k: the largest number of hits.
            within: the largest distance.
            classes: folders of the index, at any depth, that hits must lie in.
            leave_out: for each query, paths of images that are no hits.
            approximate: whether to look only into the nearest cells, after
                `build_approximate`; without cells, all images are compared.

        Returns:
            Hits for each query, the nearest first.

        Raises:
            ValueError: if an argument is out of range, or a vector is not finite.
        """
        x = np.asarray(vectors, np.float32)
        _check_query(x, k, within)
        excluded = [()] * len(x) if leave_out is None else leave_out
        if self._table is None:
            return [[] for _ in x]
        dim, n = self._table.dim, len(self._table)
        if x.shape[1] != dim:
            raise ValueError(f"vectors must have {dim} dimensions, got {x.shape[1]}.")
        for label in classes or ():
            if not self._table.count(_in_folder(label)):
                raise ValueError(
                    f"classes must be folders of the index, got {label!r}."
                )
        results, left = {}, list(range(len(x)))
        limit = k + 1 + max(map(len, excluded), default=0)
        while left and n:
            limit = min(limit, n)
            rows = self._nearest(x[left], limit, classes, within, approximate)
            again = []
            for query, hits in zip(left, rows):
                kept = [hit for hit in hits if hit.path not in excluded[query]]
                # Rows beyond the limit may tie with the k-th hit.
                cut = len(hits) == limit < n and len(kept) >= k
                if cut and kept[-1].distance <= kept[k - 1].distance:
                    again.append(query)
                    continue
                kept.sort(key=lambda hit: (hit.distance, hit.path))
                results[query] = kept[:k]
            left, limit = again, 4 * limit
        return [results.get(query, []) for query in range(len(x))]

    @property
    def has_approximate(self) -> bool:
        """Whether `build_approximate` was called."""
        return self._table is not None and self._table.has_cells

    def build_approximate(self) -> None:
        """Partition the vectors into cells, for approximate search.

        Worth its time from some 300,000 images on. New images are compared one by one
        until the next update puts them into cells.
        """
        if self._table is not None and len(self):
            self._table.create_cells(max(1, round(math.sqrt(len(self)))))

    def duplicates(self, within: float = DUPLICATE_DISTANCE) -> list[list[str]]:
        """Groups of images that are linked by distances of at most `within`.

        All pairs are compared, in memory for the vectors and some 100 MB.

        Args:
            within: the largest Euclidean distance of two duplicates.

        Returns:
            Paths in order, groups of at least two, the largest group first.
        """
        if not within >= 0:
            raise ValueError(f"within must be at least 0, got {within}.")
        return group_duplicates(*self.vectors(), within)

    def vectors(self) -> tuple[list[str], np.ndarray]:
        """Paths in order, and their vectors ``[n, d]``."""
        if self._table is None:
            return [], np.zeros((0, 0), np.float32)
        rows = self._table.rows(["path", "vector"]).sort_by("path")
        return rows["path"].to_pylist(), matrix(rows["vector"])

    def path_of(self, file: str | Path) -> str | None:
        """The path of a file within the folder, or None if it lies elsewhere.

        If two paths lead to the file through a link, the path in the index.
        """
        file = Path(os.path.abspath(file))
        paths = [
            encode_path(one.relative_to(self.folder))
            for one in dict.fromkeys([file, file.resolve()])
            if one.is_relative_to(self.folder)
        ]
        if len(paths) > 1 and self._table is not None:
            rows = self._table.rows(["path"], one_of("path", paths))
            return (rows["path"].to_pylist() or paths)[0]
        return paths[0] if paths else None

    def file_of(self, path: str) -> Path:
        """The file of a path of the index."""
        return self.folder / decode_path(path)

    def _nearest(
        self,
        x: np.ndarray,
        limit: int,
        classes: Sequence[str] | None,
        within: float | None,
        approximate: bool,
    ) -> list[list[Hit]]:
        table = self._table
        if table is None:
            return [[] for _ in x]
        where = None
        if classes is not None:
            where = " OR ".join(map(_in_folder, classes)) or "false"
        rows = table.nearest(
            x,
            limit,
            ["path", "label"],
            where=where,
            cells=max(1, round(PROBED * math.sqrt(len(self)))) if approximate else None,
        )
        hits: list[list[Hit]] = [[] for _ in x]
        numbers = rows["query_index"].to_pylist() if len(x) > 1 else [0] * len(rows)
        columns = (rows[name].to_pylist() for name in ("path", "_distance", "label"))
        for number, path, square, label in zip(numbers, *columns):
            distance = math.sqrt(max(square, 0.0))
            if within is None or distance <= within:
                hits[number].append(Hit(path, distance, label))
        return hits

    @contextlib.contextmanager
    def _lock(self, waiting: Callable[[], None] | None) -> Iterator[None]:
        if not self._database.is_writable:
            # An update that cannot write needs no lock.
            yield
            return
        lock = filelock.FileLock(self.database / "lock")
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            if waiting is not None:
                waiting()
            lock.acquire()
        try:
            yield
        finally:
            lock.release()


def _check_query(x: np.ndarray, k: int, within: float | None) -> None:
    if x.ndim != 2:
        raise ValueError(f"vectors must be [q, d], got {x.shape}.")
    if not np.isfinite(x).all():
        raise ValueError("vectors must be finite.")
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}.")
    if within is not None and not within >= 0:
        raise ValueError(f"within must be at least 0, got {within}.")


def _in_folder(folder: str) -> str:
    """The condition that an image lies in a folder of the index, at any depth."""
    label = posixpath.normpath(folder) if folder else ""
    if label == ".":
        return "true"
    own = label.replace("'", "''")
    return f"(label = '{own}' OR starts_with(label, '{own}/'))"
