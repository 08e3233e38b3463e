"""Groups of near-duplicates: vectors linked by small distances."""

import collections
from collections.abc import Sequence

import numpy as np

# The number of distances in memory at a time.
PAIRS = 2**23


def group_duplicates(
    paths: Sequence[str], x: np.ndarray, within: float
) -> list[list[str]]:
    """Group the paths of vectors that are linked by small distances.

    Returns:
        Sorted paths of groups of at least two, the largest group first.
    """
    members = collections.defaultdict(list)
    for path, number in zip(paths, linked_groups(x, within).tolist()):
        members[number].append(path)
    groups = [sorted(group) for group in members.values() if len(group) > 1]
    return sorted(groups, key=lambda group: (-len(group), group))


def linked_groups(x: np.ndarray, within: float) -> np.ndarray:
    """The number of the group of each vector, linked by distances of at most `within`.

    Args:
        x: vectors ``[n, d]``.
        within: the largest Euclidean distance of a link.

    Returns:
        Integers ``[n]``: the lowest index in the group.
    """
    n, x = len(x), np.asarray(x, np.float64)
    group = np.arange(n)
    squares = np.sum(x * x, axis=1)
    # Products round even equal vectors apart: they choose candidates a little further
    # away, whose distances are then computed by differences.
    limit = within**2 + 1e-10 * np.max(squares, initial=0.0)
    start = 0
    while start < n:
        stop = start + max(1, PAIRS // (n - start))
        # Pairs with earlier vectors are done.
        later = x[start:]
        squared = (-2 * x[start:stop]) @ later.T
        squared += squares[start:]
        squared += squares[start:stop, None]
        close = squared <= limit
        for i in np.flatnonzero(np.count_nonzero(close, axis=1) > 1):
            row = start + i
            others = start + np.flatnonzero(close[i])
            others = others[group[others] != group[row]]
            far = np.linalg.norm(x[others] - x[row], axis=1) > within
            merged = np.unique(group[[row, *others[~far]]])
            if len(merged) > 1:
                group[np.isin(group, merged)] = merged[0]
        start = stop
    return group
