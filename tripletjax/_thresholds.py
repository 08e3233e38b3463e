"""Thresholds of distances, and the rates that they are chosen at."""

from collections.abc import Iterable, Sequence

import jax.numpy as jnp
from jax import Array


def between(last: Array, following: Array) -> Array:
    """What accepts a distance, and not the following one.

    In the middle where there is room between them, below all distances if none is to be
    accepted, for which `last` is minus infinity.
    """
    middle = last + (following - last) / 2
    inside = (middle < following) & (following < jnp.inf)
    none = jnp.where(following > 0, -1, -jnp.inf)
    return jnp.where(last == -jnp.inf, none, jnp.where(inside, middle, last))


def as_rates(name: str, rates: Sequence[float]) -> tuple[float, ...]:
    if not isinstance(rates, Iterable) or isinstance(rates, str):
        raise TypeError(f"{name} must be a sequence of numbers, got {rates!r}.")
    try:
        rates = tuple(float(rate) for rate in rates)
    except (TypeError, ValueError):
        raise TypeError(
            f"{name} must be a sequence of numbers, got {rates!r}."
        ) from None
    if not rates or not all(0 < rate <= 1 for rate in rates):
        raise ValueError(f"{name} must be over 0 and up to 1, got {rates}.")
    return rates
