"""Evaluation of an embedding on a folder of classes.

A report has, for all readable images,

- retrieval: every image is a query for the others of its class;
- verification: every pair of images is of the same class or of different ones;
- collapse: the spread of the embeddings.

Rates are in percent, distances between unit vectors. Undefined values are None.
"""

import dataclasses
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

import tripletjax as tj
from tripletjax.learn import plots
from tripletjax.learn.counts import counted
from tripletjax.learn.data import image_files
from tripletjax.learn.data.class_folders import ClassFolders, find_classes
from tripletjax.learn.data.folder_listing import printable
from tripletjax.learn.data.image_shape import ImageSpec
from tripletjax.learn.embedder import Embedder, ImageEmbedder, load_embedder
from tripletjax.learn.files import digest_of_image, filled
from tripletjax.learn.reports import PREFIX, check_empty, number, percent, write_report
from tripletjax.verification import VerificationMetrics

KS = (1, 2, 4, 8)
# False accept rates of a report, if there are enough pairs to measure them.
FARS = tuple(10.0**-digits for digits in range(1, 7))
# Images of the picture of neighbours, and images whose pairs with all others are in the
# picture of distances, at most.
GALLERY, ROWS = 2048, 4096
# Images of each query that are re-ranked, at least, and at most for large classes.
RERANKED, MOST_RERANKED = 100, 1000
# Rows of pairs that are compared at a time.
BLOCK = 256
# Bins of a histogram of distances.
STEPS = 2000
REPORT = f"{PREFIX}evaluation"
# The shape of images in a picture whose embedder leaves their size as it is.
SHOWN = ImageSpec(96, 96, 3)


@dataclasses.dataclass(frozen=True)
class Embedded:
    """The images of a folder, embedded.

    Attributes:
        x: unit vectors ``[n, d]``.
        labels: int32 ``[n]``.
        names: of the classes.
        files: of the images.
        root: the folder that holds the classes: the data folder, or one within it.
        shown: numbers of the images that are kept for a picture, in order.
        images: these images, uint8 ``[k, height, width, channels]``.
        first_copy: integers ``[n]``, the first image with the same prepared pixels.
        skipped: skipped files, with reasons.
        notes: on the classes and images.
    """

    x: np.ndarray
    labels: np.ndarray
    names: tuple[str, ...]
    files: tuple[Path, ...]
    root: Path
    shown: np.ndarray
    images: np.ndarray
    first_copy: np.ndarray
    skipped: tuple[str, ...]
    notes: tuple[str, ...]


def evaluate(
    source: str | Path | ImageEmbedder,
    folder: str | Path,
    *,
    out: str | Path | None = None,
    classes_from: str | None = None,
    rerank: bool = False,
    progress: bool = False,
) -> dict[str, Any]:
    """Evaluate an embedding on a folder of classes.

    Args:
        source: a run directory, or any embedder.
        folder: one folder of images per class.
        out: a new or empty directory for ``report.json``, ``roc.png``,
            ``distances.png`` and ``neighbors.png``; None writes nothing.
        classes_from: the level of nested folders that makes classes, as in
            `datasets.load`.
        rerank: whether to measure retrieval with re-ranking, too.
        progress: whether to show a progress bar.

    Returns:
        The report: the embedder and the folder, and the metrics of ``retrieval``,
        ``verification`` and ``collapse``; with `rerank` those of ``reranked``, too.

    Raises:
        FileNotFoundError: if there is no trained model, or the folder does not exist.
        FileExistsError: if `out` exists and is not an empty directory.
        ValueError: if the folder has fewer than two readable classes.
        OSError: if a file cannot be written.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"folder {folder} does not exist.")
    if out is not None:
        out = Path(out)
        check_empty(out)
    embedder = load_embedder(source) if isinstance(source, str | Path) else source
    images = embed_folder(
        embedder, folder, keep=GALLERY, classes_from=classes_from, progress=progress
    )
    notes, run_dir = [*images.notes], None
    if isinstance(embedder, Embedder):
        run_dir = embedder.run_dir
        notes += note_on_seen_names(images.names, embedder.record.seen_names)
    notes += filter(None, [note_on_sizes(images.labels)])
    pairs = verification(images.x, images.labels)
    report = {
        "what": REPORT,
        "run": None if run_dir is None else str(run_dir),
        "embedder": embedder.key,
        "data": str(folder.resolve()),
        "images": len(images.labels),
        "classes": len(images.names),
        "retrieval": retrieval(images.x, images.labels),
        "verification": pairs,
        "collapse": {
            name: number(value)
            for name, value in tj.collapse.report(images.x)._asdict().items()
        },
        "notes": notes,
        "skipped": list(images.skipped),
    }
    if rerank:
        report["reranked"] = reranked_retrieval(images.x, images.labels)
    if out is not None:
        with filled(out) as part:
            draw(images, pairs, part)
            write_report(report, part / "report.json")
    return report


def embed_folder(
    embedder: ImageEmbedder,
    folder: Path,
    *,
    choose: Callable[[str, str], bool] | None = None,
    keep: int = 0,
    least: int = 2,
    classes_from: str | None = None,
    name_of_file: Callable[[str], str] | None = None,
    progress: bool = False,
) -> Embedded:
    """Read and embed a folder of classes, a part at a time.

    Args:
        embedder: from images to vectors.
        folder: one folder of images per class.
        choose: whether an image is read, by its path within the folder that holds the
            classes and the name of its class. If not given, all images are read.
        keep: number of images to keep for a picture.
        least: the least number of classes.
        classes_from: the level of nested folders that makes classes, as in
            `datasets.load`.
        name_of_file: as in `find_classes`.
        progress: whether to show a progress bar.

    Raises:
        ValueError: if fewer classes have readable images.
    """
    listing = find_classes(folder, classes_from, name_of_file=name_of_file)
    if choose is not None:
        paths = (file.relative_to(listing.root).as_posix() for file in listing.files)
        both = zip(paths, map(printable, listing.classes))
        listing = listing.part([i for i, one in enumerate(both) if choose(*one)])
    skipped = [f"{file.name}: not in a folder of a class" for file in listing.loose]
    skipped += listing.skipped
    entries = len(skipped)
    # Before images are read, which takes long.
    _check_classes(folder, {*map(printable, listing.classes)}, least)
    x, kept, images, first_copy, unreadable = _embed_files(
        embedder, listing, keep=keep, progress=progress
    )
    skipped += unreadable
    copies = int(np.count_nonzero(first_copy != np.arange(len(first_copy))))
    names, labels = np.unique(
        [printable(listing.classes[index]) for index in kept], return_inverse=True
    )
    _check_classes(folder, names, least)
    notes = [*listing.notes, *listing.left_out]
    if copies:
        notes.append(
            counted(copies, "image is a copy", "images are copies")
            + " of others: within a class they raise the metrics, between classes "
            "they lower them"
        )
    if unreadable:
        notes.append(counted(len(unreadable), "image is skipped", "images are skipped"))
    if entries:
        notes.append(
            counted(
                entries,
                "entry that is no image of a class is skipped",
                "entries that are no images of a class are skipped",
            )
        )
    if not np.isfinite(x).all():
        raise ValueError("the embedder returned a vector that is not finite.")
    rows = np.array(sorted(images))
    return Embedded(
        x,
        labels.astype(np.int32),
        tuple(map(str, names)),
        tuple(listing.files[index] for index in kept),
        listing.root,
        rows,
        np.stack([images[row] for row in rows]) if keep else np.zeros((0, 1, 1, 1)),
        first_copy,
        tuple(skipped),
        tuple(notes),
    )


def _check_classes(folder: Path, names: Collection[str], least: int) -> None:
    """Raise ValueError if a folder has fewer classes."""
    if len(names) < least:
        raise ValueError(
            f"{folder} must have at least {least} folders of readable images, one per "
            f"class, got {len(names)}."
        )


def _embed_files(
    embedder: ImageEmbedder, listing: ClassFolders, *, keep: int, progress: bool
) -> tuple[np.ndarray, list[int], dict[int, np.ndarray], np.ndarray, list[str]]:
    """Read and embed the files of a listing, a part at a time.

    Returns:
        Vectors; the numbers of the readable files; `keep` random images by row of
        their vectors; the first copy of each image; and the unreadable files.
    """
    order = np.random.default_rng(0).permutation(len(listing.files))
    shown = {*order[:keep].tolist()}
    x, kept, images, unreadable = [], [], {}, []
    first_of: dict[str, int] = {}
    first_copy: list[int] = []

    def read(file: Path) -> Any:
        return embedder.prepare(image_files.open_image(file))

    with tqdm(
        total=len(listing.files), desc="embedding", unit="image", disable=not progress
    ) as bar:
        for indices, results in image_files.read_ahead(listing.files, read):
            prepared = []
            for index, image in zip(indices, results):
                if isinstance(image, OSError):
                    unreadable.append(f"{printable(listing.paths[index])}: {image}")
                    continue
                kept.append(index)
                prepared.append(image)
                pixels = np.asarray(image)
                content = f"{pixels.shape} {digest_of_image(pixels)}"
                first_copy.append(first_of.setdefault(content, len(first_copy)))
                if index in shown:
                    images[len(kept) - 1] = _shown_pixels(image)
            if prepared:
                x.append(embedder.embed(prepared))
            bar.update(len(indices))
    vectors = np.concatenate(x) if x else np.zeros((0, 1), np.float32)
    return vectors, kept, images, np.array(first_copy, int), unreadable


def _shown_pixels(prepared: Any) -> np.ndarray:
    """A prepared image for a picture; images of Pillow get one size."""
    return SHOWN.fit(prepared) if isinstance(prepared, Image.Image) else prepared


def retrieval(x: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Retrieval metrics with every image as a query, in percent."""
    metrics = tj.retrieval.evaluate(x, labels, ks=KS)
    return {
        "map_at_r": percent(metrics.map_at_r),
        "r_precision": percent(metrics.r_precision),
        "recall_at_k": {
            str(k): percent(value) for k, value in metrics.recall_at_k.items()
        },
        "mean_average_precision": percent(metrics.mean_average_precision),
        "mean_reciprocal_rank": percent(metrics.mean_reciprocal_rank),
        "queries": int(metrics.queries),
    }


def reranked_retrieval(x: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Retrieval metrics after re-ranking by k-reciprocal neighbours, in percent.

    The 100 nearest images of each query are re-ranked, or as many as the largest class
    has. MAP@R and R-precision are None if that is more than 1,000.
    """
    n, largest = len(labels), int(np.unique(labels, return_counts=True)[1].max()) - 1
    k = min(n - 1, max(RERANKED, largest if largest <= MOST_RERANKED else 0))
    _, nearest = tj.retrieval.k_reciprocal_distances(x, k=k)
    return metrics_of_ranks(labels, np.asarray(nearest))


def metrics_of_ranks(labels: np.ndarray, nearest: np.ndarray) -> dict[str, Any]:
    """Retrieval metrics of given ranks, in percent, as `retrieval` reports them.

    Args:
        labels: classes of n images, each of which is a query ``[n]``.
        nearest: rows of the first k images of each query, or -1 ``[n, k]``.

    Returns:
        The report. MAP@R and R-precision are None if a class has more than k + 1
        images.
    """
    k = nearest.shape[1]
    relevant = (labels[nearest] == labels[:, None]) & (nearest >= 0)
    _, classes, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    count = sizes[classes] - 1
    relevant, count = relevant[count > 0], count[count > 0]
    empty = not len(count)
    beyond = empty or count.max() > k

    def mean(values: np.ndarray, unknown: bool) -> float | None:
        return None if unknown else percent(np.mean(values))

    precision = np.cumsum(relevant, axis=1) / np.arange(1, k + 1)
    first = relevant & (np.arange(k) < count[:, None])
    return {
        "map_at_r": mean(np.sum(first * precision, axis=1) / count, beyond),
        "r_precision": mean(np.sum(first, axis=1) / count, beyond),
        "recall_at_k": {
            str(one): mean(relevant[:, :one].any(axis=1), empty) for one in KS
        },
        "queries": len(count),
        "images": k,
    }


def verification(x: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Verification metrics of all pairs, in percent; thresholds are distances."""
    counts = np.unique(labels, return_counts=True)[1].astype(float)
    n = counts.sum()
    negatives = (n * n - (counts * counts).sum()) / 2
    fars = tuple(far for far in FARS if far * negatives >= 1)
    metrics = tj.verification.evaluate(x, labels, fars=fars or (1.0,))
    return of_metrics(metrics, fars)


def of_metrics(metrics: VerificationMetrics, fars: Sequence[float]) -> dict[str, Any]:
    """Verification metrics for a report, in percent; thresholds are distances."""
    return {
        "equal_error_rate": percent(metrics.equal_error_rate),
        "area_under_roc": percent(metrics.area_under_roc),
        "accuracy": percent(metrics.accuracy),
        "threshold": number(metrics.threshold),
        "at_far": [
            {"far": 100 * far, "tar": percent(tar), "threshold": number(threshold)}
            for far, tar, threshold in zip(fars, metrics.tar_at_far, metrics.thresholds)
        ],
        "positives": int(metrics.positives),
        "negatives": int(metrics.negatives),
    }


def histograms(x: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """Histograms of distances of pairs of the same and of different classes.

    Returns:
        Counts ``[STEPS]`` of distances from 0 to 2, same and different; and the number
        of images whose pairs with all others are counted.
    """
    n = len(labels)
    rows = np.sort(np.random.default_rng(0).permutation(n)[:ROWS])
    same, different = np.zeros((2, STEPS), np.int64)
    for start in range(0, len(rows), BLOCK):
        some = rows[start : start + BLOCK]
        distances = np.asarray(tj.euclidean(x[some], x))
        steps = np.minimum((distances * (STEPS / 2)).astype(np.int64), STEPS - 1)
        alike = labels[some][:, None] == labels
        others = some[:, None] != np.arange(n)
        same += np.bincount(steps[alike & others], minlength=STEPS)
        different += np.bincount(steps[~alike], minlength=STEPS)
    return same, different, len(rows)


def draw(embedded: Embedded, pairs: dict[str, Any], out: Path) -> None:
    """Draw the pictures of a report."""
    same, different, rows = histograms(embedded.x, embedded.labels)
    different_pairs = counted(pairs["negatives"], "different pair")
    title = f"{pairs['positives']:,} same and {different_pairs}"
    if rows < len(embedded.labels):
        title = f"pairs of {rows:,} images with all others"
    plots.distances(same, different, pairs, out / "distances.png", what=title)
    plots.roc(same, different, pairs, out / "roc.png", what=title)
    plots.neighbors(
        embedded.images,
        embedded.labels[embedded.shown],
        {"this embedding": embedded.x[embedded.shown]},
        embedded.names,
        out / "neighbors.png",
        k=min(8, len(embedded.shown) - 1),
    )


def note_on_seen_names(names: Sequence[str], seen: Sequence[str]) -> list[str]:
    """Note classes whose names are those of classes that a run was trained on."""
    both = sorted({*names} & {*seen})
    if not both:
        return []
    return [
        counted(
            len(both), "class has the name of a class", "classes have names of classes"
        )
        + f" that the run was trained on, such as {both[0]}: if they are the same, "
        "this is no test on unseen classes"
    ]


def note_on_sizes(labels: np.ndarray) -> str | None:
    """Note classes of one image, and a class that makes most pairs."""
    counts = np.unique(labels, return_counts=True)[1]
    pairs = counts * (counts - 1) / 2
    if not pairs.sum():
        return "every class has one image: there are no positives"
    notes = []
    if alone := int((counts == 1).sum()):
        notes.append(
            counted(
                alone,
                "class has one image: the image is a negative only",
                "classes have one image: the images are negatives only",
            )
        )
    share = pairs.max() / pairs.sum()
    if share > 0.25 and len(counts) > 4:
        notes.append(
            f"one class of {counts.max():,} images makes {100 * share:.0f} % of the "
            "pairs of the same class"
        )
    return "; ".join(notes) or None
