"""Thresholds of distances, and checks of the rates that choose them."""

from collections.abc import Iterable, Sequence

import jax.numpy as jnp
from jax import Array


def between(last: Array, following: Array) -> Array:
    """Threshold that accepts the distance `last`, and not the distance `following`.

    The threshold is the middle of the two, or `last` if rounding leaves no number
    between them.

    Args:
        last: largest accepted distance, or minus infinity to accept none: the threshold
            is then below all distances.
        following: smallest rejected distance, or infinity for none.
    """
    middle = last + (following - last) / 2
    inside = (middle < following) & (following < jnp.inf)
    none = jnp.where(following > 0, -1, -jnp.inf)
    return jnp.where(last == -jnp.inf, none, jnp.where(inside, middle, last))


def as_rates(name: str, rates: Sequence[float]) -> tuple[float, ...]:
    """Check rates, and convert them to floats.

    Args:
        name: name of the argument, for messages.
        rates: at least one number, each over 0 and up to 1.

    Raises:
        TypeError: if `rates` is not a sequence of numbers.
        ValueError: if `rates` is empty, or a rate is not over 0 and up to 1.
    """
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
