"""Metrics of groups against known classes: BCubed F, pairwise F and Rand index."""

import dataclasses
import math
from typing import Any

import numpy as np
from sklearn.metrics import adjusted_rand_score

from tripletjax.apps.verification.intervals import CONFIDENCE, REPLICATES
from tripletjax.learn.reports import percent

# Metrics in percent, in the order of a report.
METRICS = (
    "bcubed_f",
    "bcubed_precision",
    "bcubed_recall",
    "pairwise_f",
    "pairwise_precision",
    "pairwise_recall",
    "adjusted_rand_index",
)


@dataclasses.dataclass(frozen=True)
class ClusteringMetrics:
    """Agreement of groups and classes, as shares.

    Attributes:
        bcubed_precision: mean over images of the share of their group that has their
            class, themselves included.
        bcubed_recall: mean over images of the share of their class that is in their
            group, themselves included.
        pairwise_precision: share of the pairs in one group that are of one class; NaN
            if there is no pair.
        pairwise_recall: share of the pairs of one class that are in one group; NaN if
            there is no pair.
        adjusted_rand_index: of the pairs, 0 for random groups.
    """

    bcubed_precision: float
    bcubed_recall: float
    pairwise_precision: float
    pairwise_recall: float
    adjusted_rand_index: float

    @property
    def bcubed_f(self) -> float:
        """Harmonic mean of the BCubed precision and recall."""
        return _harmonic_mean(self.bcubed_precision, self.bcubed_recall)

    @property
    def pairwise_f(self) -> float:
        """Harmonic mean of the pairwise precision and recall."""
        return _harmonic_mean(self.pairwise_precision, self.pairwise_recall)


def measure(labels: np.ndarray, groups: np.ndarray) -> ClusteringMetrics:
    """Measure how groups agree with classes.

    Args:
        labels: classes of n images, integers ``[n]``.
        groups: numbers of their groups, integers ``[n]``.

    Returns:
        The `ClusteringMetrics`.

    References:
        Amigó, Gonzalo, Artiles, Verdejo. A comparison of extrinsic clustering
        evaluation metrics based on formal constraints. 2009 (BCubed)
        Hubert, Arabie. Comparing partitions. 1985 (adjusted Rand index)
    """
    table = _Table.of(labels, groups)
    metrics = table.measure(np.ones(len(table.class_sizes)))
    index = float(adjusted_rand_score(labels, groups))
    return dataclasses.replace(metrics, adjusted_rand_index=index)


def evaluate(
    labels: np.ndarray, groups: np.ndarray, *, replicates: int = REPLICATES
) -> dict[str, Any]:
    """Report metrics of groups in percent, with intervals over draws of classes.

    A replicate draws classes with replacement, as `tj.verification.bootstrap` does.
    Copies of one class are not compared with each other. A draw has fewer classes in
    each group, so that its precision is too high: the intervals are shifted by the
    difference of the mean replicate and the metric.

    Args:
        labels: classes of n images, integers ``[n]``.
        groups: numbers of their groups, integers ``[n]``.
        replicates: number of replicates.

    Returns:
        The report: numbers of images, classes and groups, each metric, and intervals.
    """
    table, metrics = _Table.of(labels, groups), measure(labels, groups)
    draw, classes = np.random.default_rng(0), len(table.class_sizes)
    drawn = [
        table.measure(
            np.bincount(draw.integers(0, classes, classes), minlength=classes)
        )
        for _ in range(replicates)
    ]
    intervals: dict[str, Any] = {
        "confidence": CONFIDENCE,
        "replicates": replicates,
        "by": "classes, drawn with replacement",
    }
    sides = (1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2
    for name in METRICS:
        values = np.array([getattr(one, name) for one in drawn])
        # Draws of one class are all the same.
        if classes < 2 or np.isnan(values).all():
            intervals[name] = None
            continue
        bias = np.nanmean(values) - getattr(metrics, name)
        ends = np.clip(np.nanquantile(values, sides) - bias, -1, 1)
        intervals[name] = [*map(percent, ends)]
    return {
        "images": len(labels),
        "classes": classes,
        "groups": table.groups,
        **{name: percent(getattr(metrics, name)) for name in METRICS},
        "intervals": intervals,
    }


@dataclasses.dataclass(frozen=True)
class _Table:
    """Numbers of images by class and group, where there are any.

    Attributes:
        classes: class of each entry ``[e]``, from 0.
        members: group of each entry ``[e]``, from 0.
        counts: images of each entry ``[e]``.
        class_sizes: images of each class ``[c]``.
        groups: number of groups.
    """

    classes: np.ndarray
    members: np.ndarray
    counts: np.ndarray
    class_sizes: np.ndarray
    groups: int

    @classmethod
    def of(cls, labels: np.ndarray, groups: np.ndarray) -> "_Table":
        labels, groups = np.asarray(labels), np.asarray(groups)
        if labels.shape != groups.shape or labels.ndim != 1 or not len(labels):
            raise ValueError(
                "labels and groups must be integers [n], got shapes "
                f"{labels.shape} and {groups.shape}."
            )
        _, classes, sizes = np.unique(labels, return_inverse=True, return_counts=True)
        names, members = np.unique(groups, return_inverse=True)
        count = len(names)
        entries, counts = np.unique(
            classes.astype(np.int64) * count + members, return_counts=True
        )
        return cls(entries // count, entries % count, counts, sizes, count)

    def measure(self, weights: np.ndarray) -> ClusteringMetrics:
        """Measure with given numbers of copies of each class ``[c]``."""
        n = self.counts.astype(np.float64)
        copies = weights.astype(np.float64)
        w, sizes = copies[self.classes], self.class_sizes.astype(np.float64)
        weighted = w * n
        in_group = np.bincount(self.members, weighted, minlength=self.groups)
        # Images of other classes in the group of each entry.
        others = in_group[self.members] - weighted
        total = weighted.sum()
        together = np.sum(w * n * (n - 1)) / 2
        confused = np.sum(weighted * others) / 2
        same = np.sum(copies * sizes * (sizes - 1)) / 2
        different = np.sum(copies * sizes * (total - copies * sizes)) / 2
        apart, separated = same - together, different - confused
        ratio = 2 * (together * separated - apart * confused)
        pairs = same * (apart + separated) + (together + confused) * different
        return ClusteringMetrics(
            float(np.sum(weighted * n / (n + others)) / total),
            float(np.sum(weighted * n / sizes[self.classes]) / total),
            _share(together, together + confused),
            _share(together, same),
            float(ratio / pairs) if confused or apart else 1.0,
        )


def _share(part: float, whole: float) -> float:
    return float(part / whole) if whole else math.nan


def _harmonic_mean(precision: float, recall: float) -> float:
    """F; 0 if one of the two has no pair to count, NaN if both have none."""
    if math.isnan(precision) and math.isnan(recall):
        return math.nan
    total = precision + recall
    return 2 * precision * recall / total if total > 0 else 0.0
