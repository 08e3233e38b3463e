r"""SmoothAP: average precision with ranks that have gradients.

An item's rank among the references is 1 plus the number of nearer ones. A sigmoid of
the difference of two distances counts them:

    rank of i = 1 + sum_j sigma((d_i - d_j) / temperature)

Positives are few, so that ranks take O(n K) memory for K positives of each anchor. The
negatives ahead of a positive are a sum over one row of the matrix, for each positive.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from tripletjax._api import own_promotion
from tripletjax.losses import Reduction, TripletTerms, mean_valid
from tripletjax.pair_losses import (
    AnchorPairs,
    PairLoss,
    PairOptions,
    Parameters,
    of_distances,
    pair_loss,
)
from tripletjax.pairs import PairMasks


@dataclasses.dataclass(frozen=True)
class SmoothAP:
    """The shape of `smooth_ap_loss`; static.

    Attributes:
        include_anchor: whether an anchor is a positive of itself, at distance 0.
    """

    include_anchor: bool

    def terms(self, distances: Array, masks: PairMasks, parameters: Parameters) -> Any:
        """The terms ``[..., n]`` of a distance matrix ``[..., n, m]``."""
        (temperature,) = parameters
        positive, negative = masks
        d = jnp.where(positive | negative, distances, 0)
        costs = _costs_of_rows(self.include_anchor, d, positive, negative, temperature)
        nearest = jnp.min(jnp.where(negative, d, jnp.inf), axis=-1)
        return self.terms_of_costs(costs, d, positive, lax.stop_gradient(nearest))

    def terms_of_costs(
        self, costs: Array, distances: Array, exists: Array, nearest: Array
    ) -> TripletTerms:
        """The terms of costs ``[..., n]`` and of positives ``[..., n, k]``."""
        nowhere = jnp.full_like(nearest, -jnp.inf)
        pairs = AnchorPairs(distances, exists, nowhere, nearest, nearest < jnp.inf)
        return pairs.terms(costs, pairs.has_positive)

    def costs(
        self, distances: Array, exists: Array, negatives: Array, temperature: Array
    ) -> Array:
        """The costs of anchors ``[n]``, one positive of all anchors at a time.

        Args:
            distances: distances of positives ``[k, n]``, as `with_anchor` makes them.
            exists: which of them exist, bool ``[k, n]``.
            negatives: smooth numbers of negatives ahead of each ``[k, n]``.
            temperature: a scalar.
        """

        @jax.checkpoint
        def share(parts: tuple[Array, Array, Array]) -> Array:
            index, own, ahead = parts
            others = exists & (jnp.arange(len(distances)) != index)[:, None]
            steps = jax.nn.sigmoid((own - distances) / temperature)
            inside = 1 + jnp.sum(jnp.where(others, steps, 0), axis=0)
            return ahead / (inside + ahead)

        index = jnp.arange(len(distances))
        shares = lax.map(share, (index, distances, negatives))
        total = jnp.sum(jnp.where(exists, shares, 0), axis=0)
        own = int(self.include_anchor)
        count = jnp.sum(exists[own:], axis=0, dtype=total.dtype)
        return jnp.where(count > 0, total / jnp.maximum(count + own, 1), 0)

    def with_anchor(self, distances: Array, exists: Array) -> tuple[Array, Array]:
        """Positives ``[k, n]``, after the anchors themselves if these are included."""
        if not self.include_anchor:
            return distances, exists
        zero = jnp.zeros_like(distances[:1])
        distances = jnp.concatenate([zero, distances])
        return distances, jnp.concatenate([zero == 0, exists])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _costs_of_rows(
    include_anchor: bool, d: Array, positive: Array, negative: Array, temperature: Array
) -> Array:
    """The costs ``[..., n]`` of rows of a distance matrix ``[..., n, m]``.

    Loops over the positives of all rows, so that memory is O(n m).
    """
    return _costs_forward(include_anchor, d, positive, negative, temperature)[0]


@own_promotion
def _costs_forward(
    include_anchor: bool, d: Array, positive: Array, negative: Array, temperature: Array
) -> tuple[Array, tuple]:
    ranks = _Ranks(include_anchor, d, positive, negative, temperature)

    def add(total: Array, column: Array, exists: Array) -> Array:
        _, _, _, inside, ahead = ranks.of(column)
        return total + jnp.where(exists, ahead / (inside + ahead), 0)

    total = ranks.for_each_positive(add, jnp.sum(ranks.none, axis=-1))
    return total * ranks.weight, (d, positive, negative, temperature)


@own_promotion
def _costs_backward(include_anchor: bool, inputs: tuple, by_cost: Array) -> tuple:
    ranks = _Ranks(include_anchor, *inputs)
    temperature = ranks.temperature
    by_share = by_cost * ranks.weight

    # The state: gradients by distances, and by the temperature for each anchor.
    def add(state: tuple[Array, Array], column: Array, exists: Array) -> tuple:
        by_d, by_temperature = state
        own, steps, others, inside, ahead = ranks.of(column)
        scale = jnp.where(exists, by_share, 0) / (inside + ahead) ** 2
        by_ahead, by_inside = scale * inside, -scale * ahead
        by_step = jnp.where(ranks.negative, by_ahead[..., None], 0)
        by_step = jnp.where(others, by_inside[..., None], by_step)
        slopes = by_step * steps * (1 - steps) / temperature
        by_own = jnp.sum(slopes, axis=-1)
        gaps = (own[..., None] - ranks.d) / temperature
        by_temperature -= jnp.sum(slopes * gaps, axis=-1)
        if include_anchor:
            step = jax.nn.sigmoid(own / temperature)
            slope = jnp.where(column >= 0, by_inside * step * (1 - step), 0)
            by_own += slope / temperature
            by_temperature -= slope * own / temperature**2
        is_own = ranks.columns == column[..., None]
        by_d += jnp.where(is_own, by_own[..., None], 0) - slopes
        return by_d, by_temperature

    none = ranks.none, jnp.sum(ranks.none, axis=-1)
    by_d, by_temperature = ranks.for_each_positive(add, none)
    return by_d, None, None, jnp.sum(by_temperature)


_costs_of_rows.defvjp(_costs_forward, _costs_backward)


class _Ranks:
    """Smooth ranks of the positives in rows of a distance matrix ``[..., n, m]``.

    Attributes:
        columns: indices of the references ``[m]``.
        none: zeros ``[..., n, m]``.
        weight: 1 over the number of ranked positives of each anchor, 0 without one.
    """

    def __init__(
        self,
        include_anchor: bool,
        d: Array,
        positive: Array,
        negative: Array,
        temperature: Array,
    ):
        self.include_anchor, self.temperature = include_anchor, temperature
        self.d, self.positive, self.negative = d, positive, negative
        self.columns = jnp.arange(d.shape[-1])
        # Zeros that vary over the devices of a mesh as the rows do.
        self.none = jnp.zeros_like(d) * positive
        self.count = jnp.sum(positive, axis=-1)
        weight = 1 / (jnp.maximum(self.count, 1) + include_anchor).astype(d.dtype)
        self.weight = jnp.where(self.count > 0, weight, 0)

    def of(self, column: Array) -> tuple[Array, ...]:
        """The rank of one positive of each row; column -1 is the anchor itself.

        Returns:
            Its distance, the steps of all references, which of these are other
            positives, its rank among positives, and the number of negatives ahead.
        """
        index = jnp.maximum(column, 0)[..., None]
        own = jnp.squeeze(jnp.take_along_axis(self.d, index, axis=-1), -1)
        own = jnp.where(column >= 0, own, 0)
        steps = jax.nn.sigmoid((own[..., None] - self.d) / self.temperature)
        others = self.positive & (self.columns != column[..., None])
        inside = 1 + jnp.sum(jnp.where(others, steps, 0), axis=-1)
        if self.include_anchor:
            step = jax.nn.sigmoid(own / self.temperature)
            inside += jnp.where(column >= 0, step, 0)
        ahead = jnp.sum(jnp.where(self.negative, steps, 0), axis=-1)
        return own, steps, others, inside, ahead

    def for_each_positive(self, visit: Any, state: Any) -> Any:
        """``visit(state, column, exists)`` for the r-th positives of all rows."""
        anchor = jnp.zeros_like(self.count) - 1
        if self.include_anchor:
            state = visit(state, anchor, anchor < 0)

        # The state: columns of the last positives, and the caller's state.
        def step(_: Array, carried: tuple[Array, Any]) -> tuple[Array, Any]:
            last, state = carried
            later = self.positive & (self.columns > last[..., None])
            column = jnp.argmax(later, axis=-1).astype(last.dtype)
            column = jnp.where(jnp.any(later, axis=-1), column, self.d.shape[-1])
            exists = column < self.d.shape[-1]
            clipped = jnp.where(exists, column, 0)
            return column, visit(state, clipped, exists)

        start = self.count * 0 - 1, state
        return lax.fori_loop(0, jnp.max(self.count, initial=0), step, start)[1]


def define_smooth_ap(temperature: ArrayLike, include_anchor: bool) -> PairLoss:
    """The shape and the parameters of `smooth_ap_loss`."""
    return PairLoss(SmoothAP(include_anchor), (temperature,))


@pair_loss(positive=("temperature",), flags=("include_anchor",))
def smooth_ap_loss(
    distances: ArrayLike,
    labels: ArrayLike | PairMasks,
    *,
    temperature: ArrayLike = 0.01,
    include_anchor: bool = True,
    reference_labels: ArrayLike | None = None,
    positions: ArrayLike | None = None,
    where: ArrayLike | None = None,
    reference_where: ArrayLike | None = None,
    reduce_fn: Reduction | None = mean_valid,
) -> Any:
    r"""One minus the smooth average precision of each anchor (SmoothAP).

    $$\ell_a = 1 - \frac{1}{|P_a|} \sum_{i \in P_a} \frac{R(i, P_a)}{R(i, P_a \cup N_a)}
      \qquad R(i, S) = 1 + \sum_{j \in S, j \neq i} \sigma((d_{ai} - d_{aj}) / \tau)$$

    In the paper the anchor is a positive of itself, at distance 0. An anchor without a
    positive but itself has no loss. Only reverse mode differentiates it.

    Memory: O(n m), at most 6 times the size of the distances.

    Args:
        distances: ``[..., n, m]``.
        labels: integers ``[..., n]``, or `PairMasks`.
        temperature: $\tau$, a scalar above 0.
        include_anchor: whether the anchor counts as a positive of itself, as in the
            paper. False ranks the references alone, such as a gallery without the
            queries.
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
        Brown et al. 2020 and their code: temperature 0.01, 28 classes of 4 images, Adam
        with a learning rate of 1e-5.

    Relations:
        For small temperatures it nears 1 minus the average precision, which has no
        gradient.

    References:
        Brown, Xie, Kalogeiton, Zisserman. Smooth-AP: Smoothing the Path Towards
        Large-Scale Image Retrieval. 2020. arXiv:2007.12163 (equations 4 to 6)

    >>> import jax.numpy as jnp
    >>> import tripletjax as tj
    >>> d = jnp.array([[0.0, 0.3, 0.2], [0.3, 0.0, 0.4], [0.2, 0.4, 0.0]])
    >>> print(f"{tj.smooth_ap_loss(d, jnp.array([0, 0, 1])):.4f}")
    0.0833
    """
    loss = define_smooth_ap(temperature, include_anchor)
    pairs = PairOptions(reference_labels, positions, where, reference_where)
    return of_distances(loss, distances, labels, pairs, reduce_fn)
