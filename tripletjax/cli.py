"""The command ``tripletjax``: parses, calls, prints.

Its exit status is 0, 2 for wrong use or bad input, with one line on stderr, or 130 for
an interrupt.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import tripletjax as tj
from tripletjax.learn import choices, compile_cache

# What has a meaning for images with labels alone, and for given triplets alone.
OF_CLASSES = (
    *(
        "data",
        "split",
        "classes_from",
        "mining",
        "class_sampling",
        "relevance",
        "classes",
        "per_class",
    ),
    "rotation_classes",
    "memory",
    "memory_warmup",
    "memory_momentum",
)
OF_TRIPLETS = ("triplets_per_batch",)
# Errors that a line tells all about.
FAULTS = ValueError, OSError, ImportError, FloatingPointError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: its arguments, those of the process if not given.

    Returns:
        The exit status.
    """
    with _replacing_characters():
        return _main(sys.argv[1:] if argv is None else list(argv))


@contextlib.contextmanager
def _replacing_characters() -> Iterator[None]:
    """Prints replacement characters for those that the output cannot encode."""
    streams: list[Any] = [sys.stdout, sys.stderr]
    before = [(x, x.errors) for x in streams if hasattr(x, "reconfigure")]
    for stream, errors in before:
        if errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="replace")
    try:
        yield
    finally:
        for stream, errors in before:
            stream.reconfigure(errors=errors)


def _main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="tripletjax",
        description="Train embeddings of images with triplet losses, and use them.",
        epilog="tripletjax COMMAND --help tells more of each.",
    )
    parser.add_argument("--version", action="version", version=tj.__version__)
    commands = parser.add_subparsers(metavar="COMMAND", required=True, dest="command")
    for name, (what, options, call) in COMMANDS.items():
        command = commands.add_parser(
            name, help=what, description=f"{what.capitalize()}."
        )
        command.set_defaults(call=call, parser=command)
        options(command)
    given = vars(parser.parse_args(argv))
    call, command = given.pop("call"), given.pop("parser")
    del given["command"]
    compile_cache.keep_programs()
    try:
        return call(command, given)
    except ModuleNotFoundError as error:
        _missing(command, error, "train")
    except FAULTS as error:
        print(f"{command.prog}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\n{command.prog}: stopped.", file=sys.stderr)
        return 130


def _missing(
    parser: argparse.ArgumentParser, error: ImportError, extras: str
) -> NoReturn:
    """Ends for want of a package, and says what brings it."""
    parser.error(
        f'{error}: it needs pip install "tripletjax[{extras}]" (or -e ".[{extras}]" in '
        "a checkout)"
    )


def _train_options(parser: argparse.ArgumentParser) -> None:
    from tripletjax.learn.data.splits import MIN_CLASSES

    parser.epilog = (
        "What is not given is chosen by the data, and written to config.json. The run "
        "keeps its last model, unless an earlier one is better by more than the "
        f"standard error over classes, of at least {MIN_CLASSES} validation classes."
    )
    what = parser.add_argument_group("what to learn from")
    what.add_argument(
        "--data",
        help="digits, a folder with one folder of images per class, or tfds:NAME "
        "(default: digits)",
    )
    what.add_argument(
        "--triplets",
        metavar="FILE.csv",
        help="instead of --data: a CSV file with the paths of an anchor, a positive "
        "and a negative in each line",
    )
    how = parser.add_argument_group("how to train")
    run = parser.add_argument_group("the run")
    run.add_argument(
        "--out",
        type=Path,
        metavar="RUN",
        help="the run directory (default: a new one in runs/)",
    )
    run.add_argument(
        "--resume", action="store_true", help="go on with the run in --out, if any"
    )
    run.add_argument(
        "--devices",
        metavar="N",
        help="how many devices to split every batch over: all, or a number (default: "
        "1); a run can go on with another number",
    )
    run.add_argument(
        "--processes",
        metavar="N",
        help="train in N processes: start this command once for each, with "
        "--coordinator and --process; in the processes of a cluster that JAX knows "
        "(Slurm, Open MPI, Kubernetes, TPU pods): cluster",
    )
    run.add_argument(
        "--coordinator",
        metavar="HOST:PORT",
        help="address of process 0, the same in every process; the port must be free",
    )
    run.add_argument(
        "--process", type=int, metavar="K", help="number of this process, from 0"
    )
    run.add_argument(
        "--tensorboard",
        action="store_true",
        help="write what TensorBoard reads, too (needs tensorboardX)",
    )
    for group, name, values, help_text in (
        (what, "split", choices.SPLITS, "what is held out (default: images)"),
        (
            *(what, "classes-from", choices.CLASSES_FROM),
            "which of nested folders are classes",
        ),
        (
            *(what, "augment", (*choices.KINDS, "none", "more")),
            "how images are changed at random while training: photos and characters "
            "say what they are, so that their size and network follow",
        ),
        (
            *(how, "mining", choices.MINING),
            "which triplets to train on (default: semi-hard)",
        ),
        (
            *(how, "class-sampling", choices.CLASS_SAMPLING),
            "how classes are drawn (default: uniform)",
        ),
        (
            *(how, "relevance", choices.RELEVANCE),
            "who is to be nearer: images of one class, or those that share more "
            "folders (default: classes)",
        ),
        (
            *(how, "model", choices.MODELS),
            "the network; resnet18 and so on are torchvision's, from nothing",
        ),
        (
            *(how, "backbone-training", choices.TRAININGS),
            "what of --backbone is trained: a head on it, its last stages, too, or "
            "all (default: frozen for less than 5,000 images on CPUs, or top)",
        ),
    ):
        group.add_argument(f"--{name}", choices=values, help=help_text)
    for group, name, kind, told in (
        (run, "steps", int, "how many steps to train"),
        (run, "seed", int, "of everything that is random (default: 0)"),
        (what, "size", int, "of images, the longer side in pixels"),
        (
            *(what, "rotation-classes", int),
            "turned and mirrored copies that are classes: 1, 2, 4 or 8",
        ),
        (how, "margin", float, "of the triplet loss (default: 0.2)"),
        (how, "learning-rate", float, "at its peak"),
        (how, "dim", int, "dimensions of the embedding"),
        (how, "hidden", int, "width of a second layer of the head on a backbone"),
        (how, "views", int, "views of each image for a frozen backbone (default: 2)"),
        (how, "classes", int, "classes in a batch"),
        (how, "per-class", int, "images of each class in a batch"),
        (
            *(how, "memory", int),
            "embeddings of earlier batches that a batch is compared with, too",
        ),
        (
            *(how, "memory-warmup", float),
            "share of the steps before the first is kept (default: 0.1)",
        ),
        (
            *(how, "memory-momentum", float),
            "how slowly a copy of the network follows it, which embeds what is kept; "
            "0: the network itself (default: 0.99)",
        ),
        (how, "triplets-per-batch", int, "given triplets in a batch"),
        (how, "embed-chunk-size", int, "images embedded at a time, to save memory"),
    ):
        group.add_argument(f"--{name}", type=kind, help=told)
    how.add_argument(
        "--backbone",
        metavar="FILE.safetensors",
        help="a pretrained network to begin with: ResNet, DINOv2, ConvNeXt or "
        "Inception-ResNet-v1",
    )
    how.add_argument(
        "--bfloat16", action="store_true", help="compute the network in bfloat16"
    )


def _train(parser: argparse.ArgumentParser, given: dict[str, Any]) -> int:
    """Train in this process, alone or as one of several."""
    from tripletjax.learn.distributed import processes

    number, coordinator, index = (
        given.pop(name) for name in ("processes", "coordinator", "process")
    )
    if number is None:
        if coordinator is not None or index is not None:
            parser.error("--coordinator and --process require --processes")
        return _train_here(parser, given)
    count = int(number) if number.isdecimal() else None
    if number != "cluster" and not count:
        parser.error(f"--processes must be a number or cluster, got {number}")
    if given["devices"] not in (None, "all"):
        parser.error("--devices must be all with --processes")
    given["devices"] = "all"
    if (coordinator is None, index is None) != (count is None, count is None):
        parser.error(
            "--processes N requires --coordinator and --process, --processes cluster "
            "neither; one process uses all devices of a machine by --devices all"
        )
    if index is not None and not 0 <= index < (count or 0):
        parser.error(f"--process must be 0 to {count} - 1, got {index}")
    if coordinator is not None:
        try:
            processes.check_coordinator(coordinator, first=index == 0)
        except ValueError as error:
            parser.error(f"--coordinator {error}")
    try:
        with processes.joined(coordinator=coordinator, count=count, index=index):
            return _train_here(parser, given)
    except (*FAULTS, processes.OtherProcessError) as error:
        processes.end(f"{parser.prog}: {error}")
    except KeyboardInterrupt:
        processes.end("", 130)
    except SystemExit:
        processes.end("")
    except Exception:
        processes.end(traceback.format_exc())


def _asked_of(
    parser: argparse.ArgumentParser, given: dict[str, Any]
) -> tuple[Any, Path]:
    """What is to be trained, and in which run directory."""
    from tripletjax.learn.data import augment
    from tripletjax.learn.files import free_path
    from tripletjax.learn.runs import config, defaults, record

    out, resume = given.pop("out"), given.pop("resume")
    options = {name: value for name, value in given.items() if value is not None}
    before = {}
    if resume and out is not None and (out / record.FILE).exists():
        try:
            before = record.options_of(record.RunRecord.read(out).requested)
        except (OSError, ValueError) as error:
            parser.error(str(error))
    of_triplets = "triplets" in (before | options)
    for name in OF_CLASSES if of_triplets else OF_TRIPLETS:
        if name in options:
            rule = "cannot be combined with" if of_triplets else "requires"
            parser.error(f"--{name.replace('_', '-')} {rule} --triplets")
    augments = {"none": augment.Augment(), "more": defaults.SCARCE_CHARACTERS}
    if options.get("augment") in choices.KINDS:
        options["kind"] = options.pop("augment")
    elif "augment" in options:
        options["augment"] = augments[options["augment"]]
    if resume and out is None:
        parser.error("--resume needs --out, the run to go on with")
    if out is None:
        named = options.get("triplets") or options.get("data", "digits")
        out = free_path(Path("runs") / (Path(named).resolve().stem or "run"))
    return config.Config(**before | options), out


def _train_here(parser: argparse.ArgumentParser, given: dict[str, Any]) -> int:
    """Trains in this process."""
    from tripletjax import learn
    from tripletjax.learn.distributed import placement
    from tripletjax.learn.runs import preparation
    from tripletjax.learn.training import interrupts

    resume, tensorboard = given["resume"], given.pop("tensorboard")
    on = placement.Placement(placement.mesh_of(given.pop("devices")))
    # Data may be elsewhere on another machine; all else is what the first is given.
    where = preparation.LOCATIONS
    locations = {name: given[name] for name in where if given[name] is not None}
    options = {k: v for k, v in given.items() if k not in (*where, "out")}
    if (first := on.of_first(lambda: options)) != options:
        differ = [name for name in options if options[name] != first.get(name)]
        parser.error(f"process 0 is given other options than this: {', '.join(differ)}")
    config, out = on.of_first(lambda: _asked_of(parser, given))
    config = dataclasses.replace(config, **locations)
    try:
        evaluations = learn.run(
            config, out, resume=resume, tensorboard=tensorboard, mesh=on.mesh
        )
    except KeyboardInterrupt as error:
        if on.first:
            print(
                f"\n{parser.prog}: {str(error) or 'stopped'}. To go on, run the same "
                f"with --out {out} --resume",
                file=sys.stderr,
            )
        if on.processes > 1 and not isinstance(error, interrupts.Stopped):
            raise
        return 130
    if not on.first:
        return 0
    of_triplets = config.triplets is not None
    columns = {
        "map_at_r": "MAP@R",
        "r_precision": "R-precision",
        "recall_at_1": "recall@1",
        "gallery_recall_at_1": "nearest training image",
        "triplet_accuracy": "positive nearer than negative",
    }
    columns = {k: v for k, v in columns.items() if k in evaluations["trained"]}
    what, picture = "images", "neighbors"
    if of_triplets:
        what = picture = "triplets"
    if columns:
        title = f"test {what}, in %"
        print(f"\n{title:<19}  " + "  ".join(columns.values()))
        for name, metrics in evaluations.items():
            values = (f"{metrics[k]:{len(v)}.1f}" for k, v in columns.items())
            print(f"{name:<19}  " + "  ".join(values))
        for line in _interval_lines(evaluations["trained"], columns):
            print(line)
    else:
        more = "" if of_triplets else "; --split classes holds out whole classes"
        print(f"\nThere are too few to hold any out for a test{more}.")
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    # A run of an earlier version has no such entry.
    if "kept_step" in summary:
        print(f"\nThe kept checkpoint is of step {_kept_of(summary)}.")
    skipped = summary["counts"].pop("skipped")
    counts = (
        f"{n:,} {part.replace('_', ' ')}" for part, n in summary["counts"].items()
    )
    print(f"\n{summary['parameters']:,} parameters; {what}: {', '.join(counts)}.")
    reasons, entries = (
        ", ".join(f"{reason}: {n:,}" for reason, n in summary.get(key, {}).items())
        for key in ("skipped", "skipped_entries")
    )
    if skipped:
        print(f"{skipped:,} images are left out{reasons and f' ({reasons})'}.")
    if entries:
        print(f"Other entries that are left out: {entries}.")
    if skipped or entries:
        print("config.json names each entry with its reason.")
    print(f"Everything is in {_shown(out)}: look at {picture}.png.")
    return 0


def _kept_of(summary: dict[str, Any]) -> str:
    """The kept step, and of how many."""
    step, steps = summary["kept_step"], summary["steps"]
    return f"{step:,}, the last" if step == steps else f"{step:,} of {steps:,}"


def _interval_lines(trained: dict[str, Any], columns: dict[str, str]) -> list[str]:
    """Lines with the intervals of the final numbers, if there are any."""
    unit = "anchors" if "anchors" in trained else "classes"
    return [
        f"{columns[name]} {trained[name]:.1f} % [{low:.1f}, {high:.1f}] over "
        f"{trained[unit]:,} {unit} (95 % interval)"
        for name, (low, high) in trained.get("intervals", {}).items()
    ]


def _evaluate_options(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "Retrieval: every image asks for the others of its class. Verification: every "
        "pair is of the same class or not. The report and the pictures (ROC, distances "
        "of same and different pairs, nearest neighbours) are written to --out."
    )
    _run_option(parser)
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="one folder of images per class, which the run need not have seen",
    )
    _classes_from(parser)
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="where to write (default: a new one in RUN/evaluations/)",
    )
    _report_option(parser)


def _evaluate(parser: argparse.ArgumentParser, given: dict[str, Any]) -> int:
    from tripletjax.learn import evaluation, reports
    from tripletjax.learn.files import free_path

    run, folder, out = given["run"], given["data"], given["out"]
    if given["json"] is not None:
        reports.check_replaceable(given["json"])
    if out is None:
        out = free_path(run / "evaluations" / (folder.resolve().name or "data"))
    report = evaluation.evaluate(
        run, folder, out=out, classes_from=given["classes_from"], progress=True
    )
    if given["json"] is not None:
        reports.write_report(report, given["json"])

    classes = f"{report['classes']:,} classes in {_shown(folder)}"
    print(f"{report['images']:,} images of {classes}")
    for note in report["notes"]:
        print(f"- {note}")
    found, pairs, spread = (
        report[name] for name in ("retrieval", "verification", "collapse")
    )
    rows = {
        "MAP@R": found["map_at_r"],
        "R-precision": found["r_precision"],
        **{f"recall@{k}": value for k, value in found["recall_at_k"].items()},
        "mean average precision": found["mean_average_precision"],
    }
    _table(f"retrieval, {found['queries']:,} queries", rows, " %")
    rows = {
        "equal error rate": pairs["equal_error_rate"],
        "area under the ROC": pairs["area_under_roc"],
        **{f"TAR at FAR {x['far']:g} %": x["tar"] for x in pairs["at_far"]},
    }
    n = f"{pairs['positives']:,} same and {pairs['negatives']:,} different pairs"
    _table(f"verification, {n}", rows, " %")
    rows = {
        "mean distance": spread["mean_distance"],
        "its standard deviation": spread["distance_std"],
        "effective rank": spread["effective_rank"],
    }
    _table("spread of the embeddings: near 0, and rank 1, if collapsed", rows, "")
    print(f"\nEverything is in {_shown(out)}: look at roc, distances, neighbors.png.")
    return 0


def _table(title: str, rows: dict[str, float | None], unit: str) -> None:
    print(f"\n{title}")
    for name, value in rows.items():
        told = "-" if value is None else f"{value:.2f}{unit}"
        print(f"  {name:<24}{told:>10}")


def _search_options(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "The index is brought up to date first: what is new or has changed is "
        "embedded, what is gone is removed. Distances are Euclidean, of unit vectors: "
        "from 0 to 2."
    )
    _run_option(parser)
    _index_option(parser)
    _database_option(parser)
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--query", type=Path, nargs="+", metavar="IMAGE", help="images to search by"
    )
    what.add_argument(
        "--duplicates",
        action="store_true",
        help="groups of images that are nearly the same",
    )
    parser.add_argument(
        "--approximate",
        action="store_true",
        help="look only where most of the nearest are: faster from some 300,000 "
        "images on",
    )
    parser.add_argument(
        "--together",
        action="store_true",
        help="search by the mean of all queries, and not by each alone",
    )
    parser.add_argument(
        "-k", type=int, default=8, help="how many are found at most (default: 8)"
    )
    parser.add_argument(
        "--within",
        type=float,
        metavar="DISTANCE",
        help="the largest distance (default: none; of duplicates 0.1)",
    )
    parser.add_argument(
        "--classes",
        nargs="+",
        metavar="FOLDER",
        help="only images that lie in these folders of the index, at any depth",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="a picture of what is found (PNG), or the groups of duplicates (CSV)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="all of it as JSON")


def _search(parser: argparse.ArgumentParser, given: dict[str, Any]) -> int:
    try:
        from tripletjax.apps.embedders import embedder_of
        from tripletjax.apps.search import report as search_report
        from tripletjax.learn.files import write_json
    except ImportError as error:
        _missing(parser, error, "train,search")

    for option in ("together", "classes", "approximate"):
        if given[option] and not given["query"]:
            parser.error(f"--{option} requires --query")
    for name in ("out", "json"):
        file = given[name]
        if file is not None and file.exists():
            parser.error(f"{file} is there; it is left as it is")
    if given["out"] is not None and not (given["query"] or given["duplicates"]):
        parser.error("--out requires --query or --duplicates")
    if given["out"] is not None and given["query"]:
        _check_new_picture(parser, given["out"])
    _check_images(parser, given["query"] or ())
    index, changes = _updated(given["index"], given, embedder_of(given["run"]))
    report: dict[str, Any] = {"index": search_report.report_changes(index, changes)}
    lines: list[str] = []
    if given["approximate"] and not index.has_approximate:
        print("sharing out the vectors into cells, once")
        index.build_approximate()
    if given["query"]:
        found = search_report.search_files(
            index,
            given["query"],
            k=given["k"],
            within=given["within"],
            classes=given["classes"],
            together=given["together"],
            approximate=given["approximate"],
        )
        report["queries"] = found
        lines += search_report.ranked_lines(found)
        if given["out"] is not None:
            search_report.draw_hits(index, found, given["out"])
    elif given["duplicates"]:
        within = 0.1 if given["within"] is None else given["within"]
        groups = index.duplicates(within)
        report["duplicates"] = groups
        count = sum(map(len, groups))
        lines.append(f"{len(groups):,} groups of {count:,} images within {within:g}")
        if given["out"] is not None:
            search_report.write_groups(groups, given["out"])
        else:
            lines += ["  " + "  ".join(group) for group in groups]
    if given["json"] is not None:
        write_json(given["json"], report)
    for line in lines:
        print(line)
    for name in ("out", "json"):
        if given[name] is not None:
            print(f"{_shown(given[name])} is written")
    return 0


def _verify_options(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "First --data, on images of classes that the run was not trained on: it is "
        "measured there, and a threshold is chosen and kept beside the run. Then two "
        "images: same or different by that threshold. Distances are Euclidean, of unit "
        "vectors: from 0 to 2."
    )
    parser.add_argument(
        "images", nargs="*", type=Path, metavar="IMAGE", help="two images to compare"
    )
    _run_option(parser)
    parser.add_argument(
        "--data",
        type=Path,
        metavar="FOLDER",
        help="one folder of images per class, such as a person, or tfds:NAME",
    )
    parser.add_argument(
        "--pairs",
        type=Path,
        metavar="FILE",
        help="a pairs.txt as of Labeled Faces in the Wild (default: all pairs)",
    )
    parser.add_argument(
        "--far",
        type=float,
        metavar="SHARE",
        help="the false accept rate of the threshold (default: 0.01); no threshold is "
        "chosen if there are too few pairs to show this rate",
    )
    _classes_from(parser)
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="where to write (default: a new one in RUN/verifications/)",
    )
    _report_option(parser)


def _verify(parser: argparse.ArgumentParser, given: dict[str, Any]) -> int:
    from tripletjax.apps import verification
    from tripletjax.apps.embedders import embedder_of
    from tripletjax.apps.images import load_image
    from tripletjax.apps.verification import report as verification_report
    from tripletjax.apps.verification.calibration import FOLDER, Calibration
    from tripletjax.learn import reports
    from tripletjax.learn.files import free_path

    run, images, folder = given["run"], given["images"], given["data"]
    if (folder is None) == (not images):
        parser.error("give two images, or --data FOLDER")
    if folder is None:
        if len(images) != 2:
            parser.error(f"two images are compared, got {len(images)}")
        for option in ("pairs", "far", "classes_from", "out"):
            if given[option] is not None:
                name = option.replace("_", "-")
                parser.error(f"--{name} requires --data")
    if given["json"] is not None:
        reports.check_replaceable(given["json"])
    embedder = embedder_of(run)
    if folder is None:
        calibration = Calibration.read(run, embedder.key)
        first, second = map(load_image, images)
        decision = verification.decide(embedder, first, second, calibration)
        if given["json"] is not None:
            report = verification_report.of_decision(images, decision, calibration)
            reports.write_report(report, given["json"])
        print(verification_report.decided(decision, calibration))
        return 0

    out = given["out"]
    name = str(folder) if str(folder).startswith("tfds:") else None
    if out is None:
        called = name.replace(":", "-") if name else folder.resolve().name
        out = free_path(run / "verifications" / (called or "data"))
    reports.check_empty(out)
    with verification.folder_of(str(folder)) as path:
        found = verification.evaluate(
            embedder,
            path,
            far=verification.FAR if given["far"] is None else given["far"],
            pairs_file=given["pairs"],
            classes_from=given["classes_from"],
            name=name,
            progress=True,
        )
        verification_report.write(found, out)
    if given["json"] is not None:
        reports.write_report(found.report, given["json"])
    calibration = found.calibration
    earlier = None if calibration is None else calibration.write(run)
    for line in verification_report.lines(found.report):
        print(line)
    print()
    if calibration is not None:
        print(verification_report.chosen(calibration))
        if earlier is not None:
            print(f"It is used from now on; the one before is in {earlier.name}.")
    elif (run / FOLDER).exists():
        print(f"The threshold in {_shown(run / FOLDER)} stays in use.")
    print(f"Everything is in {_shown(out)}: look at roc, distances and errors.png.")
    return 0


def _identify_options(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "With a few images of each class it is few-shot classification. The threshold "
        "is that of tripletjax verify, and how many of the images that it was chosen "
        "on would be given a name of this gallery is said: the more there are in it, "
        "the more."
    )
    parser.add_argument(
        "images", nargs="*", type=Path, metavar="IMAGE", help="images to name"
    )
    _run_option(parser)
    parser.add_argument(
        "--gallery",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="one folder of images per class, such as a person",
    )
    parser.add_argument(
        "--data",
        type=Path,
        metavar="FOLDER",
        help="measure on such a folder instead: classes of the gallery are known by "
        "their names, others are unknown",
    )
    parser.add_argument(
        "--means",
        action="store_true",
        help="compare with the mean of each class, and not with every image",
    )
    limit = parser.add_mutually_exclusive_group()
    limit.add_argument(
        "--fpir",
        type=float,
        metavar="SHARE",
        help="let not more than this share of others have a name of this gallery",
    )
    limit.add_argument(
        "--within", type=float, metavar="DISTANCE", help="a threshold of your own"
    )
    limit.add_argument(
        "--closed", action="store_true", help="nobody is unknown: always give a name"
    )
    _classes_from(parser)
    _database_option(parser)
    parser.add_argument(
        "--out", type=Path, metavar="FILE.png", help="a picture of what is found"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="all of it as JSON")


def _identify(parser: argparse.ArgumentParser, given: dict[str, Any]) -> int:
    try:
        from tripletjax.apps import identification
        from tripletjax.apps.embedders import embedder_of, vectors_of
        from tripletjax.apps.identification import report as identification_report
        from tripletjax.apps.images import load_image
        from tripletjax.apps.verification.calibration import Calibration
        from tripletjax.learn import evaluation, reports
    except ImportError as error:
        _missing(parser, error, "train,search")

    run, images, folder = given["run"], given["images"], given["data"]
    if (folder is None) == (not images):
        parser.error("give images to name, or --data FOLDER to measure on")
    if given["out"] is not None:
        if not images:
            parser.error("--out requires images to name")
        _check_new_picture(parser, given["out"])
    if given["json"] is not None:
        reports.check_replaceable(given["json"])
    if given["within"] is not None and not given["within"] >= 0:
        parser.error(f"--within must be at least 0, got {given['within']}")
    _check_images(parser, images)
    embedder = embedder_of(run)
    calibration = None
    try:
        calibration = Calibration.read(run, embedder.key)
    except FileNotFoundError as error:
        if given["within"] is None and not given["closed"]:
            parser.error(f"{error} Or give --within DISTANCE, or --closed")
    index, _ = _updated(given["gallery"], given, embedder)
    gallery = identification.Gallery.of(
        index, means=given["means"], classes_from=given["classes_from"], flat=True
    )
    strangers = None
    threshold = float("inf") if given["closed"] else given["within"]
    if calibration is not None:
        strangers = identification.Strangers.of(gallery, calibration)
        if given["fpir"] is not None:
            threshold = strangers.threshold_at(given["fpir"])
        elif threshold is None:
            threshold = calibration.threshold
    report = identification_report.of_gallery(
        gallery, threshold, calibration, strangers
    )
    lines = [f"- {line}" for line in gallery.notes]
    lines += [*identification_report.told(report), ""]
    if folder is not None:
        probes = evaluation.embed_folder(
            embedder,
            folder,
            name_of_file=gallery.name_of_probe,
            progress=True,
            least=1,
        )
        lines += [f"- {line}" for line in (*probes.notes, *probes.skipped)]
        names = [probes.names[label] for label in probes.labels]
        report["evaluation"] = identification.evaluate(
            gallery, probes.x, names, threshold
        )
        lines += identification_report.measured(report["evaluation"])
    else:
        x = vectors_of(embedder, [load_image(image) for image in images])
        own = [index.path_of(image) for image in images]
        found = identification.identify(gallery, x, threshold=threshold, own=own)
        report["probes"] = identification_report.of_probes(images, found)
        lines += identification_report.lines(images, found)
        if given["out"] is not None:
            identification_report.draw(index, images, found, given["out"])
            lines.append(f"{_shown(given['out'])} is written")
    if given["json"] is not None:
        reports.write_report(report, given["json"])
    for line in lines:
        print(line)
    return 0


def _serve_options(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "The page searches the index, verifies two images and identifies one, and "
        "needs nothing from elsewhere. Everybody who reaches its address can see the "
        "images of the index."
    )
    _run_option(parser)
    _index_option(parser)
    parser.add_argument(
        "--gallery",
        type=Path,
        metavar="FOLDER",
        help="whom to identify: one folder of images per class (default: the index)",
    )
    _database_option(parser)
    parser.add_argument(
        "--host", default="127.0.0.1", help="the address (default: this machine alone)"
    )
    parser.add_argument("--port", type=int, default=7860, help="(default: 7860)")


def _serve(parser: argparse.ArgumentParser, given: dict[str, Any]) -> int:
    try:
        from tripletjax.apps import serve
        from tripletjax.apps.embedders import embedder_of
        from tripletjax.apps.verification.calibration import Calibration
    except ImportError as error:
        _missing(parser, error, "train,search,serve")

    run, calibration = given["run"], None
    embedder = embedder_of(run)
    try:
        calibration = Calibration.read(run, embedder.key)
    except FileNotFoundError as error:
        print(f"- {error}")
    folders = [given["index"], given["gallery"]]
    indexes = [_updated(f, given, embedder)[0] for f in folders if f is not None]
    index, *gallery = indexes
    served = serve.served(
        index, calibration=calibration, gallery_index=gallery[0] if gallery else None
    )
    serve.run(served, host=given["host"], port=given["port"])
    return 0


def _export_options(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "The file takes images of the size that the run makes of all images, as uint8, "
        "any number at a time, and is compared with the run before it is kept."
    )
    _run_option(parser)
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="FILE",
        help="model.onnx, model.stablehlo for JAX and flatbuffers alone, or "
        "model.safetensors: the weights of a trained backbone, for --backbone",
    )
    parser.add_argument(
        "--check",
        type=Path,
        metavar="FOLDER",
        help="images to compare on (default: those that the run learnt from)",
    )


def _export(parser: argparse.ArgumentParser, given: dict[str, Any]) -> int:
    from tripletjax.apps.export import export
    from tripletjax.learn.embedder import load_embedder

    made = export(load_embedder(given["run"]), given["out"], check=given["check"])
    height, width, channels = made.shape
    told = f"{_shown(made.file)} is written, {made.size / 1e6:.1f} MB: "
    if made.file.suffix == ".safetensors":
        print(f"{told}the weights of the backbone, which gives {made.dim} features")
    else:
        print(
            f"{told}from images uint8 [n, {height}, {width}, {channels}] to vectors "
            f"[n, {made.dim}]"
        )
    if made.preparation is not None:
        print(f"{_shown(made.preparation)} holds the preparation of its images")
    for note in made.notes:
        print(f"- {note}")
    print(f"on {made.of} it differs from the run by at most {made.difference:.1g}")
    return 0


def _classes_from(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--classes-from",
        choices=choices.CLASSES_FROM,
        help="which of nested folders are classes",
    )


def _shown(path: Path) -> str:
    """A path that need not be UTF-8."""
    return os.fsencode(path).decode(errors="replace")


def _run_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", type=Path, required=True, help="a finished run")


def _index_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--index",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="the folder of images to search in, which is only read",
    )


def _database_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--database",
        type=Path,
        metavar="DIR",
        help="where indexes are kept (default: RUN/index)",
    )
    parser.add_argument(
        "--remove-missing",
        action="store_true",
        help="remove missing images from the index, also if they are most of it",
    )


def _report_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the report there, too"
    )


def _updated(folder: Path, given: dict[str, Any], embedder: Any) -> tuple[Any, Any]:
    """The index of a folder, brought up to date, and what has changed."""
    from tripletjax.apps import search

    index = search.Index(folder, given["database"] or given["run"] / "index", embedder)
    changes = index.update(
        progress=True,
        waiting=lambda: print("another process updates an index here: waiting for it"),
        remove_missing=given["remove_missing"],
    )
    print(changes)
    for line in (*changes.notes, *changes.skipped):
        print(f"- {line}")
    return index, changes


def _check_images(parser: argparse.ArgumentParser, images: Sequence[Path]) -> None:
    for image in images:
        if not image.is_file():
            parser.error(f"there is no image {image}")


def _check_new_picture(parser: argparse.ArgumentParser, out: Path) -> None:
    if out.exists():
        parser.error(f"{out} is there; it is left as it is")
    if out.suffix != ".png":
        parser.error(f"--out must be a .png file, got {out}")


Options = Callable[[argparse.ArgumentParser], None]
Call = Callable[[argparse.ArgumentParser, dict[str, Any]], int]

# By name: what it does, its options, and how it is called.
COMMANDS: dict[str, tuple[str, Options, Call]] = {
    "train": (
        "train an embedding of images, and show what it is worth",
        _train_options,
        _train,
    ),
    "evaluate": (
        "measure the embedding of a run on a folder of classes",
        _evaluate_options,
        _evaluate,
    ),
    "search": (
        "find images in a folder by images, or near-duplicates",
        _search_options,
        _search,
    ),
    "verify": (
        "tell whether two images are of the same class, by a threshold of one's own",
        _verify_options,
        _verify,
    ),
    "identify": (
        "name images by a gallery of known classes, or call them unknown",
        _identify_options,
        _identify,
    ),
    "serve": (
        "show search, verification and identification in a browser",
        _serve_options,
        _serve,
    ),
    "export": (
        "write the embedding of a run as ONNX or StableHLO",
        _export_options,
        _export,
    ),
}
