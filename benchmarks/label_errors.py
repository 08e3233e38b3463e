"""Precision and recall of likely label errors, with some labels made wrong.

    python benchmarks/label_errors.py --run RUN --data FOLDER --share 0.05

The images are embedded once. For each seed, a share of them gets the label of another
random class. The list of likely label errors is then compared with these images.
"""

import argparse
from pathlib import Path

import numpy as np

import tripletjax as tj
from tripletjax.apps import mining
from tripletjax.apps.embedders import embedder_of
from tripletjax.apps.mining.label_errors import NEIGHBORS, RATIO
from tripletjax.learn import evaluation


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--share", type=float, nargs="+", default=[0.0, 0.02, 0.1])
    parser.add_argument("--ratio", type=float, default=RATIO)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    embedder = embedder_of(arguments.run)
    images = evaluation.embed_folder(embedder, arguments.data, progress=True)
    x, n = images.x[images.first_copy], len(images.x)
    distances, neighbors = map(
        np.asarray,
        tj.retrieval.nearest_neighbors(
            x, x, min(NEIGHBORS, n - 1), positions=np.arange(n)
        ),
    )
    print(f"{n:,} images of {len(images.names):,} classes")
    print("wrong labels   listed   of these wrong   precision   recall   class right")
    for share in arguments.share:
        rows = []
        for seed in range(arguments.seeds if share else 1):
            draw = np.random.default_rng(seed)
            wrong = draw.random(n) < share
            labels = images.labels.copy()
            other = draw.integers(1, len(images.names), wrong.sum())
            labels[wrong] = (labels[wrong] + other) % len(images.names)
            errors = mining.find_label_errors(
                x, labels, distances, neighbors, ratio=arguments.ratio
            )
            hit = wrong[errors.images]
            right = errors.labels == images.labels[errors.images]
            rows.append([wrong.sum(), len(hit), hit.sum(), (hit & right).sum()])
        made, listed, hits, right = np.mean(rows, axis=0)
        print(
            f"{made:12.0f}{listed:9.0f}{hits:17.0f}"
            f"{_percent(hits, listed)}{_percent(hits, made)}{_percent(right, hits)}"
        )


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:10.1f} %" if whole else f"{'-':>12}"


if __name__ == "__main__":
    main()
