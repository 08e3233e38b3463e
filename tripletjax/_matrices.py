"""Distance matrices: checked, read by index, put in order."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike


def as_distances(distances: ArrayLike) -> Array:
    """Checks a distance matrix ``[..., n, m]``; at least float32."""
    distances = jnp.asarray(distances)
    if distances.ndim < 2:
        raise ValueError(f"distances must be [..., n, m], got shape {distances.shape}.")
    if distances.size == 0:
        raise ValueError(f"distances is empty: it has shape {distances.shape}.")
    if jnp.issubdtype(distances.dtype, jnp.complexfloating) or distances.dtype == bool:
        raise TypeError(f"distances must be real, got dtype {distances.dtype}.")
    return distances.astype(jnp.result_type(distances, jnp.float32))


# Larger arrays are not read for a check.
_MOST_READ = 2**16


def values_at_hand(x: ArrayLike) -> np.ndarray | None:
    """A small array that lies on the host or on a CPU; None for any other.

    Reading from an accelerator would wait for all that is queued there.
    """
    if isinstance(x, jax.core.Tracer) or np.size(x) > _MOST_READ:
        return None
    if isinstance(x, jax.Array) and (
        not x.is_fully_addressable
        or any(device.platform != "cpu" for device in x.devices())
    ):
        return None
    return np.asarray(x)


def _square_values(x: Any, options: dict[str, Any]) -> np.ndarray | None:
    """Numbers ``[n, n]`` whose rows and columns stand for the same items."""
    if options.get("reference_labels") is not None or np.ndim(x) != 2:
        return None
    values = values_at_hand(x)
    if values is None or values.shape[0] != values.shape[1] or len(values) < 3:
        return None
    return values if values.dtype.kind in "fiu" else None


def check_not_embeddings(distances: Any, labels: Any, **options: Any) -> None:
    """Raises for embeddings ``[n, n]`` in place of distances.

    With labels alone, distances are of items among themselves. Those are symmetric, or
    0 on the diagonal, or at least not negative.
    """
    values = _square_values(distances, options)
    if values is None or isinstance(labels, tuple) or not np.isfinite(values).all():
        return
    if (values < 0).any() and values.diagonal().any() and (values != values.T).any():
        raise ValueError(
            "distances must be of items among themselves, got negative numbers without "
            "symmetry; if these are embeddings, use tripletjax.blockwise or a metric."
        )


def check_not_distances(embeddings: Any, labels: Any, **options: Any) -> None:
    """Raises for a distance matrix in place of embeddings."""
    values = _square_values(embeddings, options)
    if values is None or values.diagonal().any() or not values.any():
        return
    if (values >= 0).all() and (values == values.T).all():
        raise ValueError(
            "embeddings must be vectors, got a symmetric matrix with a diagonal of 0; "
            "if these are distances, use the function of the same name in tripletjax."
        )


def frozen_distances(distances: ArrayLike) -> Array:
    """Checks a distance matrix; the result is not differentiated."""
    return jax.lax.stop_gradient(as_distances(distances))


def take(distances: Array, index: Array) -> Array:
    """The distance in each row at `index` ``[..., n]`` or ``[..., n, k]``."""
    if index.ndim < distances.ndim:
        return take(distances, index[..., None])[..., 0]
    return jnp.take_along_axis(distances, index, axis=-1, mode="promise_in_bounds")


def columns_of(matrix: Array) -> Array:
    return jnp.arange(matrix.shape[-1])


def search_rows(sorted_rows: Array, values: Array, *, side: str) -> Array:
    """``jnp.searchsorted`` in every row."""
    search = jnp.vectorize(
        lambda row, value: jnp.searchsorted(row, value, side=side),
        signature="(m),(k)->(k)",
    )
    return search(sorted_rows, values)


def columns_by_weight(weights: Array, shares: Array) -> Array:
    """Columns of rows ``[..., m]`` at shares ``[..., k]`` of the rows' sums.

    With shares drawn evenly from 0 to 1, a column is drawn in proportion to its weight.
    A column whose weight is not above 0 is never drawn, unless no weight in its row is.
    """
    positive = weights > 0
    weights = jnp.where(positive, weights, 0)
    weights = jnp.minimum(weights, jnp.finfo(weights.dtype).max)
    # Neither the sum nor the inverse of the scale leaves the range of float32.
    scale = jnp.clip(jnp.max(weights, axis=-1, keepdims=True), 1e-30, 1e30)
    scaled = weights / scale
    # The sums of a parallel scan are rounded one by one: without the maximum they rise
    # or fall a little where the weight is 0.
    running = jnp.where(positive, jnp.cumsum(scaled, axis=-1), 0)
    running = jax.lax.cummax(running, axis=running.ndim - 1)
    total = running[..., -1:]
    # Rounding may put a point on the very end, beyond the last weight.
    last = search_rows(running, total, side="left")
    return jnp.minimum(search_rows(running, shares * total, side="right"), last)


def ordered_bits(x: Array) -> Array:
    """Integers in the order of floats, which XLA sorts several times faster on CPUs."""
    dtype = jnp.int64 if x.dtype == jnp.float64 else jnp.int32
    bits = jax.lax.bitcast_convert_type(x + 0.0, dtype)
    last = jnp.iinfo(dtype).max
    # A NaN, which may have a sign, comes after all numbers and before what is no float.
    return jnp.where(jnp.isnan(x), last - 1, jnp.where(bits < 0, bits ^ last, bits))


class SortedNegatives(NamedTuple):
    """Every anchor's negatives from near to far, ``[..., n, m]``, then the rest.

    The distances of the rest are NaN.
    """

    distances: Array
    order: Array
    count: Array

    @classmethod
    def of(cls, distances: Array, negative: Array) -> "SortedNegatives":
        bits = ordered_bits(distances)
        key = jnp.where(negative, bits, jnp.iinfo(bits.dtype).max)
        column = jnp.broadcast_to(columns_of(key), key.shape)
        _, order = jax.lax.sort((key, column), num_keys=1)
        near_to_far = take(jnp.where(negative, distances, jnp.nan), order)
        return cls(near_to_far, order, jnp.sum(negative, axis=-1))

    def rank(self, values: Array, *, side: str) -> Array:
        """How many of an anchor's negatives are nearer than (or as near as) a value."""
        return search_rows(self.distances, values, side=side)

    def at(self, rank: Array) -> Array:
        """The column of the negative of a rank, which is clipped to the last."""
        return take(self.order, jnp.minimum(rank, self.order.shape[-1] - 1))


def for_each_true_column(
    pairs: Array, visit: Callable[[Any, Array, Array], Any], state: Any
) -> Any:
    """Visits the first of the pairs in every row, then the second, and so on.

    ``visit(state, column, found)`` is given columns ``[..., n]`` of `pairs`
    ``[..., n, m]``, and whether each row had one left.
    """
    columns = jnp.arange(pairs.shape[-1])

    def step(loop: tuple[Array, Any]) -> tuple[Array, Any]:
        left, state = loop
        column = jnp.argmax(left, axis=-1)
        state = visit(state, column, jnp.any(left, axis=-1))
        return left & (columns != column[..., None]), state

    return jax.lax.while_loop(lambda loop: jnp.any(loop[0]), step, (pairs, state))[1]
