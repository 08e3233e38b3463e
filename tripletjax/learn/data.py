"""Images with labels: where they come from, and which of them are held out.

Whatever the source, images are decoded once to one size and kept as array_record files
through tensorflow-datasets, which needs no TensorFlow for that, in its usual place
(``~/tensorflow_datasets``, or ``TFDS_DATA_DIR``). The next start reads them back.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image, ImageOps
from tqdm import tqdm

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
# The longer side that images are reduced to: lines need fewer pixels than photographs.
GREY_SIZE, COLOUR_SIZE = 32, 64
# So many images are looked at for colour.
LOOK = 256
# Of how images are decoded; another number makes folders be decoded again.
FORMAT = 1
# Held out of every class, or of the classes.
TEST, VALIDATION = 0.15, 0.1
SPLITS = ("images", "classes")


@dataclasses.dataclass(frozen=True)
class Images:
    """Images with labels.

    Attributes:
        images: uint8 ``[n, height, width, channels]``.
        labels: int32 ``[n]``.
    """

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Any) -> "Images":
        return Images(self.images[index], self.labels[index])


@dataclasses.dataclass(frozen=True)
class Dataset:
    """What an embedding is trained on, and images that it never sees.

    Attributes:
        name: how the dataset is called.
        train: the images to train on.
        validation: the images to choose between parameters with while training.
        test: the images to evaluate on.
        label_names: what each label stands for.
        key: a digest of all of it.
        skipped: files that could not be read, and why.
    """

    name: str
    train: Images
    validation: Images
    test: Images
    label_names: tuple[str, ...]
    key: str
    skipped: tuple[str, ...] = ()


def load(
    name: str,
    *,
    split: str = "images",
    size: int | None = None,
    data_dir: str | Path | None = None,
    progress: bool = False,
) -> Dataset:
    """Loads a dataset, preparing it first where needed.

    Args:
        name: ``"digits"``, the 1,797 handwritten digits that come with scikit-learn; a
            folder that has one folder per class, at any depth, of PNG, JPEG, BMP or
            WebP images; or ``"tfds:NAME"`` or ``"tfds:NAME:SPLIT"``, a dataset of
            tensorflow-datasets with an image and a label.
        split: ``"images"`` holds out some images of every class; ``"classes"`` holds
            out all images of some classes, the honest test of an embedding of classes
            never seen. The held-out half of the digits is always the same.
        size: the longer side of an image in pixels. If not given, that of the median
            image, but at most 32 for grey and 64 for colour images.
        data_dir: where tensorflow-datasets keeps its files; its default if not given.
        progress: whether to show a progress bar while images are decoded.

    Returns:
        The `Dataset`; the same for the same data, whatever their order on disk.

    Raises:
        FileNotFoundError: if a dataset of tensorflow-datasets is not prepared.
        ValueError: if there is no such dataset, or it has fewer than two classes.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}.")
    if size is not None and size < 1:
        raise ValueError(f"size must be positive, got {size}.")
    if name == "digits":
        builder = Digits(data_dir=data_dir, file_format="array_record")
        _prepare(builder)
        train, validation = _parts(_read(builder, "train"), "images", [VALIDATION])
        names = builder.info.features["label"].names
        return _dataset(name, train, validation, _read(builder, "test"), names)
    skipped = ()
    if name.startswith("tfds:"):
        images, names = _from_catalogue(name, size, data_dir, progress)
    elif Path(name).is_dir():
        images, names, skipped = _from_folder(Path(name), size, data_dir, progress)
    else:
        raise ValueError(
            f"there is no dataset {name!r}: it must be digits, an existing folder, or "
            "tfds:NAME."
        )
    train, test, validation = _parts(images, split, [TEST, VALIDATION])
    return _dataset(name, train, validation, test, names, skipped)


def _dataset(
    name: str,
    train: Images,
    validation: Images,
    test: Images,
    label_names: Sequence[str],
    skipped: Sequence[str] = (),
) -> Dataset:
    kinds = len(np.unique(train.labels))
    if kinds < 2:
        raise ValueError(
            f"{name} has {kinds} class{'' if kinds == 1 else 'es'} to train on; at "
            "least 2 are needed."
        )
    digest = hashlib.blake2b(digest_size=16)
    for part in (train, validation, test):
        digest.update(str(part.images.shape).encode())
        digest.update(np.ascontiguousarray(part.images))
        digest.update(np.ascontiguousarray(part.labels))
    key = digest.hexdigest()
    return Dataset(
        name, train, validation, test, tuple(label_names), key, tuple(skipped)
    )


def _parts(images: Images, split: str, shares: Sequence[float]) -> list[Images]:
    """What is left to train on, then the shares held out.

    Which ones is decided by the digests of images alone, neither by names nor by the
    order of files.
    """
    digests = [hashlib.blake2b(image).digest() for image in images.images]
    members = [np.flatnonzero(images.labels == c) for c in np.unique(images.labels)]
    members = [sorted(places, key=digests.__getitem__) for places in members]
    if split == "classes":
        # Units are whole classes, and of one class alone nothing can be told.
        ordered = sorted(members, key=lambda places: digests[places[0]])
        groups, least = [ordered], 2
    else:
        groups, least = [[[place] for place in places] for places in members], 0
    part = np.zeros(len(images), int)
    for group in groups:
        start = 0
        for number, share in enumerate(shares, start=1):
            stop = start + max(least, int(share * len(group) + 0.5))
            for unit in group[start:stop]:
                part[unit] = number
            start = stop
        if len(group) - start < least:
            raise ValueError(
                f"split is classes, but of {len(group)} classes {start} are held out, "
                "which leaves fewer than 2 to train on."
            )
    return [images[part == number] for number in range(len(shares) + 1)]


def _from_folder(
    folder: Path, size: int | None, data_dir: str | Path | None, progress: bool
) -> tuple[Images, tuple[str, ...], tuple[str, ...]]:
    """Images, the names of their classes, and what could not be read."""
    folder = folder.resolve()
    files = sorted(image_files(folder))
    if loose := [file.name for file in files if file.parent == folder]:
        raise ValueError(
            f"{folder} must hold one folder per class, but {len(loose)} images lie in "
            f"it directly, such as {loose[0]}."
        )
    if not files:
        raise ValueError(f"{folder} has no images ({', '.join(SUFFIXES)}).")
    names = tuple(sorted({str(file.parent.relative_to(folder)) for file in files}))
    if len(names) < 2:
        raise ValueError(
            f"{folder} has one folder of images, {names[0]}; it must have at least 2, "
            "one per class."
        )
    digest = hashlib.blake2b(str((FORMAT, size)).encode(), digest_size=16)
    with ThreadPoolExecutor() as pool:
        for file, content in zip(files, pool.map(_digest, files)):
            digest.update(str(file.relative_to(folder)).encode() + b"\0" + content)
    data_dir = Path(data_dir or tfds.core.constants.DATA_DIR)
    builder = Folder(
        folder=folder,
        files=files,
        names=names,
        size=size,
        progress=progress,
        data_dir=data_dir / "tripletjax_folders" / digest.hexdigest(),
        file_format="array_record",
    )
    _prepare(builder)
    summary = json.loads(builder.info.metadata["summary"])
    return _read(builder, "all_images"), names, tuple(summary["skipped"])


def image_files(folder: Path) -> Iterator[Path]:
    """The images in a folder and in those within, in no particular order."""
    seen = set()
    for directory, folders, files in os.walk(folder, followlinks=True):
        # A link may lead back to where it is.
        real = os.path.realpath(directory)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in files:
            if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                yield Path(directory) / name


def _from_catalogue(
    name: str, size: int | None, data_dir: str | Path | None, progress: bool
) -> tuple[Images, tuple[str, ...]]:
    """Images of a dataset of tensorflow-datasets, and the names of its classes."""
    _, dataset, *split = name.split(":")
    if not dataset or len(split) > 1:
        raise ValueError(f"data must be tfds:NAME or tfds:NAME:SPLIT, got {name!r}.")
    # Whether it is there is known without the network, for which it would wait minutes.
    try:
        builder = tfds.builder(dataset, data_dir=data_dir, file_format="array_record")
    except tfds.core.DatasetNotFoundError as error:
        raise ValueError(f"tensorflow-datasets has no dataset {dataset!r}.") from error
    if not Path(builder.data_dir).exists():
        raise FileNotFoundError(
            f"the dataset {dataset!r} is not prepared in {builder.data_dir}. With the "
            "network at hand and TensorFlow installed (pip install tensorflow), run\n"
            f'    python -c "import tensorflow_datasets as tfds; tfds.builder('
            f"'{dataset}', file_format='array_record').download_and_prepare()\""
        )
    features = builder.info.features

    def named(name: str, kind: type) -> str | None:
        kinds = [key for key, feature in features.items() if isinstance(feature, kind)]
        return name if name in features else kinds[0] if kinds else None

    image = named("image", tfds.features.Image)
    label = named("label", tfds.features.ClassLabel)
    if (
        image is None
        or label is None
        or not isinstance(features[label], tfds.features.ClassLabel)
    ):
        raise ValueError(
            f"the dataset {dataset!r} must have an image and a label, it has: "
            f"{', '.join(features)}."
        )
    source = builder.as_data_source("+".join(split) or "+".join(builder.info.splits))
    records = [source[i] for i in tqdm(range(len(source)), disable=not progress)]
    arrays = [np.asarray(record[image]) for record in records]
    pictures = [Image.fromarray(x[..., 0] if x.shape[-1] == 1 else x) for x in arrays]
    colour = any(is_colour(one) for one in pictures[:: -(-len(pictures) // LOOK)])
    shape = Shape.of([picture.size for picture in pictures], colour, size)
    return (
        Images(
            images=np.stack([shape.fit(picture) for picture in pictures]),
            labels=np.array([int(record[label]) for record in records], np.int32),
        ),
        tuple(features[label].names),
    )


def _digest(file: Path) -> bytes:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "blake2b").digest()


@dataclasses.dataclass(frozen=True)
class Shape:
    """What every image of a dataset, or of a run, is made into.

    Attributes:
        height: in pixels.
        width: in pixels.
        channels: 1 for grey, 3 for colour.
    """

    height: int
    width: int
    channels: int

    @classmethod
    def of(
        cls, sizes: Sequence[tuple[int, int]], colour: bool, size: int | None
    ) -> "Shape":
        """The shape of the median image, its longer side at most `size`."""
        width, height = np.median(np.array(sizes), axis=0)
        longest = max(width, height)
        limit = COLOUR_SIZE if colour else GREY_SIZE
        scale = (min(limit, longest) if size is None else size) / longest
        height, width = (max(1, round(scale * side)) for side in (height, width))
        return cls(height, width, 3 if colour else 1)

    def fit(self, image: Image.Image) -> np.ndarray:
        """An image as uint8 ``[height, width, channels]``, never distorted.

        What is left at two sides has the mean colour of the image's border.
        """
        image = flat(image).convert("RGB" if self.channels == 3 else "L")
        scale = min(self.width / image.width, self.height / image.height)
        width, height = (max(1, round(scale * side)) for side in image.size)
        if (width, height) != image.size:
            image = image.resize((width, height), Image.Resampling.LANCZOS)
        pixels = np.asarray(image).reshape(height, width, self.channels)
        if (height, width) == (self.height, self.width):
            return pixels
        border = pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]
        mean = np.concatenate(border).mean(axis=0).round().astype(np.uint8)
        whole = np.broadcast_to(mean, (self.height, self.width, self.channels)).copy()
        top, left = (self.height - height) // 2, (self.width - width) // 2
        whole[top : top + height, left : left + width] = pixels
        return whole


def flat(image: Image.Image) -> Image.Image:
    """Without what Pillow would lose: 16 bits are scaled, transparency is white."""
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, np.float64)
        top = 65535 if values.max() > 255 else 255
        return Image.fromarray(np.uint8(np.clip(values * (255 / top), 0, 255)))
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image


def is_colour(image: Image.Image) -> bool:
    """Whether it shows any colour, whatever its format could show."""
    if len(flat(image).getbands()) == 1:
        return False
    pixels = np.asarray(flat(image).convert("RGB"), np.int16)
    # Lossy formats leave a little where there is none.
    return bool(np.ptp(pixels, axis=-1).mean() > 2)


def open_image(file: str | Path) -> Image.Image:
    """An image file, upright and decoded.

    Raises:
        OSError: if it is no image, or broken.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file) as image:
                return ImageOps.exif_transpose(image)
    except OSError:
        raise
    except Exception as error:
        # Broken files make Pillow's decoders raise whatever they come across.
        raise OSError(f"{type(error).__name__}: {error}") from error


class Folder(tfds.core.GeneratorBasedBuilder):
    """Images of a folder, decoded to one shape."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(
        self,
        *,
        folder: Path,
        files: Sequence[Path],
        names: Sequence[str],
        size: int | None,
        progress: bool,
        **options: Any,
    ):
        self.folder, self.files, self.names = folder, files, names
        self.size, self.progress = size, progress
        super().__init__(**options)

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(
            {
                "image": tfds.features.Tensor(
                    shape=(None, None, None), dtype=np.uint8, encoding="zlib"
                ),
                "label": np.int64,
                "place": np.int64,
            }
        )
        return tfds.core.DatasetInfo(
            builder=self,
            description="Images of a folder.",
            features=features,
            metadata=tfds.core.MetadataDict(),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict:
        return {"all_images": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict]]:
        skipped = {}

        def tried(function: Any, files: Iterable[Path]) -> Iterator[Any]:
            def one(file: Path) -> Any:
                try:
                    return function(file)
                except OSError as error:
                    return error

            with ThreadPoolExecutor() as pool:
                for file, result in zip(files, pool.map(one, files)):
                    if isinstance(result, OSError):
                        skipped[file] = str(result)
                    else:
                        yield file, result

        def look(file: Path) -> tuple[int, int]:
            with Image.open(file) as image:
                return image.size

        sizes = [size for _, size in tried(look, self.files)]
        files = [file for file in self.files if file not in skipped]
        some = files[:: -(-len(files) // LOOK)] if files else []
        colour = [is_colour(image) for _, image in tried(open_image, some)]
        if not colour:
            raise ValueError(f"none of {len(self.files)} images could be read.")
        files = [file for file in files if file not in skipped]
        shape = Shape.of(sizes, any(colour), self.size)
        labels = {name: label for label, name in enumerate(self.names)}
        decoded = tried(lambda file: shape.fit(open_image(file)), files)
        bar = tqdm(
            decoded,
            desc="decoding images",
            total=len(files),
            unit="image",
            disable=not self.progress,
        )
        for place, (file, image) in enumerate(bar):
            yield (
                place,
                {
                    "image": image,
                    "label": labels[str(file.parent.relative_to(self.folder))],
                    "place": place,
                },
            )
        lines = [
            f"{file.relative_to(self.folder)}: {why}" for file, why in skipped.items()
        ]
        self.info.metadata["summary"] = json.dumps({"skipped": sorted(lines)})


class Digits(tfds.core.GeneratorBasedBuilder):
    """Handwritten digits of 13 writers, 8 x 8 pixels, in the order of the file.

    The first half trains and the second half tests. Writers follow one another in the
    file, so that a random split would show the test writers while training.
    """

    VERSION = tfds.core.Version("1.0.0")
    TRAIN = 898

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(
            {
                "image": tfds.features.Tensor(shape=(8, 8, 1), dtype=np.uint8),
                "label": tfds.features.ClassLabel(num_classes=10),
                # Records are stored in no particular order.
                "place": np.int64,
            }
        )
        return tfds.core.DatasetInfo(
            builder=self,
            description="The handwritten digits that come with scikit-learn.",
            citation=(
                "Alpaydin, Kaynak. Optical Recognition of Handwritten Digits. "
                "UCI Machine Learning Repository, 1998. doi:10.24432/C50P49"
            ),
            features=features,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict:
        from sklearn.datasets import load_digits

        digits = load_digits()
        # 17 levels, 0 to 16, spread over 0 to 240: exactly proportional.
        images = (digits.images * 15).astype(np.uint8)[..., None]
        half = slice(None, self.TRAIN), slice(self.TRAIN, None)
        return {
            split: self._generate_examples(images[part], digits.target[part])
            for split, part in zip(("train", "test"), half)
        }

    def _generate_examples(
        self, images: np.ndarray, labels: np.ndarray
    ) -> Iterator[tuple[int, dict]]:
        for place, (image, label) in enumerate(zip(images, labels)):
            yield place, {"image": image, "label": int(label), "place": place}


def _read(builder: tfds.core.DatasetBuilder, split: str) -> Images:
    source = builder.as_data_source(split)
    records = sorted(source.__getitems__(range(len(source))), key=lambda r: r["place"])
    return Images(
        images=np.stack([record["image"] for record in records]),
        labels=np.array([record["label"] for record in records], np.int32),
    )


def _prepare(builder: tfds.core.DatasetBuilder) -> None:
    tfds.disable_progress_bar()
    # It announces a download, on standard output, also where there is none.
    with contextlib.redirect_stdout(io.StringIO()):
        builder.download_and_prepare()
