"""What an embedding is worth on classes that it never saw: one-shot error, MAP@R, EER.

    python benchmarks/unseen.py --data TRAIN_FOLDER --unseen OTHER_FOLDER --seeds 3

Trains on the first folder by the defaults of `tripletjax train`, and then tells apart
the classes of the second: in each episode, one image each of 20 of its classes, and
another image of each to be named by the nearest; and tells same from different in all
pairs. Both folders have one folder of images
per class; if classes lie in groups (alphabets), episodes within one group are measured,
too, of as many ways as the smallest has classes.
"""

import argparse
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import numpy as np

import tripletjax as tj
from tripletjax import learn
from tripletjax.learn import data, pictures, runs

EPISODES = 1000


def episodes(labels, groups, ways, within):
    """Indices of support and queries ``[EPISODES, ways]``."""
    random = np.random.default_rng(0)
    members = {c: np.flatnonzero(labels == c) for c in np.unique(labels)}
    # Of one image there is no other.
    several = [c for c, rows in members.items() if len(rows) > 1]
    pools = [several]
    if within:
        pools = [[c for c in group if c in several] for group in groups.values()]
        pools = [pool for pool in pools if pool]
    ways = min(ways, *map(len, pools))
    chosen = np.empty((2, EPISODES, ways), int)
    for episode in range(EPISODES):
        pool = pools[random.integers(len(pools))]
        for way, c in enumerate(random.choice(pool, ways, replace=False)):
            chosen[:, episode, way] = random.choice(members[c], 2, replace=False)
    return chosen


def measure(embeddings, labels, groups) -> list[float]:
    errors = []
    for within in (False, True):
        support, queries = episodes(labels, groups, 20, within)
        accuracy = tj.retrieval.few_shot_accuracy(
            embeddings[support], labels[support], embeddings[queries], labels[queries]
        )
        errors.append(100 * (1 - float(np.mean(accuracy))))
    metrics = tj.retrieval.evaluate(embeddings, labels)
    pairs = tj.verification.evaluate(embeddings, labels, fars=(0.01,))
    told = (
        *(metrics.map_at_r, metrics.precision_at_1),
        *(pairs.equal_error_rate, pairs.tar_at_far[0]),
    )
    return [*errors, *(100 * float(value) for value in told)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--unseen", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--run", type=Path, help="a finished run instead of training")
    arguments = parser.parse_args()

    files = sorted(pictures.image_files(arguments.unseen))
    names = sorted({file.parent for file in files})
    labels = np.array([names.index(file.parent) for file in files])
    groups = defaultdict(list)
    for label, name in enumerate(names):
        groups[name.parent].append(label)

    columns = ("error, 20 ways", "within groups", "MAP@R", "recall@1", "EER")
    columns = (*columns, "TAR at FAR 1 %", "seconds")
    print(f"{'unseen classes, in %':<22}" + "".join(f"{c:>16}" for c in columns))

    def show(name: str, values) -> None:
        print(f"{name:<22}" + "".join(f"{value:16.2f}" for value in values), flush=True)

    shape = pictures.Shape(*data.load(arguments.data).train.images.shape[1:])
    raw = np.stack([shape.fit(pictures.open_image(file)) for file in files])
    raw = raw.reshape(len(files), -1) / np.float32(255)
    show("raw pixels", measure(raw, labels, groups))
    if arguments.run:
        embeddings = learn.load_embedder(arguments.run)(files)
        show(str(arguments.run), measure(embeddings, labels, groups))
        return
    rows = []
    for seed in range(arguments.seeds):
        with tempfile.TemporaryDirectory() as directory:
            start = time.perf_counter()
            config = runs.Config(data=arguments.data, seed=seed)
            runs.run(config, Path(directory) / "run", progress=False)
            seconds = time.perf_counter() - start
            embeddings = learn.load_embedder(Path(directory) / "run")(files)
        rows.append([*measure(embeddings, labels, groups), seconds])
        show(f"seed {seed}", rows[-1])
    show("mean", np.mean(rows, axis=0))
    if len(rows) > 1:
        show("standard deviation", np.std(rows, axis=0, ddof=1))


if __name__ == "__main__":
    main()
