"""Losses of pairs, log-sum-exp and separable, in O(n d) memory.

For metrics with an inner-product form and anchors of up to `MAX_TILE_POSITIVES`
positives, the distances of positives come first, from differences, [k, n]. Tiles treat
negatives alone:

    log-sum-exp: one walk makes L_a = log sum exp g(d_an); once all are complete, the
        gradient takes a second walk, in which by d_an = by L_a * exp(g - L_a) * g'.
    separable: one walk makes sums and, for reductions of sums, their gradient as well.

Costs are functions of these O(n k) numbers, which JAX differentiates. Everything else
goes by panels of rows, which the backward pass computes again.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from tripletjax._api import own_promotion
from tripletjax._engine.by_tiles import vjp_negatives, vjp_positives
from tripletjax._engine.panels import PanelRows, Panels
from tripletjax._engine.reductions import sum_in_one_loop
from tripletjax._engine.search import MAX_TILE_POSITIVES, positives_of
from tripletjax._engine.slopes import with_slope
from tripletjax._engine.spec import Gradients
from tripletjax._pairwise.batch import Batch
from tripletjax._pairwise.block_sizes import CPU, BlockSizes, by_platform
from tripletjax._pairwise.cancellation import refine
from tripletjax._pairwise.class_index import ClassIndex
from tripletjax._pairwise.slices import add_rows, materialize, rows_at
from tripletjax._pairwise.tiles import Tile, Tiles
from tripletjax.distances import Metric
from tripletjax.losses import TripletTerms
from tripletjax.pair_losses import (
    AnchorPairs,
    LogSumExp,
    PairTerms,
    Parameters,
    PerAnchor,
    Separable,
    Shape,
    at_anchors,
    both_sides,
    is_per_anchor,
    sums_of_pairs,
)
from tripletjax.pairs import PairMasks

# Classes of the anchors and, if symmetric, of the references.
Classes = tuple[ClassIndex, ...]
# Exponents of a tile have one shift as long as no sum is smaller than this.
LEAST_EXPONENT = 60.0


@dataclasses.dataclass(frozen=True)
class PairSpec:
    """A loss of pairs; static.

    Attributes:
        shape: the shape of the loss.
        metric: a distance between vectors.
        symmetric: whether references are anchors as well.
        summed: whether only sums of the terms over the anchors are wanted.
        block_size: vectors on each side of a tile, in place of `sizes.tile`.
        sizes: tile and panel sizes.
    """

    shape: Shape
    metric: Metric
    symmetric: bool = False
    summed: bool = False
    block_size: int | None = None
    sizes: BlockSizes = CPU


def pair_terms(
    spec: PairSpec,
    batch: Batch,
    parameters: Parameters,
    by_tiles: Callable[..., Any] | None = None,
) -> Any:
    """The terms of the anchors ``[n]``; if symmetric, of all references as well.

    If `spec.summed`, sums over negatives may stand for all anchors in their first.

    Args:
        spec, batch, parameters: the loss, its batch and the values of its parameters.
        by_tiles: the walk over tiles of a shape that is neither log-sum-exp nor
            separable, a function of spec, batch, classes and parameters.
    """
    if isinstance(spec.shape, LogSumExp):
        by_tiles = _log_sum_exp_by_tiles
    elif isinstance(spec.shape, Separable):
        by_tiles = _separable_by_tiles
    assert by_tiles is not None
    sides = [batch, swapped(batch)] if spec.symmetric else [batch]
    classes = None
    if spec.metric.products is not None and batch.has_classes:
        classes = tuple(_all_positives(side) for side in sides)

    def terms(sizes: BlockSizes) -> Any:
        sizes = sizes._replace(tile=spec.block_size or sizes.tile)
        here = dataclasses.replace(spec, sizes=sizes)

        def by_panels() -> Any:
            each = [_terms_by_panels(here, side, parameters) for side in sides]
            return both_sides(*each)

        if classes is None:
            return by_panels()
        most = functools.reduce(jnp.maximum, (x.max_positives for x in classes))
        return lax.cond(
            most <= MAX_TILE_POSITIVES,
            lambda: by_tiles(here, batch, classes, parameters),
            by_panels,
        )

    return by_platform(terms, batch.size)


def swapped(batch: Batch) -> Batch:
    """A batch whose anchors are the references, and the other way round."""
    pairs = batch.pairs
    if isinstance(pairs.labels, PairMasks):
        masks = PairMasks(*(x.T for x in pairs.labels))
        pairs = pairs._replace(labels=masks)
    elif batch.references is not None:
        assert pairs.reference_labels is not None
        pairs = pairs._replace(
            labels=pairs.reference_labels, reference_labels=pairs.labels
        )
    if batch.references is None:
        return batch._replace(pairs=pairs)
    pairs = pairs._replace(where=pairs.reference_where, reference_where=pairs.where)
    return Batch(batch.references, batch.anchors, pairs)


def _all_positives(batch: Batch) -> ClassIndex:
    """Classes whose `max_positives` counts anchors without a negative as well."""
    classes = ClassIndex.of(batch)
    return classes._replace(max_positives=jnp.max(classes.positives))


# Tiles.


class Positives(NamedTuple):
    """The positives of every anchor, ``[k, n]``.

    Attributes:
        index: indices of references.
        squares: half the squared differences.
        exists: bool.
    """

    index: Array
    squares: Array
    exists: Array

    @classmethod
    def of(cls, spec: PairSpec, batch: Batch, classes: Classes) -> "Positives":
        sides = (batch, swapped(batch))[: len(classes)]
        each = [
            positives_of(spec.metric, side, index, spec.sizes)
            for side, index in zip(sides, classes)
        ]
        return cls(*both_sides(*each))

    def vjp(
        self,
        spec: PairSpec,
        batch: Batch,
        classes: Classes,
        by_square: Array,
        grads: Gradients,
    ) -> Gradients:
        """Adds the gradients by vectors of the half squares."""
        n = len(batch.anchors)
        by_square = jnp.where(self.exists, by_square, 0)
        grads = vjp_positives(
            batch, grads, self.index[:, :n], by_square[:, :n], classes[0], spec.sizes
        )
        if len(classes) == 1:
            return grads
        other = _swapped_gradients(grads)
        other = vjp_positives(
            swapped(batch),
            other,
            self.index[:, n:],
            by_square[:, n:],
            classes[1],
            spec.sizes,
        )
        return _swapped_gradients(other)


def _swapped_gradients(grads: Gradients) -> Gradients:
    assert grads.references is not None
    return grads._replace(anchors=grads.references, references=grads.anchors)


class Direction(NamedTuple):
    """A direction of a tile: the anchors along one of its sides.

    Attributes:
        axis: axis of the negatives: 1 where anchors are rows, 0 where they are columns.
        start: index of the first anchor among all.
        size: number of anchors along this side.
    """

    axis: int
    start: Array
    size: int

    def at(self, x: Array) -> Array:
        """Numbers ``[n]`` of the anchors, shaped to broadcast along the tile."""
        return jnp.expand_dims(rows_at(x, self.start, self.size), self.axis)


def _directions(spec: PairSpec, batch: Batch, tile: Tile) -> list[Direction]:
    rows, columns = tile.squares.shape
    directions = [Direction(1, tile.row, rows)]
    if tile.mirrored:
        directions.append(Direction(0, tile.column, columns))
    elif spec.symmetric:
        start = tile.column + len(batch.anchors)
        directions.append(Direction(0, start, columns))
    return directions


def _anchor_count(spec: PairSpec, batch: Batch) -> int:
    return len(batch.anchors) + (len(batch.reference_side[0]) if spec.symmetric else 0)


def _log_sum_exp_by_tiles(
    spec: PairSpec, batch: Batch, classes: Classes, parameters: Parameters
) -> Any:
    assert isinstance(spec.shape, LogSumExp)
    squares, exists, total, nearest = _pair_numbers(spec, batch, classes, parameters)
    negatives = jnp.concatenate([x.negatives for x in classes])
    distance = spec.metric.inner_products.distance
    d_ap = jnp.where(exists, distance(squares), 0)
    # Cost functions take the positives of an anchor along the last axis.
    pairs = AnchorPairs(d_ap.T, exists.T, total, nearest, negatives > 0)
    return spec.shape.cost(pairs, parameters)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _pair_numbers(
    spec: PairSpec, batch: Batch, classes: Classes, parameters: Parameters
) -> tuple[Array, ...]:
    """Half squares of positives and which exist, log-sum-exp and nearest negative."""
    return _numbers_forward(spec, batch, classes, parameters)[0]


@own_promotion
def _numbers_forward(
    spec: PairSpec, batch: Batch, classes: Classes, parameters: Parameters
) -> tuple[tuple[Array, ...], tuple]:
    assert isinstance(spec.shape, LogSumExp)
    positives = Positives.of(spec, batch, classes)
    form = spec.metric.inner_products
    d_ap = jnp.where(positives.exists, form.distance(positives.squares), 0)
    limits = spec.shape.limits_of(d_ap.T, positives.exists.T, parameters)
    tiles = Tiles.of(spec.metric, batch, spec.sizes)
    total, nearest = _log_sum_exps(spec, tiles, limits, parameters)
    nearest = jnp.where(nearest < jnp.inf, form.distance(nearest), jnp.inf)
    out = positives.squares, positives.exists, total, nearest
    return out, (batch, classes, parameters, positives, limits, total)


@own_promotion
def _numbers_backward(spec: PairSpec, inputs: tuple, cotangents: tuple) -> tuple:
    batch, classes, parameters, positives, limits, total = inputs
    by_square, _, by_total, _ = cotangents
    tiles = Tiles.of(spec.metric, batch, spec.sizes)
    grads, by_parameters = _log_sum_exp_gradients(
        spec, tiles, limits, parameters, total, by_total
    )
    grads = positives.vjp(spec, batch, classes, by_square, grads)
    return vector_cotangents(grads, by_parameters)


def vector_cotangents(grads: Gradients, by_parameters: Parameters) -> tuple:
    """Those of batch, classes and parameters; labels and masks have no gradient."""
    pairs: Any = None
    return Batch(grads.anchors, grads.references, pairs), None, by_parameters


_pair_numbers.defvjp(_numbers_forward, _numbers_backward)


def _inside(d: Array, limits: tuple[Array, Array] | None, side: Direction) -> Any:
    """Which distances of a tile are within the limits of the anchors of a side."""
    if limits is None:
        return True
    low, high = (side.at(x) for x in limits)
    return ~((d < low) | (d >= high))


def _log_sum_exps(
    spec: PairSpec,
    tiles: Tiles,
    limits: tuple[Array, Array] | None,
    parameters: Parameters,
) -> tuple[Array, Array]:
    """Log-sum-exp of logits, and half square of the nearest negative, ``[n]``."""
    shape, form, batch = spec.shape, spec.metric.inner_products, tiles.batch
    assert isinstance(shape, LogSumExp)

    # The state: log-sum-exp so far, and half squares of nearest negatives.
    def visit(state: tuple[Array, Array], tile: Tile) -> tuple[Array, Array]:
        squares = materialize(tile.squares)
        negative = squares < jnp.inf
        d = form.distance(jnp.where(negative, squares, 0))
        logits = jnp.where(negative, shape.logit(d, parameters), -jnp.inf)
        shift = _finite(jnp.max(logits))
        powers = materialize(jnp.exp(logits - shift))
        sides = _directions(spec, batch, tile)
        kept = [_inside(d, limits, side) for side in sides]

        def sums_of(side: Direction, inside: Any, powers: Array) -> Array:
            return jnp.sum(jnp.where(inside, powers, 0), side.axis)

        nearest = [
            jnp.min(jnp.where(inside, squares, jnp.inf), side.axis)
            for side, inside in zip(sides, kept)
        ]
        sums = [sums_of(side, inside, powers) for side, inside in zip(sides, kept)]
        least = jnp.exp(-jnp.asarray(LEAST_EXPONENT, d.dtype))
        lost = [jnp.any((s < least) & (x < jnp.inf)) for s, x in zip(sums, nearest)]

        def with_own_shifts() -> tuple[Array, ...]:
            each = []
            for side, inside in zip(sides, kept):
                own = jnp.where(inside, logits, -jnp.inf)
                most = _finite(jnp.max(own, side.axis))
                powers = jnp.exp(own - jnp.expand_dims(most, side.axis))
                each.append(most + jnp.log(jnp.sum(powers, side.axis)))
            return tuple(each)

        new = lax.cond(
            functools.reduce(jnp.logical_or, lost),
            with_own_shifts,
            lambda: tuple(shift + jnp.log(x) for x in sums),
        )
        for side, one, least_square in zip(sides, new, nearest):
            old = [rows_at(x, side.start, side.size) for x in state]
            merged = jnp.logaddexp(old[0], one), jnp.minimum(old[1], least_square)
            first, second = (
                lax.dynamic_update_slice_in_dim(x, rows, side.start, 0)
                for x, rows in zip(state, merged)
            )
            state = first, second
        return state

    zeros = batch.zeros((_anchor_count(spec, batch),))
    return tiles.scan(visit, (zeros - jnp.inf, zeros + jnp.inf))


def _finite(x: Array) -> Array:
    """Minus infinity, the maximum of nothing, replaced by 0."""
    return jnp.where(x == -jnp.inf, 0, x)


def _log_sum_exp_gradients(
    spec: PairSpec,
    tiles: Tiles,
    limits: tuple[Array, Array] | None,
    parameters: Parameters,
    total: Array,
    by_total: Array,
) -> tuple[Gradients, Parameters]:
    """Gradients by vectors and by parameters, for gradients by log-sum-exps."""
    shape, form, batch = spec.shape, spec.metric.inner_products, tiles.batch
    assert isinstance(shape, LogSumExp)
    exists = total != -jnp.inf
    by_total = jnp.where(exists, by_total, 0)

    # The state: the gradients by vectors and by parameters.
    def visit(state: tuple[Gradients, Parameters], tile: Tile) -> tuple:
        grads, by_parameters = state
        squares = materialize(tile.squares)
        negative = squares < jnp.inf
        d, slope = with_slope(form.distance, jnp.where(negative, squares, 0))
        logits, pull = jax.vjp(shape.logit, d, parameters)
        logits = jnp.where(negative, logits, -jnp.inf)
        shift = _finite(jnp.max(logits))
        sides = _directions(spec, batch, tile)
        # Anchors without a negative here have no weight.
        excess = [
            jnp.where(side.at(exists), shift - side.at(total), -jnp.inf)
            for side in sides
        ]
        kept = [_inside(d, limits, side) for side in sides]
        each = list(zip(sides, kept, excess))

        def with_one_shift() -> Array:
            weights = jnp.exp(logits - shift)
            return weights * sum(
                jnp.where(inside, side.at(by_total) * jnp.exp(x), 0)
                for side, inside, x in each
            )

        def with_own_shifts() -> Array:
            return sum(  # pyrefly: ignore[bad-return]: it starts with an array
                jnp.where(
                    inside & side.at(exists),
                    side.at(by_total) * jnp.exp(logits - _finite(side.at(total))),
                    0,
                )
                for side, inside, _ in each
            )

        most = functools.reduce(jnp.maximum, (jnp.max(x) for x in excess))
        weights = lax.cond(most < LEAST_EXPONENT, with_one_shift, with_own_shifts)
        by_distance, new = pull(weights)
        by_square = jnp.where(negative, by_distance * slope, 0)
        grads = vjp_negatives(batch, grads, tile, by_square)
        return grads, jax.tree.map(jnp.add, by_parameters, new)

    none = Gradients.zero(batch), jax.tree.map(jnp.zeros_like, parameters)
    return tiles.scan(visit, none)


# Separable losses.


def _separable_by_tiles(
    spec: PairSpec, batch: Batch, classes: Classes, parameters: Parameters
) -> PairTerms:
    shape = spec.shape
    assert isinstance(shape, Separable)
    sums_of = _negative_totals if spec.summed else _negative_sums
    squares, exists, total, active = sums_of(spec, batch, classes, parameters)
    (of_anchors,) = classes
    d_ap = spec.metric.inner_products.distance(squares)
    each = at_anchors(parameters, lambda x: x[:, None])
    positives = sums_of_pairs(shape.positive_cost, d_ap.T, exists.T, each)
    negatives = of_anchors.negatives.astype(total.dtype)
    anchors = (positives.valid + negatives > 0).astype(total.dtype)
    return PairTerms(positives, TripletTerms(total, active, negatives), anchors)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _negative_sums(
    spec: PairSpec, batch: Batch, classes: Classes, parameters: Parameters
) -> tuple[Array, ...]:
    """Half squares of positives, which exist, and costs and counts of negatives."""
    return _sums_forward(spec, batch, classes, parameters)[0]


@own_promotion
def _sums_forward(
    spec: PairSpec, batch: Batch, classes: Classes, parameters: Parameters
) -> tuple[tuple[Array, ...], tuple]:
    positives = Positives.of(spec, batch, classes)
    sums, _ = _separable_walk(spec, batch, parameters, None, gradient=False)
    out = positives.squares, positives.exists, *sums
    return out, (batch, classes, parameters, positives)


@own_promotion
def _sums_backward(spec: PairSpec, inputs: tuple, cotangents: tuple) -> tuple:
    batch, classes, parameters, positives = inputs
    by_square, _, by_total, _ = cotangents
    _, out = _separable_walk(spec, batch, parameters, by_total, gradient=True)
    assert out is not None
    grads, by_parameters = out
    grads = positives.vjp(spec, batch, classes, by_square, grads)
    return vector_cotangents(grads, by_parameters)


_negative_sums.defvjp(_sums_forward, _sums_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _negative_totals(
    spec: PairSpec, batch: Batch, classes: Classes, parameters: Parameters
) -> tuple[Array, ...]:
    """`_negative_sums`, of which only the sums over the anchors have gradients.

    One walk makes values and gradients: all anchors have one weight.
    """
    return _sums_forward(spec, batch, classes, parameters)[0]


@own_promotion
def _totals_forward(
    spec: PairSpec, batch: Batch, classes: Classes, parameters: Parameters
) -> tuple[tuple[Array, ...], tuple]:
    positives = Positives.of(spec, batch, classes)
    sums, gradients = _separable_walk(spec, batch, parameters, None, gradient=True)
    out = positives.squares, positives.exists, *sums
    return out, (batch, classes, positives, gradients)


@own_promotion
def _totals_backward(spec: PairSpec, inputs: tuple, cotangents: tuple) -> tuple:
    batch, classes, positives, gradients = inputs
    by_square, _, by_total, _ = cotangents
    grads, by_parameters = jax.tree.map(lambda x: x * by_total[0], gradients)
    grads = positives.vjp(spec, batch, classes, by_square, grads)
    return vector_cotangents(grads, by_parameters)


_negative_totals.defvjp(_totals_forward, _totals_backward)


def _separable_walk(
    spec: PairSpec,
    batch: Batch,
    parameters: Parameters,
    weights: Array | None,
    *,
    gradient: bool,
) -> tuple[tuple[Array, Array], tuple[Gradients, Parameters] | None]:
    """Summed costs of negatives and how many cost anything, ``[n]``; and gradients.

    Gradients are those of the costs summed over the anchors, with their weights.
    """
    shape, form = spec.shape, spec.metric.inner_products
    assert isinstance(shape, Separable)
    tiles = Tiles.of(spec.metric, batch, spec.sizes)

    # The state: the sums, and the gradients by vectors and by parameters if wanted.
    def visit(state: tuple, tile: Tile) -> tuple:
        sums, gradients = state
        squares = materialize(tile.squares)
        negative = squares < jnp.inf
        d, slope = with_slope(form.distance, jnp.where(negative, squares, 0))
        sides = _directions(spec, batch, tile)
        # Both directions have one cost, unless a parameter is that of the anchor.
        groups = [[side] for side in sides] if of_anchors else [sides]
        by_distances = []
        for group in groups:
            here = at_anchors(parameters, group[0].at)
            costs, pull = jax.vjp(shape.negative_cost, d, here)
            costs = materialize(jnp.where(negative, costs, 0))
            for side in group:
                parts = (
                    sum_in_one_loop(costs, side.axis),
                    jnp.sum((costs > 0).astype(costs.dtype), side.axis),
                )
                sums = tuple(
                    add_rows(x, side.start, new) for x, new in zip(sums, parts)
                )
            if gradients is None:
                continue
            grads, by_parameters = gradients
            each = [1.0 if weights is None else side.at(weights) for side in group]
            new, by_here = pull(jnp.where(negative, sum(each), 0).astype(d.dtype))
            by_distances.append(new)
            by_parameters = _add_parameters(by_parameters, by_here, group[0])
            gradients = grads, by_parameters
        if gradients is None:
            return sums, None
        grads, by_parameters = gradients
        by_distance = functools.reduce(jnp.add, by_distances)
        by_square = jnp.where(negative, by_distance * slope, 0)
        return sums, (vjp_negatives(batch, grads, tile, by_square), by_parameters)

    of_anchors = any(
        map(is_per_anchor, jax.tree.leaves(parameters, is_leaf=is_per_anchor))
    )
    zeros = batch.zeros((_anchor_count(spec, batch),))
    gradients = None
    if gradient:
        by_parameters = jax.tree.map(jnp.zeros_like, parameters)
        gradients = Gradients.zero(batch), by_parameters
    return tiles.scan(visit, ((zeros, zeros), gradients))


def _add_parameters(total: Parameters, new: Parameters, side: Direction) -> Parameters:
    """Gradients by parameters with those of a tile, in the rows of a side's anchors."""

    def add(old: Any, part: Array) -> Any:
        if not is_per_anchor(old):
            return old + part
        values = add_rows(old.values, side.start, part.reshape(-1))
        return PerAnchor(values, old.name)

    return jax.tree.map(add, total, new, is_leaf=is_per_anchor)


# Panels.


def _terms_by_panels(spec: PairSpec, batch: Batch, parameters: Parameters) -> Any:
    panels = Panels.of(spec.metric, batch, spec.sizes)

    @jax.checkpoint
    def of_block(block: Array) -> tuple[Array, Any]:
        rows = panels.rows(block)
        distances = _panel_distances(spec, panels, rows)
        count = len(rows.a)
        here = at_anchors(
            parameters, lambda x: rows_at(x, rows.start, count), keep=True
        )
        terms = spec.shape.terms(distances, rows.masks, here)
        return rows.start, jax.tree.map(lambda x: jnp.where(rows.real, x, 0), terms)

    blocks = panels.blocks
    start, parts = lax.map(of_block, jnp.arange(blocks.count))
    # Rows that two panels share count in the first.
    row = start[:, None] + jnp.arange(blocks.size)
    none = batch.zeros((len(batch.anchors),))
    return jax.tree.map(lambda part: none.at[row].add(part), parts)


def _panel_distances(spec: PairSpec, panels: Panels, rows: PanelRows) -> Array:
    """Distances ``[rows, m]``; those of positives have all their digits."""
    metric, y = spec.metric, panels.batch.reference_side[0]
    if metric.products is None:
        return metric._matrix_checked(rows.a, y, rows.own_index)
    squares, near = panels.squares(rows.a)
    rounded = lax.stop_gradient(squares)
    pairs, compare = near & rows.masks.positive, metric.inner_products.half_square
    exact = refine(rounded, pairs, compare, *lax.stop_gradient((rows.a, y)))
    squares = squares + (exact - rounded)
    return metric.inner_products.distance(jnp.where(squares < 0, 0, squares))
