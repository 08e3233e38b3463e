"""Rankings of references: blocks of queries against tiles of references."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from tripletjax._matrices import ordered_bits
from tripletjax._pairwise.batch import Batch
from tripletjax._pairwise.class_index import ClassIndex
from tripletjax._pairwise.slices import RUN, Blocks, Index
from tripletjax.distances import Metric, common_offset
from tripletjax.pairs import PairMasks, Pairs, as_boolean, keep_pairs, match_labels

T = TypeVar("T")

# A block has at most MOST_ROWS queries and PANEL distances; a tile has COLUMNS
# references.
MOST_ROWS, PANEL, COLUMNS = 512, 2**25, 2048
# With at most MAX_COUNTED relevant references per query, counting the references before
# each relevant one is faster than sorting all (`benchmarks/retrieval.py`). The relevant
# ones are counted GROUP at a time, the last ones REST at a time.
MAX_COUNTED, GROUP, REST = 512, 128, 16


def per_query(
    reference_where: ArrayLike | None, n: int, m: int
) -> tuple[Array | None, ArrayLike | None]:
    """Split `reference_where` into a mask ``[n, m]`` or a mask ``[m]``; one is None."""
    if reference_where is None or jnp.ndim(reference_where) != 2:
        return None, reference_where
    each = as_boolean("reference_where", reference_where)
    if each.shape != (n, m):
        raise ValueError(
            f"reference_where must be [{m}], or [{n}, {m}] for each query, got shape "
            f"{each.shape}."
        )
    return each, None


def masks_of(batch: Batch, each: Array | None) -> PairMasks:
    """Masks of the relevant references and of the others that each query ranks."""
    masks = batch.pairs.masks()
    if each is None:
        return masks
    return PairMasks(masks.positive & each, masks.negative & each)


def with_masks(batch: Batch, masks: PairMasks) -> Batch:
    """The batch with masks instead of labels, positions and padding."""
    pairs = Pairs(masks, None, None, None, None)
    return Batch(batch.anchors, batch.reference_side[0], pairs)


class RankedTile(NamedTuple):
    """A block of queries against a tile of references.

    Attributes:
        index: integers ``[columns]``, the indices of the references.
        keys: integers ``[rows, columns]`` in the order of distances. References that
            a query does not rank have the largest key.
        relevant: bool ``[rows, columns]``.
    """

    index: Array
    keys: Array
    relevant: Array


class ReferenceTiles(NamedTuple):
    """References in tiles ``[tiles, columns, ...]``, the last one padded.

    Attributes:
        index: integers, the indices of the references.
        vectors: the references minus the common offset.
        halves: `Products.halves` of the references, 0 for other metrics.
        labels: integers.
        real: bool, False for padding.
    """

    index: Array
    vectors: Array
    halves: Array
    labels: Array
    real: Array


class Rankings(NamedTuple):
    """References ranked for every query, a block of queries at a time."""

    metric: Metric
    batch: Batch
    blocks: Blocks
    offset: Array
    classes: ClassIndex | None = None

    @classmethod
    def of(cls, metric: Metric, batch: Batch) -> "Rankings":
        n, y = len(batch.anchors), batch.reference_side[0]
        pairs = batch.pairs
        if batch.square:
            pairs = pairs._replace(
                reference_labels=batch.labels if batch.has_classes else None,
                positions=jnp.arange(n),
                reference_where=pairs.where,
            )
        elif pairs.positions is None:
            pairs = pairs._replace(positions=jnp.full(n, -1))
        batch = Batch(batch.anchors, y, pairs)
        offset = common_offset(y) if metric.products else jnp.zeros_like(y[0])
        rows = max(1, min(MOST_ROWS, PANEL // len(y)))
        return cls(metric, batch, Blocks.of(n, rows), offset)

    def by_class(self, classes: ClassIndex) -> tuple["Rankings", Array]:
        """The rankings with queries sorted by class, and the order of the queries."""
        batch = self.batch
        order = jnp.argsort(classes.start)
        pairs = batch.pairs._replace(
            labels=batch.labels[order], positions=self.positions[order]
        )
        batch = batch._replace(anchors=batch.anchors[order], pairs=pairs)
        classes = classes._replace(
            **{k: getattr(classes, k)[order] for k in ("start", "rank", "positives")}
        )
        return self._replace(batch=batch, classes=classes), order

    @property
    def positions(self) -> Array:
        """The index of each query among the references, or -1."""
        assert self.batch.pairs.positions is not None
        return self.batch.pairs.positions

    def tiles(self, order: Array | None = None) -> ReferenceTiles:
        """All references in tiles, in the given order or by index."""
        y, labels, real = self.batch.reference_side
        if not self.batch.has_classes:
            labels = jnp.zeros(len(y), int)
        index = jnp.arange(len(y)) if order is None else order
        real = jnp.ones(len(y), bool) if real is None else real
        if order is not None:
            y, labels, real = y[order], labels[order], real[order]
        products = self.metric.products
        halves = (
            products.halves(y, self.offset) if products else jnp.zeros_like(y[:, 0])
        )
        columns = min(COLUMNS, len(y) + -len(y) % RUN)

        def cut(x: Array) -> Array:
            x = jnp.pad(x, [(0, -len(x) % columns)] + [(0, 0)] * (x.ndim - 1))
            return x.reshape(-1, columns, *x.shape[1:])

        return ReferenceTiles(*map(cut, (index, y - self.offset, halves, labels, real)))

    def full(self, shape: tuple[int, ...], value: Any) -> Array:
        """`jnp.full` that varies over a mesh as queries do, as loop carries must."""
        value = jnp.asarray(value)
        return jnp.full(shape, value) + self.batch.zeros().astype(value.dtype)

    def rows(self, x: Array, start: Array) -> Array:
        return lax.dynamic_slice_in_dim(x, start, self.blocks.size)

    def fill(self, function: Callable[[Array], T]) -> T:
        """Concatenate a function of each block's first query over all blocks."""
        blocks = self.blocks

        def step(_: None, block: Array) -> tuple[None, T]:
            return None, function(blocks.start(block))

        _, parts = lax.scan(step, None, jnp.arange(blocks.count))
        # The last block may repeat rows of the block before it.
        whole = (blocks.count - 1) * blocks.size

        def joined(x: Array) -> Array:
            first = x[:-1].reshape(whole, *x.shape[2:])
            return jnp.concatenate([first, x[-1, whole - blocks.n :]])

        return jax.tree.map(joined, parts)

    def against(
        self, start: Array, itself: Array
    ) -> Callable[[Array, ReferenceTiles], RankedTile]:
        """A function that ranks one tile for the block of queries from `start`.

        The function takes the position of the tile's first reference, and the tile.
        `itself` are the positions of the queries among all references in tiles: a query
        does not rank itself.
        """
        products = self.metric.products
        a = self.rows(self.batch.anchors, start)
        labels = jax.tree.map(lambda x: self.rows(x, start), self.batch.pairs.labels)
        if products:
            halves = products.halves(a, self.offset)[:, None]
        a = a - self.offset

        def tile(first: Array, part: ReferenceTiles) -> RankedTile:
            own = itself - first
            if products:
                inner = jnp.matmul(a, part.vectors.T, precision="highest")
                values = halves + part.halves - inner
                values = jnp.where(values < 0, 0, values)
            else:
                values = self.metric._matrix_checked(a, part.vectors, own)
            if isinstance(labels, PairMasks):
                columns = len(part.index)
                masks = PairMasks(*(_columns_at(x, first, columns) for x in labels))
            else:
                masks = match_labels(labels, part.labels, own)
                masks = keep_pairs(masks, None, part.real)
            keys = ordered_bits(values)
            last = jnp.iinfo(keys.dtype).max
            keys = jnp.where(masks.positive | masks.negative, keys, last)
            return RankedTile(part.index, keys, masks.positive)

        return tile

    def scan(
        self,
        start: Array,
        tiles: ReferenceTiles,
        visit: Callable[[Any, RankedTile], tuple[Any, Any]],
        state: Any,
    ) -> tuple[Any, Any]:
        """`lax.scan` over all tiles, for the block of queries from `start`."""
        tile = self.against(start, self.rows(self.positions, start))

        def step(state: Any, part: ReferenceTiles) -> tuple[Any, Any]:
            return visit(state, tile(part.index[0], part))

        return lax.scan(step, state, tiles)

    def first(
        self, tiles: ReferenceTiles, by_class: ReferenceTiles
    ) -> Callable[[Array], list[Array]]:
        """Rank the first relevant reference of queries that are sorted by class."""
        columns, classes = tiles.index.shape[1], self.classes
        assert classes is not None
        dtype = ordered_bits(tiles.halves[0, 0]).dtype
        last = jnp.iinfo(dtype).max

        def nearest(start: Array) -> tuple[Array, Array]:
            """Key and index of the nearest relevant reference.

            References are sorted by class, too: only some tiles can have relevant ones.
            """
            begin, rank, positives = (
                self.rows(x, start)
                for x in (classes.start, classes.rank, classes.positives)
            )
            m = len(classes.order)
            itself = jnp.where(rank < m, begin + rank, -1)
            end = jnp.max(jnp.where(positives > 0, begin + positives + (rank < m), 0))
            tile = self.against(start, itself)

            def visit(i: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
                # Both [rows, columns]: the least key in each column of the tiles so
                # far, and the index of its reference, the first one of equals.
                least, nearest = state
                part = jax.tree.map(lambda x: x[i], by_class)
                index, keys, relevant = tile(i * columns, part)
                closer = relevant & (keys < least)
                least = jnp.where(closer, keys, least)
                return least, jnp.where(closer, index, nearest)

            shape = self.blocks.size, columns
            none = self.full(shape, jnp.array(last, dtype)), self.full(shape, m)
            least, nearest = lax.fori_loop(
                begin[0] // columns, -(-end // columns), visit, none
            )
            limit = jnp.min(least, axis=1, keepdims=True)
            index = jnp.where(least == limit, nearest, m)
            return limit, jnp.min(index, axis=1, keepdims=True)

        def rank(start: Array) -> list[Array]:
            limit, index = nearest(start)

            def visit(before: Array, tile: RankedTile) -> tuple[Array, None]:
                # `before` [rows, columns] counts nearer references in each column.
                # Among equal distances the lower index is nearer. Indices are written
                # as a range so that XLA vectorises the loop.
                lower = jnp.arange(columns) < index - tile.index[0]
                keys = jnp.where(tile.relevant, last, tile.keys)
                return before + (keys < jnp.where(lower, limit + 1, limit)), None

            before = self.full((self.blocks.size, columns), 0)
            before, _ = self.scan(start, tiles, visit, before)
            return [jnp.sum(before, axis=1) + 1]

        return rank

    def nearest(
        self, tiles: ReferenceTiles, k: int, start: Array
    ) -> tuple[Array, Array]:
        """Distances and indices of the k nearest references."""
        values, index = least_of_panel(self._panel(tiles, start), k)
        return self._by_differences(start, -values, index)

    def nearest_of_classes(
        self, tiles: ReferenceTiles, labels: Array, k: int, start: Array
    ) -> tuple[Array, Array]:
        """Distances and indices of the nearest reference of the k nearest classes."""
        nearness = self._nearness(tiles, start)
        labels = jnp.pad(labels, (0, nearness.shape[1] - len(labels)))

        def next_class(nearness: Array, _: None) -> tuple[Array, tuple[Array, Array]]:
            near = jnp.max(nearness, axis=1, keepdims=True)
            index = jnp.argmax(nearness == near, axis=1)
            others = labels != labels[index][:, None]
            return jnp.where(others, nearness, -jnp.inf), (near[:, 0], index)

        _, (near, index) = lax.scan(next_class, nearness, length=k)
        return self._by_differences(start, near.T, index.T)

    def _nearness(self, tiles: ReferenceTiles, start: Array) -> Array:
        """Floats ``[rows, columns]`` in the reverse order of distances.

        Minus infinity for references that a query does not rank.
        """
        panel = self._panel(tiles, start)
        return -jnp.moveaxis(panel, 1, 0).reshape(self.blocks.size, -1)

    def _panel(self, tiles: ReferenceTiles, start: Array) -> Array:
        """Floats ``[tiles, rows, columns]`` in the order of distances.

        Infinity for references that a query does not rank.
        """
        return self.scan(
            start, tiles, lambda _, tile: (None, as_floats(tile.keys)), None
        )[1]

    def _by_differences(
        self, start: Array, near: Array, index: Array
    ) -> tuple[Array, Array]:
        """Distances of differences, without cancellation, and indices in order."""
        m = len(self.batch.reference_side[0])
        a = self.rows(self.batch.anchors, start)
        partners = self.batch.reference_side[0][index]
        each = jax.vmap(jax.vmap(self.metric._paired_checked, (None, 0)))
        distances = each(a, partners)
        key, exists = ordered_bits(distances), near > -jnp.inf
        last = jnp.iinfo(key.dtype).max
        key, index = jnp.where(exists, key, last), jnp.where(exists, index, m)
        _, index, distances = lax.sort((key, index, distances), num_keys=2)
        exists = index < m
        return jnp.where(exists, distances, jnp.inf), jnp.where(exists, index, -1)

    def by_counting(self, tiles: ReferenceTiles, start: Array) -> tuple[Array, ...]:
        """Rank of the first relevant reference, R-precision, MAP@R, average precision.

        Counts the references before each relevant one.
        """
        _, panel = self.scan(
            start, tiles, lambda _, tile: (None, _as_runs(tile.keys)), None
        )
        panel = panel.reshape(-1, *panel.shape[2:])
        runs, rows, _ = panel.shape
        row = jnp.arange(rows)[:, None]
        last, nowhere = jnp.iinfo(panel.dtype).max, runs * RUN + 1
        classes = self.classes
        assert classes is not None
        most = jnp.max(classes.positives)

        def rank(first: Index, size: int, ranks: Array) -> Array:
            index, exists = classes.positives_slice(first, size, start, rows)
            run = index // RUN
            own = jnp.where(exists, panel[run, row, index % RUN], last - 1)
            # Among equal distances the lower index comes first. Earlier runs have lower
            # indices; within the same run, indices are compared one by one.
            before = _count_below(panel, lambda i: own + (i < run))
            equal = panel[run, row] == own[..., None]
            lower = jnp.arange(RUN) < (index % RUN)[..., None]
            before += jnp.sum(equal & lower, axis=-1)
            rank = jnp.where(exists, before + 1, nowhere)
            return lax.dynamic_update_slice_in_dim(ranks, rank, first, axis=1)

        # A class has at most as many members as there are references.
        width = min(MAX_COUNTED, runs * RUN + -(runs * RUN) % GROUP)
        ranks = _in_groups(most, rank, self.full((rows, width), nowhere))
        relevant = lax.dynamic_slice_in_dim(classes.positives, start, rows)
        among = _as_runs(ranks)

        def add(group: Array, sums: tuple[Array, ...]) -> tuple[Array, ...]:
            own = lax.dynamic_slice_in_dim(ranks, group * GROUP, GROUP, axis=1)
            upto = _count_below(among, lambda _: own + 1)
            precision = jnp.where(own < nowhere, upto / own, 0)
            within = own <= relevant[:, None]
            new = within, precision * within, precision
            return tuple(old + jnp.sum(x, axis=1) for old, x in zip(sums, new))

        none = (self.full((rows,), 0.0),) * 3
        sums = lax.fori_loop(0, -(-most // GROUP), add, none)
        divisor = jnp.maximum(relevant, 1)
        return jnp.min(ranks, axis=1), *(x / divisor for x in sums)

    def by_sorting(self, tiles: ReferenceTiles, start: Array) -> tuple[Array, ...]:
        """The results of `by_counting`, by sorting all references."""

        def visit(_: None, tile: RankedTile) -> tuple[None, tuple[Array, Array]]:
            return None, (tile.keys, tile.relevant.astype(jnp.int8))

        _, panel = self.scan(start, tiles, visit, None)
        keys, relevant = (
            jnp.moveaxis(x, 1, 0).reshape(self.blocks.size, -1) for x in panel
        )
        _, relevant = lax.sort((keys, relevant), num_keys=1, is_stable=True)
        relevant = relevant > 0
        rank = jnp.arange(1, keys.shape[1] + 1)
        count = jnp.sum(relevant, axis=1, keepdims=True)
        precision = jnp.cumsum(relevant, axis=1) / rank
        within = relevant & (rank <= count)
        sums = within, precision * within, precision * relevant
        divisor = jnp.maximum(count[:, 0], 1)
        first = jnp.argmax(relevant, axis=1) + 1
        return first, *(jnp.sum(x, axis=1) / divisor for x in sums)


def _columns_at(mask: Array, first: Array, count: int) -> Array:
    """Columns of a mask from `first` on, False beyond its end."""
    padded = jnp.pad(mask, ((0, 0), (0, -mask.shape[1] % count)))
    return lax.dynamic_slice_in_dim(padded, first, count, axis=1)


def least_of_panel(panel: Array, k: int) -> tuple[Array, Array]:
    """Find the k least numbers of every row of ``[tiles, rows, columns]``.

    The k least numbers lie in the k runs of columns that have the least minima. Only
    the minima of runs and the numbers of k runs are sorted.

    Returns:
        Numbers and their columns among all tiles ``[rows, k]``, ties by the lower
        column.
    """
    tiles, rows, columns = panel.shape
    per_tile = columns // RUN
    runs = panel.reshape(tiles, rows, per_tile, RUN)
    if k < tiles * per_tile:
        least = jnp.moveaxis(jnp.min(runs, axis=-1), 1, 0).reshape(rows, -1)
        # Among equals, top_k returns the lowest index first.
        chosen = jnp.sort(lax.top_k(-least, k)[1], axis=1)
        tile, run = jnp.divmod(chosen, per_tile)
        values = runs[tile, jnp.arange(rows)[:, None], run].reshape(rows, -1)
        column = (chosen[..., None] * RUN + jnp.arange(RUN)).reshape(rows, -1)
    else:
        values = jnp.moveaxis(panel, 1, 0).reshape(rows, -1)
        column = jnp.broadcast_to(jnp.arange(values.shape[1]), values.shape)
    near, place = lax.top_k(-values, k)
    return -near, jnp.take_along_axis(column, place, axis=1)


def as_floats(keys: Array) -> Array:
    """Invert `ordered_bits`: floats in the order of keys, infinity for the last key.

    XLA finds the least float several times faster than the least integer. Overflowed
    distances and NaN become the largest finite number.
    """
    last = jnp.iinfo(keys.dtype).max
    dtype = jnp.float64 if keys.dtype == jnp.int64 else jnp.float32
    bits = jnp.where(keys < 0, keys ^ last, keys)
    most = jnp.finfo(dtype).max
    floats = jnp.clip(lax.bitcast_convert_type(bits, dtype), -most, most)
    floats = jnp.where(jnp.isnan(floats), most, floats)
    return jnp.where(keys == last, jnp.inf, floats)


def _as_runs(x: Array) -> Array:
    """``[rows, m]`` as ``[m / RUN, rows, RUN]``."""
    return jnp.moveaxis(x.reshape(len(x), -1, RUN), 1, 0)


def _count_below(runs: Array, limit: Callable[[Array], Array]) -> Array:
    """Count the numbers of each row below the limits ``[rows, k]`` of their run.

    A Python loop over columns: on CPUs, XLA's reductions are several times slower.
    """

    def step(below: Array, run: tuple[Array, Array]) -> tuple[Array, None]:
        index, x = run
        limits = limit(index)
        for column in range(RUN):
            below += (x[:, column, None] < limits).astype(below.dtype)
        return below, None

    indices = jnp.arange(len(runs))
    none = jnp.zeros_like(limit(indices[0]), int)
    return lax.scan(step, none, (indices, runs))[0]


def _in_groups(
    count: Array, visit: Callable[[Array | int, int, Array], Array], state: Array
) -> Array:
    """Call ``visit(first, size, state)`` for groups of columns up to a count.

    Large groups cost less per column; small groups at the end waste fewer columns.
    Every size is compiled separately, which takes a second: there are two sizes, and
    one if the columns fit into one group.
    """
    first: Array | int = 0
    if state.shape[1] > GROUP:
        first = count // GROUP * GROUP
        state = lax.fori_loop(
            0, count // GROUP, lambda i, s: visit(i * GROUP, GROUP, s), state
        )
    return lax.fori_loop(
        0,
        -(-(count - first) // REST),
        lambda i, s: visit(first + i * REST, REST, s),
        state,
    )
