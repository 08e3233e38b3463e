"""Given triplets of images, in a CSV file."""

import dataclasses
from pathlib import Path

import numpy as np

from tripletjax.learn.data.image_array import ImageArray
from tripletjax.learn.data.image_cache import (
    IN_MEMORY,
    Decoding,
    cache_directory,
    decode_and_cache,
    files_key,
)
from tripletjax.learn.data.image_files import open_image
from tripletjax.learn.data.splits import TEST, VALIDATION, counts_of, share_out
from tripletjax.learn.data.text_files import read_rows
from tripletjax.learn.files import digest_of


@dataclasses.dataclass(frozen=True)
class TripletDataset:
    """Given triplets of images.

    Attributes:
        name: of the file of triplets.
        images: uint8 ``[n, height, width, channels]``, in memory or on disk.
        train: indices of anchor, positive and negative, int32 ``[t, 3]``.
        validation: held-out triplets that choose the best parameters.
        test: held-out triplets for the evaluation.
        key: a digest of images and triplets.
        skipped: files that are left out, each with the reason.
        skip_counts: number of images that are left out, by the type of reason.
        entry_counts: number of other entries that are left out; a list of triplets has
            none.
        left_out: number of triplets with such a file.
        decoding: how the pictures were decoded.
    """

    name: str
    images: ImageArray
    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    key: str
    skipped: tuple[str, ...] = ()
    skip_counts: dict[str, int] = dataclasses.field(default_factory=dict)
    entry_counts: dict[str, int] = dataclasses.field(default_factory=dict)
    left_out: int = 0
    decoding: Decoding = dataclasses.field(default_factory=Decoding)


def load_triplets(
    file: str | Path,
    *,
    size: int | None = None,
    kind: str | None = None,
    data_dir: str | Path | None = None,
    in_memory: int = IN_MEMORY,
    progress: bool = False,
) -> TripletDataset:
    """Load triplets of image files.

    Some anchors are held out with all their triplets, for validation and for the test.
    Their images may be positives or negatives of other anchors.

    Args:
        file: a CSV file in UTF-8 with three columns, the paths of an anchor, a positive
            and a negative, between commas, semicolons or tabs. Relative paths are
            relative to the file. A first line with the names ``anchor``, ``positive``
            and ``negative`` allows any order and other columns, which are ignored.
            Blanks around values are dropped, except in double quotes.
        size: as in `datasets.load`, as are all that follow.
        kind: photos or characters.
        data_dir: the folder of tensorflow-datasets.
        in_memory: the largest size of images in memory, in bytes.
        progress: whether to show a progress bar while images are decoded.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if a line is not a triplet, or no triplet is left to train on.
    """
    file = Path(file).resolve()
    rows = _triplet_rows(file)
    names = sorted({name for row in rows for name in row})
    files = [_file_of(file.parent, name) for name in names]
    try:
        stored = decode_and_cache(
            files,
            open_image,
            cache_directory(data_dir, files_key(files, names, size, kind)),
            source=str(file),
            size=size,
            kind=kind,
            in_memory=in_memory,
            progress=progress,
        )
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    row_of = {names[kept]: row for row, kept in enumerate(stored.kept)}
    whole = [row for row in rows if all(name in row_of for name in row)]
    if not whole:
        raise ValueError(f"{file} has no triplet of which all images can be read.")
    triplets = np.array([[row_of[name] for name in row] for row in whole], np.int32)
    anchors = np.unique(triplets[:, 0]).tolist()
    anchors = [[a] for a in sorted(anchors, key=lambda a: (stored.digests[a], a))]
    parts = share_out(anchors, counts_of(len(anchors), [TEST, VALIDATION]))
    train, test, validation = (
        triplets[np.isin(triplets[:, 0], np.array(part, int))] for part in parts
    )
    content = " ".join(stored.digests), f"{stored.images.shape}", triplets.tobytes()
    skipped = [f"{names[index]}: {why}" for index, why in stored.skipped.items()]
    return TripletDataset(
        str(file),
        stored.images,
        train,
        validation,
        test,
        digest_of(content),
        tuple(skipped),
        stored.skip_counts,
        left_out=len(rows) - len(whole),
        decoding=stored.decoding,
    )


def _triplet_rows(file: Path) -> list[tuple[str, str, str]]:
    roles = ("anchor", "positive", "negative")
    rows, columns, width = [], None, 3
    for line, row in read_rows(file, columns=width):
        if not any(row):
            continue
        if columns is None:
            titles = [title.lower() for title in row]
            if all(titles.count(role) == 1 for role in roles):
                columns = [titles.index(role) for role in roles]
                width = len(row)
                continue
            if not any(Path(title).suffix for title in titles):
                raise ValueError(
                    f"{file}, line {line}: must be three paths of images, or the names "
                    "of columns, among them anchor, positive and negative, got "
                    f"{', '.join(row)}."
                )
            columns = [0, 1, 2]
        if len(row) != width:
            raise ValueError(
                f"{file}, line {line}: must have {width} columns, has {len(row)}."
            )
        names = tuple(row[column] for column in columns)
        if len(set(names)) < 3 or not all(names):
            raise ValueError(
                f"{file}, line {line}: anchor, positive and negative must be three "
                f"different images, got {', '.join(names)}."
            )
        rows.append(names)
    if not rows:
        raise ValueError(
            f"{file} has no triplets: it must have three columns of paths."
        )
    return rows


def _file_of(folder: Path, name: str) -> Path:
    """The file of a name, which may have the backslashes of Windows."""
    file = folder / name
    if "\\" in name and not file.exists():
        slashed = folder / name.replace("\\", "/")
        return slashed if slashed.exists() else file
    return file
