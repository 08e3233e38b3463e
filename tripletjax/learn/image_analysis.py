"""What images show: continuous tones or strokes, and where in them classes differ."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

# Of a photograph, at least this share of the pixels is in smooth, changing tones. In
# the median image of drawings, scans and icons it is below a tenth.
TONES = 0.15
# What images may be.
KINDS = ("photos", "characters")
# Images are looked at in so many pixels, and so many at a time.
LOOK_SIZE, AT_A_TIME = 128, 256
# So many classes of several images tell where they differ, of at most so many images.
LAYOUT_CLASSES, LAYOUT_IMAGES = 8, 4096
# A grid of so many cells each way, in which orientations of edges are summed.
CELLS, ORIENTATIONS = 16, 8
# Below this share of the variance, images have no common layout. What lies around the
# peak with at least so much of its share is looked at, and a cell more each way.
LAYOUT, NEAR_PEAK = 0.15, 0.4


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where in images classes differ.

    Attributes:
        box: top, left, bottom and right, as shares of the height and the width.
        aligned: whether images have a common layout, so that places mean something.
        why: what the box was chosen by.
    """

    box: tuple[float, float, float, float]
    aligned: bool
    why: str


WHOLE = (0.0, 0.0, 1.0, 1.0)


def tone_share(image: Image.Image) -> float:
    """The share of an image's pixels that lie in smooth, changing tones.

    Such a pixel differs from its neighbours, but by less than a tenth of the image's
    range, and is neither nearly black nor nearly white in it. Photographs are made of
    them; strokes and flat areas have none but where their edges are smoothed.
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
    """What images are, by their `tone_share`, and why: photos or characters."""
    share = float(np.median(shares))
    told = (
        f"{100 * share:.0f} % of the median image's pixels are smooth, changing tones"
    )
    return ("photos" if share >= TONES else "characters"), told


def layout_of(images: np.ndarray, labels: np.ndarray) -> Layout:
    """The part of aligned images that tells their classes apart.

    In each cell of a grid, the share of the variance of the orientations of edges that
    is between classes, and not within them: ``B / (B + W)``. Where images are not of
    one layout it is near 0 everywhere, and the box is the whole image.

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
    x = _edges(images)
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
    told = f"{100 * peak:.0f} % of the variance of edges is between classes at the peak"
    box = _around_peak(share)
    if (box[2] - box[0]) * (box[3] - box[1]) > 0.8:
        return Layout(WHOLE, True, f"classes differ all over: {told}")
    return Layout(box, True, f"there classes differ: {told}")


def most_turns(images: np.ndarray, labels: np.ndarray) -> int:
    """Into how many turned and mirrored copies a class can be told apart.

    A transformation makes no other class if it leaves images as near to their class as
    its other images are, in half of them or more: a heart is its own mirror image.

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
            usual = ((own[:, None] - own) ** 2).sum(axis=-1)
            np.fill_diagonal(usual, np.inf)
            then = ((turned[:, None] - own) ** 2).sum(axis=-1)
            near.append(then.min(axis=1) <= usual.min(axis=1))
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
    """An image in a few smooth pixels."""
    grey = Image.fromarray(image.mean(axis=-1).astype(np.uint8))
    return np.asarray(
        grey.resize((CELLS, CELLS), Image.Resampling.BILINEAR), np.float32
    )


def _edges(images: np.ndarray) -> np.ndarray:
    """Energies of edges by orientation ``[n, CELLS, CELLS, ORIENTATIONS]``."""
    n, height, width, _ = images.shape
    angles = 2 * np.pi * np.arange(ORIENTATIONS) / ORIENTATIONS
    rows, columns = (np.arange(CELLS) * side // CELLS for side in (height, width))
    energies = np.empty((n, CELLS, CELLS, ORIENTATIONS), np.float32)
    for start in range(0, n, AT_A_TIME):
        x = images[start : start + AT_A_TIME].mean(axis=-1, dtype=np.float32)
        down, right = np.gradient(x, axis=(1, 2))
        for place, angle in enumerate(angles):
            along = np.maximum(right * np.cos(angle) + down * np.sin(angle), 0)
            cells = np.add.reduceat(np.add.reduceat(along, rows, 1), columns, 2)
            energies[start : start + AT_A_TIME, ..., place] = cells
    # Square roots, and relative to the image: contrast tells nothing of the class.
    return np.sqrt(energies / (energies.mean(axis=(1, 2, 3), keepdims=True) + 1e-6))


def _blurred(x: np.ndarray) -> np.ndarray:
    """Sums over 3 x 3 cells."""
    padded = np.pad(x, 1, mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3))
    return windows.sum(axis=(2, 3))


def _around_peak(share: np.ndarray) -> tuple[float, float, float, float]:
    """The box of the cells with a share near the peak's that hang together with it."""
    high = share > NEAR_PEAK * share.max()
    reached = np.zeros_like(high)
    reached[np.unravel_index(share.argmax(), share.shape)] = True
    while True:
        grown = reached.copy()
        grown[1:] |= reached[:-1]
        grown[:-1] |= reached[1:]
        grown[:, 1:] |= reached[:, :-1]
        grown[:, :-1] |= reached[:, 1:]
        grown &= high
        if (grown == reached).all():
            break
        reached = grown
    sides = []
    for axis in (1, 0):
        cells = np.flatnonzero(reached.any(axis=axis))
        sides.append((max(0, cells[0] - 1), min(CELLS, cells[-1] + 2)))
    (top, bottom), (left, right) = sides
    return tuple(float(cell / CELLS) for cell in (top, left, bottom, right))
