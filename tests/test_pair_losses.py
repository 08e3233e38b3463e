"""Log-sum-exp and separable losses: oracles, both forms, traps of other libraries."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from problems import LABELS, batch, in_lanes, problems, unless_slow, vectors

import tripletjax as tj


def guarded(oracle):
    """An oracle whose negatives are none that are much nearer than a positive."""

    def value(d, positive, negative, temperature, false_negative_margin, **options):
        rule = {"margin": false_negative_margin}
        kept = oracles.ignore_false_negatives(d, positive, negative, **rule)
        if not options.get("symmetric"):
            return oracle(d, positive, kept, temperature)
        back = oracles.ignore_false_negatives(d.T, positive.T, negative.T, **rule)
        return oracles.mean(
            oracles.nt_xent(*side, temperature)
            for side in ((d, positive, kept), (d.T, positive.T, back))
        )

    return value


# name -> (loss, oracle, parameters with gradients, options)
LOSSES = {
    "supcon": (tj.supcon_loss, oracles.supcon, {"temperature": 0.1}, {}),
    "nt_xent": (tj.nt_xent_loss, oracles.nt_xent, {"temperature": 0.1}, {}),
    "decoupled_contrastive": (
        tj.decoupled_contrastive_loss,
        oracles.decoupled_contrastive,
        {"temperature": 0.1},
        {},
    ),
    "nca": (tj.nca_loss, oracles.nca, {"temperature": 0.1}, {}),
    "info_nce": (tj.info_nce_loss, oracles.info_nce, {"temperature": 0.05}, {}),
    "info_nce of both sides": (
        tj.info_nce_loss,
        oracles.info_nce,
        {"temperature": 0.05},
        {"symmetric": True},
    ),
    "nt_xent without false negatives": (
        tj.nt_xent_loss,
        guarded(oracles.nt_xent),
        {"temperature": 0.1, "false_negative_margin": 0.1},
        {},
    ),
    "info_nce of both sides without false negatives": (
        tj.info_nce_loss,
        guarded(oracles.info_nce),
        {"temperature": 0.05, "false_negative_margin": 0.1},
        {"symmetric": True},
    ),
    "multi_similarity": (
        tj.multi_similarity_loss,
        oracles.multi_similarity,
        {"alpha": 2.0, "beta": 50.0, "base": 0.5},
        {},
    ),
    "multi_similarity with mining": (
        tj.multi_similarity_loss,
        oracles.multi_similarity,
        {"alpha": 2.0, "beta": 50.0, "base": 0.5, "epsilon": 0.1},
        {},
    ),
    "circle": (tj.circle_loss, oracles.circle, {"margin": 0.4, "scale": 80.0}, {}),
    "generalized_lifted_structure": (
        tj.generalized_lifted_structure_loss,
        oracles.generalized_lifted_structure,
        {"margin": 1.0},
        {},
    ),
    "cosface": (tj.cosface_loss, oracles.cosface, {"margin": 0.35, "scale": 64.0}, {}),
    "arcface": (tj.arcface_loss, oracles.arcface, {"margin": 0.5, "scale": 64.0}, {}),
    "proxy_anchor": (
        tj.proxy_anchor_loss,
        oracles.proxy_anchor,
        {"margin": 0.1, "scale": 32.0},
        {},
    ),
    "contrastive": (
        tj.contrastive_loss,
        oracles.contrastive,
        {"positive_margin": 0.0, "negative_margin": 1.0},
        {},
    ),
    "margin": (tj.margin_loss, oracles.margin, {"margin": 0.2, "beta": 1.2}, {}),
    "sigmoid": (tj.sigmoid_loss, oracles.sigmoid, {"scale": 10.0, "bias": -10.0}, {}),
    "smooth_ap": (tj.smooth_ap_loss, oracles.smooth_ap, {"temperature": 0.01}, {}),
    "smooth_ap of references alone": (
        tj.smooth_ap_loss,
        oracles.smooth_ap,
        {"temperature": 0.1},
        {"include_anchor": False},
    ),
}
TWO_SIDES = {
    "info_nce",
    "info_nce of both sides",
    "info_nce of both sides without false negatives",
    "cosface",
    "arcface",
    "proxy_anchor",
}
WITHIN = [name for name in LOSSES if name not in TWO_SIDES]
every_loss = pytest.mark.parametrize(
    "name", unless_slow(LOSSES, ["supcon", "circle", "arcface", "contrastive"])
)
every_form = pytest.mark.parametrize("name", unless_slow(LOSSES, ["nt_xent"]))


def options_of(name, options):
    """Pair options of a problem that go with a loss; two sides have references."""
    if name in TWO_SIDES:
        options = {k: v for k, v in options.items() if k != "positions"}
    return options


@functools.cache
def matrix_program(name):
    """Value and gradients by distances and parameters."""
    loss, _, _, fixed = LOSSES[name]

    @jax.jit
    def run(distances, labels, options, parameters):
        def value(distances, parameters):
            return loss(distances, labels, **options, **fixed, **parameters)

        return jax.value_and_grad(value, (0, 1))(distances, parameters)

    return run


def problem_of(name, problem):
    """Continuous distances, labels and options of a problem."""
    distances, labels, options = problem
    seed = int(distances.sum() * 8) + int(labels.sum())
    random = np.random.default_rng(seed)
    distances = random.uniform(0, 2, distances.shape).astype(np.float32)
    options = options_of(name, options)
    if name in TWO_SIDES and "reference_labels" not in options:
        options["reference_labels"] = labels[::-1].copy()
        options["reference_where"] = options["where"]
    return distances, labels, options


# The largest logit of losses whose logits lose more than 2e-5 to rounding, for
# distances of up to 2. A float32 logit z has an error of about |z| 2^-24, and weights
# are exponentials of logits.
LARGEST_LOGIT = {
    "circle": 80 * (2 + 0.4) * (2 - 0.4),
    "cosface": 64 * (1 + 0.35),
    "arcface": 64 * 2,
    "smooth_ap": 2 / 0.01,
    "smooth_ap of references alone": 2 / 0.01,
}


def tolerance(name):
    """The relative error in float32: 2e-5, or that of three roundings of a logit."""
    return max(2e-5, 3 * 2**-24 * LARGEST_LOGIT.get(name, 0))


def oracle_gradients(name, d, masks, parameters):
    """Value, gradient by distances, and gradients by parameters as a dictionary."""
    oracle, fixed = LOSSES[name][1], LOSSES[name][3]
    value, (by_d, *slopes) = oracles.value_and_gradients(
        lambda d, *values: oracle(d, *masks, **dict(zip(parameters, values)), **fixed),
        d,
        *parameters.values(),
    )
    return value, by_d, dict(zip(parameters, slopes))


# Ranks have derivatives s (1 - s) / temperature, of a sigmoid s: their error is that of
# 1 - s, also where all of a row are small.
RANKS = {"smooth_ap": 1 / 0.01, "smooth_ap of references alone": 1 / 0.1}


def rounding_of_ranks(name, dtype):
    return np.finfo(dtype).eps * RANKS.get(name, 0)


def rounding_of_temperature(name, dtype):
    """That of ranks times a gap of up to 16 temperatures; 1 - s is 0 beyond."""
    return 16 * rounding_of_ranks(name, dtype)


def check_rows(name, got, expected, rtol, axis=-1):
    """Errors are at most a share of the largest number of each row.

    Weights are differences of shares of 1. Those of an anchor with a small cost are
    rounded as the largest weights are: 2 eps of the largest number of all is allowed.
    """
    largest = np.maximum(np.abs(expected).max(axis, keepdims=True), 1e-30)
    error = np.abs(np.asarray(got, float) - expected)
    error -= rounding_of_ranks(name, got.dtype)
    error -= 2 * np.finfo(got.dtype).eps * np.abs(expected).max()
    assert (error / largest).max() <= rtol


def check_matrix(name, d, labels, options, dtype, rtol, parameters):
    """Value and gradients of the form of distances are those of the oracle."""
    masks = oracles.pair_masks(labels, **options)
    parameters = {k: dtype(v) for k, v in parameters.items()}
    with jax.enable_x64(dtype is np.float64):
        value, (by_d, by_parameters) = matrix_program(name)(
            d.astype(dtype), labels, options, parameters
        )
    assert value.dtype == by_d.dtype == dtype
    expected, slope, slopes = oracle_gradients(name, d, masks, parameters)
    np.testing.assert_allclose(value, expected, rtol=rtol, atol=rtol / 100)
    check_rows(name, by_d, slope, rtol, -2 if name == "proxy_anchor" else -1)
    # Gradients by parameters are sums over pairs, which may cancel.
    total = np.abs(slope).sum()
    for key, got in by_parameters.items():
        error = abs(float(got) - slopes[key])
        error -= rounding_of_temperature(name, dtype)
        assert error <= rtol * max(abs(slopes[key]), total), key


@every_loss
@settings(max_examples=15)
@given(problem=problems())
def test_value_and_gradients_are_the_oracles(name, problem):
    """To 1e-10 in float64, and in float32 to 2e-5 of the largest of each anchor."""
    d, labels, options = problem_of(name, problem)
    for dtype, rtol in ((np.float64, 1e-10), (np.float32, tolerance(name))):
        check_matrix(name, d, labels, options, dtype, rtol, LOSSES[name][2])


# Values that differ from the defaults, so that no sign and no factor cancels.
OTHERS = {
    "temperature": 0.2,
    "margin": 0.3,
    "scale": 6.0,
    "bias": -2.5,
    "alpha": 3.0,
    "beta": 1.4,
    "base": 0.7,
    "epsilon": 0.2,
    "positive_margin": 0.4,
    "negative_margin": 1.3,
    "false_negative_margin": 0.2,
}


def one_problem(name, largest):
    """Seven anchors of uneven classes, of which two are padding, in random order."""
    d = np.random.default_rng(2).uniform(0, largest, (7, 7)).astype(np.float32)
    labels = np.int32([0, 0, 0, 1, 1, 2, 1])
    options = {"where": np.arange(7) != 3}
    if name in TWO_SIDES:
        options["reference_labels"] = np.int32([1, 0, 2, 0, 3, 1, 0])
        options["reference_where"] = np.arange(7) != 1
    return d, labels, options


@pytest.mark.parametrize("name", LOSSES)
def test_other_parameters(name):
    """One batch with several positives, for the quick tests."""
    problem, parameters = one_problem(name, 2), {k: OTHERS[k] for k in LOSSES[name][2]}
    check_matrix(name, *problem, np.float32, tolerance(name), parameters)


@pytest.mark.parametrize("name", LOSSES)
def test_near_duplicates(name):
    """Small distances have all their digits, and so have the gradients."""
    problem, parameters = one_problem(name, 1e-6), LOSSES[name][2]
    check_matrix(name, *problem, np.float32, tolerance(name), parameters)


REFERENCES = np.int32(np.arange(18) % 9)


@functools.cache
def form(name, blockwise, metric=tj.cosine):
    """Value and gradients by embeddings, references and parameters, of one form."""
    loss, _, _, fixed = LOSSES[name]
    by_blocks = getattr(tj.blockwise, loss.__name__)

    @jax.jit
    def run(x, y, labels, where, parameters):
        def value(x, y, parameters):
            options = {"where": where, **fixed, **parameters}
            references = None
            if name in TWO_SIDES:
                references, options["reference_labels"] = y, REFERENCES
            if not blockwise:
                return loss(metric(x, references), labels, **options)
            if references is not None:
                options["references"] = references
            # 16 divides none of the sizes.
            return by_blocks(x, labels, metric=metric, block_size=16, **options)

        return jax.value_and_grad(value, (0, 1, 2))(x, y, parameters)

    return run


def run(name, x, labels, where=None, *, blockwise, **parameters):
    y = vectors(18, seed=1)
    where = np.ones(40, bool) if where is None else where
    labels = np.asarray(labels, np.int32)
    values = LOSSES[name][2] | parameters
    values = {k: np.float32(v) for k, v in values.items()}
    return form(name, blockwise)(x, y, labels, where, values)


def check_forms(name, x, labels, where=None, *, rtol=2e-5, **parameters):
    """Both forms agree; returns the blockwise form."""
    got, expected = (
        run(name, x, labels, where, blockwise=flag, **parameters)
        for flag in (True, False)
    )
    np.testing.assert_allclose(got[0], expected[0], rtol=rtol, atol=1e-6)
    for one, other in zip(jax.tree.leaves(got[1]), jax.tree.leaves(expected[1])):
        scale = float(np.abs(other).max())
        assert np.isfinite(one).all()
        np.testing.assert_allclose(one, other, rtol=rtol, atol=rtol * scale + 1e-7)
    return got


def by_embeddings(name, labels):
    """The oracle of a loss as a function of embeddings, references and parameters."""
    oracle, values, fixed = LOSSES[name][1:]
    sides = (REFERENCES,) if name in TWO_SIDES else ()
    masks = oracles.pair_masks(labels, *sides)

    def value(x, y, *parameters):
        d = oracles.matrix(oracles.cosine, x, *(y,) * len(sides))
        return oracle(d, *masks, **dict(zip(values, parameters)), **fixed)

    return value


@every_form
def test_gradients_by_embeddings_are_the_oracles(name):
    """Without a matrix, to 1e-10 in float64 and 2e-5 of each anchor's in float32."""
    for labels in (LABELS["few"], LABELS["many"]):
        for dtype, rtol in ((np.float64, 1e-10), (np.float32, tolerance(name))):
            x, y = (np.asarray(v, dtype) for v in (vectors(), vectors(18, seed=1)))
            parameters = {k: dtype(v) for k, v in LOSSES[name][2].items()}
            with jax.enable_x64(dtype is np.float64):
                value, (by_x, by_y, slopes) = form(name, True)(
                    x, y, labels.astype(np.int32), np.ones(40, bool), parameters
                )
            expected, (of_x, of_y, *of_parameters) = oracles.value_and_gradients(
                by_embeddings(name, labels), x, y, *parameters.values()
            )
            np.testing.assert_allclose(value, expected, rtol=rtol, atol=rtol / 100)
            check_rows(name, by_x, of_x, rtol)
            check_rows(name, by_y, of_y, rtol)
            total = np.abs(of_x).sum()
            for key, slope in zip(parameters, of_parameters):
                error = abs(float(slopes[key]) - slope)
                error -= rounding_of_temperature(name, dtype)
                assert error <= rtol * max(abs(slope), total), key


@pytest.mark.parametrize(
    "name", ["info_nce of both sides", "proxy_anchor", "smooth_ap", "sigmoid"]
)
def test_values_of_embeddings_with_padding(name):
    """One batch with several positives, for the quick tests."""
    loss, oracle, parameters, fixed = LOSSES[name]
    _, labels, options = one_problem(name, 1)
    x, references = vectors(7), {}
    if name in TWO_SIDES:
        references["references"] = vectors(7, seed=1)
    parameters = {k: OTHERS[k] for k in parameters}
    value = getattr(tj.blockwise, loss.__name__)(
        x, labels, **references, **options, **parameters, **fixed
    )
    d = oracles.matrix(oracles.cosine, x, *references.values())
    masks = oracles.pair_masks(labels, **options)
    expected = oracle(d, *masks, **parameters, **fixed)
    np.testing.assert_allclose(value, expected, rtol=2e-5)


@every_form
def test_forms_agree(name):
    """Value and gradients, for classes of all sizes, with padding and without."""
    padding = np.random.default_rng(0).random(40) < 0.8
    for labels in LABELS.values():
        for where in (None, padding):
            check_forms(name, vectors(), labels, where)


@pytest.mark.parametrize(
    "shape", unless_slow([(300, 2048, 60), (800, 4, 4)], [(300, 2048, 60)])
)
def test_gradients_of_many_vectors(shape):
    """Two blocks that overlap, of 256 unit vectors or of 655 rows of the matrix."""
    n, d, classes = shape
    x = np.random.default_rng(0).normal(size=(n, d)).astype(np.float32)
    labels = np.arange(n) % classes

    def by_matrix(x):
        return tj.supcon_loss(tj.cosine(x), labels)

    value, expected = jax.value_and_grad(by_matrix)(x)
    total, got = jax.value_and_grad(tj.blockwise.supcon_loss)(x, labels)
    np.testing.assert_allclose(total, value, rtol=1e-5)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4 * np.std(expected))


@every_form
def test_padding_may_hold_anything(name):
    where = np.random.default_rng(0).random(40) < 0.7
    expected = run(name, vectors(), LABELS["few"], where, blockwise=True)
    for junk in (1e30, np.nan, np.inf):
        x = jnp.where(where[:, None], vectors(), junk)
        got = run(name, x, LABELS["few"], where, blockwise=True)
        for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected)):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(got[1][0][~where], 0)


@every_form
@pytest.mark.parametrize("blockwise", [False, True])
def test_degenerate_batches(name, blockwise):
    """No NaN and no infinity; without any pair, loss and gradients are 0."""
    d = oracles.matrix(oracles.cosine, np.asarray(vectors(), float))
    _, oracle, parameters, fixed = LOSSES[name]
    x = vectors()
    one_class, distinct = np.zeros(40, int), np.arange(40)
    nothing = np.zeros(40, bool)
    for labels, where in (
        (one_class, None),
        (distinct, None),
        (np.arange(40) // 20, nothing),
        (one_class + 99, np.arange(40) == 3),
    ):
        value, gradients = run(name, x, labels, where, blockwise=blockwise)
        assert np.isfinite(value)
        assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradients))
        if where is nothing:
            assert value == 0
            assert not any(np.any(g) for g in jax.tree.leaves(gradients))
        elif name in WITHIN:
            masks = oracles.pair_masks(labels, where=where)
            expected = oracle(d, *masks, **parameters, **fixed)
            np.testing.assert_allclose(value, expected, rtol=2e-5, atol=1e-6)


EXTREMES = {
    "duplicates": lambda x: x.at[3:9].set(x[0]).at[9:12].set(0),
    "collapse": lambda x: jnp.ones_like(x),
    "long": lambda x: x * 1e3,
    "short": lambda x: x * 1e-3,
}


@every_form
@pytest.mark.parametrize("case", EXTREMES)
def test_extreme_vectors(name, case):
    x = EXTREMES[case](vectors())
    # The distance of a zero vector is 1, where a margin of 1 would count rounding.
    change = {"negative_margin": 0.9} if name == "contrastive" else {}
    for labels in (LABELS["few"], LABELS["many"]):
        got = run(name, x, labels, blockwise=True, **change)
        by_matrix = run(name, x, labels, blockwise=False, **change)
        expected = by_matrix[0]
        if name in WITHIN:
            # Distances of a matrix have no digits where two vectors coincide.
            _, oracle, parameters, fixed = LOSSES[name]
            d = np.round(oracles.matrix(oracles.cosine, np.asarray(x, float)), 12)
            expected = oracle(
                d, *oracles.pair_masks(labels), **parameters | change, **fixed
            )
        np.testing.assert_allclose(got[0], expected, rtol=5e-5, atol=1e-6)
        assert all(np.isfinite(g).all() for g in jax.tree.leaves((got, by_matrix)))


@every_form
def test_extreme_parameters(name):
    """Exponents beyond the range of floats."""
    extreme = {"temperature": 0.005, "scale": 400.0, "beta": 400.0}
    parameters = {k: v for k, v in extreme.items() if k in LOSSES[name][2]}
    for labels in (LABELS["uneven"], LABELS["many"]):
        check_forms(name, vectors(), labels, rtol=1e-4, **parameters)


@pytest.mark.parametrize("name", unless_slow(LOSSES, [], slow=["supcon", "sigmoid"]))
def test_low_precision(name):
    low = vectors().astype(jnp.bfloat16)
    value, (gradient, *_) = run(name, low, LABELS["few"], blockwise=True)
    assert value.dtype == jnp.float32
    assert gradient.dtype == jnp.bfloat16
    expected, _ = run(name, low.astype(jnp.float32), LABELS["few"], blockwise=True)
    np.testing.assert_allclose(value, expected, rtol=1e-6)


@pytest.mark.parametrize(
    "name", unless_slow(LOSSES, [], slow=["supcon", "margin", "info_nce"])
)
@pytest.mark.parametrize("metric", ["squared_euclidean", "manhattan"])
def test_metrics(name, metric):
    x, y = 0.3 * vectors(), 0.3 * vectors(18, seed=1)
    parameters = {k: np.float32(v) for k, v in LOSSES[name][2].items()}
    parameters |= {k: np.float32(8) for k in ("scale", "beta") if k in parameters}
    for labels in (LABELS["few"], LABELS["many"]):
        labels = np.asarray(labels, np.int32)
        got, expected = (
            form(name, flag, getattr(tj, metric))(
                x, y, labels, np.ones(40, bool), parameters
            )
            for flag in (True, False)
        )
        for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected)):
            scale = float(np.abs(other).max())
            np.testing.assert_allclose(one, other, rtol=2e-4, atol=2e-5 * scale + 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", LOSSES)
def test_pair_masks_stand_for_labels(name):
    loss, _, _, fixed = LOSSES[name]
    x, y = vectors(), vectors(18, seed=1)
    labels = np.arange(40) % 9
    pairs, options = {}, {}
    if name in TWO_SIDES:
        pairs, options = {"reference_labels": REFERENCES}, {"references": y}
    by_blocks = getattr(tj.blockwise, loss.__name__)
    masks = tj.pair_masks(labels, **pairs)
    got = by_blocks(x, masks, **options, **fixed)
    expected = by_blocks(x, labels, **options, **pairs, **fixed)
    np.testing.assert_allclose(got, expected, rtol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nt_xent", "contrastive", "smooth_ap"])
def test_vmap_and_leading_dimensions_are_loops(name):
    """Over embeddings, labels and a parameter."""
    loss, _, parameters, _ = LOSSES[name]
    key = next(iter(parameters))
    by_blocks = functools.partial(getattr(tj.blockwise, loss.__name__), block_size=16)
    x = vectors(120).reshape(3, 40, 6)
    labels = jnp.stack([jnp.asarray(LABELS[k]) for k in ("few", "many", "one large")])
    values = jnp.float32([0.1, 0.2, 0.3])

    def one(x, labels, value):
        return by_blocks(x, labels, **{key: value})

    got = jax.jit(jax.vmap(jax.value_and_grad(one, (0, 2))))(x, labels, values)
    for i in range(3):
        expected = run(name, x[i], labels[i], blockwise=True, **{key: values[i]})
        np.testing.assert_allclose(got[0][i], expected[0], rtol=2e-5)
        np.testing.assert_allclose(got[1][0][i], expected[1][0], rtol=1e-4, atol=1e-5)
        by_value = expected[1][2][key]
        np.testing.assert_allclose(got[1][1][i], by_value, rtol=1e-4, atol=1e-5)
    expected = [run(name, x[i], labels[i], blockwise=True)[0] for i in range(3)]
    np.testing.assert_allclose(by_blocks(x, labels), expected, rtol=2e-5)


@every_form
def test_a_nan_is_not_hidden(name):
    for labels in (LABELS["few"] % 9, LABELS["many"]):
        for blockwise in (False, True):
            x = vectors().at[7].set(jnp.nan)
            value, _ = run(name, x, labels, blockwise=blockwise)
            assert np.isnan(value), labels


@every_form
def test_order_does_not_matter(name):
    labels, order = LABELS["uneven"], np.random.default_rng(0).permutation(40)
    value, (by_x, *_) = run(name, vectors(), labels, blockwise=True)
    got, (by_ordered, *_) = run(name, vectors()[order], labels[order], blockwise=True)
    np.testing.assert_allclose(got, value, rtol=2e-5)
    scale = float(np.abs(by_x).max())
    np.testing.assert_allclose(by_ordered, by_x[order], rtol=1e-4, atol=2e-5 * scale)


# The general functions.


def n_pair_cost(pairs, temperature):
    costs = jax.nn.softplus(pairs.negatives[..., None] + pairs.distances / temperature)
    total = jnp.sum(jnp.where(pairs.exists, costs, 0), axis=-1)
    return pairs.terms(total, jnp.sum(pairs.exists, axis=-1))


GENERAL = {
    "log_sum_exp_loss": {
        "logit": lambda d, temperature: -d / temperature,
        "cost": n_pair_cost,
    },
    "separable_loss": {
        "positive_cost": lambda d, margin: 0.5 * d**2,
        "negative_cost": lambda d, margin: 0.5 * jax.nn.relu(margin - d) ** 2,
    },
}


@pytest.mark.parametrize("name", unless_slow(GENERAL, []))
def test_losses_of_users(name):
    """Hadsell's squares and the N-pair loss, with a learned parameter."""
    x, labels = vectors(), LABELS["uneven"]
    d = oracles.matrix(oracles.cosine, np.asarray(x, float))
    masks = oracles.pair_masks(labels)

    def oracle(parameter):
        if name == "log_sum_exp_loss":
            return oracles.nt_xent(d, *masks, temperature=parameter)
        costs = oracles.separable_costs(
            d,
            *masks,
            lambda d: 0.5 * d**2,
            lambda d: 0.5 * max(parameter - d, 0) ** 2,
        )
        return oracles.mean(sum(ps) + sum(ns) for ps, ns in costs)

    forms = {
        "matrix": lambda x, p: getattr(tj, name)(
            tj.cosine(x), labels, parameters=p, **GENERAL[name]
        ),
        "blockwise": lambda x, p: getattr(tj.blockwise, name)(
            x, labels, parameters=p, block_size=16, **GENERAL[name]
        ),
    }
    expected, (slope,) = oracles.value_and_gradients(oracle, 0.7)
    for function in forms.values():
        value, by_parameter = jax.value_and_grad(function, 1)(x, 0.7)
        np.testing.assert_allclose(value, expected, rtol=2e-5)
        np.testing.assert_allclose(by_parameter, slope, rtol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["supcon", "sigmoid", "multi_similarity", "smooth_ap"])
def test_terms_add_up(name):
    """Sums of the terms of two halves of the anchors make the loss of all."""
    loss = LOSSES[name][0]
    x, labels = vectors(), LABELS["few"]
    by_blocks = getattr(tj.blockwise, loss.__name__)
    by_anchor = name in ("supcon", "smooth_ap")
    reduction = tj.mean_valid if by_anchor else tj.mean_of_anchors
    for function in (
        lambda x, labels, **options: by_blocks(
            x, labels, references=vectors(), reduce_fn=None, **options
        ),
        lambda x, labels, **options: loss(
            tj.cosine(x, vectors()), labels, reduce_fn=None, **options
        ),
    ):
        halves = [
            function(
                x[start : start + 20],
                labels[start : start + 20],
                reference_labels=labels,
                positions=start + np.arange(20),
            )
            for start in (0, 20)
        ]
        terms = jax.tree.map(lambda *parts: sum(p.sum() for p in parts), *halves)
        np.testing.assert_allclose(reduction(terms), by_blocks(x, labels), rtol=2e-5)


@pytest.mark.slow
def test_gradients_of_terms_are_those_of_the_reduction():
    """A function of the terms takes another way through separable losses."""
    x, labels = vectors(), LABELS["few"]

    def by_terms(terms):
        return terms.total.sum() / terms.anchors.sum()

    got, expected = (
        jax.grad(lambda x: tj.blockwise.sigmoid_loss(x, labels, reduce_fn=f))(x)  # noqa: B023
        for f in (by_terms, tj.mean_of_anchors)
    )
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=1e-6)


def test_share_of_anchors_whose_nearest_is_a_positive():
    x, labels = batch(24)
    terms = tj.supcon_loss(tj.cosine(x), labels, reduce_fn=None)
    recall = tj.retrieval.recall_at_k(x, labels, ks=(1,), metric=tj.cosine)
    share = terms.active.sum() / terms.valid.sum()
    np.testing.assert_allclose(share, recall[1], rtol=1e-6)


def test_smooth_average_precision_is_that_of_retrieval_at_a_low_temperature():
    x, labels = batch(24, dim=3)
    loss = tj.blockwise.smooth_ap_loss(
        x, labels, temperature=1e-6, include_anchor=False
    )
    metrics = tj.retrieval.evaluate(x, labels, metric=tj.cosine)
    precision = metrics.mean_average_precision
    assert 0.2 < precision < 0.9
    np.testing.assert_allclose(1 - loss, precision, rtol=1e-5)


# Traps: faults that other libraries had.


def test_the_maximum_is_that_of_kept_pairs():
    """SupContrast subtracts the similarity of each anchor with itself."""
    d = tj.cosine(vectors())
    for name in ("supcon", "nca", "nt_xent", "circle"):
        run = matrix_program(name)
        args = LABELS["few"].astype(np.int32), {}, LOSSES[name][2]
        expected, (gradient, _) = run(d, *args)
        for own in (-1e4, 1e4, jnp.inf, jnp.nan):
            value, (by_d, _) = run(jnp.where(jnp.eye(40, dtype=bool), own, d), *args)
            np.testing.assert_allclose(value, expected, rtol=1e-6)
            np.testing.assert_allclose(by_d, gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", unless_slow(["supcon", "nt_xent", "nca"], []))
def test_long_vectors_do_not_underflow(name):
    """The logit of an anchor with itself is 0, and all others are below -200."""
    x, labels = 10 * np.asarray(vectors(12), float), np.arange(12) // 3
    value, gradient = jax.value_and_grad(
        lambda x: getattr(tj.blockwise, f"{name}_loss")(
            x, labels, metric=tj.squared_euclidean
        )
    )(jnp.float32(x))
    d = oracles.matrix(oracles.squared_euclidean, x)
    assert (d + 99 * np.eye(12)).min() > 20
    expected = LOSSES[name][1](d, *oracles.pair_masks(labels))
    np.testing.assert_allclose(value, expected, rtol=2e-5)
    assert np.isfinite(gradient).all()
    assert (np.abs(gradient).max(axis=1) > 1).all()


@pytest.mark.parametrize("margin", [None, 0.5])
def test_exponents_that_vanish_beside_those_of_other_anchors(margin):
    """A block has one maximum; other anchors, or ignored negatives, can be far below.

    The first item of both classes is the same vector. With a margin, it is ignored.
    """
    x = np.eye(6, dtype=np.float32)[[0, 1, 0, 2, 3, 4]]
    labels = np.int32([0, 0, 1, 1, 2, 2])
    options = {"temperature": 0.005, "false_negative_margin": margin}

    def by_matrix(x):
        terms = tj.nt_xent_loss(tj.cosine(x), labels, **options, reduce_fn=None)
        return terms.total.sum(), terms.total

    def by_blocks(x):
        terms = tj.blockwise.nt_xent_loss(x, labels, **options, reduce_fn=None)
        return terms.total.sum(), terms.total

    (_, expected), gradient = jax.value_and_grad(by_matrix, has_aux=True)(x)
    (_, total), got = jax.value_and_grad(by_blocks, has_aux=True)(x)
    # Positives and negatives are at distance 1, other than the two first items.
    far = np.log(5)
    near = np.log(4) if margin else 200.0
    np.testing.assert_allclose(expected, [near, far] * 2 + [far] * 2, rtol=1e-5)
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    np.testing.assert_allclose(got, gradient, rtol=1e-5, atol=1e-4)


def test_ignored_pairs_have_no_weight():
    """fast-reid's masked zeros take the softmax of circle loss."""
    d = np.float32([[1.9, 1.8, 0.2, 0.1]])
    masks = tj.PairMasks(
        np.array([[True, False, False, False]]), np.array([[False, True, True, False]])
    )
    gradient = jax.grad(lambda d: tj.circle_loss(d, masks, margin=0.25, scale=64.0))(d)
    alone = jax.grad(
        lambda d: tj.circle_loss(
            d, tj.PairMasks(*(m[:, :3] for m in masks)), margin=0.25, scale=64.0
        )
    )(d[:, :3])
    np.testing.assert_allclose(gradient[:, :3], alone, rtol=1e-6)
    assert gradient[0, 0] > 1
    assert gradient[0, 3] == 0


def test_an_anchor_is_no_negative_of_itself():
    """A finite mask of the diagonal leaks at low temperatures."""
    d = np.float32([[0, 0.1, 1.9], [0.1, 0, 1.9], [1.9, 1.9, 0]])
    value = tj.decoupled_contrastive_loss(d, [0, 0, 1], temperature=0.005)
    np.testing.assert_allclose(value, (0.1 - 1.9) / 0.005, rtol=1e-5)
    x = jnp.float32([[1, 0], [0.9, np.sqrt(0.19)], [-0.9, -np.sqrt(0.19)]])
    value = tj.blockwise.decoupled_contrastive_loss(x, [0, 0, 1], temperature=0.005)
    np.testing.assert_allclose(value, (0.1 - (1.9 + 2) / 2) / 0.005, rtol=1e-5)


@pytest.mark.parametrize("name", ["supcon", "nt_xent", "circle", "nca"])
def test_anchors_without_positives(name):
    """SupContrast and optax return NaN."""
    loss = LOSSES[name][0]
    d = jnp.float32([[0, 0.1, 0.5], [0.1, 0, 0.6], [0.5, 0.6, 0]])
    value, gradient = jax.value_and_grad(lambda d: loss(d, jnp.array([0, 0, 1])))(d)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()
    np.testing.assert_array_equal(gradient[2], 0)


def test_one_class_alone():
    """SupCon has a loss, as in the paper; the others have none."""
    d = tj.cosine(vectors(6))
    labels = np.zeros(6, int)
    assert tj.supcon_loss(d, labels) > 0
    for name, counts in (
        ("nt_xent", True),
        ("nca", True),
        ("decoupled_contrastive", False),
        ("circle", False),
        ("generalized_lifted_structure", False),
    ):
        terms = LOSSES[name][0](d, labels, reduce_fn=None)
        assert terms.total.sum() == 0
        assert bool(terms.valid.any()) == counts
        assert tj.mean_valid(terms) == 0


def test_small_losses_do_not_vanish():
    """log(x / y + epsilon) loses them."""
    d = jnp.float32([[0, 0, 1], [0, 0, 1], [1, 1, 0]])
    labels = jnp.array([0, 0, 1])
    for loss in (tj.nt_xent_loss, tj.nca_loss, tj.supcon_loss):
        value, gradient = jax.value_and_grad(
            lambda d: loss(d, labels, temperature=0.02)  # noqa: B023
        )(d)
        np.testing.assert_allclose(value, np.exp(-50.0), rtol=1e-4)
        assert gradient[0, 2] < 0
    # The rank among positives is 1 of both the anchor and its copy, and 1/2 of a tie.
    value, gradient = jax.value_and_grad(
        lambda d: tj.smooth_ap_loss(d, labels, temperature=0.02)
    )(d)
    np.testing.assert_allclose(value, np.exp(-50.0) / 1.5, rtol=1e-4)
    assert gradient[0, 2] < 0


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("proxy_anchor", {"scale": 1000.0}),
        ("circle", {"margin": 0.25, "scale": 256.0}),
        ("multi_similarity", {"beta": 1000.0}),
        ("generalized_lifted_structure", {"margin": 1e3}),
    ],
)
def test_exponents_do_not_overflow(name, parameters):
    d = np.random.default_rng(0).uniform(0, 2, (6, 6))
    labels, pairs = np.arange(6) // 2, {}
    if name in TWO_SIDES:
        pairs["reference_labels"] = labels
    masks = oracles.pair_masks(labels, **pairs)
    value, (gradient, _) = matrix_program(name)(
        np.float32(d), labels, pairs, LOSSES[name][2] | parameters
    )
    expected = LOSSES[name][1](d, *masks, **LOSSES[name][2] | parameters)
    np.testing.assert_allclose(value, expected, rtol=2e-5)
    assert np.isfinite(gradient).all()


def test_arcface_has_a_finite_gradient_everywhere():
    """An inverse cosine has none at 1 and -1; a continuation must keep its slope."""
    classes = {"reference_labels": [0, 1]}

    def loss(own):
        d = jnp.stack([own, jnp.ones_like(own)], -1)
        return tj.arcface_loss(d, jnp.zeros(len(own), int), scale=4.0, **classes)

    slopes = jax.grad(loss)(
        jnp.float32([-1e-7, 0, 1e-40, 1e-7, 1, 1.9, 1.99, 2, 2.0001])
    )
    assert np.isfinite(slopes).all()
    assert (slopes > 0).all()


def test_sub_centres_are_references_of_one_label():
    d = jnp.float32([[0.5, 0.1, 0.8]])
    value = tj.cosface_loss(d, [0], reference_labels=[0, 0, 1], scale=4.0)
    expected = tj.cosface_loss(d[:, 1:], [0], reference_labels=[0, 1], scale=4.0)
    np.testing.assert_allclose(value, expected, rtol=1e-6)


def test_sigmoid_loss_is_divided_by_the_anchors():
    """Not by all pairs; and a scale above 100 is not clipped."""
    d, labels = np.float32([[0.1, 0.9], [0.8, 0.3]]), [0, 1]
    for scale in (10.0, 112.0):
        value = tj.sigmoid_loss(d, labels, reference_labels=labels, scale=scale)
        z = scale * (1 - d) - 10
        signs = 2 * np.eye(2) - 1
        expected = np.logaddexp(0, -signs * z).sum() / 2
        np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_the_bias_of_the_prior_fits_any_batch():
    """One positive in n pairs is as probable as the bias log(1 / (n - 1)) says."""
    for n in (2, 32):
        slope = jax.grad(
            lambda bias: tj.sigmoid_loss(
                jnp.ones((n, n)),  # noqa: B023
                np.arange(n),  # noqa: B023
                bias=bias,
                reference_labels=np.arange(n),  # noqa: B023
            )
        )(-np.log(n - 1))
        np.testing.assert_allclose(slope, 0, atol=1e-6)


def test_equal_logits_have_half_a_slope_in_the_sigmoid_loss():
    """Logits of 0 and, where XLA rounds them in two ways, logits near 0."""
    d = jnp.linspace(0, 1e-7, 256)[None]
    masks = tj.PairMasks(jnp.zeros(d.shape, bool), jnp.ones(d.shape, bool))
    slopes = jax.jit(jax.grad(lambda d: tj.sigmoid_loss(d, masks)))(d)
    np.testing.assert_allclose(slopes, -10 / 2, rtol=1e-5)


def test_softmax_losses_take_distances_or_similarities():
    """A constant that is added to all distances changes nothing."""
    d, labels = tj.cosine(vectors()), LABELS["few"]
    for loss in (tj.supcon_loss, tj.nt_xent_loss, tj.nca_loss):
        np.testing.assert_allclose(loss(d + 3, labels), loss(d, labels), rtol=2e-5)


def test_duplicates_are_no_negatives():
    """Two anchors with one text: each is a positive of the other's reference."""
    d = jnp.float32([[0.1, 0.1, 0.9], [0.1, 0.1, 0.9], [0.9, 0.9, 0.1]])
    gradient = jax.grad(
        lambda d: tj.info_nce_loss(d, [0, 0, 1], reference_labels=[0, 0, 1])
    )(d)
    assert (gradient[:2, :2] > 0).all()


def test_hard_negatives_are_references_without_an_anchor():
    d = jnp.float32([[0.1, 0.9, 0.3], [0.9, 0.1, 0.2]])
    pairs = {"reference_labels": [0, 1, -1], "symmetric": True, "temperature": 0.1}
    expected = oracles.info_nce(
        np.asarray(d, float), *oracles.pair_masks([0, 1], [0, 1, -1]), 0.1, True
    )
    np.testing.assert_allclose(
        tj.info_nce_loss(d, [0, 1], **pairs), expected, rtol=1e-5
    )


# A boundary of each class.


@pytest.mark.parametrize("labels", unless_slow(LABELS, ["uneven"], slow=["many"]))
def test_boundaries_of_classes(labels):
    """Both forms, by embeddings and by the boundaries; float64 for the gradients."""
    labels = LABELS[labels]
    where = np.arange(40) < 37
    beta = np.random.default_rng(0).uniform(0.5, 1.5, labels.max() + 1)
    masks = oracles.pair_masks(labels, where=where)
    x = np.asarray(vectors(), float)

    def oracle(x, beta):
        d = oracles.matrix(oracles.cosine, x)
        return oracles.margin(d, *masks, beta=[beta[c] for c in labels])

    expected, slopes = oracles.value_and_gradients(oracle, x, beta)
    forms = {
        "matrix": lambda x, beta: tj.margin_loss(
            tj.cosine(x), labels, beta=beta[labels], where=where
        ),
        "blockwise": lambda x, beta: tj.blockwise.margin_loss(
            x, labels, beta=beta[labels], where=where, block_size=16
        ),
        "terms": lambda x, beta: tj.mean_active(
            tj.blockwise.margin_loss(
                x,
                labels,
                beta=beta[labels],
                where=where,
                block_size=16,
                reduce_fn=lambda terms: tj.TripletTerms(
                    terms.total, terms.active, terms.valid
                ),
            )
        ),
    }
    with jax.enable_x64(True):
        for form in forms.values():
            value, gradients = jax.jit(jax.value_and_grad(form, (0, 1)))(x, beta)
            np.testing.assert_allclose(value, expected, rtol=1e-10)
            for got, slope in zip(gradients, slopes):
                np.testing.assert_allclose(got, slope, rtol=1e-10, atol=1e-13)


@pytest.mark.slow
def test_boundaries_of_anchors_in_batches_and_over_meshes():
    x, labels = batch(36)
    beta = np.linspace(0.5, 1.5, 36, dtype=np.float32)
    loss = functools.partial(tj.blockwise.margin_loss, block_size=8)
    run = jax.value_and_grad(lambda x, beta: loss(x, labels, beta=beta), (0, 1))
    expected = run(x, beta)
    with jax.set_mesh(jax.make_mesh((8,), ("data",))):
        over_mesh = jax.value_and_grad(
            lambda x, beta: loss(x, labels, beta=beta, axis_name="data"), (0, 1)
        )
        got = jax.jit(over_mesh)(x, beta)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected)):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=1e-6)
    both = jnp.stack([x, x[::-1]]), jnp.stack([labels, labels[::-1]])
    betas = jnp.stack([beta, beta[::-1]])
    for got in (
        loss(*both, beta=betas),
        tj.margin_loss(tj.cosine(both[0]), both[1], beta=betas),
    ):
        np.testing.assert_allclose(got, [expected[0]] * 2, rtol=2e-5)


@pytest.mark.parametrize("blockwise", [False, True])
def test_wrong_boundaries_are_named(blockwise):
    loss = tj.blockwise.margin_loss if blockwise else tj.margin_loss
    x = jnp.ones((4, 4))
    with pytest.raises(ValueError, match="beta must be a scalar or have one value"):
        loss(x, [0, 0, 1, 1], beta=np.ones(3))
    with pytest.raises(ValueError, match="beta must be finite"):
        loss(x, [0, 0, 1, 1], beta=np.array([1, 1, np.nan, 1]))
    for wrong in (np.ones(4, bool), np.ones(4, complex)):
        with pytest.raises(TypeError, match="beta must be a real number"):
            loss(x, [0, 0, 1, 1], beta=wrong)


# False negatives.


RULES = [{"margin": 0.1}, {"share": 0.2}, {"margin": -0.1, "share": 0.05}]


@settings(max_examples=20)
@given(problem=problems())
def test_masks_without_false_negatives(problem):
    """Ties at the limit stay, whole rows without a positive as well."""
    d, labels, options = problem
    positive, negative = oracles.pair_masks(labels, **options)
    for rule in (
        {"margin": 0.125},
        {"margin": 0.0},
        {"margin": -0.25, "share": 0.0},
        {"share": 0.25},
        {"share": -0.5},
    ):
        got = tj.ignore_false_negatives(d, labels, **rule, **options)
        kept = oracles.ignore_false_negatives(d, positive, negative, **rule)
        np.testing.assert_array_equal(got.positive, positive)
        np.testing.assert_array_equal(got.negative, kept)


GUARDED = ["supcon", "nt_xent", "decoupled_contrastive", "nca", "info_nce"]


@pytest.mark.parametrize("name", unless_slow(GUARDED, ["supcon"]))
@pytest.mark.parametrize("rule", unless_slow(RULES, RULES[2:]), ids=str)
def test_false_negatives_have_no_weight(name, rule):
    """Both forms are the loss of masks without them, and limits have no gradient."""
    loss = LOSSES[name][0]
    by_blocks = functools.partial(getattr(tj.blockwise, loss.__name__), block_size=16)
    x, labels, where = vectors(), LABELS["few"], np.arange(40) < 37
    options = {"where": where}
    if name in TWO_SIDES:
        options |= {"reference_labels": labels, "reference_where": where}
    y = vectors(seed=1)
    references = {"references": y} if name in TWO_SIDES else {}
    d = tj.cosine(x, *references.values())
    masks = tj.ignore_false_negatives(d, labels, **rule, **options)
    ignored = tj.pair_masks(labels, **options).negative.sum() - masks.negative.sum()
    assert ignored > 20
    guard = {f"false_negative_{key}": value for key, value in rule.items()}

    def by_guard(x):
        return by_blocks(x, labels, **references, **options, **guard)

    def by_masks(x):
        return loss(tj.cosine(x, *references.values()), masks)

    def by_matrix(x, guard):
        d = tj.cosine(x, *references.values())
        return loss(d, labels, **options, **guard)

    expected, slope = jax.value_and_grad(by_masks)(x)
    value, by_x = jax.value_and_grad(by_guard)(x)
    matrix, (by_matrix_x, by_rule) = jax.value_and_grad(by_matrix, (0, 1))(x, guard)
    for got, gradient in ((value, by_x), (matrix, by_matrix_x)):
        np.testing.assert_allclose(got, expected, rtol=2e-5)
        scale = float(np.abs(slope).max())
        np.testing.assert_allclose(gradient, slope, rtol=2e-5, atol=2e-5 * scale)
    assert not any(np.any(g) for g in by_rule.values())


def test_a_share_is_that_of_the_size_of_a_similarity():
    """A share of a similarity below 0 would turn the rule around."""
    d = jnp.float32([[0, 1.5, 1.45, 1.35], [1, 0, 2, 2], [2, 2, 0, 2], [2, 2, 2, 0]])
    masks = tj.ignore_false_negatives(d, [0, 0, 1, 2], share=0.2)
    # The similarity of the positive is -0.5, and negatives go up to -0.4.
    np.testing.assert_array_equal(masks.negative[0], [False, False, True, False])


def test_collapse_is_not_a_false_negative():
    """Equal distances stay negatives, or collapse would cost nothing."""
    x, labels = jnp.ones((8, 3)), jnp.arange(8) // 2
    plain = tj.nt_xent_loss(tj.cosine(x), labels)
    got = tj.nt_xent_loss(tj.cosine(x), labels, false_negative_margin=0.0)
    np.testing.assert_allclose(got, plain, rtol=1e-6)
    np.testing.assert_allclose(plain, np.log(7), rtol=1e-6)


def test_a_rule_must_be_given():
    with pytest.raises(ValueError, match="margin or share must be given"):
        tj.ignore_false_negatives(jnp.ones((2, 2)), [0, 1])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_known_parameters_are_finite(value):
    d, labels = jnp.ones((4, 4)), [0, 0, 1, 1]
    for name in LOSSES:
        loss, _, parameters, fixed = LOSSES[name]
        pairs = {"reference_labels": labels} if name in TWO_SIDES else {}
        for form in (loss, getattr(tj.blockwise, loss.__name__)):
            for key in parameters:
                for wrong in (value, np.float64(value), jnp.float32(value)):
                    with pytest.raises(ValueError, match=f"{key} must be finite"):
                        form(d, labels, **pairs, **fixed, **{key: wrong})
    with pytest.raises(ValueError, match="share must be finite"):
        tj.ignore_false_negatives(d, labels, share=value)
    with pytest.raises(ValueError, match="false_negative_share must be finite"):
        tj.supcon_loss(d, labels, false_negative_share=value)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"temperature": 0}, ValueError, "temperature must be above 0"),
        ({"temperature": -1.0}, ValueError, "temperature.*not negative"),
        ({"temperature": [0.1, 0.2]}, ValueError, "temperature must be a scalar"),
        ({"temperature": "warm"}, TypeError, "temperature must be a real number"),
        ({"temperatures": 1.0}, TypeError, "unexpected keyword argument"),
        ({"reduce_fn": jnp.mean}, TypeError, "reduce_fn must take"),
        ({"labels": [0.0, 1.0]}, TypeError, "labels must be integers"),
        (
            {"reduce_fn": tj.mean_of_anchors},
            TypeError,
            "terms must be PairTerms, got TripletTerms; use tripletjax.mean_valid",
        ),
    ],
)
@pytest.mark.parametrize("blockwise", [False, True])
def test_bad_input_is_named(options, error, words, blockwise):
    loss = tj.blockwise.supcon_loss if blockwise else tj.supcon_loss
    arguments = {"labels": [0, 0, 1, 1]} | options
    with pytest.raises(error, match=words):
        loss(jnp.ones((4, 4)), **arguments)


@pytest.mark.parametrize("blockwise", [False, True])
def test_traced_parameters_are_scalars(blockwise):
    loss = tj.blockwise.supcon_loss if blockwise else tj.supcon_loss
    with pytest.raises(ValueError, match=r"temperature must be a scalar, got.*\(2,\)"):
        jax.eval_shape(
            lambda t: loss(jnp.ones((4, 4)), [0, 0, 1, 1], temperature=t), jnp.ones(2)
        )


def test_block_sizes_are_at_least_1():
    with pytest.raises(ValueError, match="block_size must be at least 1, got 0"):
        tj.blockwise.sigmoid_loss(jnp.ones((4, 3)), [0, 0, 1, 1], block_size=0)


@pytest.mark.parametrize("blockwise", [False, True])
@pytest.mark.parametrize(
    ("name", "options"),
    [("info_nce_loss", {"symmetric": True}), ("proxy_anchor_loss", {})],
)
def test_references_that_are_anchors_have_no_positions(name, options, blockwise):
    loss = getattr(tj.blockwise if blockwise else tj, name)
    options = options | {"reference_labels": [0, 1], "positions": np.arange(2)}
    if blockwise:
        options["references"] = jnp.ones((2, 2))
    with pytest.raises(ValueError, match="positions cannot be combined"):
        loss(jnp.ones((2, 2)), [0, 1], **options)


@pytest.mark.parametrize("blockwise", [False, True])
def test_class_vectors_need_labels(blockwise):
    module = tj.blockwise if blockwise else tj
    for name in ("cosface_loss", "info_nce_loss", "proxy_anchor_loss"):
        with pytest.raises(ValueError, match="reference_labels must be given"):
            getattr(module, name)(jnp.ones((4, 4)), [0, 0, 1, 1])


# Meshes.


# name -> gathers of vectors. Each direction of two sides that are both anchors has one.
OVER_MESHES = {
    "supcon": 1,
    "sigmoid": 1,
    "smooth_ap": 1,
    "nt_xent without false negatives": 1,
    "info_nce": 1,
    "arcface": 1,
    "proxy_anchor": 1,
    "info_nce of both sides": 2,
}


@in_lanes(
    ("name", "devices"),
    itertools.product(OVER_MESHES, [1, 2, 4, 8]),
    slow=lambda name, devices: (
        devices == 4 or (devices == 8 and name in ("supcon", "sigmoid"))
    ),
)
def test_meshes(name, devices):
    """One value and one gradient, by parameters as well, on any number of devices."""
    loss, _, values, fixed = LOSSES[name]
    loss = getattr(tj.blockwise, loss.__name__)
    x, labels = batch(32)
    y, classes = batch(16, classes=3, seed=1)
    parameters = {k: jnp.float32(v) for k, v in values.items()}

    def value(x, y, parameters, **options):
        if name in TWO_SIDES:
            options |= {"references": y, "reference_labels": classes}
        return loss(x, labels, block_size=8, **parameters, **fixed, **options)

    arguments = x, y, parameters
    expected = jax.jit(jax.value_and_grad(value, (0, 1, 2)))(*arguments)
    with jax.set_mesh(jax.make_mesh((devices,), ("data",))):
        step = functools.partial(value, axis_name="data")
        program = jax.jit(jax.value_and_grad(step, (0, 1, 2)))
        got, text = program(*arguments), program.lower(*arguments).as_text()
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected)):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=1e-6)
    gathers = re.findall(r'stablehlo.all_gather"[^\n]*x5xf32>\n', text)
    scatters = re.findall(r"stablehlo.(?:reduce_scatter|all_to_all)", text)
    assert len(gathers) == OVER_MESHES[name]
    assert len(scatters) == (OVER_MESHES[name] if devices > 1 else 0)
