"""Classes in folders of folders: batches and losses of them."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from folders import shapes
from problems import unless_full

import tripletjax as tj
from tripletjax import learn
from tripletjax.learn.data import hierarchy, sampling
from tripletjax.learn.runs.config import Config
from tripletjax.learn.training import losses, objectives


def test_levels_are_the_folders_that_are_shared():
    names = ["a/x/1", "a/x/2", "a/y/1", "b/x/1", "b/x/2", "c"]
    fine, coarse = hierarchy.levels_of(names)
    assert fine.tolist() == [0, 0, 1, 2, 2, 3]
    assert coarse.tolist() == [0, 0, 0, 1, 1, 2]
    # What groups nothing, or all of them, or as the level below does, is none.
    assert hierarchy.levels_of(["a", "b"]).shape == (0, 2)
    assert hierarchy.levels_of(["all/a", "all/b"]).shape == (0, 2)
    assert hierarchy.levels_of(["a/1", "b/1"]).shape == (0, 2)
    assert hierarchy.levels_of(["a/x/1", "a/x/2", "b/x/1"]).shape == (1, 3)
    turned = hierarchy.with_turns(np.array([fine, coarse]), 2)
    assert turned[0].tolist() == [0, 0, 1, 2, 2, 3, 4, 4, 5, 6, 6, 7]
    assert turned[1].tolist() == [0, 0, 0, 1, 1, 2, 3, 3, 3, 4, 4, 5]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", unless_full(["hard", "all", "semi-hard"], ["semi-hard"])
)
def test_the_loss_is_a_mean_of_those_of_the_levels(name):
    x = jax.random.normal(jax.random.key(0), (24, 5))
    x /= jnp.linalg.norm(x, axis=1, keepdims=True)
    labels = jnp.arange(24) % 8
    levels = (0, 0, 1, 1, 2, 2, 3, 3), (0, 0, 0, 0, 1, 1, 1, 1)
    loss = objectives.relevance_loss(name, levels, margin=0.2)
    value, metrics = loss(x, labels)
    expected = [
        objectives.batch_loss(name, margin=margin)(x, of)
        for of, margin in (
            (labels, 0.2),
            (jnp.array(levels[0])[labels], 0.4),
            (jnp.array(levels[1])[labels], 0.6),
        )
    ]
    values = np.array([value for value, _ in expected])
    np.testing.assert_allclose(value, values @ [4, 2, 1] / 7, rtol=1e-5)
    names = ("active", "active_1", "active_2")
    for name, (_, of) in zip(names, expected):
        np.testing.assert_allclose(metrics[name], of["active"], rtol=1e-6)
    with pytest.raises(
        ValueError, match="loss must be semi-hard, hard or all, got 'supcon'"
    ):
        objectives.relevance_loss("supcon", levels)


def test_coarse_levels_weigh_half_of_the_level_below(monkeypatch):
    margins = []

    def loss_of(x, labels, *, margin, reduce_fn, axis_name):
        margins.append(margin)
        return labels.sum(), {"active": labels.max()}

    hard = losses.BatchLoss(
        loss_of, tj.mean_valid, {"margin": 0.2}, mines_triplets=True, share="active"
    )
    monkeypatch.setitem(losses.LOSSES, "hard", hard)
    levels = (0, 0, 10, 10), (0, 0, 0, 100)
    loss = objectives.relevance_loss("hard", levels, margin=0.125)
    value, metrics = loss(jnp.zeros((2, 1)), jnp.array([2, 3]))
    np.testing.assert_allclose(value, (4 * 5 + 2 * 20 + 100) / 7, rtol=1e-6)
    assert margins == [0.125, 0.25, 0.375]
    assert metrics == {"active": 3, "active_1": 10, "active_2": 100}


def test_triplets_of_several_processes_are_each_their_own():
    parts = np.random.default_rng(0).normal(size=(2, 3, 4, 5)).astype(np.float32)
    loss, _ = objectives.given_loss(margin=0.5, parts=2)(parts.reshape(-1, 5), None)
    each = [tj.triplet_margin_loss(*part, margin=0.5) for part in parts]
    np.testing.assert_allclose(loss, np.mean(each), rtol=1e-6)


def test_classes_of_a_group_come_together():
    labels, groups = np.repeat(np.arange(40), 3), np.arange(40) % 10
    batches = sampling.ClassBatches(labels, 12, 2, groups=groups)
    plain = sampling.ClassBatches(labels, 12, 2)

    def mates(batches, step):
        of = groups[np.unique(labels[batches[step]])]
        return len(of) - len(np.unique(of))

    seen = {int(label) for step in range(3) for label in labels[batches[step]]}
    assert len(seen) == 36
    assert all(mates(batches, step) == 9 for step in range(3))
    assert sum(mates(plain, step) for step in range(30)) < 30 * 6
    np.testing.assert_array_equal(batches[5], batches[5])
    for options, words in (
        ({"groups": groups[:-1]}, "groups must have one entry for each of the 40"),
        ({"groups": groups, "class_sampling": "frequency"}, "class_sampling uniform"),
    ):
        with pytest.raises(ValueError, match=words):
            sampling.ClassBatches(labels, 12, 2, **options)


@pytest.mark.slow
def test_a_run_by_folders(own_data_dir, tmp_path):
    folder = shapes(tmp_path / "pictures", kinds=6, each=6)
    small = {"channels": (8,), "dim": 8, "steps": 3, "log_every": 1}
    config = Config(data=str(folder), relevance="folders", rotation_classes=2, **small)
    out = tmp_path / "run"
    learn.run(config, out, progress=False)
    told = json.loads((out / "config.json").read_text())
    assert told["plan"]["batches"]["relevance"] == "folders"
    assert "6 classes in 2 groups" in " ".join(told["notes"])
    lines = [*map(json.loads, (out / "metrics.jsonl").read_text().splitlines())]
    assert all(0 <= line["active_1"] <= 1 for line in lines if "loss" in line)
    flat = shapes(tmp_path / "flat", kinds=1, each=6)
    (flat / "group0" / "kind0").rename(flat / "a")
    shapes(tmp_path / "more", kinds=1, each=6, seed=1)
    (tmp_path / "more" / "group0" / "kind0").rename(flat / "b")
    (flat / "group0").rmdir()
    with pytest.raises(ValueError, match="requires folders of folders"):
        learn.run(
            Config(data=str(flat), relevance="folders", **small),
            tmp_path / "other",
            progress=False,
        )


@pytest.mark.slow
def test_the_order_of_groups_is_learnt():
    """Vectors as parameters: classes and their groups are put in order."""
    labels, levels = jnp.arange(24) % 8, ((0, 0, 1, 1, 2, 2, 3, 3),)
    loss = objectives.relevance_loss("semi-hard", levels, margin=0.2)
    x = jax.random.normal(jax.random.key(1), (24, 4))

    def unit(x):
        return x / jnp.linalg.norm(x, axis=1, keepdims=True)

    step = jax.jit(lambda x: x - 2 * jax.grad(lambda x: loss(unit(x), labels)[0])(x))
    groups = np.array(levels[0])[labels]
    a, p, n = (i.ravel() for i in np.meshgrid(*[np.arange(24)] * 3))
    near = (
        (groups[a] == groups[p]) & (labels[a] != labels[p]) & (groups[a] != groups[n])
    )
    triplets = np.stack([a, p, n], axis=1)[near]
    before = tj.retrieval.similarity_precision(unit(x), triplets)
    for _ in range(200):
        x = step(x)
    assert before < 0.7
    assert tj.retrieval.similarity_precision(unit(x), triplets) > 0.95
