"""Distance matrices: checks, reads by index, and sorting."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike


def as_distances(distances: ArrayLike) -> Array:
    """Check a distance matrix.

    Args:
        distances: real numbers ``[..., n, m]``, neither n nor m zero.

    Returns:
        The matrix as float32, or float64 if it was.

    Raises:
        TypeError: if `distances` are complex or bool.
        ValueError: if `distances` have fewer than two axes, or no element.
    """
    distances = jnp.asarray(distances)
    if distances.ndim < 2:
        raise ValueError(f"distances must be [..., n, m], got shape {distances.shape}.")
    if distances.size == 0:
        raise ValueError(f"distances is empty: it has shape {distances.shape}.")
    if jnp.issubdtype(distances.dtype, jnp.complexfloating) or distances.dtype == bool:
        raise TypeError(f"distances must be real, got dtype {distances.dtype}.")
    return distances.astype(jnp.result_type(distances, jnp.float32))


# Elements of the largest array that a check reads.
_MAX_READ = 2**16


def values_at_hand(x: ArrayLike) -> np.ndarray | None:
    """The values of a small array on the host or a CPU; None for any other array.

    A read from an accelerator would wait for all computations queued there.
    """
    if isinstance(x, jax.core.Tracer) or np.size(x) > _MAX_READ:
        return None
    if isinstance(x, jax.Array) and (
        not x.is_fully_addressable
        or any(device.platform != "cpu" for device in x.devices())
    ):
        return None
    return np.asarray(x)


def _square_values(x: Any, options: dict[str, Any]) -> np.ndarray | None:
    """Values ``[n, n]`` if x may be either distances of n items or n embeddings."""
    if options.get("reference_labels") is not None or np.ndim(x) != 2:
        return None
    values = values_at_hand(x)
    if values is None or values.shape[0] != values.shape[1] or len(values) < 3:
        return None
    return values if values.dtype.kind in "fiu" else None


def check_not_embeddings(distances: Any, labels: Any, **options: Any) -> None:
    """Reject embeddings ``[n, n]`` instead of distances.

    Without `reference_labels`, distances are those of the items among themselves: such
    a matrix is symmetric, or 0 on the diagonal, or at least non-negative.

    Raises:
        ValueError: if `distances` are none of these.
    """
    values = _square_values(distances, options)
    if values is None or isinstance(labels, tuple) or not np.isfinite(values).all():
        return
    if (values < 0).any() and values.diagonal().any() and (values != values.T).any():
        raise ValueError(
            "distances must be non-negative, symmetric or 0 on the diagonal, got "
            "none of these; if these are embeddings, use tripletjax.blockwise or a "
            "metric; if rows and columns are different items, give reference_labels."
        )


def check_not_distances(embeddings: Any, labels: Any, **options: Any) -> None:
    """Reject a distance matrix instead of embeddings.

    Raises:
        ValueError: if `embeddings` are symmetric, non-negative and 0 on the diagonal.
    """
    values = _square_values(embeddings, options)
    if values is None or values.diagonal().any() or not values.any():
        return
    if (values >= 0).all() and (values == values.T).all():
        raise ValueError(
            "embeddings must be vectors, got a symmetric matrix with a diagonal of 0; "
            "if these are distances, use the function of the same name in tripletjax."
        )


def frozen_distances(distances: ArrayLike) -> Array:
    """Check a distance matrix as `as_distances`, and stop its gradient."""
    return jax.lax.stop_gradient(as_distances(distances))


def take(distances: Array, index: Array) -> Array:
    """Distances of each row at columns `index` ``[..., n]`` or ``[..., n, k]``."""
    if index.ndim < distances.ndim:
        return take(distances, index[..., None])[..., 0]
    return jnp.take_along_axis(distances, index, axis=-1, mode="promise_in_bounds")


def columns_of(matrix: Array) -> Array:
    """Numbers of the columns ``[m]`` of a matrix ``[..., m]``."""
    return jnp.arange(matrix.shape[-1])


def search_rows(sorted_rows: Array, values: Array, *, side: str) -> Array:
    """`jnp.searchsorted` of values ``[..., k]`` in the same row of ``[..., m]``."""
    search = jnp.vectorize(
        lambda row, value: jnp.searchsorted(row, value, side=side),
        signature="(m),(k)->(k)",
    )
    return search(sorted_rows, values)


def columns_by_weight(weights: Array, shares: Array) -> Array:
    """Columns at which the running sum of the weights reaches a share of their total.

    With shares drawn uniformly from [0, 1), each column is drawn in proportion to its
    weight. A column without a positive weight is drawn only if its row has none.

    Args:
        weights: ``[..., m]``.
        shares: ``[..., k]``, from 0 to 1.

    Returns:
        Columns, integers ``[..., k]``.
    """
    positive = weights > 0
    weights = jnp.where(positive, weights, 0)
    weights = jnp.minimum(weights, jnp.finfo(weights.dtype).max)
    # Neither the sum nor the inverse of the scale leaves the range of float32.
    scale = jnp.clip(jnp.max(weights, axis=-1, keepdims=True), 1e-30, 1e30)
    scaled = weights / scale
    # A parallel scan rounds every sum by itself: without the maximum, the running sum
    # would rise or fall a little at a weight of 0.
    running = jnp.where(positive, jnp.cumsum(scaled, axis=-1), 0)
    running = jax.lax.cummax(running, axis=running.ndim - 1)
    total = running[..., -1:]
    # Rounding may put a share at the very end, beyond the last positive weight.
    last = search_rows(running, total, side="left")
    return jnp.minimum(search_rows(running, shares * total, side="right"), last)


def ordered_bits(x: Array) -> Array:
    """Integers in the order of floats; XLA sorts them several times faster on CPUs."""
    dtype = jnp.int64 if x.dtype == jnp.float64 else jnp.int32
    bits = jax.lax.bitcast_convert_type(x + 0.0, dtype)
    last = jnp.iinfo(dtype).max
    # NaN of either sign sorts after all numbers; the largest integer is left for
    # columns that are no candidates.
    return jnp.where(jnp.isnan(x), last - 1, jnp.where(bits < 0, bits ^ last, bits))


class SortedNegatives(NamedTuple):
    """Negatives of every anchor, sorted by distance.

    Attributes:
        distances: ``[..., n, m]``, ascending; NaN after the last negative.
        order: columns of the negatives in this order, then all other columns.
        count: number of negatives ``[..., n]``.
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
        """Number of negatives of each anchor below a value.

        Args:
            values: ``[..., n, k]``.
            side: ``"left"`` counts smaller distances, ``"right"`` equal ones, too.
        """
        return search_rows(self.distances, values, side=side)

    def at(self, rank: Array) -> Array:
        """Columns of the negatives of a rank, which is clipped to the last column."""
        return take(self.order, jnp.minimum(rank, self.order.shape[-1] - 1))


def for_each_true_column(
    pairs: Array, visit: Callable[[Any, Array, Array], Any], state: Any
) -> Any:
    """Fold over the true columns of all rows at once: all first ones, then all second.

    Args:
        pairs: bool ``[..., n, m]``.
        visit: ``visit(state, column, exists)`` returns the next state. `column`
            ``[..., n]`` is the next true column of each row; `exists` ``[..., n]`` is
            False for rows that have no further one.
        state: the first state.

    Returns:
        The last state.
    """
    columns = jnp.arange(pairs.shape[-1])

    def step(loop: tuple[Array, Any]) -> tuple[Array, Any]:
        remaining, state = loop
        column = jnp.argmax(remaining, axis=-1)
        state = visit(state, column, jnp.any(remaining, axis=-1))
        return remaining & (columns != column[..., None]), state

    return jax.lax.while_loop(lambda loop: jnp.any(loop[0]), step, (pairs, state))[1]
