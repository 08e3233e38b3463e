"""ConvNeXt, under the names of torchvision, timm, transformers or its authors."""

from collections.abc import Mapping, Sequence
from typing import Any

from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from tripletjax.learn.backbones.layers import Conv, DepthwiseConv, LayerScale, Mlp
from tripletjax.learn.weights import Rules


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
        for stage in self.stages:
            x = stage(x)
        return self.norm(x.mean(axis=(1, 2)))


class _Stage(nnx.Module):
    """Blocks, after the image is halved where the width changes."""

    def __init__(
        self,
        incoming: int,
        width: int,
        depth: int,
        *,
        dtype: DTypeLike | None,
        rngs: nnx.Rngs,
    ):
        options: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        self.halves = incoming != width
        if self.halves:
            self.norm = nnx.LayerNorm(incoming, epsilon=1e-6, **options)
            self.conv = Conv(incoming, width, 2, 2, bias=True, **options)
        self.blocks = nnx.List([_Block(width, **options) for _ in range(depth)])

    def __call__(self, x: Array) -> Array:
        if self.halves:
            x = self.conv(self.norm(x))
        for block in self.blocks:
            x = block(x)
        return x


class _Block(nnx.Module):
    def __init__(self, width: int, *, dtype: DTypeLike | None, rngs: nnx.Rngs):
        options: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        self.depthwise = DepthwiseConv(width, 7, **options)
        self.norm = nnx.LayerNorm(width, epsilon=1e-6, **options)
        self.mlp = Mlp(width, 4 * width, **options)
        self.scale = LayerScale(width)

    def __call__(self, x: Array) -> Array:
        return x + self.scale(self.mlp(self.norm(self.depthwise(x))))


def _rules(names: Mapping[str, tuple[str, str]], unused: Sequence[str]) -> Rules:
    """Of weight and bias of layers, by a pattern of a layer's name."""
    rules: dict[str, str | None] = {}
    for theirs, (ours, kind) in names.items():
        rules[rf"{theirs}\.weight"] = f"{ours}.{kind}"
        rules[rf"{theirs}\.bias"] = f"{ours}.bias"
    return rules | dict.fromkeys(unused)


# Stages have even numbers in torchvision's names, with what halves between them.
_TORCHVISION_STAGES = {1: 0, 3: 1, 5: 2, 7: 3}
BY_TORCHVISION: Rules = {
    **_rules(
        {
            r"features\.0\.0": ("stem", "kernel"),
            r"features\.0\.1": ("stem_norm", "scale"),
            r"classifier\.0": ("norm", "scale"),
        },
        [r"classifier\.2\..*"],
    ),
    **{
        theirs: ours
        for number, stage in _TORCHVISION_STAGES.items()
        for theirs, ours in {
            **_rules(
                {
                    rf"features\.{number}\.(\d+)\.block\.{place}": (
                        rf"stages.{stage}.blocks.\1.{layer}",
                        kind,
                    )
                    for place, (layer, kind) in {
                        0: ("depthwise", "kernel"),
                        2: ("norm", "scale"),
                        3: ("mlp.fc1", "kernel"),
                        5: ("mlp.fc2", "kernel"),
                    }.items()
                },
                [],
            ),
            rf"features\.{number}\.(\d+)\.layer_scale": (
                rf"stages.{stage}.blocks.\1.scale.gamma"
            ),
            **_rules(
                {
                    rf"features\.{number - 1}\.0": (f"stages.{stage}.norm", "scale"),
                    rf"features\.{number - 1}\.1": (f"stages.{stage}.conv", "kernel"),
                }
                if stage
                else {},
                [],
            ),
        }.items()
    },
}
_BLOCK = r"stages\.(\d+)\.blocks\.(\d+)"
BY_TIMM: Rules = {
    **_rules(
        {
            r"stem\.0": ("stem", "kernel"),
            r"stem\.1": ("stem_norm", "scale"),
            r"stages\.(\d+)\.downsample\.0": (r"stages.\1.norm", "scale"),
            r"stages\.(\d+)\.downsample\.1": (r"stages.\1.conv", "kernel"),
            rf"{_BLOCK}\.conv_dw": (r"stages.\1.blocks.\2.depthwise", "kernel"),
            rf"{_BLOCK}\.norm": (r"stages.\1.blocks.\2.norm", "scale"),
            rf"{_BLOCK}\.mlp\.(fc\d)": (r"stages.\1.blocks.\2.mlp.\3", "kernel"),
            r"head\.norm": ("norm", "scale"),
        },
        [r"head\.fc\..*"],
    ),
    rf"{_BLOCK}\.gamma": r"stages.\1.blocks.\2.scale.gamma",
}
_ROOT = r"(?:convnext\.)?"
_STAGE = rf"{_ROOT}encoder\.stages\.(\d+)"
BY_TRANSFORMERS: Rules = {
    **_rules(
        {
            rf"{_ROOT}embeddings\.patch_embeddings": ("stem", "kernel"),
            rf"{_ROOT}embeddings\.layernorm": ("stem_norm", "scale"),
            rf"{_STAGE}\.downsampling_layer\.0": (r"stages.\1.norm", "scale"),
            rf"{_STAGE}\.downsampling_layer\.1": (r"stages.\1.conv", "kernel"),
            **{
                rf"{_STAGE}\.layers\.(\d+)\.{theirs}": (
                    rf"stages.\1.blocks.\2.{ours}",
                    kind,
                )
                for theirs, ours, kind in (
                    ("dwconv", "depthwise", "kernel"),
                    ("layernorm", "norm", "scale"),
                    ("pwconv1", r"mlp.fc1", "kernel"),
                    ("pwconv2", r"mlp.fc2", "kernel"),
                )
            },
            rf"{_ROOT}layernorm": ("norm", "scale"),
        },
        [r"classifier\..*"],
    ),
    rf"{_STAGE}\.layers\.(\d+)\.layer_scale_parameter": (
        r"stages.\1.blocks.\2.scale.gamma"
    ),
}
# Their first downsampling is the stem.
_AFTER = r"downsample_layers\.([1-9])"
BY_AUTHORS: Rules = {
    **_rules(
        {
            r"downsample_layers\.0\.0": ("stem", "kernel"),
            r"downsample_layers\.0\.1": ("stem_norm", "scale"),
            rf"{_AFTER}\.0": (r"stages.\1.norm", "scale"),
            rf"{_AFTER}\.1": (r"stages.\1.conv", "kernel"),
            **{
                rf"stages\.(\d+)\.(\d+)\.{theirs}": (
                    rf"stages.\1.blocks.\2.{ours}",
                    kind,
                )
                for theirs, ours, kind in (
                    ("dwconv", "depthwise", "kernel"),
                    ("norm", "norm", "scale"),
                    ("pwconv1", "mlp.fc1", "kernel"),
                    ("pwconv2", "mlp.fc2", "kernel"),
                )
            },
            "norm": ("norm", "scale"),
        },
        [r"head\..*"],
    ),
    r"stages\.(\d+)\.(\d+)\.gamma": r"stages.\1.blocks.\2.scale.gamma",
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


def _depthwise(
    shapes: Mapping[str, tuple[int, ...]], form: str
) -> list[list[tuple[int, ...]]]:
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


def options_of(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any] | None:
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


def rules_of(shapes: Mapping[str, tuple[int, ...]]) -> Rules:
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
