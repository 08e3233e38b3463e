"""The terms of a batch and their gradients, and mined indices, in O(n d) memory.

One of two algorithms is chosen at run time: tiles, for metrics with an inner-product
form and anchors with few positives, and panels for everything else.

The distance of two vectors that nearly coincide is noise if it comes from products.
Distances of positives and of chosen pairs therefore come from differences.
"""

import jax.numpy as jnp
from jax import Array, lax

from tripletjax._engine.by_panels import mined_panel, sums_by_panels
from tripletjax._engine.by_tiles import mined_by_tiles, sums_by_tiles
from tripletjax._engine.panels import Panels
from tripletjax._engine.search import MAX_TILE_POSITIVES
from tripletjax._engine.spec import Gradients, LossSpec
from tripletjax._pairwise.batch import Batch
from tripletjax._pairwise.class_index import ClassIndex
from tripletjax._pairwise.slices import rows_at
from tripletjax._pairwise.tiles import Tiles
from tripletjax.losses import TripletTerms
from tripletjax.mining import CountedTriplets, Triplets


def terms_and_gradients(
    spec: LossSpec,
    batch: Batch,
    margin: Array,
    weights: Array | None = None,
    *,
    gradient: bool,
) -> tuple[TripletTerms, Gradients | None]:
    """The terms per anchor, and the gradient of their total weighted per anchor."""
    classes = None
    if spec.metric.products is not None and batch.has_classes:
        classes = ClassIndex.of(batch)

    def terms(spec: LossSpec) -> tuple[TripletTerms, Gradients | None]:
        if classes is None:
            return sums_by_panels(spec, batch, margin, weights, gradient)
        return lax.cond(
            classes.max_positives <= MAX_TILE_POSITIVES,
            lambda: sums_by_tiles(spec, batch, margin, classes, weights, gradient),
            lambda: sums_by_panels(spec, batch, margin, weights, gradient, classes),
        )

    return spec.by_platform(terms, batch.size)


def hard_triplets(spec: LossSpec, batch: Batch) -> Triplets:
    """The triplets ``[n]`` of batch-hard mining."""
    if spec.metric.products is None or not batch.has_classes:
        return spec.by_platform(lambda spec: _hard_by_panels(spec, batch), batch.size)
    classes = ClassIndex.of(batch)

    def by_tiles(spec: LossSpec) -> Triplets:
        tiles = Tiles.of(spec.metric, batch, spec.sizes)
        mined = mined_by_tiles(spec, tiles, classes)
        positive, negative, valid = (x[0] for x in mined[:3])
        # Indices are 64 bits long under jax_enable_x64.
        positive, negative = positive.astype(int), negative.astype(int)
        return Triplets(jnp.arange(len(valid)), positive, negative, valid)

    def either(spec: LossSpec) -> Triplets:
        return lax.cond(
            classes.max_positives <= MAX_TILE_POSITIVES,
            lambda: by_tiles(spec),
            lambda: _hard_by_panels(spec, batch),
        )

    return spec.by_platform(either, batch.size)


def _hard_by_panels(spec: LossSpec, batch: Batch) -> Triplets:
    panels, n = Panels.of(spec.metric, batch, spec.sizes), len(batch.anchors)

    # The state: positive, negative and whether the triplet exists, of all anchors.
    def step(block: Array, state: tuple[Array, ...]) -> tuple[Array, ...]:
        panel = panels.panel(block)
        new = [
            field[:, 0] for field in mined_panel(spec, panel.distances, panel.masks)[1:]
        ]
        fresh = panels.blocks.fresh(block)
        return tuple(
            lax.dynamic_update_slice_in_dim(
                old,
                jnp.where(fresh, x, rows_at(old, panel.start, len(x))),
                panel.start,
                0,
            )
            for old, x in zip(state, new)
        )

    index = batch.zeros((n,)).astype(int)
    mined = lax.fori_loop(0, panels.blocks.count, step, (index, index, index > 0))
    return Triplets(jnp.arange(n), *mined)


def semi_hard_triplets(spec: LossSpec, batch: Batch, size: int) -> CountedTriplets:
    """The triplets of semi-hard mining, compacted in order of anchor and positive."""
    return spec.by_platform(lambda spec: _semi_hard(spec, batch, size), batch.size)


def _semi_hard(spec: LossSpec, batch: Batch, size: int) -> CountedTriplets:
    panels = Panels.of(spec.metric, batch, spec.sizes)

    # The state: number of triplets so far, and their three indices.
    def step(block: Array, state: tuple) -> tuple:
        count, *indices = state
        panel = panels.panel(block)
        mined = mined_panel(spec, panel.distances, panel.masks)
        anchor, positive, negative, valid = mined
        slot = count + jnp.cumsum(valid.ravel()) - 1
        slot = jnp.where(valid.ravel(), slot, size)
        indices = [
            old.at[slot].set(x.ravel(), mode="drop")
            for old, x in zip(indices, (anchor + panel.start, positive, negative))
        ]
        return count + jnp.sum(valid), *indices

    index = batch.zeros((size,)).astype(int)
    count, *indices = lax.fori_loop(
        0, panels.blocks.count, step, (index[0], *[index] * 3)
    )
    anchor, positive, negative = indices
    valid = jnp.arange(size) < count
    return CountedTriplets(anchor, positive, negative, valid, count)
