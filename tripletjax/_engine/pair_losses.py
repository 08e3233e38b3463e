"""Losses of pairs, log-sum-exp and separable, in O(n d) memory.

For metrics with an inner-product form and anchors of up to `MAX_TILE_POSITIVES`
positives, the distances of positives come first, from differences, [k, n]. Tiles treat
negatives alone, as the modules of each shape describe (`log_sum_exp`, `separable`,
`smooth_ap`). Costs are functions of these O(n k) numbers, which JAX differentiates.
Everything else goes by panels of rows, which the backward pass computes again.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax

from tripletjax._api import own_promotion
from tripletjax._engine.by_tiles import vjp_positives
from tripletjax._engine.panels import Panel, Panels
from tripletjax._engine.search import MAX_TILE_POSITIVES, positives_of
from tripletjax._engine.spec import BlockSpec, Gradients
from tripletjax._pairwise.batch import Batch
from tripletjax._pairwise.class_index import ClassIndex
from tripletjax._pairwise.slices import rows_at
from tripletjax._pairwise.tiles import Tile, Tiles
from tripletjax.distances import Metric
from tripletjax.pair_losses import Parameters, Shape, at_anchors, both_sides
from tripletjax.pairs import PairMasks

S = TypeVar("S", bound=Shape)
# Classes of the anchors and, if symmetric, of the references.
Classes = tuple[ClassIndex, ...]
# Gradients by vectors and by parameters.
PairGradients = tuple[Gradients, Parameters]


@dataclasses.dataclass(frozen=True)
class PairSpec(BlockSpec):
    """A loss of pairs; static.

    Attributes:
        shape: the shape of the loss.
        metric: a distance between vectors.
        symmetric: whether references are anchors as well.
        summed: whether only sums of the terms over the anchors are wanted.
    """

    shape: Shape
    metric: Metric
    symmetric: bool = False
    summed: bool = False


class Problem(NamedTuple):
    """A loss of pairs of a batch, for a walk over tiles.

    Attributes:
        spec: the loss.
        batch: vectors and their pairs.
        classes: classes of the anchors and, if symmetric, of the references.
        parameters: values of the parameters.
    """

    spec: PairSpec
    batch: Batch
    classes: Classes
    parameters: Parameters

    def shape_of(self, kind: type[S]) -> S:
        """The shape of the loss, which is of a known class."""
        assert isinstance(self.spec.shape, kind)
        return self.spec.shape

    @property
    def tiles(self) -> Tiles:
        return Tiles.of(self.spec.metric, self.batch, self.spec.sizes)

    @property
    def distance(self) -> Callable[[Array], Array]:
        """The function from half the squared difference to the distance."""
        return self.spec.metric.inner_products.distance

    def zeros_per_anchor(self) -> Array:
        """Zeros ``[n]``; if symmetric, for all references as well."""
        return self.batch.zeros((sum(len(side.start) for side in self.classes),))

    def directions(self, tile: Tile) -> "list[Direction]":
        """The sides of a tile with anchors along them."""
        rows, columns = tile.squares.shape
        directions = [Direction(1, tile.row, rows)]
        if tile.mirrored:
            directions.append(Direction(0, tile.column, columns))
        elif self.spec.symmetric:
            start = tile.column + len(self.batch.anchors)
            directions.append(Direction(0, start, columns))
        return directions


class TileWalk(NamedTuple):
    """The walks over tiles of a shape of losses, by way of numbers of size O(n k).

    Attributes:
        forward: ``problem -> (numbers, gradients)``, where gradients are those of the
            negatives' total, or None.
        terms: ``(problem, numbers) -> terms``, which JAX differentiates.
        backward: ``(problem, numbers, cotangents of the numbers, gradients) ->
            gradients`` with their own added.
    """

    forward: Callable[[Problem], tuple[Any, PairGradients | None]]
    terms: Callable[[Problem, Any], Any]
    backward: Callable[[Problem, Any, Any, PairGradients], PairGradients]


def pair_terms(
    spec: PairSpec, walk: TileWalk, batch: Batch, parameters: Parameters
) -> Any:
    """The terms of the anchors ``[n]``; if symmetric, of all references as well.

    Args:
        spec: the loss.
        walk: the walks over tiles of its shape.
        batch: vectors and their pairs.
        parameters: values of the parameters.
    """
    by_products = spec.metric.products is not None
    classes = None
    if by_products and batch.has_classes:
        classes = tuple(_all_positives(side) for side in _sides(spec, batch))

    def terms(spec: PairSpec) -> Any:
        if not by_products:
            # A user's metric may close over traced arrays, which have gradients.
            return _terms_by_panels(spec, batch, parameters)
        return _terms(spec, walk, batch, classes, parameters)

    return spec.by_platform(terms, batch.size)


def _sides(spec: PairSpec, batch: Batch) -> list[Batch]:
    return [batch, swapped(batch)] if spec.symmetric else [batch]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _terms(
    spec: PairSpec,
    walk: TileWalk,
    batch: Batch,
    classes: Classes | None,
    parameters: Parameters,
) -> Any:
    """The terms, by tiles or by panels.

    The gradient makes the choice once more, so that no intermediate results of the
    chosen branch have to be kept.
    """
    return _terms_forward(spec, walk, batch, classes, parameters)[0]


@own_promotion
def _terms_forward(
    spec: PairSpec,
    walk: TileWalk,
    batch: Batch,
    classes: Classes | None,
    parameters: Parameters,
) -> tuple[Any, tuple]:
    if classes is None:
        terms = _terms_by_panels(spec, batch, parameters)
        return terms, (batch, classes, parameters, None)
    problem = Problem(spec, batch, classes, parameters)

    def by_tiles() -> tuple[Any, Any]:
        numbers, gradients = walk.forward(problem)
        return walk.terms(problem, numbers), (numbers, gradients)

    _, kept = jax.eval_shape(by_tiles)

    def by_panels() -> tuple[Any, Any]:
        none = jax.tree.map(lambda x: batch.zeros(x.shape).astype(x.dtype), kept)
        return _terms_by_panels(spec, batch, parameters), none

    terms, kept = lax.cond(_few_positives(classes), by_tiles, by_panels)
    return terms, (batch, classes, parameters, kept)


@own_promotion
def _terms_backward(
    spec: PairSpec, walk: TileWalk, inputs: tuple, cotangents: Any
) -> tuple:
    batch, classes, parameters, kept = inputs

    def by_panels(gradients: PairGradients) -> PairGradients:
        return _gradients_by_panels(spec, batch, parameters, cotangents, gradients)

    gradients = no_gradients(batch, parameters)
    if classes is None:
        gradients = by_panels(gradients)
    else:
        problem = Problem(spec, batch, classes, parameters)
        numbers, of_total = kept

        def terms(parameters: Parameters, numbers: Any) -> Any:
            return walk.terms(problem._replace(parameters=parameters), numbers)

        def by_tiles(gradients: PairGradients) -> PairGradients:
            _, pull = jax.vjp(terms, parameters, numbers)
            direct, by_numbers = pull(cotangents)
            grads, by_parameters = walk.backward(
                problem, numbers, by_numbers, gradients
            )
            return grads, jax.tree.map(jnp.add, direct, by_parameters)

        if of_total is not None:
            weight = cotangents.negatives.total[0]
            gradients = jax.tree.map(lambda x: x * weight, of_total)
        few = _few_positives(classes)
        gradients = _update_if(few, by_tiles, gradients)
        gradients = _update_if(~few, by_panels, gradients)
    grads, by_parameters = gradients
    pairs: Any = None  # Labels and masks have no gradient.
    return Batch(grads.anchors, grads.references, pairs), None, by_parameters


_terms.defvjp(_terms_forward, _terms_backward)


def no_gradients(batch: Batch, parameters: Parameters) -> PairGradients:
    return Gradients.zero(batch), jax.tree.map(jnp.zeros_like, parameters)


def _update_if(
    condition: Array, update: Callable[[PairGradients], PairGradients], state: Any
) -> PairGradients:
    """The state, updated if a condition holds.

    A loop updates the state in place, while `lax.cond` makes a copy.
    """
    count = condition.astype(jnp.int32)
    return lax.fori_loop(0, count, lambda _, state: update(state), state)


def _few_positives(classes: Classes) -> Array:
    most = functools.reduce(jnp.maximum, (x.max_positives for x in classes))
    return most <= MAX_TILE_POSITIVES


def swapped(batch: Batch) -> Batch:
    """A batch whose anchors are the references, and the other way round."""
    pairs = batch.pairs
    if isinstance(pairs.labels, PairMasks):
        masks = PairMasks(*(x.T for x in pairs.labels))
        pairs = pairs._replace(labels=masks)
    elif batch.references is not None:
        assert pairs.reference_labels is not None
        pairs = pairs._replace(
            labels=pairs.reference_labels, reference_labels=pairs.labels
        )
    if batch.references is None:
        return batch._replace(pairs=pairs)
    pairs = pairs._replace(where=pairs.reference_where, reference_where=pairs.where)
    return Batch(batch.references, batch.anchors, pairs)


def _swap(grads: Gradients) -> Gradients:
    """The gradients of a swapped batch."""
    if grads.references is None:
        return grads
    return grads._replace(anchors=grads.references, references=grads.anchors)


def _all_positives(batch: Batch) -> ClassIndex:
    """Classes whose `max_positives` counts anchors without a negative as well."""
    classes = ClassIndex.of(batch)
    return classes._replace(max_positives=jnp.max(classes.positives))


# Tiles.


class Positives(NamedTuple):
    """The positives of every anchor, ``[k, n]``.

    Attributes:
        index: indices of references.
        squares: half the squared differences.
        exists: bool.
    """

    index: Array
    squares: Array
    exists: Array

    @classmethod
    def of(cls, problem: Problem) -> "Positives":
        spec, batch = problem.spec, problem.batch
        each = [
            positives_of(spec.metric, side, classes, spec.sizes)
            for side, classes in zip(_sides(spec, batch), problem.classes)
        ]
        return cls(*both_sides(*each))

    def distances(self, problem: Problem) -> Array:
        """The distances ``[k, n]``, 0 where there is no positive."""
        return jnp.where(self.exists, problem.distance(self.squares), 0)

    def vjp(self, problem: Problem, by_square: Array, grads: Gradients) -> Gradients:
        """Add the gradients by vectors of the half squares."""
        spec, batch, classes, _ = problem
        n = len(batch.anchors)
        by_square = jnp.where(self.exists, by_square, 0)

        def add(side: Batch, grads: Gradients, index: Array, by_square: Array, i: int):
            return vjp_positives(side, grads, index, by_square, classes[i], spec.sizes)

        grads = add(batch, grads, self.index[:, :n], by_square[:, :n], 0)
        if not spec.symmetric:
            return grads
        other = swapped(batch), _swap(grads)
        return _swap(add(*other, self.index[:, n:], by_square[:, n:], 1))


class Direction(NamedTuple):
    """A direction of a tile: the anchors along one of its sides.

    Attributes:
        axis: axis of the negatives: 1 where anchors are rows, 0 where they are columns.
        start: index of the first anchor among all.
        size: number of anchors along this side.
    """

    axis: int
    start: Array
    size: int

    def at(self, x: Array) -> Array:
        """Numbers ``[n]`` of the anchors, shaped to broadcast along the tile."""
        return jnp.expand_dims(rows_at(x, self.start, self.size), self.axis)


# Panels.


def _terms_by_panels(spec: PairSpec, batch: Batch, parameters: Parameters) -> Any:
    return both_sides(
        *(_side_terms(spec, side, parameters) for side in _sides(spec, batch))
    )


def _side_terms(spec: PairSpec, batch: Batch, parameters: Parameters) -> Any:
    panels = Panels.of(spec.metric, batch, spec.sizes)

    @jax.checkpoint
    def of_block(block: Array) -> tuple[Array, Any]:
        panel = _refined(panels, block)
        terms = _block_terms(spec, panel, parameters, panel.distances)
        return _rows(panels, panel), terms

    row, parts = lax.map(of_block, jnp.arange(panels.blocks.count))
    none = batch.zeros((len(batch.anchors),))
    return jax.tree.map(lambda part: none.at[row].add(part), parts)


def _gradients_by_panels(
    spec: PairSpec,
    batch: Batch,
    parameters: Parameters,
    cotangents: Any,
    gradients: PairGradients,
) -> PairGradients:
    n = len(batch.anchors)
    own = jax.tree.map(lambda x: x[:n], cotangents)
    grads, by_parameters = _side_gradients(spec, batch, parameters, own, gradients)
    if not spec.symmetric:
        return grads, by_parameters
    other = jax.tree.map(lambda x: x[n:], cotangents)
    grads, by_parameters = _side_gradients(
        spec, swapped(batch), parameters, other, (_swap(grads), by_parameters)
    )
    return _swap(grads), by_parameters


def _side_gradients(
    spec: PairSpec,
    batch: Batch,
    parameters: Parameters,
    cotangents: Any,
    gradients: PairGradients,
) -> PairGradients:
    panels = Panels.of(spec.metric, batch, spec.sizes)

    def step(block: Array, gradients: PairGradients) -> PairGradients:
        grads, by_parameters = gradients
        panel = _refined(panels, block)
        terms = functools.partial(_block_terms, spec, panel)
        _, pull = jax.vjp(terms, parameters, panel.distances)
        row = _rows(panels, panel)
        new, by_distance = pull(jax.tree.map(lambda x: x[row], cotangents))
        grads = panel.vjp(panels, by_distance, grads)
        return grads, jax.tree.map(jnp.add, by_parameters, new)

    return lax.fori_loop(0, panels.blocks.count, step, gradients)


def _refined(panels: Panels, block: Array) -> Panel:
    """A panel in which positives have all the digits of their distances."""
    panel = panels.panel(block)
    return panel.refined(panels, panel.masks.positive)


def _rows(panels: Panels, panel: Panel) -> Array:
    return panel.start + jnp.arange(panels.blocks.size)


def _block_terms(
    spec: PairSpec, panel: Panel, parameters: Parameters, distances: Array
) -> Any:
    """The terms of a panel; rows that two panels share count in the first."""
    here = at_anchors(
        parameters, lambda x: rows_at(x, panel.start, len(panel.a)), keep=True
    )
    terms = spec.shape.terms(distances, panel.masks, here)
    return jax.tree.map(lambda x: jnp.where(panel.real, x, 0), terms)
