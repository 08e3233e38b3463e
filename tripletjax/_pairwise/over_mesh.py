"""Functions that split their work over the devices of a mesh, called from outside it.

Inside `jax.shard_map` a function with `axis_name` treats its own device's rows as
anchors. This does the mapping, where the caller has only said how arrays are laid out.
"""

import contextlib
import functools
import math
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from tripletjax._api import UNJITTED, as_arrays, check_nonnegative, own_promotion
from tripletjax._closures import canonical
from tripletjax._pairwise.mesh import AxisName, names_of
from tripletjax.pairs import PairMasks

P = ParamSpec("P")
R = TypeVar("R")

# Arguments with a row for each anchor, and for each reference.
ANCHOR_ROWS = "embeddings", "labels", "positions", "where"
REFERENCE_ROWS = "references", "reference_labels", "reference_where"
ROWS = *ANCHOR_ROWS, *REFERENCE_ROWS
# Arrays that every device has whole.
WHOLE = "margin", "relative_margin", "key"

# A function from a device's result and the index of its first row to the part that is
# concatenated over the devices.
OfDevice = Callable[[Any, Array], Any]
# Names of arguments, and for each a function that raises for wrong values.
Parameters = dict[str, Callable[[str, Any], Any]]
# A function from the concatenated parts, the number of rows and the options to the
# result.
Together = Callable[[Any, int, dict[str, Any]], Any]


def without_padding(result: Any, n: int, options: dict[str, Any]) -> Any:
    """A `Together` that keeps the rows of the n anchors, without padding."""
    return jax.tree.map(lambda x: x[:n], result)


def over_mesh(
    *,
    of_device: OfDevice | None = None,
    together: Together | None = None,
    suits: Callable[[dict[str, Any]], bool] | None = None,
    nonnegative: tuple[str, ...] = ("margin",),
    parameters: Parameters | None = None,
    of_anchors: tuple[str, ...] = (),
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Split the work of a function with `axis_name` over a mesh, wherever it can.

    Inside shard_map it is called as it is. Outside, it is mapped over `axis_name` if
    there is a mesh with these axes, and over the axes along which the rows of the
    embeddings lie if these are Explicit.

    Args:
        of_device, together: the functions that put results of the devices together. If
            not given, all devices have the same result.
        suits: a function of the arguments that returns whether to split work on
            Explicit axes. If not given, it is always split.
        nonnegative: numeric options that must be finite and at least 0.
        parameters: arguments that every device has whole, with the check of each, in
            place of `WHOLE` and `nonnegative`.
        of_anchors: those of the parameters that may have a row for each anchor.
    """
    checks: dict[str, Any] = dict.fromkeys(WHOLE) | dict.fromkeys(
        nonnegative, check_nonnegative
    )
    if parameters is not None:
        checks = parameters

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        of: Any = function

        @functools.partial(jax.jit, static_argnames=("mesh", "options"))
        @own_promotion
        def mapped(arrays: dict[str, Any], *, mesh: Any, options: tuple) -> Any:
            rows = tuple(name for name in of_anchors if jnp.ndim(arrays.get(name, 0)))
            anchor_rows = *ANCHOR_ROWS, *rows
            settings = dict(options)
            return _mapped(of, arrays, anchor_rows, mesh, settings, of_device, together)

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            options = dict(zip(ANCHOR_ROWS, args)) | kwargs
            if len(args) > 2 or (split := _mesh_of(options, suits)) is None:
                return function(*args, **kwargs)
            mesh, axis_name = split
            options["axis_name"] = axis_name
            names = (*ROWS, *checks)
            arrays = {name: options.pop(name) for name in names if name in options}
            for name in checks.keys() & arrays.keys():
                if (check := checks[name]) is not None and arrays[name] is not None:
                    check(name, arrays[name])
            arrays = {
                name: jax.tree.map(jnp.asarray, as_arrays(name, x))
                for name, x in arrays.items()
                if x is not None
            }
            options = {name: canonical(value) for name, value in options.items()}
            return mapped(arrays, mesh=mesh, options=tuple(sorted(options.items())))

        UNJITTED[call] = UNJITTED[function]
        return call

    return decorate


def _mapped(
    function: Callable[..., Any],
    arrays: dict[str, Any],
    anchor_rows: tuple[str, ...],
    mesh: Any,
    options: dict[str, Any],
    of_device: OfDevice | None,
    together: Together | None,
) -> Any:
    """The result of a function mapped over `axis_name` of its options."""
    axis_name = options["axis_name"]
    split, same = PartitionSpec(axis_name), PartitionSpec()
    n = len(arrays["embeddings"])
    devices = math.prod(mesh.shape[name] for name in names_of(axis_name))
    arrays = _divisible(arrays, anchor_rows, devices)
    rows = *anchor_rows, *REFERENCE_ROWS
    specs = {
        name: jax.tree.map(lambda _, s=split if name in rows else same: s, x)
        for name, x in arrays.items()
    }
    explicit = AxisType.Explicit in mesh.axis_types

    def laid_out(x: Array, spec: PartitionSpec) -> Array:
        if not explicit:
            return x
        return jax.sharding.reshard(x, NamedSharding(mesh, spec))

    def local(arrays: dict[str, Any]) -> Any:
        out = function(**arrays, **options)
        if of_device is None:
            return out
        first = lax.axis_index(axis_name) * len(arrays["embeddings"])
        return of_device(out, first)

    out = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(specs,),
        out_specs=same if of_device is None else split,
    )(jax.tree.map(laid_out, arrays, specs))
    if together is None:
        return out
    out = together(jax.tree.map(lambda x: laid_out(x, same), out), n, options)
    # Results with as many rows as the embeddings lie as the embeddings do.
    alike = lambda x: jnp.shape(x)[:1] == (n,) and n % devices == 0  # noqa: E731
    return jax.tree.map(lambda x: laid_out(x, split) if alike(x) else x, out)


def _mesh_of(
    options: dict[str, Any], suits: Callable[[dict[str, Any]], bool] | None
) -> tuple[Any, AxisName] | None:
    """The mesh and the axes over which a call is mapped; None if it is not."""
    x: Any = options.get("embeddings")
    axis_name = options.get("axis_name")
    if axis_name is not None:
        with contextlib.suppress(NameError):
            lax.axis_size(names_of(axis_name))
            return None
        mesh: Any = jax.sharding.get_abstract_mesh()
        if mesh.empty and not isinstance(x, jax.core.Tracer):
            mesh = getattr(getattr(x, "sharding", None), "mesh", mesh)
        if not {*names_of(axis_name)} <= {*mesh.axis_names}:
            return None
        if jnp.ndim(x) != 2:
            raise ValueError(
                "embeddings must be [n, d] for axis_name outside jax.shard_map, got "
                f"shape {jnp.shape(x)}."
            )
        return mesh, axis_name
    if not isinstance(x, jax.Array) or x.ndim != 2:
        return None
    if isinstance(getattr(x, "sharding", None), jax.sharding.SingleDeviceSharding):
        # The most common case, without the cost of a type.
        return None
    sharding = jax.typeof(x).sharding
    axes = sharding.spec[0] if sharding.spec else None
    if not axes or {*sharding.mesh.axis_types} != {AxisType.Explicit}:
        return None
    if suits is not None and not suits(options):
        return None
    return sharding.mesh, axes


def _divisible(
    arrays: dict[str, Any], anchor_rows: tuple[str, ...], devices: int
) -> dict[str, Any]:
    """Arrays with padding, so that every device gets as many rows."""
    arrays = dict(arrays)
    for rows, where in ((anchor_rows, "where"), (REFERENCE_ROWS, "reference_where")):
        if rows[0] not in arrays:
            continue
        n = len(arrays[rows[0]])
        for name in rows:
            for x in jax.tree.leaves(arrays.get(name)):
                if x.ndim < 1 or len(x) != n:
                    raise ValueError(
                        f"{name} must have one row for each of the {n} {rows[0]}, got "
                        f"shape {x.shape}."
                    )
        missing = -n % devices
        if not missing:
            continue
        if isinstance(arrays["labels"], PairMasks):
            raise ValueError(
                f"the {n} {rows[0]} cannot be split over {devices} devices where "
                f"labels are PairMasks: pad them and the masks, with {where}."
            )
        arrays.setdefault(where, jnp.ones(n, bool))
        for name in rows:
            if name in arrays:
                x = arrays[name]
                arrays[name] = jnp.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1))
    return arrays
