"""What is to be summed up, and what the sums' gradients are kept in."""

import dataclasses
import enum
from collections.abc import Callable
from typing import NamedTuple, TypeVar

from jax import Array

from tripletjax._pairwise.batch import Batch
from tripletjax._pairwise.cuts import CPU, Cut, by_platform
from tripletjax._pairwise.slices import Index, add_rows
from tripletjax.distances import Metric
from tripletjax.losses import RELU, Cost

T = TypeVar("T")


class Mining(enum.Enum):
    """Which triplets."""

    ALL = enum.auto()
    HARD = enum.auto()
    SEMI_HARD = enum.auto()


@dataclasses.dataclass(frozen=True)
class LossSpec:
    """What to sum up; static.

    Attributes:
        mining: which triplets.
        metric: how far two vectors are apart.
        cost: of a triplet.
        fallback: whether a pair without a semi-hard negative takes the farthest.
        cut: how the work is cut up.
        block_size: how many vectors a tile has a side, if not as the cut says.
    """

    mining: Mining
    metric: Metric
    cost: Cost = RELU
    fallback: bool = True
    block_size: int | None = None
    cut: Cut = CPU

    def by_platform(self, compute: Callable[["LossSpec"], T], n: int) -> T:
        """What is computed of n vectors, with the cut that is best where it runs."""

        def with_cut(cut: Cut) -> T:
            tile = self.block_size or cut.tile
            return compute(dataclasses.replace(self, cut=cut._replace(tile=tile)))

        return by_platform(with_cut, n)


class Gradients(NamedTuple):
    """Of the summed cost: by anchors, by references (None if square), by margin."""

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
        """Adds to the gradients of a block of anchors."""
        return self._replace(anchors=add_rows(self.anchors, start, rows))

    def add_to_references(self, start: Index, rows: Array) -> "Gradients":
        """Adds to those of a block of references."""
        if self.references is None:
            return self.add(start, rows)
        return self._replace(references=add_rows(self.references, start, rows))

    def scatter(self, index: Array, rows: Array) -> "Gradients":
        """Adds to those of references in any order."""
        if self.references is None:
            return self._replace(anchors=self.anchors.at[index].add(rows))
        return self._replace(references=self.references.at[index].add(rows))
