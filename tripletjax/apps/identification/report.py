"""What identification has found, as lines and a picture."""

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
from tripletjax.learn.reports import number

# So many probes stand in a row of the picture.
IN_ROW = 5


def of_gallery(
    gallery: Gallery,
    threshold: float,
    calibration: Calibration | None,
    strangers: Strangers | None,
) -> dict[str, Any]:
    """The gallery, its threshold, and the false positives at this threshold."""
    told: dict[str, Any] = {
        "what": REPORT,
        "classes": len(gallery.names),
        "images": len(gallery.paths),
        "means": gallery.means,
        "threshold": number(threshold),
        "others": None,
    }
    if calibration is not None and strangers is not None:
        count, named = len(strangers.distances), strangers.named(threshold)
        told["others"] = {
            "data": calibration.data,
            "images": count,
            "left_out": strangers.left_out,
            "named": named,
            "fpir": 100 * named / count if count else None,
        }
    return told


def told(report: dict[str, Any]) -> Iterator[str]:
    """Lines of the report of a gallery."""
    yield f"gallery: {report['classes']:,} classes, {report['images']:,} images"
    others, threshold = report["others"], report["threshold"]
    if threshold is None:
        yield "closed set: every probe is named after its nearest class"
        return
    yield f"threshold {threshold:.4f}: largest distance of a named probe"
    if others is None:
        yield "false positives at this gallery: unknown, the run has no calibration"
        return
    if others["left_out"]:
        yield (
            f"- {others['left_out']:,} images of {others['data']} are of classes of "
            "the gallery, or copies of its images, and are not counted"
        )
    if others["fpir"] is None:
        yield "false positives at this gallery: unknown, no other class was calibrated"
        return
    yield (
        f"false positives at this gallery: {others['fpir']:.1f} % ({others['named']:,} "
        f"of {others['images']:,} images of other classes in {others['data']}); "
        "--fpir SHARE chooses a threshold by this rate"
    )


def lines(files: Sequence[Path], found: Sequence[Identity]) -> Iterator[str]:
    """A line for each probe: its name or unknown, how far, and who is next."""
    width = max(len(encode_path(file)) for file in files)
    names = max(len(one.name or "unknown") for one in found)
    for file, one in zip(files, found):
        told = f"{encode_path(file):<{width}}  {one.name or 'unknown':<{names}}"
        told += f"  {one.distance:.4f}"
        if one.name is None:
            told += f"  nearest {one.nearest}"
        if one.runner_up is not None:
            told += f"  next {one.runner_up} {one.runner_up_distance:.4f}"
        if one.own is not None:
            told += "  (itself is left out of the gallery)"
        yield told


def of_probes(files: Sequence[Path], found: Sequence[Identity]) -> list[dict[str, Any]]:
    """The same for JSON."""
    return [
        {"query": encode_path(file), **dataclasses.asdict(one)}
        for file, one in zip(files, found)
    ]


def measured(report: dict[str, Any]) -> Iterator[str]:
    """An evaluation to be read."""
    yield (
        f"{report['known']:,} probes of {report['classes']:,} classes of the gallery, "
        f"{report['unknown']:,} of others"
    )
    if report["copies"]:
        yield (
            f"- {report['copies']:,} probes are copies of images of the gallery, which "
            "are easily named: the rates are too high"
        )
    for rank, rate in report["rate_at_rank"].items():
        yield f"  identified at rank {rank}: {_told(rate)}"
    for one in report["at_fpir"]:
        yield f"  FNIR at FPIR {one['fpir']:g} %: {_told(one['fnir'])}"
    at = report["at_threshold"]
    if at["threshold"] is not None:
        yield (
            f"  at the threshold {at['threshold']:.4f}: FPIR {_told(at['fpir'])}, FNIR "
            f"{_told(at['fnir'])}"
        )


def draw(
    index: Index, files: Sequence[Path], found: Sequence[Identity], out: Path
) -> None:
    """Pairs: each probe, and the image of the gallery that it is nearest to."""
    pairs = []
    for file, one in zip(files, found):
        nearest = one.nearest.rpartition("/")[2]
        text = (
            f"{file.name}\n{one.name or 'unknown'}\n{one.distance:.3f} from {nearest}"
        )
        images = thumbnail(file), thumbnail(index.file_of(one.path))
        pairs.append((*images, text, one.name is not None))
    out.parent.mkdir(parents=True, exist_ok=True)
    plots.pairs_sheet(
        [("", pairs[i : i + IN_ROW]) for i in range(0, len(pairs), IN_ROW)],
        out,
        title="images beside the nearest of the gallery: blue gives its name, orange "
        "and dashed is too far",
    )


def _told(rate: float | None) -> str:
    return "-" if rate is None else f"{rate:.2f} %"
