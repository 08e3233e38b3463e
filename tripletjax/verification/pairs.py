"""Check of pairs: distances, and which pairs are of the same class."""

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from tripletjax.pairs import as_boolean


def as_pairs(
    distances: ArrayLike, same: ArrayLike, where: ArrayLike | None
) -> tuple[Array, Array, Array]:
    """Checked distances, and which of them are of positives and of negatives."""
    distances = jnp.asarray(distances)
    if distances.ndim != 1 or distances.size == 0:
        raise ValueError(f"distances must be [n], got shape {distances.shape}.")
    if jnp.issubdtype(distances.dtype, jnp.complexfloating):
        raise TypeError(f"distances must be real, got dtype {distances.dtype}.")
    distances = distances.astype(jnp.result_type(distances, jnp.float32))
    masks = [("same", same), ("where", True if where is None else where)]
    same, where = (as_boolean(name, mask) for name, mask in masks)
    for name, mask in (("same", same), ("where", where)):
        if mask.ndim and mask.shape != distances.shape:
            raise ValueError(
                f"{name} must have one entry per distance, got shapes {mask.shape} and "
                f"{distances.shape}."
            )
    return distances, same & where, ~same & where
