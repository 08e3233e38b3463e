"""Embedders for elsewhere do what the run does."""

import dataclasses
import itertools
import re
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from folders import shapes
from PIL import Image
from plans import make_plan
from problems import in_lanes

from tripletjax import cli
from tripletjax.apps import export as exports
from tripletjax.apps.export import DifferenceError, export, resampling
from tripletjax.learn.data.image_files import open_image
from tripletjax.learn.data.image_shape import ImageSpec, View, prepare_images
from tripletjax.learn.embedder import Embedder
from tripletjax.learn.networks.embedding_networks import MODELS
from tripletjax.learn.runs.config import Config
from tripletjax.learn.runs.model import build_model
from tripletjax.learn.runs.record import ImageRecord, RunRecord

ROOT = Path(__file__).parent.parent
SHAPE = (20, 24, 1)


def untrained(name, shape=SHAPE, **options):
    """An embedder of a run that has not been trained."""
    seen = {"box": (0.1, 0.2, 0.85, 0.9), "mirror": True, "head": "grid"}
    plan = make_plan(model=name, dim=16, **seen | options)
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


SIZES = [(24, 20), (9, 33), (60, 50)]
SEEN = [(16, 16), (11, 31), (40, 9)]


@in_lanes(
    ("size", "seen", "box"),
    itertools.product(SIZES, SEEN, BOXES),
    quick=[(SIZES[0], SEEN[0], box) for box in BOXES],
    # Pairwise: every other size from every other size.
    slow=[
        *(zip(SIZES[1:], SEEN[1:], BOXES)),
        *(zip(SIZES[1:], SEEN[:0:-1], BOXES[1:])),
    ],
)
def test_views_are_pillows_to_the_bit(size, seen, box):
    view = View(box, *seen)
    draw = np.random.default_rng(0)
    images = draw.integers(0, 2, (3, *size, 3)).astype(np.uint8) * 255
    images[1] = draw.integers(0, 256, (*size, 3))
    images[2] = 10 * (np.arange(size[1]) % 26)[:, None]
    np.testing.assert_array_equal(resampling(view, *size)(images), view(images))


@in_lanes(
    ("name", "suffix"),
    itertools.product(MODELS, exports.FUNCTIONS),
    # Every network, and every format for some.
    slow=[*zip(MODELS, itertools.cycle(exports.FUNCTIONS))],
)
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
    assert made.preparation == out.with_name(f"{out.name}.json")
    assert {*out.parent.iterdir()} == {out, made.preparation}
    with pytest.raises(FileExistsError, match=r"already exists; give another file\.$"):
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
    same = exports._to_float32(low).embed(images)
    np.testing.assert_allclose(same, full.embed(images), atol=1e-6)
    assert np.abs(same - low.embed(images)).max() > 1e-4


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
    with pytest.raises(DifferenceError, match=r"from the run by at most 0\.0001, got"):
        export(embedder, tmp_path / "out" / "model.stablehlo", check=people)
    assert [*(tmp_path / "out").iterdir()] == []


def test_bad_exports_are_named(tmp_path, monkeypatch):
    embedder = untrained("cnn")
    with pytest.raises(
        ValueError, match=r"out must end in \.onnx, \.stablehlo, \.safetensors"
    ):
        export(embedder, tmp_path / "model.pt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="check must have a readable image"):
        export(embedder, tmp_path / "model.onnx", check=tmp_path / "empty")
    monkeypatch.setitem(sys.modules, "jax2onnx", None)
    monkeypatch.setitem(sys.modules, "flatbuffers", None)
    for suffix in exports.FUNCTIONS:
        with pytest.raises(ImportError, match=r"\[train,export\]"):
            export(embedder, tmp_path / f"model{suffix}")
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_what_is_compared_is_said(tmp_path):
    embedder = untrained("cnn")
    images, of = exports._comparison_images(embedder, None)
    assert images.shape == (32, *SHAPE)
    assert "noise" in of
    requested = Config(data="digits")
    record = dataclasses.replace(embedder.record, requested=requested)
    images, of = exports._comparison_images(
        dataclasses.replace(embedder, record=record), None
    )
    assert (images.shape, of) == ((32, *SHAPE), "32 digits")
    # Images from all over the folder, but those that are broken.
    people = shapes(tmp_path / "people", kinds=4, each=20)
    (people / "group0" / "kind0" / "0.png").write_bytes(b"none")
    images, _ = exports._comparison_images(embedder, people)
    assert 20 <= len(images) <= 32


def test_the_command_exports(tmp_path, capsys, monkeypatch):
    from tripletjax.learn import embedder as module

    monkeypatch.setattr(module, "load_embedder", lambda run: untrained("cnn"))
    people, out = shapes(tmp_path / "people", kinds=2, each=2), tmp_path / "m.stablehlo"
    command = ["export", "--run", "r", "--out", str(out), "--check", str(people)]
    assert cli.main(command) == 0
    told = capsys.readouterr().out
    assert "from images uint8 [n, 20, 24, 1] to vectors [n, 16]" in told
    assert "m.stablehlo.json: preparation of the images" in told
    assert "on 4 images of" in told
    for _ in range(2):
        assert cli.main(command) == 2
        assert "already exists; give another file." in capsys.readouterr().err
        # Its preparation alone is not overwritten either.
        out.unlink(missing_ok=True)


def test_weights_beyond_the_image_are_none():
    embedder = untrained("cnn")
    assert isinstance(embedder.model, nnx.Module)
    whole = View(BOXES[0], 20, 24)
    images = np.zeros((1, *SHAPE), np.uint8)
    np.testing.assert_array_equal(resampling(whole, 20, 24)(images), images)
    assert ImageSpec(20, 24, 1).channels == 1


RECIPE = re.findall(
    r"```python\n(.*?)```", (ROOT / "docs" / "export.md").read_text(), re.DOTALL
)


def photographs(folder):
    """Images that a resize alone would change: their sides, tags, depth and alpha."""
    draw = np.random.default_rng(0)
    noise = draw.integers(0, 200, (6, 5, 3), dtype=np.uint8)
    noise = np.kron(noise, np.ones((8, 8, 1), np.uint8))
    image, grey = Image.fromarray(noise), noise[..., 0].astype(np.uint16)
    image.save(folder / "plain.png")
    turned = Image.Exif()
    turned[274] = 6
    image.save(folder / "turned.jpg", exif=turned.tobytes())
    image.resize((90, 20)).save(folder / "wide.png")
    alpha = np.uint8(255) * (grey > 90)
    Image.fromarray(np.dstack([noise, alpha])).save(folder / "clear.png")
    Image.fromarray(grey * 15 + 500).save(folder / "deep.png")
    return sorted(folder.iterdir())


@pytest.mark.parametrize(
    ("suffix", "blocks"),
    [(".stablehlo", (0, 2)), pytest.param(".onnx", (0, 1), marks=pytest.mark.slow)],
)
def test_the_recipe_of_the_docs_gives_the_vectors_of_the_run(
    suffix, blocks, tmp_path, monkeypatch
):
    embedder = untrained("cnn", (20, 24, 3))
    images = dataclasses.replace(
        embedder.record.images, white=4095.0, background="black"
    )
    record = dataclasses.replace(embedder.record, images=images)
    embedder = dataclasses.replace(embedder, shape=images.spec, record=record)
    (tmp_path / "photos").mkdir()
    files = photographs(tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    export(embedder, f"faces{suffix}", check=tmp_path / "photos")
    assert len(RECIPE) == 3
    names = {}
    for block in blocks:
        code = RECIPE[block].replace('["face.jpg"]', repr([*map(str, files)]))
        code = code.replace("faces.onnx.json", f"faces{suffix}.json")
        exec(code, names)
    expected = embedder(files)
    np.testing.assert_allclose(names["vectors"], expected, atol=1e-4)
    prepared = [embedder.prepare(open_image(file)) for file in files]
    np.testing.assert_array_equal(names["pixels"], prepared)


def test_preparation_needs_no_training_packages(tmp_path):
    photographs(tmp_path)
    code = f"""
import sys
from pathlib import Path
from tripletjax.learn.data.image_shape import ImageSpec, prepare_images
files = sorted(Path({str(tmp_path)!r}).iterdir())
assert prepare_images(files, ImageSpec(9, 9, 3)).shape == (5, 9, 9, 3)
outside = {{name.partition(".")[0] for name in sys.modules}}
assert not outside & {{"flax", "optax", "orbax", "tensorflow_datasets", "matplotlib"}}
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


@pytest.mark.parametrize("content", ["{", "[]", '{"height": 3}', '{"other": 3}'])
def test_a_file_that_is_no_preparation_is_named(content, tmp_path):
    file = tmp_path / "model.onnx.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=r"onnx\.json must be written by tripletjax"):
        prepare_images([tmp_path / "face.jpg"], file)
    with pytest.raises(ValueError, match="files must not be empty"):
        prepare_images([], file)
    with pytest.raises(FileNotFoundError):
        prepare_images([tmp_path / "face.jpg"], tmp_path / "none.json")
