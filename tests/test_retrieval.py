"""Retrieval metrics against loops."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tripletjax as tj
from tripletjax import retrieval


@settings(max_examples=40)
@given(seed=st.integers(0, 2**32 - 1), gallery=st.booleans())
def test_metrics_are_their_definitions(seed, gallery):
    random = np.random.default_rng(seed)
    # On a grid, so that ties are frequent.
    x, y = random.integers(0, 3, (9, 2)), random.integers(0, 4, 9)
    options = {}
    if gallery:
        options = {
            "references": random.integers(0, 3, (7, 2)),
            "reference_labels": random.integers(0, 4, 7),
        }
    got = retrieval.evaluate(x, y, ks=[1, 3, 20], **options)
    expected = oracles.retrieval(x, y, (1, 3, 20), **options)
    np.testing.assert_allclose(got.recall_at_k, expected.pop("recall_at_k"), rtol=1e-6)
    for name, value in expected.items():
        np.testing.assert_allclose(getattr(got, name), value, rtol=1e-6, err_msg=name)


def test_neighbors_in_order_with_ties_to_the_lower_index():
    x = jnp.array([[0.0], [2.0], [1.0], [-1.0], [1.0]])
    distances, indices = retrieval.nearest_neighbors(
        x[:2], x, 4, positions=jnp.array([0, 1])
    )
    np.testing.assert_array_equal(indices, [[2, 3, 4, 1], [2, 4, 0, 3]])
    np.testing.assert_array_equal(distances, [[1, 1, 1, 2], [1, 1, 2, 3]])


def test_more_queries_than_a_block_holds():
    x = np.random.default_rng(0).normal(size=(600, 4)).astype(np.float32)
    _, indices = jax.jit(lambda x: retrieval.nearest_neighbors(x, x, 3))(x)
    d = np.linalg.norm(x[:, None] - x[None], axis=-1)
    np.testing.assert_array_equal(indices, np.argsort(d, axis=1, kind="stable")[:, :3])


def test_nothing_relevant():
    metrics = retrieval.evaluate(np.eye(3), [0, 1, 2])
    assert metrics.queries == 0
    assert all(jnp.all(value == 0) for value in metrics)


@pytest.mark.parametrize(
    ("k", "error", "words"),
    [(k, ValueError, "k must be from 1 to 4.*query itself") for k in (0, 5, 6)]
    + [(k, TypeError, "k must be an integer") for k in (1.0, True)],
)
def test_bad_k(k, error, words):
    with pytest.raises(error, match=words):
        retrieval.nearest_neighbors(np.eye(5), np.eye(5), k, positions=np.arange(5))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"embeddings": np.ones(3)}, ValueError, r"embeddings must be \[n, d\]"),
        ({"labels": [0, 1]}, ValueError, r"labels.*\(2,\) and \(3, 3\)"),
        ({"labels": [0.0, 1, 1]}, TypeError, "labels must be integers"),
        ({"references": np.eye(3)}, ValueError, "go together"),
        ({"ks": (0,)}, ValueError, "ks must be positive"),
        ({"ks": (1.5,)}, TypeError, "ks must be an integer"),
        ({"ks": 3}, TypeError, "ks must be a sequence"),
        ({"positions": [0, 1]}, ValueError, "positions"),
        ({"positions": [0.0, 1, 2]}, TypeError, "positions must be integers"),
        ({"metric": "euclidean"}, TypeError, "metric must be callable"),
    ],
)
def test_bad_input_is_named(change, error, words):
    arguments = {"embeddings": np.eye(3), "labels": [0, 0, 1]} | change
    with pytest.raises(error, match=words):
        retrieval.evaluate(arguments.pop("embeddings"), **arguments)


def test_any_metric():
    x = np.array([[1.0, 0.0], [10.0, 0.1], [0.0, 1.0], [0.1, 10.0]])
    labels = [0, 0, 1, 1]
    assert retrieval.evaluate(x, labels, metric=tj.cosine).precision_at_1 == 1
    assert retrieval.evaluate(x, labels).precision_at_1 < 1
