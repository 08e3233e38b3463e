"""What people do with an embedder: search, verify, identify, serve, export.

Every application takes a run directory, or any function from images to vectors. Needs
extras: ``pip install -e '.[train,search]'`` in a copy of the repository, and ``serve``
or ``export``.
"""

import importlib
import os
from typing import Any

# What LanceDB says of its cells is of no use to who searches.
os.environ.setdefault("LANCEDB_LOG", "error")

__all__ = [
    "calibration",
    "embedders",
    "export",
    "identify",
    "identify_report",
    "images",
    "pairs",
    "rejections",
    "search",
    "search_report",
    "serve",
    "verify",
    "verify_report",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
