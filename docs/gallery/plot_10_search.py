"""
Search: a contact sheet
=======================

`retrieval.nearest_neighbors` finds the nearest of any number of references, block by
block. Queries are of other writers than the references. Hits of the right digit have a
blue frame, others a dashed orange one.
"""

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

import tripletjax as tj

pixels, digits = load_digits(return_X_y=True)
half = len(digits) // 2
x = LinearDiscriminantAnalysis().fit(pixels[:half], digits[:half]).transform(pixels)
x = jnp.asarray(x / np.linalg.norm(x, axis=1, keepdims=True), jnp.float32)

# %%
# For each of six digits the most difficult query that has any right one among its six
# nearest.

distances, neighbors = tj.retrieval.nearest_neighbors(x[half:], x[:half], 6)
right = digits[:half][np.asarray(neighbors)] == digits[half:, None]
worst = [
    min(
        np.flatnonzero((digits[half:] == digit) & right.any(1)),
        key=lambda i: sum(right[i]),
    )
    for digit in (1, 3, 5, 7, 8, 9)
]

figure, axes = plt.subplots(len(worst), 7, figsize=(6, 6.8), layout="constrained")
for line, query in zip(axes, worst):
    shown = [half + query, *np.asarray(neighbors[query])]
    for place, (panel, row) in enumerate(zip(line, shown)):
        panel.imshow(pixels[row].reshape(8, 8), cmap="gray_r")
        panel.set_xticks([])
        panel.set_yticks([])
        if place:
            good = right[query, place - 1]
            panel.spines[:].set(
                color="C0" if good else "C1",
                linestyle="-" if good else "--",
                linewidth=2,
            )
            panel.set_xlabel(f"{distances[query, place - 1]:.2f}")
    line[0].set_ylabel(f"{digits[half + query]}", rotation=0, labelpad=12)
figure.suptitle("Difficult queries and their nearest, with distances")
plt.show()

# %%
# `tripletjax search` keeps an index of a folder, and draws such sheets of its images.
