"""
Digits in two dimensions, before and after
==========================================

A network with two outputs, not of unit norm, trains for some seconds on digits of some
writers. The figure shows digits of other writers: above, the two directions in which
pixels vary most, and below, the two outputs of the network.
"""

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

import tripletjax as tj

pixels, digits = load_digits(return_X_y=True)
pixels, digits = jnp.asarray(pixels / 16, jnp.float32), jnp.asarray(digits)
half = len(digits) // 2


class Network(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.first = nnx.Linear(64, 256, rngs=rngs)
        self.second = nnx.Linear(256, 128, rngs=rngs)
        self.out = nnx.Linear(128, 2, rngs=rngs)

    def __call__(self, x):
        return self.out(jax.nn.relu(self.second(jax.nn.relu(self.first(x)))))


@nnx.jit
def step(model, optimizer, x, labels):
    def loss(model):
        return tj.blockwise.batch_all_loss(model(x), labels, margin=1.0)

    value, gradient = nnx.value_and_grad(loss)(model)
    optimizer.update(model, gradient)
    return value


model = Network(nnx.Rngs(0))
optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)
random = np.random.default_rng(0)
for _ in range(600):
    rows = random.integers(0, half, 128)
    step(model, optimizer, pixels[rows], digits[rows])

# %%
# Both are measured in their two dimensions.

unseen = pixels[half:]
directions = jnp.linalg.svd(pixels[:half] - pixels[:half].mean(0))[2][:2]
views = {"pixels, two directions": unseen @ directions.T, "trained": model(unseen)}
figure, axes = plt.subplots(2, 1, figsize=(6, 9), layout="constrained")
for panel, (name, x) in zip(axes, views.items()):
    metrics = tj.retrieval.evaluate(x, digits[half:])
    dots = panel.scatter(*np.asarray(x).T, c=digits[half:], cmap="tab10", s=8)
    panel.set_title(
        f"{name}\nMAP@R {100 * metrics.map_at_r:.0f} %, "
        f"nearest right {100 * metrics.precision_at_1:.0f} %"
    )
    panel.set_xticks([])
    panel.set_yticks([])
figure.colorbar(dots, ax=axes, ticks=range(10), label="digit")
figure.suptitle("Digits of unseen writers")
plt.show()
