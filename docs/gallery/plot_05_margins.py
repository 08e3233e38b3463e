"""
A sweep of margins by vmap
==========================

The margin of every loss may be traced, so that whole trainings with different margins
are one `jax.vmap`: sixteen networks, two seeds of eight margins, train on digits at
once.
"""

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits

import tripletjax as tj

pixels, digits = load_digits(return_X_y=True)
pixels, digits = jnp.asarray(pixels / 16, jnp.float32), jnp.asarray(digits)
half = len(digits) // 2  # The second half was written by other people.


def network(params, x):
    x = jax.nn.relu(x @ params["hidden"]) @ params["out"]
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-6)


def trained(margin, key, steps=300):
    """MAP@R on other writers, after some steps of gradient descent with momentum."""
    first, second, third = jax.random.split(key, 3)
    params = {
        "hidden": jax.random.normal(first, (64, 128)) / 8,
        "out": jax.random.normal(second, (128, 16)) / 11,
    }

    def loss(params, rows):
        embeddings = network(params, pixels[rows])
        return tj.batch_semi_hard_loss(
            tj.euclidean(embeddings), digits[rows], margin=margin
        )

    def step(carry, key):
        params, speed = carry
        rows = jax.random.randint(key, (64,), 0, half)
        gradient = jax.grad(loss)(params, rows)
        speed = jax.tree.map(lambda v, g: 0.9 * v - 0.1 * g, speed, gradient)
        return (jax.tree.map(jnp.add, params, speed), speed), None

    keys = jax.random.split(third, steps)
    (params, _), _ = jax.lax.scan(
        step, (params, jax.tree.map(jnp.zeros_like, params)), keys
    )
    embeddings = network(params, pixels[half:])
    return tj.retrieval.evaluate(embeddings, digits[half:]).map_at_r


# %%
# Over seeds and over margins, compiled once.

margins = jnp.array([0.0, 0.02, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6])
keys = jax.random.split(jax.random.key(0), 2)
sweep = jax.jit(jax.vmap(jax.vmap(trained, (None, 0)), (0, None)))
found = 100 * np.asarray(sweep(margins, keys))

figure, axes = plt.subplots(layout="constrained")
axes.plot(range(len(margins)), found.mean(axis=1), "o-")
axes.vlines(range(len(margins)), found.min(axis=1), found.max(axis=1), alpha=0.5)
axes.set_xticks(range(len(margins)), [f"{margin:g}" for margin in np.asarray(margins)])
axes.set_xlabel("margin between unit-norm vectors (steps of about 2 times)")
axes.set_ylabel("MAP@R of unseen writers, in %")
axes.set_title("Two seeds of eight margins, trained at once")
plt.show()

# %%
# Unit vectors are at most 2 apart: a margin has a scale only where lengths are fixed.
# With a margin of 0 next to nothing is learnt, as semi-hard negatives are farther than
# the positive by choice. From 0.02 to 0.4 the mean of both seeds rises from about 80 to
# 87 %. Margins from 0.8 on can hardly be met, and the seeds differ by several points.
