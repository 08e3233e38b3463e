"""
Mining by hardness
==================

Most triplets of a batch teach nothing. The histogram is of all triplets of 120 digits,
as unit-norm pixels. It shows by how much the negative is farther away than the
positive. Hard triplets are left of 0, and semi-hard ones between 0 and the margin. Easy
triplets, beyond the margin, cost nothing. `all_triplets` with a band selects a group.
"""

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits

import tripletjax as tj

pixels, digits = load_digits(return_X_y=True)
x = jnp.asarray(pixels[:120] / np.linalg.norm(pixels[:120], axis=1, keepdims=True))
labels, margin = jnp.asarray(digits[:120]), 0.2
distances = tj.euclidean(x)

# %%
# The size of what is returned is fixed, as everywhere in jitted JAX; `count` says how
# many there were.

bands = {
    "hard": (tj.hard_band(), "C1"),
    "semi-hard": (tj.semi_hard_band(margin), "C0"),
    "easy": (tj.easy_band(margin), "C2"),
}
figure, axes = plt.subplots(layout="constrained")
for name, (band, color) in bands.items():
    found = tj.all_triplets(labels, size=200_000, distances=distances, band=band)
    assert found.count <= 200_000
    gaps = (
        distances[found.anchor, found.negative]
        - distances[found.anchor, found.positive]
    )
    axes.hist(
        np.asarray(gaps)[np.asarray(found.valid)],
        bins=np.arange(-1, 1.2, 0.02),
        color=color,
        label=f"{name}: {found.count:,}",
    )
axes.axvline(0, color="0.3", linewidth=0.8)
axes.axvline(margin, color="0.3", linewidth=0.8, linestyle="--")
axes.set_xlabel("distance to the negative - distance to the positive")
axes.set_ylabel("triplets")
axes.set_title("Triplets of 120 digits by hardness")
axes.legend()
plt.show()

# %%
# The triplets of each miner: one number per triplet, the same gap.

miners = {
    "batch-hard": tj.batch_hard_triplets(distances, labels),
    "semi-hard": tj.batch_semi_hard_triplets(distances, labels),
    "easy positive": tj.batch_easy_hard_triplets(distances, labels),
}
figure, axes = plt.subplots(layout="constrained")
for name, triplets in miners.items():
    gaps = [
        distances[triplets.anchor, j] for j in (triplets.negative, triplets.positive)
    ]
    gaps = np.asarray(gaps[0] - gaps[1])[np.asarray(triplets.valid)]
    axes.hist(gaps, bins=np.arange(-1, 1.2, 0.04), density=True, alpha=0.6, label=name)
axes.set_xlabel("distance to the negative - distance to the positive")
axes.set_ylabel("density")
axes.set_title("What miners take")
axes.legend()
plt.show()
