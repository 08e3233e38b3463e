"""The measures of Deep Ranking, by their definitions."""

import jax
import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tripletjax import euclidean, manhattan, retrieval


def problem(seed, tied, n=12, t=20):
    random = np.random.default_rng(seed)
    x = random.normal(size=(n, 2))
    x = np.float32(np.round(x) if tied else x)
    triplets = np.stack([random.permutation(n)[:3] for _ in range(t)])
    return x, triplets, random.integers(0, 2, n), random.random(t) < 0.8


@settings(max_examples=40)
@given(seed=st.integers(0, 2**32 - 1), tied=st.booleans(), k=st.sampled_from([1, 4]))
def test_order_and_score_are_their_definitions(seed, tied, k):
    x, triplets, groups, where = problem(seed, tied)
    where[0] = True
    for metric, distance in (
        (euclidean, oracles.euclidean),
        (manhattan, oracles.manhattan),
    ):
        d = oracles.matrix(distance, x)
        d = np.round(np.array(d), 5).tolist()
        got = retrieval.similarity_precision(x, triplets, metric=metric, where=where)
        expected = oracles.similarity_precision(d, triplets[where].tolist())
        np.testing.assert_allclose(got, expected, rtol=1e-6)
        for of in (None, groups):
            found = retrieval.score_at_top_k(
                x, triplets, k=k, groups=of, metric=metric, where=where
            )
            pools = np.zeros(len(x)) if of is None else of
            score, count = oracles.score_at_top_k(
                d, triplets[where].tolist(), k, pools.tolist()
            )
            assert (found.score, found.count) == (score, count)


def test_they_compose():
    x, triplets, *_ = problem(0, False)
    both = np.stack([x, 2 * x])
    several = jax.vmap(lambda x: retrieval.score_at_top_k(x, triplets, k=3))(both)
    one = jax.jit(lambda x: retrieval.score_at_top_k(x, triplets, k=3))(x)
    assert several.score[0] == several.score[1] == one.score
    shares = jax.vmap(lambda x: retrieval.similarity_precision(x, triplets))(both)
    assert shares[0] == retrieval.similarity_precision(x, triplets)


def test_nothing_and_what_is_not_a_number():
    x, triplets, *_ = problem(0, False)
    none = np.zeros(len(triplets), bool)
    assert np.isnan(retrieval.similarity_precision(x, triplets, where=none))
    found = retrieval.score_at_top_k(x, triplets, where=none)
    assert (found.score, found.count) == (0, 0)
    x[triplets[0, 1]] = np.nan
    assert np.isnan(retrieval.similarity_precision(x, triplets))
    assert np.isnan(retrieval.score_at_top_k(x, triplets).score)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"triplets": np.zeros((3, 2), int)}, r"triplets must be \[t, 3\]"),
        ({"triplets": np.zeros((3, 3))}, "triplets must be integers"),
        ({"where": np.ones(2, bool)}, "where must have one entry"),
        ({"embeddings": np.zeros(3, np.float32)}, "embeddings must be|dimensions"),
        ({"groups": np.zeros(2, int)}, "groups must have one entry"),
        ({"k": 0}, "k must be at least 1"),
    ],
)
def test_bad_arguments_are_named(change, words):
    options = {
        "embeddings": np.zeros((4, 2), np.float32),
        "triplets": np.zeros((3, 3), int),
    } | change
    x, triplets = options.pop("embeddings"), options.pop("triplets")
    with pytest.raises((TypeError, ValueError), match=words):
        retrieval.score_at_top_k(x, triplets, **options)
