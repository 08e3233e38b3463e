"""Open-set identification metrics of a gallery."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

import tripletjax as tj
from tripletjax.apps.identification.gallery import (
    COPY,
    Gallery,
)
from tripletjax.apps.verification.calibration import (
    NEEDED,
    Calibration,
    TooFewPairsError,
)
from tripletjax.learn.reports import number, percent

RANKS, FPIRS = (1, 5), (0.1, 0.01, 0.001)


@dataclasses.dataclass(frozen=True)
class Strangers:
    """How near images of a calibration come to a gallery that they are not in.

    Attributes:
        distances: of each to the nearest class, sorted.
        left_out: how many are of classes of the gallery, by name, or copies.
    """

    distances: np.ndarray
    left_out: int

    @classmethod
    def of(cls, gallery: Gallery, calibration: Calibration) -> "Strangers":
        other = ~np.isin(calibration.names, gallery.names)
        near = dataclasses.replace(gallery, means=False)
        x = calibration.vectors[other]
        copies = np.zeros(len(x), bool)
        if len(x):
            copies = near.nearest(x, 1)[0][:, 0] <= COPY
        x = x[~copies]
        distances = gallery.nearest(x, 1)[0][:, 0] if len(x) else np.zeros(0)
        left_out = len(calibration.vectors) - len(x)
        return cls(np.sort(distances), left_out)

    def named(self, threshold: float) -> int:
        """How many would be given a name."""
        return int((self.distances <= threshold).sum())

    def threshold_at(self, fpir: float) -> float:
        """The largest threshold at which not more than this share gets a name.

        Raises:
            TooFewPairsError: if they are too few to show it.
            ValueError: if it is no share.
        """
        if not 0 < fpir < 1:
            raise ValueError(f"fpir must be a share between 0 and 1, got {fpir}.")
        n = len(self.distances)
        if n * fpir < NEEDED - 1e-6:
            raise TooFewPairsError(
                f"a false positive identification rate of {fpir:g} is not shown by "
                f"{n:,} images of others: {-(-NEEDED // fpir):,.0f} are needed. Choose "
                "the threshold of the run on more images, with tripletjax verify"
            )
        last, following = self.distances[
            [int(n * fpir + 1e-6) - 1, int(n * fpir + 1e-6)]
        ]
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
    """The threshold of a gallery, and the images that show its false positives.

    Args:
        gallery: known classes.
        calibration: of the run; its threshold is the default.
        within: a threshold to use instead.
        fpir: false positive identification rate to choose a threshold at instead.
        closed: whether every probe gets a name: the threshold is infinite.

    Raises:
        TooFewPairsError: if the calibration has too few images to show the rate.
        ValueError: if the calibration is needed and None, or the rate is no share.
    """
    threshold = float("inf") if closed else within
    if calibration is None:
        if threshold is None:
            raise ValueError("calibration is None; give within or closed.")
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
    """Measures identification on probes whose classes are known, in percent.

    Args:
        gallery: who is known.
        x: vectors of the probes ``[n, d]``.
        names: of their classes; those that the gallery does not have are unknown.
        threshold: at which to report rates, too.
    """
    references, reference_labels = gallery.references
    numbers = {name: number for number, name in enumerate(gallery.names)}
    labels = np.array([numbers.get(name, -1) for name in names])
    unknown = int((labels < 0).sum())
    fpirs = tuple(fpir for fpir in FPIRS if fpir * unknown >= 1)
    metrics = tj.retrieval.evaluate_identification(
        x,
        labels,
        references=references,
        reference_labels=reference_labels,
        ranks=RANKS,
        fpirs=fpirs or (1.0,),
    )
    near = dataclasses.replace(gallery, means=False).nearest(x, 1)[0][:, 0]
    distances, nearest = gallery.nearest(x, 1)
    named = distances[:, 0] <= threshold
    right = named & (nearest[:, 0] == labels)
    known = labels >= 0

    def mean(of: np.ndarray, where: np.ndarray) -> float:
        return float(of[where].mean()) if where.any() else np.nan

    return {
        "probes": len(labels),
        "known": int(known.sum()),
        "unknown": unknown,
        "copies": int((near <= COPY).sum()),
        "classes": len(gallery.names),
        "rate_at_rank": {
            str(rank): percent(rate) for rank, rate in zip(RANKS, metrics.rate_at_rank)
        },
        "at_fpir": [
            {
                "fpir": 100 * fpir,
                "fnir": percent(fnir),
                "threshold": number(at),
            }
            for fpir, fnir, at in zip(fpirs, metrics.fnir_at_fpir, metrics.thresholds)
        ],
        "at_threshold": {
            "threshold": number(threshold),
            "fpir": percent(mean(named, ~known)),
            "fnir": percent(mean(~right, known)),
        },
    }
