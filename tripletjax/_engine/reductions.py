"""Reductions over tiles that XLA vectorises on CPUs.

Plain reductions to an index, sums that end in an addition and counts of booleans take
two to several times as long with XLA of jax 0.10.2. Whether that still holds is shown
by ``benchmarks/in_batch.py --libraries tripletjax`` with the plain forms in place.
"""

import functools
import operator
from collections.abc import Iterable

import jax.numpy as jnp
from jax import Array


def add_up(arrays: Iterable[Array]) -> Array:
    """The sum of some arrays, one after the other."""
    return functools.reduce(operator.add, arrays)


def sum_in_one_loop(x: Array, axis: int) -> Array:
    """Sums along an axis of a tile.

    XLA makes what ends in a selection in one loop that vectorises, but what ends in an
    addition in several.
    """
    return jnp.sum(jnp.where(x != 0, x, 0), axis)


def packed_counts(masks: list[Array], axis: int) -> Array:
    """Numbers of true entries along an axis of a tile, ``[len(masks), n]``.

    Several counts share an integer, so that one sum makes them.
    """
    bits = masks[0].shape[axis].bit_length()
    together = 31 // bits
    rows = []
    for start in range(0, len(masks), together):
        some = masks[start : start + together]
        packed = sum(x.astype(jnp.int32) << (bits * k) for k, x in enumerate(some))
        packed = jnp.sum(packed, axis)
        rows += [(packed >> (bits * k)) & ((1 << bits) - 1) for k in range(len(some))]
    return jnp.stack(rows)


def min_and_index(x: Array, limit: Array, axis: int) -> tuple[Array, Array]:
    """Minima beyond a limit along an axis, and their first indices.

    Plain minima are several times faster than a reduction to the index, and on TPUs
    several of one tile are made together.
    """
    value = jnp.min(jnp.where(x > limit, x, jnp.inf), axis=axis)
    indices = jnp.expand_dims(jnp.arange(x.shape[axis], dtype=x.dtype), 1 - axis)
    hit = x == jnp.expand_dims(value, axis)
    index = jnp.min(jnp.where(hit, indices, x.shape[axis] - 1), axis=axis)
    return value, index.astype(jnp.int32)


def min_and_index_of_all(x: Array, axis: int, *, plain: bool) -> tuple[Array, Array]:
    """Minima along an axis, and their first indices."""
    if plain:
        return jnp.min(x, axis), jnp.argmin(x, axis).astype(jnp.int32)
    # Minima of runs of 32, and then a look into the run that has it.
    size = x.shape[axis]
    length = 32 if size % 32 == 0 else size
    shape = list(x.shape)
    shape[axis : axis + 1] = [size // length, length]
    least = jnp.min(x.reshape(shape), axis=axis + 1)
    value = jnp.min(least, axis=axis)
    run = jnp.argmin(least, axis=axis)
    at = jnp.expand_dims(run, (axis, axis + 1))
    members = jnp.take_along_axis(
        x.reshape(shape), at, axis=axis, mode="promise_in_bounds"
    )
    members = jnp.squeeze(members, axis)
    within = jnp.argmax(members == jnp.expand_dims(value, axis), axis=axis)
    return value, (run * length + within).astype(jnp.int32)
