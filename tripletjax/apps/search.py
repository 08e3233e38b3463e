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
import lancedb
import numpy as np
import pyarrow as pa
from lancedb.index import IvfFlat
from tqdm import tqdm

from tripletjax.apps.images import decoded, encoded
from tripletjax.apps.rejections import Rejections
from tripletjax.learn.digests import digest_of
from tripletjax.learn.embedder import ImageEmbedder
from tripletjax.learn.folder_listing import find_files
from tripletjax.learn.image_io import (
    ImageError,
    open_image,
    read_ahead,
    read_image_file,
)

# Of the layout of the table; another number refuses older ones.
FORMAT = "1"
# Of the cells of an approximate search this share is looked into.
PROBED = 0.05
# So many pairs are measured at a time, and so many values stand in one condition.
PAIRS = 2**18
CONDITION = 1000


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
    """

    def __init__(
        self, folder: str | Path, database: str | Path, embedder: ImageEmbedder
    ):
        self.folder, self.database = Path(folder).resolve(), Path(database).resolve()
        self.embedder = embedder
        if not self.folder.is_dir():
            raise FileNotFoundError(f"there is no folder {folder}.")
        self.database.mkdir(parents=True, exist_ok=True)
        self._lance = lancedb.connect(self.database)
        self._name = f"folder-{digest_of([os.fsencode(self.folder)])}"
        self._table: Any = None
        if self._name in self._tables():
            self._table = self._lance.open_table(self._name)
            self._check(self._table)

    def __len__(self) -> int:
        return 0 if self._table is None else self._table.count_rows()

    def update(
        self,
        *,
        progress: bool = False,
        waiting: Callable[[], None] | None = None,
    ) -> Changes:
        """Brings the index to what the folder holds now.

        Images whose content is known, by whatever path, are not embedded again.

        Args:
            progress: whether to show a progress bar.
            waiting: is called if another process updates an index of the database,
                whose end is waited for.

        Raises:
            OSError: if the folder cannot be read or the index cannot be written.
        """
        with self._alone(waiting):
            return self._update(progress)

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
        dim = self._table.schema.field("vector").type.list_size
        if x.shape[1] != dim:
            raise ValueError(f"vectors must have {dim} dimensions, got {x.shape[1]}.")
        for label in classes or ():
            if not self._table.count_rows(_in_folder(label)):
                raise ValueError(
                    f"classes must be folders of the index, got {label!r}."
                )
        found, left = {}, list(range(len(x)))
        most = k + 1 + max(map(len, without), default=0)
        while left:
            rows = self._nearest(x[left], most, classes, within, approximate)
            again = []
            for query, hits in zip(left, rows):
                kept = [hit for hit in hits if hit.path not in without[query]]
                # Of equally far ones there may be more, which come before by path.
                cut = len(hits) == most and len(kept) >= k
                if cut and kept[-1].distance <= kept[k - 1].distance:
                    again.append(query)
                    continue
                kept.sort(key=lambda hit: (hit.distance, hit.path))
                found[query] = kept[:k]
            left, most = again, 4 * most
        return [found[query] for query in range(len(x))]

    @property
    def has_approximate(self) -> bool:
        """Whether `build_approximate` was called."""
        return self._table is not None and bool([*self._table.list_indices()])

    def build_approximate(self) -> None:
        """Shares out the vectors into cells, of which a search looks into the nearest.

        Worth its time from some 300,000 images on. Images that come later are looked at
        one by one until the next update puts them into their cells, too.
        """
        if len(self):
            cells = max(1, round(math.sqrt(len(self))))
            config = IvfFlat(distance_type="l2", num_partitions=cells)
            self._table.create_index("vector", config=config)

    def duplicates(self, within: float) -> list[list[str]]:
        """Groups of images that are linked by distances of at most `within`.

        Args:
            within: the largest Euclidean distance of two images that are the same.

        Returns:
            Paths in order, groups of at least two, the largest group first.
        """
        from scipy.sparse.csgraph import connected_components
        from sklearn.neighbors import radius_neighbors_graph

        if not within >= 0:
            raise ValueError(f"within must be at least 0, got {within}.")
        if len(self) < 2:
            return []
        paths, x = self.vectors()
        x = np.asarray(x, np.float64)
        # Found by products, whose rounding moves even equal vectors apart: a little
        # further than asked for, and then measured by differences.
        rounding = 1e-10 * np.max(np.sum(x * x, axis=1))
        links = radius_neighbors_graph(x, math.sqrt(within**2 + rounding)).tocoo()
        parts = max(1, -(-links.nnz // PAIRS))
        ends = (np.array_split(rows, parts) for rows in links.coords)
        near = [
            np.linalg.norm(x[one] - x[other], axis=1) <= within
            for one, other in zip(*ends)
        ]
        links.data = np.concatenate(near)
        links = links.tocsr()
        # What is stored as False would count as a link.
        links.eliminate_zeros()
        _, group = connected_components(links, directed=False)
        members = collections.defaultdict(list)
        for path, number in zip(paths, group.tolist()):
            members[number].append(path)
        several = [sorted(some) for some in members.values() if len(some) > 1]
        return sorted(several, key=lambda some: (-len(some), some))

    def vectors(self) -> tuple[list[str], np.ndarray]:
        """Paths in order, and their vectors ``[n, d]``."""
        if self._table is None:
            return [], np.zeros((0, 0), np.float32)
        rows = self._rows(self._table, ["path", "vector"]).sort_by("path")
        return rows["path"].to_pylist(), _matrix(rows["vector"])

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
            rows = self._rows(self._table, ["path"], _one_of("path", paths))
            return (rows["path"].to_pylist() or paths)[0]
        return paths[0] if paths else None

    def file_of(self, path: str) -> Path:
        """The file of a path of the index."""
        return self.folder / decoded(path)

    def _update(self, progress: bool) -> Changes:
        # Another process may have made it meanwhile.
        if self._table is None and self._name in self._tables():
            self._table = self._lance.open_table(self._name)
            self._check(self._table)
        if self._table is not None:
            self._table.checkout_latest()
        gone = [table for table in self._others() if not _folder_of(table).is_dir()]
        donors = [*([self._table] if self._table is not None else []), *gone]
        before = self._stamps(self._table)
        moved_here = {}
        for table in gone:
            moved_here |= self._stamps(table)

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
                old = self._known_vectors(donors, {*digests.values()} - {*prepared})
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
                bar.update(len(part))
        removed = [
            path
            for path in before
            if path not in stamps and not listing.may_hold(decoded(path))
        ]
        skipped += [f"{path}: {reason}" for path, (_, reason) in rejected.items()]
        unusable += rejected
        self._delete([*removed, *(path for path in unusable if path in before)])
        rejections.replace(rejected)
        notes = listing.notes
        notes += self._drop_what_has_moved(gone)
        if self._table is not None and files:
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
            self._table = self._lance.create_table(self._name, schema=schema)
        (
            self._table.merge_insert("path")
            .when_matched_update_all()
            .when_not_matched_insert_all()
            .execute(pa.table(columns, schema=schema))
        )

    def _delete(self, paths: Sequence[str]) -> None:
        for start in range(0, len(paths), CONDITION):
            self._table.delete(_one_of("path", paths[start : start + CONDITION]))

    def _nearest(
        self,
        x: np.ndarray,
        most: int,
        classes: Sequence[str] | None,
        within: float | None,
        approximate: bool,
    ) -> list[list[Hit]]:
        query = self._table.search(
            x if len(x) > 1 else x[0], vector_column_name="vector"
        )
        query = query.distance_type("l2").limit(most)
        if approximate:
            query = query.nprobes(max(1, round(PROBED * math.sqrt(len(self)))))
        else:
            query = query.bypass_vector_index()
        query = query.select(["path", "label", "_distance"])
        if classes is not None:
            condition = " OR ".join(map(_in_folder, classes)) or "false"
            query = query.where(condition, prefilter=True)
        rows = query.to_arrow()
        hits: list[list[Hit]] = [[] for _ in x]
        numbers = rows["query_index"].to_pylist() if len(x) > 1 else [0] * len(rows)
        columns = (rows[name].to_pylist() for name in ("path", "_distance", "label"))
        for number, path, square, label in zip(numbers, *columns):
            distance = math.sqrt(max(square, 0.0))
            if within is None or distance <= within:
                hits[number].append(Hit(path, distance, label))
        return hits

    def _known_vectors(
        self, tables: Sequence[Any], digests: set[str]
    ) -> dict[str, np.ndarray]:
        """Vectors of contents that are known, by their digests."""
        found = {}
        for table in tables:
            left = sorted(digests - found.keys())
            for start in range(0, len(left), CONDITION):
                rows = self._rows(
                    table,
                    ["digest", "vector"],
                    _one_of("digest", left[start : start + CONDITION]),
                )
                found |= dict(zip(rows["digest"].to_pylist(), _matrix(rows["vector"])))
        return found

    def _stamps(self, table: Any) -> dict[str, tuple[str, str]]:
        """When the images of a table changed, and digests of them, by path."""
        if table is None:
            return {}
        rows = self._rows(table, ["path", "stamp", "digest"])
        columns = (rows[name].to_pylist() for name in ("path", "stamp", "digest"))
        return {path: (stamp, digest) for path, stamp, digest in zip(*columns)}

    def _rows(self, table: Any, columns: list[str], where: str | None = None) -> Any:
        query = table.search().select(columns).limit(max(table.count_rows(), 1))
        return (query.where(where) if where else query).to_arrow()

    def _tables(self) -> list[str]:
        return [*self._lance.list_tables().tables]

    def _others(self) -> Iterator[Any]:
        """Indexes of other folders by the same embedder."""
        for name in self._tables():
            if name == self._name:
                continue
            table = self._lance.open_table(name)
            told = table.schema.metadata or {}
            if told.get(b"embedder") == self.embedder.key.encode():
                yield table

    def _drop_what_has_moved(self, gone: Sequence[Any]) -> list[str]:
        """Drops indexes of folders that are gone, if all of them is in this one."""
        if not gone:
            return []
        notes, here = [], {digest for _, digest in self._stamps(self._table).values()}
        for table in gone:
            if {digest for _, digest in self._stamps(table).values()} <= here:
                was, now = map(encoded, (_folder_of(table), self.folder))
                notes.append(f"{was} has become {now}")
                self._lance.drop_table(table.name)
        return notes

    def _check(self, table: Any) -> None:
        told = table.schema.metadata or {}
        if told.get(b"format") != FORMAT.encode():
            what = "another version of tripletjax"
        elif told.get(b"embedder") != self.embedder.key.encode():
            what = "another embedder, or another state of the run"
        else:
            return
        raise ValueError(
            f"the index of {self.folder} in {self.database} was made by {what}. Remove "
            f"{self.database / (self._name + '.lance')}, or give another database."
        )

    @contextlib.contextmanager
    def _alone(self, waiting: Callable[[], None] | None) -> Iterator[None]:
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


def _stamp(file: Path) -> str:
    """What is another if a file was written to."""
    told = file.stat()
    return f"{told.st_size} {told.st_mtime_ns} {told.st_ctime_ns}"


def _folder_of(table: Any) -> Path:
    return decoded(table.schema.metadata[b"folder"].decode())


def _matrix(column: Any) -> np.ndarray:
    chunk = column.combine_chunks()
    return chunk.flatten().to_numpy().reshape(len(chunk), chunk.type.list_size)


def _one_of(column: str, values: Sequence[str]) -> str:
    quoted = ", ".join("'" + value.replace("'", "''") + "'" for value in values)
    return f"{column} IN ({quoted})"


def _in_folder(folder: str) -> str:
    """The condition that an image lies in a folder of the index or below it."""
    label = posixpath.normpath(folder) if folder else ""
    if label == ".":
        return "true"
    own = label.replace("'", "''")
    return f"(label = '{own}' OR starts_with(label, '{own}/'))"
