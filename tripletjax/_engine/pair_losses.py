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
from tripletjax._engine.panels import Panel, Panels
from tripletjax._engine.reductions import sum_in_one_loop
from tripletjax._engine.search import MAX_TILE_POSITIVES, positives_of
from tripletjax._engine.slopes import with_slope
from tripletjax._engine.spec import BlockSpec, Gradients
from tripletjax._pairwise.batch import Batch
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
class PairSpec(BlockSpec):
    """A loss of pairs; static.

    Attributes:
        shape: the shape of the loss.
        metric: a distance between vectors.
        symmetric: whether references are anchors as well.
        summed: whether only sums of the terms over the anchors are wanted.
    """

    shape: Shape
    metric: Metric
    symmetric: bool = False
    summed: bool = False


# Gradients by vectors and by parameters.
PairGradients = tuple[Gradients, Parameters]


class TileWalk(NamedTuple):
    """The walks over tiles of a shape of losses, by way of numbers of size O(n k).

    Attributes:
        forward: ``(spec, batch, classes, parameters) -> (numbers, gradients)``, where
            gradients are those of the negatives' total, or None.
        terms: ``(spec, classes, parameters, numbers) -> terms``, which JAX
            differentiates.
        backward: ``(spec, batch, classes, parameters, numbers, cotangents of the
            numbers, gradients) -> gradients`` with their own added.
    """

    forward: Callable[..., tuple[Any, PairGradients | None]]
    terms: Callable[..., Any]
    backward: Callable[..., PairGradients]


def pair_terms(
    spec: PairSpec, walk: TileWalk, batch: Batch, parameters: Parameters
) -> Any:
    """The terms of the anchors ``[n]``; if symmetric, of all references as well.

    Args:
        spec: the loss.
        walk: the walks over tiles of its shape.
        batch: vectors and their pairs.
        parameters: values of the parameters.
    """
    by_products = spec.metric.products is not None
    classes = None
    if by_products and batch.has_classes:
        classes = tuple(_all_positives(side) for side in _sides(spec, batch))

    def terms(spec: PairSpec) -> Any:
        if not by_products:
            # A user's metric may close over traced arrays, which have gradients.
            return _terms_by_panels(spec, batch, parameters)
        return _terms(spec, walk, batch, classes, parameters)

    return spec.by_platform(terms, batch.size)


def _sides(spec: PairSpec, batch: Batch) -> list[Batch]:
    return [batch, swapped(batch)] if spec.symmetric else [batch]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _terms(
    spec: PairSpec,
    walk: TileWalk,
    batch: Batch,
    classes: Classes | None,
    parameters: Parameters,
) -> Any:
    """The terms, by tiles or by panels.

    The gradient makes the choice once more, so that no intermediate results of the
    chosen branch have to be kept.
    """
    return _terms_forward(spec, walk, batch, classes, parameters)[0]


@own_promotion
def _terms_forward(
    spec: PairSpec,
    walk: TileWalk,
    batch: Batch,
    classes: Classes | None,
    parameters: Parameters,
) -> tuple[Any, tuple]:
    if classes is None:
        terms = _terms_by_panels(spec, batch, parameters)
        return terms, (batch, classes, parameters, None)

    def by_tiles() -> tuple[Any, Any]:
        numbers, extra = walk.forward(spec, batch, classes, parameters)
        return walk.terms(spec, classes, parameters, numbers), (numbers, extra)

    _, kept = jax.eval_shape(by_tiles)

    def by_panels() -> tuple[Any, Any]:
        none = jax.tree.map(lambda x: batch.zeros(x.shape).astype(x.dtype), kept)
        return _terms_by_panels(spec, batch, parameters), none

    terms, kept = lax.cond(_few_positives(classes), by_tiles, by_panels)
    return terms, (batch, classes, parameters, kept)


@own_promotion
def _terms_backward(
    spec: PairSpec, walk: TileWalk, inputs: tuple, cotangents: Any
) -> tuple:
    batch, classes, parameters, kept = inputs

    def by_panels(gradients: PairGradients) -> PairGradients:
        return _gradients_by_panels(spec, batch, parameters, cotangents, gradients)

    def by_tiles(gradients: PairGradients) -> PairGradients:
        _, pull = jax.vjp(
            functools.partial(walk.terms, spec, classes), parameters, numbers
        )
        direct, by_numbers = pull(cotangents)
        grads, by_parameters = walk.backward(
            spec, batch, classes, parameters, numbers, by_numbers, gradients
        )
        return grads, jax.tree.map(jnp.add, direct, by_parameters)

    gradients = _no_gradients(batch, parameters)
    if classes is None:
        gradients = by_panels(gradients)
    else:
        numbers, of_total = kept
        if of_total is not None:
            weight = cotangents.negatives.total[0]
            gradients = jax.tree.map(lambda x: x * weight, of_total)
        few = _few_positives(classes)
        gradients = _update_if(few, by_tiles, gradients)
        gradients = _update_if(~few, by_panels, gradients)
    grads, by_parameters = gradients
    pairs: Any = None  # Labels and masks have no gradient.
    return Batch(grads.anchors, grads.references, pairs), None, by_parameters


def _no_gradients(batch: Batch, parameters: Parameters) -> PairGradients:
    return Gradients.zero(batch), jax.tree.map(jnp.zeros_like, parameters)


def _update_if(
    condition: Array, update: Callable[[PairGradients], PairGradients], state: Any
) -> PairGradients:
    """The state, updated if a condition holds.

    A loop updates the state in place, while `lax.cond` makes a copy.
    """
    count = condition.astype(jnp.int32)
    return lax.fori_loop(0, count, lambda _, state: update(state), state)


_terms.defvjp(_terms_forward, _terms_backward)


def _few_positives(classes: Classes) -> Array:
    most = functools.reduce(jnp.maximum, (x.max_positives for x in classes))
    return most <= MAX_TILE_POSITIVES


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

    def distances(self, spec: PairSpec) -> Array:
        """The distances ``[k, n]``, 0 where there is no positive."""
        distance = spec.metric.inner_products.distance
        return jnp.where(self.exists, distance(self.squares), 0)

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
        other = swap(grads)
        other = vjp_positives(
            swapped(batch),
            other,
            self.index[:, n:],
            by_square[:, n:],
            classes[1],
            spec.sizes,
        )
        return swap(other)


def swap(grads: Gradients) -> Gradients:
    """The gradients of a swapped batch."""
    if grads.references is None:
        return grads
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


def _log_sum_exp_forward(
    spec: PairSpec, batch: Batch, classes: Classes, parameters: Parameters
) -> tuple[tuple[Positives, Array, Array], None]:
    """Positives, log-sum-exps of logits, and distances of the nearest negatives."""
    positives = Positives.of(spec, batch, classes)
    tiles = Tiles.of(spec.metric, batch, spec.sizes)
    limits = _limits(spec, positives, parameters)
    total, nearest = _log_sum_exps(spec, tiles, limits, parameters)
    distance = spec.metric.inner_products.distance
    nearest = jnp.where(nearest < jnp.inf, distance(nearest), jnp.inf)
    return (positives, total, nearest), None


def _log_sum_exp_terms(
    spec: PairSpec,
    classes: Classes,
    parameters: Parameters,
    numbers: tuple[Positives, Array, Array],
) -> Any:
    assert isinstance(spec.shape, LogSumExp)
    positives, total, nearest = numbers
    negatives = jnp.concatenate([x.negatives for x in classes])
    # Cost functions take the positives of an anchor along the last axis.
    pairs = AnchorPairs(
        positives.distances(spec).T, positives.exists.T, total, nearest, negatives > 0
    )
    return spec.shape.terms_of(pairs, parameters)


def _log_sum_exp_backward(
    spec: PairSpec,
    batch: Batch,
    classes: Classes,
    parameters: Parameters,
    numbers: tuple[Positives, Array, Array],
    cotangents: tuple[Positives, Array, Array],
    gradients: PairGradients,
) -> PairGradients:
    positives, total, _ = numbers
    by_positives, by_total, _ = cotangents
    tiles = Tiles.of(spec.metric, batch, spec.sizes)
    limits = _limits(spec, positives, parameters)
    grads, by_parameters = _log_sum_exp_gradients(
        spec, tiles, limits, parameters, total, by_total, gradients
    )
    grads = positives.vjp(spec, batch, classes, by_positives.squares, grads)
    return grads, by_parameters


def _limits(
    spec: PairSpec, positives: Positives, parameters: Parameters
) -> tuple[Array, Array] | None:
    assert isinstance(spec.shape, LogSumExp)
    d_ap = positives.distances(spec)
    return spec.shape.limits_of(d_ap.T, positives.exists.T, parameters)


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
        logits = jnp.where(negative, shape.logits_of(d, parameters), -jnp.inf)
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
    gradients: PairGradients,
) -> PairGradients:
    """Add the gradients by vectors and by parameters, for those by log-sum-exps."""
    shape, form, batch = spec.shape, spec.metric.inner_products, tiles.batch
    assert isinstance(shape, LogSumExp)
    exists = total != -jnp.inf
    by_total = jnp.where(exists, by_total, 0)

    def visit(gradients: PairGradients, tile: Tile) -> PairGradients:
        grads, by_parameters = gradients
        squares = materialize(tile.squares)
        negative = squares < jnp.inf
        d, slope = with_slope(form.distance, jnp.where(negative, squares, 0))
        logits, pull = jax.vjp(shape.logits_of, d, parameters)
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

    return tiles.scan(visit, gradients)


# Separable losses.


def _separable_forward(
    spec: PairSpec, batch: Batch, classes: Classes, parameters: Parameters
) -> tuple[tuple[Positives, Array, Array], PairGradients | None]:
    """Positives, and summed costs of negatives and how many cost anything.

    If only sums over the anchors are wanted, all anchors have one weight, and the same
    walk makes the gradients of the total.
    """
    positives = Positives.of(spec, batch, classes)
    none = _no_gradients(batch, parameters) if spec.summed else None
    sums, gradients = _separable_walk(spec, batch, parameters, None, none)
    return (positives, *sums), gradients


def _separable_terms(
    spec: PairSpec,
    classes: Classes,
    parameters: Parameters,
    numbers: tuple[Positives, Array, Array],
) -> PairTerms:
    shape = spec.shape
    assert isinstance(shape, Separable)
    of_positives, total, active = numbers
    (of_anchors,) = classes
    d_ap, exists = of_positives.distances(spec), of_positives.exists
    each = at_anchors(parameters, lambda x: x[:, None])
    positives = sums_of_pairs(shape.positive_costs, d_ap.T, exists.T, each)
    negatives = of_anchors.negatives.astype(total.dtype)
    anchors = (positives.valid + negatives > 0).astype(total.dtype)
    return PairTerms(positives, TripletTerms(total, active, negatives), anchors)


def _separable_backward(
    spec: PairSpec,
    batch: Batch,
    classes: Classes,
    parameters: Parameters,
    numbers: tuple[Positives, Array, Array],
    cotangents: tuple[Positives, Array, Array],
    gradients: PairGradients | None,
) -> PairGradients:
    positives, (by_positives, by_total, _) = numbers[0], cotangents
    if not spec.summed:
        _, gradients = _separable_walk(spec, batch, parameters, by_total, gradients)
    assert gradients is not None
    grads, by_parameters = gradients
    grads = positives.vjp(spec, batch, classes, by_positives.squares, grads)
    return grads, by_parameters


def _separable_walk(
    spec: PairSpec,
    batch: Batch,
    parameters: Parameters,
    weights: Array | None,
    gradients: PairGradients | None,
) -> tuple[tuple[Array, Array], PairGradients | None]:
    """Summed costs of negatives and how many cost anything, ``[n]``; and gradients.

    The walk adds the gradients of the costs, summed over the anchors with their
    weights, to `gradients` if they are given.
    """
    shape, form = spec.shape, spec.metric.inner_products
    assert isinstance(shape, Separable)
    tiles = Tiles.of(spec.metric, batch, spec.sizes)

    of_anchors = any(
        map(is_per_anchor, jax.tree.leaves(parameters, is_leaf=is_per_anchor))
    )

    # The state: the sums, and the gradients by vectors and by parameters if wanted.
    def visit(state: tuple, tile: Tile) -> tuple:
        sums, gradients = state
        squares = materialize(tile.squares)
        negative = squares < jnp.inf
        d, slope = with_slope(form.distance, jnp.where(negative, squares, 0))
        sides = _directions(spec, batch, tile)
        # Both directions have one cost, unless a parameter is that of the anchor.
        groups = [[side] for side in sides] if of_anchors else [sides]
        pulled = []
        for group in groups:
            here = at_anchors(parameters, group[0].at)
            costs, pull = jax.vjp(shape.negative_costs, d, here)
            costs = materialize(jnp.where(negative, costs, 0))
            for side in group:
                parts = (
                    sum_in_one_loop(costs, side.axis),
                    jnp.sum((costs > 0).astype(costs.dtype), side.axis),
                )
                sums = tuple(
                    add_rows(x, side.start, new) for x, new in zip(sums, parts)
                )
            if gradients is not None:
                each = [1.0 if weights is None else side.at(weights) for side in group]
                pulled.append(pull(jnp.where(negative, sum(each), 0).astype(d.dtype)))
        if gradients is None:
            return sums, None
        grads, by_parameters = gradients
        by_distance = functools.reduce(jnp.add, (by_d for by_d, _ in pulled))
        for group, (_, by_here) in zip(groups, pulled):
            by_parameters = _add_parameters(by_parameters, by_here, group[0])
        by_square = jnp.where(negative, by_distance * slope, 0)
        return sums, (vjp_negatives(batch, grads, tile, by_square), by_parameters)

    zeros = batch.zeros((_anchor_count(spec, batch),))
    return tiles.scan(visit, ((zeros, zeros), gradients))


def _add_parameters(total: Parameters, new: Parameters, side: Direction) -> Parameters:
    """Gradients by parameters with those of a tile, in the rows of a side's anchors."""

    def add(old: Any, part: Array) -> Any:
        if not is_per_anchor(old):
            return old + part
        values = add_rows(old.values, side.start, part.reshape(-1))
        return PerAnchor(values, old.name)

    return jax.tree.map(add, total, new, is_leaf=is_per_anchor)


LOG_SUM_EXP = TileWalk(_log_sum_exp_forward, _log_sum_exp_terms, _log_sum_exp_backward)
SEPARABLE = TileWalk(_separable_forward, _separable_terms, _separable_backward)


# Panels.


def _terms_by_panels(spec: PairSpec, batch: Batch, parameters: Parameters) -> Any:
    return both_sides(
        *(_side_terms(spec, side, parameters) for side in _sides(spec, batch))
    )


def _side_terms(spec: PairSpec, batch: Batch, parameters: Parameters) -> Any:
    panels = Panels.of(spec.metric, batch, spec.sizes)

    @jax.checkpoint
    def of_block(block: Array) -> tuple[Array, Any]:
        panel = _refined(panels, block)
        terms = _block_terms(spec, panel, parameters, panel.distances)
        return _rows(panels, panel), terms

    row, parts = lax.map(of_block, jnp.arange(panels.blocks.count))
    none = batch.zeros((len(batch.anchors),))
    return jax.tree.map(lambda part: none.at[row].add(part), parts)


def _gradients_by_panels(
    spec: PairSpec,
    batch: Batch,
    parameters: Parameters,
    cotangents: Any,
    gradients: PairGradients,
) -> PairGradients:
    n = len(batch.anchors)
    own = jax.tree.map(lambda x: x[:n], cotangents)
    grads, by_parameters = _side_gradients(spec, batch, parameters, own, gradients)
    if not spec.symmetric:
        return grads, by_parameters
    other = jax.tree.map(lambda x: x[n:], cotangents)
    grads, by_parameters = _side_gradients(
        spec, swapped(batch), parameters, other, (swap(grads), by_parameters)
    )
    return swap(grads), by_parameters


def _side_gradients(
    spec: PairSpec,
    batch: Batch,
    parameters: Parameters,
    cotangents: Any,
    gradients: PairGradients,
) -> PairGradients:
    panels = Panels.of(spec.metric, batch, spec.sizes)

    def step(block: Array, gradients: PairGradients) -> PairGradients:
        grads, by_parameters = gradients
        panel = _refined(panels, block)
        terms = functools.partial(_block_terms, spec, panel)
        _, pull = jax.vjp(terms, parameters, panel.distances)
        row = _rows(panels, panel)
        new, by_distance = pull(jax.tree.map(lambda x: x[row], cotangents))
        grads = panel.vjp(panels, by_distance, grads)
        return grads, jax.tree.map(jnp.add, by_parameters, new)

    return lax.fori_loop(0, panels.blocks.count, step, gradients)


def _refined(panels: Panels, block: Array) -> Panel:
    """A panel in which positives have all the digits of their distances."""
    panel = panels.panel(block)
    return panel.refined(panels, panel.masks.positive)


def _rows(panels: Panels, panel: Panel) -> Array:
    return panel.start + jnp.arange(panels.blocks.size)


def _block_terms(
    spec: PairSpec, panel: Panel, parameters: Parameters, distances: Array
) -> Any:
    """The terms of a panel; rows that two panels share count in the first."""
    here = at_anchors(
        parameters, lambda x: rows_at(x, panel.start, len(panel.a)), keep=True
    )
    terms = spec.shape.terms(distances, panel.masks, here)
    return jax.tree.map(lambda x: jnp.where(panel.real, x, 0), terms)
