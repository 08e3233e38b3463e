"""What is held out of images, by labels and digests: pure functions of NumPy."""

import itertools
from collections.abc import Sequence

import numpy as np

# Held out of every class, or of the classes, or of the anchors of triplets, for the
# test and for validation.
TEST, VALIDATION = 0.15, 0.1
# The number of classes that tell differences from noise. So many are held out for the
# test and for validation each where at least three quarters are left to train on.
MIN_CLASSES = 16


def held_out_images(
    labels: np.ndarray,
    digests: Sequence[str] | np.ndarray,
    split: str,
    shares: tuple[float, float] = (TEST, VALIDATION),
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Places of images to train on, for validation and for the test."""
    if split == "images":
        train, test, validation = share_out_images(labels, digests, shares)
        return train, validation, test
    # Units are whole classes, and of one class alone nothing can be told.
    members = _members(labels, digests)
    members.sort(key=lambda indices: digests[indices[0]])
    least = MIN_CLASSES if len(members) >= 8 * MIN_CLASSES else 2
    parts = share_out(members, counts_of(len(members), shares, least=least))
    train, test, validation = (np.sort(np.array(part, int)) for part in parts)
    if len(np.unique(labels[train])) < 2:
        raise ValueError(
            f"split is classes, but of {len(members)} classes "
            f"{len(np.unique(labels[np.concatenate([test, validation])]))} are held "
            "out, which leaves fewer than 2 to train on."
        )
    return train, validation, test


def _members(
    labels: np.ndarray, digests: Sequence[str] | np.ndarray
) -> list[list[int]]:
    """The images of each class, in an order that neither names nor files decide."""
    members = [np.flatnonzero(labels == c).tolist() for c in np.unique(labels)]
    return [sorted(indices, key=lambda index: digests[index]) for indices in members]


def share_out_images(
    labels: np.ndarray, digests: Sequence[str] | np.ndarray, shares: Sequence[float]
) -> list[np.ndarray]:
    """Places that are left, then the shares of every class.

    Copies of an image stay together, lest what is held out be trained on. Where a share
    is less than half an image, so many of the classes give one; those of two keep both.
    """
    by_class = []
    for indices in _members(labels, digests):
        copies = itertools.groupby(indices, key=lambda index: digests[index])
        units = [list(same) for _, same in copies]
        counts = counts_of(len(units), shares)
        # Their first digits are in order; the last ones are as good as random.
        luck = int(digests[indices[0]][-8:], 16) / 16**8
        for part, share in enumerate(shares):
            if counts[part] == 0 and len(units) > 2:
                counts[part] = int(0 <= luck < share * len(units))
                luck -= share * len(units)
        by_class.append(share_out(units, counts))
    return [np.sort(np.concatenate(parts).astype(int)) for parts in zip(*by_class)]


def counts_of(n: int, shares: Sequence[float], *, least: int = 0) -> list[int]:
    """The shares of so many, each at least so many."""
    return [max(least, int(share * n + 0.5)) for share in shares]


def share_out(units: Sequence[list[int]], counts: Sequence[int]) -> list[list[int]]:
    """What is left of some units, then so many of them, and so many more."""
    parts, start = [], 0
    for count in counts:
        parts.append(units[start : start + count])
        start += count
    parts.insert(0, units[start:])
    return [[index for unit in part for index in unit] for part in parts]
