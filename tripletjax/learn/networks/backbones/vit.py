"""Vision transformers as DINOv2 has them, under any of their three names."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from tripletjax.learn.networks.backbones.layers import (
    Conv,
    LayerScale,
    Mlp,
    cubic_weights,
    through,
)
from tripletjax.learn.networks.weights import Part, Rules, Shapes

# Of every head.
HEAD = 64
# How implementations of the network interpolate positions; they differ.
POSITIONS = ("cubic", "cubic-antialiased", "cubic-offset")


class ViT(nnx.Module):
    """A vision transformer of images of any size, whose feature is its class token.

    Positions are interpolated from the grid that the network was trained on.

    Args:
        width: of tokens.
        depth: number of blocks.
        heads: of the attention.
        patch: height and width of a patch, in pixels.
        grid: how many patches the network was trained on, down and across.
        registers: number of register tokens.
        class_position: whether the class token has a position of its own, before the
            patches'.
        positions: how they are interpolated: ``cubic``, as transformers does;
            ``cubic-antialiased``, as timm does, and all do with registers;
            ``cubic-offset``, as the original does without.
        dtype: what is computed in; parameters stay float32.
        rngs: Flax random number streams, with ``params``.

    References:
        Dosovitskiy et al. An Image is Worth 16x16 Words. 2020. arXiv:2010.11929
        Oquab et al. DINOv2: Learning Robust Visual Features without Supervision. 2023.
        arXiv:2304.07193
        Darcet, Oquab, Mairal, Bojanowski. Vision Transformers Need Registers. 2023.
        arXiv:2309.16588
    """

    def __init__(
        self,
        *,
        width: int = 384,
        depth: int = 12,
        heads: int = 6,
        patch: int = 14,
        grid: int = 37,
        registers: int = 0,
        class_position: bool = True,
        positions: str = "cubic",
        dtype: DTypeLike | None = None,
        rngs: nnx.Rngs,
    ):
        if positions not in POSITIONS:
            raise ValueError(
                f"positions must be one of {', '.join(POSITIONS)}, got {positions!r}."
            )
        options: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        self.patch, self.grid, self.positions = patch, grid, positions
        self.patch_embed = Conv(3, width, patch, patch, bias=True, **options)
        self.cls_token = nnx.Param(jnp.zeros((1, 1, width)))
        positioned = class_position + grid * grid
        self.pos_embed = nnx.Param(jnp.zeros((1, positioned, width)))
        if registers:
            self.register_tokens = nnx.Param(jnp.zeros((1, registers, width)))
        self.registers, self.class_position = registers, class_position
        self.blocks = nnx.List([_Block(width, heads, **options) for _ in range(depth)])
        self.norm = nnx.LayerNorm(width, epsilon=1e-6, **options)
        self.features = width

    @property
    def top(self) -> tuple[str, ...]:
        """Paths of the last stages: a quarter of the blocks."""
        depth = len(self.blocks)
        first = depth - max(1, depth // 4)
        return (*(f"blocks.{index}" for index in range(first, depth)), "norm")

    def __call__(self, images: Array) -> Array:
        """Features ``[n, features]`` of images ``[n, height, width, 3]``."""
        n, height, width, _ = images.shape
        if height % self.patch or width % self.patch:
            raise ValueError(
                f"images must have sides of multiples of {self.patch} pixels, got "
                f"{height} x {width}."
            )
        x = self.patch_embed(images)
        positions = self._positions(height // self.patch, width // self.patch)
        x = x.reshape(n, -1, x.shape[-1]) + positions.astype(x.dtype)
        first = self.cls_token[...]
        if self.class_position:
            first = first + self.pos_embed[:, :1]
        if self.registers:
            first = jnp.concatenate([first, self.register_tokens[...]], axis=1)
        first = jnp.broadcast_to(first.astype(x.dtype), (n, *first.shape[1:]))
        x = jnp.concatenate([first, x], axis=1)
        x = through(self.blocks, x)
        return self.norm(x[:, 0])

    def _positions(self, rows: int, columns: int) -> Array:
        """Positions of a grid of patches, ``[1, rows * columns, width]``."""
        trained = self.pos_embed[:, int(self.class_position) :]
        if rows == columns == self.grid:
            return trained
        options: dict[str, Any] = {
            "antialias": self.positions == "cubic-antialiased",
            "offset": 0.1 if self.positions == "cubic-offset" else 0.0,
        }
        down, across = (
            jnp.asarray(cubic_weights(self.grid, n, **options), trained.dtype)
            for n in (rows, columns)
        )
        trained = trained.reshape(self.grid, self.grid, -1)
        made = jnp.einsum("ih,hwc,jw->ijc", down, trained, across, precision="highest")
        return made.reshape(1, rows * columns, -1)


class _Block(nnx.Module):
    def __init__(self, width: int, heads: int, **options: Any):
        self.norm1 = nnx.LayerNorm(width, epsilon=1e-6, **options)
        self.qkv = nnx.Linear(width, 3 * width, **options)
        self.proj = nnx.Linear(width, width, **options)
        self.ls1 = LayerScale(width)
        self.norm2 = nnx.LayerNorm(width, epsilon=1e-6, **options)
        self.mlp = Mlp(width, 4 * width, **options)
        self.ls2 = LayerScale(width)
        self.heads = heads

    def __call__(self, x: Array) -> Array:
        x = x + self.ls1(self.proj(self._attention(self.qkv(self.norm1(x)))))
        return x + self.ls2(self.mlp(self.norm2(x)))

    def _attention(self, qkv: Array) -> Array:
        n, tokens, width = qkv.shape
        qkv = qkv.reshape(n, tokens, 3, self.heads, -1)
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        logits = jnp.einsum("nqhd,nkhd->nhqk", q / q.shape[-1] ** 0.5, k)
        exact = jnp.promote_types(logits.dtype, jnp.float32)
        weights = jax.nn.softmax(logits.astype(exact)).astype(v.dtype)
        x = jnp.einsum("nhqk,nkhd->nqhd", weights, v)
        return x.reshape(n, tokens, width // 3)


# Of the original and of timm.
RULES: Rules = {
    "cls_token": "cls_token",
    "pos_embed": "pos_embed",
    "register_tokens|reg_token": "register_tokens",
    "mask_token": None,
    r"patch_embed\.proj\.weight": "patch_embed.kernel",
    r"patch_embed\.proj\.bias": "patch_embed.bias",
    r"(blocks\.\d+\.norm\d|norm)\.weight": r"\1.scale",
    r"(blocks\.\d+\.norm\d|norm)\.bias": r"\1.bias",
    r"(blocks\.\d+)\.attn\.(qkv|proj)\.weight": r"\1.\2.kernel",
    r"(blocks\.\d+)\.attn\.(qkv|proj)\.bias": r"\1.\2.bias",
    r"(blocks\.\d+\.ls\d)\.gamma": r"\1.gamma",
    r"(blocks\.\d+\.mlp\.fc\d)\.weight": r"\1.kernel",
    r"(blocks\.\d+\.mlp\.fc\d)\.bias": r"\1.bias",
    r"head\..*": None,
}
_LAYER = r"(?:dinov2(?:_with_registers)?\.)?encoder\.layer\.(\d+)"
_ROOT = r"(?:dinov2(?:_with_registers)?\.)?"
# Of transformers.
NAMED_BY_TRANSFORMERS: Rules = {
    rf"{_ROOT}embeddings\.cls_token": "cls_token",
    rf"{_ROOT}embeddings\.position_embeddings": "pos_embed",
    rf"{_ROOT}embeddings\.register_tokens": "register_tokens",
    rf"{_ROOT}embeddings\.mask_token": None,
    rf"{_ROOT}embeddings\.patch_embeddings\.projection\.weight": "patch_embed.kernel",
    rf"{_ROOT}embeddings\.patch_embeddings\.projection\.bias": "patch_embed.bias",
    # Before version 5 query, key, value and dense, now q_proj to o_proj.
    **{
        rf"{_LAYER}\.attention\.{name}\.{torch_name}": Part(
            rf"blocks.\1.qkv.{flax_name}", index, 3
        )
        for index, name in enumerate(
            rf"(?:attention\.{name}|{name[0]}_proj)"
            for name in ("query", "key", "value")
        )
        for torch_name, flax_name in (("weight", "kernel"), ("bias", "bias"))
    },
    rf"{_LAYER}\.attention\.(?:output\.dense|o_proj)\.weight": r"blocks.\1.proj.kernel",
    rf"{_LAYER}\.attention\.(?:output\.dense|o_proj)\.bias": r"blocks.\1.proj.bias",
    rf"{_LAYER}\.(norm\d)\.weight": r"blocks.\1.\2.scale",
    rf"{_LAYER}\.(norm\d)\.bias": r"blocks.\1.\2.bias",
    rf"{_LAYER}\.layer_scale(\d)\.lambda1": r"blocks.\1.ls\2.gamma",
    rf"{_LAYER}\.mlp\.(fc\d)\.weight": r"blocks.\1.mlp.\2.kernel",
    rf"{_LAYER}\.mlp\.(fc\d)\.bias": r"blocks.\1.mlp.\2.bias",
    rf"{_ROOT}layernorm\.weight": "norm.scale",
    rf"{_ROOT}layernorm\.bias": "norm.bias",
    r"classifier\..*": None,
}


def options_of(shapes: Shapes, file: str) -> dict[str, Any] | None:
    """The network that arrays of these names and shapes are of; None if no ViT's."""
    for prefix in ("", "dinov2.", "dinov2_with_registers."):
        embeddings = f"{prefix}embeddings."
        if f"{embeddings}patch_embeddings.projection.weight" in shapes:
            by_transformers = True
            kernel = shapes[f"{embeddings}patch_embeddings.projection.weight"]
            positions = shapes.get(f"{embeddings}position_embeddings")
            registers = shapes.get(f"{embeddings}register_tokens")
            first, second = f"{prefix}encoder.layer.", ".norm1.weight"
            break
    else:
        by_transformers = False
        kernel = shapes.get("patch_embed.proj.weight")
        positions = shapes.get("pos_embed")
        registers = shapes.get("register_tokens", shapes.get("reg_token"))
        first, second = "blocks.", ".norm1.weight"
    depth = 0
    while f"{first}{depth}{second}" in shapes:
        depth += 1
    if kernel is None or positions is None or not depth or len(kernel) != 4:
        return None
    width = kernel[0]
    grid = math.isqrt(positions[1])
    # Of the original without registers, which has a token for masked patches.
    original = "mask_token" in shapes and not by_transformers
    interpolated = "cubic" if by_transformers else "cubic-antialiased"
    if registers is not None:
        interpolated = "cubic-antialiased"
    elif original:
        interpolated = "cubic-offset"
    return {
        "width": width,
        "depth": depth,
        "heads": max(1, width // HEAD),
        "patch": kernel[2],
        "grid": grid,
        "registers": 0 if registers is None else registers[1],
        "class_position": positions[1] > grid * grid,
        "positions": interpolated,
    }


def rules_of(shapes: Shapes) -> Rules:
    return RULES if "patch_embed.proj.weight" in shapes else NAMED_BY_TRANSFORMERS


def title_of(options: Mapping[str, Any]) -> str:
    size = {384: "S", 768: "B", 1024: "L"}.get(options["width"], options["width"])
    more = f" with {options['registers']} registers" if options["registers"] else ""
    return f"ViT-{size}/{options['patch']} (DINOv2){more}"
