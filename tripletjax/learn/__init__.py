"""Training an embedding, from images to a run directory.

Needs the extra: ``pip install "tripletjax[train]"``.
"""

from tripletjax.learn import (
    augment,
    checkpoints,
    data,
    models,
    plots,
    runs,
    sampling,
    training,
)
from tripletjax.learn.runs import load_embedder

__all__ = [
    "augment",
    "checkpoints",
    "data",
    "load_embedder",
    "models",
    "plots",
    "runs",
    "sampling",
    "training",
]
