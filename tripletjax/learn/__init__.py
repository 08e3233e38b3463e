"""Training an embedding, from images to a run directory.

Needs the extra: ``pip install "tripletjax[train]"``.
"""

from tripletjax.learn import (
    augment,
    checkpoints,
    config,
    data,
    models,
    pictures,
    plots,
    runs,
    sampling,
    stored,
    tasks,
    training,
)
from tripletjax.learn.runs import load_embedder

__all__ = [
    "augment",
    "checkpoints",
    "config",
    "data",
    "load_embedder",
    "models",
    "pictures",
    "plots",
    "runs",
    "sampling",
    "stored",
    "tasks",
    "training",
]
