"""One number on every mesh: none, Auto, Explicit, and inside shard_map."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from problems import BUILT_IN, LOSSES, batch, in_lanes, unless_slow

import tripletjax as tj
from tripletjax._pairwise import block_sizes

every_loss = pytest.mark.parametrize("name", unless_slow(BUILT_IN, ["batch hard"]))
KINDS = AxisType.Auto, AxisType.Explicit
N = 32


@pytest.fixture
def loss(name):
    return LOSSES[name][0]


def mesh(kind, shape=(8,), names=("data",)):
    return jax.make_mesh(shape, names, axis_types=(kind,) * len(shape))


def value_and_gradient(loss, x, labels):
    return jax.value_and_grad(lambda x: loss(tj.euclidean(x), labels, margin=0.3))(x)


@in_lanes(
    ("name", "kind", "inside_jit"),
    itertools.product(BUILT_IN, KINDS, [False, True]),
    quick=lambda name, kind, inside_jit: name == "batch hard" and inside_jit,
    slow=lambda name, kind, inside_jit: name == "batch hard" or inside_jit,
)
def test_sharded_batch(loss, kind, inside_jit):
    x, labels = batch(N)
    run = lambda x, labels: value_and_gradient(loss, x, labels)  # noqa: E731
    expected = jax.jit(run)(x, labels)
    sharding = NamedSharding(mesh(kind), PartitionSpec("data"))
    x, labels = jax.device_put((x, labels), sharding)
    # Outside jit, JAX differentiates nothing on an Explicit mesh that is not set.
    with jax.set_mesh(sharding.mesh):
        got = (jax.jit(run) if inside_jit else run)(x, labels)
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-5)
    np.testing.assert_allclose(got[1], expected[1], atol=1e-6)


def test_explicit_mesh_as_the_context():
    x, labels = batch(N)
    expected = tj.batch_hard_loss(tj.euclidean(x), labels)
    with jax.set_mesh(mesh(AxisType.Explicit, (4, 2), ("data", "model"))):
        x = jax.device_put(x, PartitionSpec("data", None))
        distances = tj.euclidean(x)
        assert distances.sharding.spec == PartitionSpec("data", None)
        terms = tj.batch_hard_loss(distances, labels, reduce_fn=None)
        assert terms.total.sharding.spec == PartitionSpec("data")
        got = tj.batch_hard_loss(distances, labels)
        np.testing.assert_allclose(got, expected, rtol=1e-5)
        vectors = [jax.device_put(batch(N, seed=s)[0], x.sharding) for s in (1, 2, 3)]
        loss = tj.triplet_margin_loss(*vectors)
    expected = tj.triplet_margin_loss(*map(np.asarray, vectors))
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("inside_jit", [False, True])
def test_explicit_mesh_that_is_not_set(inside_jit):
    x, labels = batch(N)
    sharding = NamedSharding(mesh(AxisType.Explicit), PartitionSpec("data"))
    loss = lambda x, y: tj.batch_all_loss(tj.euclidean(x), y)  # noqa: E731
    expected = loss(x, labels)
    got = (jax.jit(loss) if inside_jit else loss)(
        *jax.device_put((x, labels), sharding)
    )
    np.testing.assert_allclose(got, expected, rtol=1e-5)


@pytest.mark.slow
def test_explicit_miners_and_metrics():
    x, labels = batch(N)
    d = tj.euclidean(x)
    sharding = NamedSharding(mesh(AxisType.Explicit), PartitionSpec("data"))
    sharded_d, sharded_labels = jax.device_put((d, labels), sharding)
    for got, expected in (
        (
            tj.all_triplets(sharded_labels, size=64),
            tj.all_triplets(labels, size=64),
        ),
        (
            tj.random_triplets(jax.random.key(0), sharded_labels),
            tj.random_triplets(jax.random.key(0), labels),
        ),
        (
            tj.batch_semi_hard_triplets(sharded_d, sharded_labels),
            tj.batch_semi_hard_triplets(d, labels),
        ),
        (
            tj.retrieval.evaluate(jax.device_put(x, sharding), sharded_labels),
            tj.retrieval.evaluate(x, labels),
        ),
    ):
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-6), got, expected
        )


@every_loss
def test_inside_shard_map(loss):
    """Each device takes its own rows against all: the terms add up to the whole."""
    x, labels = batch(N)
    expected = loss(tj.euclidean(x), labels, margin=0.3)
    expected_total = loss(tj.euclidean(x), labels, margin=0.3, reduce_fn=None).total

    def local(x, labels):
        everyone = jax.lax.all_gather(x, "data", tiled=True)
        all_labels = jax.lax.all_gather(labels, "data", tiled=True)
        positions = jax.lax.axis_index("data") * len(x) + jnp.arange(len(x))
        terms = loss(
            tj.euclidean(x, everyone),
            labels,
            reference_labels=all_labels,
            positions=positions,
            margin=0.3,
            reduce_fn=None,
        )
        summed = jax.tree.map(lambda t: jax.lax.psum(t.sum(), "data"), terms)
        return terms.total, summed

    spec = PartitionSpec("data")
    total, summed = jax.shard_map(
        local,
        mesh=mesh(AxisType.Auto),
        in_specs=(spec, spec),
        out_specs=(spec, PartitionSpec()),
    )(x, labels)
    np.testing.assert_allclose(total, expected_total, atol=1e-6)
    means = [tj.mean_active(summed), tj.mean_valid(summed)]
    assert np.isclose(means, expected, rtol=1e-5).any()


BLOCKWISE = {
    "all": tj.blockwise.batch_all_loss,
    "hard": tj.blockwise.batch_hard_loss,
    "semi-hard": tj.blockwise.batch_semi_hard_loss,
}
SHAPES = {(1,): ("data",), (2,): ("data",), (8,): ("data",), (4, 2): ("data", "model")}
ROWS = PartitionSpec("data")


def by_axis_name(function, kind, shape):
    """Called from outside shard_map, with the axis to split the work over."""
    one = functools.partial(function, axis_name="data")
    return one, mesh(kind, shape, SHAPES[shape])


def by_layout(function, kind, shape):
    """Called with arrays that are laid out over the axis."""
    return function, mesh(kind, shape, SHAPES[shape])


def by_shard_map(function, kind, shape):
    on = mesh(kind, shape, SHAPES[shape])
    one = functools.partial(function, axis_name="data")

    mapped = jax.shard_map(
        lambda x, labels, real: one(x, labels, where=real),
        mesh=on,
        in_specs=(ROWS,) * 3,
        out_specs=PartitionSpec(),
    )
    return lambda x, labels, where: mapped(x, labels, where), on


WAYS = [
    (by_axis_name, AxisType.Auto),
    (by_axis_name, AxisType.Explicit),
    (by_layout, AxisType.Explicit),
    (by_layout, AxisType.Auto),
    (by_shard_map, AxisType.Auto),
    (by_shard_map, AxisType.Explicit),
]
ALL_WAYS = [
    (name, shape, *way)
    for name in BLOCKWISE
    for shape in SHAPES
    for way in WAYS
    # One loss shows what holds for all, and many devices what holds for few.
    if (way in WAYS[::2] and (name == "hard" or shape == (4, 2)))
    or (name == "hard" and shape == (8,))
]
QUICK_WAYS = [("hard", (8,), *WAYS[1])]
# Each loss on an Auto and an Explicit mesh, each way on one of them.
SLOW_WAYS = [
    ("hard", (8,), *WAYS[3]),
    ("hard", (8,), *WAYS[4]),
    ("hard", (8,), *WAYS[5]),
    ("all", (4, 2), *WAYS[0]),
    ("all", (4, 2), *WAYS[2]),
    ("semi-hard", (4, 2), *WAYS[0]),
    ("semi-hard", (4, 2), *WAYS[2]),
]
every_way = pytest.mark.parametrize(
    "case",
    unless_slow(ALL_WAYS, QUICK_WAYS, slow=SLOW_WAYS),
    ids=lambda case: f"{case[0]}, {case[1]}, {case[2].__name__}, {case[3]}",
)


@functools.cache
def on_one_device(name):
    """A loss, what it is given, and its value and gradient."""
    x, labels = (np.asarray(a) for a in batch(40))
    real = np.arange(40) > 12
    loss = functools.partial(BLOCKWISE[name], margin=0.3)
    expected = jax.value_and_grad(lambda x: loss(x, labels, where=real))(x)
    return loss, (x, labels, real), expected


@every_way
def test_blockwise_losses(case):
    """Also where a device has no real anchor at all."""
    name, shape, way, kind = case
    loss, (x, labels, real), expected = on_one_device(name)
    run, on = way(loss, kind, shape)
    with jax.set_mesh(on):
        put = jax.device_put((x, labels, real), NamedSharding(on, ROWS))
        got = jax.jit(jax.value_and_grad(lambda x, y, w: run(x, y, where=w)))(*put)
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-5)
    np.testing.assert_allclose(got[1], expected[1], atol=1e-6)


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(KINDS[0], marks=pytest.mark.full),
        pytest.param(KINDS[1], marks=pytest.mark.slow),
    ],
)
def test_what_does_not_divide(kind):
    """Rows that cannot be shared out evenly, of anchors and of references."""
    x, labels = (np.asarray(a) for a in batch(37))
    gallery, others = (np.asarray(a) for a in batch(19, seed=1))
    options = {"references": gallery, "reference_labels": others}
    calls = {
        "hard": lambda **o: tj.blockwise.batch_hard_triplets(x, labels, **o),
        "hard, gallery": lambda **o: tj.blockwise.batch_hard_triplets(
            x, labels, **options, **o
        ),
        "semi-hard": lambda **o: tj.blockwise.batch_semi_hard_triplets(
            x, labels, size=300, **o
        ),
        "left out": lambda **o: tj.blockwise.batch_semi_hard_triplets(
            x, labels, size=30, **o
        ),
        "terms": lambda **o: tj.blockwise.batch_hard_loss(
            x, labels, reduce_fn=None, **options, **o
        ),
        "own reduction": lambda **o: tj.blockwise.batch_hard_loss(
            x, labels, reduce_fn=lambda terms: (terms.total**2).sum(), **o
        ),
        "retrieval": lambda **o: tj.retrieval.evaluate(x, labels, **options, **o),
        "each query": lambda **o: tj.retrieval.evaluate(x, labels, reduce_fn=None, **o),
        "recall": lambda **o: tj.retrieval.recall_at_k(x, labels, **o),
    }
    for name, call in calls.items():
        with jax.set_mesh(mesh(kind)):
            got = call(axis_name="data")
        close = functools.partial(np.testing.assert_allclose, rtol=1e-5, err_msg=name)
        jax.tree.map(close, got, call())


@in_lanes(
    ("kind", "classes", "shape"),
    [
        (kind, *case)
        for kind in KINDS
        for case in [(9, (8,)), (2, (8,)), (9, (2,)), (2, (4, 2))]
    ],
    slow=[(KINDS[0], 2, (4, 2)), (KINDS[1], 9, (8,))],
)
def test_metrics(kind, classes, shape):
    """As they lie, and inside shard_map; few and many of a class."""
    x, labels = (np.asarray(a) for a in batch(40))
    labels, real = labels % classes, np.arange(40) > 7
    evaluate = tj.retrieval.evaluate
    verify = functools.partial(tj.verification.evaluate, size=800)
    expected = (
        evaluate(x, labels, where=real),
        verify(x, labels, where=real),
    )
    on = mesh(kind, shape, ("data", "model")[: len(shape)])
    spread = jax.shard_map(
        lambda x, y, w: (
            evaluate(x, y, where=w, axis_name="data"),
            verify(x, y, where=w, axis_name="data"),
        ),
        mesh=on,
        in_specs=(ROWS,) * 3,
        out_specs=PartitionSpec(),
    )
    plain = lambda x, y, w: (evaluate(x, y, where=w), verify(x, y, where=w))  # noqa: E731
    with jax.set_mesh(on):
        put = jax.device_put((x, labels, real), NamedSharding(on, ROWS))
        for run in (plain, spread):
            got = jax.jit(run)(*put)
            close = functools.partial(np.testing.assert_allclose, rtol=1e-5)
            jax.tree.map(close, got, expected)


@pytest.mark.slow
@pytest.mark.parametrize("references", [False, True])
def test_devices_share_the_pairs_of_a_verification(references, monkeypatch):
    # Five blocks of eight: ten pairs of blocks or, of two kinds of vectors, 25.
    monkeypatch.setattr(block_sizes, "CPU", block_sizes.CPU._replace(tile=8))
    monkeypatch.setattr(block_sizes, "ACCELERATOR", block_sizes.CPU)
    x, labels = (np.asarray(a) for a in batch(40))
    given = {"embeddings": x, "labels": labels, "where": np.arange(40) % 7 > 0}
    if references:
        given |= {"references": x[::-1] + 1, "reference_labels": labels}
    verify = functools.partial(tj.verification.evaluate, size=400, fars=(0.1, 0.02))
    whole = jax.jit(lambda given: verify(**given))
    shared = jax.jit(
        jax.shard_map(
            lambda given: verify(**given, axis_name="data"),
            mesh=mesh(AxisType.Auto),
            in_specs=ROWS,
            out_specs=PartitionSpec(),
        )
    )

    def rounds(function):
        return set(re.findall(r"length=(\d+)", str(jax.make_jaxpr(function)(given))))

    every, share = ("25", "4") if references else ("10", "2")
    assert every in rounds(whole)
    assert every not in rounds(shared)
    assert share in rounds(shared)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-6)
    jax.tree.map(close, shared(given), whole(given))
    given["embeddings"] = np.where(np.arange(40)[:, None] == 30, np.nan, x)
    assert jnp.isnan(shared(given).area_under_roc)


COLLECTIVES = re.compile(
    r"= (.*?) (all-gather|all-to-all|reduce-scatter|all-reduce|collective-permute)"
    r"(?:-start)?\("
)


def operations(jaxpr):
    """Of the products; of branches, those of the least."""
    count = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            ((over,), _), _ = eqn.params["dimension_numbers"]
            count += 2 * eqn.outvars[0].aval.size * eqn.invars[0].aval.shape[over]
        inner = [
            operations(getattr(part, "jaxpr", part))
            for value in eqn.params.values()
            for part in (value if isinstance(value, tuple) else (value,))
            if hasattr(getattr(part, "jaxpr", part), "eqns")
        ]
        if inner:
            least = eqn.primitive.name == "cond"
            count += (min if least else sum)(inner) * eqn.params.get("length", 1)
    return count


@pytest.mark.parametrize("name", unless_slow(BLOCKWISE, [], slow=["all"]))
def test_each_device_does_its_share(name):
    n, d = 8192, 16
    x = jax.ShapeDtypeStruct((n, d), jnp.float32)
    labels = jax.ShapeDtypeStruct((n,), jnp.int32)
    loss, counts = BLOCKWISE[name], {}
    for devices in (1, 2, 4, 8):
        split = jax.shard_map(
            functools.partial(loss, axis_name="data"),
            mesh=mesh(AxisType.Auto, (devices,)),
            in_specs=ROWS,
            out_specs=PartitionSpec(),
        )
        step = jax.make_jaxpr(jax.value_and_grad(split))(x, labels)
        counts[devices] = operations(step.jaxpr)
    # Distances; of all triplets, gradients by both of a pair, too. Farthest negatives
    # are looked for in a loop whose rounds are not known, and counted once.
    products = 3 if name == "all" else 1
    for devices, count in counts.items():
        expected = products * 2 * n**2 * d / devices
        assert expected <= count < 1.02 * expected


@pytest.mark.parametrize("name", unless_slow(BLOCKWISE, [], slow=["hard", "all"]))
def test_communication(name):
    """Once forward and once back, of embeddings, and a few numbers."""
    on = mesh(AxisType.Explicit)
    rows = NamedSharding(on, ROWS)
    x = jax.ShapeDtypeStruct((2048, 64), jnp.float32, sharding=rows)
    labels = jax.ShapeDtypeStruct((2048,), jnp.int32, sharding=rows)
    with jax.set_mesh(on):
        step = jax.jit(jax.value_and_grad(BLOCKWISE[name]))
        text = step.lower(x, labels).compile().as_text()
        exported = {
            platform: jax.export.export(step, platforms=[platform])(x, labels)
            for platform in ("cuda", "tpu")
        }
    found = [(kind, shape) for shape, kind in COLLECTIVES.findall(text)]
    of_vectors = sorted(kind for kind, shape in found if "64]" in shape)
    assert of_vectors == ["all-gather", "all-to-all"]
    assert sorted(kind for kind, shape in found if "64]" not in shape) == [
        "all-gather",  # labels
        "all-reduce",  # total and count
    ]
    for program in exported.values():
        text = program.mlir_module()
        assert len(re.findall(r"stablehlo.reduce_scatter", text)) == 1
        assert "stablehlo.all_to_all" not in text


def test_misuse_is_told():
    x, labels = (np.asarray(a) for a in batch(N))
    loss = functools.partial(tj.blockwise.batch_hard_loss, axis_name="data")
    with pytest.raises(ValueError, match="no such mesh axis is mapped over here"):
        loss(x, labels)
    same = jax.shard_map(
        loss,
        mesh=mesh(AxisType.Auto),
        in_specs=(PartitionSpec(),) * 2,
        out_specs=PartitionSpec(),
    )
    with pytest.raises(ValueError, match="are the same on every device along data"):
        same(x, labels)
    gallery = jax.shard_map(
        lambda x, y, r: loss(x, y, references=r, reference_labels=y),
        mesh=mesh(AxisType.Auto),
        in_specs=(ROWS, ROWS, PartitionSpec()),
        out_specs=PartitionSpec(),
    )
    with pytest.raises(ValueError, match="references are the same on every device"):
        gallery(x, labels, x[:4])
    with (
        jax.set_mesh(mesh(AxisType.Auto)),
        pytest.raises(ValueError, match=r"embeddings must be \[n, d\] for axis_name"),
    ):
        loss(x[None], labels)
    with (
        jax.set_mesh(mesh(AxisType.Auto)),
        pytest.raises(ValueError, match="labels must have one row for each of the 32"),
    ):
        loss(x, labels[:-1])
    with (
        jax.set_mesh(mesh(AxisType.Auto)),
        pytest.raises(ValueError, match="margin must be finite and not negative"),
    ):
        loss(x, labels, margin=-1.0)
    masks = tj.pair_masks(labels[:-1])
    with (
        jax.set_mesh(mesh(AxisType.Auto)),
        pytest.raises(ValueError, match="cannot be split over 8 devices"),
    ):
        loss(x[:-1], masks)


def test_masks_over_a_mesh():
    x, labels = batch(N)
    masks = tj.pair_masks(labels)
    with jax.set_mesh(mesh(AxisType.Auto)):
        got = tj.blockwise.batch_hard_loss(x, masks, axis_name="data")
    np.testing.assert_allclose(got, tj.blockwise.batch_hard_loss(x, masks), rtol=1e-5)


@pytest.mark.slow
def test_averaging_where_nothing_is_checked():
    """Without check_vma gradients taken inside count every device: pmean undoes it."""
    x, labels = batch(N)
    weight = jnp.eye(x.shape[1])
    loss = tj.blockwise.batch_hard_loss
    expected = jax.grad(lambda w: loss(x @ w, labels))(weight)
    for check_vma in (True, False):

        def inside(w, x, labels):
            of = lambda w: loss(x @ w, labels, axis_name="data")  # noqa: E731
            return jax.lax.pmean(jax.grad(of)(w), "data")

        got = jax.shard_map(
            inside,
            mesh=mesh(AxisType.Auto),
            in_specs=(PartitionSpec(), ROWS, ROWS),
            out_specs=PartitionSpec(),
            check_vma=check_vma,
        )(weight, x, labels)
        np.testing.assert_allclose(got, expected, atol=1e-6)


@pytest.mark.slow
def test_a_loss_has_no_name_of_jax():
    """What JAX wraps around a loss would be given it, and lower the loss itself."""
    x, labels = batch(N)
    for loss, first in (
        (tj.blockwise.batch_all_loss, x),
        (tj.batch_all_loss, tj.euclidean(x)),
    ):
        lowered = jax.jit(jax.value_and_grad(loss)).lower(first, labels)
        assert [leaf.shape for leaf in jax.tree.leaves(lowered.out_info)] == [
            (),
            first.shape,
        ]
