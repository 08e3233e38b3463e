"""``tripletjax cluster``."""

from pathlib import Path

from tripletjax.apps import clustering
from tripletjax.apps.clustering import report as clustering_report
from tripletjax.apps.identification import Gallery
from tripletjax.apps.search import report as search_report
from tripletjax.apps.verification.calibration import Calibration
from tripletjax.cli.common import (
    check_distinct,
    check_new,
    one_line,
    open_embedder,
    shown,
    updated_index,
)
from tripletjax.cli.options import Cluster
from tripletjax.learn import reports
from tripletjax.learn.counts import counted
from tripletjax.learn.embedder import ImageEmbedder
from tripletjax.learn.files import replaced_together


def call(options: Cluster) -> int:
    sheet = None if options.out is None else options.out.with_suffix(".png")
    target = options.copy_to or options.link_to
    check_distinct(options.out, sheet, options.json, target)
    check_new(options.out, sheet)
    if options.json is not None:
        reports.check_replaceable(options.json)
    if target is not None:
        clustering_report.check_target(target, options.index)
    embedder = open_embedder(options)
    threshold, origin = _threshold(options, embedder)
    index, changes = updated_index(options.index, options, embedder)
    known = None
    if options.evaluate:
        known = Gallery.of(index, classes_from=options.classes_from)
    groups = clustering.group_images(index, threshold, progress=True)
    report = clustering_report.make_report(groups, origin)
    report["index"] = search_report.report_changes(index, changes)
    if known is not None:
        metrics = clustering.evaluate(known.labels, groups.numbers_of(known.paths))
        report["evaluation"] = {**metrics, "notes": [*known.notes]}
    written: list[Path] = []
    with replaced_together() as part:
        if options.out is not None and sheet is not None:
            clustering_report.write_table(groups, part(options.out))
            clustering_report.draw(index, groups, part(sheet))
            written += [options.out, sheet]
        if options.json is not None:
            reports.write_report(report, part(options.json))
            written.append(options.json)
        if options.copy_to is not None:
            clustering_report.copy_groups(index, groups, options.copy_to, progress=True)
        if options.link_to is not None:
            clustering_report.link_groups(index, groups, options.link_to, progress=True)
    if target is not None:
        written.append(target)
    for line in clustering_report.format_report(report):
        print(one_line(line))
    for path in written:
        print(f"written: {shown(path)}")
    return 0


def _threshold(options: Cluster, embedder: ImageEmbedder) -> tuple[float, str]:
    """The largest distance of two groups that merge, and a line about it."""
    if options.threshold is not None:
        return options.threshold, "threshold of --threshold"
    try:
        calibration = Calibration.read(options.home, embedder.key)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error} Or give --threshold DISTANCE.") from None
    chosen = clustering.choose_threshold(calibration)
    return chosen.threshold, (
        f"threshold of the best BCubed F, {100 * chosen.bcubed_f:.1f} %, on "
        f"{counted(chosen.images, 'image')} of tripletjax verify"
    )
