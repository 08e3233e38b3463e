"""Tables of LanceDB, one for each indexed folder, with errors of one line.

LanceDB raises errors of many types (RuntimeError, ValueError, OSError). This module has
every call of it, and raises a `TableError` that names the table.
"""

import contextlib
import errno
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lancedb
import numpy as np
import pyarrow as pa
from lancedb.index import IvfFlat

from tripletjax.learn.errors import first_line

# The largest number of values in a condition.
CONDITION = 1000
# The line of LanceDB's sources in the text of an error, which may be cut off.
SOURCE = re.compile(r",?\s*(\S+\.rs:\d+(:\d+)?|\S*/\.cargo/\S+)")


class TableError(OSError):
    """A table that LanceDB cannot read or write."""


class Database:
    """A directory of tables.

    Args:
        directory: created if it does not exist.

    Raises:
        OSError: if the directory cannot be created.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(
                f"no index can be created in {directory}: {error.strerror}. Choose "
                "another database (--database DIR)."
            ) from error
        with _one_line(directory, "read"):
            self._lance = lancedb.connect(directory)

    @property
    def is_writable(self) -> bool:
        return os.access(self.directory, os.W_OK)

    def names(self) -> list[str]:
        """The tables, without those whose creation was interrupted.

        A process that is killed inside `create` leaves a folder without a manifest and
        without data. Such a folder holds nothing, and `create` replaces it.
        """
        with _one_line(self.directory, "read"):
            names = self._lance.list_tables().tables
        return [name for name in names if _is_created(self.path_of(name))]

    def path_of(self, name: str) -> Path:
        """The folder of a table, for advice to remove it."""
        return self.directory / f"{name}.lance"

    def open(self, name: str) -> "Table":
        path = self.path_of(name)
        with _one_line(path, "read"):
            return Table(self._lance.open_table(name), path)

    def create(self, name: str, schema: pa.Schema) -> "Table":
        path = self.path_of(name)
        with _one_line(path, "written"):
            return Table(self._lance.create_table(name, schema=schema), path)

    def drop(self, table: "Table") -> None:
        with _one_line(table.path, "removed"):
            self._lance.drop_table(table.name)


class Table:
    """A table of a `Database` with a column ``vector``.

    Attributes:
        name: in its database.
        path: its folder.
        metadata: texts of its schema, by name.
    """

    def __init__(self, lance: Any, path: Path):
        self._lance, self.name, self.path = lance, lance.name, path
        self._schema: pa.Schema = lance.schema
        self.metadata = {
            key.decode(): value.decode(errors="replace")
            for key, value in (self._schema.metadata or {}).items()
        }

    def __len__(self) -> int:
        with _one_line(self.path, "read"):
            return self._lance.count_rows()

    @property
    def dim(self) -> int:
        return self._schema.field("vector").type.list_size

    def refresh(self) -> None:
        """Read the rows that other processes have written."""
        with _one_line(self.path, "read"):
            self._lance.checkout_latest()

    def rows(self, columns: Sequence[str], where: str | None = None) -> pa.Table:
        """Columns of all rows, or of those that meet a condition."""
        with _one_line(self.path, "read"):
            query = self._lance.search().select([*columns])
            query = query.limit(max(self._lance.count_rows(), 1))
            return (query.where(where) if where else query).to_arrow()

    def count(self, where: str) -> int:
        with _one_line(self.path, "read"):
            return self._lance.count_rows(where)

    def nearest(
        self,
        x: np.ndarray,
        limit: int,
        columns: Sequence[str],
        *,
        where: str | None = None,
        cells: int | None = None,
    ) -> pa.Table:
        """Find the rows with the nearest vectors, for each query.

        Args:
            x: queries ``[q, d]``.
            limit: the largest number of rows for a query.
            columns: to return, beside ``_distance``, which is squared; and
                ``query_index``, if there are several queries.
            where: a condition for the rows.
            cells: the number of cells to search, of `create_cells`; all rows if not
                given.
        """
        with _one_line(self.path, "read"):
            query = self._lance.search(
                x if len(x) > 1 else x[0], vector_column_name="vector"
            )
            query = query.distance_type("l2").limit(limit)
            if cells is None:
                query = query.bypass_vector_index()
            else:
                query = query.nprobes(cells)
            query = query.select([*columns, "_distance"])
            if where is not None:
                query = query.where(where, prefilter=True)
            return query.to_arrow()

    def put(self, rows: pa.Table) -> None:
        """Insert rows, and replace those of the same ``path``."""
        with _one_line(self.path, "written"):
            (
                self._lance.merge_insert("path")
                .when_matched_update_all()
                .when_not_matched_insert_all()
                .execute(rows)
            )

    def delete(self, column: str, values: Sequence[str]) -> None:
        """Delete the rows with these values in a column."""
        for start in range(0, len(values), CONDITION):
            with _one_line(self.path, "written"):
                self._lance.delete(one_of(column, values[start : start + CONDITION]))

    def optimize(self) -> None:
        """Join fragments of many commits, and drop earlier versions."""
        with _one_line(self.path, "written"):
            self._lance.optimize()

    @property
    def has_cells(self) -> bool:
        with _one_line(self.path, "read"):
            return bool([*self._lance.list_indices()])

    def create_cells(self, count: int) -> None:
        """Partition the vectors into cells, for approximate search."""
        with _one_line(self.path, "written"):
            config = IvfFlat(distance_type="l2", num_partitions=count)
            self._lance.create_index("vector", config=config)


def _is_created(table: Path) -> bool:
    """Whether the folder of a table has a manifest or data."""
    return (table / "data").exists() or any(table.glob("_versions/*.manifest"))


@contextlib.contextmanager
def _one_line(path: Path, action: str) -> Iterator[None]:
    try:
        yield
    except TableError:
        raise
    except Exception as error:
        text = SOURCE.sub("", first_line(error))
        code = getattr(error, "errno", None)
        if code == errno.ENOSPC or "No space left" in text:
            advice = "Free disk space, or choose another database (--database DIR)."
        elif code in (errno.EACCES, errno.EROFS) or "ermission denied" in text:
            advice = "Choose another database (--database DIR)."
        else:
            advice = f"Remove {path}: the index is made again from the images."
        message = f"the index {path} cannot be {action}: {text.rstrip('.')}. {advice}"
        raise TableError(message) from error


def matrix(column: Any) -> np.ndarray:
    """A column of vectors as an array ``[n, d]``."""
    chunk = column.combine_chunks()
    return chunk.flatten().to_numpy().reshape(len(chunk), chunk.type.list_size)


def one_of(column: str, values: Sequence[str]) -> str:
    """The condition that a column has one of these values."""
    quoted = ", ".join("'" + value.replace("'", "''") + "'" for value in values)
    return f"{column} IN ({quoted})"
