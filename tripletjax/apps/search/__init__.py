"""Nearest images of an index, and near-duplicates."""

from tripletjax.apps.search.duplicates import linked_groups
from tripletjax.apps.search.index import Hit, Index
from tripletjax.apps.search.update import Changes

__all__ = ["Changes", "Hit", "Index", "linked_groups"]
