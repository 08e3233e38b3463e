"""The positives of every anchor, from labels sorted once."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from tripletjax._pairwise.batch import Batch
from tripletjax._pairwise.slices import Index, rows_at
from tripletjax.pairs import PairMasks, Pairs, same_labels


class ClassIndex(NamedTuple):
    """The positives of every anchor, by sorting the references once.

    Attributes:
        order: references sorted by label ``[m]``, those that are padding last.
        start: where an anchor's class begins in it ``[n]``.
        rank: the anchor's own rank in its class, or m ``[n]``.
        own: the anchor's own index in `order`, or m ``[n]``.
        positives: how many positives an anchor has ``[n]``; none if it is padding.
        negatives: how many negatives ``[n]``.
        max_positives: the most positives of any anchor.
    """

    order: Array
    start: Array
    rank: Array
    own: Array
    positives: Array
    negatives: Array
    max_positives: Array

    @classmethod
    def of(cls, batch: Batch) -> "ClassIndex":
        return cls.of_pairs(batch.pairs)

    @classmethod
    def of_pairs(cls, pairs: Pairs) -> "ClassIndex":
        labels, where, real = pairs.labels, pairs.where, pairs.reference_where
        assert not isinstance(labels, PairMasks)
        references, square = pairs.reference_labels, pairs.reference_labels is None
        if references is None:
            references = labels
        n, m = len(labels), len(references)
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
        inverse = jnp.zeros_like(order).at[order].set(index, unique_indices=True)
        if square:
            # Every anchor is in there, and need not be searched for.
            first = (ordered != jnp.roll(ordered, 1)) | (index == 0) | (index == size)
            last = jnp.roll(first, -1)
            start = lax.cummax(jnp.where(first, index, 0))[inverse]
            end = lax.cummin(jnp.where(last, index + 1, m), reverse=True)[inverse]
        else:
            sought = labels.astype(ordered.dtype)
            start = jnp.searchsorted(ordered, sought, side="left")
            end = jnp.searchsorted(ordered, sought, side="right")
            end = jnp.minimum(end, size)
            if sought.dtype != labels.dtype:
                # A label beyond the range of the references' labels has wrapped.
                end = jnp.where(same_labels(sought, labels), end, start)
        start = jnp.minimum(start, end)
        alike = end - start

        positions = jnp.arange(n) if square else pairs.positions
        if positions is None:
            itself = matches = jnp.zeros_like(labels, bool)
            rank = own = jnp.full_like(start, m)
        else:
            place = jnp.clip(positions, 0, m - 1)
            itself = place == positions
            if real is not None:
                itself &= real[place]
            matches = itself & same_labels(references[place], labels)
            rank = jnp.where(matches, inverse[place] - start, m)
            own = jnp.where(itself, inverse[place], m)
        positives = alike - matches
        negatives = size - alike - (itself & ~matches)
        if where is not None:
            positives, negatives = positives * where, negatives * where
        most = jnp.max(jnp.where(negatives > 0, positives, 0))
        return cls(order, start, rank, own, positives, negatives, most)

    def positive(self, r: Index, start: Index, size: int) -> tuple[Array, Array]:
        """The r-th positives of a block of anchors, and whether there are such."""
        first, rank, count = (
            rows_at(x, start, size) for x in (self.start, self.rank, self.positives)
        )
        slot = jnp.minimum(first + r + (r >= rank), len(self.order) - 1)
        return self.order[slot], r < count

    def negative(self, r: Index, start: Index, size: int) -> tuple[Array, Array]:
        """The r-th negatives of a block of anchors, and whether there are such."""
        first, rank, own, positives, count = (
            rows_at(x, start, size)
            for x in (self.start, self.rank, self.own, self.positives, self.negatives)
        )
        m = len(self.order)
        # The class lies between the negatives, with the anchor or apart from it.
        alike = positives + (rank < m)
        slot = r + ((own < first) & (r >= own))
        slot += jnp.where(slot >= first, alike, 0)
        slot += (own >= first + alike) & (slot >= own)
        return self.order[jnp.minimum(slot, m - 1)], r < count

    def count_triplets(self, start: Index, size: int, like: Array) -> Array:
        """How many triplets a block of anchors has, as numbers of an array's dtype."""
        positives, negatives = (
            rows_at(x, start, size).astype(like.dtype)
            for x in (self.positives, self.negatives)
        )
        return positives * negatives

    def positives_slice(
        self, first: Index, count: int, start: Index, size: int
    ) -> tuple[Array, Array]:
        """The positives from the first on ``[size, count]`` of a block of anchors."""
        ranks = first + jnp.arange(count)
        index, found = jax.vmap(lambda r: self.positive(r, start, size))(ranks)
        return index.T, found.T
