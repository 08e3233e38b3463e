"""Sums over triplets with references that go round the devices, a part at a time.

Every device keeps its own part of the vectors, O(n d / devices), and labels of all.
The parts go round a ring; what is found out about an anchor stays with it, gradients
of a part's references go with the part, and both are complete when it is home again.
Of a batch-all loss, for some positives of every anchor at a time,

    a round   the distances of these positives,
    a round   their triplets with all negatives, and the gradients by negatives,
    a round   the gradients by the positives.

Mined losses go round for positives, for negatives, and for the gradients of both.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from tripletjax._engine.by_tiles import (
    AllSums,
    add_all_negatives,
    by_margin_of,
    costs_of_squares,
)
from tripletjax._engine.search import (
    MAX_TILE_POSITIVES,
    farthest_negatives,
    nearest_negatives,
)
from tripletjax._engine.slopes import with_slope
from tripletjax._engine.spec import Gradients, LossSpec, Mining
from tripletjax._pairwise.batch import Batch
from tripletjax._pairwise.class_index import ClassIndex
from tripletjax._pairwise.mesh import AxisName
from tripletjax._pairwise.slices import Blocks, Index, add_rows, rows_at
from tripletjax._pairwise.tiles import Tiles
from tripletjax.distances import common_offset
from tripletjax.losses import TripletTerms

# From a part, its first reference, what goes with it and what stays, to the latter two.
Visit = Callable[[Batch, Array, Any, Any], tuple[Any, Any]]


class Ring(NamedTuple):
    """A batch of which every device has its own anchors and references.

    Attributes:
        spec: what to sum up.
        batch: own vectors, with labels and `where` of all references.
        classes: the positives of own anchors, by their indices among all references.
        axis_name: of the mesh axes that the ring goes along.
        margin: of the loss.
        weights: of own anchors in the gradient ``[n]``, all 1 if None.
        offset: what the references of all devices have in common ``[d]``.
    """

    spec: LossSpec
    batch: Batch
    classes: ClassIndex
    axis_name: AxisName
    margin: Array
    weights: Array | None
    offset: Array

    @property
    def references(self) -> Array:
        assert self.batch.references is not None
        return self.batch.references

    def round(self, visit: Visit, state: Any, moving: Any = ()) -> tuple[Any, Any]:
        """Visits all parts, its own first.

        Returns:
            What went with its own part, and the state.
        """
        devices, me = lax.axis_size(self.axis_name), lax.axis_index(self.axis_name)
        to_next = [(i, (i - 1) % devices) for i in range(devices)]

        def step(i: Array, loop: tuple) -> tuple:
            y, moving, state = loop
            first = (me + i) % devices * len(y)
            moving, state = visit(self.part(y, first), first, moving, state)
            y, moving = jax.tree.map(
                lambda x: lax.ppermute(x, self.axis_name, to_next), (y, moving)
            )
            return y, moving, state

        _, moving, state = lax.fori_loop(
            0, devices, step, (self.references, moving, state)
        )
        return moving, state

    def part(self, y: Array, first: Array) -> Batch:
        """Own anchors against the references from one on."""
        pairs = self.batch.pairs

        def own(x: Array | None) -> Array | None:
            return None if x is None else rows_at(x, first, len(y))

        positions = pairs.positions
        return Batch(
            self.batch.anchors,
            y,
            pairs._replace(
                reference_labels=own(pairs.reference_labels),
                reference_where=own(pairs.reference_where),
                positions=None if positions is None else positions - first,
            ),
        )

    def positives(self, first: Index) -> tuple[Array, Array]:
        """Some positives ``[MAX_TILE_POSITIVES, n]``, and which of them there are."""
        index = first + jnp.arange(MAX_TILE_POSITIVES)
        return jax.vmap(lambda r: self.classes.positive(r, 0, self.n))(index)

    def squares(self, index: Array, count: Index) -> Array:
        """Half the squared differences to references ``[k, n]``."""

        def visit(part: Batch, first: Array, moving: Any, squares: Array) -> tuple:
            def block(k: Array, start: Array, fresh: Array, squares: Array) -> Array:
                a, b, _, here = _pair(part, first, index, k, start, len(fresh))
                new = self.spec.metric.inner_products.half_square(a, b)
                old = lax.dynamic_slice(squares, (k, start), (1, len(fresh)))
                new = jnp.where(here, new.astype(old.dtype), old)
                return lax.dynamic_update_slice(squares, new, (k, start))

            return moving, self.for_each_block(part, count, block, squares)

        return self.round(visit, self.batch.zeros(index.shape))[1]

    def pull(
        self, grads: Gradients, chosen: Sequence[tuple[Array, Array]], count: Index
    ) -> Gradients:
        """Adds gradients by vectors, of references ``[k, n]`` and slopes by squares."""

        def visit(part: Batch, first: Array, moving: Array, ours: Array) -> tuple:
            def block(k: Array, start: Array, fresh: Array, state: tuple) -> tuple:
                moving, ours = state
                size = len(fresh)
                for index, slopes in chosen:
                    a, b, at, here = _pair(part, first, index, k, start, size)
                    slope = lax.dynamic_slice(slopes, (k, start), (1, size))[0]
                    rows = jnp.where(here & fresh, slope, 0)[:, None] * (a - b)
                    ours = add_rows(ours, start, rows)
                    moving = moving.at[at].add(-rows)
                return moving, ours

            return self.for_each_block(part, count, block, (moving, ours))

        assert grads.references is not None
        theirs, ours = self.round(visit, grads.anchors, grads.references)
        return grads._replace(anchors=ours, references=theirs)

    def for_each_block(
        self, part: Batch, count: Index, visit: Callable[..., Any], state: Any
    ) -> Any:
        """``visit(k, start, fresh, state)`` for blocks of anchors, all k below a count.

        Which of a block's anchors no earlier one had, `fresh` says.
        """
        n, d = part.anchors.shape
        blocks = Blocks.of(n, self.spec.cut.panel // d)

        def step(step: Array, state: Any) -> Any:
            k, block = jnp.divmod(step, blocks.count)
            start = blocks.start(block)
            return visit(k.astype(start.dtype), start, blocks.fresh(block), state)

        return lax.fori_loop(0, count * blocks.count, step, state)

    def least(
        self, find: Callable[[Tiles], tuple[Array, Array]], shape: tuple[int, ...]
    ) -> tuple[Array, Array]:
        """The least of what is found in each part, and the first of its indices.

        Infinity, and 0, where nothing is found.
        """
        order = self.classes.order

        def visit(part: Batch, first: Array, moving: Any, state: tuple) -> tuple:
            value, index = find(self.tiles(part))
            index = index.astype(order.dtype) + first
            old, where = state
            less = (value < old) | ((value == old) & (index < where))
            return moving, (jnp.where(less, value, old), jnp.where(less, index, where))

        zeros = self.batch.zeros(shape)
        none = zeros + jnp.inf, zeros.astype(order.dtype) + len(order)
        _, (value, index) = self.round(visit, none)
        return value, jnp.where(value < jnp.inf, index, 0)

    def nearest(self, bounds: Array | None, count: Index) -> tuple[Array, Array]:
        """Half squares and indices ``[k, n]`` of nearest negatives beyond bounds."""
        k = 1 if bounds is None else len(bounds)
        return self.least(
            lambda tiles: nearest_negatives(tiles, bounds, count), (k, self.n)
        )

    def farthest(self, wanted: Array) -> Array:
        """The indices ``[n]`` of farthest negatives of the anchors that want one."""

        def find(tiles: Tiles) -> tuple[Array, Array]:
            value, index = farthest_negatives(tiles, wanted)
            return -value, index

        # All go, or none does.
        asked = lax.psum(jnp.any(wanted).astype(jnp.int32), self.axis_name) > 0
        none = self.batch.zeros((self.n,)).astype(self.classes.order.dtype)
        return lax.cond(asked, lambda: self.least(find, (self.n,))[1], lambda: none)

    @property
    def n(self) -> int:
        return len(self.batch.anchors)

    def tiles(self, part: Batch) -> Tiles:
        return Tiles.of(self.spec.metric, part, self.spec.cut, offset=self.offset)


def sums_by_ring(
    spec: LossSpec,
    batch: Batch,
    margin: Array,
    weights: Array | None,
    axis_name: AxisName,
    gradient: bool,
) -> tuple[TripletTerms, Gradients | None]:
    """The terms, and the gradient of their total weighted per anchor.

    That of references is of the terms of all devices.
    """
    offset = common_offset(batch.reference_side[0], axis_name)
    ring = Ring(spec, batch, ClassIndex.of(batch), axis_name, margin, weights, offset)
    most = lax.pmax(ring.classes.max_positives, axis_name)
    terms = TripletTerms(*[batch.zeros((ring.n,))] * 3)
    grads = Gradients.zero(batch) if gradient else None
    if spec.mining is Mining.HARD:
        return _hard(ring, most, (terms, grads))
    add = _add_all if spec.mining is Mining.ALL else _add_semi_hard

    def some(chunk: Array, state: tuple) -> tuple:
        first = chunk * MAX_TILE_POSITIVES
        count = jnp.minimum(most - first, MAX_TILE_POSITIVES)
        return add(ring, first, count, state)

    terms, grads = lax.fori_loop(
        0, -(-most // MAX_TILE_POSITIVES), some, (terms, grads)
    )
    if spec.mining is Mining.ALL:
        terms = terms._replace(
            valid=ring.classes.count_triplets(0, ring.n, terms.total)
        )
    return terms, grads


def _hard(
    ring: Ring, most: Array, state: tuple
) -> tuple[TripletTerms, Gradients | None]:
    def farther(chunk: Array, best: tuple) -> tuple:
        first = chunk * MAX_TILE_POSITIVES
        count = jnp.minimum(most - first, MAX_TILE_POSITIVES)
        index, found = ring.positives(first)
        squares = jnp.where(found, ring.squares(index, count), -1)
        row = jnp.argmax(squares, axis=0)[None]
        value, index = (jnp.take_along_axis(x, row, 0) for x in (squares, index))
        old, where = best
        new = (value > old) | jnp.isnan(value)
        return jnp.where(new, value, old), jnp.where(new, index, where)

    zeros = ring.batch.zeros((1, ring.n))
    none = zeros - 1, zeros.astype(ring.classes.order.dtype)
    squares, positive = lax.fori_loop(0, -(-most // MAX_TILE_POSITIVES), farther, none)
    valid = ~(squares < 0) & (ring.classes.negatives > 0)
    _, negative = ring.nearest(None, 1)
    squares = jnp.maximum(squares, 0), ring.squares(negative, 1)
    return _add_triplets(ring, (positive, negative), squares, valid, 1, state)


def _add_semi_hard(
    ring: Ring, first: Array, count: Array, state: tuple
) -> tuple[TripletTerms, Gradients | None]:
    positive, found = ring.positives(first)
    found &= ring.classes.negatives > 0
    squares = ring.squares(positive, count)
    nearest, negative = ring.nearest(squares, count)
    # A NaN is nearer than nothing; its pair stays, for the loss to show it.
    beyond = (nearest < jnp.inf) | jnp.isnan(squares)
    if ring.spec.fallback:
        alone = jnp.any(found & ~beyond, axis=0)
        negative = jnp.where(beyond, negative, ring.farthest(alone))
    else:
        found &= beyond
    both = squares, ring.squares(negative, count)
    return _add_triplets(ring, (positive, negative), both, found, count, state)


def _add_triplets(
    ring: Ring,
    indices: tuple[Array, Array],
    squares: tuple[Array, Array],
    valid: Array,
    count: Index,
    state: tuple,
) -> tuple[TripletTerms, Gradients | None]:
    """Adds the terms and gradients of triplets ``[k, n]``."""
    terms, grads = state
    costs, pull = costs_of_squares(ring.spec, squares, valid, ring.margin)
    new = costs, (costs > 0).astype(costs.dtype), valid.astype(costs.dtype)
    terms = TripletTerms(*(old + jnp.sum(x, axis=0) for old, x in zip(terms, new)))
    if grads is not None:
        weight = jnp.ones_like(costs) if ring.weights is None else ring.weights
        slopes, by_margin = pull(jnp.broadcast_to(weight, costs.shape))
        grads = grads._replace(margin=grads.margin + by_margin)
        grads = ring.pull(grads, [*zip(indices, slopes)], count)
    return terms, grads


def _add_all(
    ring: Ring, first: Array, count: Array, state: tuple
) -> tuple[TripletTerms, Gradients | None]:
    terms, grads = state
    positive, found = ring.positives(first)
    squares = ring.squares(positive, count)
    d_ap, slopes = with_slope(ring.spec.metric.inner_products.distance, squares)

    def visit(part: Batch, first: Array, moving: Any, state: tuple) -> tuple:
        sums, ours = state
        own = None
        if ours is not None:
            own = Gradients(ours, moving, ring.batch.zeros())
        sums, own = add_all_negatives(
            ring.spec,
            ring.tiles(part),
            ring.margin,
            d_ap,
            found,
            count,
            ring.weights,
            (sums, own),
        )
        if own is None:
            return moving, (sums, None)
        return own.references, (sums, own.anchors)

    sums = AllSums.zero(ring.batch)
    ours, theirs = (None, ()) if grads is None else (grads.anchors, grads.references)
    theirs, (sums, ours) = ring.round(visit, (sums, ours), theirs)
    terms = terms._replace(
        total=terms.total + sums.total, active=terms.active + sums.active
    )
    if grads is not None:
        by_margin = grads.margin + by_margin_of(ring.spec, sums)
        grads = Gradients(ours, theirs, by_margin)
        by_square = jnp.where(found, sums.by_positive * slopes, 0)
        grads = ring.pull(grads, [(positive, by_square)], count)
    return terms, grads


def _pair(
    part: Batch, first: Array, index: Array, k: Array, start: Array, size: int
) -> tuple[Array, Array, Array, Array]:
    """Anchors, their k-th references in a part, where these are, and whether there."""
    y = part.reference_side[0]
    at = lax.dynamic_slice(index, (k, start), (1, size))[0] - first
    here = (at >= 0) & (at < len(y))
    at = jnp.clip(at, 0, len(y) - 1)
    return rows_at(part.anchors, start, size), y[at], at, here
