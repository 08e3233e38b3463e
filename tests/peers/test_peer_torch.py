"""torch.nn: explicit triplets."""

import numpy as np
import pytest
from peer_tools import assert_same, embeddings

import tripletjax as tj

torch = pytest.importorskip("torch")
functional = torch.nn.functional


def split(x):
    return x[:5], x[5:10], x[10:15]


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("margin", [0.1, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_euclidean(seed, margin, swap):
    # torch adds eps to every component of the difference; 1e-6 unless told.
    assert_same(
        lambda x: tj.triplet_margin_loss(*split(x), margin=margin, swap=swap),
        lambda x: functional.triplet_margin_loss(
            *split(x), margin=margin, p=2, swap=swap, eps=0.0
        ),
        embeddings(seed),
    )


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize(
    ("metric", "distance"),
    [
        (tj.cosine, lambda a, b: 1 - functional.cosine_similarity(a, b)),
        (tj.manhattan, lambda a, b: (a - b).abs().sum(-1)),
        (tj.squared_euclidean, lambda a, b: (a - b).square().sum(-1)),
    ],
    ids=["cosine", "manhattan", "squared"],
)
def test_other_distances(metric, distance, swap):
    assert_same(
        lambda x: tj.triplet_margin_loss(
            *split(x), margin=0.5, metric=metric, swap=swap
        ),
        lambda x: functional.triplet_margin_with_distance_loss(
            *split(x), distance_function=distance, margin=0.5, swap=swap
        ),
        embeddings(0),
    )


def test_their_distance_of_equal_vectors_is_not_zero():
    x = torch.ones(1, 2)
    assert float(functional.pairwise_distance(x, x)) > 1e-6
    assert tj.euclidean.paired(np.ones((1, 2)), np.ones((1, 2)))[0] == 0
