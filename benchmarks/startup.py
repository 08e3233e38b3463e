"""Time before the first result: imports, tracing and compiling.

    python benchmarks/startup.py
    PYTHONPATH=OTHER_VERSION python benchmarks/startup.py

Seconds of the first call of each, with nothing in a cache, and of the second. Absolute
times are of one machine: compare two versions in turn on the same.
"""

import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

SIZES = (256, 1024)
NETWORKS = ("EmbeddingCNN", "EmbeddingResNet", "MultiScaleCNN")


def problem(n: int) -> tuple[jax.Array, jax.Array]:
    x = np.random.default_rng(0).normal(size=(n, 64)).astype(np.float32)
    return jnp.asarray(x), jnp.asarray(np.arange(n) % (n // 4))


def cases() -> Iterator[tuple[str, Callable]]:
    """What is timed, by name."""

    def learn() -> None:
        from tripletjax.learn.runs import train  # noqa: F401

    yield "import tripletjax.learn.runs.train", learn

    import tripletjax as tj
    from tripletjax.learn.networks import embedding_networks

    for name in NETWORKS:
        network = getattr(embedding_networks, name)
        yield f"{name}()", lambda network=network: network(rngs=nnx.Rngs(0))
    images = jnp.ones((40, 32, 32, 3))
    for name in NETWORKS:
        graph, params, rest = nnx.split(
            getattr(embedding_networks, name)(rngs=nnx.Rngs(0), in_channels=3),
            nnx.Param,
            ...,
        )

        def cost(params: nnx.State, graph=graph, rest=rest) -> jax.Array:
            return jnp.sum(nnx.merge(graph, params, rest, copy=True)(images) ** 3)

        gradient = jax.jit(jax.grad(cost))
        yield f"{name}, gradient", lambda g=gradient, p=params: g(p)
    for name in ("hard", "semi_hard", "all"):
        x, labels = problem(160)
        loss = getattr(tj.blockwise, f"batch_{name}_loss")
        gradient = jax.jit(jax.value_and_grad(loss))
        yield (
            f"blockwise.batch_{name}_loss, n = 160",
            lambda g=gradient, x=x, y=labels: g(x, y),
        )
    for n in SIZES:
        x, labels = problem(n)
        yield (
            f"retrieval.evaluate, n = {n:,}",
            lambda x=x, y=labels: tj.retrieval.evaluate(x, y),
        )


def main() -> None:
    print("| what | first | again |", "|---|---|---|", sep="\n")
    for name, call in cases():
        seconds = []
        for _ in range(2):
            start = time.perf_counter()
            jax.block_until_ready(jax.tree.leaves(call()))
            seconds.append(time.perf_counter() - start)
        print(f"| {name} | {seconds[0]:.2f} | {seconds[1]:.3f} |", flush=True)


if __name__ == "__main__":
    main()
