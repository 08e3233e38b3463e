"""Embedders for elsewhere do what the run does."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from folders import shapes
from PIL import ExifTags, Image
from problems import unless_slow

from tripletjax import cli
from tripletjax.apps import export as exports
from tripletjax.apps.export import DifferenceError, export, resampling
from tripletjax.learn.config import MODELS, Config
from tripletjax.learn.embedder import Embedder, build_model
from tripletjax.learn.image_io import ImageSpec, View, open_image
from tripletjax.learn.plan import ClassBatchPlan, Plan
from tripletjax.learn.record import ImageRecord, RunRecord

SHAPE = (20, 24, 1)
PAGE = Path(__file__).parents[1] / "docs" / "export.md"


def untrained(name, shape=SHAPE, **options):
    """An embedder of a run that has not been trained."""
    fields = {field.name: None for field in dataclasses.fields(Plan)}
    plan = Plan(
        **fields
        | {
            "batches": ClassBatchPlan(
                classes=2,
                per_class=2,
                mining="all",
                class_sampling="uniform",
                relevance="classes",
                rotation_classes=1,
                batch_all_fraction=0.0,
            ),
            "model": name,
            "dim": 16,
            "channels": (8, 16),
            "stride": 1,
            "head": "grid",
            "mirror": True,
            "seed": 0,
            "box": (0.1, 0.2, 0.85, 0.9),
            "size": 16,
            "bfloat16": False,
        }
        | options
    )
    record = RunRecord(
        requested=Config(data="nowhere"),
        plan=plan,
        images=ImageRecord(
            shape=shape,
            white=65535.0,
            background="white",
            mean=(0.4,) * shape[2],
            std=(0.3,) * shape[2],
        ),
        data_key="",
        label_names=(),
        seen_names=(),
        skipped=(),
        notes=(),
    )
    model = build_model(record)
    model.eval()
    return Embedder(model, record.images.spec, plan.view_of(shape), record)


BOXES = [(0.0, 0.0, 1.0, 1.0), (0.1, 0.2, 0.85, 0.9), (0.0, 0.33, 1.0, 0.71)]


@pytest.mark.parametrize("box", BOXES)
@pytest.mark.parametrize("seen", unless_slow([(16, 16), (11, 31), (40, 9)], [(16, 16)]))
@pytest.mark.parametrize("size", unless_slow([(24, 20), (9, 33), (60, 50)], [(24, 20)]))
def test_views_are_pillows_to_the_bit(size, seen, box):
    view = View(box, *seen)
    draw = np.random.default_rng(0)
    images = draw.integers(0, 2, (3, *size, 3)).astype(np.uint8) * 255
    images[1] = draw.integers(0, 256, (*size, 3))
    images[2] = 10 * (np.arange(size[1]) % 26)[:, None]
    np.testing.assert_array_equal(resampling(view, *size)(images), view(images))


@pytest.mark.slow
@pytest.mark.parametrize("suffix", exports.FUNCTIONS)
@pytest.mark.parametrize("name", ["cnn", "photo", "multiscale", "resnet"])
def test_every_network_is_exported(name, suffix, tmp_path):
    shape = (20, 24, 3) if name == "multiscale" else SHAPE
    embedder = untrained(name, shape)
    people = shapes(tmp_path / "people", kinds=2, each=3, mode="RGB")
    out = tmp_path / "more" / f"model{suffix}"
    made = export(embedder, out, check=people)
    assert made.file == out
    assert (made.shape, made.dim, made.images) == (shape, 16, 6)
    assert made.size == out.stat().st_size
    assert made.difference <= 1e-5
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    with pytest.raises(FileExistsError, match="it is left as it is"):
        export(embedder, out, check=people)


@pytest.mark.slow
def test_a_run_in_bfloat16_is_exported_in_float32(tmp_path):
    people = shapes(tmp_path / "people", kinds=2, each=2)
    low, full = untrained("cnn", bfloat16=True), untrained("cnn")
    made = export(low, tmp_path / "model.stablehlo", check=people)
    assert made.notes == ("the run computes in bfloat16, the file in float32",)
    assert made.difference <= 1e-5
    draw = np.random.default_rng(0)
    images = [*draw.integers(0, 256, (3, *SHAPE), dtype=np.uint8)]
    same = exports._in_float32(low).embed(images)
    np.testing.assert_allclose(same, full.embed(images), atol=1e-6)
    assert np.abs(same - low.embed(images)).max() > 1e-4


def test_every_network_is_tested():
    assert {*MODELS} == {"cnn", "photo", "multiscale", "resnet"}


@pytest.mark.slow
def test_stablehlo_needs_jax_alone(tmp_path):
    embedder = untrained("cnn")
    out = tmp_path / "model.stablehlo"
    export(embedder, out, check=shapes(tmp_path / "people", kinds=2, each=2))
    draw = np.random.default_rng(0)
    images = draw.integers(0, 256, (5, *SHAPE), dtype=np.uint8)
    np.save(tmp_path / "images.npy", images)
    code = f"""
import sys
import jax
import numpy as np
model = jax.export.deserialize(bytearray(open({str(out)!r}, "rb").read()))
assert {{*model.platforms}} == {{"cpu", "cuda", "tpu"}}
vectors = model.call(np.load({str(tmp_path / "images.npy")!r}))
np.save({str(tmp_path / "vectors.npy")!r}, vectors)
assert not any(name.startswith(("tripletjax", "flax")) for name in sys.modules)
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)
    np.testing.assert_allclose(
        np.load(tmp_path / "vectors.npy"), embedder.embed([*images]), atol=1e-5
    )


def test_what_differs_is_not_kept(tmp_path, monkeypatch):
    embedder = untrained("cnn")
    people = shapes(tmp_path / "people", kinds=2, each=2)

    def other(embedder):
        return lambda images: jnp.ones((images.shape[0], 16)) / 4

    monkeypatch.setattr(exports, "function_of", other)
    with pytest.raises(DifferenceError, match="would differ from the run by"):
        export(embedder, tmp_path / "out" / "model.stablehlo", check=people)
    assert [*(tmp_path / "out").iterdir()] == []


def test_bad_exports_are_named(tmp_path, monkeypatch):
    embedder = untrained("cnn")
    with pytest.raises(
        ValueError, match=r"out must end in \.onnx, \.stablehlo, \.safetensors"
    ):
        export(embedder, tmp_path / "model.pt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="there is no image in"):
        export(embedder, tmp_path / "model.onnx", check=tmp_path / "empty")
    monkeypatch.setitem(sys.modules, "jax2onnx", None)
    monkeypatch.setitem(sys.modules, "flatbuffers", None)
    for suffix in exports.FUNCTIONS:
        with pytest.raises(ImportError, match=r"tripletjax\[train,export\]"):
            export(embedder, tmp_path / f"model{suffix}")
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_what_is_compared_is_said(tmp_path):
    embedder = untrained("cnn")
    images, of = exports._some_images(embedder, None)
    assert images.shape == (32, *SHAPE)
    assert "noise" in of
    requested = Config(data="digits")
    record = dataclasses.replace(embedder.record, requested=requested)
    images, of = exports._some_images(
        dataclasses.replace(embedder, record=record), None
    )
    assert (images.shape, of) == ((32, *SHAPE), "32 digits")
    # Images from all over the folder, but those that are broken.
    people = shapes(tmp_path / "people", kinds=4, each=20)
    (people / "group0" / "kind0" / "0.png").write_bytes(b"none")
    images, _ = exports._some_images(embedder, people)
    assert 20 <= len(images) <= 32


def test_the_command_exports(tmp_path, capsys, monkeypatch):
    from tripletjax.learn import embedder as module

    monkeypatch.setattr(module, "load_embedder", lambda run: untrained("cnn"))
    people, out = shapes(tmp_path / "people", kinds=2, each=2), tmp_path / "m.stablehlo"
    command = ["export", "--run", "r", "--out", str(out), "--check", str(people)]
    assert cli.main(command) == 0
    told = capsys.readouterr().out
    assert "from images uint8 [n, 20, 24, 1] to vectors [n, 16]" in told
    assert "on 4 images of" in told
    assert cli.main(command) == 2
    assert "it is left as it is" in capsys.readouterr().err


def test_weights_beyond_the_image_are_none():
    embedder = untrained("cnn")
    assert isinstance(embedder.model, nnx.Module)
    whole = View(BOXES[0], 20, 24)
    images = np.zeros((1, *SHAPE), np.uint8)
    np.testing.assert_array_equal(resampling(whole, 20, 24)(images), images)
    assert ImageSpec(20, 24, 1).channels == 1


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(60, 25), (11, 40), (24, 20)])
def test_the_page_prepares_images_as_a_run_does(size, channels, tmp_path, monkeypatch):
    spec, given = ImageSpec(20, 24, channels), []

    def session(file):
        shape = "n", spec.height, spec.width, spec.channels
        return SimpleNamespace(
            get_inputs=lambda: [SimpleNamespace(shape=shape)],
            run=lambda _, inputs: given.append(inputs["images"]) or [None],
        )

    stub = SimpleNamespace(InferenceSession=session)
    monkeypatch.setitem(sys.modules, "onnxruntime", stub)
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    pixels = random.integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save("face.jpg", exif=exif)
    code, *_ = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.M | re.S)
    exec(code, {})
    (images,) = given
    assert images.dtype == np.uint8
    np.testing.assert_array_equal(images, spec.fit(open_image("face.jpg"))[None])
