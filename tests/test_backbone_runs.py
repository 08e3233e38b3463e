"""Runs that begin with a pretrained network, as the command and as functions."""

import contextlib
import functools
import json
import shutil

import backbone_oracles as by_hand
import jax
import numpy as np
import pytest
from flax import nnx
from folders import shapes
from problems import unless_full, unless_slow
from programs import compilations
from safetensors.numpy import load_file, save_file

from tripletjax import cli, learn
from tripletjax.apps.export import export
from tripletjax.learn.data.augment import Augment
from tripletjax.learn.files import digest_of_file
from tripletjax.learn.networks import backbones
from tripletjax.learn.networks.weights import COUNTER, Frozen
from tripletjax.learn.runs import comparisons, preparation, train
from tripletjax.learn.runs.model import load_model
from tripletjax.learn.runs.record import RunRecord
from tripletjax.learn.training import feature_cache

OPTIONS = {
    "size": 32,
    "views": 3,
    "steps": 6,
    "classes": 4,
    "per_class": 2,
    "checkpoint_every": 3,
    "log_every": 1,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return shapes(tmp_path_factory.mktemp("shapes"), kinds=6, each=8, mode="L")


@pytest.fixture(scope="module")
def resnet(tmp_path_factory):
    file = tmp_path_factory.mktemp("weights") / "resnet.safetensors"
    save_file(by_hand.small_resnet(), file)
    return file


# Parts of the network that training changes.
CHANGED = {
    "frozen": set(),
    "top": {"layer4"},
    "all": {"conv1", "bn1", "layer1", "layer2", "layer3", "layer4"},
}


def configured(folder, backbone, training, **options):
    options = OPTIONS | {"views": OPTIONS["views"]} | options
    if training != "frozen":
        del options["views"]
    return learn.Config(
        data=str(folder), backbone=str(backbone), backbone_training=training, **options
    )


@contextlib.contextmanager
def trained_without_comparison():
    """Train heads on these few classes, which a run keeps in closed form."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparisons, "TRAINED_BY_DEFAULT", True)
        yield


@pytest.fixture(scope="module")
def run_of(own_data_dir, folder, resnet, tmp_path_factory):
    """Directory of a run with so much of the network trained, made when needed."""

    @functools.cache
    def run_of(training):
        out = tmp_path_factory.mktemp("runs") / training
        with trained_without_comparison():
            learn.run(configured(folder, resnet, training), out, progress=False)
        return out

    return run_of


@pytest.mark.parametrize(
    "training", unless_slow(["frozen", "top", "all"], [], slow=["frozen", "top"])
)
def test_what_a_run_trains_and_keeps(run_of, resnet, training):
    out = run_of(training)
    made = RunRecord.read(out)
    assert made.plan.backbone.training == training
    assert made.images.mean == pytest.approx(backbones.IMAGENET.mean)
    assert made.images.shape[2] == 1
    notes = "\n".join(made.notes)
    _, loaded = backbones.load(resnet)
    assert f"ResNet-like, {loaded.parameters:,} parameters" in notes
    assert "grey images are repeated in three channels" in notes
    assert "skipped arrays of the file: fc.bias, fc.weight" in notes
    assert (out / "backbone.safetensors").read_bytes() == resnet.read_bytes()
    network, _ = backbones.load(resnet)
    before = dict(nnx.to_flat_state(nnx.state(network)))
    model, _ = load_model(out)
    after = dict(nnx.to_flat_state(nnx.state(model.model.backbone)))
    changed = {
        path[0]
        for path, value in after.items()
        if not np.array_equal(value[...], before[path][...])
    }
    assert changed == CHANGED[training]
    evaluations = json.loads((out / "summary.json").read_text())["evaluations"]
    closed_form = ["closed form"] if training == "frozen" else []
    assert list(evaluations) == ["raw pixels", "pretrained", *closed_form, "trained"]


def test_a_run_keeps_the_network_of_a_wrapped_file(tmp_path, resnet):
    """Its copy has the names of the network's library, and the digest of the plan."""
    file = tmp_path / "checkpoint.safetensors"
    save_file({f"model.{name}": x for name, x in load_file(resnet).items()}, file)
    config = preparation.normalize(learn.Config(backbone=str(file)))
    start = preparation.start_of(config, None)
    assert "unwrapped: names of its arrays begin with 'model.'" in start.notes
    preparation._keep_backbone(config, start.digest, tmp_path)
    kept = tmp_path / "backbone.safetensors"
    assert digest_of_file(kept) == start.digest
    assert backbones.open_weights(kept).is_plain
    for name, array in load_file(kept).items():
        np.testing.assert_array_equal(array, load_file(resnet)[name])
    kept.unlink()
    with pytest.raises(ValueError, match=r"checkpoint\.safetensors has changed since"):
        preparation._keep_backbone(config, "another", tmp_path)
    assert not kept.exists()


def test_names_of_pretrained_networks_are_no_paths():
    config = learn.Config(backbone="efficientnet-lite0")
    assert preparation.normalize(config).backbone == "efficientnet-lite0"


@contextlib.contextmanager
def stopped_at_first_checkpoint():
    """Stop the run within after its first checkpoint."""

    class Stopped(Exception):
        pass

    saved = train.Checkpoints.save

    def save_and_stop(self, step, state):
        saved(self, step, state)
        if self.directory.name == "checkpoints":
            raise Stopped

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.Checkpoints, "save", save_and_stop)
        with pytest.raises(Stopped):
            yield


@pytest.mark.parametrize(
    "training", unless_slow(["frozen", "top", "all"], [], slow=["top"])
)
def test_resumed_is_bit_identical(run_of, folder, resnet, training, tmp_path):
    config = configured(folder, resnet, training)
    out = tmp_path / "run"
    with trained_without_comparison(), stopped_at_first_checkpoint():
        learn.run(config, out, progress=False)
    # A training that has begun goes on without another comparison. The file that it
    # began with need not be there.
    moved = learn.Config(**vars(config) | {"backbone": str(tmp_path / "gone")})
    learn.run(moved, out, resume=True, progress=False)
    once, again = (
        [
            {k: v for k, v in json.loads(line).items() if k != "time"}
            for line in (place / "metrics.jsonl").read_text().splitlines()
        ]
        for place in (run_of(training), out)
    )
    assert once == again
    leaves = (
        jax.tree.leaves(nnx.state(load_model(place)[0]))
        for place in (run_of(training), out)
    )
    for one, other in zip(*leaves):
        np.testing.assert_array_equal(one, other)


@pytest.mark.slow
def test_a_frozen_run_compiles_each_program_once(
    own_data_dir, folder, resnet, tmp_path
):
    config = configured(folder, resnet, "frozen", dim=12, validate_every=2)
    out = tmp_path / "run"
    with (
        compilations() as lines,
        trained_without_comparison(),
        stopped_at_first_checkpoint(),
    ):
        learn.run(config, out, progress=False)
    assert_each_compiled_once(lines)
    # Runs with one learning rate and number of steps share an optimiser and its step.
    # The closed form was evaluated by the programs that evaluate the trained head.
    with compilations() as lines:
        learn.run(config, out, resume=True, progress=False)
    assert not any(line.startswith(COMPILED) for line in lines)


COMPILED = "jit(train_step)", "jit(_embed)", "jit(_evaluate)"


def assert_each_compiled_once(lines):
    steps, embedded, evaluated = (
        [line for line in lines if line.startswith(program)] for program in COMPILED
    )
    assert len(steps) == 1
    assert evaluated
    # One for each size of a batch, and one for each evaluation.
    assert len(embedded) == len({*embedded})
    assert len(evaluated) == len({*evaluated})


@pytest.mark.parametrize(
    "training", unless_slow(["frozen", "top"], [], slow=["frozen"])
)
def test_such_runs_serve_as_any(run_of, folder, training, tmp_path, capsys):
    run, unseen = str(run_of(training)), shapes(tmp_path / "unseen", kinds=4, each=6)
    files = sorted(str(file) for file in folder.rglob("*.png"))[:2]
    x = learn.load_embedder(run)(files)
    np.testing.assert_allclose(np.linalg.norm(x, axis=1), 1, rtol=1e-5)
    for arguments in (
        ["evaluate", "--run", run, "--data", str(folder), "--out", "evaluated"],
        ["search", "--run", run, "--index", str(folder), "--query", files[0]],
        ["verify", "--run", run, "--data", str(unseen), "--out", "verified"],
        ["export", "--run", run, "--out", "model.stablehlo"],
        ["export", "--run", run, "--out", "model.onnx"],
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(tmp_path)
            status = cli.main(arguments)
        assert status == 0, (arguments, capsys.readouterr().err)


@pytest.mark.parametrize("each", [1, 2])
def test_single_images_have_no_whitening(own_data_dir, resnet, tmp_path, each):
    data = shapes(tmp_path / "data", kinds=6, each=each)
    config = preparation.normalize(configured(data, resnet, "frozen"))
    start = preparation.start_of(config, None)
    task = train.tasks.load(config, size=32, progress=False)
    _, notes = task.plan(config, start)
    note = "the head begins with the principal directions of the features"
    assert any(line.startswith(note) for line in notes) is (each == 1)


@pytest.mark.slow
def test_a_run_of_few_classes_keeps_the_closed_form(
    own_data_dir, folder, resnet, tmp_path, capsys
):
    out, alone = tmp_path / "run", tmp_path / "alone"
    config = configured(folder, resnet, "frozen")
    evaluations = learn.run(config, out)
    words = "keeps the closed form: a comparison of the trained head with the closed"
    assert words in capsys.readouterr().out
    assert evaluations["trained"] == evaluations["closed form"]
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["steps"], summary["kept_step"]) == (OPTIONS["steps"], 0)
    assert summary["comparison"]["trained_is_kept"] is False
    assert "loss" not in (out / "metrics.jsonl").read_text()
    assert learn.run(config, out, resume=True, progress=False) == evaluations
    # The same head without any training.
    learn.run(configured(folder, resnet, "frozen", steps=0), alone, progress=False)
    leaves = (jax.tree.leaves(nnx.state(load_model(run)[0])) for run in (out, alone))
    for one, other in zip(*leaves, strict=True):
        np.testing.assert_array_equal(one, other)
    # A killed run whose summary was not written yet ends with the same numbers.
    (out / "summary.json").unlink()
    log = (out / "metrics.jsonl").read_text()
    assert learn.run(config, out, resume=True, progress=False) == evaluations
    assert (out / "metrics.jsonl").read_text() == log
    # A lengthened run compares again, and then trains.
    longer = configured(folder, resnet, "frozen", steps=3)
    with trained_without_comparison():
        learn.run(longer, alone, resume=True, progress=False)
    summary = json.loads((alone / "summary.json").read_text())
    assert (summary["steps"], summary["kept_step"]) == (3, 3)


@pytest.mark.slow
def test_a_head_on_kept_features_is_the_whole_network(run_of):
    """Training measures what the run then does."""
    run = run_of("frozen")
    embedder = learn.load_embedder(run)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    metrics = json.loads(lines[-1])["metrics"]
    config = RunRecord.read(run).requested
    task = train.tasks.load(config, size=32, progress=False)
    task = task.seen(embedder.record.plan)
    again = task.evaluate(lambda images: train.embed_images(embedder.model, images))
    assert metrics == pytest.approx(again, abs=1e-3)


@pytest.mark.slow
def test_features_are_made_once(folder, resnet, run_of, tmp_path, monkeypatch):
    run_of("frozen")
    calls = []
    compute = feature_cache.FeatureCache._compute

    def counted(self, images, *rest):
        calls.append(len(images))
        return compute(self, images, *rest)

    monkeypatch.setattr(feature_cache.FeatureCache, "_compute", counted)
    config = configured(folder, resnet, "frozen", dim=8)
    learn.run(config, tmp_path / "same", progress=False)
    assert calls == []
    # Of one new image, those of that one alone; another file of weights: all.
    more = tmp_path / "more"
    shutil.copytree(folder, more)
    image = next(iter(sorted(more.rglob("0.png"))))
    extra = image.with_name("extra.png")
    pixels = 255 - np.asarray(train.tasks.datasets.open_image(image))
    train.tasks.datasets.Image.fromarray(pixels).save(extra)
    learn.run(configured(more, resnet, "frozen"), tmp_path / "more run", progress=False)
    assert 0 < sum(calls) <= 3 * 8
    calls.clear()
    other = tmp_path / "other.safetensors"
    save_file(by_hand.small_resnet(seed=1), other)
    learn.run(configured(folder, other, "frozen"), tmp_path / "other", progress=False)
    assert sum(calls) > 48


@pytest.mark.full
def test_the_mirror_image_is_a_view_that_is_told(
    own_data_dir, folder, resnet, tmp_path
):
    config = configured(folder, resnet, "frozen", mirror=True, views=1)
    learn.run(config, tmp_path / "run", progress=False)
    made = RunRecord.read(tmp_path / "run")
    assert made.plan.backbone.views == 2
    assert "on its features, of 2 views of each image" in "\n".join(made.notes)


@pytest.mark.slow
def test_a_damaged_file_of_features_is_made_again(tmp_path):
    network, _ = _saved_network(tmp_path)
    cache = feature_cache.FeatureCache(network, "key", data_dir=tmp_path)
    images = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    views = feature_cache.views_of(True, Augment(shift=0.1), 3)
    first = cache.of(images, views, what="images", progress=False)
    for file in cache.directory.rglob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-1])
    second = cache.of(images, views, what="images", progress=False)
    np.testing.assert_array_equal(first.features, second.features)
    # Whichever others are with an image, and in whatever order.
    shutil.rmtree(cache.directory)
    some = cache.of(images[[3, 1]], views, what="images", progress=False)
    np.testing.assert_allclose(some.features, first.features[[3, 1]], rtol=1e-5)
    mirrored = cache.of(images[:, :, ::-1], views[:1], what="images", progress=False)
    np.testing.assert_allclose(mirrored[:, 0], first[:, 1], rtol=1e-5)


def _saved_network(tmp_path):
    file = tmp_path / "weights.safetensors"
    save_file(by_hand.small_resnet(), file)
    return backbones.load(file)


@pytest.mark.parametrize("training", unless_slow(["top", "all"], [], slow=["top"]))
def test_a_trained_backbone_is_written_for_another_run(
    run_of, resnet, training, tmp_path
):
    embedder = learn.load_embedder(run_of(training))
    made = export(embedder, tmp_path / "again.safetensors")
    assert made.dim == 24
    written, before = load_file(made.file), load_file(resnet)
    assert set(written) == set(before) - {"fc.weight", "fc.bias"}
    changed = {
        name.partition(".")[0]
        for name, value in written.items()
        if not name.endswith(COUNTER) and not np.array_equal(value, before[name])
    }
    assert changed == CHANGED[training]


@pytest.mark.slow
def test_a_backbone_that_was_not_trained_is_not_written(run_of, tmp_path):
    with pytest.raises(
        ValueError, match="requires a trained backbone, got a frozen one"
    ):
        export(learn.load_embedder(run_of("frozen")), tmp_path / "no.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize(
    "family", unless_full(["vit", "convnext", "efficientnet"], ["vit"])
)
def test_every_family_is_exported(own_data_dir, folder, family, tmp_path):
    """Inception-ResNet has what ResNet has, and takes minutes."""
    make = {
        "vit": by_hand.small_vit,
        "convnext": by_hand.small_convnext,
        "efficientnet": by_hand.small_efficientnet,
    }[family]
    file = tmp_path / "weights.safetensors"
    save_file(make(), file)
    config = configured(folder, file, "top", size=40, steps=2)
    learn.run(config, tmp_path / "run", progress=False)
    embedder = learn.load_embedder(tmp_path / "run")
    for suffix in (".stablehlo", ".onnx", ".safetensors"):
        made = export(embedder, tmp_path / f"model{suffix}", check=folder)
        assert made.difference < 1e-4
    if family == "vit":
        # Sides of 40 and 32 pixels, rounded to patches of 14.
        assert (embedder.view.height, embedder.view.width) == (28, 42)


@pytest.mark.slow
def test_from_nothing_and_on(own_data_dir, folder, tmp_path, monkeypatch):
    small = {"blocks": (1, 1, 1, 1), "widths": (8, 8, 8, 8), "bottleneck": False}
    monkeypatch.setitem(backbones.UNTRAINED, "resnet18", small)
    options = {k: v for k, v in OPTIONS.items() if k != "views"}
    config = learn.Config(data=str(folder), model="resnet18", **options)
    evaluations = learn.run(config, tmp_path / "first", progress=False)
    assert "untrained" in evaluations
    model, made = load_model(tmp_path / "first")
    assert made.plan.backbone.digest is None
    # Its statistics are learnt.
    assert float(abs(model.model.backbone.bn1.mean[...]).max()) > 0
    assert not nnx.state(model, Frozen)
    file = tmp_path / "first.safetensors"
    export(learn.load_embedder(tmp_path / "first"), file)
    config = configured(folder, file, "frozen")
    learn.run(config, tmp_path / "second", progress=False)
    assert "ResNet-like" in "\n".join(RunRecord.read(tmp_path / "second").notes)


@pytest.mark.full
def test_given_triplets_on_kept_features(own_data_dir, folder, resnet, tmp_path):
    files = [sorted(map(str, kind.glob("*"))) for kind in sorted(folder.glob("*/*"))]
    lines = ["anchor,positive,negative"]
    for i, own in enumerate(files):
        other = files[(i + 1) % len(files)]
        lines += [f"{own[j]},{own[j + 1]},{other[j]}" for j in range(6)]
    (tmp_path / "triplets.csv").write_text("\n".join(lines))
    config = learn.Config(
        triplets=str(tmp_path / "triplets.csv"),
        backbone=str(resnet),
        backbone_training="frozen",
        size=32,
        steps=3,
        triplets_per_batch=4,
    )
    evaluations = learn.run(config, tmp_path / "run", progress=False)
    assert 0 <= evaluations["trained"]["triplet_accuracy"] <= 100
    assert (tmp_path / "run" / "triplets.png").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--backbone none.safetensors", "none.safetensors"),
        ("--backbone pickle.pth", "file of PyTorch"),
        (
            "--backbone FILE --model cnn",
            "--model cannot be combined with --backbone, got 'cnn'",
        ),
        (
            "--backbone-training top",
            "--backbone-training requires --backbone, got 'top'",
        ),
        ("--hidden 8", "--hidden requires --backbone, got 8"),
        (
            "--model resnet18 --views 2",
            "--views cannot be combined with --model resnet18, got 2",
        ),
        ("--backbone FILE --size 4", "size must be at least 8"),
        ("--backbone FILE --views 0", "--views must be at least 1, got 0"),
        ("--backbone FILE --rotation-classes 4", "cannot be turned"),
        ("--backbone FILE --backbone-training some", "invalid choice"),
        (
            "--backbone FILE --steps 0 --hidden 8",
            "--steps must be at least 1 with --hidden, got 0",
        ),
        (
            "--backbone FILE --steps 0 --backbone-training top",
            "steps must be at least 1 with a trained backbone, got 0",
        ),
    ],
)
def test_bad_arguments(arguments, words, own_data_dir, resnet, tmp_path, capsys):
    (tmp_path / "pickle.pth").write_bytes(b"PK\x03\x04")
    arguments = [str(resnet) if x == "FILE" else x for x in arguments.split()]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        try:
            status = cli.main(["train", *arguments, "--out", "run"])
        except SystemExit as stopped:
            status = stopped.code
    told = capsys.readouterr().err
    assert status == 2
    assert words in told
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_another_file_than_the_run_began_with(run_of, folder, tmp_path):
    other = tmp_path / "other.safetensors"
    save_file(by_hand.small_resnet(seed=2), other)
    shutil.copytree(run_of("frozen"), tmp_path / "run")
    config = configured(folder, other, "frozen", steps=8)
    with pytest.raises(ValueError, match="has changed since the run began"):
        learn.run(config, tmp_path / "run", resume=True, progress=False)


@pytest.mark.slow
def test_a_damaged_copy_of_the_weights(run_of, tmp_path):
    shutil.copytree(run_of("frozen"), tmp_path / "run")
    kept = tmp_path / "run" / "backbone.safetensors"
    kept.write_bytes(kept.read_bytes()[:-4] + b"\0\0\0\0")
    with pytest.raises(ValueError, match="is damaged"):
        learn.load_embedder(tmp_path / "run")
