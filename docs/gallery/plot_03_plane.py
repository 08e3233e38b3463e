"""
Triplets in the plane, as they train
====================================

Sixty points of six classes begin at random. Each step mines semi-hard triplets among
them and moves the points along the gradient. Lines join anchors with the negatives of
triplets that still cost something: they grow fewer until every class is the margin away
from all others, and then nothing moves.
"""

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.animation import FuncAnimation
from matplotlib.collections import LineCollection

import tripletjax as tj

labels = jnp.arange(60) % 6
margin = 0.5


@jax.jit
def step(points):
    def loss(points):
        terms = tj.blockwise.batch_semi_hard_loss(
            points, labels, margin=margin, reduce_fn=None
        )
        return tj.mean_valid(terms), terms.active.sum() / terms.valid.sum()

    (value, active), gradient = jax.value_and_grad(loss, has_aux=True)(points)
    return points - 4 * gradient, value, active


points = jax.random.normal(jax.random.key(0), (60, 2))
frames = []
for _ in range(180):
    moved, value, active = step(points)
    frames.append((points, value, active))
    points = moved

# %%
# The triplets themselves are mined again for the picture.

figure, axes = plt.subplots(figsize=(6, 6.3), layout="constrained")
lines = axes.add_collection(LineCollection([], colors="0.75", linewidths=0.6))
dots = axes.scatter([], [], s=30, zorder=2)
axes.set_xlim(-3, 3)
axes.set_ylim(-3, 3)
axes.set_aspect("equal")
axes.set(xlabel="first dimension", ylabel="second dimension")


def draw(number):
    points, value, active = frames[number]
    distances = tj.euclidean(points)
    triplets = tj.batch_semi_hard_triplets(distances, labels)
    a, p, n = (np.ravel(x) for x in triplets[:3])
    costs = np.asarray(distances)[a, p] - np.asarray(distances)[a, n] + margin
    some = np.flatnonzero(np.ravel(triplets.valid) & (costs > 0))
    lines.set_segments(np.stack([points[a[some]], points[n[some]]], axis=1))
    dots.set_offsets(points)
    dots.set_array(labels)
    dots.set_clim(0, 5)
    axes.set_title(f"step {number}: loss {value:.3f}, active triplets {active:.0%}")
    return lines, dots


animation = FuncAnimation(figure, draw, frames=range(0, 180, 6), interval=150)
plt.show()
