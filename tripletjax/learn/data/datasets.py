"""Images with labels: sources, and held-out parts.

Images of any source are decoded once to one shape and cached as array_record files
through tensorflow-datasets, under a key of their content. The next start reads the
cached images, into memory if they fit.
"""

import collections
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tripletjax.learn.choices import CLASSES_FROM, KINDS, SPLITS
from tripletjax.learn.counts import counted
from tripletjax.learn.data.class_folders import find_classes
from tripletjax.learn.data.digits import TRAIN, digits
from tripletjax.learn.data.folder_listing import format_names, printable
from tripletjax.learn.data.image_array import ArrayImages, ImageArray
from tripletjax.learn.data.image_cache import (
    FORMAT,
    IN_MEMORY,
    DecodedImages,
    Decoding,
    cache_directory,
    decode_and_cache,
    files_key,
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
from tripletjax.learn.files import digest_of, digest_of_image

# Shares of every class that are held out for the test and for validation: less of
# photographs, since they are fewer per class.
HELD_OUT = {"characters": (TEST, VALIDATION), "photos": (0.1, 0.05)}


@dataclasses.dataclass(frozen=True)
class Images:
    """Images with labels.

    Attributes:
        images: uint8 ``[n, height, width, channels]``; a `StoredImages`, which reads
            images when it is indexed, if they do not fit in memory.
        labels: int32 ``[n]``.
    """

    images: ImageArray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def part(self, index: Any) -> "Images":
        return Images(self.images.part(index), self.labels[index])


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Images to train on, and held-out images.

    Attributes:
        name: of the dataset.
        train: the images to train on.
        validation: held-out images that choose the best parameters.
        test: held-out images for the evaluation.
        label_names: the name of each label.
        key: a digest of images, labels and parts.
        skipped: files and folders that are left out, each with the reason.
        skip_counts: number of images that are left out, by the type of reason.
        entry_counts: number of other entries that are left out, by their type.
        decoding: how the pictures were decoded.
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
    """Images of a source, before any are held out.

    Attributes:
        stored: the images that can be used.
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
    """Load a dataset, and decode its images at the first time.

    Args:
        name: ``"digits"``, the 1,797 handwritten digits that come with scikit-learn. Or
            a folder that has one folder per class, at any depth, of PNG, JPEG, BMP or
            WebP images. Or ``"tfds:NAME"`` or ``"tfds:NAME:SPLIT"``, a dataset of
            tensorflow-datasets with an image and a label.
        split: ``"images"`` holds out some images of every class. ``"classes"`` holds
            out all images of some classes, the test of an embedding on unseen classes.
            With digits, ``"images"`` holds out the second half, as their authors did.
        size: image size for the network, longer side in pixels. If None, that of the
            median image, but at most 32 for grey characters and 64 for photographs and
            colour. Photographs are cached at up to twice the size.
        kind: ``"photos"`` or ``"characters"``, which are any drawings. If None, decided
            by the share of smooth tones.
        classes_from: the folders that are classes, where folders are nested: ``"top"``,
            the folders in the data folder, or ``"leaf"``, the folders of images. If
            None, leaves, but not sub-folders by date or session, or beside images.
        data_dir: the folder of tensorflow-datasets; its default if None.
        in_memory: the largest size of images that are read into memory, in bytes. More
            stay on disk and are read when they are needed.
        progress: whether to show a progress bar while images are decoded.

    Returns:
        The `Dataset`; the same for the same data, whatever their order on disk.

    Raises:
        FileNotFoundError: if a dataset of tensorflow-datasets is not prepared.
        ValueError: if the dataset does not exist or has fewer than two classes.
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
        return _digits(split, size)
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
            f"data must be digits, an existing folder or tfds:NAME, got {name!r}."
        )
    source = _drop_contradictions(source)
    stored = source.stored
    images = Images(stored.images, source.labels[stored.kept])
    held_out = HELD_OUT[stored.decoding.kind]
    parts = held_out_images(images.labels, stored.digests, split, held_out)
    return _dataset(
        name,
        images,
        np.array(stored.digests),
        parts,
        source.label_names,
        stored.decoding,
        skipped=source.skipped,
        skip_counts=source.skip_counts,
        entry_counts=source.entry_counts,
    )


def _digits(split: str, size: int | None) -> Dataset:
    pixels, labels = digits()
    spec = ImageSpec.of([(8, 8)], False, size)
    fitted = [spec.fit(Image.fromarray(image[..., 0])) for image in pixels]
    images = ArrayImages.of(np.stack(fitted))
    digests = np.array([digest_of_image(image) for image in images])
    if split == "classes":
        parts = held_out_images(labels, digests, split)
    else:
        train, validation = share_out_images(
            labels[:TRAIN], digests[:TRAIN], [VALIDATION]
        )
        parts = train, validation, np.arange(TRAIN, len(images))
    names = [str(digit) for digit in range(10)]
    decoding = Decoding(kind_by="they are handwritten digits")
    return _dataset("digits", Images(images, labels), digests, parts, names, decoding)


def _dataset(
    name: str,
    images: Images,
    digests: np.ndarray,
    parts: Sequence[np.ndarray],
    label_names: Sequence[str],
    decoding: Decoding,
    **left_out: Any,
) -> Dataset:
    train, validation, test = (images.part(part) for part in parts)
    classes = len(np.unique(train.labels))
    if classes < 2:
        raise ValueError(
            f"{name} has {counted(classes, 'class')} to train on; at least 2 are "
            "needed."
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
    return Dataset(
        name, train, validation, test, names, key, decoding=decoding, **left_out
    )


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
    listing = find_classes(folder, classes_from)
    files, relative, folders = listing.files, listing.paths, listing.classes
    directory = cache_directory(data_dir, files_key(files, relative, size, kind))
    options |= {"source": str(folder), "size": size, "kind": kind}
    stored = decode_and_cache(files, open_image, directory, **options)
    notes = [*listing.notes, *listing.left_out, *stored.decoding.notes]
    names = sorted({folders[index] for index in stored.kept})
    if len(names) < 2:
        raise ValueError(
            f"{folder} has one folder of images, {names[0]}; it must have at least 2, "
            "one per class."
        )
    numbers = {name: label for label, name in enumerate(names)}
    labels = [numbers.get(name, -1) for name in folders]
    skipped = [f"{file.name}: no image" for file in listing.loose]
    skipped += listing.skipped
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
    stored = _with_notes(stored, tuple(notes))
    skipped += [f"{name}: nothing in this folder can be used" for name in empty]
    entries = {
        "files outside the folders of classes": len(listing.loose),
        "links, special files or unreadable folders": len(listing.skipped),
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


def _with_notes(stored: DecodedImages, notes: tuple[str, ...]) -> DecodedImages:
    """Replace the notes of decoded images."""
    decoding = dataclasses.replace(stored.decoding, notes=notes)
    return dataclasses.replace(stored, decoding=decoding)


def _drop_contradictions(source: _Source) -> _Source:
    """Leave out images that are in several classes."""
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
        counted(
            len(skipped),
            "image that is in several classes is left out",
            "images that are in several classes are left out",
        )
        + ", and named in config.json"
    )
    stored = dataclasses.replace(
        stored,
        images=stored.images.part(np.array(rows)),
        digests=[stored.digests[row] for row in rows],
        kept=[stored.kept[row] for row in rows],
    )
    return dataclasses.replace(
        source,
        stored=_with_notes(stored, (*stored.decoding.notes, note)),
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
    """Images of a dataset of tensorflow-datasets."""
    catalogue = Catalogue.open(name, data_dir)
    labelled = catalogue.indices
    fingerprint = FORMAT, size, kind, *catalogue.fingerprint
    directory = cache_directory(data_dir, digest_of([str(fingerprint)]))
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
