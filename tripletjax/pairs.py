"""Who matches whom: labels -> masks of positive and negative pairs.

This is the only place where labels are compared. Everything that mines or costs
triplets takes `labels` either as integers or, for what integers cannot say, as the
`PairMasks` that this module makes or that the user made by hand.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from tripletjax._api import jitted


class PairMasks(NamedTuple):
    """Which references are positives and which are negatives of each anchor.

    A pair that is neither is ignored. Masks made by hand are used as they are, so an
    item that is both an anchor and a reference must be ruled out as its own positive.

    With `where`, as many references as anchors and nothing on the diagonal, the anchors
    are taken for the references, so that padding is neither; `reference_where` says
    otherwise.

    Attributes:
        positive: bool ``[..., n, m]``.
        negative: bool ``[..., n, m]``.
    """

    positive: Array
    negative: Array


Match = Callable[[Array, Array], Array]


@jitted(callables=("match",))
def pair_masks(
    labels: ArrayLike,
    reference_labels: ArrayLike | None = None,
    *,
    positions: ArrayLike | None = None,
    where: ArrayLike | None = None,
    reference_where: ArrayLike | None = None,
    match: Match | None = None,
) -> PairMasks:
    r"""The positive and negative pairs that labels make.

    $$\text{positive}_{ij} = (y_i = y_j) \wedge (i \ne j), \qquad
      \text{negative}_{ij} = (y_i \ne y_j)$$

    Args:
        labels: integers ``[..., n]``, one per anchor. With `match`, labels of any
            dtype: ``[n]``, or ``[..., n, k]`` where a label is a row of k numbers.
        reference_labels: the same for m references. If not given, the anchors are
            their own references (m = n).
        positions: integers ``[..., n]``: the place of each anchor among the
            references, so that it is never paired with itself; a place outside 0 to
            m - 1 (such as -1) means that it is not among them. If not given, the
            diagonal without `reference_labels`, and nowhere with them.
        where: bool ``[..., n]``, True for real anchors and False for padding.
        reference_where: bool ``[..., m]``, the same for references. If not given,
            `where` if the anchors are their own references.
        match: says whether two labels match, ``(label, label) -> bool``, in place of
            equality.

    Returns:
        The `PairMasks`, ``[..., n, m]``.

    Raises:
        TypeError: if labels are not integers (without `match`), if positions are not
            integers, or if `where` is not boolean.
        ValueError: if there are no labels, or if shapes do not fit.

    Items that share any tag, where each item has several:

    >>> import jax.numpy as jnp
    >>> import tripletjax as tj
    >>> tags = jnp.array([[1, 0, 1], [0, 0, 1], [0, 1, 0]])
    >>> share = lambda a, b: jnp.any((a > 0) & (b > 0))
    >>> print(tj.pair_masks(tags, match=share).positive)
    [[False  True False]
     [ True False False]
     [False False False]]
    """
    labels = as_labels("labels", labels, match)
    square = reference_labels is None
    if square:
        references = labels
    else:
        references = as_labels("reference_labels", reference_labels, match)
    row = 0 if match is None or labels.ndim == 1 else 1
    if row and (references.ndim < 2 or references.shape[-1] != labels.shape[-1]):
        raise ValueError(
            "labels and reference_labels must have rows of one length, got shapes "
            f"{labels.shape} and {references.shape}."
        )
    *_, n = labels.shape[: labels.ndim - row]
    *_, m = references.shape[: references.ndim - row]

    if match is None:
        left, right = labels[..., :, None], references[..., None, :]
        same = left == right
        if left.dtype != right.dtype:
            # JAX may compare a signed and an unsigned integer by their bits.
            same &= (left < 0) == (right < 0)
    else:
        same = _match_all(match, labels, references, row)
    if positions is not None:
        positions = per_item("positions", positions, n, "labels", jnp.integer)
        itself = positions[..., :, None] == jnp.arange(m)
    else:
        itself = jnp.eye(n, m, dtype=bool) & square
    masks = PairMasks(same & ~itself, ~same & ~itself)
    if square and reference_where is None:
        reference_where = where
    return keep_pairs(masks, where, reference_where)


def resolve(
    distances: Array,
    labels: ArrayLike | PairMasks,
    *,
    reference_labels: ArrayLike | None = None,
    positions: ArrayLike | None = None,
    where: ArrayLike | None = None,
    reference_where: ArrayLike | None = None,
) -> PairMasks:
    """The masks of a distance matrix ``[..., n, m]``, from labels or ready-made."""
    *_, n, m = distances.shape
    if isinstance(labels, PairMasks):
        if reference_labels is not None or positions is not None:
            raise ValueError(
                "reference_labels and positions do not go with labels that are "
                "PairMasks: the masks already say it."
            )
        masks = [as_boolean(f"labels.{k}", v) for k, v in labels._asdict().items()]
        for name, mask in zip(labels._fields, masks):
            if mask.shape[-2:] != (n, m):
                raise ValueError(
                    f"labels.{name} has shape {mask.shape} but distances has shape "
                    f"{distances.shape}: the last two dimensions must agree."
                )
        masks = PairMasks(*masks)
        if n == m and where is not None and reference_where is None:
            reference_where = _as_references(masks, as_boolean("where", where))
        masks = keep_pairs(masks, where, reference_where)
    else:
        labels = as_labels("labels", labels, None)
        if labels.shape[-1] != n:
            raise ValueError(
                f"labels has shape {labels.shape} but distances has shape "
                f"{distances.shape}: there must be one label per row."
            )
        if reference_labels is None and n != m:
            raise ValueError(
                f"distances has shape {distances.shape}, which is not square: give the "
                "reference_labels of its columns."
            )
        if reference_labels is not None:
            reference_labels = as_labels("reference_labels", reference_labels, None)
            if reference_labels.shape[-1] != m:
                raise ValueError(
                    f"reference_labels has shape {reference_labels.shape} but "
                    f"distances has shape {distances.shape}: there must be one label "
                    "per column."
                )
        masks = pair_masks(
            labels,
            reference_labels,
            positions=positions,
            where=where,
            reference_where=reference_where,
        )
    try:
        return PairMasks(*(jnp.broadcast_to(mask, distances.shape) for mask in masks))
    except ValueError:
        raise ValueError(
            f"labels make pairs of shape {masks.positive.shape}, which does not "
            f"broadcast to the shape {distances.shape} of distances."
        ) from None


def _as_references(masks: PairMasks, where: Array) -> Array:
    """Which references are real, by masks ``[..., n, n]`` and which anchors are.

    No item is paired with itself: a pair on the diagonal is one with another
    reference, and then nothing is known of the padding among the references.
    """
    diagonals = [jnp.diagonal(mask, axis1=-2, axis2=-1) for mask in masks]
    others = jnp.any((diagonals[0] | diagonals[1]) & where, axis=-1, keepdims=True)
    return where | others


def in_turn(pairs: Array, visit: Callable[[Any, Array, Array], Any], state: Any) -> Any:
    """Visits the first of the pairs in every row, then the second, and so on.

    ``visit(state, column, found)`` is given columns ``[..., n]`` of `pairs`
    ``[..., n, m]``, and whether each row had one left.
    """
    columns = jnp.arange(pairs.shape[-1])

    def step(loop: tuple[Array, Any]) -> tuple[Array, Any]:
        left, state = loop
        column = jnp.argmax(left, axis=-1)
        state = visit(state, column, jnp.any(left, axis=-1))
        return left & (columns != column[..., None]), state

    return lax.while_loop(lambda loop: jnp.any(loop[0]), step, (pairs, state))[1]


def as_labels(name: str, labels: ArrayLike, match: Match | None) -> Array:
    labels = jnp.asarray(labels)
    if labels.ndim < 1:
        raise ValueError(f"{name} must be [..., n], got a scalar.")
    if labels.size == 0:
        raise ValueError(f"{name} is empty: it has shape {labels.shape}.")
    if match is None and not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(
            f"{name} must be integers, got dtype {labels.dtype}. Labels that match by "
            "more than equality go through tripletjax.pair_masks(..., match=...)."
        )
    return labels


def _match_all(match: Match, labels: Array, references: Array, row: int) -> Array:
    def decide(a: Array, b: Array) -> Array:
        matched = jnp.asarray(match(a, b))
        if matched.shape != () or matched.dtype != bool:
            raise TypeError(
                "match must return one boolean for two labels, got shape "
                f"{matched.shape} and dtype {matched.dtype}."
            )
        return matched

    core = "(k)" if row else "()"
    compare = jnp.vectorize(decide, signature=f"{core},{core}->()")
    left = jnp.expand_dims(labels, labels.ndim - row)
    right = jnp.expand_dims(references, references.ndim - row - 1)
    return compare(left, right)


def keep_pairs(
    masks: PairMasks, where: ArrayLike | None, reference_where: ArrayLike | None
) -> PairMasks:
    """Masks without the pairs of padding."""
    *_, n, m = masks.positive.shape
    if where is not None:
        keep = per_item("where", where, n, "anchors", jnp.bool_)[..., :, None]
        masks = PairMasks(masks.positive & keep, masks.negative & keep)
    if reference_where is not None:
        keep = per_item("reference_where", reference_where, m, "references", jnp.bool_)
        keep = keep[..., None, :]
        masks = PairMasks(masks.positive & keep, masks.negative & keep)
    return masks


def per_item(name: str, values: ArrayLike, size: int, what: str, kind: type) -> Array:
    values = jnp.asarray(values) if kind is jnp.integer else as_boolean(name, values)
    if not jnp.issubdtype(values.dtype, kind):
        raise TypeError(f"{name} must be integers, got dtype {values.dtype}.")
    if values.ndim < 1 or values.shape[-1] != size:
        raise ValueError(
            f"{name} must have one entry for each of the {size} {what}, got shape "
            f"{values.shape}."
        )
    return values


def as_boolean(name: str, values: ArrayLike) -> Array:
    values = jnp.asarray(values)
    if values.dtype != bool:
        raise TypeError(f"{name} must be boolean, got dtype {values.dtype}.")
    return values
