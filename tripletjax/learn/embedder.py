"""The embedding of a run, as a function of images.

It needs neither the data that it was trained on nor what reads data or draws.
"""

import dataclasses
import functools
import itertools
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax
from jax.typing import ArrayLike
from PIL import Image

from tripletjax.learn import backbones, pretrained, record
from tripletjax.learn.checkpoints import Checkpoints
from tripletjax.learn.config import MODELS
from tripletjax.learn.convolution import jit
from tripletjax.learn.digests import digest_of, digest_of_file
from tripletjax.learn.image_io import (
    ImageSource,
    ImageSpec,
    View,
    check_not_blank,
    open_image,
    upright,
)
from tripletjax.learn.models import Standardized
from tripletjax.learn.placement import ONE_DEVICE, Placement
from tripletjax.learn.plan import BackbonePlan
from tripletjax.learn.record import RunRecord
from tripletjax.learn.weights import Loaded


def load_model(
    run_dir: str | Path, on: Placement = ONE_DEVICE
) -> tuple[Standardized, RunRecord]:
    """The best model of a run, on one device, and the record of the run.

    Args:
        run_dir: a run directory.
        on: how the processes that load it together are placed, if there are several.

    Raises:
        FileNotFoundError: if there is none yet.
        ValueError: if the record is of another version.
    """
    run_dir = Path(run_dir).resolve()
    for part in (record.FILE, "best"):
        if not (run_dir / part).exists():
            raise FileNotFoundError(f"no trained model in {run_dir}: no {part}.")
    made = RunRecord.read(run_dir)
    # Of parameters that are read, none need to be drawn first.
    model = nnx.eval_shape(lambda: build_model(made))
    part = pretrained.trained_part(model, made.plan.backbone_training)
    if made.plan.frozen:
        fill_backbone(model, made, run_dir)
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on.sharding),
        nnx.state(part),
    )
    best = Checkpoints(run_dir / "best", writable=False)
    found = best.restore(like)
    best.close()
    if found is None:
        raise FileNotFoundError(f"no trained model in {run_dir}: best is empty.")
    nnx.update(part, on.here(found[1]))
    model.eval()
    return model, made


def fill_backbone(model: Standardized, made: RunRecord, run_dir: Path) -> Loaded:
    """Loads the weights that a run began with, of which it has a copy.

    Raises:
        ValueError: if the copy is not what it was.
    """
    plan, file = made.plan.backbone, run_dir / BACKBONE
    if plan is None or plan.digest is None:
        raise ValueError(f"the run in {run_dir} began with no backbone.")
    if digest_of_file(file) != plan.digest:
        raise ValueError(f"{file} is damaged: it is not what the run began with.")
    backbone = backbones.Backbone(plan.family, plan.options)
    return backbone.fill(pretrained.backbone_of(model), file)


# The weights that a run began with.
BACKBONE = "backbone.safetensors"
# Of a plan, what an embedding depends on.
NETWORK = (
    *("box", "size", "model", "head", "channels", "stride", "dim", "mirror"),
    *("bfloat16", "backbone"),
)

# So many pixels are embedded at a time.
PIXELS = 2**20

Tree = TypeVar("Tree")
ImageInputs = ArrayLike | Sequence[np.ndarray | str | Path | Image.Image]


class ImageEmbedder(Protocol):
    """What makes vectors of images, in two steps: of a run, or of any function.

    Attributes:
        key: a name of the embedding: vectors of two keys are not compared.
    """

    @property
    def key(self) -> str: ...

    def prepare(self, image: Image.Image, /) -> Any:
        """What `embed` takes, from one image; done by several threads."""

    def embed(self, prepared: Sequence[Any], /) -> np.ndarray:
        """Vectors ``[n, d]`` of images that are prepared."""
        ...


@dataclasses.dataclass(frozen=True)
class Embedder:
    """The trained embedding of a run, as a function of images.

    Attributes:
        model: from float images, as the network sees them, to unit vectors.
        shape: what every image is made into.
        view: the part of it that the network sees, all of it if None.
        record: what the run was made with.
        run_dir: where the run is, if it is one.
    """

    model: Standardized
    shape: ImageSpec
    view: View | None
    record: RunRecord
    run_dir: Path | None = None

    @functools.cached_property
    def key(self) -> str:
        """A digest of all that the vectors of an image depend on."""
        plan = dataclasses.asdict(self.record.plan)
        made = {name: plan[name] for name in NETWORK}
        images = dataclasses.asdict(self.record.images)
        leaves = jax.tree.leaves(nnx.state(self.model))
        arrays = (np.ascontiguousarray(x).tobytes() for x in leaves)
        return f"run {digest_of(itertools.chain([json.dumps([made, images])], arrays))}"

    def __call__(self, images: ImageInputs) -> Array:
        """Unit vectors ``[n, d]`` of images of any kind."""
        return self.of_shape(_to_batch(images, self.shape))

    def prepare(self, image: Image.Image, /) -> np.ndarray:
        """What an image is made into, uint8 ``[height, width, c]``.

        Raises:
            OSError: if there is nothing to see on it.
        """
        pixels = self.shape.fit(image)
        check_not_blank(pixels)
        return pixels

    def embed(self, prepared: Sequence[np.ndarray], /) -> np.ndarray:
        """Unit vectors ``[n, d]`` of what `prepare` made of images."""
        return np.asarray(self.of_shape(np.stack(prepared)))

    def of_shape(self, images: np.ndarray) -> Array:
        """The same of images that have the shape, uint8 ``[n, height, width, c]``."""
        seen = images if self.view is None else self.view(images)
        return embed_images(self.model, seen)


def load_embedder(run_dir: str | Path) -> Embedder:
    """The trained embedding of a run.

    Args:
        run_dir: a run directory.

    Returns:
        A function to unit vectors ``[n, d]``, from uint8 images of any size, grey or
        colour: ``[n, height, width]`` or ``[n, height, width, channels]``; or a
        sequence of arrays of different sizes, Pillow's images or paths of image files.
        Images are made into what the run was trained with.

    Raises:
        FileNotFoundError: if there is no trained model.
    """
    model, made = load_model(run_dir)
    view = made.plan.view_of(made.images.shape)
    return Embedder(model, made.images.spec, view, made, Path(run_dir).resolve())


def _to_batch(images: ImageInputs, shape: ImageSpec) -> np.ndarray:
    """Images of any kind as uint8 ``[n, height, width, channels]``."""
    if isinstance(images, str | Path | Image.Image):
        raise TypeError("images must be several, got one; put it into a list.")
    several: Any = images
    if not hasattr(several, "dtype") or several.dtype.kind == "U":
        several = list(several)
    if len(several) == 0:
        raise ValueError("images must not be empty.")
    if getattr(several, "ndim", 0) == 3 and several.shape[-1] in (3, 4):
        raise ValueError(
            f"images {several.shape} look like one image in colour; images[None] makes "
            "it several."
        )
    with ThreadPoolExecutor() as pool:
        fitted = pool.map(lambda image: shape.fit(_picture(image)), several)
        return np.stack(list(fitted))


def _picture(image: ArrayLike | str | Path | Image.Image) -> Image.Image:
    if isinstance(image, str | Path):
        return open_image(image)
    if isinstance(image, Image.Image):
        return upright(image)
    image = np.asarray(image)
    if image.dtype != np.uint8:
        raise TypeError(f"images must be uint8, got dtype {image.dtype}.")
    if image.ndim == 3 and image.shape[-1] == 1:
        image = image[..., 0]
    if image.size == 0 or not (
        image.ndim == 2 or (image.ndim == 3 and image.shape[-1] in (3, 4))
    ):
        raise ValueError(
            "images must be [n, height, width] or [n, height, width, channels] "
            f"with 1, 3 or 4 channels; one of them is {image.shape}."
        )
    return Image.fromarray(image)


def build_model(made: RunRecord) -> Standardized:
    """The untrained model of a run."""
    plan, shape = made.plan, made.images.shape
    if plan.backbone is not None:
        return _on_backbone(made, plan.backbone)
    view = plan.view_of(shape)
    height, width = shape[:2] if view is None else (view.height, view.width)
    options: dict[str, dict[str, Any]] = {
        "resnet": {"stride": plan.stride},
        "photo": {"size": (height, width), "head": plan.head},
    }
    model = MODELS[plan.model](
        plan.dim,
        channels=plan.channels,
        in_channels=shape[-1],
        dtype=jnp.bfloat16 if plan.bfloat16 else None,
        rngs=nnx.Rngs(plan.seed),
        **options.get(plan.model, {}),
    )
    return Standardized(model, made.images.mean, made.images.std, mirror=plan.mirror)


def _on_backbone(made: RunRecord, plan: BackbonePlan) -> Standardized:
    rngs = nnx.Rngs(made.plan.seed)
    options = {"learn_statistics": True} if plan.digest is None else {}
    dtype = jnp.bfloat16 if made.plan.bfloat16 else None
    made_of = backbones.Backbone(plan.family, plan.options)
    backbone: Any = made_of.build(dtype=dtype, rngs=rngs, **options)
    mirror = made.plan.mirror
    head = pretrained.Head(
        backbone.features, made.plan.dim, hidden=plan.hidden, mirror=mirror, rngs=rngs
    )
    if plan.training != "all":
        pretrained.freeze(backbone, plan.training)
    model = pretrained.BackboneEmbedder(backbone, head)
    return Standardized(model, made.images.mean, made.images.std, mirror=mirror)


@functools.partial(jit, static_argnames="graph")
def _embed(graph: nnx.GraphDef, state: nnx.State, images: Array) -> Array:
    return nnx.merge(graph, state)(as_floats(images))


def check_static(graph: nnx.GraphDef) -> None:
    """Raises TypeError for a model that cannot be told from others when compiled."""
    try:
        hash(graph)
    except TypeError as error:
        raise TypeError(
            f"model has a static attribute that cannot be hashed ({error}): make lists "
            "of numbers tuples, lists of modules nnx.List."
        ) from None


def batch_size_for(images: ImageSource) -> int:
    """How many images are embedded at a time, if nothing is asked for."""
    if len(images.shape) != 4:
        return 4096
    return max(1, min(256, PIXELS // (images.shape[1] * images.shape[2])))


def embed_images(
    model: nnx.Module, images: ImageSource, *, batch_size: int | None = None
) -> Array:
    """Embeds images ``[n, height, width, channels]``, a batch at a time.

    They are uint8, or floats from 0 to 1.
    """
    graph, state = nnx.split(model)
    check_static(graph)
    state = strongly_typed(state)
    batch_size = batch_size or batch_size_for(images)
    # Fewer images are filled up to a power of two, so that few sizes are compiled.
    batch_size = min(batch_size, 2 ** (len(images) - 1).bit_length())
    embeddings = []
    for start in range(0, len(images), batch_size):
        batch = images[start : start + batch_size]
        missing = batch_size - len(batch)
        padded = np.pad(batch, [(0, missing)] + [(0, 0)] * (batch.ndim - 1))
        embeddings.append(_embed(graph, state, padded)[: len(batch)])
    return jnp.concatenate(embeddings)


def as_floats(images: ArrayLike) -> Array:
    """Images from 0 to 255 as floats from 0 to 1; floats stay as they are."""
    x = jnp.asarray(images)
    if jnp.issubdtype(x.dtype, jnp.floating):
        return x.astype(jnp.float32)
    return x.astype(jnp.float32) / 255


def strongly_typed(tree: Tree) -> Tree:
    """The same arrays, none of which has a weak type, as `jnp.asarray(1.0)` has.

    A step gives strong types: it would be compiled again for each array that was weak.
    """

    def strong(x: Any) -> Any:
        weak = getattr(jax.typeof(x), "weak_type", False)
        return lax.convert_element_type(x, jnp.result_type(x)) if weak else x

    return jax.tree.map(strong, tree)
