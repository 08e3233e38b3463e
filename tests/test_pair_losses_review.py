"""Functions of users in losses of pairs: closures, wrong shapes, terms of any dtype."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import vectors

import tripletjax as tj

LABELS = np.arange(12) // 3


def test_gradients_by_arrays_that_a_metric_closes_over():
    """Also inside jit; the loss has the value of a plain formula."""
    x = np.asarray(vectors(12), np.float64)[:, :3]

    def metric(weights):
        return tj.Metric(paired=lambda a, b: jnp.sum(weights * (a - b) ** 2))

    def loss(weights):
        return tj.blockwise.nt_xent_loss(
            jnp.float32(x), LABELS, metric=metric(weights), temperature=0.5
        )

    def formula(weights):
        z = -2 * (weights * (x[:, None] - x) ** 2).sum(-1)
        negatives = (LABELS[:, None] != LABELS) * np.exp(z)
        costs = np.log1p(negatives.sum(1, keepdims=True) / np.exp(z))
        positive = (LABELS[:, None] == LABELS) & ~np.eye(12, dtype=bool)
        return costs[positive].mean()

    weights = np.array([1.0, 2.0, 0.5])
    value, gradient = jax.jit(jax.value_and_grad(loss))(jnp.float32(weights))
    np.testing.assert_allclose(value, formula(weights), rtol=2e-5)
    steps = 1e-6 * np.eye(3)
    slopes = [(formula(weights + s) - formula(weights - s)) / 2e-6 for s in steps]
    np.testing.assert_allclose(gradient, slopes, rtol=2e-4, atol=1e-5)


def general(module, **functions):
    """A loss of either form, of functions that replace those of a valid loss."""
    x = vectors(12)
    if "logit" in functions or "cost" in functions:
        valid = {
            "logit": lambda d, _: -d,
            "cost": lambda pairs, _: pairs.terms(pairs.negatives, pairs.has_positive),
        }
        name = "log_sum_exp_loss"
    else:
        valid = {"positive_cost": lambda d, _: d, "negative_cost": lambda d, _: -d}
        name = "separable_loss"
    vectors_or_distances = x if module is tj.blockwise else tj.cosine(x)
    function = getattr(module, name)
    return function(vectors_or_distances, LABELS, **valid | functions)


both_forms = pytest.mark.parametrize("module", [tj, tj.blockwise])


@both_forms
@pytest.mark.parametrize("name", ["logit", "positive_cost", "negative_cost"])
def test_functions_that_are_not_elementwise(module, name):
    with pytest.raises(ValueError, match=f"{name} must be elementwise"):
        general(module, **{name: lambda d, _: jnp.sum(d)})
    with pytest.raises(ValueError, match=f"{name} must be elem.*returned a tuple"):
        general(module, **{name: lambda d, _: (d, d)})


@both_forms
def test_costs_of_another_shape(module):
    with pytest.raises(ValueError, match=r"cost must return terms of shape \(12,\)"):
        general(module, cost=lambda pairs, _: pairs.distances)
    with pytest.raises(ValueError, match="cost must return terms of shape"):
        general(module, cost=lambda pairs, _: jnp.sum(pairs.negatives))
    with pytest.raises(TypeError, match="cost must return terms of the anchors"):
        general(module, cost=lambda pairs, _: None)


@both_forms
@pytest.mark.parametrize(
    "limits",
    [
        lambda d, exists, _: jnp.zeros(12),
        lambda d, exists, _: (0.0, 1.0),
        lambda d, exists, _: (d[:, 0], d),
    ],
)
def test_limits_of_another_shape(module, limits):
    with pytest.raises(ValueError, match=r"limits must return low and high.*\(12,\)"):
        general(module, logit=lambda d, _: -d, limits=limits)


@both_forms
def test_terms_may_be_booleans_and_integers(module):
    """Their sums are numbers, as those of `AnchorPairs.terms`."""

    def cost(pairs, _):
        count = jnp.sum(pairs.exists, axis=-1)
        return tj.TripletTerms(pairs.negatives, pairs.negatives > 0, count)

    value = general(module, cost=cost)
    d = np.asarray(tj.cosine(vectors(12)), float)
    negative = LABELS[:, None] != LABELS
    logs = np.log((negative * np.exp(-d)).sum(axis=1))
    np.testing.assert_allclose(value, logs.sum() / 24, rtol=2e-5)


@both_forms
@pytest.mark.parametrize(
    ("value", "error", "words"),
    [
        (1j, TypeError, "base must be a real number"),
        ("high", TypeError, "base must be a real number"),
        (float("nan"), ValueError, "base must be finite, got nan"),
    ],
)
def test_parameters_of_any_sign_are_real_numbers(module, value, error, words):
    x = vectors(12) if module is tj.blockwise else tj.cosine(vectors(12))
    with pytest.raises(error, match=words):
        module.multi_similarity_loss(x, LABELS, base=value)
