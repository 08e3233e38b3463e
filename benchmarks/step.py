"""What of a training step the loss costs, and what reading the images costs.

    python benchmarks/step.py
    python benchmarks/step.py --batch 64 --size 32

`EmbeddingResNet` on random colour images: the step of `training.fit` with each mining,
beside the same step with a loss that costs nothing (a sum), and beside the loss with
its gradient alone. Then steps per second of `fit` with one batch that is always at
hand, with batches drawn by `ImageBatches` from memory, and from disk.
"""

import argparse
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from PIL import Image

from tripletjax.learn import models, sampling, stored, tasks, training


def median_time(function, repeats: int) -> float:
    jax.block_until_ready(function())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function())
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def nothing(x, labels):
    return jnp.sum(x), {}


class OneBatch:
    def __init__(self, images, labels):
        self.batch = images, labels

    def __getitem__(self, step):
        return self.batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    n, size, repeats = arguments.batch, arguments.size, arguments.repeats

    random = np.random.default_rng(0)
    images = random.integers(0, 256, (4 * n, size, size, 3), dtype=np.uint8)
    labels = np.arange(4 * n) // 4
    batches = sampling.ImageBatches(images, labels, n // 4, 4)
    batch = batches[0]

    model = models.EmbeddingResNet(128, rngs=nnx.Rngs(0))
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    x = training.embed_images(model, batch[0])

    def step_time(loss) -> float:
        @jax.jit
        def step(params):
            def loss_of(params):
                embeddings = nnx.merge(graph, params, rest, copy=True)(
                    training.as_floats(batch[0])
                )
                return loss(embeddings, batch[1])[0]

            return jax.value_and_grad(loss_of)(params)

        return median_time(lambda: step(params), repeats)

    base = step_time(nothing)
    print(f"{n} images of {size} x {size}: forward and back {1e3 * base:.0f} ms")
    for mining in training.MINING:
        loss = training.mined_loss(mining)
        alone = jax.jit(jax.value_and_grad(loss, has_aux=True))
        seconds = median_time(lambda: alone(x, batch[1]), 20 * repeats)  # noqa: B023
        print(
            f"{mining:>10}: loss and gradient {1e3 * seconds:.2f} ms, "
            f"{100 * seconds / base:.2f} % of the step"
        )

    sources = {"at hand": OneBatch(*batch), "from memory": batches}
    with tempfile.TemporaryDirectory() as directory:
        on_disk = stored.store(
            images,
            Image.fromarray,
            Path(directory),
            size=size,
            in_memory=0,
            progress=False,
        ).images
        sources["from disk"] = sampling.ImageBatches(on_disk, labels, n // 4, 4)
        for name, source in sources.items():
            start = time.perf_counter()
            for step in range(repeats):
                source[step]
            alone = (time.perf_counter() - start) / repeats
            seconds = fit_time(source, repeats)
            print(
                f"batches {name:>11}: {1 / seconds:.3f} steps/s, "
                f"{1e3 * alone:.1f} ms to make one"
            )


def fit_time(source, repeats: int) -> float:
    """Seconds between two steps of `fit`."""
    model = models.EmbeddingResNet(128, rngs=nnx.Rngs(0))
    lines = training.fit(
        model,
        optax.adam(1e-3),
        source,
        steps=repeats + 2,
        augment=tasks.PHOTOS,
        log_every=1,
        progress=False,
    )
    moments = [time.perf_counter() for _ in lines]
    # The first step compiles.
    return float(np.median(np.diff(moments)[1:]))


if __name__ == "__main__":
    main()
