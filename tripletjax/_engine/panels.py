"""Panels: some rows of the distance matrix at a time, with their gradients.

Distances come from products; those of pairs that count and nearly coincide come from
differences, and so do their gradients.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from tripletjax._engine.slopes import vjp_half_squares, with_slope
from tripletjax._engine.spec import Gradients
from tripletjax._matrices import for_each_true_column
from tripletjax._pairwise.batch import Batch
from tripletjax._pairwise.cuts import Cut
from tripletjax._pairwise.slices import Blocks, products_with, rows_at
from tripletjax._pairwise.tiles import CANCELLATION_SHARE
from tripletjax.distances import Metric, common_offset
from tripletjax.pairs import PairMasks, keep_pairs, match_labels


class PanelRows(NamedTuple):
    """Some anchors and their pairs.

    Attributes:
        start: the first row.
        a: the anchors ``[rows, d]``.
        real: which of them count ``[rows]``: none that an earlier panel had.
        masks: their pairs ``[rows, m]``; none in rows that do not count.
        itself: the index of each among the references, -1 if it is not there.
    """

    start: Array
    a: Array
    real: Array
    masks: PairMasks
    itself: Array


class ProductPanel(NamedTuple):
    """Some rows of the distance matrix, by inner products.

    Attributes:
        start, a, real, masks: as in `PanelRows`.
        distances: ``[rows, m]``.
        slopes: their derivatives by half the squared differences, likewise.
        near: pairs whose distance by products has too few digits, likewise.
    """

    start: Array
    a: Array
    real: Array
    masks: PairMasks
    distances: Array
    slopes: Array
    near: Array

    def refined(self, panels: "Panels", counts: Array) -> "ProductPanel":
        """The same, with distances of pairs that count and are near by differences."""
        row, products = jnp.arange(len(self.a)), panels.metric.inner_products
        y, near = panels.batch.reference_side[0], self.near & counts

        def visit(distances: Array, column: Array, found: Array) -> Array:
            direct = products.distance(products.half_square(self.a, y[column]))
            direct = jnp.where(found, direct, distances[row, column])
            return distances.at[row, column].set(direct, unique_indices=True)

        distances = for_each_true_column(near, visit, self.distances)
        return self._replace(distances=distances, near=near)

    def vjp(self, panels: "Panels", by_distance: Array, grads: Gradients) -> Gradients:
        """Adds the gradients by vectors, by products but for near pairs."""
        row, products = jnp.arange(len(self.a)), panels.metric.inner_products
        y = panels.batch.reference_side[0]

        def visit(grads: Gradients, column: Array, found: Array) -> Gradients:
            difference = self.a - y[column]
            squares = products.half_square(self.a, y[column])
            slope = with_slope(products.distance, squares)[1]
            slope = jnp.where(found, slope * by_distance[row, column], 0)
            rows = slope[:, None] * difference
            return grads.add(self.start, rows).scatter(column, -rows)

        grads = for_each_true_column(self.near, visit, grads)
        by_square = jnp.where(self.near, 0, by_distance * self.slopes)
        # Differences do not depend on the origin, their digits do.
        offset = panels.offset
        assert offset is not None
        a = self.a - offset
        blocks = Blocks.of(len(y), panels.cut.panel // y.shape[1])

        def step(block: Array, grads: Gradients) -> Gradients:
            start = blocks.start(block)
            b = rows_at(y, start, blocks.size) - offset
            some = lax.dynamic_slice_in_dim(by_square, start, blocks.size, axis=1)
            some = jnp.where(blocks.fresh(block), some, 0)
            grads = grads.add(self.start, vjp_half_squares(some, a, b))
            return grads.add_to_references(start, vjp_half_squares(some.T, b, a))

        return lax.fori_loop(0, blocks.count, step, grads)


class PairedPanel(NamedTuple):
    """Some rows of the distance matrix, of a function of two vectors.

    Attributes:
        start, a, real, masks: as in `PanelRows`.
        distances: ``[rows, m]``.
        pull: from a gradient by distances to one by anchors and references.
    """

    start: Array
    a: Array
    real: Array
    masks: PairMasks
    distances: Array
    pull: Callable[[Array], tuple[Array, Array]]

    def refined(self, panels: "Panels", counts: Array) -> "PairedPanel":
        """The same: its distances have all their digits."""
        return self

    def vjp(self, panels: "Panels", by_distance: Array, grads: Gradients) -> Gradients:
        """Adds the gradients by vectors."""
        ours, theirs = self.pull(by_distance)
        return grads.add(self.start, ours).add_to_references(0, theirs)


Panel = ProductPanel | PairedPanel


class Panels(NamedTuple):
    """The distance matrix in blocks of rows.

    Attributes:
        metric: how far two vectors are apart.
        batch: the batch.
        cut: how the work is cut up.
        blocks: the blocks.
        offset: what the references have in common, if the metric is made of products.
        halves: of the references, likewise.
    """

    metric: Metric
    batch: Batch
    cut: Cut
    blocks: Blocks
    offset: Array | None
    halves: Array | None

    @classmethod
    def of(cls, metric: Metric, batch: Batch, cut: Cut) -> "Panels":
        y, products = batch.reference_side[0], metric.products
        blocks = Blocks.of(len(batch.anchors), cut.panel // len(y))
        if products is None:
            return cls(metric, batch, cut, blocks, None, None)
        offset = common_offset(y)
        return cls(metric, batch, cut, blocks, offset, products.halves(y, offset))

    def rows(self, block: Array) -> PanelRows:
        batch, blocks = self.batch, self.blocks
        start = blocks.start(block)
        _, labels, real_references = batch.reference_side
        row = start + jnp.arange(blocks.size)

        def rows(x: Array) -> Array:
            return rows_at(x, start, blocks.size)

        a, real = rows(batch.anchors), blocks.fresh(block)
        if batch.pairs.where is not None:
            real &= rows(batch.pairs.where)
        if isinstance(batch.pairs.labels, PairMasks):
            masks = PairMasks(*map(rows, batch.pairs.labels))
        else:
            positions = batch.pairs.positions
            if positions is not None:
                positions = rows(positions)
            masks = match_labels(
                rows(batch.labels), labels, row if batch.square else positions
            )
        masks = keep_pairs(masks, real, real_references)
        itself = row if batch.square else jnp.full_like(row, -1)
        return PanelRows(start, a, real, masks, itself)

    def squares(self, a: Array) -> tuple[Array, Array]:
        """Half the squared differences ``[rows, m]``, and which have too few digits.

        Those may be negative, by rounding.
        """
        assert self.metric.products is not None
        assert self.offset is not None
        assert self.halves is not None
        y = self.batch.reference_side[0]
        scale = self.metric.products.halves(a, self.offset)[:, None] + self.halves
        products = products_with(a - self.offset, y, self.offset, self.cut.panel)
        squares = scale - products
        return squares, squares < CANCELLATION_SHARE * scale

    def panel(self, block: Array) -> Panel:
        metric, y = self.metric, self.batch.reference_side[0]
        start, a, real, masks, itself = self.rows(block)
        if metric.products is None:
            distances, pull = jax.vjp(lambda a, y: metric.against(a, y, itself), a, y)
            return PairedPanel(start, a, real, masks, distances, pull)
        squares, near = self.squares(a)
        squares = jnp.where(squares < 0, 0, squares)
        distances, slopes = with_slope(metric.products.distance, squares)
        return ProductPanel(start, a, real, masks, distances, slopes, near)
