"""Trains an embedding of images with a triplet loss, and shows what it is worth.

python examples/train.py
python examples/train.py --data photos --out runs/photos
python examples/train.py --out runs/photos --resume
python examples/train.py --triplets chosen.csv --out runs/chosen
"""

import argparse
import json
import sys
from pathlib import Path

from tripletjax.learn import (
    augment,
    data,
    image_analysis,
    runs,
    sampling,
    tasks,
    training,
)

# Or what the images are, from which the augmentation follows.
AUGMENTS = {"none": augment.Augment(), "more": tasks.SCARCE_GREY}
# What has a meaning for images with labels alone, and for given triplets alone.
OF_CLASSES = (
    *("data", "split", "classes_from", "mining", "weighting", "classes", "per_class"),
    "turns",
)
OF_TRIPLETS = ("batch",)


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Train an embedding of images with a triplet loss.",
        epilog="What is not given is chosen by the data, and written to config.json.",
    )
    parser.add_argument(
        "--data",
        help="digits, a folder with one folder of images per class, or tfds:NAME "
        "(default: digits)",
    )
    parser.add_argument(
        "--triplets",
        help="instead of --data: a CSV file with the paths of an anchor, a positive "
        "and a negative in each line",
    )
    parser.add_argument(
        "--out", type=Path, help="the run directory (default: a new one in runs/)"
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on with the run in --out, if any"
    )
    for name, choices, what in (
        ("split", data.SPLITS, "what is held out (default: images)"),
        ("classes-from", data.CLASSES_FROM, "which of nested folders are classes"),
        ("mining", training.MINING, "which triplets to train on (default: semi-hard)"),
        ("weighting", sampling.WEIGHTINGS, "how classes are drawn (default: uniform)"),
        ("model", runs.MODELS, "the network"),
    ):
        parser.add_argument(f"--{name}", choices=choices, help=what)
    parser.add_argument(
        "--augment",
        choices=(*image_analysis.KINDS, *AUGMENTS),
        help="how images are changed at random while training: photos and characters "
        "say what they are, so that their size and network follow",
    )
    for name, kind, what in (
        ("steps", int, "how many steps to train"),
        ("seed", int, "of everything that is random (default: 0)"),
        ("margin", float, "of the triplet loss (default: 0.2)"),
        ("learning-rate", float, "at its peak"),
        ("dim", int, "dimensions of the embedding"),
        ("size", int, "of images, the longer side in pixels"),
        ("classes", int, "classes in a batch"),
        ("per-class", int, "images of each class in a batch"),
        ("turns", int, "turned and mirrored copies that are classes: 1, 2, 4 or 8"),
        ("batch", int, "given triplets in a batch"),
        ("chunk", int, "images embedded at a time, to save memory"),
    ):
        parser.add_argument(f"--{name}", type=kind, help=what)
    parser.add_argument(
        "--bfloat16", action="store_true", help="compute the network in bfloat16"
    )
    parser.add_argument(
        "--tensorboard",
        action="store_true",
        help="write what TensorBoard reads, too (needs tensorboardX)",
    )
    options = vars(parser.parse_args())
    out, resume = options.pop("out"), options.pop("resume")
    tensorboard = options.pop("tensorboard")
    options = {name: value for name, value in options.items() if value is not None}
    before = {}
    if resume and out is not None and (out / "config.json").exists():
        try:
            before = runs.asked_of(out)
        except (OSError, ValueError, KeyError) as error:
            parser.error(f"{out / 'config.json'} is of no run: {error!r}")
    given = "triplets" in (before | options)
    for name in OF_CLASSES if given else OF_TRIPLETS:
        if name in options:
            parser.error(
                f"--{name.replace('_', '-')} is of no use "
                f"{'with' if given else 'without'} --triplets"
            )
    if options.get("augment") in image_analysis.KINDS:
        options["kind"] = options.pop("augment")
    elif "augment" in options:
        options["augment"] = AUGMENTS[options["augment"]]
    if resume and out is None:
        parser.error("--resume needs --out, the run to go on with")
    if out is None:
        named = options.get("triplets") or options.get("data", "digits")
        name = Path(named).resolve().stem or "run"
        out = free_directory(Path("runs") / name)
    try:
        evaluations = runs.run(
            runs.Config(**before | options), out, resume=resume, tensorboard=tensorboard
        )
    except KeyboardInterrupt as error:
        print(
            f"\n{parser.prog}: {str(error) or 'stopped'}. To go on, run the same with "
            f"--out {out} --resume",
            file=sys.stderr,
        )
        return 130
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2

    columns = {
        "map_at_r": "MAP@R",
        "r_precision": "R-precision",
        "recall_at_1": "recall@1",
        "nearest_in_train": "nearest training image",
        "ranked_right": "positive nearer than negative",
    }
    columns = {k: v for k, v in columns.items() if k in evaluations["trained"]}
    what, picture = "images", "neighbors"
    if given:
        what = picture = "triplets"
    if columns:
        title = f"test {what}, in %"
        print(f"\n{title:<19}  " + "  ".join(columns.values()))
        for name, metrics in evaluations.items():
            values = (f"{metrics[k]:{len(v)}.1f}" for k, v in columns.items())
            print(f"{name:<19}  " + "  ".join(values))
    else:
        more = "" if given else "; --split classes holds out whole classes"
        print(f"\nThere are too few to hold any out for a test{more}.")
    summary = json.loads((out / "summary.json").read_text())
    skipped = summary["counts"].pop("skipped")
    counts = (
        f"{n:,} {part.replace('_', ' ')}" for part, n in summary["counts"].items()
    )
    print(f"\n{summary['parameters']:,} parameters; {what}: {', '.join(counts)}.")
    if skipped:
        print(f"{skipped:,} images that could not be read are named in config.json.")
    print(f"Everything is in {out}: look at {picture}.png.")
    return 0


def free_directory(wanted: Path) -> Path:
    """`wanted`, or the first of wanted-2, wanted-3, ... that does not exist."""
    out, number = wanted, 1
    while out.exists():
        number += 1
        out = wanted.with_name(f"{wanted.name}-{number}")
    return out


if __name__ == "__main__":
    sys.exit(main())
