"""Miners by hand, and what random miners draw."""

import copy
import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from problems import unless_slow
from scipy import stats

import tripletjax as tj
from tripletjax import mining
from tripletjax._api import own_promotion
from tripletjax._matrices import columns_by_weight

LINE = jnp.array([[0.0], [1.0], [3.0], [3.5], [7.0]])
LABELS = jnp.array([0, 0, 0, 1, 1])


def test_batch_hard_by_hand():
    triplets = tj.batch_hard_triplets(tj.euclidean(LINE), LABELS)
    np.testing.assert_array_equal(triplets.anchor, [0, 1, 2, 3, 4])
    np.testing.assert_array_equal(triplets.positive, [2, 2, 0, 4, 3])
    np.testing.assert_array_equal(triplets.negative, [3, 3, 3, 2, 2])
    assert triplets.valid.all()


def test_semi_hard_by_hand():
    triplets = tj.batch_semi_hard_triplets(tj.euclidean(LINE), LABELS)
    # Anchor 2: nothing is between its positives and its negatives; anchor 3 is 3.5 from
    # its positive and from negative 0, which is not strictly farther: the farthest.
    np.testing.assert_array_equal(triplets.negative[0, 1:3], [3, 3])
    np.testing.assert_array_equal(triplets.negative[2, :2], [4, 4])
    assert triplets.negative[3, 4] == 0
    strict = tj.batch_semi_hard_triplets(tj.euclidean(LINE), LABELS, fallback=False)
    assert not strict.valid[3, 4]
    assert strict.valid[4, 3]
    assert strict.negative[4, 3] == 2


def test_the_lowest_index_wins_ties():
    d = jnp.ones((6, 6)) - jnp.eye(6)
    labels = jnp.array([0, 1, 0, 1, 0, 1])
    hard = tj.batch_hard_triplets(d, labels)
    np.testing.assert_array_equal(hard.positive, [2, 3, 0, 1, 0, 1])
    np.testing.assert_array_equal(hard.negative, [1, 0, 1, 0, 1, 0])
    # No negative is farther: the farthest are tied as well.
    semi_hard = tj.batch_semi_hard_triplets(d, labels)
    np.testing.assert_array_equal(semi_hard.negative[0, [2, 4]], [1, 1])
    # All negatives beyond are tied.
    d = d.at[0, 2].set(0.5)
    assert tj.batch_semi_hard_triplets(d, labels).negative[0, 2] == 1


def test_a_semi_hard_choice_is_strict():
    """A partner that is as far as the other one is no choice."""
    d = jnp.array([[1.0, 1.0, 2.0]])
    choose = functools.partial(
        tj.batch_easy_hard_triplets, d, reference_labels=np.array([0, 1, 1])
    )
    triplets = choose(np.array([0]), negative=mining.semi_hard_negative)
    assert triplets.negative == 2
    triplets = choose(
        np.array([1]),
        positive=mining.semi_hard_positive,
        negative=mining.hardest_negative,
    )
    assert not triplets.valid.any()


def test_the_ends_of_bands():
    """Negatives as far as the positive, on the margin, and beyond it."""
    d, labels = jnp.array([[0.5, 0.5, 1.0, 1.25]]), np.array([0])
    pairs = {"reference_labels": np.array([0, 1, 2, 3])}
    for band, expected in (
        (mining.hard_band(), [1]),
        (mining.semi_hard_band(0.5), [2]),
        (mining.easy_band(0.5), [3]),
        (mining.violating_band(0.5), [1, 2]),
    ):
        triplets = tj.all_triplets(labels, size=4, distances=d, band=band, **pairs)
        assert triplets.negative[triplets.valid].tolist() == expected
    # A random one lies between, and on neither end.
    draw = functools.partial(mining.random_semi_hard_triplets, jax.random.key(0))
    for margin, valid in ((0.5, False), (0.625, True)):
        triplets = draw(d, labels, margin=margin, **pairs)
        assert triplets.valid[0].tolist() == [valid, False, False, False]
    assert triplets.negative[0, 0] == 2


def test_five_meanings_of_semi_hard_differ():
    """One anchor, two positives, four negatives: each meaning picks its own."""
    row = jnp.array([0.0, 1.0, 2.0, 0.5, 1.2, 1.6, 2.6])
    labels = jnp.array([0, 0, 0, 1, 1, 1, 1])
    d, options = row[None], {"reference_labels": labels, "positions": jnp.array([0])}
    anchor = labels[:1]
    per_pair = tj.batch_semi_hard_triplets(d, anchor, **options)
    assert (per_pair.negative[0, 1], per_pair.negative[0, 2]) == (4, 6)
    within = tj.all_triplets(
        anchor, size=9, distances=d, band=tj.semi_hard_band(0.5), **options
    )
    _, positive, negative, valid = mining.as_triplets(within)
    assert [(positive[0], negative[0]), *valid.tolist()] == [(1, 4), True, *[False] * 8]
    easy = tj.batch_easy_hard_triplets(d, anchor, **options)
    assert (easy.positive[0], easy.negative[0]) == (1, 4)
    hard = tj.batch_easy_hard_triplets(
        d, anchor, positive=mining.hardest_positive, fallback=True, **options
    )
    assert (hard.positive[0], hard.negative[0]) == (2, 6)
    drawn = tj.random_semi_hard_triplets(
        jax.random.key(0), d, anchor, margin=0.7, **options
    )
    assert drawn.negative[0, 1] in (4, 5)
    assert drawn.negative[0, 2] == 6


def test_a_function_as_selector():
    def second_nearest(distances, candidates, other):
        ordered = jnp.argsort(jnp.where(candidates, distances, jnp.inf), axis=-1)
        return ordered[..., 1], candidates.sum(-1) > 1

    triplets = tj.batch_easy_hard_triplets(
        tj.euclidean(LINE), LABELS, negative=second_nearest
    )
    np.testing.assert_array_equal(triplets.negative, [4, 4, 4, 1, 1])


@pytest.mark.slow
def test_counts_beyond_the_integers_stop_there():
    labels = jnp.arange(3000) % 2
    triplets = tj.all_triplets(labels, size=10)
    # 3000 x 1499 x 1500 triplets.
    assert triplets.count == 2**31 - 1
    assert triplets.valid.all()


def test_sums_beyond_the_integers_stop_there():
    most = 2**31 - 1
    a = jnp.array([1, most - 5, most - 5, most, most], jnp.int32)
    b = jnp.array([2, 5, 6, 0, most], jnp.int32)
    sums = mining._saturating_add(a, b)
    assert sums.tolist() == [3, most, most, most, most]


def test_more_pairs_than_the_integers_count():
    """Only traced: the pairs of 46,341 items alone would take gigabytes."""
    triplets = jax.eval_shape(
        lambda y: tj.all_triplets(y, size=4), jax.ShapeDtypeStruct((46_341,), jnp.int32)
    )
    assert triplets.anchor.shape == (4,)


def test_counted_triplets():
    """A plain record with the count, which every transform and every copy keeps."""
    triplets = tj.all_triplets([0, 0, 1], size=5)
    assert triplets._fields == ("anchor", "positive", "negative", "valid", "count")
    assert triplets.valid.sum() == triplets.count == 2
    batched = jax.vmap(lambda y: tj.all_triplets(y, size=5))(jnp.array([[0, 0, 1]] * 2))
    assert batched.count.tolist() == [2, 2]
    for other in (
        jax.tree.map(lambda x: x, triplets),
        copy.deepcopy(triplets),
        pickle.loads(pickle.dumps(triplets)),
    ):
        assert type(other) is tj.CountedTriplets
        assert other.count == 2
        np.testing.assert_array_equal(other.negative, triplets.negative)


def test_the_loss_takes_counted_triplets():
    d = tj.euclidean(LINE)
    counted = tj.all_triplets(LABELS, size=40)
    without = mining.as_triplets(counted)
    assert type(without) is tj.Triplets
    assert mining.as_triplets(without) is without
    loss = tj.triplet_loss(d, counted)
    assert loss == tj.triplet_loss(d, without) > 0
    batched = jax.vmap(lambda y: tj.all_triplets(y, size=40))(jnp.stack([LABELS] * 2))
    losses = tj.triplet_loss(jnp.stack([d, d]), batched)
    np.testing.assert_allclose(losses, [loss, loss], rtol=1e-6)
    with pytest.raises(TypeError, match="Triplets or CountedTriplets, got tuple"):
        mining.as_triplets(tuple(counted))
    with pytest.raises(ValueError, match=r"triplets\.anchor must be from 0 to 1"):
        tj.triplet_loss(d[:2, :2], counted)


def test_a_relative_selector_and_its_fallback():
    def farther_by(distances, candidates, other):
        beyond = candidates & (distances > other[..., None] + 0.75)
        return mining.hardest_negative(distances, beyond)

    nearest_beyond = mining.Selector(
        farther_by, relative=True, fallback=mining.easiest_negative
    )
    mine = functools.partial(tj.batch_easy_hard_triplets, tj.euclidean(LINE), LABELS)
    strict = mine(negative=nearest_beyond)
    lenient = mine(negative=nearest_beyond, fallback=True)
    far = mine(negative=mining.easiest_negative)
    assert not strict.valid.all()
    np.testing.assert_array_equal(lenient.valid, far.valid)
    np.testing.assert_array_equal(
        lenient.negative, jnp.where(strict.valid, strict.negative, far.negative)
    )


def test_selectors_do_not_change_functions():
    """One function makes several selectors, and has no attribute from any of them."""

    def nearest(distances, candidates, other):
        return mining.hardest_negative(distances, candidates)

    relative = mining.Selector(nearest, relative=True)
    assert not vars(nearest)
    assert relative != mining.Selector(nearest) == mining.Selector(nearest)
    of_builtin = mining.Selector(functools.partial(nearest, other=None))
    triplets = tj.batch_easy_hard_triplets(
        tj.euclidean(LINE),
        LABELS,
        negative=lambda d, c, other: of_builtin.function(d, c),
    )
    np.testing.assert_array_equal(triplets.negative, [3, 3, 3, 2, 2])


def test_selectors_of_the_same_code_share_a_program():
    def selector():
        return mining.Selector(lambda d, c, _: mining.easiest_negative(d, c))

    assert selector() == selector()
    assert hash(selector()) == hash(selector())


def test_selectors_pickle_and_are_documented():
    for name, selector in vars(mining).items():
        if isinstance(selector, mining.Selector):
            assert pickle.loads(pickle.dumps(selector)) == selector
            assert selector.__doc__ != mining.Selector.__doc__, name


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"function": "nearest"}, TypeError, "function must be callable"),
        ({"relative": 1}, TypeError, "relative must be a bool"),
        ({"fallback": "easiest"}, TypeError, "fallback must be a Selector or None"),
    ],
)
def test_bad_selectors_are_named(options, error, words):
    with pytest.raises(error, match=words):
        mining.Selector(**{"function": mining.easiest_negative} | options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {
                "positive": mining.semi_hard_positive,
                "negative": mining.semi_hard_negative,
            },
            "cannot both be relative",
        ),
        (
            {"positive": mining.all_candidates, "negative": mining.all_candidates},
            "use all_triplets",
        ),
        ({"positive": mining.all_candidates}, "all_triplets with semi_hard_band"),
        (
            {
                "positive": mining.semi_hard_positive,
                "negative": mining.all_candidates,
            },
            "all_triplets with semi_hard_band",
        ),
        (
            {
                "negative": lambda *of: mining.hardest_negative(*of),
                "fallback": True,
            },
            "requires a selector with a fallback",
        ),
    ],
)
def test_selectors_that_do_not_fit_together(options, words):
    with pytest.raises(ValueError, match=words):
        tj.batch_easy_hard_triplets(tj.euclidean(LINE), LABELS, **options)


def counts(draw, anchor, column, draws=2000):
    """How often each negative is drawn for one entry."""
    keys = jax.random.split(jax.random.key(1), draws)
    drawn = jax.vmap(lambda key: draw(key).negative[anchor, column])(keys)
    return np.bincount(drawn, minlength=16)


def agrees(observed, probabilities):
    """A chi-squared test at one in ten thousand."""
    drawn = probabilities > 0
    assert observed[~drawn].sum() == 0
    if drawn.sum() == 1:
        return True
    expected = probabilities[drawn] * observed.sum()
    return stats.chisquare(observed[drawn], expected).pvalue > 1e-4


def sphere(dim, n=16):
    x = np.random.default_rng(0).normal(size=(n, dim))
    x[1] = x[0] + 0.3 * x[1]
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.mark.parametrize("dim", [2, 3, 4, 16, 512])
def test_distance_weighted_draws_by_weight(dim):
    x, labels = sphere(dim), np.repeat(np.arange(8), 2)
    d = tj.euclidean(x)
    observed = counts(
        lambda key: tj.distance_weighted_triplets(key, d, labels, dim=dim), 2, 3
    )
    _, negative = oracles.pair_masks(labels)
    weights = oracles.distance_weights(np.float64(d), negative, 2, dim, 0.5, 1.4)
    probabilities = np.array([weights.get(n, 0) for n in range(16)])
    assert agrees(observed, probabilities)


def test_distance_weighted_is_stable_in_many_dimensions():
    """The weights span far more than float32 does; all cut off are uniform."""
    x, labels = sphere(4096), np.repeat(np.arange(8), 2)
    d = tj.euclidean(x)
    for furthest in (1.4, 0.1):
        triplets = tj.distance_weighted_triplets(
            jax.random.key(0), d, labels, dim=4096, furthest=furthest
        )
        assert triplets.valid.sum() == 16
    observed = counts(
        lambda key: tj.distance_weighted_triplets(
            key, d, labels, dim=4096, furthest=0.1
        ),
        2,
        3,
    )
    _, negative = oracles.pair_masks(labels)
    assert agrees(observed, negative[2] / 14)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("position", [None, 2, 7, 14, -1])
def test_random_triplets_are_uniform(masked, position):
    """One anchor of class 1; the reference that it is may be of another class."""
    references, real = np.repeat(np.arange(4), 4), np.arange(16) % 5 > 0
    options = {"reference_where": real}
    if position is None:
        labels, anchor = references, 5
    else:
        labels, anchor = np.array([1]), 0
        options |= {"reference_labels": references, "positions": np.array([position])}
    sides = oracles.pair_masks(labels, **options)
    if masked:
        labels, options = tj.PairMasks(*tj.pair_masks(labels, **options)), {}
    keys = jax.random.split(jax.random.key(1), 2000)
    draw = functools.partial(tj.random_triplets, labels=labels, per_anchor=2, **options)
    drawn = jax.vmap(draw)(keys)
    assert drawn.valid[:, anchor].all()
    for indices, side in zip((drawn.positive, drawn.negative), sides):
        observed = np.bincount(np.ravel(indices[:, anchor]), minlength=16)
        assert agrees(observed, side[anchor] / side[anchor].sum())


def test_random_triplets_of_signed_and_unsigned_labels():
    """All bits set is -1 in one and 2**32 - 1 in the other."""
    labels, theirs = np.int32([-1, 1]), np.uint32([2**32 - 1, 1, 1])
    options = {"reference_labels": theirs, "positions": np.array([-1, 1])}
    draw = functools.partial(tj.random_triplets, jax.random.key(0), per_anchor=20)
    drawn = draw(labels, **options)
    np.testing.assert_array_equal(drawn.valid[:, 0], [False, True])
    assert (drawn.positive[1] == 2).all()
    assert (drawn.negative[1] == 0).all()
    assert not draw(theirs[:1], reference_labels=labels).valid.any()


def test_random_triplets_of_batches():
    """Padding alone may have leading dimensions; each batch has its own draws."""
    labels, where = np.array([0, 0, 1, 1, 2]), np.arange(5) < [[5], [4]]
    sides = zip(*[oracles.pair_masks(labels, where=one) for one in where])
    masks = tj.PairMasks(*map(np.stack, sides))
    draw = functools.partial(tj.random_triplets, jax.random.key(0), per_anchor=3)
    for triplets in (draw(labels, where=where), draw(masks)):
        assert triplets.anchor.shape == (2, 5, 3)
        np.testing.assert_array_equal(
            triplets.valid, np.broadcast_to(np.arange(5)[:, None] < 4, (2, 5, 3))
        )
        batch = np.arange(2)[:, None, None]
        for indices, mask in zip((triplets.positive, triplets.negative), masks):
            assert mask[batch, triplets.anchor, indices][triplets.valid].all()
        assert (triplets.negative[0] != triplets.negative[1]).any()


def test_no_column_without_weight_is_drawn():
    """Sums of a parallel scan are rounded so that they rise where a weight is 0."""
    random = np.random.default_rng(0)
    weights = np.exp(3 * random.normal(size=(8, 5000)))
    weights[random.random((8, 5000)) < 0.5] = 0
    weights = jnp.asarray(weights, jnp.float32)
    ends = jnp.cumsum(weights, axis=-1)
    drawn = columns_by_weight(weights, ends / ends[:, -1:])
    assert (jnp.take_along_axis(weights, drawn, -1) > 0).all()


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ([0.0, 3.0, 0.0, 1.0], [1, 1, 3, 3]),
        ([1e38, 3e38, 1e38, 3e38], [0, 1, 3, 3]),
        ([np.nan, 1.0, np.inf, 1.0], [1, 2, 2, 2]),
    ],
)
def test_columns_by_weight(weights, expected):
    shares = jnp.array([0.0, 0.4, 0.76, 1.0])
    assert columns_by_weight(jnp.array(weights), shares).tolist() == expected


def test_random_semi_hard_triplets_are_uniform():
    d, labels = jnp.tile(jnp.arange(16) / 100, (16, 1)), np.repeat(np.arange(4), 4)
    observed = counts(
        lambda key: tj.random_semi_hard_triplets(key, d, labels, margin=0.055), 0, 3
    )
    assert agrees(observed, np.isin(np.arange(16), range(4, 9)) / 5)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: tj.all_triplets([0, 1], size=0), ValueError, "size"),
        (lambda: tj.all_triplets([0, 1], size=2.0), TypeError, "size must be an int"),
        (lambda: tj.all_triplets([0, 1], size=True), TypeError, "size must be an int"),
        (
            lambda: tj.batch_semi_hard_triplets(np.eye(2), [0, 1], fallback="no"),
            TypeError,
            "fallback must be a bool",
        ),
        (
            lambda: tj.batch_hard_triplets(None, [0, 1]),
            TypeError,
            "distances must be given",
        ),
        (
            lambda: tj.all_triplets([0, 1], size=2, band=tj.hard_band()),
            ValueError,
            "band requires distances",
        ),
        (
            lambda: tj.all_triplets(
                [0, 1], size=2, distances=np.eye(2), band=(0.0, 1.0)
            ),
            TypeError,
            "band must be a Band",
        ),
        (
            lambda: tj.random_triplets(jax.random.key(0), [0, 1], per_anchor=0),
            ValueError,
            "per_anchor",
        ),
        (
            lambda: tj.distance_weighted_triplets(
                jax.random.key(0), np.eye(2), [0, 1], dim=1
            ),
            ValueError,
            "dim",
        ),
        (
            lambda: tj.distance_weighted_triplets(
                jax.random.key(0), np.eye(2), [0, 1], dim=3, cutoff=-1
            ),
            ValueError,
            "cutoff",
        ),
        (
            lambda: tj.batch_easy_hard_triplets(np.eye(2), [0, 1], positive="easy"),
            TypeError,
            "positive must be callable",
        ),
    ],
)
def test_bad_options_are_named(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_sizes_may_be_numpy_integers():
    assert tj.all_triplets([0, 0, 1], size=np.int64(3)).valid.shape == (3,)


@pytest.mark.parametrize("seed", unless_slow(range(4), [0]))
def test_semi_hard_either_way(seed):
    """What is beyond a positive is the same by comparing and by sorting."""
    random = np.random.default_rng(seed)
    # Few distances, so that many are equal; of infinite ones and of NaN as well.
    values = [0.0, 0.5, 1.0, 1.5, 2.0, np.inf, np.nan, -np.nan][: 5 + seed]
    distances = jnp.asarray(random.choice(values, (9, 12)), jnp.float32)
    kind = random.integers(3, size=(9, 12))
    masks = tj.PairMasks(jnp.asarray(kind == 0), jnp.asarray(kind == 1))
    few = own_promotion(mining._beyond_few)(distances, masks, True)
    every = mining._beyond_all(distances, masks.negative)
    known = masks.positive & ~jnp.isnan(distances)
    np.testing.assert_array_equal(few[1][known], every[1][known])
    found = known & every[1]
    assert found.any()
    np.testing.assert_array_equal(few[0][found], every[0][found])


@pytest.mark.slow
def test_semi_hard_of_large_classes():
    x = np.random.default_rng(0).normal(size=(134, 4))
    labels = np.arange(134) % 2
    assert mining.MAX_COMPARED < 134 // 2 - 1
    triplets = tj.batch_semi_hard_triplets(tj.euclidean(x), labels)
    d = np.asarray(tj.euclidean(x), float)
    chosen = oracles.semi_hard(d, *oracles.pair_masks(labels))
    found = np.argwhere(triplets.valid)
    assert {(a, p): int(triplets.negative[a, p]) for a, p in found.tolist()} == chosen
