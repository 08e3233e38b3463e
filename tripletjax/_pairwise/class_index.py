"""Positives of every anchor, from labels that are sorted once."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from tripletjax._pairwise.batch import Batch
from tripletjax._pairwise.slices import Index, rows_at


class ClassIndex(NamedTuple):
    """Positives of every anchor, as runs of the references in the order of labels.

    Attributes:
        order: indices of the references sorted by label ``[m]``, padding last.
        start: position in `order` where an anchor's class begins ``[n]``.
        rank: the anchor's rank in its class; m if it is not a reference ``[n]``.
        positives: number of positives of an anchor ``[n]``, 0 for padding.
        negatives: number of negatives of an anchor ``[n]``, 0 for padding.
        max_positives: the largest number of positives of an anchor with negatives.
    """

    order: Array
    start: Array
    rank: Array
    positives: Array
    negatives: Array
    max_positives: Array

    @classmethod
    def of(cls, batch: Batch) -> "ClassIndex":
        labels, where = batch.labels, batch.pairs.where
        _, references, real = batch.reference_side
        m = len(references)
        index = jnp.arange(m)
        if real is None:
            ordered, order = lax.sort((references, index), num_keys=1)
            size = m
        else:
            _, ordered, order = lax.sort((~real, references, index), num_keys=2)
            size = jnp.sum(real)
            # The labels of padding are not in order: a search must not see them.
            last = jnp.iinfo(ordered.dtype).max
            ordered = jnp.where(index < size, ordered, last)
        inverse = jnp.zeros_like(order).at[order].set(index, unique_indices=True)
        if batch.square:
            # Every anchor is a reference, which needs no search.
            first = (ordered != jnp.roll(ordered, 1)) | (index == 0) | (index == size)
            last = jnp.roll(first, -1)
            start = lax.cummax(jnp.where(first, index, 0))[inverse]
            end = lax.cummin(jnp.where(last, index + 1, m), reverse=True)[inverse]
        else:
            start = jnp.searchsorted(ordered, labels, side="left")
            end = jnp.searchsorted(ordered, labels, side="right")
            end = jnp.minimum(end, size)
        start = jnp.minimum(start, end)
        alike = end - start

        own = jnp.clip(batch.own_index, 0, m - 1)
        is_reference = own == batch.own_index
        if real is not None:
            is_reference &= real[own]
        matches = is_reference & (references[own] == labels)
        rank = jnp.where(matches, inverse[own] - start, m)
        positives = alike - matches
        negatives = size - alike - (is_reference & ~matches)
        if where is not None:
            positives, negatives = positives * where, negatives * where
        most = jnp.max(jnp.where(negatives > 0, positives, 0))
        return cls(order, start, rank, positives, negatives, most)

    def positive(self, r: Index, start: Index, size: int) -> tuple[Array, Array]:
        """The r-th positives of a block of anchors, and whether they exist."""
        first, rank, count = (
            rows_at(x, start, size) for x in (self.start, self.rank, self.positives)
        )
        slot = jnp.minimum(first + r + (r >= rank), len(self.order) - 1)
        return self.order[slot], r < count

    def count_triplets(self, start: Index, size: int, like: Array) -> Array:
        """Number of triplets of each anchor of a block, in the dtype of an array."""
        positives, negatives = (
            rows_at(x, start, size).astype(like.dtype)
            for x in (self.positives, self.negatives)
        )
        return positives * negatives

    def positives_slice(
        self, first: Index, count: int, start: Index, size: int
    ) -> tuple[Array, Array]:
        """Positives ``[size, count]`` of a block of anchors from the first rank on."""
        ranks = first + jnp.arange(count)
        index, exists = jax.vmap(lambda r: self.positive(r, start, size))(ranks)
        return index.T, exists.T
