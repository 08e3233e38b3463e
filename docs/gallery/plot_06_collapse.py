"""
Collapse, and how to leave it
=============================

Batch-hard from a cold start may pull everything into one point. There the hardest
positive and the hardest negative are equally far away, and the loss is the margin, for
long or for good. The spread of the embeddings shows it, and the loss alone does not.
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
# Five ways through the same 300 steps. The soft margin has no point where it costs
# nothing. `selectively_contrastive` takes nearest positives and negatives, and where
# the negative is nearer pushes it and pulls nothing. A warm start begins with
# batch-all.


def hard(x, labels, hinge=jax.nn.relu):
    return tj.batch_hard_loss(
        tj.euclidean(x), labels, margin=margin, hinge=hinge, reduce_fn=watched
    )


def soft(x, labels):
    return hard(x, labels, jax.nn.softplus)


def selective(x, labels):
    distances = tj.cosine(x)
    triplets = tj.batch_easy_hard_triplets(
        distances, labels, negative=tj.mining.hardest_negative
    )
    return tj.triplet_loss(
        distances, triplets, hinge=tj.selectively_contrastive(), reduce_fn=watched
    )


def everything(x, labels):
    return tj.batch_all_loss(tj.euclidean(x), labels, margin=margin, reduce_fn=watched)


# By name, the loss of the first 100 steps and of the others.
ways = {
    "batch-hard": (hard, hard),
    "soft margin": (soft, soft),
    "selectively contrastive": (selective, selective),
    "batch-all": (everything, everything),
    "batch-all for 100 steps, then hard": (everything, hard),
}


@functools.partial(jax.jit, static_argnames="loss")
def descend(params, speed, rows, *, loss):
    def loss_of(params):
        return loss(network(params, pixels[rows]), digits[rows])

    (value, active), gradient = jax.value_and_grad(loss_of, has_aux=True)(params)
    speed = jax.tree.map(lambda v, g: 0.9 * v - 0.1 * g, speed, gradient)
    params = jax.tree.map(jnp.add, params, speed)
    return params, speed, value, active


figure, axes = plt.subplots(2, 1, figsize=(6, 8.5), sharex=True, layout="constrained")
for name, (early, late) in ways.items():
    random = np.random.default_rng(0)
    params, spread, shares = start(jax.random.key(0)), [], []
    speed = jax.tree.map(jnp.zeros_like, params)
    for number in range(300):
        loss = early if number < 100 else late
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
axes[1].set_xlabel("step")
for panel in axes:
    panel.set_ylim(0, None)
figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center")
plt.show()

# %%
# Batch-hard lies near one point for most of its steps, and a soft margin does not help.
# It may escape, because even embeddings close together have an order, but the steps
# until then are lost.
#
# To watch: with relu, `active.sum() / valid.sum()` near 1 with a loss at the margin;
# with any cost, the mean distance of `tj.collapse.report`, which falls towards 0. With
# the soft margin and `selectively_contrastive` the share stays at 1 in any case.
# `learn.fit` logs the share and the spread of each batch, and warns.
