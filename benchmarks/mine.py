"""Hard negatives of a large set, as a multiple of the product of all pairs.

    python benchmarks/mine.py
    python benchmarks/mine.py --n 20000

`tripletjax.mine_hard_negatives` with a margin, `mine_hard_positives`, and
`retrieval.nearest_neighbors`, beside the inner products of all pairs in blocks. Each
is compiled before it is timed.
"""

import argparse
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from retrieval import problem

import tripletjax as tj


def products(x: jax.Array) -> jax.Array:
    """The sum of all inner products, a block of rows and columns at a time."""
    tiles = jnp.pad(x, ((0, -len(x) % 2048), (0, 0))).reshape(-1, 2048, x.shape[1])
    blocks = jnp.pad(x, ((0, -len(x) % 512), (0, 0))).reshape(-1, 512, x.shape[1])

    def row(a: jax.Array) -> jax.Array:
        def step(most: jax.Array, b: jax.Array) -> tuple[jax.Array, None]:
            return jnp.maximum(most, jnp.matmul(a, b.T, precision="highest")), None

        return jax.lax.scan(step, jnp.zeros((512, 2048)), tiles)[0].max()

    return jax.lax.map(row, blocks)


def measure(name: str, function: Callable, *arrays: jax.Array) -> float:
    compiled = jax.jit(function).lower(*arrays).compile()
    start = time.perf_counter()
    jax.block_until_ready(compiled(*arrays))
    seconds = time.perf_counter() - start
    size = compiled.memory_analysis().temp_size_in_bytes
    print(f"{name:24} {seconds:8.2f} s {size / 2**20:8.0f} MiB temporary", end="")
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=100_000)
    parser.add_argument("--per-class", type=int, default=100)
    parser.add_argument("-k", type=int, default=10)
    parser.add_argument("--only", action="append", help="a function to measure")
    arguments = parser.parse_args()
    x, labels = map(jnp.asarray, problem(arguments.n, arguments.per_class))
    k = arguments.k
    functions = {
        "mine_hard_negatives": lambda x, y: tj.mine_hard_negatives(
            x, y, k=k, margin=0.05
        ),
        "mine_hard_positives": lambda x, y: tj.mine_hard_positives(x, y, k=k),
        "nearest_neighbors": lambda x, y: tj.retrieval.nearest_neighbors(x, x, k),
    }
    least = measure("products", products, x)
    print()
    for name in arguments.only or functions:
        seconds = measure(name, functions[name], x, labels)
        print(f" {seconds / least:6.2f} times the products")


if __name__ == "__main__":
    main()
