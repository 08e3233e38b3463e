"""The rules that hold for every loss and form, checked on every one.

A form is a loss of a distance matrix, or a blockwise loss. All cases of a form go
through one compiled program (`problems.program`), as data of one shape.
"""

import functools
import inspect
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from problems import (
    BLOCKWISE,
    BUILT_IN,
    DISTINCT,
    FORMS,
    HINGES,
    LABELS,
    LOSSES,
    METRICS,
    QUICK,
    WITH_HINGES,
    batch,
    in_lanes,
    oracle_of,
    run,
    unless_slow,
    vectors,
)

import tripletjax as tj

BLOCKS = [form for form in FORMS if form.startswith("blockwise")]
EMBEDDED = [form for form in FORMS if form.startswith("embeddings")]
QUICK_FORMS = [*QUICK, *BLOCKS[:3], EMBEDDED[1]]
DISTINCT_FORMS = [*DISTINCT, *BLOCKS, *EMBEDDED]

every_form = pytest.mark.parametrize("form", unless_slow(DISTINCT_FORMS, QUICK_FORMS))
# Blockwise losses treat all metrics in the same way: one loss for each will do.
METRICS_OF_BLOCKS = {
    "batch all": ("euclidean", "cosine", "manhattan"),
    "batch hard": ("euclidean", "cosine", "squared_euclidean"),
    "semi-hard": ("euclidean", "cosine", "custom"),
}
every_loss = pytest.mark.parametrize("name", unless_slow(DISTINCT, QUICK))


HINGES_OF_FORMS = [
    (form, hinge)
    for form in DISTINCT_FORMS
    for hinge in HINGES
    if hinge == "hinge" or form in (*BUILT_IN, *BLOCKS, *EMBEDDED)
]
every_hinge = in_lanes(
    ("form", "hinge"),
    HINGES_OF_FORMS,
    quick=lambda form, hinge: form in QUICK_FORMS and hinge == "hinge",
    slow=lambda form, hinge: hinge == "hinge" or form not in BLOCKS[3:],
)
every_metric = in_lanes(
    ("form", "metric"),
    itertools.product(DISTINCT_FORMS, METRICS),
    quick=lambda form, metric: form in QUICK_FORMS and metric == "euclidean",
    slow=lambda form, metric: form in ("batch hard", BLOCKS[1]),
)


@pytest.fixture
def loss(name):
    return LOSSES[name][0]


def of_embeddings(loss, labels, **options):
    """The loss as a function of embeddings."""
    return lambda x: loss(tj.euclidean(x), labels, **options)


def check(got, expected, *, rtol=2e-4, atol=2e-5):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol),
        got,
        expected,
    )


# Cases of the shared programs.


@every_hinge
def test_the_value_is_the_oracles(form, hinge):
    where = np.random.default_rng(1).random(40) < 0.8
    for labels in LABELS.values():
        value, _ = run(form, vectors(), labels, where, hinge=hinge)
        expected = oracle_of(form, vectors(), labels, where, hinge=hinge)
        np.testing.assert_allclose(value, expected, rtol=1e-5)


@in_lanes(
    ("name", "hinge", "metric"),
    [
        *itertools.product(BLOCKWISE, HINGES, ["euclidean"]),
        *itertools.product(BLOCKWISE, ["hinge"], [*METRICS][1:]),
    ],
    quick=lambda name, hinge, metric: (
        name in QUICK and (hinge, metric) == ("hinge", "euclidean")
    ),
    slow=lambda name, hinge, metric: (
        metric in METRICS_OF_BLOCKS[name]
        if name in QUICK
        else (hinge, metric) == ("hinge", "euclidean")
    ),
)
def test_blockwise_losses_are_those_of_the_matrix(name, hinge, metric):
    """Value and gradients, for classes of all sizes, with padding and without."""
    padding = np.random.default_rng(0).random(40) < 0.8
    options = {"hinge": hinge, "metric": metric}
    for labels in LABELS.values():
        for where in (None, padding):
            check(
                run(f"blockwise: {name}", vectors(), labels, where, **options),
                run(name, vectors(), labels, where, **options),
            )


@every_form
def test_order_does_not_matter(form):
    labels, order = LABELS["uneven"], np.random.default_rng(0).permutation(40)
    value, (by_x, by_margin) = run(form, vectors(), labels)
    got = run(form, vectors()[order], labels[order])
    check(got, (value, (by_x[order], by_margin)))


@every_hinge
@pytest.mark.parametrize("case", ["one class", "all distinct", "all masked"])
def test_no_triplet_costs_nothing(form, hinge, case):
    labels = {"one class": np.zeros(40), "all distinct": np.arange(40)}
    where = np.zeros(40, bool) if case == "all masked" else None
    labels = labels.get(case, LABELS["few"])
    value, gradients = run(form, vectors(), labels, where, hinge=hinge)
    assert value == 0
    for gradient in gradients:
        np.testing.assert_array_equal(gradient, jnp.zeros_like(gradient))


@pytest.mark.parametrize(
    "form", unless_slow(FORMS, ["batch all"], slow=["blockwise: batch hard"])
)
def test_one_item_costs_nothing(form):
    value, gradient = jax.value_and_grad(lambda x: FORMS[form](x, [0]))(vectors(1))
    assert value == 0
    np.testing.assert_array_equal(gradient, jnp.zeros((1, 6)))


@every_metric
def test_collapse_costs_the_margin(form, metric):
    for labels in LABELS.values():
        x = jnp.ones((40, 6))
        value, gradients = run(form, x, labels, margin=0.25, metric=metric)
        # Without a fallback a semi-hard negative must be farther: none is.
        assert value in (0.25, 0.0)
        assert value == 0.25 or "without" in form or "easy" in form
        assert all(jnp.isfinite(gradient).all() for gradient in gradients)


@every_metric
def test_duplicates_have_finite_gradients(form, metric):
    x = vectors().at[3:9].set(vectors()[0]).at[9:12].set(0)
    for labels in LABELS.values():
        value, gradients = run(form, x, labels, metric=metric)
        assert jnp.isfinite(value)
        assert all(jnp.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize(
    "form", unless_slow(DISTINCT_FORMS, ["batch all"], slow=BLOCKS[:3])
)
@pytest.mark.parametrize("gap", [1e4, -1e4])
def test_soft_margin_does_not_overflow(form, gap):
    # Items 0 and 1 are the positives, item 2 the negative, all others are padding.
    x = np.zeros((40, 6), np.float32)
    x[1 if gap > 0 else 2, 0] = 1e4
    labels, where = np.minimum(np.arange(40), 2) // 2, np.arange(40) < 3
    options = {"margin": 0.0, "hinge": "soft margin"}
    value, gradients = run(form, x, labels, where, **options)
    expected = oracle_of(form, x, labels, where, **options)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    assert all(jnp.isfinite(gradient).all() for gradient in gradients)


@every_form
def test_a_nan_is_not_hidden(form):
    for labels in (LABELS["few"], LABELS["many"]):
        value, _ = run(form, vectors().at[7].set(jnp.nan), labels)
        assert jnp.isnan(value)


@every_form
def test_far_from_the_origin(form):
    """Distances of common offset keep their digits."""
    far = vectors() + 1000
    for labels in LABELS.values():
        check(run(form, far, labels), run(form, far - 1000, labels), atol=1e-3)


@pytest.mark.parametrize("form", unless_slow(BLOCKS, BLOCKS[:3]))
def test_padding_may_hold_anything(form):
    """Value and gradient of what is real do not depend on it; its own gradient is 0."""
    where = np.random.default_rng(0).random(40) < 0.7
    for labels in LABELS.values():
        expected, (gradient, by_margin) = run(form, vectors(), labels, where)
        np.testing.assert_array_equal(gradient[~where], 0)
        for junk in (0.0, 1e30, jnp.nan, jnp.inf):
            x = jnp.where(where[:, None], vectors(), junk)
            got = run(form, x, labels, where)
            check(got, (expected, (gradient, by_margin)))
            np.testing.assert_array_equal(got[1][0][~where], 0)


@in_lanes(
    ("form", "dtype"),
    itertools.product(DISTINCT_FORMS, [jnp.bfloat16, jnp.float16]),
    quick=[("batch all", jnp.bfloat16)],
    slow=[("semi-hard", jnp.bfloat16), (BLOCKS[0], jnp.bfloat16)],
)
def test_low_precision(form, dtype):
    low = vectors().astype(dtype)
    value, (gradient, _) = run(form, low, LABELS["few"])
    assert value.dtype == jnp.float32
    assert gradient.dtype == dtype
    expected, _ = run(form, low.astype(jnp.float32), LABELS["few"])
    np.testing.assert_allclose(value, expected, rtol=1e-6)


@pytest.mark.parametrize(
    "form", unless_slow(DISTINCT_FORMS, ["batch all", BLOCKS[1]], slow=BLOCKS[2:3])
)
def test_double_precision(form):
    with jax.enable_x64(True):
        x = jnp.asarray(vectors(), jnp.float64)
        value, (gradient, _) = run(form, x, LABELS["few"])
        assert value.dtype == gradient.dtype == jnp.float64
    expected = oracle_of(form, vectors(), LABELS["few"])
    np.testing.assert_allclose(value, expected, rtol=1e-7)


# Programs of their own.


@pytest.mark.parametrize(
    "form",
    unless_slow(DISTINCT_FORMS, ["batch hard", BLOCKS[0]], slow=BLOCKS[1:2]),
)
def test_a_bare_call_is_the_jitted_one(form):
    for labels in LABELS.values():
        value = FORMS[form](vectors(), labels, margin=0.3)
        np.testing.assert_allclose(value, run(form, vectors(), labels)[0], rtol=1e-5)


@pytest.mark.parametrize(
    "name", unless_slow(DISTINCT, ["batch hard"], slow=["batch all"])
)
def test_without_jit(loss):
    x, labels = batch()
    d = tj.euclidean(x)
    expected = loss(d, labels, margin=0.3)
    with jax.disable_jit():
        np.testing.assert_allclose(loss(d, labels, margin=0.3), expected, rtol=1e-6)


@pytest.mark.parametrize(
    "form",
    unless_slow(DISTINCT_FORMS, ["semi-hard"], slow=[*DISTINCT, BLOCKS[1]]),
)
def test_vmap_is_a_loop(form):
    """Over embeddings, labels and margins, whose inner loops end at different times."""
    x = vectors(120).reshape(3, 40, 6)
    labels = jnp.stack([jnp.asarray(LABELS[k]) for k in ("few", "many", "one large")])
    margins = jnp.array([0.0, 0.2, 1.0])

    def one(x, labels, margin):
        return FORMS[form](x, labels, margin=margin)

    mapped = jax.jit(jax.vmap(jax.value_and_grad(one, (0, 2))))
    expected = [
        run(form, *arguments[:2], margin=arguments[2])
        for arguments in zip(x, labels, margins)
    ]
    expected = jax.tree.map(lambda *leaves: jnp.stack(leaves), *expected)
    check(mapped(x, labels, margins), expected)


@pytest.mark.parametrize(
    "form", unless_slow(DISTINCT_FORMS, ["batch all"], slow=QUICK_FORMS)
)
def test_leading_dimensions_are_batch_dimensions(form):
    x, labels = vectors(240).reshape(2, 3, 40, 6), LABELS["uneven"]
    expected = np.reshape(
        [run(form, one, labels)[0] for one in x.reshape(6, 40, 6)], (2, 3)
    )
    mapped = jax.jit(functools.partial(FORMS[form], margin=0.3))
    check(mapped(x, labels), expected)
    if form in QUICK:
        check(mapped(x, jnp.broadcast_to(labels, (2, 3, 40))), expected)


@in_lanes(
    ("name", "hinge"),
    WITH_HINGES,
    quick=[("batch all", "hinge"), ("batch hard", "hinge")],
)
def test_padding_of_a_matrix_changes_nothing(loss, hinge):
    x, labels = batch()
    real = jnp.array([0, 1, 2, 4, 5, 6, 8, 9, 11])
    d = tj.euclidean(x)
    step = jax.jit(
        jax.value_and_grad(functools.partial(loss, margin=0.3, hinge=HINGES[hinge][0]))
    )
    expected, gradient = step(d[real][:, real], labels[real])
    expected_gradient = jnp.zeros((12, 12)).at[jnp.ix_(real, real)].set(gradient)
    where = jnp.zeros(12, bool).at[real].set(True)
    for junk in (0.0, jnp.nan, jnp.inf, -jnp.inf):
        padded = jnp.where(where[:, None] & where[None], d, junk)
        got, padded_gradient = step(padded, labels, where=where)
        np.testing.assert_allclose(got, expected, rtol=1e-6)
        np.testing.assert_allclose(padded_gradient, expected_gradient, atol=1e-6)


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


@in_lanes(
    ("name", "hinge"),
    [case for case in WITH_HINGES if case[0] in DISTINCT],
    quick=[("batch all", "hinge")],
    slow=lambda name, hinge: hinge == "hinge",
)
def test_gradients_are_those_of_finite_differences(loss, hinge):
    with jax.enable_x64(True):
        x, labels = batch(n=8, classes=3, seed=1)
        x = jnp.asarray(x, jnp.float64)
        options = {"hinge": HINGES[hinge][0]}
        check_grads(
            jax.jit(
                lambda x, margin: loss(
                    tj.euclidean(x), labels, margin=margin, **options
                )
            ),
            (x, 0.3),
            order=1,
            modes=("fwd", "rev"),
            eps=1e-7,
            atol=1e-5,
            rtol=1e-5,
        )


@pytest.mark.parametrize("name", unless_slow(DISTINCT, [], slow=["batch all"]))
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


@pytest.mark.parametrize(
    "form",
    unless_slow(DISTINCT_FORMS, ["semi-hard"], slow=["batch all", BLOCKS[2]]),
)
def test_scan_and_remat(form):
    labels = LABELS["few"]

    def step(x, _):
        value, gradient = jax.value_and_grad(
            jax.checkpoint(lambda x: FORMS[form](x, labels, margin=0.5))
        )(x)
        return x - 0.05 * gradient, value

    _, values = jax.lax.scan(step, vectors(), length=5)
    assert values[-1] < values[0]
    np.testing.assert_allclose(
        values[0], run(form, vectors(), labels, margin=0.5)[0], rtol=1e-5
    )


@pytest.mark.parametrize(
    "form",
    unless_slow(DISTINCT_FORMS, ["batch hard", BLOCKS[1]], slow=QUICK_FORMS),
)
def test_pair_masks_stand_for_labels(form):
    labels, where = LABELS["few"], np.arange(40) != 3

    @jax.jit
    def of_masks(x, masks, where):
        return jax.value_and_grad(FORMS[form])(x, masks, where=where, margin=0.3)

    for labels in (LABELS["few"], LABELS["many"]):
        value, (gradient, _) = run(form, vectors(), labels, where)
        masks = tj.pair_masks(labels)
        check(of_masks(vectors(), masks, where), (value, gradient))
        masks = tj.pair_masks(labels, where=where)
        check(of_masks(vectors(), masks, np.ones(40, bool)), (value, gradient))


@pytest.mark.parametrize("name", unless_slow(DISTINCT, ["semi-hard"]))
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


def kinds(function):
    return [one.kind for one in inspect.signature(function).parameters.values()]


WITH_OPTIONS = [
    getattr(module, name)
    for module in (tj, tj.blockwise)
    for name in module.__all__
    if inspect.isfunction(getattr(module, name))
    and inspect.Parameter.KEYWORD_ONLY in kinds(getattr(module, name))
]


@pytest.mark.parametrize(
    "function", WITH_OPTIONS, ids=lambda function: function.__name__
)
def test_an_option_by_place_is_refused_by_the_name_of_the_function(function):
    by_place = len([kind for kind in kinds(function) if kind.name != "KEYWORD_ONLY"])
    words = rf"{function.__name__}\(\) takes .*{by_place} .*argument"
    with pytest.raises(TypeError, match=words):
        function(*[jnp.ones((2, 2))] * (by_place + 1))
