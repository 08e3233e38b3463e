"""Sums over triplets by tiles: every product of two blocks of vectors is made once.

For metrics with an inner-product form and anchors of up to `MAX_TILE_POSITIVES`
positives. The distances of positives come first, from differences, [k, n]. The tiles
have negatives alone. Over all triplets,

    cost      = sum_ap sum_an c(d_ap - d_an + margin)
    by d_ap   = sum_an c'(...)      added up per positive, [k, n]
    by d_an   = -sum_ap c'(...)     added up per pair of a tile, pulled back at once.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from tripletjax._engine.reductions import add_up, packed_counts, sum_in_one_loop
from tripletjax._engine.search import (
    MAX_TILE_POSITIVES,
    farthest_negatives,
    in_threes,
    nearest_negatives,
    positives_of,
)
from tripletjax._engine.slopes import costs_and_slopes, vjp_half_squares, with_slope
from tripletjax._engine.spec import Gradients, LossSpec, Mining
from tripletjax._pairwise.batch import Batch
from tripletjax._pairwise.block_sizes import BlockSizes
from tripletjax._pairwise.class_index import ClassIndex
from tripletjax._pairwise.slices import (
    Blocks,
    add_rows,
    materialize,
    rows_at,
)
from tripletjax._pairwise.tiles import Tile, Tiles
from tripletjax.losses import Cost, TripletCost, TripletTerms, costs_of


class TripletRows(NamedTuple):
    """Up to k triplets of every anchor, ``[k, n]``.

    Attributes:
        positive: indices of references.
        negative: indices of references.
        valid: whether the triplet exists, bool.
        count: number of rows in use.
    """

    positive: Array
    negative: Array
    valid: Array
    count: Array | int


def sums_by_tiles(
    spec: LossSpec,
    batch: Batch,
    margin: Array,
    classes: ClassIndex,
    weights: Array | None,
    gradient: bool,
) -> tuple[TripletTerms, Gradients | None]:
    """The terms, and the gradient of their total weighted per anchor."""
    tiles = Tiles.of(spec.metric, batch, spec.sizes)
    if spec.mining is Mining.ALL:
        return _all_by_tiles(spec, tiles, margin, classes, weights, gradient)
    triplets = mined_by_tiles(spec, tiles, classes)
    return _explicit_triplet_terms(spec, batch, margin, triplets, weights, gradient)


def mined_by_tiles(spec: LossSpec, tiles: Tiles, classes: ClassIndex) -> TripletRows:
    """The hardest triplet of every anchor, or one for each of its positives."""
    positives, squares, valid = positives_of(
        spec.metric, tiles.batch, classes, spec.sizes
    )
    valid &= classes.negatives > 0
    if spec.mining is Mining.HARD:
        hardest = jnp.argmax(jnp.where(valid, squares, -1), axis=0)[None]
        positive = jnp.take_along_axis(positives, hardest, axis=0)
        negative = nearest_negatives(tiles, None, 1).index
        return TripletRows(positive, negative, valid[:1], 1)
    count = classes.max_positives
    nearest, negative = nearest_negatives(tiles, squares, count)
    # No negative is farther than a NaN. Its pair stays, for the loss to show it.
    beyond = (nearest < jnp.inf) | jnp.isnan(squares)
    if not spec.fallback:
        return TripletRows(positives, negative, valid & beyond, count)

    alone = jnp.any(valid & ~beyond, axis=0)
    negative = jnp.where(beyond, negative, farthest_negatives(tiles, alone))
    return TripletRows(positives, negative, valid, count)


def _explicit_triplet_terms(
    spec: LossSpec,
    batch: Batch,
    margin: Array,
    triplets: TripletRows,
    weights: Array | None,
    gradient: bool,
) -> tuple[TripletTerms, Gradients | None]:
    """The terms and gradients of explicit triplets, by differences of vectors."""
    n, d = batch.anchors.shape
    y = batch.reference_side[0]
    blocks = Blocks.of(n, spec.sizes.panel // d)
    form = spec.metric.inner_products

    # The state: summed costs and active triplets of each anchor, and the gradients.
    def step(step: Array, state: tuple) -> tuple:
        totals, actives, grads = state
        k, block = jnp.divmod(step, blocks.count)
        start = blocks.start(block)
        p, n, valid = (rows_at(x[k], start, blocks.size) for x in triplets[:3])
        valid &= blocks.fresh(block)
        a = rows_at(batch.anchors, start, blocks.size)

        squares = form.half_square(a, y[p]), form.half_square(a, y[n])
        costs, pull = costs_of_squares(spec, squares, valid, margin)
        totals = add_rows(totals, start, costs)
        actives = add_rows(actives, start, (costs > 0).astype(costs.dtype))
        if gradient:
            cotangents = jnp.ones_like(costs)
            if weights is not None:
                cotangents = rows_at(weights, start, blocks.size)
            slopes, by_margin = pull(cotangents)
            grads = grads._replace(margin=grads.margin + by_margin)
            for index, slope in zip((p, n), slopes):
                rows = slope[:, None] * (a - y[index])
                grads = grads.add(start, rows).scatter(index, -rows)
        return totals, actives, grads

    zeros = batch.zeros((n,))
    grads = Gradients.zero(batch) if gradient else None
    totals, actives, grads = lax.fori_loop(
        0, triplets.count * blocks.count, step, (zeros, zeros, grads)
    )
    valid = jnp.sum(triplets.valid, axis=0, dtype=totals.dtype)
    return TripletTerms(totals, actives, valid), grads


def costs_of_squares(
    spec: LossSpec, squares: tuple[Array, Array], valid: Array, margin: Array
) -> tuple[Array, Callable[[Array], tuple]]:
    """Costs of triplets by half their squared differences, and their pullback."""

    def cost(squares: tuple[Array, Array], margin: Array) -> Array:
        d_ap, d_an = map(spec.metric.inner_products.distance, squares)
        return costs_of(d_ap, d_an, valid, margin, spec.cost)

    return jax.vjp(cost, squares, margin)


class AllSums(NamedTuple):
    """Sums of all triplets over the tiles.

    Attributes:
        total: summed cost of each anchor ``[n]``.
        active: number of triplets of each anchor with a positive cost ``[n]``.
        by_positive: derivatives by the distances of positives ``[k, n]``.
        by_margin: derivative by the margin, of a `TripletCost` alone.
    """

    total: Array
    active: Array
    by_positive: Array
    by_margin: Array

    @classmethod
    def zero(cls, batch: Batch) -> "AllSums":
        n = len(batch.anchors)
        zeros = batch.zeros((n,))
        return cls(zeros, zeros, batch.zeros((MAX_TILE_POSITIVES, n)), batch.zeros())


def _all_by_tiles(
    spec: LossSpec,
    tiles: Tiles,
    margin: Array,
    classes: ClassIndex,
    weights: Array | None,
    gradient: bool,
) -> tuple[TripletTerms, Gradients | None]:
    batch, form = tiles.batch, spec.metric.inner_products
    positives, squares, exists = positives_of(spec.metric, batch, classes, spec.sizes)
    d_ap, slopes = with_slope(form.distance, squares)
    # For a cost of the gap, minus infinity stands for no positive.
    gap_ap = d_ap
    if not isinstance(spec.cost, TripletCost):
        gap_ap = jnp.where(exists, d_ap, -jnp.inf)

    # The state: the sums, and the gradients by negatives and their anchors.
    def visit(
        state: tuple[AllSums, Gradients | None], tile: Tile
    ) -> tuple[AllSums, Gradients | None]:
        sums, grads = state
        d_an, slope = with_slope(form.distance, tile.squares)
        d_an = materialize(d_an)

        # The state: the sums, and the derivatives by the distances of the tile.
        def all_directions(r: Array, rows: list[Array], state: tuple) -> tuple:
            gaps, exist = rows[: tile.directions], rows[tile.directions :]
            for axis, start, *part in zip((1, 0), (tile.row, tile.column), gaps, exist):
                side = Side(axis, start, weights)
                state = _add_positives(spec.cost, margin, d_an, side, r, part, state)
            return state

        sums, by_negative = in_threes(
            classes.max_positives,
            tile.along(gap_ap) + tile.along(exists),
            all_directions,
            (sums, jnp.zeros_like(d_an) if gradient else None),
        )
        if grads is not None:
            grads = vjp_negatives(batch, grads, tile, by_negative * slope)
        return sums, grads

    none = AllSums.zero(batch), Gradients.zero(batch) if gradient else None
    sums, grads = tiles.scan(visit, none)
    if grads is not None:
        # A cost of the gap has the same derivative by the margin as by d_ap.
        by_margin = jnp.sum(sums.by_positive)
        if isinstance(spec.cost, TripletCost):
            by_margin = sums.by_margin
        grads = grads._replace(margin=by_margin)
        by_square = jnp.where(exists, sums.by_positive * slopes, 0)
        grads = vjp_positives(batch, grads, positives, by_square, classes, spec.sizes)
    valid = classes.count_triplets(0, len(batch.anchors), sums.total)
    return TripletTerms(sums.total, sums.active, valid), grads


class Side(NamedTuple):
    """A side of a tile, along which its anchors lie.

    Attributes:
        axis: axis of the negatives: 1 where anchors are rows, 0 where they are columns.
        start: index of the first anchor.
        weights: weights of all anchors in the gradient ``[n]``, or None.
    """

    axis: int
    start: Array
    weights: Array | None

    def sum(self, x: Array) -> Array:
        """Sums over the negatives of each anchor."""
        return sum_in_one_loop(x, self.axis)

    def expand(self, x: Array) -> Array:
        """Numbers of the anchors, shaped to broadcast along the tile."""
        return jnp.expand_dims(x, self.axis)


def _add_positives(
    cost: Cost,
    margin: Array,
    d_an: Array,
    side: Side,
    r: Array,
    positives: Sequence[Array],
    state: tuple[AllSums, Array | None],
) -> tuple[AllSums, Array | None]:
    """Add the triplets of some positives with the negatives of a tile.

    Args:
        cost, margin: the cost of a triplet, and its margin.
        d_an: distances of the tile, infinite for pairs that are not negatives.
        side: the side of the tile along which the anchors lie.
        r: the rank of the first of the positives.
        positives: distances of the positives ``[some, anchors]``, and which exist.
        state: the sums, and the derivatives by `d_an` if gradients are wanted.
    """
    sums, by_negative = state
    each = [
        costs_and_slopes(cost, side.expand(d_ap), d_an, side.expand(exists), margin)
        for d_ap, exists in zip(*positives)
    ]
    costs, active, by_ap, by_an, by_margin = zip(*each)
    total = add_rows(sums.total, side.start, side.sum(add_up(costs)))
    if not isinstance(cost, TripletCost) and cost.counts:
        by_positive = packed_counts([x > 0 for x in by_ap], side.axis)
        active = jnp.sum(by_positive, 0)
    else:
        by_positive = jnp.stack([side.sum(x) for x in by_ap])
        active = side.sum(add_up(active))
    active = add_rows(sums.active, side.start, active)
    sums = sums._replace(total=total, active=active)
    if by_negative is None:
        return sums, None
    by_an, weight = add_up(by_an), 1
    if side.weights is not None:
        weight = rows_at(side.weights, side.start, by_positive.shape[1])
        by_an = by_an * side.expand(weight)
    corner = (lax.convert_element_type(r, side.start.dtype), side.start)
    old = lax.dynamic_slice(sums.by_positive, corner, by_positive.shape)
    new = lax.dynamic_update_slice(sums.by_positive, old + by_positive * weight, corner)
    sums = sums._replace(by_positive=new)
    if isinstance(cost, TripletCost):
        new = jnp.sum(side.sum(add_up(by_margin)) * weight)
        sums = sums._replace(by_margin=sums.by_margin + new)
    return sums, by_negative + by_an


def vjp_negatives(
    batch: Batch, grads: Gradients, tile: Tile, by_square: Array
) -> Gradients:
    """Add the gradients by vectors of the half squares of a tile."""
    if batch.square and not tile.mirrored:
        # The vectors of rows and columns are the same.
        by_square = by_square + by_square.T
        return grads.add(tile.row, vjp_half_squares(by_square, tile.a, tile.b))
    by_square = materialize(by_square)
    by_rows = vjp_half_squares(by_square, tile.a, tile.b)
    by_columns = vjp_half_squares(by_square.T, tile.b, tile.a)
    return grads.add(tile.row, by_rows).add_to_references(tile.column, by_columns)


def vjp_positives(
    batch: Batch,
    grads: Gradients,
    positives: Array,
    slopes: Array,
    classes: ClassIndex,
    sizes: BlockSizes,
) -> Gradients:
    """Add the gradients by vectors of the half squares ``[k, n]`` of positives."""
    n, d = batch.anchors.shape
    y = batch.reference_side[0]
    blocks = Blocks.of(n, sizes.panel // d)

    def step(step: Array, grads: Gradients) -> Gradients:
        r, block = jnp.divmod(step, blocks.count)
        start = blocks.start(block)
        index = rows_at(positives[r], start, blocks.size)
        slope = rows_at(slopes[r], start, blocks.size) * blocks.fresh(block)
        rows = slope[:, None] * (rows_at(batch.anchors, start, blocks.size) - y[index])
        return grads.add(start, rows).scatter(index, -rows)

    return lax.fori_loop(0, classes.max_positives * blocks.count, step, grads)
