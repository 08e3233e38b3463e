"""Export of an embedder as StableHLO or ONNX, and of its backbone as safetensors.

A StableHLO file requires JAX and flatbuffers alone. An exported function maps prepared
images, uint8 ``[n, height, width, channels]`` for any n, to vectors ``[n, d]``. It
contains the crop and the resize to the view of the network, in the integers of Pillow.
"""

import contextlib
import dataclasses
import functools
import io
import json
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from PIL import Image

from tripletjax.apps.embedders.onnx_files import METADATA
from tripletjax.learn.counts import counted
from tripletjax.learn.data.digits import digits
from tripletjax.learn.data.folder_listing import find_files
from tripletjax.learn.data.image_files import open_image
from tripletjax.learn.data.image_shape import View
from tripletjax.learn.embedder import Embedder
from tripletjax.learn.errors import install_command
from tripletjax.learn.files import replaced_together, write_json
from tripletjax.learn.networks import backbones, heads
from tripletjax.learn.networks.backbones.layers import whole_depthwise
from tripletjax.learn.networks.embedding import as_floats
from tripletjax.learn.networks.embedding_networks import Standardized
from tripletjax.learn.networks.weights import save_weights, shapes_of
from tripletjax.learn.networks.weights_files import read_arrays
from tripletjax.learn.runs.model import BACKBONE, build_model

# Largest difference of an exported value from that of the run.
TOLERANCE = 1e-4
PLATFORMS = ("cpu", "cuda", "tpu")
FUNCTIONS, WEIGHTS = (".onnx", ".stablehlo"), ".safetensors"
SUFFIXES = (*FUNCTIONS, WEIGHTS)
# Images that are compared.
COMPARED = 32
# Half the bits of Pillow's fixed point: float32 holds the sums of a half exactly.
HALF = 2**11


@dataclasses.dataclass(frozen=True)
class Exported:
    """An exported file, and its comparison with the run.

    Attributes:
        file: path of the file.
        preparation: path of the JSON file with the preparation of images; None for
            weights.
        size: size of the file in bytes.
        shape: height, width and channels of prepared images.
        dim: size of the vectors, or number of features of a backbone.
        images: number of images that were compared.
        compared_on: description of these images.
        difference: largest difference of a value from that of the run.
        notes: differences between file and run, for the user.
    """

    file: Path
    preparation: Path | None
    size: int
    shape: tuple[int, int, int]
    dim: int
    images: int
    compared_on: str
    difference: float
    notes: tuple[str, ...]


class DifferenceError(ValueError):
    """An exported file whose values differ from those of its run."""


def export(
    embedder: Embedder, out: str | Path, *, check: str | Path | None = None
) -> Exported:
    """Write the embedding of a run as one file, and compare the file with the run.

    The suffix of `out` chooses the format:

    - ``.stablehlo``: a function for `jax.export`, for CPU, CUDA and TPU.
    - ``.onnx``: a function for ONNX.
    - ``.safetensors``: weights of a trained backbone without its head. Their names are
      those of the file that the run began with, or torchvision's.

    Beside a function, ``FILE.json`` holds the preparation of images, for
    `learn.data.image_shape.prepare_images`. An ONNX file also carries it as metadata,
    so that ``--embedder FILE.onnx`` of the commands needs no second file.

    Args:
        embedder: of a run.
        out: path of the file, which must not exist.
        check: folder of images to compare on; by default the training images of the
            run if they exist, otherwise noise.

    Returns:
        The file and its difference from the run.

    Raises:
        FileExistsError: if `out` or its ``.json`` exists.
        FileNotFoundError: if `check` has no readable image.
        ValueError: if the suffix is none of these, or the run trained no backbone.
        DifferenceError: if values differ by more than 1e-4; no file remains.
        ImportError: if a required package is missing.
    """
    out = Path(out)
    if out.suffix not in SUFFIXES:
        raise ValueError(f"out must end in {', '.join(SUFFIXES)}, got {out}.")
    weights = out.suffix == WEIGHTS
    preparation = None if weights else out.with_name(f"{out.name}.json")
    for file in (out, preparation):
        if file is not None and file.exists():
            raise FileExistsError(f"{file} already exists; give another file.")
    if weights:
        _check_trained_backbone(embedder)
    notes = ()
    if embedder.record.plan.bfloat16:
        embedder = _to_float32(embedder)
        notes = ("the run computes in bfloat16, the file in float32",)
    images, compared_on = _comparison_images(embedder, check)
    spec = embedder.shape
    shape = spec.height, spec.width, spec.channels
    with replaced_together() as part_beside:
        part = part_beside(out)
        if weights:
            expected = np.asarray(_features(embedder).of_shape(images))
            _write_weights(embedder, part)
            restored = _features(embedder, part).of_shape
        else:
            expected = embedder.embed(list(images))
            function = function_of(embedder)
            if out.suffix == ".onnx":
                metadata = {METADATA: json.dumps(dataclasses.asdict(spec))}
                part.write_bytes(_to_onnx(function, shape, metadata))
                restored = _load_onnx(part.read_bytes())
            else:
                part.write_bytes(_to_stablehlo(function, shape))
                restored = _load_stablehlo(part.read_bytes())
        # In two batches, since the file must accept any number of images.
        actual = np.concatenate([restored(images[:1]), restored(images[1:])])
        # Features are compared as shares of the largest; vectors have unit norm.
        scale = float(np.abs(expected).max()) if weights else 1.0
        difference = float(np.abs(actual - expected).max()) / scale
        if not difference <= TOLERANCE:
            raise DifferenceError(
                f"{out} must differ from the run by at most {TOLERANCE:g}, got "
                f"{difference:.2g} on {compared_on}; no file is written."
            )
        if preparation is not None:
            write_json(part_beside(preparation), dataclasses.asdict(spec))
    size, dim = out.stat().st_size, expected.shape[1]
    return Exported(
        out, preparation, size, shape, dim, len(images), compared_on, difference, notes
    )


def _check_trained_backbone(embedder: Embedder) -> None:
    plan = embedder.record.plan.backbone
    if plan is None:
        raise ValueError(
            f"out with suffix {WEIGHTS} requires a run with a backbone; for this run "
            f"use {' or '.join(FUNCTIONS)}."
        )
    if plan.training == "frozen":
        raise ValueError(
            f"out with suffix {WEIGHTS} requires a trained backbone, got a frozen one; "
            "its weights are those of the file that the run began with."
        )


def _write_weights(embedder: Embedder, path: Path) -> None:
    """Write the weights of the backbone, under the names of its original file."""
    plan, run_dir = embedder.record.plan.backbone, embedder.run_dir
    backbone = heads.backbone_of(embedder.model)
    if plan is None or plan.digest is None or run_dir is None:
        save_weights(backbone, path)
        return
    file = run_dir / BACKBONE
    module = backbones.FAMILIES[plan.family].module
    rules = module.rules_of(shapes_of(read_arrays(file)))
    save_weights(backbone, path, like=file, rules=rules)


def _features(embedder: Embedder, path: Path | None = None) -> Embedder:
    """The features of the backbone, of the run or as another run would load them."""
    if path is None:
        model = heads.features_of(embedder.model)
    else:
        network, _ = backbones.load(path)
        model = Standardized(network, embedder.model.mean, embedder.model.std)
        model.eval()
    return dataclasses.replace(embedder, model=model)


def _to_float32(embedder: Embedder) -> Embedder:
    """The embedder with the same parameters, which computes in float32."""
    plan = dataclasses.replace(embedder.record.plan, bfloat16=False)
    record = dataclasses.replace(embedder.record, plan=plan)
    model = build_model(record)
    nnx.update(model, nnx.state(embedder.model))
    model.eval()
    return dataclasses.replace(embedder, model=model, record=record)


def function_of(embedder: Embedder) -> Callable[[Array], Array]:
    """The embedding as a function of prepared images, in JAX alone."""
    graph, state = nnx.split(embedder.model)
    resize = None
    if embedder.view is not None:
        spec = embedder.shape
        resize = resampling(embedder.view, spec.height, spec.width)

    def embed(images: Array) -> Array:
        x = as_floats(images) if resize is None else resize(images) / 255
        return nnx.merge(graph, state)(x)

    return embed


def resampling(view: View, height: int, width: int) -> Callable[[Array], Array]:
    """A view as a function of images in JAX, equal to Pillow's bit by bit.

    Pillow sums integers, and rounds after each of the two directions. Which direction
    is first depends on its version: a comparison on noise decides.

    Args:
        view: box and size of the part that the network sees.
        height: height of prepared images.
        width: width of prepared images.

    Returns:
        A function from uint8 ``[n, height, width, c]`` to floats from 0 to 255
        ``[n, view.height, view.width, c]``.
    """
    top, left, bottom, right = view.box
    columns = _weights(width, left * width, right * width, view.width)
    rows = _weights(height, top * height, bottom * height, view.height)

    def apply_weights(x: Array, weights: np.ndarray | None, form: str) -> Array:
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
            x = apply_weights(x, weights, form)
        return x

    draw = np.random.default_rng(0)
    noise = draw.integers(0, 256, (1, height, width, 3), dtype=np.uint8)
    expected = view(noise).astype(np.float32)
    orders = steps, steps[::-1]
    errors = [np.abs(resize(jnp.asarray(noise), o) - expected).sum() for o in orders]
    return functools.partial(resize, steps=orders[int(np.argmin(errors))])


def _weights(size: int, start: float, end: float, out: int) -> np.ndarray | None:
    """Pillow's integer weights ``[out, size]`` of a Lanczos filter.

    None if the filter would keep every pixel.
    """
    # Pillow keeps the ends of the box in 32 bits.
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
        kernel = np.where(np.abs(x) <= 3, np.sinc(x) * np.sinc(x / 3), 0)
        weights[index, first:last] = kernel / kernel.sum()
    fixed = weights * HALF**2
    return np.trunc(fixed + np.where(fixed < 0, -0.5, 0.5)).astype(np.int64)


def _to_stablehlo(function: Callable, shape: tuple[int, int, int]) -> bytes:
    _import("flatbuffers")
    (n,) = jax.export.symbolic_shape("n")
    spec = jax.ShapeDtypeStruct((n, *shape), jnp.uint8)
    exported = jax.export.export(jax.jit(function), platforms=PLATFORMS)(spec)
    return bytes(exported.serialize())


def _load_stablehlo(content: bytes) -> Callable[[np.ndarray], np.ndarray]:
    call = jax.export.deserialize(bytearray(content)).call
    return lambda images: np.asarray(call(images))


def _to_onnx(
    function: Callable, shape: tuple[int, int, int], metadata: Mapping[str, str]
) -> bytes:
    (n,) = jax.export.symbolic_shape("n")
    with _silence_converters(), whole_depthwise():
        # The import warns of optional packages, which these networks do not need.
        jax2onnx = _import("jax2onnx")
        model: Any = jax2onnx.to_onnx(
            function,
            [jax.ShapeDtypeStruct((n, *shape), jnp.uint8)],
            model_name="tripletjax",
            input_names=["images"],
            output_names=["embeddings"],
        )
    for name, text in metadata.items():
        model.metadata_props.add(key=name, value=text)
    return model.SerializeToString()


def _load_onnx(content: bytes) -> Callable[[np.ndarray], np.ndarray]:
    onnxruntime = _import("onnxruntime")
    options = onnxruntime.SessionOptions()
    # Level 3: errors, without warnings.
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(content, options)
    return lambda images: session.run(None, {"images": images})[0]


def _import(package: str) -> Any:
    try:
        return __import__(package)
    except ImportError as error:
        raise ImportError(
            f"{error}; export requires {install_command('train,export')}."
        ) from error


@contextlib.contextmanager
def _silence_converters() -> Iterator[None]:
    """Suppress the logs, warnings and prints of jax2onnx, which are for its authors."""
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


def _comparison_images(
    embedder: Embedder, check: str | Path | None
) -> tuple[np.ndarray, str]:
    """Prepared images to compare on, and their description."""
    data = embedder.record.requested.data
    folder = Path(data if check is None else check)
    if check is None and data == "digits":
        pixels = digits()[0][:COMPARED, ..., 0]
        images = [embedder.prepare(Image.fromarray(image)) for image in pixels]
        return np.stack(images), counted(len(images), "digit")
    if folder.is_dir():
        images = [*_prepare_sample(embedder, find_files(folder).files)]
        if images:
            return np.stack(images), f"{counted(len(images), 'image')} of {folder}"
    if check is not None:
        raise FileNotFoundError(f"check must have a readable image, got {check}.")
    spec, draw = embedder.shape, np.random.default_rng(0)
    shape = COMPARED, spec.height, spec.width, spec.channels
    noise = draw.integers(0, 256, shape, dtype=np.uint8)
    return noise, f"{COMPARED} images of noise (the training images do not exist)"


def _prepare_sample(embedder: Embedder, files: Sequence[Path]) -> Iterator[np.ndarray]:
    """Prepare every n-th image, and skip unreadable ones."""
    step = max(1, math.ceil(len(files) / COMPARED))
    for file in files[::step]:
        try:
            yield embedder.prepare(open_image(file))
        except OSError:
            continue
