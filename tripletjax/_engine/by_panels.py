"""Sums over triplets by panels: any metric, masks, classes of any size.

A panel is treated by the functions of a whole matrix, or where pairs are told by labels
a chunk of positives of every anchor at a time.
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
from tripletjax._pairwise.class_index import ClassIndex
from tripletjax._pairwise.cuts import Cut
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

# How many positives of every anchor a panel treats at a time, and what is left in steps
# of how many.
CHUNK, REMAINDER_CHUNK = 512, 64


# From distances and margin to terms, and a function from weights of the anchors to
# gradients by distances and margin.
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
    panels = Panels.of(spec.metric, batch, spec.cut)

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
    """How a panel's terms are made, and of which pairs."""
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
    """``visit(first, size, state)`` for some positives of every anchor, until all were.

    Sizes are `CHUNK`, and what is left then in steps of `REMAINDER_CHUNK`. Nothing is
    compiled for `CHUNK` where no class can be so large.
    """
    count, start = classes.max_positives, 0
    # What is left of a class of 500 costs less in one large step.
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
    """All triplets of a panel, and what their gradient is made of.

    What a positive needs is summed up over the negatives, and the other way round.
    """
    cost, cut = spec.cost, spec.cut
    row, masks = jnp.arange(len(distances))[:, None], panel.masks
    d_an = _filled(distances, masks.negative)
    # Slopes of 0 and 1 need not be computed, but counted.
    counted = not isinstance(cost, TripletCost) and cost.counts
    dtype = jnp.int32 if counted else distances.dtype

    def costs(d_ap: Array, d_an: Array, found: Array) -> tuple[Array, ...]:
        if counted:
            # That triplets are active is all that has to be known of them here.
            active = (d_ap + margin > d_an).astype(dtype)
            return active, active, active, -active, active
        if not isinstance(cost, TripletCost):
            d_ap = jnp.where(found, d_ap, -jnp.inf)
        d_ap, d_an, found = jnp.broadcast_arrays(d_ap, d_an, found)
        return costs_and_slopes(cost, d_ap, d_an, found, margin)

    def some_positives(first: Index, size: int, state: tuple) -> tuple:
        sums, by_distance, by_negative = state
        index, found = classes.positives_slice(first, size, panel.start, len(row))
        d_ap = jnp.where(found, take(distances, index), -jnp.inf if counted else 0)

        def of_positives(d_an: Array) -> tuple[Array, ...]:
            total, active, by_ap, _, by_all = costs(d_ap, d_an, found)
            return (by_ap,) if counted else (by_ap, total, active, by_all)

        def of_negatives(d_ap: Array, found: Array) -> tuple[Array]:
            return (costs(d_ap, d_an, found)[3],)

        by_ap, *others = sum_over_columns([d_an], of_positives, cut)
        (new,) = sum_over_columns([d_ap, found], of_negatives, cut)
        by_negative, by_ap = by_negative + new, by_ap.astype(distances.dtype)
        if counted:
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
    state = (none,) * 3, jnp.zeros_like(distances), jnp.zeros_like(d_an, dtype)
    (total, active, by_margin), by_distance, by_negative = for_each_chunk(
        classes, some_positives, state
    )
    by_negative = by_negative[:, : distances.shape[1]]
    by_negative = by_negative.astype(distances.dtype)
    if counted:
        gaps = jnp.where(masks.negative, farthest + margin - distances, 0)
        total = total + jnp.sum(-by_negative * gaps, axis=-1)
    by_distance = by_distance + by_negative

    def pull(weights: Array) -> tuple[Array, Array]:
        return by_distance * weights[:, None], jnp.sum(by_margin * weights)

    valid = classes.count_triplets(panel.start, len(row), total) * panel.real
    return TripletTerms(total, active, valid), pull


def _semi_hard_in_panel(
    spec: LossSpec, panel: Panel, classes: ClassIndex
) -> tuple[PanelCost, Array]:
    """As `_panel_cost`, some positives of every anchor at a time."""
    row, masks = jnp.arange(len(panel.a))[:, None], panel.masks
    real = masks.negative & (panel.distances < jnp.inf)
    d_an = _filled(panel.distances, real)
    _, farthest = min_and_index_of_all(
        jnp.where(real, -panel.distances, 1), 1, plain=spec.cut.plain
    )
    possible = panel.real & (rows_at(classes.negatives, panel.start, len(row)) > 0)

    def choose(first: Index, size: int, chosen: Array) -> Array:
        positive, found = classes.positives_slice(first, size, panel.start, len(row))
        d_ap = take(panel.distances, positive)
        nearest, negative = _nearest_beyond(d_an, d_ap, spec.cut)
        beyond = nearest < jnp.inf
        # The pair of a NaN stays, for the loss to show it.
        found &= possible[:, None] & (beyond | spec.fallback | jnp.isnan(d_ap))
        negative = jnp.where(beyond, negative, farthest[:, None])
        return chosen.at[row, positive].max(jnp.where(found, negative, -1))

    # The negative of every pair, -1 if it has none.
    none = jnp.zeros_like(masks.positive, row.dtype) - 1
    chosen = for_each_chunk(classes, choose, none)

    def some(first: Index, size: int) -> tuple[list[Array], Array]:
        positive, found = classes.positives_slice(first, size, panel.start, len(row))
        negative = take(chosen, positive)
        return [positive, jnp.maximum(negative, 0)], found & (negative >= 0)

    def add_pairs(first: Index, size: int, pairs: Array) -> Array:
        (_, negative), found = some(first, size)
        return pairs.at[row, negative].max(found)

    pairs = for_each_chunk(classes, add_pairs, chosen >= 0)

    def cost(distances: Array, margin: Array) -> tuple:
        def add(first: Index, size: int, state: tuple) -> tuple:
            terms, by_distance, by_margin = state
            indices, valid = some(first, size)

            def costs(d_ap: Array, d_an: Array, margin: Array) -> Array:
                return costs_of(d_ap, d_an, valid, margin, spec.cost)

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
        terms, by_distance, by_margin = for_each_chunk(classes, add, state)

        def pull(weights: Array) -> tuple[Array, Array]:
            return by_distance * weights[:, None], jnp.sum(by_margin * weights)

        return terms, pull

    return cost, pairs


def _nearest_beyond(d_an: Array, d_ap: Array, cut: Cut) -> tuple[Array, Array]:
    """For every ``d_ap[a, p]`` the least ``d_an[a, n]`` above it, and its first n.

    Distances are not negative, and no `d_an` is NaN. All are compared with all: sorting
    takes longer up to thousands of positives.
    """
    # As integers the floats are in the same order, and what is not above wraps to more
    # than what is: half the instructions of comparing.
    bits = jnp.dtype(f"uint{8 * d_an.dtype.itemsize}")
    ours, theirs = (lax.bitcast_convert_type(x, bits) for x in (d_ap, d_an))
    ours += 1
    none = jnp.full_like(ours, jnp.iinfo(bits).max), jnp.zeros_like(ours, jnp.int32)
    if cut.plain:
        blocks = Blocks.of(theirs.shape[1], cut.columns_at_once(ours.size))

        def visit_some(block: Array, state: tuple) -> tuple[Array, Array]:
            least, index = state
            start = blocks.start(block)
            some = lax.dynamic_slice_in_dim(theirs, start, blocks.size, axis=1)
            above = some[:, None] - ours[..., None]
            new, at = min_and_index_of_all(above, 2, plain=True)
            return jnp.minimum(least, new), jnp.where(new < least, start + at, index)

        least, index = lax.fori_loop(0, blocks.count, visit_some, none)
        return _if_above(least + ours, d_ap), index

    def visit(step: Array, runs: list[Array], state: tuple) -> tuple[Array, Array]:
        old, where = state
        least = old
        for x in runs[0]:
            least = jnp.minimum(least, x[:, None] - ours)
        return least, jnp.where(least < old, step, where)

    least, run = for_each_run([theirs], visit, none)
    row = jnp.arange(len(ours))[:, None, None]
    members = theirs[row, run[..., None] * RUN + jnp.arange(RUN)]
    within = jnp.argmax(members == (least + ours)[..., None], axis=-1)
    return _if_above(least + ours, d_ap), run * RUN + within


def _if_above(bits: Array, d_ap: Array) -> Array:
    """The distances of which these are the bits, infinite where they are not above."""
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
