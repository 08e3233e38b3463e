"""Tiles: all pairs, a block of anchors against a block of references at a time.

With x and y less what all vectors have in common, and h half their squared norms,

    half the squared difference  = h_x + h_y - x . y,

so that one product makes a tile, and in a symmetric matrix serves both directions.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from tripletjax._matrices import for_each_true_column
from tripletjax._pairwise.batch import Batch
from tripletjax._pairwise.cuts import Cut
from tripletjax._pairwise.mesh import AxisName, vary
from tripletjax._pairwise.slices import Blocks, fetch_ahead, rows_at
from tripletjax.distances import Metric, common_offset
from tripletjax.pairs import match_labels

# Half squared distances below this share of the vectors' halves are taken directly.
CANCELLATION_SHARE = 0.01


class TileInputs(NamedTuple):
    """What a tile is made of: first row and column, and of its anchors and references
    vectors, halves and labels; and where its anchors are among its references.
    """

    row: Array
    column: Array
    a: Array
    b: Array
    halves: Array
    reference_halves: Array
    labels: Array
    reference_labels: Array
    positions: Array | None


class Tile(NamedTuple):
    """A block of pairs.

    Attributes:
        row: its first anchor.
        column: its first reference.
        a: its anchors ``[rows, d]``.
        b: its references ``[columns, d]``.
        squares: half the squared differences of negatives, infinite for others.
        mirrored: whether it also stands for its mirror image; static.
    """

    row: Array
    column: Array
    a: Array
    b: Array
    squares: Array
    mirrored: bool = False

    @property
    def directions(self) -> int:
        """Whose distances it has: of its rows' anchors, or of its columns' as well."""
        return 1 + self.mirrored

    def along(self, x: Array) -> list[Array]:
        """The parts of ``[k, n]`` that belong to the anchors of each direction."""
        starts = (self.row, self.column)[: self.directions]
        return [
            lax.dynamic_slice_in_dim(x, start, size, axis=1)
            for start, size in zip(starts, self.squares.shape)
        ]


class Tiles(NamedTuple):
    """Vectors as tiles take them: without what all have in common, with halves.

    Attributes:
        metric: the metric.
        batch: the batch.
        cut: how the work is cut up.
        offset: what the vectors have in common ``[d]``.
        halves: of anchors ``[n]``; infinite if they are padding.
        reference_halves: of references ``[m]``, likewise.
        rows: blocks of anchors.
        columns: blocks of references.
        axis_name: mesh axes whose devices, each with the whole batch, share the tiles;
            a state is then of those of its device. None if all are each one's own.
    """

    metric: Metric
    batch: Batch
    cut: Cut
    offset: Array
    halves: Array
    reference_halves: Array
    rows: Blocks
    columns: Blocks
    axis_name: AxisName | None = None

    @classmethod
    def of(
        cls,
        metric: Metric,
        batch: Batch,
        cut: Cut,
        *,
        offset: Array | None = None,
        axis_name: AxisName | None = None,
    ) -> "Tiles":
        """All pairs; of references that are part of others, with the offset of all."""
        x, products = batch.anchors, metric.products
        y, _, real = batch.reference_side
        if offset is None:
            offset = common_offset(y) if products else jnp.zeros_like(y[0])

        def halves(x: Array, where: Array | None) -> Array:
            halves = products.halves(x, offset) if products else jnp.zeros_like(x[:, 0])
            return halves if where is None else jnp.where(where, halves, jnp.inf)

        ours = halves(x, batch.pairs.where)
        theirs = ours if batch.square else halves(y, real)
        blocks = Blocks.even(len(x), cut.tile), Blocks.even(len(y), cut.tile)
        return cls(metric, batch, cut, offset, ours, theirs, *blocks, axis_name)

    def scan(self, visit: Callable[[Any, Tile], Any], state: Any) -> Any:
        """Visits all tiles; if the matrix is symmetric, of unordered pairs."""

        def of_parts(state: Any, parts: TileInputs, mirrored: bool) -> Any:
            return visit(state, self.tile(parts)._replace(mirrored=mirrored))

        return self.scan_parts(of_parts, state)

    def scan_parts(
        self, visit: Callable[[Any, TileInputs, bool], Any], state: Any
    ) -> Any:
        if self.axis_name is not None:
            state = vary(state, self.axis_name)
        if not self.batch.square:
            counts = self.rows.count, self.columns.count
            return self._scan(visit, state, np.indices(counts).reshape(2, -1), False)
        off_diagonal = np.triu_indices(self.rows.count, k=1)
        if len(off_diagonal[0]):
            state = self._scan(visit, state, off_diagonal, True)
        diagonal = np.diag_indices(self.rows.count)
        return self._scan(visit, state, diagonal, False)

    def _scan(self, visit: Callable, state: Any, blocks: Any, mirrored: bool) -> Any:
        rows, columns = (jnp.asarray(indices, jnp.int32) for indices in blocks)
        devices, me = 1, 0
        if self.axis_name is not None:
            devices, me = lax.axis_size(self.axis_name), lax.axis_index(self.axis_name)

        def cut(i: Array | int) -> TileInputs:
            index = i * devices + me
            i = jnp.minimum(index, len(rows) - 1)
            parts = self.parts(rows[i], columns[i])
            if devices == 1:
                return parts
            # One that has no tile left looks at what does not count.
            halves = jnp.where(index < len(rows), parts.halves, jnp.inf)
            return parts._replace(halves=halves)

        def step(_: Array, parts: TileInputs, state: Any) -> Any:
            return visit(state, parts, mirrored)

        return fetch_ahead(-(-len(rows) // devices), cut, step, state)

    def parts(self, i: Array, j: Array) -> TileInputs:
        batch, positions = self.batch, self.batch.pairs.positions
        row, column = self.rows.start(i), self.columns.start(j)
        y, labels, _ = batch.reference_side

        def halves(all: Array, blocks: Blocks, block: Array) -> Array:
            halves = rows_at(all, blocks.start(block), blocks.size)
            if blocks.n % blocks.size:
                halves = jnp.where(blocks.fresh(block), halves, jnp.inf)
            return halves

        if positions is not None:
            positions = rows_at(positions, row, self.rows.size) - column
        return TileInputs(
            row,
            column,
            rows_at(batch.anchors, row, self.rows.size) - self.offset,
            rows_at(y, column, self.columns.size) - self.offset,
            halves(self.halves, self.rows, i),
            halves(self.reference_halves, self.columns, j),
            rows_at(batch.labels, row, self.rows.size),
            rows_at(labels, column, self.columns.size),
            positions,
        )

    def tile(self, parts: TileInputs) -> Tile:
        row, column, a, b, ours, theirs, labels, reference_labels, positions = parts
        products = jnp.matmul(a, b.T, precision="highest")
        squares = ours[:, None] + theirs - products
        # A NaN becomes 0, to be chosen: a loss that has gone wrong must not look well.
        squares = jnp.where(squares > 0, squares, 0)
        masks = match_labels(labels, reference_labels, positions)
        squares = jnp.where(masks.negative, squares, jnp.inf)
        return Tile(row, column, a, b, squares)

    def distances(self, visit: Callable[[Any, Array, Array], Any], state: Any) -> Any:
        """``visit(state, distances, counts)`` for blocks of distances of negatives.

        Of the distances ``[rows, columns]`` those count that are of negatives, and in a
        symmetric matrix one of each two. Of any metric, and with digits where vectors
        nearly coincide.
        """
        batch, products = self.batch, self.metric.products
        y = batch.reference_side[0]

        def of_parts(state: Any, parts: TileInputs, mirrored: bool) -> Any:
            row, column, *_, labels, reference_labels, positions = parts
            masks = match_labels(labels, reference_labels, positions)
            counts = masks.negative & (parts.halves < jnp.inf)[:, None]
            counts &= parts.reference_halves < jnp.inf
            if batch.square and not mirrored:
                counts = jnp.triu(counts, 1)
            a = rows_at(batch.anchors, row, self.rows.size)
            b = rows_at(y, column, self.columns.size)
            if products is None:
                itself = jnp.full(len(a), -1)
                return visit(state, self.metric.against(a, b, itself), counts)
            scale = parts.halves[:, None] + parts.reference_halves
            squares = scale - jnp.matmul(parts.a, parts.b.T, precision="highest")
            near = counts & (squares < CANCELLATION_SHARE * scale)
            row = jnp.arange(len(a))

            def direct(squares: Array, column: Array, found: Array) -> Array:
                new = products.half_square(a, b[column])
                new = jnp.where(found, new, squares[row, column])
                return squares.at[row, column].set(new)

            squares = for_each_true_column(near, direct, squares)
            return visit(state, products.distance(squares), counts)

        return self.scan_parts(of_parts, state)
