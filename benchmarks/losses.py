"""MAP@R on unseen classes for each loss of `tripletjax train`, on any data set.

    python benchmarks/losses.py --data digits
    python benchmarks/losses.py --data FOLDER --losses semi-hard supcon --seeds 3
    python benchmarks/losses.py --data FOLDER --backbone efficientnet-lite0

Every run holds out whole classes for the test (``--split classes``), the same for all
losses and seeds. A row has the mean and the standard deviation over seeds. With
``--json FILE`` the script appends each measurement to a file, one JSON object per line,
and does not repeat those that the file has.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from tripletjax import learn
from tripletjax.learn.training.losses import LOSSES


def measure(arguments: argparse.Namespace, loss: str, seed: int) -> dict[str, Any]:
    """Train one run and return its measurement."""
    config = learn.Config(
        data=arguments.data,
        split="classes",
        loss=loss,
        learn_loss=loss == "sigmoid",
        seed=seed,
        size=arguments.size,
        steps=arguments.steps,
        backbone=arguments.backbone,
    )
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        evaluations = learn.run(config, Path(folder) / "run", progress=False)
    trained = evaluations["trained"]
    return {
        "data": Path(arguments.data).name,
        "backbone": arguments.backbone,
        "steps": arguments.steps,
        "loss": loss,
        "seed": seed,
        "map_at_r": trained["map_at_r"],
        "recall_at_1": trained["recall_at_1"],
        "classes": trained["classes"],
        "seconds": round(time.perf_counter() - began, 1),
    }


def read(file: Path | None) -> list[dict[str, Any]]:
    if file is None or not file.exists():
        return []
    return [json.loads(line) for line in file.read_text().splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=[*LOSSES])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--size", type=int, help="longer side in pixels")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--backbone")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    known = {
        (row["data"], row["backbone"], row["steps"], row["loss"], row["seed"]): row
        for row in read(arguments.json)
    }
    print("| loss | MAP@R | recall@1 | test classes | seconds per run |")
    print("| --- | --- | --- | --- | --- |")
    for loss in arguments.losses:
        rows = []
        for seed in range(arguments.seeds):
            name = Path(arguments.data).name
            key = name, arguments.backbone, arguments.steps, loss, seed
            if key not in known:
                known[key] = measure(arguments, loss, seed)
                if arguments.json is not None:
                    with arguments.json.open("a") as file:
                        file.write(json.dumps(known[key]) + "\n")
            rows.append(known[key])
        map_at_r, recall = (
            np.array([row[name] for row in rows])
            for name in ("map_at_r", "recall_at_1")
        )
        seconds = np.mean([row["seconds"] for row in rows])
        deviation = np.std(map_at_r, ddof=1) if len(rows) > 1 else 0
        print(
            f"| {loss} | {map_at_r.mean():.1f} ± {deviation:.1f} | {recall.mean():.1f} "
            f"| {rows[0]['classes']} | {seconds:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
