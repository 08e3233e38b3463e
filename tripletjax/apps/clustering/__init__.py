"""Groups of the images of an index by identity, and their metrics."""

from tripletjax.apps.clustering.calibration import GroupThreshold, choose_threshold
from tripletjax.apps.clustering.evaluation import ClusteringMetrics, evaluate, measure
from tripletjax.apps.clustering.groups import Groups, group_images
from tripletjax.apps.clustering.linkage import group_vectors

__all__ = [
    "ClusteringMetrics",
    "GroupThreshold",
    "Groups",
    "choose_threshold",
    "evaluate",
    "group_images",
    "group_vectors",
    "measure",
]
