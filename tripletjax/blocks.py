"""What blockwise losses are made of: sums over triplets, a block of pairs at a time.

`sums` makes the terms of a batch and the gradient of their total in O(n d + n block)
memory. It goes one of two ways, chosen at run time:

- *tiles*, for metrics made of inner products and anchors of up to `FEW` positives. The
  distances of positives come first and directly, and then every negative pair once:
  where the anchors are their own references, one product of two blocks of vectors
  serves the anchors of both, so that half the matrix is enough.
- *panels*, for everything else: blocks of rows of the distance matrix, each treated by
  the functions of a whole matrix.

Of two vectors that nearly coincide, the distance by products is noise. The distances
that count, of positives and of chosen pairs, are therefore taken from differences.
"""

import dataclasses
import enum
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from tripletjax.distances import Metric, common_offset
from tripletjax.losses import (
    Hinge,
    TripletCost,
    TripletTerms,
    batch_all_sums,
    check_elementwise,
    costs_of,
    count_all,
    sums_of,
)
from tripletjax.mining import (
    CountedTriplets,
    Triplets,
    batch_hard_triplets,
    batch_semi_hard_triplets,
    take,
)
from tripletjax.pairs import PairMasks, in_turn, keep_pairs, pair_masks

# Tiles cost more with every positive of an anchor, panels little more, but from a
# higher start.
FEW = 16
# Of a tile's side: the products are efficient from here on, and a tile still fits into
# a cache.
BLOCK_SIZE = 512
# How many numbers a panel of the distance matrix has, and a block of vectors.
PANEL = 2**19
# Half squared distances below this share of the vectors' halves are taken directly.
NEAR = 0.01


class Kind(enum.Enum):
    """Which triplets."""

    ALL = enum.auto()
    HARD = enum.auto()
    SEMI_HARD = enum.auto()


@dataclasses.dataclass(frozen=True)
class Task:
    """What to sum up; static.

    Attributes:
        kind: which triplets.
        metric: how far two vectors are apart.
        hinge: what a triplet costs.
        fallback: whether a pair without a semi-hard negative takes the farthest.
        block_size: how many vectors a tile has a side.
    """

    kind: Kind
    metric: Metric
    hinge: Hinge = jax.nn.relu
    fallback: bool = True
    block_size: int = BLOCK_SIZE

    def __post_init__(self) -> None:
        if not isinstance(self.metric, Metric):
            raise TypeError(f"metric must be a Metric, got {self.metric!r}.")


class Batch(NamedTuple):
    """Vectors, and who matches whom among them.

    Attributes:
        anchors: ``[n, d]``; those that products are taken of, if the metric has such.
        references: ``[m, d]``, or None if the anchors are their own.
        margin: a scalar.
        labels: integers ``[n]``, or `PairMasks` ``[n, m]``.
        reference_labels: integers ``[m]``, or None.
        positions: integers ``[n]``, or None.
        where: bool ``[n]``, or None.
        reference_where: bool ``[m]``, or None.
    """

    anchors: Array
    references: Array | None
    margin: Array
    labels: Array | PairMasks
    reference_labels: Array | None
    positions: Array | None
    where: Array | None
    reference_where: Array | None

    @property
    def square(self) -> bool:
        return self.references is None

    @property
    def others(self) -> tuple[Array, Array | None, Array | None]:
        """Vectors, labels and `where` of the references, whoever they are."""
        if self.square:
            return self.anchors, self.labels, self.where
        return self.references, self.reference_labels, self.reference_where


class Gradients(NamedTuple):
    """Of the summed cost: by anchors, by references (None if square), by margin."""

    anchors: Array
    references: Array | None
    margin: Array

    @classmethod
    def zero(cls, batch: Batch) -> "Gradients":
        none = [None if x is None else _zeros(batch, x.shape) for x in batch[:2]]
        return cls(*none, _zeros(batch))

    def add(self, start: Array, rows: Array) -> "Gradients":
        return self._replace(anchors=_add_rows(self.anchors, start, rows))

    def add_to_references(self, start: Array, rows: Array) -> "Gradients":
        if self.references is None:
            return self.add(start, rows)
        return self._replace(references=_add_rows(self.references, start, rows))

    def scatter(self, index: Array, rows: Array) -> "Gradients":
        """Adds to references in any order."""
        if self.references is None:
            return self._replace(anchors=self.anchors.at[index].add(rows))
        return self._replace(references=self.references.at[index].add(rows))


def sums(
    task: Task, batch: Batch, weights: Array | None = None, *, gradient: bool
) -> tuple[TripletTerms, Gradients | None]:
    """The terms per anchor, and the gradient of their total weighted per anchor."""
    if task.metric.products is None or isinstance(batch.labels, PairMasks):
        return _by_panels(task, batch, weights, gradient)
    classes = Classes.of(batch)
    return lax.cond(
        classes.most <= FEW,
        lambda: _by_tiles(task, batch, classes, weights, gradient),
        lambda: _by_panels(task, batch, weights, gradient, classes),
    )


def _zeros(batch: Batch, shape: tuple[int, ...] = ()) -> Array:
    # Inside shard_map, what a loop carries has to vary over devices as the batch does.
    return jnp.zeros(shape, batch.anchors.dtype) + jnp.zeros_like(batch.anchors[0, 0])


def _rows(x: Array, start: Array, size: int) -> Array:
    return lax.dynamic_slice_in_dim(x, start, size)


def _stored(x: Any) -> Any:
    """The same, but in memory, and not computed again by everything that takes it.

    XLA would fuse even a dynamic slice into loops over tiles, which are then slow.
    """
    return lax.optimization_barrier(x)


def _add_rows(x: Array, start: Array, rows: Array) -> Array:
    old = lax.dynamic_slice_in_dim(x, start, len(rows))
    return lax.dynamic_update_slice_in_dim(x, old + rows, start, axis=0)


class Blocks(NamedTuple):
    """Blocks of one size that cover n rows; the last may overlap the one before."""

    n: int
    size: int

    @classmethod
    def of(cls, n: int, size: int) -> "Blocks":
        return cls(n, max(1, min(size, n)))

    @property
    def count(self) -> int:
        return -(-self.n // self.size)

    def start(self, block: Array) -> Array:
        return jnp.minimum(block * self.size, self.n - self.size)

    def fresh(self, block: Array) -> Array:
        """Which rows no earlier block had."""
        return self.start(block) + jnp.arange(self.size) >= block * self.size


def _products(a: Array, y: Array, offset: Array) -> Array:
    """The products ``[rows, m]`` of some vectors with all others less an offset."""
    blocks = Blocks.of(len(y), PANEL // y.shape[1])

    def step(block: Array, products: Array) -> Array:
        start = blocks.start(block)
        b = _rows(y, start, blocks.size) - offset
        some = jnp.matmul(a, b.T, precision="highest")
        return lax.dynamic_update_slice_in_dim(products, some, start, axis=1)

    none = jnp.zeros((len(a), len(y)), a.dtype) + jnp.zeros_like(a[0, 0])
    return lax.fori_loop(0, blocks.count, step, none)


# Tiles.


class Classes(NamedTuple):
    """The positives of every anchor, by sorting the references once.

    Attributes:
        order: references sorted by label ``[m]``, those that are padding last.
        start: where an anchor's class begins in it ``[n]``.
        rank: the anchor's own place in its class, or m ``[n]``.
        positives: how many positives an anchor has ``[n]``; none if it is padding.
        negatives: how many negatives ``[n]``.
        most: the most positives of any anchor.
    """

    order: Array
    start: Array
    rank: Array
    positives: Array
    negatives: Array
    most: Array

    @classmethod
    def of(cls, batch: Batch) -> "Classes":
        labels, where = batch.labels, batch.where
        n = len(labels)
        _, references, real = batch.others
        m = len(references)
        index = jnp.arange(m)
        if real is None:
            ordered, order = lax.sort((references, index), num_keys=1)
            size = m
        else:
            _, ordered, order = lax.sort((~real, references, index), num_keys=2)
            size = jnp.sum(real)
            # Padding, whose labels are not in order, does not take part in a search.
            last = jnp.iinfo(ordered.dtype).max
            ordered = jnp.where(index < size, ordered, last)
        places = jnp.zeros_like(order).at[order].set(index, unique_indices=True)
        if batch.square:
            # Every anchor is in there, and need not be searched for.
            first = (ordered != jnp.roll(ordered, 1)) | (index == 0) | (index == size)
            last = jnp.roll(first, -1)
            start = lax.cummax(jnp.where(first, index, 0))[places]
            end = lax.cummin(jnp.where(last, index + 1, m), reverse=True)[places]
        else:
            start = jnp.searchsorted(ordered, labels, side="left")
            end = jnp.searchsorted(ordered, labels, side="right")
            end = jnp.minimum(end, size)
        start = jnp.minimum(start, end)
        alike = end - start

        positions = jnp.arange(n) if batch.square else batch.positions
        if positions is None:
            itself = matches = jnp.zeros_like(labels, bool)
            rank = jnp.full_like(start, m)
        else:
            place = jnp.clip(positions, 0, m - 1)
            itself = place == positions
            if real is not None:
                itself &= real[place]
            matches = itself & (references[place] == labels)
            rank = jnp.where(matches, places[place] - start, m)
        positives = alike - matches
        negatives = size - alike - (itself & ~matches)
        if where is not None:
            positives, negatives = positives * where, negatives * where
        most = jnp.max(jnp.where(negatives > 0, positives, 0))
        return cls(order, start, rank, positives, negatives, most)

    def positive(self, r: Array, start: Array, size: int) -> tuple[Array, Array]:
        """The r-th positives of a block of anchors, and whether there are such."""
        first, rank, count = (
            _rows(x, start, size) for x in (self.start, self.rank, self.positives)
        )
        place = jnp.minimum(first + r + (r >= rank), len(self.order) - 1)
        return self.order[place], r < count

    def count(self, start: Array | int, size: int, like: Array) -> Array:
        """How many triplets a block of anchors has, as numbers of an array's dtype."""
        positives, negatives = (
            _rows(x, start, size).astype(like.dtype)
            for x in (self.positives, self.negatives)
        )
        return positives * negatives

    def some(
        self, first: Array, count: int, start: Array, size: int
    ) -> tuple[Array, Array]:
        """The positives from the first on ``[size, count]`` of a block of anchors."""
        place = first + jnp.arange(count)
        index, found = jax.vmap(lambda r: self.positive(r, start, size))(place)
        return index.T, found.T


class Tiles(NamedTuple):
    """Vectors as tiles take them: without what all have in common, with halves.

    Attributes:
        metric: the metric.
        batch: the batch.
        offset: what the vectors have in common ``[d]``.
        halves: of anchors ``[n]``; infinite if they are padding.
        reference_halves: of references ``[m]``, likewise.
        rows: blocks of anchors.
        columns: blocks of references.
    """

    metric: Metric
    batch: Batch
    offset: Array
    halves: Array
    reference_halves: Array
    rows: Blocks
    columns: Blocks

    @classmethod
    def of(cls, task: Task, batch: Batch) -> "Tiles":
        x, products = batch.anchors, task.metric.products
        y, _, real = batch.others
        offset = common_offset(y) if products else jnp.zeros_like(y[0])

        def halves(x: Array, where: Array | None) -> Array:
            halves = products.halves(x, offset) if products else jnp.zeros_like(x[:, 0])
            return halves if where is None else jnp.where(where, halves, jnp.inf)

        ours = halves(x, batch.where)
        theirs = ours if batch.square else halves(y, real)
        size = task.block_size
        blocks = Blocks.of(len(x), size), Blocks.of(len(y), size)
        return cls(task.metric, batch, offset, ours, theirs, *blocks)

    def scan(self, visit: Callable[[Any, "Tile"], Any], state: Any) -> Any:
        """Visits all tiles; if the matrix is symmetric, of unordered pairs."""

        def of_parts(state: Any, parts: "_Parts", twice: bool) -> Any:
            return visit(state, self.tile(parts)._replace(twice=twice))

        return self.scan_parts(of_parts, state)

    def scan_parts(
        self, visit: Callable[[Any, "_Parts", bool], Any], state: Any
    ) -> Any:
        if not self.batch.square:
            counts = self.rows.count, self.columns.count
            return self._scan(visit, state, np.indices(counts).reshape(2, -1), False)
        off_diagonal = np.triu_indices(self.rows.count, k=1)
        if len(off_diagonal[0]):
            state = self._scan(visit, state, off_diagonal, True)
        diagonal = np.diag_indices(self.rows.count)
        return self._scan(visit, state, diagonal, False)

    def _scan(self, visit: Callable, state: Any, blocks: Any, twice: bool) -> Any:
        # Parts are cut out one step ahead. XLA would fuse the slices with all that is
        # done to a tile, which then does not vectorise; what a loop carries, it cannot.
        def step(loop: tuple, following: tuple[Array, Array]) -> tuple[tuple, None]:
            state, parts = loop
            state = visit(state, parts, twice)
            return (state, self.parts(*following)), None

        blocks = [jnp.asarray(indices, jnp.int32) for indices in blocks]
        following = [jnp.roll(indices, -1) for indices in blocks]
        first = self.parts(*(indices[0] for indices in blocks))
        return lax.scan(step, (state, first), following)[0][0]

    def parts(self, i: Array, j: Array) -> "_Parts":
        batch, positions = self.batch, self.batch.positions
        row, column = self.rows.start(i), self.columns.start(j)
        y, labels, _ = batch.others

        def halves(all: Array, blocks: Blocks, block: Array) -> Array:
            halves = _rows(all, blocks.start(block), blocks.size)
            if blocks.n % blocks.size:
                halves = jnp.where(blocks.fresh(block), halves, jnp.inf)
            return halves

        if positions is not None:
            positions = _rows(positions, row, self.rows.size) - column
        return _Parts(
            row,
            column,
            _rows(batch.anchors, row, self.rows.size) - self.offset,
            _rows(y, column, self.columns.size) - self.offset,
            halves(self.halves, self.rows, i),
            halves(self.reference_halves, self.columns, j),
            _rows(batch.labels, row, self.rows.size),
            _rows(labels, column, self.columns.size),
            positions,
        )

    def tile(self, parts: "_Parts") -> "Tile":
        row, column, a, b, ours, theirs, labels, reference_labels, positions = parts
        products = jnp.matmul(a, b.T, precision="highest")
        squares = ours[:, None] + theirs - products
        # A NaN becomes 0, to be chosen: a loss that has gone wrong must not look well.
        squares = jnp.where(squares > 0, squares, 0)
        masks = pair_masks(labels, reference_labels, positions=positions)
        squares = jnp.where(masks.negative, squares, jnp.inf)
        return Tile(row, column, a, b, squares)

    def distances(self, visit: Callable[[Any, Array, Array], Any], state: Any) -> Any:
        """``visit(state, distances, counts)`` for blocks of distances of negatives.

        Of the distances ``[rows, columns]`` those count that are of negatives, and in a
        symmetric matrix one of each two. Of any metric, and with digits where vectors
        nearly coincide.
        """
        batch, products = self.batch, self.metric.products
        y = batch.others[0]

        def of_parts(state: Any, parts: "_Parts", twice: bool) -> Any:
            row, column, *_, labels, reference_labels, positions = parts
            masks = pair_masks(labels, reference_labels, positions=positions)
            counts = masks.negative & (parts.halves < jnp.inf)[:, None]
            counts &= parts.reference_halves < jnp.inf
            if batch.square and not twice:
                counts = jnp.triu(counts, 1)
            a = _rows(batch.anchors, row, self.rows.size)
            b = _rows(y, column, self.columns.size)
            if products is None:
                itself = jnp.full(len(a), -1)
                return visit(state, self.metric.against(a, b, itself), counts)
            scale = parts.halves[:, None] + parts.reference_halves
            squares = scale - jnp.matmul(parts.a, parts.b.T, precision="highest")
            near = counts & (squares < NEAR * scale)
            row = jnp.arange(len(a))

            def direct(squares: Array, column: Array, found: Array) -> Array:
                new = products.half_square(a, b[column])
                new = jnp.where(found, new, squares[row, column])
                return squares.at[row, column].set(new)

            squares = in_turn(near, direct, squares)
            return visit(state, products.distance(squares), counts)

        return self.scan_parts(of_parts, state)


class _Parts(NamedTuple):
    """What a tile is made of: first row and column, and of its anchors and references
    vectors, halves and labels; and where its anchors are among its references.
    """

    row: Array
    column: Array
    a: Array
    b: Array
    halves: Array
    reference_halves: Array
    labels: Array
    reference_labels: Array
    positions: Array | None


class Tile(NamedTuple):
    """A block of pairs.

    Attributes:
        row: its first anchor.
        column: its first reference.
        a: its anchors ``[rows, d]``.
        b: its references ``[columns, d]``.
        squares: half the squared differences of negatives, infinite for others.
        twice: whether it also stands for its mirror image; static.
    """

    row: Array
    column: Array
    a: Array
    b: Array
    squares: Array
    twice: bool = False

    @property
    def ways(self) -> int:
        """Whose distances it has: of its rows' anchors, or of its columns' as well."""
        return 1 + self.twice

    def along(self, x: Array) -> list[Array]:
        """The parts of ``[k, n]`` that belong to the anchors of each way."""
        starts = (self.row, self.column)[: self.ways]
        return [
            lax.dynamic_slice_in_dim(x, start, size, axis=1)
            for start, size in zip(starts, self.squares.shape)
        ]


def _by_tiles(
    task: Task, batch: Batch, classes: Classes, weights: Array | None, gradient: bool
) -> tuple[TripletTerms, Gradients | None]:
    tiles = Tiles.of(task, batch)
    if task.kind is Kind.ALL:
        return _all_by_tiles(task, tiles, classes, weights, gradient)
    listed = _mined_by_tiles(task, tiles, classes)
    return _listed(task, batch, *listed, weights, gradient)


def _mined_by_tiles(
    task: Task, tiles: Tiles, classes: Classes
) -> tuple[Array, Array, Array, Array | int]:
    """Positives, negatives and validity ``[k, n]`` of triplets, and how many k are."""
    positives, squares, found = _positives(task, tiles.batch, classes)
    found &= classes.negatives > 0
    if task.kind is Kind.HARD:
        hardest = jnp.argmax(jnp.where(found, squares, -1), axis=0)[None]
        positive = jnp.take_along_axis(positives, hardest, axis=0)
        _, negative = _nearest(tiles, None, 1)
        return positive, negative, found[:1], 1
    nearest, negative = _nearest(tiles, squares, classes.most)
    # A NaN is nearer than nothing; its pair stays, for the loss to show it.
    beyond = (nearest < jnp.inf) | jnp.isnan(squares)
    if not task.fallback:
        return positives, negative, found & beyond, classes.most

    alone = jnp.any(found & ~beyond, axis=0)
    negative = jnp.where(beyond, negative, _farthest(tiles, alone))
    return positives, negative, found, classes.most


def _positives(
    task: Task, batch: Batch, classes: Classes
) -> tuple[Array, Array, Array]:
    """Every anchor's positives, half their squared difference, and which there are.

    All ``[FEW, n]``.
    """
    n, d = batch.anchors.shape
    y = batch.others[0]
    blocks = Blocks.of(n, PANEL // d)

    def step(step: Array, state: tuple[Array, Array, Array]) -> tuple:
        r, block = jnp.divmod(step, blocks.count)
        start = blocks.start(block)
        index, found = classes.positive(r, start, blocks.size)
        a = _rows(batch.anchors, start, blocks.size)
        squares = task.metric.products.half_square(a, y[index])
        return tuple(
            lax.dynamic_update_slice(old, new.astype(old.dtype)[None], (r, start))
            for old, new in zip(state, (index, squares, found))
        )

    zeros = jnp.broadcast_to(jnp.zeros_like(classes.start), (FEW, n))
    none = (zeros, _zeros(batch, (FEW, n)), zeros > 0)
    return lax.fori_loop(0, classes.most * blocks.count, step, none)


def _farthest(tiles: Tiles, wanted: Array) -> Array:
    """The farthest negative ``[n]`` of the anchors that want one, some at a time."""
    batch = tiles.batch
    y, labels, _ = batch.others
    n, m = len(wanted), len(y)
    size = Blocks.of(n, PANEL // 8 // m).size
    order = jnp.flatnonzero(wanted, size=n, fill_value=0)
    theirs, offset = tiles.reference_halves, tiles.offset

    def step(state: tuple[Array, Array]) -> tuple[Array, Array]:
        done, farthest = state
        row = order[jnp.minimum(done, n - size) + jnp.arange(size)]
        masks = pair_masks(
            batch.labels[row],
            labels,
            positions=None if batch.positions is None else batch.positions[row],
        )
        products = _products(batch.anchors[row] - offset, y, offset)
        squares = tiles.halves[row][:, None] + theirs - products
        squares = jnp.where(masks.negative & (theirs < jnp.inf), -squares, jnp.inf)
        squares = _stored(squares)
        _, column = _min_and_place_of_all(squares, 1)
        return done + size, farthest.at[row].set(column)

    count = jnp.sum(wanted)
    none = jnp.zeros_like(count), jnp.zeros_like(order)
    return lax.while_loop(lambda state: state[0] < count, step, none)[1]


def _nearest(
    tiles: Tiles, bounds: Array | None, count: Array | int
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
        squares = _stored(tile.squares)

        def one_way(
            k: Array, limits: Array | None, state: tuple, tile: Tile, axis: int
        ) -> tuple:
            start, other = (tile.row, tile.column)[:: 1 if axis else -1]
            if limits is None:
                found = [_min_and_place_of_all(squares, axis)]
            else:
                found = [
                    _min_and_place(squares, jnp.expand_dims(limit, axis), axis)
                    for limit in limits
                ]
            new = [jnp.stack(x) for x in zip(*found)]
            new[1] += other
            place = (lax.convert_element_type(k, start.dtype), start)
            old = [lax.dynamic_slice(x, place, new[0].shape) for x in state]
            better = (new[0] < old[0]) | ((new[0] == old[0]) & (new[1] < old[1]))
            return tuple(
                lax.dynamic_update_slice(x, jnp.where(better, *pair), place)
                for x, *pair in zip(state, new, old)
            )

        def all_ways(k: Array, limits: list[Array | None], state: tuple) -> tuple:
            for axis, some in zip((1, 0), limits):
                state = one_way(k, some, state, tile, axis)
            return state

        if bounds is None:
            return all_ways(0, [None] * tile.ways, state)
        return _in_threes(count, tile.along(bounds), all_ways, state)

    k = 1 if bounds is None else len(bounds)
    zeros = _zeros(tiles.batch, (k, len(tiles.halves)))
    return tiles.scan(visit, (zeros + jnp.inf, zeros.astype(jnp.int32)))


def _in_threes(
    count: Array | int, rows: Any, visit: Callable[[Array, Any, Any], Any], state: Any
) -> Any:
    """``visit(k, some rows from k on, state)`` for all k below a count.

    Three rows at a time, which serves classes of four, and then one. Rows are moved up
    rather than sliced where k says: XLA would fuse such a slice into every loop over a
    tile, which then does not vectorise.
    """

    def steps(some: int, start: Array | int, end: Array | int, state: Any) -> Any:
        def step(i: Array, loop: tuple) -> tuple:
            rows, state = loop
            state = visit(start + some * i, [x[:some] for x in rows], state)
            return [jnp.roll(x, -some, axis=0) for x in rows], state

        return lax.fori_loop(0, (end - start) // some, step, state)

    threes = count // 3 * 3
    loop = steps(3, 0, threes, (rows, state))
    return steps(1, threes, count, loop)[1]


def _min_and_place(x: Array, limit: Array, axis: int) -> tuple[Array, Array]:
    """Minima beyond a limit along an axis, and their first places.

    Plain minima are several times faster than a reduction to the index.
    """
    value = jnp.min(jnp.where(x > limit, x, jnp.inf), axis=axis)
    places = jnp.expand_dims(jnp.arange(x.shape[axis], dtype=x.dtype), 1 - axis)
    hit = x == jnp.expand_dims(value, axis)
    place = jnp.min(jnp.where(hit, places, x.shape[axis] - 1), axis=axis)
    return value, place.astype(jnp.int32)


def _min_and_place_of_all(x: Array, axis: int) -> tuple[Array, Array]:
    """Minima along an axis, and their first places."""
    # Minima of runs of 32, and then a look into the run that has it.
    size = x.shape[axis]
    length = 32 if size % 32 == 0 else size
    shape = list(x.shape)
    shape[axis : axis + 1] = [size // length, length]
    runs = jnp.min(x.reshape(shape), axis=axis + 1)
    value = jnp.min(runs, axis=axis)
    run = jnp.argmin(runs, axis=axis)
    at = jnp.expand_dims(run, (axis, axis + 1))
    members = jnp.take_along_axis(
        x.reshape(shape), at, axis=axis, mode="promise_in_bounds"
    )
    members = jnp.squeeze(members, axis)
    within = jnp.argmax(members == jnp.expand_dims(value, axis), axis=axis)
    return value, (run * length + within).astype(jnp.int32)


def _listed(
    task: Task,
    batch: Batch,
    positives: Array,
    negatives: Array,
    valid: Array,
    count: Array | int,
    weights: Array | None,
    gradient: bool,
) -> tuple[TripletTerms, Gradients | None]:
    """The sums of triplets ``[k, n]``, of which the first `count` rows are in use."""
    n, d = batch.anchors.shape
    y = batch.others[0]
    blocks = Blocks.of(n, PANEL // d)
    products = task.metric.products

    def cost(squares: tuple[Array, Array], margin: Array, valid: Array) -> Array:
        d_ap, d_an = map(products.distance, squares)
        return costs_of(d_ap, d_an, valid, margin, task.hinge)

    def step(step: Array, state: tuple) -> tuple:
        totals, actives, sink = state
        k, block = jnp.divmod(step, blocks.count)
        start = blocks.start(block)
        counts = _rows(valid[k], start, blocks.size) & blocks.fresh(block)
        a = _rows(batch.anchors, start, blocks.size)
        p, n = (_rows(index[k], start, blocks.size) for index in (positives, negatives))
        squares = products.half_square(a, y[p]), products.half_square(a, y[n])
        costs, pull = jax.vjp(
            lambda squares, margin: cost(squares, margin, counts), squares, batch.margin
        )
        totals = _add_rows(totals, start, costs)
        actives = _add_rows(actives, start, (costs > 0).astype(costs.dtype))
        if gradient:
            cotangents = jnp.ones_like(costs)
            if weights is not None:
                cotangents = _rows(weights, start, blocks.size)
            slopes, by_margin = pull(cotangents)
            sink = sink._replace(margin=sink.margin + by_margin)
            for index, slope in zip((p, n), slopes):
                rows = slope[:, None] * (a - y[index])
                sink = sink.add(start, rows).scatter(index, -rows)
        return totals, actives, sink

    zeros = _zeros(batch, (n,))
    sink = Gradients.zero(batch) if gradient else None
    totals, actives, sink = lax.fori_loop(
        0, count * blocks.count, step, (zeros, zeros, sink)
    )
    terms = TripletTerms(totals, actives, jnp.sum(valid, axis=0, dtype=totals.dtype))
    return terms, sink


def _all_by_tiles(
    task: Task,
    tiles: Tiles,
    classes: Classes,
    weights: Array | None,
    gradient: bool,
) -> tuple[TripletTerms, Gradients | None]:
    batch, products = tiles.batch, task.metric.products
    positives, squares, found = _positives(task, batch, classes)
    d_ap, slopes = _with_slope(products.distance, squares)
    # The gap of what is not a triplet is minus infinity.
    gap_ap = jnp.where(found, d_ap, -jnp.inf)
    if isinstance(task.hinge, TripletCost):
        gap_ap = d_ap

    def visit(state: tuple, tile: Tile) -> tuple:
        d_an, slope = _with_slope(products.distance, tile.squares)
        d_an = _stored(d_an)

        def one_way(
            r: Array, gaps: Array, exists: Array, state: tuple, axis: int
        ) -> tuple:
            totals, actives, by_positive, by_margin, by_negative = state
            start = tile.row if axis else tile.column
            each = [
                _costs_and_slopes(
                    task.hinge,
                    jnp.expand_dims(gap, axis),
                    d_an,
                    jnp.expand_dims(found, axis),
                    batch.margin,
                )
                for gap, found in zip(gaps, exists)
            ]
            costs, active, by_ap, by_an, by_all = zip(*each)
            totals = _add_rows(totals, start, _sum(sum(costs), axis))
            if task.hinge is jax.nn.relu:
                rows = _counts([x > 0 for x in by_ap], axis)
                active = jnp.sum(rows, 0)
            else:
                rows = jnp.stack([_sum(x, axis) for x in by_ap])
                active = _sum(sum(active), axis)
            actives = _add_rows(actives, start, active)
            if gradient:
                by_an = sum(by_an)
                weight = 1
                if weights is not None:
                    weight = _rows(weights, start, rows.shape[1])
                    by_an = by_an * jnp.expand_dims(weight, axis)
                by_negative = by_negative + by_an
                place = (lax.convert_element_type(r, start.dtype), start)
                new = lax.dynamic_slice(by_positive, place, rows.shape) + rows * weight
                by_positive = lax.dynamic_update_slice(by_positive, new, place)
                if by_all[0] is not by_ap[0]:
                    rows = _sum(sum(by_all), axis)
                    by_margin = by_margin + jnp.sum(rows * weight)
            return totals, actives, by_positive, by_margin, by_negative

        def all_ways(r: Array, rows: list[Array], state: tuple) -> tuple:
            ways = zip((1, 0), rows[: tile.ways], rows[tile.ways :])
            for axis, gaps, exists in ways:
                state = one_way(r, gaps, exists, state, axis)
            return state

        *state, sink = state
        by_negative = jnp.zeros_like(d_an) if gradient else None
        *state, by_negative = _in_threes(
            classes.most,
            tile.along(gap_ap) + tile.along(found),
            all_ways,
            (*state, by_negative),
        )
        if gradient:
            by_square = by_negative * slope
            if batch.square and not tile.twice:
                # The same vectors on both sides.
                by_square = by_square + by_square.T
                sink = sink.add(tile.row, _pull(by_square, tile.a, tile.b))
            else:
                by_square = _stored(by_square)
                ours = _pull(by_square, tile.a, tile.b)
                theirs = _pull(by_square.T, tile.b, tile.a)
                sink = sink.add(tile.row, ours).add_to_references(tile.column, theirs)
        return *state, sink

    n = len(batch.anchors)
    sink = Gradients.zero(batch) if gradient else None
    zeros = _zeros(batch, (n,)), _zeros(batch, (n,)), _zeros(batch, (FEW, n))
    totals, actives, by_positive, by_margin, sink = tiles.scan(
        visit, (*zeros, _zeros(batch), sink)
    )
    if gradient:
        if not isinstance(task.hinge, TripletCost):
            by_margin = jnp.sum(by_positive)
        sink = sink._replace(margin=by_margin)
        sink = _pull_positives(
            batch, sink, positives, jnp.where(found, by_positive * slopes, 0), classes
        )
    valid = classes.count(0, n, totals)
    return TripletTerms(totals, actives, valid), sink


def _sum(x: Array, axis: int) -> Array:
    """Sums along an axis of a tile.

    XLA makes what ends in a selection in one loop that vectorises, but what ends in an
    addition in several.
    """
    return jnp.sum(jnp.where(x != 0, x, 0), axis)


def _counts(masks: list[Array], axis: int) -> Array:
    """How many are true along an axis of a tile, ``[len(masks), n]``.

    Several counts share an integer, so that one sum makes them.
    """
    bits = masks[0].shape[axis].bit_length()
    together = 31 // bits
    rows = []
    for start in range(0, len(masks), together):
        some = masks[start : start + together]
        packed = sum(x.astype(jnp.int32) << (bits * k) for k, x in enumerate(some))
        packed = jnp.sum(packed, axis)
        rows += [(packed >> (bits * k)) & ((1 << bits) - 1) for k in range(len(some))]
    return jnp.stack(rows)


def _costs_and_slopes(
    hinge: Hinge, d_ap: Array, d_an: Array, found: Array, margin: Array
) -> tuple[Array, Array, Array, Array, Array]:
    """Costs, which are active, and derivatives by d_ap, by d_an and by the margin."""
    if isinstance(hinge, TripletCost):
        valid = found & (d_an < jnp.inf)
        d_ap, margin = (jnp.broadcast_to(x, d_an.shape) for x in (d_ap, margin))
        costs, pull = jax.vjp(
            lambda d_ap, d_an, margin: costs_of(d_ap, d_an, valid, margin, hinge),
            *(d_ap, d_an, margin),
        )
        slopes = pull(jnp.ones_like(costs))
        return costs, (costs > 0).astype(costs.dtype), *slopes
    gaps = d_ap + margin - d_an
    costs, slope = _with_slope(hinge, gaps)
    check_elementwise(costs, gaps)
    if hinge is jax.nn.relu:
        return costs, slope, slope, -slope, slope
    if hinge is not jax.nn.softplus:
        # Others need not vanish at minus infinity.
        valid = found & (d_an < jnp.inf)
        costs, slope = jnp.where(valid, costs, 0), jnp.where(valid, slope, 0)
    return costs, (costs > 0).astype(costs.dtype), slope, -slope, slope


def _with_slope(function: Callable[[Array], Array], x: Array) -> tuple[Array, Array]:
    """An elementwise function and its derivative."""
    return jax.jvp(function, (x,), (jnp.ones_like(x),))


def _pull(by_square: Array, a: Array, b: Array) -> Array:
    """The gradients by a of weighted half squared differences from b."""
    # Sums and products are each faster alone than in one loop.
    weights = _stored(jnp.sum(by_square, axis=1))
    products = _stored(jnp.matmul(by_square, b, precision="highest"))
    return weights[:, None] * a - products


def _pull_positives(
    batch: Batch, sink: Gradients, positives: Array, slopes: Array, classes: Classes
) -> Gradients:
    """Adds the gradients of half the squared differences ``[FEW, n]`` of positives."""
    n, d = batch.anchors.shape
    y = batch.others[0]
    blocks = Blocks.of(n, PANEL // d)

    def step(step: Array, sink: Gradients) -> Gradients:
        r, block = jnp.divmod(step, blocks.count)
        start = blocks.start(block)
        index = _rows(positives[r], start, blocks.size)
        slope = _rows(slopes[r], start, blocks.size) * blocks.fresh(block)
        rows = slope[:, None] * (_rows(batch.anchors, start, blocks.size) - y[index])
        return sink.add(start, rows).scatter(index, -rows)

    return lax.fori_loop(0, classes.most * blocks.count, step, sink)


# Panels.


class _Panel(NamedTuple):
    """Some rows of the distance matrix.

    Attributes:
        start: the first row.
        a: its anchors ``[rows, d]``.
        real: which of them count ``[rows]``: none that an earlier panel had.
        masks: its pairs ``[rows, m]``; none in rows that do not count.
        distances: ``[rows, m]``.
        slopes: their derivatives by half the squared differences, if made of products.
        near: pairs whose distance by products has too few digits, likewise.
        pull: from a gradient by distances to one by anchors and references, otherwise.
    """

    start: Array
    a: Array
    real: Array
    masks: PairMasks
    distances: Array
    slopes: Array | None
    near: Array | None
    pull: Callable[[Array], tuple[Array, Array]] | None


class _Panels(NamedTuple):
    """The distance matrix in blocks of rows.

    Attributes:
        task: what to sum up.
        batch: the batch.
        blocks: the blocks.
        offset: what the references have in common, if the metric is made of products.
        halves: of the references, likewise.
    """

    task: Task
    batch: Batch
    blocks: Blocks
    offset: Array | None
    halves: Array | None

    @classmethod
    def of(cls, task: Task, batch: Batch) -> "_Panels":
        y, products = batch.others[0], task.metric.products
        blocks = Blocks.of(len(batch.anchors), PANEL // len(y))
        if products is None:
            return cls(task, batch, blocks, None, None)
        offset = common_offset(y)
        return cls(task, batch, blocks, offset, products.halves(y, offset))

    def panel(self, block: Array) -> _Panel:
        metric, batch, blocks = self.task.metric, self.batch, self.blocks
        start = blocks.start(block)
        y, labels, real_references = batch.others
        row = start + jnp.arange(blocks.size)

        def rows(x: Array | None) -> Array | None:
            return None if x is None else _rows(x, start, blocks.size)

        a, real = rows(batch.anchors), blocks.fresh(block)
        if batch.where is not None:
            real &= rows(batch.where)
        if isinstance(batch.labels, PairMasks):
            masks = PairMasks(*map(rows, batch.labels))
            masks = keep_pairs(masks, real, real_references)
        else:
            masks = pair_masks(
                rows(batch.labels),
                labels,
                positions=row if batch.square else rows(batch.positions),
                where=real,
                reference_where=real_references,
            )
        if metric.products is None:
            itself = row if batch.square else jnp.full_like(row, -1)
            distances, pull = jax.vjp(lambda a, y: metric.against(a, y, itself), a, y)
            return _Panel(start, a, real, masks, distances, None, None, pull)
        scale = metric.products.halves(a, self.offset)[:, None] + self.halves
        squares = scale - _products(a - self.offset, y, self.offset)
        squares = jnp.where(squares < 0, 0, squares)
        distances, slopes = _with_slope(metric.products.distance, squares)
        near = squares < NEAR * scale
        return _Panel(start, a, real, masks, distances, slopes, near, None)


def _by_panels(
    task: Task,
    batch: Batch,
    weights: Array | None,
    gradient: bool,
    classes: Classes | None = None,
) -> tuple[TripletTerms, Gradients | None]:
    panels = _Panels.of(task, batch)

    def step(block: Array, state: tuple) -> tuple:
        terms, sink = state
        panel = panels.panel(block)
        cost, counts = _panel_costs(task, panel, classes)
        near = None
        if panel.near is not None:
            near = panel.near & counts
            panel = panel._replace(distances=_with_differences(panels, panel, near))
        new, pull = cost(panel.distances, batch.margin)
        if gradient:
            weight = jnp.ones_like(new.total)
            if weights is not None:
                weight = _rows(weights, panel.start, len(panel.a))
            by_distance, by_margin = pull(weight)
            sink = sink._replace(margin=sink.margin + by_margin)
            if near is None:
                ours, theirs = panel.pull(by_distance)
                sink = sink.add(panel.start, ours).add_to_references(0, theirs)
            else:
                sink = _pull_panel(panels, panel, near, by_distance, sink)
        terms = [_add_rows(old, panel.start, x) for old, x in zip(terms, new)]
        return TripletTerms(*terms), sink

    terms = TripletTerms(*[_zeros(batch, (len(batch.anchors),))] * 3)
    sink = Gradients.zero(batch) if gradient else None
    return lax.fori_loop(0, panels.blocks.count, step, (terms, sink))


# From distances and margin to terms, and a function from weights of the anchors to
# gradients by distances and margin.
_Cost = Callable[[Array, Array], tuple[TripletTerms, Callable[[Array], tuple]]]


def _panel_costs(
    task: Task, panel: _Panel, classes: Classes | None
) -> tuple[_Cost, Array]:
    """How a panel's terms are made, and of which pairs."""
    masks = panel.masks
    if task.kind is Kind.ALL:
        if classes is not None:
            every = functools.partial(_all_in_panel, task.hinge, panel, classes)
            return every, masks.positive

        def every(distances: Array, margin: Array) -> TripletTerms:
            margins = jnp.broadcast_to(margin, distances.shape[:-1])
            sums = batch_all_sums(task.hinge, distances, margins, *masks)
            return TripletTerms(*sums, count_all(masks, distances))

        return _with_pull(every), masks.positive

    if task.kind is Kind.SEMI_HARD and classes is not None:
        return _semi_hard_in_panel(task, panel, classes)
    _, positive, negative, valid = _mined_panel(task, panel)

    def chosen(distances: Array, margin: Array) -> TripletTerms:
        d_ap, d_an = take(distances, positive), take(distances, negative)
        return sums_of(costs_of(d_ap, d_an, valid, margin, task.hinge), valid)

    row = jnp.arange(len(positive))[:, None]
    pairs = jnp.zeros_like(masks.positive)
    for index in (positive, negative):
        pairs = pairs.at[row, index].max(valid)
    return _with_pull(chosen), pairs


def _with_pull(terms: Callable[[Array, Array], TripletTerms]) -> _Cost:
    def cost(distances: Array, margin: Array) -> tuple:
        out, pull = jax.vjp(terms, distances, margin)
        none = jnp.zeros_like(out.total)
        return out, lambda weights: pull(TripletTerms(weights, none, none))

    return cost


# How many positives of every anchor a panel treats at a time, and what is left in steps
# of how many; and how many columns are compared with these in one loop over an array.
_MANY, _REST, RUN = 512, 64, 32


def in_columns(
    count: Array,
    visit: Callable[[Array, int, Any], Any],
    state: Any,
    *,
    rest: int = _REST,
) -> Any:
    """``visit(first, size, state)`` until all of a count have had their turn.

    Sizes are `_MANY`, and what is left then in steps of `rest`.
    """
    # What is left of a class of 500 costs less in one large step.
    large = (count + _MANY // 2) // _MANY
    state = lax.fori_loop(
        0, large, lambda i, state: visit(i * _MANY, _MANY, state), state
    )
    start = large * _MANY
    small = -(-jnp.maximum(count - start, 0) // rest)
    return lax.fori_loop(
        0, small, lambda i, state: visit(start + i * rest, rest, state), state
    )


def in_runs(columns: list[Array], visit: Callable, state: Any) -> Any:
    """``visit(step, runs, state)`` for runs ``[RUN, rows]`` of columns ``[rows, m]``.

    The number of columns is a multiple of `RUN`.
    """

    # Cut out one step ahead, as tiles are.
    def cut(step: Array | int) -> list[Array]:
        return [lax.dynamic_slice_in_dim(x, step * RUN, RUN, axis=1).T for x in columns]

    def step(step: Array, loop: tuple) -> tuple:
        runs, state = loop
        return cut(step + 1), visit(step, runs, state)

    count = columns[0].shape[1] // RUN
    return lax.fori_loop(0, count, step, (cut(0), state))[1]


def _filled(x: Array, real: Array) -> Array:
    """Distances ``[rows, m]``, infinite where not real, m rounded up for `in_runs`."""
    x = jnp.where(real, x, jnp.inf)
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % RUN)), constant_values=jnp.inf)


def _all_in_panel(
    hinge: Hinge, panel: _Panel, classes: Classes, distances: Array, margin: Array
) -> tuple[TripletTerms, Callable[[Array], tuple]]:
    """All triplets of a panel, and what their gradient is made of.

    What a positive needs is summed up over the negatives, and the other way round, both
    as sums of a few arrays at a time: reductions are several times slower.
    """
    row, masks = jnp.arange(len(distances))[:, None], panel.masks
    d_an = _filled(distances, masks.negative)
    relu = hinge is jax.nn.relu
    count = jnp.int32 if relu else distances.dtype

    def costs(d_ap: Array, d_an: Array, found: Array) -> tuple[Array, ...]:
        if relu:
            # That triplets are active is all that has to be known of them here.
            active = (d_ap + margin > d_an).astype(count)
            return active, active, active, -active, active
        if not isinstance(hinge, TripletCost):
            d_ap = jnp.where(found, d_ap, -jnp.inf)
        d_ap, d_an, found = jnp.broadcast_arrays(d_ap, d_an, found)
        return _costs_and_slopes(hinge, d_ap, d_an, found, margin)

    def some_positives(first: Array, size: int, state: tuple) -> tuple:
        sums, by_distance, by_negative = state
        index, found = classes.some(first, size, panel.start, len(row))
        d_ap = jnp.where(found, take(distances, index), -jnp.inf if relu else 0)

        def of_positives(_: Array, runs: list[Array], sums: tuple) -> tuple:
            for d in runs[0]:
                total, active, by_ap, _, by_all = costs(d_ap, d[:, None], found)
                new = (by_ap,) if relu else (by_ap, total, active, by_all)
                sums = [old + x for old, x in zip(sums, new)]
            return tuple(sums)

        def of_negatives(_: Array, runs: list[Array], by_negative: Array) -> Array:
            for d, real in zip(*runs):
                by_negative += costs(d[:, None], d_an, real[:, None])[3]
            return by_negative

        none = (jnp.zeros_like(d_ap, count),) * (1 if relu else 4)
        by_ap, *others = in_runs([d_an], of_positives, none)
        by_negative = in_runs([d_ap, found], of_negatives, by_negative)
        by_ap = by_ap.astype(distances.dtype)
        if relu:
            # By how much each falls short of the row's farthest, as below.
            total = jnp.where(found, by_ap * (d_ap - farthest), 0)
            active = by_all = by_ap
        else:
            total, active, by_all = others
        new = (total, active, by_all)
        sums = [
            old + jnp.sum(x, axis=-1, dtype=distances.dtype)
            for old, x in zip(sums, new)
        ]
        by_distance = by_distance.at[row, index].add(jnp.where(found, by_ap, 0))
        return tuple(sums), by_distance, by_negative

    # Sums of costs are differences of sums; taken from the farthest positive they have
    # no more digits than they need.
    farthest = jnp.max(masks.positive * distances, axis=-1, keepdims=True)
    none = jnp.zeros_like(distances[:, 0])
    state = (none,) * 3, jnp.zeros_like(distances), jnp.zeros_like(d_an, count)
    (total, active, by_margin), by_distance, by_negative = in_columns(
        classes.most, some_positives, state
    )
    by_negative = by_negative[:, : distances.shape[1]]
    by_negative = by_negative.astype(distances.dtype)
    if relu:
        gaps = jnp.where(masks.negative, farthest + margin - distances, 0)
        total = total + jnp.sum(-by_negative * gaps, axis=-1)
    by_distance = by_distance + by_negative

    def pull(weights: Array) -> tuple[Array, Array]:
        return by_distance * weights[:, None], jnp.sum(by_margin * weights)

    valid = classes.count(panel.start, len(row), total) * panel.real
    return TripletTerms(total, active, valid), pull


def _semi_hard_in_panel(
    task: Task, panel: _Panel, classes: Classes
) -> tuple[_Cost, Array]:
    """As `_panel_costs`, some positives of every anchor at a time."""
    row, masks = jnp.arange(len(panel.a))[:, None], panel.masks
    real = masks.negative & (panel.distances < jnp.inf)
    d_an = _filled(panel.distances, real)
    _, farthest = _min_and_place_of_all(jnp.where(real, -panel.distances, 1), 1)
    possible = panel.real & (_rows(classes.negatives, panel.start, len(row)) > 0)

    def choose(first: Array, size: int, chosen: Array) -> Array:
        positive, found = classes.some(first, size, panel.start, len(row))
        d_ap = take(panel.distances, positive)
        nearest, negative = _nearest_beyond(d_an, d_ap)
        beyond = nearest < jnp.inf
        # The pair of a NaN stays, for the loss to show it.
        found &= possible[:, None] & (beyond | task.fallback | jnp.isnan(d_ap))
        negative = jnp.where(beyond, negative, farthest[:, None])
        return chosen.at[row, positive].max(jnp.where(found, negative, -1))

    # The negative of every pair, -1 if it has none.
    none = jnp.zeros_like(masks.positive, row.dtype) - 1
    chosen = in_columns(classes.most, choose, none)

    def some(first: Array, size: int) -> tuple[list[Array], Array]:
        positive, found = classes.some(first, size, panel.start, len(row))
        negative = take(chosen, positive)
        return [positive, jnp.maximum(negative, 0)], found & (negative >= 0)

    def add_pairs(first: Array, size: int, pairs: Array) -> Array:
        (_, negative), found = some(first, size)
        return pairs.at[row, negative].max(found)

    pairs = in_columns(classes.most, add_pairs, chosen >= 0)

    def cost(distances: Array, margin: Array) -> tuple:
        def add(first: Array, size: int, state: tuple) -> tuple:
            terms, by_distance, by_margin = state
            indices, valid = some(first, size)

            def costs(d_ap: Array, d_an: Array, margin: Array) -> Array:
                return costs_of(d_ap, d_an, valid, margin, task.hinge)

            d = [take(distances, index) for index in indices]
            margins = jnp.broadcast_to(margin, valid.shape)
            values, pull = jax.vjp(costs, *d, margins)
            *slopes, by_all = pull(jnp.ones_like(values))
            terms = jax.tree.map(jnp.add, terms, sums_of(values, valid))
            for index, slope in zip(indices, slopes):
                by_distance = by_distance.at[row, index].add(slope)
            return terms, by_distance, by_margin + jnp.sum(by_all, axis=-1)

        none = jnp.zeros_like(distances[:, 0])
        state = TripletTerms(*[none] * 3), jnp.zeros_like(distances), none
        terms, by_distance, by_margin = in_columns(classes.most, add, state)

        def pull(weights: Array) -> tuple[Array, Array]:
            return by_distance * weights[:, None], jnp.sum(by_margin * weights)

        return terms, pull

    return cost, pairs


def _nearest_beyond(d_an: Array, d_ap: Array) -> tuple[Array, Array]:
    """For every ``d_ap[a, p]`` the least ``d_an[a, n]`` above it, and its first n.

    Distances are not negative, and no `d_an` is NaN. All are compared with all: sorting
    takes longer up to thousands of positives.
    """
    # As integers the floats are in the same order, and what is not above wraps to more
    # than what is: half the instructions of comparing.
    bits = jnp.dtype(f"uint{8 * d_an.dtype.itemsize}")
    ours, theirs = (lax.bitcast_convert_type(x, bits) for x in (d_ap, d_an))
    ours += 1

    def visit(step: Array, runs: list[Array], state: tuple) -> tuple[Array, Array]:
        old, where = state
        least = old
        for x in runs[0]:
            least = jnp.minimum(least, x[:, None] - ours)
        return least, jnp.where(least < old, step, where)

    none = jnp.full_like(ours, jnp.iinfo(bits).max), jnp.zeros_like(ours, jnp.int32)
    least, run = in_runs([theirs], visit, none)
    row = jnp.arange(len(ours))[:, None, None]
    members = theirs[row, run[..., None] * RUN + jnp.arange(RUN)]
    within = jnp.argmax(members == (least + ours)[..., None], axis=-1)
    nearest = lax.bitcast_convert_type(least + ours, d_an.dtype)
    # If there is none above, this is one that is not.
    return jnp.where(nearest > d_ap, nearest, jnp.inf), run * RUN + within


def _mined_panel(task: Task, panel: _Panel) -> Triplets:
    """The triplets ``[rows, k]`` of a panel."""
    if task.kind is Kind.SEMI_HARD:
        return batch_semi_hard_triplets(
            panel.distances, panel.masks, fallback=task.fallback
        )
    triplets = batch_hard_triplets(panel.distances, panel.masks)
    return Triplets(*(field[:, None] for field in triplets))


def _with_differences(panels: _Panels, panel: _Panel, near: Array) -> Array:
    """Distances, those of near pairs from the differences."""
    row, products = jnp.arange(len(panel.a)), panels.task.metric.products
    y = panels.batch.others[0]

    def visit(distances: Array, column: Array, found: Array) -> Array:
        direct = products.distance(products.half_square(panel.a, y[column]))
        direct = jnp.where(found, direct, distances[row, column])
        return distances.at[row, column].set(direct, unique_indices=True)

    return in_turn(near, visit, panel.distances)


def _pull_panel(
    panels: _Panels, panel: _Panel, near: Array, by_distance: Array, sink: Gradients
) -> Gradients:
    """Adds the gradients of a panel's distances, by products but for near pairs."""
    row, products = jnp.arange(len(panel.a)), panels.task.metric.products
    y = panels.batch.others[0]

    def visit(sink: Gradients, column: Array, found: Array) -> Gradients:
        difference = panel.a - y[column]
        squares = products.half_square(panel.a, y[column])
        slope = _with_slope(products.distance, squares)[1] * by_distance[row, column]
        rows = jnp.where(found, slope, 0)[:, None] * difference
        return sink.add(panel.start, rows).scatter(column, -rows)

    sink = in_turn(near, visit, sink)
    by_square = jnp.where(near, 0, by_distance * panel.slopes)
    # Differences do not depend on the origin, their digits do.
    offset = panels.offset
    a = panel.a - offset
    blocks = Blocks.of(len(y), PANEL // y.shape[1])

    def step(block: Array, sink: Gradients) -> Gradients:
        start = blocks.start(block)
        b = _rows(y, start, blocks.size) - offset
        some = lax.dynamic_slice_in_dim(by_square, start, blocks.size, axis=1)
        some = jnp.where(blocks.fresh(block), some, 0)
        sink = sink.add(panel.start, _pull(some, a, b))
        return sink.add_to_references(start, _pull(some.T, b, a))

    return lax.fori_loop(0, blocks.count, step, sink)


# Indices alone.


def hard_triplets(task: Task, batch: Batch) -> Triplets:
    """The triplets ``[n]`` of batch-hard mining."""
    if task.metric.products is None or isinstance(batch.labels, PairMasks):
        return _hard_by_panels(task, batch)
    classes = Classes.of(batch)

    def by_tiles() -> Triplets:
        tiles = Tiles.of(task, batch)
        listed = _mined_by_tiles(task, tiles, classes)
        positive, negative, valid = (x[0] for x in listed[:3])
        # Indices are 64 bits long under jax_enable_x64.
        positive, negative = positive.astype(int), negative.astype(int)
        return Triplets(jnp.arange(len(valid)), positive, negative, valid)

    return lax.cond(classes.most <= FEW, by_tiles, lambda: _hard_by_panels(task, batch))


def _hard_by_panels(task: Task, batch: Batch) -> Triplets:
    panels, n = _Panels.of(task, batch), len(batch.anchors)

    def step(block: Array, found: tuple[Array, ...]) -> tuple[Array, ...]:
        panel = panels.panel(block)
        new = [field[:, 0] for field in _mined_panel(task, panel)[1:]]
        fresh = panels.blocks.fresh(block)
        return tuple(
            lax.dynamic_update_slice_in_dim(
                old,
                jnp.where(fresh, x, _rows(old, panel.start, len(x))),
                panel.start,
                0,
            )
            for old, x in zip(found, new)
        )

    index = _zeros(batch, (n,)).astype(int)
    found = lax.fori_loop(0, panels.blocks.count, step, (index, index, index > 0))
    return Triplets(jnp.arange(n), *found)


def semi_hard_triplets(task: Task, batch: Batch, size: int) -> CountedTriplets:
    """The triplets of semi-hard mining, compacted in order of anchor and positive."""
    panels = _Panels.of(task, batch)

    def step(block: Array, state: tuple) -> tuple:
        count, *found = state
        panel = panels.panel(block)
        anchor, positive, negative, valid = _mined_panel(task, panel)
        slot = count + jnp.cumsum(valid.ravel()) - 1
        slot = jnp.where(valid.ravel(), slot, size)
        found = [
            old.at[slot].set(x.ravel(), mode="drop")
            for old, x in zip(found, (anchor + panel.start, positive, negative))
        ]
        return count + jnp.sum(valid), *found

    index = _zeros(batch, (size,)).astype(int)
    count, *found = lax.fori_loop(
        0, panels.blocks.count, step, (index[0], *[index] * 3)
    )
    return CountedTriplets(*found, jnp.arange(size) < count, count)
