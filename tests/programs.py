"""How the programs of the tests are compiled."""

import contextlib
import itertools
import logging
import os
from pathlib import Path

import jax
import jaxlib
import pytest
from jax.experimental.compilation_cache import compilation_cache

# Versions of XLA with its older code for loops beside the newer: it is compiled in half
# the time. Later ones have no such flag, and end a process that gives it.
_HAS_OLDER = jaxlib.version.__version_info__ < (0, 11)
# Options of one program, for what the older code does wrong.
NEWER_LOOPS = {"xla_cpu_use_fusion_emitters": True} if _HAS_OLDER else {}

# Most programs compile in less; reading one back takes a few milliseconds.
KEPT_FROM_SECONDS = 0.05
KEPT_BYTES = 2**30

# Whether programs are optimised, and the folder that keeps them: the defaults of tests.
_usual: tuple[bool, str | None] = (True, None)


def cache_folder() -> str:
    """Folder of the compiled programs of all checkouts, one for each version of JAX.

    `TRIPLETJAX_TESTS_CACHE` names another one: an empty folder makes a cold run.
    """
    if named := os.environ.get("TRIPLETJAX_TESTS_CACHE"):
        return str(Path(named).absolute())
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    version = f"jax-{jax.__version__}-jaxlib-{jaxlib.__version__}"
    return str(Path(caches) / "tripletjax-tests" / version)


def compile_quickly() -> None:
    """Compile in half the time, and keep compiled programs for the next run.

    Most of the tests' time goes to the compiler. `TRIPLETJAX_TESTS_OPTIMIZED=1`
    compiles all programs as users do.
    """
    global _usual
    _usual = bool(os.environ.get("TRIPLETJAX_TESTS_OPTIMIZED")), cache_folder()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XLA_FLAGS", _flags())
        # XLA reads its flags once, here. Processes that tests start do not see them.
        jax.jit(lambda: 0)()
    jax.config.update("jax_persistent_cache_min_compile_time_secs", KEPT_FROM_SECONDS)
    _compile(*_usual)


def remove_old_programs(folder: str, most_bytes: int = KEPT_BYTES) -> None:
    """Remove the programs that were used least recently, beyond a total size.

    JAX's own limit, `jax_compilation_cache_max_size`, looks at every kept file each
    time that it writes one, which takes longer than to compile most programs.
    """
    kept = []
    for file in Path(folder).glob("*"):
        # Another run of the tests may remove it, too.
        with contextlib.suppress(FileNotFoundError):
            kept.append((file, file.stat()))
    kept.sort(key=lambda item: -max(item[1].st_atime, item[1].st_mtime))
    sizes = itertools.accumulate(stat.st_size for _, stat in kept)
    for (file, _), total in zip(kept, sizes):
        if total > most_bytes:
            file.unlink(missing_ok=True)


@contextlib.contextmanager
def repeatable():
    """Programs that repeat one another to the last bit.

    Those of the newer loops do so with all optimisations alone. What was compiled
    before is forgotten then: JAX would go on with it.
    """
    if _usual[0] or _HAS_OLDER:
        yield
        return
    jax.clear_caches()
    _compile(True, None)
    try:
        yield
    finally:
        _compile(*_usual)


def _compile(optimized, directory):
    jax.config.update("jax_disable_most_optimizations", not optimized)
    jax.config.update("jax_compilation_cache_dir", directory)
    compilation_cache.reset_cache()


def _flags() -> str:
    older = _HAS_OLDER and not _usual[0]
    given = os.environ.get("XLA_FLAGS", "")
    return given + " --xla_cpu_use_fusion_emitters=false" * older


def quickly(*, exact: bool = False, killed: bool = False) -> dict[str, str]:
    """The same settings for other processes, as environment variables.

    With `exact`, two processes agree to the last bit, as in `repeatable`. Processes
    that a test kills are `killed`: they read kept programs, and write none, since half
    of a file would stay.
    """
    optimized, folder = _usual
    optimized |= exact and not _HAS_OLDER
    return {
        "JAX_COMPILATION_CACHE_DIR": str(folder),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": (
            "inf" if killed else str(KEPT_FROM_SECONDS)
        ),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": str(int(not optimized)),
        "XLA_FLAGS": _flags(),
    }


@contextlib.contextmanager
def compilations():
    """A list that JAX adds a line to for each function that it compiles.

    A line has the function and the types of its arguments. Programs that a cache on
    disk already has count, too.
    """
    lines = []

    class Listing(logging.Handler):
        def emit(self, record):
            line = record.getMessage()
            if line.startswith("Compiling "):
                lines.append(line.removeprefix("Compiling "))

    logger, listing = logging.getLogger("jax._src.interpreters.pxla"), Listing()
    logger.addHandler(listing)
    try:
        with jax.log_compiles():
            yield lines
    finally:
        logger.removeHandler(listing)
