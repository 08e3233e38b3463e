"""Are these two the same? Of two images, and measured on classes never seen."""

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.typing import ArrayLike
from PIL import Image

import tripletjax as tj
from tripletjax.apps.calibration import (
    NEEDED,
    Calibration,
    TooFewPairsError,
    calibrate,
)
from tripletjax.apps.embedders import vectors_of
from tripletjax.apps.images import encoded
from tripletjax.apps.pairs import PairDistances
from tripletjax.learn import evaluation
from tripletjax.learn.class_folders import without_number
from tripletjax.learn.embedder import Embedder, ImageEmbedder
from tripletjax.learn.lfw import read_pairs

REPORT = "tripletjax verification"
# Intervals are of so many replicates, and have this share of them.
REPLICATES, CONFIDENCE = 1000, 0.95
# A threshold is chosen at this false accept rate if no other is asked for.
FAR = 0.01
# Folds of classes, and so many pairs of either kind in each.
FOLDS, IN_FOLD = 10, 300
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


@dataclasses.dataclass(frozen=True)
class Decision:
    """Whether two images are of the same class.

    Attributes:
        same: whether they are taken for the same.
        distance: how far they are apart.
        threshold: at most which distance that is.
        probability: that they are, where as many pairs are the same as are not.
    """

    same: bool
    distance: float
    threshold: float
    probability: float


def decide(
    embedder: ImageEmbedder,
    first: Image.Image,
    second: Image.Image,
    calibration: Calibration,
) -> Decision:
    """Whether two images are of the same class, by a threshold of one's own."""
    x = vectors_of(embedder, [first, second]).astype(np.float64)
    distance = float(np.linalg.norm(x[0] - x[1]))
    return Decision(
        distance <= calibration.threshold,
        distance,
        calibration.threshold,
        float(calibration.probability(distance)),
    )


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
    """Measures an embedding on a folder of classes, and chooses a threshold there.

    Classes that a run was trained on are left out where the folder is the one that it
    learnt from.

    Args:
        embedder: of a run, or of any function.
        folder: one folder of images per class, or images alone: their names without
            numbers are the classes.
        far: the false accept rate of the threshold, a share. With too few pairs to
            show the rate, the report has no threshold, and a note with the reason.
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
        ValueError: if there is nothing to compare, or `far` is no share.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}.")
    if not 0 < far < 1:
        raise ValueError(f"far must be a share between 0 and 1, got {far}.")
    protocol = None if pairs_file is None else read_pairs(pairs_file)
    called = encoded(folder.resolve()) if name is None else name
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
    # All pairs are gone over once, for the report and for the threshold.
    metrics = pairs.evaluate((*fars, far))
    report = {
        "what": REPORT,
        "embedder": embedder.key,
        "data": called,
        "pairs": "all"
        if protocol is None
        else encoded(Path(pairs_file or "").resolve()),
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
            far=far,
            threshold=float(metrics.thresholds[-1]),
            tar=float(metrics.tar_at_far[-1]),
            vectors=found.x,
            names=names,
        )
    except TooFewPairsError as error:
        notes.append(f"no threshold is chosen: {error}")
    report |= {
        "calibration": None if calibration is None else calibration.summary(),
        "notes": notes,
        "skipped": skipped,
    }
    return Verification(report, calibration, pairs, found.files, _worst(pairs))


@contextlib.contextmanager
def folder_of(data: str) -> Iterator[Path]:
    """A folder as it is, or one that a prepared dataset ``tfds:NAME`` is written to."""
    if not data.startswith("tfds:"):
        yield Path(data)
        return
    # Which knows the digits, too.
    from tripletjax.learn.datasets import Catalogue

    with tempfile.TemporaryDirectory() as directory:
        Catalogue.open(data).write(Path(directory))
        yield Path(directory)


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


def _indices_of_pairs(
    protocol: Any, folder: Path, found: evaluation.Embedded
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Numbers of the images of given pairs, by their paths without suffixes."""
    paths = [file.relative_to(found.root).as_posix() for file in found.files]
    outer = found.root.relative_to(folder.resolve()).as_posix() + "/"
    index_of = {_stem(path): number for number, path in enumerate(paths)}
    broken = {
        _stem(line.partition(": ")[0].removeprefix(outer)) for line in found.skipped
    }
    there = index_of.keys() | broken

    def listed(path: str) -> str:
        # All images may lie in one folder, and in none of their own names.
        name = path.rpartition("/")[2]
        return name if path not in there and name in there else path

    pairs = [
        tuple(map(listed, both))
        for both in zip(_stems(protocol.first), _stems(protocol.second))
    ]
    missing = sorted({p for both in pairs for p in both} - index_of.keys() - broken)
    if missing:
        raise FileNotFoundError(
            f"the file of pairs names {len(missing):,} images that are not in "
            f"{folder}, such as {missing[0]}."
        )
    whole = np.array([all(path in index_of for path in both) for both in pairs])
    numbers = [
        [index_of[path] for path in both] for both, ok in zip(pairs, whole) if ok
    ]
    return (
        np.array(numbers, int).reshape(-1, 2),
        protocol.same[whole],
        protocol.fold[whole],
        int((~whole).sum()),
    )


def _stem(path: str) -> str:
    return path.rpartition(".")[0]


def _stems(paths: Sequence[str]) -> list[str]:
    return [_stem(path) for path in paths]


def _intervals(
    pairs: PairDistances, fars: Sequence[float], replicates: int, progress: bool
) -> dict[str, Any]:
    """What the rates would be of other people, in percent."""
    shown = tuple(f for f in fars if f * len(pairs.different) >= NEEDED)
    drawn = pairs.bootstrap(shown or (1.0,), replicates, progress=progress)

    def interval(values: ArrayLike, scale: float = 100) -> list[float] | None:
        values = np.asarray(values)
        if np.isnan(values).all():
            return None
        sides = (1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2
        return [scale * float(x) for x in np.nanquantile(values, sides)]

    return {
        "confidence": CONFIDENCE,
        "replicates": replicates,
        "by": "classes, drawn with replacement",
        "equal_error_rate": interval(drawn.equal_error_rate),
        "area_under_roc": interval(drawn.area_under_roc),
        "at_far": [
            {
                "far": 100 * far,
                "tar": interval(drawn.tar_at_far[:, i]),
                "threshold": interval(drawn.thresholds[:, i], 1),
            }
            for i, far in enumerate(shown)
        ],
    }


def _folds(
    pairs: PairDistances, found: evaluation.Embedded, fold: np.ndarray | None
) -> dict[str, Any] | None:
    """Accuracy of each fold with the threshold of the others, in percent."""
    if fold is not None:
        # Of given pairs, the same ones come first.
        by = "folds of the file of pairs"
        distances, same = pairs.listed
        folds = int(fold.max()) + 1
    else:
        by = "folds of classes, with as many same as different pairs"
        distances, same, fold, folds = _own_folds(pairs, found.labels)
    if folds < 2:
        return None
    result = tj.verification.k_fold_accuracy(distances, same, folds=folds, fold=fold)
    return {
        "folds": folds,
        "by": by,
        "pairs": len(distances),
        "accuracy": evaluation.percent(result.accuracy),
        "standard_error": evaluation.percent(result.standard_error),
    }


def _own_folds(
    pairs: PairDistances, labels: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Pairs within folds that share no class, as many the same as different."""
    draw = np.random.default_rng(0)
    several = np.unique(labels[pairs.same_images[:, 0]])
    folds = min(FOLDS, len(several) // 2)
    of_class = np.full(labels.max() + 1, -1)
    if folds >= 2:
        of_class[draw.permutation(several)] = np.arange(len(several)) % folds
    where = of_class[labels]
    distances, same, fold = [], [], []
    for k in range(folds):
        chosen = []
        for images, values in (
            (pairs.same_images, pairs.same),
            (pairs.different_images, pairs.different),
        ):
            within = np.flatnonzero((where[images] == k).all(axis=1))
            chosen.append(values[draw.permutation(within)[:IN_FOLD]])
        count = min(map(len, chosen))
        for kind, values in zip((True, False), chosen):
            distances.append(values[:count])
            same.append(np.full(count, kind))
            fold.append(np.full(count, k))
    if not distances:
        return np.zeros(0), np.zeros(0, bool), np.zeros(0, int), 0
    return np.concatenate(distances), np.concatenate(same), np.concatenate(fold), folds


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
