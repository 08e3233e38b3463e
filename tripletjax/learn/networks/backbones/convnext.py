"""ConvNeXt, under the names of torchvision, timm, transformers or its authors."""

from collections.abc import Mapping, Sequence
from typing import Any

from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from tripletjax.learn.networks.backbones.layers import (
    Conv,
    DepthwiseConv,
    LayerScale,
    Mlp,
    through,
)
from tripletjax.learn.networks.weights import Rules, Shapes


class ConvNeXt(nnx.Module):
    """A convolutional network in the manner of transformers, without its classifier.

    Args:
        depths: how many blocks each stage has; the default is ConvNeXt-Tiny.
        widths: number of channels of each stage.
        last_eps: of the last normalisation, in which transformers differs.
        dtype: what is computed in; parameters stay float32.
        rngs: Flax random number streams, with ``params``.

    References:
        Liu, Mao, Wu, Feichtenhofer, Darrell, Xie. A ConvNet for the 2020s. 2022.
        arXiv:2201.03545
    """

    def __init__(
        self,
        *,
        depths: Sequence[int] = (3, 3, 9, 3),
        widths: Sequence[int] = (96, 192, 384, 768),
        last_eps: float = 1e-6,
        dtype: DTypeLike | None = None,
        rngs: nnx.Rngs,
    ):
        options: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        self.stem = Conv(3, widths[0], 4, 4, bias=True, **options)
        self.stem_norm = nnx.LayerNorm(widths[0], epsilon=1e-6, **options)
        stages, incoming = [], widths[0]
        for depth, width in zip(depths, widths):
            stages.append(_Stage(incoming, width, depth, **options))
            incoming = width
        self.stages = nnx.List(stages)
        self.norm = nnx.LayerNorm(incoming, epsilon=last_eps, **options)
        self.features = incoming

    @property
    def top(self) -> tuple[str, ...]:
        """Paths of the last stage."""
        return f"stages.{len(self.stages) - 1}", "norm"

    def __call__(self, images: Array) -> Array:
        """Features ``[n, features]`` of images ``[n, height, width, 3]``."""
        x = self.stem_norm(self.stem(images))
        x = through(self.stages, x)
        return self.norm(x.mean(axis=(1, 2)))


class _Stage(nnx.Module):
    """Blocks, after the image is halved where the width changes."""

    def __init__(self, incoming: int, width: int, depth: int, **options: Any):
        self.halves = incoming != width
        if self.halves:
            self.norm = nnx.LayerNorm(incoming, epsilon=1e-6, **options)
            self.conv = Conv(incoming, width, 2, 2, bias=True, **options)
        self.blocks = nnx.List([_Block(width, **options) for _ in range(depth)])

    def __call__(self, x: Array) -> Array:
        if self.halves:
            x = self.conv(self.norm(x))
        return through(self.blocks, x)


class _Block(nnx.Module):
    def __init__(self, width: int, **options: Any):
        self.depthwise = DepthwiseConv(width, 7, **options)
        self.norm = nnx.LayerNorm(width, epsilon=1e-6, **options)
        self.mlp = Mlp(width, 4 * width, **options)
        self.scale = LayerScale(width)

    def __call__(self, x: Array) -> Array:
        return x + self.scale(self.mlp(self.norm(self.depthwise(x))))


def _ends(stem: str, stem_norm: str, norm: str, classifier: str) -> Rules:
    """Rules of what stands before and after the stages, by patterns of the names."""
    layers = {
        stem: ("stem", "kernel"),
        stem_norm: ("stem_norm", "scale"),
        norm: ("norm", "scale"),
    }
    return _both(layers) | {rf"{classifier}\..*": None}


def _stages(
    halving: str,
    block: str,
    names: Sequence[str],
    *,
    stage: str = r"\1",
    index: str = r"\2",
) -> Rules:
    """Rules of the stages, by patterns of the names.

    Args:
        halving: of what halves the image before a stage.
        block: of a block.
        names: in a block, of its depthwise convolution, its normalisation, its two
            linear layers, and its factors.
        stage: the number of the stage, as far as known, or the group that has it.
        index: likewise, of the block.
    """
    inside = f"stages.{stage}.blocks.{index}"
    depthwise, norm, first, second, factors = (rf"{block}\.{name}" for name in names)
    layers = {
        rf"{halving}\.0": (f"stages.{stage}.norm", "scale"),
        rf"{halving}\.1": (f"stages.{stage}.conv", "kernel"),
        depthwise: (f"{inside}.depthwise", "kernel"),
        norm: (f"{inside}.norm", "scale"),
        first: (f"{inside}.mlp.fc1", "kernel"),
        second: (f"{inside}.mlp.fc2", "kernel"),
    }
    return _both(layers) | {factors: f"{inside}.scale.gamma"}


def _both(layers: Mapping[str, tuple[str, str]]) -> dict[str, Any]:
    """Rules of the weight and the bias of layers."""
    rules = {}
    for name, (path, weight) in layers.items():
        rules[rf"{name}\.weight"] = f"{path}.{weight}"
        rules[rf"{name}\.bias"] = f"{path}.bias"
    return rules


_TORCHVISION_BLOCK = r"block\.0", r"block\.2", r"block\.3", r"block\.5", "layer_scale"
# Stages have odd numbers, with what halves between them; before the first is the stem,
# whose rules come last.
BY_TORCHVISION: Rules = {
    rule: target
    for stage in range(4)
    for rule, target in _stages(
        rf"features\.{2 * stage}",
        rf"features\.{2 * stage + 1}\.(\d+)",
        _TORCHVISION_BLOCK,
        stage=str(stage),
        index=r"\1",
    ).items()
} | dict(
    _ends(r"features\.0\.0", r"features\.0\.1", r"classifier\.0", r"classifier\.2")
)
BY_TIMM: Rules = {
    **_ends(r"stem\.0", r"stem\.1", r"head\.norm", r"head\.fc"),
    **_stages(
        r"stages\.(\d+)\.downsample",
        r"stages\.(\d+)\.blocks\.(\d+)",
        ("conv_dw", "norm", r"mlp\.fc1", r"mlp\.fc2", "gamma"),
    ),
}
_ROOT = r"(?:convnext\.)?"
_STAGE = rf"{_ROOT}encoder\.stages\.(\d+)"
BY_TRANSFORMERS: Rules = {
    **_ends(
        rf"{_ROOT}embeddings\.patch_embeddings",
        rf"{_ROOT}embeddings\.layernorm",
        rf"{_ROOT}layernorm",
        "classifier",
    ),
    **_stages(
        rf"{_STAGE}\.downsampling_layer",
        rf"{_STAGE}\.layers\.(\d+)",
        ("dwconv", "layernorm", "pwconv1", "pwconv2", "layer_scale_parameter"),
    ),
}
BY_AUTHORS: Rules = {
    **_ends(r"downsample_layers\.0\.0", r"downsample_layers\.0\.1", "norm", "head"),
    **_stages(
        # Their first is the stem.
        r"downsample_layers\.([1-9])",
        r"stages\.(\d+)\.(\d+)",
        ("dwconv", "norm", "pwconv1", "pwconv2", "gamma"),
    ),
}
# Of each naming, the stem's kernel and the depthwise kernel of a block.
NAMINGS: tuple[tuple[str, str, Rules], ...] = (
    ("features.0.0.weight", "features.{odd}.{block}.block.0.weight", BY_TORCHVISION),
    ("stem.0.weight", "stages.{stage}.blocks.{block}.conv_dw.weight", BY_TIMM),
    (
        "embeddings.patch_embeddings.weight",
        "encoder.stages.{stage}.layers.{block}.dwconv.weight",
        BY_TRANSFORMERS,
    ),
    (
        "convnext.embeddings.patch_embeddings.weight",
        "convnext.encoder.stages.{stage}.layers.{block}.dwconv.weight",
        BY_TRANSFORMERS,
    ),
    (
        "downsample_layers.0.0.weight",
        "stages.{stage}.{block}.dwconv.weight",
        BY_AUTHORS,
    ),
)


def _depthwise(shapes: Shapes, form: str) -> list[list[tuple[int, ...]]]:
    """Shapes of the depthwise kernels, by stage and block."""
    stages = []
    for stage in range(4):
        blocks = []
        while True:
            names = {"stage": stage, "odd": 2 * stage + 1, "block": len(blocks)}
            if (shape := shapes.get(form.format(**names))) is None:
                break
            blocks.append(shape)
        stages.append(blocks)
    return stages


def options_of(shapes: Shapes, file: str) -> dict[str, Any] | None:
    """The network that arrays of these names are of; None if no ConvNeXt's."""
    for stem, form, rules in NAMINGS:
        stages = _depthwise(shapes, form)
        if stem in shapes and all(stages):
            return {
                "depths": tuple(map(len, stages)),
                "widths": tuple(blocks[0][0] for blocks in stages),
                "last_eps": 1e-12 if rules is BY_TRANSFORMERS else 1e-6,
            }
    return None


def rules_of(shapes: Shapes) -> Rules:
    return next(rules for stem, _, rules in NAMINGS if stem in shapes)


# Of depths and the first width.
SIZES = {
    ((3, 3, 9, 3), 96): "Tiny",
    ((3, 3, 27, 3), 96): "Small",
    ((3, 3, 27, 3), 128): "Base",
}


def title_of(options: Mapping[str, Any]) -> str:
    size = SIZES.get((tuple(options["depths"]), options["widths"][0]), "like")
    return f"ConvNeXt-{size}"
