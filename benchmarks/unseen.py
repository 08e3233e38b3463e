"""One-shot error, MAP@R and equal error rate of unseen classes.

    python benchmarks/unseen.py --data TRAIN_FOLDER --unseen OTHER_FOLDER --seeds 3
    python benchmarks/unseen.py --data FOLDER --folds 3 --classes 285 571 1143

Trains on the first folder by the defaults of `tripletjax train`, and measures on the
classes of the second. An episode has one image each of 20 classes, and another image of
each to be named by the nearest. Verification is measured on all pairs, and on those of
at most 10 images per class ("capped"), because a few large classes have most of the
pairs. Both folders have one folder of images per class. If classes lie in groups
(alphabets), episodes within one group are measured, too. Their number of ways is the
number of classes of the smallest group.

With `--folds K` instead of another folder, each random Kth of the classes is measured
in turn, by training on the others. `--classes` trains on fewer classes, to show the
effect of their number. `--images N` takes classes of at least N images, and N of each.
"""

import argparse
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import jax
import numpy as np

import tripletjax as tj
from tripletjax import learn
from tripletjax.learn.data import datasets, image_files, image_shape
from tripletjax.learn.data.folder_listing import find_files

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


def capped(labels, most: int = 10):
    """Indices of at most `most` items of each class, drawn at random."""
    order = np.random.default_rng(0).permutation(len(labels))
    ranks = [np.sum(labels[order[:i]] == labels[row]) for i, row in enumerate(order)]
    return np.sort(order[np.array(ranks) < most])


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
    few = capped(labels)
    few_pairs = tj.verification.evaluate(embeddings[few], labels[few], fars=(0.01,))
    told = (
        *(metrics.map_at_r, metrics.precision_at_1, pairs.equal_error_rate),
        *(few_pairs.equal_error_rate, pairs.tar_at_far[0]),
    )
    return [*errors, *(100 * float(value) for value in told)]


def show(name: str, values) -> None:
    print(f"{name:<26}" + "".join(f"{value:15.2f}" for value in values), flush=True)


def files_in(folder: Path, images: int | None) -> dict[Path, list[Path]]:
    """The image files of each class, at random if only some are wanted."""
    classes = defaultdict(list)
    for file in filter(image_files.is_image, find_files(folder).files):
        classes[file.parent].append(file)
    if images is None:
        return dict(classes)
    random = np.random.default_rng(0)
    return {
        name: list(random.choice(files, images, replace=False))
        for name, files in classes.items()
        if len(files) >= images
    }


def link(classes: dict[Path, list[Path]], root: Path, folder: Path) -> Path:
    """A folder that holds these classes alone."""
    for name, files in classes.items():
        place = folder / name.relative_to(root)
        place.mkdir(parents=True)
        for file in files:
            (place / file.name).symlink_to(file.resolve())
    return folder


def measure_classes(embed, classes: dict[Path, list[Path]]) -> list[float]:
    files = [file for several in classes.values() for file in several]
    labels = np.repeat(np.arange(len(classes)), [*map(len, classes.values())])
    groups = defaultdict(list)
    for label, name in enumerate(classes):
        groups[name.parent].append(label)
    return measure(np.asarray(embed(files)), labels, groups)


def trained(data_name: str, seed: int, unseen: dict[Path, list[Path]]) -> list[float]:
    with tempfile.TemporaryDirectory() as directory:
        start = time.perf_counter()
        config = learn.Config(data=data_name, seed=seed)
        learn.run(config, Path(directory) / "run", progress=False)
        seconds = time.perf_counter() - start
        embed = learn.load_embedder(Path(directory) / "run")
        measured = measure_classes(embed, unseen)
    # Linux refuses a process the mappings of the programs of many runs.
    jax.clear_caches()
    return [*measured, seconds]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--unseen", type=Path)
    parser.add_argument("--folds", type=int)
    parser.add_argument("--classes", type=int, nargs="+", help="how many to train on")
    parser.add_argument("--images", type=int, help="how many of each class")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--run", type=Path, help="a finished run instead of training")
    arguments = parser.parse_args()
    if (arguments.unseen is None) == (arguments.folds is None):
        parser.error("give either --unseen or --folds")

    columns = ("error, 20 ways", "within groups", "MAP@R", "recall@1", "EER")
    columns = (*columns, "EER, capped", "TAR, FAR 1 %", "seconds")
    print(f"{'unseen classes, in %':<26}" + "".join(f"{c:>15}" for c in columns))
    rows = defaultdict(list)
    if arguments.folds:
        root = Path(arguments.data)
        classes = files_in(root, arguments.images)
        names = list(classes)
        order = np.random.default_rng(7).permutation(len(names))
        for count in arguments.classes or (None,):
            for fold in range(arguments.folds):
                held_out = set(order[fold :: arguments.folds].tolist())
                others = [names[i] for i in order if i not in held_out][:count]
                unseen = {names[i]: classes[names[i]] for i in sorted(held_out)}
                title = f"{count or 'all other'} classes"
                with tempfile.TemporaryDirectory() as directory:
                    folder = link(
                        {name: classes[name] for name in others}, root, Path(directory)
                    )
                    rows[title].append(trained(str(folder), fold, unseen))
                show(f"{title}, fold {fold}", rows[title][-1])
    else:
        unseen = files_in(arguments.unseen, arguments.images)
        shape = image_shape.ImageSpec(
            *datasets.load(arguments.data).train.images.shape[1:]
        )

        def pixels(files):
            images = np.stack(
                [shape.fit(image_files.open_image(file)) for file in files]
            )
            return images.reshape(len(files), -1) / np.float32(255)

        show("raw pixels", measure_classes(pixels, unseen))
        if arguments.run:
            embed = learn.load_embedder(arguments.run)
            show(str(arguments.run), measure_classes(embed, unseen))
            return
        for seed in range(arguments.seeds):
            rows[""].append(trained(arguments.data, seed, unseen))
            show(f"seed {seed}", rows[""][-1])
    for title, measured in rows.items():
        show(f"{title} mean", np.mean(measured, axis=0))
        if len(measured) > 1:
            show(f"{title} std", np.std(measured, axis=0, ddof=1))


if __name__ == "__main__":
    main()
