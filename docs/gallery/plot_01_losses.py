"""
Gradients of three losses
=========================

The arrows are the negative gradient of a loss on nine points of three classes: where a
step of gradient descent moves them. Batch-all moves every point that is in an active
triplet, by the mean of them all. Batch-hard moves the farthest positive and the nearest
negative of every anchor alone. Semi-hard has a triplet for every pair of the same
class, and takes the nearest negative that is farther away than the positive.
"""

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import tripletjax as tj

random = np.random.default_rng(3)
labels = np.repeat(np.arange(3), 3)
centres = np.array([[0.0, 0.0], [1.0, 0.2], [0.4, 0.9]])
points = jnp.asarray(centres[labels] + 0.3 * random.normal(size=(9, 2)))

losses = {
    "batch-all": tj.batch_all_loss,
    "semi-hard": tj.batch_semi_hard_loss,
    "batch-hard": tj.batch_hard_loss,
}

# %%
# A loss is a function of a matrix of distances, and JAX differentiates through both.
# All three are drawn to the scale of their longest arrow.

colors = np.array(["C0", "C1", "C2"])
figure, axes = plt.subplots(1, 3, figsize=(6, 4), layout="constrained")
for panel, (name, loss) in zip(axes, losses.items()):

    def of_points(points, loss=loss):
        return loss(tj.euclidean(points), labels, margin=0.3)

    value, gradient = jax.value_and_grad(of_points)(points)
    step = -0.5 * gradient / jnp.linalg.norm(gradient, axis=1).max()
    panel.scatter(*points.T, c=colors[labels], s=50, zorder=2)
    panel.quiver(
        *points.T,
        *step.T,
        angles="xy",
        scale_units="xy",
        scale=1,
        width=0.014,
        zorder=3,
    )
    panel.set_title(f"{name}\nloss {value:.2f}")
    panel.set_aspect("equal")
    panel.margins(0.25)
    panel.set_xticks([])
    panel.set_yticks([])
    panel.set_xlabel("first dimension")
axes[0].set_ylabel("second dimension")
figure.suptitle("Negative gradient of each loss; colours are classes")
plt.show()

# %%
# Batch-all is the safe start, as no single point dominates. Semi-hard is the default of
# :command:`tripletjax train`. Batch-hard uses the fewest triplets and the hardest ones,
# mislabelled images among them.
