"""Same or different: the decision about one pair."""

import dataclasses

import numpy as np
from PIL import Image

from tripletjax.apps.embedders import vectors_of
from tripletjax.apps.verification.calibration import (
    Calibration,
)
from tripletjax.learn.embedder import ImageEmbedder


@dataclasses.dataclass(frozen=True)
class Decision:
    """Whether two images are of the same class.

    Attributes:
        same: whether they are taken for the same.
        distance: how far they are apart.
        threshold: at most which distance that is.
        probability: that they are, where as many pairs are the same as are not.
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
    """Whether two images are of the same class, by a threshold of one's own."""
    x = vectors_of(embedder, [first, second]).astype(np.float64)
    distance = float(np.linalg.norm(x[0] - x[1]))
    return Decision(
        distance <= calibration.threshold,
        distance,
        calibration.threshold,
        float(calibration.probability(distance)),
    )
