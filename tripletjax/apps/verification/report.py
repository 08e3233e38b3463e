"""Reports of verification: lines, JSON and pictures."""

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
from tripletjax.learn.counts import counted
from tripletjax.learn.files import filled

# Bins of the histograms of distances.
BINS = 2000


def format_report(report: dict[str, Any]) -> Iterator[str]:
    """Format the report of `evaluate` as lines."""
    pairs, intervals = report["verification"], report["intervals"]
    classes = counted(report["classes"], "class")
    yield f"{counted(report['images'], 'image')} of {classes}"
    for line in (*report["notes"], *report["skipped"]):
        yield f"- {line}"
    yield ""
    yield (
        f"{pairs['positives']:,} same and "
        f"{counted(pairs['negatives'], 'different pair')}, with "
        f"{100 * intervals['confidence']:g} % intervals over classes"
    )
    tar_intervals = {one["far"]: one["tar"] for one in intervals["at_far"]}
    rows = [
        (title, pairs[name], intervals[name])
        for title, name in (
            ("equal error rate", "equal_error_rate"),
            ("area under the ROC", "area_under_roc"),
        )
    ]
    rows += [
        (f"TAR at FAR {one['far']:g} %", one["tar"], tar_intervals.get(one["far"]))
        for one in pairs["at_far"]
    ]
    for name, value, interval in rows:
        text = "-" if value is None else f"{value:.2f} %"
        line = f"  {name:<22}{text:>10}"
        if interval is not None:
            line += f"   {interval[0]:.2f} to {interval[1]:.2f}"
        yield line
    if (fold := report["k_fold"]) is not None:
        name, text = f"{fold['folds']}-fold accuracy", f"{fold['accuracy']:.2f} %"
        yield (
            f"  {name:<22}{text:>10} ± {fold['standard_error']:.2f}, of {fold['by']}"
        )


def format_threshold(calibration: Calibration) -> str:
    """Format a threshold and its rates as a line."""
    return (
        f"threshold {calibration.threshold:.4f}: pairs up to this distance are "
        f"accepted, {100 * calibration.far:g} % of the different and "
        f"{100 * calibration.tar:.1f} % of the same pairs here"
    )


def format_decision(decision: Decision, calibration: Calibration) -> str:
    """Format the decision about two images as a line."""
    verdict = "same" if decision.same else "different"
    return (
        f"{verdict}  distance {decision.distance:.4f}  "
        f"threshold {decision.threshold:.4f} (FAR {100 * calibration.far:g} %)  "
        f"match probability {decision.probability:.3f} (equal priors)"
    )


def make_decision_report(
    images: Sequence[Path], decision: Decision, calibration: Calibration
) -> dict[str, Any]:
    """Make the report of a decision, for JSON.

    Args:
        images: files of the two images.
        decision: about these images.
        calibration: threshold of the decision.
    """
    return {
        "what": REPORT,
        "images": [encode_path(image) for image in images],
        **dataclasses.asdict(decision),
        "calibration": calibration.summary(),
    }


def draw(result: Verification, out: Path) -> None:
    """Draw the ROC curve, the distances, and the worst errors.

    Args:
        result: of `evaluate`.
        out: directory of ``roc.png``, ``distances.png`` and ``errors.png``.
    """
    pairs, calibration = result.pairs, result.calibration
    largest = max(2.0, *(float(x.max()) for x in (pairs.same, pairs.different)))
    _draw_curves(result, out, scale=largest / 2)
    threshold = (
        result.report["verification"]["threshold"]
        if calibration is None
        else calibration.threshold
    )
    # The report has no threshold if accepting no pair is the most accurate.
    threshold = -1.0 if threshold is None else threshold
    accepts, rejects = (
        [_pair_picture(result, *pair, same, threshold) for pair in zip(*worst)]
        for same, worst in zip((False, True), result.worst)
    )
    plots.pairs_sheet(
        [
            ("nearest pairs of different classes, one per two classes", accepts),
            ("farthest pairs of the same class, one per class", rejects),
        ],
        out / "errors.png",
        title="worst pairs (solid blue: decided correctly; dashed orange: wrongly)",
    )


def _draw_curves(result: Verification, out: Path, *, scale: float) -> None:
    """Draw the ROC curve and the histograms, of distances from 0 to ``2 scale``."""
    pairs, calibration = result.pairs, result.calibration
    metrics = result.report["verification"]
    same, different = (
        np.histogram(x / scale, BINS, (0, 2))[0] for x in (pairs.same, pairs.different)
    )
    counts = metrics["positives"], metrics["negatives"]
    if len(pairs.different) < pairs.all_different:
        counts = len(pairs.same), len(pairs.different)
    title = f"{counts[0]:,} same and {counted(int(counts[1]), 'different pair')}"
    plots.roc(
        same,
        different,
        metrics,
        out / "roc.png",
        what=title,
        intervals=[
            (one["far"] / 100, *(x / 100 for x in one["tar"]))
            for one in result.report["intervals"]["at_far"]
            if one["tar"] is not None
        ],
    )
    threshold = probability = None
    if calibration is not None:
        name = f"threshold at FAR {100 * calibration.far:g} %"
        threshold = calibration.threshold, name
        probability = calibration.probability
    plots.distances(
        same,
        different,
        metrics,
        out / "distances.png",
        what=title,
        scale=scale,
        threshold=threshold,
        probability=probability,
    )


def _pair_picture(
    result: Verification,
    images: np.ndarray,
    distance: float,
    same: bool,
    threshold: float,
) -> tuple[np.ndarray, np.ndarray, str, bool]:
    """Two images, their caption, and whether the threshold decides them correctly."""
    first, second = (result.files[image] for image in images)
    names = first.parent.name if same else f"{first.parent.name}\n{second.parent.name}"
    return (
        thumbnail(first),
        thumbnail(second),
        f"{distance:.3f}\n{names}",
        (distance <= threshold) == same,
    )


def write(result: Verification, out: Path) -> None:
    """Write the report and its pictures.

    Args:
        result: of `evaluate`.
        out: a new or empty directory.
    """
    with filled(out) as part:
        draw(result, part)
        reports.write_report(result.report, part / "report.json")
