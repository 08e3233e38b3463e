"""How the work is cut up: small for the caches of CPUs, large for accelerators."""

import functools
from collections.abc import Callable
from typing import NamedTuple, TypeVar

from jax import lax

T = TypeVar("T")


class Cut(NamedTuple):
    """How the work is cut up; static.

    Attributes:
        tile: how many vectors a tile has a side.
        panel: how many numbers a panel of the distance matrix has, and a block of
            vectors.
        plain: whether reductions are one operation, which accelerators do in one
            kernel, and not in the forms that XLA vectorises on CPUs.
    """

    tile: int
    panel: int
    plain: bool

    def columns_at_once(self, pairs: int) -> int:
        """How many a plain reduction compares with so many pairs at a time.

        So that memory stays within bounds should XLA not fuse the two.
        """
        return max(1, 4 * self.panel // pairs)


# Products are efficient from a side of 512 on, and such a tile still fits into a cache.
CPU = Cut(512, 2**19, plain=False)
# Every tile is some twenty kernels, whatever its size. All temporaries together stay
# below 256 MiB: ``benchmarks/accelerators.py``.
ACCELERATOR = Cut(2048, 2**22, plain=True)


def by_platform(compute: Callable[[Cut], T], n: int) -> T:
    """What is computed of n vectors, cut up as is best where it runs.

    The platform is that of the arrays, and known when the program is lowered. What is
    one tile for all platforms is traced once.
    """
    if n <= CPU.tile:
        return compute(CPU)
    return lax.platform_dependent(
        cpu=functools.partial(compute, CPU),
        default=functools.partial(compute, ACCELERATOR),
    )
