"""Blocks of rows, and loops over them that XLA keeps fast on CPUs.

What only works around a habit of XLA stands here and in `_engine.reductions`, once,
with the benchmark that shows whether it is still needed. All were seen with XLA of jax
0.10.2.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from tripletjax._pairwise.block_sizes import BlockSizes

# The number of columns that one loop over another array compares with it.
RUN = 32


# A row number, traced or not.
Index = Array | int


def rows_at(x: Array, start: Index, size: int) -> Array:
    return lax.dynamic_slice_in_dim(x, start, size)


def add_rows(x: Array, start: Index, rows: Array) -> Array:
    old = lax.dynamic_slice_in_dim(x, start, len(rows))
    return lax.dynamic_update_slice_in_dim(x, old + rows, start, axis=0)


def materialize(x: Any) -> Any:
    """Arrays that XLA stores in memory, and does not compute again for each use.

    Works around XLA, which fuses even a dynamic slice into every loop over a tile that
    reads it; the loop then does not vectorise. ``benchmarks/in_batch.py``, batch-all at
    n = 1024: 3.3 times the bare product, 7 without.
    """
    return lax.optimization_barrier(x)


class Blocks(NamedTuple):
    """Blocks of equal size that cover n rows. The last may overlap the one before."""

    n: int
    size: int

    @classmethod
    def of(cls, n: int, size: int) -> "Blocks":
        return cls(n, max(1, min(size, n)))

    @classmethod
    def even(cls, n: int, most: int) -> "Blocks":
        """The fewest blocks of at most `most` rows, with little overlap."""
        size = -(-n // -(-n // most))
        return cls.of(n, min(most, size + -size % 128))

    @property
    def count(self) -> int:  # pyrefly: ignore[bad-override]: no tuple is counted
        return -(-self.n // self.size)

    def start(self, block: Index) -> Array:
        return jnp.minimum(block * self.size, self.n - self.size)

    def fresh(self, block: Index) -> Array:
        """The rows that no earlier block had, bool ``[size]``."""
        return self.start(block) + jnp.arange(self.size) >= block * self.size


def products_with(a: Array, y: Array, offset: Array, panel: int) -> Array:
    """The products ``[rows, m]`` of vectors `a` with vectors `y` less an offset.

    Blocks of `y` have at most `panel` numbers.
    """
    blocks = Blocks.of(len(y), panel // y.shape[1])

    def step(block: Array, products: Array) -> Array:
        start = blocks.start(block)
        b = rows_at(y, start, blocks.size) - offset
        some = jnp.matmul(a, b.T, precision="highest")
        return lax.dynamic_update_slice_in_dim(products, some, start, axis=1)

    none = jnp.zeros((len(a), len(y)), a.dtype) + jnp.zeros_like(a[0, 0])
    return lax.fori_loop(0, blocks.count, step, none)


def fetch_ahead(
    count: Index,
    slice_at: Callable[[Index], Any],
    visit: Callable[[Array, Any, Any], Any],
    state: Any,
) -> Any:
    """``state = visit(i, slice_at(i), state)`` for all i below a count.

    Works around XLA, as `materialize` does where that is not enough: it fuses slices
    with what is done to them, but not what a loop carries, so it slices one step
    ahead. ``benchmarks/in_batch.py``, batch-all at n = 4096: 1.5 times the bare
    product, 2.2 without. `slice_at` is called with the count, too.
    """

    def step(i: Array, loop: tuple) -> tuple:
        part, state = loop
        return slice_at(i + 1), visit(i, part, state)

    return lax.fori_loop(0, count, step, (slice_at(0), state))[1]


def sum_over_columns(
    columns: list[Array], visit: Callable[..., tuple[Array, ...]], sizes: BlockSizes
) -> tuple[Array, ...]:
    """The sums of ``visit(*column)`` over columns ``[rows, 1]`` of ``[rows, m]``.

    Accelerators take plain reductions. These are several times slower on CPUs, which
    take `for_each_run`.
    """

    def of_column(*column: Array) -> tuple[Array, ...]:
        return visit(*(x[:, None] for x in column))

    none = tuple(map(jnp.zeros_like, of_column(*(x[:, 0] for x in columns))))
    if not sizes.plain:

        def add(_: Array, runs: list[Array], sums: tuple[Array, ...]) -> tuple:
            for column in zip(*runs):
                sums = tuple(map(jnp.add, sums, of_column(*column)))
            return sums

        return for_each_run(columns, add, none)

    blocks = Blocks.of(columns[0].shape[1], sizes.columns_at_once(none[0].size))

    def add_some(block: Array, sums: tuple[Array, ...]) -> tuple[Array, ...]:
        start, fresh = blocks.start(block), blocks.fresh(block)
        some = [
            lax.dynamic_slice_in_dim(x, start, blocks.size, axis=1) for x in columns
        ]
        parts = jax.vmap(of_column, in_axes=1, out_axes=-1)(*some)
        return tuple(
            old + jnp.sum(jnp.where(fresh, x, 0), axis=-1, dtype=x.dtype)
            for old, x in zip(sums, parts)
        )

    return lax.fori_loop(0, blocks.count, add_some, none)


def for_each_run(columns: list[Array], visit: Callable, state: Any) -> Any:
    """``visit(step, runs, state)`` for runs ``[RUN, rows]`` of columns ``[rows, m]``.

    The number of columns is a multiple of `RUN`.
    """

    def slice_at(step: Index) -> list[Array]:
        return [lax.dynamic_slice_in_dim(x, step * RUN, RUN, axis=1).T for x in columns]

    return fetch_ahead(columns[0].shape[1] // RUN, slice_at, visit, state)
