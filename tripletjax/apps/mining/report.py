"""Results of mining as lines, JSON, CSV and a picture."""

import csv
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tripletjax.apps.images import thumbnail
from tripletjax.apps.mining.folder import QUANTILES, Mining
from tripletjax.learn import plots
from tripletjax.learn.counts import counted
from tripletjax.learn.files import replaced_together, write_json

# Likely label errors in the picture and in the printed lines, at most.
PICTURED, PRINTED = 10, 5
# Neighbours of each in the picture.
NEIGHBORS = 5
TRIPLET_COLUMNS = (
    *("anchor", "positive", "negative"),
    *("positive_distance", "negative_distance"),
)


class Files(NamedTuple):
    """Files of a report.

    Attributes:
        triplets: CSV for ``tripletjax train --triplets``.
        report: JSON.
        label_errors: CSV.
        picture: PNG of likely label errors.
    """

    triplets: Path
    report: Path
    label_errors: Path
    picture: Path

    @classmethod
    def beside(cls, triplets: Path, report: Path | None = None) -> "Files":
        """The files beside the one of triplets; the report may be another.

        Raises:
            ValueError: if the report is one of the other files.
        """
        stem = triplets.with_suffix("").name
        names = f"{stem}.json", f"{stem}_label_errors.csv", f"{stem}_label_errors.png"
        beside, *others = (triplets.with_name(name) for name in names)
        files = cls(triplets, report or beside, *others)
        if len({path.resolve() for path in files}) < len(files):
            raise ValueError(f"the report must be a file of its own, got {report}.")
        return files


def write(mining: Mining, files: Files) -> list[Path]:
    """Write triplets, report and likely label errors; return the written files.

    Paths of images are relative to the file of triplets.
    """
    written = [files.triplets, files.report]
    with replaced_together() as part:
        if errors := mining.report["label_errors"]:
            draw(mining, part(files.picture))
            rows = (e.values() for e in errors)
            _write_rows(part(files.label_errors), [*errors[0]], rows)
            written += [files.label_errors, files.picture]
        write_json(part(files.report), mining.report)
        names = _relative(mining.images.files, files.triplets)
        _write_rows(
            part(files.triplets),
            [*TRIPLET_COLUMNS],
            (
                [*(names[image] for image in triplet), *distances]
                for triplet, distances in zip(
                    mining.triplets.tolist(), mining.distances.tolist()
                )
            ),
        )
    return written


def _relative(images: Sequence[Path], file: Path) -> list[str]:
    """Paths of images relative to the folder of a file, or whole on another drive."""
    folder = file.parent.resolve()
    try:
        return [Path(os.path.relpath(image, folder)).as_posix() for image in images]
    except ValueError:
        return [image.as_posix() for image in images]


def _write_rows(file: Path, header: list[str], rows: Iterable[Iterable[Any]]) -> None:
    """Write a CSV file with texts in quotes."""
    with file.open("w", newline="", encoding="utf-8") as opened:
        writer = csv.writer(opened, quoting=csv.QUOTE_NONNUMERIC)
        writer.writerow(header)
        writer.writerows(rows)


def draw(mining: Mining, out: Path, *, most: int = PICTURED) -> None:
    """Draw the likeliest label errors, each in a row with its nearest images."""
    images = mining.images
    rows = []
    for image in mining.label_errors.images[:most].tolist():
        nearest = mining.neighbors[image, :NEIGHBORS].tolist()
        pictures = [thumbnail(images.files[i]) for i in (image, *nearest)]
        hits = [
            (
                f"{distance:.3f}\n{_class_of(mining, i)}",
                bool(images.labels[i] == images.labels[image]),
            )
            for i, distance in zip(nearest, mining.neighbor_distances[image].tolist())
        ]
        name = f"{images.files[image].name}\n{_class_of(mining, image)}"
        rows.append((name, pictures, hits))
    title = (
        "likely label errors, each with its nearest images, their distances and "
        "classes; blue: the class of its label, orange and dashed: another class"
    )
    plots.contact_sheet(rows, out, title=title)


def _class_of(mining: Mining, image: int) -> str:
    return mining.images.names[mining.images.labels[image]].rpartition("/")[2]


def format_report(report: dict[str, Any]) -> Iterator[str]:
    """Format the report of `mine` as lines."""
    classes = counted(report["classes"], "class")
    yield f"{counted(report['images'], 'image')} of {classes}"
    for line in (*report["notes"], *report["skipped"]):
        yield f"- {line}"
    yield ""
    anchors = counted(report["anchors"], "anchor")
    yield f"{counted(report['triplets'], 'triplet')} of {anchors}"
    distances = report["distances"]
    titles = "".join(f"{100 * q:>7g} %" for q in QUANTILES)
    yield f"  {'quantiles of distances':<24}{titles}"
    for name in ("positive", "negative"):
        values = "".join(f"{value:9.4f}" for value in distances[name])
        yield f"  {f'to {name}s':<24}{values}"
    share = distances["nearer_negatives"]
    yield f"  {share:.1f} % of the negatives are nearer than the positive"
    yield ""
    yield "excluded pairs of an anchor and a negative, by rule"
    for name, count in report["excluded"].items():
        yield f"  {name.replace('_', ' '):<16}{count:>12,}"
    yield ""
    errors = report["label_errors"]
    yield counted(len(errors), "likely label error")
    for error in errors[:PRINTED]:
        yield (
            f"  {error['path']}: nearest class {error['nearest_class']}, at "
            f"{error['ratio']:.2f} of the distance to its own class"
        )
    if len(errors) > PRINTED:
        yield f"  and {len(errors) - PRINTED:,} more"
