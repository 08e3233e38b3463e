"""Where training has its arrays: on one device, or over a mesh of them."""

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
from tripletjax.learn.distributed.keys import from_plain, plain

Tree = TypeVar("Tree")
Made = TypeVar("Made")


class Placement:
    """Batches are split over all axes of a mesh, and everything else is everywhere.

    Args:
        mesh: the mesh, or None for one device.

    Attributes:
        axis_name: of the axes, None on one device.
        count: how many devices there are.
        processes: how many processes these are of.
        process: which of them this is.

    Raises:
        ValueError: if devices of some processes are missing.
    """

    def __init__(self, mesh: Mesh | None):
        # Whatever its axes are, how models are laid out is left to the compiler.
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
                    "processes: it must have some of all, or of one."
                )

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and tells."""
        return self.process == 0

    @property
    def shard(self) -> tuple[int, int]:
        """Which part of every batch this process makes, of how many."""
        return self.process, self.processes

    def of_first(self, make: Callable[[], Made]) -> Made:
        """What the first process makes, in all of them; the others wait for it."""
        return make() if self.processes == 1 else processes.of_first(make)

    def in_turn(self, make: Callable[[], Made]) -> Made:
        """What every process makes for itself, the others after the first."""
        made: list[Made] = []
        self.of_first(lambda: made.append(make()))
        return made[0] if made else make()

    def any_of(self, flag: bool) -> bool:
        """Whether any process says so."""
        return flag if self.processes == 1 else processes.any_of(flag)

    def context(self) -> AbstractContextManager:
        """Within which functions of arrays over the mesh are called."""
        return (
            contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)
        )

    @property
    def sharding(self) -> Sharding:
        """Of arrays that are everywhere."""
        if self.mesh is None:
            return SingleDeviceSharding(jax.local_devices()[0])
        return NamedSharding(self.mesh, PartitionSpec())

    def everywhere(self, tree: Tree) -> Tree:
        """Arrays of the first process, on every device."""
        if self.mesh is None:
            return tree
        if self.processes > 1:
            arrays = multihost_utils.broadcast_one_to_all(plain(tree))
            tree = from_plain(arrays, tree)
        return jax.device_put(tree, self.sharding)

    def split(self, batch: Any) -> Any:
        """A batch, each device with its own rows; of several processes, of each part.

        Raises:
            ValueError: if the devices would have different numbers of rows.
        """
        if self.mesh is None:
            return batch
        n = len(batch) * self.processes
        if n % self.count:
            raise ValueError(
                f"batches must split over {self.count} devices of the mesh, got one of "
                f"{n} rows."
            )
        rows = PartitionSpec(self.axis_name)
        sharding = NamedSharding(self.mesh, rows)
        if self.processes == 1:
            return jax.device_put(batch, sharding)
        return jax.make_array_from_process_local_data(sharding, np.asarray(batch))

    def paced(self, tree: Tree) -> Tree:
        """Arrays that are made on the way, waited for where that is needed.

        XLA (jaxlib 0.10 to 0.12) has at most 32 programs under way on a CPU device.
        Where one process simulates several devices, later programs can take all of
        these places on one, while an earlier one waits there for a place and on another
        for its like: forever.
        """
        if self.mesh is None:
            return tree
        here = self.mesh.local_devices
        if len(here) > 1 and here[0].platform == "cpu":
            jax.block_until_ready(tree)
        return tree

    def here(self, tree: Tree) -> Tree:
        """Arrays that are everywhere, on this process's first device."""
        if self.mesh is None:
            return tree
        return jax.tree.map(lambda x: x.addressable_data(0), tree)


ONE_DEVICE = Placement(None)


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
