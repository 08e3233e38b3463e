"""Pretrained networks: images per second beside PyTorch, and a head on kept features.

python benchmarks/backbone.py            # needs the peers group, and facenet-pytorch

For each network, random weights of the peer are written as safetensors and loaded here.
Both networks then embed the same images, in turn, and the best of three counts. The
head is trained as in a frozen run, on features of 10,000 random images.
"""

import argparse
import contextlib
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import optax
from flax import nnx

from tripletjax import learn
from tripletjax.learn.data import sampling
from tripletjax.learn.data.image_array import KeptFeatures
from tripletjax.learn.networks import backbones, heads
from tripletjax.learn.training import loop, objectives
from tripletjax.learn.training.feature_cache import AnyView

BATCH = 16
IMAGES, CLASSES, VIEWS, FEATURES = 10_000, 500, 4, 512


def networks() -> dict[str, tuple[Callable, int]]:
    """The peer's network, and the size of images."""
    import torch

    # Builds of torchvision for GPUs lack their operators beside a torch for CPUs.
    try:
        import torchvision
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor a, Tensor b, float c) -> Tensor")
        import torchvision

        networks.library = library
    import timm
    from facenet_pytorch import InceptionResnetV1

    def dino() -> torch.nn.Module:
        name = "vit_small_patch14_dinov2"
        return timm.create_model(name, pretrained=False, dynamic_img_size=True)

    models = torchvision.models
    return {
        "ResNet-18": (models.resnet18, 224),
        "ResNet-50": (models.resnet50, 224),
        "ConvNeXt-Tiny": (models.convnext_tiny, 224),
        "ViT-S/14 (DINOv2)": (dino, 224),
        "Inception-ResNet-v1": (InceptionResnetV1, 160),
    }


def best_of(call: Callable[[], object], times: int = 3) -> float:
    call()
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return min(taken)


def compare() -> None:
    import torch
    from safetensors.torch import save_file

    draw = np.random.default_rng(0)
    print(f"{'images/s, batches of 16':<26}{'here':>8}{'PyTorch':>9}{'ratio':>7}")
    for name, (make, size) in networks().items():
        model = make().eval()
        state = {key: value.contiguous() for key, value in model.state_dict().items()}
        with tempfile.TemporaryDirectory() as folder:
            save_file(state, Path(folder) / "weights.safetensors")
            network, _ = backbones.load(Path(folder) / "weights.safetensors")
        images = draw.normal(size=(BATCH, size, size, 3)).astype(np.float32)
        theirs = torch.tensor(images.transpose(0, 3, 1, 2))
        theirs = theirs.contiguous(memory_format=torch.channels_last)
        model = model.to(memory_format=torch.channels_last)

        def ours(network: nnx.Module = network, images: np.ndarray = images) -> None:
            learn.embed_images(network, images).block_until_ready()

        def peer(model: Callable = model, theirs: torch.Tensor = theirs) -> None:
            with torch.inference_mode():
                model(theirs)

        rates = [BATCH / best_of(call) for call in (ours, peer)]
        ratio = rates[0] / rates[1]
        print(f"{name:<26}{rates[0]:8.1f}{rates[1]:9.1f}{ratio:7.2f}", flush=True)


def head(steps: int) -> None:
    """What a frozen run does once features are kept."""
    draw = np.random.default_rng(0)
    labels = np.arange(IMAGES) % CLASSES
    middles = draw.normal(size=(CLASSES, 1, FEATURES))
    noise = draw.normal(size=(IMAGES, VIEWS, FEATURES))
    features = (middles[labels] + 2 * noise).astype(np.float32)
    images = KeptFeatures(np.zeros((IMAGES, 1, 1, 1), np.uint8), features)
    start = time.perf_counter()
    model = heads.Head(FEATURES, 128, mirror=True, rngs=nnx.Rngs(0))
    model.fit(features[:2048, 0])
    lines = loop.fit(
        model,
        optax.adamw(1e-3),
        sampling.ImageBatches(images, labels, 40, 4),
        steps=steps,
        loss=objectives.batch_loss(),
        augment=AnyView(),
        ema_decay=0.98,
        progress=False,
    )
    *_, last = lines
    learn.embed_images(model, images).block_until_ready()
    taken = time.perf_counter() - start
    print(
        f"\na head on kept features of {IMAGES:,} images, {steps} steps of 160 and all "
        f"embedded: {taken:.1f} s (loss {last['loss']:.3f})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--head-alone", action="store_true")
    options = parser.parse_args()
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}")
    if not options.head_alone:
        with contextlib.suppress(KeyboardInterrupt):
            compare()
    head(options.steps)


if __name__ == "__main__":
    main()
