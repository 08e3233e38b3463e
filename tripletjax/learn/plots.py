"""Plots of training, and pictures of neighbours, triplets and pairs."""

import functools
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.typing import ArrayLike
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure, FigureBase
from matplotlib.ft2font import FT2Font
from matplotlib.patches import Rectangle

import tripletjax as tj
from tripletjax.learn.data.image_array import ImageSource

# Blue and orange differ for colour-blind readers, too.
RIGHT, WRONG, QUERY, BEYOND = "#0072b2", "#d55e00", "#444444", "#cccccc"
# At this width in inches, type of 10 points is 9 pixels high on a telephone.
WIDTH, TYPE = 5.8, 10
# Images in a row of this width, and pairs.
IMAGES, PAIRS = 6, 3
# The height of a picture with text below, as a multiple of one without.
WITH_TEXT = 1.4
# The largest number of triplets in a picture.
ROWS = 10


def training(lines: Sequence[dict], path: str | Path) -> None:
    """Plot the loss, its share, the spread of embeddings and validation over the steps.

    Args:
        lines: records of the log with a step, and either loss, spread, and active or
            recall_at_1, or validation.
        path: the PNG file to write.
    """
    trained = [line for line in lines if "loss" in line]
    validated = [line for line in lines if line.get("validation")]
    figure = Figure(figsize=(WIDTH, 8 if validated else 6), layout="constrained")
    panels = figure.subplots(4 if validated else 3, 1, sharex=True)
    titles = {
        "loss": "loss",
        "active": "share of active triplets or pairs",
        "recall_at_1": "share of anchors whose nearest reference is a positive",
        "spread": "spread: root mean squared distance",
    }
    names = [name for name in titles if name in trained[0]]
    for axes, name, title in zip(panels, names, map(titles.get, names)):
        steps, values = zip(*((line["step"], line[name]) for line in trained))
        axes.plot(steps, values, color=RIGHT, linewidth=1.2)
        axes.set_title(title, loc="left", fontsize=TYPE)
    if validated:
        panels[-1].set_prop_cycle(color=[RIGHT, WRONG, QUERY])
        steps = [line["step"] for line in validated]
        for name in validated[0]["validation"]:
            values = [line["validation"][name] for line in validated]
            panels[-1].plot(steps, values, marker=".", label=name)
        panels[-1].set_title("validation, in %", loc="left", fontsize=TYPE)
        panels[-1].legend(loc="lower right")
    for axes in panels:
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel("step")
    _save(figure, path)


def neighbors(
    images: np.ndarray,
    labels: np.ndarray,
    embeddings: dict[str, ArrayLike],
    label_names: Sequence[str],
    path: str | Path,
    *,
    what: str = "images",
    k: int = 8,
    queries: int = 6,
) -> None:
    """Draw query images with their nearest neighbours, for each embedding.

    The queries have the worst neighbours by the first embedding, one per class. Classes
    of one image are left out if others have more. The colour of a frame shows whether
    an image is of the query's class. Other classes are grey beyond the number of images
    of the query's class.

    Args:
        images: uint8 ``[n, height, width, channels]``.
        labels: integers ``[n]``.
        embeddings: by name, vectors ``[n, d]``.
        label_names: the name of each label.
        path: the PNG file to write.
        what: the noun for the images in the title.
        k: number of neighbours.
        queries: number of queries.
    """
    indices = np.arange(len(images))
    ranked = {
        name: np.asarray(tj.retrieval.nearest_neighbors(x, x, k, positions=indices)[1])
        for name, x in embeddings.items()
    }
    right = (labels[next(iter(ranked.values()))] == labels[:, None]).mean(axis=1)
    classes, counts = np.unique(labels, return_counts=True)
    several = classes[counts > 1]
    hardest = [
        min(indices[labels == c], key=right.__getitem__)
        for c in (several if len(several) else classes)
    ]
    chosen = sorted(hardest, key=right.__getitem__)[:queries]
    first = next(iter(ranked))

    height = len(ranked) * (0.56 * len(chosen) + 0.4) + 0.6
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    title = (
        f"The {what} with the worst neighbours by {first}. Blue: same class; orange: "
        "another class; light grey: beyond the size of the class"
    )
    if not len(several):
        title = f"The {what} have one image per class: all neighbours differ in class"
    _set_title(figure, title)
    parts = np.atleast_1d(np.asarray(figure.subfigures(len(ranked), 1)))
    for part, (name, neighbor) in zip(parts, ranked.items()):
        axes, _ = _table(
            part, [f"{name}: query and its {k} nearest"], k + 1, len(chosen)
        )
        for row, query in enumerate(chosen):
            options = _text_options(label_names[labels[query]])
            axes.text(0, row + 0.5, **options, ha="right", va="center", fontsize=TYPE)
            others = np.sum(labels == labels[query]) - 1
            for rank, index in enumerate((query, *neighbor[query])):
                same = labels[index] == labels[query]
                wrong = WRONG if rank <= others else BEYOND
                color = QUERY if rank == 0 else RIGHT if same else wrong
                _draw_framed(axes, rank, row, images[index], color)
    _save(figure, path)


def triplets(
    images: ImageSource,
    triplets: np.ndarray,
    distances: dict[str, np.ndarray],
    path: str | Path,
    *,
    what: str = "triplets",
) -> None:
    """Draw triplets in the order of distance: anchor, nearer image, farther image.

    The triplets have the worst order by the first embedding, one per anchor. The frame
    of the positive is blue, that of the negative orange.

    Args:
        images: uint8 ``[n, height, width, channels]``.
        triplets: indices of anchor, positive and negative, ``[t, 3]``.
        distances: by name of an embedding, distances from anchors to positives and to
            negatives, ``[2, t]``.
        path: the PNG file to write.
        what: the noun for the triplets in the title.
    """
    positive, negative = next(iter(distances.values()))
    worst = np.argsort(negative - positive, kind="stable")
    _, first = np.unique(triplets[worst, 0], return_index=True)
    chosen = worst[np.sort(first)][:ROWS]

    columns = 3 * len(distances) + 0.5 * (len(distances) - 1)
    width = max(3.4, 0.9 * columns)
    height = WITH_TEXT * width / columns * len(chosen) + 1
    figure = Figure(figsize=(width, height), layout="constrained")
    _set_title(
        figure,
        f"The {what} in the worst order by {next(iter(distances))}: anchor, nearer, "
        "farther; the positive is blue, the negative orange",
    )
    titles = [
        f"{name}:\n{np.mean(positive < negative):.1%} in order"
        for name, (positive, negative) in distances.items()
    ]
    axes, starts = _table(figure, titles, 3, len(chosen) * WITH_TEXT)
    for start, (positive, negative) in zip(starts, distances.values()):
        for row, index in enumerate(chosen):
            anchor, *pair = triplets[index]
            others = [
                (positive[index], pair[0], RIGHT),
                (negative[index], pair[1], WRONG),
            ]
            others.sort(key=lambda other: other[0])
            for column, (distance, image, color) in enumerate(
                [(None, anchor, QUERY), *others]
            ):
                picture = np.asarray(images[image])
                text = "" if distance is None else f"{distance:.2f}"
                _draw_framed(
                    axes, start + column, row * WITH_TEXT, picture, color, text=text
                )
    _save(figure, path)


def distances(
    same: np.ndarray,
    different: np.ndarray,
    pairs: dict,
    path: str | Path,
    *,
    what: str = "all pairs",
    scale: float = 1,
    threshold: tuple[float, str] | None = None,
    probability: Callable[[np.ndarray], np.ndarray] | None = None,
) -> None:
    """Plot the distances of pairs of the same class and of different classes.

    Args:
        same: number of pairs of the same class, by distance in equal steps from 0 to 2.
        different: number of pairs of different classes, likewise.
        pairs: the verification report, with a threshold for each FAR.
        path: the PNG file to write.
        what: the noun for the pairs in the title.
        scale: the divisor of the distances.
        threshold: the threshold to show and its name; the most accurate one if None.
        probability: the probability of the same class, a function of distances.
    """
    if threshold is None and pairs["threshold"] is not None:
        threshold = pairs["threshold"], "most accurate threshold"
    figure = Figure(figsize=(WIDTH, 4), layout="constrained")
    axes = figure.subplots()
    # Steps are joined, so that the line is smooth.
    width = len(same) // 100
    edges = np.linspace(0, 2 * scale, len(same) // width + 1)
    both = np.flatnonzero(same + different)
    furthest = (
        edges[min(both[-1] // width + 2, len(edges) - 1)] if len(both) else 2 * scale
    )
    for counts, label, color in (
        (same, "same class", RIGHT),
        (different, "different classes", WRONG),
    ):
        shares = counts.reshape(-1, width).sum(axis=1) / max(counts.sum(), 1)
        axes.stairs(shares, edges, fill=True, alpha=0.35, color=color)
        axes.stairs(shares, edges, color=color, label=label)
    if threshold is not None:
        axes.axvline(threshold[0], color=QUERY, linewidth=1.5, label=threshold[1])
    axes.set(xlim=(0, furthest), xlabel="distance", ylabel="share of the pairs")
    axes.set_ylim(bottom=0)
    handles = axes.get_legend_handles_labels()[0]
    if probability is not None:
        beside = axes.twinx()
        x = np.linspace(0, furthest, 200)
        label = "match probability (equal priors)"
        handles += beside.plot(x, probability(x), "--", color=QUERY, label=label)
        beside.set(ylim=(0, 1.02), ylabel="probability")
        beside.spines["top"].set_visible(False)
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    _write_diagram(axes, f"Distances of {what}", path)


def roc(
    same: np.ndarray,
    different: np.ndarray,
    pairs: dict,
    path: str | Path,
    *,
    what: str = "all pairs",
    intervals: Sequence[tuple[float, float, float]] = (),
) -> None:
    """Plot the ROC of pairs: true accept rate over false accept rate on a log scale.

    Args:
        same, different, pairs, path, what: as in `distances`.
        intervals: false accept rate, lower and upper bound of the true accept rate.
    """
    figure = Figure(figsize=(5.5, 4.5), layout="constrained")
    axes = figure.subplots()
    least = 1 / max(different.sum(), 1)
    true, false = (np.cumsum(x) / max(x.sum(), 1) for x in (same, different))
    axes.plot(np.maximum(false, least), true, color=RIGHT)
    bars = {"color": RIGHT, "linewidth": 4, "alpha": 0.35}
    for number, (far, low, high) in enumerate(intervals):
        label = None if number else "intervals over classes"
        axes.plot([far, far], [low, high], **bars, label=label)
    if pairs["equal_error_rate"] is not None:
        equal = pairs["equal_error_rate"] / 100
        label = f"equal error rate {100 * equal:.1f} %"
        axes.plot([max(equal, least)], [1 - equal], "o", color=WRONG, label=label)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="upper left")
    axes.set(
        xscale="log",
        xlim=(least, 1),
        ylim=(0, 1),
        xlabel="false accept rate (pairs of different classes)",
        ylabel="true accept rate (pairs of the same class)",
    )
    axes.grid(alpha=0.3)
    _write_diagram(axes, f"ROC of {what}", path)


def pairs_sheet(
    groups: Sequence[tuple[str, Sequence[tuple[np.ndarray, np.ndarray, str, bool]]]],
    path: str | Path,
    *,
    title: str,
) -> None:
    """Draw pairs of images, in rows for each group.

    Args:
        groups: the name of each group, and its pairs: two images uint8 ``[height,
            width, 3]`` of one height, a text, and whether the decision is right.
        path: the PNG file to write.
        title: of the sheet.
    """
    rows = [
        ("" if start else name, pairs[start : start + PAIRS])
        for name, pairs in groups
        for start in range(0, max(len(pairs), 1), PAIRS)
    ]
    figure = Figure(figsize=(WIDTH, 1.8 * len(rows) + 0.5), layout="constrained")
    _set_title(figure, title)
    parts = np.atleast_1d(np.asarray(figure.subfigures(len(rows), 1)))
    for part, (name, pairs) in zip(parts, rows):
        axes, _ = _table(part, [name], PAIRS, 0.82)
        for column, (first, second, text, right) in enumerate(pairs):
            gap = np.full((len(first), 6, 3), 255, np.uint8)
            both = np.concatenate([first, gap, second], axis=1)
            color, dashed = (RIGHT, False) if right else (WRONG, True)
            _draw_framed(
                axes, column, 0, both, color, text=text, pair=True, dashed=dashed
            )
    _save(figure, path)


def contact_sheet(
    rows: Sequence[tuple[str, Sequence[np.ndarray], Sequence[tuple[str, bool | None]]]],
    path: str | Path,
    *,
    title: str,
) -> None:
    """Draw queries, each in a row with its hits.

    Args:
        rows: the name of each query, its images and its hits. Images are uint8
            ``[height, width]`` or ``[height, width, 3]``, the query first. Each hit has
            a text and whether the hit is right, or None if unknown.
        path: the PNG file to write.
        title: of the sheet.
    """
    most = max(len(images) for _, images, _ in rows)
    width = max(IMAGES, most) * WIDTH / IMAGES
    figure = Figure(figsize=(width, 1.4 * len(rows) + 0.5), layout="constrained")
    _set_title(figure, title)
    axes, _ = _table(figure, [""], most, len(rows) * WITH_TEXT)
    for row, (name, images, hits) in enumerate(rows):
        captions = [(name, None), *hits]
        for rank, (image, (text, right)) in enumerate(zip(images, captions)):
            color = BEYOND if right is None else RIGHT if right else WRONG
            if rank == 0:
                color = QUERY
            dashed = right is False
            _draw_framed(
                axes, rank, row * WITH_TEXT, image, color, text=text, dashed=dashed
            )
    _save(figure, path)


def _table(
    part: FigureBase, titles: Sequence[str], columns: int, height: float
) -> tuple[Axes, list[float]]:
    """Axes for tables of pictures of one unit each, and the left side of each table.

    All pictures share the axes, because axes for each would take seconds.
    """
    starts = [number * (columns + 0.5) for number in range(len(titles))]
    axes = part.subplots()
    axes.set(xlim=(0, starts[-1] + columns), ylim=(height, 0), aspect="equal")
    axes.set_axis_off()
    axes.autoscale(False)
    for start, title in zip(starts, titles):
        axes.text(
            start + columns / 2, -0.05, title, ha="center", va="bottom", fontsize=TYPE
        )
    return axes, starts


def _draw_framed(
    axes: Axes,
    left: float,
    top: float,
    image: np.ndarray,
    color: str,
    *,
    text: str = "",
    pair: bool = False,
    dashed: bool = False,
) -> None:
    """Draw a picture, or a pair side by side, with a frame and text below."""
    height, width = image.shape[:2]
    scale = min(0.9 / width, (0.45 if pair else 0.9) / height)
    width, height = width * scale, height * scale
    left += (1 - width) / 2
    # Pictures with text are aligned at the top with those beside them.
    top += 0.05 if text else (1 - height) / 2
    extent = (left, left + width, top + height, top)
    axes.imshow(image, extent=extent, cmap="gray", vmin=0, vmax=255)
    frame = Rectangle((left, top), width, height, fill=False, edgecolor=color)
    frame.set(linewidth=2.5, linestyle="--" if dashed else "-")
    axes.add_patch(frame)
    if text:
        middle, below = left + width / 2, top + height + 0.05
        options = _text_options(text, 24 if pair else 12)
        axes.text(middle, below, **options, ha="center", va="top", fontsize=TYPE)


def _save(figure: Figure, path: str | Path) -> None:
    """Write a PNG file, whose path may have another suffix until it is complete."""
    figure.savefig(path, dpi=120, format="png")


def _set_title(figure: Figure, title: str) -> None:
    """Give a figure a title, in lines of its width."""
    # A letter of this size is about 0.08 inches wide.
    lines = textwrap.fill(title, int(figure.get_figwidth() / 0.08))
    figure.suptitle(lines, fontsize=TYPE)


def _text_options(text: str, most: int = 12) -> dict[str, Any]:
    """Options of `Axes.text` for short lines, without mathematics."""
    lines = [_shorten(line, most) for line in text.splitlines()]
    fonts = _find_fonts("".join(lines))
    if fonts is None:
        # Code points differ; the boxes of missing characters would not.
        lines = [line.encode("ascii", "backslashreplace").decode() for line in lines]
        lines, fonts = [_shorten(line, most) for line in lines], ["DejaVu Sans"]
    return {"s": "\n".join(lines), "fontfamily": fonts, "parse_math": False}


def _write_diagram(axes: Axes, title: str, path: str | Path) -> None:
    """Give a diagram its title, and write it."""
    axes.set_title(title, loc="left", fontsize=TYPE)
    axes.spines[["top", "right"]].set_visible(False)
    figure = axes.get_figure()
    assert isinstance(figure, Figure)
    _save(figure, path)


def _shorten(name: str, most: int) -> str:
    return name if len(name) <= most else "…" + name[1 - most :]


def _find_fonts(text: str) -> list[str] | None:
    """Installed fonts that have all characters of a text between them, or None."""
    families, missing = [], {ord(sign) for sign in text if not sign.isspace()}
    default = font_manager.findfont("DejaVu Sans")
    entries = [font_manager.FontEntry(fname=default, name="DejaVu Sans")]
    for entry in (*entries, *font_manager.fontManager.ttflist):
        if not missing:
            break
        added = missing & _characters(entry.fname)
        # Matplotlib's last resort has a box for every character.
        if added and not entry.name.startswith("Last Resort"):
            families.append(entry.name)
            missing -= added
    return None if missing else families or ["DejaVu Sans"]


@functools.lru_cache
def _characters(file: str) -> frozenset[int]:
    """Code points of a font."""
    return frozenset(FT2Font(file).get_charmap())
