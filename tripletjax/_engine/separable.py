"""Separable losses by tiles of negatives.

One walk makes the sums of their costs. For reductions of sums, all anchors have one
weight, and the same walk makes the gradient as well.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from tripletjax._engine.by_tiles import vjp_negatives
from tripletjax._engine.pair_losses import (
    Direction,
    PairGradients,
    Positives,
    Problem,
    TileWalk,
    no_gradients,
)
from tripletjax._engine.reductions import sum_in_one_loop
from tripletjax._engine.slopes import with_slope
from tripletjax._pairwise.slices import add_rows, materialize
from tripletjax._pairwise.tiles import Tile
from tripletjax.losses import TripletTerms
from tripletjax.pair_losses import (
    PairTerms,
    Parameters,
    PerAnchor,
    Separable,
    at_anchors,
    is_per_anchor,
    sums_of_pairs,
)


class Numbers(NamedTuple):
    """Numbers of every anchor, or their cotangents.

    Attributes:
        positives: its positives.
        total: summed costs of its negatives ``[n]``.
        active: number of its negatives with a cost ``[n]``.
    """

    positives: Positives
    total: Array
    active: Array


def _forward(problem: Problem) -> tuple[Numbers, PairGradients | None]:
    none = None
    if problem.spec.summed:
        none = no_gradients(problem.batch, problem.parameters)
    sums, gradients = _walk(problem, None, none)
    return Numbers(Positives.of(problem), *sums), gradients


def _terms(problem: Problem, numbers: Numbers) -> PairTerms:
    of_positives, total, active = numbers
    (of_anchors,) = problem.classes
    d_ap, exists = of_positives.distances(problem).T, of_positives.exists.T
    each = at_anchors(problem.parameters, lambda x: x[:, None])
    positives = sums_of_pairs(
        problem.shape_of(Separable).positive_costs, d_ap, exists, each
    )
    negatives = of_anchors.negatives.astype(total.dtype)
    anchors = (positives.valid + negatives > 0).astype(total.dtype)
    return PairTerms(positives, TripletTerms(total, active, negatives), anchors)


def _backward(
    problem: Problem, numbers: Numbers, cotangents: Numbers, gradients: Any
) -> PairGradients:
    if not problem.spec.summed:
        _, gradients = _walk(problem, cotangents.total, gradients)
    grads, by_parameters = gradients
    by_square = cotangents.positives.squares
    return numbers.positives.vjp(problem, by_square, grads), by_parameters


SEPARABLE = TileWalk(_forward, _terms, _backward)


def _walk(
    problem: Problem, weights: Array | None, gradients: PairGradients | None
) -> tuple[tuple[Array, Array], PairGradients | None]:
    """Summed costs of negatives and how many cost anything, ``[n]``; and gradients.

    The walk adds the gradients of the costs, summed over the anchors with their
    weights, to `gradients` if they are given.
    """
    parameters = problem.parameters
    leaves = jax.tree.leaves(parameters, is_leaf=is_per_anchor)
    of_anchors = any(map(is_per_anchor, leaves))

    # The state: the sums, and the gradients by vectors and by parameters if wanted.
    def visit(state: tuple, tile: Tile) -> tuple:
        sums, gradients = state
        squares = materialize(tile.squares)
        negative = squares < jnp.inf
        d, slope = with_slope(problem.distance, jnp.where(negative, squares, 0))
        sides = problem.directions(tile)
        # Both directions have one cost, unless a parameter is that of the anchor.
        groups = [[side] for side in sides] if of_anchors else [sides]
        pulled = []
        for group in groups:
            here = at_anchors(parameters, group[0].at)
            costs, pull = jax.vjp(problem.shape_of(Separable).negative_costs, d, here)
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
        grads = vjp_negatives(problem.batch, grads, tile, by_square)
        return sums, (grads, by_parameters)

    zeros = problem.zeros_per_anchor()
    return problem.tiles.scan(visit, ((zeros, zeros), gradients))


def _add_parameters(total: Parameters, new: Parameters, side: Direction) -> Parameters:
    """Gradients by parameters with those of a tile, in the rows of a side's anchors."""

    def add(old: Any, part: Array) -> Any:
        if not is_per_anchor(old):
            return old + part
        values = add_rows(old.values, side.start, part.reshape(-1))
        return PerAnchor(values, old.name)

    return jax.tree.map(add, total, new, is_leaf=is_per_anchor)
