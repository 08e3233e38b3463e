"""Comparison of trained heads with their closed form, on held-out classes."""

import numpy as np
import pytest
from flax import nnx
from plans import class_batches, make_plan

from tripletjax.learn.data import datasets, triplet_files
from tripletjax.learn.data.image_array import ArrayImages, KeptFeatures
from tripletjax.learn.networks import heads, whitening
from tripletjax.learn.runs import comparisons
from tripletjax.learn.runs.plan import BackbonePlan
from tripletjax.learn.runs.tasks import LabelTask, TripletTask

CLASSES, EACH, FEATURES = 20, 6, 8


def kept(features):
    pixels = np.zeros((len(features), 1, 1, 1), np.uint8)
    return KeptFeatures(ArrayImages.of(pixels), features[:, None].astype(np.float32))


def task_of(features, labels):
    images = datasets.Images(kept(features), labels.astype(np.int32))
    nothing = images.part(np.arange(0))
    names = tuple(f"class {i:02}" for i in range(labels.max() + 1))
    return LabelTask(
        datasets.Dataset("features", images, nothing, nothing, names, "key")
    )


def plan_of(**options):
    backbone = BackbonePlan(
        family="resnet",
        options={},
        training="frozen",
        hidden=0,
        views=1,
        digest="digest",
        multiple=1,
    )
    batches = class_batches(classes=16, per_class=4)
    features = {"model": "backbone", "backbone": backbone, "dim": FEATURES}
    return make_plan(batches=batches, size=1, **features | options)


def noisy_features():
    """Features whose last half, with the larger variance, is noise."""
    draw = np.random.default_rng(0)
    labels = np.repeat(np.arange(CLASSES), EACH)
    signal = draw.normal(size=(CLASSES, FEATURES // 2))[labels]
    signal += 0.2 * draw.normal(size=signal.shape)
    noise = 3 * draw.normal(size=signal.shape)
    return np.concatenate([signal, noise], axis=1), labels


@pytest.mark.slow
@pytest.mark.parametrize("learning_rate", [0.05, 0.0])
def test_a_trained_head_is_kept_only_with_a_gain(learning_rate, monkeypatch):
    # Without whitening, the closed form has much to gain.
    monkeypatch.setattr(whitening.whitening, "__kwdefaults__", {"shrinkage": 1.0})
    head = heads.Head(FEATURES, FEATURES, rngs=nnx.Rngs(0))
    before = nnx.to_pure_dict(nnx.state(head))
    comparison = comparisons.compare(
        task_of(*noisy_features()),
        plan_of(learning_rate=learning_rate),
        head,
        progress=False,
    )
    gain = comparison["trained"] - comparison["closed_form"]
    note = comparisons.note_of(comparison, "classes")
    assert comparison["classes"] == CLASSES
    assert comparison["trained_is_kept"] is (learning_rate > 0)
    if learning_rate:
        assert gain > 3 * comparison["error"] > 0
        assert f"keeps the trained head: on {CLASSES} held-out classes" in note
    else:
        assert gain == pytest.approx(0, abs=1e-6)
        assert f"keeps the closed form: on {CLASSES} held-out classes" in note
    after = nnx.to_pure_dict(nnx.state(head))
    np.testing.assert_array_equal(before["out"]["kernel"], after["out"]["kernel"])


def test_few_classes_are_not_compared():
    features, labels = noisy_features()
    few = labels < 15
    comparison = comparisons.compare(
        task_of(features[few], labels[few]),
        plan_of(),
        heads.Head(FEATURES, FEATURES, rngs=nnx.Rngs(0)),
        progress=False,
    )
    assert comparison == {"steps": 60, "classes": 0, "trained_is_kept": False}
    note = comparisons.note_of(comparison, "classes")
    assert "the run keeps the closed form" in note
    assert "needs at least 16 classes" in note


def test_every_class_is_held_out_once():
    features, labels = noisy_features()
    # A class of one image is never held out.
    task = task_of(features[: -EACH + 1], labels[: -EACH + 1])
    assert task.trained_classes == CLASSES - 1
    held_out = []
    for fold in task.folds(4):
        train, validation = fold.dataset.train, fold.dataset.validation
        assert not np.isin(train.labels, validation.labels).any()
        assert len(train) + len(validation) == len(task.dataset.train)
        plan = fold.limited(plan_of())
        assert plan.batches.classes == min(16, len(np.unique(train.labels)) - 1)
        images, batch = fold.batches(plan)[0]
        assert len(images) == len(batch) == 4 * plan.batches.classes
        held_out += np.unique(validation.labels).tolist()
    assert sorted(held_out) == list(range(CLASSES - 1))


def test_folds_of_triplets_have_no_anchor_of_validation():
    draw = np.random.default_rng(0)
    triplets = np.stack([draw.permutation(40)[:3] for _ in range(60)]).astype(np.int32)
    features = draw.normal(size=(40, FEATURES))
    task = TripletTask(
        triplet_files.TripletDataset(
            "file", kept(features), triplets, triplets[:0], triplets[:0], "key"
        )
    )
    rows, labels = task.labelled_rows
    np.testing.assert_array_equal(rows.reshape(-1, 2), triplets[:, :2])
    np.testing.assert_array_equal(labels.reshape(-1, 2).T, [np.arange(60)] * 2)
    assert task.trained_classes == len(set(triplets[:, 0].tolist()))
    anchors = []
    for fold in task.folds(4):
        validation = set(fold.dataset.validation[:, 0].tolist())
        assert not validation & set(fold.dataset.train.ravel().tolist())
        anchors += validation
    assert sorted(anchors) == sorted(set(triplets[:, 0].tolist()))
