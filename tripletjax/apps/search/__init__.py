"""Nearest images of an index, and near-duplicates."""

from tripletjax.apps.search.duplicates import linked_groups
from tripletjax.apps.search.index import DUPLICATE_DISTANCE, Hit, Index
from tripletjax.apps.search.update import Changes

__all__ = ["DUPLICATE_DISTANCE", "Changes", "Hit", "Index", "linked_groups"]
