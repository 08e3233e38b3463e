"""Groups of classes in folders of folders: classes of one folder are more alike."""

import os
from collections.abc import Sequence

import numpy as np


def levels_of(names: Sequence[str]) -> np.ndarray:
    """Group classes by the folders that they share, from the finest groups.

    Args:
        names: paths of the classes, such as ``Greek/character01``.

    Returns:
        Integers ``[levels, classes]``: classes with the same number share the folders
        of that level. Levels with one group, or one group per class, are left out.
    """
    paths = [name.split(os.sep) for name in names]
    levels: list[np.ndarray] = []
    for depth in range(max(map(len, paths), default=0) - 1, 0, -1):
        # A shorter path stands for its own folder.
        above = [os.sep.join(path[:depth]) for path in paths]
        groups = np.unique(above, return_inverse=True)[1].reshape(-1)
        finer = levels[-1] if levels else np.arange(len(names))
        if 0 < groups.max(initial=0) < finer.max(initial=0):
            levels.append(groups)
    return np.array(levels, np.int32).reshape(len(levels), len(names))


def with_turns(levels: np.ndarray, turns: int) -> np.ndarray:
    """Repeat levels for turned copies of every class, with groups of their own."""
    each = [
        levels + turn * (levels.max(axis=1, keepdims=True) + 1) for turn in range(turns)
    ]
    return np.concatenate(each, axis=1)
