"""Derivatives of the sums.

The total over all anchors, which `SumReduction` needs, comes together with its gradient
in either mode of differentiation. The terms of every anchor have reverse mode alone, by
a second walk that weighs the anchors. Second derivatives go through the matrix.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from tripletjax import losses
from tripletjax._api import own_promotion
from tripletjax._engine.reductions import add_up
from tripletjax._engine.spec import Gradients, LossSpec, Mining
from tripletjax._engine.terms import terms_and_gradients
from tripletjax._pairwise.batch import Batch
from tripletjax.losses import TripletCost, TripletTerms


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def total_terms(spec: LossSpec, batch: Batch, margin: Array) -> TripletTerms:
    """The terms summed over the anchors."""
    terms, _ = terms_and_gradients(spec, batch, margin, gradient=False)
    return TripletTerms(*map(jnp.sum, terms))


@total_terms.defjvp
@own_promotion
def _total_terms_jvp(spec: LossSpec, primals: tuple, tangents: tuple) -> tuple:
    dot = _floats(*tangents)
    terms, gradients = _with_gradients(spec, *primals, None)
    total_dot = add_up(
        jnp.sum(gradient * dot)
        for gradient, dot in zip(gradients, dot)
        if gradient is not None
    )
    terms = TripletTerms(*map(jnp.sum, terms))
    none = jnp.zeros_like(terms.total)
    return terms, TripletTerms(total_dot, none, none)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def terms_per_anchor(spec: LossSpec, batch: Batch, margin: Array) -> TripletTerms:
    """The terms ``[n]``."""
    return terms_and_gradients(spec, batch, margin, gradient=False)[0]


@own_promotion
def _forward(
    spec: LossSpec, batch: Batch, margin: Array
) -> tuple[TripletTerms, tuple[Batch, Array]]:
    return terms_per_anchor(spec, batch, margin), (batch, margin)


@own_promotion
def _backward(
    spec: LossSpec, inputs: tuple[Batch, Array], cotangents: TripletTerms
) -> tuple:
    _, gradients = _with_gradients(spec, *inputs, cotangents.total)
    # Labels, masks and positions have no gradient.
    pairs: Any = None
    return Batch(gradients.anchors, gradients.references, pairs), gradients.margin


terms_per_anchor.defvjp(_forward, _backward)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _with_gradients(
    spec: LossSpec, batch: Batch, margin: Array, weights: Array | None
) -> tuple[TripletTerms, Gradients]:
    terms, gradients = terms_and_gradients(spec, batch, margin, weights, gradient=True)
    assert gradients is not None
    return terms, gradients


@_with_gradients.defjvp
@own_promotion
def _with_gradients_jvp(spec: LossSpec, primals: tuple, tangents: tuple) -> tuple:
    out = _with_gradients(spec, *primals)
    (batch, margin, weights), (*dot, weights_dot) = primals, tangents
    if weights is None:
        weights = jnp.ones_like(batch.anchors[:, 0])
        weights_dot = jnp.zeros_like(weights)

    def by_matrix(floats: Gradients, weights: Array) -> tuple[TripletTerms, Gradients]:
        def total(floats: Gradients) -> tuple[Array, TripletTerms]:
            terms = _terms_by_matrix(spec, batch, floats)
            return jnp.sum(weights * terms.total), terms

        gradients, terms = jax.grad(total, has_aux=True)(floats)
        return terms, gradients

    floats, floats_dot = _floats(batch, margin), _floats(*dot)
    _, out_dot = jax.jvp(by_matrix, (floats, weights), (floats_dot, weights_dot))
    return out, out_dot


def _floats(batch: Batch, margin: Array) -> Gradients:
    """The arrays with gradients, or their tangents, in the order of `Gradients`."""
    return Gradients(batch.anchors, batch.references, margin)


MATRIX_LOSSES = {
    Mining.ALL: losses.batch_all_loss,
    Mining.HARD: losses.batch_hard_loss,
    Mining.SEMI_HARD: losses.batch_semi_hard_loss,
}


def _terms_by_matrix(spec: LossSpec, batch: Batch, floats: Gradients) -> TripletTerms:
    x = floats.anchors
    y = x if floats.references is None else floats.references
    products = spec.metric.products
    if products is None:
        distances = spec.metric._matrix_checked(x, y, batch.own_index)
    else:
        distances = products.matrix(x, y)
    cost = spec.cost
    return MATRIX_LOSSES[spec.mining](
        distances,
        batch.pairs.masks(),
        margin=floats.margin,
        hinge=cost if isinstance(cost, TripletCost) else cost.function,
        reduce_fn=None,
        **({"fallback": spec.fallback} if spec.mining is Mining.SEMI_HARD else {}),
    )
