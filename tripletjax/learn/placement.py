"""Where training has its arrays: on one device, or over a mesh of them."""

import contextlib
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from tripletjax.blockwise import AxisName

Tree = TypeVar("Tree")


class Placement:
    """Batches are split over all axes of a mesh, and everything else is everywhere.

    Args:
        mesh: the mesh, or None for one device.

    Attributes:
        axis_name: of the axes, None on one device.
        count: how many devices there are.
    """

    def __init__(self, mesh: Mesh | None):
        # Whatever its axes are, how models are laid out is left to the compiler.
        self.mesh = None if mesh is None else Mesh(mesh.devices, mesh.axis_names)
        self.axis_name: AxisName | None = None
        self.count = 1
        if self.mesh is not None:
            self.axis_name, self.count = self.mesh.axis_names, self.mesh.size

    def context(self) -> AbstractContextManager:
        """Within which functions of arrays over the mesh are called."""
        return (
            contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)
        )

    def everywhere(self, tree: Tree) -> Tree:
        """Arrays on every device."""
        if self.mesh is None:
            return tree
        return jax.device_put(tree, NamedSharding(self.mesh, PartitionSpec()))

    def split(self, batch: Any) -> Any:
        """A batch, each device with its own rows.

        Raises:
            ValueError: if the devices would have different numbers of rows.
        """
        if self.mesh is None:
            return batch
        n = len(batch)
        if n % self.count:
            raise ValueError(
                f"batches must split over {self.count} devices of the mesh, got one of "
                f"{n} rows."
            )
        rows = PartitionSpec(self.axis_name)
        return jax.device_put(batch, NamedSharding(self.mesh, rows))

    def here(self, tree: Tree) -> Tree:
        """Copies of arrays that are everywhere, on this process's first device."""

        def copy(x: Array) -> Array:
            return jnp.copy(x if self.mesh is None else x.addressable_data(0))

        return jax.tree.map(copy, tree)


def mesh_of(devices: str | None) -> Mesh | None:
    """A mesh of "all" devices, of as many as a number says, or None for one.

    Raises:
        ValueError: if it is neither, or there are not so many.
    """
    if devices is None:
        return None
    known = jax.devices()
    count = len(known) if devices == "all" else -1
    if devices.isdecimal():
        count = int(devices)
    if count < 1:
        raise ValueError(f"devices must be all or a number, got {devices!r}.")
    if count > len(known):
        raise ValueError(
            f"devices is {count}, but there are {len(known)} ({known[0].platform})."
        )
    return jax.make_mesh(
        (count,), ("data",), axis_types=(AxisType.Auto,), devices=known[:count]
    )
