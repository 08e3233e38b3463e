"""MAP@R of the default training on handwritten digits, over several seeds.

    python benchmarks/digits.py
    python benchmarks/digits.py --loss hard --seeds 5

Trains on the first 898 images, less 90 for validation, and evaluates on the
last 899. All choices are the defaults of `tripletjax.learn.Config`; every seed is
reported.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np

from tripletjax import learn
from tripletjax.learn.training.losses import LOSSES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--loss", choices=LOSSES, default="semi-hard")
    arguments = parser.parse_args()
    names = ("map_at_r", "r_precision", "recall_at_1", "gallery_recall_at_1", "seconds")
    print("".join(f"{name:>18}" for name in ("", *names)))
    rows = []
    for seed in range(arguments.seeds):
        config = learn.Config(seed=seed, loss=arguments.loss)
        with tempfile.TemporaryDirectory() as directory:
            start = time.perf_counter()
            metrics = learn.run(config, Path(directory) / "run", progress=False)
            seconds = time.perf_counter() - start
        if seed == 0:
            show("raw pixels", [metrics["raw pixels"][name] for name in names[:-1]])
        rows.append([*(metrics["trained"][name] for name in names[:-1]), seconds])
        show(f"seed {seed}", rows[-1])
    show("mean", np.mean(rows, axis=0))
    if len(rows) > 1:
        show("standard deviation", np.std(rows, axis=0, ddof=1))


def show(name: str, values) -> None:
    print(f"{name:<18}" + "".join(f"{value:18.2f}" for value in values), flush=True)


if __name__ == "__main__":
    main()
