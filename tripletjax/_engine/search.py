"""Which positives and negatives: searched for in tiles.

The negative of an anchor a is the nearest of all, or of those beyond some bound b,

    argmin_n h_an   with h_an > b, and of equal ones the lowest n,

where h is half the squared difference, which orders vectors as the distance does.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from tripletjax._engine.reductions import min_and_index, min_and_index_of_all
from tripletjax._pairwise.batch import Batch
from tripletjax._pairwise.class_index import ClassIndex
from tripletjax._pairwise.cuts import Cut
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

# Tiles cost more with every positive of an anchor, panels little more, but from a
# higher start.
MAX_TILE_POSITIVES = 16


def positives_of(
    metric: Metric, batch: Batch, classes: ClassIndex, cut: Cut
) -> tuple[Array, Array, Array]:
    """Every anchor's positives, half their squared difference, and which there are.

    All ``[MAX_TILE_POSITIVES, n]``.
    """
    n, d = batch.anchors.shape
    y = batch.reference_side[0]
    blocks = Blocks.of(n, cut.panel // d)

    def step(step: Array, state: tuple[Array, Array, Array]) -> tuple:
        r, block = jnp.divmod(step, blocks.count)
        start = blocks.start(block)
        index, found = classes.positive(r, start, blocks.size)
        a = rows_at(batch.anchors, start, blocks.size)
        squares = metric.inner_products.half_square(a, y[index])
        return tuple(
            lax.dynamic_update_slice(old, new.astype(old.dtype)[None], (r, start))
            for old, new in zip(state, (index, squares, found))
        )

    zeros = jnp.broadcast_to(jnp.zeros_like(classes.start), (MAX_TILE_POSITIVES, n))
    none = (zeros, batch.zeros((MAX_TILE_POSITIVES, n)), zeros > 0)
    return lax.fori_loop(0, classes.max_positives * blocks.count, step, none)


def nearest_negatives(
    tiles: Tiles, bounds: Array | None, count: Index
) -> tuple[Array, Array]:
    """The nearest negatives of every anchor, beyond bounds if there are any.

    Args:
        tiles: the batch.
        bounds: ``[k, n]``: for each k, a negative has to be farther.
        count: how many k are in use.

    Returns:
        Half the squared differences and indices, ``[k, n]``.
    """

    def visit(state: tuple[Array, Array], tile: Tile) -> tuple[Array, Array]:
        # Materialised: fused into every reduction, it would be made again each time.
        squares = materialize(tile.squares)

        def one_direction(
            k: Index, limits: Array | None, state: tuple, tile: Tile, axis: int
        ) -> tuple:
            start, first = (tile.row, tile.column)[:: 1 if axis else -1]
            if limits is None:
                found = [min_and_index_of_all(squares, axis, plain=tiles.cut.plain)]
            else:
                found = [
                    min_and_index(squares, jnp.expand_dims(limit, axis), axis)
                    for limit in limits
                ]
            new = [jnp.stack(x) for x in zip(*found)]
            new[1] += first
            corner = (lax.convert_element_type(k, start.dtype), start)
            old = [lax.dynamic_slice(x, corner, new[0].shape) for x in state]
            better = (new[0] < old[0]) | ((new[0] == old[0]) & (new[1] < old[1]))
            return tuple(
                lax.dynamic_update_slice(x, jnp.where(better, one, other), corner)
                for x, one, other in zip(state, new, old)
            )

        def all_directions(k: Index, limits: list[Array | None], state: tuple) -> tuple:
            for axis, some in zip((1, 0), limits):
                state = one_direction(k, some, state, tile, axis)
            return state

        if bounds is None:
            return all_directions(0, [None] * tile.directions, state)
        return in_threes(count, tile.along(bounds), all_directions, state)

    k = 1 if bounds is None else len(bounds)
    zeros = tiles.batch.zeros((k, len(tiles.halves)))
    return tiles.scan(visit, (zeros + jnp.inf, zeros.astype(jnp.int32)))


def farthest_negatives(tiles: Tiles, wanted: Array) -> tuple[Array, Array]:
    """The farthest negatives of the anchors that want one, some at a time.

    Returns:
        Half the squared differences and indices, ``[n]``.
    """
    batch, cut = tiles.batch, tiles.cut
    y, labels, _ = batch.reference_side
    n, m = len(wanted), len(y)
    size = Blocks.of(n, cut.panel // 8 // m).size
    order = jnp.flatnonzero(wanted, size=n, fill_value=0)
    theirs, offset = tiles.reference_halves, tiles.offset

    def step(state: tuple[Array, ...]) -> tuple[Array, ...]:
        done, values, farthest = state
        row = order[jnp.minimum(done, n - size) + jnp.arange(size)]
        positions = batch.pairs.positions
        if positions is not None:
            positions = positions[row]
        masks = match_labels(batch.labels[row], labels, positions)
        products = products_with(batch.anchors[row] - offset, y, offset, cut.panel)
        squares = tiles.halves[row][:, None] + theirs - products
        squares = jnp.where(masks.negative & (theirs < jnp.inf), -squares, jnp.inf)
        squares = materialize(squares)
        value, column = min_and_index_of_all(squares, 1, plain=cut.plain)
        values = values.at[row].set(-value)
        return done + size, values, farthest.at[row].set(column)

    count = jnp.sum(wanted)
    none = jnp.zeros_like(count), batch.zeros((n,)) - jnp.inf, jnp.zeros_like(order)
    with jax.named_scope("farthest"):
        _, *found = lax.while_loop(lambda state: state[0] < count, step, none)
    return found[0], found[1]


def in_threes(
    count: Index, rows: Any, visit: Callable[[Array, Any, Any], Any], state: Any
) -> Any:
    """``visit(k, some rows from k on, state)`` for all k below a count.

    Three rows at a time, which serves classes of four, and then one. Rows are moved up
    rather than cut out where k says, for what `fetch_ahead` works around.
    """

    def steps(some: int, start: Index, end: Index, state: Any) -> Any:
        def step(i: Array, loop: tuple) -> tuple:
            rows, state = loop
            state = visit(start + some * i, [x[:some] for x in rows], state)
            return [jnp.roll(x, -some, axis=0) for x in rows], state

        with jax.named_scope(f"by_{some}"):
            return lax.fori_loop(0, (end - start) // some, step, state)

    threes = count // 3 * 3
    loop = steps(3, 0, threes, (rows, state))
    return steps(1, threes, count, loop)[1]
