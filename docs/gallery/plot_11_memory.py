"""
A memory of earlier batches, against computing them again
=========================================================

A small batch has few negatives. `tj.memory` keeps embeddings of earlier batches as
further references, which cost nothing to make, and are out of date: they come from the
network as it was. How far, and how much that changes the loss, is measured here against
embedding the same images again.
"""

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits

import tripletjax as tj

pixels, digits = load_digits(return_X_y=True)
pixels, digits = jnp.asarray(pixels / 16, jnp.float32), jnp.asarray(digits, jnp.int32)
half = len(digits) // 2
size, batch = 320, 16


def network(params, x):
    x = jax.nn.relu(x @ params["hidden"]) @ params["out"]
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def loss_of(params, rows, memory):
    x = network(params, pixels[rows])
    pairs = tj.memory.references(memory, x, digits[rows])
    return tj.blockwise.batch_semi_hard_loss(x, digits[rows], margin=0.2, **pairs)


@jax.jit
def step(params, memory, rows):
    value, gradient = jax.value_and_grad(loss_of)(params, rows, memory)
    memory = tj.memory.push(memory, network(params, pixels[rows]), digits[rows])
    return jax.tree.map(lambda p, g: p - 0.3 * g, params, gradient), memory, value


@jax.jit
def compared(params, memory, kept, rows):
    """What is kept, and the loss, beside those of the network as it is."""
    again = network(params, pixels[kept])
    fresh = memory._replace(embeddings=again)
    away = jnp.linalg.norm(again - memory.embeddings, axis=1)
    return away, loss_of(params, rows, memory), loss_of(params, rows, fresh)


# %%
# The memory is a ring: the batch of step t lies where t * batch modulo its size says.

first, second = jax.random.split(jax.random.key(0))
params = {
    "hidden": jax.random.normal(first, (64, 128)) / 8,
    "out": jax.random.normal(second, (128, 32)) / 11,
}
memory = tj.memory.create(size, 32, label_dtype=jnp.int32)
random, kept = np.random.default_rng(0), np.zeros(size, int)
ages, losses = {}, []
for number in range(600):
    rows = random.integers(0, half, batch)
    if number >= size // batch and number % 10 == 0:
        away, stale, fresh = compared(params, memory, kept, rows)
        losses.append((number, stale, fresh))
        if number in (20, 100, 500):
            age = (number * batch - 1 - np.arange(size)) % size // batch + 1
            ages[number] = [np.asarray(away)[age == a].mean() for a in range(1, 21)]
    params, memory, _ = step(params, memory, rows)
    kept[(number * batch + np.arange(batch)) % size] = rows

figure, axes = plt.subplots(2, 1, figsize=(6, 8), layout="constrained")
for number, away in ages.items():
    axes[0].plot(range(1, 21), away, "o-", label=f"at step {number}")
axes[0].set_xlabel("age in steps")
axes[0].set_ylabel("distance to what the network makes now")
axes[0].set_title("How far embeddings are out of date")
axes[0].legend()
losses = np.array(losses)
axes[1].plot(losses[:, 0], losses[:, 1], label="references kept")
axes[1].plot(losses[:, 0], losses[:, 2], "--", label="references computed again")
axes[1].set_xlabel("step")
axes[1].set_title("Loss of the same batch")
axes[1].legend()
plt.show()

# %%
# It pays where networks change slowly, which is why :command:`tripletjax train
# --memory` begins after a tenth of the steps. Measured on real runs, it helps small
# batches with semi-hard mining, and harms batch-hard: see the guide on meshes and
# memory.
