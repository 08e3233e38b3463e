"""Functions as arguments: gradients by what they close over, and equal functions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from problems import unless_slow

import tripletjax as tj
from tripletjax._closures import canonical

LOSSES = ["batch_all_loss", "batch_hard_loss", "batch_semi_hard_loss"]
DRAW = np.random.default_rng(0)
X = jnp.asarray(DRAW.normal(size=(12, 3)), jnp.float32)
LABELS = jnp.arange(12) % 3
SLOPE = 2.0
SCALE = jnp.array([1.0, 2.0, 0.5])


def learned_metric(scale):
    return tj.Metric(lambda a, b: jnp.sqrt(jnp.sum((scale * (a - b)) ** 2) + 1e-9))


def learned_hinge(temperature):
    return lambda gap: jax.nn.softplus(temperature * gap) / temperature


def oracle(name, scale, temperature, x=X):
    """The loss of the whole matrix, by operations that JAX differentiates."""
    distances = jnp.sqrt(jnp.sum(((x[:, None] - x[None]) * scale) ** 2, axis=-1) + 1e-9)
    hinge = learned_hinge(temperature)
    if name == "batch_all_loss":
        positive, negative = tj.pair_masks(LABELS)
        valid = positive[:, :, None] & negative[:, None, :]
        gaps = distances[:, :, None] - distances[:, None, :] + 1.0
        return jnp.sum(jnp.where(valid, hinge(gaps), 0)) / jnp.sum(valid)
    triplets = getattr(tj, name.replace("_loss", "_triplets"))(distances, LABELS)
    return tj.triplet_loss(distances, triplets, margin=1.0, hinge=hinge)


def blockwise(name, scale, temperature, x=X, **options):
    return getattr(tj.blockwise, name)(
        x,
        LABELS,
        margin=1.0,
        metric=learned_metric(scale),
        hinge=learned_hinge(temperature),
        reduce_fn=tj.mean_valid,
        **options,
    )


def hinge_alone(name, temperature, **options):
    """With a metric made of products, whose triplets are mined by tiles."""
    return getattr(tj.blockwise, name)(
        X,
        LABELS,
        margin=1.0,
        hinge=learned_hinge(temperature),
        reduce_fn=tj.mean_valid,
        **options,
    )


def assert_close(got, want):
    assert all(np.any(x != 0) for x in jax.tree.leaves(want))
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), got, want
    )


@pytest.mark.parametrize("name", unless_slow(LOSSES, ["batch_hard_loss"]))
def test_learned_metric_and_hinge(name):
    """Value and gradient by all that is closed over, and by the embeddings."""
    got, want = (
        jax.jit(jax.value_and_grad(functools.partial(loss, name), argnums=(0, 1, 2)))(
            SCALE, 2.0, X
        )
        for loss in (blockwise, oracle)
    )
    assert_close(got, want)


@pytest.mark.parametrize("name", unless_slow(LOSSES, ["batch_semi_hard_loss"]))
def test_learned_hinge(name):
    got, want = (
        jax.jit(jax.value_and_grad(loss))(2.0)
        for loss in (
            functools.partial(hinge_alone, name),
            functools.partial(oracle, name, 1.0),
        )
    )
    assert_close(got, want)


@pytest.mark.slow
@pytest.mark.parametrize("name", LOSSES)
def test_large_classes(name):
    """More positives than tiles take, and than the shortest loop has steps."""
    x = jnp.asarray(DRAW.normal(size=(48, 3)), jnp.float32)
    labels = jnp.minimum(jnp.arange(48), 25)
    masks = tj.pair_masks(labels)

    def loss(pairs, temperature):
        return getattr(tj.blockwise, name)(
            x, pairs, margin=1.0, hinge=learned_hinge(temperature)
        )

    def plain(temperature):
        return getattr(tj, name)(
            tj.euclidean(x), labels, margin=1.0, hinge=learned_hinge(temperature)
        )

    want = jax.jit(jax.value_and_grad(plain))(2.0)
    for pairs in (labels, masks):
        got = jax.jit(jax.value_and_grad(functools.partial(loss, pairs)))(2.0)
        assert_close(got, want)


def test_hinge_of_the_matrix():
    def loss(temperature, x):
        return tj.batch_all_loss(
            learned_metric(SCALE)(x),
            LABELS,
            margin=1.0,
            hinge=learned_hinge(temperature),
            reduce_fn=tj.mean_valid,
        )

    want = jax.jit(
        jax.value_and_grad(
            lambda t, x: oracle("batch_all_loss", SCALE, t, x), argnums=(0, 1)
        )
    )(2.0, X)
    assert_close(jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(2.0, X), want)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["batch_all_loss", "batch_hard_loss"])
def test_transformations(name):
    loss = functools.partial(blockwise, name, SCALE)
    temperatures = jnp.array([1.0, 2.0])
    want = jax.vmap(jax.value_and_grad(functools.partial(oracle, name, SCALE)))(
        temperatures
    )

    def scanned(temperatures):
        def step(total, temperature):
            return total + loss(temperature), None

        return jax.lax.scan(step, 0.0, temperatures)[0]

    assert_close(jax.vmap(jax.value_and_grad(loss))(temperatures), want)
    assert_close(jax.vmap(lambda t: jax.jvp(loss, (t,), (1.0,)))(temperatures), want)
    assert_close(
        jax.jit(jax.value_and_grad(scanned))(temperatures), (want[0].sum(), want[1])
    )
    assert_close(jax.grad(jax.checkpoint(jax.jit(loss)))(2.0), want[1][1])
    second = jax.hessian(functools.partial(oracle, name, SCALE))(2.0)
    assert_close(jax.jit(jax.hessian(loss))(2.0), second)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("name", LOSSES)
def test_meshes(name, kind):
    """Closed-over arrays are the same on all devices, their gradients of all rows."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(kind,))
    rows = PartitionSpec("data")
    x = jax.device_put(X, NamedSharding(mesh, rows))
    labels = jax.device_put(LABELS, NamedSharding(mesh, rows))

    def inside(scale, temperature, x):
        def local(x, labels):
            return getattr(tj.blockwise, name)(
                x,
                labels,
                margin=1.0,
                metric=learned_metric(scale),
                hinge=learned_hinge(temperature),
                axis_name="data",
                reduce_fn=tj.mean_valid,
            )

        shard = jax.shard_map(
            local, mesh=mesh, in_specs=(rows, rows), out_specs=PartitionSpec()
        )
        return shard(x, labels)

    outside = functools.partial(blockwise, name, axis_name="data")
    loss = functools.partial(oracle, name)
    want = jax.value_and_grad(loss, argnums=(0, 1, 2))(SCALE, 2.0, X)
    with jax.set_mesh(mesh):
        for loss in (inside, outside):
            value_and_grad = jax.value_and_grad(loss, argnums=(0, 1, 2))
            assert_close(jax.jit(value_and_grad)(SCALE, 2.0, x), want)


@pytest.mark.parametrize("name", LOSSES)
def test_arrays_that_are_not_traced(name):
    """Nothing changes for a function that closes over arrays with values."""

    def programs(x, hinge):
        loss = getattr(tj.blockwise, name)
        return str(
            jax.make_jaxpr(lambda x: loss(x, LABELS, margin=1.0, hinge=hinge))(x)
        )

    temperature = jnp.array(2.0)
    assert "name=total_terms" in programs(X, learned_hinge(temperature))
    assert "name=total_terms" in programs(X, jax.nn.relu)


@pytest.mark.parametrize("name", LOSSES)
def test_a_function_that_fails(name):
    def broken(gap):
        raise ArithmeticError("of the hinge")

    with pytest.raises(ArithmeticError, match="of the hinge"):
        getattr(tj.blockwise, name)(X, LABELS, hinge=broken)


def scaled(by, function=jax.nn.softplus):
    return lambda gap: function(by * gap) / by


def test_equal_functions_are_one():
    assert canonical(scaled(2.0)) is canonical(scaled(2.0))
    part = functools.partial(scaled(2.0), 1)
    assert canonical(part) is canonical(functools.partial(scaled(2.0), 1))
    assert canonical(scaled(2.0)) is not canonical(scaled(2))
    assert canonical(scaled(0.0)) is not canonical(scaled(-0.0))
    assert canonical(scaled(2.0)) is not canonical(scaled(2.0, jax.nn.relu))

    def chebyshev():
        return tj.Metric(lambda a, b: jnp.max(jnp.abs(a - b)))

    assert chebyshev() == chebyshev()
    assert chebyshev() != tj.Metric(lambda a, b: jnp.max(a - b))


def test_functions_of_what_may_change_are_their_own(monkeypatch):
    array = np.ones(())
    for by in (array, jnp.ones(()), [1.0]):
        first, second = scaled(by), scaled(by)
        assert canonical(first) is first
        assert canonical(second) is second

    def of_a_global():
        return lambda gap: SLOPE * gap

    first = canonical(of_a_global())
    assert canonical(of_a_global()) is first
    monkeypatch.setitem(globals(), "SLOPE", 3.0)
    assert canonical(of_a_global()) is not first


def test_calls_that_mean_the_same_share_a_program():
    distances = np.float32(np.random.default_rng(1).random((9, 9)))
    labels = np.arange(9) % 3
    traced = []

    def reduce_fn(terms):
        traced.append(None)
        return tj.mean_valid(terms)

    for args, options in (
        ((distances, labels), {}),
        ((distances, labels), {"margin": 0.1}),
        ((distances, labels), {"margin": np.float32(0.2)}),
        ((distances, labels), {"margin": 1}),
        ((distances, labels), {"hinge": jax.nn.relu, "where": None}),
        ((distances, labels.astype(np.int8)), {}),
        ((distances,), {"labels": labels.astype(np.uint16)}),
        ((distances.astype(">f4"), labels.astype(">i4")), {}),
    ):
        tj.batch_hard_loss(*args, reduce_fn=reduce_fn, **options)
    assert len(traced) == 1


def test_big_endian_arrays():
    x, labels = np.float32(DRAW.normal(size=(8, 3))), np.arange(8) % 2
    want = tj.blockwise.batch_hard_loss(x, labels)
    got = tj.blockwise.batch_hard_loss(x.astype(">f4"), labels.astype(">i8"))
    assert got == want
