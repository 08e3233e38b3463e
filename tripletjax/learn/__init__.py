"""Training an embedding, from images to a run directory, and using it.

Needs the extra ``train``: ``pip install -e '.[train]'`` in a copy of the repository.
Modules are imported when they are first used: `load_embedder` needs none of what reads
datasets or draws.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tripletjax.learn.config import Config
    from tripletjax.learn.embedder import load_embedder
    from tripletjax.learn.runs import run
    from tripletjax.learn.training import fit
    from tripletjax.learn.weights import load_weights

MODULES = (
    "augment",
    "backbones",
    "cache_folder",
    "checkpoints",
    "choices",
    "class_folders",
    "compile_cache",
    "config",
    "convolution",
    "datasets",
    "defaults",
    "digests",
    "embedder",
    "errors",
    "evaluation",
    "features",
    "folder_listing",
    "image_analysis",
    "image_cache",
    "image_io",
    "lfw",
    "metrics_log",
    "models",
    "objectives",
    "placement",
    "plan",
    "plots",
    "preparation",
    "pretrained",
    "processes",
    "record",
    "runs",
    "sampling",
    "splits",
    "steps",
    "tasks",
    "text_files",
    "training",
    "triplet_files",
    "watchdog",
    "weights",
)
# What is here for short, and where it is.
NAMES = {
    "Config": "config",
    "fit": "training",
    "load_embedder": "embedder",
    "load_weights": "weights",
    "run": "runs",
}

__all__ = [*MODULES, "Config", "fit", "load_embedder", "load_weights", "run"]


def __getattr__(name: str) -> Any:
    if name in MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name in NAMES:
        return getattr(importlib.import_module(f"{__name__}.{NAMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *MODULES, *NAMES})
