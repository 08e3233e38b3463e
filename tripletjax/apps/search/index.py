"""An index of the images in a folder, and search in it by images.

The index is a table of LanceDB, one row for each image: its path within the folder, a
digest of its content, when it changed, its class (the folder it lies in), its vector.
Every batch of changes is committed at once, so that a process may be killed at any
moment, and the next update goes on. Search is exact.
"""

import collections
import contextlib
import dataclasses
import io
import math
import os
import posixpath
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import filelock
import numpy as np
import pyarrow as pa
from tqdm import tqdm

from tripletjax.apps.images import decoded, encoded
from tripletjax.apps.search.rejections import Rejections
from tripletjax.apps.search.table import (
    CONDITION,
    Database,
    Table,
    TableError,
    matrix,
    one_of,
)
from tripletjax.learn.data.folder_listing import FolderListing, find_files
from tripletjax.learn.data.image_files import (
    ImageError,
    open_image,
    read_ahead,
    read_image_file,
)
from tripletjax.learn.embedder import ImageEmbedder
from tripletjax.learn.files import digest_of

# Of the layout of the table; another number refuses older ones.
FORMAT = "1"
# Of the cells of an approximate search this share is looked into.
PROBED = 0.05
# The number of distances in memory at a time while duplicates are linked.
PAIRS = 2**23
# Images up to this distance are near-duplicates, by default.
DUPLICATE_DISTANCE = 0.1


class Hit(NamedTuple):
    """An image that was found.

    Attributes:
        path: within the folder.
        distance: Euclidean, from the query.
        label: the folder that it lies in, within the folder of the index; ``""`` if it
            lies there itself.
    """

    path: str
    distance: float
    label: str


@dataclasses.dataclass(frozen=True)
class Changes:
    """What an update has found and done.

    Attributes:
        images: how many images the index now has.
        added: how many are new, and were embedded.
        changed: how many have another content than before, and were embedded again.
        moved: how many have a content that was known by another path or folder.
        removed: how many are no longer there.
        skipped: files that could not be used, and why.
        notes: what else was found.
    """

    images: int
    added: int
    changed: int
    moved: int
    removed: int
    skipped: tuple[str, ...]
    notes: tuple[str, ...]


class Index:
    """The images of a folder by their vectors.

    Args:
        folder: the folder of images, which is only read.
        database: a directory of LanceDB, made if there is none; it may hold the indexes
            of many folders.
        embedder: what makes vectors of images.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if the folder's index was made by another embedder.
        OSError: if the index is damaged, or the database cannot be made; all methods
            raise it for a damaged index.
    """

    def __init__(
        self, folder: str | Path, database: str | Path, embedder: ImageEmbedder
    ):
        self.folder, self.database = Path(folder).resolve(), Path(database).resolve()
        self.embedder = embedder
        if not self.folder.is_dir():
            raise FileNotFoundError(f"there is no folder {folder}.")
        self._tables = Database(self.database)
        self._name = f"folder-{digest_of([os.fsencode(self.folder)])}"
        self._table: Table | None = None
        self._open()

    def __len__(self) -> int:
        return 0 if self._table is None else len(self._table)

    def update(
        self,
        *,
        progress: bool = False,
        waiting: Callable[[], None] | None = None,
        remove_missing: bool = False,
    ) -> Changes:
        """Brings the index to what the folder holds now.

        Images whose content is known, by whatever path, are not embedded again. An
        index that can only be read is searched as it is if nothing has changed.

        Missing files may lie on a disk that is not mounted. Their vectors are kept if
        their sub-folder is empty, a broken link or not readable. The update stops if
        more than half of the index is missing otherwise.

        Args:
            progress: whether to show a progress bar.
            waiting: is called if another process updates an index of the database,
                whose end is waited for.
            remove_missing: whether missing images leave the index however many they
                are, and with them indexes of folders that do not exist, all of whose
                images are in this folder.

        Raises:
            FileNotFoundError: if more than half of the index is missing.
            OSError: if the folder cannot be read or the index cannot be written.
        """
        with self._alone(waiting):
            return self._update(progress, remove_missing)

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
        """The k nearest images of each query, exactly; of equally far ones by path.

        Args:
            vectors: of the queries, ``[q, d]``.
            k: how many at most.
            within: the largest distance.
            classes: only images that lie in these folders of the index, at any depth.
            leave_out: for each query, paths of images that are no hits.
            approximate: whether to look only where most of the nearest are, by
                `build_approximate`; all images are looked at if that was never called.

        Returns:
            Hits for each query, the nearest first.

        Raises:
            ValueError: if an argument is out of range, or a vector is not finite.
        """
        x = np.asarray(vectors, np.float32)
        if x.ndim != 2:
            raise ValueError(f"vectors must be [q, d], got {x.shape}.")
        if not np.isfinite(x).all():
            raise ValueError("vectors must be finite.")
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}.")
        if within is not None and not within >= 0:
            raise ValueError(f"within must be at least 0, got {within}.")
        without = [()] * len(x) if leave_out is None else leave_out
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
        found, left = {}, list(range(len(x)))
        most = k + 1 + max(map(len, without), default=0)
        while left and n:
            most = min(most, n)
            rows = self._nearest(x[left], most, classes, within, approximate)
            again = []
            for query, hits in zip(left, rows):
                kept = [hit for hit in hits if hit.path not in without[query]]
                # Of equally far ones there may be more, which come before by path.
                cut = len(hits) == most < n and len(kept) >= k
                if cut and kept[-1].distance <= kept[k - 1].distance:
                    again.append(query)
                    continue
                kept.sort(key=lambda hit: (hit.distance, hit.path))
                found[query] = kept[:k]
            left, most = again, 4 * most
        return [found.get(query, []) for query in range(len(x))]

    @property
    def has_approximate(self) -> bool:
        """Whether `build_approximate` was called."""
        return self._table is not None and self._table.has_cells

    def build_approximate(self) -> None:
        """Shares out the vectors into cells, of which a search looks into the nearest.

        Worth its time from some 300,000 images on. Images that come later are looked at
        one by one until the next update puts them into their cells, too.
        """
        if self._table is not None and len(self):
            self._table.create_cells(max(1, round(math.sqrt(len(self)))))

    def duplicates(self, within: float = DUPLICATE_DISTANCE) -> list[list[str]]:
        """Groups of images that are linked by distances of at most `within`.

        It compares all pairs, in memory for the vectors and some 100 MB.

        Args:
            within: the largest Euclidean distance of two images that are the same.

        Returns:
            Paths in order, groups of at least two, the largest group first.
        """
        if not within >= 0:
            raise ValueError(f"within must be at least 0, got {within}.")
        paths, x = self.vectors()
        group = linked_groups(x, within)
        members = collections.defaultdict(list)
        for path, number in zip(paths, group.tolist()):
            members[number].append(path)
        several = [sorted(some) for some in members.values() if len(some) > 1]
        return sorted(several, key=lambda some: (-len(some), some))

    def vectors(self) -> tuple[list[str], np.ndarray]:
        """Paths in order, and their vectors ``[n, d]``."""
        if self._table is None:
            return [], np.zeros((0, 0), np.float32)
        rows = self._table.rows(["path", "vector"]).sort_by("path")
        return rows["path"].to_pylist(), matrix(rows["vector"])

    def path_of(self, file: str | Path) -> str | None:
        """The path of a file within the folder, or None if it lies elsewhere.

        Of two paths to it through a link, that which is in the index.
        """
        file = Path(os.path.abspath(file))
        paths = [
            encoded(one.relative_to(self.folder))
            for one in dict.fromkeys([file, file.resolve()])
            if one.is_relative_to(self.folder)
        ]
        if len(paths) > 1 and self._table is not None:
            rows = self._table.rows(["path"], one_of("path", paths))
            return (rows["path"].to_pylist() or paths)[0]
        return paths[0] if paths else None

    def file_of(self, path: str) -> Path:
        """The file of a path of the index."""
        return self.folder / decoded(path)

    def _open(self) -> None:
        """Opens the table of the folder, which another process may have made."""
        if self._table is not None:
            self._table.refresh()
        elif self._name in self._tables.names():
            self._table = self._tables.open(self._name)
            self._check(self._table)

    def _update(self, progress: bool, remove_missing: bool) -> Changes:
        self._open()
        away, notes = self._away()
        donors = [*([self._table] if self._table is not None else []), *away]
        before = _stamps(self._table)
        moved_here = {}
        for stamps_there in away.values():
            moved_here |= stamps_there

        listing = find_files(self.folder)
        skipped = [f"{encoded(path)}: {why}" for path, why in listing.skipped]
        rejections = Rejections.read(
            self.database / f"{self._name}.rejected.json", self.embedder.key
        )
        files, stamps, rejected = {}, {}, {}
        for file in listing.files:
            if file.is_relative_to(self.database):
                continue
            path = encoded(file.relative_to(self.folder))
            try:
                stamps[path] = _stamp(file)
            except OSError as error:
                skipped.append(f"{path}: {error}")
                continue
            if before.get(path, (None, None))[0] == stamps[path]:
                continue
            if reason := rejections.reason(path, stamps[path]):
                rejected[path] = stamps[path], reason
                continue
            files[path] = file
        known = {digest for _, digest in (*before.values(), *moved_here.values())}
        known_here: set[str] = set()
        counts, unusable = collections.Counter(), []

        def read(path: str) -> tuple[str, Any]:
            """The content's digest, and what the embedder takes unless it is known."""
            stamp, digest = moved_here.get(path, (None, ""))
            if stamp == stamps[path]:
                return digest, None
            return self._read(files[path], known)

        paths = [*files]
        bar = tqdm(
            total=len(files),
            desc="indexing",
            unit="image",
            disable=not (progress and files),
        )
        with bar:
            for part, made in read_ahead(paths, read):
                digests, prepared = {}, {}
                for number, what in zip(part, made):
                    path = paths[number]
                    if isinstance(what, ImageError):
                        rejected[path] = stamps[path], str(what)
                        continue
                    if isinstance(what, OSError):
                        skipped.append(f"{path}: {what}")
                        unusable.append(path)
                        continue
                    digests[path] = what[0]
                    if what[1] is not None:
                        prepared[what[0]] = what[1]
                if digests and not self._tables.is_writable:
                    raise self._outdated("images are new or have changed")
                old = _known_vectors(donors, {*digests.values()} - {*prepared}, notes)
                for path, digest in [*digests.items()]:
                    if digest in old or digest in prepared:
                        continue
                    # Where it was known has just got another content: read again.
                    again, what = self._read(files[path], set())
                    if again == digest:
                        prepared[digest] = what
                    else:
                        skipped.append(f"{path}: it changed while it was read")
                        del digests[path]
                new = {}
                if prepared:
                    new = dict(zip(prepared, self.embedder.embed([*prepared.values()])))
                for path, digest in digests.items():
                    if digest in new:
                        counts["changed" if path in before else "added"] += 1
                    elif before.get(path, ("", ""))[1] != digest:
                        counts["moved"] += 1
                self._write(digests, old | new, stamps)
                if self._table is not None and self._table not in donors:
                    donors.append(self._table)
                known |= new.keys()
                known_here |= {*digests.values()}
                bar.update(len(part))
        now = {before[path][1] for path in before if path in stamps} | known_here
        missing = [path for path in before if path not in stamps]
        gone = {path for path in missing if before[path][1] not in now}
        kept = set()
        if not remove_missing:
            kept, kept_notes = _unreachable(missing, gone, listing)
            notes += kept_notes
            self._check_missing(len(gone - kept), len(before))
        removed = [path for path in missing if path not in kept]
        skipped += [f"{path}: {reason}" for path, (_, reason) in rejected.items()]
        unusable += rejected
        unusable = [path for path in unusable if path in before]
        if self._table is not None and (removed or unusable):
            if not self._tables.is_writable:
                raise self._outdated(f"{len(removed) + len(unusable):,} are missing")
            self._table.delete("path", [*removed, *unusable])
        if self._tables.is_writable:
            rejections.replace(rejected)
        notes += listing.notes
        notes += self._moved_folders(away, drop=remove_missing)
        if self._table is not None and files and self._tables.is_writable:
            # Many small pieces are put together, and earlier states dropped.
            self._table.optimize()
        return Changes(
            images=len(self),
            added=counts["added"],
            changed=counts["changed"],
            moved=counts["moved"],
            removed=len(removed),
            skipped=tuple(skipped),
            notes=tuple(notes),
        )

    def _read(self, file: Path, known: set[str]) -> tuple[str, Any]:
        """The content's digest, and what the embedder takes unless it is known."""
        content = read_image_file(file)
        digest = digest_of([content])
        if digest in known:
            return digest, None
        return digest, self.embedder.prepare(open_image(io.BytesIO(content)))

    def _write(
        self,
        digests: dict[str, str],
        vectors: dict[str, np.ndarray],
        stamps: dict[str, str],
    ) -> None:
        """Puts images in, or replaces those of the same paths."""
        if not digests:
            return
        x = np.stack([vectors[digest] for digest in digests.values()])
        x = x.astype(np.float32)
        if not np.isfinite(x).all():
            raise ValueError("the embedder has made a vector that is not finite.")
        schema = pa.schema(
            [
                ("path", pa.string()),
                ("digest", pa.string()),
                ("stamp", pa.string()),
                ("label", pa.string()),
                ("vector", pa.list_(pa.float32(), x.shape[1])),
            ],
            metadata={
                "format": FORMAT,
                "embedder": self.embedder.key,
                "folder": encoded(self.folder),
            },
        )
        columns = {
            "path": [*digests],
            "digest": [*digests.values()],
            "stamp": [stamps[path] for path in digests],
            "label": [path.rpartition("/")[0] for path in digests],
            "vector": pa.FixedSizeListArray.from_arrays(
                pa.array(x.ravel()), x.shape[1]
            ),
        }
        if self._table is None:
            self._table = self._tables.create(self._name, schema)
        self._table.put(pa.table(columns, schema=schema))

    def _nearest(
        self,
        x: np.ndarray,
        most: int,
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
            most,
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

    def _away(self) -> tuple[dict[Table, dict[str, tuple[str, str]]], list[str]]:
        """Indexes by the same embedder of folders that do not exist, and notes.

        With stamps and digests of their images.
        """
        away, notes = {}, []
        for name in self._tables.names():
            if name == self._name:
                continue
            try:
                table = self._tables.open(name)
                same = table.metadata.get("embedder") == self.embedder.key
                if same and not _folder_of(table).is_dir():
                    away[table] = _stamps(table)
            except TableError as error:
                # The index of this folder does not need it.
                notes.append(f"of another folder: {error}")
        return away, notes

    def _moved_folders(
        self, away: dict[Table, dict[str, tuple[str, str]]], *, drop: bool
    ) -> list[str]:
        """Folders that do not exist, all of whose images are in this one."""
        if not away:
            return []
        notes, here = [], {digest for _, digest in _stamps(self._table).values()}
        for table, stamps in away.items():
            if {digest for _, digest in stamps.values()} <= here:
                was, now = map(encoded, (_folder_of(table), self.folder))
                note = f"{was} does not exist, and all its images are in {now}; its "
                if drop:
                    self._tables.drop(table)
                    notes.append(f"{note}index is removed")
                else:
                    notes.append(f"{note}index is kept (--remove-missing removes it)")
        return notes

    def _check_missing(self, gone: int, n: int) -> None:
        if 2 * gone > n:
            raise FileNotFoundError(
                f"{gone:,} of the {n:,} images in the index of {self.folder} are "
                "missing. If they are on a disk that is not mounted, mount the disk; "
                "to remove them from the index, use --remove-missing "
                "(remove_missing=True)."
            )

    def _outdated(self, why: str) -> OSError:
        return OSError(
            f"the index in {self.database} cannot be written, but must be updated: "
            f"{why} in {self.folder}. Choose another database (--database DIR)."
        )

    def _check(self, table: Table) -> None:
        if table.metadata.get("format") != FORMAT:
            what = "another version of tripletjax"
        elif table.metadata.get("embedder") != self.embedder.key:
            what = "another embedder, or another state of the run"
        else:
            return
        raise ValueError(
            f"the index of {self.folder} in {self.database} was made by {what}. Remove "
            f"{table.path}, or choose another database (--database DIR)."
        )

    @contextlib.contextmanager
    def _alone(self, waiting: Callable[[], None] | None) -> Iterator[None]:
        if not self._tables.is_writable:
            # An update only reads here.
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


def linked_groups(x: np.ndarray, within: float) -> np.ndarray:
    """The number of the group of each vector, linked by distances of at most `within`.

    Args:
        x: vectors ``[n, d]``.
        within: the largest Euclidean distance of a link.

    Returns:
        Integers ``[n]``: the lowest index in the group.
    """
    n, x = len(x), np.asarray(x, np.float64)
    group = np.arange(n)
    squares = np.sum(x * x, axis=1)
    # Products round even equal vectors apart: they choose candidates a little further
    # away, whose distances are then computed by differences.
    limit = within**2 + 1e-10 * np.max(squares, initial=0.0)
    start = 0
    while start < n:
        stop = start + max(1, PAIRS // (n - start))
        # Pairs with earlier vectors are done.
        later = x[start:]
        squared = (-2 * x[start:stop]) @ later.T
        squared += squares[start:]
        squared += squares[start:stop, None]
        close = squared <= limit
        for i in np.flatnonzero(np.count_nonzero(close, axis=1) > 1):
            row = start + i
            others = start + np.flatnonzero(close[i])
            others = others[group[others] != group[row]]
            far = np.linalg.norm(x[others] - x[row], axis=1) > within
            merged = np.unique(group[[row, *others[~far]]])
            if len(merged) > 1:
                group[np.isin(group, merged)] = merged[0]
        start = stop
    return group


def _unreachable(
    missing: Sequence[str], gone: set[str], listing: FolderListing
) -> tuple[set[str], list[str]]:
    """Missing images that may come back, and notes of the folders above them.

    Args:
        missing: paths in the index without a file.
        gone: those of them whose content is at no other path.
        listing: of the folder.
    """
    kept, below = set(), collections.Counter()
    for path in missing:
        folder = listing.folder_away(decoded(path))
        # An unreadable folder may still hold its copy of an image.
        if listing.may_hold(decoded(path)) or (folder is not None and path in gone):
            kept.add(path)
            if folder is not None:
                below[folder] += 1
    notes = [
        f"{encoded(folder)} {listing.away[folder]}: the index keeps {count:,} images "
        "below it (--remove-missing removes them)"
        for folder, count in sorted(below.items())
    ]
    return kept, notes


def _stamp(file: Path) -> str:
    """What is another if a file was written to."""
    status = file.stat()
    return f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"


def _stamps(table: Table | None) -> dict[str, tuple[str, str]]:
    """Stamps and digests of the images of a table, by path."""
    if table is None:
        return {}
    rows = table.rows(["path", "stamp", "digest"])
    columns = (rows[name].to_pylist() for name in ("path", "stamp", "digest"))
    return {path: (stamp, digest) for path, stamp, digest in zip(*columns)}


def _known_vectors(
    tables: list[Table], digests: set[str], notes: list[str]
) -> dict[str, np.ndarray]:
    """Vectors of contents that are known, by their digests.

    A damaged table is taken from `tables`, and named in `notes`.
    """
    known = {}
    for table in [*tables]:
        left = sorted(digests - known.keys())
        try:
            for start in range(0, len(left), CONDITION):
                some = one_of("digest", left[start : start + CONDITION])
                rows = table.rows(["digest", "vector"], some)
                known |= dict(zip(rows["digest"].to_pylist(), matrix(rows["vector"])))
        except TableError as error:
            tables.remove(table)
            notes.append(str(error))
    return known


def _in_folder(folder: str) -> str:
    """The condition that an image lies in a folder of the index or below it."""
    label = posixpath.normpath(folder) if folder else ""
    if label == ".":
        return "true"
    own = label.replace("'", "''")
    return f"(label = '{own}' OR starts_with(label, '{own}/'))"


def _folder_of(table: Table) -> Path:
    return decoded(table.metadata["folder"])
