"""Same or different: the decision about one pair."""

import dataclasses

import numpy as np
from PIL import Image

from tripletjax.apps.embedders import vectors_of
from tripletjax.apps.verification.calibration import Calibration
from tripletjax.learn.embedder import ImageEmbedder


@dataclasses.dataclass(frozen=True)
class Decision:
    """Whether two images are of the same class.

    Attributes:
        same: whether the distance is at most the threshold.
        distance: of their vectors.
        threshold: of the calibration.
        probability: that they are of the same class, at equal priors.
    """

    same: bool
    distance: float
    threshold: float
    probability: float


def decide(
    embedder: ImageEmbedder,
    first: Image.Image,
    second: Image.Image,
    calibration: Calibration,
) -> Decision:
    """Decide whether two images are of the same class, by a calibrated threshold."""
    x = vectors_of(embedder, [first, second]).astype(np.float64)
    distance = float(np.linalg.norm(x[0] - x[1]))
    return Decision(
        distance <= calibration.threshold,
        distance,
        calibration.threshold,
        float(calibration.probability(distance)),
    )
