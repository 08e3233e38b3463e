"""Nearest images of an index, and near-duplicates."""

from tripletjax.apps.search.index import (
    DUPLICATE_DISTANCE,
    Changes,
    Hit,
    Index,
    linked_groups,
)

__all__ = ["DUPLICATE_DISTANCE", "Changes", "Hit", "Index", "linked_groups"]
