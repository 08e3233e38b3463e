"""Training an embedding, from images to a run directory.

Needs the extra: ``pip install "tripletjax[train]"``.
"""

from tripletjax.learn import augment, data, models, plots, sampling, training
from tripletjax.learn.training import load_embedder

__all__ = [
    "augment",
    "data",
    "load_embedder",
    "models",
    "plots",
    "sampling",
    "training",
]
