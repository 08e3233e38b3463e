"""Retrieval metrics of a large set, against faiss with NumPy.

    python benchmarks/retrieval.py
    python benchmarks/retrieval.py --n 10000

Every item is a query against all others. `tripletjax.retrieval.evaluate` ranks all of
them, and `recall_at_k` runs alone. The third contestant is faiss's exact search for the
nearest 100, or as many as a class has, with metrics in NumPy. Each runs in a process of
its own; the first call, which compiles, is not timed. Needs
``pip install -e . --group peers``.
"""

import argparse
import json
import subprocess
import sys
import time

import numpy as np


def problem(n: int, per_class: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    labels = np.arange(n) % max(n // per_class, 1)
    centres = random.normal(size=(labels.max() + 1, 128))
    x = centres[labels] + 1.5 * random.normal(size=(n, 128))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    return x.astype(np.float32), labels


def with_tripletjax(name: str, x: np.ndarray, labels: np.ndarray) -> dict:
    import jax
    import jax.numpy as jnp

    from tripletjax import retrieval

    function = getattr(retrieval, name)
    x, labels = jnp.asarray(x), jnp.asarray(labels)
    jax.block_until_ready(function(x, labels))
    start = time.perf_counter()
    out = jax.block_until_ready(function(x, labels))
    seconds = time.perf_counter() - start
    compiled = jax.jit(function).lower(x, labels).compile()
    result = {"recall_at_k": out} if name == "recall_at_k" else out._asdict()
    return {
        "seconds": seconds,
        "bytes": compiled.memory_analysis().temp_size_in_bytes,
        "metrics": jax.tree.map(float, result),
    }


def with_faiss(x: np.ndarray, labels: np.ndarray, k: int) -> dict:
    import faiss

    start = time.perf_counter()
    index = faiss.IndexFlatL2(x.shape[1])
    index.add(x)
    _, nearest = index.search(x, k + 1)
    searched = time.perf_counter() - start
    itself = nearest == np.arange(len(x))[:, None]
    # Of equals, the query itself need not come first.
    itself[~itself.any(axis=1), -1] = True
    nearest = nearest[~itself].reshape(len(x), k)
    relevant = labels[nearest] == labels[:, None]
    count = np.bincount(labels)[labels] - 1
    rank = np.arange(1, k + 1)
    precision = np.cumsum(relevant, axis=1) / rank
    within = relevant & (rank <= count[:, None])
    first = np.where(relevant.any(axis=1), relevant.argmax(axis=1) + 1, np.inf)
    metrics = {
        "recall_at_k": {k: float(np.mean(first <= k)) for k in (1, 2, 4, 8)},
        "precision_at_1": float(np.mean(relevant[:, 0])),
        "r_precision": float(np.mean(within.sum(axis=1) / count)),
        "map_at_r": float(np.mean((precision * within).sum(axis=1) / count)),
        "mean_reciprocal_rank": float(np.mean(1 / first)),
    }
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "search": searched, "metrics": metrics}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=60_000)
    parser.add_argument("--per-class", type=int, default=100)
    parser.add_argument("--only", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        x, labels = problem(arguments.n, arguments.per_class)
        if arguments.only == "faiss":
            out = with_faiss(x, labels, max(100, arguments.per_class))
        else:
            out = with_tripletjax(arguments.only, x, labels)
        print(json.dumps(out))
        return
    for name in ("faiss", "evaluate", "recall_at_k"):
        done = subprocess.run(
            [sys.executable, __file__, *sys.argv[1:], "--only", name],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            sys.exit(done.stderr)
        out = json.loads(done.stdout.splitlines()[-1])
        print(f"{name:12} {out['seconds']:8.2f} s", end="")
        if "bytes" in out:
            print(f" {out['bytes'] / 2**20:8.0f} MiB temporary", end="")
        print()
        for metric, value in out["metrics"].items():
            values = [*value.values()] if metric == "recall_at_k" else value
            print(f"    {metric:24} {np.round(values, 5)}")


if __name__ == "__main__":
    main()
