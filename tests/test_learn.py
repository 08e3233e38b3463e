"""The learning system in small: data, batches, augmentation, models, a whole run."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tripletjax import learn
from tripletjax.learn import augment, data, models, sampling, training

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module", autouse=True)
def datasets(tmp_path_factory):
    """Prepared datasets go into a directory of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        directory = str(tmp_path_factory.mktemp("tensorflow_datasets"))
        patch.setenv("TFDS_DATA_DIR", directory)
        patch.setattr("tensorflow_datasets.core.constants.DATA_DIR", directory)
        yield


def small(**options):
    settings = {"steps": 20, "channels": (8, 16), "dim": 16, "per_class": 4}
    return training.Config(**settings | {"learning_rate": 1e-2} | options)


@pytest.fixture(scope="module")
def finished(datasets, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "small"
    return out, training.run(small(), out, progress=False)


# Data.


def test_digits_come_back_as_they_are_in_the_file(tmp_path):
    from sklearn.datasets import load_digits

    digits = load_digits()
    dataset = data.load("digits", data_dir=tmp_path)
    assert "tensorflow" not in sys.modules
    assert list(tmp_path.rglob("*.array_record*"))
    images = np.concatenate([dataset.train.images, dataset.test.images])
    labels = np.concatenate([dataset.train.labels, dataset.test.labels])
    assert (len(dataset.train), len(dataset.test)) == (898, 899)
    np.testing.assert_array_equal(images[..., 0] / 15, digits.images)
    np.testing.assert_array_equal(labels, digits.target)
    assert images.dtype == np.uint8
    assert dataset.label_names == tuple("0123456789")
    again = data.load("digits", data_dir=tmp_path)
    np.testing.assert_array_equal(again.train.images, dataset.train.images)


def test_unknown_data():
    with pytest.raises(ValueError, match="no dataset 'faces'"):
        data.load("faces")


# Batches.


@settings(max_examples=50)
@given(
    seed=st.integers(0, 99),
    step=st.integers(0, 10_000),
    classes=st.integers(2, 6),
    per_class=st.integers(2, 5),
)
def test_batches_are_p_classes_of_k(seed, step, classes, per_class):
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(7) * 3, 4))
    batches = sampling.ClassBatches(labels, classes, per_class, seed)
    chosen = batches[step]
    values, counts = np.unique(labels[chosen], return_counts=True)
    assert len(values) == classes
    assert (counts == per_class).all()
    if per_class <= 4:
        assert len(set(chosen)) == len(chosen)
    again = sampling.ClassBatches(labels, classes, per_class, seed)
    np.testing.assert_array_equal(again[step], chosen)
    assert (batches[step + 1] != chosen).any()


def test_every_class_and_every_image_is_seen():
    labels = np.repeat(np.arange(10), 12)
    batches = sampling.ClassBatches(labels, 4, 3, seed=1)
    seen = np.concatenate([batches[step] for step in range(200)])
    assert set(seen) == set(range(len(labels)))
    passes = [
        labels[np.concatenate([batches[2 * i], batches[2 * i + 1]])] for i in range(9)
    ]
    assert all(len(set(a_pass)) == 8 for a_pass in passes)


def test_small_classes_repeat_images():
    batches = sampling.ClassBatches(np.array([0, 0, 0, 1]), 2, 3)
    assert (np.sort(batches[0]) == [0, 1, 2, 3, 3, 3]).all()


@pytest.mark.parametrize(
    ("classes", "per_class", "words"),
    [(1, 2, "classes"), (2, 1, "per_class"), (3, 2, "only 2")],
)
def test_batches_without_triplets_are_errors(classes, per_class, words):
    with pytest.raises(ValueError, match=words):
        sampling.ClassBatches(np.array([0, 0, 1, 1]), classes, per_class)


# Augmentation and models.


def test_no_augmentation_changes_nothing():
    images = jax.random.uniform(jax.random.key(0), (3, 8, 6, 2))
    np.testing.assert_allclose(
        augment.random_affine(jax.random.key(1), images), images, atol=1e-6
    )


def test_augmentation_moves_turns_and_stays_in_range():
    images = jnp.zeros((64, 9, 9, 1)).at[:, 4, 4].set(1.0)
    moved = augment.random_affine(jax.random.key(0), images, shift=2.0)
    y, x = (np.tensordot(moved[..., 0], g, 2) for g in np.mgrid[:9, :9])
    mass = moved.sum((1, 2, 3))
    assert (np.abs(np.stack([y, x]) / mass - 4) <= 2.01).all()
    assert np.std(y / mass) > 0.5
    assert ((moved >= 0) & (moved <= 1)).all()
    bar = jnp.zeros((64, 9, 9, 1)).at[:, :, 4].set(1.0)
    turned = augment.random_affine(jax.random.key(0), bar, rotation=45.0)
    assert np.std(turned[:, 0].argmax(1)) > 1
    np.testing.assert_allclose(turned[:, 4, 4, 0], 1, atol=1e-5)


@pytest.mark.parametrize("shape", [(8, 8, 1), (17, 33, 3), (1, 1, 1)])
def test_any_image_size_gives_unit_vectors(shape):
    model = models.EmbeddingCNN(16, in_channels=shape[-1], rngs=nnx.Rngs(0))
    images = jax.random.uniform(jax.random.key(0), (5, *shape))
    norms = jnp.linalg.norm(model(images), axis=-1)
    assert norms.shape == (5,)
    np.testing.assert_allclose(norms, 1, rtol=1e-5)


def test_number_of_parameters():
    model = models.EmbeddingCNN(rngs=nnx.Rngs(0))
    assert sum(p.size for p in jax.tree.leaves(nnx.state(model, nnx.Param))) == 73_440


def test_a_zero_vector_has_a_finite_gradient():
    gradient = jax.grad(lambda x: models.unit_norm(x).sum())(jnp.zeros((1, 4)))
    assert jnp.isfinite(gradient).all()


# Runs.


def test_a_run_leaves_everything_behind(finished):
    out, evaluations = finished
    assert {path.name for path in out.iterdir()} == {
        "config.json",
        "metrics.jsonl",
        "checkpoint",
        "training.png",
        "neighbors.png",
    }
    config = json.loads((out / "config.json").read_text())
    assert config["steps"] == 20
    lines = (out / "metrics.jsonl").read_text().splitlines()
    lines = [json.loads(line) for line in lines]
    assert [line["step"] for line in lines if "loss" in line] == [10, 20]
    assert [line["evaluation"] for line in lines if "evaluation" in line] == [
        "raw pixels",
        "untrained",
        "trained",
    ]
    np.testing.assert_allclose(evaluations["raw pixels"]["map_at_r"], 57.31, atol=0.01)
    np.testing.assert_allclose(
        evaluations["raw pixels"]["recall_at_1"], 98.89, atol=0.01
    )
    for name in ("training.png", "neighbors.png"):
        with Image.open(out / name) as image:
            assert min(image.size) > 300
            assert len(set(image.convert("L").tobytes())) > 20


def test_training_helps(finished):
    _, evaluations = finished
    gain = evaluations["trained"]["map_at_r"] - evaluations["untrained"]["map_at_r"]
    assert gain > 10


def test_the_embedder_is_the_trained_model(finished):
    out, evaluations = finished
    embed = learn.load_embedder(out)
    dataset = data.load("digits")
    embeddings = embed(dataset.test.images[..., 0])
    np.testing.assert_array_equal(embeddings, embed(dataset.test.images))
    np.testing.assert_allclose(jnp.linalg.norm(embeddings, axis=1), 1, rtol=1e-5)
    assert training.evaluate(embed, dataset) == evaluations["trained"]
    with pytest.raises(ValueError, match=r"images must be \[n, height, width, 1\]"):
        embed(np.zeros((2, 8, 8, 3), np.uint8))
    with pytest.raises(TypeError, match="uint8"):
        embed(np.zeros((2, 8, 8), np.float32))
    with pytest.raises(FileNotFoundError, match="no finished run"):
        learn.load_embedder(out / "checkpoint")


def test_a_run_is_repeatable(finished, tmp_path):
    out, _ = finished
    training.run(small(), tmp_path / "again", progress=False)
    lines = [(d / "metrics.jsonl").read_text() for d in (out, tmp_path / "again")]
    assert lines[0] == lines[1]
    training.run(small(seed=1), tmp_path / "other", progress=False)
    assert (tmp_path / "other" / "metrics.jsonl").read_text() != lines[0]


@pytest.mark.parametrize("mining", training.MINING)
def test_every_mining_trains(mining):
    config = small(mining=mining)
    dataset = data.load("digits")
    batches = sampling.ClassBatches(dataset.train.labels, 10, 4, 0)
    model = models.EmbeddingCNN(8, channels=(8, 8), rngs=nnx.Rngs(0))
    lines = list(training.fit(model, config, dataset.train, batches, progress=False))
    expected = ["all", "hard"] if mining == "hard" else [mining, mining]
    assert [line["mining"] for line in lines] == expected
    assert all(0 <= line["active"] <= 1 and line["spread"] > 0.05 for line in lines)


def test_a_loss_that_is_not_finite_stops_the_run():
    config = small(learning_rate=1e30)
    dataset = data.load("digits")
    batches = sampling.ClassBatches(dataset.train.labels, 10, 4, 0)
    model = models.EmbeddingCNN(8, channels=(8, 8), rngs=nnx.Rngs(0))
    with pytest.raises(FloatingPointError, match="step"):
        list(training.fit(model, config, dataset.train, batches, progress=False))


def test_nothing_is_overwritten(finished):
    out, _ = finished
    before = (out / "metrics.jsonl").read_text()
    with pytest.raises(training.RunExistsError, match="not an empty directory"):
        training.run(small(), out)
    assert (out / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mining": "some"}, "mining must be one of all, semi-hard, hard"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"warm_start": 2}, "warm_start"),
    ],
)
def test_bad_configurations_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        training.Config(**options)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data", "nowhere"], "no dataset 'nowhere'"),
        (["--out", "."], "not an empty directory"),
        (["--steps", "0"], "steps must be at least 1"),
        (["--mining", "some"], "invalid choice"),
        (["--margin", "-1"], "margin"),
    ],
)
def test_bad_arguments_are_one_line_and_exit_2(arguments, words, tmp_path):
    (tmp_path / "precious").write_text("kept")
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "train.py", *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert words in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]
