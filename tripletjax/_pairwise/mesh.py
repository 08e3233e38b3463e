"""Gathering the parts of a batch that is split over the devices of a mesh."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

AxisName = str | tuple[str, ...]


def names_of(axis_name: AxisName) -> tuple[str, ...]:
    names = (axis_name,) if isinstance(axis_name, str) else axis_name
    if not isinstance(names, tuple) or not all(isinstance(x, str) for x in names):
        raise TypeError(
            f"axis_name must be a string or a tuple of strings, got {axis_name!r}."
        )
    return names


def check_split(x: Array, axis_name: AxisName, *, what: str = "embeddings") -> None:
    """Check that every device along some mesh axes has its own rows.

    Raises:
        ValueError: if there are no such axes here, or all devices have the same.
    """
    try:
        index = lax.axis_index(names_of(axis_name))
    except NameError:
        raise ValueError(
            f"axis_name is {axis_name!r}, but no such mesh axis is mapped over here: "
            "call it inside jax.shard_map, or under jax.set_mesh with a mesh that has "
            "the axis."
        ) from None
    if missing := (_varying_axes(index) - _varying_axes(x)) & {*names_of(axis_name)}:
        raise ValueError(
            f"axis_name is {axis_name!r}, but {what} are the same on every device "
            f"along {', '.join(sorted(missing))}: in_specs must split their rows over "
            "it."
        )


def _varying_axes(x: Array) -> frozenset[str]:
    """The mesh axes along which an array differs between devices.

    Without check_vma of shard_map there are none.
    """
    axis_type = getattr(jax.typeof(x), "manual_axis_type", None)
    return frozenset() if axis_type is None else axis_type.varying


def vary(state: Any, axis_name: AxisName) -> Any:
    """Arrays that JAX takes to differ between devices, as a loop has to carry them."""
    names = names_of(axis_name)
    return jax.tree.map(lambda x: lax.pcast(x, names, to="varying"), state)


def vary_alike(*arrays: Array) -> list[Array]:
    """Arrays that vary along the same mesh axes: those of any of them.

    The gradients of an array that was the same on all devices are summed over them.
    """
    axes = frozenset().union(*map(_varying_axes, arrays))
    missing = [tuple(sorted(axes - _varying_axes(x))) for x in arrays]
    return [vary(x, names) if names else x for x, names in zip(arrays, missing)]


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def gather_rows(x: Array, axis_name: AxisName, axis: int) -> Array:
    """The parts of all devices, in order of the devices, on every device.

    On the way back, every part's gradients come from all devices and are added up. On
    CPUs they are not by the reduce-scatter that is all-gather's own transpose: between
    processes, that of jax 0.10.2 gives wrong sums from some 8 MiB a part on (gloo, jax
    issue 40830).
    """
    return lax.all_gather(x, axis_name, axis=axis, tiled=True)


@gather_rows.defjvp
def _gather_rows_jvp(
    axis_name: AxisName, axis: int, primals: tuple, tangents: tuple
) -> tuple[Array, Array]:
    tangent = lax.platform_dependent(
        *tangents,
        cpu=lambda x: _exchange_rows(x, axis_name, axis),
        default=lambda x: lax.all_gather(x, axis_name, axis=axis, tiled=True),
    )
    return gather_rows(*primals, axis_name, axis), tangent


def _exchange_rows(x: Array, axis_name: AxisName, axis: int) -> Array:
    """The same as `gather_rows`; its transpose is an all-to-all and a sum."""
    devices = lax.axis_size(axis_name)
    copies = jnp.broadcast_to(x, (devices, *x.shape))
    parts = jnp.moveaxis(lax.all_to_all(copies, axis_name, 0, 0), 0, axis)
    return parts.reshape(*x.shape[:axis], -1, *x.shape[axis + 1 :])


def gather_terms(terms: Any, axis_name: AxisName) -> Any:
    """The parts of all devices of arrays ``[n, ...]``, the same on every device.

    They are sums of parts among zeros. JAX knows that a sum is the same on all devices,
    and does not know it of a gathered array.
    """

    def gather(x: Array) -> Array:
        if x.dtype == bool:
            return gather(x.astype(jnp.int32)) > 0
        n = len(x)
        shape = (n * lax.axis_size(axis_name), *x.shape[1:])
        parts = jnp.zeros(shape, x.dtype) + jnp.zeros_like(x[:1])
        start = lax.axis_index(axis_name) * n
        parts = lax.dynamic_update_slice_in_dim(parts, x, start, axis=0)
        return lax.psum(parts, axis_name)

    return jax.tree.map(gather, terms)
