"""The checkpoint that training keeps: the last, the best, or the rule of `selection`.

    python benchmarks/checkpoints.py --data FOLDER --seed 0 --size 32

FOLDER has one folder of images per class, of which a random half is trained on. Every
validation embeds the other half. Some of these classes, drawn again and again, then
choose the checkpoint, and all others measure the choice: the mean MAP@R over classes,
in points above the last checkpoint.
"""

import argparse
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np

import tripletjax as tj
from tripletjax import learn
from tripletjax.learn.data.class_folders import ClassFolders, find_classes
from tripletjax.learn.data.image_files import open_image
from tripletjax.learn.embedder import Embedder
from tripletjax.learn.runs.record import RunRecord
from tripletjax.learn.runs.tasks import LabelTask
from tripletjax.learn.training.selection import class_means, exceeds_noise


def embeddings(found: ClassFolders, trained: np.ndarray, options: dict) -> list:
    """Embeddings of all images that are not trained on, at each validation."""
    made, prepared, validate = [], [], LabelTask.validate
    with tempfile.TemporaryDirectory() as directory:
        data, run = Path(directory) / "data", Path(directory) / "run"
        for number in np.flatnonzero(trained):
            copy = (
                data / found.classes[number] / f"{number}{found.files[number].suffix}"
            )
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(found.files[number].read_bytes())

        def recording(task: LabelTask, model):
            record = RunRecord.read(run)
            view = record.plan.view_of(record.images.shape)
            embed = Embedder(model, record.images.spec, view, record)
            if not prepared:
                rest = (found.files[number] for number in np.flatnonzero(~trained))
                prepared.extend(embed.prepare(open_image(file)) for file in rest)
            made.append(embed.embed(prepared))
            return validate(task, model)

        with mock.patch.object(LabelTask, "validate", recording):
            learn.run(learn.Config(data=str(data), **options), run)
    return made


def by_class(x: np.ndarray, labels: np.ndarray, where: np.ndarray) -> np.ndarray:
    """MAP@R in percent of each class of the images `where`, among themselves."""
    of = tj.retrieval.evaluate(x, labels, where=where, reduce_fn=None)
    return class_means(100 * np.asarray(of.map_at_r)[where], labels[where])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trained", type=int, help="classes to train on, not half")
    parser.add_argument("--draws", type=int, default=40)
    parser.add_argument("--classes", type=int, nargs="+", default=[4, 8, 16])
    for name in ("size", "steps", "validate-every"):
        parser.add_argument(f"--{name}", type=int)
    arguments = parser.parse_args()
    found = find_classes(arguments.data.resolve())
    classes, draw = np.array(found.classes), np.random.default_rng(arguments.seed)
    names = draw.permutation(np.unique(classes))
    trained = np.isin(classes, names[: arguments.trained or len(names) // 2])
    options = {
        name: getattr(arguments, name)
        for name in ("seed", "size", "steps", "validate_every")
    }
    steps = embeddings(found, trained, options)
    # Classes of one image have nothing to find.
    values, counts = np.unique(classes[~trained], return_counts=True)
    several = np.isin(classes[~trained], values[counts > 1])
    labels = np.unique(classes[~trained][several], return_inverse=True)[1]
    steps = [x[several] for x in steps]
    n = labels.max() + 1
    everything = np.ones(len(labels), bool)
    all_values = np.stack([by_class(x, labels, everything) for x in steps])
    print(f"MAP@R of {n} unseen classes: {all_values.mean(1).round(1)}")
    print("| validation classes | most possible | best | rule | last not kept |")
    print("|---|---|---|---|---|")
    for count in arguments.classes:
        rows = []
        for _ in range(arguments.draws if count < n else 0):
            chosen = draw.permutation(n)[:count]
            where = np.isin(labels, chosen)
            seen = np.stack([by_class(x, labels, where) for x in steps])
            unseen = np.delete(all_values, chosen, axis=1).mean(1)
            gains = unseen - unseen[-1]
            # Of equals the last.
            best = len(steps) - 1 - seen.mean(1)[::-1].argmax()
            earlier = exceeds_noise(seen[best], seen[-1], min_classes=2)
            rows.append([gains.max(), gains[best], gains[best] * earlier, earlier])
        if rows:
            most, best, rule, share = np.mean(rows, axis=0)
            print(
                f"| {count} | {most:+.2f} | {best:+.2f} | {rule:+.2f} | "
                f"{100 * share:.0f} % |",
                flush=True,
            )


if __name__ == "__main__":
    main()
