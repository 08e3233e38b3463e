"""Re-ranking and query expansion against loops in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from tripletjax import retrieval


def clusters(n, seed=0):
    random = np.random.default_rng(seed)
    x = random.normal(size=(6, 5))[random.integers(0, 6, n)]
    x = x + 0.6 * random.normal(size=(n, 5))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def check(got, expected):
    """Compare with re-ranked distances ``[n, m]`` of the candidates."""
    distances, indices = map(np.asarray, got)
    picked = np.take_along_axis(expected, indices, axis=1)
    np.testing.assert_allclose(distances, picked, atol=2e-6)
    assert (np.diff(distances) >= 0).all()
    assert all(len(set(row)) == len(row) for row in indices.tolist())


@pytest.mark.parametrize(
    ("k1", "k2", "weight"), [(20, 6, 0.3), (5, 1, 0.0), (8, 3, 0.5), (1, 2, 0.3)]
)
def test_all_items_among_themselves(k1, k2, weight):
    x = clusters(70)
    d = oracles.matrix(oracles.euclidean, x)
    got = retrieval.k_reciprocal_distances(
        x, k=25, k1=k1, k2=k2, distance_weight=weight
    )
    check(got, oracles.k_reciprocal(d, k1, k2, weight))
    # The candidates are the nearest by the original distance.
    _, nearest = retrieval.nearest_neighbors(x, x, 25, positions=np.arange(70))
    np.testing.assert_array_equal(np.sort(got[1]), np.sort(nearest))


def test_queries_against_references():
    x = clusters(60)
    d = oracles.matrix(oracles.euclidean, x)
    got = retrieval.k_reciprocal_distances(x[:9], x[9:], k=51, k1=10, k2=4)
    expected = oracles.k_reciprocal(d, 10, 4, 0.3)[:9, 9:]
    check(got, expected)
    np.testing.assert_array_equal(got[1], np.argsort(expected, axis=1))


def test_more_neighbors_than_items():
    x = clusters(6)
    d = oracles.matrix(oracles.euclidean, x)
    got = retrieval.k_reciprocal_distances(x, k=5)
    check(got, oracles.k_reciprocal(d, 20, 6, 0.3))


@pytest.mark.parametrize("value", [7.0, np.nan])
def test_padding_changes_nothing(value):
    x = clusters(50)
    real = np.random.default_rng(1).random(50) < 0.8
    padded = np.where(real[:, None], x, np.float32(value))
    options = {"k": 8, "k1": 7, "k2": 3}
    distances, indices = retrieval.k_reciprocal_distances(padded, where=real, **options)
    expected, places = retrieval.k_reciprocal_distances(x[real], **options)
    np.testing.assert_allclose(distances[real], expected, atol=2e-6)
    np.testing.assert_array_equal(indices[real], np.flatnonzero(real)[places])
    assert (indices[~real] == -1).all()
    assert jnp.isposinf(distances[~real]).all()


def test_broken_vectors():
    x = clusters(30)
    x[3] = np.nan
    distances, indices = retrieval.k_reciprocal_distances(x, k=29, k1=5, k2=2)
    assert jnp.isnan(distances[3]).all()
    assert (indices[3] == -1).all()
    assert not (indices == 3).any()
    others = np.arange(30) != 3
    assert not jnp.isnan(distances[others]).any()
    assert jnp.isfinite(distances[others, :28]).all()


def test_duplicates_are_finite():
    distances, indices = retrieval.k_reciprocal_distances(np.ones((12, 3)), k=11)
    assert jnp.isfinite(distances).all()
    np.testing.assert_array_equal(jnp.sort(indices[0]), np.arange(1, 12))


def test_reranking_finds_more_of_a_class():
    """The purpose: neighbours of neighbours come before strangers."""
    random = np.random.default_rng(0)
    centres = random.normal(size=(10, 16))
    labels = np.arange(200) % 10
    x = centres[labels] + 1.4 * random.normal(size=(200, 16))
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    _, before = retrieval.nearest_neighbors(x, x, 19, positions=np.arange(200))
    _, candidates = retrieval.k_reciprocal_distances(x, k=60)
    share = lambda indices: np.mean(labels[indices] == labels[:, None])  # noqa: E731
    assert share(candidates[:, :19]) > share(before) + 0.03


@pytest.mark.parametrize("alpha", [0.0, 1.0, 3.0])
def test_expanded_queries(alpha):
    x = 3 * clusters(40)
    got = retrieval.expand_queries(x[:10], x[10:], k=6, alpha=alpha)
    expected = [oracles.expanded_query(q, x[10:], 6, alpha) for q in x[:10]]
    np.testing.assert_allclose(got, expected, atol=2e-6)
    np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1, atol=1e-6)


def test_database_augmentation():
    x = clusters(30)
    real = np.random.default_rng(1).random(30) < 0.7
    padded = np.where(real[:, None], x, np.nan)
    got = retrieval.expand_queries(
        x, padded, k=4, positions=np.arange(30), reference_where=real
    )
    for i in range(30):
        others = x[real & (np.arange(30) != i)]
        expected = oracles.expanded_query(x[i], others, 4, 3)
        np.testing.assert_allclose(got[i], expected, atol=2e-6)


def test_expansion_of_few_and_broken_vectors():
    x = np.eye(3, dtype=np.float32)
    alone = retrieval.expand_queries(x, x, k=2, reference_where=np.zeros(3, bool))
    np.testing.assert_array_equal(alone, x)
    broken = np.where(np.eye(3), np.nan, x)
    assert jnp.isnan(retrieval.expand_queries(broken, x, k=1)).any(axis=1).all()
    assert jnp.isfinite(retrieval.expand_queries(x, broken, k=3)).all()


def test_jit_and_strict_promotion():
    x = clusters(20)
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        got = jax.jit(lambda x: retrieval.k_reciprocal_distances(x, k=3, k1=4))(x)
        expanded = retrieval.expand_queries(x, x, k=3, alpha=np.float16(2))
    assert got[0].dtype == expanded.dtype == jnp.float32


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"queries": np.ones(3)}, ValueError, "queries must be"),
        ({"references": np.eye(4)[:, :3]}, ValueError, "vectors of one length"),
        ({"k": 0}, ValueError, "k must be from 1 to 3, got 0"),
        ({"k": 4}, ValueError, "k must be from 1 to 3, got 4"),
        ({"k": 1.5}, TypeError, "k must be an integer"),
        ({"k1": 0}, ValueError, "k1 must be at least 1"),
        ({"k2": 0}, ValueError, "k2 must be at least 1"),
        ({"distance_weight": -0.1}, ValueError, "distance_weight"),
        ({"where": [True]}, ValueError, "where"),
        ({"reference_where": np.ones(4, bool)}, ValueError, "requires references"),
    ],
)
def test_bad_input_is_named(change, error, words):
    options = {"queries": np.eye(4), "k": 2} | change
    with pytest.raises(error, match=words):
        retrieval.k_reciprocal_distances(options.pop("queries"), **options)
