"""Distances of pairs of images, and the classes of each pair."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
from tqdm import tqdm

import tripletjax as tj
from tripletjax.verification import VerificationMetrics

# The largest number of same, and of different, pairs that are listed. Of more pairs, a
# random sample is listed.
MOST = 2**20
# Pairs that are measured at a time, and replicates that are drawn at a time.
BLOCK, AT_A_TIME = 2**16, 100


@dataclasses.dataclass(frozen=True)
class PairDistances:
    """Pairs of images of the same and of different classes.

    Attributes:
        same: float32 distances ``[p]`` of pairs of the same class.
        same_images: the numbers of their images ``[p, 2]``.
        different: float32 distances ``[q]`` of pairs of different classes.
        different_images: the numbers of their images ``[q, 2]``.
        labels: integers ``[n]``, the classes of the images.
        all_same: number of pairs of the same class, of which `same` may be a sample.
        all_different: number of pairs of different classes.
        vectors: of the images ``[n, d]``, for all pairs; None for given pairs.
    """

    same: np.ndarray
    same_images: np.ndarray
    different: np.ndarray
    different_images: np.ndarray
    labels: np.ndarray
    all_same: int
    all_different: int
    vectors: np.ndarray | None

    @classmethod
    def of_all(cls, x: np.ndarray, labels: np.ndarray) -> "PairDistances":
        """Measure all pairs of vectors ``[n, d]``."""
        draw, n = np.random.default_rng(0), len(labels)
        counts = np.unique(labels, return_counts=True)[1].astype(int)
        all_same = int((counts * (counts - 1) // 2).sum())
        all_different = n * (n - 1) // 2 - all_same
        if n * (n - 1) // 2 <= 2 * MOST:
            first, second = np.triu_indices(n, 1)
            alike = labels[first] == labels[second]
            both = np.stack([first, second], axis=1)
            same, different = both[alike], both[~alike]
        else:
            order = np.argsort(labels, kind="stable")
            members = np.split(order, np.cumsum(counts)[:-1])
            same = [_pairs_within(some, all_same, draw) for some in members]
            same = np.concatenate(same)
            different = np.zeros((0, 2), int)
            while len(different) < MOST:
                drawn = np.sort(draw.integers(0, n, (2 * MOST, 2)), axis=1)
                drawn = drawn[labels[drawn[:, 0]] != labels[drawn[:, 1]]]
                different = np.unique(np.concatenate([different, drawn]), axis=0)
        same, different = (_some(pairs, draw) for pairs in (same, different))
        return cls(
            distances_of(x, same),
            same,
            distances_of(x, different),
            different,
            labels,
            all_same,
            all_different,
            x,
        )

    @classmethod
    def of_given(
        cls, x: np.ndarray, labels: np.ndarray, pairs: np.ndarray, same: np.ndarray
    ) -> "PairDistances":
        """Measure given pairs ``[n, 2]``, some of the same class."""
        alike, others = pairs[same], pairs[~same]
        return cls(
            distances_of(x, alike),
            alike,
            distances_of(x, others),
            others,
            labels,
            len(alike),
            len(others),
            None,
        )

    @property
    def listed(self) -> tuple[np.ndarray, np.ndarray]:
        """Distances of the listed pairs, and whether each is of the same class."""
        distances = np.concatenate([self.same, self.different])
        return distances, np.arange(len(distances)) < len(self.same)

    def evaluate(self, fars: Sequence[float]) -> VerificationMetrics:
        """Verification metrics of all pairs, exact."""
        if self.vectors is not None:
            return tj.verification.evaluate(self.vectors, self.labels, fars=fars)
        return tj.verification.evaluate_pairs(*self.listed, fars=fars)

    def bootstrap(
        self, fars: Sequence[float], replicates: int, *, progress: bool = False
    ) -> VerificationMetrics:
        """Bootstrap replicates of the listed pairs, by class."""
        names, identities = np.unique(self.labels, return_inverse=True)
        keys = jax.random.split(jax.random.key(0), -(-replicates // AT_A_TIME))
        drawn = []
        for key in tqdm(keys, desc="intervals", disable=not progress):
            drawn.append(
                tj.verification.bootstrap(
                    key,
                    self.same,
                    identities[self.same_images[:, 0]],
                    self.different,
                    identities[self.different_images],
                    fars=fars,
                    replicates=AT_A_TIME,
                    size=len(names),
                )
            )
        return jax.tree.map(lambda *x: np.concatenate(x)[:replicates], *drawn)


def distances_of(x: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Euclidean distances of pairs ``[p, 2]`` of vectors, by differences."""
    parts = [
        np.linalg.norm(x[pairs[i : i + BLOCK, 0]] - x[pairs[i : i + BLOCK, 1]], axis=1)
        for i in range(0, len(pairs), BLOCK)
    ]
    return np.concatenate([np.zeros(0, np.float32), *parts]).astype(np.float32)


def _pairs_within(
    members: np.ndarray, of: int, draw: np.random.Generator
) -> np.ndarray:
    """Pairs of one class, or a random sample in proportion to a large class."""
    n = len(members)
    count = n * (n - 1) // 2
    wanted = count if of <= MOST else -(-MOST * count // of)
    if 2 * wanted > count:
        one, other = np.triu_indices(n, 1)
        some = np.sort(draw.permutation(count)[:wanted])
        both = np.stack([members[one[some]], members[other[some]]], axis=1)
        return np.sort(both, axis=1)
    pairs = np.zeros((0, 2), int)
    while len(pairs) < wanted:
        drawn = np.sort(draw.choice(members, (wanted, 2)), axis=1)
        drawn = drawn[drawn[:, 0] != drawn[:, 1]]
        pairs = np.unique(np.concatenate([pairs, drawn]), axis=0)
    return pairs[np.sort(draw.permutation(len(pairs))[:wanted])]


def _some(pairs: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    if len(pairs) <= MOST:
        return pairs
    return pairs[np.sort(draw.permutation(len(pairs))[:MOST])]
