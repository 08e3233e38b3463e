"""``tripletjax verify``."""

from tripletjax.apps import verification
from tripletjax.apps.images import load_image
from tripletjax.apps.verification import report as verification_report
from tripletjax.apps.verification.calibration import FOLDER, Calibration
from tripletjax.cli.common import one_line, open_embedder, shown
from tripletjax.cli.options import Verify
from tripletjax.learn import reports
from tripletjax.learn.data.sources import parse_source
from tripletjax.learn.embedder import ImageEmbedder
from tripletjax.learn.files import free_path


def call(options: Verify) -> int:
    if options.json is not None:
        reports.check_replaceable(options.json)
    embedder = open_embedder(options)
    if options.data is None:
        _compare(options, embedder)
    else:
        _calibrate(options, embedder, options.data)
    return 0


def _compare(options: Verify, embedder: ImageEmbedder) -> None:
    """Print whether two images are of the same class."""
    calibration = Calibration.read(options.home, embedder.key)
    first, second = map(load_image, options.images)
    decision = verification.decide(embedder, first, second, calibration)
    if options.json is not None:
        report = verification_report.make_decision_report(
            options.images, decision, calibration
        )
        reports.write_report(report, options.json)
    print(verification_report.format_decision(decision, calibration))


def _calibrate(options: Verify, embedder: ImageEmbedder, data: str) -> None:
    """Measure verification on a folder, and keep a threshold in its directory."""
    source, home = parse_source(data), options.home
    out = options.out
    if out is None:
        out = free_path(home / "verifications" / source.label)
    reports.check_empty(out)
    with verification.folder_of(data) as folder:
        result = verification.evaluate(
            embedder,
            folder,
            far=verification.FAR if options.far is None else options.far,
            pairs_file=options.pairs,
            classes_from=options.classes_from,
            name=source.name if source.in_tfds else None,
            progress=True,
        )
        verification_report.write(result, out)
    if options.json is not None:
        reports.write_report(result.report, options.json)
    calibration = result.calibration
    earlier = None if calibration is None else calibration.write(home)
    for line in verification_report.format_report(result.report):
        print(one_line(line))
    print()
    if calibration is not None:
        print(verification_report.format_threshold(calibration))
        if options.run is None:
            print(f"The threshold is kept in {shown(home / FOLDER)}.")
        if earlier is not None:
            print(f"The threshold is in use; the earlier one is in {earlier.name}.")
    elif (home / FOLDER).exists():
        print(f"The threshold in {shown(home / FOLDER)} stays in use.")
    print(f"Report directory: {shown(out)}; see roc, distances and errors.png.")
