"""Nearest images of an index, and near-duplicates."""

from tripletjax.apps.search.index import Changes, Hit, Index, linked_groups

__all__ = ["Changes", "Hit", "Index", "linked_groups"]
