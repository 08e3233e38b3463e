"""Cross-batch memory: small batches compared with embeddings of earlier batches.

A batch of six images has few negatives. A memory adds the embeddings of earlier
batches, from the network at that time, or from a copy that follows the network slowly,
as in MoCo. This script trains the same network without a memory and with each of the
two, on the digits of `examples/train.py`:

    python examples/memory.py                   # semi-hard: the memory helps
    python examples/memory.py --classes 10      # larger batches: the gain is smaller
    python examples/memory.py --loss hard       # batch-hard: the memory does harm
"""

import argparse
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

import tripletjax as tj

pixels, digits = load_digits(return_X_y=True)
images, labels = np.asarray(pixels, np.float32) / 16, np.asarray(digits, np.int32)
half = len(images) // 2  # The second half was written by other people.


class Network(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(64, 128, rngs=rngs)
        self.out = nnx.Linear(128, 32, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.out(jax.nn.relu(self.hidden(x)))
        return tj.normalize(x)


def batches(classes: int, seed: int):
    """Some classes with two images each."""
    random = np.random.default_rng(seed)
    of_class = [np.flatnonzero(labels[:half] == c) for c in range(10)]
    while True:
        chosen = random.choice(10, classes, replace=False)
        yield np.concatenate(
            [random.choice(of_class[c], 2, replace=False) for c in chosen]
        )


tx = optax.adam(1e-3)
LOSSES = {
    "semi-hard": tj.blockwise.batch_semi_hard_loss,
    "hard": functools.partial(tj.blockwise.batch_hard_loss, hinge=jax.nn.softplus),
}


# A donated memory is written in place.
@functools.partial(
    jax.jit, static_argnames=("graph", "decay", "batch_loss"), donate_argnames="memory"
)
def train_step(params, slow, optimizer, memory, x, y, *, graph, decay, batch_loss):
    def loss_of(params):
        embeddings = nnx.merge(graph, params)(x)
        pairs = {}
        if memory is not None:
            # The batch and the memory; no anchor is its own positive.
            pairs = tj.memory.references(memory, embeddings, y)
        return batch_loss(embeddings, y, margin=0.2, **pairs)

    loss, gradients = jax.value_and_grad(loss_of)(params)
    updates, optimizer = tx.update(gradients, optimizer, params)
    params = optax.apply_updates(params, updates)
    slow = optax.incremental_update(params, slow, 1 - decay)
    if memory is not None:
        memory = tj.memory.push(memory, nnx.merge(graph, slow)(x), y)
    return params, slow, optimizer, memory, loss


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--loss", choices=LOSSES, default="semi-hard")
parser.add_argument("--classes", type=int, default=3, help="classes of a batch")
parser.add_argument("--steps", type=int, default=400)
parser.add_argument("--size", type=int, default=400, help="embeddings in the memory")
parser.add_argument("--seeds", type=int, default=3)
options = parser.parse_args()

for name, size, decay in (
    ("no memory", 0, 0.0),
    ("of the network", options.size, 0.0),
    ("of a slow copy", options.size, 0.99),
):
    scores = []
    for seed in range(options.seeds):
        graph, params = nnx.split(Network(nnx.Rngs(seed)))
        slow, optimizer = params, tx.init(params)
        memory = tj.memory.create(size, 32, label_dtype=jnp.int32) if size else None
        for _, rows in zip(range(options.steps), batches(options.classes, seed)):
            params, slow, optimizer, memory, loss = train_step(
                *(params, slow, optimizer, memory, images[rows], labels[rows]),
                graph=graph,
                decay=decay,
                batch_loss=LOSSES[options.loss],
            )
        x = nnx.merge(graph, params)(jnp.asarray(images[half:]))
        scores.append(100 * tj.retrieval.evaluate(x, labels[half:]).map_at_r)
    print(f"{name:<16}MAP@R {np.mean(scores):.1f} +- {np.std(scores):.1f} %")
