"""Blockwise losses: terms, gradients and indices, without the matrix.

The rules that hold for all losses are in `test_contract`.
"""

import functools
import inspect
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from problems import (
    BLOCKWISE,
    BUILT_IN,
    HINGES,
    LABELS,
    LOSSES,
    in_lanes,
    public_names,
    unless_slow,
    vectors,
)

import tripletjax as tj
from tripletjax import blockwise
from tripletjax._engine.search import MAX_TILE_POSITIVES
from tripletjax._pairwise import block_sizes
from tripletjax._pairwise.slices import Blocks
from tripletjax.losses import RELU, SOFTPLUS, GapCost, as_cost

THREE = BUILT_IN[:3]
every_loss = pytest.mark.parametrize("name", unless_slow(BLOCKWISE, THREE))
one_loss = pytest.mark.parametrize(
    "name", unless_slow(BLOCKWISE, ["batch hard"], slow=THREE)
)


@pytest.fixture
def matrix(name):
    return LOSSES[name][0]


@pytest.fixture
def loss(name):
    return BLOCKWISE[name]


def gallery_of(labels, seed=0):
    """References and all options of pairs, for 40 anchors of these labels.

    Some anchors are references, in some order; some of these have another label.
    """
    random = np.random.default_rng(seed)
    return {
        "references": vectors(53, seed=1),
        "reference_labels": random.permutation(np.resize(labels, 53)),
        "positions": random.integers(-1, 54, len(labels)),
        "where": random.random(len(labels)) < 0.8,
        "reference_where": random.random(53) < 0.8,
    }


def check(got, expected, atol=2e-5):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=atol),
        got,
        expected,
    )


@functools.cache
def terms_program(name):
    """Terms of a loss with references, and gradients of their weighted total."""

    @jax.jit
    def run(x, labels, options, margin, weights):
        def weighted(x, references, margin):
            pairs = options | {"references": references}
            # 16 divides none of the sizes.
            blocks = {"block_size": 16, "reduce_fn": None}
            terms = BLOCKWISE[name](x, labels, margin=margin, **pairs, **blocks)
            return terms.total @ weights, terms

        gradients, terms = jax.grad(weighted, (0, 1, 2), has_aux=True)(
            x, options["references"], margin
        )
        return tuple(terms), gradients

    return run


def expected_terms(name, x, labels, options, margin, weights):
    """The same by loops; gradients of Euclidean distances are unit vectors."""
    x, y = np.asarray(x, float), np.asarray(options["references"], float)
    pairs = {k: v for k, v in options.items() if k != "references"}
    d = oracles.matrix(oracles.euclidean, x, y)
    triplets = LOSSES[name][1](d, *oracles.pair_masks(labels, **pairs))
    terms, by_distance = oracles.loss_of(d, triplets, oracles.hinge, margin, weights)
    units = (x[:, None] - y) / d[..., None]
    pulls = by_distance[..., None] * units
    return terms, (pulls.sum(1), -pulls.sum(0), weights @ terms[1])


@every_loss
def test_terms_and_gradients_are_the_oracles(name):
    """With references of other labels, padding, and anchors that are references."""
    x, weights = vectors(), np.linspace(1, 2, 40, dtype=np.float32)
    plain = {
        "positions": np.full(40, -1),
        "where": np.ones(40, bool),
        "reference_where": np.ones(53, bool),
    }
    for labels in LABELS.values():
        for options in (gallery_of(labels), gallery_of(labels) | plain):
            got = terms_program(name)(x, labels, options, 0.5, weights)
            expected = expected_terms(name, x, labels, options, 0.5, weights)
            check(got, expected, atol=1e-3)


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


REDUCTIONS = [
    lambda terms: tj.mean_valid(terms),
    lambda terms: (tj.mean_active(terms), terms.valid.sum()),
    lambda terms: jnp.sum(terms.total / (1 + terms.valid)),
    lambda terms: (terms.total.sum(), terms.active),
    jax.jit(lambda terms: (tj.mean_active(terms), terms.valid)),
    lambda terms: jnp.max(terms.total),
]


@in_lanes(
    ("reduce_fn",),
    [(reduce_fn,) for reduce_fn in REDUCTIONS],
    quick=[(REDUCTIONS[2],)],
    slow=[(reduce_fn,) for reduce_fn in REDUCTIONS[:4]],
)
def test_any_reduction_of_the_terms(reduce_fn):
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


def test_reductions_of_sums_take_one_walk():
    def text(reduce_fn):
        loss = functools.partial(blockwise.batch_hard_loss, reduce_fn=reduce_fn)
        return str(jax.make_jaxpr(loss)(vectors(), LABELS["few"]))

    own = tj.SumReduction(lambda sums: sums.total)
    for reduce_fn in (tj.mean_valid, tj.mean_active, own):
        assert "name=total_terms" in text(reduce_fn)
    for reduce_fn in (None, lambda terms: tj.mean_valid(terms)):
        assert "name=terms_per_anchor" in text(reduce_fn)


def test_costs_by_their_hinge():
    for known in (RELU, SOFTPLUS):
        assert as_cost(known.function) is known
    for other in (jax.nn.gelu, jnp.exp):
        assert as_cost(other) == GapCost(other)


@in_lanes(
    ("name", "hinge"),
    [(name, hinge) for name in BLOCKWISE for hinge in ("contrastive", "exponential")],
    slow=[("batch all", "exponential")],
)
def test_terms_of_any_hinge(loss, matrix, hinge):
    hinge = HINGES["selectively contrastive"][0] if hinge == "contrastive" else jnp.exp
    weights = jnp.arange(40.0) / 100

    def program(loss):
        def weighted(x, margin, labels):
            terms = loss(x, labels, margin=margin, hinge=hinge, reduce_fn=None)
            return terms.total @ weights

        return jax.jit(jax.value_and_grad(weighted, (0, 1)))

    got = program(loss)
    expected = program(lambda x, labels, **o: matrix(tj.euclidean(x), labels, **o))
    for labels in LABELS.values():
        check(got(vectors(), 0.3, labels), expected(vectors(), 0.3, labels), atol=1e-3)


PAIR_OPTIONS = {
    "none": (),
    "where": ("where",),
    "references": ("references", "reference_labels"),
    "all": gallery_of(LABELS["few"]),
}


@in_lanes(
    ("names", "fallback"),
    itertools.product(PAIR_OPTIONS, [True, False]),
    quick=[("all", True)],
    slow=lambda names, fallback: names != "where",
)
def test_indices(names, fallback):
    x = vectors()
    for labels in LABELS.values():
        options = {k: gallery_of(labels)[k] for k in PAIR_OPTIONS[names]}
        pairs = {k: v for k, v in options.items() if k != "references"}
        d = tj.euclidean(x, options.get("references"))
        expected = tj.batch_hard_triplets(d, labels, **pairs)
        got = blockwise.batch_hard_triplets(x, labels, block_size=16, **options)
        np.testing.assert_array_equal(got.valid, expected.valid)
        for indices, correct in zip(got, expected):
            np.testing.assert_array_equal(indices[got.valid], correct[got.valid])
        expected = tj.batch_semi_hard_triplets(d, labels, fallback=fallback, **pairs)
        got = blockwise.batch_semi_hard_triplets(
            x, labels, size=3000, fallback=fallback, **options
        )
        where = np.nonzero(expected.valid)
        assert got.count == len(where[0]) == got.valid.sum()
        for indices, correct in zip(got[:3], expected):
            np.testing.assert_array_equal(indices[: got.count], correct[where])


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


@in_lanes(
    ("name", "block_size"),
    itertools.product(THREE, [7, 1000]),
    slow=[("semi-hard", 7)],
)
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


@in_lanes(
    ("name", "role"),
    # Only batch-hard chooses a negative by its own distance.
    [("batch hard", "negative"), *((name, "positive") for name in BLOCKWISE)],
    quick=lambda name, role: role == "negative",
    slow=lambda name, role: name in THREE,
)
def test_near_duplicates_keep_their_digits(name, loss, role):
    """The product form of this distance has no digit left."""
    exact = oracles.euclidean(*np.asarray(near_pair(1e-4)[:2], float))

    @jax.jit
    def gradient_and_terms(x, labels):
        def first_total(x):
            terms = loss(x, labels, hinge=only(role), reduce_fn=None)
            return terms.total[0], terms

        return jax.grad(first_total, has_aux=True)(x)

    for labels in (np.arange(36) // 2, np.minimum(np.arange(36), 3)):
        x = near_pair(1e-4)
        if role == "positive":
            labels[:2] = 0
        else:
            # The nearest negative, where the positive coincides with the anchor.
            labels[:3] = (0, 99, 0)
            x = x.at[2].set(x[0])
        gradient, terms = gradient_and_terms(x, labels)
        # Batch-all has the one positive with every negative.
        count = 34 if name == "batch all" else 1
        assert terms.valid[0] == count
        np.testing.assert_allclose(terms.total[0] / count, exact, rtol=1e-6)
        np.testing.assert_allclose(jnp.linalg.norm(gradient[0]), count, rtol=1e-5)


def test_a_second_derivative_is_that_of_the_matrix():
    x, labels = vectors(8, 3), np.arange(8) // 2
    options = {"margin": 0.5, "hinge": jax.nn.softplus}

    def of_gradient(form):
        squared = lambda x: jnp.sum(jax.grad(form)(x) ** 2)  # noqa: E731
        return jax.jit(jax.grad(squared))(x)

    got = of_gradient(lambda x: blockwise.batch_hard_loss(x, labels, **options))
    expected = of_gradient(
        lambda x: tj.batch_hard_loss(tj.euclidean(x), labels, **options)
    )
    np.testing.assert_allclose(got, expected, atol=1e-4)


@pytest.mark.parametrize("name", unless_slow(THREE, [], slow=["batch all"]))
def test_forward_mode_and_second_order(loss, matrix):
    options = {"margin": 0.5, "hinge": jax.nn.softplus}

    def program(form):
        def derivatives(x, labels):
            value = functools.partial(form, labels=labels)
            squared = lambda x: jnp.sum(jax.grad(value)(x) ** 2)  # noqa: E731
            return (
                jax.jvp(value, (x,), (x[::-1],)),
                jax.hessian(value)(x),
                jax.grad(squared)(x),
            )

        return jax.jit(derivatives)

    got = program(lambda x, labels: loss(x, labels, **options))
    expected = program(lambda x, labels: matrix(tj.euclidean(x), labels, **options))
    # The second has too many positives for tiles.
    x = vectors(20, 3)
    for labels in (np.arange(20) // 4, np.arange(20) // 18):
        check(got(x, labels), expected(x, labels), atol=1e-4)


@every_loss
def test_forward_mode_of_terms_is_a_clear_error(loss):
    terms = lambda x: loss(x, LABELS["few"], reduce_fn=None).total  # noqa: E731
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(terms, (vectors(),), (vectors(),))


@in_lanes(
    ("name", "metric"),
    itertools.product(THREE, ["euclidean", "manhattan"]),
    slow=[("batch hard", "manhattan")],
)
def test_pair_masks_with_references(loss, metric):
    labels, y = LABELS["few"], vectors(30, seed=3)
    run = lambda labels, **options: jax.value_and_grad(  # noqa: E731
        lambda x: loss(x, labels, metric=getattr(tj, metric), **options)
    )(vectors())
    masks = tj.pair_masks(labels, labels[:30])
    check(
        run(masks, references=y),
        run(labels, references=y, reference_labels=labels[:30]),
    )


@in_lanes(
    ("name", "sizes", "most"),
    [
        (name, sizes, most)
        for name in THREE
        for sizes, most in ((block_sizes.CPU, 64), (block_sizes.ACCELERATOR, 256))
    ],
    slow=lambda name, sizes, most: sizes == block_sizes.CPU or name == "batch all",
)
def test_memory_does_not_grow_with_the_matrix(loss, sizes, most, monkeypatch):
    monkeypatch.setattr(block_sizes, "CPU", sizes)
    n = 65_536
    x = jax.ShapeDtypeStruct((n, 128), jnp.float32)
    labels = jax.ShapeDtypeStruct((n,), jnp.int32)
    # Nothing else is traced with these options, and remembered.
    with_cut = functools.partial(loss, block_size=sizes.tile)
    compiled = jax.jit(jax.value_and_grad(with_cut)).lower(x, labels).compile()
    # The matrix alone would be 16 GiB.
    assert compiled.memory_analysis().temp_size_in_bytes <= most * 2**20


@in_lanes(
    ("name", "hinge", "with_references"),
    [
        (name, hinge, with_references)
        for with_references in (True, False)
        for name, hinge in [
            ("batch all", "hinge"),
            ("batch hard", "hinge"),
            ("semi-hard without fallback", "hinge"),
            ("semi-hard", "soft margin"),
            # Sums over all triplets alone depend on the hinge.
            ("batch all", "soft margin"),
            ("batch all", "selectively contrastive"),
        ]
    ],
    slow=[("batch all", "hinge", True), ("semi-hard", "soft margin", True)],
)
def test_the_forms_of_accelerators(hinge, with_references, loss, matrix, monkeypatch):
    """Plain reductions, in panels and tiles, agree with those for CPUs."""
    monkeypatch.setattr(
        block_sizes, "CPU", block_sizes.ACCELERATOR._replace(tile=64, panel=320)
    )
    # Nothing else is traced with this block size, and remembered.
    options = {"margin": 0.5, "hinge": HINGES[hinge][0]}

    @jax.jit
    def got(x, labels, pairs):
        of = lambda x: loss(x, labels, block_size=15, **options, **pairs)  # noqa: E731
        return jax.value_and_grad(of)(x)

    @jax.jit
    def expected(x, labels, pairs):
        pairs = dict(pairs)
        y = pairs.pop("references", None)
        of = lambda x: matrix(tj.euclidean(x, y), labels, **options, **pairs)  # noqa: E731
        return jax.value_and_grad(of)(x)

    for labels in LABELS.values():
        pairs = gallery_of(labels) if with_references else {}
        check(got(vectors(), labels, pairs), expected(vectors(), labels, pairs))


@one_loss
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


@in_lanes(
    ("name", "reduce_fn", "check_vma"),
    [
        (name, *case)
        for name in THREE
        for case in [
            ("default", True),
            ("default", False),
            ("terms", True),
            ("own", True),
        ]
    ],
    slow=[
        ("batch all", "default", False),
        ("batch hard", "own", True),
        ("semi-hard", "terms", True),
    ],
)
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


def test_triplets_split_over_devices():
    labels, x = jnp.asarray(LABELS["few"]), vectors()
    spec = P("data")
    got = jax.shard_map(
        lambda x, y: blockwise.batch_hard_triplets(x, y, axis_name="data")[1:],
        mesh=mesh(AxisType.Auto),
        in_specs=(spec, spec),
        out_specs=spec,
    )(x, labels)
    expected = blockwise.batch_hard_triplets(x, labels)
    jax.tree.map(np.testing.assert_array_equal, tuple(got), tuple(expected[1:]))
    # From outside, anchors are counted along the rows of all devices.
    sharding = NamedSharding(mesh(AxisType.Explicit), spec)
    got = blockwise.batch_hard_triplets(*jax.device_put((x, labels), sharding))
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
        ({"axis_name": 3}, TypeError, "axis_name must be a string.*got 3"),
        ({"embeddings": [[1.0], [1, 2]]}, ValueError, "embeddings is not a rect"),
    ],
)
def test_bad_input_is_named(loss, change, error, words):
    arguments = {"embeddings": np.ones((4, 3)), "labels": [0, 0, 1, 1]} | change
    with pytest.raises(error, match=words):
        loss(arguments.pop("embeddings"), arguments.pop("labels"), **arguments)


def drawn_triplets(n, m, k=50):
    random = np.random.default_rng(0)
    indices = [random.integers(0, size, k) for size in (n, m, m)]
    return tj.Triplets(*indices, random.random(k) < 0.8)


@pytest.mark.parametrize("metric", [tj.euclidean, tj.cosine, tj.manhattan])
def test_triplets_of_embeddings_and_references(metric, monkeypatch):
    """Value and gradients are those of explicit triplets, in blocks of seven."""
    monkeypatch.setattr(block_sizes, "CPU", block_sizes.CPU._replace(panel=7 * 6))
    x, y, triplets = vectors(), vectors(53, seed=1), drawn_triplets(40, 53)
    anchor, positive, negative, valid = triplets

    def explicit(x, y, margin):
        return tj.triplet_margin_loss(
            x[anchor], y[positive], y[negative], where=valid, metric=metric,
            margin=margin,
        )  # fmt: skip

    def mined(x, y, margin):
        return blockwise.triplet_loss(
            x, triplets, references=y, metric=metric, margin=margin
        )

    check(*(jax.value_and_grad(f, (0, 1, 2))(x, y, 0.3) for f in (mined, explicit)))
    check(*(jax.jvp(lambda x: f(x, y, 0.3), (x,), (x,)) for f in (mined, explicit)))  # noqa: B023


def test_triplets_keep_the_digits_of_near_duplicates():
    x = near_pair(1e-4)
    triplets = tj.Triplets(*(jnp.array([i]) for i in (0, 0, 1)), jnp.array([True]))
    exact = oracles.euclidean(*np.asarray(x[:2], float))
    value = blockwise.triplet_loss(x, triplets, hinge=only("negative"))
    np.testing.assert_allclose(value, exact, rtol=1e-6)


def test_triplets_that_are_not_valid_have_no_gradient():
    """Their indices may compare a vector with itself: this root has no slope there."""
    metric = tj.Metric(lambda a, b: jnp.sqrt(jnp.sum((a - b) ** 2)))
    triplets = blockwise.batch_hard_triplets(vectors(4), [0, 0, 1, 2])
    assert triplets.valid.tolist() == [True, True, False, False]
    gradient = jax.grad(lambda x: blockwise.triplet_loss(x, triplets, metric=metric))
    assert jnp.isfinite(gradient(vectors(4))).all()


def test_triplets_of_batches_of_embeddings():
    x, labels = vectors(24).reshape(2, 12, 6), np.arange(12) % 3
    triplets = jax.vmap(lambda x: blockwise.batch_hard_triplets(x, labels))(x)
    got = blockwise.triplet_loss(x, triplets, margin=0.3)
    expected = blockwise.batch_hard_loss(x, labels, margin=0.3)
    np.testing.assert_allclose(got, expected, rtol=1e-6)


@pytest.mark.parametrize("field", ["anchor", "positive", "negative"])
def test_triplets_out_of_range_are_named_or_give_nan(field):
    x, y = vectors(3), vectors(5)
    right = tj.Triplets(*(jnp.array([i]) for i in (0, 4, 3)), jnp.array([True]))
    loss = functools.partial(blockwise.triplet_loss, references=y)
    assert jnp.isfinite(loss(x, right))
    last = 2 if field == "anchor" else 4
    for index in (last + 1, -1):
        wrong = right._replace(**{field: jnp.array([index])})
        words = f"triplets.{field} must be from 0 to {last}, got {index}: there are 3"
        with pytest.raises(ValueError, match=words):
            loss(x, wrong)
        assert jnp.isnan(jax.jit(loss)(x, wrong))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"embeddings": np.ones(3)}, ValueError, r"embeddings must be \[..., n, d\]"),
        ({"triplets": (0, 1, 2)}, TypeError, "triplets must be Triplets"),
        ({"triplets": drawn_triplets(4, 4)._replace(valid=[1])}, ValueError, "shape"),
        ({"embeddings": np.ones((2, 4, 3))}, ValueError, r"\(2, 4, 3\), got shape"),
        ({"references": np.ones((5, 2))}, ValueError, r"\(5, 2\) and \(4, 3\)"),
        ({"metric": np.subtract}, TypeError, "metric must be a Metric"),
        ({"hinge": jnp.sum}, ValueError, "hinge must be elementwise"),
        ({"margin": -1.0}, ValueError, "margin must be finite and not negative"),
        ({"reduce_fn": jnp.mean}, TypeError, "reduce_fn must take TripletTerms"),
        ({"labels": [0, 1]}, TypeError, "unexpected keyword argument 'labels'"),
    ],
)
def test_bad_triplets_of_embeddings_are_named(change, error, words):
    arguments = {"embeddings": np.ones((4, 3)), "triplets": drawn_triplets(4, 4)}
    arguments |= change
    with pytest.raises(error, match=words):
        blockwise.triplet_loss(
            arguments.pop("embeddings"), arguments.pop("triplets"), **arguments
        )


@pytest.mark.parametrize("name", public_names(blockwise))
def test_options_are_given_by_name(name):
    parameters = inspect.signature(getattr(blockwise, name)).parameters.values()
    by_place = [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY]
    assert by_place in (["embeddings", "labels"], ["embeddings", "triplets"])


def test_labels_of_other_dtypes():
    x, labels = vectors(6), np.array([-1, -1, 5, 5, 7, 7], np.int8)
    references = np.array([255, 255, 5, 5, 7, 7], np.uint8)
    terms = blockwise.batch_hard_loss(
        x, labels, references=x[::-1], reference_labels=references, reduce_fn=None
    )
    np.testing.assert_array_equal(terms.valid, [0, 0, 1, 1, 1, 1])


@pytest.mark.parametrize(
    "dtype", [np.uint8, np.uint32, pytest.param(np.uint64, marks=pytest.mark.slow)]
)
def test_labels_without_a_sign_with_padding(dtype):
    """Also the largest label of the dtype, which padding may have as well."""
    with jax.enable_x64(dtype is np.uint64):
        labels = np.arange(8).astype(dtype) % 4 - dtype(1)
        where = np.arange(8) != 5
        got = blockwise.batch_hard_loss(vectors(8), labels, where=where)
        expected = blockwise.batch_hard_loss(vectors(8), np.arange(8) % 4, where=where)
    assert got == expected


def test_both_ways_are_taken():
    """What these tests rely on: some of their classes are few, and some many."""
    most = {k: np.bincount(v).max() - 1 for k, v in LABELS.items()}
    assert most["few"] <= MAX_TILE_POSITIVES < most["many"]
    assert most["uneven"] <= MAX_TILE_POSITIVES < most["one large"]
