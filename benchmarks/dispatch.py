"""Overhead of a call beside plain `jax.jit`, with next to nothing to compute.

    python benchmarks/dispatch.py

Public functions are jitted behind a door that checks their arguments and takes whatever
is like an array. Each is called on 8 items in turn with `jax.jit` of its inside, on
arrays of the device and on NumPy's; the least of several hundred calls counts.
"""

import time

import jax
import numpy as np

import tripletjax as tj
from tripletjax._api import unjitted

ROUNDS, CALLS = 40, 50


def least(functions):
    """Microseconds per call of each function, in turn so that noise reaches all."""
    for function in functions:
        jax.block_until_ready(function())
    best = [float("inf")] * len(functions)
    for _ in range(ROUNDS):
        for place, function in enumerate(functions):
            start = time.perf_counter()
            for _ in range(CALLS):
                function()
            best[place] = min(best[place], time.perf_counter() - start)
    return [1e6 * total / CALLS for total in best]


def main() -> None:
    x = jax.random.normal(jax.random.key(0), (8, 4))
    labels = jax.numpy.arange(8) % 4
    distances = tj.euclidean(x)
    triplets = tj.batch_hard_triplets(distances, labels)
    cases = {
        "batch_hard_loss": (tj.batch_hard_loss, (distances, labels)),
        "batch_all_loss": (tj.batch_all_loss, (distances, labels)),
        "triplet_loss": (tj.triplet_loss, (distances, triplets)),
        "triplet_margin_loss": (tj.triplet_margin_loss, (x, x[::-1], -x)),
        "blockwise.batch_hard_loss": (tj.blockwise.batch_hard_loss, (x, labels)),
    }
    print(f"{'in microseconds':<28}{'jit':>8}{'device':>9}{'times':>7}{'NumPy':>9}")
    for name, (function, arguments) in cases.items():
        plain = jax.jit(unjitted(function))
        of_numpy = jax.tree.map(np.asarray, arguments)
        jit, device, host = least(
            [
                lambda plain=plain, arguments=arguments: plain(*arguments),
                lambda call=function, arguments=arguments: call(*arguments),
                lambda call=function, arguments=of_numpy: call(*arguments),
            ]
        )
        print(f"{name:<28}{jit:8.1f}{device:9.1f}{device / jit:7.2f}{host:9.1f}")


if __name__ == "__main__":
    main()
