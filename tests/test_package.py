"""What importing costs, and that what is public is documented and tested by doctest."""

import ast
import graphlib
import inspect
import subprocess
import sys
from pathlib import Path

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


# Each imports from those before it, and the core from nothing but JAX and NumPy.
ROOMS = (
    ("_closures",),
    ("_api",),
    ("distances", "pairs", "_matrices", "_thresholds"),
    ("_pairwise",),
    ("retrieval", "verification", "collapse"),
    ("mining",),
    ("losses", "relevance"),
    ("_engine",),
    ("blockwise",),
    ("memory",),
    ("learn",),
    ("apps",),
    ("cli",),
    ("__main__",),
)
CORE = [name for room in ROOMS[:-4] for name in room]
# Evaluation stands beside mining and the losses, and on neither.
APART = {
    "retrieval": ("mining", "losses"),
    "verification": ("mining", "losses"),
    "collapse": ("mining", "losses"),
    "mining": ("retrieval", "verification", "collapse"),
    "losses": ("_pairwise", "retrieval", "verification", "collapse"),
    "blockwise": ("retrieval", "verification", "collapse"),
}


def imports_of(file):
    """Names of modules that a file imports, in functions too."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} imports relatively"
            if node.module in ("tripletjax", "tripletjax.learn"):
                yield from (f"{node.module}.{alias.name}" for alias in node.names)
            else:
                yield node.module


def test_imports_point_downwards():
    root = Path(tj.__file__).parent
    floor = {name: level for level, room in enumerate(ROOMS) for name in room}
    packages = {path.parent.name for path in root.glob("*/__init__.py")}
    found = {path.stem for path in root.glob("*.py")} | packages
    assert found - {"__init__"} == set(floor)
    for name, level in floor.items():
        files = [root / f"{name}.py"]
        if name in packages:
            files = sorted((root / name).rglob("*.py"))
        for module in (module for file in files for module in imports_of(file)):
            top, _, rest = module.partition(".")
            if top != "tripletjax":
                allowed = {"jax", "numpy", *sys.stdlib_module_names}
                assert name not in CORE or top in allowed, (name, module)
            elif rest and (below := rest.split(".")[0]) in floor and below != name:
                assert floor[below] < level, (name, module)
                assert below not in APART.get(name, ()), (name, module)


def test_modules_of_learning_import_in_no_circle():
    folder = Path(tj.__file__).parent / "learn"
    modules = {file.stem for file in folder.glob("[!_]*.py")}
    imported = {}
    for file in folder.glob("[!_]*.py"):
        prefix = "tripletjax.learn."
        found = {
            name.removeprefix(prefix).split(".")[0]
            for name in imports_of(file)
            if name.startswith(prefix)
        }
        imported[file.stem] = found & modules
    order = [*graphlib.TopologicalSorter(imported).static_order()]
    assert order.index("image_io") < order.index("runs")


def test_everything_public_is_documented():
    for name in tj.__all__:
        thing = getattr(tj, name)
        assert thing.__doc__, name
        if inspect.isfunction(thing) and not name.endswith("band"):
            for part in ("Args:", "Returns:", ">>>"):
                assert part in thing.__doc__, (name, part)


def test_version():
    assert tj.__version__.count(".") == 2
