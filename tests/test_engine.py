"""Parts of blockwise losses: a class index, reductions, several panels."""

import jax.numpy as jnp
import numpy as np
import pytest

import tripletjax as tj
from tripletjax._engine.reductions import min_and_index, min_and_index_of_all
from tripletjax._pairwise import block_sizes
from tripletjax._pairwise.batch import single_batch
from tripletjax._pairwise.class_index import ClassIndex


def vectors(n, seed=0):
    return np.random.default_rng(seed).normal(size=(n, 3)).astype(np.float32)


def test_classes_among_padding():
    """Most references are padding, whose labels are those of real ones."""
    random = np.random.default_rng(0)
    labels, theirs = random.integers(0, 9, 20), random.integers(0, 9, 64)
    real = random.random(64) < 0.3
    batch = single_batch(
        tj.euclidean,
        vectors(20),
        labels,
        references=vectors(64),
        reference_labels=theirs,
        reference_where=real,
    )
    classes = ClassIndex.of(batch)
    same = (labels[:, None] == theirs) & real
    np.testing.assert_array_equal(classes.positives, same.sum(1))
    np.testing.assert_array_equal(classes.negatives, real.sum() - same.sum(1))
    index, found = classes.positives_slice(0, 9, 0, 20)
    for indices, there, row in zip(index, found, same):
        assert indices[there].tolist() == np.flatnonzero(row).tolist()


def test_the_least_beyond_a_limit():
    x = jnp.array([[3.0, 1.0, 2.0, 2.0], [5.0, 4.0, 4.0, jnp.inf]])
    value, index = min_and_index(x, jnp.array([[1.0], [4.0]]), axis=1)
    assert (value.tolist(), index.tolist()) == ([2, 5], [2, 0])
    value, _ = min_and_index(x, jnp.array([[3.0], [5.0]]), axis=1)
    assert value.tolist() == [np.inf, np.inf]


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("axis", [0, 1])
def test_the_least_of_all(axis, plain):
    # With ties, along runs of 32 and along one of 7.
    x = np.random.default_rng(0).integers(0, 9, size=(64, 7)).astype(np.float32)
    value, index = min_and_index_of_all(jnp.asarray(x), axis, plain=plain)
    np.testing.assert_array_equal(value, x.min(axis))
    np.testing.assert_array_equal(index, x.argmin(axis))


def test_anchors_of_overlapping_panels_count_once(monkeypatch):
    # Four rows at a time: the last two blocks of eleven anchors share one.
    monkeypatch.setattr(block_sizes, "CPU", block_sizes.CPU._replace(panel=44))
    x, labels = vectors(11), np.arange(11) % 3
    got = tj.blockwise.batch_hard_loss(
        x, labels, metric=tj.manhattan, margin=2.0, reduce_fn=None
    )
    expected = tj.batch_hard_loss(tj.manhattan(x), labels, margin=2.0, reduce_fn=None)
    assert (expected.active > 0).any()
    for one, other in zip(got, expected):
        np.testing.assert_allclose(one, other, rtol=1e-5)
