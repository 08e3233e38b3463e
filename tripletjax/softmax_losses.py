r"""Named losses of the log-sum-exp shape, over a distance matrix.

Logits are $z = -d / \tau$. $P$ are the positives, $N$ the negatives and $A = P \cup N$
all references. The losses differ in the positives of the denominator, and in the place
of the logarithm, inside or outside of the mean over positives.

| loss | per anchor | mean over |
| --- | --- | --- |
| `supcon_loss` | lse over A, less the mean of z over P | anchors with a positive |
| `nt_xent_loss` | sum over P of softplus(lse over N, less z) | positive pairs |
| `decoupled_contrastive_loss` | sum over P of (lse over N, less z) | positive pairs |
| `nca_loss` | lse over A, less lse over P | anchors with a positive |

Negatives that are much nearer than a positive are probably positives without a label.
``false_negative_margin`` and ``false_negative_share`` ignore them, by the rule of
`tripletjax.ignore_false_negatives`.

In the terms of these losses, ``active`` counts what belongs to anchors whose nearest
reference is a positive: ``active.sum() / valid.sum()`` is their share.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from tripletjax.losses import Reduction, TripletTerms, mean_valid
from tripletjax.pair_losses import (
    AnchorPairs,
    LogSumExp,
    PairLoss,
    PairOptions,
    PairTerms,
    log_sum_exp,
    mean_of_anchors,
    mean_valid_by_side,
    of_distances,
    pair_loss,
)
from tripletjax.pairs import PairMasks, false_negative_limits

_GUARD = "false_negative_margin", "false_negative_share"


class Softmax(NamedTuple):
    """Parameters of the losses of the table.

    Attributes:
        temperature: a scalar above 0.
        margin, share: the arguments of `false_negative_limits`.
    """

    temperature: ArrayLike
    margin: ArrayLike | None = None
    share: ArrayLike | None = None

    def shape_of(self, cost: Callable[[AnchorPairs, Any], Any]) -> LogSumExp:
        """The shape of a loss with a cost, with limits if there is a guard."""
        guarded = self.margin is not None or self.share is not None
        limits = _false_negative_limits if guarded else None
        return LogSumExp(_by_temperature, cost, limits)


def _by_temperature(d: Array, parameters: Any) -> Array:
    return -d / parameters.temperature


def _false_negative_limits(
    distances: Array, exists: Array, parameters: Any
) -> tuple[Array, Array]:
    margin, share = parameters.margin, parameters.share
    low = false_negative_limits(distances, exists, margin, share)
    return low, jnp.full_like(low, jnp.inf)


def _sum_over(mask: Array, x: Array) -> Array:
    return jnp.sum(jnp.where(mask, x, 0), axis=-1)


def _positives_lse(pairs: AnchorPairs, logits: Array) -> Array:
    """Log-sum-exp of logits of the positives, 0 for anchors without one."""
    return jnp.where(pairs.has_positive, log_sum_exp(logits, pairs.exists), 0)


def _supcon_cost(pairs: AnchorPairs, parameters: Softmax) -> TripletTerms:
    valid, count = pairs.has_positive, jnp.sum(pairs.exists, axis=-1)
    z = _by_temperature(pairs.distances, parameters)
    positives = _positives_lse(pairs, z)
    mean = _sum_over(pairs.exists, z) / jnp.maximum(count, 1).astype(z.dtype)
    # The log-sum-exp of all less the mean, so that small costs do not vanish.
    costs = jax.nn.softplus(pairs.negatives - positives) + (positives - mean)
    return pairs.terms(jnp.where(valid, costs, 0), valid)


def define_supcon(
    temperature: ArrayLike,
    false_negative_margin: ArrayLike | None = None,
    false_negative_share: ArrayLike | None = None,
) -> PairLoss:
    """The shape and the parameters of `supcon_loss`."""
    parameters = Softmax(temperature, false_negative_margin, false_negative_share)
    return PairLoss(parameters.shape_of(_supcon_cost), parameters)


@pair_loss(positive=("temperature",), finite=_GUARD)
def supcon_loss(
    distances: ArrayLike,
    labels: ArrayLike | PairMasks,
    *,
    temperature: ArrayLike = 0.1,
    false_negative_margin: ArrayLike | None = None,
    false_negative_share: ArrayLike | None = None,
    reference_labels: ArrayLike | None = None,
    positions: ArrayLike | None = None,
    where: ArrayLike | None = None,
    reference_where: ArrayLike | None = None,
    reduce_fn: Reduction | None = mean_valid,
) -> Any:
    r"""Supervised contrastive loss.

    $$\ell_a = \log \sum_{i \in A_a} e^{-d_{ai} / \tau}
      + \frac{1}{|P_a|} \sum_{p \in P_a} d_{ap} / \tau$$

    Each positive is also in the denominator of the others. A batch of one class has a
    loss, as in the paper.

    Memory: O(n m), at most 6 times the size of the distances.

    Args:
        distances: ``[..., n, m]``.
        labels: integers ``[..., n]``, or `PairMasks`.
        temperature: $\tau$, a scalar above 0.
        false_negative_margin: a scalar of any sign, in units of the distances, or
            None. Negatives nearer than the anchor's nearest positive by more than the
            margin are ignored.
        false_negative_share: the same by more than a share of $|s_{ap}|$, where
            $s = 1 - d$; or None.
        reference_labels, positions, where, reference_where: as in `pair_masks`.
        reduce_fn: from the terms ``[..., n]`` to the result; None returns the
            terms.

    Returns:
        With the default `reduce_fn` the mean over anchors with a positive, ``[...]``.

    Raises:
        TypeError: if an argument has the wrong dtype or is not callable.
        ValueError: if shapes do not fit, or the temperature is not above 0.

    Requirements:
        Two items of one class. Anchors without a positive have no loss.

    Settings:
        Khosla et al. 2020: temperature 0.1 and batches of 6,144 images. They report
        that 2,048 images suffice for most purposes.

    Relations:
        It equals `nt_xent_loss` if each class has two items. `nca_loss` has the
        logarithm outside of the sum over positives.

    References:
        Khosla et al. Supervised Contrastive Learning. 2020. arXiv:2004.11362
        (equation 2)

    >>> import jax.numpy as jnp
    >>> import tripletjax as tj
    >>> d = jnp.array([[0.0, 0.1, 0.2], [0.1, 0.0, 0.2], [0.2, 0.2, 0.0]])
    >>> print(f"{tj.supcon_loss(d, jnp.array([0, 0, 1])):.4f}")
    0.3133
    """
    guard = false_negative_margin, false_negative_share
    loss = define_supcon(temperature, *guard)
    pairs = PairOptions(reference_labels, positions, where, reference_where)
    return of_distances(loss, distances, labels, pairs, reduce_fn)


def _nt_xent_cost(pairs: AnchorPairs, parameters: Softmax) -> TripletTerms:
    z = _by_temperature(pairs.distances, parameters)
    costs = jax.nn.softplus(pairs.negatives[..., None] - z)
    total = _sum_over(pairs.exists, costs)
    return pairs.terms(total, jnp.sum(pairs.exists, axis=-1))


def define_nt_xent(
    temperature: ArrayLike,
    false_negative_margin: ArrayLike | None = None,
    false_negative_share: ArrayLike | None = None,
) -> PairLoss:
    """The shape and the parameters of `nt_xent_loss`."""
    parameters = Softmax(temperature, false_negative_margin, false_negative_share)
    return PairLoss(parameters.shape_of(_nt_xent_cost), parameters)


@pair_loss(positive=("temperature",), finite=_GUARD)
def nt_xent_loss(
    distances: ArrayLike,
    labels: ArrayLike | PairMasks,
    *,
    temperature: ArrayLike = 0.1,
    false_negative_margin: ArrayLike | None = None,
    false_negative_share: ArrayLike | None = None,
    reference_labels: ArrayLike | None = None,
    positions: ArrayLike | None = None,
    where: ArrayLike | None = None,
    reference_where: ArrayLike | None = None,
    reduce_fn: Reduction | None = mean_valid,
) -> Any:
    r"""Normalised temperature-scaled cross entropy of each positive pair.

    $$\ell_a = \sum_{p \in P_a} \log \Bigl(1 +
      \sum_{n \in N_a} e^{(d_{ap} - d_{an}) / \tau}\Bigr)$$

    The denominator of a pair has its own positive and all negatives. InfoNCE and
    SINCERE are other names.

    Memory: O(n m), at most 6 times the size of the distances.

    Args:
        distances: ``[..., n, m]``.
        labels: integers ``[..., n]``, or `PairMasks`.
        temperature: $\tau$, a scalar above 0.
        false_negative_margin: a scalar of any sign, in units of the distances, or
            None. Negatives nearer than the anchor's nearest positive by more than the
            margin are ignored.
        false_negative_share: the same by more than a share of $|s_{ap}|$, where
            $s = 1 - d$; or None.
        reference_labels, positions, where, reference_where: as in `pair_masks`.
        reduce_fn: from the terms ``[..., n]`` to the result; None returns the
            terms.

    Returns:
        With the default `reduce_fn` the mean over positive pairs, ``[...]``.

    Raises:
        TypeError: if an argument has the wrong dtype or is not callable.
        ValueError: if shapes do not fit, or the temperature is not above 0.

    Requirements:
        Two classes, and two items, or views, of one of them. Without a negative the
        loss is 0.

    Settings:
        Chen et al. 2020 and their code: temperature 0.1 and batches of 4,096 images
        with two views. LARS has a learning rate of 0.3 for each 256 images of the
        batch.

    Relations:
        It equals `supcon_loss` if each class has two items. With references it equals
        `info_nce_loss` of one direction.

    References:
        Chen, Kornblith, Norouzi, Hinton. A Simple Framework for Contrastive Learning of
        Visual Representations. 2020. arXiv:2002.05709

        Feeney, Hughes. SINCERE: Supervised Information Noise-Contrastive Estimation
        REvisited. 2023. arXiv:2309.14277

    >>> import jax.numpy as jnp
    >>> import tripletjax as tj
    >>> d = jnp.array([[0.0, 0.1, 0.2], [0.1, 0.0, 0.2], [0.2, 0.2, 0.0]])
    >>> print(f"{tj.nt_xent_loss(d, jnp.array([0, 0, 1])):.4f}")
    0.3133
    """
    guard = false_negative_margin, false_negative_share
    loss = define_nt_xent(temperature, *guard)
    pairs = PairOptions(reference_labels, positions, where, reference_where)
    return of_distances(loss, distances, labels, pairs, reduce_fn)


def _decoupled_cost(pairs: AnchorPairs, parameters: Softmax) -> TripletTerms:
    z = _by_temperature(pairs.distances, parameters)
    exists = pairs.exists & (pairs.negatives != -jnp.inf)[..., None]
    negatives = jnp.where(pairs.negatives == -jnp.inf, 0, pairs.negatives)
    total = _sum_over(exists, negatives[..., None] - z)
    return pairs.terms(total, jnp.sum(exists, axis=-1))


def define_decoupled_contrastive(
    temperature: ArrayLike,
    false_negative_margin: ArrayLike | None = None,
    false_negative_share: ArrayLike | None = None,
) -> PairLoss:
    """The shape and the parameters of `decoupled_contrastive_loss`."""
    parameters = Softmax(temperature, false_negative_margin, false_negative_share)
    return PairLoss(parameters.shape_of(_decoupled_cost), parameters)


@pair_loss(positive=("temperature",), finite=_GUARD)
def decoupled_contrastive_loss(
    distances: ArrayLike,
    labels: ArrayLike | PairMasks,
    *,
    temperature: ArrayLike = 0.1,
    false_negative_margin: ArrayLike | None = None,
    false_negative_share: ArrayLike | None = None,
    reference_labels: ArrayLike | None = None,
    positions: ArrayLike | None = None,
    where: ArrayLike | None = None,
    reference_where: ArrayLike | None = None,
    reduce_fn: Reduction | None = mean_valid,
) -> Any:
    r"""Decoupled contrastive loss, whose denominator has negatives alone.

    $$\ell_a = \sum_{p \in P_a} \Bigl(d_{ap} / \tau +
      \log \sum_{n \in N_a} e^{-d_{an} / \tau}\Bigr)$$

    The loss can be negative.

    Memory: O(n m), at most 6 times the size of the distances.

    Args:
        distances: ``[..., n, m]``.
        labels: integers ``[..., n]``, or `PairMasks`.
        temperature: $\tau$, a scalar above 0.
        false_negative_margin: a scalar of any sign, in units of the distances, or
            None. Negatives nearer than the anchor's nearest positive by more than the
            margin are ignored.
        false_negative_share: the same by more than a share of $|s_{ap}|$, where
            $s = 1 - d$; or None.
        reference_labels, positions, where, reference_where: as in `pair_masks`.
        reduce_fn: from the terms ``[..., n]`` to the result; None returns the
            terms.

    Returns:
        With the default `reduce_fn` the mean over positive pairs of anchors with a
        negative, ``[...]``.

    Raises:
        TypeError: if an argument has the wrong dtype or is not callable.
        ValueError: if shapes do not fit, or the temperature is not above 0.

    Requirements:
        Two classes, and two items of one of them. An anchor without a negative has no
        loss.

    Settings:
        Yeh et al. 2021: batches of 256 images with two views. The default temperature
        is that of `nt_xent_loss`.

    Relations:
        It is `nt_xent_loss` without the positive in the denominator. Both have nearly
        the same value where the loss is large.

    References:
        Yeh et al. Decoupled Contrastive Learning. 2021. arXiv:2110.06848

    >>> import jax.numpy as jnp
    >>> import tripletjax as tj
    >>> d = jnp.array([[0.0, 0.1, 0.2], [0.1, 0.0, 0.2], [0.2, 0.2, 0.0]])
    >>> print(f"{tj.decoupled_contrastive_loss(d, jnp.array([0, 0, 1])):.4f}")
    -1.0000
    """
    guard = false_negative_margin, false_negative_share
    loss = define_decoupled_contrastive(temperature, *guard)
    pairs = PairOptions(reference_labels, positions, where, reference_where)
    return of_distances(loss, distances, labels, pairs, reduce_fn)


def _nca_cost(pairs: AnchorPairs, parameters: Softmax) -> TripletTerms:
    valid = pairs.has_positive
    z = _by_temperature(pairs.distances, parameters)
    costs = jax.nn.softplus(pairs.negatives - _positives_lse(pairs, z))
    return pairs.terms(jnp.where(valid, costs, 0), valid)


def define_nca(
    temperature: ArrayLike,
    false_negative_margin: ArrayLike | None = None,
    false_negative_share: ArrayLike | None = None,
) -> PairLoss:
    """The shape and the parameters of `nca_loss`."""
    parameters = Softmax(temperature, false_negative_margin, false_negative_share)
    return PairLoss(parameters.shape_of(_nca_cost), parameters)


@pair_loss(positive=("temperature",), finite=_GUARD)
def nca_loss(
    distances: ArrayLike,
    labels: ArrayLike | PairMasks,
    *,
    temperature: ArrayLike = 0.1,
    false_negative_margin: ArrayLike | None = None,
    false_negative_share: ArrayLike | None = None,
    reference_labels: ArrayLike | None = None,
    positions: ArrayLike | None = None,
    where: ArrayLike | None = None,
    reference_where: ArrayLike | None = None,
    reduce_fn: Reduction | None = mean_valid,
) -> Any:
    r"""Neighbourhood components analysis: the probability of any positive.

    $$\ell_a = -\log \frac{\sum_{p \in P_a} e^{-d_{ap} / \tau}}
      {\sum_{i \in A_a} e^{-d_{ai} / \tau}}$$

    Memory: O(n m), at most 6 times the size of the distances.

    Args:
        distances: ``[..., n, m]``.
        labels: integers ``[..., n]``, or `PairMasks`.
        temperature: $\tau$, a scalar above 0.
        false_negative_margin: a scalar of any sign, in units of the distances, or
            None. Negatives nearer than the anchor's nearest positive by more than the
            margin are ignored.
        false_negative_share: the same by more than a share of $|s_{ap}|$, where
            $s = 1 - d$; or None.
        reference_labels, positions, where, reference_where: as in `pair_masks`.
        reduce_fn: from the terms ``[..., n]`` to the result; None returns the
            terms.

    Returns:
        With the default `reduce_fn` the mean over anchors with a positive, ``[...]``.

    Raises:
        TypeError: if an argument has the wrong dtype or is not callable.
        ValueError: if shapes do not fit, or the temperature is not above 0.

    Requirements:
        Two classes, and two items of one of them. Without a negative the loss is 0.

    Settings:
        Goldberger et al. 2004: squared Euclidean distances without a temperature, which
        is ``temperature=1``. The default of 0.1 is for cosine distances.

    Relations:
        It is `supcon_loss` with the logarithm outside of the sum over positives. Both
        are equal if each class has two items.

    References:
        Goldberger, Roweis, Hinton, Salakhutdinov. Neighbourhood Components Analysis.
        NIPS 2004.

    >>> import jax.numpy as jnp
    >>> import tripletjax as tj
    >>> d = jnp.array([[0.0, 0.1, 0.2], [0.1, 0.0, 0.2], [0.2, 0.2, 0.0]])
    >>> print(f"{tj.nca_loss(d, jnp.array([0, 0, 1])):.4f}")
    0.3133
    """
    guard = false_negative_margin, false_negative_share
    loss = define_nca(temperature, *guard)
    pairs = PairOptions(reference_labels, positions, where, reference_where)
    return of_distances(loss, distances, labels, pairs, reduce_fn)


def define_info_nce(
    temperature: ArrayLike,
    symmetric: bool,
    false_negative_margin: ArrayLike | None = None,
    false_negative_share: ArrayLike | None = None,
) -> PairLoss:
    """The shape and the parameters of `info_nce_loss`."""
    parameters = Softmax(temperature, false_negative_margin, false_negative_share)
    reason = "anchors and references are two sides"
    return PairLoss(parameters.shape_of(_nt_xent_cost), parameters, reason, symmetric)


@pair_loss(
    positive=("temperature",), finite=_GUARD, flags=("symmetric",), by_anchor=False
)
def info_nce_loss(
    distances: ArrayLike,
    labels: ArrayLike | PairMasks,
    *,
    temperature: ArrayLike = 0.05,
    symmetric: bool = False,
    false_negative_margin: ArrayLike | None = None,
    false_negative_share: ArrayLike | None = None,
    reference_labels: ArrayLike | None = None,
    positions: ArrayLike | None = None,
    where: ArrayLike | None = None,
    reference_where: ArrayLike | None = None,
    reduce_fn: Reduction | None = mean_valid,
) -> Any:
    r"""InfoNCE of two sides, such as questions and answers or images and captions.

    $$\ell_a = \sum_{p \in P_a} \log \Bigl(1 +
      \sum_{n \in N_a} e^{(d_{ap} - d_{an}) / \tau}\Bigr)$$

    Anchors and references are the two sides; equal labels are a pair. References of
    labels that no anchor has are additional hard negatives. Duplicates share a label,
    and are never negatives of each other.

    Memory: O(n m), at most 6 times the size of the distances.

    Args:
        distances: ``[..., n, m]``.
        labels: integers ``[..., n]``, or `PairMasks`.
        temperature: $\tau$, a scalar above 0.
        symmetric: if True, references are anchors as well, as in CLIP. The terms of the
            references ``[..., m]`` follow those of the anchors.
        false_negative_margin: a scalar of any sign, in units of the distances, or
            None. Negatives nearer than the anchor's nearest positive by more than the
            margin are ignored.
        false_negative_share: the same by more than a share of $|s_{ap}|$, where
            $s = 1 - d$; or None.
        reference_labels, positions, where, reference_where: as in `pair_masks`.
        reduce_fn: from the terms ``[..., n]`` to the result; None returns the
            terms.

    Returns:
        With the default `reduce_fn` the mean over positive pairs, ``[...]``. If
        symmetric, the mean of both directions.

    Raises:
        TypeError: if an argument has the wrong dtype or is not callable.
        ValueError: if shapes do not fit, reference_labels are missing, or the
            temperature is not above 0.

    Requirements:
        Labels of both sides, or `PairMasks`. The references of other labels are the
        negatives of an anchor.

    Settings:
        sentence-transformers' ``MultipleNegativesRankingLoss``: scale 20, which is the
        default temperature. Radford et al. 2021: batches of 32,768, and a temperature
        that is learned from 0.07, with 1 / temperature at most 100.

    Relations:
        It is `nt_xent_loss` with references, and with `symmetric` the loss of CLIP.
        `sigmoid_loss` treats each pair on its own.

    References:
        van den Oord, Li, Vinyals. Representation Learning with Contrastive Predictive
        Coding. 2018. arXiv:1807.03748

        Radford et al. Learning Transferable Visual Models From Natural Language
        Supervision. 2021. arXiv:2103.00020

    >>> import jax.numpy as jnp
    >>> import tripletjax as tj
    >>> d = jnp.array([[0.1, 0.2], [0.3, 0.1]])
    >>> pairs = {"reference_labels": jnp.array([0, 1])}
    >>> print(f"{tj.info_nce_loss(d, jnp.array([0, 1]), temperature=0.1, **pairs):.4f}")
    0.2201
    """
    guard = false_negative_margin, false_negative_share
    loss = define_info_nce(temperature, symmetric, *guard)
    pairs = PairOptions(reference_labels, positions, where, reference_where)
    return of_distances(loss, distances, labels, pairs, reduce_fn)


def _multi_similarity_logit(d: Array, parameters: tuple) -> Array:
    _, beta, base = parameters[:3]
    return beta * (1 - d - base)


def _multi_similarity_cost(pairs: AnchorPairs, parameters: tuple) -> PairTerms:
    alpha, beta, base, *mining = parameters
    exists = pairs.exists
    if mining:
        # A NaN stays, for the loss to show it.
        exists &= ~(pairs.distances <= (pairs.nearest - mining[0])[..., None])
    logits = alpha * (pairs.distances - (1 - base))
    positives = jax.nn.softplus(log_sum_exp(logits, exists)) / alpha
    negatives = jax.nn.softplus(pairs.negatives) / beta
    return PairTerms(
        pairs.terms(positives, pairs.has_positive),
        pairs.terms(negatives, pairs.has_negative),
        (pairs.has_positive | pairs.has_negative).astype(positives.dtype),
    )


def _multi_similarity_limits(
    distances: Array, exists: Array, parameters: tuple
) -> tuple[Array, Array]:
    farthest = jnp.max(jnp.where(exists, distances, -jnp.inf), axis=-1)
    return jnp.full_like(farthest, -jnp.inf), farthest + parameters[3]


_MULTI_SIMILARITY = LogSumExp(_multi_similarity_logit, _multi_similarity_cost)
_MINED_MULTI_SIMILARITY = LogSumExp(
    _multi_similarity_logit, _multi_similarity_cost, _multi_similarity_limits
)


def define_multi_similarity(
    alpha: ArrayLike, beta: ArrayLike, base: ArrayLike, epsilon: ArrayLike | None
) -> PairLoss:
    """The shape and the parameters of `multi_similarity_loss`."""
    parameters = alpha, beta, base
    if epsilon is None:
        return PairLoss(_MULTI_SIMILARITY, parameters)
    return PairLoss(_MINED_MULTI_SIMILARITY, (*parameters, epsilon))


@pair_loss(positive=("alpha", "beta"), finite=("base", "epsilon"))
def multi_similarity_loss(
    distances: ArrayLike,
    labels: ArrayLike | PairMasks,
    *,
    alpha: ArrayLike = 2.0,
    beta: ArrayLike = 50.0,
    base: ArrayLike = 0.5,
    epsilon: ArrayLike | None = None,
    reference_labels: ArrayLike | None = None,
    positions: ArrayLike | None = None,
    where: ArrayLike | None = None,
    reference_where: ArrayLike | None = None,
    reduce_fn: Reduction | None = mean_of_anchors,
) -> Any:
    r"""Multi-similarity loss, of similarities $s = 1 - d$.

    $$\ell_a = \frac1\alpha \log \Bigl(1 + \sum_{p \in P_a}
      e^{-\alpha (s_{ap} - \lambda)}\Bigr) + \frac1\beta \log \Bigl(1 +
      \sum_{n \in N_a} e^{\beta (s_{an} - \lambda)}\Bigr)$$

    Memory: O(n m), at most 6 times the size of the distances.

    Args:
        distances: ``[..., n, m]``.
        labels: integers ``[..., n]``, or `PairMasks`.
        alpha, beta: scalars above 0.
        base: $\lambda$, a scalar.
        epsilon: the margin of the paper's mining. Only negatives with
            $s_{an} + \epsilon > \min_p s_{ap}$ and positives with
            $s_{ap} - \epsilon < \max_n s_{an}$ count. None takes all pairs.
        reference_labels, positions, where, reference_where: as in `pair_masks`.
        reduce_fn: from the terms ``[..., n]`` to the result; None returns the
            terms.

    Returns:
        With the default `reduce_fn` the mean over anchors, ``[...]``.

    Raises:
        TypeError: if an argument has the wrong dtype or is not callable.
        ValueError: if shapes do not fit, or alpha or beta is not above 0.

    Requirements:
        Cosine distances, two classes, and two items of one of them. Anchors without a
        positive have the part of the negatives alone.

    Settings:
        The code of Wang et al. 2019: alpha 2, beta 40, base 0.5, epsilon 0.1, 80 images
        with 5 of each class. The default beta is that of pytorch-metric-learning.

    Relations:
        For large alpha and beta, the parts near hinges of the farthest positive and of
        the nearest negative, as in `contrastive_loss`.

    References:
        Wang, Han, Huang, Dong, Scott. Multi-Similarity Loss with General Pair Weighting
        for Deep Metric Learning. 2019. arXiv:1904.06627

    >>> import jax.numpy as jnp
    >>> import tripletjax as tj
    >>> d = jnp.array([[0.0, 0.1, 0.6], [0.1, 0.0, 0.6], [0.6, 0.6, 0.0]])
    >>> print(f"{tj.multi_similarity_loss(d, jnp.array([0, 0, 1])):.4f}")
    0.1239
    """
    loss = define_multi_similarity(alpha, beta, base, epsilon)
    pairs = PairOptions(reference_labels, positions, where, reference_where)
    return of_distances(loss, distances, labels, pairs, reduce_fn)


def _circle_logit(d: Array, parameters: tuple) -> Array:
    margin, scale = parameters
    weight = lax.stop_gradient(jax.nn.relu(1 - d + margin))
    return scale * weight * (1 - d - margin)


def _of_both(
    pairs: AnchorPairs, function: Callable[[Array], Array], logits: Array
) -> TripletTerms:
    """The terms of a function of lse over P plus lse over N, where both exist."""
    valid = pairs.has_positive & (pairs.negatives != -jnp.inf)
    total = _positives_lse(pairs, logits) + jnp.where(valid, pairs.negatives, 0)
    return pairs.terms(jnp.where(valid, function(total), 0), valid)


def _circle_cost(pairs: AnchorPairs, parameters: tuple) -> TripletTerms:
    margin, scale = parameters
    weight = lax.stop_gradient(jax.nn.relu(margin + pairs.distances))
    logits = scale * weight * (pairs.distances - margin)
    return _of_both(pairs, jax.nn.softplus, logits)


def define_circle(margin: ArrayLike, scale: ArrayLike) -> PairLoss:
    """The shape and the parameters of `circle_loss`."""
    return PairLoss(LogSumExp(_circle_logit, _circle_cost), (margin, scale))


@pair_loss(positive=("scale",), finite=("margin",))
def circle_loss(
    distances: ArrayLike,
    labels: ArrayLike | PairMasks,
    *,
    margin: ArrayLike = 0.4,
    scale: ArrayLike = 80.0,
    reference_labels: ArrayLike | None = None,
    positions: ArrayLike | None = None,
    where: ArrayLike | None = None,
    reference_where: ArrayLike | None = None,
    reduce_fn: Reduction | None = mean_valid,
) -> Any:
    r"""Circle loss, of similarities $s = 1 - d$.

    $$\ell_a = \log \Bigl(1 + \sum_{n \in N_a} e^{\gamma [s_{an} + m]_+ (s_{an} - m)}
      \sum_{p \in P_a} e^{-\gamma [1 + m - s_{ap}]_+ (s_{ap} - 1 + m)}\Bigr)$$

    The weights $[\cdot]_+$ have no gradient.

    Memory: O(n m), at most 6 times the size of the distances.

    Args:
        distances: ``[..., n, m]``.
        labels: integers ``[..., n]``, or `PairMasks`.
        margin: m, a scalar.
        scale: $\gamma$, a scalar above 0.
        reference_labels, positions, where, reference_where: as in `pair_masks`.
        reduce_fn: from the terms ``[..., n]`` to the result; None returns the
            terms.

    Returns:
        With the default `reduce_fn` the mean over anchors with a positive and a
        negative, ``[...]``.

    Raises:
        TypeError: if an argument has the wrong dtype or is not callable.
        ValueError: if shapes do not fit, or the scale is not above 0.

    Requirements:
        Cosine distances, two classes, and two items of one of them.

    Settings:
        Sun et al. 2020, fine-grained retrieval: margin 0.4, scale 80, 16 classes of 5
        images. Faces: margin 0.25, scale 256. Re-identification: margin 0.25, scale
        128.

    Relations:
        Without its weights it is a soft form of `batch_hard_loss`, as is
        `generalized_lifted_structure_loss`.

    References:
        Sun et al. Circle Loss: A Unified Perspective of Pair Similarity Optimization.
        2020. arXiv:2002.10857

    >>> import jax.numpy as jnp
    >>> import tripletjax as tj
    >>> d = jnp.array([[0.0, 0.1, 0.6], [0.1, 0.0, 0.6], [0.6, 0.6, 0.0]])
    >>> print(f"{tj.circle_loss(d, jnp.array([0, 0, 1]), scale=2.0):.4f}")
    0.5544
    """
    loss = define_circle(margin, scale)
    pairs = PairOptions(reference_labels, positions, where, reference_where)
    return of_distances(loss, distances, labels, pairs, reduce_fn)


def _lifted_logit(d: Array, parameters: tuple) -> Array:
    (margin,) = parameters
    return margin - d


def _lifted_cost(pairs: AnchorPairs, parameters: tuple) -> TripletTerms:
    return _of_both(pairs, jax.nn.relu, pairs.distances)


def define_generalized_lifted_structure(margin: ArrayLike) -> PairLoss:
    """The shape and the parameters of `generalized_lifted_structure_loss`."""
    return PairLoss(LogSumExp(_lifted_logit, _lifted_cost), (margin,))


@pair_loss(finite=("margin",))
def generalized_lifted_structure_loss(
    distances: ArrayLike,
    labels: ArrayLike | PairMasks,
    *,
    margin: ArrayLike = 1.0,
    reference_labels: ArrayLike | None = None,
    positions: ArrayLike | None = None,
    where: ArrayLike | None = None,
    reference_where: ArrayLike | None = None,
    reduce_fn: Reduction | None = mean_valid,
) -> Any:
    r"""Lifted structure loss, generalised to all positives of an anchor.

    $$\ell_a = \Bigl[\log \sum_{p \in P_a} e^{d_{ap}} +
      \log \sum_{n \in N_a} e^{m - d_{an}}\Bigr]_+$$

    Memory: O(n m), at most 6 times the size of the distances.

    Args:
        distances: ``[..., n, m]``.
        labels: integers ``[..., n]``, or `PairMasks`.
        margin: m, a scalar, in units of the distances.
        reference_labels, positions, where, reference_where: as in `pair_masks`.
        reduce_fn: from the terms ``[..., n]`` to the result; None returns the
            terms.

    Returns:
        With the default `reduce_fn` the mean over anchors with a positive and a
        negative, ``[...]``.

    Raises:
        TypeError: if an argument has the wrong dtype or is not callable.
        ValueError: if shapes do not fit.

    Requirements:
        Two classes, and two items of one of them.

    Settings:
        Hermans et al. 2017: Euclidean distances without unit norm. Margins from 0.1 to
        1 differed by at most 0.5 points of MAP.

    Relations:
        It is `batch_hard_loss` with a soft maximum over positives and a soft minimum
        over negatives.

    References:
        Hermans, Beyer, Leibe. In Defense of the Triplet Loss for Person
        Re-Identification. 2017. arXiv:1703.07737

    >>> import jax.numpy as jnp
    >>> import tripletjax as tj
    >>> d = jnp.array([[0.0, 0.5, 1.0], [0.5, 0.0, 1.0], [1.0, 1.0, 0.0]])
    >>> print(tj.generalized_lifted_structure_loss(d, jnp.array([0, 0, 1])))
    0.5
    """
    loss = define_generalized_lifted_structure(margin)
    pairs = PairOptions(reference_labels, positions, where, reference_where)
    return of_distances(loss, distances, labels, pairs, reduce_fn)


def _scaled_logit(d: Array, parameters: tuple) -> Array:
    _, scale = parameters
    return scale * (1 - d)


def _class_cost(pairs: AnchorPairs, logits: Array) -> TripletTerms:
    """Cross entropy of the nearest class vector of an anchor's class."""
    valid = pairs.has_positive
    costs = jax.nn.softplus(pairs.negatives - jnp.where(valid, logits, 0))
    return pairs.terms(jnp.where(valid, costs, 0), valid)


def _class_distance(pairs: AnchorPairs) -> Array:
    """Distance of the nearest class vector of an anchor's class, 0 without one."""
    nearest = jnp.argmin(jnp.where(pairs.exists, pairs.distances, jnp.inf), axis=-1)
    return jnp.take_along_axis(
        pairs.distances, nearest[..., None], axis=-1, mode="promise_in_bounds"
    )[..., 0]


def _cosface_cost(pairs: AnchorPairs, parameters: tuple) -> TripletTerms:
    margin, scale = parameters
    return _class_cost(pairs, scale * (1 - _class_distance(pairs) - margin))


_CLASS_VECTORS = "references are class vectors, with the labels of their classes"


def define_cosface(margin: ArrayLike, scale: ArrayLike) -> PairLoss:
    """The shape and the parameters of `cosface_loss`."""
    parameters = margin, scale
    return PairLoss(LogSumExp(_scaled_logit, _cosface_cost), parameters, _CLASS_VECTORS)


@pair_loss(positive=("scale",), finite=("margin",))
def cosface_loss(
    distances: ArrayLike,
    labels: ArrayLike | PairMasks,
    *,
    margin: ArrayLike = 0.35,
    scale: ArrayLike = 64.0,
    reference_labels: ArrayLike | None = None,
    positions: ArrayLike | None = None,
    where: ArrayLike | None = None,
    reference_where: ArrayLike | None = None,
    reduce_fn: Reduction | None = mean_valid,
) -> Any:
    r"""CosFace: softmax over class vectors, with a margin on the similarity.

    $$\ell_a = -\log \frac{e^{\gamma (s_{ap} - m)}}
      {e^{\gamma (s_{ap} - m)} + \sum_{n \in N_a} e^{\gamma s_{an}}}, \quad s = 1 - d$$

    References are learned class vectors. Several references of one label are
    sub-centres, of which the nearest is the positive.

    Memory: O(n m), at most 6 times the size of the distances.

    Args:
        distances: ``[..., n, m]``.
        labels: integers ``[..., n]``, or `PairMasks`.
        margin: m, a scalar.
        scale: $\gamma$, a scalar above 0.
        reference_labels, positions, where, reference_where: as in `pair_masks`.
        reduce_fn: from the terms ``[..., n]`` to the result; None returns the
            terms.

    Returns:
        With the default `reduce_fn` the mean over anchors, ``[...]``.

    Raises:
        TypeError: if an argument has the wrong dtype or is not callable.
        ValueError: if shapes do not fit, reference_labels are missing, or the scale is
            not above 0.

    Requirements:
        Cosine distances to class vectors, and `reference_labels` with their classes.
        One item of a class suffices.

    Settings:
        Wang et al. 2018: margin 0.35, scale 64, batches of 512 images, SGD with a
        learning rate of 0.1, or 0.05 for large data.

    Relations:
        With margin 0 and one vector for each class, it equals `info_nce_loss` with
        temperature 1 / scale. `arcface_loss` has its margin on the angle.

    References:
        Wang et al. CosFace: Large Margin Cosine Loss for Deep Face Recognition. 2018.
        arXiv:1801.09414

    >>> import jax.numpy as jnp
    >>> import tripletjax as tj
    >>> d = jnp.array([[0.1, 0.9], [0.8, 0.3]])
    >>> classes = {"reference_labels": jnp.array([0, 1])}
    >>> print(f"{tj.cosface_loss(d, jnp.array([0, 1]), scale=4.0, **classes):.4f}")
    0.2952
    """
    loss = define_cosface(margin, scale)
    pairs = PairOptions(reference_labels, positions, where, reference_where)
    return of_distances(loss, distances, labels, pairs, reduce_fn)


def _arcface_cost(pairs: AnchorPairs, parameters: tuple) -> TripletTerms:
    margin, scale = parameters
    d = _class_distance(pairs)
    # Small distances have digits that 1 - s has not.
    s, square = 1 - d, d * (2 - d)
    inside = square > 0
    sine = jnp.where(inside, jnp.sqrt(jnp.where(inside, square, 1)), 0)
    rotated = s * jnp.cos(margin) - sine * jnp.sin(margin)
    continued = s - margin * jnp.sin(margin)
    cosines = jnp.where(s > -jnp.cos(margin), rotated, continued)
    return _class_cost(pairs, scale * cosines)


def define_arcface(margin: ArrayLike, scale: ArrayLike) -> PairLoss:
    """The shape and the parameters of `arcface_loss`."""
    parameters = margin, scale
    return PairLoss(LogSumExp(_scaled_logit, _arcface_cost), parameters, _CLASS_VECTORS)


@pair_loss(positive=("scale",), nonnegative=("margin",))
def arcface_loss(
    distances: ArrayLike,
    labels: ArrayLike | PairMasks,
    *,
    margin: ArrayLike = 0.5,
    scale: ArrayLike = 64.0,
    reference_labels: ArrayLike | None = None,
    positions: ArrayLike | None = None,
    where: ArrayLike | None = None,
    reference_where: ArrayLike | None = None,
    reduce_fn: Reduction | None = mean_valid,
) -> Any:
    r"""ArcFace: softmax over class vectors, with a margin on the angle.

    $$\ell_a = -\log \frac{e^{\gamma \cos(\theta_{ap} + m)}}
      {e^{\gamma \cos(\theta_{ap} + m)} + \sum_{n \in N_a} e^{\gamma s_{an}}}, \quad
      \cos \theta = s = 1 - d$$

    $\cos(\theta + m)$ is $s \cos m - \sqrt{1 - s^2} \sin m$, without an inverse cosine,
    so that gradients are finite everywhere. Beyond $\theta = \pi - m$ it continues as
    $s - m \sin m$. References are class vectors, as in `cosface_loss`.

    Memory: O(n m), at most 6 times the size of the distances.

    Args:
        distances: ``[..., n, m]``.
        labels: integers ``[..., n]``, or `PairMasks`.
        margin: m in radians, a scalar of at least 0.
        scale: $\gamma$, a scalar above 0.
        reference_labels, positions, where, reference_where: as in `pair_masks`.
        reduce_fn: from the terms ``[..., n]`` to the result; None returns the
            terms.

    Returns:
        With the default `reduce_fn` the mean over anchors, ``[...]``.

    Raises:
        TypeError: if an argument has the wrong dtype or is not callable.
        ValueError: if shapes do not fit, reference_labels are missing, the margin is
            negative, or the scale is not above 0.

    Requirements:
        Cosine distances to class vectors, and `reference_labels` with their classes.
        One item of a class suffices.

    Settings:
        Deng et al. 2018: margin 0.5, scale 64, batches of 512 images, SGD with a
        learning rate of 0.1.

    Relations:
        With margin 0 it equals `cosface_loss` with margin 0.

    References:
        Deng, Guo, Xue, Zafeiriou. ArcFace: Additive Angular Margin Loss for Deep Face
        Recognition. 2018. arXiv:1801.07698

    >>> import jax.numpy as jnp
    >>> import tripletjax as tj
    >>> d = jnp.array([[0.1, 0.9], [0.8, 0.3]])
    >>> classes = {"reference_labels": jnp.array([0, 1])}
    >>> print(f"{tj.arcface_loss(d, jnp.array([0, 1]), scale=4.0, **classes):.4f}")
    0.3480
    """
    loss = define_arcface(margin, scale)
    pairs = PairOptions(reference_labels, positions, where, reference_where)
    return of_distances(loss, distances, labels, pairs, reduce_fn)


def _proxy_anchor_logit(d: Array, parameters: tuple) -> Array:
    margin, scale = parameters
    return scale * (1 - d + margin)


def _proxy_anchor_cost(pairs: AnchorPairs, parameters: tuple) -> PairTerms:
    margin, scale = parameters
    logits = -scale * (1 - pairs.distances - margin)
    positives = jax.nn.softplus(log_sum_exp(logits, pairs.exists))
    negatives = jax.nn.softplus(pairs.negatives)
    proxies = pairs.has_positive | pairs.has_negative
    return PairTerms(
        pairs.terms(positives, pairs.has_positive),
        pairs.terms(negatives, proxies),
        proxies.astype(positives.dtype),
    )


def define_proxy_anchor(margin: ArrayLike, scale: ArrayLike) -> PairLoss:
    """The shape and the parameters of `proxy_anchor_loss`."""
    parameters, shape = (
        (margin, scale),
        LogSumExp(_proxy_anchor_logit, _proxy_anchor_cost),
    )
    return PairLoss(shape, parameters, _CLASS_VECTORS, swapped=True)


@pair_loss(positive=("scale",), finite=("margin",), by_anchor=False)
def proxy_anchor_loss(
    distances: ArrayLike,
    labels: ArrayLike | PairMasks,
    *,
    margin: ArrayLike = 0.1,
    scale: ArrayLike = 32.0,
    reference_labels: ArrayLike | None = None,
    positions: ArrayLike | None = None,
    where: ArrayLike | None = None,
    reference_where: ArrayLike | None = None,
    reduce_fn: Reduction | None = mean_valid_by_side,
) -> Any:
    r"""Proxy-anchor loss: class vectors are the anchors, embeddings their references.

    $$\frac{1}{|C^+|} \sum_{c \in C^+} \log \Bigl(1 + \sum_{i \in P_c}
      e^{-\gamma (s_{ic} - m)}\Bigr) + \frac{1}{|C|} \sum_{c \in C} \log \Bigl(1 +
      \sum_{i \in N_c} e^{\gamma (s_{ic} + m)}\Bigr), \quad s = 1 - d$$

    $C$ are the class vectors, given as references, and $C^+$ those with a positive.
    Terms are per class vector, ``[..., m]``.

    Memory: O(n m), at most 6 times the size of the distances.

    Args:
        distances: ``[..., n, m]``.
        labels: integers ``[..., n]``, or `PairMasks`.
        margin: m, a scalar.
        scale: $\gamma$, a scalar above 0.
        reference_labels, positions, where, reference_where: as in `pair_masks`.
        reduce_fn: from the terms ``[..., n]`` to the result; None returns the
            terms.

    Returns:
        With the default `reduce_fn` the sum of both means, ``[...]``.

    Raises:
        TypeError: if an argument has the wrong dtype or is not callable.
        ValueError: if shapes do not fit, reference_labels are missing, or the scale is
            not above 0.

    Requirements:
        Cosine distances to class vectors, and `reference_labels` with their classes.
        One item of a class suffices.

    Settings:
        Kim et al. 2020 and their code: margin 0.1, scale 32, batches of 180 images,
        AdamW with a learning rate of 1e-4. Class vectors have 100 times this learning
        rate.

    Relations:
        It is near `multi_similarity_loss` with class vectors as the anchors.

    References:
        Kim, Kim, Cho, Kwak. Proxy Anchor Loss for Deep Metric Learning. 2020.
        arXiv:2003.13911

    >>> import jax.numpy as jnp
    >>> import tripletjax as tj
    >>> d = jnp.array([[0.1, 0.9], [0.8, 0.3]])
    >>> classes = {"reference_labels": jnp.array([0, 1])}
    >>> print(f"{tj.proxy_anchor_loss(d, jnp.array([0, 1]), scale=4.0, **classes):.4f}")
    1.3806
    """
    loss = define_proxy_anchor(margin, scale)
    pairs = PairOptions(reference_labels, positions, where, reference_where)
    return of_distances(loss, distances, labels, pairs, reduce_fn)
