"""The static description of a loss, and the gradients of its sums."""

import dataclasses
import enum
from collections.abc import Callable
from typing import NamedTuple, Self, TypeVar

from jax import Array

from tripletjax._pairwise.batch import Batch
from tripletjax._pairwise.block_sizes import CPU, BlockSizes, by_platform
from tripletjax._pairwise.slices import Index, add_rows
from tripletjax.distances import Metric
from tripletjax.losses import RELU, Cost

T = TypeVar("T")


class Mining(enum.Enum):
    """The triplets of a loss."""

    ALL = enum.auto()
    HARD = enum.auto()
    SEMI_HARD = enum.auto()


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockSpec:
    """The blocks of a loss; static.

    Attributes:
        sizes: tile and panel sizes.
        block_size: vectors on each side of a tile, instead of `sizes.tile`.
    """

    block_size: int | None = None
    sizes: BlockSizes = CPU

    def by_platform(self, compute: Callable[[Self], T], n: int) -> T:
        """The computation for n vectors, with the block sizes of the platform."""

        def with_cut(sizes: BlockSizes) -> T:
            tile = self.block_size or sizes.tile
            return compute(dataclasses.replace(self, sizes=sizes._replace(tile=tile)))

        return by_platform(with_cut, n)


@dataclasses.dataclass(frozen=True)
class LossSpec(BlockSpec):
    """A loss; static.

    Attributes:
        mining: the triplets.
        metric: a distance between vectors.
        cost: the cost of a triplet.
        fallback: whether a pair without a semi-hard negative takes the farthest.
    """

    mining: Mining
    metric: Metric
    cost: Cost = RELU
    fallback: bool = True


class Gradients(NamedTuple):
    """Gradients of the summed cost.

    Attributes:
        anchors: by the anchors ``[n, d]``.
        references: by the references ``[m, d]``, None if square.
        margin: by the margin.
    """

    anchors: Array
    references: Array | None
    margin: Array

    @classmethod
    def zero(cls, batch: Batch) -> "Gradients":
        references = batch.references
        if references is not None:
            references = batch.zeros(references.shape)
        return cls(batch.zeros(batch.anchors.shape), references, batch.zeros())

    def add(self, start: Index, rows: Array) -> "Gradients":
        """Add to the gradients of a block of anchors."""
        return self._replace(anchors=add_rows(self.anchors, start, rows))

    def add_to_references(self, start: Index, rows: Array) -> "Gradients":
        """Add to the gradients of a block of references."""
        if self.references is None:
            return self.add(start, rows)
        return self._replace(references=add_rows(self.references, start, rows))

    def scatter(self, index: Array, rows: Array) -> "Gradients":
        """Add to the gradients of references in any order."""
        if self.references is None:
            return self._replace(anchors=self.anchors.at[index].add(rows))
        return self._replace(references=self.references.at[index].add(rows))
