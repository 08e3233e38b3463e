"""Groups of the images of an index."""

import collections
import dataclasses
from collections.abc import Sequence

import numpy as np

from tripletjax.apps.clustering.linkage import group_vectors
from tripletjax.apps.search.index import Index


@dataclasses.dataclass(frozen=True)
class Groups:
    """Groups of images, the largest first, and equally large ones by their first path.

    Attributes:
        paths: of all images within the folder of the index, in order.
        numbers: group of each image ``[n]``, from 0.
        members: rows of the images of each group, the nearest to their mean first.
        threshold: largest distance of two groups that merged.
    """

    paths: tuple[str, ...]
    numbers: np.ndarray
    members: tuple[np.ndarray, ...]
    threshold: float

    def __len__(self) -> int:
        return len(self.members)

    @property
    def sizes(self) -> list[int]:
        """Number of images of each group."""
        return [*map(len, self.members)]

    @property
    def several(self) -> int:
        """Number of groups of at least two images, which come first."""
        return sum(size > 1 for size in self.sizes)

    def numbers_of(self, paths: Sequence[str]) -> np.ndarray:
        """The group of each of some images ``[n]``."""
        row_of = {path: row for row, path in enumerate(self.paths)}
        return self.numbers[[row_of[path] for path in paths]]

    def paths_of(self, number: int) -> list[str]:
        """Paths of the images of a group, the nearest to their mean first."""
        return [self.paths[row] for row in self.members[number]]


def group_images(index: Index, threshold: float, *, progress: bool = False) -> Groups:
    """Group the images of an index by average linkage.

    Args:
        index: up to date.
        threshold: largest distance of two groups that merge, as in `group_vectors`.
        progress: whether to show a progress bar.

    Raises:
        ValueError: if the index has fewer than two images, or the threshold is
            negative.
    """
    paths, x = index.vectors()
    if len(paths) < 2:
        raise ValueError(
            f"{index.folder} must have at least 2 readable images to group, got "
            f"{len(paths)}."
        )
    return make_groups(
        paths, x, group_vectors(x, threshold, progress=progress), threshold
    )


def make_groups(
    paths: Sequence[str], x: np.ndarray, roots: np.ndarray, threshold: float
) -> Groups:
    """Number and order the groups of images.

    Args:
        paths: of n images.
        x: vectors of the images ``[n, d]``.
        roots: group of each image ``[n]``, named by the lowest row in the group.
        threshold: largest distance of two groups that merged.
    """
    rows = collections.defaultdict(list)
    for row, root in enumerate(roots.tolist()):
        rows[root].append(row)
    numbers, members = np.empty(len(paths), int), []
    # Sorting keeps groups of one size in the order of their first paths.
    for number, some in enumerate(sorted(rows.values(), key=len, reverse=True)):
        numbers[some] = number
        far = np.linalg.norm(x[some] - x[some].mean(axis=0), axis=1)
        members.append(np.array(some)[np.argsort(far, kind="stable")])
    return Groups(tuple(paths), numbers, tuple(members), threshold)
