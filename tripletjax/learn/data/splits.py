"""Held-out images by labels and digests: pure functions of NumPy."""

import itertools
from collections.abc import Sequence

import numpy as np

# Shares held out for the test and for validation: of the images of every class, of the
# classes, or of the anchors of triplets.
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
    """Indices of the images for training, for validation and for the test."""
    if split == "images":
        train, test, validation = share_out_images(labels, digests, shares)
        return train, validation, test
    # Units are whole classes; a part of one class cannot be evaluated.
    members = _members(labels, digests)
    members.sort(key=lambda indices: digests[indices[0]])
    least = MIN_CLASSES if len(members) >= 8 * MIN_CLASSES else 2
    parts = share_out(members, counts_of(len(members), shares, least=least))
    train, test, validation = (np.sort(np.array(part, int)) for part in parts)
    if len(np.unique(labels[train])) < 2:
        raise ValueError(
            "split classes must leave at least 2 classes to train on, got "
            f"{len(np.unique(labels[train]))} of {len(members)}; give more classes, or "
            "split images."
        )
    return train, validation, test


def _members(
    labels: np.ndarray, digests: Sequence[str] | np.ndarray
) -> list[list[int]]:
    """The images of each class in the order of digests, not of names."""
    members = [np.flatnonzero(labels == c).tolist() for c in np.unique(labels)]
    return [sorted(indices, key=lambda index: digests[index]) for indices in members]


def share_out_images(
    labels: np.ndarray, digests: Sequence[str] | np.ndarray, shares: Sequence[float]
) -> list[np.ndarray]:
    """Indices of the rest, then of the shares of every class.

    Copies of an image stay together, so that no held-out image is trained on. If a
    share is less than half an image, that share of the classes gives one image.
    Classes of two images keep both.
    """
    by_class = []
    for indices in _members(labels, digests):
        copies = itertools.groupby(indices, key=lambda index: digests[index])
        units = [list(same) for _, same in copies]
        counts = counts_of(len(units), shares)
        # First digits are sorted; the last ones are pseudo-random.
        draw = int(digests[indices[0]][-8:], 16) / 16**8
        for part, share in enumerate(shares):
            if counts[part] == 0 and len(units) > 2:
                counts[part] = int(0 <= draw < share * len(units))
                draw -= share * len(units)
        by_class.append(share_out(units, counts))
    return [np.sort(np.concatenate(parts).astype(int)) for parts in zip(*by_class)]


def counts_of(n: int, shares: Sequence[float], *, least: int = 0) -> list[int]:
    """Shares of n as counts of at least `least`."""
    return [max(least, int(share * n + 0.5)) for share in shares]


def share_out(units: Sequence[list[int]], counts: Sequence[int]) -> list[list[int]]:
    """Split units into the rest, then parts of these counts."""
    parts, start = [], 0
    for count in counts:
        parts.append(units[start : start + count])
        start += count
    parts.insert(0, units[start:])
    return [[index for unit in part for index in unit] for part in parts]
