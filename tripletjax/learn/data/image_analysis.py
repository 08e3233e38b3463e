"""Analysis of images: photos or characters, and the part where classes differ."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

from tripletjax.learn.data.image_array import ImageSource
from tripletjax.learn.data.image_shape import WHOLE, Box

# The least share of smooth, changing tones in a photograph. In the median image of
# drawings, scans and icons the share is below a tenth.
TONES = 0.15
# The longer side of images for tones, in pixels, and the number of images at a time.
LOOK_SIZE, AT_A_TIME = 128, 256
# The least number of classes of several images for a layout, and the most images.
LAYOUT_CLASSES, LAYOUT_IMAGES = 8, 4096
# The cells of a grid each way, and the orientations of edges that are summed in each.
CELLS, ORIENTATIONS = 16, 8
# The least share of the variance between classes if images have a common layout.
LAYOUT = 0.15
# Parts of images are compared by at most JUDGED images, JUDGED_EACH of a class, in a
# grid of PART_CELLS cells each way, by COMPONENTS principal components.
JUDGED, JUDGED_EACH, PART_CELLS, COMPONENTS = 2048, 10, 12, 100
# The shrinkage of the covariance within classes towards a multiple of the identity.
SHRINKAGE = 0.1
# The longer side of images for these edges, in pixels.
JUDGED_SIZE = 64
# A part has at least LEAST_CELLS of `CELLS` each way. It replaces a wider one if its
# error is smaller by the share NARROWER, and the whole by the share WORTHWHILE.
LEAST_CELLS, NARROWER, WORTHWHILE = 8, 0.01, 0.1


@dataclasses.dataclass(frozen=True)
class Layout:
    """The part of images where classes differ.

    Attributes:
        box: top, left, bottom and right, as shares of the height and the width.
        aligned: whether images have a common layout, so that positions are comparable.
        why: the reason for the box.
    """

    box: Box
    aligned: bool
    why: str


def tone_share(image: Image.Image) -> float:
    """The share of an image's pixels that lie in smooth, changing tones.

    Such a pixel differs from its neighbours by less than a tenth of the image's range,
    and is neither nearly black nor nearly white. Photographs consist of them. Strokes
    and flat areas have them only at smoothed edges.
    """
    image = image.convert("RGB")
    image.thumbnail((LOOK_SIZE, LOOK_SIZE))
    x = np.asarray(image, np.float32).mean(axis=-1)
    if min(x.shape) < 2:
        return 0.0
    low, high = np.percentile(x, [1, 99])
    extent = max(high - low, 8.0)
    inner = x[:-1, :-1]
    steps = np.maximum(np.abs(x[1:, :-1] - inner), np.abs(x[:-1, 1:] - inner))
    middle = (inner > low + 0.1 * extent) & (inner < high - 0.1 * extent)
    smooth = (steps > 0) & (steps < 0.1 * extent)
    return float((middle & smooth).mean())


def kind_of(shares: Sequence[float]) -> tuple[str, str]:
    """The kind of images by their `tone_share`, and the reason."""
    share = float(np.median(shares))
    why = f"{100 * share:.0f} % of the median image's pixels are smooth, changing tones"
    return ("photos" if share >= TONES else "characters"), why


def layout_of(images: ImageSource, labels: np.ndarray) -> Layout:
    """Find the part of aligned images that tells their classes apart.

    In each cell of a grid, ``B / (B + W)`` is the share of the variance of oriented
    edges that is between classes, not within them. Without a common layout the share is
    near 0 everywhere, and the box is the whole image. Otherwise the box is the part
    whose edges verify classes of other images with the least error, enlarged by one
    cell each way. If the whole image is about as good, the box is the whole image.

    Args:
        images: uint8 ``[n, height, width, channels]``.
        labels: integers ``[n]``.
    """
    _, classes, counts = np.unique(labels, return_inverse=True, return_counts=True)
    many = counts > 1
    if many.sum() < LAYOUT_CLASSES:
        return Layout(WHOLE, False, "too few classes to tell where they differ")
    if min(images.shape[1:3]) < CELLS:
        return Layout(WHOLE, False, "too few pixels to tell where classes differ")
    if len(labels) > LAYOUT_IMAGES:
        # Whole classes, those of several images first, as the images lie.
        order = np.lexsort((np.arange(len(labels)), classes, ~many[classes]))
        kept = np.sort(order[:LAYOUT_IMAGES])
        return layout_of(images[kept], labels[kept])
    pixels = images[:]
    x = _edges(pixels)
    order = np.argsort(classes, kind="stable")
    starts = np.cumsum(counts) - counts
    means = np.add.reduceat(x[order], starts) / counts[:, None, None, None]
    squares = np.add.reduceat(((x - means[classes]) ** 2)[order], starts)[many]
    within = (squares / (counts[many] - 1)[:, None, None, None]).mean(axis=0)
    between = means.var(axis=0, ddof=1) - within * (1 / counts).mean()
    within, between = (_blurred(v.sum(axis=-1)) for v in (within, between))
    between = np.maximum(between, 0)
    share = between / np.maximum(between + within, 1e-12)
    peak = share.max()
    if peak < LAYOUT:
        return Layout(WHOLE, False, "classes differ nowhere in particular")
    judge = _Judge(pixels, classes)
    box, error = _narrowed(judge)
    whole = judge(WHOLE_CELLS)
    if whole - error < max(WORTHWHILE * whole, 0.01):
        return Layout(WHOLE, True, "no part of the image tells classes apart better")
    why = (
        "edges tell classes apart best there, with "
        f"{100 * error:.0f} % of the pairs in the wrong order instead of "
        f"{100 * whole:.0f} % over the whole image"
    )
    # A network uses a little of the surroundings, too.
    top, left, bottom, right = box
    wider = (
        max(0, top - 1) / CELLS,
        max(0, left - 1) / CELLS,
        min((bottom + 1) / CELLS, 1.0),
        min((right + 1) / CELLS, 1.0),
    )
    return Layout(wider, True, why)


def most_turns(images: ImageSource, labels: np.ndarray) -> int:
    """The number of turned and mirrored copies that make classes of their own.

    A transformation makes no new class if half of the images or more stay as near to
    their class as its other images: a heart is its own mirror image.

    Args:
        images: uint8 ``[n, height, width, channels]``.
        labels: integers ``[n]``.

    Returns:
        8 for quarter turns and their mirror images, 4 for quarter turns, 2 for half
        turns, 1 for none; at most 2 for images that are not square.
    """
    square = images.shape[1] == images.shape[2]
    _, classes, counts = np.unique(labels, return_inverse=True, return_counts=True)
    order = np.flatnonzero(counts[classes] > 1)[:LAYOUT_IMAGES]
    x = np.stack([_thumbnail(image) for image in images[order]]) if len(order) else None
    if x is None:
        return 8 if square else 2
    members = [np.flatnonzero(classes[order] == c) for c in np.unique(classes[order])]
    members = [rows for rows in members if len(rows) > 1]

    def alike(transform: Callable[[np.ndarray], np.ndarray]) -> bool:
        near = []
        for rows in members:
            own = x[rows].reshape(len(rows), -1)
            turned = transform(x[rows]).reshape(len(rows), -1)
            before = ((own[:, None] - own) ** 2).sum(axis=-1)
            np.fill_diagonal(before, np.inf)
            after = ((turned[:, None] - own) ** 2).sum(axis=-1)
            near.append(after.min(axis=1) <= before.min(axis=1))
        return np.concatenate(near).mean() >= 0.5

    def quarter(times: int, *, mirrored: bool = False) -> bool:
        mirror = slice(None, None, -1) if mirrored else slice(None)
        return alike(lambda x: np.rot90(x, times, axes=(1, 2))[:, :, mirror])

    if quarter(2):
        return 1
    if not square or quarter(1) or quarter(3):
        return 2
    return 4 if any(quarter(times, mirrored=True) for times in range(4)) else 8


def _thumbnail(image: np.ndarray) -> np.ndarray:
    """A grey image of `CELLS` pixels each way."""
    grey = Image.fromarray(image.mean(axis=-1).astype(np.uint8))
    return np.asarray(
        grey.resize((CELLS, CELLS), Image.Resampling.BILINEAR), np.float32
    )


def _edges(images: np.ndarray) -> np.ndarray:
    """Energies of edges by orientation ``[n, CELLS, CELLS, ORIENTATIONS]``."""
    n, height, width, _ = images.shape
    rows, columns = (np.arange(CELLS) * side // CELLS for side in (height, width))
    energies = np.empty((n, CELLS, CELLS, ORIENTATIONS), np.float32)
    for start in range(0, n, AT_A_TIME):
        x = images[start : start + AT_A_TIME].mean(axis=-1, dtype=np.float32)
        for index, along in enumerate(_oriented(x)):
            cells = np.add.reduceat(np.add.reduceat(along, rows, 1), columns, 2)
            energies[start : start + AT_A_TIME, ..., index] = cells
    return _relative(energies)


def _oriented(x: np.ndarray) -> Iterator[np.ndarray]:
    """Edges in grey images ``[n, height, width]``, by orientation."""
    down, right = np.gradient(x, axis=(1, 2))
    for angle in 2 * np.pi * np.arange(ORIENTATIONS) / ORIENTATIONS:
        yield np.maximum(right * np.cos(angle) + down * np.sin(angle), 0)


def _relative(energies: np.ndarray) -> np.ndarray:
    """Square roots, relative to the image, so that contrast does not count."""
    return np.sqrt(energies / (energies.mean(axis=(1, 2, 3), keepdims=True) + 1e-6))


def _blurred(x: np.ndarray) -> np.ndarray:
    """Sums over 3 x 3 cells."""
    padded = np.pad(x, 1, mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3))
    return windows.sum(axis=(2, 3))


class _Judge:
    """The error with which edges in a part of images verify other classes.

    The error is 1 - AUC of pairs of images, by the cosine of principal components of
    the edges, whitened by the covariance within other classes, as in LDA.

    Args:
        images: uint8 ``[n, height, width, channels]``.
        classes: integers ``[n]``.
    """

    def __init__(self, images: np.ndarray, classes: np.ndarray):
        rank = np.empty(len(classes), int)
        for c in np.unique(classes):
            members = np.flatnonzero(classes == c)
            rank[members] = np.arange(len(members))
        several = np.bincount(classes)[classes] > 1
        # Whole classes, in an order that does not depend on their names.
        order = np.random.default_rng(0).permutation(classes.max() + 1)[classes]
        kept = np.flatnonzero(several & (rank < JUDGED_EACH))
        kept = np.sort(kept[np.argsort(order[kept], kind="stable")][:JUDGED])
        self.classes = order[kept]
        self.sums = _summed_edges(images[kept])
        values = np.unique(self.classes)
        folds = 2 if len(values) >= 100 else 4
        self.folds = [np.isin(self.classes, values[k::folds]) for k in range(folds)]
        self.errors: dict[Cells, float] = {}

    def __call__(self, box: "Cells") -> float:
        if box not in self.errors:
            x = self._components(box)
            errors = [self._error(x, test) for test in self.folds]
            self.errors[box] = float(np.mean(errors))
        return self.errors[box]

    def _components(self, box: "Cells") -> np.ndarray:
        # The import takes a second.
        from sklearn.decomposition import PCA

        n, height, width, _ = self.sums.shape
        top, left, bottom, right = box
        rows, columns = (
            np.linspace(
                low / CELLS * (side - 1), high / CELLS * (side - 1), PART_CELLS + 1
            )
            .round()
            .astype(int)
            for low, high, side in ((top, bottom, height), (left, right, width))
        )
        corners = self.sums[:, rows][:, :, columns]
        # Differences of sums may round to less than 0.
        cells = np.maximum(np.diff(np.diff(corners, axis=1), axis=2), 0)
        x = _relative(cells).reshape(n, -1)
        return PCA(min(COMPONENTS, n), svd_solver="full").fit_transform(x)

    def _error(self, x: np.ndarray, test: np.ndarray) -> float:
        from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
        from sklearn.metrics import roc_auc_score
        from sklearn.preprocessing import normalize

        lda = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=SHRINKAGE)
        lda.fit(x[~test], self.classes[~test])
        # Images of a class may all be the same.
        least = 1e-6 * x.var() + 1e-12
        within = lda.covariance_ + least * np.eye(x.shape[1])
        whitening = np.linalg.inv(np.linalg.cholesky(within)).T
        y = normalize((x[test] - lda.means_.mean(axis=0)) @ whitening)
        rows, columns = np.triu_indices(len(y), 1)
        classes = self.classes[test]
        same = classes[rows] == classes[columns]
        return 1 - roc_auc_score(same, (y @ y.T)[rows, columns])


# Top, left, bottom and right, in `CELLS`.
Cells = tuple[int, int, int, int]
WHOLE_CELLS: Cells = (0, 0, CELLS, CELLS)


def _narrowed(judge: Callable[[Cells], float]) -> tuple[Cells, float]:
    """The box with the least error, by moving sides of the whole image step by step."""
    box, error = WHOLE_CELLS, judge(WHOLE_CELLS)
    sides = np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, -1, 0], [0, 0, 0, -1]])
    moves = [*sides, sides[0] + sides[2], sides[1] + sides[3], sides.sum(axis=0)]
    for step in (2, 1):
        while True:
            near = [np.array(box) + step * way * m for m in moves for way in (1, -1)]
            boxes: list[Any] = [
                tuple(int(x) for x in other)
                for other in near
                if other.min() >= 0
                and other.max() <= CELLS
                and min(other[2] - other[0], other[3] - other[1]) >= LEAST_CELLS
            ]
            best = min(boxes, key=judge)
            if judge(best) >= (1 - NARROWER) * error:
                break
            box, error = best, judge(best)
    return box, error


def _summed_edges(images: np.ndarray) -> np.ndarray:
    """Integral images of the energies of edges, after scaling to `JUDGED_SIZE`.

    ``[n, height + 1, width + 1, ORIENTATIONS]``.
    """
    _, height, width, _ = images.shape
    scale = min(1.0, JUDGED_SIZE / max(height, width))
    size = max(2, round(scale * width)), max(2, round(scale * height))
    small = np.stack(
        [
            np.asarray(
                Image.fromarray(image.mean(axis=-1).astype(np.uint8)).resize(
                    size, Image.Resampling.BOX
                ),
                np.float32,
            )
            for image in images
        ]
    )
    sums = np.zeros((len(small), size[1] + 1, size[0] + 1, ORIENTATIONS), np.float32)
    for start in range(0, len(small), AT_A_TIME):
        edges = _oriented(small[start : start + AT_A_TIME])
        for index, along in enumerate(edges):
            sums[start : start + AT_A_TIME, 1:, 1:, index] = along.cumsum(1).cumsum(2)
    return sums
