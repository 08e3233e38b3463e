"""Costs of triplets with their derivatives, and from derivatives to vectors."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from tripletjax._pairwise.slices import materialize
from tripletjax.losses import Cost, TripletCost, check_elementwise, costs_of


def with_slope(function: Callable[[Array], Array], x: Array) -> tuple[Array, Array]:
    """An elementwise function and its derivative."""
    return jax.jvp(function, (x,), (jnp.ones_like(x),))


def costs_and_slopes(
    cost: Cost, d_ap: Array, d_an: Array, exists: Array, margin: Array
) -> tuple[Array, Array, Array, Array, Array]:
    """Costs, active triplets, and derivatives by d_ap, by d_an and by the margin.

    ``d_an`` is infinite for pairs that are not negatives. Where no positive `exists`,
    ``d_ap`` is minus infinity unless the cost is a `TripletCost`.
    """
    if isinstance(cost, TripletCost):
        valid = exists & (d_an < jnp.inf)
        d_ap, margin = (jnp.broadcast_to(x, d_an.shape) for x in (d_ap, margin))
        costs, pull = jax.vjp(
            lambda d_ap, d_an, margin: costs_of(d_ap, d_an, valid, margin, cost),
            *(d_ap, d_an, margin),
        )
        slopes = pull(jnp.ones_like(costs))
        return costs, (costs > 0).astype(costs.dtype), *slopes
    gaps = d_ap + margin - d_an
    costs, slope = with_slope(cost.function, gaps)
    check_elementwise(costs, gaps)
    if cost.counts:
        return costs, slope, slope, -slope, slope
    if not cost.vanishes:
        valid = exists & (d_an < jnp.inf)
        costs, slope = jnp.where(valid, costs, 0), jnp.where(valid, slope, 0)
    return costs, (costs > 0).astype(costs.dtype), slope, -slope, slope


def vjp_half_squares(by_square: Array, a: Array, b: Array) -> Array:
    """The gradients by a of half squared differences, times weights.

    With w the weights of the pairs, sum_j w_ij (a_i - b_j) = (sum_j w_ij) a_i - w b.
    """
    # Sums and products are each faster alone than in one loop.
    weights = materialize(jnp.sum(by_square, axis=1))
    products = materialize(jnp.matmul(by_square, b, precision="highest"))
    return weights[:, None] * a - products
