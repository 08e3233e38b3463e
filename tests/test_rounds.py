"""Rounds of training: mined groups of classes, and the batches of each round."""

import dataclasses

import numpy as np
import pytest

from tripletjax import learn
from tripletjax.learn.distributed import placement
from tripletjax.learn.runs import preparation, rounds
from tripletjax.learn.runs.options import OptionError


def clusters(draw, pairs, *, per_class=6):
    """Vectors of classes around centres; classes 2 i and 2 i + 1 are near."""
    centres = np.repeat(10.0 * draw.normal(size=(pairs, 8)), 2, axis=0)
    labels = np.repeat(np.arange(2 * pairs), per_class)
    x = centres[labels] + draw.normal(size=(len(labels), 8))
    return x.astype(np.float32), labels


def test_near_classes_are_grouped():
    draw = np.random.default_rng(0)
    x, labels = clusters(draw, 5)
    order = draw.permutation(len(x))
    # Labels need be neither in order nor without gaps.
    mined = rounds.mine_round(x[order], 3 * labels[order] + 1, step=7)
    assert mined.step == 7
    groups = np.array(mined.groups)
    np.testing.assert_array_equal(groups[::2], groups[1::2])
    d = np.linalg.norm(x[:, None] - x, axis=2)
    np.fill_diagonal(d, np.inf)
    same = labels[:, None] == labels
    nearest, negative = (np.min(np.where(m, d, np.inf), 1) for m in (same, ~same))
    assert mined.nearer == np.mean(negative < nearest)
    assert 0 < mined.nearer < 1


def grouped_by_loop(pairs, count, most):
    """Groups by a plain loop: the most frequent pair of two groups that fit joins."""
    groups = [{c} for c in range(count)]
    unordered = [tuple(sorted(pair)) for pair in pairs.tolist()]
    for pair in sorted(set(unordered), key=lambda p: (-unordered.count(p), p)):
        one, other = (next(g for g in groups if c in g) for c in pair)
        if one is not other and len(one | other) <= most:
            groups = [g for g in groups if g not in (one, other)] + [one | other]
    groups.sort(key=min)
    return [next(i for i, g in enumerate(groups) if c in g) for c in range(count)]


@pytest.mark.parametrize("most", [2, 3, 4, 40])
def test_groups_are_those_of_a_loop(most):
    draw = np.random.default_rng(most)
    pairs = draw.integers(0, 12, (60, 2))
    pairs = pairs[pairs[:, 0] != pairs[:, 1]]
    expected = grouped_by_loop(pairs, 13, most)
    assert rounds.group_classes(pairs, 13, most) == expected


def test_groups_have_the_most_frequent_pairs_and_a_largest_size():
    draw = np.random.default_rng(1)
    pairs = draw.integers(0, 40, (500, 2))
    pairs = pairs[pairs[:, 0] != pairs[:, 1]]
    most = pairs[:1].repeat(20, axis=0)
    groups = np.array(rounds.group_classes(np.concatenate([pairs, most]), 42, most=4))
    counts = np.bincount(groups)
    assert counts.sum() == 42
    assert counts.max() == 4
    assert counts.min() >= 1
    assert groups[pairs[0, 0]] == groups[pairs[0, 1]]
    # Classes without a pair stay alone.
    assert (counts[groups[40:]] == 1).all()


@pytest.fixture(scope="module")
def planned(own_data_dir, tmp_path_factory):
    config = learn.Config(steps=12, classes=4, per_class=3, rounds=2, seed=5)
    out = tmp_path_factory.mktemp("rounds") / "run"
    made, task = preparation.make_plan(
        config, None, None, out, placement.ONE_DEVICE, False
    )
    return made.plan, task


def test_batches_of_a_round_have_its_groups(planned):
    plan, task = planned
    assert rounds.rounds_of(plan) == 2
    assert rounds.first_steps(plan.steps, 2) == [4, 8]
    pairs, others = (0, 0, 1, 1, 2, 2, 3, 3, 4, 4), (0, 1, 2, 3, 4, 4, 3, 2, 1, 0)
    mined = [rounds.Round(4, pairs, 0.5), rounds.Round(8, others, 0.4)]
    batches, before = task.batches(plan, mined=mined), task.batches(plan)
    for step in range(4):
        for one, two in zip(batches[step], before[step], strict=True):
            np.testing.assert_array_equal(one, two)
    for first, groups in ((4, pairs), (8, others)):
        for step in range(first, first + 4):
            classes = np.unique(batches[step][1])
            assert len(classes) == 4
            assert len({groups[c] for c in classes}) == 2


def test_turned_copies_have_groups_of_their_own(planned):
    plan, task = planned
    turned = dataclasses.replace(plan.batches, rotation_classes=4)
    pairs = (0, 1, 2, 3, 4, 4, 3, 2, 1, 0)
    batches = task.batches(
        dataclasses.replace(plan, batches=turned), mined=[rounds.Round(4, pairs, 0.5)]
    )
    for step in range(4, 12):
        turn, index = np.divmod(np.unique(batches[step][1]), 10)
        assert len(index) == 4
        assert len({(t, pairs[i]) for t, i in zip(turn, index, strict=True)}) == 2


def test_the_file_of_rounds_has_those_of_earlier_steps(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"rounds\.json does not exist"):
        rounds.read_rounds(tmp_path)
    rounds.begin_rounds(tmp_path)
    assert rounds.read_rounds(tmp_path) == []
    first, second, again = (
        rounds.Round(step, (0, 0, 1), 0.25) for step in (10, 20, 15)
    )
    for one in (first, second, again):
        rounds.write_round(tmp_path, one)
    assert rounds.read_rounds(tmp_path) == [first, again]
    (tmp_path / rounds.FILE).write_text("[{}]")
    with pytest.raises(ValueError, match=r"rounds\.json is damaged"):
        rounds.read_rounds(tmp_path)


def test_rounds_need_steps_between_them():
    assert rounds.first_steps(100, 0) == []
    assert rounds.first_steps(3, 5) == [1, 2]
    assert rounds.first_steps(1, 2) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"relevance": "folders"}, "rounds requires relevance classes, got folders"),
        ({"class_sampling": "frequency"}, "rounds requires class_sampling uniform"),
        ({"steps": 0, "backbone": "a"}, "rounds must be less than steps 0, got 1"),
        ({"steps": 3, "rounds": 3}, "rounds must be less than steps 3, got 3"),
        ({"rounds": -1}, "rounds must be at least 0, got -1"),
    ],
)
def test_options_that_exclude_rounds(options, words):
    with pytest.raises(OptionError, match=words):
        learn.Config(**{"rounds": 1} | options)


def test_a_batch_of_all_classes_has_no_rounds(own_data_dir, tmp_path):
    with pytest.raises(OptionError, match=r"classes below 10, .* got 10"):
        preparation.make_plan(
            learn.Config(rounds=1), None, None, tmp_path, placement.ONE_DEVICE, False
        )
