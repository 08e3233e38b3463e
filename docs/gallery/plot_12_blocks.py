"""
Half of a matrix, block by block
================================

`tj.blockwise` computes a loss of all pairs without a matrix of distances. Distances are
symmetric, so that half of the blocks are enough: each product serves the anchors of its
rows, and those of its columns. A block is used and discarded. The loss keeps some
numbers of each anchor.
"""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import Rectangle

blocks, classes = 6, 12


def empty(panel, title):
    """A matrix of 6 x 6 blocks with the pairs of the same class on its diagonal."""
    for line in range(blocks + 1):
        panel.axhline(line, color="0.85", linewidth=0.8, zorder=0)
        panel.axvline(line, color="0.85", linewidth=0.8, zorder=0)
    size = blocks / classes
    for number in range(classes):
        at = number * size
        panel.add_patch(Rectangle((at, at), size, size, color="C2", alpha=0.8))
    panel.set(xlim=(0, blocks), ylim=(blocks, 0), xticks=[], yticks=[], aspect="equal")
    panel.set_title(title)


def block(panel, row, column, color):
    panel.add_patch(
        Rectangle((column, row), 1, 1, facecolor=color, alpha=0.35, edgecolor=color)
    )


# %%
# Left: the loss computes the 21 blocks on and above the diagonal, of 36. The green
# squares are pairs of the same class, which lie together here, as the batch is in order
# of class. Their distances come first, from differences of vectors. Middle: one step.
# The product of blocks 1 and 4 serves the anchors of block 1 along its rows, and those
# of block 4 along its columns. Right: for large classes, a panel of all references for
# some anchors at a time.

figure, axes = plt.subplots(1, 3, figsize=(6, 2.9), layout="constrained")
empty(axes[0], "half of\nthe blocks")
for row in range(blocks):
    for column in range(row, blocks):
        block(axes[0], row, column, "C0")
empty(axes[1], "a tile, for anchors\nboth ways")
block(axes[1], 1, 4, "C0")
arrow = {"arrowstyle": "->", "color": "C1", "linewidth": 2}
axes[1].annotate("", (0.1, 1.5), (4, 1.5), arrowprops=arrow)
axes[1].annotate("", (4.5, 5.9), (4.5, 2), arrowprops=arrow)
empty(axes[2], "a panel, for\nlarge classes")
for column in range(blocks):
    block(axes[2], 2, column, "C1")
figure.suptitle("Rows are anchors, columns are references")
plt.show()

# %%
# Memory for vectors of 128 numbers and blocks of 512: the bytes of a matrix, and those
# of the vectors and one block.

sizes = 2 ** np.arange(8, 21)
figure, axes = plt.subplots(layout="constrained")
axes.loglog(sizes, 4 * sizes**2 / 2**20, label="n x n matrix")
axes.loglog(sizes, 4 * (sizes * 128 + 512**2) / 2**20, label="vectors and a block")
axes.set_xlabel("images in the batch")
axes.set_ylabel("MiB in float32")
axes.set_title("By count, not measured")
axes.legend()
plt.show()
