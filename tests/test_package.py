"""What importing costs, and that what is public is documented and tested by doctest."""

import inspect
import subprocess
import sys

import tripletjax as tj

HEAVY = ("flax", "optax", "orbax", "tensorflow_datasets", "matplotlib", "sklearn")


def test_the_core_imports_jax_and_nothing_heavier():
    code = f"""
import sys
import jax, jax.numpy, jax.test_util
before = set(sys.modules)
import tripletjax
loaded = set(sys.modules) - before
heavy = [name for name in {HEAVY} if name in sys.modules]
assert not heavy, heavy
outside = sorted(
    name for name in loaded
    if name.split(".")[0] not in sys.stdlib_module_names
    and name.split(".")[0] not in ("tripletjax", "jax", "numpy", "_jax", "jaxlib")
)
assert not outside, outside
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_everything_public_is_documented():
    for name in tj.__all__:
        thing = getattr(tj, name)
        assert thing.__doc__, name
        if inspect.isfunction(thing) and not name.endswith("band"):
            for part in ("Args:", "Returns:", ">>>"):
                assert part in thing.__doc__, (name, part)


def test_version():
    assert tj.__version__.count(".") == 2
