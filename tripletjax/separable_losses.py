"""Named losses of the separable shape, over a distance matrix.

Costs of positive pairs and costs of negative pairs are summed per anchor into
`PairTerms`, and reduced.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from tripletjax.losses import Reduction, mean_active
from tripletjax.pair_losses import (
    PairLoss,
    PairOptions,
    PerAnchor,
    Separable,
    mean_active_by_side,
    mean_of_anchors,
    of_distances,
    pair_loss,
)
from tripletjax.pairs import PairMasks


def _beyond_margin(d: Array, parameters: tuple) -> Array:
    return jax.nn.relu(d - parameters[0])


def _within_margin(d: Array, parameters: tuple) -> Array:
    return jax.nn.relu(parameters[1] - d)


def define_contrastive(
    positive_margin: ArrayLike, negative_margin: ArrayLike
) -> PairLoss:
    """The shape and the parameters of `contrastive_loss`."""
    parameters = positive_margin, negative_margin
    return PairLoss(Separable(_beyond_margin, _within_margin), parameters)


@pair_loss(finite=("positive_margin", "negative_margin"))
def contrastive_loss(
    distances: ArrayLike,
    labels: ArrayLike | PairMasks,
    *,
    positive_margin: ArrayLike = 0.0,
    negative_margin: ArrayLike = 1.0,
    reference_labels: ArrayLike | None = None,
    positions: ArrayLike | None = None,
    where: ArrayLike | None = None,
    reference_where: ArrayLike | None = None,
    reduce_fn: Reduction | None = mean_active_by_side,
) -> Any:
    r"""Contrastive loss: positives within one margin, negatives beyond the other.

    $$\ell_a = \sum_{p \in P_a} [d_{ap} - m_+]_+ + \sum_{n \in N_a} [m_- - d_{an}]_+$$

    The paper has squares of these costs, which `separable_loss` can compute.

    Memory: O(n m), at most 6 times the size of the distances.

    Args:
        distances: ``[..., n, m]``.
        labels: integers ``[..., n]``, or `PairMasks`.
        positive_margin: $m_+$, a scalar, in units of the distances.
        negative_margin: $m_-$, a scalar, in units of the distances.
        reference_labels, positions, where, reference_where: as in `pair_masks`.
        reduce_fn: from the terms ``[..., n]`` to the result; None returns the
            terms.

    Returns:
        With the default `reduce_fn` the mean over positives that cost anything plus
        the mean over negatives that cost anything, ``[...]``.

    Raises:
        TypeError: if an argument has the wrong dtype or is not callable.
        ValueError: if shapes do not fit.

    Requirements:
        Two classes, and two items of one of them. Positives alone collapse the
        embedding.

    Settings:
        The defaults are those of pytorch-metric-learning, for Euclidean distances of
        unit norm. With cosine distances, a negative margin of 1 stops at similarity 0.

    Relations:
        `margin_loss` has the same costs, with margins $\beta - m$ and $\beta + m$, and
        another mean.

    References:
        Hadsell, Chopra, LeCun. Dimensionality Reduction by Learning an Invariant
        Mapping. CVPR 2006.

    >>> import jax.numpy as jnp
    >>> import tripletjax as tj
    >>> d = jnp.array([[0.0, 0.5, 0.75], [0.5, 0.0, 2.0], [0.75, 2.0, 0.0]])
    >>> print(tj.contrastive_loss(d, jnp.array([0, 0, 1])))
    0.75
    """
    loss = define_contrastive(positive_margin, negative_margin)
    pairs = PairOptions(reference_labels, positions, where, reference_where)
    return of_distances(loss, distances, labels, pairs, reduce_fn)


def _beyond_boundary(d: Array, parameters: tuple) -> Array:
    margin, beta = parameters
    return jax.nn.relu(margin + d - beta)


def _within_boundary(d: Array, parameters: tuple) -> Array:
    margin, beta = parameters
    return jax.nn.relu(margin + beta - d)


def define_margin(margin: ArrayLike, beta: ArrayLike) -> PairLoss:
    """The shape and the parameters of `margin_loss`."""
    boundary = PerAnchor(beta, "beta") if jnp.ndim(beta) else beta
    return PairLoss(Separable(_beyond_boundary, _within_boundary), (margin, boundary))


@pair_loss(finite=("margin",), of_anchors=("beta",))
def margin_loss(
    distances: ArrayLike,
    labels: ArrayLike | PairMasks,
    *,
    margin: ArrayLike = 0.2,
    beta: ArrayLike = 1.2,
    reference_labels: ArrayLike | None = None,
    positions: ArrayLike | None = None,
    where: ArrayLike | None = None,
    reference_where: ArrayLike | None = None,
    reduce_fn: Reduction | None = mean_active,
) -> Any:
    r"""Margin loss around a boundary that can be learned.

    $$\ell_a = \sum_{p \in P_a} [m + d_{ap} - \beta]_+ +
      \sum_{n \in N_a} [m + \beta - d_{an}]_+$$

    The paper samples one negative per positive by
    `tripletjax.distance_weighted_triplets`; here all negatives count.

    Memory: O(n m), at most 6 times the size of the distances.

    Args:
        distances: ``[..., n, m]``.
        labels: integers ``[..., n]``, or `PairMasks`.
        margin: m, a scalar, in units of the distances.
        beta: $\beta$, a scalar or an array ``[..., n]`` with a value for each anchor,
            in units of the distances. With a value for each class, ``beta[labels]``.
        reference_labels, positions, where, reference_where: as in `pair_masks`.
        reduce_fn: from the terms ``[..., n]`` to the result; None returns the
            terms.

    Returns:
        With the default `reduce_fn` the mean over pairs that cost anything, ``[...]``.

    Raises:
        TypeError: if an argument has the wrong dtype or is not callable.
        ValueError: if shapes do not fit.

    Requirements:
        Two classes, and two items of one of them. Positives alone collapse the
        embedding.

    Settings:
        Wu et al. 2017, as in MXNet's example: margin 0.2 and beta from 1.2, for
        `euclidean` distances of unit norm. Adam has a learning rate of 1e-4, and SGD
        has 0.1 for beta. `tripletjax.blockwise` needs ``metric=tj.euclidean`` for them.

    Relations:
        `contrastive_loss` with margins $\beta - m$ and $\beta + m$ has the same costs,
        and another mean.

    References:
        Wu, Manmatha, Smola, Krähenbühl. Sampling Matters in Deep Embedding Learning.
        2017. arXiv:1706.07567

    >>> import jax.numpy as jnp
    >>> import tripletjax as tj
    >>> d = jnp.array([[0.0, 1.25, 1.0], [1.25, 0.0, 2.0], [1.0, 2.0, 0.0]])
    >>> print(f"{tj.margin_loss(d, jnp.array([0, 0, 1])):.4f}")
    0.3250
    """
    loss = define_margin(margin, beta)
    pairs = PairOptions(reference_labels, positions, where, reference_where)
    return of_distances(loss, distances, labels, pairs, reduce_fn)


@jax.custom_jvp
def _softplus(x: Array) -> Array:
    # Half the time of `jax.nn.softplus`, which treats infinities and NaN apart.
    return jnp.maximum(x, 0) + jnp.log1p(jnp.exp(-jnp.abs(x)))


@_softplus.defjvp
def _softplus_slope(primals: tuple[Array], tangents: tuple[Array]) -> tuple:
    # The slopes of a maximum and of an absolute value fit together only if both have
    # the same sign of x. XLA may compute x twice, with two roundings.
    (x,), (tangent,) = primals, tangents
    power = jnp.exp(-jnp.abs(x))
    slope = jnp.where(x >= 0, 1, power) / (1 + power)
    return _softplus(x), slope * tangent


def _sigmoid_positive(d: Array, parameters: tuple) -> Array:
    scale, bias = parameters
    return _softplus(-(scale * (1 - d) + bias))


def _sigmoid_negative(d: Array, parameters: tuple) -> Array:
    scale, bias = parameters
    return _softplus(scale * (1 - d) + bias)


def define_sigmoid(scale: ArrayLike, bias: ArrayLike) -> PairLoss:
    """The shape and the parameters of `sigmoid_loss`."""
    return PairLoss(Separable(_sigmoid_positive, _sigmoid_negative), (scale, bias))


@pair_loss(positive=("scale",), finite=("bias",))
def sigmoid_loss(
    distances: ArrayLike,
    labels: ArrayLike | PairMasks,
    *,
    scale: ArrayLike = 10.0,
    bias: ArrayLike = -10.0,
    reference_labels: ArrayLike | None = None,
    positions: ArrayLike | None = None,
    where: ArrayLike | None = None,
    reference_where: ArrayLike | None = None,
    reduce_fn: Reduction | None = mean_of_anchors,
) -> Any:
    r"""Sigmoid loss of all pairs (SigLIP), of similarities $s = 1 - d$.

    $$\ell_a = \sum_{p \in P_a} \log(1 + e^{-(\gamma s_{ap} + b)}) +
      \sum_{n \in N_a} \log(1 + e^{\gamma s_{an} + b})$$

    Memory: O(n m), at most 6 times the size of the distances.

    Args:
        distances: ``[..., n, m]``.
        labels: integers ``[..., n]``, or `PairMasks`.
        scale: $\gamma$, a scalar above 0. The paper learns its logarithm.
        bias: b, a scalar. With one positive in n pairs, $\log(1 / (n - 1))$ is the bias
            of the prior; -10 is that of n = 22,027.
        reference_labels, positions, where, reference_where: as in `pair_masks`.
        reduce_fn: from the terms ``[..., n]`` to the result; None returns the
            terms.

    Returns:
        With the default `reduce_fn` the sum over pairs divided by the number of
        anchors, ``[...]``.

    Raises:
        TypeError: if an argument has the wrong dtype or is not callable.
        ValueError: if shapes do not fit, or the scale is not above 0.

    Requirements:
        Cosine distances. Two sides, such as images and texts, need `reference_labels`
        or `PairMasks`.

    Settings:
        Zhai et al. 2023 and their code: scale and bias are learned from 10 and -10.
        They report that batches of 32,000 pairs suffice.

    Relations:
        It is near `info_nce_loss`, but the cost of a pair does not depend on other
        pairs.

    References:
        Zhai, Mustafa, Kolesnikov, Beyer. Sigmoid Loss for Language Image Pre-Training.
        2023. arXiv:2303.15343

    >>> import jax.numpy as jnp
    >>> import tripletjax as tj
    >>> d = jnp.array([[0.1, 0.9], [0.8, 0.3]])
    >>> pairs = {"reference_labels": jnp.array([0, 1])}
    >>> print(f"{tj.sigmoid_loss(d, jnp.array([0, 1]), bias=-5.0, **pairs):.4f}")
    0.1059
    """
    loss = define_sigmoid(scale, bias)
    pairs = PairOptions(reference_labels, positions, where, reference_where)
    return of_distances(loss, distances, labels, pairs, reduce_fn)
