"""Verification of a folder: metrics, intervals, and a threshold with its rates."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tripletjax.apps.images import encode_path
from tripletjax.apps.verification.calibration import (
    Calibration,
    TooFewPairsError,
    calibrate,
)
from tripletjax.apps.verification.intervals import REPLICATES, folds_of, intervals_of
from tripletjax.apps.verification.lfw import PairsFile, read_pairs
from tripletjax.apps.verification.pair_distances import PairDistances
from tripletjax.apps.verification.protocol import find_pairs, stem
from tripletjax.learn import evaluation
from tripletjax.learn.counts import counted
from tripletjax.learn.data.class_folders import without_number
from tripletjax.learn.embedder import Embedder, ImageEmbedder

REPORT = "tripletjax verification"
# The default false accept rate of a threshold.
FAR = 0.01
# The number of errors of either sort that are shown.
WORST = 6


@dataclasses.dataclass(frozen=True)
class Verification:
    """Verification of the images of a folder.

    Attributes:
        report: metrics and notes, for JSON.
        calibration: the threshold, or None if there are too few pairs to choose one.
        pairs: the distances.
        files: of the images.
        worst: the nearest pairs of different classes, and the farthest of the same:
            numbers of their images ``[k, 2]`` and their distances ``[k]``.
    """

    report: dict[str, Any]
    calibration: Calibration | None
    pairs: PairDistances
    files: tuple[Path, ...]
    worst: tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


def evaluate(
    embedder: ImageEmbedder,
    folder: str | Path,
    *,
    far: float = FAR,
    pairs_file: str | Path | None = None,
    classes_from: str | None = None,
    name: str | None = None,
    replicates: int = REPLICATES,
    progress: bool = False,
) -> Verification:
    """Evaluate verification on a folder of classes, and choose a threshold there.

    If a run was trained on this folder, the classes that it was trained on are left
    out.

    Args:
        embedder: of a run, or of any function.
        folder: one folder of images per class, or images alone, whose names without
            numbers are the classes.
        far: false accept rate of the threshold, between 0 and 1. If there are too few
            pairs to measure it, the report has a note and no threshold.
        pairs_file: a ``pairs.txt`` in the format of Labeled Faces in the Wild. If not
            given, all pairs of images.
        classes_from: the level of nested folders that makes classes, as in
            `datasets.load`.
        name: of the folder in the report. If not given, its path.
        replicates: of the bootstrap over classes.
        progress: whether to show progress bars.

    Returns:
        `Verification`.

    Raises:
        FileNotFoundError: if the folder, or an image of a pair, does not exist.
        ValueError: if there are no pairs to compare, or `far` is not between 0 and 1.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"folder {folder} does not exist.")
    if not 0 < far < 1:
        raise ValueError(f"far must be a share between 0 and 1, got {far}.")
    protocol = None if pairs_file is None else read_pairs(pairs_file)
    data = encode_path(folder.resolve()) if name is None else name
    images, notes = _embed(embedder, folder, protocol, classes_from, name, progress)
    pairs, fold, more = _pairs_of(images, protocol, folder)
    notes += [*more, *_notes_on_samples(pairs)]
    fars = tuple(f for f in evaluation.FARS if f * pairs.all_different >= 1)
    # One pass over all pairs serves the report and the threshold.
    metrics = pairs.evaluate((*fars, far))
    report = {
        "what": REPORT,
        "embedder": embedder.key,
        "data": data,
        "pairs": "all"
        if pairs_file is None
        else encode_path(Path(pairs_file).resolve()),
        "images": len(images.labels),
        "classes": len(images.names),
        "verification": evaluation.of_metrics(metrics, fars),
        "intervals": intervals_of(pairs, fars, replicates, progress),
        "k_fold": folds_of(pairs, images.labels, fold),
    }
    calibration = None
    try:
        calibration = calibrate(
            pairs,
            embedder=embedder.key,
            data=data,
            far=far,
            threshold=float(metrics.thresholds[-1]),
            tar=float(metrics.tar_at_far[-1]),
            vectors=images.x,
            names=np.array(images.names)[images.labels],
        )
    except TooFewPairsError as error:
        notes.append(f"no threshold: {error}")
    report |= {
        "calibration": None if calibration is None else calibration.summary(),
        "notes": notes,
        "skipped": [*images.skipped],
    }
    return Verification(report, calibration, pairs, images.files, _worst(pairs))


def _embed(
    embedder: ImageEmbedder,
    folder: Path,
    protocol: PairsFile | None,
    classes_from: str | None,
    name: str | None,
    progress: bool,
) -> tuple[evaluation.Embedded, list[str]]:
    """The embedded images of classes that the run was not trained on, and notes."""
    trained_on, notes = _not_trained_on(embedder, folder, name)
    images = evaluation.embed_folder(
        embedder,
        folder,
        choose=_chooser(trained_on, protocol),
        classes_from=classes_from,
        name_of_file=without_number,
        progress=progress,
    )
    notes += images.notes
    if protocol is None and not trained_on and isinstance(embedder, Embedder):
        seen = embedder.record.seen_names
        notes += evaluation.note_on_seen_names(images.names, seen)
    return images, notes


def _chooser(
    trained_on: frozenset[str], protocol: PairsFile | None
) -> Callable[[str, str], bool]:
    """Choose images by path and class: not trained on, and named by the protocol."""
    if protocol is None:
        return lambda path, of: of not in trained_on
    named = {*map(stem, protocol.first + protocol.second)}
    named |= {path.rpartition("/")[2] for path in named}
    return lambda path, of: of not in trained_on and stem(path) in named


def _pairs_of(
    images: evaluation.Embedded, protocol: PairsFile | None, folder: Path
) -> tuple[PairDistances, np.ndarray | None, list[str]]:
    """All pairs or those of a protocol, the fold of each, and notes.

    Raises:
        FileNotFoundError: if an image of the protocol does not exist.
        ValueError: if all pairs are of the same class, or none is.
    """
    fold, notes = None, []
    if protocol is None:
        pairs = PairDistances.of_all(images.x, images.labels)
        notes += filter(None, [evaluation.note_on_sizes(images.labels)])
    else:
        indices, same, fold, left_out = find_pairs(protocol, folder, images)
        if left_out:
            notes.append(
                counted(
                    left_out,
                    "pair of skipped images is left out",
                    "pairs of skipped images are left out",
                )
            )
        pairs = PairDistances.of_given(images.x, images.labels, indices, same)
        fold = np.concatenate([fold[same], fold[~same]])
    if not len(pairs.same) or not len(pairs.different):
        missing = "different classes" if len(pairs.same) else "the same class"
        raise ValueError(
            f"{folder} has no pair of {missing}. It must hold one folder of images per "
            "class, or images with names such as ann_1.png, ann_2.png and bob_1.png."
        )
    return pairs, fold, notes


def _notes_on_samples(pairs: PairDistances) -> list[str]:
    """Notes on pairs of which a random sample stands for all."""
    return [
        f"intervals and pictures use {counted(len(sample), 'random pair')} of {which}, "
        f"of {count:,}"
        for which, sample, count in (
            ("the same class", pairs.same, pairs.all_same),
            ("different classes", pairs.different, pairs.all_different),
        )
        if len(sample) < count
    ]


def _not_trained_on(
    embedder: ImageEmbedder, folder: Path, name: str | None
) -> tuple[frozenset[str], list[str]]:
    """Names of classes of a folder that a run was trained on, and a note."""
    if not isinstance(embedder, Embedder):
        return frozenset(), []
    record = embedder.record
    data = record.requested.data
    same = data == name or Path(data).resolve() == folder.resolve()
    if record.requested.triplets is not None or not same:
        return frozenset(), []
    trained_on = frozenset(record.seen_names)
    held_out = len(record.label_names) - len(trained_on)
    if held_out < 2:
        raise ValueError(
            f"the run was trained on the classes of {name or folder}, whose distances "
            "are better than those of unseen classes. Give a folder of other classes, "
            "or train with --split classes, which holds some out."
        )
    return trained_on, [
        counted(
            len(trained_on),
            "class of the folder is left out: the run was trained on it",
            "classes of the folder are left out: the run was trained on them",
        )
        + f"; {held_out:,} were held out"
    ]


def _worst(pairs: PairDistances) -> tuple:
    """The nearest pairs of different classes and the farthest of the same class.

    At most one pair is taken of each class, or of each two classes.
    """

    def first(
        images: np.ndarray, distances: np.ndarray, order: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        seen, kept = set(), []
        for index in order.tolist():
            classes = tuple(sorted(pairs.labels[images[index]].tolist()))
            if classes not in seen:
                seen.add(classes)
                kept.append(index)
            if len(kept) == WORST:
                break
        return images[kept], distances[kept]

    nearest = np.argsort(pairs.different, kind="stable")
    farthest = np.argsort(-pairs.same, kind="stable")
    return (
        first(pairs.different_images, pairs.different, nearest),
        first(pairs.same_images, pairs.same, farthest),
    )
