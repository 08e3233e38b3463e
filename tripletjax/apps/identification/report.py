"""Reports of identification: lines, JSON and a picture."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tripletjax.apps.identification.evaluation import Strangers
from tripletjax.apps.identification.gallery import REPORT, Gallery, Identity
from tripletjax.apps.images import encode_path, thumbnail
from tripletjax.apps.search.index import Index
from tripletjax.apps.verification.calibration import Calibration
from tripletjax.learn import plots
from tripletjax.learn.counts import counted
from tripletjax.learn.reports import number


def make_gallery_report(
    gallery: Gallery,
    threshold: float,
    calibration: Calibration | None,
    strangers: Strangers | None,
) -> dict[str, Any]:
    """Make the report of a gallery: its size, threshold, and false positives.

    Args:
        gallery: known classes.
        threshold: largest distance of a class that names a probe.
        calibration: of the run, or None.
        strangers: calibration images of other classes, which show the false positives;
            None if there is no calibration.

    Returns:
        The report for JSON and for `format_gallery`.
    """
    report: dict[str, Any] = {
        "what": REPORT,
        "classes": len(gallery.names),
        "images": len(gallery.paths),
        "means": gallery.means,
        "threshold": number(threshold),
        "others": None,
    }
    if calibration is not None and strangers is not None:
        count, named = len(strangers.distances), strangers.count_named(threshold)
        report["others"] = {
            "data": calibration.data,
            "images": count,
            "left_out": strangers.left_out,
            "named": named,
            "fpir": 100 * named / count if count else None,
        }
    return report


def format_gallery(report: dict[str, Any]) -> Iterator[str]:
    """Format the report of a gallery as lines."""
    images = counted(report["images"], "image")
    yield f"gallery: {counted(report['classes'], 'class')}, {images}"
    others, threshold = report["others"], report["threshold"]
    if threshold is None:
        yield "closed set: every probe is named after its nearest class"
        return
    yield f"threshold {threshold:.4f}: largest distance of a named probe"
    if others is None:
        yield "false positives at this gallery: unknown, there is no calibration"
        return
    if others["left_out"]:
        yield (
            "- "
            + counted(
                others["left_out"],
                f"image of {others['data']} is of a class of the gallery, or a copy of "
                "its images, and is not counted",
                f"images of {others['data']} are of classes of the gallery, or copies "
                "of its images, and are not counted",
            )
        )
    if others["fpir"] is None:
        yield "false positives at this gallery: unknown, no other class was calibrated"
        return
    yield (
        f"false positives at this gallery: {others['fpir']:.1f} % ({others['named']:,} "
        f"of {counted(others['images'], 'image')} of other classes in "
        f"{others['data']}); "
        "--fpir SHARE chooses a threshold by this rate"
    )


def format_identities(
    files: Sequence[Path], identities: Sequence[Identity]
) -> Iterator[str]:
    """Format a line for each probe: file, name, distance, and the next class.

    Args:
        files: image files of the probes.
        identities: of these probes.
    """
    paths = [encode_path(file) for file in files]
    names = [identity.name or "unknown" for identity in identities]
    path_width, name_width = max(map(len, paths)), max(map(len, names))
    for path, name, identity in zip(paths, names, identities):
        line = f"{path:<{path_width}}  {name:<{name_width}}  {identity.distance:.4f}"
        if identity.name is None:
            line += f"  nearest {identity.nearest}"
        if identity.runner_up is not None:
            line += f"  next {identity.runner_up} {identity.runner_up_distance:.4f}"
        if identity.own is not None:
            line += "  (this image of the gallery is left out)"
        yield line


def make_probe_reports(
    files: Sequence[Path], identities: Sequence[Identity]
) -> list[dict[str, Any]]:
    """Make the report of each probe, for JSON.

    Args:
        files: image files of the probes.
        identities: of these probes.
    """
    return [
        {"query": encode_path(file), **dataclasses.asdict(identity)}
        for file, identity in zip(files, identities)
    ]


def format_evaluation(report: dict[str, Any]) -> Iterator[str]:
    """Format the result of `evaluate` as lines."""
    yield (
        f"probes: {report['known']:,} of the {counted(report['classes'], 'class')} of "
        f"the gallery, {report['unknown']:,} of other classes"
    )
    if report["copies"]:
        yield (
            "- "
            + counted(report["copies"], "probe is a copy", "probes are copies")
            + " of images of the gallery: the identification rates are too high"
        )
    for rank, rate in report["rate_at_rank"].items():
        yield f"  identified at rank {rank}: {_format_rate(rate)}"
    for one in report["at_fpir"]:
        yield f"  FNIR at FPIR {one['fpir']:g} %: {_format_rate(one['fnir'])}"
    rates = report["at_threshold"]
    if rates["threshold"] is not None:
        yield (
            f"  at threshold {rates['threshold']:.4f}: FPIR "
            f"{_format_rate(rates['fpir'])}, FNIR {_format_rate(rates['fnir'])}"
        )


def draw(
    index: Index, files: Sequence[Path], identities: Sequence[Identity], out: Path
) -> None:
    """Draw each probe beside its nearest image of the gallery.

    Args:
        index: of the gallery.
        files: image files of the probes.
        identities: of these probes.
        out: file of the picture.
    """
    pairs = []
    for file, identity in zip(files, identities):
        nearest = identity.nearest.rpartition("/")[2]
        text = (
            f"{file.name}\n{identity.name or 'unknown'}\n"
            f"{identity.distance:.3f} from {nearest}"
        )
        images = thumbnail(file), thumbnail(index.file_of(identity.path))
        pairs.append((*images, text, identity.name is not None))
    out.parent.mkdir(parents=True, exist_ok=True)
    plots.pairs_sheet(
        [("", pairs)],
        out,
        title="probes beside their nearest image of the gallery (solid blue: named; "
        "dashed orange: unknown)",
    )


def _format_rate(rate: float | None) -> str:
    return "-" if rate is None else f"{rate:.2f} %"
