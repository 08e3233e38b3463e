"""Tiles: blocks of anchors against blocks of references, for all pairs.

With x and y less their common offset, and h half their squared norms,

    half the squared difference  = h_x + h_y - x . y,

One product makes a tile. In a symmetric matrix it serves both directions.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from tripletjax._pairwise.batch import Batch
from tripletjax._pairwise.block_sizes import BlockSizes
from tripletjax._pairwise.cancellation import CANCELLATION_SHARE, refine
from tripletjax._pairwise.mesh import AxisName, vary
from tripletjax._pairwise.slices import Blocks, fetch_ahead, rows_at
from tripletjax.distances import Metric, common_offset
from tripletjax.pairs import match_labels


class TileInputs(NamedTuple):
    """Inputs of a tile: rows of anchors, and columns of references.

    Attributes:
        row: index of the first anchor.
        column: index of the first reference.
        a: anchors less the offset ``[rows, d]``.
        b: references less the offset ``[columns, d]``.
        halves: half the squared norms of the anchors, infinite for padding.
        reference_halves: half the squared norms of the references, likewise.
        labels: labels of the anchors.
        reference_labels: labels of the references.
        positions: columns of the anchors themselves, or None.
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
        row: index of the first anchor.
        column: index of the first reference.
        a: anchors less the offset ``[rows, d]``.
        b: references less the offset ``[columns, d]``.
        squares: half the squared differences of negatives, infinite for other pairs.
        mirrored: whether the tile also stands for its mirror image; static.
    """

    row: Array
    column: Array
    a: Array
    b: Array
    squares: Array
    mirrored: bool = False

    @property
    def directions(self) -> int:
        """Sides with anchors: 1 for the rows, 2 if the columns are anchors as well."""
        return 1 + self.mirrored

    def along(self, x: Array) -> list[Array]:
        """The parts of ``[k, n]`` of the anchors along each side."""
        starts = (self.row, self.column)[: self.directions]
        return [
            lax.dynamic_slice_in_dim(x, start, size, axis=1)
            for start, size in zip(starts, self.squares.shape)
        ]


class Tiles(NamedTuple):
    """All tiles of a batch.

    Attributes:
        metric: a distance between vectors.
        batch: the batch.
        sizes: tile and panel sizes.
        offset: `common_offset` of the references ``[d]``.
        halves: half the squared norms of the anchors ``[n]``, infinite for padding.
        reference_halves: half the squared norms of the references ``[m]``, likewise.
        rows: blocks of anchors.
        columns: blocks of references.
        axis_name: mesh axes whose devices share the tiles. Every device has the whole
            batch, and a state of its own tiles. None if each device visits all tiles.
    """

    metric: Metric
    batch: Batch
    sizes: BlockSizes
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
        sizes: BlockSizes,
        *,
        axis_name: AxisName | None = None,
    ) -> "Tiles":
        x, form = batch.anchors, metric.products
        y, _, real = batch.reference_side
        offset = common_offset(y) if form else jnp.zeros_like(y[0])

        def halves(x: Array, where: Array | None) -> Array:
            halves = form.halves(x, offset) if form else jnp.zeros_like(x[:, 0])
            return halves if where is None else jnp.where(where, halves, jnp.inf)

        of_anchors = halves(x, batch.pairs.where)
        of_references = of_anchors if batch.square else halves(y, real)
        blocks = Blocks.even(len(x), sizes.tile), Blocks.even(len(y), sizes.tile)
        return cls(
            metric, batch, sizes, offset, of_anchors, of_references, *blocks, axis_name
        )

    def scan(self, visit: Callable[[Any, Tile], Any], state: Any) -> Any:
        """``visit(state, tile)`` for all tiles, or half of a symmetric matrix."""

        def of_parts(state: Any, parts: TileInputs, mirrored: bool) -> Any:
            return visit(state, self.tile(parts)._replace(mirrored=mirrored))

        return self.scan_parts(of_parts, state)

    def scan_parts(
        self, visit: Callable[[Any, TileInputs, bool], Any], state: Any
    ) -> Any:
        """``visit(state, inputs, mirrored)`` for the inputs of the same tiles."""
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

        def inputs_at(i: Array | int) -> TileInputs:
            index = i * devices + me
            i = jnp.minimum(index, len(rows) - 1)
            parts = self.parts(rows[i], columns[i])
            if devices == 1:
                return parts
            # A device without a tile left visits a tile of padding.
            halves = jnp.where(index < len(rows), parts.halves, jnp.inf)
            return parts._replace(halves=halves)

        def step(_: Array, parts: TileInputs, state: Any) -> Any:
            return visit(state, parts, mirrored)

        return fetch_ahead(-(-len(rows) // devices), inputs_at, step, state)

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
        squares = _scale(parts) - _products(parts)
        # A NaN becomes 0, which is nearest, so that the loss shows it.
        squares = jnp.where(squares > 0, squares, 0)
        masks = match_labels(parts.labels, parts.reference_labels, parts.positions)
        squares = jnp.where(masks.negative, squares, jnp.inf)
        return Tile(parts.row, parts.column, parts.a, parts.b, squares)

    def distances(self, visit: Callable[[Any, Array, Array], Any], state: Any) -> Any:
        """``visit(state, distances, counts)`` for blocks of distances of negatives.

        `counts` marks the pairs of negatives among distances ``[rows, columns]``, and
        in a symmetric matrix one of each two. It works for any metric. Pairs that
        nearly coincide have distances from differences.
        """
        batch, form = self.batch, self.metric.products
        y = batch.reference_side[0]

        def of_parts(state: Any, parts: TileInputs, mirrored: bool) -> Any:
            masks = match_labels(parts.labels, parts.reference_labels, parts.positions)
            counts = masks.negative & (_scale(parts) < jnp.inf)
            if batch.square and not mirrored:
                counts = jnp.triu(counts, 1)
            a = rows_at(batch.anchors, parts.row, self.rows.size)
            b = rows_at(y, parts.column, self.columns.size)
            if form is None:
                nowhere = jnp.full(len(a), -1)
                return visit(state, self.metric._matrix_checked(a, b, nowhere), counts)
            squares = _scale(parts) - _products(parts)
            near = counts & (squares < CANCELLATION_SHARE * _scale(parts))
            squares = refine(squares, near, form.half_square, a, b)
            return visit(state, form.distance(squares), counts)

        return self.scan_parts(of_parts, state)


def _products(parts: TileInputs) -> Array:
    return jnp.matmul(parts.a, parts.b.T, precision="highest")


def _scale(parts: TileInputs) -> Array:
    """Sums of the halves of each pair, infinite where one of the two is padding."""
    return parts.halves[:, None] + parts.reference_halves
