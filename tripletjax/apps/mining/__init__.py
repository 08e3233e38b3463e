"""Hard triplets of a whole folder, and images that are likely labelled wrongly."""

from tripletjax.apps.mining.folder import Mining, find_neighbors, mine
from tripletjax.apps.mining.label_errors import LabelErrors, find_label_errors

__all__ = ["LabelErrors", "Mining", "find_label_errors", "find_neighbors", "mine"]
