"""How the programs of the tests are compiled."""

import contextlib
import logging
import os

import jax
import jaxlib
import pytest
from jax.experimental.compilation_cache import compilation_cache

# Versions of XLA with its older code for loops beside the newer: it is compiled in half
# the time. Later ones have no such flag, and end a process that gives it.
_HAS_OLDER = jaxlib.version.__version_info__ < (0, 11)
# Options of one program, for what the older code does wrong.
NEWER_LOOPS = {"xla_cpu_use_fusion_emitters": True} if _HAS_OLDER else {}

# Whether programs are optimised, and where they are kept, in all tests that do not ask
# for others.
_usual: tuple[bool, str | None] = (True, None)


def compile_quickly(directory):
    """Compiles in half the time, and what was compiled before not at all.

    Most of what the tests wait for is the compiler. With TRIPLETJAX_TESTS_OPTIMIZED=1
    all programs are as users have them.
    """
    global _usual
    _usual = bool(os.environ.get("TRIPLETJAX_TESTS_OPTIMIZED")), directory
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XLA_FLAGS", _flags())
        # XLA reads its flags once, here; what tests start does not inherit them.
        jax.jit(lambda: 0)()
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    _compile(*_usual)


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


def quickly(*, exact: bool = False) -> dict[str, str]:
    """The same for other processes, as variables of their environment.

    If `exact`, for those that repeat one another to the last bit, as in `repeatable`.
    """
    optimized, directory = _usual
    optimized |= exact and not _HAS_OLDER
    return {
        "JAX_COMPILATION_CACHE_DIR": str(directory),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
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
