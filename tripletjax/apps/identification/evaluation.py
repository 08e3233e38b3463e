"""Open-set identification metrics of a gallery."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

import tripletjax as tj
from tripletjax.apps.identification.gallery import COPY, Gallery
from tripletjax.apps.verification.calibration import (
    NEEDED,
    Calibration,
    TooFewPairsError,
)
from tripletjax.learn.reports import number, percent

RANKS, FPIRS = (1, 5), (0.1, 0.01, 0.001)


@dataclasses.dataclass(frozen=True)
class Strangers:
    """Calibration images of classes outside a gallery, and their distances to it.

    Attributes:
        distances: distance of each image to its nearest class, ascending.
        left_out: number of calibration images of a class of the gallery, or copies of
            its images.
    """

    distances: np.ndarray
    left_out: int

    @classmethod
    def of(cls, gallery: Gallery, calibration: Calibration) -> "Strangers":
        """Compare the images of a calibration with a gallery."""
        x = calibration.vectors[~np.isin(calibration.names, gallery.names)]
        if len(x):
            x = x[~_are_copies(gallery, x)]
        distances = gallery.nearest(x, 1)[0][:, 0] if len(x) else np.zeros(0)
        left_out = len(calibration.vectors) - len(x)
        return cls(np.sort(distances), left_out)

    def count_named(self, threshold: float) -> int:
        """Number of images within the threshold: the false positives."""
        return int((self.distances <= threshold).sum())

    def threshold_at(self, fpir: float) -> float:
        """The largest threshold with at most this false positive rate (FPIR).

        Args:
            fpir: rate between 0 and 1.

        Raises:
            TooFewPairsError: if there are too few images to measure the rate.
            ValueError: if `fpir` is not between 0 and 1.
        """
        if not 0 < fpir < 1:
            raise ValueError(f"fpir must be between 0 and 1, got {fpir}.")
        n = len(self.distances)
        if n * fpir < NEEDED - 1e-6:
            raise TooFewPairsError(
                f"fpir {fpir:g} requires {-(-NEEDED // fpir):,.0f} calibration images "
                f"of classes outside the gallery, got {n:,}; calibrate on more "
                "images with tripletjax verify."
            )
        count = int(n * fpir + 1e-6)
        last, following = self.distances[[count - 1, count]]
        if last == following:
            below = self.distances[self.distances < following]
            return float(below[-1]) if len(below) else -1.0
        return float((last + following) / 2)


def choose_threshold(
    gallery: Gallery,
    calibration: Calibration | None,
    *,
    within: float | None = None,
    fpir: float | None = None,
    closed: bool = False,
) -> tuple[float, Strangers | None]:
    """Choose the threshold of a gallery.

    Args:
        gallery: known classes.
        calibration: of the run; its threshold is the default.
        within: a threshold to use instead.
        fpir: false positive identification rate to choose a threshold at instead.
        closed: whether every probe gets a name: the threshold is infinite.

    Returns:
        The threshold, and the images that show its false positives, or None without a
        calibration.

    Raises:
        TooFewPairsError: if the calibration has too few images to show the rate.
        ValueError: if `calibration` is None without `within` or `closed`, or `fpir` is
            not between 0 and 1.
    """
    threshold = float("inf") if closed else within
    if calibration is None:
        if threshold is None:
            raise ValueError("calibration must not be None without within or closed.")
        return threshold, None
    strangers = Strangers.of(gallery, calibration)
    if fpir is not None:
        threshold = strangers.threshold_at(fpir)
    elif threshold is None:
        threshold = calibration.threshold
    return threshold, strangers


def evaluate(
    gallery: Gallery, x: np.ndarray, names: Sequence[str], threshold: float
) -> dict[str, Any]:
    """Measure open-set identification of probes with class names, in percent.

    At a threshold, FPIR is the share of unknown probes that get a name. FNIR is the
    share of known probes that get no name or a wrong one.

    Args:
        gallery: known classes.
        x: vectors of the probes ``[n, d]``.
        names: class names of the probes; names outside the gallery are unknown.
        threshold: distance at which to report FPIR and FNIR, too.

    Returns:
        The counts of probes, the identification rate at each rank, FNIR at each FPIR,
        and both rates at the threshold.
    """
    references, reference_labels = gallery.references
    label_of = {name: label for label, name in enumerate(gallery.names)}
    labels = np.array([label_of.get(name, -1) for name in names])
    known = labels >= 0
    unknown_count = int((~known).sum())
    fpirs = tuple(fpir for fpir in FPIRS if fpir * unknown_count >= 1)
    metrics = tj.retrieval.evaluate_identification(
        x,
        labels,
        references=references,
        reference_labels=reference_labels,
        ranks=RANKS,
        fpirs=fpirs or (1.0,),
    )
    distances, nearest = gallery.nearest(x, 1)
    named = distances[:, 0] <= threshold
    correct = named & (nearest[:, 0] == labels)

    def mean(mask: np.ndarray, where: np.ndarray) -> float:
        return float(mask[where].mean()) if where.any() else np.nan

    return {
        "probes": len(labels),
        "known": int(known.sum()),
        "unknown": unknown_count,
        "copies": int(_are_copies(gallery, x).sum()),
        "classes": len(gallery.names),
        "rate_at_rank": {
            str(rank): percent(rate) for rank, rate in zip(RANKS, metrics.rate_at_rank)
        },
        "at_fpir": [
            {
                "fpir": 100 * fpir,
                "fnir": percent(fnir),
                "threshold": number(at_threshold),
            }
            for fpir, fnir, at_threshold in zip(
                fpirs, metrics.fnir_at_fpir, metrics.thresholds
            )
        ],
        "at_threshold": {
            "threshold": number(threshold),
            "fpir": percent(mean(named, ~known)),
            "fnir": percent(mean(~correct, known)),
        },
    }


def _are_copies(gallery: Gallery, x: np.ndarray) -> np.ndarray:
    """Whether vectors ``[n, d]`` are those of images of the gallery."""
    by_image = dataclasses.replace(gallery, means=False)
    return by_image.nearest(x, 1)[0][:, 0] <= COPY
