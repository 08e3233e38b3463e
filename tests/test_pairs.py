"""Masks of pairs against the loops that define them."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from problems import problems

import tripletjax as tj


@settings(max_examples=60)
@given(problem=problems())
def test_masks_are_the_definition(problem):
    _, labels, options = problem
    expected = oracles.pair_masks(labels, **options)
    for got, mask in zip(tj.pair_masks(labels, **options), expected):
        np.testing.assert_array_equal(got, mask)


def test_multi_hot_labels():
    tags = np.random.default_rng(0).integers(0, 2, (7, 4))

    def overlap(a, b):
        return (a * b).sum() > 0

    expected = oracles.pair_masks(tags, match=overlap)
    for got, mask in zip(tj.pair_masks(tags, match=overlap), expected):
        np.testing.assert_array_equal(got, mask)
    gallery = np.random.default_rng(1).integers(0, 2, (3, 4))
    expected = oracles.pair_masks(tags, gallery, match=overlap)
    for got, mask in zip(tj.pair_masks(tags, gallery, match=overlap), expected):
        np.testing.assert_array_equal(got, mask)
    batched = tj.pair_masks(np.stack([tags, tags[::-1]]), match=overlap)
    assert batched.positive.shape == (2, 7, 7)


def test_float_labels_with_a_predicate():
    ages = jnp.array([20.0, 21.0, 40.0])
    masks = tj.pair_masks(ages, match=lambda a, b: jnp.abs(a - b) < 5)
    np.testing.assert_array_equal(masks.positive.sum(1), [1, 1, 0])


def test_anchor_subset():
    """`reference_where` without references: who may be a partner, not an anchor."""
    labels = [0, 0, 1, 1]
    masks = tj.pair_masks(
        labels, where=[True, False, False, False], reference_where=[True] * 4
    )
    np.testing.assert_array_equal(masks.positive.sum(1), [1, 0, 0, 0])
    np.testing.assert_array_equal(masks.negative.sum(1), [2, 0, 0, 0])


def test_leading_dimensions_and_jit():
    labels = jnp.arange(12).reshape(2, 6) % 3
    masks = jax.jit(tj.pair_masks)(labels)
    for i in range(2):
        np.testing.assert_array_equal(
            masks.positive[i], tj.pair_masks(labels[i]).positive
        )


def test_large_labels():
    """Neighbours far above 2**24, which float32 cannot tell apart."""
    labels = np.array([2**30, 2**30 + 1, 2**30], np.int64)
    np.testing.assert_array_equal(tj.pair_masks(labels).positive.sum(1), [1, 0, 1])


def test_signed_and_unsigned_labels_differ_by_value():
    """All bits set is -1 in one and 2**32 - 1 in the other."""
    unsigned = np.array([2**32 - 1, 5], np.uint32)
    masks = tj.pair_masks(unsigned, np.array([-1, 5], np.int32))
    np.testing.assert_array_equal(masks.positive, [[False, False], [False, True]])


@pytest.mark.parametrize(
    ("arguments", "options", "error", "words"),
    [
        ((None,), {}, TypeError, "labels must be given"),
        (([],), {}, (ValueError, TypeError), "labels"),
        (([0.5, 1.0],), {}, TypeError, "labels must be integers.*match"),
        (([True, False],), {}, TypeError, "labels must be integers"),
        (([0, 1], [0.5]), {}, TypeError, "reference_labels must be integers"),
        ((["x", "y"],), {}, TypeError, "np.unique"),
        ((np.array([2**40, 1]),), {}, ValueError, "labels.*wrap"),
        (([0, 1],), {"match": 3}, TypeError, "match must be callable"),
        (([0, 1],), {"match": lambda a, b: a}, TypeError, "match must return"),
        (
            (np.ones((2, 3)), np.ones((2, 4))),
            {"match": lambda a, b: a[0] == b[0]},
            ValueError,
            "rows of one length",
        ),
        (([0, 1],), {"where": [True]}, ValueError, r"where.*2 anchors.*\(1,\)"),
        (([0, 1],), {"where": [1.0, 0.0]}, TypeError, "where must be boolean"),
        (([0, 1],), {"positions": [0.0, 1.0]}, TypeError, "positions must be integers"),
    ],
)
def test_bad_input_is_named(arguments, options, error, words):
    with pytest.raises(error, match=words):
        tj.pair_masks(*arguments, **options)


def test_masks_that_do_not_fit_are_named():
    d, masks = np.ones((3, 3)), tj.pair_masks([0, 0, 1, 1])
    with pytest.raises(ValueError, match=r"labels.positive.*\(4, 4\).*\(3, 3\)"):
        tj.batch_hard_loss(d, masks)
    with pytest.raises(ValueError, match="reference_labels and positions"):
        tj.batch_hard_loss(np.ones((4, 4)), masks, positions=[0, 1, 2, 3])
    with pytest.raises(TypeError, match=r"labels\.negative must be boolean"):
        tj.batch_hard_loss(d, tj.PairMasks(np.ones((3, 3), bool), np.ones((3, 3))))
