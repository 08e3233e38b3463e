"""Terms that JAX differentiates: metrics and hinges that close over traced arrays.

The rest of the engine has custom derivatives by the batch and the margin alone. Here
panels of rows consist of differentiable operations. The backward pass computes them
again, so that memory is still that of a panel.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array, lax

from tripletjax._closures import closes_over_tracers
from tripletjax._engine.by_panels import panel_terms
from tripletjax._engine.by_tiles import TripletRows, mined_by_tiles
from tripletjax._engine.panels import PanelRows, Panels
from tripletjax._engine.search import MAX_TILE_POSITIVES
from tripletjax._engine.spec import LossSpec, Mining
from tripletjax._engine.terms import hard_triplets
from tripletjax._pairwise.batch import Batch
from tripletjax._pairwise.block_sizes import BlockSizes, by_platform
from tripletjax._pairwise.cancellation import refine
from tripletjax._pairwise.class_index import ClassIndex
from tripletjax._pairwise.slices import Blocks
from tripletjax._pairwise.tiles import Tiles
from tripletjax.distances import Metric, cosine, euclidean, manhattan, squared_euclidean
from tripletjax.losses import (
    Cost,
    TripletTerms,
    batch_all_sums_by_autodiff,
    closes_over_arrays,
    costs_of,
    outside_as,
    sums_of,
)

PRODUCT_METRICS = euclidean, squared_euclidean, cosine


def needs_autodiff(spec: LossSpec, batch: Batch) -> bool:
    """Whether the metric or the cost closes over traced arrays."""
    return closes_over_arrays(spec.cost, batch.anchors.dtype) or _metric_closes_over(
        spec.metric, batch
    )


def _metric_closes_over(metric: Metric, batch: Batch) -> bool:
    if metric in (*PRODUCT_METRICS, manhattan):
        return False
    x = jax.ShapeDtypeStruct(batch.anchors.shape, batch.anchors.dtype)
    vector = jax.ShapeDtypeStruct(x.shape[1:], x.dtype)
    own_index = jax.ShapeDtypeStruct(x.shape[:1], jnp.int32)
    if closes_over_tracers(metric._paired_checked, vector, vector):
        return True
    return closes_over_tracers(metric._matrix_checked, x, x, own_index)


def terms_by_autodiff(spec: LossSpec, batch: Batch, margin: Array) -> TripletTerms:
    """The terms ``[n]``."""
    if spec.mining is Mining.HARD:
        # Selection is not differentiated: any part of the engine may do it.
        _, *chosen = hard_triplets(spec, lax.stop_gradient(batch))
        rows = TripletRows(*(x[None] for x in chosen), count=1)
        return _explicit_terms(spec, batch, margin, rows)
    by_products = batch.has_classes and spec.metric in PRODUCT_METRICS
    classes = None
    if spec.mining is Mining.SEMI_HARD and by_products:
        classes = ClassIndex.of(batch)

    def by_tiles(spec: LossSpec) -> TripletTerms:
        assert classes is not None
        selected = lax.stop_gradient(batch)
        tiles = Tiles.of(spec.metric, selected, spec.sizes)
        rows = mined_by_tiles(spec, tiles, classes)
        return _explicit_terms(spec, batch, margin, rows)

    def terms(spec: LossSpec) -> TripletTerms:
        if classes is None:
            return _terms_by_panels(spec, batch, margin)
        return lax.cond(
            classes.max_positives <= MAX_TILE_POSITIVES,
            lambda: by_tiles(spec),
            lambda: _terms_by_panels(spec, batch, margin),
        )

    return spec.by_platform(terms, batch.size)


def _explicit_terms(
    spec: LossSpec, batch: Batch, margin: Array, triplets: TripletRows
) -> TripletTerms:
    """The terms of the triplets of every anchor."""
    a, y = batch.anchors, batch.reference_side[0]

    @jax.checkpoint
    def of_row(row: tuple[Array, Array, Array]) -> TripletTerms:
        positive, negative, valid = row
        costs = _costs_of_vectors(
            spec.metric, spec.cost, margin, a, y[positive], y[negative], valid
        )
        return sums_of(costs[:, None], valid[:, None])

    terms = lax.map(of_row, (triplets.positive, triplets.negative, triplets.valid))
    return TripletTerms(*(jnp.sum(x, axis=0) for x in terms))


def terms_of_triplets(
    metric: Metric,
    cost: Cost,
    x: Array,
    y: Array,
    margin: Array,
    triplets: Sequence[Array],
) -> TripletTerms:
    """The terms ``[n]`` of triplets ``[k]``, some at a time.

    Args:
        metric: a distance.
        cost: the cost of a triplet.
        x: vectors of anchors ``[n, d]``, as `Batch` has them.
        y: vectors of references ``[m, d]``.
        margin: a scalar.
        triplets: anchors, positives, negatives and whether they are valid.
    """
    n, k = len(x), len(triplets[0])

    # Indices out of range would be clipped, wrapped or dropped: they give NaN instead.
    def rows(x: Array, index: Array) -> Array:
        at = x.at[outside_as(len(x), index)]
        return at.get(mode="fill", fill_value=jnp.nan)

    # The state is the terms of all anchors.
    @jax.checkpoint
    def add(terms: TripletTerms, part: list[Array]) -> tuple[TripletTerms, None]:
        anchor, positive, negative, valid = part
        vectors = rows(x, anchor), rows(y, positive), rows(y, negative)
        costs = _costs_of_vectors(metric, cost, margin, *vectors, valid)
        index = jnp.minimum(outside_as(n, anchor), n - 1)
        new = costs, costs > 0, valid
        return TripletTerms(
            *(old.at[index].add(one.astype(old.dtype)) for old, one in zip(terms, new))
        ), None

    def in_blocks(sizes: BlockSizes) -> TripletTerms:
        size = Blocks.of(k, sizes.panel // x.shape[1]).size
        parts = [jnp.pad(f, (0, -k % size)).reshape(-1, size) for f in triplets]
        none = jnp.zeros_like(x[:, 0])
        return lax.scan(add, TripletTerms(none, none, none), parts)[0]

    return by_platform(in_blocks, k)


def _costs_of_vectors(
    metric: Metric,
    cost: Cost,
    margin: Array,
    a: Array,
    p: Array,
    n: Array,
    valid: Array,
) -> Array:
    """The costs ``[k]`` of triplets of vectors ``[k, d]``, by differences."""
    # Triplets that are not valid may compare an anchor with itself, where many a
    # distance has no gradient.
    compare = jax.vmap(metric._paired_checked)
    d_ap, d_an = (compare(a, jnp.where(valid[:, None], b, a + 1)) for b in (p, n))
    return costs_of(d_ap, d_an, valid, margin, cost)


def _terms_by_panels(spec: LossSpec, batch: Batch, margin: Array) -> TripletTerms:
    panels = Panels.of(spec.metric, batch, spec.sizes)

    @jax.checkpoint
    def of_block(block: Array) -> tuple[Array, TripletTerms]:
        rows = panels.rows(block)
        return rows.start, _panel_terms(spec, panels, rows, margin)

    blocks = panels.blocks
    start, parts = lax.map(of_block, jnp.arange(blocks.count))
    # Rows that two panels share have no triplets in the second.
    row = start[:, None] + jnp.arange(blocks.size)
    none = batch.zeros((len(batch.anchors),))
    return TripletTerms(*(none.at[row].add(part) for part in parts))


def _panel_terms(
    spec: LossSpec, panels: Panels, rows: PanelRows, margin: Array
) -> TripletTerms:
    metric, y = panels.metric, panels.batch.reference_side[0]
    sums = batch_all_sums_by_autodiff
    if metric.products is None:
        distances = metric._matrix_checked(rows.a, y, rows.own_index)
        terms, _ = panel_terms(spec, distances, rows.masks, sums)
        return terms(distances, margin)

    def distances_of(squares: Array) -> Array:
        return metric.inner_products.distance(jnp.where(squares < 0, 0, squares))

    squares, near = panels.squares(rows.a)
    terms, pairs = panel_terms(spec, distances_of(squares), rows.masks, sums)
    # Values come from differences where products have no digits.
    rounded = lax.stop_gradient(squares)
    compare = metric.inner_products.half_square
    exact = refine(rounded, near & pairs, compare, *lax.stop_gradient((rows.a, y)))
    return terms(distances_of(squares + (exact - rounded)), margin)
