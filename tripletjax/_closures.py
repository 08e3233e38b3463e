"""Functions as arguments: when they are equal, and what they close over.

JAX compiles a program for every function object that is a static argument. Of two
functions that Python makes from the same code, with the same numbers and functions
around it, `canonical` gives the first, for which there is a program.

JAX differentiates a loss by the arrays that its metric or hinge closes over, unless a
derivative of its own (`jax.custom_jvp`, `jax.custom_vjp`) takes these functions as
static arguments. Such a derivative knows no more arrays than its arguments.
"""

import builtins
import functools
import types
from collections.abc import Callable, Hashable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np

F = TypeVar("F")

# The contents of the modules of these packages do not change.
_CONSTANT_PACKAGES = {"jax", "jaxlib", "math", "numpy", "operator", "tripletjax"}
# The number of distinct functions that are remembered.
_MOST_FUNCTIONS = 512


def canonical(function: F) -> F:
    """The first function of the same code and surroundings; else the function itself.

    Surroundings are compared if they are numbers, strings, functions, or modules of
    JAX and NumPy. Functions that use anything else, which might change, are their own.
    """
    if not isinstance(function, types.FunctionType | functools.partial):
        return function
    if isinstance(function, types.FunctionType) and "<" not in function.__qualname__:
        # A function of a module: there is one of it.
        return function
    identity = _identity(function, ())
    return function if identity is None else _first(_Identified(identity, function))


class _Identified:
    """A value that is equal to others of the same identity."""

    def __init__(self, identity: Hashable, value: Any):
        self.identity, self.value = identity, value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identified) and self.identity == other.identity

    def __hash__(self) -> int:
        return hash(self.identity)


@functools.lru_cache(_MOST_FUNCTIONS)
def _first(identified: _Identified) -> Any:
    return identified.value


def _identity(value: Any, within: tuple) -> Hashable | None:
    """A hashable identity of a value; None if the value may change or is unknown."""
    if value is None or isinstance(value, bool | int | str | bytes):
        return type(value), value
    if isinstance(value, float | np.generic):
        # Unlike equality, this tells -0.0 from 0.0.
        return type(value), np.asarray(value).tobytes()
    if isinstance(value, types.ModuleType):
        package = value.__name__.partition(".")[0]
        return value if package in _CONSTANT_PACKAGES else None
    if isinstance(value, tuple):
        return _all_known(type(value), (_identity(item, within) for item in value))
    if isinstance(value, functools.partial):
        parts = (value.func, value.args, *value.keywords, *value.keywords.values())
        return _all_known(type(value), (_identity(part, within) for part in parts))
    if isinstance(value, types.FunctionType):
        if any(value is outer for outer in within):
            return None
        return _identity_of_function(value, (*within, value))
    module = getattr(value, "__module__", None) or ""
    if callable(value) and module.partition(".")[0] in _CONSTANT_PACKAGES:
        # Such as jax.nn.relu and numpy.exp: there is one of each.
        return value if isinstance(value, Hashable) else None
    return None


def _identity_of_function(
    function: types.FunctionType, within: tuple
) -> Hashable | None:
    try:
        cells = [cell.cell_contents for cell in function.__closure__ or ()]
    except ValueError:  # Of a name that has no value yet.
        return None
    surroundings = [
        *(function.__defaults__ or ()),
        *(function.__kwdefaults__ or {}).values(),
        *cells,
        *function.__dict__,
        *function.__dict__.values(),
    ]
    for name in _names_of(function.__code__):
        if name in function.__globals__:
            surroundings.append(function.__globals__[name])
        elif not hasattr(builtins, name):
            surroundings.append(name)  # An attribute, or a name without a value.
    parts = (_identity(part, within) for part in surroundings)
    return _all_known(function.__code__, parts)


def _names_of(code: types.CodeType) -> Iterator[str]:
    """Names of global values and of attributes, also in functions within."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names_of(constant)


def _all_known(code: Hashable, parts: Iterator[Hashable | None]) -> Hashable | None:
    known = tuple(parts)
    return None if None in known else (code, known)


def closes_over_tracers(function: Callable[..., Any], *samples: Any) -> bool:
    """Whether a function uses traced arrays that are not among its arguments.

    Args:
        function: any function of arrays.
        *samples: arrays, or their shapes and dtypes, to trace the function with.
    """
    constants = jax.make_jaxpr(function)(*samples).consts
    return any(isinstance(constant, jax.core.Tracer) for constant in constants)
