"""Search for positives and negatives, in tiles.

The negative of an anchor a is the nearest of all, or of those beyond some bound b,

    argmin_n h_an   with h_an > b, and of equal ones the lowest n,

where h is half the squared difference, which orders references as the distance does.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from tripletjax._engine.reductions import min_and_index, min_and_index_of_all
from tripletjax._pairwise.batch import Batch
from tripletjax._pairwise.block_sizes import BlockSizes
from tripletjax._pairwise.class_index import ClassIndex
from tripletjax._pairwise.slices import (
    Blocks,
    Index,
    materialize,
    products_with,
    rows_at,
)
from tripletjax._pairwise.tiles import Tile, Tiles
from tripletjax.distances import Metric
from tripletjax.pairs import match_labels

# The cost of tiles grows with the positives of an anchor. The cost of panels begins
# higher and hardly grows.
MAX_TILE_POSITIVES = 16


def positives_of(
    metric: Metric, batch: Batch, classes: ClassIndex, sizes: BlockSizes
) -> tuple[Array, Array, Array]:
    """Positives of every anchor, half their squared differences, and which exist.

    Each is ``[MAX_TILE_POSITIVES, n]``.
    """
    n, d = batch.anchors.shape
    y = batch.reference_side[0]
    blocks = Blocks.of(n, sizes.panel // d)

    # The state: indices, half squares, and whether the positive exists.
    def step(step: Array, state: tuple[Array, Array, Array]) -> tuple:
        r, block = jnp.divmod(step, blocks.count)
        start = blocks.start(block)
        index, exists = classes.positive(r, start, blocks.size)
        a = rows_at(batch.anchors, start, blocks.size)
        squares = metric.inner_products.half_square(a, y[index])
        return tuple(
            lax.dynamic_update_slice(old, new.astype(old.dtype)[None], (r, start))
            for old, new in zip(state, (index, squares, exists))
        )

    zeros = jnp.broadcast_to(jnp.zeros_like(classes.start), (MAX_TILE_POSITIVES, n))
    none = (zeros, batch.zeros((MAX_TILE_POSITIVES, n)), zeros > 0)
    return lax.fori_loop(0, classes.max_positives * blocks.count, step, none)


class Nearest(NamedTuple):
    """The nearest negatives so far.

    Attributes:
        squares: half the squared differences ``[k, n]``, infinite where there is none.
        index: indices of references ``[k, n]``.
    """

    squares: Array
    index: Array

    def merge(self, k: Index, start: Array, squares: Array, index: Array) -> "Nearest":
        """Keep the nearer of old and new negatives; of equals the lower index.

        Args:
            k, start: the first row and column that the new negatives belong to.
            squares: half the squared differences ``[some, anchors]``.
            index: likewise.
        """
        new = Nearest(squares, index)
        corner = (lax.convert_element_type(k, start.dtype), start)
        old = Nearest(*(lax.dynamic_slice(x, corner, squares.shape) for x in self))
        better = (new[0] < old[0]) | ((new[0] == old[0]) & (new[1] < old[1]))
        return Nearest(
            *(
                lax.dynamic_update_slice(x, jnp.where(better, one, other), corner)
                for x, one, other in zip(self, new, old)
            )
        )


def nearest_negatives(tiles: Tiles, bounds: Array | None, count: Index) -> Nearest:
    """The nearest negatives of every anchor, beyond bounds if there are any.

    Args:
        tiles: the batch.
        bounds: ``[k, n]``: for each k, a negative has to be farther.
        count: how many k are in use.
    """

    def visit(state: Nearest, tile: Tile) -> Nearest:
        # Materialised: each fused reduction would compute the tile again.
        squares = materialize(tile.squares)

        def all_directions(
            k: Index, limits: list[Array | None], state: Nearest
        ) -> Nearest:
            for axis, start, first, some in zip(
                (1, 0), (tile.row, tile.column), (tile.column, tile.row), limits
            ):
                if some is None:
                    minima = [min_and_index_of_all(squares, axis, plain=plain)]
                else:
                    minima = [
                        min_and_index(squares, jnp.expand_dims(limit, axis), axis)
                        for limit in some
                    ]
                values, indices = (jnp.stack(x) for x in zip(*minima))
                state = state.merge(k, start, values, indices + first)
            return state

        if bounds is None:
            return all_directions(0, [None] * tile.directions, state)
        return in_threes(count, tile.along(bounds), all_directions, state)

    plain = tiles.sizes.plain
    k = 1 if bounds is None else len(bounds)
    zeros = tiles.batch.zeros((k, len(tiles.halves)))
    return tiles.scan(visit, Nearest(zeros + jnp.inf, zeros.astype(jnp.int32)))


def farthest_negatives(tiles: Tiles, wanted: Array) -> Array:
    """Indices ``[n]`` of the farthest negatives of the anchors that want one."""
    batch, sizes, offset = tiles.batch, tiles.sizes, tiles.offset
    y, labels, _ = batch.reference_side
    halves = tiles.reference_halves
    n, m = len(wanted), len(y)
    size = Blocks.of(n, sizes.panel // 8 // m).size
    order = jnp.flatnonzero(wanted, size=n, fill_value=0)

    # The state: how many anchors are done, and their farthest negatives.
    def step(state: tuple[Array, Array]) -> tuple[Array, Array]:
        done, farthest = state
        row = order[jnp.minimum(done, n - size) + jnp.arange(size)]
        masks = match_labels(batch.labels[row], labels, batch.own_index[row])
        products = products_with(batch.anchors[row] - offset, y, offset, sizes.panel)
        squares = tiles.halves[row][:, None] + halves - products
        squares = jnp.where(masks.negative & (halves < jnp.inf), -squares, jnp.inf)
        squares = materialize(squares)
        _, column = min_and_index_of_all(squares, 1, plain=sizes.plain)
        return done + size, farthest.at[row].set(column)

    count = jnp.sum(wanted)
    none = jnp.zeros_like(count), jnp.zeros_like(order)
    with jax.named_scope("farthest"):
        return lax.while_loop(lambda state: state[0] < count, step, none)[1]


def in_threes(
    count: Index, rows: Any, visit: Callable[[Array, Any, Any], Any], state: Any
) -> Any:
    """``visit(k, some rows from k on, state)`` for all k below a count.

    Three rows at a time, which serves classes of four, and then one. The loop carries
    the rows and moves them up, since XLA fuses a slice at k as `fetch_ahead` describes.
    """

    def steps(some: int, start: Index, end: Index, carried: tuple) -> tuple:
        # Carried: the rows that are left, in front, and the caller's state.
        def step(i: Array, carried: tuple) -> tuple:
            rows, state = carried
            state = visit(start + some * i, [x[:some] for x in rows], state)
            return [jnp.roll(x, -some, axis=0) for x in rows], state

        with jax.named_scope(f"by_{some}"):
            return lax.fori_loop(0, (end - start) // some, step, carried)

    threes = count // 3 * 3
    carried = steps(3, 0, threes, (rows, state))
    return steps(1, threes, count, carried)[1]
