"""Hard triplets of a folder of classes, mined over all of its images."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

import tripletjax as tj
from tripletjax.apps.images import encode_path
from tripletjax.apps.mining.label_errors import (
    NEIGHBORS,
    LabelErrors,
    find_label_errors,
)
from tripletjax.learn import evaluation
from tripletjax.learn.counts import counted
from tripletjax.learn.embedder import ImageEmbedder
from tripletjax.learn.reports import PREFIX, number, percent

REPORT = f"{PREFIX}mining"
# Anchors that are mined at a time, under the progress bar.
ANCHORS = 8192
# The fault of a path that no line of a text file can hold.
UNWRITABLE = (
    "holds a line break or bytes that are not UTF-8, which no CSV file can hold"
)
# Quantiles of distances in a report.
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


@dataclasses.dataclass(frozen=True)
class Mining:
    """Hard triplets and likely label errors of a folder.

    Attributes:
        report: numbers, distances, exclusions and notes, for JSON.
        triplets: indices of anchor, positive and negative, ``[t, 3]``.
        distances: of anchors to positives and to negatives, ``[t, 2]``.
        label_errors: images that are far nearer to another class than to their own.
        images: the embedded images of the folder.
        neighbors: indices of the nearest images of each image, ``[n, k]``.
        neighbor_distances: distances of these images, ``[n, k]``.
    """

    report: dict[str, Any]
    triplets: np.ndarray
    distances: np.ndarray
    label_errors: LabelErrors
    images: evaluation.Embedded
    neighbors: np.ndarray
    neighbor_distances: np.ndarray


def mine(
    embedder: ImageEmbedder,
    folder: str | Path,
    *,
    k: int = 1,
    range_min: int = 0,
    range_max: int | None = None,
    margin: float | None = None,
    relative_margin: float | None = None,
    farthest_positive: bool = False,
    skip_label_errors: bool = False,
    seed: int | None = None,
    classes_from: str | None = None,
    progress: bool = False,
) -> Mining:
    """Mine the hardest triplets of a folder of classes, and find label errors.

    The search is exact, over all images. Copies of an image are neither its positives
    nor its negatives.

    Args:
        embedder: of a run, or of any function.
        folder: one folder of images per class.
        k: number of negatives of each anchor.
        range_min, range_max: ranks of negatives, as in
            `tripletjax.mine_hard_negatives`.
        margin, relative_margin: exclude negatives that are likely labelled wrongly, as
            in `tripletjax.mine_hard_negatives`.
        farthest_positive: whether a triplet has the farthest positive of its anchor
            instead of the nearest.
        skip_label_errors: whether images that are likely labelled wrongly are in no
            triplet.
        seed: of random draws among the ranks; requires `range_max`. If None, the
            hardest.
        classes_from: the level of nested folders that makes classes, as in
            `datasets.load`.
        progress: whether to show progress bars.

    Returns:
        `Mining`.

    Raises:
        FileNotFoundError: if the folder does not exist.
        ValueError: if there are fewer than two classes, no class of two images, fewer
            than `k` negatives, or no triplet is left.
    """
    folder = Path(folder)
    images, notes = _embed(embedder, folder, classes_from, progress)
    _check_counts(folder, images.labels, k, range_min)
    # Equal images have equal vectors, whatever batch they were embedded in.
    x, labels = images.x[images.first_copy], images.labels
    distances, neighbors = find_neighbors(x, progress=progress)
    errors = find_label_errors(x, labels, distances, neighbors)
    where = np.ones(len(x), bool)
    where[errors.images] = not skip_label_errors
    options: dict[str, Any] = {
        "k": k,
        "range_min": range_min,
        "range_max": range_max,
        "margin": margin,
        "relative_margin": relative_margin,
        "farthest_positive": farthest_positive,
    }
    mined = _mine_triplets(x, labels, where, options, seed=seed, progress=progress)
    valid = mined.valid
    triplets = np.stack([mined.anchor, mined.positive, mined.negative], axis=-1)[valid]
    of_triplets = np.stack(
        [mined.positive_distances, mined.negative_distances], axis=-1
    )[valid]
    excluded = {
        name: int(np.sum(count, dtype=np.int64))
        for name, count in mined.excluded._asdict().items()
    }
    _check_some_left(folder, triplets, excluded)
    report = {
        "what": REPORT,
        "embedder": embedder.key,
        "data": encode_path(folder.resolve()),
        "images": len(labels),
        "classes": len(images.names),
        "options": options | {"skip_label_errors": skip_label_errors, "seed": seed},
        "triplets": len(triplets),
        "anchors": len(np.unique(triplets[:, 0])),
        "distances": _describe_distances(of_triplets),
        "excluded": excluded,
        "label_errors": _describe_errors(images, errors, folder.resolve()),
        "notes": notes,
        "skipped": [*images.skipped],
    }
    return Mining(report, triplets, of_triplets, errors, images, neighbors, distances)


def _embed(
    embedder: ImageEmbedder, folder: Path, classes_from: str | None, progress: bool
) -> tuple[evaluation.Embedded, list[str]]:
    """The embedded images of a folder whose paths fit a line, and notes."""
    if not folder.is_dir():
        raise FileNotFoundError(f"folder {folder} does not exist.")
    if not _fits_a_line(str(folder.resolve())):
        raise ValueError(f"{encode_path(folder)} has a path that {UNWRITABLE}.")
    unwritable = []

    def choose(path: str, _: str) -> bool:
        fits = _fits_a_line(path)
        unwritable.extend([] if fits else [path])
        return fits

    images = evaluation.embed_folder(
        embedder, folder, choose=choose, classes_from=classes_from, progress=progress
    )
    notes = [*images.notes, *filter(None, [evaluation.note_on_sizes(images.labels)])]
    if unwritable:
        notes.append(
            counted(len(unwritable), "image is skipped", "images are skipped")
            + f": each has a path that {UNWRITABLE}"
        )
    return images, notes


def _check_some_left(
    folder: Path, triplets: np.ndarray, excluded: dict[str, int]
) -> None:
    if len(triplets):
        return
    counts = ", ".join(
        f"{name.replace('_', ' ')} {count:,}"
        for name, count in excluded.items()
        if count
    )
    raise ValueError(
        f"{folder} has no triplet left; excluded pairs: {counts or 'none'}."
    )


def _fits_a_line(path: str) -> bool:
    """Whether a line of a text file in UTF-8 can hold a path."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return not {"\n", "\r"} & {*path}


def _check_counts(folder: Path, labels: np.ndarray, k: int, range_min: int) -> None:
    """Raise ValueError if no image has a positive, or none has `k` negatives."""
    counts = np.unique(labels, return_counts=True)[1]
    if counts.max() < 2:
        raise ValueError(
            f"{folder} has no class of two images: every class has one, and no image "
            "has a positive."
        )
    most = len(labels) - counts.min()
    if range_min + k > most:
        name = "k" if range_min == 0 else "range_min + k"
        raise ValueError(
            f"{name} must be at most {most:,}, the largest number of images of other "
            f"classes, got {range_min + k:,}."
        )


def find_neighbors(
    x: np.ndarray, *, progress: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Distances and indices ``[n, k]`` of the nearest images, for label errors."""
    k = min(NEIGHBORS, len(x) - 1)

    def find(rows: np.ndarray, _: int) -> tuple[jax.Array, jax.Array]:
        return tj.retrieval.nearest_neighbors(x[rows], x, k, positions=rows)

    return _in_parts(len(x), find, "neighbors", progress)


def _mine_triplets(
    x: np.ndarray,
    labels: np.ndarray,
    where: np.ndarray,
    options: dict[str, Any],
    *,
    seed: int | None,
    progress: bool,
) -> tj.HardTriplets:
    """Mine triplets ``[n, k]`` of the images where a mask is True."""

    def mine(rows: np.ndarray, part: int) -> tj.HardTriplets:
        key = None if seed is None else jax.random.key(seed)
        mined = tj.mine_triplets(
            x[rows],
            labels[rows],
            references=x,
            reference_labels=labels,
            positions=rows,
            where=where[rows],
            reference_where=where,
            key=None if key is None else jax.random.fold_in(key, part),
            **options,
        )
        return mined._replace(anchor=rows[mined.anchor])

    return _in_parts(len(x), mine, "mining", progress)


def _in_parts(
    n: int, function: Callable[[np.ndarray, int], Any], what: str, progress: bool
) -> Any:
    """Join the results of a function of row numbers, for parts of one size."""
    size = min(n, ANCHORS)
    parts = []
    with tqdm(total=n, desc=what, unit="image", disable=not progress) as bar:
        for part, start in enumerate(range(0, n, size)):
            # The last part ends with the first rows again.
            result = function(np.arange(start, start + size) % n, part)
            parts.append(jax.tree.map(np.asarray, result))
            bar.update(min(size, n - start))
    return jax.tree.map(lambda *arrays: np.concatenate(arrays)[:n], *parts)


def _describe_distances(distances: np.ndarray) -> dict[str, Any]:
    """Quantiles of distances to positives and to negatives ``[t, 2]``, for JSON."""
    positive, negative = (
        [number(value) for value in np.quantile(part, QUANTILES)]
        for part in distances.T
    )
    return {
        "quantiles": [*QUANTILES],
        "positive": positive,
        "negative": negative,
        "nearer_negatives": percent(np.mean(distances[:, 1] < distances[:, 0])),
    }


def _describe_errors(
    images: evaluation.Embedded, errors: LabelErrors, folder: Path
) -> list[dict[str, Any]]:
    """Likely label errors, for JSON and CSV, with paths within the folder."""
    names, labels = images.names, images.labels
    paths = [encode_path(file.relative_to(folder)) for file in images.files]
    return [
        {
            "path": paths[image],
            "class": names[labels[image]],
            "nearest_class": names[label],
            "nearest_image": paths[nearest],
            "distance_to_class": float(own),
            "distance_to_nearest_class": float(other),
            "ratio": float(ratio),
        }
        for image, label, nearest, own, other, ratio in zip(
            errors.images,
            errors.labels,
            errors.nearest,
            errors.own,
            errors.other,
            errors.ratio,
        )
    ]
