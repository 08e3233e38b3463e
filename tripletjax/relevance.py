"""Triplets of graded relevance, sampled as in Deep Ranking."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from tripletjax._api import jitted
from tripletjax.mining import Triplets
from tripletjax.pairs import per_item


@jitted(sizes=("size",), nonnegative=("cap", "gap"))
def relevance_triplets(
    key: Array,
    relevance: ArrayLike,
    categories: ArrayLike,
    *,
    size: int,
    cap: ArrayLike = jnp.inf,
    gap: ArrayLike = 0.0,
    out_of_category: ArrayLike = 0.5,
    where: ArrayLike | None = None,
) -> Triplets:
    r"""Draw triplets whose positive is more relevant to the anchor than the negative.

    $$P(a) \propto \sum_{j \in C_a} r_{aj}, \qquad
      P(p \mid a) \propto \min(\text{cap}, r_{ap}), \; p \in C_a$$

    where $C_a$ has the other items of the anchor's category. With probability
    `out_of_category` the negative is uniform over the items of other categories. Else
    it is an item of the category with $r_{ap} - r_{an} > 0$ and at least the gap, drawn
    in proportion to $\min(\text{cap}, r_{an})$. If one of the two sets is empty, the
    negative comes from the other set. Memory is O(n^2 + n size): some 4 bytes for each
    pair of items, and 40 for each item and triplet.

    Args:
        key: a random key, ``jax.random.key(seed)``.
        relevance: floats ``[n, n]`` of at least 0: entry (i, j) is the relevance of
            item j to item i.
        categories: integers ``[n]``.
        size: the number of triplets to draw, at least 1.
        cap: the greatest weight of a relevance, so that near-copies do not dominate.
        gap: the least difference $r_{ap} - r_{an}$ within a category.
        out_of_category: the probability of a negative of another category, 0 to 1.
        where: bool ``[n]``, False for padding.

    Returns:
        Triplets ``[size]``. A triplet whose anchor has no relevant item or no negative
        is not valid.

    Raises:
        TypeError: if an argument has the wrong dtype.
        ValueError: if shapes do not fit, or an option is out of range.

    References:
        Wang et al. Learning Fine-Grained Image Similarity with Deep Ranking. 2014.
        arXiv:1404.4661

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import tripletjax as tj
    >>> relevance = jnp.array([[0.0, 2.0, 1.0], [2.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    >>> triplets = tj.relevance_triplets(
    ...     jax.random.key(0), relevance, jnp.array([0, 0, 1]), size=2)
    >>> print(triplets.negative, triplets.valid)
    [2 2] [ True  True]
    """
    r = jnp.asarray(relevance)
    r = r.astype(jnp.result_type(r, jnp.float32))
    if r.ndim != 2 or r.shape[0] != r.shape[1] or r.size == 0:
        raise ValueError(f"relevance must be [n, n], got shape {r.shape}.")
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}.")
    n = len(r)
    categories = per_item("categories", categories, n, "items", jnp.integer)
    real = jnp.ones(n, bool) if where is None else where
    real = per_item("where", real, n, "items", jnp.bool_)
    together = (categories[:, None] == categories) & real[:, None] & real
    within = together & ~jnp.eye(n, dtype=bool)
    weights = jnp.where(within, jnp.minimum(r, cap), 0)
    total = jnp.sum(jnp.where(within, r, 0), axis=-1)

    def draw(key: Array, weights: Array, shape: tuple[int, ...]) -> Array:
        logits = jnp.where(weights > 0, jnp.log(weights), -jnp.inf)
        return jax.random.categorical(key, logits, shape=shape)

    keys = jax.random.split(key, 5)
    anchor = draw(keys[0], total, (size,))
    anchor_weights = weights[anchor]
    positive = draw(keys[1], anchor_weights, (size,))
    of_positive = jnp.take_along_axis(r[anchor], positive[:, None], axis=1)
    apart = of_positive - r[anchor]
    inside = jnp.where((apart >= gap) & (apart > 0), anchor_weights, 0)
    outside = (real & (categories != categories[anchor][:, None])).astype(r.dtype)
    has_inside, has_outside = (jnp.any(w > 0, axis=1) for w in (inside, outside))
    out = jax.random.bernoulli(keys[2], out_of_category, (size,))
    out = jnp.where(has_inside & has_outside, out, has_outside)
    negative = jnp.where(
        out, draw(keys[3], outside, (size,)), draw(keys[4], inside, (size,))
    )
    valid = (total[anchor] > 0) & jnp.any(anchor_weights > 0, axis=1)
    return Triplets(anchor, positive, negative, valid & (has_inside | has_outside))
