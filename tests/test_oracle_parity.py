"""Every loss and every miner against the loops in float64, on random problems."""

import functools
import itertools

import jax
import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import (
    HINGES,
    LOSSES,
    WITH_HINGES,
    in_lanes,
    margins,
    problems,
    quick_hinge,
    unless_slow,
)

import tripletjax as tj

CHOICES = {
    "easy": (tj.mining.easiest_positive, tj.mining.easiest_negative),
    "semi-hard": (tj.mining.semi_hard_positive, tj.mining.semi_hard_negative),
    "hard": (tj.mining.hardest_positive, tj.mining.hardest_negative),
}
BANDS = {
    "all": (lambda margin: None, lambda margin: (-np.inf, np.inf)),
    "hard": (lambda margin: tj.hard_band(), lambda margin: (-np.inf, 0)),
    "semi-hard": (tj.semi_hard_band, lambda margin: (0, margin)),
    "easy": (tj.easy_band, lambda margin: (margin, np.inf)),
    "violating": (tj.violating_band, lambda margin: (-np.inf, margin)),
}


@functools.cache
def program(loss, hinge):
    """Terms, gradient of their weighted total, and the default reduction."""

    @jax.jit
    def run(distances, labels, options, margin, weights):
        function = functools.partial(
            LOSSES[loss][0], labels=labels, margin=margin, **options
        )

        def weighted(distances):
            terms = function(distances, hinge=HINGES[hinge][0], reduce_fn=None)
            return terms.total @ weights, terms

        gradient, terms = jax.grad(weighted, has_aux=True)(distances)
        return terms, gradient, function(distances, hinge=HINGES[hinge][0])

    return run


@in_lanes(("loss", "hinge"), WITH_HINGES, quick=quick_hinge)
@settings(max_examples=20)
@given(problem=problems(), margin=margins)
def test_loss_and_gradient(loss, hinge, problem, margin):
    _, triplets_of, reduced = LOSSES[loss]
    distances, labels, options = problem
    d = distances.astype(np.float64)
    triplets = triplets_of(d, *oracles.pair_masks(labels, **options))
    weights = np.linspace(1, 2, len(d), dtype=np.float32)
    expected, expected_gradient = oracles.loss_of(
        d, triplets, HINGES[hinge][1], margin, weights
    )
    terms, gradient, value = program(loss, hinge)(
        distances, labels, options, margin, weights
    )
    for field, array in zip(terms._fields, expected):
        np.testing.assert_allclose(
            getattr(terms, field), array, rtol=2e-5, atol=2e-6, err_msg=field
        )
    np.testing.assert_allclose(gradient, expected_gradient, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(value, reduced(expected), rtol=2e-5, atol=2e-6)


@settings(max_examples=60)
@given(problem=problems())
def test_batch_hard(problem):
    distances, labels, options = problem
    expected = oracles.batch_hard(distances, *oracles.pair_masks(labels, **options))
    check_per_anchor(tj.batch_hard_triplets(distances, labels, **options), expected)


@in_lanes(
    ("positive", "negative", "fallback"),
    itertools.product(CHOICES, CHOICES, [False, True]),
    # Each choice of each side.
    quick=[
        ("easy", "semi-hard", True),
        ("hard", "hard", True),
        ("semi-hard", "easy", True),
        ("semi-hard", "semi-hard", True),
    ],
)
@settings(max_examples=15)
@given(problem=problems())
def test_easy_hard(positive, negative, fallback, problem):
    distances, labels, options = problem
    options |= {
        "positive": CHOICES[positive][0],
        "negative": CHOICES[negative][1],
        "fallback": fallback,
    }
    if positive == negative == "semi-hard":
        with pytest.raises(ValueError, match="semi-hard"):
            tj.batch_easy_hard_triplets(distances, labels, **options)
        return
    triplets = tj.batch_easy_hard_triplets(distances, labels, **options)
    for name in ("positive", "negative", "fallback"):
        del options[name]
    masks = oracles.pair_masks(labels, **options)
    expected = oracles.easy_hard(distances, *masks, positive, negative, fallback)
    check_per_anchor(triplets, expected)


@pytest.mark.parametrize("single", ["easy", "hard"])
@pytest.mark.parametrize("every", ["positive", "negative"])
@settings(max_examples=15)
@given(problem=problems())
def test_every_one_of_one_side(every, single, problem):
    distances, labels, options = problem
    choices = {
        "positive": CHOICES[single][0],
        "negative": CHOICES[single][1],
        every: tj.mining.all_candidates,
    }
    triplets = tj.batch_easy_hard_triplets(distances, labels, **choices, **options)
    masks = oracles.pair_masks(labels, **options)
    chosen = oracles.easy_hard(distances, *masks, single, single)
    expected = set()
    for a, triplet in enumerate(chosen):
        if triplet:
            _, p, n = triplet
            for j in np.flatnonzero(masks[every == "negative"][a]):
                expected.add((a, j, n) if every == "positive" else (a, p, j))
    assert triplet_set(triplets) == expected


@pytest.mark.parametrize("fallback", [False, True])
@settings(max_examples=60)
@given(problem=problems())
def test_semi_hard(fallback, problem):
    distances, labels, options = problem
    masks = oracles.pair_masks(labels, **options)
    expected = oracles.semi_hard(distances, *masks, fallback)
    got = tj.batch_semi_hard_triplets(distances, labels, fallback=fallback, **options)
    assert got.valid.shape == distances.shape
    assert triplet_set(got) == {(a, p, n) for (a, p), n in expected.items()}


@pytest.mark.parametrize("band", unless_slow(BANDS, ["semi-hard"]))
@settings(max_examples=40)
@given(problem=problems(), margin=margins, short=st.booleans())
def test_all_triplets(band, problem, margin, short):
    distances, labels, options = problem
    ours, theirs = BANDS[band]
    masks = oracles.pair_masks(labels, **options)
    expected = oracles.all_triplets(distances, *masks, *theirs(margin))
    size = 2 if short else 300
    got = tj.all_triplets(
        labels, size=size, distances=distances, band=ours(margin), **options
    )
    assert got.valid.shape == (size,)
    assert got.count == len(expected)
    assert got.valid.sum() == min(size, len(expected))
    assert got.valid[: got.valid.sum()].all()
    if short:
        assert triplet_set(got) <= set(expected)
        # Anchors and positives come in order, whatever is left out.
        assert [t[:2] for t in triplet_list(got)] == [t[:2] for t in expected[:size]]
    else:
        assert triplet_set(got) == set(expected)
    if band == "all":
        alone = tj.all_triplets(labels, size=size, **options)
        assert triplet_list(alone) == expected[:size]
        assert alone.count == len(expected)


@settings(max_examples=30)
@given(problem=problems(), seed=st.integers(0, 99))
def test_random_triplets(problem, seed):
    _, labels, options = problem
    positive, negative = oracles.pair_masks(labels, **options)
    possible = positive.any(1) & negative.any(1)
    draw = functools.partial(tj.random_triplets, jax.random.key(seed), per_anchor=3)
    for got in (draw(labels, **options), draw(tj.PairMasks(positive, negative))):
        assert got.valid.shape == (len(labels), 3)
        np.testing.assert_array_equal(got.valid, np.repeat(possible[:, None], 3, 1))
        for a, p, n in triplet_list(got):
            assert positive[a, p]
            assert negative[a, n]


@settings(max_examples=30)
@given(problem=problems(), margin=margins, seed=st.integers(0, 99))
def test_random_semi_hard(problem, margin, seed):
    distances, labels, options = problem
    masks = oracles.pair_masks(labels, **options)
    expected = oracles.within_margin(distances, *masks, margin)
    got = tj.random_semi_hard_triplets(
        jax.random.key(seed), distances, labels, margin=margin, **options
    )
    drawn = {(a, p): n for a, p, n in triplet_list(got)}
    assert set(drawn) == {pair for pair, choices in expected.items() if choices}
    for pair, n in drawn.items():
        assert n in expected[pair]


@settings(max_examples=30)
@given(problem=problems(), seed=st.integers(0, 99))
def test_distance_weighted_only_draws_what_has_weight(problem, seed):
    distances, labels, options = problem
    positive, negative = oracles.pair_masks(labels, **options)
    got = tj.distance_weighted_triplets(
        jax.random.key(seed), distances, labels, dim=3, **options
    )
    valid = positive & negative.any(1, keepdims=True)
    np.testing.assert_array_equal(got.valid, valid)
    for a, p, n in triplet_list(got):
        assert positive[a, p]
        assert oracles.distance_weights(distances, negative, a, 3, 0.5, 1.4).get(n)


def check_per_anchor(triplets, expected):
    for a, (valid, triplet) in enumerate(zip(triplets.valid, expected)):
        assert valid == (triplet is not None)
        if triplet:
            got = (triplets.anchor[a], triplets.positive[a], triplets.negative[a])
            assert got == triplet


def triplet_list(triplets):
    fields = np.stack([np.ravel(field) for field in triplets[:3]], axis=1)
    return [tuple(map(int, row)) for row in fields[np.ravel(triplets.valid)]]


def triplet_set(triplets):
    listed = triplet_list(triplets)
    assert len(set(listed)) == len(listed)
    return set(listed)
