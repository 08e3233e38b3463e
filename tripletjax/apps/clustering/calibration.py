"""The threshold of groups, chosen on images of unseen classes.

A threshold for pairs is none for groups. The share of false pairs in a group grows with
the number of images, and a mean over pairs differs from the distance of one pair.
"""

from typing import NamedTuple

import numpy as np
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import pdist

from tripletjax.apps.clustering.evaluation import measure
from tripletjax.apps.verification.calibration import Calibration

# The largest number of thresholds that are compared.
THRESHOLDS = 200


class GroupThreshold(NamedTuple):
    """A threshold of groups.

    Attributes:
        threshold: largest distance of two groups that merge.
        bcubed_f: BCubed F of the groups of the images that it was chosen on.
        images: number of these images.
    """

    threshold: float
    bcubed_f: float
    images: int


def choose_threshold(calibration: Calibration) -> GroupThreshold:
    """Choose the threshold of best BCubed F on the images of a calibration.

    Args:
        calibration: of `tripletjax verify`, which keeps vectors of unseen classes.

    Returns:
        The `GroupThreshold`, the smallest of equally good ones.
    """
    x = np.asarray(calibration.vectors, np.float64)
    _, labels = np.unique(calibration.names, return_inverse=True)
    tree = linkage(pdist(x, "sqeuclidean"), "average")
    # Between each height and the next; heights of average linkage ascend.
    heights = np.concatenate([[0.0], tree[:, 2], [tree[-1, 2]]])
    cuts = np.unique((heights[1:] + heights[:-1]) / 2)
    rows = np.linspace(0, len(cuts) - 1, min(len(cuts), THRESHOLDS)).astype(int)
    scores = [
        measure(labels, fcluster(tree, cut, "distance")).bcubed_f for cut in cuts[rows]
    ]
    best = int(np.argmax(scores))
    threshold = float(np.sqrt(cuts[rows][best]))
    return GroupThreshold(threshold, scores[best], len(x))
