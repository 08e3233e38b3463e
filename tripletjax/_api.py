"""The decorator of every public function.

A public function takes any array-like, is jitted, and runs on any mesh:

- lists, NumPy arrays and whatever else has ``__array__`` become arrays, in the byte
  order of the machine; an integer that this JAX configuration would silently wrap is an
  error;
- calls that mean the same use one program: defaults may be given or not, arguments by
  place or by name, real numbers in any type, labels in a narrow type, and functions may
  be made anew by the same code (`tripletjax._closures`);
- callables, flags and sizes are static and checked, everything else may be traced;
- only optional arguments, and those whose default is None, may be None;
- it is traced under JAX's default promotion of ranks and dtypes, even if the caller
  has set a stricter one;
- arrays on a mesh with Explicit axes are computed under Auto axes, so that the same
  code runs on either type of mesh.
"""

import functools
import inspect
import math
import operator
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from tripletjax._closures import canonical

P = ParamSpec("P")
R = TypeVar("R")
F = TypeVar("F", bound=Callable[..., Any])


# Arguments that become int32 if they are narrower.
LABELS = "labels", "reference_labels"

# The function that each public function jits.
UNJITTED: dict[Callable, Any] = {}


def own_promotion(function: Callable[P, R]) -> Callable[P, R]:
    """Traces a function under JAX's default promotion, whatever the caller has set.

    Rules of differentiation need it, too: they are traced when a caller asks for them.
    """

    @functools.wraps(function)
    def traced(*args: P.args, **kwargs: P.kwargs) -> R:
        with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
            return function(*args, **kwargs)

    return traced


def jitted(
    *,
    callables: tuple[str, ...] = (),
    flags: tuple[str, ...] = (),
    sizes: tuple[str, ...] = (),
    static: tuple[str, ...] = (),
    nonnegative: tuple[str, ...] = (),
    positive: tuple[str, ...] = (),
    finite: tuple[str, ...] = (),
    optional: tuple[str, ...] = (),
    keep_dtypes: bool = False,
    check: Callable[..., None] | None = None,
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Jit a function, mesh-agnostic and strict about its arguments.

    Within other jitted functions, `unjitted` calls the function itself.

    Args:
        callables: options that are static and must be callable.
        flags: options that are static and must be booleans.
        sizes: options that are static and must be integers.
        static: other static options. All static options are keyword-only.
        nonnegative: numeric options that may be traced; when their value is known
            they must be finite and at least 0.
        positive: the same for options that must be above 0.
        finite: the same for options of any sign.
        optional: arguments that may be None; those whose default is None may, too.
        keep_dtypes: whether labels stay int8 or int16, which results then have.
        check: raises for arguments whose values are known and wrong.

    Returns:
        A decorator.
    """
    converters: dict[str, Callable[[str, Any], Any]] = {}
    converters.update(dict.fromkeys(callables, _as_callable))
    converters.update(dict.fromkeys(flags, _as_flag))
    converters.update(dict.fromkeys(sizes, as_integer))
    converters.update(dict.fromkeys(static, lambda name, value: canonical(value)))
    statics = tuple(converters)
    converters.update(dict.fromkeys(nonnegative, _as_nonnegative))
    converters.update(dict.fromkeys(positive, _as_positive))
    converters.update(dict.fromkeys(finite, _as_finite))

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        arguments = _Arguments.of(
            function, converters, statics, optional, keep_dtypes=keep_dtypes
        )
        unjitted = own_promotion(function)
        run = jax.jit(unjitted, static_argnames=statics)
        run_explicit = jax.jit(
            functools.partial(_under_auto_axes, unjitted, statics),
            static_argnames=statics,
        )

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            given = arguments.match(args, kwargs)
            if given is None:
                return run(*args, **kwargs)  # Python raises the TypeError.
            placed, named, explicit = arguments.convert(given)
            if check is not None:
                check(*args, **kwargs)
            chosen: Any = run_explicit if explicit else run
            return chosen(*placed, **named)

        # Attributes of its own would be copied to whatever JAX wraps around it, and
        # `lower` there would lower this.
        UNJITTED[call] = unjitted
        return call

    return decorate


class _Arguments(NamedTuple):
    """The arguments of a function, and their conversion.

    Attributes:
        function: name of the function.
        converters: for each argument, a function from name and value to the value.
        by_place: names of the arguments that may be given by place.
        statics: names of the static arguments.
        nullable: names of the arguments that may be None.
        defaults: values of the arguments that have a default.
    """

    function: str
    converters: dict[str, Callable[[str, Any], Any]]
    by_place: tuple[str, ...]
    statics: tuple[str, ...]
    nullable: frozenset[str]
    defaults: dict[str, Any]

    @classmethod
    def of(
        cls,
        function: Any,
        converters: dict[str, Callable[[str, Any], Any]],
        statics: tuple[str, ...],
        optional: tuple[str, ...],
        *,
        keep_dtypes: bool,
    ) -> "_Arguments":
        parameters = inspect.signature(function).parameters
        if wrong := {*converters, *optional} - set(parameters):
            raise TypeError(f"{function.__name__} has no {', '.join(sorted(wrong))}.")
        all_converters = dict.fromkeys(parameters, as_arrays) | converters
        if not keep_dtypes:
            all_converters |= {n: _as_labels for n in LABELS if n in parameters}
        return cls(
            function.__name__,
            all_converters,
            tuple(n for n, p in parameters.items() if p.kind is not p.KEYWORD_ONLY),
            statics,
            frozenset({n for n, p in parameters.items() if p.default is None})
            | {*optional},
            {n: p.default for n, p in parameters.items() if p.default is not p.empty},
        )

    def match(self, args: tuple, kwargs: dict) -> dict[str, Any] | None:
        """The given arguments by name; None if Python has to raise an error.

        Raises:
            TypeError: if an argument is unknown.
        """
        given = dict(zip(self.by_place, args))
        if unknown := kwargs.keys() - self.converters.keys():
            raise TypeError(
                f"{self.function}() got an unexpected keyword argument "
                f"{min(unknown)!r}; it has {', '.join(self.converters)}."
            )
        if len(args) > len(self.by_place) or given.keys() & kwargs.keys():
            return None
        given |= kwargs
        missing = self.converters.keys() - self.defaults.keys() - given.keys()
        return None if missing else given

    def convert(self, given: dict[str, Any]) -> tuple[list, dict, bool]:
        """Convert the arguments of a call.

        Returns:
            Arguments by place, arguments by name, and whether an array lies on a mesh
            with Explicit axes.

        Raises:
            TypeError: if an argument must not be None.
        """
        ready = self.defaults | given
        explicit = False
        for name, value in given.items():
            if value is None and name in self.nullable:
                continue
            if value is None:
                raise TypeError(f"{name} must be given, got None.")
            ready[name] = value = self.converters[name](name, value)
            if not explicit and name not in self.statics:
                explicit = _has_explicit(value)
        placed = [ready.pop(name) for name in self.by_place]
        return placed, ready, explicit


def unjitted(function: F) -> F:
    """A `jitted` function itself, for calls within other jitted functions."""
    return UNJITTED[function]


def as_integer(name: str, value: Any) -> int:
    """Check a size, of any integer type but bool."""
    try:
        if isinstance(value, bool | np.bool_):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}.") from None


def _as_callable(name: str, value: Any) -> Any:
    if not callable(value):
        raise TypeError(f"{name} must be callable, got {value!r}.")
    return canonical(value)


def _as_flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be a bool, got {value!r}.")
    return bool(value)


def _as_nonnegative(name: str, value: Any) -> Any:
    check_nonnegative(name, value)
    return value if isinstance(value, jax.Array) else float(value)


def _as_positive(name: str, value: Any) -> Any:
    check_positive(name, value)
    return value if isinstance(value, jax.Array) else float(value)


def _as_finite(name: str, value: Any) -> Any:
    check_finite(name, value)
    return value if isinstance(value, jax.Array) else float(value)


def _as_labels(name: str, value: Any) -> Any:
    value = as_arrays(name, value)
    narrow = isinstance(value, np.ndarray | jax.Array) and value.dtype.kind in "iu"
    return value.astype(np.int32) if narrow and value.dtype.itemsize < 4 else value


def as_arrays(name: str, tree: Any) -> Any:
    """An argument, or each part of it, as arrays; arrays of JAX stay as they are."""
    if isinstance(tree, jax.Array) or _is_record(tree):
        return tree
    is_list = lambda node: type(node) in (list, tuple)  # noqa: E731
    return jax.tree.map(functools.partial(_array, name), tree, is_leaf=is_list)


def _is_record(tree: Any) -> bool:
    """Whether a value is a named tuple of arrays, such as triplets."""
    return (
        isinstance(tree, tuple)
        and type(tree) is not tuple
        and all(isinstance(x, jax.Array) for x in tree)
    )


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
        hint = ""
        if "labels" in name:
            hint = " np.unique(x, return_inverse=True)[1] turns names into integers."
        raise TypeError(f"{name} must be numeric, got dtype {leaf.dtype}.{hint}")
    if not leaf.dtype.isnative:
        leaf = leaf.astype(leaf.dtype.newbyteorder("="))
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


def check_real(name: str, value: Any) -> None:
    """Raise for a number or an array, which may be traced, of another type."""
    dtype = value.dtype if isinstance(value, jax.Array) else np.asarray(value).dtype
    if dtype.kind not in "fiu" and dtype != jnp.bfloat16:
        raise TypeError(f"{name} must be a real number, got {value!r}.")


def known_scalar(name: str, value: Any) -> Any:
    """A checked real scalar, or None if the value is traced."""
    if isinstance(value, jax.core.Tracer):
        return None
    number = np.asarray(value)
    check_real(name, number)
    if number.ndim:
        raise ValueError(
            f"{name} must be a scalar, got shape {number.shape}; use jax.vmap to sweep "
            "over several."
        )
    return number


def check_finite(name: str, value: Any) -> None:
    """Raise for a scalar that is not traced, and NaN or infinite."""
    number = known_scalar(name, value)
    if number is not None and not math.isfinite(number):
        raise ValueError(f"{name} must be finite, got {value!r}.")


def check_nonnegative(name: str, value: Any) -> None:
    """Raise for a scalar that is not traced, and not finite or negative."""
    number = known_scalar(name, value)
    if number is not None and (not math.isfinite(number) or number < 0):
        raise ValueError(f"{name} must be finite and not negative, got {value!r}.")


def check_positive(name: str, value: Any) -> None:
    """Raises for a value that is not traced, and not finite or not above 0."""
    check_nonnegative(name, value)
    if not isinstance(value, jax.core.Tracer) and not np.asarray(value) > 0:
        raise ValueError(f"{name} must be above 0, got {value!r}.")


def _has_explicit(tree: Any) -> bool:
    """Whether an array lies on a mesh with Explicit axes."""
    if isinstance(tree, np.ndarray | float | int):
        return False
    if isinstance(tree, jax.Array):
        return _is_explicit(tree)
    return any(map(_is_explicit, tree if _is_record(tree) else jax.tree.leaves(tree)))


def _is_explicit(leaf: Any) -> bool:
    tracer = isinstance(leaf, jax.core.Tracer)
    if not tracer and isinstance(
        getattr(leaf, "sharding", None), jax.sharding.SingleDeviceSharding
    ):
        # The most common case, without the cost of a type.
        return False
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
    on_auto_axes: Callable = jax.sharding.auto_axes(plain, out_sharding=layouts)
    return on_auto_axes(args, kwargs)
