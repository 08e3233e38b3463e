"""Updates of an index: scan the folder, embed new contents, commit batch by batch.

A process may be killed at any moment. Each batch is one commit, and the next update
goes on after the last one.
"""

import collections
import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from tripletjax.apps.images import decode_path, encode_path
from tripletjax.apps.search.folder_table import (
    Content,
    FolderTable,
    find_vectors,
    folder_of,
)
from tripletjax.apps.search.rejections import Rejections
from tripletjax.learn.counts import counted
from tripletjax.learn.data.folder_listing import FolderListing, find_files
from tripletjax.learn.data.image_files import (
    ImageError,
    open_image,
    read_ahead,
    read_image_file,
)
from tripletjax.learn.embedder import ImageEmbedder
from tripletjax.learn.files import digest_of


@dataclasses.dataclass(frozen=True)
class Changes:
    """The changes of an update, as text one line.

    Attributes:
        images: the number of images in the index.
        added: the number of new images, which were embedded.
        changed: the number of images with a new content, which were embedded again.
        moved: the number of images whose content was known by another path or folder.
        removed: the number of images that left the index.
        skipped: files that are not used, each with the reason.
        notes: lines about folders and other indexes.
    """

    images: int
    added: int
    changed: int
    moved: int
    removed: int
    skipped: tuple[str, ...]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        names = ("added", "changed", "moved", "removed")
        counts = [(name, getattr(self, name)) for name in names]
        counts.append(("skipped", len(self.skipped)))
        text = ", ".join(f"{count:,} {name}" for name, count in counts if count)
        images = counted(self.images, "image")
        return f"{images} in the index ({text or 'no change'})"


@dataclasses.dataclass(frozen=True)
class Scan:
    """The files of a folder, compared with its index by their stamps.

    Attributes:
        listing: all entries of the folder.
        stamps: of each file, by its path.
        unread: files that are new or have another stamp, by path.
        rejected: stamps and reasons of files that an earlier update could not use.
        skipped: lines about other entries that are left out.
    """

    listing: FolderListing
    stamps: dict[str, str]
    unread: dict[str, Path]
    rejected: dict[str, tuple[str, str]]
    skipped: list[str]

    @classmethod
    def of(
        cls,
        folder: Path,
        database: Path,
        known: dict[str, Content],
        rejections: Rejections,
    ) -> "Scan":
        """Scan a folder without its database, which may lie within."""
        listing = find_files(folder)
        skipped = [f"{encode_path(path)}: {why}" for path, why in listing.skipped]
        scan = cls(listing, {}, {}, {}, skipped)
        for file in listing.files:
            if file.is_relative_to(database):
                continue
            path = encode_path(file.relative_to(folder))
            try:
                stamp = scan.stamps[path] = _stamp(file)
            except OSError as error:
                skipped.append(f"{path}: {error}")
                continue
            if path in known and known[path].stamp == stamp:
                continue
            if reason := rejections.reason(path, stamp):
                scan.rejected[path] = stamp, reason
            else:
                scan.unread[path] = file
        return scan


class Update:
    """One update of the rows of a folder.

    Args:
        rows: of the folder, refreshed.
        embedder: makes the vectors.
    """

    def __init__(self, rows: FolderTable, embedder: ImageEmbedder):
        self.rows, self.embedder = rows, embedder
        self.database = rows.database
        self.before = rows.contents()
        # A missing folder may be this one under its earlier name.
        self.elsewhere, self.notes = rows.tables_of_missing_folders()
        self.donors = [*([rows.table] if rows.table is not None else [])]
        self.donors += self.elsewhere
        self.contents_elsewhere: dict[str, Content] = {}
        for contents in self.elsewhere.values():
            self.contents_elsewhere |= contents
        contents = *self.before.values(), *self.contents_elsewhere.values()
        self.known_digests = {content.digest for content in contents}
        self.rejections = Rejections.read(
            self.database.directory / f"{rows.name}.rejected.json", embedder.key
        )
        self.scan = Scan.of(
            rows.folder, self.database.directory, self.before, self.rejections
        )
        self.skipped = self.scan.skipped
        self.rejected = self.scan.rejected
        # Files of this update that cannot be read now.
        self.unreadable: list[str] = []
        # Digests of the files that this update reads.
        self.read_digests: set[str] = set()
        self.counts: collections.Counter[str] = collections.Counter()

    def run(self, *, progress: bool, remove_missing: bool) -> Changes:
        """Bring the rows to the state of the folder.

        Raises:
            FileNotFoundError: if more than half of the index is missing.
            OSError: if the index must be written and cannot be.
        """
        self._add(progress)
        removed = self._remove(remove_missing)
        self.skipped += [f"{path}: {why}" for path, (_, why) in self.rejected.items()]
        if self.database.is_writable:
            self.rejections.replace(self.rejected)
        self.notes += self.scan.listing.notes
        self.notes += self._note_moved_folders(drop=remove_missing)
        table = self.rows.table
        if table is not None and self.scan.unread and self.database.is_writable:
            table.optimize()
        return Changes(
            images=len(self.rows),
            added=self.counts["added"],
            changed=self.counts["changed"],
            moved=self.counts["moved"],
            removed=removed,
            skipped=tuple(self.skipped),
            notes=tuple(self.notes),
        )

    def _add(self, progress: bool) -> None:
        """Embed new contents, and commit each batch of files."""
        unread = [*self.scan.unread]
        bar = tqdm(
            total=len(unread),
            desc="indexing",
            unit="image",
            disable=not (progress and unread),
        )
        with bar:
            for batch, results in read_ahead(unread, self._read):
                paths = [unread[number] for number in batch]
                self._commit(*self._sort(paths, results))
                bar.update(len(batch))

    def _read(self, path: str) -> tuple[str, Any]:
        """The digest of a file, and its prepared image unless the digest is known."""
        content = self.contents_elsewhere.get(path)
        if content is not None and content.stamp == self.scan.stamps[path]:
            return content.digest, None
        return self._read_unless(path, self.known_digests)

    def _read_unless(self, path: str, known: set[str]) -> tuple[str, Any]:
        content = read_image_file(self.scan.unread[path])
        digest = digest_of([content])
        if digest in known:
            return digest, None
        return digest, self.embedder.prepare(open_image(io.BytesIO(content)))

    def _sort(
        self, paths: Sequence[str], results: Sequence[tuple[str, Any] | OSError]
    ) -> tuple[dict[str, str], dict[str, Any]]:
        """Digests by path and prepared images by digest, without files that failed."""
        digests, prepared = {}, {}
        for path, result in zip(paths, results):
            if isinstance(result, ImageError):
                self.rejected[path] = self.scan.stamps[path], str(result)
            elif isinstance(result, OSError):
                self.skipped.append(f"{path}: {result}")
                self.unreadable.append(path)
            else:
                digests[path], image = result
                if image is not None:
                    prepared[result[0]] = image
        return digests, prepared

    def _commit(self, digests: dict[str, str], prepared: dict[str, Any]) -> None:
        """Write the rows of a batch, with known vectors and new ones."""
        if digests and not self.database.is_writable:
            raise self._outdated("images are new or have changed")
        wanted = {*digests.values()} - {*prepared}
        vectors = find_vectors(self.donors, wanted, self.notes)
        for path, digest in [*digests.items()]:
            if digest in vectors or digest in prepared:
                continue
            # The row with this content has just been replaced: read the file again.
            again, image = self._read_unless(path, set())
            if again == digest:
                prepared[digest] = image
            else:
                self.skipped.append(f"{path}: it changed while it was read")
                del digests[path]
        new: dict[str, np.ndarray] = {}
        if prepared:
            new = dict(zip(prepared, self.embedder.embed([*prepared.values()])))
        for path, digest in digests.items():
            if digest in new:
                self.counts["changed" if path in self.before else "added"] += 1
            elif path not in self.before or self.before[path].digest != digest:
                self.counts["moved"] += 1
        self.rows.put(digests, vectors | new, self.scan.stamps)
        if self.rows.table is not None and self.rows.table not in self.donors:
            self.donors.append(self.rows.table)
        self.known_digests |= new.keys()
        self.read_digests |= {*digests.values()}

    def _remove(self, remove_missing: bool) -> int:
        """Delete the rows of missing and unusable files, and count the missing."""
        stamps, before = self.scan.stamps, self.before
        missing = [path for path in before if path not in stamps]
        here = {before[path].digest for path in before if path in stamps}
        here |= self.read_digests
        gone = {path for path in missing if before[path].digest not in here}
        kept: set[str] = set()
        if not remove_missing:
            kept, notes = _unreachable(missing, gone, self.scan.listing)
            self.notes += notes
            self._check_missing(len(gone - kept))
        removed = [path for path in missing if path not in kept]
        unusable = [p for p in (*self.unreadable, *self.rejected) if p in before]
        if removed or unusable:
            if not self.database.is_writable:
                raise self._outdated(
                    counted(len(removed) + len(unusable), "is missing", "are missing")
                )
            self.rows.delete([*removed, *unusable])
        return len(removed)

    def _check_missing(self, gone: int) -> None:
        n = len(self.before)
        if 2 * gone > n:
            raise FileNotFoundError(
                f"{gone:,} of the {counted(n, 'image')} in the index of "
                f"{self.rows.folder} missing. If the folder is on a disk that is not "
                "mounted, mount the disk; to remove missing images from the index, use "
                "--remove-missing (remove_missing=True)."
            )

    def _note_moved_folders(self, *, drop: bool) -> list[str]:
        """Lines about missing folders, all of whose images are in this one."""
        if not self.elsewhere:
            return []
        notes = []
        here = {content.digest for content in self.rows.contents().values()}
        for table, contents in self.elsewhere.items():
            if {content.digest for content in contents.values()} <= here:
                was, now = map(encode_path, (folder_of(table), self.rows.folder))
                note = f"{was} does not exist, and all its images are in {now}; its "
                if drop:
                    self.database.drop(table)
                    notes.append(f"{note}index is removed")
                else:
                    notes.append(f"{note}index is kept (--remove-missing removes it)")
        return notes

    def _outdated(self, why: str) -> OSError:
        return OSError(
            f"the index in {self.database.directory} cannot be written, but must be "
            f"updated: {why} in {self.rows.folder}. Choose another database "
            "(--database DIR)."
        )


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
        folder = listing.folder_away(decode_path(path))
        # An unreadable folder may still hold its copy of an image.
        if listing.may_hold(decode_path(path)) or (folder is not None and path in gone):
            kept.add(path)
            if folder is not None:
                below[folder] += 1
    notes = [
        f"{encode_path(folder)} {listing.away[folder]}: the index keeps {count:,} "
        "images below it (--remove-missing removes them)"
        for folder, count in sorted(below.items())
    ]
    return kept, notes


def _stamp(file: Path) -> str:
    """A text that changes when a file is written."""
    status = file.stat()
    return f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"
