"""Sums over triplets by panels: any metric, masks, classes of any size.

Panels of masks go through the functions of a whole matrix. Panels of labels take a
chunk of positives of every anchor at a time.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from tripletjax._api import unjitted
from tripletjax._engine.panels import Panel, Panels
from tripletjax._engine.reductions import min_and_index_of_all
from tripletjax._engine.slopes import costs_and_slopes
from tripletjax._engine.spec import Gradients, LossSpec, Mining
from tripletjax._matrices import take
from tripletjax._pairwise.batch import Batch
from tripletjax._pairwise.block_sizes import BlockSizes
from tripletjax._pairwise.class_index import ClassIndex
from tripletjax._pairwise.slices import (
    RUN,
    Blocks,
    Index,
    add_rows,
    for_each_run,
    rows_at,
    sum_over_columns,
)
from tripletjax.losses import (
    TripletCost,
    TripletTerms,
    batch_all_sums,
    costs_of,
    count_all,
    sums_of,
)
from tripletjax.mining import Triplets, batch_hard_triplets, batch_semi_hard_triplets
from tripletjax.pairs import PairMasks

# Positives of every anchor in a chunk, and in the smaller chunks of the rest.
CHUNK, REMAINDER_CHUNK = 512, 64


# A function from distances and margin to terms, and to a pullback from weights of the
# anchors to gradients by distances and margin.
PanelCost = Callable[[Array, Array], tuple[TripletTerms, Callable[[Array], tuple]]]


def sums_by_panels(
    spec: LossSpec,
    batch: Batch,
    margin: Array,
    weights: Array | None,
    gradient: bool,
    classes: ClassIndex | None = None,
) -> tuple[TripletTerms, Gradients | None]:
    """The terms, and the gradient of their total weighted per anchor."""
    panels = Panels.of(spec.metric, batch, spec.sizes)

    # The state: the terms of all anchors, and the gradients if wanted.
    def step(block: Array, state: tuple) -> tuple:
        terms, grads = state
        panel = panels.panel(block)
        cost, counts = _panel_cost(spec, panel, classes)
        panel = panel.refined(panels, counts)
        new, pull = cost(panel.distances, margin)
        if gradient:
            weight = jnp.ones_like(new.total)
            if weights is not None:
                weight = rows_at(weights, panel.start, len(panel.a))
            by_distance, by_margin = pull(weight)
            grads = grads._replace(margin=grads.margin + by_margin)
            grads = panel.vjp(panels, by_distance, grads)
        terms = [add_rows(old, panel.start, x) for old, x in zip(terms, new)]
        return TripletTerms(*terms), grads

    terms = TripletTerms(*[batch.zeros((len(batch.anchors),))] * 3)
    grads = Gradients.zero(batch) if gradient else None
    return lax.fori_loop(0, panels.blocks.count, step, (terms, grads))


def _panel_cost(
    spec: LossSpec, panel: Panel, classes: ClassIndex | None
) -> tuple[PanelCost, Array]:
    """The function to the terms of a panel, and the pairs whose distances it uses."""
    masks = panel.masks
    if spec.mining is Mining.ALL:
        if classes is not None:
            every = functools.partial(_all_in_panel, spec, panel, classes)
            return every, masks.positive
    elif spec.mining is Mining.SEMI_HARD and classes is not None:
        return _semi_hard_in_panel(spec, panel, classes)
    terms, pairs = panel_terms(spec, panel.distances, masks, batch_all_sums)
    return _with_pull(terms), pairs


def panel_terms(
    spec: LossSpec,
    distances: Array,
    masks: PairMasks,
    batch_all_sums: Callable[..., tuple[Array, Array]],
) -> tuple[Callable[[Array, Array], TripletTerms], Array]:
    """A function from distances and margin to terms, and the pairs that it uses."""
    if spec.mining is Mining.ALL:

        def every(distances: Array, margin: Array) -> TripletTerms:
            margins = jnp.broadcast_to(margin, distances.shape[:-1])
            sums = batch_all_sums(spec.cost, distances, margins, *masks)
            return TripletTerms._make((*sums, count_all(masks, distances)))

        return every, masks.positive
    _, positive, negative, valid = mined_panel(spec, distances, masks)

    def chosen(distances: Array, margin: Array) -> TripletTerms:
        d_ap, d_an = take(distances, positive), take(distances, negative)
        return sums_of(costs_of(d_ap, d_an, valid, margin, spec.cost), valid)

    row = jnp.arange(len(positive))[:, None]
    pairs = jnp.zeros_like(masks.positive)
    for index in (positive, negative):
        pairs = pairs.at[row, index].max(valid)
    return chosen, pairs


def _with_pull(terms: Callable[[Array, Array], TripletTerms]) -> PanelCost:
    def cost(distances: Array, margin: Array) -> tuple:
        out, pull = jax.vjp(terms, distances, margin)
        none = jnp.zeros_like(out.total)
        return out, lambda weights: pull(TripletTerms(weights, none, none))

    return cost


def for_each_chunk(
    classes: ClassIndex, visit: Callable[[Index, int, Any], Any], state: Any
) -> Any:
    """``visit(first, size, state)`` for all positives of every anchor, in chunks.

    Chunks of `CHUNK` come first, then chunks of `REMAINDER_CHUNK`. Batches in which no
    class can be so large compile no chunk of `CHUNK`.
    """
    count, start = classes.max_positives, 0
    # The rest of a class of 500 costs less in one large chunk.
    if len(classes.order) >= CHUNK // 2:
        large = (count + CHUNK // 2) // CHUNK
        state = lax.fori_loop(
            0, large, lambda i, state: visit(i * CHUNK, CHUNK, state), state
        )
        start = large * CHUNK

    def step(i: Array, state: Any) -> Any:
        return visit(start + i * REMAINDER_CHUNK, REMAINDER_CHUNK, state)

    small = -(-jnp.maximum(count - start, 0) // REMAINDER_CHUNK)
    return lax.fori_loop(0, small, step, state)


def _filled(x: Array, real: Array) -> Array:
    """Distances ``[rows, m]`` for `for_each_run`: padded, infinite where not real."""
    x = jnp.where(real, x, jnp.inf)
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % RUN)), constant_values=jnp.inf)


def _all_in_panel(
    spec: LossSpec, panel: Panel, classes: ClassIndex, distances: Array, margin: Array
) -> tuple[TripletTerms, Callable[[Array], tuple]]:
    """The terms of all triplets of a panel, and their pullback.

    Terms of a positive are summed over the negatives, and the other way round.
    """
    if not isinstance(spec.cost, TripletCost) and spec.cost.counts:
        sums, by_distance = _count_in_panel(spec, panel, classes, distances, margin)
    else:
        sums, by_distance = _sum_in_panel(spec, panel, classes, distances, margin)
    total, active, by_margin = sums

    def pull(weights: Array) -> tuple[Array, Array]:
        return by_distance * weights[:, None], jnp.sum(by_margin * weights)

    valid = classes.count_triplets(panel.start, len(distances), total) * panel.real
    return TripletTerms(total, active, valid), pull


def _count_in_panel(
    spec: LossSpec, panel: Panel, classes: ClassIndex, distances: Array, margin: Array
) -> tuple[list[Array], Array]:
    """Sums of a cost whose slopes are 0 and 1, which are counted.

    Returns:
        Total, active triplets and slope by the margin ``[rows]``, and the derivatives
        by the distances ``[rows, m]``.
    """
    row, masks = jnp.arange(len(distances))[:, None], panel.masks
    d_an = _filled(distances, masks.negative)
    # A total is a difference of two sums. Both are taken from the farthest positive, so
    # that they have few digits.
    farthest = jnp.max(masks.positive * distances, axis=-1, keepdims=True)

    # The state: total and active triplets, derivatives by the distances of positives,
    # and numbers of active triplets of the negatives.
    def some_positives(first: Index, size: int, state: tuple) -> tuple:
        total, active, by_distance, counts = state
        index, exists = classes.positives_slice(first, size, panel.start, len(row))
        d_ap = jnp.where(exists, take(distances, index), -jnp.inf)

        def is_active(d_ap: Array, d_an: Array) -> tuple[Array]:
            return ((d_ap + margin > d_an).astype(jnp.int32),)

        (by_ap,) = sum_over_columns([d_an], lambda d: is_active(d_ap, d), spec.sizes)
        (new,) = sum_over_columns([d_ap], lambda d: is_active(d, d_an), spec.sizes)
        by_ap = by_ap.astype(distances.dtype)
        shortfall = jnp.where(exists, by_ap * (d_ap - farthest), 0)
        total = total + jnp.sum(shortfall, axis=-1)
        active = active + jnp.sum(by_ap, axis=-1)
        by_distance = by_distance.at[row, index].add(jnp.where(exists, by_ap, 0))
        return total, active, by_distance, counts + new

    none = jnp.zeros_like(distances[:, 0])
    state = none, none, jnp.zeros_like(distances), jnp.zeros_like(d_an, jnp.int32)
    total, active, by_distance, counts = for_each_chunk(classes, some_positives, state)
    counts = counts[:, : distances.shape[1]].astype(distances.dtype)
    gaps = jnp.where(masks.negative, farthest + margin - distances, 0)
    total = total + jnp.sum(counts * gaps, axis=-1)
    return [total, active, active], by_distance - counts


def _sum_in_panel(
    spec: LossSpec, panel: Panel, classes: ClassIndex, distances: Array, margin: Array
) -> tuple[list[Array], Array]:
    """Sums of any cost, as `_count_in_panel` returns them."""
    cost, row = spec.cost, jnp.arange(len(distances))[:, None]
    d_an = _filled(distances, panel.masks.negative)

    def costs(d_ap: Array, d_an: Array, exists: Array) -> tuple[Array, ...]:
        if not isinstance(cost, TripletCost):
            d_ap = jnp.where(exists, d_ap, -jnp.inf)
        d_ap, d_an, exists = jnp.broadcast_arrays(d_ap, d_an, exists)
        return costs_and_slopes(cost, d_ap, d_an, exists, margin)

    # The state: total, active triplets and slope by the margin, derivatives by the
    # distances of positives, and by those of negatives.
    def some_positives(first: Index, size: int, state: tuple) -> tuple:
        sums, by_distance, by_negative = state
        index, exists = classes.positives_slice(first, size, panel.start, len(row))
        d_ap = jnp.where(exists, take(distances, index), 0)

        def of_positives(d_an: Array) -> tuple[Array, ...]:
            total, active, by_ap, _, by_margin = costs(d_ap, d_an, exists)
            return by_ap, total, active, by_margin

        def of_negatives(d_ap: Array, exists: Array) -> tuple[Array]:
            return (costs(d_ap, d_an, exists)[3],)

        by_ap, *each = sum_over_columns([d_an], of_positives, spec.sizes)
        (new,) = sum_over_columns([d_ap, exists], of_negatives, spec.sizes)
        sums = [old + jnp.sum(x, axis=-1) for old, x in zip(sums, each)]
        by_distance = by_distance.at[row, index].add(jnp.where(exists, by_ap, 0))
        return sums, by_distance, by_negative + new

    none = jnp.zeros_like(distances[:, 0])
    state = [none] * 3, jnp.zeros_like(distances), jnp.zeros_like(d_an)
    sums, by_distance, by_negative = for_each_chunk(classes, some_positives, state)
    return sums, by_distance + by_negative[:, : distances.shape[1]]


def _semi_hard_in_panel(
    spec: LossSpec, panel: Panel, classes: ClassIndex
) -> tuple[PanelCost, Array]:
    """`_panel_cost` of semi-hard mining, a chunk of positives at a time."""
    row, masks = jnp.arange(len(panel.a))[:, None], panel.masks
    real = masks.negative & (panel.distances < jnp.inf)
    d_an = _filled(panel.distances, real)
    _, farthest = min_and_index_of_all(
        jnp.where(real, -panel.distances, 1), 1, plain=spec.sizes.plain
    )
    possible = panel.real & (rows_at(classes.negatives, panel.start, len(row)) > 0)

    def choose(first: Index, size: int, chosen: Array) -> Array:
        positive, exists = classes.positives_slice(first, size, panel.start, len(row))
        d_ap = take(panel.distances, positive)
        nearest, negative = _nearest_beyond(d_an, d_ap, spec.sizes)
        beyond = nearest < jnp.inf
        # The pair of a NaN stays, for the loss to show it.
        exists &= possible[:, None] & (beyond | spec.fallback | jnp.isnan(d_ap))
        negative = jnp.where(beyond, negative, farthest[:, None])
        return chosen.at[row, positive].max(jnp.where(exists, negative, -1))

    # The negative of every pair, -1 if it has none.
    none = jnp.zeros_like(masks.positive, row.dtype) - 1
    chosen = for_each_chunk(classes, choose, none)

    def triplets(first: Index, size: int) -> tuple[list[Array], Array]:
        positive, exists = classes.positives_slice(first, size, panel.start, len(row))
        negative = take(chosen, positive)
        return [positive, jnp.maximum(negative, 0)], exists & (negative >= 0)

    def add_pairs(first: Index, size: int, pairs: Array) -> Array:
        (_, negative), valid = triplets(first, size)
        return pairs.at[row, negative].max(valid)

    pairs = for_each_chunk(classes, add_pairs, chosen >= 0)
    return functools.partial(_cost_of_chunks, spec, classes, triplets), pairs


def _cost_of_chunks(
    spec: LossSpec,
    classes: ClassIndex,
    triplets: Callable[[Index, int], tuple[list[Array], Array]],
    distances: Array,
    margin: Array,
) -> tuple[TripletTerms, Callable[[Array], tuple]]:
    """The terms of chosen triplets, and their pullback.

    Args:
        spec, classes: the loss and the classes.
        triplets: a function from the first positive and the size of a chunk to indices
            of positives and negatives ``[rows, size]``, and which are valid.
        distances: ``[rows, m]``.
        margin: a scalar.
    """
    row = jnp.arange(len(distances))[:, None]

    # The state: terms, derivatives by the distances, and by the margin of each row.
    def add(first: Index, size: int, state: tuple) -> tuple:
        terms, by_distance, by_margin = state
        indices, valid = triplets(first, size)

        def costs(d_ap: Array, d_an: Array, margin: Array) -> Array:
            return costs_of(d_ap, d_an, valid, margin, spec.cost)

        d = [take(distances, index) for index in indices]
        margins = jnp.broadcast_to(margin, valid.shape)
        values, pull = jax.vjp(costs, *d, margins)
        *slopes, by_margins = pull(jnp.ones_like(values))
        terms = jax.tree.map(jnp.add, terms, sums_of(values, valid))
        for index, slope in zip(indices, slopes):
            by_distance = by_distance.at[row, index].add(slope)
        return terms, by_distance, by_margin + jnp.sum(by_margins, axis=-1)

    none = jnp.zeros_like(distances[:, 0])
    state = TripletTerms(none, none, none), jnp.zeros_like(distances), none
    terms, by_distance, by_margin = for_each_chunk(classes, add, state)

    def pull(weights: Array) -> tuple[Array, Array]:
        return by_distance * weights[:, None], jnp.sum(by_margin * weights)

    return terms, pull


def _nearest_beyond(d_an: Array, d_ap: Array, sizes: BlockSizes) -> tuple[Array, Array]:
    """For every ``d_ap[a, p]`` the least ``d_an[a, n]`` above it, and its first n.

    Distances must not be negative, and no `d_an` may be NaN. All are compared with all:
    sorting takes longer up to thousands of positives.
    """
    # Distances of 0 and more have the order of their bits as unsigned integers. The
    # excess of a negative over a positive is (bits of d_an) - (bits of d_ap + 1). It
    # wraps to a large number if the negative is not above, so that the least excess
    # belongs to the nearest negative above. For example, in 8 bits, with 5 for d_ap:
    #
    #     bits of d_an    3    5    6    9
    #     excess        253  255    0    3       the least is 0: the negative of 6
    #
    # That takes half the instructions of comparisons.
    unsigned = jnp.dtype(f"uint{8 * d_an.dtype.itemsize}")
    limits, bits = (lax.bitcast_convert_type(x, unsigned) for x in (d_ap, d_an))
    limits += 1
    most = jnp.full_like(limits, jnp.iinfo(unsigned).max)
    # The state of both loops: the least excess, and where it was.
    none = most, jnp.zeros_like(limits, jnp.int32)
    if sizes.plain:
        blocks = Blocks.of(bits.shape[1], sizes.columns_at_once(limits.size))

        def visit_block(block: Array, state: tuple) -> tuple[Array, Array]:
            least, index = state
            start = blocks.start(block)
            some = lax.dynamic_slice_in_dim(bits, start, blocks.size, axis=1)
            excess = some[:, None] - limits[..., None]
            new, at = min_and_index_of_all(excess, 2, plain=True)
            return jnp.minimum(least, new), jnp.where(new < least, start + at, index)

        least, index = lax.fori_loop(0, blocks.count, visit_block, none)
        return _if_above(least + limits, d_ap), index

    def visit(step: Array, runs: list[Array], state: tuple) -> tuple[Array, Array]:
        old, run = state
        least = old
        for x in runs[0]:
            least = jnp.minimum(least, x[:, None] - limits)
        return least, jnp.where(least < old, step, run)

    least, run = for_each_run([bits], visit, none)
    row = jnp.arange(len(limits))[:, None, None]
    members = bits[row, run[..., None] * RUN + jnp.arange(RUN)]
    within = jnp.argmax(members == (least + limits)[..., None], axis=-1)
    return _if_above(least + limits, d_ap), run * RUN + within


def _if_above(bits: Array, d_ap: Array) -> Array:
    """The distances of some bits, infinite where they are not above `d_ap`."""
    nearest = lax.bitcast_convert_type(bits, d_ap.dtype)
    return jnp.where(nearest > d_ap, nearest, jnp.inf)


def mined_panel(spec: LossSpec, distances: Array, masks: PairMasks) -> Triplets:
    """The triplets ``[rows, k]`` of a panel."""
    if spec.mining is Mining.SEMI_HARD:
        return unjitted(batch_semi_hard_triplets)(
            distances, masks, fallback=spec.fallback
        )
    triplets = unjitted(batch_hard_triplets)(distances, masks)
    return Triplets(*(field[:, None] for field in triplets))
