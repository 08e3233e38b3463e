"""Parts of the engine of blockwise losses: reductions, several panels, a ring."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

import tripletjax as tj
from tripletjax._engine.reductions import min_and_index
from tripletjax._pairwise import cuts


def vectors(n, seed=0):
    return np.random.default_rng(seed).normal(size=(n, 3)).astype(np.float32)


def test_the_least_beyond_a_limit():
    x = jnp.array([[3.0, 1.0, 2.0, 2.0], [5.0, 4.0, 4.0, jnp.inf]])
    value, index = min_and_index(x, jnp.array([[1.0], [4.0]]), axis=1)
    assert (value.tolist(), index.tolist()) == ([2, 5], [2, 0])
    value, _ = min_and_index(x, jnp.array([[3.0], [5.0]]), axis=1)
    assert value.tolist() == [np.inf, np.inf]


def test_anchors_of_overlapping_panels_count_once(monkeypatch):
    # Four rows at a time: the last two blocks of eleven anchors share one.
    monkeypatch.setattr(cuts, "CPU", cuts.CPU._replace(panel=44))
    x, labels = vectors(11), np.arange(11) % 3
    got = tj.blockwise.batch_hard_loss(
        x, labels, metric=tj.manhattan, margin=2.0, reduce_fn=None
    )
    expected = tj.batch_hard_loss(tj.manhattan(x), labels, margin=2.0, reduce_fn=None)
    assert (expected.active > 0).any()
    for one, other in zip(got, expected):
        np.testing.assert_allclose(one, other, rtol=1e-5)


def test_references_that_go_round_two_devices():
    x, labels = vectors(12), np.arange(12) % 4
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    loss = functools.partial(tj.blockwise.batch_hard_loss, margin=2.0)
    expected = jax.value_and_grad(lambda x: loss(x, labels))(x)
    with jax.set_mesh(mesh):
        over = lambda x: loss(x, labels, axis_name="data", ring=True)  # noqa: E731
        got = jax.jit(jax.value_and_grad(over))(x)
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-5)
    np.testing.assert_allclose(got[1], expected[1], atol=1e-5)
