"""Training an embedding, from images to a run directory, and using it.

Needs the extra ``train``: ``pip install -e '.[train]'`` in a copy of the repository.
Names are imported when they are first used: `load_embedder` needs no module that reads
datasets or draws.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tripletjax.learn.embedder import load_embedder
    from tripletjax.learn.networks.embedding import embed_images
    from tripletjax.learn.networks.functions import as_model
    from tripletjax.learn.networks.weights import load_weights
    from tripletjax.learn.runs.config import Config
    from tripletjax.learn.runs.train import run
    from tripletjax.learn.training.loop import fit

ROOMS = ("data", "distributed", "networks", "runs", "training")
# Public names, and the module of each.
NAMES = {
    "Config": "runs.config",
    "as_model": "networks.functions",
    "embed_images": "networks.embedding",
    "fit": "training.loop",
    "load_embedder": "embedder",
    "load_weights": "networks.weights",
    "run": "runs.train",
}

__all__ = [
    *ROOMS,
    "Config",
    "as_model",
    "embed_images",
    "fit",
    "load_embedder",
    "load_weights",
    "run",
]


def __getattr__(name: str) -> Any:
    if name in ROOMS:
        return importlib.import_module(f"{__name__}.{name}")
    if name in NAMES:
        return getattr(importlib.import_module(f"{__name__}.{NAMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *ROOMS, *NAMES})
