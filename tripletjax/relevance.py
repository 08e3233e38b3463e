"""Triplets of graded relevance, sampled as in Deep Ranking."""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from tripletjax._api import jitted
from tripletjax._matrices import columns_by_weight
from tripletjax.mining import Triplets
from tripletjax.pairs import per_item

# So many relevances at a time, of a few anchors, do not take much memory.
NUMBERS_AT_ONCE = 2**20


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
    negative comes from the other set.

    Memory: O(n + size); the relevance is read in blocks of rows.

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
    index = jnp.arange(n)

    def relevant(anchor: Array) -> tuple[Array, Array]:
        """Relevance of all items ``[n]``, and a mask of those in the same category."""
        within = real & (categories == categories[anchor])
        return r[anchor], within & real[anchor] & (index != anchor)

    def total_of(anchor: Array) -> Array:
        row, within = relevant(anchor)
        return jnp.sum(jnp.where(within, row, 0))

    def partners(drawn: tuple[Array, Array]) -> tuple[Array, Array, Array]:
        """A positive and a negative of an anchor, and whether there are such."""
        shares, anchor = drawn
        positive_share, negative_share, chance = shares[:, None]
        row, within = relevant(anchor)
        weights = jnp.where(within, jnp.minimum(row, cap), 0)
        positive = columns_by_weight(weights, positive_share)
        apart = row[positive] - row
        inside = jnp.where((apart >= gap) & (apart > 0), weights, 0)
        outside = (real & (categories != categories[anchor])).astype(r.dtype)
        has_inside, has_outside = jnp.any(inside > 0), jnp.any(outside > 0)
        out = chance < out_of_category
        out = jnp.where(has_inside & has_outside, out, has_outside)
        negative = columns_by_weight(jnp.where(out, outside, inside), negative_share)
        valid = jnp.any(weights > 0) & (has_inside | has_outside)
        return positive[0], negative[0], valid

    # Rows are read a few at a time.
    over_items = functools.partial(jax.lax.map, batch_size=max(1, NUMBERS_AT_ONCE // n))
    total = over_items(total_of, index)
    keys = jax.random.split(key)
    anchor = columns_by_weight(total, jax.random.uniform(keys[0], (size,), r.dtype))
    shares = jax.random.uniform(keys[1], (size, 3), r.dtype)
    positive, negative, valid = over_items(partners, (shares, anchor))
    return Triplets(anchor, positive, negative, valid & (total[anchor] > 0))
