"""Metrics against their definitions, and where rounding would hurt."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads
from problems import unless_slow

import tripletjax as tj

METRICS = {
    name: (getattr(tj, name), getattr(oracles, name))
    for name in ("euclidean", "squared_euclidean", "cosine", "manhattan")
}
every_metric = pytest.mark.parametrize("name", METRICS)


def chebyshev(a, b):
    return jnp.max(jnp.abs(a - b))


def vectors(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@every_metric
@settings(max_examples=30)
@given(
    seed=st.integers(0, 2**32 - 1),
    scale=st.sampled_from((1e-3, 1.0, 1e3)),
    grid=st.booleans(),
)
def test_matrix_and_pairs_are_the_definition(name, seed, scale, grid):
    metric, oracle = METRICS[name]
    random = np.random.default_rng(seed)
    x, y = random.normal(size=(5, 3)), random.normal(size=(4, 3))
    if grid:  # zeros, duplicates and ties
        x, y = random.integers(-1, 2, (5, 3)), random.integers(-1, 2, (4, 3))
    x, y = np.float32(x * scale), np.float32(y * scale)
    far = 1e-6 if name == "cosine" else 1e-6 * scale ** (1 + ("squared" in name))
    close = {"rtol": 2e-6, "atol": 10 * far}
    np.testing.assert_allclose(metric(x, y), oracles.matrix(oracle, x, y), **close)
    # The root magnifies what is left of two equal vectors.
    close["atol"] *= 1e3 if name == "euclidean" else 1
    np.testing.assert_allclose(metric(x), oracles.matrix(oracle, x), **close)
    paired = [oracle(a, b) for a, b in zip(x, y)]
    np.testing.assert_allclose(metric.paired(x[:4], y), paired, rtol=2e-6, atol=far)


@every_metric
def test_diagonal_is_exactly_zero_and_flat(name):
    metric = METRICS[name][0]
    x = 100 + vectors(6, 4)
    assert (jnp.diag(metric(x)) == 0).all()
    assert (jax.grad(lambda x: jnp.trace(metric(x)))(x) == 0).all()


@every_metric
def test_zero_distance_has_zero_gradient(name):
    metric = METRICS[name][0]
    x = jnp.asarray(vectors(1, 3))
    for function in (
        lambda a, b: metric(a, b)[0, 0],
        lambda a, b: metric.paired(a, b)[0],
    ):
        for gradient in jax.grad(function, argnums=(0, 1))(x, x):
            np.testing.assert_allclose(gradient, 0, atol=1e-6)
    twice = jnp.concatenate([x, x])
    gradient = jax.grad(lambda x: metric(x).sum())(twice)
    np.testing.assert_allclose(gradient, 0, atol=1e-6)


@pytest.mark.parametrize("name", unless_slow(METRICS, ["cosine"]))
def test_leading_dimensions(name):
    metric = METRICS[name][0]
    x, y = vectors(2, 3, 5, 4), vectors(2, 3, 6, 4, seed=1)
    assert metric(x, y).shape == (2, 3, 5, 6)
    np.testing.assert_allclose(metric(x, y)[1, 2], metric(x[1, 2], y[1, 2]), rtol=1e-6)
    assert metric(x, y[0, 0]).shape == (2, 3, 5, 6)
    assert metric.paired(x, x[::-1]).shape == (2, 3, 5)
    np.testing.assert_allclose(jax.vmap(jax.vmap(metric))(x), metric(x), rtol=1e-5)


@every_metric
@pytest.mark.parametrize(
    "dtype", unless_slow([jnp.float16, jnp.bfloat16, jnp.int8], [jnp.bfloat16])
)
def test_low_precision_is_computed_in_float32(name, dtype):
    metric = METRICS[name][0]
    x = jnp.asarray(4 * vectors(6, 300), dtype)
    for got, full in (
        (metric(x), metric(x.astype(jnp.float32))),
        (metric.paired(x, x[::-1]), metric.paired(*jnp.float32([x, x[::-1]]))),
    ):
        assert got.dtype == jnp.float32
        np.testing.assert_array_equal(got, full)


@every_metric
def test_double_precision_stays(name):
    with jax.enable_x64(True):
        assert METRICS[name][0](np.ones((2, 3))).dtype == jnp.float64


def test_pairs_keep_their_digits():
    """Unit vectors 1e-4 apart: of the product form nothing is left."""
    a = vectors(64)
    a /= np.linalg.norm(a)
    step = vectors(64, seed=1)
    step -= step @ a * a
    b = a + np.float32(1e-4) * step / np.linalg.norm(step)
    exact = oracles.euclidean(a, b)
    np.testing.assert_allclose(tj.euclidean.paired(a, b), exact, rtol=1e-6)
    gradient = jax.grad(tj.euclidean.paired)(jnp.asarray(a), jnp.asarray(b))
    np.testing.assert_allclose(jnp.linalg.norm(gradient), 1, rtol=1e-5)
    # The cosine of 1e-4 is 1 - 5e-9: 1 - similarity would be 0 or 6e-8.
    np.testing.assert_allclose(
        tj.cosine.paired(a, b), oracles.squared_euclidean(a, b) / 2, rtol=1e-4
    )


@pytest.mark.parametrize("offset", [1e2, 1e3])
def test_a_common_offset_costs_no_digits(offset):
    x = (vectors(20, 8) + np.float32(offset)).astype(np.float32)
    exact = oracles.matrix(oracles.squared_euclidean, x)
    np.testing.assert_allclose(tj.squared_euclidean(x), exact, atol=1e-4)


@every_metric
def test_equal_vectors_of_two_sets_are_near(name):
    """Rounding may leave less than nothing of their products."""
    x = vectors(50, 20)
    distances = METRICS[name][0](x, x.copy())
    assert (distances >= 0).all()
    assert (jnp.diagonal(distances) < 1e-2).all()


def test_small_integers_are_exact():
    x = np.random.default_rng(0).integers(0, 9, (30, 4)) + 100
    exact = oracles.matrix(oracles.squared_euclidean, x)
    np.testing.assert_array_equal(tj.squared_euclidean(x), exact)


def test_zero_vectors_have_no_direction():
    x = jnp.array([[0.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
    np.testing.assert_allclose(tj.cosine(x), [[0, 1, 1], [1, 0, 1], [1, 1, 0]])
    np.testing.assert_allclose(tj.cosine.paired(x, x), [1, 0, 1], atol=1e-7)
    assert jnp.isfinite(jax.grad(lambda x: tj.cosine(x).sum())(x)).all()


@pytest.mark.parametrize("scale", [1e-30, 1e-18, 1e18, 1e30])
def test_directions_of_tiny_and_of_huge_vectors(scale):
    x = jnp.asarray(vectors(6, 4))
    np.testing.assert_allclose(tj.cosine(x * scale), tj.cosine(x), atol=1e-6)
    paired = tj.cosine.paired(x[:3] * scale, x[3:] * scale)
    np.testing.assert_allclose(paired, tj.cosine.paired(x[:3], x[3:]), rtol=1e-5)
    gradient = jax.grad(lambda x: tj.cosine(x)[0].sum())
    np.testing.assert_allclose(
        gradient(x * scale) * scale, gradient(x), rtol=1e-4, atol=1e-6
    )


def test_a_nan_stays_a_nan():
    x = jnp.array([[0.0, 1.0], [jnp.nan, 0.0], [1.0, 2.0]])
    for metric, _ in METRICS.values():
        assert jnp.isnan(metric(x)[0, 1])
        assert not jnp.isnan(metric(x)[0, 2])


def test_any_function_of_two_vectors():
    metric = tj.Metric(paired=chebyshev)
    x = vectors(5, 3)
    exact = np.abs(x[:, None] - x[None]).max(-1)
    np.testing.assert_allclose(metric(x), exact, rtol=1e-6)
    np.testing.assert_allclose(metric.paired(x, x[::-1]), np.diag(exact[:, ::-1]))
    assert metric == tj.Metric(paired=chebyshev)
    assert hash(metric) == hash(tj.Metric(paired=chebyshev))
    assert metric != tj.euclidean
    assert repr(metric) == "Metric(chebyshev)"


def test_a_function_without_gradient_at_zero_does_not_poison_the_diagonal():
    metric = tj.Metric(paired=lambda a, b: jnp.linalg.norm(a - b))
    gradient = jax.grad(lambda x: metric(x).sum())(jnp.asarray(vectors(4, 3)))
    assert jnp.isfinite(gradient).all()


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((np.ones(3),), ValueError, r"x must be \[..., n, d\], got shape \(3,\)"),
        ((np.ones((2, 3)), np.ones(3)), ValueError, "y must be"),
        ((np.ones((2, 3)), np.ones((2, 4))), ValueError, r"\(2, 3\) and \(2, 4\)"),
        ((np.ones((2, 2, 3)), np.ones((3, 2, 3))), ValueError, "batch dimensions"),
        ((np.ones((0, 3)),), ValueError, "x is empty"),
        ((np.ones((2, 3), complex),), TypeError, "x must be real"),
        (([["a"], ["b"]],), TypeError, "x must be numeric"),
    ],
)
def test_bad_vectors_are_named(arguments, error, words):
    with pytest.raises(error, match=words):
        tj.euclidean(*arguments)


def test_bad_pairs_and_functions_are_named():
    with pytest.raises(ValueError, match=r"\(2, 3\) and \(1, 3\)"):
        tj.euclidean.paired(np.ones((2, 3)), np.ones((1, 3)))
    with pytest.raises(ValueError, match="paired must return a scalar"):
        tj.Metric(paired=jnp.subtract)(np.ones((2, 3)))
    with pytest.raises(TypeError, match="paired must be callable"):
        tj.Metric(paired="euclidean")
    with pytest.raises(TypeError, match="matrix must be callable"):
        tj.Metric(paired=chebyshev, matrix=3)


def test_metrics_of_equal_parts_are_equal():
    """Equal static arguments must not take different paths."""
    function = tj.euclidean.paired
    assert tj.Metric(paired=function) == tj.Metric(paired=function)
    assert hash(tj.Metric(paired=function)) == hash(tj.Metric(paired=function))
    plain = tj.Metric(*tj.euclidean._functions[:1], matrix=tj.euclidean._functions[1])
    assert plain.products is None
    assert plain != tj.euclidean
    with pytest.raises(AttributeError):
        plain.products = tj.euclidean.products


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_unit_norm(scale):
    x = np.random.default_rng(0).normal(size=(2, 5, 4)) * scale
    expected = x / np.linalg.norm(x, axis=-1, keepdims=True)
    np.testing.assert_allclose(tj.normalize(np.float32(x)), expected, rtol=2e-6)


def test_unit_norm_of_zero():
    """Value and derivatives are 0, also beside other rows."""
    x = jnp.zeros((3, 4)).at[1].set(jnp.arange(4.0))
    weights = jnp.arange(12.0).reshape(3, 4)
    total = lambda x: jnp.sum(weights * tj.normalize(x))  # noqa: E731
    gradient, hessian = jax.grad(total)(x), jax.hessian(total)(x)
    np.testing.assert_array_equal(tj.normalize(x)[jnp.array([0, 2])], 0)
    np.testing.assert_array_equal(gradient[jnp.array([0, 2])], 0)
    assert jnp.isfinite(gradient).all()
    assert jnp.isfinite(hessian).all()
    with jax.enable_x64(True):
        check_grads(tj.normalize, (jnp.float64(x[1]),), order=2, rtol=1e-4)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_unit_norm_of_low_precision(dtype):
    low = jnp.asarray(np.random.default_rng(0).normal(size=(3, 1000)), dtype)
    got = tj.normalize(low)
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, tj.normalize(low.astype(jnp.float32)))
    assert jax.grad(lambda x: tj.normalize(x).sum())(low).dtype == dtype


@pytest.mark.parametrize(
    ("x", "error", "words"),
    [
        (1.0, ValueError, r"x must be \[..., d\], got shape \(\)"),
        (np.ones((0, 3)), ValueError, "x is empty"),
        (np.ones(3, complex), TypeError, "x must be real"),
    ],
)
def test_bad_vectors_for_unit_norm_are_named(x, error, words):
    with pytest.raises(error, match=words):
        tj.normalize(x)
