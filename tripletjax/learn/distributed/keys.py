"""Random keys as plain arrays, and back."""

from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

State = TypeVar("State")


def plain(state: Any) -> list[Any]:
    """List the arrays of a state, with the data of random keys."""
    return [jax.random.key_data(x) if _is_key(x) else x for x in jax.tree.leaves(state)]


def from_plain(arrays: Sequence[Any], like: State) -> State:
    """Rebuild a state from the arrays of `plain`."""
    leaves = [
        jax.random.wrap_key_data(jnp.asarray(x), impl=jax.random.key_impl(old))
        if _is_key(old)
        else x
        for old, x in zip(jax.tree.leaves(like), arrays)
    ]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _is_key(x: Any) -> bool:
    return hasattr(x, "dtype") and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
