"""The learning system in small: data, batches, augmentation, models, a whole run."""

import contextlib
import dataclasses
import functools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from folders import shapes
from PIL import Image
from problems import in_lanes, unless_full, unless_slow
from programs import compilations, quickly, repeatable

import tripletjax as tj
from tripletjax import learn
from tripletjax.learn import plots
from tripletjax.learn.data import augment, datasets, image_analysis, sampling
from tripletjax.learn.data.image_array import ArrayImages
from tripletjax.learn.data.image_cache import Decoding
from tripletjax.learn.distributed import placement
from tripletjax.learn.networks import embedding_networks, layers
from tripletjax.learn.networks.embedding import as_floats
from tripletjax.learn.runs import config, defaults, preparation, record, rounds, tasks
from tripletjax.learn.runs import model as model_of_run
from tripletjax.learn.runs.record import RunRecord
from tripletjax.learn.training import loop, objectives, selection
from tripletjax.learn.training.checkpoints import Checkpoints
from tripletjax.learn.training.metrics_log import MetricsLog
from tripletjax.learn.training.objectives import batch_loss
from tripletjax.learn.training.selection import Validation

pytestmark = pytest.mark.usefixtures("own_data_dir")


def small(**options):
    # As many dimensions as digits have pixels, so that one evaluation is compiled.
    settings = {"steps": 20, "channels": (8, 16), "dim": 64, "per_class": 4}
    return learn.Config(
        **settings | {"learning_rate": 1e-2, "ema_decay": 0.5} | options
    )


def requested_of(out):
    return record.requested_options(RunRecord.read(out).requested)


@pytest.fixture(scope="module")
def finished(own_data_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "small"
    return out, learn.run(small(), out, progress=False)


@pytest.fixture(scope="module")
def embed(finished):
    return learn.load_embedder(finished[0])


@pytest.fixture(scope="module")
def finished_exactly(own_data_dir, tmp_path_factory):
    """The same run to the last bit, for others to be compared with."""
    out = tmp_path_factory.mktemp("runs") / "exact"
    with repeatable():
        learn.run(small(), out, progress=False)
    return out


def test_an_embedder_needs_nothing_that_reads_data_or_draws(finished):
    code = f"""
import sys
import numpy as np
from tripletjax import learn
embed = learn.load_embedder({str(finished[0])!r})
print(embed(np.zeros((2, 8, 8), np.uint8)).shape)
heavy = ("tensorflow_datasets", "grain", "matplotlib", "sklearn", "array_record")
assert not (loaded := [name for name in heavy if name in sys.modules]), loaded
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("(2, 64)\n", 0), done.stderr


def test_what_is_lazy_is_there():
    for name in learn.__all__:
        assert getattr(learn, name) is not None
        assert name in dir(learn)
    assert learn.Config is config.Config
    with pytest.raises(AttributeError, match="no attribute 'fits'"):
        _ = learn.fits


# Augmentation and models.


def test_no_augmentation_changes_nothing():
    images = jax.random.uniform(jax.random.key(0), (3, 8, 6, 2))
    np.testing.assert_allclose(
        augment.random_warp(jax.random.key(1), images), images, atol=1e-6
    )


def test_augmentation_moves_turns_and_stays_in_range():
    images = jnp.zeros((64, 9, 9, 1)).at[:, 4, 4].set(1.0)
    moved = augment.random_warp(jax.random.key(0), images, shift=2.0)
    y, x = (np.tensordot(moved[..., 0], g, 2) for g in np.mgrid[:9, :9])
    mass = moved.sum((1, 2, 3))
    assert (np.abs(np.stack([y, x]) / mass - 4) <= 2.01).all()
    assert np.std(y / mass) > 0.5
    assert ((moved >= 0) & (moved <= 1)).all()
    bar = jnp.zeros((64, 9, 9, 1)).at[:, :, 4].set(1.0)
    turned = augment.random_warp(jax.random.key(0), bar, rotation=45.0)
    assert np.std(turned[:, 0].argmax(1)) > 1
    np.testing.assert_allclose(turned[:, 4, 4, 0], 1, atol=1e-5)


def test_bending_moves_parts_apart_and_smoothly():
    # Every pixel tells where it comes from.
    row = jnp.linspace(0, 1, 33)
    images = jnp.broadcast_to(row[None, None, :, None], (64, 33, 33, 1))
    bent = augment.random_warp(jax.random.key(0), images, elastic=3.0)
    moved = 32 * np.asarray(bent - images)[:, 3:-3, 3:-3, 0]
    assert np.abs(moved).max() < 1.4 * 3
    assert np.abs(moved).mean() > 0.5
    assert np.abs(moved[:, 0, 0] - moved[:, -1, -1]).mean() > 0.5
    for axis in (1, 2):
        # From a point of the grid to the next are 6.6 pixels.
        assert np.abs(np.diff(moved, axis=axis)).max() < 1.5 * 6 / 6.6


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


@pytest.mark.slow
def test_group_norm_is_that_of_flax():
    x = 2 + jax.random.normal(jax.random.key(0), (3, 5, 4, 16))
    flax, ours = nnx.GroupNorm(16, num_groups=8, rngs=nnx.Rngs(0)), layers.GroupNorm(16)
    scale, shift = jax.random.normal(jax.random.key(1), (2, 16))
    flax.scale.set_value(scale)
    flax.bias.set_value(shift)
    ours.scale.set_value(scale)
    ours.shift.set_value(shift)
    np.testing.assert_allclose(ours(x), flax(x), rtol=1e-4, atol=1e-5)
    gradients = [jax.grad(lambda x, f=f: jnp.sum(f(x) ** 3))(x) for f in (ours, flax)]
    np.testing.assert_allclose(*gradients, rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="channels must be a multiple of 8, got 12"):
        layers.GroupNorm(12)


def test_a_photo_network_says_what_it_takes():
    with pytest.raises(ValueError, match="head must be one of grid, mean, got 'flat'"):
        embedding_networks.EmbeddingPhotoNet(head="flat", rngs=nnx.Rngs(0))
    model = embedding_networks.EmbeddingPhotoNet(size=(16, 12), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="must be 16 x 12 pixels, got 12 x 16"):
        model(jnp.zeros((1, 12, 16, 1)))


def test_mirrored_embeddings_are_those_of_the_mirror_image():
    inner = embedding_networks.EmbeddingCNN(8, channels=(8, 8), rngs=nnx.Rngs(0))
    model = embedding_networks.Standardized(inner, [0.5], [0.2], mirror=True)
    images = jax.random.uniform(jax.random.key(0), (3, 9, 8, 1))
    plain = model(images)
    model.eval()
    mean = model(images)
    np.testing.assert_allclose(mean, model(images[:, :, ::-1]), rtol=1e-5, atol=1e-6)
    assert not jnp.allclose(plain, mean, atol=1e-3)
    model.train()
    np.testing.assert_array_equal(model(images), plain)


def test_the_largest_has_the_gradient_of_the_maximum():
    x = jax.random.randint(jax.random.key(0), (3, 4, 6), 0, 4).astype(jnp.float32)
    weights = jax.random.normal(jax.random.key(1), (3,))
    got, expected = (
        jax.value_and_grad(lambda x, f=f: weights @ f(x, (1, 2)))(x)
        for f in (layers.largest, jnp.max)
    )
    jax.tree.map(np.testing.assert_array_equal, got, expected)


@pytest.mark.full
@pytest.mark.parametrize("optimize", [True, False])
@pytest.mark.parametrize("kind", ["cnn", "photo"])
def test_gradients_are_finite_however_it_is_compiled(kind, optimize):
    """What is computed twice may be rounded in two ways, and equal itself nowhere."""
    options = {"head": "mean", "size": (16, 16)} if kind == "photo" else {}
    model = embedding_networks.MODELS[kind](
        16, channels=(8, 16), in_channels=1, rngs=nnx.Rngs(0), **options
    )
    graph, state = nnx.split(model)
    images = jax.random.uniform(jax.random.key(0), (20, 16, 16, 1))

    @jax.jit
    def gradient(state):
        return jax.grad(lambda state: jnp.sum(nnx.merge(graph, state)(images)))(state)

    jax.config.update("jax_disable_most_optimizations", not optimize)
    try:
        found = gradient(state)
    finally:
        jax.config.update("jax_disable_most_optimizations", False)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(found))


def test_flips_and_light():
    images = jax.random.uniform(jax.random.key(1), (40, 6, 7, 1))
    flipped = augment.random_flip(jax.random.key(0), images)
    mirrored = (flipped == images[:, :, ::-1]).all((1, 2, 3))
    assert (mirrored | (flipped == images).all((1, 2, 3))).all()
    assert 0.2 < mirrored.mean() < 0.8
    brighter = augment.random_light(jax.random.key(0), images, brightness=0.2)
    assert ((brighter >= 0) & (brighter <= 1)).all()
    assert jnp.abs(brighter - images).max() <= 0.2
    assert jnp.std(jnp.mean(brighter - images, axis=(1, 2, 3))) > 0.05
    images = 0.4 + images / 5
    stretched = augment.random_light(jax.random.key(0), images, contrast=0.5)
    pixels = 1, 2, 3
    np.testing.assert_allclose(stretched.mean(pixels), images.mean(pixels), rtol=1e-4)
    ratio = stretched.std(pixels) / images.std(pixels)
    assert (jnp.abs(ratio - 1) <= 0.5001).all()
    assert jnp.std(ratio) > 0.1


def test_augmentation_is_off_by_default_and_checked():
    images = jax.random.uniform(jax.random.key(0), (3, 8, 6, 2))
    np.testing.assert_array_equal(augment.Augment()(jax.random.key(1), images), images)
    every = augment.Augment(0.1, 10.0, 0.1, 0.1, 0.1, True, 0.1, 0.5)
    changed = jax.jit(every)(jax.random.key(1), images)
    assert changed.shape == images.shape
    assert not (changed == images).all()
    with pytest.raises(ValueError, match="shift must be finite"):
        augment.Augment(shift=-1)
    with pytest.raises(ValueError, match="erase must be 0 to 1"):
        augment.Augment(erase=2)


NETWORKS = [
    (kind, dtype, shape)
    for kind in embedding_networks.MODELS
    for dtype in (None, jnp.bfloat16)
    for shape in ((8, 8, 1), (17, 33, 3), (1, 1, 1))
]
QUICK_NETWORKS = [("cnn", None, (17, 33, 3)), ("photo", None, (17, 33, 3))]
# With those, every network and every size, and every size in bfloat16.
SLOW_NETWORKS = [
    ("cnn", jnp.bfloat16, (8, 8, 1)),
    ("photo", jnp.bfloat16, (1, 1, 1)),
    ("resnet", None, (1, 1, 1)),
    ("multiscale", jnp.bfloat16, (17, 33, 3)),
]


@in_lanes(
    ("kind", "dtype", "shape"), NETWORKS, quick=QUICK_NETWORKS, slow=SLOW_NETWORKS
)
def test_any_image_size_gives_unit_vectors(kind, dtype, shape):
    options = {"size": shape[:2]} if kind == "photo" else {}
    model = embedding_networks.MODELS[kind](
        16,
        channels=(16, 32),
        in_channels=shape[-1],
        dtype=dtype,
        rngs=nnx.Rngs(0),
        **options,
    )
    images = jax.random.uniform(jax.random.key(0), (5, *shape))
    embeddings = nnx.jit(lambda model, x: model(x))(model, images)
    assert embeddings.dtype == jnp.float32
    norms = jnp.linalg.norm(embeddings, axis=-1)
    assert norms.shape == (5,)
    np.testing.assert_allclose(norms, 1, rtol=1e-5)


@pytest.mark.parametrize("shape", [(8, 6), (7, 5), (1, 1)])
def test_halving_is_pooling_by_windows(shape):
    x = jax.random.normal(jax.random.key(0), (3, *shape, 2))
    halved, pull_back = jax.vjp(layers.halved, x)
    pooled, window_pull_back = jax.vjp(
        lambda x: nnx.max_pool(x, (2, 2), strides=(2, 2), padding="SAME"), x
    )
    np.testing.assert_array_equal(halved, pooled)
    along = jax.random.normal(jax.random.key(1), halved.shape)
    np.testing.assert_array_equal(*pull_back(along), *window_pull_back(along))


@pytest.mark.parametrize(("stride", "side"), [(1, 4), (2, 2)])
def test_the_first_stride_of_the_residual_network(stride, side):
    def stages(x):
        model = embedding_networks.EmbeddingResNet(
            channels=(8, 16, 16), stride=stride, rngs=nnx.Rngs(0)
        )
        x = model.stem(x)
        for block in model.blocks:
            x = block(x)
        return x

    output = jax.eval_shape(stages, jnp.zeros((1, 16, 16, 3)))
    assert output.shape == (1, side, side, 16)


@pytest.mark.parametrize(
    ("kind", "count"), [("cnn", 73_440), ("resnet", 704_736), ("multiscale", 381_856)]
)
def test_number_of_parameters(kind, count):
    network = embedding_networks.MODELS[kind]
    model = nnx.eval_shape(lambda: network(rngs=nnx.Rngs(0)))
    assert sum(p.size for p in jax.tree.leaves(nnx.state(model, nnx.Param))) == count


def test_a_zero_vector_has_a_finite_gradient():
    gradient = jax.grad(lambda x: layers.unit_norm(x).sum())(jnp.zeros((1, 4)))
    assert jnp.isfinite(gradient).all()


# Runs.


def test_a_run_leaves_everything_behind(finished):
    out, evaluations = finished
    gain = evaluations["trained"]["map_at_r"] - evaluations["untrained"]["map_at_r"]
    assert gain > 10
    assert {path.name for path in out.iterdir()} == {
        "config.json",
        "best.digests.json",
        "checkpoints.digests.json",
        "metrics.jsonl",
        "summary.json",
        "checkpoints",
        "best",
        "training.png",
        "neighbors.png",
    }
    made = RunRecord.read(out)
    assert (made.requested, made.plan.steps) == (small(), 20)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["evaluations"] == evaluations
    assert summary["counts"] == {
        "train": 808,
        "validation": 90,
        "test": 899,
        "skipped": 0,
    }
    count = sum(
        x.size
        for x in jax.tree.leaves(nnx.state(model_of_run.build_model(made), nnx.Param))
    )
    assert summary["parameters"] == count
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


def test_the_embedder_is_the_trained_model(finished, embed):
    out, evaluations = finished
    dataset = datasets.load("digits")
    embeddings = embed(dataset.test.images[..., 0])
    np.testing.assert_array_equal(embeddings, embed(dataset.test.images))
    np.testing.assert_allclose(jnp.linalg.norm(embeddings, axis=1), 1, rtol=1e-5)
    assert tasks.LabelTask(dataset).evaluate(embed) == evaluations["trained"]
    with pytest.raises(FileNotFoundError, match="no trained model"):
        learn.load_embedder(out / "checkpoints")


def test_the_embedder_takes_images_of_any_kind(embed, tmp_path):
    images = datasets.load("digits").test.images[:6]
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
    np.testing.assert_array_equal(embed(np.array(files, str)), expected)
    every = [str(files[0]), Image.open(files[1]), images[2]]
    np.testing.assert_allclose(embed(every), expected[:3], atol=1e-6)


@pytest.mark.parametrize(
    ("images", "error", "words"),
    [
        (np.zeros((2, 8, 8), np.float32), TypeError, "uint8, got dtype float32"),
        (np.zeros((2, 8, 8, 2), np.uint8), ValueError, "1, 3 or 4 channels"),
        (np.zeros((8,), np.uint8), ValueError, r"must be \[n, height, width\]"),
        ([], ValueError, "must not be empty"),
        ("a.png", TypeError, "got one image"),
        (Image.new("L", (8, 8)), TypeError, "got one image"),
        (np.zeros((8, 9, 3), np.uint8), ValueError, "one image in colour"),
        (["nowhere.png"], FileNotFoundError, "nowhere.png"),
    ],
)
def test_the_embedder_names_what_it_cannot_take(embed, images, error, words):
    with pytest.raises(error, match=words):
        embed(images)


@pytest.mark.full
@pytest.mark.usefixtures("exact")
def test_a_run_is_repeatable(finished_exactly, tmp_path):
    again = tmp_path / "again"
    learn.run(small(), again, progress=False)
    lines = [(d / "metrics.jsonl").read_text() for d in (finished_exactly, again)]
    assert lines[0] == lines[1]
    learn.run(small(seed=1), tmp_path / "other", progress=False)
    assert (tmp_path / "other" / "metrics.jsonl").read_text() != lines[0]


def digits_batches():
    train = datasets.load("digits").train
    return sampling.ImageBatches(train.images, train.labels, 10, 4)


# Programs are kept by the functions of an optimizer: others would be compiled again.
ADAM, SGD = optax.adam(1e-2), optax.sgd(0.1)


def trained(steps=20, *, model=None, **options):
    """A small model and the lines of its training."""
    model = model or embedding_networks.EmbeddingCNN(
        8, channels=(8, 8), rngs=nnx.Rngs(0)
    )
    options = {"tx": ADAM, "batches": digits_batches()} | options
    return model, list(loop.fit(model, steps=steps, progress=False, **options))


def assert_same_model(one, two):
    same = jax.tree.map(lambda a, b: (a == b).all(), nnx.state(one), nnx.state(two))
    assert all(jax.tree.leaves(same))


def assert_nearly_same_model(one, two):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
        nnx.state(one),
        nnx.state(two),
    )


@pytest.mark.full
@pytest.mark.parametrize("name", ["semi-hard", "hard", "all"])
def test_every_triplet_loss_trains(name):
    start = objectives.batch_loss("all")
    _, lines = trained(loss=[(0, start), (10, objectives.batch_loss(name))])
    assert [line["step"] for line in lines] == [10, 20]
    assert all(0 <= line["active"] <= 1 and line["spread"] > 0.05 for line in lines)


@pytest.mark.slow
def test_losses_follow_one_another():
    every, hard = (objectives.batch_loss(name) for name in ("all", "hard"))
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


@pytest.mark.slow
@pytest.mark.parametrize("chunk", unless_full([None, 8], [None]))
def test_a_loss_without_metrics(chunk):
    def loss(x, labels):
        return tj.blockwise.batch_semi_hard_loss(x, labels, margin=0.2)

    options = {"tx": SGD, "log_every": 1, "embed_chunk_size": chunk}
    model, lines = trained(3, loss=loss, **options)
    expected, _ = trained(3, loss=objectives.batch_loss("semi-hard"), **options)
    assert lines[0].keys() == {"step", "loss", "spread"}
    assert_nearly_same_model(model, expected)


def test_wrong_losses_and_batches():
    with pytest.raises(TypeError, match=r"loss must be a function, .*'hard'"):
        trained(1, loss="hard")
    with pytest.raises(TypeError, match="batches must have batches"):
        trained(1, batches=iter([digits_batches()[0]]))


@pytest.mark.slow
@pytest.mark.parametrize("chunk", unless_full([8, 13], [13]))
def test_chunks_have_the_loss_of_the_whole_batch(chunk):
    one, whole = trained(2, tx=SGD, log_every=1)
    two, chunks = trained(2, tx=SGD, log_every=1, embed_chunk_size=chunk)
    for a, b in zip(whole, chunks):
        assert a.keys() == b.keys()
        np.testing.assert_allclose([*a.values()], [b[name] for name in a], rtol=1e-5)
    assert_nearly_same_model(one, two)


def test_the_average_of_parameters():
    tx = SGD
    paths = [trained(steps, tx=tx)[0] for steps in (1, 2)]
    start = embedding_networks.EmbeddingCNN(8, channels=(8, 8), rngs=nnx.Rngs(0))
    first, second = (nnx.state(model, nnx.Param) for model in paths)
    expected = jax.tree.map(
        lambda a, b, c: 0.9 * (0.9 * a + 0.1 * b) + 0.1 * c,
        nnx.state(start, nnx.Param),
        first,
        second,
    )
    model, _ = trained(2, tx=tx, ema_decay=0.9)
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


STATES = {"memory": 100, "memory_momentum": 0.9, "ema_decay": 0.9}


@pytest.mark.parametrize(
    "options",
    [
        STATES,
        pytest.param(STATES | {"embed_chunk_size": 8}, marks=pytest.mark.slow),
        *(
            pytest.param(options, marks=pytest.mark.full)
            for options in (
                {},
                {"embed_chunk_size": 8},
                {"memory": 100},
                {"memory": 100, "memory_momentum": 0.9},
            )
        ),
    ],
    ids=str,
)
def test_training_goes_on_where_it_stopped(tmp_path, options):
    """To the last bit: statistics, dropout, optimizer, averages and memory."""

    def train(steps, checkpoints=None):
        options_of_fit = options | {"log_every": 1, "checkpoints": checkpoints}
        return trained(steps, model=WithStatistics(), **options_of_fit)

    whole, lines = train(6)
    assert not (whole.norm.mean[...] == 0).any()
    train(3, Checkpoints(tmp_path / "kept"))
    resumed, rest = train(6, Checkpoints(tmp_path / "kept"))
    assert rest == [{"step": 3, "resumed": True, "damaged": []}, *lines[3:]]
    assert_same_model(resumed, whole)


def test_ten_lines_for_own_images_and_model():
    images = np.random.default_rng(0).integers(0, 255, (40, 8, 8, 1), dtype=np.uint8)
    labels = np.arange(40) % 4
    images[np.arange(40), labels] = 255
    model = WithStatistics()
    batches = sampling.ImageBatches(images, labels, classes=4, per_class=4)
    lines = list(loop.fit(model, ADAM, batches, steps=60, progress=False))
    assert lines[-1]["active"] < lines[0]["active"]
    # The model is left as it is used: without dropout.
    one, two = (learn.embed_images(model, images) for _ in range(2))
    assert one.shape == (40, 8)
    np.testing.assert_array_equal(one, two)


def test_a_model_has_learnt_when_training_is_left_early():
    expected, lines = trained(4, log_every=2)
    model = embedding_networks.EmbeddingCNN(8, channels=(8, 8), rngs=nnx.Rngs(0))
    tx, batches = ADAM, digits_batches()
    for line in loop.fit(model, tx, batches, steps=100, log_every=2, progress=False):
        if line["step"] == 4:
            break
    assert line == lines[-1]
    assert_same_model(model, expected)


def over(count):
    return placement.mesh_of(str(count))


# Of all triplets none is chosen, which rounding might choose otherwise.
ALL = batch_loss("all")
ALL_OVER_MESH = batch_loss("all", axis_name="data")


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    unless_full(
        [
            {"embed_chunk_size": 16, "memory": 100, "ema_decay": 0.9},
            {"memory": 100, "memory_momentum": 0.9},
            {},
        ],
        [{"embed_chunk_size": 16, "memory": 100, "ema_decay": 0.9}],
    ),
    ids=str,
)
def test_a_mesh_changes_nothing(options):
    options = {"tx": SGD, "log_every": 1} | options
    model, lines = trained(5, loss=ALL, **options)
    split, others = trained(5, mesh=over(4), loss=ALL_OVER_MESH, **options)
    for one, other in zip(lines, others, strict=True):
        np.testing.assert_allclose(other["loss"], one["loss"], rtol=1e-3)
        np.testing.assert_allclose(other["spread"], one["spread"], rtol=1e-3)
    for one, other in zip(*(jax.tree.leaves(nnx.state(m)) for m in (model, split))):
        np.testing.assert_allclose(other, one, atol=1e-4)
        assert other.sharding.num_devices == 1


@pytest.mark.slow
@pytest.mark.parametrize("count", unless_full([1, 8], [8]))
def test_goes_on_with_other_devices(tmp_path, count):
    """Training that four devices began continues on fewer and on more."""
    options = {"tx": SGD, "log_every": 1, "memory": 50}
    _, lines = trained(6, loss=ALL, **options)
    options["loss"] = ALL_OVER_MESH
    kept = Checkpoints(tmp_path / "kept")
    trained(3, mesh=over(4), checkpoints=kept, **options)
    _, rest = trained(6, mesh=over(count), checkpoints=kept, **options)
    assert rest[0] == {"step": 3, "resumed": True, "damaged": []}
    for one, other in zip(lines[3:], rest[1:], strict=True):
        np.testing.assert_allclose(other["loss"], one["loss"], rtol=1e-3)


def test_wrong_devices():
    with pytest.raises(ValueError, match=r"split over 3 devices.*40 rows"):
        trained(2, mesh=over(3))
    for devices, words in (
        ("9", "must be at most 8"),
        ("some", "must be all or at least 1"),
    ):
        with pytest.raises(ValueError, match=words):
            placement.mesh_of(devices)


def counted_loss(x, labels, **pairs):
    """A loss whose metrics tell what it was given."""
    value = tj.blockwise.batch_all_loss(x, labels, margin=0.3, **pairs)
    return value, {"kept": pairs["reference_where"].sum() - len(x)}


def test_a_batch_is_compared_with_those_before():
    options = {
        "loss": counted_loss,
        "log_every": 1,
        "memory": 100,
        "memory_warmup_steps": 2,
    }
    _, lines = trained(6, **options)
    assert [line["kept"] for line in lines] == [0, 0, 0, 40, 80, 100]


@pytest.mark.parametrize("momentum", unless_slow([None, 0.9], [None]))
def test_what_is_kept_is_embedded_before_the_step(momentum):
    """By the parameters as they were, or by their average."""
    seen, loss = [], tj.blockwise.batch_all_loss

    def spying(x, labels, **pairs):
        jax.debug.callback(lambda *arrays: seen.append(arrays), x, pairs["references"])
        return loss(x, labels, margin=0.3, **pairs)

    options = {"tx": SGD, "memory": 40, "memory_momentum": momentum, "loss": spying}
    trained(2, **options)
    jax.effects_barrier()
    (first, _), (second, references) = seen
    np.testing.assert_allclose(references[:40], second, atol=1e-6)
    # At the first step the average is what the parameters are.
    np.testing.assert_allclose(references[40:], first, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("momentum", unless_full([None, 0.9], [0.9]))
def test_a_memory_in_chunks(momentum):
    options = {"memory": 100, "memory_momentum": momentum, "tx": SGD, "log_every": 1}
    options["loss"] = ALL
    _, lines = trained(5, **options)
    _, in_chunks = trained(5, embed_chunk_size=16, **options)
    for one, other in zip(lines, in_chunks):
        np.testing.assert_allclose(other["loss"], one["loss"], rtol=1e-3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"memory": -1}, "memory must be at least 0"),
        ({"memory": 9, "memory_momentum": 1.0}, "memory_momentum must be at least 0"),
        ({"memory_warmup_steps": 9}, "memory_warmup_steps requires memory > 0, got 9"),
        ({"memory_momentum": 0.0}, "memory_momentum requires memory > 0, got 0.0"),
        ({"memory_warmup_steps": -1}, "memory_warmup_steps must be at least 0"),
    ],
)
def test_wrong_memories(options, words):
    with pytest.raises(ValueError, match=words):
        trained(2, **options)


def test_floats_from_0_to_1_stay_as_they_are():
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 1), dtype=np.uint8)
    model = embedding_networks.EmbeddingCNN(8, channels=(8, 8), rngs=nnx.Rngs(0))
    np.testing.assert_allclose(
        learn.embed_images(model, images),
        learn.embed_images(model, np.float32(images) / 255),
        atol=1e-5,
    )
    np.testing.assert_array_equal(as_floats(jnp.ones(2, jnp.bfloat16)), jnp.ones(2))


def test_a_loss_that_is_not_finite_stops_before_the_last_checkpoint(tmp_path):
    batches, poison = digits_batches(), 12

    class Poisoned:
        def __getitem__(self, step):
            images, labels = batches[step]
            images = np.float32(images) / 255
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

    with pytest.warns(loop.CollapseWarning, match=r"collapsed at step 10.*all"):
        list(
            loop.fit(
                Collapsing(), optax.sgd(0.0), digits_batches(), steps=20, progress=False
            )
        )


def test_signals_between_two_lines_are_the_callers(own_data_dir, request):
    # Which a process in the background need not have.
    own = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(functools.partial(signal.signal, signal.SIGINT, own))
    before = signal.getsignal(signal.SIGINT)
    model = embedding_networks.EmbeddingCNN(8, channels=(8, 8), rngs=nnx.Rngs(0))
    lines = loop.fit(
        model, ADAM, digits_batches(), steps=4, log_every=1, progress=False
    )
    assert next(lines)["step"] == 1
    assert signal.getsignal(signal.SIGINT) is before
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    assert next(lines)["step"] == 2
    lines.close()
    assert signal.getsignal(signal.SIGINT) is before


SPREAD = np.tile([-1.0, 1, -2, 2, 0, 3, -3, 0], 2)
CLEAR, OUTLIER = np.full(16, 10.0), np.array([90.0, -1, 0, 1, -1] + 11 * [0])


@pytest.mark.parametrize(
    ("gains", "steps"),
    [
        # The gains of each validation over the last one, and the steps that are kept.
        ([CLEAR, 0], [4, 4]),
        ([CLEAR + SPREAD / 4, 0], [4, 4]),
        ([CLEAR, CLEAR], [4, 8]),
        ([OUTLIER, 0], [4, 8]),
        ([SPREAD / 100, 0], [4, 8]),
        ([-CLEAR, CLEAR, 0, CLEAR / 2], [4, 8, 8, 8]),
        ([CLEAR, 2 * CLEAR, 0, 3 * CLEAR], [4, 8, 8, 16]),
        # Too few classes.
        ([CLEAR[:15], np.zeros(15)], [4, 8]),
        ([np.array([50.0, 50]), np.zeros(2)], [4, 8]),
        ([np.zeros(0), np.zeros(0)], [4, 8]),
        ([np.full(16, np.nan), 0], [4, 8]),
        ([CLEAR, np.nan], [4, 8]),
    ],
)
def test_an_earlier_model_is_kept_if_it_exceeds_noise(tmp_path, gains, steps):
    classes = len(gains[0])
    values = iter([50 + gain + np.zeros(classes) for gain in gains])
    kept, seen = Checkpoints(tmp_path / "best"), {}

    def validate(model):
        seen[4 * (len(seen) + 1)] = jax.tree.map(jnp.copy, nnx.state(model))
        return Validation({}, next(values))

    _, lines = trained(
        4 * len(gains),
        validate=validate,
        validate_every=4,
        validation_classes=classes,
        kept_model=kept,
    )
    assert [line["kept_step"] for line in lines if "kept_step" in line] == steps
    _, model, _ = kept.restore(seen[4])
    jax.tree.map(np.testing.assert_array_equal, model, seen[steps[-1]])


@pytest.mark.parametrize("stop", unless_slow([4, 6, 9], [9]))
def test_the_candidate_survives_a_resume(tmp_path, stop):
    def fit(name, start, steps):
        due = iter([s for s in range(start + 1, steps + 1) if s % 4 == 0 or s == steps])
        gains = {4: CLEAR}
        return trained(
            steps,
            validate=lambda model: Validation({}, gains.get(next(due), 0 * CLEAR)),
            validate_every=4,
            validation_classes=16,
            checkpoints=Checkpoints(tmp_path / name / "states"),
            kept_model=Checkpoints(tmp_path / name / "best"),
        )[1]

    whole = fit("whole", 0, 12)
    assert whole[-1]["kept_step"] == 4
    fit("stopped", 0, stop)
    assert fit("stopped", stop, 12)[-1] == whole[-1]
    found = [
        # A digest of every number of the model.
        Checkpoints(tmp_path / name / "best")
        ._orbax.checkpointables_metadata(12)
        .custom_metadata
        for name in ("whole", "stopped")
    ]
    assert found[0] == found[1]


@pytest.mark.slow
def test_the_candidate_over_a_mesh(tmp_path):
    values = iter([CLEAR, 0 * CLEAR])
    kept, seen = Checkpoints(tmp_path / "best"), []

    def validate(model):
        seen.append(jax.tree.map(jnp.copy, nnx.state(model)))
        return Validation({}, next(values))

    options = {"validate": validate, "validate_every": 2, "validation_classes": 16}
    mesh = {"mesh": over(4), "loss": ALL_OVER_MESH}
    states = Checkpoints(tmp_path / "states")
    _, lines = trained(4, checkpoints=states, kept_model=kept, **options, **mesh)
    assert lines[-1]["kept_step"] == 2
    _, model, _ = kept.restore(seen[0])
    jax.tree.map(np.testing.assert_array_equal, model, seen[0])


@pytest.mark.slow
def test_a_noisy_early_peak_of_two_classes_is_not_kept(tmp_path, monkeypatch):
    folder = shapes(tmp_path / "pictures", size=(9, 9), kinds=8, each=4)
    peaks = iter([99.0, 40.0, 60.0])

    def validate(task, model):
        assert task.validation_classes == 2
        value = next(peaks)
        return Validation({"map_at_r": value}, np.full(2, value))

    monkeypatch.setattr(tasks.LabelTask, "validate", validate)
    out = tmp_path / "run"
    config = small(data=str(folder), steps=3, split="classes", validate_every=1)
    evaluations = learn.run(config, out, progress=False)
    assert json.loads((out / "summary.json").read_text())["kept_step"] == 3
    (note,) = [n for n in RunRecord.read(out).notes if "checkpoint" in n]
    assert note.startswith("the last checkpoint is kept: validation has 2 classes")
    assert evaluations["trained"]["classes"] == 2
    low, high = evaluations["trained"]["intervals"]["map_at_r"]
    assert 0 <= low <= evaluations["trained"]["map_at_r"] <= high <= 100


def validated(task):
    """Validation by a model that does not need to learn."""
    model = embedding_networks.EmbeddingCNN(8, channels=(8, 8), rngs=nnx.Rngs(0))
    return task.validate(model)


def test_validation_by_class():
    task = tasks.LabelTask(datasets.load("digits"))
    metrics, by_class = validated(task)
    assert by_class.shape == (task.validation_classes,) == (10,)
    counts = np.bincount(task.dataset.validation.labels)
    np.testing.assert_allclose(counts @ by_class / counts.sum(), metrics["map_at_r"])
    apart = tasks.LabelTask(datasets.load("digits", split="classes"))
    _, by_class = validated(apart)
    assert by_class.shape == (apart.validation_classes,) == (2,)


def test_an_interval_holds_the_mean_of_all_classes_as_often_as_it_says():
    draw = np.random.default_rng(0)
    held = []
    for _ in range(1000):
        sizes = draw.integers(1, 9, 12)
        labels = np.repeat(np.arange(12), sizes)
        values = 50 + 5 * draw.normal(size=12)[labels] + draw.normal(size=len(labels))
        low, high = selection.interval_over_classes(values, labels)
        held.append(low <= 50 <= high)
    assert 0.92 < np.mean(held) < 0.98
    assert selection.interval_over_classes(np.ones(3), np.zeros(3, int)) is None


def test_validation_has_a_value_of_each_class():
    options = {"validate": lambda model: Validation({}, np.zeros(9))}
    with pytest.raises(ValueError, match=r"by_class must be \[16\].*got shape \(9,\)"):
        trained(2, validate_every=1, validation_classes=16, **options)


# Checkpoints.


def damage(directory):
    """Changes one bit of the largest file."""
    files = [path for path in directory.rglob("*") if path.is_file()]
    file = max(files, key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_states_that_a_killed_process_was_removing_go(tmp_path):
    directory = tmp_path / "kept"
    checkpoints = Checkpoints(directory)
    for step in (1, 2, 3):
        checkpoints.save(step, {"x": jnp.full(3, step)})
    checkpoints.close()
    # Part of a state of an earlier step, as a removal leaves it.
    shutil.copytree(directory / "3", directory / "1")
    (directory / "1" / "_CHECKPOINT_METADATA").unlink()
    again = Checkpoints(directory)
    assert again.steps == [2, 3]
    assert not (directory / "1").exists()
    step, state, damaged = again.restore({"x": jnp.zeros(3, jnp.int32)})
    assert (step, state["x"].tolist(), damaged) == (3, [3, 3, 3], [])


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
    assert len(damaged[0]) < 300
    kept.save(3, state)
    assert kept.steps == [2, 3]
    for each in (2, 3):
        shutil.rmtree(tmp_path / "kept" / str(each) / "state", ignore_errors=True)
    both = r"step 3 is damaged.*step 2 is damaged.*; no other checkpoint exists\.$"
    with pytest.raises(OSError, match=both):
        Checkpoints(tmp_path / "kept").restore(state)


@pytest.mark.parametrize("name", ["exp[v2]", "a*b?", "back\\slash", "a b\n字😀"])
def test_any_path_will_do(tmp_path, name):
    directory, state = tmp_path / name / "kept", {"x": jnp.arange(10.0)}
    kept = Checkpoints(directory)
    for step in (1, 2, 3):
        kept.save(step, state)
    kept.close()
    assert sorted(path.name for path in directory.iterdir()) == ["2", "3"]
    kept = Checkpoints(directory, writable=False)
    step, found, damaged = kept.restore(state)
    kept.close()
    assert (step, damaged) == (3, [])
    np.testing.assert_array_equal(found["x"], state["x"])


def test_what_is_restored_needs_no_other_programs(tmp_path):
    """Arrays are committed to a device only where those of the same state are."""
    x = jnp.arange(10.0)

    def shape_on(device):
        sharding = jax.sharding.SingleDeviceSharding(device)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    state = {
        "free": x,
        "half": x.astype(jnp.bfloat16),
        "shape": shape_on(jax.devices()[0]),
        "elsewhere": shape_on(jax.devices()[1]),
        "fixed": jax.device_put(x, jax.devices()[1]),
        "key": jax.random.key(3),
        "numpy": np.arange(3),
    }
    kept = Checkpoints(tmp_path / "kept")
    kept.save(1, state | {"shape": x, "elsewhere": x})
    found = kept.restore(state)[1]
    add = jax.jit(lambda x: x + 1)
    add(state["free"])
    for name in ("free", "shape"):
        add(found[name])
        np.testing.assert_array_equal(found[name], x)
    assert add._cache_size() == 1
    assert found["fixed"].sharding == state["fixed"].sharding
    for name in ("fixed", "elsewhere"):
        assert found[name].committed
        assert found[name].device == jax.devices()[1]
    for name in ("half", "key"):
        assert not found[name].committed
    assert found["half"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(found["half"], state["half"])
    assert found["key"] == state["key"]
    np.testing.assert_array_equal(found["numpy"], state["numpy"])
    # Its memory can be given away, as that of a training's state is.
    taken = jax.jit(lambda x: x + 1, donate_argnums=0)(found["free"])
    assert found["free"].is_deleted()
    np.testing.assert_array_equal(taken, x + 1)


def test_what_cannot_be_read_is_not_damaged(tmp_path, monkeypatch):
    kept, state = Checkpoints(tmp_path / "kept"), {"x": jnp.arange(10.0)}
    for step in (1, 2):
        kept.save(step, state)

    def unreadable(self, step, like):
        raise RuntimeError("of another version")

    monkeypatch.setattr(Checkpoints, "_load", unreadable)
    with pytest.raises(OSError, match=r"step 2 .*nothing shows that it is damaged.*ot"):
        kept.restore(state)
    assert kept.steps == [1, 2]
    # Nor is one of which nobody knows what was written.
    (tmp_path / "kept.digests.json").unlink()
    with pytest.raises(OSError, match="nothing shows that it is damaged"):
        kept.restore(state)
    assert kept.steps == [1, 2]


def test_a_state_is_read_back_before_the_last_good_one_goes(tmp_path, monkeypatch):
    kept, state = Checkpoints(tmp_path / "kept"), {"x": jnp.arange(1000.0)}
    kept.save(1, state)
    load = Checkpoints._load

    def broken(self, step, like):
        damage(tmp_path / "kept" / str(step))
        return load(self, step, like)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "_load", broken)
        with pytest.raises(OSError, match=r"step 2 .* could not be read back"):
            kept.save(2, state)
    assert 1 in kept.steps


def test_states_of_another_model_are_left_alone(tmp_path):
    kept = Checkpoints(tmp_path / "kept")
    kept.save(1, {"x": jnp.zeros(3)})
    for other in ({"x": jnp.zeros(4)}, {"x": jnp.zeros(3, int)}, {"x": 1, "y": 2}):
        with pytest.raises(ValueError, match=r"step 1 in .* is of another model"):
            kept.restore(jax.tree.map(jnp.asarray, other))
    assert kept.restore({"x": jnp.ones(3)})[0] == 1


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
    with pytest.raises(preparation.RunExistsError, match="not an empty directory"):
        learn.run(small(), out)
    assert (out / "metrics.jsonl").read_text() == before


def test_an_image_of_pillow_is_turned_upright(embed, tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 8), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.png", exif=exif)
    with Image.open(tmp_path / "turned.png") as opened:
        np.testing.assert_array_equal(embed([opened]), embed([tmp_path / "turned.png"]))
        assert not (embed([opened]) == embed([image])).all()


def with_images(shape, kinds, each):
    """A dataset of so many classes, of which nothing is held out."""
    draw = np.random.default_rng(0)
    labels = np.repeat(np.arange(kinds), each)
    patterns = draw.integers(0, 200, (kinds, *shape), dtype=np.uint8)
    images = (
        patterns[labels] + np.uint8(np.arange(len(labels)) % 9)[:, None, None, None]
    )
    train = datasets.Images(ArrayImages.of(images), labels)
    none = train.part(slice(0))
    names = tuple(map(str, range(kinds)))
    kind = "photos" if shape[-1] == 3 else "characters"
    return datasets.Dataset(
        "some", train, none, none, names, key="", decoding=Decoding(kind)
    )


def test_a_pretrained_network_instead_of_training_from_scratch():
    (general,) = defaults._notes_on_scratch(4999, aligned=False)
    (faces,) = defaults._notes_on_scratch(4999, aligned=True)
    assert general.startswith("4,999 photographs are few to train from scratch")
    assert "--backbone with efficientnet-lite0 of the extra pretrained" in general
    assert faces.startswith(general)
    assert "docs/faces.md" in faces
    assert defaults._notes_on_scratch(5000, aligned=False) == []


@pytest.mark.parametrize(
    ("shape", "kinds", "each", "expected"),
    [
        ((8, 8, 1), 10, 80, ("cnn", 10, 8, 1, (32, 64))),
        ((32, 32, 1), 97, 15, ("cnn", 40, 4, 8, (32, 64, 128))),
        ((32, 24, 1), 97, 15, ("cnn", 40, 4, 2, (32, 64, 128))),
        ((64, 64, 3), 2, 90, ("photo", 2, 8, 1, (16, 32, 64, 128))),
        *(
            pytest.param(
                (24, 32, 3),
                500,
                each,
                ("photo", 40, 4, 1, (16, 32, 64, 128)),
                marks=pytest.mark.full,
            )
            for each in (7, 31)
        ),
    ],
)
def test_choices_by_the_data(shape, kinds, each, expected):
    plan, notes = tasks.LabelTask(with_images(shape, kinds, each)).plan(learn.Config())
    few = [note for note in notes if "photographs are few to train from" in note]
    assert len(few) == (shape[-1] == 3 and kinds * each < 5000)
    of = plan.batches
    made = (plan.model, of.classes, of.per_class, of.rotation_classes, plan.channels)
    assert made == expected
    assert plan.augment.flip == (shape[-1] == 3)
    assert plan.embed_chunk_size == of.size
    assert [name for name, x in dataclasses.asdict(plan).items() if x is None] == [
        "backbone"
    ]
    own = learn.Config(
        model="multiscale", classes=2, per_class=3, rotation_classes=1, steps=5
    )
    kept, _ = tasks.LabelTask(with_images(shape, kinds, each)).plan(own)
    assert (kept.model, kept.steps) == ("multiscale", 5)
    of = kept.batches
    assert (of.classes, of.per_class, of.rotation_classes) == (2, 3, 1)


@pytest.mark.parametrize(
    ("several", "words"),
    [
        (0, "warning: 12 of 12 classes have one training image: their positives are"),
        (1, "warning: 11 of 12 classes have one training image: their positives are"),
        (4, "8 classes of one training image are not trained on: no positive"),
        (12, None),
    ],
)
def test_classes_of_one_image_are_told(several, words):
    dataset = with_images((12, 12, 1), 12, 2)
    labels = dataset.train.labels
    kept = np.array(
        [
            label < several or index == np.argmax(labels == label)
            for index, label in enumerate(labels)
        ]
    )
    few = dataclasses.replace(dataset, train=dataset.train.part(kept))
    _, notes = tasks.LabelTask(few).plan(learn.Config())
    told = [note for note in notes if "one training image" in note]
    assert len(told) == (words is not None)
    assert all(note.startswith(words) for note in told)


def test_mirrored_classes_are_not_mirrored_at_random():
    task = tasks.LabelTask(with_images((12, 12, 3), 40, 5))
    assert task.plan(learn.Config(rotation_classes=4))[0].augment.flip
    assert not task.plan(learn.Config(rotation_classes=8))[0].augment.flip
    grey = tasks.LabelTask(with_images((32, 32, 1), 40, 5))
    assert grey.plan(learn.Config())[0].batches.rotation_classes == 8
    drawn = learn.Config(augment=defaults.CHARACTERS)
    assert grey.plan(drawn)[0].batches.rotation_classes == 8
    with pytest.raises(ValueError, match=r"rotation_classes is 8.*augment mirrors"):
        grey.plan(learn.Config(augment=defaults.PHOTOS, rotation_classes=8))


def faces(people, each, *, place=(20, 12), size=24, seed=0, noise=5):
    """Images that differ between people in one place, and elsewhere at random."""
    draw = np.random.default_rng(seed)
    images = draw.normal(100, 25, (people * each, 64, 48))
    patterns = draw.normal(100, 45, (people, size, size))
    labels = np.repeat(np.arange(people), each)
    top, left = place
    images[:, top : top + size, left : left + size] = patterns[labels]
    images += draw.normal(0, noise, images.shape)
    return np.uint8(np.clip(images, 0, 255))[..., None], labels


def test_where_classes_differ_is_found():
    images, labels = faces(20, 5, noise=60)
    layout = image_analysis.layout_of(images, labels)
    top, left, bottom, right = layout.box
    assert 10 / 64 <= top <= 20 / 64
    assert 3 / 48 <= left <= 12 / 48
    assert 44 / 64 <= bottom <= 54 / 64
    assert 36 / 48 <= right <= 45 / 48
    assert layout.aligned
    few = image_analysis.layout_of(images[:20], labels[:20])
    assert few.why == "too few classes to tell where they differ"


@pytest.mark.slow
def test_all_is_looked_at_where_no_part_tells_more():
    images, labels = faces(20, 5, noise=60)
    draw = np.random.default_rng(1)
    rolled = np.stack([np.roll(x, draw.integers(0, 48, 2), (0, 1)) for x in images])
    layout = image_analysis.layout_of(rolled, labels)
    assert (layout.box, layout.aligned) == (image_analysis.WHOLE, False)
    clear = image_analysis.layout_of(*faces(20, 5))
    assert (clear.box, clear.aligned) == (image_analysis.WHOLE, True)


@pytest.mark.slow
def test_photographs_are_seen_where_classes_differ(tmp_path):
    images, labels = faces(12, 6, noise=60)
    for number, (image, label) in enumerate(zip(images, labels)):
        (tmp_path / "people" / str(label)).mkdir(parents=True, exist_ok=True)
        file = tmp_path / "people" / str(label) / f"{number}.png"
        Image.fromarray(image[..., 0]).save(file)
    config = small(data=str(tmp_path / "people"), kind="photos", steps=2)
    learn.run(config, tmp_path / "run", progress=False)
    made = RunRecord.read(tmp_path / "run")
    assert (made.plan.model, made.plan.head) == ("photo", "grid")
    assert made.plan.mirror
    assert made.images.shape == (64, 48, 1)
    top, _, bottom, _ = made.plan.box
    assert bottom - top < 0.7
    assert any("% of the height" in note for note in made.notes)
    embed = learn.load_embedder(tmp_path / "run")
    one = np.asarray(embed(images[:2]))
    np.testing.assert_allclose(np.linalg.norm(one, axis=1), 1, rtol=1e-5)
    # What is not seen does not count.
    other = images[:2].copy()
    other[:, :6], other[:, -6:] = 0, 0
    np.testing.assert_allclose(embed(other), one, atol=1e-5)


@pytest.mark.parametrize(
    ("drawn", "turns"),
    [
        (lambda x: x, 8),
        (lambda x: x + x[:, :, ::-1], 4),
        (lambda x: x + x[:, ::-1, ::-1], 1),
    ],
)
def test_symmetric_classes_are_not_turned(drawn, turns):
    images, labels = faces(20, 5)
    square = drawn(images[:, 20:44, 12:36] // 2)
    assert image_analysis.most_turns(square, labels) == turns
    assert image_analysis.most_turns(square[:, :20], labels) <= 2


# Runs that are stopped.


def test_a_run_is_not_gone_on_with_by_accident(finished, tmp_path):
    out, evaluations = finished
    assert learn.run(small(), out, resume=True) == evaluations
    with pytest.raises(ValueError, match="another configuration: seed was 0, got 1"):
        learn.run(small(seed=1), out, resume=True)
    (tmp_path / "notes.txt").write_text("precious")
    with pytest.raises(preparation.RunExistsError, match="not the directory of a run"):
        learn.run(small(), tmp_path, resume=True)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@contextlib.contextmanager
def killed_at(step, owner=MetricsLog, name="add"):
    """A run within is killed before it writes the record of a step."""
    write = getattr(owner, name)

    def killed(first, line):
        if (line["step"] if isinstance(line, dict) else line.step) == step:
            raise MemoryError
        write(first, line)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, killed)
        with pytest.raises(MemoryError):
            yield


@pytest.mark.slow
@pytest.mark.usefixtures("exact")
def test_a_run_killed_before_its_first_state_begins_again(
    finished_exactly, tmp_path, monkeypatch
):
    out = tmp_path / "run"
    with killed_at(20):
        learn.run(small(), out, progress=False)
    assert steps_of(out) == 10
    # Choices stay, whatever would be chosen now.
    monkeypatch.setattr(defaults, "CHARACTERS", augment.Augment(rotation=90.0))
    learn.run(small(), out, resume=True, progress=False)
    assert_same_run(out, finished_exactly)


@pytest.mark.slow
@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize(
    "loss",
    [{}, {"loss": "arcface"}, {"loss": "supcon", "learn_loss": True, "memory": 16}],
    ids=lambda options: options.get("loss", "default"),
)
def test_a_run_with_rounds_is_the_same_wherever_it_is_killed(
    loss, tmp_path, own_data_dir
):
    config = small(
        steps=9, checkpoint_every=2, log_every=1, classes=4, rounds=2, **loss
    )
    whole, out = tmp_path / "whole", tmp_path / "run"
    learn.run(config, whole, progress=False)
    mined = rounds.read_rounds(whole)
    assert [one.step for one in mined] == [3, 6]
    for one in mined:
        sizes = np.unique(one.groups, return_counts=True)[1]
        assert sizes.sum() == 10
        assert 2 <= sizes.max() <= 4
    # Killed before a round is mined, after it is written, and within the next round.
    kills = [(rounds, "write_round", 3), (MetricsLog, "add", 4), (MetricsLog, "add", 8)]
    for owner, name, step in kills:
        with killed_at(step, owner, name):
            learn.run(config, out, resume=True, progress=False)
    learn.run(config, out, resume=True, progress=False)
    assert_same_run(out, whole)
    assert (out / rounds.FILE).read_bytes() == (whole / rounds.FILE).read_bytes()
    # Nothing is trained without the groups of the rounds so far.
    longer, state = dataclasses.replace(config, steps=12), steps_of(out)
    text = (out / rounds.FILE).read_text()
    (out / rounds.FILE).write_text(text[:20])
    with pytest.raises(ValueError, match=r"rounds\.json is damaged"):
        learn.run(longer, out, resume=True, progress=False)
    (out / rounds.FILE).unlink()
    with pytest.raises(FileNotFoundError, match=r"rounds\.json does not exist"):
        learn.run(longer, out, resume=True, progress=False)
    assert steps_of(out) == state


def test_names_that_no_font_has_are_shown_as_numbers(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 1), dtype=np.uint8)
    names = ("Ada", "\u5b57\u5178", "\U0001f600 $x_1$")
    embeddings = {"trained": np.float32(images.reshape(6, -1))}
    # A sign that is missing would be a warning, which is an error here.
    plots.neighbors(
        images, np.arange(6) // 2, embeddings, names, tmp_path / "a.png", k=3
    )
    assert (tmp_path / "a.png").exists()
    assert plots._find_fonts("Ada") == ["DejaVu Sans"]
    assert plots._find_fonts("\U000f0000") is None


def test_queries_have_somebody_to_find(tmp_path, monkeypatch):
    images = np.random.default_rng(0).integers(0, 256, (7, 8, 8, 1), dtype=np.uint8)
    shown = []
    monkeypatch.setattr(
        plots, "_shorten", lambda name, most: shown.append(name) or name
    )
    embeddings = {"trained": np.float32(images.reshape(7, -1))}
    labels, names = np.array([0, 1, 2, 2, 3, 3, 4]), tuple("abcde")
    plots.neighbors(images, labels, embeddings, names, tmp_path / "a.png", k=3)
    assert sorted(shown) == ["c", "d"]
    plots.neighbors(
        images[:3], labels[:3], {"x": np.eye(3)}, names, tmp_path / "b.png", k=2
    )
    assert sorted(shown[2:]) == ["a", "b", "c"]


def test_a_margin_that_cannot_be_reached_is_named(tmp_path):
    config, on = small(margin=5.0), placement.ONE_DEVICE
    made, _ = preparation.make_plan(config, None, None, tmp_path / "run", on, False)
    assert any("no triplet can satisfy a margin of 5" in note for note in made.notes)


@pytest.mark.slow
@pytest.mark.usefixtures("exact")
def test_a_finished_run_is_lengthened(tmp_path, own_data_dir):
    out = tmp_path / "run"
    learn.run(small(steps=4, checkpoint_every=2), out, progress=False)
    longer = small(steps=8, checkpoint_every=2)
    learn.run(longer, out, resume=True, progress=False)
    assert steps_of(out) == 8
    made = RunRecord.read(out)
    assert made.plan.steps == made.requested.steps == 8
    assert "lengthened from 4 to 8 steps" in made.notes[-1]
    lines = [json.loads(x) for x in (out / "metrics.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines if x.get("evaluation") == "trained"] == [8]
    # It stays so long, also without its options.
    again = learn.Config(**requested_of(out))
    assert again == longer
    with pytest.raises(ValueError, match=r"at least 8.*got 6.*not shortened"):
        learn.run(small(steps=6, checkpoint_every=2), out, resume=True, progress=False)


def test_a_summary_of_fewer_steps_does_not_finish_a_lengthened_run(finished, tmp_path):
    run, evaluations = finished
    out = tmp_path / "run"
    out.mkdir()
    for name in ("config.json", "summary.json"):
        shutil.copy(run / name, out)
    made = RunRecord.read(out)
    assert preparation.find_run(out, small(), True) == (made, evaluations)
    assert preparation.find_run(out, small(steps=30), True) == (made, None)
    # A lengthened run that was killed has its new goal and the summary of the old one.
    longer = dataclasses.replace(
        made, requested=small(steps=30), plan=dataclasses.replace(made.plan, steps=30)
    )
    longer.write(out)
    for wish in (small(steps=30), learn.Config(**requested_of(out))):
        assert preparation.find_run(out, wish, True) == (longer, None)


@pytest.mark.slow
@pytest.mark.usefixtures("exact")
def test_a_killed_lengthening_goes_on_to_its_new_goal(tmp_path):
    def longer(out, steps):
        config = small(steps=steps, checkpoint_every=2, log_every=1)
        return learn.run(config, out, resume=steps > 4, progress=False)

    out, whole = tmp_path / "run", tmp_path / "whole"
    first = longer(out, 4)
    with killed_at(7):
        longer(out, 10)
    assert json.loads((out / "summary.json").read_text())["evaluations"] == first
    evaluations = learn.run(
        learn.Config(**requested_of(out)), out, resume=True, progress=False
    )
    assert steps_of(out) == 10
    assert evaluations["trained"] != first["trained"]
    longer(whole, 4)
    assert longer(whole, 10) == evaluations


@pytest.mark.slow
@pytest.mark.usefixtures("exact")
def test_a_run_goes_on_without_its_options_and_with_moved_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder, out = shapes(tmp_path / "pictures", each=4), tmp_path / "exp[v2]"
    config = small(data=str(folder), steps=4, checkpoint_every=2)
    evaluations = learn.run(config, out, progress=False)
    moved = folder.rename(tmp_path / "moved")
    requested = requested_of(out)
    assert requested["steps"] == 4
    elsewhere = learn.Config(**requested | {"data": "moved"})
    assert elsewhere == dataclasses.replace(config, data="moved")
    # A finished run has no results on other data.
    other = dataclasses.replace(config, data=str(shapes(tmp_path / "other", each=5)))
    with pytest.raises(ValueError, match=f"data must have the content of {folder}"):
        learn.run(other, out, resume=True, progress=False)
    finished = learn.run(elsewhere, out, resume=True, progress=False)
    assert finished == json.loads(json.dumps(evaluations))
    assert requested_of(out)["data"] == str(moved)
    (out / "summary.json").unlink()
    assert learn.run(elsewhere, out.name, resume=True, progress=False) == evaluations
    # From now on it is found there.
    again = learn.Config(**requested_of(out))
    assert again.data == str(moved)
    (out / "summary.json").unlink()
    assert learn.run(again, out, resume=True, progress=False) == evaluations
    # A run that has lost its states does not begin again without a word.
    (out / "summary.json").unlink()
    shutil.rmtree(out / "checkpoints")
    with pytest.raises(ValueError, match=r"reached step 4, but has no checkpoint"):
        learn.run(again, out, resume=True, progress=False)
    # Nor does one go on with other images.
    Image.new("L", (24, 20), 77).save(moved / "group0" / "kind0" / "0.png")
    with pytest.raises(ValueError, match="have changed since the run"):
        learn.run(again, out, resume=True, progress=False)


@pytest.mark.slow
def test_a_run_on_a_folder_with_broken_images(tmp_path):
    folder = shapes(tmp_path / "pictures", size=(40, 30), mode="RGB", each=6)
    (folder / "group1").rename(folder / "from_$1_to_$2_")
    (folder / "group0" / "kind0" / "broken.png").write_bytes(b"")
    config = small(data=str(folder), steps=3, split="classes")
    evaluations = learn.run(config, tmp_path / "run", progress=False)
    made = RunRecord.read(tmp_path / "run")
    assert made.skipped[0].startswith("group0/kind0/broken.png")
    assert {*made.seen_names} < {*made.label_names}
    assert made.plan.model == "photo"
    assert made.images.shape == (30, 40, 3)
    assert "gallery_recall_at_1" not in evaluations["trained"]
    embed = learn.load_embedder(tmp_path / "run")
    assert embed([folder / "group0" / "kind0" / "0.png"]).shape == (1, 64)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kinds_and_each", unless_full([(2, 2), (3, 8), (2, 1)], [(2, 1)])
)
def test_a_tiny_folder_is_trained_on(tmp_path, kinds_and_each):
    kinds, each = kinds_and_each
    folder = shapes(tmp_path / "pictures", kinds=kinds, each=each)
    config = learn.Config(data=str(folder), steps=2, channels=(8, 16), dim=8)
    evaluations = learn.run(config, tmp_path / "run", progress=False)
    assert bool(evaluations["trained"]) == (each == 8)
    assert (tmp_path / "run" / "neighbors.png").exists()
    assert "NaN" not in (tmp_path / "run" / "metrics.jsonl").read_text()
    assert learn.load_embedder(tmp_path / "run")(
        np.zeros((1, 9, 9), np.uint8)
    ).shape == (1, 8)


@pytest.mark.full
def test_a_test_of_one_image(tmp_path):
    folder = shapes(tmp_path / "pictures", kinds=2)
    for number in range(3, 10):
        next((folder / "group0").rglob(f"{number}.*")).unlink()
    for file in sorted((folder / "group1").rglob("*.*"))[8:]:
        file.unlink()
    config = learn.Config(data=str(folder), steps=2, channels=(8, 16), dim=8)
    evaluations = learn.run(config, tmp_path / "run", progress=False)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["counts"]["test"] == 1
    assert evaluations["trained"].keys() == {"gallery_recall_at_1"}


@pytest.mark.slow
@pytest.mark.parametrize("repeated", unless_full([False, True], [False]))
def test_a_run_on_given_triplets(tmp_path, repeated):
    folder = shapes(tmp_path / "pictures", kinds=4, each=10)
    kinds = [sorted(path.iterdir()) for path in sorted(folder.glob("*/*"))]
    draw = random.Random(0)
    lines = []
    for _ in range(400):
        one, other = draw.sample(range(4), 2)
        a, p = draw.sample(kinds[one], 2)
        lines.append(f"{a},{p},{draw.choice(kinds[other])}")
    (tmp_path / "t.csv").write_text("\n".join(lines))
    # Where the rectangles lie is what they are.
    options = {"kind": "characters", "steps": 40, "triplets_per_batch": 16}
    config = small(triplets=str(tmp_path / "t.csv"), **options)
    out = tmp_path / "run"
    evaluations = learn.run(config, out, progress=False)
    assert evaluations["trained"]["triplet_accuracy"] > 95
    assert (
        evaluations["untrained"]["triplet_accuracy"]
        < evaluations["trained"]["triplet_accuracy"]
    )
    assert (out / "triplets.png").exists()
    assert learn.load_embedder(out)(kinds[0][:3]).shape == (3, 64)
    lines = MetricsLog(out / "metrics.jsonl").lines
    assert 0 <= lines[-2]["validation"]["triplet_accuracy"] <= 100
    if repeated:
        again = learn.run(config, tmp_path / "again", progress=False)
        assert again == evaluations


def test_the_loss_of_given_triplets_is_the_mean_of_theirs():
    x = jax.random.normal(jax.random.key(0), (12, 5))
    loss, metrics = objectives.given_loss(margin=0.3)(x, None)
    a, p, n = np.asarray(x, float).reshape(3, 4, 5)
    costs = np.linalg.norm(a - p, axis=1) - np.linalg.norm(a - n, axis=1) + 0.3
    np.testing.assert_allclose(loss, np.maximum(costs, 0).mean(), rtol=1e-5)
    assert metrics["active"] == np.mean(costs > 0)


@pytest.mark.slow
@pytest.mark.usefixtures("exact")
def test_a_run_on_images_that_do_not_fit_in_memory(tmp_path, monkeypatch):
    folder = shapes(tmp_path / "pictures", each=14)
    config = small(data=str(folder), steps=6, class_sampling="frequency")
    whole = learn.run(config, tmp_path / "one", progress=False)
    less = functools.partial(datasets.load, in_memory=100)
    monkeypatch.setattr(datasets, "load", less)
    stored = learn.run(config, tmp_path / "two", progress=False)
    del whole["raw pixels"]
    assert stored == whole
    assert (tmp_path / "two" / "neighbors.png").exists()


def shown_in(directory):
    """What TensorBoard would show: (name, step, value)."""
    from tensorboardX.proto.event_pb2 import Event

    (file,) = directory.iterdir()
    content, shown = file.read_bytes(), []
    while content:
        # Records: the length, its checksum, an event, its checksum.
        end = 12 + int.from_bytes(content[:8], "little")
        event = Event.FromString(content[12:end])
        shown += [(v.tag, event.step, v.simple_value) for v in event.summary.value]
        content = content[end + 4 :]
    return shown


def test_what_tensorboard_reads(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.add({"step": 0, "evaluation": "untrained", "metrics": {"map_at_r": 12.0}})
    log.show_in(tmp_path / "tensorboard")
    log.add({"step": 10, "loss": 0.5})
    log.add({"step": 10, "validation": {"map_at_r": 50.0}})
    log.add({"step": 20, "loss": 0.25})
    expected = [
        ("untrained/map_at_r", 0, 12.0),
        ("train/loss", 10, 0.5),
        ("validation/map_at_r", 10, 50.0),
        ("train/loss", 20, 0.25),
    ]
    log.close()
    assert shown_in(tmp_path / "tensorboard") == expected
    # What is trained again is shown once.
    log.truncate_after(10)
    log.add({"step": 20, "loss": 0.125})
    log.close()
    assert shown_in(tmp_path / "tensorboard") == [
        *expected[:3],
        ("train/loss", 20, 0.125),
    ]


@pytest.mark.full
def test_a_run_for_tensorboard(tmp_path):
    out = tmp_path / "run"
    learn.run(small(steps=4), out, tensorboard=True, progress=False)
    names = {name for name, _, _ in shown_in(out / "tensorboard")}
    assert {"train/loss", "trained/map_at_r", "validation/map_at_r"} <= names


def test_tensorboard_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ImportError, match="pip install tensorboardX"):
        learn.run(small(), tmp_path / "run", tensorboard=True, progress=False)
    assert not (tmp_path / "run").exists()


TRAIN = """
import resource, sys
from tripletjax import learn
from tripletjax.learn.training import selection
# Ten digits are then enough for a candidate, which is part of the state.
selection.MIN_CLASSES = 10
config = learn.Config(
    steps=120, channels=(8, 16), dim=64, per_class=4, ema_decay=0.5,
    checkpoint_every=7, validate_every=30,
)
if sys.argv[2:]:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
try:
    learn.run(config, sys.argv[1], resume=True, progress=False)
except KeyboardInterrupt as error:
    sys.exit(f"interrupted: {error}")
except OSError as error:
    sys.exit(f"failed: {error}")
"""


def start(out, *arguments, killed=True):
    return subprocess.Popen(
        [sys.executable, "-c", TRAIN, str(out), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | quickly(exact=True, killed=killed),
    )


def finish(out, *arguments):
    process = start(out, *arguments, killed=False)
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
    assert_same_model(model_of_run.load_model(one)[0], model_of_run.load_model(two)[0])
    kept = [Checkpoints(out / "checkpoints") for out in (one, two)]
    assert kept[0].steps == kept[1].steps
    # A digest of every number of the state is written with it.
    found = [
        each._orbax.checkpointables_metadata(each.steps[-1]).custom_metadata
        for each in kept
    ]
    assert found[0] == found[1]


@pytest.fixture(scope="module")
def whole(own_data_dir, tmp_path_factory):
    """A run that was never stopped."""
    out = tmp_path_factory.mktemp("whole") / "run"
    code, _, error = finish(out)
    assert code == 0, error
    return out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("seed", "kills"), [(0, 3), pytest.param(1, 5, marks=pytest.mark.full)]
)
def test_killed_at_any_moment_a_run_ends_as_if_it_had_not_been(
    whole, tmp_path, seed, kills
):
    draw, out = random.Random(seed), tmp_path / "run"
    for kill in range(kills):
        process = start(out)
        # Most of them while it trains, wherever it is, and the others at any time.
        if kill % 3 == 1:
            time.sleep(draw.uniform(0, 9))
        else:
            wait_for(out, draw.randint(steps_of(out), 120), process)
            time.sleep(draw.random() / 20)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if (out / "summary.json").exists():
            assert_same_run(out, whole)
            shutil.rmtree(out)
    code, _, error = finish(out)
    assert code == 0, error
    assert_same_run(out, whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    "number", unless_full([signal.SIGINT, signal.SIGTERM], [signal.SIGTERM])
)
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
    assert_same_model(
        *(model_of_run.load_model(out)[0] for out in (tmp_path / "run", whole))
    )


@pytest.mark.full
def test_a_damaged_checkpoint_falls_back_and_says_so(whole, tmp_path):
    process = start(tmp_path / "run")
    wait_for(tmp_path / "run", 60, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    newest = max(Checkpoints(tmp_path / "run" / "checkpoints").steps)
    damage(tmp_path / "run" / "checkpoints" / str(newest))
    code, printed, error = finish(tmp_path / "run")
    assert code == 0, error
    assert f"the checkpoint of step {newest} is damaged" in printed
    assert f"going on from step {newest - 7}" in printed
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.full
def test_a_full_disk_is_told(tmp_path):
    # No file may become larger than this.
    code, _, error = finish(tmp_path / "run", "20000")
    assert code == 1
    assert "failed: the state of step" in error
    assert "could not be written" in error


# Compilations.


class ScaledModel(nnx.Module):
    """A model with a parameter and a statistic besides its layer."""

    def __init__(self, scale):
        self.layer = nnx.Linear(64, 8, rngs=nnx.Rngs(0))
        self.scale, self.seen = nnx.Param(scale), nnx.BatchStat(jnp.asarray(0.0))

    def __call__(self, x):
        self.seen[...] = 0.5 * self.seen[...] + 0.5
        x = self.layer(x.reshape(len(x), -1)) * self.scale[...]
        return layers.unit_norm(x)


@pytest.mark.parametrize(
    ("shape", "classes", "options"),
    [
        ((), 0, {}),
        ((8,), 16, {"ema_decay": 0.5, "memory": 100, "memory_momentum": 0.5}),
    ],
)
def test_a_weak_type_compiles_no_step_again(tmp_path, shape, classes, options):
    model = ScaledModel(jnp.full(shape, 1.0))
    assert model.scale[...].weak_type
    tx = optax.inject_hyperparams(optax.adam)(learning_rate=1e-3)
    images = np.zeros((5, 8, 8, 1), np.uint8)

    def validate(model):
        total = float(learn.embed_images(model, images).sum())
        return Validation({"sum": total}, np.full(classes, total))

    options |= {"progress": False, "log_every": 1, "loss": ALL}
    options |= {"validate": validate, "validate_every": 1}
    options |= {"validation_classes": classes}
    with compilations() as lines:
        kept = Checkpoints(tmp_path / "states")
        more = options | {"checkpoints": kept}
        list(loop.fit(model, tx, digits_batches(), steps=3, **more))
        again = ScaledModel(jnp.full(shape, 1.0))
        kept = Checkpoints(tmp_path / "states")
        more = options | {"checkpoints": kept}
        rest = list(loop.fit(again, tx, digits_batches(), steps=5, **more))
    assert rest[0]["resumed"]
    for name in ("jit(train_step)", "jit(_embed)"):
        assert sum(line.startswith(name) for line in lines) == 1, lines


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "channels"),
    [
        ("cnn", (8, 16)),
        ("photo", (8, 16, 16, 16)),
        ("resnet", (8, 16, 16)),
        ("multiscale", (8, 16, 16)),
        ("resnet18", None),
    ],
)
def test_a_run_compiles_each_program_once(tmp_path, name, channels):
    folder = shapes(tmp_path / "pictures", kinds=3, each=20, mode="RGB")
    config = learn.Config(
        data=str(folder),
        model=name,
        steps=4,
        validate_every=2,
        channels=channels,
        size=16,
        per_class=3,
        classes=3,
    )
    with compilations() as lines:
        learn.run(config, tmp_path / "run", progress=False)
    steps, embedded, evaluated = (
        [line for line in lines if line.startswith(f"jit({function})")]
        for function in ("train_step", "_embed", "_evaluate")
    )
    assert len(steps) == 1
    # One for each size of a batch, and one for each evaluation.
    sizes = [re.search(r"uint8\[(\d+),", line)[1] for line in embedded]
    assert len(sizes) == len({*sizes})
    assert len(evaluated) == len({*evaluated})
