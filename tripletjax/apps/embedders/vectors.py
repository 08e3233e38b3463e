"""Vectors of other embedders than runs: checks, and unit norm."""

import sysconfig
import traceback
from pathlib import Path
from typing import Any

import numpy as np

from tripletjax.learn.counts import counted

# The largest number of images that a function or a file gets at a time.
BATCH = 64


def check_vectors(x: Any, n: int, name: str) -> np.ndarray:
    """Vectors as float32, after a check.

    Args:
        x: the result of an embedder.
        n: number of images that it got.
        name: of the embedder, for errors.

    Raises:
        ValueError: if `x` is not ``[n, d]`` or not finite.
    """
    x = np.asarray(x)
    if x.ndim != 2 or len(x) != n or not x.shape[1]:
        raise ValueError(
            f"{name} must return vectors [{n}, d] for {counted(n, 'image')}, got shape "
            f"{x.shape}."
        )
    # The kinds of numbers; extensions such as bfloat16 are of the kind V.
    if x.dtype.kind not in "biufV":
        raise ValueError(f"{name} must return real numbers, got dtype {x.dtype}.")
    x = x.astype(np.float32)
    if not np.isfinite(x).all():
        raise ValueError(f"{name} must return finite vectors, got NaN or infinity.")
    return x


def to_unit_norm(x: np.ndarray) -> np.ndarray:
    """Scale vectors ``[n, d]`` to unit norm; zero stays zero."""
    # By the largest value first, whose square cannot overflow.
    x = x / np.maximum(np.abs(x).max(axis=1, keepdims=True), 1e-30)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-30)


def describe(error: BaseException) -> str:
    """One line about an exception of other code: type, message and place."""
    frames = traceback.extract_tb(error.__traceback__)
    installed = "site-packages", "<frozen", sysconfig.get_path("stdlib")
    own = [x for x in frames if not any(part in x.filename for part in installed)]
    place = ""
    if own and Path(own[-1].filename).parent != Path(__file__).parent:
        place = f" ({Path(own[-1].filename).name}, line {own[-1].lineno})"
    message = " ".join(str(error).split()).rstrip(".")
    return f"{type(error).__name__}{message and f': {message}'}{place}"
