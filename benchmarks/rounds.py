"""Metrics with and without rounds of mining, at the same steps.

    python benchmarks/rounds.py --data FOLDER --steps 200 --rounds 3

Each seed trains two runs on one split of the data: without rounds and with them. The
runs have the same number of steps. The table has the metrics of held-out test classes,
or images with `--split images`, the time of each run, and the differences of rounds.
"""

import argparse
import dataclasses
import tempfile
import time
import zipfile
from pathlib import Path

import numpy as np

from tripletjax import learn
from tripletjax.cli import compile_cache

METRICS = "map_at_r", "r_precision", "recall_at_1"
OPTIONS = "size", "classes", "per_class", "rotation_classes", "model", "loss"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data", type=Path, required=True, help="digits, a folder or a zip file"
    )
    parser.add_argument("--within", default="", help="folder within the zip file")
    parser.add_argument("--split", default="classes", choices=("classes", "images"))
    parser.add_argument("--channels", type=int, nargs="+")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=3)
    for name in OPTIONS:
        number = name not in ("model", "loss")
        parser.add_argument(f"--{name.replace('_', '-')}", type=int if number else str)
    arguments = parser.parse_args()
    given = {name: getattr(arguments, name) for name in OPTIONS}
    options = {name: value for name, value in given.items() if value is not None}
    compile_cache.keep_programs()
    with tempfile.TemporaryDirectory() as directory:
        folder, root = arguments.data, Path(directory)
        if folder.suffix == ".zip":
            with zipfile.ZipFile(folder) as archive:
                archive.extractall(root / "data")
            folder = root / "data"
        config = learn.Config(
            data=str(folder / arguments.within),
            split=arguments.split,
            channels=arguments.channels and tuple(arguments.channels),
            steps=arguments.steps,
            **options,
        )
        compare(config, arguments.rounds, arguments.seeds, root)


def compare(config: learn.Config, rounds: int, seeds: int, root: Path) -> None:
    """Print the metrics of every run, and the mean difference of rounds."""
    print(f"{'seed':>4} {'rounds':>6} " + " ".join(f"{m:>12}" for m in METRICS), "s")
    differences = []
    for seed in range(seeds):
        rows = []
        for number in (0, rounds):
            of_run = dataclasses.replace(config, seed=seed, rounds=number)
            start = time.perf_counter()
            result = learn.run(of_run, root / f"{seed}-{number}", progress=False)
            seconds = time.perf_counter() - start
            rows.append([*(result["trained"][m] for m in METRICS), seconds])
            values = " ".join(f"{value:12.2f}" for value in rows[-1][:-1])
            print(f"{seed:>4} {number:>6} {values} {seconds:.0f}", flush=True)
        differences.append(np.subtract(rows[1], rows[0]))
    mean, error = np.mean(differences, axis=0), np.std(differences, axis=0, ddof=1)
    for name, values in (("mean", mean), ("s.e.", error / np.sqrt(seeds))):
        print(f"{name:>11} " + " ".join(f"{v:+12.2f}" for v in values[:-1]))


if __name__ == "__main__":
    main()
