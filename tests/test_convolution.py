"""Convolutions and their gradients, against XLA's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P
from problems import unless_full

from tripletjax.learn.networks import convolution as module
from tripletjax.learn.networks import embedding_networks, layers
from tripletjax.learn.networks.convolution import convolution

SAME = "SAME"


def by_xla(x, kernel, stride=1, padding=SAME):
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def with_gradients(function, x, kernel, *how):
    def both(x, kernel):
        y, back = jax.vjp(lambda x, kernel: function(x, kernel, *how), x, kernel)
        # Not the same for any two of them.
        return y, *back(jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape))

    return jax.jit(both)(x, kernel)


def images_and_kernel(shape, size, *, dtype=np.float32):
    random = np.random.default_rng(0)
    arrays = random.normal(size=shape), random.normal(size=(*size, shape[-1], 4))
    return [jnp.asarray(array, dtype) for array in arrays]


@pytest.mark.parametrize("shape", [(3, 3, 4, 8), (1, 7, 2, 5), (5, 5, 1, 6)])
def test_kernels_are_drawn_as_jax_draws_them(shape):
    key = jax.random.key(0)
    for ours, jaxs in (
        (module.HE_NORMAL, jax.nn.initializers.he_normal()),
        (module.LECUN_NORMAL, jax.nn.initializers.lecun_normal()),
    ):
        np.testing.assert_array_equal(ours(key, shape), jaxs(key, shape))
        assert ours(key, shape, jnp.bfloat16).dtype == jnp.bfloat16


def test_space_to_depth_keeps_every_pixel():
    x = jnp.arange(2 * 4 * 6 * 2.0).reshape(2, 4, 6, 2)
    y = module.space_to_depth(x, 2)
    assert y.shape == (2, 2, 3, 8)
    np.testing.assert_array_equal(y[1, 0, 1], x[1, :2, 2:4].ravel())
    np.testing.assert_array_equal(y[0, 1, 0], x[0, 2:, :2].ravel())


def test_odd_sides_are_made_even_first():
    x = jnp.arange(2 * 3 * 4 * 2.0).reshape(2, 3, 4, 2)
    y = module.space_to_depth(layers.pad_to_even(x), 2)
    assert y.shape == (2, 2, 2, 8)
    np.testing.assert_array_equal(y[1, 0, 1], x[1, :2, 2:].ravel())
    np.testing.assert_array_equal(y[0, 1, 0, :4], x[0, 2, :2].ravel())


@pytest.mark.parametrize(
    ("shape", "size", "stride", "padding"),
    [
        # Images of 70 x 70 go one at a time, of 40 x 40 two; 7 in one part or in 7.
        ((3, 70, 70, 2), (3, 3), 1, SAME),
        ((6, 40, 40, 2), (3, 3), 1, SAME),
        ((7, 40, 40, 2), (3, 3), 1, SAME),
        ((7, 8, 5, 3), (3, 3), 1, SAME),
        ((1, 8, 5, 3), (5, 5), 1, SAME),
        ((2, 8, 9, 3), (1, 7), 1, ((0, 0), (3, 3))),
        ((2, 8, 9, 3), (7, 1), 1, ((3, 3), (0, 0))),
        ((2, 8, 9, 3), (2, 4), 1, "VALID"),
        ((2, 8, 9, 3), (3, 3), 1, ((1, 2), (0, 4))),
        ((2, 8, 9, 3), (1, 1), 1, ((1, 2), (0, 4))),
        ((2, 8, 9, 3), (1, 1), 1, SAME),
        ((2, 3, 3, 3), (3, 3), 1, SAME),
        ((2, 9, 12, 3), (3, 3), 2, SAME),
        ((2, 9, 12, 3), (5, 5), 2, ((2, 2), (1, 3))),
        ((2, 9, 12, 3), (1, 1), 2, SAME),
        ((2, 9, 12, 3), (1, 1), 2, ((1, 0), (0, 2))),
        ((2, 9, 12, 3), (2, 2), 2, "VALID"),
        ((2, 5, 6, 3), (3, 3), 3, SAME),
    ],
)
def test_values_and_gradients(shape, size, stride, padding):
    arrays = images_and_kernel(shape, size)
    expected = with_gradients(by_xla, *arrays, stride, padding)
    got = with_gradients(convolution, *arrays, stride, padding)
    for one, other in zip(got, expected, strict=True):
        scale = np.abs(other).max()
        np.testing.assert_allclose(one / scale, other / scale, atol=3e-6)


def test_low_precision_adds_up_in_float32():
    arrays = images_and_kernel((8, 40, 40, 2), (3, 3), dtype=jnp.bfloat16)

    def gradient(function, x, kernel):
        y, back = jax.vjp(lambda kernel: function(x, kernel, 1, SAME), kernel)
        return back(jnp.ones_like(y))[0]

    got = gradient(convolution, *arrays)
    assert got.dtype == jnp.bfloat16
    exact = gradient(by_xla, *(array.astype(jnp.float32) for array in arrays))
    error = np.abs(got.astype(jnp.float32) - exact).max() / np.abs(exact).max()
    # The last rounding's alone: in bfloat16 a sum of 12,800 terms is off by far more.
    assert error < 2**-8


def test_only_cpus_have_another_gradient():
    x, kernel = images_and_kernel((8, 40, 40, 2), (3, 3))
    gradient = jax.jit(jax.grad(lambda kernel: convolution(x, kernel, 1, SAME).sum()))
    for platform, loops in (("cpu", True), ("cuda", False), ("tpu", False)):
        lowered = gradient.trace(kernel).lower(lowering_platforms=(platform,))
        assert ("stablehlo.while" in lowered.as_text()) == loops, platform


@pytest.mark.parametrize("way", ["shard_map", "unchecked", "auto"])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_batch_split_over_devices(way, stride):
    x, kernel = images_and_kernel((16, 40, 40, 2), (3, 3))

    def gradients(x, kernel):
        return jax.grad(
            lambda x, kernel: (convolution(x, kernel, stride, SAME) ** 2).sum(), (0, 1)
        )(x, kernel)

    expected = jax.jit(gradients)(x, kernel)
    mesh = jax.make_mesh((4,), ("data",), (jax.sharding.AxisType.Auto,))
    split = jax.device_put(x, jax.NamedSharding(mesh, P("data")))
    whole = jax.device_put(kernel, jax.NamedSharding(mesh, P()))
    function = gradients
    if way != "auto":

        def of_part(x, kernel):
            along_x, along_kernel = gradients(x, kernel)
            if way == "unchecked":
                along_kernel = jax.lax.psum(along_kernel, "data")
            return along_x, along_kernel

        function = jax.shard_map(
            of_part,
            mesh=mesh,
            in_specs=(P("data"), P()),
            out_specs=(P("data"), P()),
            check_vma=way == "shard_map",
        )
    for one, other in zip(jax.jit(function)(split, whole), expected, strict=True):
        scale = np.abs(other).max()
        np.testing.assert_allclose(one / scale, other / scale, atol=3e-6)


NETWORKS = {
    "EmbeddingCNN": {"channels": (8, 8)},
    "EmbeddingResNet": {"channels": (8, 16), "blocks": 1},
    "EmbeddingPhotoNet": {"channels": (8, 8), "size": (16, 18)},
    "MultiScaleCNN": {"channels": (8, 8), "shallow": 8},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", unless_full(NETWORKS, ["EmbeddingPhotoNet"]))
def test_networks_on_explicit_meshes(name):
    network, options = (
        getattr(embedding_networks, name),
        NETWORKS[name] | {"in_channels": 3},
    )
    graph, params = nnx.split(network(4, **options, rngs=nnx.Rngs(0)))
    x, _ = images_and_kernel((8, 16, 18, 3), (1, 1))

    def summed(params, x):
        return (nnx.merge(graph, params)(x)[:, 0] ** 3).sum()

    expected = jax.jit(jax.grad(summed))(params, x)
    mesh = jax.make_mesh((4,), ("data",), (jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, P()), jax.device_put(x, P("data"))
        got = jax.jit(jax.grad(summed))(*placed)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * largest),
        got,
        expected,
    )


@pytest.mark.parametrize("name", ["EmbeddingCNN", "EmbeddingResNet"])
def test_networks_of_one_kind_are_compiled_once(name):
    network = getattr(embedding_networks, name)
    one, other = (
        nnx.graphdef(nnx.eval_shape(lambda seed=seed: network(4, rngs=nnx.Rngs(seed))))
        for seed in range(2)
    )
    assert one == other
    assert hash(one) == hash(other)


@pytest.mark.parametrize("known", [True, False])
def test_programs_without_ynnpack(known, monkeypatch):
    if not known:
        monkeypatch.setattr(module, "KNOWN_UNTIL", (0, 1))
    scaled = module.jit(lambda x, *, by: by * x, static_argnames="by")
    np.testing.assert_array_equal(scaled(jnp.arange(3), by=2), [0, 2, 4])
    # Of another version it is `jax.jit`'s own.
    assert known != hasattr(scaled, "lower")
