"""An embedder for elsewhere: StableHLO for JAX and flatbuffers alone, and ONNX.

Or what another run begins with: the weights of its backbone, as safetensors.

What is exported takes images as they are made into, uint8 ``[n, height, width,
channels]`` for any n, and gives their vectors ``[n, d]``: the part of the image that
the network sees is cut and resized within, by the same integers as Pillow.
"""

import contextlib
import dataclasses
import functools
import io
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from PIL import Image

from tripletjax.learn.data.digits import digits
from tripletjax.learn.data.folder_listing import find_files
from tripletjax.learn.data.image_files import open_image
from tripletjax.learn.data.image_shape import View
from tripletjax.learn.embedder import Embedder
from tripletjax.learn.files import replaced, write_json
from tripletjax.learn.networks import backbones, heads
from tripletjax.learn.networks.backbones.layers import whole_depthwise
from tripletjax.learn.networks.embedding import as_floats
from tripletjax.learn.networks.embedding_networks import Standardized
from tripletjax.learn.networks.weights import save_weights, shapes_of
from tripletjax.learn.runs.model import BACKBONE, build_model

# Of each file the largest difference from the run that is let through.
TOLERANCE = 1e-4
PLATFORMS = ("cpu", "cuda", "tpu")
FUNCTIONS, WEIGHTS = (".onnx", ".stablehlo"), ".safetensors"
SUFFIXES = (*FUNCTIONS, WEIGHTS)
# So many images are compared.
COMPARED = 32
# Pillow's fixed point, in two halves whose sums float32 holds exactly.
HALF = 2**11


@dataclasses.dataclass(frozen=True)
class Exported:
    """A file that was written and compared with its run.

    Attributes:
        file: where it is.
        preparation: the JSON file beside it, by which images are prepared for it; None
            for weights.
        size: in bytes.
        shape: height, width and channels of the images that it takes.
        dim: of the vectors that it gives; of a backbone's, how many features.
        images: how many were compared.
        of: what they are.
        difference: the largest of any value from that of the run.
        notes: what was decided.
    """

    file: Path
    preparation: Path | None
    size: int
    shape: tuple[int, int, int]
    dim: int
    images: int
    of: str
    difference: float
    notes: tuple[str, ...]


class DifferenceError(ValueError):
    """What was exported does not do what the run does."""


def export(
    embedder: Embedder, out: str | Path, *, check: str | Path | None = None
) -> Exported:
    """Writes the embedding of a run as one file, and compares it with the run.

    Args:
        embedder: of a run.
        out: the file, which must not exist: ``.stablehlo`` for `jax.export`, of any
            batch size, for CPU, CUDA and TPU; ``.onnx`` for ONNX; ``.safetensors`` for
            the weights of a backbone that was trained, without the head, under the
            names of the file that it began with, or torchvision's. Beside a function,
            ``FILE.json`` holds the preparation of images, for
            `learn.data.image_shape.prepare_images`.
        check: a folder with images that they are compared on. If not given, images that
            the run has learnt from, if they are still there, and else noise.

    Returns:
        `Exported`.

    Raises:
        FileExistsError: if the file is there.
        FileNotFoundError: if the folder has no image.
        ValueError: if the suffix is none of these, or no backbone was trained.
        DifferenceError: if they differ by more than 1e-4; then no file is left.
        ImportError: if a package is missing.
    """
    out = Path(out)
    if out.suffix not in SUFFIXES:
        raise ValueError(f"out must end in {', '.join(SUFFIXES)}, got {out}.")
    weights = out.suffix == WEIGHTS
    preparation = None if weights else out.with_name(f"{out.name}.json")
    for file in (out, preparation):
        if file is not None and file.exists():
            raise FileExistsError(f"{file} is there; it is left as it is.")
    if weights:
        _check_trained_backbone(embedder)
    notes = ()
    if embedder.record.plan.bfloat16:
        embedder = _in_float32(embedder)
        notes = ("the run computes in bfloat16, the file in float32",)
    images, of = _some_images(embedder, check)
    spec = embedder.shape
    shape = spec.height, spec.width, spec.channels
    out.parent.mkdir(parents=True, exist_ok=True)
    with replaced(out) as part:
        if weights:
            expected = _backbone_features(embedder)(images)
            _write_weights(embedder, part)
            again = _loaded_features(embedder, part)
        else:
            expected = embedder.embed(list(images))
            function = function_of(embedder)
            onnx = out.suffix == ".onnx"
            part.write_bytes((_as_onnx if onnx else _as_stablehlo)(function, shape))
            again = (_onnx if onnx else _stablehlo)(part.read_bytes())
        # Of another number of images, too.
        got = np.concatenate([again(images[:1]), again(images[1:])])
        # Of features, as a share of the largest.
        largest = float(np.abs(expected).max()) if weights else 1.0
        difference = float(np.abs(got - expected).max()) / largest
        if not difference <= TOLERANCE:
            raise DifferenceError(
                f"the file for {out} would differ from the run by {difference:.2g} on "
                f"{of}, more than {TOLERANCE:g}; it is not kept."
            )
        if preparation is not None:
            write_json(preparation, dataclasses.asdict(spec))
    size, dim = out.stat().st_size, expected.shape[1]
    return Exported(
        out, preparation, size, shape, dim, len(images), of, difference, notes
    )


def _check_trained_backbone(embedder: Embedder) -> None:
    plan = embedder.record.plan.backbone
    if plan is None:
        raise ValueError(
            f"out is {WEIGHTS}, for the weights of a backbone, but the run has none."
        )
    if plan.training == "frozen":
        raise ValueError(
            f"out is {WEIGHTS}, for the weights of a backbone, but that of the run "
            "was not trained: it is the file that the run began with."
        )


def _write_weights(embedder: Embedder, path: Path) -> None:
    """The weights of a run's backbone, under the names that it began with."""
    plan, run_dir = embedder.record.plan.backbone, embedder.run_dir
    backbone = heads.backbone_of(embedder.model)
    if plan is None or plan.digest is None or run_dir is None:
        save_weights(backbone, path)
        return
    file = run_dir / BACKBONE
    rules = backbones.FAMILIES[plan.family].rules_of(shapes_of(file))
    save_weights(backbone, path, like=file, rules=rules)


def _backbone_features(embedder: Embedder) -> Callable[[np.ndarray], np.ndarray]:
    model = heads.features_of(embedder.model)
    return lambda images: np.asarray(
        dataclasses.replace(embedder, model=model).of_shape(images)
    )


def _loaded_features(
    embedder: Embedder, path: Path
) -> Callable[[np.ndarray], np.ndarray]:
    """The same of a file, read as another run would read it."""
    network, _ = backbones.load(path)
    model = Standardized(network, embedder.model.mean, embedder.model.std)
    model.eval()
    return lambda images: np.asarray(
        dataclasses.replace(embedder, model=model).of_shape(images)
    )


def _in_float32(embedder: Embedder) -> Embedder:
    """The same network and parameters, computed in float32."""
    made = embedder.record
    made = dataclasses.replace(
        made, plan=dataclasses.replace(made.plan, bfloat16=False)
    )
    model = build_model(made)
    nnx.update(model, nnx.state(embedder.model))
    model.eval()
    return dataclasses.replace(embedder, model=model, record=made)


def function_of(embedder: Embedder) -> Callable[[Array], Array]:
    """The embedding in JAX alone, from images as they are made into."""
    graph, state = nnx.split(embedder.model)
    resize = None
    if embedder.view is not None:
        spec = embedder.shape
        resize = resampling(embedder.view, spec.height, spec.width)

    def embed(images: Array) -> Array:
        seen = as_floats(images) if resize is None else resize(images) / 255
        return nnx.merge(graph, state)(seen)

    return embed


def resampling(view: View, height: int, width: int) -> Callable[[Array], Array]:
    """What a view does to images uint8 ``[n, height, width, c]``, as floats 0 to 255.

    Sums of the same integers as Pillow's, which are rounded after either direction.
    Which comes first depends on Pillow's version: it is asked.
    """
    top, left, bottom, right = view.box
    columns = _weights(width, left * width, right * width, view.width)
    rows = _weights(height, top * height, bottom * height, view.height)

    def weighted(x: Array, weights: np.ndarray | None, form: str) -> Array:
        if weights is None:
            return x
        high, low = (np.float32(part) for part in np.divmod(weights, HALF))
        large = jnp.einsum(form, high, x, precision="highest")
        small = jnp.einsum(form, low, x, precision="highest")
        # (large * HALF + small + HALF**2 / 2) // HALF**2, in numbers below 2**24.
        carried = jnp.floor(small / HALF + HALF / 2)
        return jnp.clip(jnp.floor((large + carried) / HALF), 0, 255)

    steps = [(columns, "jw,nhwc->nhjc"), (rows, "ih,nhwc->niwc")]

    def resize(images: Array, steps: list) -> Array:
        x = jnp.asarray(images).astype(jnp.float32)
        for weights, form in steps:
            x = weighted(x, weights, form)
        return x

    draw = np.random.default_rng(0)
    noise = draw.integers(0, 256, (1, height, width, 3), dtype=np.uint8)
    orders = steps, steps[::-1]
    expected = view(noise).astype(np.float32)
    apart = [np.abs(resize(jnp.asarray(noise), one) - expected).sum() for one in orders]
    return functools.partial(resize, steps=orders[int(np.argmin(apart))])


def _weights(size: int, start: float, end: float, out: int) -> np.ndarray | None:
    """Pillow's weights of a Lanczos filter, integers ``[out, size]``; None for none."""
    # Pillow has the ends in 32 bits.
    start, end = float(np.float32(start)), float(np.float32(end))
    if out == size and start == 0 and end == size:
        return None
    scale = (end - start) / out
    spread = max(scale, 1.0)
    weights = np.zeros((out, size))
    for index in range(out):
        centre = start + (index + 0.5) * scale
        first = max(int(centre - 3 * spread + 0.5), 0)
        last = min(int(centre + 3 * spread + 0.5), size)
        x = (np.arange(first, last) - centre + 0.5) / spread
        near = np.where(np.abs(x) <= 3, np.sinc(x) * np.sinc(x / 3), 0)
        weights[index, first:last] = near / near.sum()
    fixed = weights * HALF**2
    return np.trunc(fixed + np.where(fixed < 0, -0.5, 0.5)).astype(np.int64)


def _as_stablehlo(function: Callable, shape: tuple[int, int, int]) -> bytes:
    _need("flatbuffers")
    (n,) = jax.export.symbolic_shape("n")
    spec = jax.ShapeDtypeStruct((n, *shape), jnp.uint8)
    made = jax.export.export(jax.jit(function), platforms=PLATFORMS)(spec)
    return bytes(made.serialize())


def _stablehlo(content: bytes) -> Callable[[np.ndarray], np.ndarray]:
    call = jax.export.deserialize(bytearray(content)).call
    return lambda images: np.asarray(call(images))


def _as_onnx(function: Callable, shape: tuple[int, int, int]) -> bytes:
    (n,) = jax.export.symbolic_shape("n")
    with _quiet(), whole_depthwise():
        # What it cannot import is for other networks.
        jax2onnx = _need("jax2onnx")
        made: Any = jax2onnx.to_onnx(
            function,
            [jax.ShapeDtypeStruct((n, *shape), jnp.uint8)],
            model_name="tripletjax",
            input_names=["images"],
            output_names=["embeddings"],
        )
    return made.SerializeToString()


def _onnx(content: bytes) -> Callable[[np.ndarray], np.ndarray]:
    onnxruntime = _need("onnxruntime")
    options = onnxruntime.SessionOptions()
    # Errors alone.
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(content, options)
    return lambda images: session.run(None, {"images": images})[0]


def _need(package: str) -> Any:
    try:
        return __import__(package)
    except ImportError as error:
        raise ImportError(
            f'{error}: it needs pip install "tripletjax[train,export]"'
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what a converter says to those who write it."""
    loggers = [logging.getLogger(name) for name in ("jax2onnx", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


def _some_images(
    embedder: Embedder, check: str | Path | None
) -> tuple[np.ndarray, str]:
    """Images to compare on, as the run makes them, and what they are."""
    learnt = embedder.record.requested.data
    folder = Path(learnt if check is None else check)
    if check is None and learnt == "digits":
        pixels = digits()[0][:COMPARED, ..., 0]
        images = [embedder.prepare(Image.fromarray(image)) for image in pixels]
        return np.stack(images), f"{len(images)} digits"
    if folder.is_dir():
        images = [*_readable(embedder, find_files(folder).files)]
        if images:
            return np.stack(images), f"{len(images)} images of {folder}"
    if check is not None:
        raise FileNotFoundError(f"there is no image in {check}.")
    spec, draw = embedder.shape, np.random.default_rng(0)
    shape = COMPARED, spec.height, spec.width, spec.channels
    noise = draw.integers(0, 256, shape, dtype=np.uint8)
    return noise, f"{COMPARED} images of noise: what the run learnt from is not there"


def _readable(embedder: Embedder, files: Sequence[Path]) -> Iterator[np.ndarray]:
    """Some images, from all over the folder."""
    step = max(1, math.ceil(len(files) / COMPARED))
    for file in files[::step]:
        try:
            yield embedder.prepare(open_image(file))
        except OSError:
            continue
