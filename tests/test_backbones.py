"""Pretrained networks: the same as by hand, from files that fit and no others."""

import itertools
import re

import backbone_oracles as by_hand
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from problems import in_lanes
from safetensors.numpy import load_file, save_file

from tripletjax.learn.networks import backbones, heads, weights
from tripletjax.learn.networks.backbones import vit
from tripletjax.learn.networks.backbones.layers import BatchNorm, Conv, max_pool
from tripletjax.learn.networks.embedding import embed_images
from tripletjax.learn.networks.embedding_networks import Standardized
from tripletjax.learn.training import optimizer

# A file of each family, its network by hand, and two sizes of images.
NETWORKS = {
    "resnet": (by_hand.small_resnet, by_hand.resnet, [(33, 48), (64, 64)]),
    "resnet, bottlenecks": (
        lambda: by_hand.small_resnet(bottleneck=True),
        by_hand.resnet,
        [(40, 40), (32, 70)],
    ),
    "vit": (
        by_hand.small_vit,
        lambda arrays, x: by_hand.vit(arrays, x, heads=2),
        [(42, 42), (56, 28)],
    ),
    "convnext": (by_hand.small_convnext, by_hand.convnext, [(32, 32), (64, 37)]),
    "inception-resnet-v1": (
        by_hand.small_inception_resnet,
        by_hand.inception_resnet,
        [(75, 75), (80, 91)],
    ),
}


def written(tmp_path, arrays, name="weights.safetensors"):
    file = tmp_path / name
    save_file(arrays, file)
    return file


@pytest.mark.parametrize(
    "name",
    [
        "resnet",
        "vit",
        pytest.param("resnet, bottlenecks", marks=pytest.mark.slow),
        pytest.param("convnext", marks=pytest.mark.slow),
        pytest.param("inception-resnet-v1", marks=pytest.mark.full),
    ],
)
def test_the_same_as_by_hand(tmp_path, name):
    make, forward, sizes = NETWORKS[name]
    arrays = make()
    network, loaded = backbones.load(written(tmp_path, arrays))
    assert backbones.recognise(tmp_path / "weights.safetensors").family in name
    assert loaded.parameters == sum(
        array.size
        for key, array in arrays.items()
        if key not in loaded.unused and "running" not in key
    )
    exact = {key: value.astype(np.float64) for key, value in arrays.items()}
    draw = np.random.default_rng(1)
    for height, width in sizes:
        x = draw.normal(size=(2, 3, height, width))
        expected = forward(exact, x)
        got = jax.jit(network)(x.transpose(0, 2, 3, 1).astype(np.float32))
        assert got.shape == expected.shape
        np.testing.assert_allclose(
            got, expected, rtol=0, atol=1e-4 * abs(expected).max()
        )


def test_convnext_under_its_authors_names(tmp_path):
    arrays = by_hand.small_convnext()
    renamed = {}
    for name, value in arrays.items():
        for timm, theirs in (
            (r"stem\.", "downsample_layers.0."),
            (r"stages\.(\d)\.downsample\.", r"downsample_layers.\1."),
            (r"\.blocks\.", "."),
            ("conv_dw", "dwconv"),
            (r"mlp\.fc", "pwconv"),
            (r"head\.norm", "norm"),
            (r"head\.fc", "head"),
        ):
            name = re.sub(timm, theirs, name)
        renamed[name] = value
    one, other = (
        nnx.state(backbones.load(written(tmp_path, of))[0]) for of in (arrays, renamed)
    )
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize(
    "name",
    [
        "resnet",
        pytest.param("vit", marks=pytest.mark.slow),
        pytest.param("convnext", marks=pytest.mark.full),
    ],
)
def test_the_gradient_is_the_slope_by_hand(tmp_path, name):
    make, forward, sizes = NETWORKS[name]
    arrays = make()
    network, _ = backbones.load(written(tmp_path, arrays))
    exact = {key: value.astype(np.float64) for key, value in arrays.items()}
    draw = np.random.default_rng(2)
    x = draw.normal(size=(1, 3, *sizes[1]))
    along, towards = draw.normal(size=x.shape), draw.normal(size=network.features)

    def loss(x):
        return jnp.sum(network(x) @ towards.astype(np.float32))

    step = 1e-6
    ends = [
        float((forward(exact, x + s * along) @ towards).sum()) for s in (step, -step)
    ]
    slope = (ends[0] - ends[1]) / (2 * step)
    gradient = jax.jit(jax.grad(loss))(x.transpose(0, 2, 3, 1).astype(np.float32))
    got = float((np.asarray(gradient, np.float64) * along.transpose(0, 2, 3, 1)).sum())
    assert got == pytest.approx(slope, rel=1e-3)


SIDES = [(3, 3), (14, 20), (17, 31)]
KERNELS = [(1, 1), (2, 2), (3, 3), (7, 7), (1, 7), (14, 14)]
STRIDES = [1, 2, 3]


@in_lanes(
    ("shape", "size", "stride"),
    itertools.product(SIDES, KERNELS, STRIDES),
    quick=[((3, 3), size, 2) for size in KERNELS],
    # Pairwise: every kernel once more, both other shapes, both other strides.
    slow=[*zip(3 * SIDES[1:], KERNELS, [1, 3, 3, 1, 1, 3])],
)
def test_convolutions(shape, size, stride):
    padding = tuple(side // 2 for side in size)
    layer = Conv(3, 4, size, stride, padding, bias=True, dtype=None, rngs=nnx.Rngs(0))
    layer.bias[...] = jnp.arange(4.0)
    x = np.random.default_rng(0).normal(size=(2, *shape, 3)).astype(np.float32)
    expected = by_hand.conv(
        x.transpose(0, 3, 1, 2),
        np.asarray(layer.kernel[...]).transpose(3, 2, 0, 1),
        np.arange(4.0),
        stride,
        padding,
    )
    np.testing.assert_allclose(
        layer(x), expected.transpose(0, 2, 3, 1), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    ("size", "stride", "padding"), [(3, 2, 1), (3, 2, 0), (2, 2, 0)]
)
def test_max_pool(size, stride, padding):
    x = np.random.default_rng(0).normal(size=(2, 9, 12, 3)) - 10
    expected = by_hand.max_pool(x.transpose(0, 3, 1, 2), size, stride, padding)
    got = max_pool(jnp.asarray(x, jnp.float32), size, stride, padding)
    np.testing.assert_allclose(got, expected.transpose(0, 2, 3, 1), rtol=1e-6)


def test_statistics_stay_unless_they_are_to_be_learnt():
    x = np.random.default_rng(0).normal(3, 2, size=(50, 4)).astype(np.float32)
    frozen, learnt = BatchNorm(4), BatchNorm(4, learn_statistics=True)
    for norm in (frozen, learnt):
        norm.train()
    np.testing.assert_allclose(frozen(x), x, rtol=1e-4)
    y = learnt(x)
    np.testing.assert_allclose(y.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(y.std(0), 1, rtol=1e-4)
    np.testing.assert_allclose(learnt.mean[...], 0.1 * x.mean(0), rtol=1e-5)
    np.testing.assert_allclose(learnt.var[...], 0.9 + 0.1 * x.var(0, ddof=1), rtol=1e-5)
    learnt.eval()
    kept = np.array(learnt.mean[...])
    learnt(x)
    np.testing.assert_array_equal(learnt.mean[...], kept)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda x: x.pop("layer2.0.conv1.weight"), "of no known network"),
        (lambda x: x.pop("layer2.0.conv2.weight"), "missing: layer2.0.conv2.kernel"),
        (lambda x: x.update(extra=np.ones(3, np.float32)), "left over: extra [3]"),
        (
            lambda x: x.update({"layer1.7.conv1.weight": np.ones(3, np.float32)}),
            "left over: layer1.7.conv1.weight [3], for layer1.7.conv1.kernel",
        ),
        (
            lambda x: x.update({"bn1.bias": np.ones(3, np.float32)}),
            "misshapen: bn1.bias [3], for bn1.bias, which is [8] here",
        ),
        (
            lambda x: x.update({"bn1.bias": np.ones(8, np.int32)}),
            "misshapen: bn1.bias",
        ),
        (
            lambda x: x.update({"bn1.bias": np.full(8, np.nan, np.float32)}),
            "not finite: bn1.bias",
        ),
    ],
    ids=["recognised by", "missing", "extra", "deep", "shape", "integers", "nan"],
)
def test_strict_loading(tmp_path, change, told):
    arrays = by_hand.small_resnet()
    change(arrays)
    with pytest.raises(weights.WeightsError) as error:
        backbones.load(written(tmp_path, arrays))
    assert told in str(error.value)


def test_nothing_is_filled_where_something_is_wrong(tmp_path):
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    before = np.array(model.kernel[...])
    file = written(tmp_path, {"weight": np.ones((3, 2), np.float32)})
    with pytest.raises(weights.WeightsError, match=r"missing: bias \[3\]"):
        weights.load_weights(model, file, {"weight": "kernel"})
    np.testing.assert_array_equal(model.kernel[...], before)


def test_rules_that_contradict_one_another(tmp_path):
    model = nnx.Linear(2, 3, use_bias=False, rngs=nnx.Rngs(0))
    kernel = np.ones((3, 2), np.float32)
    file = written(tmp_path, {"weight": kernel})
    with pytest.raises(weights.WeightsError, match="named by several rules: weight"):
        weights.load_weights(model, file, {"weight": "kernel", "w.*": "kernel"})
    file = written(tmp_path, {"a": kernel, "b": kernel})
    with pytest.raises(weights.WeightsError, match="filled twice: parts of kernel"):
        weights.load_weights(model, file, {"a|b": "kernel"})


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "is empty: 0 bytes"),
        (b"PK\x03\x04" + bytes(40), "is a pickle"),
        (b"\x80\x02}q\x00.", "is a pickle"),
        (b"no weights at all", "no whole safetensors file"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "pointer of Git LFS"),
        (b"\n<!DOCTYPE html><html>", "is a web page"),
        (b'{"metadata": {}, "weight_map": {}}', r"index .*shards.*Join the shards"),
    ],
    ids=["empty", "zip", "pickle", "text", "lfs", "page", "index"],
)
def test_what_is_no_file_of_weights(tmp_path, content, told):
    file = tmp_path / "weights.safetensors"
    file.write_bytes(content)
    with pytest.raises(weights.WeightsError, match=told):
        backbones.load(file)


def test_a_truncated_file_and_a_folder(tmp_path):
    file = written(tmp_path, by_hand.small_resnet())
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(weights.WeightsError, match="no whole safetensors file"):
        backbones.load(file)
    with pytest.raises(weights.WeightsError, match="is a folder"):
        backbones.load(tmp_path)
    with pytest.raises(FileNotFoundError):
        backbones.load(tmp_path / "none.safetensors")


@pytest.mark.parametrize("first", [b"\x80", b"<", b"{", b" "])
def test_a_header_that_begins_as_other_files_do(tmp_path, first):
    # Its length may be any number: spaces fill it up.
    header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    header += b" " * (first[0] + 256 - len(header))
    file = tmp_path / "weights.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    assert file.read_bytes()[:1] == first
    assert list(weights.shapes_of(file).values()) == [(1,)]


@pytest.mark.parametrize("network", ["resnet", "vit"])
@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "teacher.backbone.", "model.state_dict.net."]
)
def test_a_prefix_of_all_names_is_named(tmp_path, network, prefix):
    arrays = NETWORKS[network][0]()
    file = written(tmp_path, {prefix + name: x for name, x in arrays.items()})
    title = backbones.recognise(written(tmp_path, arrays, "plain.safetensors")).title
    words = f"is {title}, but its names have the prefix {prefix!r}"
    with pytest.raises(weights.WeightsError, match=re.escape(words)):
        backbones.recognise(file)


def test_a_shard_is_no_network(tmp_path):
    file = written(tmp_path, by_hand.small_resnet())
    shard = file.rename(tmp_path / "model-00001-of-00002.safetensors")
    with pytest.raises(weights.WeightsError, match=r"shard 1 of 2.*Join the shards"):
        backbones.load(shard)
    assert backbones.load(shard.rename(tmp_path / "model-00001-of-00001.safetensors"))


def test_half_precision_is_cast_and_told(tmp_path):
    arrays = by_hand.small_resnet()
    halves = {
        name: value if value.dtype.kind == "i" else value.astype(np.float16)
        for name, value in arrays.items()
    }
    network, loaded = backbones.load(written(tmp_path, halves))
    assert loaded.notes[-1] == "arrays of float16 are cast to float32"
    assert network.conv1.kernel[...].dtype == jnp.float32
    assert loaded.notes[0] == "skipped arrays of the file: fc.bias, fc.weight"


@pytest.mark.parametrize("name", NETWORKS)
def test_written_as_it_was_read(tmp_path, name):
    arrays = NETWORKS[name][0]()
    file = written(tmp_path, arrays)
    network, loaded = backbones.load(file)
    again = tmp_path / "again.safetensors"
    rules = backbones.recognise(file).of.rules_of(weights.shapes_of(file))
    weights.save_weights(network, again, like=file, rules=rules)
    written_again = load_file(again)
    left_out = {n for n in loaded.unused if not n.endswith(weights.COUNTER)}
    assert set(written_again) == set(arrays) - left_out
    for key, value in written_again.items():
        np.testing.assert_array_equal(value, arrays[key], err_msg=key)


def test_a_resnet_is_written_under_torchvisions_names(tmp_path):
    arrays = by_hand.small_resnet()
    network, _ = backbones.load(written(tmp_path, arrays))
    again = tmp_path / "again.safetensors"
    weights.save_weights(network, again)
    written_again = load_file(again)
    assert set(written_again) == set(arrays) - {"fc.weight", "fc.bias"}
    for key, value in written_again.items():
        if not key.endswith(weights.COUNTER):
            np.testing.assert_array_equal(value, arrays[key], err_msg=key)


def test_images_that_do_not_fit_a_patch(tmp_path):
    network, _ = backbones.load(written(tmp_path, by_hand.small_vit()))
    with pytest.raises(ValueError, match="multiples of 14 pixels, got 8 x 8"):
        network(jnp.zeros((1, 8, 8, 3)))


def test_a_model_with_a_list_is_named():
    class Listed(nnx.Module):
        def __init__(self):
            self.kernel = nnx.Param(jnp.ones(3))
            self.padding = [(1, 1)]

        def __call__(self, images):
            return images.mean(axis=(1, 2)) * self.kernel[...]

    with pytest.raises(TypeError, match="static attribute that cannot be hashed"):
        embed_images(Listed(), np.zeros((2, 4, 4, 3), np.uint8))


def test_names_of_networks():
    for name, options in backbones.UNTRAINED.items():
        title = backbones.Backbone("resnet", options).title
        assert title == f"ResNet-{name.removeprefix('resnet')}"
    # As their authors count them, without the classifier.
    counts = {"resnet18": 11_176_512, "resnet34": 21_284_672, "resnet50": 23_508_032}
    for name, count in counts.items():
        backbone = backbones.Backbone("resnet", backbones.UNTRAINED[name])
        network = nnx.eval_shape(lambda b=backbone: b.build(rngs=nnx.Rngs(0)))
        parameters = jax.tree.leaves(nnx.state(network, nnx.Param))
        assert sum(x.size for x in parameters) == count


def test_what_is_frozen(tmp_path):
    for training, first, last in (
        ("frozen", weights.Frozen, weights.Frozen),
        ("top", weights.Frozen, nnx.Param),
    ):
        network, _ = backbones.load(written(tmp_path, by_hand.small_resnet()))
        heads.freeze(network, training)
        assert type(network.conv1.kernel) is first
        assert type(network.layer3[0].bn1.scale) is first
        assert type(network.layer4[0].conv1.kernel) is last
        # Statistics are never parameters.
        assert type(network.layer4[0].bn1.mean) is nnx.BatchStat


def test_what_was_learnt_before_moves_at_a_tenth_of_the_rate():
    backbone = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    head = heads.Head(4, 2, rngs=nnx.Rngs(0))
    model = heads.BackboneEmbedder(backbone, head)
    params = nnx.state(Standardized(model, (0.0,) * 3, (1.0,) * 3), nnx.Param)
    tx = optimizer.slow_backbone(lambda step: 0.01, 0.0)
    gradients = jax.tree.map(jnp.ones_like, params)
    updates, _ = tx.update(gradients, tx.init(params), params)
    moved = updates["model"]
    for name, expected in (("head", -0.01), ("backbone", -0.001)):
        for x in jax.tree.leaves(moved[name]):
            np.testing.assert_allclose(x, expected, rtol=1e-4)


def test_kept_views_are_averaged_with_the_mirror_image_alone():
    head = heads.Head(6, 4, mirror=True, rngs=nnx.Rngs(0))
    views = np.random.default_rng(0).normal(size=(5, 3, 6)).astype(np.float32)
    both = head(views[:, 0]) + head(views[:, 1])
    expected = both / np.linalg.norm(both, axis=1, keepdims=True)
    np.testing.assert_allclose(head(views), expected, rtol=1e-5)


def test_positions_are_interpolated_in_a_known_way():
    with pytest.raises(ValueError, match=r"positions must be one of cubic,.*'linear'"):
        vit.ViT(positions="linear", rngs=nnx.Rngs(0))
