"""TensorFlow Addons (ended in 2024): its two losses, from what its documentation says.

Semi-hard: for each positive pair the nearest negative farther than the positive, else
the farthest negative; summed and divided by the number of positive pairs. Hard: each
anchor's farthest positive and nearest negative; the mean over anchors.
"""

import numpy as np
import pytest
from peer_tools import LABELS, embeddings, on_matrix, ours

import tripletjax as tj

# Without a positive, theirs counts the anchor or divides 0 by 0; ours leaves it out.
every_labels = pytest.mark.parametrize("name", ["p x k", "two classes"])
every_metric = pytest.mark.parametrize("metric", ["euclidean", "squared_euclidean"])


def matrix(x, metric):
    squared = ((x[:, None] - x[None]) ** 2).sum(-1)
    return squared if metric == "squared_euclidean" else np.sqrt(squared)


@every_metric
@every_labels
@pytest.mark.parametrize("seed", range(3))
def test_semi_hard(seed, name, metric):
    x, labels, costs = embeddings(seed), LABELS[name], []
    d = matrix(x, metric)
    for a in range(16):
        negatives = d[a][labels != labels[a]]
        for p in np.flatnonzero((labels == labels[a]) & (np.arange(16) != a)):
            beyond = negatives[negatives > d[a, p]]
            chosen = beyond.min() if beyond.size else negatives.max()
            costs.append(max(d[a, p] - chosen + 1.0, 0))
    loss = on_matrix(
        tj.batch_semi_hard_loss, labels, metric=getattr(tj, metric), margin=1.0
    )
    np.testing.assert_allclose(ours(loss, x)[0], np.mean(costs), rtol=1e-9)


@every_metric
@every_labels
@pytest.mark.parametrize("seed", range(3))
def test_hard(seed, name, metric):
    x, labels, costs = embeddings(seed), LABELS[name], []
    d = matrix(x, metric)
    for a in range(16):
        same = labels == labels[a]
        costs.append(max(d[a][same].max() - d[a][~same].min() + 1.0, 0))
    loss = on_matrix(tj.batch_hard_loss, labels, metric=getattr(tj, metric), margin=1.0)
    np.testing.assert_allclose(ours(loss, x)[0], np.mean(costs), rtol=1e-9)
