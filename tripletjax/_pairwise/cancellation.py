"""Distances from differences, where products of nearly equal vectors have no digits."""

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array

from tripletjax._matrices import for_each_true_column

# Half squared differences below this share of the vectors' halves need refinement.
CANCELLATION_SHARE = 0.01


def refine(
    values: Array,
    pairs: Array,
    compare: Callable[[Array, Array], Array],
    a: Array,
    b: Array,
) -> Array:
    """Values ``[n, m]`` in which some pairs are computed from their vectors.

    Args:
        values: numbers of all pairs, computed from products.
        pairs: the pairs to compute again, bool ``[n, m]``.
        compare: a function from vectors ``[n, d]`` and ``[n, d]`` to values ``[n]``.
        a: vectors of the rows ``[n, d]``.
        b: vectors of the columns ``[m, d]``.
    """
    row = jnp.arange(len(a))

    def visit(values: Array, column: Array, exists: Array) -> Array:
        new = jnp.where(exists, compare(a, b[column]), values[row, column])
        return values.at[row, column].set(new, unique_indices=True)

    return for_each_true_column(pairs, visit, values)
