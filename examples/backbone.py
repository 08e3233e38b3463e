"""A Flax NNX network of another library, trained by the loop of this library.

Replace `TheirNetwork` by any `nnx.Module` from images to features: of a package such as
jimm or bonsai, or your own. Here it is a small network that reads its weights from a
safetensors file, by rules, as a pretrained network would.

    python examples/backbone.py
"""

import tempfile
from pathlib import Path

import jax
import numpy as np
import optax
from flax import nnx
from safetensors.numpy import save_file

import tripletjax as tj
from tripletjax import learn
from tripletjax.learn.data import sampling
from tripletjax.learn.data.digits import digits


class TheirNetwork(nnx.Module):
    """Stands for a network of another package: from images to 32 features."""

    def __init__(self, rngs: nnx.Rngs):
        self.conv = nnx.Conv(1, 32, (3, 3), strides=2, rngs=rngs)
        self.norm = nnx.BatchNorm(32, use_running_average=True, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        return jax.nn.relu(self.norm(self.conv(images))).mean(axis=(1, 2))


class Embedder(nnx.Module):
    """Their network with a head, from images to unit vectors."""

    def __init__(self, network: nnx.Module, features: int, *, rngs: nnx.Rngs):
        self.network = network
        self.head = nnx.Linear(features, 32, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        x = self.head(self.network(images))
        return tj.normalize(x)


def write_weights() -> Path:
    """Stands for the file that you have, in PyTorch's names and layout."""
    file = Path(tempfile.mkdtemp()) / "theirs.safetensors"
    draw = np.random.default_rng(7)
    arrays = {
        "conv.weight": draw.normal(0, 0.3, (32, 1, 3, 3)),
        "conv.bias": np.zeros(32),
        "norm.weight": np.ones(32),
        "norm.bias": np.zeros(32),
        "norm.running_mean": np.zeros(32),
        "norm.running_var": np.ones(32),
        "norm.num_batches_tracked": np.array(1),
        "classifier.weight": np.ones((10, 32)),
    }
    save_file(arrays, file)
    return file


def main() -> None:
    network = TheirNetwork(nnx.Rngs(0))
    loaded = learn.load_weights(
        network,
        write_weights(),
        {
            r"conv\.weight": "conv.kernel",
            r"conv\.bias": "conv.bias",
            r"norm\.weight": "norm.scale",
            r"norm\.bias": "norm.bias",
            r"norm\.running_(mean|var)": r"norm.\1",
            r"norm\.num_batches_tracked|classifier\.weight": None,
        },
    )
    print(
        f"{loaded.parameters:,} parameters; unused arrays: {', '.join(loaded.unused)}"
    )

    images, labels = digits()
    model = Embedder(network, 32, rngs=nnx.Rngs(0))
    batches = sampling.ImageBatches(images[:898], labels[:898], 10, 8)
    for line in learn.fit(model, optax.adam(3e-3), batches, steps=200, log_every=50):
        print({name: round(value, 3) for name, value in line.items()})
    x = learn.embed_images(model, images[898:])
    recall = tj.retrieval.recall_at_k(x, labels[898:], ks=(1,))
    print(f"recall@1 of images of other writers: {float(recall[1]):.3f}")


if __name__ == "__main__":
    main()
