"""Applications of an embedder: search, verify, identify, cluster, mine, serve, export.

Every application takes a run directory, or any function from images to vectors. The
extras ``train`` and ``search`` are required, and ``serve`` or ``export`` for these:
``pip install -e '.[train,search]'`` in a copy of the repository.
"""

import importlib
import os
from typing import Any

# Silence LanceDB's log of index partitions.
os.environ.setdefault("LANCEDB_LOG", "error")

__all__ = [
    "clustering",
    "embedders",
    "export",
    "identification",
    "images",
    "mining",
    "search",
    "serve",
    "verification",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
