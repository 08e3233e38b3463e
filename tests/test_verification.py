"""Verification against counting, and against scikit-learn."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from problems import in_lanes
from sklearn import metrics as sk

import tripletjax as tj
from tripletjax import verification
from tripletjax._pairwise import block_sizes
from tripletjax.verification import evaluation


def pairs_of(seed, n=30, tied=False):
    """Distances of pairs, those of the same item smaller; some of either kind."""
    random = np.random.default_rng(seed)
    # Rates depend on how many there are, and programs on the rates: few are made.
    same = random.permutation(n) < n * random.choice([0.2, 0.5, 0.8])
    distances = random.normal(size=n) ** 2 + ~same
    if tied:
        distances = np.round(distances)
    return distances.astype(np.float32), same


def check(got, distances, same, fars):
    distances, same = distances.tolist(), same.tolist()
    tars = [oracles.tar_at_far(distances, same, far) for far in fars]
    np.testing.assert_allclose(got.tar_at_far, tars, rtol=1e-6)
    for threshold, tar in zip(got.thresholds.tolist(), tars):
        accepted = [d <= threshold for d, s in zip(distances, same) if s]
        np.testing.assert_allclose(np.mean(accepted), tar, rtol=1e-6)
    expected = {
        "equal_error_rate": oracles.equal_error_rate(distances, same),
        "area_under_roc": oracles.area_under_roc(distances, same),
        "positives": sum(same),
        "negatives": len(same) - sum(same),
    }
    expected["accuracy"], last = oracles.best_threshold(distances, same)
    expected["threshold"] = oracles.between(distances, last)
    for name, value in expected.items():
        np.testing.assert_allclose(
            getattr(got, name), value, rtol=1e-5, atol=1e-6, err_msg=name
        )


@settings(max_examples=50)
@given(seed=st.integers(0, 2**32 - 1), tied=st.booleans())
def test_rates_are_their_definitions(seed, tied):
    distances, same = pairs_of(seed, tied=tied)
    fars = (1.0, 0.5, 1 / np.sum(~same))
    check(
        verification.evaluate_pairs(distances, same, fars=fars), distances, same, fars
    )


@pytest.mark.slow
@settings(max_examples=30)
@given(seed=st.integers(0, 2**32 - 1), tied=st.booleans())
def test_the_curve_is_scikit_learns(seed, tied):
    distances, same = pairs_of(seed, tied=tied)
    curve = verification.roc(distances, same)
    far, tar, thresholds = sk.roc_curve(same, -distances, drop_intermediate=False)
    points, index = np.unique(curve.thresholds, return_index=True)
    np.testing.assert_allclose(points[1:], -thresholds[1:], rtol=1e-6)
    np.testing.assert_allclose(curve.true_accept_rate[index], tar, rtol=1e-6)
    np.testing.assert_allclose(curve.false_accept_rate[index], far, rtol=1e-6)
    got = verification.evaluate_pairs(distances, same, fars=(1.0,))
    np.testing.assert_allclose(
        got.area_under_roc, sk.roc_auc_score(same, -distances), rtol=1e-5
    )


@settings(max_examples=20)
@given(seed=st.integers(0, 2**32 - 1))
def test_folds(seed):
    random = np.random.default_rng(seed)
    distances, same = pairs_of(seed, n=40, tied=seed % 2)
    fold = random.permutation(np.arange(40) % 4)
    got = verification.k_fold_accuracy(distances, same, folds=4, fold=fold)
    expected = oracles.k_fold(distances.tolist(), same.tolist(), fold.tolist(), 4)
    np.testing.assert_allclose(got.accuracies, expected, rtol=1e-6)
    np.testing.assert_allclose(got.accuracy, np.mean(expected), rtol=1e-6)
    np.testing.assert_allclose(
        got.standard_error, np.std(expected, ddof=1) / 2, rtol=1e-5, atol=1e-7
    )


def test_folds_in_order():
    distances, same = pairs_of(0, n=43)
    fold = np.repeat(np.arange(10), [5] * 3 + [4] * 7)
    jax.tree.map(
        np.testing.assert_array_equal,
        verification.k_fold_accuracy(distances, same),
        verification.k_fold_accuracy(distances, same, fold=fold),
    )


METRICS = {
    "euclidean": (tj.euclidean, oracles.euclidean),
    "cosine": (tj.cosine, oracles.cosine),
    "manhattan": (tj.manhattan, oracles.manhattan),
}


@in_lanes(
    ("kind", "metric"),
    itertools.product(["square", "padded", "references"], METRICS),
    quick=[("padded", "euclidean"), ("references", "manhattan")],
)
def test_all_pairs(kind, metric):
    random = np.random.default_rng(0)
    metric, distance = METRICS[metric]
    x, labels = random.normal(size=(40, 5)), random.integers(0, 6, 40)
    x += labels[:, None] * [1, -1, 0.5, 0, 2]
    options, real = {}, np.ones(40, bool)
    if kind == "padded":
        real = options["where"] = random.random(40) < 0.7
    if kind == "references":
        options["references"] = random.normal(size=(23, 5)) + 1
        options["reference_labels"] = random.integers(3, 9, 23)
        options["reference_where"] = random.random(23) < 0.8
        pairs = [
            (distance(a, b), p == q)
            for a, p in zip(x, labels)
            for b, q, real in zip(*options.values())
            if real
        ]
    else:
        items = [(a, p) for a, p, keep in zip(x, labels, real) if keep]
        pairs = [
            (distance(a, b), p == q)
            for i, (a, p) in enumerate(items)
            for b, q in items[i + 1 :]
        ]
    distances, same = map(np.array, zip(*pairs))
    fars = (0.3, 0.1, 0.01)
    got = verification.evaluate(x, labels, metric=metric, fars=fars, **options)
    check(got, distances, same, fars)


def told_and_done(got, distances, same, fars):
    """That thresholds do what the rates say, on the distances as they are."""
    distances, positives, negatives = np.asarray(distances), same.sum(), (~same).sum()
    for far, threshold, tar in zip(fars, np.asarray(got.thresholds), got.tar_at_far):
        accepted = distances <= threshold
        assert (accepted & ~same).sum() <= far * negatives * (1 + 1e-12)
        assert threshold not in distances
        if far * negatives < 1:
            # Too few negatives to tell.
            assert np.isnan(tar)
        else:
            assert (accepted & same).sum() == round(float(tar) * positives)
    right = ((distances <= np.asarray(got.threshold)) == same).sum()
    assert right == round(float(got.accuracy) * len(same))


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    form=st.sampled_from(["close", "rounded", "float32", "float16", "large", "signed"]),
)
def test_thresholds_do_what_they_say(seed, form):
    distances, same = pairs_of(seed, tied=False)
    distances = np.float64(distances)
    if form == "close":
        distances = 1 + 1e-9 * np.random.default_rng(seed).permutation(len(distances))
    elif form == "rounded":
        distances = np.round(distances, 2)
    elif form == "large":
        distances = np.int64(2**40) + np.round(10 * distances).astype(np.int64)
    elif form == "signed":
        distances = -distances
    else:
        distances = distances.astype(form)
    fars = (1.0, 0.5, 0.2, 1 / (~same).sum())
    got = verification.evaluate_pairs(distances, same, fars=fars)
    wide = distances.dtype.itemsize == 8
    assert np.asarray(got.thresholds).dtype == (np.float64 if wide else np.float32)
    told_and_done(got, distances, same, fars)


def test_a_threshold_of_64_bits_separates_what_32_bits_do_not():
    distances = np.array([1.0, 1 + 1e-9, 1 + 2e-9, 1 + 3e-9])
    same = np.array([True, True, False, False])
    got = verification.evaluate_pairs(distances, same, fars=(0.5,))
    assert got.accuracy == 1
    assert distances[1] < got.threshold < distances[2]
    curve = verification.roc(distances, same)
    np.testing.assert_array_equal(curve.true_accept_rate, [0, 0.5, 1, 1, 1])
    folds = verification.k_fold_accuracy(
        distances, same, folds=2, fold=np.array([0, 1, 0, 1])
    )
    np.testing.assert_array_equal(folds.accuracies, [0.5, 1])


def test_thresholds_of_embeddings_lie_between_their_distances():
    x = np.float32(np.random.default_rng(0).normal(size=(60, 4)))
    labels = np.arange(60) // 5
    i, j = np.triu_indices(60, k=1)
    distances, same = np.linalg.norm(x[i] - x[j], axis=1), labels[i] == labels[j]
    fars = (1.0, 0.3, 0.01)
    got = verification.evaluate(x, labels, fars=fars)
    told_and_done(got, distances, same, fars)


@pytest.mark.parametrize("jit", [False, True])
def test_a_far_that_few_negatives_cannot_show_is_nan(jit):
    x, labels = np.random.default_rng(0).normal(size=(6, 2)), np.arange(6) // 2
    evaluate = functools.partial(verification.evaluate, size=3)
    got = (jax.jit(evaluate) if jit else evaluate)(np.float32(x), labels)
    np.testing.assert_array_equal(jnp.isnan(got.tar_at_far), [False, True, True])
    np.testing.assert_array_equal(jnp.isnan(got.thresholds), [False, True, True])
    assert got.negatives == 12
    assert jnp.isfinite(got.equal_error_rate)


@pytest.mark.slow
def test_more_pairs_than_a_tile_holds():
    x = np.float32(np.random.default_rng(0).normal(size=(1100, 4)))
    labels = np.arange(1100) // 5
    got = verification.evaluate(x, labels, fars=(0.1, 1e-3, 1e-5))
    i, j = np.triu_indices(1100, k=1)
    distances = np.linalg.norm(np.float64(x[i] - x[j]), axis=1)
    expected = verification.evaluate_pairs(
        np.float32(distances), labels[i] == labels[j], fars=(0.1, 1e-3, 1e-5)
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5),
        got,
        expected,
    )


def test_near_duplicates_keep_their_order():
    """Negatives at 1e-4, which an inner product cannot tell from 2e-4."""
    random = np.random.default_rng(0)
    x = random.normal(size=(60, 32))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    step = random.normal(size=(20, 32))
    step /= np.linalg.norm(step, axis=1, keepdims=True)
    # 10 positive pairs at 1e-4 and 10 negative ones at 2e-4.
    near = np.where(np.arange(20) < 10, 1e-4, 2e-4)[:, None]
    x[20:40] = x[:20] + near * step
    labels = np.arange(60)
    labels[20:30] = labels[:10]
    got = verification.evaluate(np.float32(x), labels, fars=(0.01,))
    assert got.area_under_roc == 1
    assert got.equal_error_rate == 0
    np.testing.assert_allclose(got.threshold, 1.5e-4, rtol=1e-2)


@pytest.mark.slow
def test_inside_jit_and_split_over_devices():
    x, labels = np.random.default_rng(0).normal(size=(64, 3)), np.arange(64) // 4
    expected = verification.evaluate(x, labels)
    evaluate = jax.jit(lambda x, y: verification.evaluate(x, y, size=100))
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((4,), ("data",), axis_types=(kind,))
        arrays = jax.device_put(
            (jnp.float32(x), jnp.int32(labels)), NamedSharding(mesh, P("data"))
        )
        with jax.set_mesh(mesh):
            got = evaluate(*arrays)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got, expected
        )
    short = jax.jit(lambda x, y: verification.evaluate(x, y, size=95))(x, labels)
    assert jnp.isnan(short.area_under_roc)


def test_devices_go_over_different_pairs(monkeypatch):
    # Two blocks of eight: the pairs between them are the only tile of a round.
    monkeypatch.setattr(block_sizes, "CPU", block_sizes.CPU._replace(tile=8))
    monkeypatch.setattr(block_sizes, "ACCELERATOR", block_sizes.CPU)
    x = np.float32(np.random.default_rng(0).normal(size=(16, 3)))
    labels = np.arange(16) // 4
    verify = functools.partial(verification.evaluate, size=24, fars=(0.2,))
    shared = jax.shard_map(
        functools.partial(verify, axis_name="data"),
        mesh=jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,)),
        in_specs=P("data"),
        out_specs=P(),
    )
    got = jax.jit(shared)(x, labels)
    assert (got.positives, got.negatives) == (24, 96)
    i, j = np.triu_indices(16, k=1)
    distances, same = np.linalg.norm(x[i] - x[j], axis=1), labels[i] == labels[j]
    expected = verification.evaluate_pairs(distances, same, fars=(0.2,))
    for one, other in zip(got, expected):
        np.testing.assert_allclose(one, other, rtol=1e-5)


def test_padded_pairs():
    distances, same = pairs_of(0)
    where = np.random.default_rng(1).random(30) < 0.6
    got = verification.evaluate_pairs(distances, same, fars=(0.5,), where=where)
    expected = verification.evaluate_pairs(distances[where], same[where], fars=(0.5,))
    jax.tree.map(np.testing.assert_array_equal, got, expected)
    curve = verification.roc(distances, same, where=where)
    plain = verification.roc(distances[where], same[where])
    for a, b in zip(curve, plain):
        np.testing.assert_array_equal(a[: len(b)], b)


@pytest.mark.parametrize("same", [True, False])
def test_one_kind_of_pairs_is_nan(same):
    got = evaluation._evaluate_pairs(
        np.arange(4.0), np.full(4, same), fars=(0.5,), where=None
    )
    for name, value in got._asdict().items():
        if name in ("positives", "negatives"):
            assert value == 4 * (same == (name == "positives"))
        else:
            assert jnp.isnan(value).all(), name


def test_a_nan_is_shown():
    distances, same = pairs_of(0)
    for i in (0, 1):
        broken = distances.copy()
        broken[i] = np.nan
        got = verification.evaluate_pairs(broken, same, fars=(0.5,))
        assert jnp.isnan(got.area_under_roc), i
        assert jnp.isnan(verification.roc(broken, same).true_accept_rate).all()
    x = np.random.default_rng(0).normal(size=(12, 3))
    x[0, 0] = np.nan
    got = verification.evaluate(x, np.arange(12) // 4, fars=(0.5,))
    assert jnp.isnan(got.equal_error_rate)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"fars": (0.1, 0.0)}, ValueError, "fars must be over 0"),
        ({"fars": (1.5,)}, ValueError, "fars must be over 0 and up to 1"),
        ({"fars": 0.1}, TypeError, "fars must be a sequence"),
        ({"fars": ("a",)}, TypeError, "fars must be a sequence"),
        ({"labels": [0, 1, 1]}, ValueError, "labels"),
        ({"embeddings": np.ones(3)}, ValueError, "embeddings must be"),
        (
            {"embeddings": np.ones((2, 4, 3))},
            ValueError,
            r"embeddings must be \[n, d\]",
        ),
        ({"references": np.eye(4)}, ValueError, "go together"),
        ({"size": 0}, ValueError, "size must be at least 1"),
        ({"size": 1.5}, TypeError, "size must be an integer"),
        ({"metric": "euclidean"}, TypeError, "metric must be"),
    ],
)
def test_bad_input_is_named(change, error, words):
    arguments = {"embeddings": np.eye(4), "labels": [0, 0, 1, 1], "fars": (0.5,)}
    arguments |= change
    with pytest.raises(error, match=words):
        verification.evaluate(
            arguments.pop("embeddings"), arguments.pop("labels"), **arguments
        )


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"distances": np.ones((2, 2))}, ValueError, r"distances must be \[n\]"),
        ({"same": [1, 0, 1]}, TypeError, "same must be boolean"),
        ({"same": [True]}, ValueError, r"same.*\(1,\) and \(3,\)"),
        ({"where": [True]}, ValueError, r"where.*\(1,\) and \(3,\)"),
        ({"folds": 1}, ValueError, "folds must be at least 2"),
        ({"fold": [0, 1]}, ValueError, "fold must have one entry"),
        ({"fold": [0.0, 1, 1]}, TypeError, "fold must be integers"),
    ],
)
def test_bad_pairs_are_named(change, error, words):
    arguments = {"distances": np.ones(3), "same": [True, False, True]} | change
    with pytest.raises(error, match=words):
        verification.k_fold_accuracy(
            arguments.pop("distances"), arguments.pop("same"), **arguments
        )


def test_one_program_for_classes_of_other_sizes():
    traces = []

    def distance(a, b):
        traces.append(None)
        return jnp.sum(jnp.abs(a - b))

    metric, x = tj.Metric(paired=distance), np.eye(9, 3)
    got = verification.evaluate(x, np.arange(9) % 3, metric=metric)
    assert got.positives == 9
    count = len(traces)
    got = verification.evaluate(x, np.repeat([0, 1, 2], [4, 3, 2]), metric=metric)
    assert got.positives == 10
    assert 0 < count == len(traces)


def test_more_pairs_than_can_be_counted():
    n = 65_537
    with pytest.raises(ValueError, match="2147516416 pairs are too many"):
        verification.evaluate(np.zeros((n, 1)), np.arange(n))


def test_traced_labels_need_a_size():
    with pytest.raises(TypeError, match="size must be given"):
        jax.jit(lambda y: verification.evaluate(np.eye(4), y))(jnp.zeros(4, int))


@settings(max_examples=20)
@given(seed=st.integers(0, 2**32 - 1), tied=st.booleans())
def test_a_replicate_is_the_pairs_of_its_draw(seed, tied):
    """Every pair as often as its identities are drawn."""
    random = np.random.default_rng(seed)
    people = random.integers(0, 6, 14)
    first, second = np.triu_indices(14, 1)
    distances = random.normal(size=len(first)).astype(np.float32) ** 2
    distances = np.round(distances, 1) if tied else distances
    same = people[first] == people[second]
    same[:20], same[20:40] = True, False
    pairs = np.stack([people[first], people[second]], axis=1)
    key, fars = jax.random.key(seed % 1000), (1.0, 0.3)
    got = verification.bootstrap(
        key,
        distances[:20],
        pairs[:20, 0],
        distances[20:40],
        pairs[20:40],
        fars=fars,
        replicates=5,
        size=6,
    )
    for replicate, one in enumerate(jax.random.split(key, 5)):
        copies = np.bincount(jax.random.randint(one, (6,), 0, 6), minlength=6)
        weights = np.where(
            same[:40], copies[pairs[:40, 0]], copies[pairs[:40]].prod(axis=1)
        )
        repeated = np.repeat(distances[:40], weights)
        alike = np.repeat(same[:40], weights)
        metrics = jax.tree.map(lambda x, i=replicate: x[i], got)
        if not alike.any() or alike.all():
            assert np.isnan(metrics.equal_error_rate)
            continue
        tars = [oracles.tar_at_far(repeated, alike, far) for far in fars]
        seen = np.array(fars) * (~alike).sum() >= 1
        np.testing.assert_allclose(metrics.tar_at_far[seen], np.array(tars)[seen])
        assert np.isnan(metrics.tar_at_far[~seen]).all()
        for name in ("equal_error_rate", "area_under_roc"):
            expected = getattr(oracles, name)(repeated, alike)
            np.testing.assert_allclose(getattr(metrics, name), expected, atol=1e-6)
        assert (metrics.positives, metrics.negatives) == (alike.sum(), (~alike).sum())


@pytest.mark.slow
def test_replicates_spread_as_new_people_do():
    """Pairs resampled one by one would tell too little where people differ."""
    random = np.random.default_rng(0)

    def draw():
        people = np.repeat(np.arange(30), 6)
        spread = np.repeat(random.uniform(0.2, 2.0, 30), 6)[:, None]
        x = random.normal(size=(30, 8)).repeat(6, 0) + spread * random.normal(
            size=(180, 8)
        )
        first, second = np.triu_indices(180, 1)
        d = np.linalg.norm(x[first] - x[second], axis=1).astype(np.float32)
        return d, people[first], people[second]

    def error(d, one, other):
        return float(verification.equal_error_rate(d, one == other))

    expected = np.std([error(*draw()) for _ in range(40)])
    d, one, other = draw()
    same = one == other
    got = verification.bootstrap(
        jax.random.key(0),
        d[same],
        one[same],
        d[~same],
        np.stack([one, other], 1)[~same],
        fars=(0.1,),
        replicates=200,
    ).equal_error_rate
    assert expected / 1.7 < np.std(got) < expected * 1.7
    pairs = [random.integers(0, len(d), len(d)) for _ in range(40)]
    naive = np.std([error(d[p], one[p], other[p]) for p in pairs])
    assert naive < 0.7 * np.std(got)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"positives": np.zeros((2, 1), np.float32)}, "positives must be distances"),
        ({"positives": np.zeros(2, np.int32)}, "positives must be floats"),
        ({"negative_identities": np.zeros(3, np.int32)}, "negative_identities must be"),
        ({"positive_identities": np.zeros(2)}, "positive_identities must be integers"),
        ({"positive_identities": np.array([0, 7])}, "identities must be from 0 to 3"),
        ({"positive_identities": np.array([0, -1])}, "identities must be from 0 to 3"),
        ({"replicates": 0}, "replicates"),
        ({"fars": (2.0,)}, "fars must be over 0"),
    ],
)
def test_bad_bootstraps(change, words):
    options = {
        "positives": np.ones(2, np.float32),
        "positive_identities": np.array([0, 1]),
        "negatives": np.ones(3, np.float32),
        "negative_identities": np.array([[0, 1], [1, 2], [2, 3]]),
        "size": 4,
        "replicates": 2,
    }
    with pytest.raises((TypeError, ValueError), match=words):
        verification.bootstrap(jax.random.key(0), **options | change)


def test_bootstraps_of_what_is_not_a_number():
    got = verification.bootstrap(
        jax.random.key(0),
        np.array([0.1, np.nan], np.float32),
        np.array([0, 1]),
        np.array([0.5, 0.7], np.float32),
        np.array([[0, 1], [0, 1]]),
        fars=(1.0,),
        replicates=4,
    )
    assert np.isnan(got.equal_error_rate).all()
    assert np.isnan(got.tar_at_far).all()
