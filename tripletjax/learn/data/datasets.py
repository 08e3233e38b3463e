"""Images with labels: where they come from, and which are held out.

Whatever the source, images are decoded once to one shape and kept as array_record files
through tensorflow-datasets, under a key of their content. The next start reads them
back, into memory if they fit.
"""

import collections
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from tripletjax.learn.choices import CLASSES_FROM, KINDS, SPLITS
from tripletjax.learn.data.class_folders import find_classes
from tripletjax.learn.data.folder_listing import format_names, printable
from tripletjax.learn.data.image_array import ImageArray, part_of
from tripletjax.learn.data.image_cache import (
    FORMAT,
    IN_MEMORY,
    DecodedImages,
    Decoding,
    Digits,
    cache_directory,
    decode_and_cache,
    files_key,
    prepare,
)
from tripletjax.learn.data.image_files import open_image
from tripletjax.learn.data.image_shape import ImageSpec
from tripletjax.learn.data.sources import parse_source
from tripletjax.learn.data.splits import (
    TEST,
    VALIDATION,
    held_out_images,
    share_out_images,
)
from tripletjax.learn.data.tfds_catalogue import Catalogue
from tripletjax.learn.errors import one_line_errors
from tripletjax.learn.files import digest_of, digest_of_image

# What is held out of every class: of photographs less, since a network learns them
# from few.
HELD_OUT = {"characters": (TEST, VALIDATION), "photos": (0.1, 0.05)}


@dataclasses.dataclass(frozen=True)
class Images:
    """Images with labels.

    Attributes:
        images: uint8 ``[n, height, width, channels]``; a `StoredImages`, which is read
            when it is indexed, if they do not fit in memory.
        labels: int32 ``[n]``.
    """

    images: ImageArray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def part(self, index: Any) -> "Images":
        return Images(part_of(self.images, index), self.labels[index])


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
        skipped: files and folders that are left out, each with the reason.
        skip_counts: number of images that are left out, by the type of reason.
        entry_counts: number of other entries that are left out, by their type.
        decoding: what was decided of the pictures.
    """

    name: str
    train: Images
    validation: Images
    test: Images
    label_names: tuple[str, ...]
    key: str
    skipped: tuple[str, ...] = ()
    skip_counts: dict[str, int] = dataclasses.field(default_factory=dict)
    entry_counts: dict[str, int] = dataclasses.field(default_factory=dict)
    decoding: Decoding = dataclasses.field(default_factory=Decoding)


@dataclasses.dataclass(frozen=True)
class _Source:
    """Images as they were read, before any is held out.

    Attributes:
        stored: the images that could be read.
        labels: int32 ``[n]``, of all pictures.
        pictures: the names of all pictures.
        label_names: the name of each label.
        skipped: files and folders that are left out, each with the reason.
        skip_counts: number of images that are left out, by the type of reason.
        entry_counts: number of other entries that are left out, by their type.
    """

    stored: DecodedImages
    labels: np.ndarray
    pictures: Sequence[str]
    label_names: tuple[str, ...]
    skipped: tuple[str, ...]
    skip_counts: dict[str, int]
    entry_counts: dict[str, int] = dataclasses.field(default_factory=dict)


def load(
    name: str | Path,
    *,
    split: str = "images",
    size: int | None = None,
    kind: str | None = None,
    classes_from: str | None = None,
    data_dir: str | Path | None = None,
    in_memory: int = IN_MEMORY,
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
            never seen. Of the digits, images are held out as their authors did: all of
            the second half.
        size: the longer side in pixels that images are to be seen at. If not given,
            that of the median image, but at most 32 for grey characters and 64 for
            photographs and colour. Photographs are kept at up to twice the size.
        kind: what the images are: ``"photos"`` or ``"characters"``, any drawings. If
            not given, photographs are told by their smooth tones.
        classes_from: which folders are classes where they lie within others: ``"top"``,
            those in the data folder, or ``"leaf"``, those that hold images. If not
            given, leaves, but for sub-folders by date or session, or beside images.
        data_dir: where tensorflow-datasets keeps its files; its default if not given.
        in_memory: how many bytes of images are read into memory; more stay on disk,
            and are read when they are needed.
        progress: whether to show a progress bar while images are decoded.

    Returns:
        The `Dataset`; the same for the same data, whatever their order on disk.

    Raises:
        FileNotFoundError: if a dataset of tensorflow-datasets is not prepared.
        ValueError: if there is no such dataset, or it has fewer than two classes.
    """
    name, named = os.fspath(name), parse_source(name)
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}.")
    if size is not None and size < 1:
        raise ValueError(f"size must be positive, got {size}.")
    if kind not in (None, *KINDS):
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}.")
    if classes_from not in (None, *CLASSES_FROM):
        raise ValueError(
            f"classes_from must be one of {', '.join(CLASSES_FROM)}, got "
            f"{classes_from!r}."
        )
    if named.is_digits:
        return _digits(data_dir, split, size)
    options = {
        "size": size,
        "kind": kind,
        "data_dir": data_dir,
        "in_memory": in_memory,
        "progress": progress,
    }
    if named.in_tfds:
        source = _from_catalogue(name, **options)
    elif Path(name).is_dir():
        source = _from_folder(Path(name), classes_from=classes_from, **options)
    else:
        raise ValueError(
            f"there is no dataset {name!r}: it must be digits, an existing folder, or "
            "tfds:NAME."
        )
    source = _without_contradictions(source)
    stored = source.stored
    images = Images(stored.images, source.labels[stored.kept])
    held_out = HELD_OUT[stored.decoding.kind]
    parts = held_out_images(images.labels, stored.digests, split, held_out)
    dataset = _dataset(
        name,
        images,
        np.array(stored.digests),
        parts,
        source.label_names,
        stored.decoding,
    )
    return dataclasses.replace(
        dataset,
        skipped=source.skipped,
        skip_counts=source.skip_counts,
        entry_counts=source.entry_counts,
    )


def _digits(data_dir: str | Path | None, split: str, size: int | None) -> Dataset:
    directory = Path(data_dir or tfds.core.constants.DATA_DIR) / Digits.name
    with one_line_errors(directory, "read"):
        builder = Digits(data_dir=data_dir, file_format="array_record")
    prepare(builder)
    records = []
    with one_line_errors(Path(builder.data_path), "read"):
        for part in ("train", "test"):
            source = builder.as_data_source(part)
            some = source.__getitems__(range(len(source)))
            records += sorted(some, key=lambda record: record["index"])
    shape = ImageSpec.of([(8, 8)], False, size)
    images = Images(
        images=np.stack(
            [shape.fit(Image.fromarray(record["image"][..., 0])) for record in records]
        ),
        labels=np.array([record["label"] for record in records], np.int32),
    )
    digests = np.array([digest_of_image(image) for image in images.images])
    if split == "classes":
        parts = held_out_images(images.labels, digests, split)
    else:
        half = Digits.TRAIN
        labels = images.labels[:half]
        train, validation = share_out_images(labels, digests[:half], [VALIDATION])
        parts = train, validation, np.arange(half, len(images))
    names = builder.info.features["label"].names
    decoding = Decoding(kind_by="they are handwritten digits")
    return _dataset("digits", images, digests, parts, names, decoding)


def _dataset(
    name: str,
    images: Images,
    digests: np.ndarray,
    parts: Sequence[np.ndarray],
    label_names: Sequence[str],
    decoding: Decoding,
) -> Dataset:
    train, validation, test = (images.part(part) for part in parts)
    classes = len(np.unique(train.labels))
    if classes < 2:
        raise ValueError(
            f"{name} has {classes} class{'' if classes == 1 else 'es'} to train on; at "
            "least 2 are needed."
        )
    shape = images.images.shape[1:]
    key = digest_of(
        text
        for part in parts
        for text in (
            str((len(part), *shape)),
            " ".join(digests[part]),
            images.labels[part].tobytes(),
        )
    )
    names = tuple(label_names)
    return Dataset(name, train, validation, test, names, key, decoding=decoding)


def _from_folder(
    folder: Path,
    *,
    size: int | None,
    kind: str | None,
    classes_from: str | None,
    data_dir: str | Path | None,
    **options: Any,
) -> _Source:
    """Images in folders of one class each."""
    folder = folder.resolve()
    found = find_classes(folder, classes_from)
    files, relative, folders = found.files, found.paths, found.classes
    directory = cache_directory(data_dir, files_key(files, relative, size, kind))
    options |= {"source": str(folder), "size": size, "kind": kind}
    stored = decode_and_cache(files, open_image, directory, **options)
    notes = [*found.notes, *found.left_out, *stored.decoding.notes]
    names = sorted({folders[index] for index in stored.kept})
    if len(names) < 2:
        raise ValueError(
            f"{folder} has one folder of images, {names[0]}; it must have at least 2, "
            "one per class."
        )
    numbers = {name: label for label, name in enumerate(names)}
    labels = [numbers.get(name, -1) for name in folders]
    skipped = [f"{file.name}: no image" for file in found.loose]
    skipped += found.skipped
    skipped += [f"{relative[index]}: {why}" for index, why in stored.skipped.items()]
    empty = sorted(set(folders) - set(names))
    if empty:
        reasons = collections.Counter(
            why for index, why in stored.skipped.items() if folders[index] in empty
        )
        ((reason, _),) = reasons.most_common(1)
        notes.append(
            f"folders without an image that can be used: {format_names(empty)}; most "
            f"often, {reason}"
        )
    stored = _noted(stored, tuple(notes))
    skipped += [f"{name}: nothing in this folder can be used" for name in empty]
    entries = {
        "files outside the folders of classes": len(found.loose),
        "links, special files or unreadable folders": len(found.skipped),
        "folders without images": len(empty),
    }
    names, skipped, pictures = (
        tuple(map(printable, some)) for some in (names, skipped, relative)
    )
    return _Source(
        stored,
        np.array(labels, np.int32),
        pictures,
        names,
        skipped,
        stored.skip_counts,
        entries,
    )


def _noted(stored: DecodedImages, notes: tuple[str, ...]) -> DecodedImages:
    """The same with other notes."""
    decoding = dataclasses.replace(stored.decoding, notes=notes)
    return dataclasses.replace(stored, decoding=decoding)


def _without_contradictions(source: _Source) -> _Source:
    """The same without images that are in several classes."""
    stored, names = source.stored, source.label_names
    labels = source.labels[stored.kept]
    classes = {}
    for digest, label in zip(stored.digests, labels.tolist()):
        classes.setdefault(digest, set()).add(label)
    double = {digest for digest, several in classes.items() if len(several) > 1}
    if not double:
        return source
    skipped = [
        f"{source.pictures[index]}: the same image is in "
        + ", ".join(names[other] for other in sorted(classes[digest] - {label}))
        for index, digest, label in zip(stored.kept, stored.digests, labels.tolist())
        if digest in double
    ]
    rows = [row for row, digest in enumerate(stored.digests) if digest not in double]
    if not rows:
        raise ValueError(f"every image is in several classes: {skipped[0]}.")
    note = (
        f"{len(skipped):,} images that are in several classes are left out, and named "
        "in config.json"
    )
    stored = dataclasses.replace(
        stored,
        images=part_of(stored.images, np.array(rows)),
        digests=[stored.digests[row] for row in rows],
        kept=[stored.kept[row] for row in rows],
    )
    return dataclasses.replace(
        source,
        stored=_noted(stored, (*stored.decoding.notes, note)),
        skipped=(*source.skipped, *skipped),
        skip_counts=source.skip_counts | {"in several classes": len(skipped)},
    )


def _from_catalogue(
    name: str,
    *,
    size: int | None,
    kind: str | None,
    data_dir: str | Path | None,
    **options: Any,
) -> _Source:
    """The same of a dataset of tensorflow-datasets."""
    catalogue = Catalogue.open(name, data_dir)
    labelled = catalogue.indices
    made_of = FORMAT, size, kind, *catalogue.made_of
    directory = cache_directory(data_dir, digest_of([str(made_of)]))
    options |= {"source": f"{name} in {data_dir}", "size": size, "kind": kind}
    stored = decode_and_cache(labelled, catalogue.picture, directory, **options)
    pictures = [f"record {index}" for index in labelled]
    skipped = [f"{pictures[index]}: {why}" for index, why in stored.skipped.items()]
    counts = stored.skip_counts | {"without a label": catalogue.unlabelled}
    if catalogue.unlabelled:
        skipped.append(f"{catalogue.unlabelled} records without a label")
    return _Source(
        stored, catalogue.labels, pictures, catalogue.names, tuple(skipped), counts
    )
