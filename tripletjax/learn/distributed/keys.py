"""Random keys as plain arrays, and back."""

from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from tripletjax.learn.files import digest_of

State = TypeVar("State")


def plain(state: Any) -> list[Any]:
    """The arrays of a state; keys as the numbers that they are made of."""
    return [jax.random.key_data(x) if _is_key(x) else x for x in jax.tree.leaves(state)]


def from_plain(arrays: Sequence[Any], like: State) -> State:
    """The state whose arrays these are."""
    leaves = [
        jax.random.wrap_key_data(jnp.asarray(x), impl=jax.random.key_impl(old))
        if _is_key(old)
        else x
        for old, x in zip(jax.tree.leaves(like), arrays)
    ]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _kind(arrays: list[Any]) -> str:
    """A digest of shapes and dtypes."""
    kinds = [f"{np.shape(x)}{jax.dtypes.canonicalize_dtype(x.dtype)}" for x in arrays]
    return digest_of([" ".join(kinds)])


def _is_key(x: Any) -> bool:
    return hasattr(x, "dtype") and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
