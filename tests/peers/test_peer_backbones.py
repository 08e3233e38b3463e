"""Networks and weights of torchvision, timm, transformers and other libraries."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from programs import NEWER_LOOPS

from tripletjax.learn.networks import backbones

torch = pytest.importorskip("torch")
safetensors = pytest.importorskip("safetensors.torch")


def torchvision_model(name):
    models = pytest.importorskip("torchvision.models")
    return getattr(models, name)()


def resnet_features(model, x):
    x = model.maxpool(model.relu(model.bn1(model.conv1(x))))
    x = model.layer4(model.layer3(model.layer2(model.layer1(x))))
    return model.avgpool(x).flatten(1)


def small_bottlenecks():
    resnet = pytest.importorskip("torchvision.models.resnet")
    return resnet.ResNet(resnet.Bottleneck, DEPTHS)


def small_convnext():
    convnext = pytest.importorskip("torchvision.models.convnext")
    after = [*WIDTHS[1:], None]
    stages = zip(WIDTHS, after, DEPTHS)
    return convnext.ConvNeXt([convnext.CNBlockConfig(*stage) for stage in stages])


def convnext_features(model, x):
    x = model.avgpool(model.features(x))
    return model.classifier[1](model.classifier[0](x))


def timm_model(name, **options):
    timm = pytest.importorskip("timm")
    return timm.create_model(name, pretrained=False, **options)


def timm_features(model, x):
    return model.forward_head(model.forward_features(x), pre_logits=True)


def transformers_model(kind, **options):
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{kind}Config")(**options)
    return getattr(transformers, f"{kind}Model")(config)


def pooled(model, x):
    return model(x).pooler_output


# Factors of widths and depths, of a network with one block in each stage.
FACTORS = 0.5, 0.1


def efficientnet_pytorch_model(package, name):
    width, depth = FACTORS
    return pytest.importorskip(package).EfficientNet.from_name(
        name, width_coefficient=width, depth_coefficient=depth, image_size=None
    )


def efficientnet_pytorch_features(model, x):
    return model.extract_features(x).mean((2, 3))


def small_torchvision_efficientnet():
    efficientnet = pytest.importorskip("torchvision.models.efficientnet")
    width, depth = FACTORS
    stages, channels = efficientnet._efficientnet_conf(
        "efficientnet_b0", width_mult=width, depth_mult=depth
    )
    return efficientnet.EfficientNet(stages, 0.2, last_channel=channels)


def torchvision_efficientnet_features(model, x):
    return model.avgpool(model.features(x)).flatten(1)


def small_timm_efficientnet(*, lite=False, **options):
    efficientnet = pytest.importorskip("timm.models.efficientnet")
    make = efficientnet._gen_efficientnet
    if lite:
        make = efficientnet._gen_efficientnet_lite
    name = "efficientnet_lite0" if lite else "efficientnet_b0"
    width, depth = FACTORS
    return make(name, channel_multiplier=width, depth_multiplier=depth, **options)


DINO = {
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 70,
    "patch_size": 14,
}
DEPTHS, WIDTHS = [1, 1, 2, 1], [16, 32, 48, 64]
TIMM_DINO = {
    "img_size": 70,
    "dynamic_img_size": True,
    "depth": 3,
    "embed_dim": 128,
    "num_heads": 2,
}


def facenet_model():
    """With fewer of its blocks, which are alike."""
    facenet = pytest.importorskip("facenet_pytorch")
    model = facenet.InceptionResnetV1()
    model.repeat_1, model.repeat_2 = model.repeat_1[:1], model.repeat_2[:2]
    model.repeat_3 = model.repeat_3[:1]
    return model


# Only the embeddings of these networks are compared: other networks have their blocks.
EMBEDDINGS_ALONE = [
    *("torchvision resnet18", "torchvision resnet34", "torchvision resnet50"),
    *("timm efficientnet", "timm efficientnet_lite", "timm tf_efficientnet"),
]
# The peer's network, its features, the family, and two sizes of images.
SMALL, PATCHES = [(64, 64), (96, 80)], [(70, 70), (112, 42)]
PEERS = {
    **{
        f"torchvision {name}": (
            lambda name=name: torchvision_model(name),
            resnet_features,
            "resnet",
            SMALL,
        )
        for name in ("resnet18", "resnet34", "resnet50")
    },
    "torchvision bottlenecks": (small_bottlenecks, resnet_features, "resnet", SMALL),
    "timm resnet": (
        lambda: timm_model("resnet18", layers=DEPTHS),
        timm_features,
        "resnet",
        SMALL,
    ),
    "torchvision convnext": (small_convnext, convnext_features, "convnext", SMALL),
    "timm convnext": (
        lambda: timm_model("convnext_tiny", depths=DEPTHS, dims=WIDTHS),
        timm_features,
        "convnext",
        SMALL,
    ),
    "transformers convnext": (
        lambda: transformers_model("ConvNext", depths=DEPTHS, hidden_sizes=WIDTHS),
        pooled,
        "convnext",
        SMALL,
    ),
    **{
        f"{package.replace('_', '-')} {name}": (
            lambda package=package, name=name: efficientnet_pytorch_model(
                package, name
            ),
            efficientnet_pytorch_features,
            "efficientnet",
            SMALL,
        )
        for package, name in (
            ("efficientnet_pytorch", "efficientnet-b0"),
            ("efficientnet_lite_pytorch", "efficientnet-lite0"),
        )
    },
    "torchvision efficientnet": (
        small_torchvision_efficientnet,
        torchvision_efficientnet_features,
        "efficientnet",
        SMALL,
    ),
    "timm efficientnet": (
        small_timm_efficientnet,
        timm_features,
        "efficientnet",
        SMALL,
    ),
    "timm efficientnet_lite": (
        lambda: small_timm_efficientnet(lite=True),
        timm_features,
        "efficientnet",
        SMALL,
    ),
    # The name of the file decides.
    "timm tf_efficientnet": (
        lambda: small_timm_efficientnet(pad_type="same", bn_eps=1e-3),
        timm_features,
        "efficientnet",
        SMALL,
    ),
    "facenet-pytorch": (
        facenet_model,
        lambda model, x: model(x),
        "inception-resnet-v1",
        [(75, 75), (96, 80)],
    ),
    "transformers dinov2": (
        lambda: transformers_model("Dinov2", **DINO),
        pooled,
        "vit",
        PATCHES,
    ),
    "transformers dinov2 with registers": (
        lambda: transformers_model(
            "Dinov2WithRegisters", num_register_tokens=4, **DINO
        ),
        pooled,
        "vit",
        PATCHES,
    ),
    "timm dinov2": (
        lambda: timm_model("vit_small_patch14_dinov2", **TIMM_DINO),
        timm_features,
        "vit",
        PATCHES,
    ),
    "timm dinov2 with registers": (
        lambda: timm_model("vit_base_patch14_reg4_dinov2", **TIMM_DINO),
        timm_features,
        "vit",
        PATCHES,
    ),
}


def drawn(model, seed=0):
    """A model whose statistics, scales and tokens are at random, too."""
    torch.manual_seed(seed)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm1d | torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 1.5)
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(0, 0.2)
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("gamma", "lambda1", "layer_scale")):
            parameter.data.uniform_(0.2, 0.6)
        if "pos" in name or "token" in name:
            parameter.data.normal_(0, 0.5)
    return model.eval()


def relative(got, expected):
    return float(np.abs(np.asarray(got) - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("name", PEERS)
def test_embeddings_and_gradients(name, tmp_path):
    make, features, family, sizes = PEERS[name]
    model = drawn(make())
    file = tmp_path / f"{name}.safetensors"
    state = {key: value.contiguous() for key, value in model.state_dict().items()}
    safetensors.save_file(state, file)
    assert backbones.recognise(file).family == family
    network, _ = backbones.load(file)
    draw = np.random.default_rng(0)

    def ours(network, x):
        y = network(x)
        if family == "inception-resnet-v1":
            # Theirs has unit length.
            y /= jnp.linalg.norm(y, axis=-1, keepdims=True)
        return y

    for height, width in sizes:
        x = draw.normal(size=(2, 3, height, width))
        with torch.no_grad():
            theirs = features(model.float(), torch.tensor(x, dtype=torch.float32))
        got = jax.jit(lambda x: ours(network, x))(
            x.transpose(0, 2, 3, 1).astype(np.float32)
        )
        assert relative(got, theirs.numpy()) < 1e-4

        if name in EMBEDDINGS_ALONE or (height, width) != sizes[0]:
            continue
        # Where a ReLU or a maximum is nearly tied, its slope turns on the last digit
        # of float32, in either library: in float64 none is.
        along = draw.normal(size=theirs.shape)
        inputs = torch.tensor(x, dtype=torch.float64, requires_grad=True)
        (features(model.double(), inputs) * torch.tensor(along)).sum().backward()
        with jax.enable_x64(True):
            graph, values = nnx.split(network)
            values = jax.tree.map(lambda v: jnp.asarray(v, jnp.float64), values)

            def loss(x, graph=graph, values=values, along=along):
                return jnp.sum(ours(nnx.merge(graph, values), x) * along)

            # XLA's older loops give a wrong one of Inception-ResNet in float64.
            gradient_of = jax.jit(jax.grad(loss), compiler_options=NEWER_LOOPS)
            gradient = gradient_of(jnp.asarray(x.transpose(0, 2, 3, 1)))
            expected = inputs.grad.numpy().transpose(0, 2, 3, 1)
            assert relative(gradient, expected) < 1e-5


def test_positions_as_dinov2_itself_interpolates_them(tmp_path):
    """Without registers it adds 0.1 to the size, which changes the scale a little."""
    from tripletjax.learn.networks.backbones.layers import cubic_weights

    grid = torch.tensor(np.random.default_rng(0).normal(size=(1, 4, 37, 37)))
    scale = (16 + 0.1) / 37
    theirs = torch.nn.functional.interpolate(
        grid, scale_factor=(scale, scale), mode="bicubic"
    )
    line = cubic_weights(37, 16, offset=0.1)
    ours = np.einsum("ih,nchw,jw->ncij", line, grid.numpy(), line)
    np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-6)
    # The original's file is told from timm's by its token for masked patches.
    model = drawn(timm_model("vit_small_patch14_dinov2", **TIMM_DINO))
    state = {key: value.contiguous() for key, value in model.state_dict().items()}
    state["mask_token"] = torch.zeros(1, 128)
    file = tmp_path / "weights.safetensors"
    safetensors.save_file(state, file)
    assert backbones.recognise(file).options["positions"] == "cubic-offset"


def test_what_is_written_loads_strictly_there(tmp_path):
    model = drawn(torchvision_model("resnet18"))
    model.fc = torch.nn.Identity()
    file, again = tmp_path / "weights.safetensors", tmp_path / "again.safetensors"
    safetensors.save_file(model.state_dict(), file)
    network, _ = backbones.load(file)
    from tripletjax.learn.networks.weights import save_weights

    save_weights(network, again)
    arrays = safetensors.load_file(again)
    assert set(arrays) == set(safetensors.load_file(file))
    model.load_state_dict(arrays, strict=True)
