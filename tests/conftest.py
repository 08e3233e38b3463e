"""Eight devices on the CPU, so that meshes can be tested anywhere."""

import gc
import itertools
import os
import signal
from pathlib import Path

# Tests run side by side, and threads of OpenBLAS and OpenMP that find no core free
# wait for one another. Processes of the tests inherit this.
for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(name, "1")
# Tests have a compile cache of their own, and never use that of the user.
os.environ["TRIPLETJAX_COMPILE_CACHE"] = "off"
# Shells start background jobs with SIGINT ignored, which processes of the tests would
# inherit. Tests of interrupts need the handler of Python.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import jax
import pytest
from hypothesis import settings
from programs import cache_folder, compile_quickly, remove_old_programs, repeatable

# Must come before anything asks JAX for its devices.
jax.config.update("jax_num_cpu_devices", 8)

# Random inputs are the same in every run, unless other ones are requested.
settings.register_profile(
    "tripletjax",
    deadline=None,
    print_blob=True,
    derandomize="TRIPLETJAX_TESTS_RANDOM" not in os.environ,
)
settings.load_profile("tripletjax")


def pytest_configure(config):
    if not hasattr(config, "workerinput"):
        remove_old_programs(cache_folder())
    compile_quickly()


MAPS, MOST_MAPS = Path("/proc/self/maps"), Path("/proc/sys/vm/max_map_count")


# Counting them takes a while: it is done after every MAPS_EVERY tests.
MAPS_EVERY = 10
_tests = itertools.count(1)


def pytest_runtest_teardown():
    """Forgets what was compiled before a process has no more mappings for it.

    XLA maps memory for every program, and crashes where Linux refuses.
    """
    if next(_tests) % MAPS_EVERY or not MAPS.exists():
        return
    if MAPS.read_bytes().count(b"\n") > int(MOST_MAPS.read_text()) // 2:
        jax.clear_caches()
        gc.collect()


# Networks and training broadcast as Flax and Optax do; all else is strict.
STRICT = {
    "test_blockwise",
    "test_collapse",
    "test_compiled_memory",
    "test_contract",
    "test_distances",
    "test_gradient_caching",
    "test_identification",
    "test_losses",
    "test_matryoshka",
    "test_memory",
    "test_meshes",
    "test_mining",
    "test_oracle_parity",
    "test_pair_losses",
    "test_pairs",
    "test_relevance",
    "test_retrieval",
    "test_strict",
    "test_verification",
}


@pytest.fixture(scope="module", autouse=True)
def strict_promotion(request):
    """The core promotes no dtype and no rank implicitly."""
    if request.path.stem not in STRICT:
        yield
        return
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture
def exact():
    with repeatable():
        yield


@pytest.fixture(scope="module")
def own_data_dir(tmp_path_factory):
    """Prepared datasets go into a directory of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        directory = str(tmp_path_factory.mktemp("tensorflow_datasets"))
        patch.setenv("TFDS_DATA_DIR", directory)
        patch.setattr("tensorflow_datasets.core.constants.DATA_DIR", directory)
        yield
