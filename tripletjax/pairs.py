"""Masks of positive and negative pairs from labels.

Miners, losses and metrics take `labels` as integers or as `PairMasks`. This module
makes the masks, or the user makes them by hand. `Pairs` checks, completes and compares
labels, positions and padding. Large batches of integers are sorted by class instead
(`_pairwise.class_index`).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from tripletjax._api import jitted
from tripletjax._matrices import as_distances


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

    Memory: O(n m), that of the masks.

    Args:
        labels: integers ``[..., n]``, one per anchor. With `match`, labels of any
            dtype: ``[n]``, or ``[..., n, k]`` where a label is a row of k numbers.
        reference_labels: the same for m references. If not given, the anchors are
            their own references (m = n).
        positions: integers ``[..., n]``: the index of each anchor among the
            references, so that an anchor is never paired with itself. An index outside
            0 to m - 1, such as -1, means that the anchor is not a reference. If not
            given, the diagonal without `reference_labels`, and nowhere with them.
        where: bool ``[..., n]``, True for real anchors and False for padding.
        reference_where: bool ``[..., m]``, the same for references. If not given,
            `where` if the anchors are their own references.
        match: a predicate of two labels, ``(label, label) -> bool``, instead of
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
    labels = _as_labels("labels", labels, match)
    square = reference_labels is None
    references = labels
    if not square:
        references = _as_labels("reference_labels", reference_labels, match)
    row = 0 if match is None or labels.ndim == 1 else 1
    if row and (references.ndim < 2 or references.shape[-1] != labels.shape[-1]):
        raise ValueError(
            "labels and reference_labels must have rows of one length, got shapes "
            f"{labels.shape} and {references.shape}."
        )
    *_, n = labels.shape[: labels.ndim - row]
    if positions is not None:
        positions = per_item("positions", positions, n, "labels", jnp.integer)
    if square and reference_where is None:
        reference_where = where
    if match is None:
        masks = match_labels(labels, None if square else references, positions)
    else:
        masks = _masks_of(_match_all(match, labels, references, row), positions, square)
    return keep_pairs(masks, where, reference_where)


def match_labels(
    labels: Array, reference_labels: Array | None, positions: Array | None
) -> PairMasks:
    """The masks of checked labels, without padding."""
    square = reference_labels is None
    references = labels if square else reference_labels
    same = same_labels(labels[..., :, None], references[..., None, :])
    return _masks_of(same, positions, square)


def same_labels(left: Array, right: Array) -> Array:
    """Whether integers are equal, whatever their dtypes."""
    same = left == right
    if left.dtype != right.dtype:
        # JAX may compare a signed and an unsigned integer by their bits.
        same &= (left < 0) == (right < 0)
    return same


def _masks_of(same: Array, positions: Array | None, square: bool) -> PairMasks:
    """Masks of which labels are the same; no item is paired with itself."""
    *_, n, m = same.shape
    if positions is not None:
        itself = positions[..., :, None] == jnp.arange(m)
    else:
        itself = jnp.eye(n, m, dtype=bool) & square
    return PairMasks(same & ~itself, ~same & ~itself)


class Pairs(NamedTuple):
    """Positive and negative pairs of a call: checked, with the defaults filled in.

    The matrix and the blockwise forms, retrieval and verification all begin with it.

    Attributes:
        labels: integers ``[..., n]``, or `PairMasks` ``[..., n, m]``.
        reference_labels: integers ``[..., m]``; None with masks, and if the anchors are
            their own references.
        positions: integers ``[..., n]``, or None.
        where: bool ``[..., n]``, or None.
        reference_where: bool ``[..., m]``, or None.
    """

    labels: Array | PairMasks
    reference_labels: Array | None
    positions: Array | None
    where: Array | None
    reference_where: Array | None

    @classmethod
    def of(
        cls,
        labels: ArrayLike | PairMasks,
        *,
        shape: tuple[int, ...],
        anchors: str,
        references: str,
        same: bool | None = None,
        devices: int = 1,
        reference_labels: ArrayLike | None = None,
        positions: ArrayLike | None = None,
        where: ArrayLike | None = None,
        reference_where: ArrayLike | None = None,
    ) -> "Pairs":
        """Check labels or masks, positions and padding.

        Args:
            labels, reference_labels, positions, where, reference_where: as in
                `pair_masks`; or `PairMasks`.
            shape: of all pairs, ``[..., n, m]``.
            anchors: what the caller calls anchors, in plural, for errors.
            references: likewise.
            same: whether the anchors are their own references; None if the labels have
                to say.
            devices: over how many the references are split, of which masks have all.
        """
        *lead, n, m = shape
        where = _of_items("where", where, anchors, (*lead, n), jnp.bool_)
        reference_where = _of_items(
            "reference_where", reference_where, references, (*lead, m), jnp.bool_
        )
        if isinstance(labels, PairMasks):
            if reference_labels is not None or positions is not None:
                raise ValueError(
                    "reference_labels and positions do not go with labels that are "
                    "PairMasks: the masks already say it."
                )
            masks = _of_pairs(labels, (*lead, n, m * devices), anchors, references)
            if reference_where is None and where is not None and n == m:
                if same:
                    reference_where = where
                elif same is None:
                    reference_where = _as_references(masks, where)
            return cls(masks, None, None, where, reference_where)
        if reference_labels is None and n != m:
            hint = ""
            if anchors == "rows of distances":
                hint = " If these are embeddings, use tripletjax.blockwise."
            raise ValueError(
                f"reference_labels must be given where there are {n} {anchors} and {m} "
                f"{references}.{hint}"
            )
        labels = _labels_of("labels", labels, anchors, (*lead, n))
        if reference_labels is not None:
            reference_labels = _labels_of(
                "reference_labels", reference_labels, references, (*lead, m)
            )
        elif reference_where is None:
            reference_where = where
        positions = _of_items("positions", positions, anchors, (*lead, n), jnp.integer)
        return cls(labels, reference_labels, positions, where, reference_where)

    @classmethod
    def alone(cls, labels: ArrayLike | PairMasks, **options: Any) -> "Pairs":
        """Check labels or masks without distances or vectors.

        Args:
            labels: integers ``[..., n]``, or `PairMasks`.
            **options: `reference_labels`, `positions`, `where` and `reference_where`,
                each of which may be None.
        """
        names = {"anchors": "anchors", "references": "references"}
        if isinstance(labels, PairMasks):
            shape = jnp.shape(labels.positive)
            if len(shape) < 2:
                raise ValueError(
                    f"labels.positive must be [..., n, m], got shape {shape}."
                )
            return cls.of(labels, shape=shape, **names, **options)
        labels = _as_labels("labels", labels, None)
        given = [jnp.shape(x) for x in (labels, *options.values()) if x is not None]
        lead = jnp.broadcast_shapes(*(shape[:-1] for shape in given))
        n = m = labels.shape[-1]
        if (references := options["reference_labels"]) is not None:
            m = _as_labels("reference_labels", references, None).shape[-1]
        pairs = cls.of(labels, shape=(*lead, n, m), **names, **options)
        positions, own = pairs.positions, pairs.labels
        assert not isinstance(own, PairMasks)
        if references is None and (
            positions is not None or options["reference_where"] is not None
        ):
            # The anchors and their references then differ in more than their order.
            if positions is None:
                positions = jnp.broadcast_to(jnp.arange(n), (*lead, n))
            pairs = pairs._replace(reference_labels=own, positions=positions)
        return pairs

    def masks(self) -> PairMasks:
        """Which pairs are positive and which negative, ``[..., n, m]``."""
        masks = self.labels
        if not isinstance(masks, PairMasks):
            masks = match_labels(masks, self.reference_labels, self.positions)
        return keep_pairs(masks, self.where, self.reference_where)


def masks_for(
    distances: Array, labels: ArrayLike | PairMasks, **pairs: Any
) -> PairMasks:
    """The masks of a distance matrix ``[..., n, m]``, from labels or ready-made.

    Args:
        distances: ``[..., n, m]``.
        labels: integers, or `PairMasks`.
        **pairs: `reference_labels`, `positions`, `where` and `reference_where`.
    """
    return Pairs.of(
        labels,
        shape=distances.shape,
        anchors="rows of distances",
        references="columns of distances",
        **pairs,
    ).masks()


def _as_references(masks: PairMasks, where: Array) -> Array:
    """Which references are real, by masks ``[..., n, n]`` and which anchors are.

    No item is paired with itself: a pair on the diagonal is one with another
    reference, and then nothing is known of the padding among the references.
    """
    diagonals = [jnp.diagonal(mask, axis1=-2, axis2=-1) for mask in masks]
    others = jnp.any((diagonals[0] | diagonals[1]) & where, axis=-1, keepdims=True)
    return where | others


def _labels_of(
    name: str, labels: ArrayLike, what: str, shape: tuple[int, ...]
) -> Array:
    labels = _as_labels(name, labels, None)
    if labels.shape[-1] != shape[-1]:
        raise ValueError(
            f"{name} has shape {labels.shape}, but there are {shape[-1]} {what}: there "
            "must be one label for each."
        )
    return _broadcast(name, labels, shape)


def _of_items(
    name: str, values: ArrayLike | None, what: str, shape: tuple[int, ...], dtype: Any
) -> Array | None:
    if values is None:
        return None
    return _broadcast(name, per_item(name, values, shape[-1], what, dtype), shape)


def _of_pairs(
    masks: PairMasks, shape: tuple[int, ...], anchors: str, references: str
) -> PairMasks:
    checked = []
    for name, mask in masks._asdict().items():
        name, mask = f"labels.{name}", as_boolean(f"labels.{name}", mask)
        if mask.shape[-2:] != shape[-2:]:
            raise ValueError(
                f"{name} has shape {mask.shape}, but there are {shape[-2]} {anchors} "
                f"and {shape[-1]} {references}: the last two dimensions must be "
                f"{shape[-2:]}."
            )
        checked.append(_broadcast(name, mask, shape))
    return PairMasks(*checked)


def _broadcast(name: str, values: Array, shape: tuple[int, ...]) -> Array:
    try:
        return jnp.broadcast_to(values, shape)
    except ValueError:
        raise ValueError(
            f"{name} has shape {values.shape}, which does not broadcast to {shape}."
        ) from None


def _as_labels(name: str, labels: ArrayLike, match: Match | None) -> Array:
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


def _check_guard(*_: Any, **options: Any) -> None:
    if options.get("margin") is None and options.get("share") is None:
        raise ValueError("margin or share must be given, got None for both.")


@jitted(finite=("margin", "share"), check=_check_guard)
def ignore_false_negatives(
    distances: ArrayLike,
    labels: ArrayLike | PairMasks,
    *,
    margin: ArrayLike | None = None,
    share: ArrayLike | None = None,
    reference_labels: ArrayLike | None = None,
    positions: ArrayLike | None = None,
    where: ArrayLike | None = None,
    reference_where: ArrayLike | None = None,
) -> PairMasks:
    r"""Pairs without the negatives that are much nearer than a positive.

    Such negatives are probably positives without a label. Those that remain have

    $$d_{an} \ge \min_{p \in P_a} d_{ap} - \text{margin}, \qquad
      s_{an} \le s_{ap} + \text{share} \cdot |s_{ap}|, \quad s = 1 - d$$

    with the nearest positive p. The masks go into any miner or loss as `labels`. The
    softmax losses have both rules as arguments, and without a matrix in
    `tripletjax.blockwise`.

    Memory: O(n m), that of the distances.

    Args:
        distances: ``[..., n, m]``; cosine distances for `share`.
        labels: integers ``[..., n]``, or `PairMasks`.
        margin: a scalar of any sign, in units of the distances, or None. The rule of
            Qwen3 Embedding is 0.1 with cosine distances.
        share: a scalar of any sign, or None. The rule of NV-Retriever is -0.05, which
            keeps negatives with at most 95 % of the positive's similarity.
        reference_labels, positions, where, reference_where: as in `pair_masks`.

    Returns:
        The `PairMasks` ``[..., n, m]``. All negatives remain for an anchor without a
        positive.

    Raises:
        TypeError: if an argument has the wrong dtype.
        ValueError: if shapes do not fit, both rules are None, or one is not finite.

    References:
        Zhang et al. Qwen3 Embedding: Advancing Text Embedding and Reranking Through
        Foundation Models. 2025. arXiv:2506.05176

        Moreira, Osmulski, Xu, Ak, Schifferer, Oldridge. NV-Retriever: Improving Text
        Embedding Models with Effective Hard-Negative Mining. 2024. arXiv:2407.15831

    >>> import jax.numpy as jnp
    >>> import tripletjax as tj
    >>> d = jnp.array([[0.0, 0.5, 0.1], [0.5, 0.0, 0.6], [0.1, 0.6, 0.0]])
    >>> masks = tj.ignore_false_negatives(d, jnp.array([0, 0, 1]), margin=0.1)
    >>> print(masks.negative)
    [[False False False]
     [False False  True]
     [ True  True False]]
    >>> print(f"{tj.batch_hard_loss(d, masks, margin=0.2):.1f}")
    0.1
    """
    distances = as_distances(distances)
    positive, negative = masks_for(
        distances,
        labels,
        reference_labels=reference_labels,
        positions=positions,
        where=where,
        reference_where=reference_where,
    )
    low = false_negative_limits(distances, positive, margin, share)
    return PairMasks(positive, negative & ~(distances < low[..., None]))


def false_negative_limits(
    distances: Array,
    positive: Array,
    margin: ArrayLike | None,
    share: ArrayLike | None,
) -> Array:
    """The least distances of negatives that are not ignored, ``[..., n]``.

    Args:
        distances: of positives and others ``[..., n, k]``.
        positive: bool ``[..., n, k]``.
        margin, share: as in `ignore_false_negatives`.
    """
    nearest = jnp.min(jnp.where(positive, distances, jnp.inf), axis=-1)
    limits = [jnp.full_like(nearest, -jnp.inf)]
    if margin is not None:
        limits.append(nearest - margin)
    if share is not None:
        limits.append(nearest - share * jnp.abs(1 - nearest))
    least = jnp.max(jnp.stack(limits), axis=0).astype(nearest.dtype)
    return lax.stop_gradient(jnp.where(nearest < jnp.inf, least, -jnp.inf))


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


def per_item(name: str, values: ArrayLike, size: int, what: str, dtype: Any) -> Array:
    values = jnp.asarray(values) if dtype is jnp.integer else as_boolean(name, values)
    if not jnp.issubdtype(values.dtype, dtype):
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
