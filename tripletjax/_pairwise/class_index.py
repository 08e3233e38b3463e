"""The positives of every anchor, from labels sorted once."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from tripletjax._pairwise.batch import Batch
from tripletjax._pairwise.slices import Index, rows_at
from tripletjax.pairs import PairMasks, Pairs, same_labels


class ClassIndex(NamedTuple):
    """Positives and negatives of every anchor, from references sorted by label.

    Attributes:
        order: references sorted by label, padding last ``[m]``.
        start: index in `order` at which the class of an anchor begins ``[n]``.
        rank: rank of the anchor itself in its class, or m if it is no member ``[n]``.
        own: index of the anchor itself in `order`, or m if it is no reference ``[n]``.
        positives: number of positives of an anchor, 0 for padding ``[n]``.
        negatives: number of negatives of an anchor, 0 for padding ``[n]``.
        max_positives: largest number of positives of an anchor that has a negative.
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
        """The index of the labels of a batch."""
        return cls.of_pairs(batch.pairs)

    @classmethod
    def of_pairs(cls, pairs: Pairs) -> "ClassIndex":
        """The index of pairs that are defined by labels, not by masks."""
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
            # Labels of padding are not in order: the searches below must not see them.
            last = jnp.array(jnp.iinfo(ordered.dtype).max, ordered.dtype)
            ordered = jnp.where(index < size, ordered, last)
        inverse = jnp.zeros_like(order).at[order].set(index, unique_indices=True)
        if square:
            # Every anchor is a reference: no search, only the bounds of its class.
            first = (ordered != jnp.roll(ordered, 1)) | (index == 0) | (index == size)
            last = jnp.roll(first, -1)
            start = lax.cummax(jnp.where(first, index, 0))[inverse]
            end = lax.cummin(jnp.where(last, index + 1, m), reverse=True)[inverse]
        else:
            wanted = labels.astype(ordered.dtype)
            start = jnp.searchsorted(ordered, wanted, side="left")
            end = jnp.searchsorted(ordered, wanted, side="right")
            end = jnp.minimum(end, size)
            if wanted.dtype != labels.dtype:
                # A label out of range of this dtype has wrapped: its class is empty.
                end = jnp.where(same_labels(wanted, labels), end, start)
        start = jnp.minimum(start, end)
        class_size = end - start

        positions = jnp.arange(n) if square else pairs.positions
        if positions is None:
            in_references = matches = jnp.zeros_like(labels, bool)
            rank = own = jnp.full_like(start, m)
        else:
            position = jnp.clip(positions, 0, m - 1)
            in_references = position == positions
            if real is not None:
                in_references &= real[position]
            matches = in_references & same_labels(references[position], labels)
            rank = jnp.where(matches, inverse[position] - start, m)
            own = jnp.where(in_references, inverse[position], m)
        positives = class_size - matches
        negatives = size - class_size - (in_references & ~matches)
        if where is not None:
            positives, negatives = positives * where, negatives * where
        max_positives = jnp.max(jnp.where(negatives > 0, positives, 0))
        return cls(order, start, rank, own, positives, negatives, max_positives)

    def positive(self, r: Index, start: Index, size: int) -> tuple[Array, Array]:
        """The r-th positive of each anchor of a block.

        Args:
            r: rank of the positive by its index in `order`, from 0.
            start: first anchor of the block.
            size: anchors of the block.

        Returns:
            References ``[size]``, and whether each anchor has an r-th positive.
        """
        first, rank, count = (
            rows_at(x, start, size) for x in (self.start, self.rank, self.positives)
        )
        slot = jnp.minimum(first + r + (r >= rank), len(self.order) - 1)
        return self.order[slot], r < count

    def negative(self, r: Index, start: Index, size: int) -> tuple[Array, Array]:
        """The r-th negative of each anchor of a block, as in `positive`."""
        first, rank, own, positives, count = (
            rows_at(x, start, size)
            for x in (self.start, self.rank, self.own, self.positives, self.negatives)
        )
        m = len(self.order)
        # In `order`, the class lies among the negatives, and so does an anchor that is
        # no member of it: skip whichever comes first, then the other.
        class_size = positives + (rank < m)
        slot = r + ((own < first) & (r >= own))
        slot += jnp.where(slot >= first, class_size, 0)
        slot += (own >= first + class_size) & (slot >= own)
        return self.order[jnp.minimum(slot, m - 1)], r < count

    def count_triplets(self, start: Index, size: int, like: Array) -> Array:
        """Number of triplets of each anchor of a block, in the dtype of `like`."""
        positives, negatives = (
            rows_at(x, start, size).astype(like.dtype)
            for x in (self.positives, self.negatives)
        )
        return positives * negatives

    def positives_slice(
        self, first: Index, count: int, start: Index, size: int
    ) -> tuple[Array, Array]:
        """Positives ``[size, count]`` of a block, those of rank `first` and after.

        Returns:
            References, and whether each anchor has such a positive.
        """
        ranks = first + jnp.arange(count)
        index, exists = jax.vmap(lambda r: self.positive(r, start, size))(ranks)
        return index.T, exists.T
