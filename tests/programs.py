"""How the programs of the tests are compiled."""

import contextlib
import os

import jax
from jax.experimental.compilation_cache import compilation_cache


def compile_quickly(directory):
    """Compiles in half the time, and what was compiled before not at all.

    Most of what the tests wait for is the compiler. With TRIPLETJAX_TESTS_OPTIMIZED=1
    all programs are as users have them.
    """
    if not os.environ.get("TRIPLETJAX_TESTS_OPTIMIZED"):
        jax.config.update("jax_disable_most_optimizations", True)
    jax.config.update("jax_compilation_cache_dir", directory)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


@contextlib.contextmanager
def as_users_compile():
    """Programs that repeat one another to the last bit, which quick ones need not."""
    quick = jax.config.jax_disable_most_optimizations
    directory = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_disable_most_optimizations", False)
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", quick)
        jax.config.update("jax_compilation_cache_dir", directory)
        compilation_cache.reset_cache()
