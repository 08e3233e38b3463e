"""Names for images from a gallery, or "unknown"."""

from tripletjax.apps.identification.evaluation import (
    Strangers,
    choose_threshold,
    evaluate,
)
from tripletjax.apps.identification.gallery import Gallery, Identity, identify

__all__ = [
    "Gallery",
    "Identity",
    "Strangers",
    "choose_threshold",
    "evaluate",
    "identify",
]
