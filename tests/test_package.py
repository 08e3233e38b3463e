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


def test_batches_need_no_extra():
    """The sampler with every package of the extras blocked."""
    blocked = (*HEAVY, "PIL", "grain", "array_record", "safetensors", "tqdm")
    code = f"""
import sys
sys.modules |= dict.fromkeys({blocked})
import numpy as np
from tripletjax.learn.data import sampling
labels = np.arange(40) % 5
batch = labels[sampling.ClassBatches(labels, classes=3, per_class=4)[0]]
assert [len(set(row)) for row in batch.reshape(3, 4)] == [1, 1, 1], batch
images, y = sampling.ImageBatches(np.zeros((40, 4, 4, 1)), labels, 3, 4)[0]
assert images.shape == (12, 4, 4, 1) and len(set(y.tolist())) == 3
"""
    subprocess.run([sys.executable, "-c", code], check=True)


# Rooms, from the bottom: each imports from rooms above it in this list.
# The core imports nothing but JAX and NumPy.
CORE = (
    ("_closures",),
    ("_api",),
    ("_matrices", "_thresholds"),
    ("distances", "pairs"),
    ("_pairwise",),
    ("retrieval", "verification", "collapse"),
    ("mining",),
    ("losses", "relevance", "hard_examples"),
    ("pair_losses",),
    ("softmax_losses", "separable_losses", "smooth_ap"),
    ("_engine",),
    ("_blockwise_pairs",),
    ("blockwise",),
    ("memory", "gradient_caching", "matryoshka"),
)
ROOMS = (
    *CORE,
    ("learn.choices", "learn.counts", "learn.errors", "learn.files"),
    ("learn.data", "learn.reports"),
    ("learn.networks", "learn.distributed", "learn.plots"),
    ("learn.training",),
    ("learn.runs",),
    ("learn.embedder",),
    ("learn.evaluation",),
    ("learn",),
    ("apps.embedders", "apps.images"),
    ("apps.search", "apps.verification", "apps.mining", "apps.export"),
    ("apps.identification", "apps.clustering"),
    ("apps.serve",),
    ("apps",),
    ("cli",),
    ("__main__",),
)
# Evaluation stands beside mining and the losses, and on neither.
APART = {
    "retrieval": ("mining", "losses"),
    "verification": ("mining", "losses"),
    "collapse": ("mining", "losses"),
    "mining": ("retrieval", "verification", "collapse"),
    "losses": ("_pairwise", "retrieval", "verification", "collapse"),
    "pair_losses": ("_pairwise", "retrieval", "verification", "collapse"),
    "blockwise": ("retrieval", "verification", "collapse"),
}
FLOORS = {room: floor for floor, rooms in enumerate(ROOMS) for room in rooms}


def modules():
    """Modules of the package with their files; names leave out ``tripletjax.``."""
    root = Path(tj.__file__).parent
    for file in sorted(root.rglob("*.py")):
        parts = file.relative_to(root).with_suffix("").parts
        if name := ".".join(parts).removesuffix("__init__").removesuffix("."):
            yield name, file


def room_of(module):
    """The room of a module: its longest prefix that names one."""
    parts = module.split(".")
    prefixes = [".".join(parts[:end]) for end in range(len(parts), 0, -1)]
    return next(prefix for prefix in prefixes if prefix in FLOORS)


def imports_of(file, known):
    """Names of modules that a file imports, in functions too."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} imports relatively"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            inside = {name.removeprefix("tripletjax.") for name in names} & known
            yield from (f"tripletjax.{name}" for name in sorted(inside))
            if len(inside) < len(names):
                yield node.module


def test_every_room_exists():
    names = {name for name, _ in modules()}
    assert set(FLOORS) <= names
    assert {name for name in names if "." not in name} <= set(FLOORS)


def test_imports_point_downwards():
    known = {name for name, _ in modules()}
    core = {room for rooms in CORE for room in rooms}
    for name, file in modules():
        # `learn` and `apps` import their public names when they are first used.
        if name in ("learn", "apps"):
            continue
        room = room_of(name)
        for module in imports_of(file, known):
            top, _, rest = module.partition(".")
            if top != "tripletjax":
                allowed = {"jax", "numpy", *sys.stdlib_module_names}
                assert room not in core or top in allowed, (name, module)
            elif rest and (other := room_of(rest)) != room:
                assert FLOORS[other] < FLOORS[room], (name, module)
                assert other not in APART.get(room, ()), (name, module)


def test_modules_import_in_no_circle():
    known = {name for name, _ in modules()}
    graph = {
        name: {
            module.removeprefix("tripletjax.")
            for module in imports_of(file, known)
            if module.startswith("tripletjax.")
        }
        - {name}
        for name, file in modules()
        if not file.name.startswith("__init__")
    }
    order = [*graphlib.TopologicalSorter(graph).static_order()]
    assert order.index("learn.data.image_files") < order.index("learn.runs.train")


def test_everything_public_is_documented():
    for name in tj.__all__:
        thing = getattr(tj, name)
        assert thing.__doc__, name
        if inspect.isfunction(thing) and not name.endswith("band"):
            for part in ("Args:", "Returns:", ">>>"):
                assert part in thing.__doc__, (name, part)


def test_version():
    assert tj.__version__.count(".") == 2
