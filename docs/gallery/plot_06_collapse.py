"""
Collapse, and how to leave it
=============================

Batch-hard from a cold start may pull everything into one point: there the hardest
positive and the hardest negative are equally far away, the loss is the margin, and it
stays so. This happens in silence, unless the spread of the embeddings is watched.
"""

import functools

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits

import tripletjax as tj

pixels, digits = load_digits(return_X_y=True)
pixels, digits = jnp.asarray(pixels / 16, jnp.float32), jnp.asarray(digits)
half = len(digits) // 2
margin = 0.5


def network(params, x):
    x = jax.nn.relu(x @ params["hidden"]) @ params["out"]
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-6)


def start(key):
    first, second = jax.random.split(key)
    return {
        "hidden": jax.random.normal(first, (64, 128)) / 8,
        "out": jax.random.normal(second, (128, 16)) / 11,
    }


def watched(terms):
    """The loss, and the share of triplets that cost something."""
    return tj.mean_valid(terms), terms.active.sum() / terms.valid.sum()


# %%
# Five ways through the same 300 steps. `selectively_contrastive` drops what a triplet
# with a hard negative pulls together, and pushes its negative alone; the soft margin
# has no point where it costs nothing; a warm start begins with batch-all.

hard = functools.partial(tj.batch_hard_loss, margin=margin, reduce_fn=watched)
everything = functools.partial(tj.batch_all_loss, margin=margin, reduce_fn=watched)
ways = {
    "batch-hard": lambda step: hard,
    "selectively contrastive": lambda step: functools.partial(
        hard, hinge=tj.selectively_contrastive()
    ),
    "soft margin": lambda step: functools.partial(hard, hinge=jax.nn.softplus),
    "batch-all": lambda step: everything,
    "batch-all for 100 steps, then hard": lambda step: (
        everything if step < 100 else hard
    ),
}


@functools.partial(jax.jit, static_argnames="loss")
def descend(params, speed, rows, *, loss):
    def loss_of(params):
        return loss(tj.euclidean(network(params, pixels[rows])), digits[rows])

    (value, active), gradient = jax.value_and_grad(loss_of, has_aux=True)(params)
    speed = jax.tree.map(lambda v, g: 0.9 * v - 0.1 * g, speed, gradient)
    params = jax.tree.map(jnp.add, params, speed)
    return params, speed, value, active


figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
for name, way in ways.items():
    random, losses = np.random.default_rng(0), {}
    params, spread, shares = start(jax.random.key(0)), [], []
    speed = jax.tree.map(jnp.zeros_like, params)
    for number in range(300):
        loss = losses.setdefault(number < 100, way(number))
        rows = random.integers(0, half, 128)
        params, speed, value, active = descend(params, speed, rows, loss=loss)
        if number % 5 == 0:
            report = tj.collapse.report(network(params, pixels[half : half + 256]))
            spread.append(report.mean_distance)
            shares.append(active)
    quality = tj.retrieval.evaluate(network(params, pixels[half:]), digits[half:])
    steps = range(0, 300, 5)
    axes[0].plot(steps, spread, label=f"{name}: MAP@R {100 * quality.map_at_r:.0f} %")
    axes[1].plot(steps, shares)
axes[0].set_title("mean distance of embeddings")
axes[1].set_title("share of active triplets")
for panel in axes:
    panel.set_xlabel("step")
    panel.set_ylim(0, None)
figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
plt.show()

# %%
# Batch-hard lies near one point for most of its steps, and a soft margin does not help.
# It may find out again, as embeddings that are close together still are in some order,
# and the steps until then are lost.
#
# What to watch: `active.sum() / valid.sum()` near 1 with a loss at the margin, and
# `tj.collapse.report`, whose mean distance falls towards 0. `learn.fit` logs both, and
# warns.
