"""Problems and comparisons that the tests against other libraries share."""

import jax
import jax.numpy as jnp
import numpy as np

import tripletjax as tj

# One class has a single item, one is large; the last two have nothing but one class and
# nothing but classes of one.
LABELS = {
    "p x k": np.repeat(np.arange(4), 4),
    "uneven": np.array([0, 1, 1, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 4, 4, 4]),
    "two classes": np.arange(16) % 2,
}
DEGENERATE = {"one class": np.zeros(16, int), "all distinct": np.arange(16)}


def embeddings(seed, n=16, dim=6, scale=1.0):
    return scale * np.random.default_rng(seed).normal(size=(n, dim))


def ours(loss, x):
    """Value and gradient in float64."""
    with jax.enable_x64(True):
        value, gradient = jax.value_and_grad(loss)(jnp.asarray(x, jnp.float64))
        return np.asarray(value), np.asarray(gradient)


def theirs(loss, x):
    """The same in torch, where no rounding of cdist is in the way either."""
    import torch

    x = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    value = loss(x)
    value.backward()
    return value.detach().numpy(), x.grad.numpy()


def assert_same(loss, other, x, rtol=1e-9):
    value, gradient = ours(loss, x)
    other_value, other_gradient = theirs(other, x)
    np.testing.assert_allclose(value, other_value, rtol=rtol)
    np.testing.assert_allclose(gradient, other_gradient, rtol=rtol, atol=rtol)


def assert_nothing(loss, x):
    value, gradient = ours(loss, x)
    assert value == 0
    assert (gradient == 0).all()


def triplet_set(triplets):
    fields = [np.ravel(field)[np.ravel(triplets.valid)] for field in triplets[:3]]
    return set(zip(*(field.tolist() for field in fields)))


def on_matrix(loss, labels, metric=tj.euclidean, **options):
    return lambda x: loss(metric(x), labels, **options)
