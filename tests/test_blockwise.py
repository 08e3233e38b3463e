"""Blockwise losses are those of the matrix: same numbers, gradients and indices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from problems import HINGES, unless_slow
from problems import LOSSES as MATRIX_LOSSES

import tripletjax as tj
from tripletjax import blockwise
from tripletjax._engine.search import MAX_TILE_POSITIVES
from tripletjax._pairwise import cuts
from tripletjax._pairwise.slices import Blocks
from tripletjax.losses import RELU, SOFTPLUS, GapCost, as_cost, needs_sums_alone

BLOCKWISE = {
    "batch all": blockwise.batch_all_loss,
    "batch hard": blockwise.batch_hard_loss,
    "semi-hard": blockwise.batch_semi_hard_loss,
    "semi-hard without fallback": functools.partial(
        blockwise.batch_semi_hard_loss, fallback=False
    ),
}
# name -> (loss of a matrix, blockwise loss, oracles of its triplets and reduction)
LOSSES = {
    name: (MATRIX_LOSSES[name][0], loss, *MATRIX_LOSSES[name][1:])
    for name, loss in BLOCKWISE.items()
}
METRICS = {
    "euclidean": tj.euclidean,
    "squared_euclidean": tj.squared_euclidean,
    "cosine": tj.cosine,
    "manhattan": tj.manhattan,
    "custom": tj.Metric(paired=lambda a, b: jnp.linalg.norm(a - b)),
}
every_loss = pytest.mark.parametrize(
    "name", unless_slow(LOSSES, ["batch all", "batch hard", "semi-hard"])
)
one_loss = pytest.mark.parametrize("name", unless_slow(LOSSES, ["batch hard"]))
# What does not depend on which semi-hard triplets there are.
every_mining = pytest.mark.parametrize("name", [*LOSSES][:3])
KINDS = "square", "padded", "references", "everything"
# Classes of every size that is treated in its own way.
LABELS = {
    "few": np.arange(40) // 4,
    "uneven": np.repeat(np.arange(7), [1, 2, 2, 5, 6, 10, 14]),
    "many": np.arange(40) % 2,
    "one large": np.where(np.arange(40) < 30, 0, np.arange(40)),
}


@pytest.fixture
def matrix(name):
    return LOSSES[name][0]


@pytest.fixture
def loss(name):
    return LOSSES[name][1]


def vectors(n=40, d=6, seed=0):
    random = np.random.default_rng(seed)
    return jnp.asarray(random.normal(size=(n, d)), jnp.float32)


def options_of(kind, labels, seed=0):
    """Options of a blockwise loss, and of one over a matrix, and the references."""
    random = np.random.default_rng(seed)
    n = len(labels)
    if kind == "square":
        return {}, {}, None
    if kind == "padded":
        where = {"where": random.random(n) < 0.8}
        return where, where, None
    y = vectors(53, seed=1)
    shared = {"reference_labels": random.permutation(np.resize(labels, 53))}
    if kind == "references":
        return {"references": y, **shared}, shared, y
    # Some anchors are references, in some order; some of these have another label.
    shared |= {
        "positions": random.integers(-1, 54, n),
        "where": random.random(n) < 0.8,
        "reference_where": random.random(53) < 0.8,
    }
    return {"references": y, **shared}, shared, y


def check(got, expected, atol=2e-5):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=atol),
        got,
        expected,
    )


@pytest.mark.parametrize("kind", unless_slow(KINDS, ["everything"]))
@every_loss
def test_value_and_gradient(loss, matrix, kind):
    for labels in LABELS.values():
        x = vectors()
        options, shared, y = options_of(kind, labels)

        def expected(x, y, margin, labels=labels, shared=shared):
            return matrix(tj.euclidean(x, y), labels, margin=margin, **shared)

        def got(x, y, margin, labels=labels, options=options):
            references = {} if y is None else {"references": y}
            # 16 divides none of the sizes.
            return loss(
                x, labels, margin=margin, block_size=16, **(options | references)
            )

        arguments = (0, 1, 2) if y is not None else (0, 2)
        check(
            jax.value_and_grad(got, arguments)(x, y, 0.5),
            jax.value_and_grad(expected, arguments)(x, y, 0.5),
        )


@one_loss
def test_a_reduction_of_sums(loss, matrix):
    """Several results, and forward mode, which other reductions do not have."""

    @tj.SumReduction
    def mean_and_share(sums):
        return tj.mean_active(sums), sums.active / jnp.maximum(sums.valid, 1)

    x, labels = vectors(), LABELS["uneven"]
    got, dot = jax.jvp(
        lambda x: loss(x, labels, reduce_fn=mean_and_share), (x,), (x[::-1],)
    )
    expected, expected_dot = jax.jvp(
        lambda x: matrix(tj.euclidean(x), labels, reduce_fn=mean_and_share),
        (x,),
        (x[::-1],),
    )
    check(got, expected)
    check(dot, expected_dot)


@pytest.mark.parametrize(
    ("reduce_fn", "sums"),
    [
        (lambda terms: tj.mean_valid(terms), True),
        *(
            pytest.param(*reduction, marks=pytest.mark.slow)
            for reduction in (
                (lambda terms: (tj.mean_active(terms), terms.valid.sum()), True),
                (lambda terms: terms.total.mean() + terms.active.sum() / 7, True),
                (jax.jit(lambda terms: (tj.mean_active(terms), terms.valid)), False),
                (lambda terms: jnp.sum(terms.total / (1 + terms.valid)), False),
                (lambda terms: (terms.total.sum(), terms.active), False),
            )
        ),
        pytest.param(lambda terms: jnp.max(terms.total), False, marks=pytest.mark.slow),
    ],
)
def test_what_a_reduction_does_with_the_terms(reduce_fn, sums):
    assert needs_sums_alone(reduce_fn, 40, jnp.float32) == sums
    x, labels = vectors(), LABELS["few"]

    def first(value):
        value = value[0] if isinstance(value, tuple) else value
        return value if value.ndim == 0 else value.sum()

    def run(loss):
        return jax.value_and_grad(lambda x: first(loss(x)))(x)

    check(
        run(lambda x: tj.blockwise.batch_all_loss(x, labels, reduce_fn=reduce_fn)),
        run(lambda x: tj.batch_all_loss(tj.euclidean(x), labels, reduce_fn=reduce_fn)),
    )


def test_functions_like_relu_are_relu():
    for known in (RELU, SOFTPLUS):
        function = known.function
        assert as_cost(function) is as_cost(lambda gap, f=function: f(gap)) is known
    for other in (lambda gap: jnp.maximum(gap, 0), jax.nn.gelu, jnp.exp):
        assert as_cost(other) == GapCost(other)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("hinge", "reduce_fn"),
    [
        (HINGES["soft margin"][0], tj.mean_valid),
        (HINGES["selectively contrastive"][0], tj.mean_active),
        (HINGES["selectively contrastive"][0], None),
        (jnp.exp, None),
    ],
    ids=["soft", "contrastive", "contrastive terms", "exponential terms"],
)
@every_loss
def test_any_hinge_and_reduction(loss, matrix, hinge, reduce_fn):
    x, weights = vectors(), jnp.arange(40.0)
    options = {"hinge": hinge, "reduce_fn": reduce_fn}

    def scalar(value):
        return jnp.sum(value.total * weights) / 100 if reduce_fn is None else value

    def got(x, margin, labels):
        return scalar(loss(x, labels, margin=margin, **options))

    def expected(x, margin, labels):
        return scalar(matrix(tj.euclidean(x), labels, margin=margin, **options))

    got, expected = (jax.jit(jax.value_and_grad(f, (0, 1))) for f in (got, expected))
    for labels in LABELS.values():
        check(got(x, 0.3, labels), expected(x, 0.3, labels), atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("metric", METRICS)
@every_mining
def test_any_metric(loss, matrix, metric):
    metric, x = METRICS[metric], vectors()
    run, expected = (
        jax.jit(jax.value_and_grad(f))
        for f in (
            lambda x, labels: loss(x, labels, metric=metric, margin=0.25),
            lambda x, labels: matrix(metric(x), labels, margin=0.25),
        )
    )
    for labels in LABELS.values():
        check(run(x, labels), expected(x, labels))
        if metric is METRICS["custom"]:
            continue  # The norm of zero has no gradient.
        value, gradient = run(jnp.ones((40, 6)), labels)
        assert value in (0.0, 0.25)
        assert jnp.isfinite(gradient).all()
        value, gradient = run(x.at[3:9].set(x[0]).at[9:12].set(0), labels)
        assert jnp.isfinite(value)
        assert jnp.isfinite(gradient).all()


@pytest.mark.parametrize("labels", unless_slow(LABELS, ["one large"]))
@one_loss
def test_the_oracle(name, loss, labels):
    labels, x = LABELS[labels], vectors()
    d = oracles.matrix(oracles.euclidean, np.asarray(x))
    triplets = LOSSES[name][2](d, *oracles.pair_masks(labels))
    terms, by_distance = oracles.loss_of(d, triplets, oracles.hinge, 0.3)
    got = loss(x, labels, margin=0.3, reduce_fn=None)
    for ours, theirs in zip(got, terms):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
    mean = loss(x, labels, margin=0.3)
    np.testing.assert_allclose(mean, LOSSES[name][3](terms), rtol=1e-5)
    # The distances' own gradients are unit vectors.
    units = np.asarray(x)[:, None] - np.asarray(x)
    units /= np.where(d == 0, 1, d)[..., None]
    expected = ((by_distance + by_distance.T)[..., None] * units).sum(1)
    got = jax.grad(
        lambda x: loss(x, labels, margin=0.3, reduce_fn=lambda t: t.total.sum())
    )(x)
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("labels", unless_slow(LABELS, ["few", "many"]))
@pytest.mark.parametrize("kind", unless_slow(KINDS, ["everything"]))
def test_indices(labels, kind):
    labels, x = LABELS[labels], vectors()
    options, shared, y = options_of(kind, labels)
    d = tj.euclidean(x, y)
    expected = tj.batch_hard_triplets(d, labels, **shared)
    got = blockwise.batch_hard_triplets(x, labels, block_size=16, **options)
    np.testing.assert_array_equal(got.valid, expected.valid)
    for ours, theirs in zip(got, expected):
        np.testing.assert_array_equal(ours[got.valid], theirs[got.valid])
    for fallback in (True, False):
        expected = tj.batch_semi_hard_triplets(d, labels, fallback=fallback, **shared)
        got = blockwise.batch_semi_hard_triplets(
            x, labels, size=3000, fallback=fallback, **options
        )
        where = np.nonzero(expected.valid)
        assert got.count == len(where[0]) == got.valid.sum()
        for ours, theirs in zip(got[:3], expected):
            np.testing.assert_array_equal(ours[: got.count], theirs[where])


def test_ties_go_to_the_lowest_index():
    """On a grid of integers all forms of a distance are exact."""
    random = np.random.default_rng(0)
    for classes in (12, 2):
        x = random.integers(0, 3, (40, 3)).astype(np.float32)
        labels = random.integers(0, classes, 40)
        expected = tj.batch_hard_triplets(tj.squared_euclidean(x), labels)
        got = blockwise.batch_hard_triplets(
            x, labels, metric=tj.squared_euclidean, block_size=8
        )
        for ours, theirs in zip(got, expected):
            np.testing.assert_array_equal(ours[expected.valid], theirs[expected.valid])


def test_triplets_that_do_not_fit_are_counted():
    got = blockwise.batch_semi_hard_triplets(vectors(), LABELS["few"], size=7)
    full = blockwise.batch_semi_hard_triplets(vectors(), LABELS["few"], size=120)
    assert got.count == full.count == 120
    assert got.valid.all()
    np.testing.assert_array_equal(got.negative, full.negative[:7])


@pytest.mark.slow
@pytest.mark.parametrize("block_size", [7, 1000])
@every_mining
def test_block_size_changes_nothing(loss, block_size):
    run = lambda **options: jax.value_and_grad(  # noqa: E731
        lambda x: loss(x, LABELS["uneven"], margin=0.4, **options)
    )(vectors())
    check(run(block_size=block_size), run(), atol=1e-6)


def only(role):
    """A cost that is the distance of the positive, or of the negative."""
    return tj.TripletCost(lambda ap, an, margin: ap if role == "positive" else an)


def near_pair(distance):
    """Unit vectors, the first two at a small distance."""
    random = np.random.default_rng(0)
    x = random.normal(size=(36, 64))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    step = random.normal(size=64)
    step -= step @ x[0] * x[0]
    x[1] = x[0] + distance * step / np.linalg.norm(step)
    return jnp.asarray(x, jnp.float32)


@pytest.mark.parametrize("others", unless_slow(["pairs", "one class"], ["one class"]))
@pytest.mark.parametrize(
    ("name", "role"),
    # Other losses take all negatives, or choose those beyond, by products.
    [
        ("batch hard", "negative"),
        *(pytest.param(name, "positive", marks=pytest.mark.slow) for name in LOSSES),
    ],
)
def test_near_duplicates_keep_their_digits(name, loss, role, others):
    """Of the product form of this distance nothing is left."""
    x = near_pair(1e-4)
    exact = oracles.euclidean(*np.asarray(x[:2], float))
    labels = np.arange(36) // 2 if others == "pairs" else np.minimum(np.arange(36), 3)
    if role == "positive":
        labels[:2] = 0
    else:
        # The nearest negative, where the positive coincides with the anchor.
        labels[:3] = (0, 99, 0)
        x = x.at[2].set(x[0])
    terms = loss(x, labels, hinge=only(role), reduce_fn=None)
    # Batch-all has the one positive with every negative.
    assert terms.valid[0] == (34 if name == "batch all" else 1)
    np.testing.assert_allclose(terms.total[0] / terms.valid[0], exact, rtol=1e-6)
    gradient = jax.grad(
        lambda x: loss(
            x, labels, hinge=only(role), reduce_fn=lambda terms: terms.total[0]
        )
    )(x)
    np.testing.assert_allclose(jnp.linalg.norm(gradient[0]), terms.valid[0], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("labels", LABELS)
@every_mining
def test_far_from_the_origin(loss, labels):
    labels, x = LABELS[labels], vectors()
    run = jax.value_and_grad(lambda x: loss(x, labels, margin=0.4))
    far = x + 1000
    check(run(far), run(far - 1000), atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("labels", ["few", "many"])
@every_mining
def test_leading_dimensions_and_vmap(loss, labels):
    labels = LABELS[labels]
    x = vectors(120).reshape(3, 40, 6)
    expected = jnp.stack([loss(one, labels) for one in x])
    check(loss(x, labels), expected)
    check(loss(x, np.broadcast_to(labels, (3, 40))), expected)
    check(jax.vmap(lambda x: loss(x, labels))(x), expected)
    many = jnp.stack([jnp.asarray(LABELS[k]) for k in ("few", "many", "one large")])
    check(
        jax.vmap(jax.value_and_grad(loss))(x, many),
        jax.tree.map(
            lambda *leaves: jnp.stack(leaves),
            *[jax.value_and_grad(loss)(*pair) for pair in zip(x, many)],
        ),
    )
    margins = jnp.array([0.0, 0.2, 1.0])
    sweep = jax.vmap(lambda margin: loss(x[0], labels, margin=margin))(margins)
    check(sweep, jnp.stack([loss(x[0], labels, margin=m) for m in margins]))
    triplets = blockwise.batch_hard_triplets(x, labels)
    assert triplets.positive.shape == (3, 40)


@pytest.mark.slow
@pytest.mark.parametrize("labels", ["few", "many"])
@every_mining
def test_forward_mode_and_second_order(loss, matrix, labels):
    labels, x = LABELS[labels][:12], vectors(12, 3)
    options = {"margin": 0.5, "hinge": jax.nn.softplus}
    got = lambda x: loss(x, labels, **options)  # noqa: E731
    expected = lambda x: matrix(tj.euclidean(x), labels, **options)  # noqa: E731
    check(jax.jvp(got, (x,), (x[::-1],)), jax.jvp(expected, (x,), (x[::-1],)))
    check(jax.hessian(got)(x), jax.hessian(expected)(x))
    twice = lambda f: jax.grad(lambda x: jnp.sum(jax.grad(f)(x) ** 2))  # noqa: E731
    check(twice(got)(x), twice(expected)(x))


@every_loss
def test_forward_mode_of_terms_is_a_clear_error(loss):
    terms = lambda x: loss(x, LABELS["few"], reduce_fn=None).total  # noqa: E731
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(terms, (vectors(),), (vectors(),))


@pytest.mark.slow
@every_mining
def test_scan_and_remat(loss):
    labels = LABELS["few"]

    def step(x, _):
        value, gradient = jax.value_and_grad(
            jax.checkpoint(lambda x: loss(x, labels, margin=0.5))
        )(x)
        return x - 0.05 * gradient, value

    _, values = jax.lax.scan(step, vectors(), length=5)
    assert values[-1] < values[0]


@pytest.mark.slow
@every_mining
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_low_precision(loss, dtype):
    low = vectors().astype(dtype)
    run = jax.value_and_grad(lambda x: loss(x, LABELS["few"], margin=0.3))
    value, gradient = run(low)
    assert value.dtype == jnp.float32
    assert gradient.dtype == dtype
    np.testing.assert_allclose(value, run(low.astype(jnp.float32))[0], rtol=1e-6)


@pytest.mark.slow
@every_mining
@pytest.mark.parametrize("labels", ["few", "many"])
def test_double_precision(loss, labels):
    single = loss(vectors(), LABELS[labels], margin=0.3)
    with jax.enable_x64(True):
        x = jnp.asarray(vectors(), jnp.float64)
        value, gradient = jax.value_and_grad(
            lambda x: loss(x, LABELS[labels], margin=0.3)
        )(x)
        assert value.dtype == gradient.dtype == jnp.float64
    np.testing.assert_allclose(value, single, rtol=1e-5)


@every_loss
@pytest.mark.parametrize(
    "labels",
    [[0] * 6, *(pytest.param(x, marks=pytest.mark.slow) for x in (range(6), [0]))],
)
def test_no_triplet_costs_nothing(loss, labels):
    x, labels = vectors(len(labels)), np.array(labels)
    value, gradient = jax.value_and_grad(
        lambda x: loss(x, labels, hinge=jax.nn.softplus)
    )(x)
    assert value == 0
    np.testing.assert_array_equal(gradient, jnp.zeros_like(x))


@pytest.mark.slow
@pytest.mark.parametrize("labels", ["few", "many"])
@every_mining
def test_padding_may_hold_anything(loss, labels):
    labels, x = LABELS[labels], vectors()
    where = np.random.default_rng(0).random(40) < 0.7
    expected = jax.value_and_grad(lambda x: loss(x, labels[where]))(x[where])
    for junk in (0.0, 1e30, jnp.nan, jnp.inf):
        padded = jnp.where(where[:, None], x, junk)
        value, gradient = jax.value_and_grad(
            lambda x: loss(x, labels, where=where, block_size=16)
        )(padded)
        check((value, gradient[where]), expected)
        np.testing.assert_array_equal(gradient[~where], 0)


@pytest.mark.parametrize("labels", ["few", "many"])
@every_loss
def test_a_nan_is_not_hidden(loss, labels):
    assert jnp.isnan(loss(vectors().at[7].set(jnp.nan), LABELS[labels]))


@pytest.mark.slow
@pytest.mark.parametrize("metric", ["euclidean", "manhattan"])
@every_mining
def test_pair_masks_stand_for_labels(loss, metric):
    labels, metric = LABELS["few"], METRICS[metric]
    run = lambda labels, **options: jax.value_and_grad(  # noqa: E731
        lambda x: loss(x, labels, metric=metric, **options)
    )(vectors())
    where = np.arange(40) != 3
    check(run(tj.pair_masks(labels), where=where), run(labels, where=where))
    y = vectors(30, seed=3)
    masks = tj.pair_masks(labels, labels[:30])
    check(
        run(masks, references=y),
        run(labels, references=y, reference_labels=labels[:30]),
    )


@pytest.mark.slow
@pytest.mark.parametrize(("cut", "most"), [(cuts.CPU, 64), (cuts.ACCELERATOR, 256)])
@every_mining
def test_memory_does_not_grow_with_the_matrix(loss, cut, most, monkeypatch):
    monkeypatch.setattr(cuts, "CPU", cut)
    n = 65_536
    x = jax.ShapeDtypeStruct((n, 128), jnp.float32)
    labels = jax.ShapeDtypeStruct((n,), jnp.int32)
    # Nothing else is traced with these options, and remembered.
    with_cut = functools.partial(loss, block_size=cut.tile)
    compiled = jax.jit(jax.value_and_grad(with_cut)).lower(x, labels).compile()
    # The matrix alone would be 16 GiB.
    assert compiled.memory_analysis().temp_size_in_bytes <= most * 2**20


@pytest.mark.parametrize(
    ("name", "hinge"),
    [
        pytest.param("batch all", "hinge", marks=pytest.mark.slow),
        pytest.param("semi-hard", "soft margin", marks=pytest.mark.slow),
        # Which costs there are matters to sums over all triplets alone.
        pytest.param("batch all", "soft margin", marks=pytest.mark.slow),
        pytest.param("batch all", "selectively contrastive", marks=pytest.mark.slow),
        pytest.param("batch hard", "hinge", marks=pytest.mark.slow),
        pytest.param("semi-hard without fallback", "hinge", marks=pytest.mark.slow),
    ],
)
def test_the_forms_of_accelerators(name, hinge, loss, matrix, monkeypatch):
    """Plain reductions, in panels and tiles, do what those for CPUs do."""
    monkeypatch.setattr(cuts, "CPU", cuts.ACCELERATOR._replace(tile=64, panel=320))
    x, hinge = vectors(), HINGES[hinge][0]
    for kind in ("square", "everything"):
        for labels in LABELS.values():
            options, shared, y = options_of(kind, labels)

            def expected(x, margin, labels=labels, shared=shared, y=y):
                distances = tj.euclidean(x, y)
                return matrix(distances, labels, margin=margin, hinge=hinge, **shared)

            def got(x, margin, labels=labels, options=options):
                # Nothing else is traced with this size, and remembered.
                options = options | {"hinge": hinge, "block_size": 15}
                return loss(x, labels, margin=margin, **options)

            check(
                jax.value_and_grad(got, (0, 1))(x, 0.5),
                jax.value_and_grad(expected, (0, 1))(x, 0.5),
            )


@pytest.mark.parametrize("name", unless_slow(LOSSES, ["batch hard"]))
def test_each_platform_has_its_own_blocks(loss):
    """Whatever the machine that a program is made on."""
    x = jax.ShapeDtypeStruct((5000, 8), jnp.float32)
    labels = jax.ShapeDtypeStruct((5000,), jnp.int32)
    traced = jax.jit(jax.value_and_grad(loss)).trace(x, labels)
    # Of ten blocks of 500 and three of 1667, rounded up.
    sizes = {"cpu": 512, "cuda": 1792, "rocm": 1792, "tpu": 1792}
    for platform, own in sizes.items():
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        for size in set(sizes.values()):
            assert (f"tensor<{size}x{size}xf32>" in text) == (size == own)


def test_blocks_that_cover_evenly():
    for n, most, size in [
        (40, 16, 16),
        (600, 512, 384),
        (5000, 2048, 1792),
        (5000, 5000, 5000),
        (3, 9, 3),
    ]:
        blocks = Blocks.even(n, most)
        assert blocks == (n, size)
        fresh = sum(int(blocks.fresh(i).sum()) for i in range(blocks.count))
        assert fresh == n


def mesh(kind):
    return jax.make_mesh((8,), ("data",), axis_types=(kind,))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("reduce_fn", "check_vma"),
    [("default", True), ("default", False), ("terms", True), ("own", True)],
)
@every_mining
def test_a_batch_split_over_devices(loss, reduce_fn, check_vma):
    x = vectors()
    where = jnp.arange(40) % 7 > 0
    options = {
        "default": {},
        "terms": {"reduce_fn": None},
        "own": {"reduce_fn": lambda terms: (terms.total**2).sum() / 1000},
    }[reduce_fn]

    def run(x, scale, labels, where, **options):
        value = loss(x * scale, labels, where=where, **options)
        return value.total.sum() / 100 if reduce_fn == "terms" else value

    split = jax.shard_map(
        functools.partial(run, axis_name="data", **options),
        mesh=mesh(AxisType.Auto),
        in_specs=(P("data"), P(), P("data"), P("data")),
        out_specs=P(),
        check_vma=check_vma,
    )
    got, expected = (
        jax.jit(jax.value_and_grad(function, (0, 1)))
        for function in (split, functools.partial(run, **options))
    )
    for labels in map(jnp.asarray, LABELS.values()):
        arguments = x, 1.5, labels, where
        check(got(*arguments), expected(*arguments), atol=1e-4)


@pytest.mark.slow
@one_loss
def test_explicit_mesh(loss):
    labels, x = jnp.asarray(LABELS["few"]), vectors()
    expected = jax.value_and_grad(loss)(x, labels)
    sharding = NamedSharding(mesh(AxisType.Explicit), P("data"))
    with jax.set_mesh(sharding.mesh):
        got = jax.jit(jax.value_and_grad(loss))(*jax.device_put((x, labels), sharding))
    check(got, expected)


@pytest.mark.slow
@one_loss
def test_split_over_devices(loss):
    labels, x = jnp.asarray(LABELS["few"]), vectors()
    run = jax.shard_map(
        functools.partial(loss, axis_name="data"),
        mesh=mesh(AxisType.Auto),
        in_specs=(P("data"), P("data")),
        out_specs=P(),
    )
    check(jax.value_and_grad(run)(x, labels), jax.value_and_grad(loss)(x, labels))


def test_triplets_split_over_devices():
    labels, x = jnp.asarray(LABELS["few"]), vectors()
    spec = P("data")
    got = jax.shard_map(
        lambda x, y: blockwise.batch_hard_triplets(x, y, axis_name="data")[1:],
        mesh=mesh(AxisType.Auto),
        in_specs=(spec, spec),
        out_specs=spec,
    )(x, labels)
    expected = blockwise.batch_hard_triplets(x, labels)[1:]
    jax.tree.map(np.testing.assert_array_equal, tuple(got), tuple(expected))


@every_loss
@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"embeddings": np.ones(3)}, ValueError, r"embeddings must be \[..., n, d\]"),
        ({"embeddings": np.ones((0, 3))}, ValueError, "embeddings is empty"),
        (
            {"embeddings": np.ones((4, 3), complex)},
            TypeError,
            "embeddings must be real",
        ),
        ({"labels": [0, 0, 1]}, ValueError, r"labels.*\(3,\).*4 embeddings"),
        ({"labels": [0.0, 0, 1, 1]}, TypeError, "labels must be integers"),
        ({"labels": np.zeros((3, 4), int)}, ValueError, "labels.*broadcast"),
        ({"where": [True]}, ValueError, "where"),
        ({"where": [1, 1, 1, 0]}, TypeError, "where must be boolean"),
        ({"references": np.ones((5, 3))}, ValueError, "go together"),
        ({"reference_labels": [0, 0]}, ValueError, "go together"),
        (
            {"references": np.ones((5, 2)), "reference_labels": [0] * 5},
            ValueError,
            r"references.*\(5, 2\) and \(4, 3\)",
        ),
        (
            {"references": np.ones((5, 3)), "reference_labels": [0] * 4},
            ValueError,
            r"reference_labels.*\(4,\).*5 references",
        ),
        (
            {"labels": tj.pair_masks([0, 0, 1])},
            ValueError,
            r"labels.positive.*\(4, 4\)",
        ),
        ({"positions": [0.0, 1, 2, 3]}, TypeError, "positions must be integers"),
        ({"margin": -0.1}, ValueError, "margin.*-0.1"),
        ({"margin": [0.1, 0.2]}, ValueError, "margin must be a scalar"),
        ({"hinge": "soft"}, TypeError, "hinge must be callable"),
        ({"hinge": jnp.sum}, ValueError, "hinge must be elementwise"),
        (
            {
                "references": np.ones((4, 3)),
                "reference_labels": np.array([0, 1, 2, 2**32 - 1], np.uint32),
            },
            TypeError,
            "labels and reference_labels.*int32 and uint32",
        ),
        ({"metric": "euclidean"}, TypeError, "metric must be callable"),
        ({"metric": np.subtract}, TypeError, "metric must be a Metric"),
        ({"reduce_fn": "mean"}, TypeError, "reduce_fn must be callable"),
        ({"block_size": 0}, ValueError, "block_size must be at least 1"),
        ({"block_size": 1.5}, TypeError, "block_size must be an integer"),
    ],
)
def test_bad_input_is_named(loss, change, error, words):
    arguments = {"embeddings": np.ones((4, 3)), "labels": [0, 0, 1, 1]} | change
    with pytest.raises(error, match=words):
        loss(arguments.pop("embeddings"), arguments.pop("labels"), **arguments)


def test_labels_of_other_dtypes():
    x, labels = vectors(6), np.array([-1, -1, 5, 5, 7, 7], np.int8)
    references = np.array([255, 255, 5, 5, 7, 7], np.uint8)
    terms = blockwise.batch_hard_loss(
        x, labels, references=x[::-1], reference_labels=references, reduce_fn=None
    )
    np.testing.assert_array_equal(terms.valid, [0, 0, 1, 1, 1, 1])


def test_both_ways_are_taken():
    """What these tests rely on: some of their classes are few, and some many."""
    most = {k: np.bincount(v).max() - 1 for k, v in LABELS.items()}
    assert most["few"] <= MAX_TILE_POSITIVES < most["many"]
    assert most["uneven"] <= MAX_TILE_POSITIVES < most["one large"]
