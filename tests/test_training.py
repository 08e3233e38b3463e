"""One step of training at a time: averages, statistics, and the key of each step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from tripletjax.learn.training import loop, steps


def test_averages_keep_what_their_decay_says():
    one = jnp.ones(2)
    both = steps.Params(one, {"scale": one})
    state = steps.TrainState(
        params=both,
        rest=None,
        optimizer=optax.sgd(1.0).init(both),
        average=both,
        finite=jnp.array(True),
        slow=one,
    )
    new = steps._next_state(
        state,
        jnp.array(1.0),
        both,
        tx=optax.sgd(1.0),
        ema_decay=0.75,
        memory_momentum=0.875,
    )
    for x in jax.tree.leaves(new.params):
        np.testing.assert_array_equal(x, [0, 0])
    for x in jax.tree.leaves(new.average):
        np.testing.assert_array_equal(x, [0.75, 0.75])
    np.testing.assert_array_equal(new.slow, [0.875, 0.875])
    assert new.finite


class Model(nnx.Module):
    def __init__(self):
        self.linear = nnx.Linear(4, 2, rngs=nnx.Rngs(0))
        self.norm = nnx.BatchNorm(2, rngs=nnx.Rngs(0))

    def __call__(self, images):
        return self.norm(self.linear(images.reshape(len(images), -1)))


def sum_of_squares(x, labels):
    return jnp.sum(x * x)


def test_statistics_are_of_all_chunks():
    images = np.random.default_rng(0).random((6, 2, 2, 1), np.float32)
    options = {"loss": sum_of_squares, "embed_chunk_size": 2, "progress": False}
    model, expected = Model(), Model()
    list(loop.fit(model, optax.sgd(0.0), [(images, np.arange(6))], steps=1, **options))
    for chunk in np.split(images, 3):
        expected(chunk)
    for one, other in (
        (model.norm.mean, expected.norm.mean),
        (model.norm.var, expected.norm.var),
    ):
        np.testing.assert_allclose(one[...], other[...], rtol=1e-5)


def test_every_step_augments_with_its_own_key():
    keys = []

    def augment(key, images):
        jax.debug.callback(
            lambda data: keys.append(tuple(data.tolist())), jax.random.key_data(key)
        )
        return images

    batches = [(np.zeros((3, 2, 2, 1), np.uint8), np.arange(3))] * 3
    options = {"loss": sum_of_squares, "augment": augment, "progress": False}
    for seed in (0, 1):
        list(loop.fit(Model(), optax.sgd(0.1), batches, steps=3, seed=seed, **options))
    jax.effects_barrier()
    assert len(keys) == len({*keys}) == 6
