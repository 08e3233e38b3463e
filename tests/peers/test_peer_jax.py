"""optax and representax."""

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
