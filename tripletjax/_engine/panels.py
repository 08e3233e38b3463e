"""Panels: blocks of rows of the distance matrix, with their gradients.

Distances come from products. Distances and gradients of pairs that the loss uses and
that nearly coincide come from differences.
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
from tripletjax._pairwise.block_sizes import BlockSizes
from tripletjax._pairwise.cancellation import CANCELLATION_SHARE, refine
from tripletjax._pairwise.slices import Blocks, products_with, rows_at
from tripletjax.distances import Metric, common_offset
from tripletjax.pairs import PairMasks, keep_pairs, match_labels


class PanelRows(NamedTuple):
    """A block of anchors and their pairs.

    Attributes:
        start: the first row.
        a: the anchors ``[rows, d]``.
        real: bool ``[rows]``, False for padding and for rows of an earlier panel.
        masks: their pairs ``[rows, m]``, none in rows that are not real.
        own_index: index of each anchor among the references, -1 if it is not one.
    """

    start: Array
    a: Array
    real: Array
    masks: PairMasks
    own_index: Array


class ProductPanel(NamedTuple):
    """A block of rows of the distance matrix, from inner products.

    Attributes:
        start, a, real, masks: as in `PanelRows`.
        distances: ``[rows, m]``.
        slopes: derivatives of the distances by half the squared differences.
        near: pairs whose distances from products have too few digits.
    """

    start: Array
    a: Array
    real: Array
    masks: PairMasks
    distances: Array
    slopes: Array
    near: Array

    def refined(self, panels: "Panels", used: Array) -> "ProductPanel":
        """The panel with distances from differences for near pairs that are used."""
        near, compare = self.near & used, panels.metric._paired_checked
        y = panels.batch.reference_side[0]
        distances = refine(self.distances, near, compare, self.a, y)
        return self._replace(distances=distances, near=near)

    def vjp(self, panels: "Panels", by_distance: Array, grads: Gradients) -> Gradients:
        """Add the gradients by vectors, from differences for near pairs."""
        row, form = jnp.arange(len(self.a)), panels.metric.inner_products
        y = panels.batch.reference_side[0]

        def visit(grads: Gradients, column: Array, exists: Array) -> Gradients:
            difference = self.a - y[column]
            squares = form.half_square(self.a, y[column])
            slope = with_slope(form.distance, squares)[1]
            slope = jnp.where(exists, slope * by_distance[row, column], 0)
            rows = slope[:, None] * difference
            return grads.add(self.start, rows).scatter(column, -rows)

        grads = for_each_true_column(self.near, visit, grads)
        by_square = jnp.where(self.near, 0, by_distance * self.slopes)
        # Differences do not depend on the origin, but their digits do.
        offset = panels.offset
        assert offset is not None
        a = self.a - offset
        blocks = Blocks.of(len(y), panels.sizes.panel // y.shape[1])

        def step(block: Array, grads: Gradients) -> Gradients:
            start = blocks.start(block)
            b = rows_at(y, start, blocks.size) - offset
            some = lax.dynamic_slice_in_dim(by_square, start, blocks.size, axis=1)
            some = jnp.where(blocks.fresh(block), some, 0)
            grads = grads.add(self.start, vjp_half_squares(some, a, b))
            return grads.add_to_references(start, vjp_half_squares(some.T, b, a))

        return lax.fori_loop(0, blocks.count, step, grads)


class PairedPanel(NamedTuple):
    """A block of rows of the distance matrix, from a function of two vectors.

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

    def refined(self, panels: "Panels", used: Array) -> "PairedPanel":
        """The panel itself, whose distances have all their digits."""
        return self

    def vjp(self, panels: "Panels", by_distance: Array, grads: Gradients) -> Gradients:
        """Add the gradients by vectors."""
        by_anchor, by_reference = self.pull(by_distance)
        return grads.add(self.start, by_anchor).add_to_references(0, by_reference)


Panel = ProductPanel | PairedPanel


class Panels(NamedTuple):
    """The distance matrix in blocks of rows.

    Attributes:
        metric: a distance between vectors.
        batch: the batch.
        sizes: tile and panel sizes.
        blocks: the blocks of rows.
        offset: `common_offset` of the references; None without an inner-product form.
        halves: half the squared norms of the references less the offset, likewise.
    """

    metric: Metric
    batch: Batch
    sizes: BlockSizes
    blocks: Blocks
    offset: Array | None
    halves: Array | None

    @classmethod
    def of(cls, metric: Metric, batch: Batch, sizes: BlockSizes) -> "Panels":
        y, form = batch.reference_side[0], metric.products
        blocks = Blocks.of(len(batch.anchors), sizes.panel // len(y))
        if form is None:
            return cls(metric, batch, sizes, blocks, None, None)
        offset = common_offset(y)
        return cls(metric, batch, sizes, blocks, offset, form.halves(y, offset))

    def rows(self, block: Array) -> PanelRows:
        batch, blocks = self.batch, self.blocks
        start = blocks.start(block)
        _, labels, real_references = batch.reference_side

        def rows(x: Array) -> Array:
            return rows_at(x, start, blocks.size)

        a, real = rows(batch.anchors), blocks.fresh(block)
        if batch.pairs.where is not None:
            real &= rows(batch.pairs.where)
        if isinstance(batch.pairs.labels, PairMasks):
            masks = PairMasks(*map(rows, batch.pairs.labels))
        else:
            masks = match_labels(rows(batch.labels), labels, rows(batch.own_index))
        masks = keep_pairs(masks, real, real_references)
        return PanelRows(start, a, real, masks, rows(batch.own_index))

    def squares(self, a: Array) -> tuple[Array, Array]:
        """Half the squared differences ``[rows, m]``, and those with too few digits.

        Rounding may make half squares with too few digits negative.
        """
        assert self.metric.products is not None
        assert self.offset is not None
        assert self.halves is not None
        y = self.batch.reference_side[0]
        scale = self.metric.products.halves(a, self.offset)[:, None] + self.halves
        products = products_with(a - self.offset, y, self.offset, self.sizes.panel)
        squares = scale - products
        return squares, squares < CANCELLATION_SHARE * scale

    def panel(self, block: Array) -> Panel:
        metric, y = self.metric, self.batch.reference_side[0]
        start, a, real, masks, own_index = self.rows(block)
        if metric.products is None:
            distances, pull = jax.vjp(
                lambda a, y: metric._matrix_checked(a, y, own_index), a, y
            )
            return PairedPanel(start, a, real, masks, distances, pull)
        squares, near = self.squares(a)
        squares = jnp.where(squares < 0, 0, squares)
        distances, slopes = with_slope(metric.products.distance, squares)
        return ProductPanel(start, a, real, masks, distances, slopes, near)
