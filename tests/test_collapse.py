"""The collapse report against its definition."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from problems import unless_slow

import tripletjax as tj
from tripletjax import collapse
from tripletjax._pairwise import block_sizes


def expected(x, distance=oracles.euclidean):
    pairs = [distance(a, b) for i, a in enumerate(x) for b in x[i + 1 :]]
    values = np.linalg.svd(x - x.mean(0), compute_uv=False)
    shares = values / values.sum()
    shares = shares[shares > 1e-9]
    norms = [np.linalg.norm(a) for a in x]
    return (
        np.mean(pairs),
        np.std(pairs),
        np.exp(-np.sum(shares * np.log(shares))),
        np.mean(norms),
        np.std(norms),
    )


@pytest.mark.parametrize("n", unless_slow([2, 30, 700], [2, 30]))
def test_report(n):
    x = np.random.default_rng(0).normal(size=(n, 5)) * [1, 2, 0.1, 1, 0] + 1
    got = collapse.report(np.float32(x))
    np.testing.assert_allclose(got, expected(x), rtol=1e-4)


def test_report_of_several_tiles(monkeypatch):
    monkeypatch.setattr(block_sizes, "CPU", block_sizes.CPU._replace(tile=16))
    monkeypatch.setattr(block_sizes, "ACCELERATOR", block_sizes.CPU)
    x = np.random.default_rng(0).normal(size=(37, 5)) * [1, 2, 0.1, 1, 0] + 1
    x[:12] += 5
    got = collapse.report(np.float32(x))
    np.testing.assert_allclose(got, expected(x), rtol=1e-4)


def test_padding_and_metric():
    random = np.random.default_rng(0)
    x, where = random.normal(size=(30, 4)), random.random(30) < 0.6
    x[~where] = np.nan
    got = collapse.report(x, where=where, metric=tj.cosine)
    np.testing.assert_allclose(got, expected(x[where], oracles.cosine), rtol=1e-4)


def test_digits_of_a_spread_far_from_the_origin():
    x = np.random.default_rng(0).normal(size=(50, 4))
    near, far = (collapse.report(np.float32(x * 1e-2 + c)) for c in (0, 100))
    np.testing.assert_allclose(far[:3], near[:3], rtol=1e-2)


def test_collapsed():
    got = collapse.report(jnp.ones((9, 4)))
    np.testing.assert_array_equal(got, [0, 0, 1, 2, 0])
    line = np.arange(9.0)[:, None] * np.array([1.0, -2.0, 3.0])
    np.testing.assert_allclose(collapse.report(line).effective_rank, 1, rtol=1e-5)


def test_too_few():
    got = collapse.report(jnp.ones((3, 4)), where=jnp.array([True, False, False]))
    assert jnp.isnan(jnp.array(got[:3])).all()
    assert got.mean_norm == 2


def test_inside_jit():
    x = np.random.default_rng(0).normal(size=(20, 3))
    jax.tree.map(
        np.testing.assert_array_equal, jax.jit(collapse.report)(x), collapse.report(x)
    )


@pytest.mark.parametrize(
    ("x", "options", "error", "words"),
    [
        (np.ones(3), {}, ValueError, "embeddings must be"),
        (np.ones((2, 3, 4)), {}, ValueError, r"embeddings must be \[n, d\]"),
        (np.ones((3, 4)), {"where": [True]}, ValueError, "where must have one entry"),
        (np.ones((3, 4)), {"metric": max}, TypeError, "metric must be a Metric"),
    ],
)
def test_bad_input_is_named(x, options, error, words):
    with pytest.raises(error, match=words):
        collapse.report(x, **options)
