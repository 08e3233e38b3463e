"""
Five meanings of semi-hard
==========================

FaceNet chose negatives "further away from the anchor than the positive exemplar, but
still hard because the squared distance is close to the anchor-positive distance".
Libraries read that in five ways. Here an anchor stands at 0 on a line, with three
positives and five negatives; each row shows which negatives one reading takes, and for
which positive.
"""

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import tripletjax as tj
from tripletjax import mining

margin = 0.4
points = np.array([0.0, 0.8, 1.5, 2.6, 0.5, 1.0, 1.15, 1.7, 2.4])
labels = np.array([0, 0, 0, 0, 1, 2, 3, 4, 5])
distances = tj.euclidean(jnp.asarray(points)[:, None])

# %%
# Every reading is a miner, or a miner with an option. `batch_semi_hard_triplets` is
# what `batch_semi_hard_loss` uses.

readings = {
    "per pair, the nearest beyond the positive;\nif there is none, the farthest": (
        tj.batch_semi_hard_triplets(distances, labels)
    ),
    "per pair, the nearest beyond the positive,\nor none (fallback=False)": (
        tj.batch_semi_hard_triplets(distances, labels, fallback=False)
    ),
    "all beyond the positive by at most\nthe margin (semi_hard_band)": tj.all_triplets(
        labels, size=100, distances=distances, band=tj.semi_hard_band(margin)
    ),
    "per anchor, the nearest beyond its nearest\npositive (batch_easy_hard_triplets)": (
        tj.batch_easy_hard_triplets(distances, labels)
    ),
    "per anchor, the nearest beyond its farthest\npositive (hardest_positive)": (
        tj.batch_easy_hard_triplets(
            distances, labels, positive=mining.hardest_positive, fallback=True
        )
    ),
    "per pair, a random one within the margin\n(random_semi_hard_triplets)": (
        tj.random_semi_hard_triplets(
            jax.random.key(1), distances, labels, margin=margin
        )
    ),
}

# %%
# No two rows are the same. The second is a variant of the first.

colors = {1: "C0", 2: "C2", 3: "C3"}
figure, axes = plt.subplots(len(readings), 1, figsize=(6, 7.5), layout="constrained")
for panel, (name, triplets) in zip(axes, readings.items()):
    panel.axhline(0, color="0.8", zorder=0)
    panel.plot(0, 0, "ko", markersize=10)
    for positive, color in colors.items():
        panel.plot(points[positive], 0, "o", color=color, markersize=9)
    panel.plot(
        points[4:], np.zeros(5), "x", color="C1", markersize=9, markeredgewidth=2
    )
    rows = np.ravel(triplets.valid) & (np.ravel(triplets.anchor) == 0)
    chosen = np.stack([np.ravel(triplets.positive), np.ravel(triplets.negative)], 1)
    for positive, negative in np.unique(chosen[rows], axis=0):
        there, back = points[negative], points[positive]
        panel.annotate(
            "",
            (there, 0.08),
            (back, 0.08),
            arrowprops={
                "arrowstyle": "->",
                "color": colors[positive],
                "linewidth": 1.8,
                "connectionstyle": f"arc3,rad={-0.6 if there > back else 0.6}",
            },
        )
    panel.set_xlim(-0.15, 2.8)
    panel.set_ylim(-0.15, 0.45)
    panel.set_xticks([])
    panel.set_yticks([])
    panel.set_title(name, loc="left")
    panel.spines[:].set_visible(False)
figure.suptitle(
    "Anchor (black), positives (dots), negatives (crosses).\n"
    "An arrow is a triplet: from its positive to its negative."
)
plt.show()
