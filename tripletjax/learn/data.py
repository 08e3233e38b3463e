"""Images with labels or in triplets: where they come from, and which are held out.

Whatever the source, images are decoded once to one shape and kept as array_record files
through tensorflow-datasets, under a key of their content. The next start reads them
back, into memory if they fit.
"""

import csv
import dataclasses
import hashlib
import itertools
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from tripletjax.learn.config import CLASSES_FROM, SPLITS
from tripletjax.learn.image_analysis import KINDS
from tripletjax.learn.image_cache import (
    DecodedImages,
    Digits,
    StoredImages,
    decode_and_cache,
    digest_of,
    prepare,
)
from tripletjax.learn.image_io import ImageSpec, find_files, is_image, open_image

# Of how images are decoded; another number makes them be decoded again.
FORMAT = 5
# Held out of every class, or of the classes, or of the anchors of triplets, for the
# test and for validation. Of photographs less, since a network learns them from few.
TEST, VALIDATION = 0.15, 0.1
HELD_OUT = {"characters": (TEST, VALIDATION), "photos": (0.1, 0.05)}
# Sub-folders of these names hold images of one class by date or session.
BY_DATE = re.compile(
    r"(19|20)\d\d([-_. ]?\d\d?){0,2}|(session|set|seq|sequence|day|month|visit|shoot|"
    r"batch|video|clip|cam|camera|scan|trip)[-_. ]?\d*",
    re.IGNORECASE,
)
# Folders that share out the same classes.
PARTS = {"train", "training", "val", "valid", "validation", "test", "testing"}
# Images of more bytes than this stay on disk.
IN_MEMORY = 2**31

# uint8 ``[n, height, width, channels]``: in memory, or on disk if they do not fit.
ImageArray = np.ndarray | StoredImages


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
        stored = isinstance(self.images, StoredImages)
        images = self.images.part(index) if stored else self.images[index]
        return Images(images, self.labels[index])


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
        kind: what the images are, photos or characters.
        kind_by: how that was decided.
        white: the value that is white in images of more than 8 bits.
        background: what shows through transparency.
        notes: what else was decided or found.
    """

    name: str
    train: Images
    validation: Images
    test: Images
    label_names: tuple[str, ...]
    key: str
    skipped: tuple[str, ...] = ()
    kind: str = "characters"
    kind_by: str = "they are handwritten digits"
    white: float = 65535
    background: str = "white"
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Triplets:
    """Triplets of images that somebody has chosen.

    Attributes:
        name: how they are called.
        images: uint8 ``[n, height, width, channels]``, or a `StoredImages`.
        train: which images are anchor, positive and negative, int32 ``[t, 3]``.
        validation: the same, held out to choose between parameters with.
        test: the same, held out to evaluate on.
        key: a digest of all of it.
        skipped: files that could not be read, and why.
        left_out: how many triplets have such a file.
        kind: what the images are, photos or characters.
        kind_by: how that was decided.
        white: the value that is white in images of more than 8 bits.
        background: what shows through transparency.
        notes: what else was decided or found.
    """

    name: str
    images: ImageArray
    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    key: str
    skipped: tuple[str, ...] = ()
    left_out: int = 0
    kind: str = "characters"
    kind_by: str = ""
    white: float = 65535
    background: str = "white"
    notes: tuple[str, ...] = ()


def load(
    name: str,
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
    if name == "digits":
        return _digits(data_dir, split, size)
    options = {
        "size": size,
        "kind": kind,
        "data_dir": data_dir,
        "in_memory": in_memory,
        "progress": progress,
    }
    if name.startswith("tfds:"):
        stored, labels, names, skipped = _from_catalogue(name, **options)
    elif Path(name).is_dir():
        stored, labels, names, skipped = _from_folder(
            Path(name), classes_from=classes_from, **options
        )
    else:
        raise ValueError(
            f"there is no dataset {name!r}: it must be digits, an existing folder, or "
            "tfds:NAME."
        )
    images = Images(stored.images, labels[stored.kept])
    images, stored, names, skipped = _checked(images, stored, names, skipped)
    held_out = HELD_OUT[stored.kind]
    places = _held_out_images(images.labels, stored.digests, split, held_out)
    digests = np.array(stored.digests)
    dataset = _dataset(name, images, digests, places, names, skipped)
    return dataclasses.replace(
        dataset,
        kind=stored.kind,
        kind_by=stored.kind_by,
        white=stored.white,
        background=stored.background,
        notes=stored.notes,
    )


def load_triplets(
    file: str | Path,
    *,
    size: int | None = None,
    kind: str | None = None,
    data_dir: str | Path | None = None,
    in_memory: int = IN_MEMORY,
    progress: bool = False,
) -> Triplets:
    """Loads triplets of image files.

    Some anchors are held out with all their triplets, for validation and for the test;
    the images themselves may be positives or negatives of others.

    Args:
        file: a CSV file of UTF-8 with three columns, the paths of an anchor, a positive
            and a negative; relative ones are relative to the file. With a first line
            that names them ``anchor``, ``positive`` and ``negative`` they may come in
            any order, and other columns are not looked at.
        size: as in `load`, and the arguments that follow.
        kind: see there.
        data_dir: see there.
        in_memory: see there.
        progress: see there.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if a line is not a triplet, or no triplet is left to train on.
    """
    file = Path(file).resolve()
    rows = _triplet_rows(file)
    names = sorted({name for row in rows for name in row})
    files = [file.parent / name for name in names]
    stored = decode_and_cache(
        files,
        open_image,
        _directory(data_dir, _files_key(files, names, size, kind)),
        source=str(file),
        size=size,
        kind=kind,
        in_memory=in_memory,
        progress=progress,
    )
    place = {names[kept]: row for row, kept in enumerate(stored.kept)}
    whole = [row for row in rows if all(name in place for name in row)]
    if not whole:
        raise ValueError(f"{file} has no triplet of which all images can be read.")
    triplets = np.array([[place[name] for name in row] for row in whole], np.int32)
    anchors = np.unique(triplets[:, 0]).tolist()
    anchors = [[a] for a in sorted(anchors, key=lambda a: (stored.digests[a], a))]
    parts = _shared_out(anchors, _counts(len(anchors), [TEST, VALIDATION]))
    train, test, validation = (
        triplets[np.isin(triplets[:, 0], np.array(part, int))] for part in parts
    )
    digest = hashlib.blake2b(" ".join(stored.digests).encode(), digest_size=16)
    digest.update(f"{stored.images.shape}".encode())
    digest.update(triplets)
    skipped = [f"{names[place]}: {why}" for place, why in stored.skipped.items()]
    return Triplets(
        str(file),
        stored.images,
        train,
        validation,
        test,
        digest.hexdigest(),
        tuple(skipped),
        len(rows) - len(whole),
        stored.kind,
        stored.kind_by,
        stored.white,
        stored.background,
        stored.notes,
    )


def _triplet_rows(file: Path) -> list[tuple[str, str, str]]:
    roles = ("anchor", "positive", "negative")
    rows, columns = [], None
    with file.open(newline="", encoding="utf-8-sig") as opened:
        reader = csv.reader(opened, skipinitialspace=True)
        for row in reader:
            if not any(row):
                continue
            if columns is None:
                titles = [title.strip().lower() for title in row]
                if all(titles.count(role) == 1 for role in roles):
                    columns = [titles.index(role) for role in roles]
                    width = len(row)
                    continue
                if not any(Path(title).suffix for title in titles):
                    raise ValueError(
                        f"{file}, line {reader.line_num}: must be three paths of "
                        "images, or the names of columns, among them anchor, positive "
                        f"and negative, got {', '.join(row)}."
                    )
                columns, width = [0, 1, 2], 3
            if len(row) != width:
                raise ValueError(
                    f"{file}, line {reader.line_num}: must have {width} columns, has "
                    f"{len(row)}."
                )
            names = tuple(row[column].strip() for column in columns)
            if len(set(names)) < 3 or not all(names):
                raise ValueError(
                    f"{file}, line {reader.line_num}: anchor, positive and negative "
                    f"must be three different images, got {', '.join(names)}."
                )
            rows.append(names)
    if not rows:
        raise ValueError(
            f"{file} has no triplets: it must have three columns of paths."
        )
    return rows


def _digits(data_dir: str | Path | None, split: str, size: int | None) -> Dataset:
    builder = Digits(data_dir=data_dir, file_format="array_record")
    prepare(builder)
    records = []
    for part in ("train", "test"):
        source = builder.as_data_source(part)
        some = source.__getitems__(range(len(source)))
        records += sorted(some, key=lambda record: record["place"])
    shape = ImageSpec.of([(8, 8)], False, size)
    images = Images(
        images=np.stack(
            [shape.fit(Image.fromarray(record["image"][..., 0])) for record in records]
        ),
        labels=np.array([record["label"] for record in records], np.int32),
    )
    digests = np.array([digest_of(image) for image in images.images])
    if split == "classes":
        places = _held_out_images(images.labels, digests, split)
    else:
        half = Digits.TRAIN
        labels = images.labels[:half]
        train, validation = _shared_out_images(labels, digests[:half], [VALIDATION])
        places = train, validation, np.arange(half, len(images))
    names = builder.info.features["label"].names
    return _dataset("digits", images, digests, places, names)


def _dataset(
    name: str,
    images: Images,
    digests: np.ndarray,
    places: Sequence[np.ndarray],
    label_names: Sequence[str],
    skipped: Sequence[str] = (),
) -> Dataset:
    train, validation, test = (images.part(part) for part in places)
    kinds = len(np.unique(train.labels))
    if kinds < 2:
        raise ValueError(
            f"{name} has {kinds} class{'' if kinds == 1 else 'es'} to train on; at "
            "least 2 are needed."
        )
    digest = hashlib.blake2b(digest_size=16)
    for part in places:
        digest.update(str((len(part), *images.images.shape[1:])).encode())
        digest.update(" ".join(digests[part]).encode())
        digest.update(images.labels[part])
    key = digest.hexdigest()
    return Dataset(
        name, train, validation, test, tuple(label_names), key, tuple(skipped)
    )


def _held_out_images(
    labels: np.ndarray,
    digests: Sequence[str],
    split: str,
    shares: tuple[float, float] = (TEST, VALIDATION),
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Places of images to train on, for validation and for the test."""
    if split == "images":
        train, test, validation = _shared_out_images(labels, digests, shares)
        return train, validation, test
    # Units are whole classes, and of one class alone nothing can be told.
    members = _members(labels, digests)
    members.sort(key=lambda places: digests[places[0]])
    parts = _shared_out(members, _counts(len(members), shares, least=2))
    train, test, validation = (np.sort(np.array(part, int)) for part in parts)
    if len(np.unique(labels[train])) < 2:
        raise ValueError(
            f"split is classes, but of {len(members)} classes "
            f"{len(np.unique(labels[np.concatenate([test, validation])]))} are held "
            "out, which leaves fewer than 2 to train on."
        )
    return train, validation, test


def _members(labels: np.ndarray, digests: Sequence[str]) -> list[list[int]]:
    """The images of each class, in an order that neither names nor files decide."""
    members = [np.flatnonzero(labels == c).tolist() for c in np.unique(labels)]
    return [sorted(places, key=lambda place: digests[place]) for places in members]


def _shared_out_images(
    labels: np.ndarray, digests: Sequence[str], shares: Sequence[float]
) -> list[np.ndarray]:
    """Places that are left, then the shares of every class.

    Copies of an image stay together, lest what is held out be trained on. Where a share
    is less than half an image, so many of the classes give one; those of two keep both.
    """
    by_class = []
    for places in _members(labels, digests):
        copies = itertools.groupby(places, key=lambda place: digests[place])
        units = [list(same) for _, same in copies]
        counts = _counts(len(units), shares)
        # Their first digits are in order; the last ones are as good as random.
        luck = int(digests[places[0]][-8:], 16) / 16**8
        for part, share in enumerate(shares):
            if counts[part] == 0 and len(units) > 2:
                counts[part] = int(0 <= luck < share * len(units))
                luck -= share * len(units)
        by_class.append(_shared_out(units, counts))
    return [np.sort(np.concatenate(parts).astype(int)) for parts in zip(*by_class)]


def _counts(n: int, shares: Sequence[float], *, least: int = 0) -> list[int]:
    """The shares of so many, each at least so many."""
    return [max(least, int(share * n + 0.5)) for share in shares]


def _shared_out(units: Sequence[list[int]], counts: Sequence[int]) -> list[list[int]]:
    """What is left of some units, then so many of them, and so many more."""
    parts, start = [], 0
    for count in counts:
        parts.append(units[start : start + count])
        start += count
    parts.insert(0, units[start:])
    return [[place for unit in part for place in unit] for part in parts]


@dataclasses.dataclass(frozen=True)
class ClassFolders:
    """Files in folders of one class each.

    Attributes:
        files: in the order of their paths.
        paths: the same, relative to the data folder.
        classes: the name of each file's class.
        loose: files that lie in the data folder itself, and belong to no class.
        notes: what was decided.
    """

    files: list[Path]
    paths: list[str]
    classes: list[str]
    loose: list[Path]
    notes: tuple[str, ...]


def find_classes(folder: Path, classes_from: str | None = None) -> ClassFolders:
    """The files in a folder of classes, whatever they hold.

    Args:
        folder: the data folder.
        classes_from: as in `load`.

    Raises:
        ValueError: if there are none in folders, or images in none.
    """
    folder = folder.resolve()
    found = find_files(folder)
    loose = [file for file in found.files if file.parent == folder]
    if images := [file.name for file in loose if is_image(file)]:
        raise ValueError(
            f"{folder} must hold one folder per class, but {len(images)} images lie in "
            f"it directly, such as {images[0]}."
        )
    files = [file for file in found.files if file.parent != folder]
    if not files:
        raise ValueError(f"{folder} has no images in folders.")
    relative = [str(file.relative_to(folder)) for file in files]
    folders = [os.path.dirname(name) for name in relative]
    parts = sorted({name.partition(os.sep)[0] for name in folders})
    within = [name.partition(os.sep)[2] for name in sorted(set(folders))]
    shared = all(within) and len(set(within)) < len(within)
    if shared and all(part.lower() in PARTS for part in parts):
        raise ValueError(
            f"{folder} holds {' and '.join(parts)}, whose folders of the same name "
            "would be different classes. Give one of them, or merge them."
        )
    notes = []
    if any(within):
        level, why = _level(folders)
        if classes_from is not None:
            level, why = classes_from, "it was asked for"
        if level == "top":
            folders = [name.partition(os.sep)[0] for name in folders]
        notes.append(
            f"{'folders in the data folder' if level == 'top' else 'folders of images'}"
            f" are classes (classes from {level}): {why}"
        )
    if found.runs:
        runs = ", ".join(str(run.relative_to(folder)) for run in found.runs)
        notes.append(f"directories of training runs are left out: {printable(runs)}")
    return ClassFolders(files, relative, folders, loose, tuple(notes))


def _from_folder(
    folder: Path,
    *,
    size: int | None,
    kind: str | None,
    classes_from: str | None,
    data_dir: str | Path | None,
    **options: Any,
) -> tuple[DecodedImages, np.ndarray, tuple[str, ...], tuple[str, ...]]:
    """Images, labels, the names of classes, and what could not be read."""
    folder = folder.resolve()
    found = find_classes(folder, classes_from)
    files, relative, folders = found.files, found.paths, found.classes
    directory = _directory(data_dir, _files_key(files, relative, size, kind))
    options |= {"source": str(folder), "size": size, "kind": kind}
    stored = decode_and_cache(files, open_image, directory, **options)
    stored = dataclasses.replace(stored, notes=(*found.notes, *stored.notes))
    names = sorted({folders[place] for place in stored.kept})
    if len(names) < 2:
        raise ValueError(
            f"{folder} has one folder of images, {names[0]}; it must have at least 2, "
            "one per class."
        )
    numbers = {name: label for label, name in enumerate(names)}
    labels = [numbers.get(name, -1) for name in folders]
    skipped = [f"{file.name}: no image" for file in found.loose]
    skipped += [f"{relative[place]}: {why}" for place, why in stored.skipped.items()]
    skipped += [
        f"{name}: nothing in this folder can be used"
        for name in sorted(set(folders) - set(names))
    ]
    names, skipped = (tuple(map(printable, some)) for some in (names, skipped))
    return stored, np.array(labels, np.int32), names, skipped


def _level(folders: Sequence[str]) -> tuple[str, str]:
    """Which of nested folders are classes, and why."""
    tops = {name for name in folders if os.sep not in name}
    nested = {name for name in folders if os.sep in name}
    if any(name.partition(os.sep)[0] in tops for name in nested):
        return "top", "some hold images beside sub-folders"
    dated = sum(bool(BY_DATE.fullmatch(name.split(os.sep)[1])) for name in nested)
    if dated > len(nested) / 2:
        return "top", "their sub-folders are named by date or session"
    return "leaf", "their names are no dates or sessions"


def _checked(
    images: Images, stored: DecodedImages, names: Sequence[str], skipped: Sequence[str]
) -> tuple[Images, DecodedImages, Sequence[str], Sequence[str]]:
    """Without images that are in several classes, which contradict one another."""
    classes = {}
    for place, (digest, label) in enumerate(zip(stored.digests, images.labels)):
        classes.setdefault(digest, {}).setdefault(int(label), []).append(place)
    double = {digest: of for digest, of in classes.items() if len(of) > 1}
    if not double:
        return images, stored, names, skipped
    told = [
        f"{sum(map(len, of.values()))} copies of an image: it is in "
        f"{', '.join(names[label] for label in sorted(of))}"
        for of in double.values()
    ]
    keep = np.array([digest not in double for digest in stored.digests])
    if not keep.any():
        raise ValueError(f"every image is in several classes: {told[0]}.")
    kept = np.flatnonzero(keep)
    stored = dataclasses.replace(
        stored,
        digests=[stored.digests[place] for place in kept],
        notes=(
            *stored.notes,
            f"{len(keep) - len(kept):,} images that are in several classes are left "
            "out, and named in config.json",
        ),
    )
    return images.part(kept), stored, names, (*skipped, *told)


def printable(name: str) -> str:
    """A name that need not be UTF-8."""
    return os.fsencode(name).decode(errors="replace")


def _files_key(
    files: Sequence[Path], names: Sequence[str], size: int | None, kind: str | None
) -> str:
    """A digest of what files hold, and of their names."""

    def content(file: Path) -> bytes:
        try:
            with file.open("rb") as opened:
                return hashlib.file_digest(opened, "blake2b").digest()
        except OSError:
            # It is named when it is to be decoded.
            return b"none"

    digest = hashlib.blake2b(str((FORMAT, size, kind)).encode(), digest_size=16)
    with ThreadPoolExecutor() as pool:
        for name, one in zip(names, pool.map(content, files)):
            digest.update(os.fsencode(name) + b"\0" + one)
    return digest.hexdigest()


def _directory(data_dir: str | Path | None, key: str) -> Path:
    return Path(data_dir or tfds.core.constants.DATA_DIR) / "tripletjax" / key


def _from_catalogue(
    name: str,
    *,
    size: int | None,
    kind: str | None,
    data_dir: str | Path | None,
    **options: Any,
) -> tuple[DecodedImages, np.ndarray, tuple[str, ...], tuple[str, ...]]:
    """The same of a dataset of tensorflow-datasets."""
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
    part = "+".join(split) or "+".join(builder.info.splits)
    # Images need not be decoded for their labels.
    skip = {image: tfds.decode.SkipDecoding()}
    records = builder.as_data_source(part, decoders=skip)
    labels = np.array([int(record[label]) for record in records], np.int32)
    # Records of which the label is not known have a negative one.
    labelled = np.flatnonzero(labels >= 0).tolist()
    source = builder.as_data_source(part)

    def picture(place: int) -> Image.Image:
        x = np.asarray(source[place][image])
        return Image.fromarray(x[..., 0] if x.shape[-1] == 1 else x)

    made_of = (
        FORMAT,
        size,
        kind,
        builder.info.full_name,
        builder.data_dir,
        part,
        len(source),
    )
    key = hashlib.blake2b(str(made_of).encode(), digest_size=16).hexdigest()
    directory = _directory(data_dir, key)
    options |= {"source": f"{name} in {data_dir}", "size": size, "kind": kind}
    stored = decode_and_cache(labelled, picture, directory, **options)
    skipped = [
        f"record {labelled[place]}: {why}" for place, why in stored.skipped.items()
    ]
    if len(labelled) < len(labels):
        skipped.append(f"{len(labels) - len(labelled)} records without a label")
    names = tuple(features[label].names)
    return stored, labels[labelled], names, tuple(skipped)
