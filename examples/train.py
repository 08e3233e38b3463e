"""Train an embedding of handwritten digits with a triplet loss: a script to copy.

`tripletjax train` also reads your folders, augments images, saves checkpoints and draws
pictures.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits
from tqdm import tqdm

import tripletjax as tj

STEPS, CLASSES, PER_CLASS, MARGIN = 600, 10, 8, 0.2

# The data: 8 x 8 pixels. The second half was written by other people than the first.
pixels, digits = load_digits(return_X_y=True)
images = np.asarray(pixels, np.float32).reshape(-1, 8, 8, 1) / 16
labels = np.asarray(digits, np.int32)
half = len(images) // 2
train_images, train_labels = images[:half], labels[:half]
test_images, test_labels = jnp.asarray(images[half:]), labels[half:]


class CNN(nnx.Module):
    """From images to unit vectors, so that the margin has a fixed scale."""

    def __init__(self, dim: int, rngs: nnx.Rngs):
        self.first = nnx.Conv(1, 32, (3, 3), rngs=rngs)
        self.second = nnx.Conv(32, 64, (3, 3), rngs=rngs)
        self.norm = nnx.LayerNorm(64, rngs=rngs)
        self.head = nnx.Linear(4 * 4 * 64, dim, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.max_pool(nnx.relu(self.first(x)), (2, 2), (2, 2))
        x = nnx.relu(self.norm(self.second(x)))
        x = self.head(x.reshape(len(x), -1))
        return tj.normalize(x)


# Batches of P classes with K images each: every anchor has K - 1 positives.
def batches(labels: np.ndarray, seed: int = 0):
    random = np.random.default_rng(seed)
    of_class = [np.flatnonzero(labels == c) for c in np.unique(labels)]
    while True:
        chosen = random.choice(len(of_class), CLASSES, replace=False)
        yield np.concatenate(
            [random.choice(of_class[c], PER_CLASS, replace=False) for c in chosen]
        )


def shifted(key: jax.Array, x: jax.Array) -> jax.Array:
    """Move each image by up to a pixel, against memorizing."""
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    crop = lambda x, start: jax.lax.dynamic_slice(x, (*start, 0), (8, 8, 1))  # noqa: E731
    return jax.vmap(crop)(padded, jax.random.randint(key, (len(x), 2), 0, 3))


def loss_fn(model: CNN, x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    # In blocks, without an n x n matrix: n may be many thousands.
    terms = tj.blockwise.batch_semi_hard_loss(
        model(x), y, margin=MARGIN, reduce_fn=None
    )
    # The share of triplets with a loss above 0, which falls during training.
    active = terms.active.sum() / terms.valid.sum()
    return tj.mean_valid(terms), active


@nnx.jit
def train_step(model: CNN, optimizer: nnx.Optimizer, x, y, step):
    x = shifted(jax.random.fold_in(jax.random.key(0), step), x)
    grad_fn = nnx.value_and_grad(loss_fn, has_aux=True)
    (loss, active), grads = grad_fn(model, x, y)
    optimizer.update(model, grads)
    return loss, active


def evaluate(name: str, x: jax.Array) -> None:
    metrics = tj.retrieval.evaluate(x, test_labels)
    print(f"{name:<12}MAP@R {100 * metrics.map_at_r:.1f} %", end="  ")
    print(f"recall@1 {100 * metrics.precision_at_1:.1f} %")


model = CNN(32, nnx.Rngs(0))
schedule = optax.warmup_cosine_decay_schedule(0.0, 3e-3, 30, STEPS)
optimizer = nnx.Optimizer(
    model, optax.adamw(schedule, weight_decay=1e-3), wrt=nnx.Param
)
evaluate("raw pixels", test_images.reshape(len(test_images), -1))
bar = tqdm(zip(range(STEPS), batches(train_labels)), total=STEPS, desc="training")
for step, rows in bar:
    x, y = train_images[rows], train_labels[rows]
    loss, active = train_step(model, optimizer, x, y, step)
    if step % 20 == 0:
        bar.set_postfix(loss=f"{loss:.3f}", active=f"{active:.2f}")
evaluate("trained", model(test_images))
