"""Placement of arrays in training: on one device, or over a mesh of devices."""

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import (
    AxisType,
    Mesh,
    NamedSharding,
    PartitionSpec,
    Sharding,
    SingleDeviceSharding,
)

from tripletjax.blockwise import AxisName
from tripletjax.learn.distributed import processes
from tripletjax.learn.distributed.keys import arrays_of, with_arrays

Tree = TypeVar("Tree")
Result = TypeVar("Result")


class Placement:
    """Batches split over all axes of a mesh, and all other arrays on every device.

    Args:
        mesh: the mesh, or None for one device.

    Attributes:
        axis_name: of the axes; None on one device.
        count: number of devices.
        processes: number of processes that they belong to.
        process: number of this process.

    Raises:
        ValueError: if devices of some processes are missing.
    """

    def __init__(self, mesh: Mesh | None):
        # The compiler lays out models, whatever the types of the given axes.
        self.mesh = None if mesh is None else Mesh(mesh.devices, mesh.axis_names)
        self.axis_name: AxisName | None = None
        self.count = 1
        if self.mesh is not None:
            self.axis_name, self.count = self.mesh.axis_names, self.mesh.size
        devices = [] if self.mesh is None else self.mesh.devices.flat
        of = {device.process_index for device in devices}
        self.processes, self.process = max(1, len(of)), 0
        if self.processes > 1:
            self.process = jax.process_index()
            if self.processes != jax.process_count():
                raise ValueError(
                    f"mesh has devices of {self.processes} of {jax.process_count()} "
                    "processes; it must have devices of all processes, or of one."
                )

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.process == 0

    @property
    def shard(self) -> tuple[int, int]:
        """The part of every batch that this process makes, and the number of parts."""
        return self.process, self.processes

    def of_first(self, make: Callable[[], Result]) -> Result:
        """Call a function in the first process, and return its result in all."""
        return make() if self.processes == 1 else processes.of_first(make)

    def in_turn(self, make: Callable[[], Result]) -> Result:
        """Call a function in every process, in the first one before the others."""
        results: list[Result] = []
        self.of_first(lambda: results.append(make()))
        return results[0] if results else make()

    def any_of(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        return flag if self.processes == 1 else processes.any_of(flag)

    def context(self) -> AbstractContextManager:
        """Context for calls of functions of arrays over the mesh."""
        return (
            contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)
        )

    @property
    def sharding(self) -> Sharding:
        """Sharding of arrays that are on every device."""
        if self.mesh is None:
            return SingleDeviceSharding(jax.local_devices()[0])
        return NamedSharding(self.mesh, PartitionSpec())

    def everywhere(self, tree: Tree) -> Tree:
        """Copy the arrays of the first process to every device."""
        if self.mesh is None:
            return tree
        if self.processes > 1:
            arrays = multihost_utils.broadcast_one_to_all(arrays_of(tree))
            tree = with_arrays(tree, arrays)
        return jax.device_put(tree, self.sharding)

    def split(self, batch: Any) -> Any:
        """Split the rows of a batch, or of the parts of all processes, over devices.

        Raises:
            ValueError: if the devices would have different numbers of rows.
        """
        if self.mesh is None:
            return batch
        n = len(jax.tree.leaves(batch)[0]) * self.processes
        if n % self.count:
            raise ValueError(
                f"batches must split over {self.count} devices of the mesh, got one of "
                f"{n} rows."
            )
        rows = PartitionSpec(self.axis_name)
        sharding = NamedSharding(self.mesh, rows)
        if self.processes == 1:
            return jax.device_put(batch, sharding)
        return jax.tree.map(
            lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)),
            batch,
        )

    def paced(self, tree: Tree) -> Tree:
        """Wait for arrays in computation where several CPU devices are simulated.

        XLA (jaxlib 0.10 to 0.12) runs at most 32 programs at a time on a CPU device. If
        one process simulates several devices, later programs can take all places on
        one device, while an earlier program waits for a place there. The training would
        wait for ever.
        """
        if self.mesh is None:
            return tree
        here = self.mesh.local_devices
        if len(here) > 1 and here[0].platform == "cpu":
            jax.block_until_ready(tree)
        return tree

    def here(self, tree: Tree) -> Tree:
        """Return the copy on this process's first device."""
        if self.mesh is None:
            return tree
        return jax.tree.map(lambda x: x.addressable_data(0), tree)


ONE_DEVICE = Placement(None)


def mesh_of(devices: str | None) -> Mesh | None:
    """Make a mesh of "all" devices, or of a number of them; None stands for one.

    Raises:
        ValueError: if devices is neither, or more than there are.
    """
    if devices is None:
        return None
    known = jax.devices()
    count = len(known) if devices == "all" else -1
    if devices.isdecimal():
        count = int(devices)
    if count < 1:
        raise ValueError(f"devices must be all or at least 1, got {devices}.")
    if count > len(known):
        raise ValueError(
            f"devices must be at most {len(known)}, the number of devices "
            f"({known[0].platform}), got {count}."
        )
    return jax.make_mesh(
        (count,), ("data",), axis_types=(AxisType.Auto,), devices=known[:count]
    )
