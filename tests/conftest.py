"""Eight devices on the CPU, so that meshes can be tested anywhere."""

import gc
from pathlib import Path

import jax
import pytest
from hypothesis import settings
from jax.experimental.compilation_cache import compilation_cache

# Must come before anything asks JAX for its devices.
jax.config.update("jax_num_cpu_devices", 8)

settings.register_profile("tripletjax", deadline=None, print_blob=True)
settings.load_profile("tripletjax")


def pytest_configure(config):
    """Compiles in half the time, except in the slow lane, where programs are as users'.

    Most of what the tests wait for is the compiler.
    """
    if config.getoption("markexpr") == "not slow":
        jax.config.update("jax_disable_most_optimizations", True)
        # Tests and workers share what they compile, and the next run takes it, too.
        jax.config.update("jax_compilation_cache_dir", str(config.cache.mkdir("jax")))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


MAPS, MOST_MAPS = Path("/proc/self/maps"), Path("/proc/sys/vm/max_map_count")


def pytest_runtest_teardown():
    """Forgets what was compiled before a process has no more mappings for it.

    XLA maps memory for every program, and crashes where Linux refuses.
    """
    if not MAPS.exists():
        return
    with MAPS.open("rb") as maps:
        count = sum(1 for _ in maps)
    if count > int(MOST_MAPS.read_text()) // 2:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="module")
def compiled_anew():
    """Programs of their own, for runs that must repeat one another to the last bit."""
    directory = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_compilation_cache_dir", directory)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    """Prepared datasets go into a directory of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        directory = str(tmp_path_factory.mktemp("tensorflow_datasets"))
        patch.setenv("TFDS_DATA_DIR", directory)
        patch.setattr("tensorflow_datasets.core.constants.DATA_DIR", directory)
        yield
