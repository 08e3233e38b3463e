"""Retrieval metrics against loops."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import tripletjax as tj
from tripletjax import retrieval
from tripletjax.retrieval import rankings


def assert_metrics(got, expected, rtol=1e-6):
    """Every expected metric, and recall at each expected k."""
    for name, value in expected.items():
        jax.tree.map(
            lambda a, b, name=name: np.testing.assert_allclose(
                a, b, rtol, err_msg=name
            ),
            getattr(got, name),
            value,
        )


@settings(max_examples=40)
@given(seed=st.integers(0, 2**32 - 1), gallery=st.booleans())
def test_metrics_are_their_definitions(seed, gallery):
    random = np.random.default_rng(seed)
    # On a grid, so that ties are frequent.
    x, y = random.integers(0, 3, (9, 2)), random.integers(0, 4, 9)
    options = {}
    if gallery:
        options = {
            "references": random.integers(0, 3, (7, 2)),
            "reference_labels": random.integers(0, 4, 7),
        }
    got = retrieval.evaluate(x, y, ks=[1, 3, 20], **options)
    assert_metrics(got, oracles.retrieval(x, y, (1, 3, 20), **options))


@pytest.mark.slow
def test_repeated_calls_are_traced_once():
    traces = []

    def distance(a, b):
        traces.append(None)
        return jnp.sum(jnp.abs(a - b))

    metric, x, labels = tj.Metric(paired=distance), np.eye(4), [0, 0, 1, 1]
    for function in (
        lambda: retrieval.evaluate(x, labels, metric=metric),
        lambda: retrieval.recall_at_k(x, labels, metric=metric),
        lambda: retrieval.nearest_neighbors(x, x, 2, metric=metric),
        lambda: retrieval.few_shot_accuracy(x, labels, x, labels, metric=metric),
    ):
        function()
        count = len(traces)
        function()
        assert 0 < count == len(traces)


def test_neighbors_in_order_with_ties_to_the_lower_index():
    x = jnp.array([[0.0], [2.0], [1.0], [-1.0], [1.0]])
    distances, indices = retrieval.nearest_neighbors(
        x[:2], x, 4, positions=jnp.array([0, 1])
    )
    np.testing.assert_array_equal(indices, [[2, 3, 4, 1], [2, 4, 0, 3]])
    np.testing.assert_array_equal(distances, [[1, 1, 1, 2], [1, 1, 2, 3]])


def test_more_queries_than_a_block_holds():
    x = np.random.default_rng(0).normal(size=(600, 4)).astype(np.float32)
    _, indices = jax.jit(lambda x: retrieval.nearest_neighbors(x, x, 3))(x)
    d = np.linalg.norm(x[:, None] - x[None], axis=-1)
    np.testing.assert_array_equal(indices, np.argsort(d, axis=1, kind="stable")[:, :3])


@settings(max_examples=25)
@given(seed=st.integers(0, 2**32 - 1))
def test_neighbors_are_those_of_loops(seed):
    random = np.random.default_rng(seed)
    # On a grid, so that ties are frequent.
    x, y = random.integers(0, 3, (9, 2)), random.integers(0, 3, (40, 2))
    positions, where = random.integers(-1, 40, 9), random.random(40) < 0.5
    distances, indices = retrieval.nearest_neighbors(
        x,
        np.where(where[:, None], y, np.nan),
        25,
        positions=positions,
        reference_where=where,
    )
    for i in range(9):
        ranked = sorted(
            (oracles.euclidean(x[i], y[j]), j)
            for j in range(40)
            if where[j] and j != positions[i]
        )
        ranked = (ranked + [(np.inf, -1)] * 25)[:25]
        np.testing.assert_allclose(distances[i], [d for d, _ in ranked], rtol=1e-6)
        np.testing.assert_array_equal(indices[i], [j for _, j in ranked])


def test_neighbors_over_several_tiles(monkeypatch):
    x, _ = clusters(n=300)
    expected = retrieval.nearest_neighbors(x, x, 7, positions=np.arange(300))
    monkeypatch.setattr(rankings, "COLUMNS", 64)
    monkeypatch.setattr(rankings, "MOST_ROWS", 50)
    got = retrieval.nearest_neighbors(x, x, 8, positions=np.arange(300))
    for a, b in zip(got, expected):
        np.testing.assert_array_equal(a[:, :7], b)


def test_neighbors_that_nearly_coincide_are_in_order():
    x = np.zeros((30, 8), np.float32)
    x[:, 0] = 1
    x[:, 1] = 1e-5 * np.random.default_rng(0).permutation(30)
    distances, indices = retrieval.nearest_neighbors(x[:5], x, 30)
    expected = np.argsort(np.abs(x[:5, None, 1] - x[:, 1]), axis=1, kind="stable")
    assert (np.diff(distances) >= 0).all()
    np.testing.assert_array_equal(indices[:, 0], np.arange(5))
    apart = np.abs(x[:5, None, 1] - x[:, 1])
    np.testing.assert_allclose(
        np.take_along_axis(apart, np.asarray(indices), 1),
        np.take_along_axis(apart, expected, 1),
    )


def test_neighbors_at_infinity():
    x = np.array([[0.0], [3e38], [1.0]], np.float32)
    distances, indices = retrieval.nearest_neighbors(x[:1], -x, 3)
    np.testing.assert_array_equal(indices, [[0, 2, 1]])
    assert not jnp.isnan(distances).any()


def test_neighbors_by_any_metric():
    x = np.array([[1.0, 0.0], [0.0, 1.0], [10.0, 0.1]])
    metric = tj.Metric(paired=lambda a, b: jnp.max(jnp.abs(a - b)))
    for chosen, expected in ((tj.cosine, 2), (metric, 1), (tj.manhattan, 1)):
        _, indices = retrieval.nearest_neighbors(x[:1], x[1:], 1, metric=chosen)
        assert indices == expected - 1


@pytest.mark.slow
def test_neighbors_split_over_devices():
    x, _ = clusters(n=240)
    expected = retrieval.nearest_neighbors(x, x, 5)
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((4,), ("data",), axis_types=(kind,))
        split = jax.device_put(jnp.asarray(x), NamedSharding(mesh, P("data")))
        with jax.set_mesh(mesh):
            got = jax.jit(lambda x: retrieval.nearest_neighbors(x, x, 5))(split)
        jax.tree.map(np.testing.assert_array_equal, got, expected)


def all_nan(metrics):
    return all(jnp.isnan(x).all() for x in jax.tree.leaves(metrics[:-1]))


def test_nothing_relevant():
    metrics = retrieval.evaluate(np.eye(3), [0, 1, 2])
    assert metrics.queries == 0
    assert all_nan(metrics)
    each = retrieval.evaluate(np.eye(3), [0, 1, 2], reduce_fn=None)
    assert not any(value.any() for value in jax.tree.leaves(each))


@pytest.mark.slow
def test_average_precision_is_scikit_learns():
    from sklearn.metrics import average_precision_score

    random = np.random.default_rng(0)
    x, labels = random.normal(size=(80, 3)), random.integers(0, 5, 80)
    each = retrieval.evaluate(x, labels, reduce_fn=None).mean_average_precision
    for i in range(80):
        others = np.arange(80) != i
        expected = average_precision_score(
            labels[others] == labels[i], -np.linalg.norm(x[others] - x[i], axis=1)
        )
        np.testing.assert_allclose(each[i], expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("k", "error", "words"),
    [(k, ValueError, "k must be from 1 to 4.*query itself") for k in (0, 5, 6)]
    + [(k, TypeError, "k must be an integer") for k in (1.0, True)],
)
def test_bad_k(k, error, words):
    with pytest.raises(error, match=words):
        retrieval.nearest_neighbors(np.eye(5), np.eye(5), k, positions=np.arange(5))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"embeddings": np.ones(3)}, ValueError, "embeddings must be"),
        ({"embeddings": np.ones((1, 3, 3))}, ValueError, r"must be \[n, d\]"),
        ({"labels": [0, 1]}, ValueError, r"labels has shape \(2,\).*3 embeddings"),
        ({"labels": [0.0, 1, 1]}, TypeError, "labels must be integers"),
        ({"references": np.eye(3)}, ValueError, "go together"),
        ({"ks": (0,)}, ValueError, "ks must be at least 1"),
        ({"ks": (1.5,)}, TypeError, "ks must be an integer"),
        ({"ks": 3}, TypeError, "ks must be a sequence"),
        ({"positions": [0, 1]}, ValueError, "positions"),
        ({"positions": [0.0, 1, 2]}, TypeError, "positions must be integers"),
        ({"metric": "euclidean"}, TypeError, "metric must be callable"),
    ],
)
def test_bad_input_is_named(change, error, words):
    arguments = {"embeddings": np.eye(3), "labels": [0, 0, 1]} | change
    with pytest.raises(error, match=words):
        retrieval.evaluate(arguments.pop("embeddings"), **arguments)


def clusters(n=230, classes=7, seed=0):
    """Points on a grid, so that ties are frequent, and labels they go with."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, classes, n)
    return np.float32(random.integers(0, 4, (n, 3)) + labels[:, None] % 3), labels


def same(got, expected):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got, expected
    )


@pytest.mark.slow
def test_counting_and_sorting_agree(monkeypatch):
    x, labels = clusters()
    counted = retrieval.evaluate(x, labels, reduce_fn=None)
    by_sorting = rankings.Rankings.by_sorting
    monkeypatch.setattr(rankings.Rankings, "by_counting", by_sorting)
    # Another list of ranks: what was compiled before is not used again.
    ranked = retrieval.evaluate(x, labels, ks=(1, 2, 4, 8, 9), reduce_fn=None)
    same(counted[1:], ranked[1:])
    for k, recall in counted.recall_at_k.items():
        np.testing.assert_array_equal(recall, ranked.recall_at_k[k])


@pytest.mark.slow
def test_more_queries_and_references_than_a_block_holds(monkeypatch):
    x, labels = clusters(n=300)
    expected = retrieval.evaluate(x, labels, ks=(1, 3), reduce_fn=None)
    monkeypatch.setattr(rankings, "MOST_ROWS", 64)
    monkeypatch.setattr(rankings, "COLUMNS", 96)
    same(retrieval.evaluate(x, labels, ks=(1, 3, 5), reduce_fn=None)[1:], expected[1:])
    recall = jax.tree.map(np.mean, expected.recall_at_k)
    same(retrieval.recall_at_k(x, labels, ks=(1, 3)), recall)


def test_recall_names_its_ks():
    recall = jax.jit(lambda x: retrieval.recall_at_k(x, [0, 0, 1, 1], ks=(3, 1)))
    line = np.array([[0.0], [1.0], [1.5], [2.6]])
    assert recall(line) == {1: 0.5, 3: 1.0}


def test_recall_alone():
    for seed in range(3):
        x, labels = clusters(seed=seed)
        got = retrieval.recall_at_k(x, labels, ks=(1, 2, 5))
        same(got, retrieval.evaluate(x, labels, ks=(1, 2, 5)).recall_at_k)


@pytest.mark.slow
def test_large_classes():
    x, labels = clusters(n=1200, classes=2)
    assert np.bincount(labels).max() > rankings.MAX_COUNTED
    got = retrieval.evaluate(x[:30], labels[:30], references=x, reference_labels=labels)
    expected = oracles.retrieval(x[:30], labels[:30], (1, 2, 4, 8), x, labels)
    assert_metrics(got, expected, rtol=1e-5)


def test_padding():
    x, labels = clusters()
    where = np.random.default_rng(1).random(len(x)) < 0.7
    padded = np.where(where[:, None], x, np.nan)
    expected = retrieval.evaluate(x[where], labels[where])
    same(retrieval.evaluate(padded, labels, where=where), expected)
    same(retrieval.recall_at_k(padded, labels, where=where), expected.recall_at_k)
    same(
        retrieval.evaluate(
            x[where],
            labels[where],
            references=padded,
            reference_labels=labels,
            positions=np.flatnonzero(where),
            reference_where=where,
        ),
        expected,
    )


@settings(max_examples=40)
@given(seed=st.integers(0, 2**32 - 1), gallery=st.booleans())
def test_queries_that_rank_different_references(seed, gallery):
    random = np.random.default_rng(seed)
    # On a grid, so that ties are frequent.
    x, y = random.integers(0, 3, (9, 2)), random.integers(0, 3, 9)
    options = {}
    if gallery:
        options["references"] = random.integers(0, 3, (11, 2))
        options["reference_labels"] = random.integers(0, 3, 11)
    m = 11 if gallery else 9
    ranks = random.random((9, m)) < 0.6
    expected = oracles.retrieval(x, y, (1, 3), **options, ranks=ranks)
    got = retrieval.evaluate(x, y, ks=(1, 3), **options, reference_where=ranks)
    if not expected["queries"]:
        assert all_nan(got)
        got = jax.tree.map(jnp.nan_to_num, got)
    assert_metrics(got, expected)
    recall = retrieval.recall_at_k(x, y, ks=(1, 3), **options, reference_where=ranks)
    same(jax.tree.map(jnp.nan_to_num, recall), got.recall_at_k)

    masks = tj.pair_masks(y, options.pop("reference_labels", None))
    masks = tj.PairMasks(masks.positive & ranks, masks.negative & ranks)
    masked = retrieval.evaluate(x, masks, ks=(1, 3), **options)
    same(jax.tree.map(jnp.nan_to_num, masked), got)
    with pytest.raises(ValueError, match="mean_of_classes requires integer labels"):
        retrieval.evaluate(x, masks, **options, reduce_fn=retrieval.mean_of_classes)


@pytest.mark.slow
def test_ranking_different_references_over_several_tiles(monkeypatch):
    monkeypatch.setattr(rankings, "COLUMNS", 64)
    monkeypatch.setattr(rankings, "MOST_ROWS", 48)
    x, labels = clusters()
    where = np.random.default_rng(1).random(len(x)) < 0.8
    cameras = np.arange(len(x)) % 3
    ranks = (labels[:, None] != labels) | (cameras[:, None] != cameras)
    got = retrieval.evaluate(
        np.where(where[:, None], x, np.nan), labels, where=where, reference_where=ranks
    )
    expected = oracles.retrieval(
        x[where], labels[where], (1, 2, 4, 8), ranks=ranks[where][:, where]
    )
    assert_metrics(got, expected, rtol=1e-5)
    distances, indices = retrieval.nearest_neighbors(
        x, x, 3, positions=np.arange(len(x)), reference_where=ranks
    )
    d = np.linalg.norm(x[:, None] - x, axis=-1)
    d[~ranks | np.eye(len(x), dtype=bool)] = np.inf
    np.testing.assert_array_equal(indices, np.argsort(d, kind="stable")[:, :3])
    np.testing.assert_allclose(distances, np.sort(d)[:, :3], rtol=1e-4)


@pytest.mark.parametrize("shape", [(230, 229), (229, 230), (1, 230)])
def test_a_mask_of_another_shape_is_named(shape):
    x, labels = clusters()
    with pytest.raises(ValueError, match=r"reference_where must be \[230\]"):
        retrieval.evaluate(x, labels, reference_where=np.ones(shape, bool))


def test_nan_does_not_look_like_skill():
    got = retrieval.evaluate(np.full((40, 3), np.nan), np.arange(40) // 4)
    assert got.queries == 40
    assert all_nan(got)


@pytest.mark.slow
def test_a_query_that_is_not_finite_is_nan():
    x, labels = np.eye(40, dtype=np.float32), np.arange(40) // 4
    for value in (np.nan, np.inf):
        broken = np.full_like(x, value)
        for got in (
            retrieval.evaluate(broken, labels),
            retrieval.evaluate(broken, labels, references=x, reference_labels=labels),
            retrieval.evaluate(broken, labels, reference_where=np.ones((40, 40), bool)),
        ):
            assert got.queries == 40
            assert all_nan(got)
        recall = retrieval.recall_at_k(broken, labels)
        assert all(jnp.isnan(share) for share in recall.values())
        few = retrieval.few_shot_accuracy(x, labels, broken[:3], labels[:3])
        assert jnp.isnan(few)
        distances, indices = retrieval.nearest_neighbors(broken[:1], x, 3)
        assert jnp.isnan(distances).all()
        assert (indices == -1).all()


@pytest.mark.slow
def test_a_reference_that_is_not_finite_touches_who_ranks_it():
    x, labels = clusters()
    gallery, theirs = x.copy(), labels.copy()
    gallery[3] = np.nan
    arguments = {"references": gallery, "reference_labels": theirs, "reduce_fn": None}
    got = retrieval.evaluate(x, labels, **arguments)
    assert all_nan(got)
    # Who does not rank it is not touched.
    ranks = np.ones((230, 230), bool)
    ranks[5:, 3] = False
    got = retrieval.evaluate(x, labels, **arguments, reference_where=ranks)
    expected = retrieval.evaluate(
        x,
        labels,
        references=np.delete(x, 3, axis=0),
        reference_labels=np.delete(labels, 3),
        reduce_fn=None,
    )
    assert jnp.isnan(got.map_at_r[:5]).all()
    np.testing.assert_allclose(got.map_at_r[5:], expected.map_at_r[5:], rtol=1e-6)
    # A query is not its own reference.
    got = retrieval.evaluate(
        x[3:4], labels[3:4], positions=[3], **arguments | {"references": gallery}
    )
    np.testing.assert_allclose(got.queries, True)
    assert not jnp.isnan(got.map_at_r).any()
    assert jnp.isnan(retrieval.few_shot_accuracy(gallery, theirs, x[:3], labels[:3]))
    # As a neighbour it comes last.
    distances, indices = retrieval.nearest_neighbors(x[:2], gallery, 230)
    np.testing.assert_array_equal(indices[:, -1], [3, 3])
    assert jnp.isnan(distances[:, -1]).all()
    assert jnp.isfinite(distances[:, :-1]).all()


@pytest.mark.slow
def test_reductions():
    x, labels = clusters()
    each = retrieval.evaluate(x, labels, reduce_fn=None)
    assert [*each.recall_at_k] == [1, 2, 4, 8]
    assert each.recall_at_k[8].shape == (len(x),)
    mean = retrieval.evaluate(x, labels)
    assert mean.queries == len(x)
    np.testing.assert_allclose(mean.map_at_r, np.mean(each.map_at_r), rtol=1e-6)
    by_class = retrieval.evaluate(x, labels, reduce_fn=retrieval.mean_of_classes)
    for values, got in (
        (each.map_at_r, by_class.map_at_r),
        (each.recall_at_k[2], by_class.recall_at_k[2]),
    ):
        expected = np.mean([values[labels == c].mean() for c in range(7)])
        np.testing.assert_allclose(got, expected, rtol=1e-5)


@pytest.mark.slow
def test_a_class_of_one_is_left_out():
    x, labels = clusters()
    labels[0] = 99
    for reduce_fn in (retrieval.mean_of_queries, retrieval.mean_of_classes):
        got = retrieval.evaluate(x, labels, reduce_fn=reduce_fn)
        assert got.queries == len(x) - 1
    each = retrieval.evaluate(x, labels, reduce_fn=None)
    keep = np.arange(len(x)) > 0
    np.testing.assert_array_equal(each.queries, keep)
    mean = retrieval.evaluate(x, labels).map_at_r
    np.testing.assert_allclose(mean, np.mean(each.map_at_r[keep]), rtol=1e-6)


@pytest.mark.slow
def test_split_over_devices():
    x, labels = clusters(n=240)
    expected = retrieval.evaluate(x, labels)
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((4,), ("data",), axis_types=(kind,))
        arrays = jax.device_put(
            (jnp.asarray(x), jnp.asarray(labels)), NamedSharding(mesh, P("data"))
        )
        with jax.set_mesh(mesh):
            same(jax.jit(retrieval.evaluate)(*arrays), expected)
            recall = jax.jit(retrieval.recall_at_k)(*arrays)
        same(recall, expected.recall_at_k)


def test_queries_that_fill_up_a_mesh_do_not_count():
    x, labels = clusters(n=30, classes=3)
    expected = retrieval.recall_at_k(x, labels, ks=(1, 2))
    with jax.set_mesh(jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))):
        got = retrieval.recall_at_k(x, labels, ks=(1, 2), axis_name="data")
    same(got, expected)


@pytest.mark.slow
def test_low_precision():
    x, labels = clusters()
    same(
        retrieval.evaluate(x.astype(jnp.bfloat16), labels),
        retrieval.evaluate(x, labels),
    )


@pytest.mark.slow
def test_any_metric():
    x = np.array([[1.0, 0.0], [10.0, 0.1], [0.0, 1.0], [0.1, 10.0]])
    labels = [0, 0, 1, 1]
    assert retrieval.evaluate(x, labels, metric=tj.cosine).precision_at_1 == 1
    assert retrieval.evaluate(x, labels).precision_at_1 < 1


def episodes(seed=0):
    """Three episodes: support, its labels, queries, theirs."""
    random = np.random.default_rng(seed)
    labels, expected = random.integers(0, 4, (3, 12)), random.integers(0, 4, (3, 20))
    support, queries = (
        np.float32(random.normal(size=(*y.shape, 5)) + y[..., None] % 3)
        for y in (labels, expected)
    )
    return support, labels, queries, expected


def by_loops(support, labels, queries, expected, class_means):
    if class_means:
        kinds = sorted(set(labels.tolist()))
        support = [np.mean(support[labels == c], axis=0) for c in kinds]
        labels = kinds
    right = [
        labels[np.argmin([oracles.euclidean(query, one) for one in support])] == label
        for query, label in zip(queries, expected)
    ]
    return np.mean(right)


@pytest.mark.parametrize("class_means", [False, True])
def test_few_shot(class_means):
    given = episodes()
    got = retrieval.few_shot_accuracy(*given, class_means=class_means)
    for value, *episode in zip(got, *given):
        np.testing.assert_allclose(value, by_loops(*episode, class_means), rtol=1e-6)
        assert 0.2 < value < 1


@pytest.mark.parametrize("class_means", [False, True])
def test_few_shot_with_padding(class_means):
    support, labels, queries, expected = (x[0] for x in episodes())
    where, known = np.arange(20) < 15, np.arange(12) % 3 > 0
    got = retrieval.few_shot_accuracy(
        np.where(known[:, None], support, np.nan),
        labels,
        np.where(where[:, None], queries, np.nan),
        expected,
        class_means=class_means,
        support_where=known,
        where=where,
    )
    np.testing.assert_allclose(
        got,
        retrieval.few_shot_accuracy(
            support[known],
            labels[known],
            queries[where],
            expected[where],
            class_means=class_means,
        ),
    )


def test_few_shot_of_signed_and_unsigned_labels():
    """All bits set is -1 in one and 2**32 - 1 in the other."""
    x, unsigned = np.zeros((1, 2), np.float32), np.array([2**32 - 1], np.uint32)
    assert retrieval.few_shot_accuracy(x, unsigned, x, np.array([-1])) == 0
    assert retrieval.few_shot_accuracy(x, unsigned, x, unsigned) == 1


def test_few_shot_of_nothing_is_nan():
    support, labels, queries, expected = episodes()
    for name, size in (("where", 20), ("support_where", 12)):
        got = retrieval.few_shot_accuracy(
            support, labels, queries, expected, **{name: np.zeros(size, bool)}
        )
        assert jnp.isnan(got).all()


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"support": np.ones((12, 4))}, ValueError, "support must be vectors"),
        ({"support_labels": np.zeros(12)}, TypeError, "support_labels must be integer"),
        ({"query_labels": [0]}, ValueError, "query_labels must have one entry"),
        ({"where": [1]}, TypeError, "where must be boolean"),
        ({"class_means": 1}, TypeError, "class_means must be a bool"),
        ({"metric": None}, TypeError, "metric must be given"),
    ],
)
def test_bad_episodes_are_named(change, error, words):
    names = ("support", "support_labels", "queries", "query_labels")
    arguments = dict(zip(names, (x[0] for x in episodes()))) | change
    with pytest.raises(error, match=words):
        retrieval.few_shot_accuracy(**arguments)
