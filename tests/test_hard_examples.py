"""Hard examples of a whole data set against sorting in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from problems import unless_slow

import tripletjax as tj
from tripletjax import hard_examples
from tripletjax.retrieval import rankings

METRICS = {
    tj.euclidean: oracles.euclidean,
    tj.squared_euclidean: oracles.squared_euclidean,
    tj.manhattan: oracles.manhattan,
}


def grid(random, n):
    """Vectors on a grid, so that ties and duplicates are frequent."""
    return random.integers(0, 4, (n, 3)).astype(np.float32)


def check(mined, d, expected):
    """Compare `HardExamples` with the oracle's indices and exclusions."""
    k = mined.indices.shape[1]
    for a, (indices, counts, _) in enumerate(expected):
        padding = [-1] * (k - len(indices))
        np.testing.assert_array_equal(mined.indices[a], indices + padding)
        np.testing.assert_array_equal(mined.valid[a], np.arange(k) < len(indices))
        far = [np.inf] * len(padding)
        distances = [d[a][j] for j in indices] + far
        np.testing.assert_allclose(mined.distances[a], distances, rtol=1e-6)
        got = {name: int(x[a]) for name, x in mined.excluded._asdict().items()}
        assert got == counts


@pytest.mark.parametrize("metric", unless_slow(METRICS, [tj.euclidean]))
@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**32 - 1),
    classes=st.sampled_from([1, 4, 30]),
    margin=st.sampled_from([None, -1.0, 0.0, 1.0]),
    relative=st.sampled_from([None, 0.0, 0.5]),
    farthest=st.booleans(),
)
def test_negatives_are_sorted_ones(metric, seed, classes, margin, relative, farthest):
    if metric is tj.euclidean and relative:
        # At 1.5 sqrt(8) = sqrt(18) rounding would decide; no two distances of the grid
        # have the ratio 1.375.
        relative = 0.375
    random = np.random.default_rng(seed)
    x, labels = grid(random, 30), random.integers(0, classes, 30)
    where = random.random(30) < 0.8
    d = oracles.matrix(METRICS[metric], x)
    masks = oracles.pair_masks(labels, where=where)
    for range_min, range_max in ((0, None), (2, 9), (3, None)):
        mined = tj.mine_hard_negatives(
            np.where(where[:, None], x, np.nan),
            labels,
            k=4,
            range_min=range_min,
            range_max=range_max,
            margin=margin,
            relative_margin=relative,
            farthest_positive=farthest,
            metric=metric,
            where=where,
        )
        expected = oracles.hard_examples(
            d,
            *masks,
            4,
            range_min=range_min,
            range_max=range_max,
            margin=margin,
            relative=None if relative is None else lambda d_ap: relative * d_ap,
            farthest=farthest,
        )
        check(mined, d, expected)


@pytest.mark.parametrize("of_masks", [False, True])
@settings(max_examples=25)
@given(seed=st.integers(0, 2**32 - 1))
def test_queries_and_references(of_masks, seed):
    random = np.random.default_rng(seed)
    x, y = grid(random, 9), grid(random, 40)
    labels, others = random.integers(0, 4, 9), random.integers(0, 4, 40)
    positions, real = random.integers(-1, 40, 9), random.random(40) < 0.7
    options = {"reference_labels": others, "positions": positions}
    masks = oracles.pair_masks(
        labels, others, positions=positions, reference_where=real
    )
    d = oracles.matrix(oracles.euclidean, x, y)
    chosen = tj.PairMasks(*map(np.asarray, masks)) if of_masks else labels
    if of_masks:
        options = {}
    options |= {"references": y, "reference_where": real}
    mined = tj.mine_hard_negatives(x, chosen, k=45, margin=0.0, **options)
    check(mined, d, oracles.hard_examples(d, *masks, 45, margin=0.0))
    mined = tj.mine_hard_positives(x, chosen, k=3, range_min=1, range_max=3, **options)
    expected = oracles.hard_examples(
        d, *masks, 3, of_positives=True, range_min=1, range_max=3
    )
    check(mined, d, expected)


@pytest.mark.slow
@settings(max_examples=25)
@given(seed=st.integers(0, 2**32 - 1), farthest=st.booleans())
def test_triplets_have_one_positive(seed, farthest):
    random = np.random.default_rng(seed)
    x, labels = grid(random, 30), random.integers(0, 8, 30)
    mined = tj.mine_triplets(x, labels, k=3, margin=0.0, farthest_positive=farthest)
    d = oracles.matrix(oracles.euclidean, x)
    masks = oracles.pair_masks(labels)
    negatives = oracles.hard_examples(d, *masks, 3, margin=0.0, farthest=farthest)
    positives = oracles.hard_examples(d, *masks, 30, of_positives=True)
    for a, ((indices, _, _), (from_far, _, _)) in enumerate(zip(negatives, positives)):
        if not from_far:
            assert not mined.valid[a].any()
            continue
        d_ap = d[a][from_far[0 if farthest else -1]]
        positive = min(j for j in from_far if d[a][j] == d_ap)
        count = len(indices)
        np.testing.assert_array_equal(mined.valid[a], np.arange(3) < count)
        np.testing.assert_array_equal(mined.anchor[a], [a] * 3)
        np.testing.assert_array_equal(mined.positive[a, :count], positive)
        np.testing.assert_array_equal(mined.negative[a, :count], indices)
        np.testing.assert_allclose(mined.positive_distances[a, :count], d_ap, 1e-6)


def test_triplets_of_one_batch_are_batch_hard():
    random = np.random.default_rng(0)
    x, labels = random.normal(size=(50, 5)).astype(np.float32), np.arange(50) % 7
    mined = tj.mine_triplets(x, labels, farthest_positive=True).triplets
    expected = tj.batch_hard_triplets(tj.euclidean(x), labels)
    for got, value in zip(mined, expected):
        np.testing.assert_array_equal(got[:, 0], value)


@pytest.mark.slow
def test_margins_of_the_cosine_similarity_are_those_of_nv_retriever():
    random = np.random.default_rng(0)
    x, labels = random.normal(size=(60, 4)), np.arange(60) % 9
    d = oracles.matrix(oracles.cosine, x)
    masks = oracles.pair_masks(labels)
    s = 1 - d
    mined = tj.mine_hard_negatives(
        x, labels, k=60, relative_margin=0.05, metric=tj.cosine
    )
    for a in range(60):
        s_ap = max(s[a][p] for p in range(60) if masks[0][a][p])
        below = {n for n in range(60) if masks[1][a][n] and s[a][n] <= 0.95 * s_ap}
        assert s_ap > 0
        assert set(np.asarray(mined.indices[a][mined.valid[a]]).tolist()) == below
    check(
        tj.mine_hard_negatives(x, labels, k=5, margin=-0.1, metric=tj.cosine),
        d,
        oracles.hard_examples(d, *masks, 5, margin=-0.1),
    )


def test_one_class_has_no_negative():
    mined = tj.mine_hard_negatives(np.eye(4), [1, 1, 1, 1], k=2, margin=0.1)
    assert not mined.valid.any()
    assert (mined.indices == -1).all()
    assert jnp.isposinf(mined.distances).all()
    assert not any(x.any() for x in mined.excluded)


def test_distinct_labels_have_no_positive():
    mined = tj.mine_hard_negatives(np.eye(4), np.arange(4), k=3, margin=9.0)
    assert mined.valid.all()
    assert not tj.mine_triplets(np.eye(4), np.arange(4)).valid.any()
    assert not tj.mine_hard_positives(np.eye(4), np.arange(4), k=1).valid.any()


@pytest.mark.parametrize("n", [60, 90])
@pytest.mark.parametrize("metric", [tj.euclidean, tj.cosine])
def test_duplicates_are_counted(n, metric):
    """More than `MOST_NEAR` pairs of a row, and fewer."""
    vector = np.float32([0.1, 0.7, 1 / 3])
    x = np.concatenate([np.tile(vector, (n, 1)), np.eye(3, dtype=np.float32)])
    labels = np.arange(n + 3) % 2
    for count in (n, 20):
        x[count:n] = np.random.default_rng(0).normal(size=(n - count, 3))
        mined = tj.mine_hard_negatives(x, labels, k=5, metric=metric)
        assert (mined.distances > 0).all()
        np.testing.assert_array_equal(mined.excluded.duplicates[:count], count // 2)
        others = np.sum(labels[:count, None] != labels[count:], axis=1)
        left = np.minimum(others, 5)
        np.testing.assert_array_equal(mined.valid[:count].sum(axis=1), left)


def test_near_duplicates_are_in_order():
    """Where inner products have no digits left."""
    random = np.random.default_rng(0)
    x = np.zeros((30, 8), np.float32)
    x[:, 0] = random.normal(size=30)
    x[:20, 0] = 1
    x[:20, 1] = 1e-5 * (1 + random.permutation(20))
    labels = np.arange(30)
    labels[1] = 0
    mined = tj.mine_hard_negatives(x, labels, k=5, margin=0.0)
    d = oracles.matrix(oracles.euclidean, x)
    masks = oracles.pair_masks(labels)
    expected = oracles.hard_examples(d, *masks, 5, margin=0.0)
    # From the other vectors all of these are equally far up to rounding.
    check(jax.tree.map(lambda a: a[:20], mined), d, expected[:20])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_vectors_that_are_not_finite_are_never_mined(value):
    random = np.random.default_rng(0)
    x, labels = random.normal(size=(20, 3)).astype(np.float32), np.arange(20) % 4
    x[3] = value
    mined = tj.mine_hard_negatives(x, labels, k=20, margin=0.0)
    assert not mined.valid[3].any()
    assert mined.excluded.not_finite[3] == 15
    assert not (mined.indices == 3).any()
    finite = np.arange(20) != 3
    d = oracles.matrix(oracles.euclidean, np.where(finite[:, None], x, 0))
    d[3], d[:, 3] = np.inf, np.inf
    masks = oracles.pair_masks(labels)
    check(mined, d, oracles.hard_examples(d, *masks, 20, margin=0.0))


def test_no_anchor_is_real():
    mined = tj.mine_triplets(np.eye(4), [0, 0, 1, 1], k=2, where=np.zeros(4, bool))
    assert not mined.valid.any()
    assert not any(x.any() for x in mined.excluded)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision(dtype):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(40, 6)), dtype)
    labels = np.arange(40) % 5
    got = tj.mine_hard_negatives(x, labels, k=3, margin=0.1)
    assert got.distances.dtype == jnp.float32
    expected = tj.mine_hard_negatives(x.astype(jnp.float32), labels, k=3, margin=0.1)
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def blobs(n=300):
    random = np.random.default_rng(1)
    labels = random.integers(0, 12, n)
    return grid(random, n) + labels[:, None] % 3, labels


@pytest.mark.slow
def test_blocks_and_tiles_change_nothing(monkeypatch):
    x, labels = blobs()
    options = {"k": 6, "range_max": 40, "margin": -0.5, "key": jax.random.key(3)}
    expected = tj.mine_hard_negatives(x, labels, **options)
    monkeypatch.setattr(rankings, "COLUMNS", 64)
    monkeypatch.setattr(rankings, "MOST_ROWS", 50)
    monkeypatch.setattr(hard_examples, "MOST_NEAR", 1)
    got = tj.mine_hard_negatives(x, labels, **options | {"k": 7})
    masks = oracles.pair_masks(labels)
    d = oracles.matrix(oracles.euclidean, x)
    for a, (_, counts, left) in enumerate(
        oracles.hard_examples(d, *masks, 7, range_max=40, margin=-0.5)
    ):
        valid = got.valid[a]
        mined = np.asarray(got.indices[a][valid]).tolist()
        assert len(set(mined)) == len(mined) == min(7, len(left))
        assert set(mined) <= set(left)
        assert (np.diff(got.distances[a][valid]) >= 0).all()
        # The draw is the same in other blocks: one more is drawn.
        fewer = np.asarray(expected.indices[a][expected.valid[a]]).tolist()
        assert set(fewer) <= set(mined)
        assert len(fewer) == min(6, len(left))
        assert int(got.excluded.range_max[a]) == counts["range_max"]


def test_draws_are_uniform():
    x = np.arange(8.0)[:, None]
    labels = np.array([0, 1, 1, 1, 1, 1, 1, 0])

    def draw(key):
        options = {"range_min": 1, "range_max": 5, "key": key}
        return tj.mine_hard_negatives(x, labels, k=2, **options).indices[0]

    drawn = jax.vmap(draw)(jax.random.split(jax.random.key(0), 2000))
    counts = np.bincount(np.ravel(drawn), minlength=8)
    np.testing.assert_array_equal(counts[[0, 1, 6, 7]], 0)
    # Four standard deviations.
    np.testing.assert_allclose(counts[2:6], 1000, atol=90)


@pytest.mark.parametrize("n", unless_slow([64, 61], [61]))
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_devices_share_the_anchors(kind, n):
    x, labels = blobs(n)
    options = {"k": 3, "range_max": 20, "margin": -1.0, "key": jax.random.key(0)}
    expected = [
        tj.mine_hard_negatives(x, labels, **options),
        tj.mine_triplets(x, labels, k=2, relative_margin=-0.5),
    ]
    mesh = jax.make_mesh((4,), ("data",), axis_types=(kind,))
    with jax.set_mesh(mesh):
        if n % 4 == 0:
            x, labels = (
                jax.device_put(jnp.asarray(a), NamedSharding(mesh, P("data")))
                for a in (x, labels)
            )
        got = [
            tj.mine_hard_negatives(x, labels, **options, axis_name="data"),
            tj.mine_triplets(x, labels, k=2, relative_margin=-0.5, axis_name="data"),
        ]
    jax.tree.map(np.testing.assert_array_equal, got, expected)


@pytest.mark.slow
def test_inside_shard_map():
    x, labels = blobs(64)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    mapped = jax.shard_map(
        lambda x, y: tj.mine_hard_positives(x, y, k=3, axis_name="data"),
        mesh=mesh,
        in_specs=P("data"),
        out_specs=P("data"),
    )
    got = jax.jit(mapped)(x, labels)
    expected = tj.mine_hard_positives(x, labels, k=3)
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_margins_are_traced():
    x, labels = blobs(40)
    margins = jnp.array([-1.0, 0.0, 1.0])
    got = jax.jit(jax.vmap(lambda m: tj.mine_hard_negatives(x, labels, k=3, margin=m)))(
        margins
    )
    expected = [tj.mine_hard_negatives(x, labels, k=3, margin=m) for m in margins]
    expected = jax.tree.map(lambda *leaves: np.stack(leaves), *expected)
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_strict_promotion():
    x, labels = blobs(20)
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        options = {"margin": 0.1, "relative_margin": 0.1}
        assert tj.mine_triplets(x, labels, k=2, **options).valid.any()


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"embeddings": np.ones(4)}, ValueError, "embeddings must be"),
        ({"embeddings": np.ones((2, 4, 3))}, ValueError, "jax.vmap"),
        ({"labels": [0, 1]}, ValueError, r"labels has shape \(2,\).*4 embeddings"),
        ({"labels": [0.0, 1, 1, 0]}, TypeError, "labels must be integers"),
        ({"references": np.eye(4)}, ValueError, "go together"),
        ({"k": 0}, ValueError, "k must be at least 1, got 0"),
        ({"k": 1.5}, TypeError, "k must be an integer"),
        ({"range_min": -1}, ValueError, "range_min must be at least 0, got -1"),
        ({"range_min": 3, "range_max": 3}, ValueError, "range_max must be above"),
        ({"key": jax.random.key(0)}, ValueError, "key requires range_max"),
        ({"margin": np.nan}, ValueError, "margin must be finite, got nan"),
        ({"margin": "much"}, TypeError, "margin must be numeric, got dtype"),
        ({"relative_margin": [0.1, 0.2]}, ValueError, "relative_margin must be a scal"),
        ({"positions": [0, 1]}, ValueError, "positions"),
        ({"where": [1, 1, 1, 0]}, TypeError, "where must be boolean"),
        ({"metric": "euclidean"}, TypeError, "metric must be callable"),
        ({"farthest_positive": 1}, TypeError, "farthest_positive must be a bool"),
        ({"axis_name": "data"}, ValueError, "no such mesh axis"),
        ({"embeddings": tj.euclidean(np.eye(4))}, ValueError, "embeddings must be vec"),
    ],
)
@pytest.mark.parametrize("mine", [tj.mine_hard_negatives, tj.mine_triplets])
def test_bad_input_is_named(mine, change, error, words):
    options = {"embeddings": np.eye(4), "labels": [0, 0, 1, 1], "k": 2} | change
    with pytest.raises(error, match=words):
        mine(options.pop("embeddings"), options.pop("labels"), **options)
