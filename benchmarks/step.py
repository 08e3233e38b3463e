"""Share of the loss and of reading images in a training step.

    python benchmarks/step.py
    python benchmarks/step.py --batch 64 --size 32
    python benchmarks/step.py --peers
    python benchmarks/step.py --gradients

`EmbeddingResNet` on random colour images: the step of `learn.fit` with triplet losses,
the same step with a loss that costs nothing (a sum), and the loss with its gradient
alone. Then steps per second of `fit` with one batch that is always at
hand, with batches drawn by `ImageBatches` from memory, and from disk.

With `--peers`, a step with AdamW of each network beside the same network in PyTorch, in
turn; of `EmbeddingPhotoNet` beside PyTorch's residual network, in whose place it is.

With `--gradients`, such a step with the own gradients of `convolution` beside the same
step with XLA's gradients, each by `convolution.jit` and by `jax.jit`.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from PIL import Image

from tripletjax import learn
from tripletjax.learn.data import image_cache, sampling
from tripletjax.learn.networks import convolution, embedding_networks
from tripletjax.learn.networks.embedding import as_floats
from tripletjax.learn.runs import defaults
from tripletjax.learn.training import loop, objectives


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
    parser.add_argument("--peers", action="store_true", help="compare with PyTorch")
    parser.add_argument(
        "--gradients", action="store_true", help="compare own gradients with XLA's"
    )
    arguments = parser.parse_args()
    if arguments.gradients:
        compare_gradients(arguments.repeats)
        return
    if arguments.peers:
        compare_with_pytorch(arguments.repeats)
        return
    n, size, repeats = arguments.batch, arguments.size, arguments.repeats

    random = np.random.default_rng(0)
    images = random.integers(0, 256, (4 * n, size, size, 3), dtype=np.uint8)
    labels = np.arange(4 * n) // 4
    batches = sampling.ImageBatches(images, labels, n // 4, 4)
    batch = batches[0]

    model = embedding_networks.EmbeddingResNet(128, rngs=nnx.Rngs(0))
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    x = learn.embed_images(model, batch[0])

    def step_time(loss) -> float:
        @jax.jit
        def step(params):
            def loss_of(params):
                embeddings = nnx.merge(graph, params, rest, copy=True)(
                    as_floats(batch[0])
                )
                return loss(embeddings, batch[1])[0]

            return jax.value_and_grad(loss_of)(params)

        return median_time(lambda: step(params), repeats)

    base = step_time(nothing)
    print(f"{n} images of {size} x {size}: forward and back {1e3 * base:.0f} ms")
    for name in ("semi-hard", "hard", "all"):
        loss = objectives.batch_loss(name)
        alone = jax.jit(jax.value_and_grad(loss, has_aux=True))
        seconds = median_time(lambda: alone(x, batch[1]), 20 * repeats)  # noqa: B023
        print(
            f"{name:>10}: loss and gradient {1e3 * seconds:.2f} ms, "
            f"{100 * seconds / base:.2f} % of the step"
        )

    sources = {"at hand": OneBatch(*batch), "from memory": batches}
    with tempfile.TemporaryDirectory() as directory:
        on_disk = image_cache.decode_and_cache(
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


def compare_with_pytorch(repeats: int) -> None:
    import torch
    from torch import nn

    def layer(into: int, out: int, side: int = 3, stride: int = 1) -> list:
        convolution = nn.Conv2d(into, out, side, stride, side // 2, bias=False)
        return [convolution, nn.GroupNorm(8, out)]

    class Cnn(nn.Module):
        def __init__(self, channels: tuple[int, ...]):
            super().__init__()
            stages, into = [], 1
            for out in channels:
                both = [*layer(into, out), nn.ReLU(), *layer(out, out), nn.ReLU()]
                stages += [nn.MaxPool2d(2)] * bool(stages) + both
                into = out
            self.stages, self.head = nn.Sequential(*stages), nn.Linear(2 * into, 128)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stages(x)
            x = torch.cat([x.mean((2, 3)), x.amax((2, 3))], dim=-1)
            return nn.functional.normalize(self.head(x))

    class Residual(nn.Module):
        def __init__(self, into: int, out: int, stride: int):
            super().__init__()
            first = [*layer(into, out, stride=stride), nn.ReLU()]
            self.inner = nn.Sequential(*first, *layer(out, out))
            self.short = nn.Identity()
            if stride > 1 or into != out:
                self.short = nn.Conv2d(into, out, 1, stride, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(self.short(x) + self.inner(x))

    class ResNet(nn.Module):
        def __init__(self):
            super().__init__()
            blocks, into = [*layer(3, 32, 5, 2), nn.ReLU()], 32
            for place, out in enumerate((32, 64, 128)):
                for stride in (1 + (place > 0), 1):
                    blocks.append(Residual(into, out, stride))
                    into = out
            self.blocks, self.head = nn.Sequential(*blocks), nn.Linear(into, 128)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.normalize(self.head(self.blocks(x).mean((2, 3))))

    def torch_time(model: nn.Module, shape: tuple[int, ...]) -> float:
        optimizer, x = torch.optim.AdamW(model.parameters()), torch.rand(shape)
        times = []
        for _ in range(repeats + 1):
            start = time.perf_counter()
            optimizer.zero_grad()
            (model(x) ** 3).sum().backward()
            optimizer.step()
            times.append(time.perf_counter() - start)
        return min(times)

    def jax_time(model: nnx.Module, shape: tuple[int, ...]) -> float:
        step = adamw_step(model, shape, convolution.jit)
        return min(step() for _ in range(repeats + 1))

    rngs, n = nnx.Rngs(0), 160
    small, large = (32, 64), (32, 64, 128)
    for name, ours, theirs, (side, channels) in (
        (
            "EmbeddingCNN, two stages",
            embedding_networks.EmbeddingCNN(128, channels=small, rngs=rngs),
            lambda: Cnn(small),
            (32, 1),
        ),
        (
            "EmbeddingCNN, three stages",
            embedding_networks.EmbeddingCNN(128, channels=large, rngs=rngs),
            lambda: Cnn(large),
            (32, 1),
        ),
        (
            "EmbeddingResNet",
            embedding_networks.EmbeddingResNet(128, rngs=rngs),
            ResNet,
            (64, 3),
        ),
        (
            "EmbeddingPhotoNet",
            embedding_networks.EmbeddingPhotoNet(128, in_channels=3, rngs=rngs),
            ResNet,
            (64, 3),
        ),
    ):
        ratios = []
        for _ in range(3):
            peer = torch_time(theirs(), (n, channels, side, side))
            own = jax_time(ours, (n, side, side, channels))
            ratios.append(own / peer)
            print(
                f"{name}, {n} x {side} x {side} x {channels}: {1e3 * own:.0f} ms, "
                f"PyTorch {1e3 * peer:.0f} ms",
                flush=True,
            )
        print(f"    {np.median(ratios):.2f} times")


def adamw_step(
    model: nnx.Module, shape: tuple[int, ...], jit: Callable
) -> Callable[[], float]:
    """A function that takes a step with AdamW and returns its seconds."""
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    tx, x = optax.adamw(1e-3), jax.random.uniform(jax.random.key(0), shape)

    @jit
    def step(params, state):
        def loss(params):
            return jnp.sum(nnx.merge(graph, params, rest, copy=True)(x) ** 3)

        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state = params, tx.init(params)

    def timed() -> float:
        nonlocal state
        start = time.perf_counter()
        state = jax.block_until_ready(step(*state))
        return time.perf_counter() - start

    return timed


def compare_gradients(repeats: int) -> None:
    small, large, own = (32, 64), (32, 64, 128), convolution._convolve
    for network, options, (side, channels) in (
        (embedding_networks.EmbeddingCNN, {"channels": small}, (32, 1)),
        (embedding_networks.EmbeddingCNN, {"channels": large}, (32, 1)),
        (embedding_networks.EmbeddingResNet, {}, (64, 3)),
        (embedding_networks.EmbeddingPhotoNet, {"in_channels": 3}, (64, 3)),
        (embedding_networks.MultiScaleCNN, {}, (64, 3)),
    ):
        steps = {}
        for how, jit in (("convolution.jit", convolution.jit), ("jax.jit", jax.jit)):
            for name, convolved in (("own", own), ("XLA's", convolution._by_xla)):
                convolution._convolve = convolved
                model = network(128, **options, rngs=nnx.Rngs(0))
                step = adamw_step(model, (160, side, side, channels), jit)
                step()
                steps[f"{name}, {how}"] = step
        convolution._convolve = own
        times = [[step() for step in steps.values()] for _ in range(repeats)]
        medians = np.median(times, axis=0)
        print(f"{network.__name__} {options}: {1e3 * medians[0]:.0f} ms")
        for name, seconds in zip(steps, medians):
            print(f"    {name:>22}: {seconds / medians[0]:.2f} times", flush=True)


def fit_time(source, repeats: int) -> float:
    """Seconds between two steps of `fit`."""
    model = embedding_networks.EmbeddingResNet(128, rngs=nnx.Rngs(0))
    lines = loop.fit(
        model,
        optax.adam(1e-3),
        source,
        steps=repeats + 2,
        augment=defaults.PHOTOS,
        log_every=1,
        progress=False,
    )
    moments = [time.perf_counter() for _ in lines]
    # The first step compiles.
    return float(np.median(np.diff(moments)[1:]))


if __name__ == "__main__":
    main()
