"""Are these two the same? Of two images, and measured on classes never seen."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tripletjax.apps.images import encode_path
from tripletjax.apps.verification.calibration import (
    Calibration,
    TooFewPairsError,
    calibrate,
    check_enough,
)
from tripletjax.apps.verification.intervals import REPLICATES, _folds, _intervals
from tripletjax.apps.verification.lfw import read_pairs
from tripletjax.apps.verification.pair_distances import PairDistances
from tripletjax.apps.verification.protocol import (
    _indices_of_pairs,
    _stem,
    _stems,
)
from tripletjax.learn import evaluation
from tripletjax.learn.data.class_folders import without_number
from tripletjax.learn.embedder import Embedder, ImageEmbedder

REPORT = "tripletjax verification"
# A threshold is chosen at this false accept rate if no other is asked for.
FAR = 0.01
# So many of the worst errors of either kind are shown.
WORST = 6


@dataclasses.dataclass(frozen=True)
class Verification:
    """What was found on a folder.

    Attributes:
        report: the numbers, for JSON.
        calibration: the threshold that was chosen, or None if there are too few pairs.
        pairs: the distances.
        files: of the images.
        worst: numbers of the images of the nearest pairs of different classes, and of
            the farthest of the same ``[k, 2]``, with the distances of each.
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
    far: float | None = None,
    pairs_file: str | Path | None = None,
    classes_from: str | None = None,
    name: str | None = None,
    replicates: int = REPLICATES,
    progress: bool = False,
) -> Verification:
    """Measures an embedding on a folder of classes, and chooses a threshold there.

    Classes that a run was trained on are left out where the folder is the one that it
    learnt from.

    Args:
        embedder: of a run, or of any function.
        folder: one folder of images per class, or images alone: their names without
            numbers are the classes.
        far: the false accept rate of the threshold, a share. If not given, 0.01, and
            no threshold where there are too few pairs to show it.
        pairs_file: a ``pairs.txt`` in the format of Labeled Faces in the Wild; if not
            given, all pairs of images.
        classes_from: which of nested folders are classes, as in `datasets.load`.
        name: what the folder is called in the report; its path if not given.
        replicates: how many draws of classes the intervals are of.
        progress: whether to show progress bars.

    Returns:
        `Verification`.

    Raises:
        FileNotFoundError: if there is no such folder, or images of pairs are missing.
        TooFewPairsError: if there are too few pairs to show the rate asked for.
        ValueError: if there is nothing to compare, or `far` is no share.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}.")
    if far is not None and not 0 < far < 1:
        raise ValueError(f"far must be a share between 0 and 1, got {far}.")
    protocol = None if pairs_file is None else read_pairs(pairs_file)
    called = encode_path(folder.resolve()) if name is None else name
    without, notes = _not_trained_on(embedder, folder, name)
    needed = None
    if protocol is not None:
        needed = {*_stems(protocol.first + protocol.second)}
        needed |= {path.rpartition("/")[2] for path in needed}
    found = evaluation.embed_folder(
        embedder,
        folder,
        choose=lambda path, of: (
            of not in without and (needed is None or _stem(path) in needed)
        ),
        classes_from=classes_from,
        name_of_file=without_number,
        progress=progress,
    )
    notes += found.notes
    skipped = list(found.skipped)
    fold = None
    if protocol is None:
        pairs = PairDistances.of_all(found.x, found.labels)
        if not without:
            notes += _same_names(embedder, found.names)
        notes += [*filter(None, [evaluation.sizes_worth_telling(found.labels)])]
    else:
        indices, same, fold, broken = _indices_of_pairs(protocol, folder, found)
        if broken:
            notes.append(f"{broken:,} pairs are left out, of images that are skipped")
        pairs = PairDistances.of_given(found.x, found.labels, indices, same)
        fold = np.concatenate([fold[same], fold[~same]])
    if not len(pairs.same) or not len(pairs.different):
        kind = "the same class" if not len(pairs.same) else "different classes"
        raise ValueError(
            f"{folder} has no pair of {kind}. It must hold one folder of images per "
            "class, or images with names such as ann_1.png, ann_2.png and bob_1.png."
        )
    if far is not None:
        check_enough(pairs.all_different, far)
    for kind, listed, of in (
        ("the same class", pairs.same, pairs.all_same),
        ("different classes", pairs.different, pairs.all_different),
    ):
        if len(listed) < of:
            notes.append(
                f"intervals and pictures are of {len(listed):,} pairs of {kind}, drawn "
                f"at random from {of:,}"
            )

    fars = tuple(f for f in evaluation.FARS if f * pairs.all_different >= 1)
    chosen_far = FAR if far is None else far
    # All pairs are gone over once, for the report and for the threshold.
    metrics = pairs.evaluate((*fars, chosen_far))
    report = {
        "what": REPORT,
        "embedder": embedder.key,
        "data": called,
        "pairs": "all"
        if protocol is None
        else encode_path(Path(pairs_file or "").resolve()),
        "images": len(found.labels),
        "classes": len(found.names),
        "verification": evaluation.of_metrics(metrics, fars),
        "intervals": _intervals(pairs, fars, replicates, progress),
        "k_fold": _folds(pairs, found, fold),
    }
    calibration = None
    names = np.array(found.names)[found.labels]
    try:
        calibration = calibrate(
            pairs,
            embedder=embedder.key,
            data=called,
            far=chosen_far,
            threshold=float(metrics.thresholds[-1]),
            tar=float(metrics.tar_at_far[-1]),
            vectors=found.x,
            names=names,
        )
    except TooFewPairsError as error:
        # What was asked for has been checked above.
        notes.append(f"no threshold is chosen: {error}")
    report |= {
        "calibration": None if calibration is None else calibration.summary(),
        "notes": notes,
        "skipped": skipped,
    }
    return Verification(report, calibration, pairs, found.files, _worst(pairs))


def _not_trained_on(
    embedder: ImageEmbedder, folder: Path, name: str | None
) -> tuple[frozenset[str], list[str]]:
    """Names of classes of a folder that a run has learnt from, if it has."""
    if not isinstance(embedder, Embedder):
        return frozenset(), []
    made = embedder.record
    learnt = made.requested.data
    same = learnt == name or Path(learnt).resolve() == folder.resolve()
    if made.requested.triplets is not None or not same:
        return frozenset(), []
    seen = frozenset(made.seen_names)
    held_out = len(made.label_names) - len(seen)
    if held_out < 2:
        raise ValueError(
            f"the run was trained on the classes of {name or folder}, where distances "
            "are better than those of others. Give a folder of other classes, or train "
            "with --split classes, which holds some out."
        )
    return seen, [
        f"{len(seen):,} classes of the folder are left out, because the run was "
        f"trained on them; {held_out:,} were held out"
    ]


def _same_names(embedder: ImageEmbedder, names: Sequence[str]) -> list[str]:
    if not isinstance(embedder, Embedder):
        return []
    both = sorted({*names} & {*embedder.record.seen_names})
    if not both:
        return []
    return [
        f"{len(both):,} classes have names of classes that the run was trained on, "
        f"such as {both[0]}: if they are the same, the rates are too good"
    ]


def _worst(pairs: PairDistances) -> tuple:
    """The nearest pairs of different classes, the farthest of the same: one of each."""

    def chosen(
        images: np.ndarray, distances: np.ndarray, order: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        seen, kept = set(), []
        for index in order.tolist():
            who = tuple(sorted(pairs.labels[images[index]].tolist()))
            if who not in seen:
                seen.add(who)
                kept.append(index)
            if len(kept) == WORST:
                break
        return images[kept], distances[kept]

    return (
        chosen(
            pairs.different_images,
            pairs.different,
            np.argsort(pairs.different, kind="stable"),
        ),
        chosen(pairs.same_images, pairs.same, np.argsort(-pairs.same, kind="stable")),
    )
