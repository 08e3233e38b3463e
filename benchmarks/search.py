"""Time and memory of a search, and the recall of an approximate one.

    python benchmarks/search.py
    python benchmarks/search.py --images 20000

Vectors of 128 dimensions in 1,000 classes, written as an index is. First 100,000: how
long a process takes to open the index and answer one query, beyond its imports, and 100
queries; its memory beyond the vectors. Then 1,000,000: exact and approximate search.
With `--images`, how many images a second are read and embedded by a small network, and
how many are embedded that are in memory.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

import numpy as np
from PIL import Image

from tripletjax.apps import search
from tripletjax.apps.embedders import embedder_of

DIM, CLASSES = 128, 1000
ONE = """
import resource, sys, time
import numpy as np
from tripletjax.apps import search
from tripletjax.apps.embedders import embedder_of

def memory():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

embedder = embedder_of(lambda images: np.zeros((len(images), 1)), key="made")
before, start = memory(), time.perf_counter()
index = search.Index(sys.argv[1], sys.argv[2], embedder)
queries = np.load(sys.argv[3])
index.search(queries[:1], 10)
one, start = time.perf_counter() - start, time.perf_counter()
index.search(queries, 10)
many = time.perf_counter() - start
print(f"open and one query {one:.3f} s, {len(queries)} queries {many:.3f} s, "
      f"{memory() - before:.0f} MiB more than before")
"""


def made(n: int, seed: int = 0) -> np.ndarray:
    """Unit vectors about the centres of classes."""
    centres = np.random.default_rng(1).normal(size=(CLASSES, DIM))
    random = np.random.default_rng(seed)
    x = centres[random.integers(0, CLASSES, n)] + 0.7 * random.normal(size=(n, DIM))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def index_of(x: np.ndarray, folder: Path, database: Path) -> search.Index:
    """The index that images with these vectors would have."""
    folder.mkdir()
    embedder = embedder_of(lambda images: np.zeros((len(images), 1)), key="made")
    index = search.Index(folder, database, embedder)
    for start in range(0, len(x), 10_000):
        rows = range(start, min(start + 10_000, len(x)))
        paths = [f"{row % CLASSES}/{row}.png" for row in rows]
        digests = {path: path for path in paths}
        index._rows.put(digests, dict(zip(paths, x[rows])), digests)
    index._rows.table.optimize()
    return index


def timed(function) -> tuple[float, object]:
    start = time.perf_counter()
    out = function()
    return time.perf_counter() - start, out


def read_and_embedded(n: int) -> None:
    """Images a second, from files and from memory."""
    from flax import nnx

    from tripletjax.learn.data import image_shape
    from tripletjax.learn.networks import embedding, embedding_networks

    model = embedding_networks.EmbeddingCNN(DIM, in_channels=3, rngs=nnx.Rngs(0))
    model.eval()
    spec = image_shape.ImageSpec(64, 64, 3, 65535, "white")

    class Network:
        key, prepare = "network", staticmethod(spec.fit)

        @staticmethod
        def embed(images):
            return np.asarray(embedding.embed_images(model, np.stack(images)))

    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        (root / "images").mkdir()
        random = np.random.default_rng(0)
        for number in range(n):
            pixels = random.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            image = Image.fromarray(pixels).resize((256, 256))
            image.save(root / "images" / f"{number}.jpg")
        embed = Network.embed
        some = [spec.fit(Image.open(root / "images" / "0.jpg"))] * 256
        embed(some)
        alone, _ = timed(lambda: [embed(some) for _ in range(8)])
        index = search.Index(root / "images", root / "db", Network())
        whole, _ = timed(index.update)
        print(
            f"embedding from memory {8 * 256 / alone:.0f} images/s; "
            f"reading {n} JPEG files of 256 x 256 and embedding {n / whole:.0f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--images", type=int, help="measure reading of this number of images instead"
    )
    arguments = parser.parse_args()
    if arguments.images:
        read_and_embedded(arguments.images)
        return
    print(f"lancedb {metadata.version('lancedb')}")
    queries = made(100, seed=2)
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        np.save(root / "queries.npy", queries)
        seconds, _ = timed(lambda: index_of(made(100_000), root / "a", root / "db"))
        print(f"100,000 vectors written in {seconds:.1f} s", flush=True)
        command = [sys.executable, "-c", ONE]
        places = [str(root / name) for name in ("a", "db", "queries.npy")]
        subprocess.run([*command, *places], check=True)

        index = index_of(made(1_000_000), root / "b", root / "db")
        exact_time, exact = timed(lambda: index.search(queries, 10))
        seconds, _ = timed(index.build_approximate)
        near_time, near = timed(lambda: index.search(queries, 10, approximate=True))
        shared = [
            len({h.path for h in a} & {h.path for h in b}) / 10
            for a, b in zip(exact, near)
        ]
        print(
            f"1,000,000 vectors, 100 queries: exact {exact_time:.2f} s, approximate "
            f"{near_time:.2f} s with recall@10 of {np.mean(shared):.3f}; cells made in "
            f"{seconds:.0f} s"
        )


if __name__ == "__main__":
    main()
