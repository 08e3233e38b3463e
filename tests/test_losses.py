"""Explicit triplets, reductions and costs, by hand and against the oracles."""

import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads
from problems import HINGES, unless_slow

import tripletjax as tj

METRICS = ("euclidean", "squared_euclidean", "cosine", "manhattan")


def vectors(seed, shape=(5, 4)):
    random = np.random.default_rng(seed)
    return [random.normal(size=shape).astype(np.float32) for _ in range(3)]


@pytest.mark.parametrize("hinge", unless_slow(["hinge", "soft margin"], ["hinge"]))
@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("metric", METRICS)
@settings(max_examples=10)
@given(seed=st.integers(0, 2**32 - 1), margin=st.floats(0, 2))
def test_explicit_triplets(metric, swap, hinge, seed, margin):
    ours, cost = HINGES[hinge]
    a, p, n = vectors(seed)
    distance = getattr(oracles, metric)
    expected = oracles.triplet_margin(a, p, n, distance, cost, margin, swap)
    options = {
        "margin": margin,
        "metric": getattr(tj, metric),
        "swap": swap,
        "hinge": ours,
    }
    terms = tj.triplet_margin_loss(a, p, n, reduce_fn=None, **options)
    np.testing.assert_allclose(terms.total, expected, rtol=1e-4, atol=1e-5)
    mean = tj.triplet_margin_loss(a, p, n, **options)
    np.testing.assert_allclose(mean, expected.mean(), rtol=1e-4, atol=1e-5)
    where = np.array([True, False, True, True, False])
    mean = tj.triplet_margin_loss(a, p, n, where=where, **options)
    np.testing.assert_allclose(mean, expected[where].mean(), rtol=1e-4, atol=1e-5)


def test_the_defaults_are_those_of_the_original():
    """Euclidean distance, margin 0.1, the mean."""
    a, p, n = vectors(0)
    by_hand = np.maximum(
        np.linalg.norm(a - p, axis=1) - np.linalg.norm(a - n, axis=1) + 0.1, 0
    )
    np.testing.assert_allclose(tj.triplet_margin_loss(a, p, n), by_hand.mean(), 1e-5)


@pytest.mark.parametrize("swap", unless_slow([False, True], [True]))
@pytest.mark.parametrize("metric", unless_slow(METRICS, ["euclidean"]))
def test_gradients_are_those_of_finite_differences(metric, swap):
    with jax.enable_x64(True):
        triplets = [jnp.float64(x) for x in vectors(3)]
        options = {"metric": getattr(tj, metric), "swap": swap, "margin": 0.5}
        for hinge in (jax.nn.relu, jax.nn.softplus):
            check_grads(
                lambda a, p, n, h=hinge: tj.triplet_margin_loss(
                    a, p, n, hinge=h, **options
                ),
                triplets,
                order=2,
                modes=("fwd", "rev"),
                eps=1e-6,
                atol=1e-4,
                rtol=1e-4,
            )


@pytest.mark.parametrize("metric", METRICS)
def test_coinciding_vectors_have_finite_gradients(metric):
    x = jnp.ones((2, 3))
    metric = getattr(tj, metric)
    for triplet in ((x, x, x), (x, x, -x), (x, -x, x), (0 * x, 0 * x, x)):
        gradients = jax.grad(
            lambda *t: tj.triplet_margin_loss(*t, metric=metric), argnums=(0, 1, 2)
        )(*triplet)
        assert all(jnp.isfinite(g).all() for g in gradients)


def test_near_duplicates_keep_value_and_gradient():
    """Anchor and positive 1e-4 apart: what is left of a matrix product is noise."""
    a = vectors(0, (1, 128))[0]
    a /= np.linalg.norm(a)
    p = a.copy()
    p[0, 0] += np.float32(1e-4)
    loss = lambda p: tj.triplet_margin_loss(a, p, a, margin=1.0)  # noqa: E731
    value, gradient = jax.value_and_grad(loss)(jnp.asarray(p))
    exact = 1 + abs(float(p[0, 0]) - float(a[0, 0]))
    np.testing.assert_allclose(value, exact, rtol=1e-7)
    np.testing.assert_allclose(jnp.linalg.norm(gradient), 1, rtol=1e-6)


def test_shapes():
    a, p, n = vectors(0, (2, 3, 5, 4))
    assert tj.triplet_margin_loss(a, p, n).shape == (2, 3)
    one = tj.triplet_margin_loss(a[0, 0, 0], p[0, 0, 0], n[0, 0, 0], margin=5.0)
    assert one.shape == ()
    swept = jax.vmap(lambda *t: tj.triplet_margin_loss(*t, margin=5.0))
    np.testing.assert_allclose(swept(a[0, 0], p[0, 0], n[0, 0])[0], one, rtol=1e-6)
    margins = jnp.linspace(0, 1, 7)
    swept = jax.vmap(
        lambda m: tj.triplet_margin_loss(a[0, 0], p[0, 0], n[0, 0], margin=m)
    )
    assert swept(margins).shape == (7,)
    assert (jnp.diff(swept(margins)) >= 0).all()


def test_masked_triplets_may_hold_anything():
    a, p, n = (jnp.asarray(x) for x in vectors(0))
    where = jnp.arange(5) != 2
    loss = lambda a: tj.triplet_margin_loss(a, p, n, where=where)  # noqa: E731
    value, gradient = jax.value_and_grad(loss)(a)
    got, got_gradient = jax.value_and_grad(loss)(a.at[2].set(1e30))
    assert got == value
    np.testing.assert_array_equal(got_gradient, gradient)
    none = tj.triplet_margin_loss(a, p, n, where=jnp.zeros(5, bool))
    assert none == 0


def test_reductions():
    terms = tj.TripletTerms(*jnp.array([[3.0, 1.0], [2.0, 0.0], [8.0, 0.0]]))
    assert tj.mean_active(terms) == 2
    assert tj.mean_valid(terms) == 0.5
    nothing = tj.TripletTerms(*jnp.zeros((3, 2)))
    for reduce_fn in (tj.mean_active, tj.mean_valid):
        value, gradient = jax.value_and_grad(reduce_fn)(nothing)
        assert value == 0
        assert jnp.isfinite(gradient.total).all()
    d, labels = tj.euclidean(vectors(0)[0]), [0, 0, 1, 1, 1]
    total = tj.batch_all_loss(d, labels, reduce_fn=lambda terms: terms.total.sum())
    parts = tj.batch_all_loss(d, labels, reduce_fn=None)
    np.testing.assert_allclose(total, parts.total.sum(), rtol=1e-6)


def test_reductions_keep_batch_dimensions():
    """Also where one is part of another, which sees sums."""
    both = tj.SumReduction(lambda sums: (tj.mean_valid.of_sums(sums), sums.valid))
    terms = tj.TripletTerms(*jnp.arange(18.0).reshape(3, 2, 3))
    mean, valid = both(terms)
    np.testing.assert_allclose(mean, terms.total.sum(1) / terms.valid.sum(1))
    np.testing.assert_array_equal(valid, terms.valid.sum(1))


def test_equal_reductions_are_one():
    def reduction():
        return tj.SumReduction(lambda sums: sums.total / 7)

    assert reduction() == reduction()
    assert hash(reduction()) == hash(reduction())
    assert tj.mean_valid != tj.mean_active
    assert pickle.loads(pickle.dumps(tj.mean_valid)) == tj.mean_valid
    assert "Mean cost of all triplets" in tj.mean_valid.__doc__
    assert repr(tj.mean_valid) == "SumReduction(mean_valid)"


@pytest.mark.parametrize(
    "reduce_fn", [jnp.mean, np.mean, sum, functools.partial(jnp.sum, axis=-1)]
)
@pytest.mark.parametrize("loss", [tj.batch_hard_loss, tj.blockwise.batch_hard_loss])
def test_reductions_of_one_array_are_refused(loss, reduce_fn):
    with pytest.raises(TypeError, match=r"reduce_fn must take TripletTerms, got .*use"):
        loss(np.ones((4, 4)), [0, 0, 1, 1], reduce_fn=reduce_fn)


@pytest.mark.parametrize(
    "loss", [tj.batch_all_loss, tj.batch_hard_loss, tj.batch_semi_hard_loss]
)
def test_the_slope_by_the_margin_counts_active_triplets(loss):
    d = tj.euclidean(np.random.default_rng(0).normal(size=(12, 3)))

    def total(margin):
        terms = loss(d, np.arange(12) % 3, margin=margin, reduce_fn=None)
        return terms.total.sum(), terms.active.sum()

    slope, active = jax.grad(total, has_aux=True)(0.3)
    assert slope == active > 0


def test_counts_do_not_wrap():
    """4,096 items of 8 classes make 7.5e9 triplets, more than an int32 holds."""
    d, labels = tj.euclidean(vectors(0)[0]), [0, 0, 1, 1, 1]
    terms = tj.batch_all_loss(d, labels, reduce_fn=None)
    assert all(jnp.issubdtype(term.dtype, jnp.floating) for term in terms)
    terms = tj.TripletTerms(*(jnp.full(4096, 511.0 * 3584.0),) * 3)
    np.testing.assert_allclose(tj.mean_valid(terms), 1)


@pytest.mark.parametrize("field", ["anchor", "positive", "negative"])
def test_triplets_that_are_not_there_are_named_or_give_nan(field):
    """JAX clips indices out of range; a wrong loss would go unnoticed."""
    d = jnp.ones((3, 3))
    right = tj.Triplets(np.array([0]), np.array([1]), np.array([2]), np.array([True]))
    wrong = right._replace(**{field: np.array([9])})
    with pytest.raises(ValueError, match=rf"triplets.{field} must be from 0 to 2, got"):
        tj.triplet_loss(d, wrong)
    assert tj.triplet_loss(d, wrong._replace(valid=np.array([False]))) == 0
    for index in (9, -1):
        wrong = jax.tree.map(jnp.asarray, right)._replace(**{field: jnp.array([index])})
        with pytest.raises(ValueError, match=f"triplets.{field} must be from 0 to 2"):
            tj.triplet_loss(d, wrong)
        assert jnp.isnan(jax.jit(tj.triplet_loss)(d, wrong))
    np.testing.assert_allclose(tj.triplet_loss(d, right), 0.1, rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (
            {"positives": np.ones((1, 4))},
            ValueError,
            r"\(5, 4\), \(1, 4\) and \(5, 4\)",
        ),
        ({"where": [True]}, ValueError, "where must have one entry"),
        ({"where": [1.0] * 5}, TypeError, "where must be boolean"),
        ({"margin": -1}, ValueError, "margin"),
        ({"margin": None}, TypeError, "margin must be given"),
        ({"swap": "no"}, TypeError, "swap must be a bool"),
        ({"hinge": jnp.sum}, ValueError, r"hinge must be elementwise.*\(5,\)"),
        (
            {"hinge": tj.TripletCost(lambda ap, an, margin: margin)},
            ValueError,
            "hinge must be elementwise",
        ),
        ({"metric": "euclidean"}, TypeError, "metric must be callable"),
        ({"hinge": "relu"}, TypeError, "hinge must be callable"),
        ({"anchors": np.ones((5, 4), complex)}, TypeError, "real"),
    ],
)
def test_bad_explicit_triplets_are_named(change, error, words):
    names = ("anchors", "positives", "negatives")
    arguments = dict.fromkeys(names, np.ones((5, 4))) | change
    triplet = [arguments.pop(name) for name in names]
    with pytest.raises(error, match=words):
        tj.triplet_margin_loss(*triplet, **arguments)


def test_bad_mined_triplets_are_named():
    d, i = np.ones((2, 3, 3)), np.zeros(3, int)
    with pytest.raises(TypeError, match="triplets must be Triplets"):
        tj.triplet_loss(d[0], (i, i, i))
    with pytest.raises(ValueError, match="batch dimensions"):
        tj.triplet_loss(d, tj.Triplets(i, i, i, i == 0))
    with pytest.raises(ValueError, match="one shape"):
        tj.triplet_loss(d[0], tj.Triplets(i, i, i[:2], i == 0))
    with pytest.raises(TypeError, match=r"triplets\.anchor must be integers"):
        tj.triplet_loss(d[0], tj.Triplets(i + 0.0, i, i, i == 0))
    with pytest.raises(TypeError, match=r"triplets\.valid must be boolean"):
        tj.triplet_loss(d[0], tj.Triplets(i, i, i, i))


def test_selectively_contrastive_options():
    assert tj.selectively_contrastive() is tj.selectively_contrastive()
    for option in ("hard_weight", "temperature"):
        for value in (0.0, -1.0, float("inf")):
            with pytest.raises(ValueError, match=option):
                tj.selectively_contrastive(**{option: value})


def test_selectively_contrastive_only_pushes_hard_negatives():
    d = jnp.array([[0.0, 0.5, 0.2], [0.5, 0.0, 0.9], [0.2, 0.9, 0.0]])
    gradient = jax.grad(
        lambda d: tj.batch_hard_loss(
            d,
            jnp.array([0, 0, 1]),
            hinge=tj.selectively_contrastive(hard_weight=2.0),
            reduce_fn=lambda terms: terms.total.sum(),
        )
    )(d)
    np.testing.assert_allclose(gradient[0], [0, 0, -2])


LOSS_NAMES = ["batch_all_loss", "batch_hard_loss", "batch_semi_hard_loss"]


@pytest.mark.parametrize("name", LOSS_NAMES)
def test_embeddings_and_distances_are_told_apart(name):
    """At once, and only where it takes no wait: values that are not traced."""
    random = np.random.default_rng(0)
    x, labels = np.float32(random.normal(size=(6, 6))), np.arange(6) % 2
    distances = np.abs(x[:, None] - x).sum(-1)
    matrix, blockwise = getattr(tj, name), getattr(tj.blockwise, name)
    for array in (x, jnp.asarray(x)):
        with pytest.raises(ValueError, match="if these are embeddings, use"):
            matrix(array, labels)
    with pytest.raises(ValueError, match="If these are embeddings, use"):
        matrix(x[:, :4], labels)
    with pytest.raises(ValueError, match="if these are distances, use"):
        blockwise(distances, labels)
    for function, array in ((matrix, x), (blockwise, distances)):
        assert jax.eval_shape(function, array, labels).shape == ()


def test_triplets_of_embeddings():
    x = np.float32(np.random.default_rng(0).normal(size=(6, 3)))
    triplets = tj.all_triplets(np.arange(6) % 2, size=40)
    with pytest.raises(ValueError, match=r"use tripletjax\.blockwise\.triplet_loss"):
        tj.triplet_loss(x, triplets)
