"""The cross-batch memory keeps what it should, and losses see it as recomputed."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from problems import in_lanes, unless_slow

import tripletjax as tj

LOSSES = {
    "all": tj.blockwise.batch_all_loss,
    "hard": tj.blockwise.batch_hard_loss,
    "semi-hard": tj.blockwise.batch_semi_hard_loss,
}


def draw(n, seed=0, dim=4):
    random = np.random.default_rng(seed)
    x = random.normal(size=(n, dim)).astype(np.float32)
    return x, random.integers(0, 5, n).astype(np.int32)


def filled(size=12, sizes=(5, 5, 5), dim=4):
    memory = tj.memory.create(size, dim)
    for seed, n in enumerate(sizes):
        memory = tj.memory.push(memory, *draw(n, seed + 1, dim))
    return memory


@settings(max_examples=30)
@given(
    st.sampled_from((1, 3, 6)),
    st.lists(st.tuples(st.sampled_from((1, 4, 7)), st.integers(0, 127)), max_size=6),
)
def test_keeps_the_last(size, batches):
    memory, kept, numbers = tj.memory.create(size, 2), [], itertools.count(1)
    for n, mask in batches:
        labels = np.array([next(numbers) for _ in range(n)])
        where = np.array([bool(mask >> i & 1) for i in range(n)])
        x = np.stack([labels, -labels], 1).astype(np.float32)
        memory = tj.memory.push(memory, x, labels, where=where)
        kept += labels[where].tolist()
    position = len(kept) % size
    assert memory.position == position
    expected = sorted(kept[-size:])
    assert sorted(memory.labels[memory.valid].tolist()) == expected
    np.testing.assert_array_equal(
        memory.embeddings[memory.valid][:, 0], memory.labels[memory.valid]
    )
    if len(kept) >= size:
        # From the slot that is written next, they are in order of age.
        np.testing.assert_array_equal(np.roll(memory.labels, -position), kept[-size:])


@pytest.mark.parametrize("loss", unless_slow(LOSSES.values(), [LOSSES["hard"]]))
def test_is_what_is_recomputed(loss):
    """With masks of everything at hand, written down without a memory."""
    x, labels = draw(8)
    batches = [draw(5, seed) for seed in (1, 2, 3)]
    old = np.concatenate([x for x, _ in batches])[-12:]
    old_labels = np.concatenate([y for _, y in batches])[-12:]

    def expected(x):
        distances = tj.euclidean(x, jnp.concatenate([x, old]))
        same = labels[:, None] == np.concatenate([labels, old_labels])
        itself = np.eye(8, 20, dtype=bool)
        masks = tj.PairMasks(same & ~itself, ~same)
        matrix = {
            tj.blockwise.batch_all_loss: tj.batch_all_loss,
            tj.blockwise.batch_hard_loss: tj.batch_hard_loss,
            tj.blockwise.batch_semi_hard_loss: tj.batch_semi_hard_loss,
        }
        return matrix[loss](distances, masks, margin=0.3)

    def got(x):
        pairs = tj.memory.references(filled(), x, labels)
        return loss(x, labels, margin=0.3, **pairs)

    values, expected = jax.value_and_grad(got)(x), jax.value_and_grad(expected)(x)
    np.testing.assert_allclose(values[0], expected[0], rtol=1e-5)
    np.testing.assert_allclose(values[1], expected[1], atol=1e-6)


def test_an_empty_memory_changes_nothing():
    x, labels = draw(8)
    where = np.arange(8) > 1
    pairs = tj.memory.references(tj.memory.create(64, 4), x, labels, where=where)
    got = tj.blockwise.batch_hard_loss(x, labels, where=where, **pairs)
    expected = tj.blockwise.batch_hard_loss(x, labels, where=where)
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_has_no_gradient():
    x, labels = draw(8)

    def through_memory(scale):
        memory = tj.memory.push(tj.memory.create(8, 4), x * scale, labels)
        pairs = tj.memory.references(memory, x, labels)
        return tj.blockwise.batch_all_loss(x, labels, margin=5.0, **pairs)

    value, gradient = jax.value_and_grad(through_memory)(2.0)
    assert value > 0
    assert gradient == 0


def test_what_is_kept_has_no_gradient_either_way():
    """Neither as it is written nor as references are made of it."""
    x, labels = draw(3)
    memory = tj.memory.create(4, 4)

    def written(x):
        return tj.memory.push(memory, x, labels).embeddings.sum()

    def read(embeddings):
        kept = memory._replace(embeddings=embeddings)
        return tj.memory.references(kept, x, labels)["references"].sum()

    for function, vectors in ((written, x), (read, memory.embeddings)):
        np.testing.assert_array_equal(jax.grad(function)(vectors), 0 * vectors)


def test_positions_count_along_the_references_of_all_devices():
    x, labels = draw(8)

    def local(x, labels):
        memory = jax.tree.map(
            lambda leaf: jax.lax.pcast(leaf, "data", to="varying"),
            tj.memory.create(3, 4),
        )
        pairs = tj.memory.references(memory, x, labels, axis_name="data")
        return pairs["references"], pairs["positions"]

    references, positions = jax.shard_map(
        local,
        mesh=jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,)),
        in_specs=(P("data"), P("data")),
        out_specs=P("data"),
    )(x, labels)
    assert references.shape == (20, 4)
    np.testing.assert_array_equal(references[positions], x)


def test_written_in_place_if_given_away():
    memory, batch = tj.memory.create(4096, 64), draw(32, dim=64)
    kept = tj.memory.push(memory, *batch)
    assert not memory.embeddings.is_deleted()
    push = jax.jit(tj.memory.push, donate_argnums=0)
    compiled = push.lower(memory, *batch).compile()
    whole = sum(leaf.nbytes for leaf in memory)
    assert compiled.memory_analysis().alias_size_in_bytes == whole
    assert compiled.memory_analysis().temp_size_in_bytes < whole / 10
    place = memory.embeddings.unsafe_buffer_pointer()
    given = push(memory, *batch)
    assert memory.embeddings.is_deleted()
    assert given.embeddings.unsafe_buffer_pointer() == place
    jax.tree.map(np.testing.assert_array_equal, given, kept)


def test_one_program_as_it_fills():
    step = jax.jit(tj.memory.push)
    memory = tj.memory.create(20, 4)
    for seed in range(9):
        memory = step(memory, *draw(7, seed))
    assert step._cache_size() == 1


def test_numbers_beyond_the_range_of_its_dtype():
    memory = tj.memory.create(5, 1, dtype=jnp.float16)
    x = np.float32([[1e5], [-1e5], [65_519.0], [np.inf], [np.nan]])
    memory = tj.memory.push(memory, x, np.arange(5))
    most = np.float32(np.finfo(np.float16).max)
    np.testing.assert_array_equal(
        np.float32(memory.embeddings[:, 0]), [most, -most, most, np.inf, np.nan]
    )


def test_bfloat16_and_rows_of_labels():
    memory = tj.memory.create(6, 4, dtype=jnp.bfloat16, label_shape=(3,))
    x, _ = draw(4)
    tags = np.eye(4, 3, dtype=np.int32)
    memory = tj.memory.push(memory, x, tags)
    assert memory.embeddings.dtype == jnp.bfloat16
    pairs = tj.memory.references(memory, x, tags)
    assert pairs["references"].dtype == jnp.float32
    masks = tj.pair_masks(
        tags,
        pairs["reference_labels"],
        positions=pairs["positions"],
        reference_where=pairs["reference_where"],
        match=lambda a, b: (a & b).any(),
    )
    np.testing.assert_array_equal(masks.positive[0], [False] * 4 + [True] + [False] * 5)


def test_in_scan_and_under_vmap():
    xs, ys = (np.stack(part) for part in zip(*[draw(5, s) for s in (1, 2, 3)]))
    last, _ = jax.lax.scan(
        lambda memory, batch: (tj.memory.push(memory, *batch), None),
        tj.memory.create(12, 4),
        (xs, ys),
    )
    jax.tree.map(np.testing.assert_array_equal, last, filled())
    both = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), tj.memory.create(12, 4))
    got = jax.vmap(tj.memory.push)(both, xs[:2], ys[:2])
    assert got.position.tolist() == [5, 5]
    np.testing.assert_array_equal(got.embeddings[1, :5], xs[1])


@in_lanes(
    ("name", "kind", "shape"),
    itertools.product(LOSSES, (AxisType.Auto, AxisType.Explicit), ((4,), (4, 2))),
    slow=[
        ("all", AxisType.Auto, (4,)),
        ("hard", AxisType.Explicit, (4, 2)),
        ("semi-hard", AxisType.Explicit, (4,)),
    ],
)
def test_split_over_devices(name, kind, shape):
    """Each device has a memory of its own part; the losses are of all of them."""
    loss = LOSSES[name]
    names = ("data", "model")[: len(shape)]
    mesh = jax.make_mesh(shape, names, axis_types=(kind,) * len(shape))
    batches = [draw(8, seed) for seed in range(4)]
    rows = NamedSharding(mesh, P("data"))

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(P("data"), P("data")), out_specs=P()
    )
    def split(x, labels):
        memory = jax.tree.map(
            lambda leaf: jax.lax.pcast(leaf, "data", to="varying"),
            tj.memory.create(5, 4),
        )
        for old in batches[1:]:
            first = jax.lax.axis_index("data") * 2
            part = [jax.lax.dynamic_slice_in_dim(jnp.asarray(a), first, 2) for a in old]
            memory = tj.memory.push(memory, *part)
        pairs = tj.memory.references(memory, x, labels, axis_name="data")
        return loss(x, labels, margin=0.3, axis_name="data", **pairs)

    # The order of slots within a memory of all changes nothing.
    memory = tj.memory.create(20, 4)
    for i in range(4):
        parts = zip(*[[a[2 * i : 2 * i + 2] for a in old] for old in batches[1:]])
        memory = tj.memory.push(memory, *[np.concatenate(part)[-5:] for part in parts])
    x, labels = batches[0]

    def of_all(x, axis_name=None):
        pairs = tj.memory.references(memory, x, labels)
        return loss(x, labels, margin=0.3, axis_name=axis_name, **pairs)

    expected = jax.value_and_grad(of_all)(x)
    with jax.set_mesh(mesh):
        put = jax.device_put((x, labels), rows)
        got = jax.jit(jax.value_and_grad(split))(*put)
        # One memory for all, called from outside shard_map.
        whole = jax.jit(jax.value_and_grad(lambda x: of_all(x, "data")))(put[0])
    for value, gradient in (got, whole):
        np.testing.assert_allclose(value, expected[0], rtol=1e-5)
        np.testing.assert_allclose(gradient, expected[1], atol=1e-6)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda m, x, y: tj.memory.create(0, 4), ValueError, "size must be at least 1"),
        (
            lambda m, x, y: tj.memory.create(4.0, 4),
            TypeError,
            "size must be an integer",
        ),
        (
            lambda m, x, y: tj.memory.create(4, 4, dtype=int),
            TypeError,
            "dtype must be a floating dtype",
        ),
        (
            lambda m, x, y: tj.memory.push(m, x[:, :3], y),
            ValueError,
            r"embeddings must be \[n, 4\]",
        ),
        (
            lambda m, x, y: tj.memory.push(m, x, y[:3]),
            ValueError,
            r"labels must be \[8\]",
        ),
        (
            lambda m, x, y: tj.memory.push(m, x, x[:, 0]),
            TypeError,
            "labels must be int",
        ),
        (
            lambda m, x, y: tj.memory.push(m, x, y.astype(np.uint32)),
            TypeError,
            "got dtype uint32",
        ),
        (lambda m, x, y: tj.memory.push(m._asdict(), x, y), TypeError, "be a Memory"),
        (
            lambda m, x, y: tj.memory.push(m, x, y, where=y[:2] > 0),
            ValueError,
            "where must have one entry for each of the 8 embeddings",
        ),
        (
            lambda m, x, y: tj.memory.references(m, x, y, axis_name="data"),
            ValueError,
            "axis_name is 'data'",
        ),
    ],
)
def test_wrong_use(call, error, words):
    with pytest.raises(error, match=words):
        call(tj.memory.create(6, 4), *draw(8))
