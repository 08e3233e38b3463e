"""Groups of images of unseen classes: BCubed F of several methods, time and memory.

    python benchmarks/clustering.py --run RUN --calibrate FOLDER --unseen OTHER_FOLDER
    python benchmarks/clustering.py --sizes 10000 100000

The first command groups the images of the second folder. Both folders have one folder
of images per class, and the run was trained on neither. Each method has one threshold:
a distance, chosen on the first folder by its false accept rate, or by the best BCubed F
there. A bound is the best threshold for the second folder itself. DBSCAN and HDBSCAN
leave images out of all groups; these count as single.

The second command groups synthetic unit vectors of 128 dimensions, 10 around each of
n / 10 centres, and prints seconds and the largest memory of the process.
"""

import argparse
import resource
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components
from sklearn.cluster import DBSCAN, HDBSCAN, AgglomerativeClustering

import tripletjax as tj
from tripletjax.apps.clustering import group_vectors, measure
from tripletjax.apps.embedders import embedder_of
from tripletjax.learn.evaluation import embed_folder

FARS = 0.01, 0.001, 0.0001
GRID = np.round(np.arange(0.2, 1.3, 0.025), 3)
NEIGHBORS = 16
# Threshold and noise of synthetic vectors.
SYNTHETIC, NOISE = 0.9, 0.7


def graph(x, threshold, mutual):
    """Edges of nearest neighbours within a threshold."""
    k = min(NEIGHBORS, len(x) - 1)
    d, near = tj.retrieval.nearest_neighbors(x, x, k, positions=np.arange(len(x)))
    rows = np.repeat(np.arange(len(x)), k)
    close = np.asarray(d).ravel() <= threshold
    columns = np.asarray(near).ravel()[close]
    edges = csr_array((np.ones(close.sum()), (rows[close], columns)), (len(x),) * 2)
    return edges.multiply(edges.T) if mutual else edges


def components(mutual):
    def group(x, threshold):
        return connected_components(graph(x, threshold, mutual), directed=False)[1]

    return group


def alone(labels):
    """Labels with a group of its own for each image that is left out."""
    noise = labels < 0
    return np.where(noise, labels.max() + np.cumsum(noise), labels)


def dbscan(samples):
    def group(x, threshold):
        return alone(DBSCAN(eps=threshold, min_samples=samples).fit_predict(x))

    return group


def agglomerative(linkage, sparse=False):
    def group(x, threshold):
        links = None
        if sparse:
            k = min(NEIGHBORS, len(x) - 1)
            links = graph(x, np.inf, mutual=False)
            assert links.nnz == k * len(x)
        model = AgglomerativeClustering(
            None, linkage=linkage, distance_threshold=threshold, connectivity=links
        )
        return model.fit_predict(x)

    return group


def hdbscan(x, samples):
    """HDBSCAN, which has no threshold but a number of samples."""
    model = HDBSCAN(min_cluster_size=2, min_samples=int(samples), copy=True)
    return alone(model.fit_predict(x))


def singles(x, threshold):
    return np.arange(len(x))


METHODS: dict[str, Callable] = {
    "average linkage, graph (ours)": group_vectors,
    "average linkage, matrix": agglomerative("average"),
    "average linkage, scikit-learn graph": agglomerative("average", sparse=True),
    "complete linkage, matrix": agglomerative("complete"),
    "connected components": components(mutual=False),
    "mutual neighbours, components": components(mutual=True),
    "DBSCAN, 2 samples": dbscan(2),
    "DBSCAN, 4 samples": dbscan(4),
    "HDBSCAN, 1 to 5 samples": hdbscan,
    "every image alone": singles,
}


def compare(before, after) -> None:
    """Print BCubed F of each method on the second of two embedded folders."""
    for name, one in (("calibrate", before), ("unseen", after)):
        print(f"{name}: {len(one.x):,} images, {len(one.names):,} classes")
    pairs = tj.verification.evaluate(before.x, before.labels, fars=FARS)
    there = tj.verification.evaluate(after.x, after.labels, fars=FARS)
    print(f"EER {100 * float(there.equal_error_rate):.1f} % on unseen classes")
    far_thresholds = [float(t) for t in pairs.thresholds]
    print("thresholds by FAR:", *(f"{t:.3f}" for t in far_thresholds))
    heads = [f"FAR {100 * far:g} %" for far in FARS] + ["chosen", "best", "groups", "s"]
    print(f"{'BCubed F, %':<38}" + "".join(f"{head:>14}" for head in heads))
    for name, group in METHODS.items():
        start = time.perf_counter()

        def score(one, threshold, group=group):
            groups = group(one.x, threshold)
            return 100 * measure(one.labels, groups).bcubed_f, len(np.unique(groups))

        grid = np.arange(1, 6) if group is hdbscan else GRID
        on_grid = [score(before, t)[0] for t in grid]
        chosen = float(grid[int(np.argmax(on_grid))])
        bounds = [score(after, t) for t in grid]
        best = int(np.argmax([f for f, _ in bounds]))
        cells = []
        for t in far_thresholds:
            known = np.isfinite(t) and group is not hdbscan
            cells.append(f"{score(after, t)[0]:.1f}" if known else "-")
        value, groups = score(after, chosen)
        cells.append(f"{value:.1f} ({chosen:g})")
        cells.append(f"{bounds[best][0]:.1f} ({grid[best]:g})")
        cells.append(f"{groups:,}")
        cells.append(f"{time.perf_counter() - start:.0f}")
        print(f"{name:<38}" + "".join(f"{cell:>14}" for cell in cells), flush=True)


def scale(size: int) -> None:
    draw = np.random.default_rng(0)
    centres = draw.normal(size=(size // 10, 128)).astype(np.float32)
    x = np.repeat(centres, 10, axis=0)
    x += NOISE * draw.normal(size=x.shape).astype(np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    labels = np.repeat(np.arange(size // 10), 10)
    order = draw.permutation(size)
    start = time.perf_counter()
    groups = group_vectors(x[order], SYNTHETIC, progress=True)
    seconds = time.perf_counter() - start
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    f = 100 * measure(labels[order], groups).bcubed_f
    print(
        f"{size:,} vectors: {seconds:.1f} s, {memory:,.0f} MiB at most, "
        f"{len(np.unique(groups)):,} groups, BCubed F {f:.1f} %",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path)
    parser.add_argument("--calibrate", type=Path)
    parser.add_argument("--unseen", type=Path)
    parser.add_argument("--sizes", type=int, nargs="+", default=())
    arguments = parser.parse_args()
    # scikit-learn completes graphs of several components, and says so.
    warnings.filterwarnings("ignore", message="the number of connected components")
    for size in arguments.sizes:
        scale(size)
    if arguments.run is not None:
        embedder = embedder_of(arguments.run)
        folders = [arguments.calibrate, arguments.unseen]
        compare(*(embed_folder(embedder, folder) for folder in folders))


if __name__ == "__main__":
    main()
