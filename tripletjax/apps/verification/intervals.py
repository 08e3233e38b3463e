"""Confidence intervals and folds of verification metrics."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.typing import ArrayLike

import tripletjax as tj
from tripletjax.apps.verification.calibration import NEEDED
from tripletjax.apps.verification.pair_distances import PairDistances
from tripletjax.learn import reports

# Bootstrap replicates, and the confidence of their intervals.
REPLICATES, CONFIDENCE = 1000, 0.95
# The largest number of folds, and of same and of different pairs in each.
FOLDS, IN_FOLD = 10, 300


def intervals_of(
    pairs: PairDistances, fars: Sequence[float], replicates: int, progress: bool
) -> dict[str, Any]:
    """Intervals of the metrics over draws of classes, in percent."""
    measured = tuple(f for f in fars if f * len(pairs.different) >= NEEDED)
    drawn = pairs.bootstrap(measured or (1.0,), replicates, progress=progress)

    def interval(values: ArrayLike, scale: float = 100) -> list[float] | None:
        values = np.asarray(values)
        if np.isnan(values).all():
            return None
        sides = (1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2
        return [scale * float(x) for x in np.nanquantile(values, sides)]

    return {
        "confidence": CONFIDENCE,
        "replicates": replicates,
        "by": "classes, drawn with replacement",
        "equal_error_rate": interval(drawn.equal_error_rate),
        "area_under_roc": interval(drawn.area_under_roc),
        "at_far": [
            {
                "far": 100 * far,
                "tar": interval(drawn.tar_at_far[:, i]),
                "threshold": interval(drawn.thresholds[:, i], 1),
            }
            for i, far in enumerate(measured)
        ],
    }


def folds_of(
    pairs: PairDistances, labels: np.ndarray, fold: np.ndarray | None
) -> dict[str, Any] | None:
    """K-fold accuracy in percent; None with fewer than two folds.

    Args:
        pairs: the distances.
        labels: the classes of the images ``[n]``.
        fold: of each pair, same ones first; None for folds of classes.
    """
    if fold is not None:
        by = "folds of the file of pairs"
        distances, same = pairs.listed
        folds = int(fold.max()) + 1
    else:
        by = "folds of classes, with as many same as different pairs"
        distances, same, fold, folds = _folds_of_classes(pairs, labels)
    if folds < 2:
        return None
    result = tj.verification.k_fold_accuracy(distances, same, folds=folds, fold=fold)
    return {
        "folds": folds,
        "by": by,
        "pairs": len(distances),
        "accuracy": reports.percent(result.accuracy),
        "standard_error": reports.percent(result.standard_error),
    }


def _folds_of_classes(
    pairs: PairDistances, labels: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Make folds without a common class, of as many same as different pairs."""
    draw = np.random.default_rng(0)
    several = np.unique(labels[pairs.same_images[:, 0]])
    folds = min(FOLDS, len(several) // 2)
    of_class = np.full(labels.max() + 1, -1)
    if folds >= 2:
        of_class[draw.permutation(several)] = np.arange(len(several)) % folds
    where = of_class[labels]
    distances, same, fold = [], [], []
    for k in range(folds):
        samples = []
        for images, values in (
            (pairs.same_images, pairs.same),
            (pairs.different_images, pairs.different),
        ):
            within = np.flatnonzero((where[images] == k).all(axis=1))
            samples.append(values[draw.permutation(within)[:IN_FOLD]])
        count = min(map(len, samples))
        for is_same, values in zip((True, False), samples):
            distances.append(values[:count])
            same.append(np.full(count, is_same))
            fold.append(np.full(count, k))
    if not distances:
        return np.zeros(0), np.zeros(0, bool), np.zeros(0, int), 0
    return np.concatenate(distances), np.concatenate(same), np.concatenate(fold), folds
