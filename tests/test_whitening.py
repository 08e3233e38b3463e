"""Within-class whitening against loops in float64, and the heads that begin with it."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tripletjax.learn.networks import heads, whitening
from tripletjax.learn.runs.train import sample_of_classes


def whitened_by_loops(features, labels, shrinkage):
    """The mean, the shrunk within-class covariance and its inverse square root."""
    f = features.shape[1]
    members = {
        label: [x for x, own in zip(features, labels) if own == label]
        for label in set(labels.tolist())
    }
    # A class counts as at most 10 images.
    weights = {label: min(1, 10 / len(of)) for label, of in members.items()}
    weight = sum(weights[label] * len(of) for label, of in members.items())
    mean = sum(weights[label] * sum(of) for label, of in members.items()) / weight
    within, total = np.zeros((f, f)), np.zeros((f, f))
    for label, of in members.items():
        center = sum(of) / len(of)
        for x in of:
            within += weights[label] * np.outer(x - center, x - center)
            total += weights[label] * np.outer(x - mean, x - mean)
    scale = sum(within[k, k] for k in range(f)) / f
    shrunk = (1 - shrinkage) * within / scale + shrinkage * np.eye(f)
    values, vectors = np.linalg.eigh(shrunk)
    root = sum(np.outer(v, v) / np.sqrt(e) for e, v in zip(values, vectors.T))
    return mean, shrunk, root, total


@pytest.mark.parametrize(
    ("n", "classes", "dim"),
    [(60, 7, 3), (60, 7, 9), (60, 45, 9), (6, 3, 9), (6, 5, 4)],
    ids=["few", "all", "singles", "fewer images", "one pair"],
)
def test_whitening_is_that_of_loops(n, classes, dim):
    draw = np.random.default_rng(n + classes)
    features = draw.normal(size=(n, 9)) @ draw.normal(size=(9, 9)) + 3
    # Half of the images of more than the fewest are of one class.
    rest = (n - classes) // 2
    labels = [*range(classes), *[0] * (n - classes - rest)]
    labels = draw.permutation([*labels, *draw.integers(0, classes, rest)])
    mean, kernel = whitening.whitening(features, labels, dim, shrinkage=0.3)
    by_loops, shrunk, root, total = whitened_by_loops(features, labels, 0.3)
    np.testing.assert_allclose(mean, by_loops)
    np.testing.assert_allclose(kernel.T @ shrunk @ kernel, np.eye(dim), atol=1e-9)
    # Distances are those of whitened features on their first principal directions.
    z = np.stack([root @ (x - mean) for x in features])
    _, vectors = np.linalg.eigh(root @ total @ root)
    z = z @ vectors[:, ::-1][:, :dim]
    x = (features - mean) @ kernel
    np.testing.assert_allclose(x @ x.T, z @ z.T, atol=1e-8 * np.abs(z @ z.T).max())


def test_a_large_class_counts_as_ten_images():
    draw = np.random.default_rng(0)
    features = draw.normal(size=(40, 4)) * [1, 2, 3, 4]
    labels = np.repeat([0, 1, 2], [10, 10, 20])
    twice = np.concatenate([features, features[:20]])
    mean, kernel = whitening.whitening(features, labels, 4)
    same, again = whitening.whitening(twice, np.concatenate([labels, labels[:20]]), 4)
    np.testing.assert_allclose(same, mean)
    np.testing.assert_allclose(again @ again.T, kernel @ kernel.T)


def test_chunks_do_not_change_the_result(monkeypatch):
    draw = np.random.default_rng(0)
    features, labels = draw.normal(size=(50, 5)), draw.integers(0, 9, 50)
    _, once = whitening.whitening(features, labels, 5)
    monkeypatch.setattr(whitening, "ROWS", 7)
    _, again = whitening.whitening(features, labels, 5)
    np.testing.assert_allclose(once @ once.T, again @ again.T)


@pytest.mark.parametrize("copies", [False, True], ids=["one image", "equal images"])
def test_without_differences_it_is_principal_directions(copies):
    draw = np.random.default_rng(0)
    features = draw.normal(size=(12, 3)) * [1, 5, 2]
    labels = np.arange(12)
    if copies:
        features = np.repeat(features, 2, axis=0)
        labels = np.repeat(labels, 2)
    mean, kernel = whitening.whitening(features, labels, 2)
    _, _, directions = np.linalg.svd(features - mean)
    expected = directions[:2].T @ directions[:2]
    np.testing.assert_allclose(kernel @ kernel.T, expected, atol=1e-12)


def test_a_head_is_the_closed_form_at_unit_norm():
    draw = np.random.default_rng(0)
    features = (draw.normal(size=(80, 6)) @ draw.normal(size=(6, 6)) + 5).astype("f4")
    labels = draw.integers(0, 8, 80)
    head = heads.Head(6, 4, rngs=nnx.Rngs(0))
    head.fit(features, labels)
    mean, kernel = whitening.whitening(features, labels, 4)
    expected = (features - mean) @ kernel
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(head(jnp.asarray(features)), expected, atol=1e-5)
    assert float((head.out.kernel[...] ** 2).sum()) == pytest.approx(4)


def test_dimensions_beyond_the_features_are_zero():
    draw = np.random.default_rng(0)
    features, labels = draw.normal(size=(30, 3)), draw.integers(0, 4, 30)
    x = {}
    for dim in (3, 5):
        head = heads.Head(3, dim, rngs=nnx.Rngs(0))
        head.fit(features, labels)
        x[dim] = np.asarray(head(jnp.asarray(features, jnp.float32)))
    np.testing.assert_allclose(x[5][:, :3], x[3], atol=1e-5)
    assert not x[5][:, 3:].any()


def test_a_sample_has_several_images_of_each_of_its_classes():
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(500), 40))
    sample = sample_of_classes(labels, 2048)
    assert len(sample) == len(set(sample.tolist())) == 2048
    _, counts = np.unique(labels[sample], return_counts=True)
    assert len(counts) == 128
    assert (counts == 16).all()
    few = sample_of_classes(np.repeat(np.arange(3), [1, 5000, 2]), 2048)
    assert np.bincount(np.repeat(np.arange(3), [1, 5000, 2])[few]).tolist() == [
        1,
        682,
        2,
    ]
