"""Identification against a gallery, by its definitions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tripletjax as tj
from tripletjax import retrieval

RANKS, FPIRS = (1, 3), (1.0, 0.5, 0.2)


def problem(seed, tied):
    """Queries of seven classes, of which the gallery has five."""
    random = np.random.default_rng(seed)
    means = 2 * random.normal(size=(7, 3))
    labels, theirs = random.integers(0, 7, 24), random.integers(0, 5, 15)
    labels[:2] = theirs[0], 6
    x, y = (means[c] + random.normal(size=(len(c), 3)) for c in (labels, theirs))
    x, y = (np.float32(np.round(v) if tied else v) for v in (x, y))
    where, real = random.random(24) < 0.9, random.random(15) < 0.8
    where[:2] = real[0] = True
    return x, labels, y, theirs, where, real


@settings(max_examples=30)
@given(seed=st.integers(0, 2**32 - 1), tied=st.booleans())
def test_identification_is_its_definition(seed, tied):
    x, labels, y, theirs, where, real = problem(seed, tied)
    found = retrieval.nearest_classes(x, y, theirs, k=3, reference_where=real)
    d = oracles.matrix(oracles.euclidean, x, y)
    for i in range(len(x)):
        order = oracles.class_order(d[i], theirs, real)[:3]
        order += [(-1, np.inf, -1)] * (3 - len(order))
        for got, expected in zip(found, zip(*((e[1], e[0], e[2]) for e in order))):
            np.testing.assert_allclose(got[i], expected, rtol=1e-5)

    metrics = retrieval.evaluate_identification(
        x,
        labels,
        references=y,
        reference_labels=theirs,
        ranks=RANKS,
        fpirs=FPIRS,
        where=where,
        reference_where=real,
    )
    rates, fnirs = oracles.identification(d, labels, theirs, where, real, RANKS, FPIRS)
    np.testing.assert_allclose(metrics.rate_at_rank, rates, rtol=1e-6)
    known = np.isin(labels, theirs[real])
    assert metrics.known == (known & where).sum()
    assert metrics.unknown == (~known & where).sum()
    seen = np.array(FPIRS) * int(metrics.unknown) >= 1 - 1e-6
    np.testing.assert_allclose(metrics.fnir_at_fpir[seen], np.array(fnirs)[seen], 1e-5)
    assert np.isnan(metrics.fnir_at_fpir[~seen]).all()
    # The thresholds do what the rates say.
    nearest, right = found.distances[:, 0], found.labels[:, 0] == labels
    for threshold, fnir, fpir in zip(metrics.thresholds, metrics.fnir_at_fpir, FPIRS):
        if np.isnan(threshold):
            continue
        named = nearest <= threshold
        missed = ~(named & right)[known & where]
        np.testing.assert_allclose(missed.mean(), fnir, rtol=1e-6, atol=1e-6)
        assert named[~known & where].mean() <= fpir + 1e-6


def test_class_means_are_references():
    x, y = jnp.array([[0.9]]), jnp.array([[0.0], [2.0], [2.5]])
    labels = jnp.array([0, 1, 0])
    assert retrieval.nearest_classes(x, y, labels).labels[0, 0] == 0
    means = jnp.array([[1.25], [2.0]])
    found = retrieval.nearest_classes(x, means, jnp.array([0, 1]))
    np.testing.assert_allclose(found.distances, [[0.35]], rtol=1e-6)


@pytest.mark.slow
def test_identification_composes():
    x, labels, y, theirs, *_ = problem(0, False)
    function = functools.partial(
        retrieval.evaluate_identification,
        references=y,
        reference_labels=theirs,
        fpirs=(0.5,),
    )
    expected = function(x, labels)
    got = jax.jit(function)(x, labels)
    several = jax.vmap(function)(jnp.stack([x, x]), jnp.stack([labels, labels]))
    for a, b, c in zip(expected, got, several):
        np.testing.assert_allclose(a, b)
        np.testing.assert_allclose(a, c[1])
    found = jax.vmap(lambda x: retrieval.nearest_classes(x, y, theirs, k=2))(x[None])
    np.testing.assert_array_equal(
        found.labels[0], retrieval.nearest_classes(x, y, theirs, k=2).labels
    )


def test_signed_and_unsigned_labels_differ_by_value():
    """All bits set is -1 in one and 2**32 - 1 in the other."""
    x, unsigned = np.zeros((1, 2), np.float32), np.array([2**32 - 1], np.uint32)
    for labels, known in ((np.array([-1], np.int32), 0), (unsigned, 1)):
        metrics = retrieval.evaluate_identification(
            x, labels, references=x, reference_labels=unsigned, ranks=(1,)
        )
        assert metrics.known == known


def test_many_classes_take_as_much_to_compile_as_one():
    x = jax.ShapeDtypeStruct((16_384, 16), jnp.float32)
    labels = jax.ShapeDtypeStruct((16_384,), jnp.int32)

    def size(k):
        nearest = functools.partial(retrieval.nearest_classes, k=k)
        return len(jax.jit(nearest).lower(x, x, labels).as_text())

    assert size(20) < 1.1 * size(1)


def test_nobody_known_or_unknown():
    x, y = jnp.array([[0.0], [1.0]]), jnp.array([[0.5]])
    function = functools.partial(
        retrieval.evaluate_identification, references=y, reference_labels=np.array([3])
    )
    metrics = function(x, np.array([3, 3]), fpirs=(0.5,))
    np.testing.assert_allclose(metrics.rate_at_rank, 1.0)
    assert np.isnan(metrics.fnir_at_fpir).all()
    metrics = function(x, np.array([1, 2]), fpirs=(0.5,))
    assert np.isnan(metrics.rate_at_rank).all()
    assert metrics.unknown == 2
    broken = function(x.at[0].set(jnp.nan), np.array([3, 1]), fpirs=(1.0,))
    assert np.isnan(broken.rate_at_rank).all()
    assert np.isnan(broken.fnir_at_fpir).all()


def test_padding_may_hold_anything():
    x, labels, y, theirs, *_ = problem(1, False)
    options = {"ranks": (1, 2), "fpirs": (0.5,)}
    expected = retrieval.evaluate_identification(
        x, labels, references=y, reference_labels=theirs, **options
    )
    more = np.full((3, 3), np.nan, np.float32)
    got = retrieval.evaluate_identification(
        np.concatenate([x, more]),
        np.concatenate([labels, [0, 1, 9]]),
        references=np.concatenate([y, more]),
        reference_labels=np.concatenate([theirs, [6, 5, 5]]),
        where=np.arange(len(x) + 3) < len(x),
        reference_where=np.arange(len(y) + 3) < len(y),
        **options,
    )
    for a, b in zip(expected, got):
        np.testing.assert_allclose(a, b)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"labels": np.zeros(3, int)}, "labels must have one entry"),
        ({"reference_labels": np.zeros(4)}, "reference_labels must be integers"),
        ({"ranks": ()}, "ranks must be at least 1"),
        ({"ranks": 5}, "ranks must be a sequence"),
        ({"ranks": (0,)}, "ranks must be at least 1"),
        ({"fpirs": (0.0,)}, "fpirs must be over 0"),
        ({"fpirs": 0.1}, "fpirs must be a sequence"),
        ({"references": np.zeros((4, 3), np.float32)}, "same length|lengths|dimension"),
        ({"where": np.zeros(2, int)}, "where must be boolean"),
    ],
)
def test_bad_identifications(change, words):
    options = {
        "embeddings": np.zeros((2, 2), np.float32),
        "labels": np.zeros(2, int),
        "references": np.zeros((4, 2), np.float32),
        "reference_labels": np.zeros(4, int),
    } | change
    x, labels = options.pop("embeddings"), options.pop("labels")
    with pytest.raises((TypeError, ValueError), match=words):
        tj.retrieval.evaluate_identification(x, labels, **options)
    with pytest.raises(ValueError, match="k must be from 1 to 4"):
        tj.retrieval.nearest_classes(x, np.zeros((4, 2)), np.zeros(4, int), k=5)
