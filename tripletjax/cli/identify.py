"""``tripletjax identify``."""

from collections.abc import Sequence
from pathlib import Path

from tripletjax.apps import identification
from tripletjax.apps.embedders import vectors_of
from tripletjax.apps.identification import Gallery, Identity
from tripletjax.apps.identification import report as identification_report
from tripletjax.apps.images import load_image
from tripletjax.apps.search import Index
from tripletjax.apps.verification.calibration import Calibration
from tripletjax.cli.common import (
    check_distinct,
    check_images,
    check_new,
    one_line,
    open_embedder,
    shown,
    updated_index,
)
from tripletjax.cli.options import Identify
from tripletjax.learn import evaluation, reports
from tripletjax.learn.embedder import ImageEmbedder
from tripletjax.learn.files import replaced_together


def call(options: Identify) -> int:
    check_distinct(options.out, options.json)
    check_new(options.out)
    if options.json is not None:
        reports.check_replaceable(options.json)
    check_images(options.images)
    embedder = open_embedder(options)
    calibration = _calibration(options, embedder)
    index, _ = updated_index(options.gallery, options, embedder)
    gallery = Gallery.of(
        index, means=options.means, classes_from=options.classes_from, flat=True
    )
    threshold, strangers = identification.choose_threshold(
        gallery,
        calibration,
        within=options.within,
        fpir=options.fpir,
        closed=options.closed,
    )
    report = identification_report.make_gallery_report(
        gallery, threshold, calibration, strangers
    )
    lines = [f"- {line}" for line in gallery.notes]
    lines += [*identification_report.format_gallery(report), ""]
    identities: list[Identity] = []
    if options.data is not None:
        probes = evaluation.embed_folder(
            embedder,
            options.data,
            name_of_file=gallery.name_of_probe,
            progress=True,
            least=1,
        )
        names = [probes.names[label] for label in probes.labels]
        metrics = identification.evaluate(gallery, probes.x, names, threshold)
        report["evaluation"] = metrics
        lines += [f"- {line}" for line in (*probes.notes, *probes.skipped)]
        lines += identification_report.format_evaluation(metrics)
    else:
        identities = _identities(options.images, embedder, gallery, threshold, index)
        report["probes"] = identification_report.make_probe_reports(
            options.images, identities
        )
        lines += identification_report.format_identities(options.images, identities)
    with replaced_together() as part:
        if options.out is not None:
            draw = identification_report.draw
            draw(index, options.images, identities, part(options.out))
            lines.append(f"written: {shown(options.out)}")
        if options.json is not None:
            reports.write_report(report, part(options.json))
    for line in lines:
        print(one_line(line))
    return 0


def _identities(
    images: Sequence[Path],
    embedder: ImageEmbedder,
    gallery: Gallery,
    threshold: float,
    index: Index,
) -> list[Identity]:
    x = vectors_of(embedder, [load_image(image) for image in images])
    own = [index.path_of(image) for image in images]
    return identification.identify(gallery, x, threshold=threshold, own=own)


def _calibration(options: Identify, embedder: ImageEmbedder) -> Calibration | None:
    """The calibration of the embedder; None if there is none and none is needed."""
    try:
        return Calibration.read(options.home, embedder.key)
    except FileNotFoundError as error:
        if options.within is None and not options.closed:
            raise FileNotFoundError(
                f"{error} Or give --within DISTANCE, or --closed."
            ) from None
        return None
