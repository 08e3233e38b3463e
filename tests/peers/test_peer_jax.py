"""optax, representax and big_vision."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from peer_tools import DEGENERATE, LABELS, assert_nothing, embeddings, on_matrix, ours

import tripletjax as tj


@pytest.mark.parametrize("seed", range(3))
def test_optax(seed):
    def split(x):
        return x[:5], x[5:10], x[10:15]

    x = embeddings(seed)
    value, gradient = ours(lambda x: tj.triplet_margin_loss(*split(x), margin=1.0), x)
    # eps sits inside the root there, 1e-6 unless told.
    other = ours(
        lambda x: optax.losses.triplet_margin_loss(*split(x), eps=0.0).mean(), x
    )
    np.testing.assert_allclose(value, other[0], rtol=1e-9)
    np.testing.assert_allclose(gradient, other[1], rtol=1e-9, atol=1e-12)


def test_odd_norms_are_wrong_in_optax():
    """It takes no absolute values: the Manhattan distance comes out signed."""
    a, p, n = jnp.array([[0.0, 0.0]]), jnp.array([[1.0, -1.0]]), jnp.array([[3.0, 0.0]])
    right = tj.triplet_margin_loss(a, p, n, margin=2.0, metric=tj.manhattan)
    wrong = optax.losses.triplet_margin_loss(a, p, n, norm_degree=1, margin=2.0)
    assert right == 1.0
    assert abs(float(wrong[0]) - 1.0) > 0.5


TERMS = {
    "batch_all_triplet_loss_terms": tj.batch_all_loss,
    "batch_semi_hard_triplet_loss_terms": tj.batch_semi_hard_loss,
    "batch_hard_triplet_loss_terms": tj.batch_hard_loss,
}


@pytest.mark.parametrize("name", ["p x k", "two classes"])
@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("seed", range(2))
def test_representax(terms, name, seed):
    module = pytest.importorskip("representax.tasks.triplet.losses")
    theirs, labels = getattr(module, terms), jnp.asarray(LABELS[name])
    x = np.float32(embeddings(seed))
    value, gradient = ours(on_matrix(TERMS[terms], labels, margin=0.7), x)
    other = theirs(jnp.asarray(x), labels, margin=0.7)
    np.testing.assert_allclose(value, other.loss, rtol=1e-5)
    other = jax.grad(lambda x: theirs(x, labels, margin=0.7).loss)(jnp.asarray(x))
    np.testing.assert_allclose(gradient, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", DEGENERATE)
def test_no_triplet(name):
    for loss in TERMS.values():
        assert_nothing(on_matrix(loss, DEGENERATE[name]), embeddings(0))


@pytest.mark.parametrize("name", LABELS)
@pytest.mark.parametrize("seed", range(2))
def test_optax_ntxent(name, seed):
    labels = jnp.asarray(LABELS[name])
    x = embeddings(seed)
    loss = on_matrix(tj.nt_xent_loss, labels, metric=tj.cosine, temperature=0.07)
    value, gradient = ours(loss, x)
    other = ours(lambda x: optax.losses.ntxent(x, labels, temperature=0.07), x)
    np.testing.assert_allclose(value, other[0], rtol=1e-9)
    np.testing.assert_allclose(gradient, other[1], rtol=1e-8, atol=1e-10)


def test_optax_ntxent_is_nan_without_positives():
    labels = jnp.asarray(DEGENERATE["all distinct"])
    x = jnp.asarray(embeddings(0), jnp.float32)
    assert jnp.isnan(optax.losses.ntxent(x, labels))
    assert_nothing(on_matrix(tj.nt_xent_loss, labels, metric=tj.cosine), x)


@pytest.mark.parametrize("seed", range(2))
def test_siglip_of_big_vision(seed):
    """The formula of its `sigmoid_loss`, which no package has: all n x n pairs."""
    x, y = embeddings(seed, n=12), embeddings(seed + 5, n=12)
    labels = jnp.arange(12)

    def formula(both, t, b):
        z = [
            v / jnp.linalg.norm(v, axis=1, keepdims=True)
            for v in (both[:12], both[12:])
        ]
        logits = z[0] @ z[1].T * jnp.exp(t) + b
        signs = 2 * jnp.eye(12) - 1
        return -jnp.mean(jnp.sum(jax.nn.log_sigmoid(signs * logits), axis=-1))

    def loss(both, t, b):
        d = tj.cosine(both[:12], both[12:])
        options = {"scale": jnp.exp(t), "bias": b}
        return tj.sigmoid_loss(d, labels, reference_labels=labels, **options)

    with jax.enable_x64(True):
        arguments = np.concatenate([x, y]), np.log(10.0), -10.0
        got, expected = (
            jax.value_and_grad(f, (0, 1, 2))(*arguments) for f in (loss, formula)
        )
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected)):
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-12)
