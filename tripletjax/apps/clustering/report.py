"""Groups of images as lines, JSON, CSV, a contact sheet and folders."""

import csv
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from tripletjax.apps.clustering.evaluation import METRICS
from tripletjax.apps.clustering.groups import Groups
from tripletjax.apps.images import decode_path, thumbnail
from tripletjax.apps.search.index import Index
from tripletjax.learn import plots, reports
from tripletjax.learn.counts import counted
from tripletjax.learn.files import replaced

REPORT = f"{reports.PREFIX}clustering"
# Groups of a contact sheet, and images of each.
ROWS, COLUMNS = 8, 6
TITLES = {
    "bcubed_f": "BCubed F",
    "bcubed_precision": "BCubed precision",
    "bcubed_recall": "BCubed recall",
    "pairwise_f": "pairwise F",
    "pairwise_precision": "pairwise precision",
    "pairwise_recall": "pairwise recall",
    "adjusted_rand_index": "adjusted Rand index",
}
# Folder of the images that are alone in their groups.
SINGLE = "single"


def make_report(groups: Groups, origin: str) -> dict[str, Any]:
    """Make the report of groups, for JSON and for `format_report`.

    Args:
        groups: of the images of an index.
        origin: a line about the threshold.
    """
    return {
        "what": REPORT,
        "threshold": groups.threshold,
        "origin": origin,
        "images": len(groups.paths),
        "groups": len(groups),
        "groups_of_several": groups.several,
        "single_images": len(groups) - groups.several,
        "largest": groups.sizes[0],
        "paths": [groups.paths_of(number) for number in range(len(groups))],
    }


def format_report(report: dict[str, Any]) -> Iterator[str]:
    """Format the report of groups as lines."""
    yield (
        f"{counted(report['images'], 'image')} in {counted(report['groups'], 'group')} "
        f"at threshold {report['threshold']:.4f}; groups of several images: "
        f"{report['groups_of_several']:,}, the largest of {report['largest']:,}; "
        f"single images: {report['single_images']:,}"
    )
    yield f"- {report['origin']}"
    if (metrics := report.get("evaluation")) is None:
        return
    for note in metrics["notes"]:
        yield f"- {note}"
    yield ""
    yield (
        f"{counted(metrics['images'], 'image')} of known classes: "
        f"{counted(metrics['groups'], 'group')}, "
        f"{counted(metrics['classes'], 'class')}, with "
        f"{100 * metrics['intervals']['confidence']:g} % intervals over classes"
    )
    for name in METRICS:
        value, interval = metrics[name], metrics["intervals"][name]
        # The index is no share.
        unit, scale = ("", 0.01) if name == "adjusted_rand_index" else (" %", 1)
        text = "-" if value is None else f"{scale * value:.2f}{unit}"
        if interval is not None:
            low, high = interval
            text += f"   {scale * low:.2f} to {scale * high:.2f}"
        yield f"  {TITLES[name]:<22}{text}"


def write_table(groups: Groups, out: Path) -> None:
    """Write groups as CSV: a line for each image, with its group and the group's size.

    Groups are numbered from 1, the largest first.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    sizes = groups.sizes
    with replaced(out) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "group", "size"])
        for number, members in enumerate(groups.members):
            for row in np.sort(members):
                writer.writerow([groups.paths[row], number + 1, sizes[number]])


def draw(index: Index, groups: Groups, out: Path) -> None:
    """Draw a contact sheet: a row for each of the largest groups.

    The image nearest to the mean of the group comes first, and the farthest last.
    """
    rows = []
    for number in range(min(len(groups), ROWS)):
        paths = groups.paths_of(number)
        shown = np.linspace(0, len(paths) - 1, min(len(paths), COLUMNS)).astype(int)
        paths = [paths[i] for i in shown]
        images = [thumbnail(index.file_of(path)) for path in paths]
        captions = [(_caption(path), None) for path in paths[1:]]
        size = groups.sizes[number]
        rows.append((f"group {number + 1}\n{counted(size, 'image')}", images, captions))
    title = "largest groups, from the image nearest to the mean to the farthest"
    out.parent.mkdir(parents=True, exist_ok=True)
    plots.contact_sheet(rows, out, title=title)


def _caption(path: str) -> str:
    folder, _, name = path.rpartition("/")
    return folder.rpartition("/")[2] or name


def check_target(target: Path, folder: Path) -> None:
    """Raise an error if a target exists or lies in the folder of the index."""
    if os.path.lexists(target):
        raise FileExistsError(f"{target} already exists; give another folder.")
    if target.resolve().is_relative_to(folder.resolve()):
        raise ValueError(
            f"{target} must lie outside {folder}: its images would be indexed, too."
        )


def copy_groups(
    index: Index, groups: Groups, target: Path, *, progress: bool = False
) -> None:
    """Copy the images of each group into a folder of its own.

    Single images lie in one folder. The target appears whole or not at all, and must
    lie outside the folder of the index.
    """
    _fill(index, groups, target, shutil.copy2, "copying", progress)


def link_groups(
    index: Index, groups: Groups, target: Path, *, progress: bool = False
) -> None:
    """Link to the images of each group from a folder of its own, as `copy_groups`."""
    _fill(index, groups, target, os.symlink, "linking", progress)


def _fill(
    index: Index,
    groups: Groups,
    target: Path,
    place: Callable[[Path, Path], Any],
    title: str,
    progress: bool,
) -> None:
    check_target(target, index.folder)
    target.parent.mkdir(parents=True, exist_ok=True)
    digits = len(str(max(groups.several, 1)))
    # Beside the target, so that one step moves it there.
    beside = tempfile.TemporaryDirectory(
        prefix=f"{target.name}-", dir=target.parent, ignore_cleanup_errors=True
    )
    bar = tqdm(total=len(groups.paths), desc=title, unit="image", disable=not progress)
    with beside as part, bar:
        whole = Path(part) / "groups"
        whole.mkdir()
        taken: dict[Path, int] = {}
        for number, size in enumerate(groups.sizes):
            name = SINGLE if size == 1 else f"group-{number + 1:0{digits}}"
            folder = whole / name
            folder.mkdir(exist_ok=True)
            for path in sorted(groups.paths_of(number)):
                place(index.file_of(path), _free_name(folder, decode_path(path), taken))
                bar.update()
        whole.rename(target)


def _free_name(folder: Path, path: Path, taken: dict[Path, int]) -> Path:
    """A path in a folder for a file of this name, numbered if the name is taken.

    `taken` has the last number of each name, so that many files may share a name.
    """
    wanted = file = folder / path.name
    while os.path.lexists(file):
        taken[wanted] = taken.get(wanted, 1) + 1
        file = folder / f"{path.stem}-{taken[wanted]}{path.suffix}"
    return file
