"""``tripletjax train``."""

import dataclasses
import json
import sys
import traceback
from pathlib import Path
from typing import Any

from tripletjax import learn
from tripletjax.cli.common import FAULTS, message_of, shown
from tripletjax.cli.options import Train
from tripletjax.learn.counts import counted
from tripletjax.learn.distributed import processes
from tripletjax.learn.distributed.placement import Placement, mesh_of
from tripletjax.learn.runs import preparation, record
from tripletjax.learn.runs.config import Config
from tripletjax.learn.runs.options import OptionError
from tripletjax.learn.training import interrupts

PROG = "tripletjax train"
# Columns of the results, by the names of metrics.
COLUMNS = {
    "map_at_r": "MAP@R",
    "r_precision": "R-precision",
    "recall_at_1": "recall@1",
    "gallery_recall_at_1": "nearest training image is of the class",
    "triplet_accuracy": "positive nearer than negative",
}


def call(options: Train) -> int:
    """Train in this process, alone or as one of several."""
    if options.processes is None:
        return _train(options)
    if options.coordinator is not None:
        try:
            first = options.process == 0
            processes.check_coordinator(options.coordinator, first=first)
        except ValueError as error:
            raise OptionError(f"{{coordinator}} {error}.") from None
    try:
        with processes.joined(
            coordinator=options.coordinator,
            count=options.process_count,
            index=options.process,
        ):
            return _train(dataclasses.replace(options, devices="all"))
    except (*FAULTS, processes.OtherProcessError) as error:
        processes.end(f"{PROG}: {message_of(error, Train)}")
    except KeyboardInterrupt:
        processes.end("", 130)
    except Exception:
        processes.end(traceback.format_exc())


def _train(options: Train) -> int:
    on = Placement(mesh_of(options.devices))
    config, out = _request(options, on)
    try:
        evaluations = learn.run(
            config,
            out,
            resume=options.resume,
            tensorboard=options.tensorboard,
            mesh=on.mesh,
        )
    except KeyboardInterrupt as error:
        if on.first:
            print(
                f"\n{PROG}: {str(error) or 'stopped'}. To continue, run the same "
                f"command with --out {out} --resume",
                file=sys.stderr,
            )
        if on.processes > 1 and not isinstance(error, interrupts.Stopped):
            raise
        return 130
    if on.first:
        _print_results(evaluations, config, out)
    return 0


def _request(options: Train, on: Placement) -> tuple[Config, Path]:
    """The configuration and the run directory, those of process 0 but for locations."""
    # Data may be elsewhere on another machine; all else must be the same.
    requested, names = options.requested, preparation.LOCATIONS
    locations = {name: requested[name] for name in names if name in requested}
    own = {k: v for k, v in requested.items() if k not in locations}
    own |= {"augment": options.augment, "resume": options.resume}
    first = on.of_first(lambda: own)
    differ = [k for k in sorted(first | own) if repr(first.get(k)) != repr(own.get(k))]
    if differ:
        raise OptionError(
            "options must be those of process 0, got others for "
            f"{', '.join(f'{{{name}}}' for name in differ)}."
        )
    config, out = on.of_first(
        lambda: preparation.make_request(
            requested, augment=options.augment, out=options.out, resume=options.resume
        )
    )
    return dataclasses.replace(config, **locations), out


def _print_results(
    evaluations: dict[str, dict[str, Any]], config: Config, out: Path
) -> None:
    items = "images" if config.triplets is None else "triplets"
    columns = {k: v for k, v in COLUMNS.items() if k in evaluations["trained"]}
    if columns:
        title = f"test {items}, in %"
        print(f"\n{title:<19}  " + "  ".join(columns.values()))
        for name, metrics in evaluations.items():
            values = (f"{metrics[k]:{len(v)}.1f}" for k, v in columns.items())
            print(f"{name:<19}  " + "  ".join(values))
        for line in _interval_lines(evaluations["trained"]):
            print(line)
    else:
        more = "; --split classes holds out whole classes" if items == "images" else ""
        print(f"\nNo test: there are too few {items} to hold any out{more}.")
    summary = json.loads((out / record.SUMMARY).read_text(encoding="utf-8"))
    # A run of an earlier version has no such entry.
    if "kept_step" in summary:
        print(f"\nKept checkpoint: step {_kept_step(summary)}.")
    skipped = summary["counts"].pop("skipped")
    counts = (
        f"{n:,} {part.replace('_', ' ')}" for part, n in summary["counts"].items()
    )
    print(f"\n{summary['parameters']:,} parameters; {items}: {', '.join(counts)}.")
    reasons, entries = (
        ", ".join(f"{reason}: {n:,}" for reason, n in summary.get(key, {}).items())
        for key in ("skipped", "skipped_entries")
    )
    if skipped:
        images = counted(skipped, "image is left out", "images are left out")
        print(f"{images}{reasons and f' ({reasons})'}.")
    if entries:
        print(f"Other entries that are left out: {entries}.")
    if skipped or entries:
        print("config.json names each entry with its reason.")
    picture = "neighbors" if items == "images" else items
    print(f"Run directory: {shown(out)}; see {picture}.png.")


def _kept_step(summary: dict[str, Any]) -> str:
    """The kept step, and the number of steps."""
    step, steps = summary["kept_step"], summary["steps"]
    if step == 0:
        return "0, the closed form of the head"
    return f"{step:,}, the last" if step == steps else f"{step:,} of {steps:,}"


def _interval_lines(trained: dict[str, Any]) -> list[str]:
    """Lines with the intervals of the final numbers, if there are any."""
    unit = "anchors" if "anchors" in trained else "classes"
    return [
        f"{COLUMNS[name]} {trained[name]:.1f} % [{low:.1f}, {high:.1f}] over "
        f"{trained[unit]:,} {unit} (95 % interval)"
        for name, (low, high) in trained.get("intervals", {}).items()
    ]
