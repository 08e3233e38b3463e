"""Compiled programs of the commands, kept in the user's cache folder.

The compiler takes most of the time of a short command. JAX keeps what it has compiled,
and the next command reads it.
"""

import hashlib
import importlib.util
import os
import platform
import time
import warnings
from pathlib import Path
from typing import Any

import jax

# Another folder, or "off".
VARIABLE = "TRIPLETJAX_COMPILE_CACHE"
# The largest size of the folder in bytes: programs that were used last stay.
MAX_SIZE = 2**30
# Programs that are compiled in less time, in seconds, are not kept.
MIN_TIME = 0.2
# The two files of a program, and the age in seconds of one that is not being written.
PROGRAM, USED, SETTLED = "-cache", "-atime", 60


def keep_programs() -> Path | None:
    """Keep compiled programs for the next process.

    They are in ``tripletjax`` of ``$XDG_CACHE_HOME`` or ``~/.cache``, or in the folder
    that the environment variable ``TRIPLETJAX_COMPILE_CACHE`` names; "off" keeps none.
    Settings of JAX's own cache (``JAX_COMPILATION_CACHE_DIR``) come first.

    Returns:
        The folder; None if JAX has its own settings, or the folder cannot be written.
    """
    setting = os.environ.get(VARIABLE, "")
    config: Any = jax.config
    own = config.jax_compilation_cache_dir is not None
    # JAX bounds the size of a cache by means of filelock.
    possible = importlib.util.find_spec("filelock") is not None
    if own or not possible or setting.lower() in ("off", "0"):
        return None
    try:
        root = Path(setting).expanduser() if setting else _cache_home() / "tripletjax"
        folder = root / f"programs-{_processor()}"
        folder.mkdir(parents=True, exist_ok=True)
        _remove_torn(folder)
    except (OSError, RuntimeError):
        # Such as a home that does not exist.
        return None
    if not os.access(folder, os.W_OK):
        return None
    # A program that cannot be read is compiled again.
    warnings.filterwarnings(
        "ignore", message="Error (reading|writing) persistent compilation cache"
    )
    jax.config.update("jax_compilation_cache_max_size", MAX_SIZE)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_TIME)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    return folder


def _cache_home() -> Path:
    named = os.environ.get("XDG_CACHE_HOME", "")
    return Path(named) if os.path.isabs(named) else Path.home() / ".cache"


def _processor() -> str:
    """A digest of what the processor can do.

    A home may be on machines with different processors, and programs use all that one
    can do.
    """
    lines = [platform.machine(), platform.processor()]
    try:
        known = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        known = []
    names = "flags", "Features", "model name"
    lines += sorted({line for line in known if line.startswith(names)})
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:12]


def _remove_torn(folder: Path) -> None:
    """Remove programs that a killed process has left half written."""
    for program in folder.glob(f"*{PROGRAM}"):
        used = program.with_name(program.name.removesuffix(PROGRAM) + USED)
        if not used.exists() and time.time() - program.stat().st_mtime > SETTLED:
            program.unlink(missing_ok=True)
