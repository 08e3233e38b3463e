"""Trains an embedding of images with a triplet loss, and shows what it is worth.

python examples/train.py
python examples/train.py --mining semi-hard --seed 1 --out runs/semi-hard
"""

import argparse
import sys
from pathlib import Path

from tripletjax.learn import training


def main() -> int:
    defaults = training.Config()
    parser = argparse.ArgumentParser(
        description="Train an embedding of images with a triplet loss.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--data", default=defaults.data, help="the dataset: digits")
    parser.add_argument(
        "--out", type=Path, help="the run directory (default: a new one in runs/)"
    )
    parser.add_argument(
        "--mining",
        choices=training.MINING,
        default=defaults.mining,
        help="which triplets to train on",
    )
    for name, what in (
        ("steps", "how many steps to train"),
        ("seed", "of everything that is random"),
        ("margin", "of the triplet loss"),
    ):
        default = getattr(defaults, name)
        parser.add_argument(f"--{name}", type=type(default), default=default, help=what)
    arguments = parser.parse_args()
    options = vars(arguments)
    out = options.pop("out") or free_directory(Path("runs") / arguments.data)
    try:
        evaluations = training.run(training.Config(**options), out)
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2

    print(
        f"\n{'test images, in %':<20}{'MAP@R':>8}{'R-prec.':>9}{'recall@1':>10}", end=""
    )
    print(f"{'nearest training image':>24}")
    for name, metrics in evaluations.items():
        print(f"{name:<20}", end="")
        for value, width in zip(metrics.values(), (8, 9, 10, 24)):
            print(f"{value:{width}.1f}", end="")
        print()
    print(f"\nEverything is in {out}: look at neighbors.png.")
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
