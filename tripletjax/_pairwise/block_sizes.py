"""Tile and panel sizes of each platform: caches of CPUs, kernels of accelerators."""

import functools
from collections.abc import Callable
from typing import NamedTuple, TypeVar

from jax import lax

T = TypeVar("T")


class BlockSizes(NamedTuple):
    """Tile and panel sizes; static.

    Attributes:
        tile: vectors on each side of a tile.
        panel: numbers in a panel of the distance matrix, and in a block of vectors.
        plain: whether a reduction is one operation, which accelerators run as one
            kernel. Otherwise it takes the form that XLA vectorises on CPUs.
    """

    tile: int
    panel: int
    plain: bool

    def columns_at_once(self, pairs: int) -> int:
        """The number of columns that a plain reduction compares with `pairs` at a time.

        It bounds the memory of a comparison that XLA does not fuse with its reduction.
        """
        return max(1, 4 * self.panel // pairs)


# Products are efficient from a side of 512 on, and such a tile still fits into a cache.
CPU = BlockSizes(512, 2**19, plain=False)
# A tile takes some twenty kernels, whatever its size. All temporaries together stay
# below 256 MiB: ``benchmarks/accelerators.py``.
ACCELERATOR = BlockSizes(2048, 2**22, plain=True)


def by_platform(compute: Callable[[BlockSizes], T], n: int) -> T:
    """Compute with the sizes of the platform on which the program will run.

    The platform is known when the program is lowered. A problem of one tile takes the
    sizes for CPUs everywhere, so that it is traced once.

    Args:
        compute: a function of the sizes.
        n: the number of vectors.
    """
    if n <= CPU.tile:
        return compute(CPU)
    return lax.platform_dependent(
        cpu=functools.partial(compute, CPU),
        default=functools.partial(compute, ACCELERATOR),
    )
