"""The measures of Deep Ranking, by their definitions."""

import functools

import jax
import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import unless_slow

from tripletjax import euclidean, manhattan, relevance_triplets, retrieval


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


@pytest.mark.parametrize("seed", unless_slow(range(4), [0]))
def test_triplets_are_drawn_as_often_as_they_should(seed):
    random = np.random.default_rng(seed)
    r = np.round(random.random((6, 6)) * 3, 1).astype(np.float32)
    r[random.random((6, 6)) < 0.2] = 0
    categories = np.array([0, 0, 0, 0, 1, 1])
    options = {"cap": 2.0, "gap": 0.5, "out_of_category": 0.3}
    size = 100_000
    got = relevance_triplets(jax.random.key(seed), r, categories, size=size, **options)
    expected = oracles.relevance_probabilities(
        r.tolist(), categories, *options.values()
    )
    valid = np.asarray(got.valid)
    drawn = np.stack(got[:3], axis=1)[valid]
    counts = dict.fromkeys(expected, 0)
    for triplet in map(tuple, drawn.tolist()):
        counts[triplet] += 1
    for triplet, chance in expected.items():
        spread = 5 * np.sqrt(chance * (1 - chance) / size) + 1e-5
        assert abs(counts[triplet] / size - chance) < spread
    assert valid.mean() == pytest.approx(sum(expected.values()), abs=0.01)
    a, p, n = drawn.T
    other = categories[n] != categories[a]
    assert (categories[p] == categories[a]).all()
    assert (other | (r[a, p] - r[a, n] >= 0.5)).all()


def test_padding_is_not_drawn_and_nothing_is_not_valid():
    r, categories = np.ones((4, 4), np.float32), np.array([0, 0, 1, 0])
    where = np.array([True, True, True, False])
    draw = functools.partial(relevance_triplets, jax.random.key(0), size=50)
    got = draw(r, categories, where=where)
    assert np.asarray(got.valid).all()
    assert (np.stack(got[:3]) != 3).all()
    assert (np.asarray(got.negative) == 2).all()
    assert not np.asarray(draw(0 * r, categories).valid).any()
    # Equally relevant ones of one category are no triplet.
    assert not np.asarray(draw(r, 0 * categories).valid).any()
    got = jax.jit(jax.vmap(lambda r: draw(r, categories)))(np.stack([r, r]))
    assert got.valid.shape == (2, 50)
    for relevance, labels, options, words in (
        (r[:3], categories, {}, r"relevance must be \[n, n\]"),
        (r, categories[:3], {}, "categories must have one entry"),
        (r, categories, {"size": 0}, "size must be at least 1"),
        (r, categories, {"gap": -1.0}, "gap"),
        (r, categories, {"where": where.astype(int)}, "where must be boolean"),
    ):
        with pytest.raises((TypeError, ValueError), match=words):
            draw(relevance, labels, **options)
