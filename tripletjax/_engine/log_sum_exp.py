"""Log-sum-exp losses by tiles of negatives, with logits g of their distances.

One walk makes L_a = log sum exp g(d_an). Once all are complete, the gradient takes a
second walk, in which

    by d_an = by L_a * exp(g - L_a) * g'.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from tripletjax._engine.by_tiles import vjp_negatives
from tripletjax._engine.pair_losses import (
    Direction,
    PairGradients,
    Positives,
    Problem,
    TileWalk,
)
from tripletjax._engine.slopes import with_slope
from tripletjax._pairwise.slices import materialize, rows_at
from tripletjax._pairwise.tiles import Tile
from tripletjax.pair_losses import AnchorPairs, LogSumExp

# Exponents of a tile have one shift as long as no sum is smaller than this.
LEAST_EXPONENT = 60.0


class Numbers(NamedTuple):
    """Numbers of every anchor, or their cotangents.

    Attributes:
        positives: its positives.
        total: log-sum-exp of the logits of its negatives ``[n]``.
        nearest: distance of its nearest negative ``[n]``.
    """

    positives: Positives
    total: Array
    nearest: Array


def _forward(problem: Problem) -> tuple[Numbers, None]:
    positives = Positives.of(problem)
    total, nearest = _log_sum_exps(problem, _limits(problem, positives))
    nearest = jnp.where(nearest < jnp.inf, problem.distance(nearest), jnp.inf)
    return Numbers(positives, total, nearest), None


def _terms(problem: Problem, numbers: Numbers) -> Any:
    positives, total, nearest = numbers
    negatives = jnp.concatenate([x.negatives for x in problem.classes])
    # Cost functions take the positives of an anchor along the last axis.
    d_ap, exists = positives.distances(problem).T, positives.exists.T
    pairs = AnchorPairs(d_ap, exists, total, nearest, negatives > 0)
    return problem.shape_of(LogSumExp).terms_of(pairs, problem.parameters)


def _backward(
    problem: Problem, numbers: Numbers, cotangents: Numbers, gradients: PairGradients
) -> PairGradients:
    grads, by_parameters = _add_gradients(problem, numbers, cotangents.total, gradients)
    by_square = cotangents.positives.squares
    return numbers.positives.vjp(problem, by_square, grads), by_parameters


LOG_SUM_EXP = TileWalk(_forward, _terms, _backward)


def _limits(problem: Problem, positives: Positives) -> tuple[Array, Array] | None:
    d_ap, exists = positives.distances(problem).T, positives.exists.T
    return problem.shape_of(LogSumExp).limits_of(d_ap, exists, problem.parameters)


def _inside(d: Array, limits: tuple[Array, Array] | None, side: Direction) -> Any:
    """Which distances of a tile are within the limits of the anchors of a side."""
    if limits is None:
        return True
    low, high = (side.at(x) for x in limits)
    return ~((d < low) | (d >= high))


def _log_sum_exps(
    problem: Problem, limits: tuple[Array, Array] | None
) -> tuple[Array, Array]:
    """Log-sum-exp of logits, and half square of the nearest negative, ``[n]``."""

    # The state: log-sum-exp so far, and half squares of nearest negatives.
    def visit(state: tuple[Array, Array], tile: Tile) -> tuple[Array, Array]:
        squares = materialize(tile.squares)
        negative = squares < jnp.inf
        d = problem.distance(jnp.where(negative, squares, 0))
        logits = problem.shape_of(LogSumExp).logits_of(d, problem.parameters)
        logits = jnp.where(negative, logits, -jnp.inf)
        shift = _finite(jnp.max(logits))
        powers = materialize(jnp.exp(logits - shift))
        sides = problem.directions(tile)
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

    zeros = problem.zeros_per_anchor()
    return problem.tiles.scan(visit, (zeros - jnp.inf, zeros + jnp.inf))


def _finite(x: Array) -> Array:
    """Minus infinity, the maximum of nothing, replaced by 0."""
    return jnp.where(x == -jnp.inf, 0, x)


def _add_gradients(
    problem: Problem, numbers: Numbers, by_total: Array, gradients: PairGradients
) -> PairGradients:
    """Add the gradients of the log-sum-exps by vectors of negatives and parameters."""
    limits, total = _limits(problem, numbers.positives), numbers.total
    exists = total != -jnp.inf
    by_total = jnp.where(exists, by_total, 0)

    def visit(gradients: PairGradients, tile: Tile) -> PairGradients:
        grads, by_parameters = gradients
        squares = materialize(tile.squares)
        negative = squares < jnp.inf
        d, slope = with_slope(problem.distance, jnp.where(negative, squares, 0))
        logits, pull = jax.vjp(
            problem.shape_of(LogSumExp).logits_of, d, problem.parameters
        )
        logits = jnp.where(negative, logits, -jnp.inf)
        shift = _finite(jnp.max(logits))
        sides = problem.directions(tile)
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
        grads = vjp_negatives(problem.batch, grads, tile, by_square)
        return grads, jax.tree.map(jnp.add, by_parameters, new)

    return problem.tiles.scan(visit, gradients)
