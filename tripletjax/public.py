"""What every public function has in common, in one decorator.

A public function takes any array-like, is jitted, and runs on any mesh:

- lists, NumPy arrays and whatever else has ``__array__`` become arrays; an integer
  that this JAX configuration would silently wrap is an error;
- callables, flags and sizes are static and checked, everything else may be traced;
- only what is annotated as optional may be None;
- it is traced under JAX's default promotion of ranks and dtypes, which a caller may
  have made stricter;
- arrays on a mesh with Explicit axes are computed under Auto axes, so that the same
  code runs whichever kind of mesh the caller has set up.
"""

import functools
import inspect
import math
import operator
import typing
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

P = ParamSpec("P")
R = TypeVar("R")


def own_promotion(function: Callable[P, R]) -> Callable[P, R]:
    """Traces a function under JAX's default promotion, whatever the caller has set.

    Rules of differentiation need it, too: they are traced when a caller asks for them.
    """

    @functools.wraps(function)
    def traced(*args: P.args, **kwargs: P.kwargs) -> R:
        with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
            return function(*args, **kwargs)

    return traced


def public(
    *,
    callables: tuple[str, ...] = (),
    static: tuple[str, ...] = (),
    nonnegative: tuple[str, ...] = (),
    check: Callable[..., None] | None = None,
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Makes a function jitted, mesh-agnostic and strict about its arguments.

    Args:
        callables: options that are static and must be callable, or None where their
            annotation allows it.
        static: other static options. All static options are keyword-only.
        nonnegative: numeric options that may be traced; when their value is known
            they must be finite and at least 0.
        check: raises for arguments whose values are known and wrong.

    Returns:
        A decorator.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        parameters = inspect.signature(function).parameters
        names = tuple(parameters)
        optional = {
            name
            for name, parameter in parameters.items()
            if type(None) in typing.get_args(parameter.annotation)
        }
        flags = [name for name in static if parameters[name].annotation is bool]
        sizes = [name for name in static if parameters[name].annotation is int]
        statics = (*callables, *static)
        function = own_promotion(function)
        run = jax.jit(function, static_argnames=statics)
        run_explicit = jax.jit(
            functools.partial(_under_auto_axes, function, statics),
            static_argnames=statics,
        )

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            for name in kwargs:
                if name not in parameters:
                    raise TypeError(
                        f"{function.__name__}() got an unexpected keyword argument "
                        f"{name!r}; it has {', '.join(names)}."
                    )
            for name, value in (*zip(names, args), *kwargs.items()):
                if value is None and name in parameters and name not in optional:
                    raise TypeError(f"{name} must be given, got None.")
            for name in callables:
                if not callable(kwargs.get(name, len)) and kwargs[name] is not None:
                    raise TypeError(f"{name} must be callable, got {kwargs[name]!r}.")
            for name in nonnegative:
                _check_nonnegative(name, kwargs.get(name, 0))
            for name in flags:
                if not isinstance(kwargs.get(name, True), bool | np.bool_):
                    raise TypeError(f"{name} must be a bool, got {kwargs[name]!r}.")
            kwargs |= {n: as_integer(n, kwargs[n]) for n in sizes if n in kwargs}
            if check is not None:
                check(*args, **kwargs)
            args = tuple(_arrays(name, arg) for name, arg in zip(names, args))
            kwargs = {
                name: arg if name in statics else _arrays(name, arg)
                for name, arg in kwargs.items()
            }
            arrays = [arg for name, arg in kwargs.items() if name not in statics]
            if any(_is_explicit(leaf) for leaf in jax.tree.leaves((args, arrays))):
                return run_explicit(*args, **kwargs)
            return run(*args, **kwargs)

        return call

    return decorate


def as_integer(name: str, value: Any) -> int:
    """Checks a size: any integer type will do, but not a bool."""
    try:
        if isinstance(value, bool | np.bool_):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}.") from None


def _arrays(name: str, tree: Any) -> Any:
    is_list = lambda node: type(node) in (list, tuple)  # noqa: E731
    return jax.tree.map(functools.partial(_array, name), tree, is_leaf=is_list)


def _array(name: str, leaf: Any) -> Any:
    if isinstance(leaf, jax.Array | bool | int | float | complex):
        return leaf
    if isinstance(leaf, list | tuple) and any(
        isinstance(item, jax.Array) for item in jax.tree.leaves(leaf)
    ):
        return jnp.asarray(leaf)
    try:
        leaf = np.asarray(leaf)
    except ValueError as error:
        raise ValueError(f"{name} is not a rectangular array: {error}") from None
    if leaf.dtype.kind in "OSUmM":
        raise TypeError(
            f"{name} must be numeric, got dtype {leaf.dtype}. "
            "np.unique(x, return_inverse=True)[1] turns names into integers."
        )
    narrow = jax.dtypes.canonicalize_dtype(leaf.dtype)
    if leaf.dtype.kind in "iu" and leaf.size and narrow != leaf.dtype:
        limits = np.iinfo(narrow)
        if leaf.min() < limits.min or leaf.max() > limits.max:
            raise ValueError(
                f"{name} holds integers that do not fit into {narrow} and would wrap. "
                "Enable jax_enable_x64, or renumber them with "
                "np.unique(x, return_inverse=True)[1]."
            )
    return leaf


def _check_nonnegative(name: str, value: Any) -> None:
    if isinstance(value, jax.core.Tracer):
        return
    number = np.asarray(value)
    if number.dtype.kind not in "fiu" and number.dtype != jnp.bfloat16:
        raise TypeError(f"{name} must be a real number, got {value!r}.")
    if number.ndim:
        raise ValueError(
            f"{name} must be a scalar, got shape {number.shape}; use jax.vmap to sweep "
            "over several."
        )
    if not math.isfinite(number) or number < 0:
        raise ValueError(f"{name} must be finite and not negative, got {value!r}.")


def _is_explicit(leaf: Any) -> bool:
    mesh = jax.typeof(leaf).sharding.mesh
    return not mesh.empty and AxisType.Explicit in mesh.axis_types


def _under_auto_axes(
    function: Callable, statics: tuple[str, ...], *args: Any, **kwargs: Any
) -> Any:
    """Runs `function` with the mesh's Explicit axes made Auto.

    Every output is laid out like the first sharded argument as far as their leading
    dimensions agree, and replicated beyond that.
    """
    options = {name: kwargs.pop(name) for name in statics if name in kwargs}

    def plain(args: tuple, kwargs: dict) -> Any:
        return function(*args, **kwargs, **options)

    model = next(leaf for leaf in jax.tree.leaves((args, kwargs)) if _is_explicit(leaf))
    sharding = jax.typeof(model).sharding

    def layout(out: jax.ShapeDtypeStruct) -> NamedSharding:
        spec = []
        for size, model_size, axes in zip(out.shape, model.shape, sharding.spec):
            if size != model_size:
                break
            spec.append(axes)
        return NamedSharding(sharding.mesh, PartitionSpec(*spec))

    bare = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            jnp.shape(leaf),
            jax.typeof(leaf).dtype,
            weak_type=jax.typeof(leaf).weak_type,
        ),
        (args, kwargs),
    )
    layouts = jax.tree.map(layout, jax.eval_shape(plain, *bare))
    return jax.sharding.auto_axes(plain, out_sharding=layouts)(args, kwargs)
