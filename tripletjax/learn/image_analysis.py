"""What images show: continuous tones or strokes, and where in them classes differ."""

import dataclasses

import numpy as np

# Of a photograph, at least this share of the pixels is in smooth, changing tones. In
# the median image of drawings, scans and icons it is below a tenth.
TONES = 0.15
# So many images tell what all are like; classes of so many tell where they differ.
SAMPLE = 256
LAYOUT_SAMPLE, LAYOUT_CLASSES = 4096, 8
# A grid of so many cells each way, in which orientations of edges are summed.
CELLS, ORIENTATIONS = 16, 8
# Below this share of the variance, images have no common layout. What lies around the
# peak with at least half its share is looked at, and a cell more each way.
LAYOUT = 0.15


@dataclasses.dataclass(frozen=True)
class Box:
    """A part of every image, as shares of its height and width."""

    top: float = 0.0
    left: float = 0.0
    bottom: float = 1.0
    right: float = 1.0

    def __post_init__(self) -> None:
        inside = 0 <= self.top < self.bottom <= 1 and 0 <= self.left < self.right <= 1
        if not inside:
            raise ValueError(
                "a box must have 0 <= top < bottom <= 1 and 0 <= left < right <= 1, "
                f"got {dataclasses.astuple(self)}."
            )

    @property
    def whole(self) -> bool:
        return self == Box()

    def pixels(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Top, left, bottom and right in whole pixels, at least one each way."""
        top = min(int(self.top * height), height - 1)
        left = min(int(self.left * width), width - 1)
        bottom = max(top + 1, round(self.bottom * height))
        right = max(left + 1, round(self.right * width))
        return top, left, bottom, right


def tone_share(images: np.ndarray) -> float:
    """The share of pixels that lie in smooth, changing tones, in the median image.

    Such a pixel differs from its neighbours, but by less than a tenth of the image's
    range, and is neither nearly black nor nearly white in it. Photographs are made of
    them; strokes and flat areas have none but where their edges are smoothed.

    Args:
        images: uint8 ``[n, height, width, channels]``.
    """
    x = images.mean(axis=-1)
    low, high = np.percentile(x, [1, 99], axis=(1, 2), keepdims=True)
    extent = np.maximum(high - low, 8)
    inner = x[:, :-1, :-1]
    steps = np.maximum(np.abs(x[:, 1:, :-1] - inner), np.abs(x[:, :-1, 1:] - inner))
    middle = (inner > low + 0.1 * extent) & (inner < high - 0.1 * extent)
    smooth = (steps > 0) & (steps < 0.1 * extent)
    return float(np.median((middle & smooth).mean(axis=(1, 2))))


def where_classes_differ(images: np.ndarray, labels: np.ndarray) -> tuple[Box, str]:
    """The part of aligned images that tells their classes apart, and why it is that.

    In each cell of a grid, the share of the variance of the orientations of edges that
    is between classes, and not within them: ``B / (B + W)``. Where images are not of
    one layout it is near 0 everywhere, and the box is the whole image.

    Args:
        images: uint8 ``[n, height, width, channels]``.
        labels: integers ``[n]``.
    """
    values, classes, counts = np.unique(labels, return_inverse=True, return_counts=True)
    many = counts > 1
    if many.sum() < LAYOUT_CLASSES or len(values) < 2 * LAYOUT_CLASSES:
        return Box(), "too few classes to tell where they differ"
    if min(images.shape[1:3]) < CELLS:
        return Box(), "images too small to look at a part of them"
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
        return Box(), "classes differ nowhere in particular"
    box = _around_peak(share)
    if (box.bottom - box.top) * (box.right - box.left) > 0.8:
        return Box(), "classes differ all over the image"
    return box, (
        "there edges differ most between classes "
        f"({100 * peak:.0f} % of their variance at the peak)"
    )


def _edges(images: np.ndarray) -> np.ndarray:
    """Energies of edges by orientation ``[n, CELLS, CELLS, ORIENTATIONS]``."""
    n, height, width, _ = images.shape
    angles = 2 * np.pi * np.arange(ORIENTATIONS) / ORIENTATIONS
    rows, columns = (np.arange(CELLS) * side // CELLS for side in (height, width))
    energies = np.empty((n, CELLS, CELLS, ORIENTATIONS), np.float32)
    for start in range(0, n, SAMPLE):
        x = images[start : start + SAMPLE].mean(axis=-1, dtype=np.float32)
        down, right = np.gradient(x, axis=(1, 2))
        for place, angle in enumerate(angles):
            along = np.maximum(right * np.cos(angle) + down * np.sin(angle), 0)
            cells = np.add.reduceat(np.add.reduceat(along, rows, 1), columns, 2)
            energies[start : start + SAMPLE, ..., place] = cells
    # Square roots, and relative to the image: contrast tells nothing of the class.
    return np.sqrt(energies / (energies.mean(axis=(1, 2, 3), keepdims=True) + 1e-6))


def _blurred(x: np.ndarray) -> np.ndarray:
    """Sums over 3 x 3 cells."""
    padded = np.pad(x, 1, mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3))
    return windows.sum(axis=(2, 3))


def _around_peak(share: np.ndarray) -> Box:
    """The box of the cells of half the peak that hang together with it."""
    high = share > share.max() / 2
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
    return Box(*(float(cell / CELLS) for cell in (top, left, bottom, right)))
