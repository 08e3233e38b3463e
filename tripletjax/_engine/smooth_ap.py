"""SmoothAP by tiles: smooth numbers of negatives ahead of each positive, ``[k, n]``.

    ahead_ai = sum_n sigma((d_ai - d_an) / temperature)

One walk makes these numbers, and the gradient takes a second walk. The rest of the loss
is a function of O(n k) numbers, which JAX differentiates.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from tripletjax._engine.by_tiles import vjp_negatives
from tripletjax._engine.pair_losses import (
    PairGradients,
    Positives,
    Problem,
    TileWalk,
)
from tripletjax._engine.reductions import add_up, sum_in_one_loop
from tripletjax._engine.search import in_threes
from tripletjax._engine.slopes import with_slope
from tripletjax._engine.spec import Gradients
from tripletjax._pairwise.slices import materialize
from tripletjax._pairwise.tiles import Tile, Tiles
from tripletjax.pair_losses import Parameters
from tripletjax.smooth_ap import SmoothAP


class Numbers(NamedTuple):
    """Numbers of every anchor, or their cotangents.

    Attributes:
        positives: its positives.
        ahead: negatives ahead of each positive whose rank counts ``[k, n]``.
        nearest: distance of its nearest negative ``[n]``.
    """

    positives: Positives
    ahead: Array
    nearest: Array


class Thresholds(NamedTuple):
    """Positives of every anchor whose ranks count, ``[k, n]``.

    Attributes:
        distances: distances, 0 where there is none.
        count: number of rows in use.
    """

    distances: Array
    count: Array

    @classmethod
    def of(cls, problem: Problem, positives: Positives) -> "Thresholds":
        shape, (classes,) = problem.shape_of(SmoothAP), problem.classes
        d_ap = positives.distances(problem)
        distances, _ = shape.with_anchor(d_ap, positives.exists)
        return cls(distances, classes.max_positives + shape.include_anchor)


def _forward(problem: Problem) -> tuple[Numbers, None]:
    positives = Positives.of(problem)
    thresholds = Thresholds.of(problem, positives)
    ahead = _negatives_ahead(problem.tiles, thresholds, problem.parameters)
    return Numbers(positives, *ahead), None


def _terms(problem: Problem, numbers: Numbers) -> Any:
    positives, ahead, nearest = numbers
    shape, (temperature,) = problem.shape_of(SmoothAP), problem.parameters
    d_ap, exists = positives.distances(problem), positives.exists
    costs = shape.costs(*shape.with_anchor(d_ap, exists), ahead, temperature)
    return shape.terms_of_costs(costs, d_ap.T, exists.T, nearest)


def _backward(
    problem: Problem, numbers: Numbers, cotangents: Numbers, gradients: PairGradients
) -> PairGradients:
    positives, by_square = numbers.positives, cotangents.positives.squares
    thresholds = Thresholds.of(problem, positives)
    grads, by_threshold, by_parameters = _gradients(
        problem.tiles, thresholds, problem.parameters, cotangents.ahead, gradients
    )
    _, slopes = with_slope(problem.distance, positives.squares)
    by_square += by_threshold[int(problem.shape_of(SmoothAP).include_anchor) :] * slopes
    return positives.vjp(problem, by_square, grads), by_parameters


SMOOTH_AP = TileWalk(_forward, _terms, _backward)


class Tiled(NamedTuple):
    """The distances of a tile, and its sides.

    Attributes:
        distances: distances of negatives, infinite for other pairs.
        starts: the first anchors along the rows and, if mirrored, the columns.
    """

    distances: Array
    starts: list[Array]

    @classmethod
    def of(cls, tiles: Tiles, tile: Tile) -> "Tiled":
        distance = tiles.metric.inner_products.distance
        starts = [tile.row, tile.column][: tile.directions]
        return cls(materialize(distance(tile.squares)), starts)


def _negatives_ahead(
    tiles: Tiles, thresholds: Thresholds, parameters: Parameters
) -> tuple[Array, Array]:
    """Negatives ahead of each threshold ``[k, n]``, and nearest distances ``[n]``."""
    (temperature,) = parameters

    # The state: negatives ahead, and distances of nearest negatives.
    def visit(state: tuple[Array, Array], tile: Tile) -> tuple[Array, Array]:
        ahead, nearest = state
        d, starts = Tiled.of(tiles, tile)
        for axis, start in zip((1, 0), starts):
            least = jnp.min(d, axis)
            old = lax.dynamic_slice_in_dim(nearest, start, len(least))
            least = jnp.minimum(old, least)
            nearest = lax.dynamic_update_slice_in_dim(nearest, least, start, 0)

        def count(r: Array, rows: list[Array], counts: list[Array]) -> list[Array]:
            for side, (axis, some) in enumerate(zip((1, 0), rows)):
                steps = [
                    jax.nn.sigmoid((jnp.expand_dims(own, axis) - d) / temperature)
                    for own in some
                ]
                sums = jnp.stack([sum_in_one_loop(x, axis) for x in steps])
                counts[side] = lax.dynamic_update_slice_in_dim(counts[side], sums, r, 0)
            return counts

        own = tile.along(thresholds.distances)
        counts = in_threes(thresholds.count, own, count, [*map(jnp.zeros_like, own)])
        return _add_columns(ahead, starts, counts), nearest

    zeros = tiles.batch.zeros((len(tiles.halves),))
    none = tiles.batch.zeros(thresholds.distances.shape)
    return tiles.scan(visit, (none, zeros + jnp.inf))


def _gradients(
    tiles: Tiles,
    thresholds: Thresholds,
    parameters: Parameters,
    by_ahead: Array,
    gradients: PairGradients,
) -> tuple[Gradients, Array, Parameters]:
    """Gradients by vectors, by thresholds ``[k, n]`` and by parameters."""
    batch, form = tiles.batch, tiles.metric.inner_products
    (temperature,) = parameters

    # The state: gradients by vectors, by thresholds and by the temperature.
    def visit(state: tuple[Gradients, Array, Array], tile: Tile) -> tuple:
        grads, by_threshold, by_temperature = state
        d, starts = Tiled.of(tiles, tile)
        directions = len(starts)

        # The state: gradients by thresholds, by the temperature and by the distances.
        def add(
            r: Array, rows: list[Array], state: tuple[list[Array], Array, Array]
        ) -> tuple[list[Array], Array, Array]:
            by_own, by_temperature, by_d = state
            sides = zip((1, 0), rows[:directions], rows[directions:])
            for side, (axis, some, weights) in enumerate(sides):
                slopes = []
                for own, weight in zip(some, weights):
                    gaps = (jnp.expand_dims(own, axis) - d) / temperature
                    steps = jax.nn.sigmoid(gaps)
                    weight = jnp.expand_dims(weight / temperature, axis)
                    slopes.append(weight * (steps * (1 - steps)))
                    # Not by the sums of slopes: gaps have more digits than distances.
                    scaled = jnp.where(slopes[-1] != 0, slopes[-1] * gaps, 0)
                    by_temperature -= jnp.sum(jnp.sum(scaled, axis))
                sums = jnp.stack([sum_in_one_loop(x, axis) for x in slopes])
                by_own[side] = lax.dynamic_update_slice_in_dim(by_own[side], sums, r, 0)
                by_d = by_d - add_up(slopes)
            return by_own, by_temperature, by_d

        own = tile.along(thresholds.distances)
        none = [*map(jnp.zeros_like, own)], by_temperature, jnp.zeros_like(d)
        by_own, by_temperature, by_d = in_threes(
            thresholds.count, own + tile.along(by_ahead), add, none
        )
        by_threshold = _add_columns(by_threshold, starts, by_own)
        negative = tile.squares < jnp.inf
        _, slope = with_slope(form.distance, jnp.where(negative, tile.squares, 0))
        by_square = jnp.where(negative, by_d * slope, 0)
        grads = vjp_negatives(batch, grads, tile, by_square)
        return grads, by_threshold, by_temperature

    grads, (by_temperature,) = gradients
    state = grads, batch.zeros(thresholds.distances.shape), by_temperature
    grads, by_threshold, by_temperature = tiles.scan(visit, state)
    return grads, by_threshold, (by_temperature,)


def _add_columns(x: Array, starts: list[Array], parts: list[Array]) -> Array:
    """``[k, n]`` with parts ``[k, size]`` added from columns on."""
    for start, part in zip(starts, parts):
        old = lax.dynamic_slice_in_dim(x, start, part.shape[1], axis=1)
        x = lax.dynamic_update_slice_in_dim(x, old + part, start, axis=1)
    return x
