"""Comparison of a trained head with its closed form, on held-out classes.

Heads are fitted and trained on some of the training classes, and validated on the
others, in folds. A paired test over all classes decides which head a run keeps.
"""

from typing import Any

import numpy as np
from flax import nnx
from tqdm import tqdm

from tripletjax.learn.data.image_array import KeptFeatures
from tripletjax.learn.networks import heads
from tripletjax.learn.runs import fitting, tasks
from tripletjax.learn.runs.plan import Plan
from tripletjax.learn.training.selection import MIN_CLASSES, exceeds_noise

# Parts of the training classes, each of which is held out once.
FOLDS = 4
# The probability that a trained head is kept which is no better than its closed form.
SIGNIFICANCE = 0.05
# Whether a head is trained where too few classes show a gain (benchmarks/frozen.py).
TRAINED_BY_DEFAULT = False


def fit_to_features(head: heads.Head, task: tasks.Task) -> None:
    """Fit a head to the features of a task in closed form."""
    images = task.images
    if not isinstance(images, KeptFeatures):
        raise TypeError(f"task must have features, got {type(images).__name__}.")
    rows, labels = task.labelled_rows
    head.fit(images.features[rows, 0], labels)


def compare(
    task: tasks.Task, plan: Plan, head: heads.Head, *, progress: bool
) -> dict[str, Any]:
    """Compare a trained head with its closed form.

    Args:
        task: images with features.
        plan: the plan of the run.
        head: a head of the run; unchanged.
        progress: whether to show a progress bar.

    Returns:
        ``steps`` of the training, ``classes`` (the number of held-out classes with
        a value), and ``trained_is_kept``. From 2 classes on also means over classes in
        percent: ``closed_form``, ``trained``, and ``error``, the standard error of
        their difference.
    """
    closed_form, trained = [], []
    count = FOLDS if task.trained_classes >= MIN_CLASSES else 0
    for fold in tqdm(
        task.folds(count),
        desc="comparison with the closed form",
        total=count,
        unit="fold",
        disable=not (progress and count),
    ):
        one = nnx.clone(head)
        fit_to_features(one, fold)
        closed_form.append(fold.validate(one).by_class)
        part = fold.limited(plan)
        for _ in fitting.fit(one, fold, fold.batches(part), part, progress=False):
            pass
        trained.append(fold.validate(one).by_class)
    before, after = (np.concatenate([[], *x]) for x in (closed_form, trained))
    n = len(before)
    comparison: dict[str, Any] = {"steps": plan.steps, "classes": n}
    if n >= 2:
        comparison |= {
            "closed_form": float(before.mean()),
            "trained": float(after.mean()),
            "error": float(np.std(after - before, ddof=1) / np.sqrt(n)),
        }
    kept = TRAINED_BY_DEFAULT
    if n >= MIN_CLASSES:
        kept = exceeds_noise(after, before, significance=SIGNIFICANCE)
    return comparison | {"trained_is_kept": kept}


def note_of(comparison: dict[str, Any], unit: str) -> str:
    """The note on the head that a run keeps."""
    kept = "trained head" if comparison["trained_is_kept"] else "closed form"
    if comparison["classes"] < MIN_CLASSES:
        return (
            f"the run keeps the {kept}: a comparison of the trained head with the "
            f"closed form needs at least {MIN_CLASSES} {unit}"
        )
    before, after = comparison["closed_form"], comparison["trained"]
    return (
        f"the run keeps the {kept}: on {comparison['classes']} held-out {unit} in "
        f"{FOLDS} folds the closed form reaches {before:.1f} %, the trained head "
        f"{after:.1f} % (difference {after - before:+.1f}, standard error "
        f"{comparison['error']:.1f})"
    )
