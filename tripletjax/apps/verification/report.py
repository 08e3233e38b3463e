"""What verification has found, as lines and pictures."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tripletjax.apps.images import encode_path, thumbnail
from tripletjax.apps.verification.calibration import Calibration
from tripletjax.apps.verification.decision import Decision
from tripletjax.apps.verification.evaluation import REPORT, Verification
from tripletjax.learn import plots, reports

# Distances are counted in so many steps.
STEPS = 2000


def lines(report: dict[str, Any]) -> Iterator[str]:
    """A report to be read."""
    pairs, intervals = report["verification"], report["intervals"]
    yield f"{report['images']:,} images of {report['classes']:,} classes"
    for line in (*report["notes"], *report["skipped"]):
        yield f"- {line}"
    yield ""
    yield (
        f"{pairs['positives']:,} same and {pairs['negatives']:,} different pairs, with "
        f"{100 * intervals['confidence']:g} % intervals over classes"
    )
    of_far = {one["far"]: one["tar"] for one in intervals["at_far"]}
    rows = [
        (name.replace("_", " "), pairs[name], intervals[name])
        for name in ("equal_error_rate", "area_under_roc")
    ]
    rows += [
        (f"TAR at FAR {one['far']:g} %", one["tar"], of_far.get(one["far"]))
        for one in pairs["at_far"]
    ]
    for name, value, interval in rows:
        told = "-" if value is None else f"{value:.2f} %"
        if interval is not None:
            told += f"   {interval[0]:.2f} to {interval[1]:.2f}"
        yield f"  {name:<22}{told:>10}"
    if (fold := report["k_fold"]) is not None:
        yield (
            f"  {fold['folds']}-fold accuracy       {fold['accuracy']:.2f} % "
            f"± {fold['standard_error']:.2f}, of {fold['by']}"
        )


def chosen(calibration: Calibration) -> str:
    """What a threshold is and means, in a line."""
    return (
        f"threshold {calibration.threshold:.4f}: pairs up to this distance are "
        f"accepted, {100 * calibration.far:g} % of the different and "
        f"{100 * calibration.tar:.1f} % of the same pairs here"
    )


def decided(decision: Decision, calibration: Calibration) -> str:
    """Whether two images are the same, in a line."""
    told = "same" if decision.same else "different"
    return (
        f"{told}  distance {decision.distance:.4f}  threshold {decision.threshold:.4f} "
        f"(FAR {100 * calibration.far:g} %)  match probability "
        f"{decision.probability:.3f} (equal priors)"
    )


def of_decision(
    images: Sequence[Path], decision: Decision, calibration: Calibration
) -> dict[str, Any]:
    """The same for JSON."""
    return {
        "what": REPORT,
        "images": [encode_path(image) for image in images],
        **dataclasses.asdict(decision),
        "calibration": calibration.summary(),
    }


def draw(found: Verification, out: Path) -> None:
    """The ROC, the distances, and the worst errors, into a directory."""
    pairs, told = found.pairs, found.report["verification"]
    furthest = max(2.0, *(float(x.max()) for x in (pairs.same, pairs.different)))
    scale = furthest / 2
    same, different = (
        np.histogram(x / scale, STEPS, (0, 2))[0] for x in (pairs.same, pairs.different)
    )
    what = f"{told['positives']:,} same and {told['negatives']:,} different pairs"
    if len(pairs.different) < pairs.all_different:
        what = f"{len(pairs.same):,} same and {len(pairs.different):,} different pairs"
    chosen = found.calibration
    plots.roc(
        same,
        different,
        told,
        out / "roc.png",
        what=what,
        intervals=[
            (one["far"] / 100, *(x / 100 for x in one["tar"]))
            for one in found.report["intervals"]["at_far"]
            if one["tar"] is not None
        ],
    )
    threshold = told["threshold"] if chosen is None else chosen.threshold
    # Where copies are of different classes, the most accurate may be to accept none.
    threshold = -1.0 if threshold is None else threshold
    plots.distances(
        same,
        different,
        told,
        out / "distances.png",
        what=what,
        scale=scale,
        threshold=None
        if chosen is None
        else (chosen.threshold, f"threshold at FAR {100 * chosen.far:g} %"),
        probability=None if chosen is None else chosen.probability,
    )
    accepts, rejects = (
        [_shown(found, *pair, accepted_is_right, threshold) for pair in zip(*worst)]
        for accepted_is_right, worst in zip((False, True), found.worst)
    )
    plots.pairs_sheet(
        [
            ("nearest of different classes, of every two classes one", accepts),
            ("farthest of the same class, of every class one", rejects),
        ],
        out / "errors.png",
        title="the worst pairs; blue if the threshold decides them rightly, orange and "
        "dashed if not",
    )


def _shown(
    found: Verification,
    images: np.ndarray,
    distance: float,
    same: bool,
    threshold: float,
) -> tuple[np.ndarray, np.ndarray, str, bool]:
    """A pair for a picture."""
    first, second = (found.files[image] for image in images)
    names = first.parent.name if same else f"{first.parent.name} / {second.parent.name}"
    return (
        thumbnail(first),
        thumbnail(second),
        f"{distance:.3f}\n{names}",
        (distance <= threshold) == same,
    )


def write(found: Verification, out: Path) -> None:
    """The report and its pictures, into a directory that is made."""
    out.mkdir(parents=True, exist_ok=True)
    draw(found, out)
    reports.write_report(found.report, out / "report.json")
