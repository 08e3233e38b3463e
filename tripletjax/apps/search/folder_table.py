"""The rows of one folder: path, content, class and vector of each image."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from tripletjax.apps.images import decode_path, encode_path
from tripletjax.apps.search.table import (
    CONDITION,
    Database,
    Table,
    TableError,
    matrix,
    one_of,
)
from tripletjax.learn.files import digest_of

# The layout of the table. A table with another number is refused.
FORMAT = "1"


class Content(NamedTuple):
    """The state of a file: a stamp that changes when it is written, and a digest."""

    stamp: str
    digest: str


class FolderTable:
    """The table of a folder, created with its first row.

    Args:
        database: holds the tables of all folders.
        folder: the indexed folder.
        embedder_key: the key of the embedder that makes the vectors.

    Raises:
        ValueError: if the table was made by another embedder or another version.
        OSError: if the table is damaged.
    """

    def __init__(self, database: Database, folder: Path, embedder_key: str):
        self.database, self.folder = database, folder
        self.embedder_key = embedder_key
        self.name = f"folder-{digest_of([os.fsencode(folder)])}"
        self.table: Table | None = None
        self.refresh()

    def __len__(self) -> int:
        return 0 if self.table is None else len(self.table)

    def refresh(self) -> None:
        """Go on with the rows that other processes have written."""
        if self.table is not None:
            self.table.refresh()
        elif self.name in self.database.names():
            table = self.database.open(self.name)
            self._check(table)
            self.table = table

    def contents(self) -> dict[str, Content]:
        """The content of each image, by its path."""
        return {} if self.table is None else contents_of(self.table)

    def put(
        self,
        digests: dict[str, str],
        vectors: dict[str, np.ndarray],
        stamps: dict[str, str],
    ) -> None:
        """Insert images, and replace those of the same paths, in one commit.

        Args:
            digests: of the images, by path.
            vectors: by digest.
            stamps: by path.
        """
        if not digests:
            return
        x = np.stack([vectors[digest] for digest in digests.values()])
        x = x.astype(np.float32)
        if not np.isfinite(x).all():
            raise ValueError("the embedder must make finite vectors, got NaN or inf.")
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
                "embedder": self.embedder_key,
                "folder": encode_path(self.folder),
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
        if self.table is None:
            self.table = self.database.create(self.name, schema)
        self.table.put(pa.table(columns, schema=schema))

    def delete(self, paths: Sequence[str]) -> None:
        """Delete the rows of these paths."""
        if self.table is not None:
            self.table.delete("path", paths)

    def tables_of_missing_folders(self) -> tuple[dict[Table, dict[str, Content]], list]:
        """Tables of the same embedder whose folder does not exist.

        Returns:
            Each table with its contents, and lines about tables that are damaged.
        """
        tables, notes = {}, []
        for name in self.database.names():
            if name == self.name:
                continue
            try:
                table = self.database.open(name)
                same = table.metadata.get("embedder") == self.embedder_key
                if same and not folder_of(table).is_dir():
                    tables[table] = contents_of(table)
            except TableError as error:
                # The index of this folder does not need the damaged one.
                notes.append(f"of another folder: {error}")
        return tables, notes

    def _check(self, table: Table) -> None:
        if table.metadata.get("format") != FORMAT:
            maker = "another version of tripletjax"
        elif table.metadata.get("embedder") != self.embedder_key:
            maker = "another embedder, or another state of the run"
        else:
            return
        raise ValueError(
            f"the index of {self.folder} in {self.database.directory} was made by "
            f"{maker}. Remove {table.path}, or choose another database (--database "
            "DIR)."
        )


def folder_of(table: Table) -> Path:
    """The folder that a table belongs to."""
    return decode_path(table.metadata["folder"])


def contents_of(table: Table) -> dict[str, Content]:
    """The content of each image of a table, by its path."""
    rows = table.rows(["path", "stamp", "digest"])
    columns = (rows[name].to_pylist() for name in ("path", "stamp", "digest"))
    return {path: Content(stamp, digest) for path, stamp, digest in zip(*columns)}


def find_vectors(
    tables: list[Table], digests: set[str], notes: list[str]
) -> dict[str, np.ndarray]:
    """Vectors of contents that tables have, by digest.

    A damaged table is removed from `tables`, and a line about it added to `notes`.
    """
    vectors: dict[str, np.ndarray] = {}
    for table in [*tables]:
        left = sorted(digests - vectors.keys())
        try:
            for start in range(0, len(left), CONDITION):
                some = one_of("digest", left[start : start + CONDITION])
                rows = table.rows(["digest", "vector"], some)
                pairs = zip(rows["digest"].to_pylist(), matrix(rows["vector"]))
                vectors.update(pairs)
        except TableError as error:
            tables.remove(table)
            notes.append(str(error))
    return vectors
