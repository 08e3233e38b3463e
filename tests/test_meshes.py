"""One number on every mesh: none, Auto, Explicit, and inside shard_map."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from problems import LOSSES, batch, unless_slow

import tripletjax as tj

every_loss = pytest.mark.parametrize("name", unless_slow(LOSSES, ["batch hard"]))
N = 32


@pytest.fixture
def loss(name):
    return LOSSES[name][0]


def mesh(kind, shape=(8,), names=("data",)):
    return jax.make_mesh(shape, names, axis_types=(kind,) * len(shape))


def value_and_gradient(loss, x, labels):
    return jax.value_and_grad(lambda x: loss(tj.euclidean(x), labels, margin=0.3))(x)


@pytest.mark.parametrize("inside_jit", [False, True])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@every_loss
def test_sharded_batch(loss, kind, inside_jit):
    x, labels = batch(N)
    expected = value_and_gradient(loss, x, labels)
    sharding = NamedSharding(mesh(kind), PartitionSpec("data"))
    x, labels = jax.device_put((x, labels), sharding)
    run = lambda x, labels: value_and_gradient(loss, x, labels)  # noqa: E731
    # Outside jit, JAX differentiates nothing on an Explicit mesh that is not set.
    with jax.set_mesh(sharding.mesh):
        got = (jax.jit(run) if inside_jit else run)(x, labels)
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-5)
    np.testing.assert_allclose(got[1], expected[1], atol=1e-6)


def test_explicit_mesh_as_the_context():
    x, labels = batch(N)
    expected = tj.batch_hard_loss(tj.euclidean(x), labels)
    with jax.set_mesh(mesh(AxisType.Explicit, (4, 2), ("data", "model"))):
        x = jax.device_put(x, PartitionSpec("data", None))
        distances = tj.euclidean(x)
        assert distances.sharding.spec == PartitionSpec("data", None)
        terms = tj.batch_hard_loss(distances, labels, reduce_fn=None)
        assert terms.total.sharding.spec == PartitionSpec("data")
        got = tj.batch_hard_loss(distances, labels)
        np.testing.assert_allclose(got, expected, rtol=1e-5)
        vectors = [jax.device_put(batch(N, seed=s)[0], x.sharding) for s in (1, 2, 3)]
        loss = tj.triplet_margin_loss(*vectors)
    expected = tj.triplet_margin_loss(*map(np.asarray, vectors))
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


@pytest.mark.parametrize("inside_jit", [False, True])
def test_explicit_mesh_that_is_not_set(inside_jit):
    x, labels = batch(N)
    sharding = NamedSharding(mesh(AxisType.Explicit), PartitionSpec("data"))
    loss = lambda x, y: tj.batch_all_loss(tj.euclidean(x), y)  # noqa: E731
    expected = loss(x, labels)
    got = (jax.jit(loss) if inside_jit else loss)(
        *jax.device_put((x, labels), sharding)
    )
    np.testing.assert_allclose(got, expected, rtol=1e-5)


@pytest.mark.slow
def test_explicit_miners_and_metrics():
    x, labels = batch(N)
    d = tj.euclidean(x)
    sharding = NamedSharding(mesh(AxisType.Explicit), PartitionSpec("data"))
    sharded_d, sharded_labels = jax.device_put((d, labels), sharding)
    for got, expected in (
        (
            tj.all_triplets(sharded_labels, size=64),
            tj.all_triplets(labels, size=64),
        ),
        (
            tj.random_triplets(jax.random.key(0), sharded_labels),
            tj.random_triplets(jax.random.key(0), labels),
        ),
        (
            tj.batch_semi_hard_triplets(sharded_d, sharded_labels),
            tj.batch_semi_hard_triplets(d, labels),
        ),
        (
            tj.retrieval.evaluate(jax.device_put(x, sharding), sharded_labels),
            tj.retrieval.evaluate(x, labels),
        ),
    ):
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-6), got, expected
        )


@every_loss
def test_inside_shard_map(loss):
    """Each device takes its own rows against all: the terms add up to the whole."""
    x, labels = batch(N)
    expected = loss(tj.euclidean(x), labels, margin=0.3)
    expected_total = loss(tj.euclidean(x), labels, margin=0.3, reduce_fn=None).total

    def local(x, labels):
        everyone = jax.lax.all_gather(x, "data", tiled=True)
        all_labels = jax.lax.all_gather(labels, "data", tiled=True)
        positions = jax.lax.axis_index("data") * len(x) + jnp.arange(len(x))
        terms = loss(
            tj.euclidean(x, everyone),
            labels,
            reference_labels=all_labels,
            positions=positions,
            margin=0.3,
            reduce_fn=None,
        )
        summed = jax.tree.map(lambda t: jax.lax.psum(t.sum(), "data"), terms)
        return terms.total, summed

    spec = PartitionSpec("data")
    total, summed = jax.shard_map(
        local,
        mesh=mesh(AxisType.Auto),
        in_specs=(spec, spec),
        out_specs=(spec, PartitionSpec()),
    )(x, labels)
    np.testing.assert_allclose(total, expected_total, atol=1e-6)
    means = [tj.mean_active(summed), tj.mean_valid(summed)]
    assert np.isclose(means, expected, rtol=1e-5).any()
