"""The rules that hold for every loss, checked on every loss."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from problems import (
    BUILT_IN,
    DISTINCT,
    HINGES,
    LOSSES,
    QUICK,
    WITH_HINGES,
    batch,
    unless_slow,
)

import tripletjax as tj

slow = pytest.mark.slow
FORMS = "batch_all_loss", "batch_hard_loss", "batch_semi_hard_loss"

every_loss = pytest.mark.parametrize("name", unless_slow(DISTINCT, QUICK))
every_hinge = pytest.mark.parametrize(("name", "hinge"), WITH_HINGES)


@pytest.fixture
def loss(name):
    return LOSSES[name][0]


def of_embeddings(loss, labels, **options):
    """The loss as a function of embeddings."""
    return lambda x: loss(tj.euclidean(x), labels, **options)


@pytest.mark.parametrize("name", unless_slow(DISTINCT, ["batch all", "batch hard"]))
def test_jit_is_eager(loss):
    x, labels = batch()
    d = tj.euclidean(x)
    eager = loss(d, labels, margin=0.3)
    np.testing.assert_allclose(jax.jit(loss)(d, labels, margin=0.3), eager, rtol=1e-6)
    with jax.disable_jit():
        np.testing.assert_allclose(loss(d, labels, margin=0.3), eager, rtol=1e-6)


@pytest.mark.parametrize("name", unless_slow(DISTINCT, ["batch all", "semi-hard"]))
def test_vmap_is_a_loop(loss):
    d = jnp.stack([tj.euclidean(batch(seed=seed)[0]) for seed in range(3)])
    # Different numbers of positives, so that inner loops end at different times.
    labels = jnp.stack([jnp.arange(12) % k for k in (2, 4, 12)])
    margins = jnp.array([0.0, 0.2, 1.0])

    def one(d, labels, margin):
        return loss(d, labels, margin=margin)

    expected = [one(*arguments) for arguments in zip(d, labels, margins)]
    np.testing.assert_allclose(jax.vmap(one)(d, labels, margins), expected, rtol=1e-5)
    gradients = jax.vmap(jax.grad(one))(d, labels, margins)
    for i, arguments in enumerate(zip(d, labels, margins)):
        np.testing.assert_allclose(gradients[i], jax.grad(one)(*arguments), atol=1e-6)


@every_loss
def test_leading_dimensions_are_batch_dimensions(loss):
    d = jnp.stack([tj.euclidean(batch(seed=seed)[0]) for seed in range(6)])
    labels = batch()[1]
    expected = jnp.stack([loss(one, labels, margin=0.3) for one in d])
    got = loss(d.reshape(2, 3, 12, 12), labels, margin=0.3)
    np.testing.assert_allclose(got, expected.reshape(2, 3), rtol=1e-5)
    per_batch = jnp.broadcast_to(labels, (2, 3, 12))
    got = loss(d.reshape(2, 3, 12, 12), per_batch, margin=0.3)
    np.testing.assert_allclose(got, expected.reshape(2, 3), rtol=1e-5)


@every_hinge
def test_padding_changes_nothing(loss, hinge):
    hinge = HINGES[hinge][0]
    x, labels = batch()
    real = jnp.array([0, 1, 2, 4, 5, 6, 8, 9, 11])
    d = tj.euclidean(x)
    plain = functools.partial(loss, labels=labels[real], margin=0.3, hinge=hinge)
    expected, gradient = jax.value_and_grad(plain)(d[real][:, real])
    where = jnp.zeros(12, bool).at[real].set(True)
    for junk in (0.0, jnp.nan, jnp.inf, -jnp.inf):
        padded = jnp.where(where[:, None] & where, d, junk)
        got, padded_gradient = jax.value_and_grad(loss)(
            padded, labels, margin=0.3, hinge=hinge, where=where
        )
        np.testing.assert_allclose(got, expected, rtol=1e-6)
        expected_gradient = jnp.zeros((12, 12)).at[jnp.ix_(real, real)].set(gradient)
        np.testing.assert_allclose(padded_gradient, expected_gradient, atol=1e-6)


@pytest.mark.parametrize("padded", unless_slow([False, True], [True]))
@pytest.mark.parametrize(
    "references", unless_slow(["none", "as many", "others"], ["as many"])
)
@pytest.mark.parametrize("name", FORMS)
def test_forms_agree(name, references, padded):
    """Labels or masks, a matrix or blocks, of the items themselves or of others."""
    matrix, blocks = getattr(tj, name), getattr(tj.blockwise, name)
    x, labels = batch(6)
    where = jnp.array([True, True, False, True, True, True]) if padded else None
    options, y = {}, None
    if references != "none":
        y, others = batch({"as many": 6, "others": 9}[references], seed=1)
        options = {"references": y, "reference_labels": others}
    masks = tj.pair_masks(labels, options.get("reference_labels"))
    of_masks = {k: v for k, v in options.items() if k == "references"}
    of_matrix = {k: v for k, v in options.items() if k != "references"}
    both = {"margin": 0.5, "where": where}
    values = [
        matrix(tj.euclidean(x, y), labels, **of_matrix, **both),
        matrix(tj.euclidean(x, y), masks, **both),
        blocks(x, labels, **options, **both),
        blocks(x, masks, **of_masks, **both),
    ]
    assert values[0] > 0
    np.testing.assert_allclose(values[1:], values[0], rtol=1e-5)


@every_loss
def test_order_does_not_matter(loss):
    x, labels = batch()
    order = np.random.default_rng(0).permutation(12)
    value, gradient = jax.value_and_grad(of_embeddings(loss, labels))(x)
    got = jax.value_and_grad(of_embeddings(loss, labels[order]))(x[order])
    np.testing.assert_allclose(got[0], value, rtol=1e-5)
    np.testing.assert_allclose(got[1], gradient[order], atol=1e-5)


@every_hinge
@pytest.mark.parametrize(
    "labels",
    [[0] * 6, list(range(6)), pytest.param([0], marks=pytest.mark.slow)],
    ids=["one class", "all distinct", "one item"],
)
def test_no_triplet_costs_nothing(loss, hinge, labels):
    x, _ = batch(len(labels))
    options = {"margin": 0.3, "hinge": HINGES[hinge][0]}
    check_nothing(of_embeddings(loss, labels, **options), x)


@every_hinge
def test_all_masked_costs_nothing(loss, hinge):
    x, labels = batch(6)
    options = {"hinge": HINGES[hinge][0], "where": jnp.zeros(6, bool)}
    check_nothing(of_embeddings(loss, labels, **options), x)


def check_nothing(loss, x):
    value, gradient = jax.value_and_grad(loss)(x)
    assert value == 0
    np.testing.assert_array_equal(gradient, jnp.zeros_like(x))


@every_loss
@pytest.mark.parametrize("metric", ["euclidean", "squared_euclidean", "cosine"])
def test_collapse_costs_the_margin(loss, metric):
    labels = batch(6)[1]
    x = jnp.ones((6, 3))
    metric = getattr(tj, metric)
    value, gradient = jax.value_and_grad(
        lambda x: loss(metric(x), labels, margin=0.25)
    )(x)
    # Without a fallback a semi-hard negative must be farther: there is none.
    assert value in (0.25, 0.0)
    assert jnp.isfinite(gradient).all()


@every_hinge
def test_duplicates_have_finite_gradients(loss, hinge):
    x, labels = batch()
    x = x.at[3].set(x[0]).at[4].set(x[0]).at[5].set(x[2]).at[1].set(0)
    for metric in (tj.euclidean, tj.squared_euclidean, tj.cosine, tj.manhattan):
        gradient = jax.grad(
            lambda x, m=metric: loss(m(x), labels, hinge=HINGES[hinge][0])
        )(x)
        assert jnp.isfinite(gradient).all()


@every_loss
@pytest.mark.parametrize("gap", [1e4, -1e4])
def test_soft_margin_does_not_overflow(loss, gap):
    labels = [0, 0, 1]
    near, far = (0.0, gap) if gap > 0 else (-gap, 0.0)
    d = jnp.array([[0.0, far, near], [far, 0.0, near], [near, near, 0.0]])
    value, gradient = jax.value_and_grad(loss)(
        d, labels, margin=0.0, hinge=jax.nn.softplus
    )
    assert value == max(gap, 0) or value == 0
    assert jnp.isfinite(gradient).all()


@every_loss
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_low_precision(loss, dtype):
    x, labels = batch()
    low = x.astype(dtype)
    value, gradient = jax.value_and_grad(of_embeddings(loss, labels, margin=0.3))(low)
    assert value.dtype == jnp.float32
    assert gradient.dtype == dtype
    full = of_embeddings(loss, labels, margin=0.3)(low.astype(jnp.float32))
    np.testing.assert_allclose(value, full, rtol=1e-6)
    assert loss(tj.euclidean(x).astype(dtype), labels).dtype == jnp.float32


@every_loss
def test_double_precision(loss):
    with jax.enable_x64(True):
        x, labels = batch()
        x = jnp.asarray(x, jnp.float64)
        value, gradient = jax.value_and_grad(of_embeddings(loss, labels, margin=0.3))(x)
        assert value.dtype == gradient.dtype == jnp.float64
    single = of_embeddings(loss, labels, margin=0.3)(jnp.float32(x))
    np.testing.assert_allclose(value, single, rtol=1e-5)


@every_loss
def test_one_trace_for_repeated_calls(loss):
    chex.clear_trace_counter()

    @chex.assert_max_traces(n=1)
    def total(terms):
        return terms.total.sum()

    labels = batch()[1]
    for seed, margin in enumerate((0.1, 0.2, 0.3)):
        d = tj.euclidean(batch(seed=seed)[0])
        loss(d, labels, margin=margin, reduce_fn=total)


@pytest.mark.parametrize(
    ("name", "hinge"),
    [
        pytest.param(name, hinge, marks=[] if quick else slow)
        for name in DISTINCT
        for hinge in HINGES
        if name in BUILT_IN or hinge == "hinge"
        for quick in [name in ("batch all", "semi-hard") and hinge == "hinge"]
    ],
)
def test_gradients_are_those_of_finite_differences(loss, hinge):
    with jax.enable_x64(True):
        x, labels = batch(n=8, classes=3, seed=1)
        x = jnp.asarray(x, jnp.float64)
        options = {"margin": 0.3, "hinge": HINGES[hinge][0]}
        check_grads(
            of_embeddings(loss, labels, **options),
            (x,),
            order=1,
            modes=("fwd", "rev"),
            eps=1e-7,
            atol=1e-5,
            rtol=1e-5,
        )
        check_grads(
            lambda margin: loss(tj.euclidean(x), labels, margin=margin),
            (0.3,),
            order=1,
            eps=1e-7,
            atol=1e-5,
            rtol=1e-5,
        )


@pytest.mark.slow
@pytest.mark.parametrize("name", DISTINCT)
def test_second_derivatives(loss):
    with jax.enable_x64(True):
        x, labels = batch(n=6, dim=3, classes=2, seed=1)
        x = jnp.asarray(x, jnp.float64)
        check_grads(
            of_embeddings(loss, labels, margin=0.3, hinge=jax.nn.softplus),
            (x,),
            order=2,
            modes=("fwd", "rev"),
            eps=1e-6,
            atol=1e-4,
            rtol=1e-4,
        )


@every_loss
def test_scan(loss):
    x, labels = batch()

    def step(x, _):
        value, gradient = jax.value_and_grad(of_embeddings(loss, labels, margin=0.5))(x)
        return x - 0.05 * gradient, value

    _, values = jax.lax.scan(step, x, length=5)
    assert values[-1] < values[0]


@every_loss
def test_pair_masks_stand_for_labels(loss):
    x, labels = batch()
    where = jnp.arange(12) != 3
    d = tj.euclidean(x)
    expected = loss(d, labels, margin=0.3, where=where)
    assert loss(d, tj.pair_masks(labels, where=where), margin=0.3) == expected
    assert loss(d, tj.pair_masks(labels), margin=0.3, where=where) == expected


@every_loss
def test_references(loss):
    x, labels = batch()
    d = tj.euclidean(x[:5], x)
    options = {"reference_labels": labels, "margin": 0.3}
    # The anchors are the first references: the loss is that of the first rows.
    got = loss(d, labels[:5], positions=jnp.arange(5), **options)
    masks = tj.pair_masks(labels)
    expected = loss(d, tj.PairMasks(*(mask[:5] for mask in masks)), margin=0.3)
    np.testing.assert_allclose(got, expected, rtol=1e-6)


@every_loss
@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"distances": jnp.ones(3)}, ValueError, "distances.*\\(3,\\)"),
        ({"distances": jnp.ones((0, 0))}, ValueError, "distances is empty"),
        ({"distances": jnp.ones((4, 5))}, ValueError, "reference_labels"),
        ({"distances": jnp.ones((4, 4), complex)}, TypeError, "distances.*complex"),
        ({"labels": [0, 0, 1]}, ValueError, r"labels.*\(3,\).*4 rows"),
        ({"labels": [0.0, 0, 1, 1]}, TypeError, "labels must be integers"),
        ({"labels": ["a", "a", "b", "b"]}, TypeError, "labels.*np.unique"),
        ({"labels": [[0, 0], [1]]}, ValueError, "labels is not a rectangular"),
        ({"labels": np.array([0, 0, 1, 2**40])}, ValueError, "labels.*wrap"),
        ({"labels": 3}, ValueError, "labels.*scalar"),
        ({"labels": np.zeros((3, 4), int)}, ValueError, r"labels.*\(3, 4\).*broad"),
        ({"where": [True]}, ValueError, "where"),
        ({"where": [1, 1, 1, 0]}, TypeError, "where must be boolean"),
        ({"reference_labels": [0, 0]}, ValueError, r"reference_labels.*\(2,\)"),
        ({"reference_where": [True]}, ValueError, "reference_where"),
        ({"positions": [0, 1]}, ValueError, "positions"),
        ({"positions": [0.0, 1, 2, 3]}, TypeError, "positions must be integers"),
        ({"margin": -0.1}, ValueError, "margin.*-0.1"),
        ({"margin": float("nan")}, ValueError, "margin.*nan"),
        ({"margin": float("inf")}, ValueError, "margin.*inf"),
        ({"margin": [0.1, 0.2]}, ValueError, "margin must be a scalar"),
        ({"margin": "much"}, TypeError, "margin"),
        ({"hinge": "soft"}, TypeError, "hinge must be callable"),
        ({"reduce_fn": "mean"}, TypeError, "reduce_fn must be callable"),
        ({"margins": 0.1}, TypeError, "unexpected keyword argument 'margins'"),
        ({"how": "some"}, TypeError, "unexpected keyword argument 'how'"),
    ],
)
def test_bad_input_is_named(loss, change, error, words):
    arguments = {"distances": jnp.ones((4, 4)), "labels": [0, 0, 1, 1]} | change
    distances, labels = arguments.pop("distances"), arguments.pop("labels")
    with pytest.raises(error, match=words):
        loss(distances, labels, **arguments)


@every_loss
def test_a_nan_is_not_hidden(loss):
    x, labels = batch()
    x = x.at[4].set(jnp.nan)
    assert jnp.isnan(of_embeddings(loss, labels, margin=0.3)(x))
