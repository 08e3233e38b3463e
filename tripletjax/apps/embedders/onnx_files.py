"""Embedders of ONNX files, by ONNX Runtime.

A file of `tripletjax export` carries the preparation of its images. For other files, a
JSON file beside it (``FILE.onnx.json``) or options give the preparation.
"""

import dataclasses
import importlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from tripletjax.apps.embedders.vectors import (
    BATCH,
    check_vectors,
    describe,
    to_unit_norm,
)
from tripletjax.learn.data.image_shape import ImageSpec, to_rgb
from tripletjax.learn.errors import install_command
from tripletjax.learn.files import digest_of, digest_of_file

# The metadata of a file of `tripletjax export`: the `ImageSpec` as JSON.
METADATA = "tripletjax.images"
DTYPES = {
    "tensor(uint8)": np.uint8,
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
}
# The first that is there computes.
PROVIDERS = ("CUDAExecutionProvider", "CPUExecutionProvider")
LAYOUTS, FITS = ("nchw", "nhwc"), ("crop", "pad", "stretch")
IMAGENET = "0.485 0.456 0.406 and 0.229 0.224 0.225"
# The location of weights outside the file, in the encoding of the format.
LOCATION = re.compile(rb"\x0a\x08location\x12(.)", re.DOTALL)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preparation:
    """The preparation of images for a network, as far as it is known.

    Attributes:
        size: side of the square input in pixels, or height and width.
        mean: of pixel values from 0 to 1, one for each channel or for all.
        std: standard deviation of pixel values, one for each channel or for all.
        layout: nchw or nhwc, the order of the axes of the input.
        fit: crop the centre, pad to the size, or stretch.
        output: name of the output that holds the vectors.
    """

    size: int | tuple[int, int] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    layout: str | None = None
    fit: str = "crop"
    output: str | None = None

    @classmethod
    def of(cls, values: Any) -> "Preparation":
        """Check values, such as those of a JSON file.

        Raises:
            ValueError: if a name or a value is wrong.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        if not isinstance(values, dict) or not {*values} <= {*names}:
            raise ValueError(f"it must have no names but {', '.join(names)}")
        fields: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in values.items()
        }
        result = cls(**fields)
        size = result.size
        sides = size if isinstance(size, tuple) else (1 if size is None else size,)
        _require("size", size, len(sides) <= 2 and _all(sides, int, 1))
        for name, least in (("mean", -np.inf), ("std", 1e-12)):
            value = fields.get(name)
            right = value is None or (
                isinstance(value, tuple)
                and len(value) in (1, 3)
                and _all(value, (int, float), least)
            )
            _require(name, value, right)
        _require("layout", result.layout, result.layout in (None, *LAYOUTS))
        _require("fit", result.fit, result.fit in FITS)
        output = result.output
        _require("output", output, output is None or isinstance(output, str))
        return result


@dataclasses.dataclass(frozen=True)
class OnnxEmbedder:
    """An ONNX file as an `ImageEmbedder`, with vectors of unit norm.

    Attributes:
        key: digest of the file and of the preparation of images.
        name: of the file, for messages.
        session: of ONNX Runtime.
        input: name of the input.
        output: name of the output with the vectors.
        dtype: of the input.
        batch: number of images in a batch of the file; None for any number.
        spec: preparation of a file of `tripletjax export`; None for other files.
        size: height and width of the input.
        channels: 1 or 3.
        layout: nchw or nhwc.
        fit: crop, pad or stretch.
        mean: of pixel values from 0 to 1, by channel.
        std: of pixel values, by channel.
    """

    key: str
    name: str
    session: Any
    input: str
    output: str
    dtype: Any
    batch: int | None
    spec: ImageSpec | None
    size: tuple[int, int]
    channels: int
    layout: str
    fit: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def prepare(self, image: Image.Image, /) -> np.ndarray:
        """Prepare an image as uint8 ``[height, width, channels]``."""
        if self.spec is not None:
            return self.spec.fit(image)
        height, width = self.size
        image = to_rgb(image)
        if self.fit == "pad":
            return ImageSpec(height, width, self.channels).fit(image)
        image = image.convert("RGB" if self.channels == 3 else "L")
        if self.fit == "crop":
            image = ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)
        else:
            image = image.resize((width, height), Image.Resampling.BICUBIC)
        return np.asarray(image).reshape(height, width, self.channels)

    def embed(self, prepared: Sequence[np.ndarray], /) -> np.ndarray:
        """Unit vectors ``[n, d]`` of prepared images."""
        size = self.batch or BATCH
        batches = [prepared[i : i + size] for i in range(0, len(prepared), size)]
        return to_unit_norm(np.concatenate([self._run(batch) for batch in batches]))

    def _run(self, prepared: Sequence[np.ndarray]) -> np.ndarray:
        images, n = np.stack(prepared), len(prepared)
        if self.batch is not None:
            # Repeat the last image up to the only size that the file accepts.
            images = images[np.minimum(np.arange(self.batch), n - 1)]
        if self.dtype is not np.uint8:
            mean, std = (np.asarray(x, np.float32) for x in (self.mean, self.std))
            images = ((images.astype(np.float32) / 255 - mean) / std).astype(self.dtype)
        if self.layout == "nchw":
            images = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
        try:
            (x,) = self.session.run([self.output], {self.input: images})
        except Exception as error:
            raise ValueError(
                f"embedder {self.name} cannot run on images {images.shape}: "
                f"{describe(error)}."
            ) from error
        return check_vectors(x, len(images), f"embedder {self.name}")[:n]


def load_onnx(
    file: str | Path,
    *,
    size: int | None = None,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
) -> OnnxEmbedder:
    """Load the embedder of an ONNX file.

    Args:
        file: from images ``[n, 3, h, w]`` or ``[n, h, w, 3]``, or with one grey
            channel, to vectors ``[n, d]``.
        size: side of the input in pixels.
        mean: of pixel values from 0 to 1.
        std: standard deviation of pixel values. Size, mean and std override those of
            ``FILE.json``, whose names are those of `Preparation`.

    Returns:
        The embedder, whose vectors have unit norm.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if it is no ONNX file, or has another input or output, or the
            preparation is unknown or wrong.
        ImportError: if ONNX Runtime is missing.
    """
    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"embedder {file} does not exist.")
    session = _open_session(file)
    given = {"size": size, "mean": tuple(mean), "std": tuple(std)}
    given = {name: value for name, value in given.items() if value}
    spec, preparation = _read_preparation(file, session, given)
    inputs = session.get_inputs()
    shape = inputs[0].shape or []
    if len(inputs) != 1 or inputs[0].type not in DTYPES or len(shape) != 4:
        received = ", ".join(f"{x.name} {x.type} {x.shape}" for x in inputs)
        raise ValueError(
            f"embedder {file} must have one input, images [n, 3, h, w] or [n, h, w, "
            f"3] of float or uint8, got {received}."
        )
    layout = _layout_of(file, shape, preparation)
    height, width, channels = (shape[layout.index(axis)] for axis in "hwc")
    channels = channels if isinstance(channels, int) else 3
    if channels not in (1, 3):
        raise ValueError(
            f"embedder {file} must take 1 or 3 channels, got {channels} in {shape}."
        )
    sides = _size_of(file, (height, width), preparation)
    dtype = DTYPES[inputs[0].type]
    mean, std = preparation.mean or (), preparation.std or ()
    _check_scaling(file, mean, std, channels, required=dtype is not np.uint8)
    prepared = dataclasses.asdict(preparation if spec is None else spec)
    return OnnxEmbedder(
        key=f"onnx {_digest_of_weights(file)}, preparation 1 "
        f"{digest_of([json.dumps([prepared, sides, layout])])}",
        name=str(file),
        session=session,
        input=inputs[0].name,
        output=_output_of(file, session, preparation),
        dtype=dtype,
        batch=shape[0] if isinstance(shape[0], int) else None,
        spec=spec,
        size=sides,
        channels=channels,
        layout=layout,
        fit=preparation.fit,
        mean=mean,
        std=std,
    )


def _check_scaling(
    file: Path,
    mean: Sequence[float],
    std: Sequence[float],
    channels: int,
    *,
    required: bool,
) -> None:
    if required and not (mean and std):
        raise ValueError(
            f"embedder {file} requires the mean and the deviation of pixel values: "
            f"--embedder-mean and --embedder-std, or mean and std in {file.name}.json, "
            f"such as {IMAGENET} for most networks of ImageNet."
        )
    for name, values in (("mean", mean), ("std", std)):
        if len(values) not in (0, 1, channels):
            raise ValueError(
                f"{name} must have 1 or {channels} values for {file}, got "
                f"{len(values)}."
            )


def _open_session(file: Path) -> Any:
    try:
        onnxruntime = importlib.import_module("onnxruntime")
    except ImportError as error:
        raise ImportError(
            f"{error}; embedder {file} requires {install_command('train,export')}."
        ) from error
    options = onnxruntime.SessionOptions()
    # Level 4: fatal errors alone; others are raised as exceptions.
    options.log_severity_level = 4
    available = onnxruntime.get_available_providers()
    try:
        return onnxruntime.InferenceSession(
            str(file), options, providers=[x for x in PROVIDERS if x in available]
        )
    except Exception as error:
        raise ValueError(
            f"embedder {file} is no ONNX file that ONNX Runtime reads: "
            f"{describe(error)}."
        ) from error


def _read_preparation(
    file: Path, session: Any, given: Mapping[str, Any]
) -> tuple[ImageSpec | None, Preparation]:
    """The preparation that a file carries, or that of its JSON file and of options."""
    text = session.get_modelmeta().custom_metadata_map.get(METADATA)
    beside = file.with_name(f"{file.name}.json")
    values: Any = {}
    if text is not None or beside.exists():
        source = file if text is not None else beside
        try:
            values = json.loads(
                beside.read_text(encoding="utf-8") if text is None else text
            )
        except ValueError as error:
            raise ValueError(f"{source} has a broken preparation: {error}.") from None
        if text is not None or (isinstance(values, dict) and "background" in values):
            if given:
                name = next(iter(given))
                raise ValueError(
                    f"{name} cannot be combined with {file}: the file carries the "
                    "preparation of its run."
                )
            try:
                spec = ImageSpec(**values)
            except TypeError as error:
                raise ValueError(
                    f"{source} must be written by tripletjax export: {error}."
                ) from None
            return spec, Preparation(size=(spec.height, spec.width), layout="nhwc")
    try:
        of_file = Preparation.of(values)
    except ValueError as error:
        raise ValueError(f"{beside}: {error}.") from None
    return None, Preparation.of(dataclasses.asdict(of_file) | dict(given))


def _layout_of(file: Path, shape: Sequence[Any], preparation: Preparation) -> str:
    if preparation.layout is not None:
        return preparation.layout
    possible = [name for name in LAYOUTS if shape[name.index("c")] in (1, 3)]
    if len(possible) != 1:
        raise ValueError(
            f"embedder {file} takes images {shape}, whose channels are unclear; give "
            f'"layout": "nchw" or "nhwc" in {file.name}.json.'
        )
    return possible[0]


def _size_of(
    file: Path, sides: tuple[Any, Any], preparation: Preparation
) -> tuple[int, int]:
    """Height and width of the input, of the file or the preparation."""
    size = preparation.size
    if size is None:
        if not all(isinstance(side, int) for side in sides):
            raise ValueError(
                f"embedder {file} takes images of any size; give --embedder-size, or "
                f"size in {file.name}.json."
            )
        return sides
    height, width = size if isinstance(size, tuple) else (size, size)
    for side, own in zip((height, width), sides):
        if isinstance(own, int) and own != side:
            raise ValueError(
                f"size must be that of {file}, {sides[0]} x {sides[1]}, got {height} x "
                f"{width}."
            )
    return height, width


def _output_of(file: Path, session: Any, preparation: Preparation) -> str:
    """The output with the vectors: the named one, or the only one of rank 2."""
    outputs = session.get_outputs()
    names = [x.name for x in outputs]
    if preparation.output is not None:
        if preparation.output not in names:
            raise ValueError(
                f"output must be one of {', '.join(names)} of {file}, got "
                f"{preparation.output}."
            )
        return preparation.output
    flat = names if len(names) == 1 else [x.name for x in outputs if len(x.shape) == 2]
    if len(flat) != 1:
        raise ValueError(
            f"embedder {file} has the outputs {', '.join(names)}; name the output with "
            f'the vectors as "output" in {file.name}.json.'
        )
    return flat[0]


def _digest_of_weights(file: Path) -> str:
    """Digest of an ONNX file, and of the files beside it that hold its weights."""
    content = file.read_bytes()
    names = {
        content[match.end() : match.end() + match[1][0]]
        for match in LOCATION.finditer(content)
    }
    beside = [file.parent / name.decode(errors="replace") for name in sorted(names)]
    digests = [digest_of_file(path) for path in beside if path.is_file()]
    return digest_of([content, *digests])


def _all(values: Sequence[Any], types: Any, least: float) -> bool:
    return all(
        isinstance(x, types) and not isinstance(x, bool) and least <= x < np.inf
        for x in values
    )


RULES = {
    "size": "a number of pixels, or height and width",
    "mean": "1 or 3 finite numbers",
    "std": "1 or 3 numbers above 0",
    "layout": " or ".join(LAYOUTS),
    "fit": ", ".join(FITS),
    "output": "the name of an output",
}


def _require(name: str, value: Any, right: bool) -> None:
    if not right:
        raise ValueError(f"{name} must be {RULES[name]}, got {value!r}")
