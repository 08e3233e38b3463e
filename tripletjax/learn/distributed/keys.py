"""Random keys as arrays of integers, for files and other processes."""

from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

State = TypeVar("State")


def arrays_of(state: Any) -> list[Any]:
    """List the leaves of a state in order, each random key as its data."""
    return [jax.random.key_data(x) if _is_key(x) else x for x in jax.tree.leaves(state)]


def with_arrays(like: State, arrays: Sequence[Any]) -> State:
    """Rebuild a state from the arrays of `arrays_of`.

    Its structure and the generators of its random keys are those of `like`.
    """
    leaves = [
        jax.random.wrap_key_data(jnp.asarray(x), impl=jax.random.key_impl(old))
        if _is_key(old)
        else x
        for old, x in zip(jax.tree.leaves(like), arrays)
    ]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _is_key(x: Any) -> bool:
    return hasattr(x, "dtype") and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
