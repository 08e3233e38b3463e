"""Sums over triplets by tiles: every product of two blocks of vectors is made once.

For metrics made of inner products and anchors of up to `MAX_TILE_POSITIVES` positives.
The distances of positives come first and directly, [k, n]; the tiles treat negatives
alone. Of all triplets,

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
from tripletjax._pairwise.class_index import ClassIndex
from tripletjax._pairwise.cuts import Cut
from tripletjax._pairwise.slices import (
    Blocks,
    Index,
    add_rows,
    materialize,
    rows_at,
)
from tripletjax._pairwise.tiles import Tile, Tiles
from tripletjax.losses import TripletCost, TripletTerms, costs_of


class TripletRows(NamedTuple):
    """Triplets of every anchor, ``[k, n]``.

    Attributes:
        positive: indices of references.
        negative: likewise.
        valid: bool.
        count: how many of the k rows are in use.
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
    tiles = Tiles.of(spec.metric, batch, spec.cut)
    if spec.mining is Mining.ALL:
        return _all_by_tiles(spec, tiles, margin, classes, weights, gradient)
    triplets = mined_by_tiles(spec, tiles, classes)
    return _explicit_triplet_terms(spec, batch, margin, triplets, weights, gradient)


def mined_by_tiles(spec: LossSpec, tiles: Tiles, classes: ClassIndex) -> TripletRows:
    """The hardest triplet of every anchor, or one for each of its positives."""
    positives, squares, found = positives_of(
        spec.metric, tiles.batch, classes, spec.cut
    )
    found &= classes.negatives > 0
    if spec.mining is Mining.HARD:
        hardest = jnp.argmax(jnp.where(found, squares, -1), axis=0)[None]
        positive = jnp.take_along_axis(positives, hardest, axis=0)
        _, negative = nearest_negatives(tiles, None, 1)
        return TripletRows(positive, negative, found[:1], 1)
    count = classes.max_positives
    nearest, negative = nearest_negatives(tiles, squares, count)
    # A NaN is nearer than nothing; its pair stays, for the loss to show it.
    beyond = (nearest < jnp.inf) | jnp.isnan(squares)
    if not spec.fallback:
        return TripletRows(positives, negative, found & beyond, count)

    alone = jnp.any(found & ~beyond, axis=0)
    negative = jnp.where(beyond, negative, farthest_negatives(tiles, alone)[1])
    return TripletRows(positives, negative, found, count)


def _explicit_triplet_terms(
    spec: LossSpec,
    batch: Batch,
    margin: Array,
    triplets: TripletRows,
    weights: Array | None,
    gradient: bool,
) -> tuple[TripletTerms, Gradients | None]:
    """The sums of given triplets, whose distances are taken from differences."""
    n, d = batch.anchors.shape
    y = batch.reference_side[0]
    blocks = Blocks.of(n, spec.cut.panel // d)
    products = spec.metric.inner_products

    def step(step: Array, state: tuple) -> tuple:
        totals, actives, grads = state
        k, block = jnp.divmod(step, blocks.count)
        start = blocks.start(block)
        p, n, valid = (rows_at(x[k], start, blocks.size) for x in triplets[:3])
        valid &= blocks.fresh(block)
        a = rows_at(batch.anchors, start, blocks.size)

        squares = products.half_square(a, y[p]), products.half_square(a, y[n])
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
    """Costs of triplets, of half their squared differences, and their pullback."""

    def cost(squares: tuple[Array, Array], margin: Array) -> Array:
        d_ap, d_an = map(spec.metric.inner_products.distance, squares)
        return costs_of(d_ap, d_an, valid, margin, spec.cost)

    return jax.vjp(cost, squares, margin)


class AllSums(NamedTuple):
    """What is added up over tiles for all triplets.

    Attributes:
        total: cost ``[n]``.
        active: triplets that cost anything ``[n]``.
        by_positive: derivatives by the distances of positives ``[k, n]``.
        by_margin: derivative by the margin, unless it follows from `by_positive`.
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
    batch, products = tiles.batch, spec.metric.inner_products
    positives, squares, found = positives_of(spec.metric, batch, classes, spec.cut)
    d_ap, slopes = with_slope(products.distance, squares)
    none = AllSums.zero(batch), Gradients.zero(batch) if gradient else None
    sums, grads = add_all_negatives(
        spec, tiles, margin, d_ap, found, classes.max_positives, weights, none
    )
    if grads is not None:
        grads = grads._replace(margin=by_margin_of(spec, sums))
        by_square = jnp.where(found, sums.by_positive * slopes, 0)
        grads = _vjp_positives(batch, grads, positives, by_square, classes, spec.cut)
    valid = classes.count_triplets(0, len(batch.anchors), sums.total)
    return TripletTerms(sums.total, sums.active, valid), grads


def by_margin_of(spec: LossSpec, sums: AllSums) -> Array:
    """The derivative by the margin."""
    if isinstance(spec.cost, TripletCost):
        return sums.by_margin
    # Of a gap, it is that of the positive's distance.
    return jnp.sum(sums.by_positive)


def add_all_negatives(
    spec: LossSpec,
    tiles: Tiles,
    margin: Array,
    d_ap: Array,
    found: Array,
    count: Index,
    weights: Array | None,
    state: tuple[AllSums, Gradients | None],
) -> tuple[AllSums, Gradients | None]:
    """Adds the triplets of given positives with all negatives of tiles.

    Args:
        spec, tiles, margin, weights: as elsewhere.
        d_ap: distances of the positives ``[MAX_TILE_POSITIVES, n]``.
        found: which of them there are.
        count: how many rows of them are in use.
        state: sums, and gradients by negatives and their anchors if wanted.
    """
    batch, products, cost = tiles.batch, spec.metric.inner_products, spec.cost
    gradient, of_both = state[1] is not None, isinstance(cost, TripletCost)
    # Elsewhere the gap of what is not a triplet is minus infinity.
    gap_ap = d_ap if of_both else jnp.where(found, d_ap, -jnp.inf)

    def add_positives(
        d_an: Array, axis: int, start: Array, r: Array, part: Sequence, state: tuple
    ) -> tuple:
        """Some positives, from the r-th on, of the anchors along one side of a tile."""
        sums, by_negative = state
        each = [
            costs_and_slopes(
                cost,
                jnp.expand_dims(gap, axis),
                d_an,
                jnp.expand_dims(found, axis),
                margin,
            )
            for gap, found in zip(*part)
        ]
        costs, active, by_ap, by_an, by_all = zip(*each)
        total = add_rows(sums.total, start, sum_in_one_loop(add_up(costs), axis))
        if not isinstance(cost, TripletCost) and cost.counts:
            rows = packed_counts([x > 0 for x in by_ap], axis)
            active = jnp.sum(rows, 0)
        else:
            rows = jnp.stack([sum_in_one_loop(x, axis) for x in by_ap])
            active = sum_in_one_loop(add_up(active), axis)
        sums = sums._replace(total=total, active=add_rows(sums.active, start, active))
        if not gradient:
            return sums, by_negative
        by_an, weight = add_up(by_an), 1
        if weights is not None:
            weight = rows_at(weights, start, rows.shape[1])
            by_an = by_an * jnp.expand_dims(weight, axis)
        corner = (lax.convert_element_type(r, start.dtype), start)
        new = lax.dynamic_slice(sums.by_positive, corner, rows.shape) + rows * weight
        by_positive = lax.dynamic_update_slice(sums.by_positive, new, corner)
        sums = sums._replace(by_positive=by_positive)
        if of_both:
            by_margin = jnp.sum(sum_in_one_loop(add_up(by_all), axis) * weight)
            sums = sums._replace(by_margin=sums.by_margin + by_margin)
        return sums, by_negative + by_an

    def visit(state: tuple, tile: Tile) -> tuple:
        d_an, slope = with_slope(products.distance, tile.squares)
        d_an = materialize(d_an)
        sums, grads = state

        def all_directions(r: Array, rows: list[Array], state: tuple) -> tuple:
            gaps, exists = rows[: tile.directions], rows[tile.directions :]
            for axis, start, *part in zip(
                (1, 0), (tile.row, tile.column), gaps, exists
            ):
                state = add_positives(d_an, axis, start, r, part, state)
            return state

        sums, by_negative = in_threes(
            count,
            tile.along(gap_ap) + tile.along(found),
            all_directions,
            (sums, jnp.zeros_like(d_an) if gradient else None),
        )
        if gradient:
            by_square = by_negative * slope
            if batch.square and not tile.mirrored:
                # The same vectors on both sides.
                by_square = by_square + by_square.T
                rows = vjp_half_squares(by_square, tile.a, tile.b)
                grads = grads.add(tile.row, rows)
            else:
                by_square = materialize(by_square)
                ours = vjp_half_squares(by_square, tile.a, tile.b)
                theirs = vjp_half_squares(by_square.T, tile.b, tile.a)
                grads = grads.add(tile.row, ours)
                grads = grads.add_to_references(tile.column, theirs)
        return sums, grads

    return tiles.scan(visit, state)


def _vjp_positives(
    batch: Batch,
    grads: Gradients,
    positives: Array,
    slopes: Array,
    classes: ClassIndex,
    cut: Cut,
) -> Gradients:
    """Adds the gradients by vectors of half squares ``[k, n]`` of positives."""
    n, d = batch.anchors.shape
    y = batch.reference_side[0]
    blocks = Blocks.of(n, cut.panel // d)

    def step(step: Array, grads: Gradients) -> Gradients:
        r, block = jnp.divmod(step, blocks.count)
        start = blocks.start(block)
        index = rows_at(positives[r], start, blocks.size)
        slope = rows_at(slopes[r], start, blocks.size) * blocks.fresh(block)
        rows = slope[:, None] * (rows_at(batch.anchors, start, blocks.size) - y[index])
        return grads.add(start, rows).scatter(index, -rows)

    return lax.fori_loop(0, classes.max_positives * blocks.count, step, grads)
