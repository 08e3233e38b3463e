"""Batches in chunks have the embeddings and gradients of the whole batch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from problems import unless_slow

import tripletjax as tj

N = 14
LABELS = np.arange(N) % 4
DRAW = np.random.default_rng(0)
X, Y = (DRAW.normal(size=(N, 6)).astype(np.float32) for _ in range(2))
PARAMS = {
    "first": jnp.asarray(DRAW.normal(size=(6, 8)), jnp.float32),
    "second": jnp.asarray(DRAW.normal(size=(8, 5)), jnp.float32),
}
# Chunks that divide the batch, that do not, of one item, and one of the whole batch.
SIZES = [7, 4, 1, 14, 99]


def encoder(params, x):
    return jnp.tanh(x @ params["first"]) @ params["second"]


def keep(key, shape):
    return jax.random.bernoulli(key, 0.7, shape)


def dropout_encoder(params, x, key):
    hidden = jnp.tanh(x @ params["first"])
    return jnp.where(keep(key, hidden.shape), hidden, 0) @ params["second"]


def assert_same(got, expected, rtol=2e-5):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected)):
        scale = float(np.abs(other).max())
        np.testing.assert_allclose(one, other, rtol=rtol, atol=rtol * scale)


def supcon(x, temperature=0.3):
    return tj.blockwise.supcon_loss(x, LABELS, temperature=temperature)


@pytest.mark.parametrize("chunk_size", unless_slow(SIZES, [4]))
def test_value_and_gradients_are_those_of_the_batch(chunk_size):
    """By parameters, by inputs and by the temperature of the loss."""

    def loss(params, x, temperature, *, in_chunks):
        embed = encoder
        if in_chunks:
            embed = functools.partial(
                tj.encode_in_chunks, encoder, chunk_size=chunk_size
            )
        return supcon(embed(params, x), temperature)

    got, expected = (
        jax.jit(jax.value_and_grad(functools.partial(loss, in_chunks=flag), (0, 1, 2)))(
            PARAMS, X, 0.3
        )
        for flag in (True, False)
    )
    assert_same(got, expected)


def test_auxiliary_results_and_pytrees():
    """Two inputs, two outputs, integers among them, and metrics of the loss."""

    def both(params, inputs):
        x, scale = inputs["x"], inputs["scale"]
        out = encoder(params, x) * scale[:, None]
        return {"vectors": out, "halves": (out[:, :2], scale)}

    inputs = {"x": X, "scale": np.arange(N)}

    def loss(params, *, in_chunks):
        embed = both
        if in_chunks:
            embed = functools.partial(tj.encode_in_chunks, both, chunk_size=4)
        out = embed(params, inputs)
        first, scale = out["halves"]
        value = supcon(out["vectors"]) + jnp.sum(first * scale[:, None])
        return value, {"length": jnp.linalg.norm(out["vectors"]), "scale": scale}

    with jax.numpy_dtype_promotion("standard"):
        got, expected = (
            jax.value_and_grad(functools.partial(loss, in_chunks=flag), has_aux=True)(
                PARAMS
            )
            for flag in (True, False)
        )
    assert_same(got, expected)


@pytest.mark.parametrize("chunk_size", unless_slow([4, 7, 99], [4]))
def test_dropout_is_the_same_in_both_passes(chunk_size):
    """Each chunk has its key, which the gradient uses again."""
    key, size = jax.random.key(1), min(chunk_size, N)

    def loss(params):
        x = tj.encode_in_chunks(
            dropout_encoder, params, X, chunk_size=chunk_size, key=key
        )
        return supcon(x)

    def expected(params):
        parts = [
            dropout_encoder(params, X[start : start + size], jax.random.fold_in(key, i))
            for i, start in enumerate(range(0, N, size))
        ]
        return supcon(jnp.concatenate(parts))

    got = jax.value_and_grad(loss)(PARAMS)
    assert_same(got, jax.value_and_grad(expected)(PARAMS))


def test_keys_of_items_do_not_depend_on_the_chunks():
    def item_encoder(params, inputs):
        return jax.vmap(functools.partial(dropout_encoder, params))(*inputs)

    inputs = X, jax.random.split(jax.random.key(2), N)

    def loss(params, *, chunk_size):
        return supcon(
            tj.encode_in_chunks(item_encoder, params, inputs, chunk_size=chunk_size)
        )

    expected = jax.value_and_grad(lambda p: supcon(item_encoder(p, inputs)))(PARAMS)
    for chunk_size in (3, 7):
        got = jax.value_and_grad(functools.partial(loss, chunk_size=chunk_size))(PARAMS)
        assert_same(got, expected)


@pytest.mark.parametrize("shared", unless_slow([False, True], [True]))
def test_two_sides(shared):
    """Queries and documents, of different numbers, with one encoder or with two."""
    documents = np.concatenate([Y, X[:5] + 1])
    labels = {"reference_labels": np.concatenate([LABELS, np.full(5, -1)])}

    def document_encoder(params, y):
        return jnp.sin(y @ params["first"]) @ params["second"]

    def loss(params, *, in_chunks):
        query, document = (params, params) if shared else params
        sides = (
            (encoder, query, X),
            (encoder if shared else document_encoder, document, documents),
        )
        x, y = (
            tj.encode_in_chunks(*side, chunk_size=4)
            if in_chunks
            else side[0](*side[1:])
            for side in sides
        )
        return tj.blockwise.info_nce_loss(
            x, LABELS, references=y, symmetric=True, temperature=0.3, **labels
        )

    params = PARAMS
    if not shared:
        params = PARAMS, jax.tree.map(lambda x: x[::-1] + 0.5, PARAMS)
    got, expected = (
        jax.jit(jax.value_and_grad(functools.partial(loss, in_chunks=flag)))(params)
        for flag in (True, False)
    )
    assert_same(got, expected)


@pytest.mark.slow
def test_double_precision():
    with jax.enable_x64(True):
        params = jax.tree.map(lambda x: x.astype(jnp.float64), PARAMS)
        x = X.astype(np.float64)

        def loss(params):
            return supcon(tj.encode_in_chunks(encoder, params, x, chunk_size=4))

        got = jax.value_and_grad(loss)(params)
        expected = jax.value_and_grad(lambda p: supcon(encoder(p, x)))(params)
        assert got[0].dtype == jnp.float64
        assert_same(got, expected, rtol=1e-12)


def test_gradients_by_arrays_that_the_encoder_closes_over():
    def loss(params, *, in_chunks):
        def of_inputs(_, x):
            return encoder(params, x)

        if not in_chunks:
            return supcon(of_inputs(None, X))
        return supcon(tj.encode_in_chunks(of_inputs, None, X, chunk_size=4))

    for wrap in (jax.jit, lambda f: f):
        got, expected = (
            wrap(jax.value_and_grad(functools.partial(loss, in_chunks=flag)))(PARAMS)
            for flag in (True, False)
        )
        assert_same(got, expected)


def test_forward_mode_and_second_derivatives():
    def loss(params, *, in_chunks):
        embed = encoder
        if in_chunks:
            embed = functools.partial(tj.encode_in_chunks, encoder, chunk_size=4)
        return tj.supcon_loss(tj.cosine(embed(params, X)), LABELS)

    got, expected = (
        jax.jvp(
            jax.grad(functools.partial(loss, in_chunks=flag)), (PARAMS,), (PARAMS,)
        )[1]
        for flag in (True, False)
    )
    assert_same(got, expected, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2, 4])
def test_meshes(devices):
    """Each device has chunks of its own rows; the sum over devices comes once."""
    labels, x = np.arange(24) % 4, np.tile(X, (2, 1))[:24] + np.arange(24)[:, None] / 9
    x = jnp.asarray(x, jnp.float32)

    def loss(params, x, labels, *, axis_name=None, in_chunks=True):
        embed = encoder
        if in_chunks:
            embed = functools.partial(tj.encode_in_chunks, encoder, chunk_size=4)
        return tj.blockwise.supcon_loss(embed(params, x), labels, axis_name=axis_name)

    expected = jax.value_and_grad(functools.partial(loss, in_chunks=False))(
        PARAMS, x, labels
    )
    mesh = jax.make_mesh(
        (devices,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)
    )
    program = jax.jit(
        jax.shard_map(
            jax.value_and_grad(functools.partial(loss, axis_name="data")),
            mesh=mesh,
            in_specs=(P(), P("data"), P("data")),
            out_specs=P(),
        )
    )
    assert_same(program(PARAMS, x, jnp.asarray(labels)), expected)


def test_activations_are_those_of_one_chunk():
    """Those of all inputs take 64 MiB a layer."""

    def deep(params, x):
        for layer in params:
            x = jnp.tanh(x @ layer)
        return x[:, :4]

    def loss(params, x):
        return jnp.sum(tj.encode_in_chunks(deep, params, x, chunk_size=256) ** 2)

    params = [jax.ShapeDtypeStruct((1024, 1024), jnp.float32)] * 4
    x = jax.ShapeDtypeStruct((2**14, 1024), jnp.float32)
    for n in (2**14, 2**14 - 100):
        x = jax.ShapeDtypeStruct((n, 1024), jnp.float32)
        program = jax.jit(jax.value_and_grad(loss)).lower(params, x).compile()
        # Parameters have gradients of 16 MiB, and a chunk 1 MiB a layer.
        inputs = 0 if n == 2**14 else 2**26
        assert program.memory_analysis().temp_size_in_bytes < 2**26 + inputs


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"encoder": 3}, TypeError, "encoder must be callable, got 3"),
        ({"chunk_size": 0}, ValueError, "chunk_size must be at least 1, got 0"),
        ({"chunk_size": 2.0}, TypeError, "chunk_size must be an integer"),
        ({"inputs": ()}, ValueError, "inputs must be arrays with one number of rows"),
        ({"inputs": (X, X[1:])}, ValueError, r"got shapes \[\(14, 6\), \(13, 6\)\]"),
        ({"inputs": np.float32(1)}, ValueError, r"got shapes \[\(\)\]"),
        (
            {"encoder": lambda params, x: x.sum()},
            ValueError,
            r"one row for each of 4 inputs, got shape \(\)",
        ),
    ],
)
def test_bad_input_is_named(change, error, words):
    arguments = {"encoder": encoder, "inputs": X, "chunk_size": 4} | change
    with pytest.raises(error, match=words):
        tj.encode_in_chunks(
            arguments["encoder"],
            PARAMS,
            arguments["inputs"],
            chunk_size=arguments["chunk_size"],
        )
