"""The learning system in small: data, batches, augmentation, models, a whole run."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tripletjax import learn
from tripletjax.learn import augment, data, models, runs, sampling, training
from tripletjax.learn.checkpoints import Checkpoints

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
    return runs.Config(**settings | {"learning_rate": 1e-2, "average": 0.5} | options)


@pytest.fixture(scope="module")
def finished(datasets, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "small"
    return out, runs.run(small(), out, progress=False)


# Data.


def test_digits_come_back_as_they_are_in_the_file(tmp_path):
    from sklearn.datasets import load_digits

    digits = load_digits()
    dataset = data.load("digits", data_dir=tmp_path)
    assert "tensorflow" not in sys.modules
    assert list(tmp_path.rglob("*.array_record*"))
    sizes = [len(part) for part in (dataset.train, dataset.validation, dataset.test)]
    assert sizes == [808, 90, 899]
    np.testing.assert_array_equal(dataset.test.images[..., 0] / 15, digits.images[898:])
    np.testing.assert_array_equal(dataset.test.labels, digits.target[898:])
    rest = [*dataset.train.images, *dataset.validation.images]
    first = [image.tobytes() for image in np.uint8(digits.images[:898] * 15)]
    assert sorted(image.tobytes() for image in rest) == sorted(first)
    assert dataset.test.images.dtype == np.uint8
    assert dataset.label_names == tuple("0123456789")
    again = data.load("digits", data_dir=tmp_path)
    np.testing.assert_array_equal(again.train.images, dataset.train.images)


def test_unknown_data():
    with pytest.raises(ValueError, match="no dataset 'faces'"):
        data.load("faces")
    with pytest.raises(ValueError, match="split must be one of images, classes"):
        data.load("digits", split="some")


def shapes(folder, *, kinds=8, each=10, size=(24, 20), mode="L", seed=0):
    """A folder of pictures: of each kind rectangles of one place, with noise."""
    draw = np.random.default_rng(seed)
    for kind in range(kinds):
        place = folder / f"group{kind % 2}" / f"kind{kind}"
        place.mkdir(parents=True)
        for number in range(each):
            pixels = draw.integers(0, 60, (size[1], size[0], 3), dtype=np.uint8)
            left, top = divmod(kind, 4)
            pixels[4 * top : 4 * top + 6, 10 * left : 10 * left + 8] += 150
            image = Image.fromarray(pixels).convert(mode)
            suffix = ("png", "bmp", "webp")[number % 3]
            image.save(place / f"{number}.{suffix}", lossless=True)
    return folder


def test_a_folder_of_images(tmp_path):
    folder = shapes(tmp_path / "pictures")
    dataset = data.load(str(folder), data_dir=tmp_path / "kept")
    names = sorted(f"group{kind % 2}/kind{kind}" for kind in range(8))
    assert list(dataset.label_names) == names
    assert dataset.train.images.shape == (8 * 7, 20, 24, 1)
    assert (len(dataset.validation), len(dataset.test)) == (8, 16)
    for part in (dataset.train, dataset.validation, dataset.test):
        assert set(part.labels) == set(range(8))
    every = {
        image.tobytes()
        for part in (dataset.train, dataset.validation, dataset.test)
        for image in part.images
    }
    assert len(every) == 80
    for label, name in enumerate(names):
        exact = np.asarray(Image.open(folder / name / "0.png"))[..., None]
        parts = (dataset.train, dataset.validation, dataset.test)
        assert any(
            (part.images[part.labels == label] == exact).all((1, 2, 3)).any()
            for part in parts
        )


def test_what_is_held_out_does_not_depend_on_names(tmp_path):
    folder = shapes(tmp_path / "pictures")
    one = data.load(str(folder), data_dir=tmp_path / "kept")
    for file in sorted(folder.rglob("*.*")):
        file.rename(file.with_name(f"{100 - int(file.stem)}{file.suffix}"))
    two = data.load(str(folder), data_dir=tmp_path / "kept")
    assert {x.tobytes() for x in one.test.images} == {
        x.tobytes() for x in two.test.images
    }


def test_classes_are_held_out_whole(tmp_path):
    folder = shapes(tmp_path / "pictures", kinds=8, each=4)
    dataset = data.load(str(folder), split="classes", data_dir=tmp_path / "kept")
    kinds = [
        set(part.labels) for part in (dataset.train, dataset.validation, dataset.test)
    ]
    assert [len(each) for each in kinds] == [4, 2, 2]
    assert set.union(*kinds) == set(range(8))
    few = shapes(tmp_path / "few", kinds=5, each=3)
    with pytest.raises(ValueError, match="of 5 classes 4 are held out"):
        data.load(str(few), split="classes", data_dir=tmp_path / "kept")


def test_a_folder_is_decoded_once(tmp_path, monkeypatch):
    folder = shapes(tmp_path / "pictures", each=4)
    one = data.load(str(folder), data_dir=tmp_path / "kept")
    assert list((tmp_path / "kept").rglob("*.array_record*"))
    with monkeypatch.context() as patch:
        patch.setattr(data, "open_image", lambda file: 1 / 0)
        two = data.load(str(folder), data_dir=tmp_path / "kept")
    assert one.key == two.key
    np.testing.assert_array_equal(one.train.images, two.train.images)
    # Another content at the same place.
    file = folder / "group0" / "kind0" / "0.png"
    Image.new("L", (24, 20), 77).save(file)
    assert data.load(str(folder), data_dir=tmp_path / "kept").key != one.key


def test_broken_images_are_named_and_skipped(tmp_path):
    folder = shapes(tmp_path / "pictures", each=4)
    place = folder / "group0" / "kind0"
    (place / "none.png").write_bytes(b"this is no image")
    whole = (place / "0.png").read_bytes()
    (place / "half.png").write_bytes(whole[: len(whole) // 2])
    (place / "empty.jpg").write_bytes(b"")
    (place / "notes.txt").write_text("not looked at")
    (place / ".hidden.png").write_bytes(b"not looked at")
    for _ in range(2):
        dataset = data.load(str(folder), data_dir=tmp_path / "kept")
        named = [line.split(":")[0] for line in dataset.skipped]
        assert named == [
            f"group0/kind0/{n}" for n in ("empty.jpg", "half.png", "none.png")
        ]
    assert len(dataset.train) + len(dataset.validation) + len(dataset.test) == 32


def test_links_are_followed_but_not_in_circles(tmp_path):
    folder = shapes(tmp_path / "pictures", each=4)
    (tmp_path / "links").mkdir()
    for name in ("group0", "group1"):
        (tmp_path / "links" / name).symlink_to(folder / name)
    (folder / "group0" / "back").symlink_to(tmp_path / "links")
    dataset = data.load(str(tmp_path / "links"), data_dir=tmp_path / "kept")
    assert len(dataset.label_names) == 8
    assert len(dataset.train) + len(dataset.validation) + len(dataset.test) == 32


def test_a_class_of_one_image_is_trained_on(tmp_path):
    folder = shapes(tmp_path / "pictures", kinds=3, each=8)
    (folder / "single").mkdir()
    Image.new("L", (24, 20), 200).save(folder / "single" / "a.png")
    dataset = data.load(str(folder), data_dir=tmp_path / "kept")
    label = dataset.label_names.index("single")
    assert (dataset.train.labels == label).sum() == 1


@pytest.mark.parametrize("content", ["nothing", "loose", "one class", "all broken"])
def test_folders_that_cannot_be_trained_on(tmp_path, content):
    folder = tmp_path / "pictures"
    folder.mkdir()
    words = "has no images"
    if content == "loose":
        Image.new("L", (8, 8)).save(folder / "a.png")
        words = "one folder per class, but 1 images lie in it directly"
    elif content == "one class":
        shapes(folder, kinds=1)
        words = "has one folder of images"
    elif content == "all broken":
        shapes(folder, kinds=2, each=2)
        for file in folder.rglob("*.*"):
            file.write_bytes(b"broken")
        words = "none of 4 images could be read"
    with pytest.raises(ValueError, match=words):
        data.load(str(folder), data_dir=tmp_path / "kept")


def test_images_are_made_into_one_shape_without_distortion():
    shape = data.Shape(20, 40, 3)
    wide = Image.new("RGB", (80, 40), (9, 8, 7))
    np.testing.assert_array_equal(shape.fit(wide), np.full((20, 40, 3), (9, 8, 7)))
    square = Image.new("RGB", (10, 10), (50, 0, 0))
    square.paste((0, 200, 0), (2, 2, 8, 8))
    fitted = shape.fit(square)
    assert fitted.shape == (20, 40, 3)
    np.testing.assert_allclose(fitted[:, :10], np.full((20, 10, 3), (50, 0, 0)), atol=8)
    green = fitted[..., 1] > 100
    assert abs(green.any(0).sum() - green.any(1).sum()) <= 1


def test_every_kind_of_picture_is_read(tmp_path):
    grey = np.uint8(np.arange(100).reshape(10, 10))
    kinds = {
        "grey.png": Image.fromarray(grey),
        "deep.png": Image.fromarray(np.uint16(grey) * 257),
        "colour.png": Image.merge("RGB", [Image.fromarray(grey)] * 3),
        "clear.png": Image.merge(
            "LA", [Image.fromarray(grey), Image.new("L", (10, 10), 255)]
        ),
        "indexed.png": Image.fromarray(grey).convert("P"),
        "bits.png": Image.fromarray(grey > 50),
    }
    shape = data.Shape(10, 10, 1)
    for name, image in kinds.items():
        image.save(tmp_path / name)
        expected = 255 * (grey > 50) if name == "bits.png" else grey
        read = shape.fit(data.open_image(tmp_path / name))[..., 0]
        np.testing.assert_allclose(read, expected, atol=1, err_msg=name)
    clear = Image.new("LA", (10, 10), (0, 0))
    assert (shape.fit(clear) == 255).all()


def test_colour_is_what_is_seen(tmp_path):
    grey = Image.fromarray(np.uint8(np.arange(100).reshape(10, 10)))
    grey.convert("RGB").save(tmp_path / "grey.jpg")
    assert not data.is_colour(data.open_image(tmp_path / "grey.jpg"))
    Image.new("RGB", (9, 9), (200, 30, 30)).save(tmp_path / "red.jpg")
    assert data.is_colour(data.open_image(tmp_path / "red.jpg"))
    assert not data.is_colour(grey.convert("P"))


def test_the_shape_is_that_of_the_median_image():
    sizes = [(100, 50), (200, 100), (90, 45)]
    assert data.Shape.of(sizes, False, None) == data.Shape(16, 32, 1)
    assert data.Shape.of(sizes, True, None) == data.Shape(32, 64, 3)
    assert data.Shape.of(sizes, True, 100) == data.Shape(50, 100, 3)
    assert data.Shape.of([(8, 8)], False, None) == data.Shape(8, 8, 1)


def test_datasets_of_the_catalogue():
    expected = data.load("digits")
    dataset = data.load("tfds:digits:test")
    assert dataset.label_names == expected.label_names
    parts = (dataset.train, dataset.validation, dataset.test)
    every = [image.tobytes() for part in parts for image in part.images]
    assert sorted(every) == sorted(image.tobytes() for image in expected.test.images)
    whole = data.load("tfds:digits")
    assert len(whole.train) + len(whole.validation) + len(whole.test) == 1797


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("tfds:fashion_mnist", FileNotFoundError, "not prepared.*TensorFlow"),
        ("tfds:nothing_of_that", ValueError, "no dataset 'nothing_of_that'"),
        ("tfds:", ValueError, "must be tfds:NAME"),
    ],
)
def test_the_catalogue_does_not_wait_for_the_network(name, error, words):
    start = time.perf_counter()
    with pytest.raises(error, match=words):
        data.load(name)
    assert time.perf_counter() - start < 20


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


def test_batches_of_images_with_turned_classes():
    images = np.random.default_rng(0).integers(0, 99, (30, 5, 5, 2), dtype=np.uint8)
    labels = np.arange(30) % 3 + 10
    batches = sampling.ImageBatches(images, labels, classes=24, per_class=4, turns=8)
    got, kinds = batches[3]
    assert got.shape == (96, 5, 5, 2)
    assert len(set(kinds)) == 24
    found = {}
    for image, kind in zip(got, kinds):
        for turn in range(8):
            back = image[:, ::-1] if turn >= 4 else image
            back = np.rot90(back, -(turn % 4))
            same = np.flatnonzero((images == back).all((1, 2, 3)))
            if len(same):
                found.setdefault(kind, set()).add((turn, labels[same[0]]))
    # Each class of a batch is one class in one turn.
    assert all(len(turns) == 1 for turns in found.values())
    assert len(set.union(*found.values())) == 24


@pytest.mark.parametrize("turns", [0, 3, 4])
def test_turns_that_do_not_fit(turns):
    with pytest.raises(ValueError, match=r"turns must be 1, 2, 4 or 8.*4 x 6 pixels"):
        sampling.ImageBatches(np.zeros((4, 4, 6, 1)), [0, 0, 1, 1], 2, 2, turns=turns)


def test_half_turns_of_oblong_images():
    images = np.arange(4 * 24, dtype=np.uint8).reshape(4, 4, 6, 1)
    batches = sampling.ImageBatches(images, [0, 0, 1, 1], 4, 2, turns=2)
    got, kinds = batches[0]
    for image, kind in zip(got, kinds):
        back = np.rot90(image, 2) if kind >= 2 else image
        assert (images[2 * (kind % 2) :][:2] == back).all((1, 2, 3)).any()


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


def test_erasing_makes_a_rectangle_grey():
    images = jnp.ones((200, 20, 30, 3))
    erased = augment.random_erase(jax.random.key(0), images, 0.5)
    grey = np.asarray((erased == 0.5).all(-1))
    assert 0.3 < grey.any((1, 2)).mean() < 0.7
    for one in grey[grey.any((1, 2))]:
        rows, columns = one.any(1), one.any(0)
        np.testing.assert_array_equal(one, rows[:, None] & columns)
        assert 1 <= rows.sum() <= 9
        assert 2 <= columns.sum() <= 13


def test_flips_and_brightness():
    images = jax.random.uniform(jax.random.key(1), (40, 6, 7, 1))
    flipped = augment.random_flip(jax.random.key(0), images)
    mirrored = (flipped == images[:, :, ::-1]).all((1, 2, 3))
    assert (mirrored | (flipped == images).all((1, 2, 3))).all()
    assert 0.2 < mirrored.mean() < 0.8
    brighter = augment.random_brightness(jax.random.key(0), images, 0.2)
    assert ((brighter >= 0) & (brighter <= 1)).all()
    assert jnp.abs(brighter - images).max() <= 0.2
    assert jnp.std(jnp.mean(brighter - images, axis=(1, 2, 3))) > 0.05


def test_augmentation_is_off_by_default_and_checked():
    images = jax.random.uniform(jax.random.key(0), (3, 8, 6, 2))
    np.testing.assert_array_equal(augment.Augment()(jax.random.key(1), images), images)
    every = augment.Augment(0.1, 10.0, 0.1, 0.1, True, 0.1, 0.5)
    changed = jax.jit(every)(jax.random.key(1), images)
    assert changed.shape == images.shape
    assert not (changed == images).all()
    with pytest.raises(ValueError, match="shift must be finite"):
        augment.Augment(shift=-1)
    with pytest.raises(ValueError, match="erase must be 0 to 1"):
        augment.Augment(erase=2)


@pytest.mark.parametrize("shape", [(8, 8, 1), (17, 33, 3), (1, 1, 1)])
@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
@pytest.mark.parametrize("kind", runs.MODELS)
def test_any_image_size_gives_unit_vectors(kind, dtype, shape):
    model = runs.MODELS[kind](
        16, channels=(16, 32), in_channels=shape[-1], dtype=dtype, rngs=nnx.Rngs(0)
    )
    images = jax.random.uniform(jax.random.key(0), (5, *shape))
    embeddings = nnx.jit(lambda model, x: model(x))(model, images)
    assert embeddings.dtype == jnp.float32
    norms = jnp.linalg.norm(embeddings, axis=-1)
    assert norms.shape == (5,)
    np.testing.assert_allclose(norms, 1, rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "count"), [("cnn", 73_440), ("resnet", 703_200), ("multiscale", 381_856)]
)
def test_number_of_parameters(kind, count):
    model = runs.MODELS[kind](rngs=nnx.Rngs(0))
    assert sum(p.size for p in jax.tree.leaves(nnx.state(model, nnx.Param))) == count


def test_a_zero_vector_has_a_finite_gradient():
    gradient = jax.grad(lambda x: models.unit_norm(x).sum())(jnp.zeros((1, 4)))
    assert jnp.isfinite(gradient).all()


# Runs.


def test_a_run_leaves_everything_behind(finished):
    out, evaluations = finished
    assert {path.name for path in out.iterdir()} == {
        "config.json",
        "metrics.jsonl",
        "summary.json",
        "checkpoints",
        "best",
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
    assert runs.evaluate(embed, dataset) == evaluations["trained"]
    with pytest.raises(FileNotFoundError, match="no trained model"):
        learn.load_embedder(out / "checkpoints")


def test_the_embedder_takes_images_of_any_kind(finished, tmp_path):
    embed = learn.load_embedder(finished[0])
    images = data.load("digits").test.images[:6]
    expected = embed(images)
    large = np.repeat(np.repeat(images, 3, axis=1), 3, axis=2)
    np.testing.assert_allclose(
        embed(np.repeat(images, 3, axis=-1)), expected, atol=1e-5
    )
    assert (jnp.sum(embed(large) * expected, axis=1) > 0.8).all()
    mixed = [large[0], images[1, ..., 0], np.repeat(large[2], 3, axis=-1)]
    assert (jnp.sum(embed(mixed) * expected[:3], axis=1) > 0.8).all()
    files = [tmp_path / f"{number}.png" for number in range(6)]
    for file, image in zip(files, images):
        Image.fromarray(image[..., 0]).save(file)
    np.testing.assert_array_equal(embed(files), expected)


@pytest.mark.parametrize(
    ("images", "error", "words"),
    [
        (np.zeros((2, 8, 8), np.float32), TypeError, "uint8, got dtype float32"),
        (np.zeros((2, 8, 8, 2), np.uint8), ValueError, "1, 3 or 4 channels"),
        (np.zeros((8,), np.uint8), ValueError, r"must be \[n, height, width\]"),
        ([], ValueError, "must not be empty"),
        ("a.png", TypeError, "put it into a list"),
        (["nowhere.png"], FileNotFoundError, "nowhere.png"),
    ],
)
def test_the_embedder_names_what_it_cannot_take(finished, images, error, words):
    with pytest.raises(error, match=words):
        learn.load_embedder(finished[0])(images)


def test_a_run_is_repeatable(finished, tmp_path):
    out, _ = finished
    runs.run(small(), tmp_path / "again", progress=False)
    lines = [(d / "metrics.jsonl").read_text() for d in (out, tmp_path / "again")]
    assert lines[0] == lines[1]
    runs.run(small(seed=1), tmp_path / "other", progress=False)
    assert (tmp_path / "other" / "metrics.jsonl").read_text() != lines[0]


def digits_batches():
    train = data.load("digits").train
    return sampling.ImageBatches(train.images, train.labels, 10, 4)


def trained(steps=20, **options):
    """A small model and what its training said."""
    model = models.EmbeddingCNN(8, channels=(8, 8), rngs=nnx.Rngs(0))
    options = {"tx": optax.adam(1e-2), "batches": digits_batches()} | options
    return model, list(training.fit(model, steps=steps, progress=False, **options))


def assert_same_model(one, two):
    same = jax.tree.map(lambda a, b: (a == b).all(), nnx.state(one), nnx.state(two))
    assert all(jax.tree.leaves(same))


@pytest.mark.parametrize("mining", training.MINING)
def test_every_mining_trains(mining):
    start = training.mined_loss("all")
    _, lines = trained(loss=[(0, start), (10, training.mined_loss(mining))])
    assert [line["step"] for line in lines] == [10, 20]
    assert all(0 <= line["active"] <= 1 and line["spread"] > 0.05 for line in lines)


def test_losses_follow_one_another():
    every, hard = (training.mined_loss(mining) for mining in ("all", "hard"))
    one, _ = trained(10, loss=every)
    two, _ = trained(20, loss=[(0, every), (10, hard)])
    for steps, loss, same in ((10, [(0, every), (10, hard)], one), (20, hard, None)):
        model, _ = trained(steps, loss=loss)
        if same is not None:
            assert_same_model(model, same)
        else:
            with pytest.raises(AssertionError):
                assert_same_model(model, two)
    with pytest.raises(ValueError, match="first loss must hold from step 0"):
        trained(loss=[(1, every)])


def test_chunks_have_the_loss_of_the_whole_batch():
    one, whole = trained(2, tx=optax.sgd(0.1), log_every=1)
    two, chunks = trained(2, tx=optax.sgd(0.1), log_every=1, chunk=8)
    for a, b in zip(whole, chunks):
        np.testing.assert_allclose(list(a.values()), list(b.values()), rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
        nnx.state(one),
        nnx.state(two),
    )
    with pytest.raises(ValueError, match="chunk must divide the batch of 40"):
        trained(1, chunk=7)


def test_the_average_of_parameters():
    tx = optax.sgd(0.1)
    paths = [trained(steps, tx=tx)[0] for steps in (1, 2)]
    start = models.EmbeddingCNN(8, channels=(8, 8), rngs=nnx.Rngs(0))
    first, second = (nnx.state(model, nnx.Param) for model in paths)
    expected = jax.tree.map(
        lambda a, b, c: 0.9 * (0.9 * a + 0.1 * b) + 0.1 * c,
        nnx.state(start, nnx.Param),
        first,
        second,
    )
    model, _ = trained(2, tx=tx, average=0.9)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
        nnx.state(model, nnx.Param),
        expected,
    )


class WithStatistics(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.first = nnx.Linear(64, 16, rngs=rngs)
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.drop = nnx.Dropout(0.2, rngs=rngs)
        self.last = nnx.Linear(16, 8, rngs=rngs)

    def __call__(self, images):
        x = jax.nn.relu(self.norm(self.first(images.reshape(len(images), -1))))
        return self.last(self.drop(x))


@pytest.mark.parametrize("chunk", [None, 8])
def test_models_with_statistics_and_dropout_go_on_where_they_stopped(tmp_path, chunk):
    def train(steps, directory=None):
        model = WithStatistics()
        kept = None if directory is None else Checkpoints(directory)
        lines = list(
            training.fit(
                model,
                optax.adam(1e-3),
                digits_batches(),
                steps=steps,
                chunk=chunk,
                checkpoints=kept,
                log_every=5,
                checkpoint_every=5,
                progress=False,
            )
        )
        return model, lines

    whole, lines = train(15)
    assert not (whole.norm.mean[...] == 0).any()
    train(5, tmp_path / "kept")
    again, rest = train(15, tmp_path / "kept")
    assert rest == [{"step": 5, "resumed": True, "damaged": []}, *lines[1:]]
    assert_same_model(again, whole)
    # For use, not for training.
    images = data.load("digits").test.images[:50]
    one, two = (training.embed_images(again, images) for _ in range(2))
    np.testing.assert_array_equal(one, two)


def test_ten_lines_for_own_images_and_model():
    images = np.random.default_rng(0).integers(0, 255, (40, 8, 8, 1), dtype=np.uint8)
    labels = np.arange(40) % 4
    images[np.arange(40), labels] = 255
    model = WithStatistics()
    batches = sampling.ImageBatches(images, labels, classes=4, per_class=4)
    lines = list(
        training.fit(model, optax.adam(1e-2), batches, steps=60, progress=False)
    )
    assert lines[-1]["active"] < lines[0]["active"]
    assert training.embed_images(model, images).shape == (40, 8)


def test_a_loss_that_is_not_finite_stops_before_the_last_checkpoint(tmp_path):
    batches, poison = digits_batches(), 12

    class Poisoned:
        def __getitem__(self, step):
            images, labels = batches[step]
            images = images.astype(np.float32)
            if step == poison:
                images[0, 0, 0] = np.nan
            return images, labels

    kept = Checkpoints(tmp_path / "kept")
    with pytest.raises(FloatingPointError, match="not finite at step 15"):
        trained(40, batches=Poisoned(), checkpoints=kept, checkpoint_every=5)
    assert kept.steps == [5, 10]


def test_collapse_is_told():
    class Collapsing(nnx.Module):
        def __init__(self):
            self.weight = nnx.Param(jnp.full((), 1e-6))

        def __call__(self, images):
            x = self.weight[...] * images.reshape(len(images), -1)
            return x + 1.0

    with pytest.warns(training.CollapseWarning, match=r"collapsed at step 10.*all"):
        list(
            training.fit(
                Collapsing(), optax.sgd(0.0), digits_batches(), steps=20, progress=False
            )
        )


def test_the_best_validation_is_kept(tmp_path):
    values = iter([3.0, 5.0, 4.0, 5.0, float("nan")])
    kept, seen = Checkpoints(tmp_path / "best", keep=1), []

    def validate(model):
        seen.append(jax.tree.map(jnp.copy, nnx.state(model)))
        return {"score": next(values)}

    options = {"validate": validate, "validate_every": 4, "best": "score"}
    trained(16, best_checkpoints=kept, **options)
    assert kept.steps == [16]
    _, best, _ = kept.restore(seen[0])
    jax.tree.map(np.testing.assert_array_equal, best, seen[3])


# Checkpoints.


def damage(directory):
    """Changes one bit of the largest file."""
    files = [path for path in directory.rglob("*") if path.is_file()]
    file = max(files, key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_damaged_checkpoints_fall_back(tmp_path):
    state = {"x": jnp.arange(1000.0), "key": jax.random.key(3), "none": None}
    kept = Checkpoints(tmp_path / "kept")
    for step in (1, 2, 3):
        kept.save(step, state | {"x": state["x"] + step})
    assert kept.steps == [2, 3]
    kept.close()
    damage(tmp_path / "kept" / "3")
    kept = Checkpoints(tmp_path / "kept")
    step, found, damaged = kept.restore(state)
    assert step == 2
    np.testing.assert_array_equal(found["x"], state["x"] + 2)
    assert found["key"] == state["key"]
    assert len(damaged) == 1
    assert "step 3 is damaged" in damaged[0]
    assert (tmp_path / "3-damaged").is_dir()
    kept.save(3, state)
    assert kept.steps == [2, 3]
    for each in (2, 3):
        shutil.rmtree(tmp_path / "kept" / str(each) / "state", ignore_errors=True)
    with pytest.raises(OSError, match=r"step 3 is damaged.*step 2 is damaged.*none"):
        Checkpoints(tmp_path / "kept").restore(state)


def test_a_checkpoint_that_cannot_be_written(tmp_path, monkeypatch):
    kept = Checkpoints(tmp_path / "kept")
    kept.save(1, {"x": jnp.zeros(3)})

    def full(*arguments, **options):
        raise ValueError("RESOURCE_EXHAUSTED: no space left on device")

    monkeypatch.setattr(kept._orbax, "save", full)
    with pytest.raises(OSError, match=r"step 2 could not be written.*no space left"):
        kept.save(2, {"x": jnp.zeros(3)})
    assert kept.steps == [1]


def test_nothing_is_overwritten(finished):
    out, _ = finished
    before = (out / "metrics.jsonl").read_text()
    with pytest.raises(runs.RunExistsError, match="not an empty directory"):
        runs.run(small(), out)
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
        runs.Config(**options)


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


def with_images(shape, kinds, each):
    """A dataset of so many classes, of which nothing is held out."""
    images = np.zeros((kinds * each, *shape), np.uint8)
    train = data.Images(images, np.repeat(np.arange(kinds), each))
    names = tuple(map(str, range(kinds)))
    return data.Dataset("some", train, train[:0], train[:0], names, key="")


@pytest.mark.parametrize(
    ("shape", "kinds", "each", "expected"),
    [
        ((8, 8, 1), 10, 80, ("cnn", 10, 8, 1, (32, 64))),
        ((32, 32, 1), 97, 15, ("cnn", 40, 4, 8, (32, 64, 128))),
        ((32, 24, 1), 97, 15, ("cnn", 40, 4, 2, (32, 64, 128))),
        ((48, 64, 3), 500, 90, ("resnet", 40, 4, 1, (32, 64, 128))),
        ((64, 64, 3), 2, 90, ("resnet", 2, 8, 1, (32, 64, 128))),
    ],
)
def test_choices_by_the_data(shape, kinds, each, expected):
    config = runs.chosen(runs.Config(), with_images(shape, kinds, each))
    names = ("model", "classes", "per_class", "turns", "channels")
    assert tuple(getattr(config, name) for name in names) == expected
    assert config.augment.flip == (shape[-1] == 3)
    own = runs.Config(model="multiscale", classes=2, per_class=3, turns=1, steps=5)
    kept = runs.chosen(own, with_images(shape, kinds, each))
    assert (kept.model, kept.classes, kept.per_class) == ("multiscale", 2, 3)
    assert (kept.turns, kept.steps) == (1, 5)


# Runs that are stopped.


def test_a_run_is_not_gone_on_with_by_accident(finished, tmp_path):
    out, evaluations = finished
    assert runs.run(small(), out, resume=True) == evaluations
    with pytest.raises(ValueError, match="made otherwise: seed was 0 and is 1"):
        runs.run(small(seed=1), out, resume=True)
    (tmp_path / "notes.txt").write_text("precious")
    with pytest.raises(runs.RunExistsError, match="not the directory of a run"):
        runs.run(small(), tmp_path, resume=True)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_run_whose_data_changed_is_not_gone_on_with(tmp_path):
    folder = shapes(tmp_path / "pictures", each=4)
    config = small(data=str(folder), steps=2)
    runs.run(config, tmp_path / "run", progress=False)
    (tmp_path / "run" / "summary.json").unlink()
    Image.new("L", (24, 20), 77).save(folder / "group0" / "kind0" / "0.png")
    with pytest.raises(ValueError, match="no longer what the run"):
        runs.run(config, tmp_path / "run", resume=True, progress=False)


def test_a_run_on_a_folder_with_broken_images(tmp_path):
    folder = shapes(tmp_path / "pictures", size=(40, 30), mode="RGB", each=6)
    (folder / "group0" / "kind0" / "broken.png").write_bytes(b"")
    config = small(data=str(folder), steps=3, split="classes")
    evaluations = runs.run(config, tmp_path / "run", progress=False)
    settings = json.loads((tmp_path / "run" / "config.json").read_text())
    assert settings["skipped"][0].startswith("group0/kind0/broken.png")
    assert settings["model"] == "resnet"
    assert settings["shape"] == [30, 40, 3]
    assert "nearest_in_train" not in evaluations["trained"]
    embed = learn.load_embedder(tmp_path / "run")
    assert embed([folder / "group0" / "kind0" / "0.png"]).shape == (1, 16)


@pytest.mark.parametrize(("kinds", "each"), [(2, 2), (3, 8), (2, 1)])
def test_a_tiny_folder_is_trained_on(tmp_path, kinds, each):
    folder = shapes(tmp_path / "pictures", kinds=kinds, each=each)
    config = runs.Config(data=str(folder), steps=2, channels=(8, 16), dim=8)
    evaluations = runs.run(config, tmp_path / "run", progress=False)
    assert bool(evaluations["trained"]) == (each == 8)
    assert (tmp_path / "run" / "neighbors.png").exists()
    assert learn.load_embedder(tmp_path / "run")(
        np.zeros((1, 9, 9), np.uint8)
    ).shape == (1, 8)


TRAIN = """
import resource, sys
from tripletjax.learn import runs
config = runs.Config(
    steps=240, channels=(8, 16), dim=16, per_class=4, average=0.5,
    checkpoint_every=7, validate_every=30,
)
if sys.argv[2:]:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
try:
    runs.run(config, sys.argv[1], resume=True, progress=False)
except KeyboardInterrupt as error:
    sys.exit(f"interrupted: {error}")
except OSError as error:
    sys.exit(f"failed: {error}")
"""


def start(out, *arguments):
    return subprocess.Popen(
        [sys.executable, "-c", TRAIN, str(out), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(out, *arguments):
    process = start(out, *arguments)
    printed, error = process.communicate(timeout=300)
    return process.returncode, printed, error


def steps_of(out):
    path = out / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return max(
        (json.loads(line)["step"] for line in lines if line[-1] == "\n"), default=0
    )


def wait_for(out, step, process):
    end = time.time() + 120
    while steps_of(out) < step and process.poll() is None and time.time() < end:
        time.sleep(0.01)


def assert_same_run(one, two):
    for name in ("config.json", "metrics.jsonl", "summary.json"):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    assert_same_model(runs.load_model(one)[0], runs.load_model(two)[0])
    kept = [Checkpoints(out / "checkpoints") for out in (one, two)]
    assert kept[0].steps == kept[1].steps
    # A digest of every number of the state is written with it.
    found = [each._orbax.checkpointables_metadata(240).custom_metadata for each in kept]
    assert found[0] == found[1]


@pytest.fixture(scope="module")
def whole(datasets, tmp_path_factory):
    """A run that was never stopped."""
    out = tmp_path_factory.mktemp("whole") / "run"
    code, _, error = finish(out)
    assert code == 0, error
    return out


@pytest.mark.slow
def test_killed_at_any_moment_a_run_ends_as_if_it_had_not_been(whole, tmp_path):
    draw, out, kills = random.Random(0), tmp_path / "run", 0
    while kills < 20:
        process = start(out)
        # Half of them while it trains, wherever it is, and half at any time.
        if kills % 2:
            wait_for(out, draw.randrange(1, 240), process)
            time.sleep(draw.random() / 20)
        else:
            time.sleep(draw.uniform(0, 9))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kills += 1
        if (out / "summary.json").exists():
            assert_same_run(out, whole)
            shutil.rmtree(out)
    code, _, error = finish(out)
    assert code == 0, error
    assert_same_run(out, whole)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_saves_and_goes_on(whole, tmp_path, number):
    process = start(tmp_path / "run")
    wait_for(tmp_path / "run", 50, process)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "interrupted: stopped after step" in error
    step = int(error.split("step")[-1])
    assert Checkpoints(tmp_path / "run" / "checkpoints").steps[-1] == step
    assert finish(tmp_path / "run")[0] == 0
    lines = [
        out.joinpath("metrics.jsonl").read_text() for out in (tmp_path / "run", whole)
    ]
    assert lines[0] == lines[1]
    assert_same_model(*(runs.load_model(out)[0] for out in (tmp_path / "run", whole)))


@pytest.mark.slow
def test_a_damaged_checkpoint_falls_back_and_says_so(whole, tmp_path):
    process = start(tmp_path / "run")
    wait_for(tmp_path / "run", 100, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    newest = max(Checkpoints(tmp_path / "run" / "checkpoints").steps)
    damage(tmp_path / "run" / "checkpoints" / str(newest))
    code, printed, error = finish(tmp_path / "run")
    assert code == 0, error
    assert f"the checkpoint of step {newest} is damaged" in printed
    assert f"going on from step {newest - 7}" in printed
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.slow
def test_a_full_disk_is_told(whole, tmp_path):
    # No file may become larger than this.
    code, _, error = finish(tmp_path / "run", "20000")
    assert code == 1
    assert "failed: the state of step" in error
    assert "could not be written" in error
