"""A loss at several prefixes of the vectors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from problems import batch

import tripletjax as tj

X, LABELS = batch(12, dim=8)
SUPCON = functools.partial(tj.blockwise.supcon_loss, temperature=0.5)
HARD = functools.partial(tj.blockwise.batch_hard_loss, margin=0.5)


def test_the_sum_of_the_losses_of_unit_prefixes():
    """Euclidean distances change with the norm; each prefix has norm 1."""
    x = np.asarray(X, float)
    masks, expected = oracles.pair_masks(LABELS), 0
    for dim, weight in ((2, 3.0), (5, 0.5), (8, 1.0)):
        part = x[:, :dim] / np.linalg.norm(x[:, :dim], axis=1, keepdims=True)
        d = oracles.matrix(oracles.euclidean, part)
        triplets = oracles.batch_hard_triplets_of(d, *masks)
        terms = oracles.loss_of(d, triplets, oracles.hinge, 0.5)[0]
        expected += weight * oracles.mean_valid(terms)
    loss = tj.matryoshka_loss(HARD, (2, 5, 8), weights=(3.0, 0.5, 1.0))
    np.testing.assert_allclose(loss(7 * X, LABELS), expected, rtol=1e-5)


def test_vectors_as_they_are():
    loss = tj.matryoshka_loss(HARD, (3, 8), normalize=False)
    expected = HARD(X[:, :3], LABELS) + HARD(X, LABELS)
    np.testing.assert_allclose(loss(X, LABELS), expected, rtol=1e-6)
    # Cosine distances have no norm.
    values = [
        tj.matryoshka_loss(SUPCON, (3, 8), normalize=flag)(X, LABELS)
        for flag in (False, True)
    ]
    np.testing.assert_allclose(*values, rtol=1e-5)


def test_references_have_the_same_prefixes():
    classes, labels = batch(3, dim=8, seed=1)
    loss = functools.partial(tj.blockwise.arcface_loss, scale=4.0)
    pairs = {"reference_labels": labels}
    got = tj.matryoshka_loss(loss, (4, 8))(X, LABELS, references=classes, **pairs)
    expected = sum(
        loss(X[:, :dim], LABELS, references=classes[:, :dim], **pairs) for dim in (4, 8)
    )
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_gradients_by_vectors_and_weights():
    def value(x, weights, temperature):
        loss = tj.matryoshka_loss(tj.blockwise.supcon_loss, (4, 8), weights=weights)
        return loss(x, LABELS, temperature=temperature)

    def expected(x, weights, temperature):
        parts = [
            tj.supcon_loss(tj.cosine(x[:, :dim]), LABELS, temperature=temperature)
            for dim in (4, 8)
        ]
        return weights[0] * parts[0] + weights[1] * parts[1]

    args = X, jnp.float32([2.0, 0.5]), 0.3
    got, expected = (
        jax.jit(jax.value_and_grad(f, (0, 1, 2)))(*args) for f in (value, expected)
    )
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected)):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"dims": ()}, ValueError, r"dims must be at least 1, got \[\]"),
        ({"dims": (0, 8)}, ValueError, r"dims must be at least 1, got \[0, 8\]"),
        ({"dims": (4.0,)}, TypeError, "dims must be an integer, got 4.0"),
        ({"dims": (4, 9)}, ValueError, "at most the 8 dimensions of embeddings, got 9"),
        ({"dims": (4, 8), "weights": (1.0,)}, ValueError, "one for each of 2 dims"),
        (
            {"dims": (4, 8), "weights": 2.0},
            ValueError,
            "weights must be a sequence of numbers",
        ),
        (
            {"dims": (4, 8), "weights": np.ones((2, 2))},
            ValueError,
            "weights must be a seq",
        ),
        ({"dims": 8}, TypeError, "dims must be a sequence of integers, got 8"),
    ],
)
def test_bad_input_is_named(arguments, error, words):
    with pytest.raises(error, match=words):
        tj.matryoshka_loss(SUPCON, **arguments)(X, LABELS)


def test_a_loss_must_be_callable():
    with pytest.raises(TypeError, match="loss must be callable, got None"):
        tj.matryoshka_loss(None, (8,))


def test_terms_are_no_loss():
    loss = tj.matryoshka_loss(SUPCON, (8,))
    with pytest.raises(TypeError, match=r"loss must return one array.*TripletTerms"):
        loss(X, LABELS, reduce_fn=None)
