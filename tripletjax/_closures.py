"""Functions that close over traced arrays.

JAX differentiates a loss by the arrays that its metric or hinge closes over, unless a
derivative of its own (`jax.custom_jvp`, `jax.custom_vjp`) takes these functions as
static arguments. Such a derivative knows no more arrays than its arguments.
"""

from collections.abc import Callable
from typing import Any

import jax


def closes_over_tracers(function: Callable[..., Any], *samples: Any) -> bool:
    """Whether a function uses traced arrays that are not among its arguments.

    Args:
        function: any function of arrays.
        *samples: arrays, or their shapes and dtypes, to trace the function with.
    """
    try:
        closed = jax.make_jaxpr(function)(*samples)
    except Exception:
        # Nothing is known of it: the loss raises the error, or JAX differentiates it.
        return True
    return any(isinstance(constant, jax.core.Tracer) for constant in closed.consts)
