"""Embedders that are no runs: functions of the user, and ONNX files."""

import json
import shutil
import sys

import numpy as np
import onnx
import pytest
from folders import shapes
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from test_export import untrained

from tripletjax import cli
from tripletjax.apps.embedders import open_embedder, vectors_of
from tripletjax.apps.embedders.functions import SIDE
from tripletjax.apps.export import export
from tripletjax.learn import evaluation

COLOURS = """
import numpy as np

calls = []

def embed(images):
    calls.append(len(images))
    small = [np.asarray(image.resize((4, 4)), np.float32) for image in images]
    return np.stack(small).reshape(len(images), -1) - 128

class Network:
    version = 7

    def __call__(self, images):
        return [[*image.size, 1] for image in images]

network = Network()
"""


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    """Write a module of the user into the current directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])

    def write(text, name="colours"):
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)
        shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)
        return name

    return write


def picture(width, height, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3))
    return Image.fromarray(pixels.astype(np.uint8))


def test_a_function_gets_bounded_batches_of_bounded_images(user_module):
    user_module(COLOURS)
    embedder = open_embedder("colours:embed")
    images = [picture(9, 7, seed) for seed in range(150)]
    x = vectors_of(embedder, images)
    # The first call shows the dimension.
    assert sys.modules["colours"].calls == [1, 64, 64, 22]
    expected = np.stack([np.asarray(i.resize((4, 4)), np.float32) for i in images])
    expected = expected.reshape(150, -1) - 128
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(x, expected, atol=1e-6)
    network = open_embedder("colours:network")
    for width, height in ((2000, 1000), (SIDE, 3)):
        scale = min(1, SIDE / width)
        size = np.array([width * scale, height * scale, 1])
        (vector,) = vectors_of(network, [picture(width, height)])
        np.testing.assert_allclose(vector, size / np.linalg.norm(size), rtol=1e-6)
    (vector,) = vectors_of(open_embedder("colours:network", size=10), [picture(40, 20)])
    np.testing.assert_allclose(vector * 10 / vector[0], [10, 5, 1], rtol=1e-6)


def test_zero_stays_zero_and_large_values_do_not_overflow(user_module):
    user_module("embed = lambda images: [[3e38, 3e38, 0]] * len(images)")
    x = vectors_of(open_embedder("colours:embed"), [picture(4, 4)])
    np.testing.assert_allclose(x, [[0.5**0.5, 0.5**0.5, 0]], rtol=1e-6)
    user_module("embed = lambda images: [[0.0, 0.0]] * len(images)")
    x = vectors_of(open_embedder("colours:embed"), [picture(4, 4)])
    np.testing.assert_array_equal(x, [[0, 0]])


def test_keys_name_function_dimension_version_and_size(user_module):
    user_module(COLOURS)
    keys = {
        open_embedder("colours:embed").key,
        open_embedder("colours:network").key,
        open_embedder("colours:network", size=10).key,
    }
    user_module(COLOURS.replace("version = 7", "version = 8"))
    keys.add(open_embedder("colours:network").key)
    user_module(COLOURS.replace("(4, 4)", "(3, 3)"))
    keys.add(open_embedder("colours:embed").key)
    assert len(keys) == 5
    user_module(COLOURS)
    assert open_embedder("colours:embed").key in keys


@pytest.mark.parametrize(
    ("text", "name", "words"),
    [
        ("", "colours", "must be MODULE:FUNCTION or FILE.onnx, got 'colours'"),
        ("", "runs/photos", "must be MODULE:FUNCTION or FILE.onnx"),
        ("", "nowhere:embed", "module nowhere does not exist"),
        ("", "colours.more:embed", "module colours.more does not exist"),
        ("", "colours:embed", "module colours has no function embed"),
        ("embed = 3", "colours:embed", "module colours has no function embed"),
        (
            "import torhc",
            "colours:embed",
            r"No module named 'torhc' \(colours.py, line 1",
        ),
        ("def embed(", "colours:embed", "import of colours raised SyntaxError"),
        (
            "def embed(images):\n    return images[1]",
            "colours:embed",
            r"raised IndexError: list index out of range \(colours.py, line 2\)",
        ),
        ("raise SystemExit(2)", "colours:embed", r"raised SystemExit: 2 \(colours.py"),
        (
            "def embed(images):\n    raise SystemExit",
            "colours:embed",
            r"raised SystemExit \(colours.py, line 2\)",
        ),
        ("embed = lambda images: 3", "colours:embed", r"vectors \[1, d\] for 1 image,"),
        ("embed = lambda images: [[1], [2]]", "colours:embed", r"got shape \(2, 1\)"),
        ("embed = lambda images: [[]]", "colours:embed", r"got shape \(1, 0\)"),
        ("embed = lambda images: [['a']]", "colours:embed", "numbers, got dtype <U1"),
        (
            "embed = lambda images: [[float('nan')]] * len(images)",
            "colours:embed",
            "finite vectors, got NaN",
        ),
        (
            "embed = lambda images: [[1] * len(images)] * len(images)",
            "colours:embed",
            "must return vectors of 1 dimensions, as before, got 2",
        ),
    ],
)
def test_bad_functions_are_one_line(text, name, words, user_module):
    user_module(text)
    with pytest.raises(ValueError, match=words) as caught:
        vectors_of(open_embedder(name), [picture(4, 4)] * 2)
    assert "\n" not in str(caught.value)


def write_onnx(
    file,
    *,
    shape=("n", 3, 5, 4),
    dtype=TensorProto.FLOAT,
    outputs=("vectors",),
    scale=1.0,
    external=False,
):
    """A network that flattens its images, and multiplies them by a number."""
    nodes = [
        helper.make_node("Cast", ["images"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Flatten", ["floats"], ["flat"]),
        *(helper.make_node("Mul", ["flat", "scale"], [name]) for name in outputs),
    ]
    graph = helper.make_graph(
        nodes,
        "flatten",
        [helper.make_tensor_value_info("images", dtype, shape)],
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", "d"])
            for name in outputs
        ],
        [numpy_helper.from_array(np.full(1024, scale, np.float32)[:1], "scale")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)])
    model.ir_version = 8
    more = {"location": f"{file.name}.data", "size_threshold": 0} if external else {}
    onnx.save(model, file, save_as_external_data=external, **more)
    return file


MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


def unit(x):
    x = np.float32(x).reshape(len(x), -1)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.mark.parametrize("source", ["options", "json"])
@pytest.mark.parametrize("batch", ["n", 2])
def test_a_file_gets_standardized_images(source, batch, tmp_path):
    file = write_onnx(tmp_path / "model.onnx", shape=(batch, 3, 5, 4))
    options = {"mean": MEAN, "std": STD}
    if source == "json":
        (tmp_path / "model.onnx.json").write_text(json.dumps(options))
        options = {}
    embedder = open_embedder(str(file), **options)
    images = [picture(4, 5, seed) for seed in range(3)]
    x = (np.stack([np.asarray(i) for i in images]) / 255 - MEAN) / STD
    np.testing.assert_allclose(
        vectors_of(embedder, images), unit(x.transpose(0, 3, 1, 2)), atol=1e-5
    )


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
def test_images_are_fitted(fit, tmp_path):
    shape = ("n", "h", "w", 3)
    file = write_onnx(tmp_path / "model.onnx", shape=shape, dtype=TensorProto.UINT8)
    json_file = tmp_path / "model.onnx.json"
    json_file.write_text(json.dumps({"size": [4, 6], "fit": fit}))
    # Black on the left, white in the middle, black on the right.
    pixels = np.zeros((40, 120, 3), np.uint8)
    pixels[:, 40:80] = 255
    prepared = open_embedder(str(file)).prepare(Image.fromarray(pixels))
    assert prepared.shape == (4, 6, 3)
    expected = {
        "crop": [0, 255, 255, 255, 255, 0],
        "pad": [0, 0, 255, 255, 0, 0],
        "stretch": [0, 0, 255, 255, 0, 0],
    }[fit]
    np.testing.assert_allclose(prepared[2, :, 0], expected, atol=40)
    assert (prepared[0] == prepared[2]).all() == (fit != "pad")


def test_grey_files_get_grey(tmp_path):
    file = write_onnx(
        tmp_path / "m.onnx", shape=("n", 5, 4, 1), dtype=TensorProto.UINT8
    )
    image = picture(4, 5)
    (x,) = vectors_of(open_embedder(str(file)), [image])
    np.testing.assert_allclose(x, unit([np.asarray(image.convert("L"))])[0], atol=1e-6)


def test_keys_are_of_the_content(tmp_path):
    options = {"mean": (0.5,), "std": (0.5,)}

    def key(**change):
        file = write_onnx(tmp_path / "model.onnx", **change)
        return open_embedder(str(file), **options).key

    first, other = key(), key(scale=2.0)
    weights = [key(scale=scale, external=True) for scale in (1.0, 2.0)]
    assert len({first, other, *weights}) == 4
    assert key() == first
    options["mean"] = (0.4,)
    assert key() != first


@pytest.mark.parametrize(
    ("change", "beside", "options", "words"),
    [
        ({}, None, {}, "requires the mean and the deviation of pixel values"),
        ({"shape": ("n", 60)}, None, {}, r"must have one input, images \[n, 3, h, w\]"),
        ({"shape": ("n", 5, 5, 4)}, None, {}, "channels are unclear"),
        ({"shape": ("n", 3, 5, 3)}, None, {}, "channels are unclear"),
        ({"shape": ("n", 5, 5, 4)}, {"layout": "nchw"}, {}, "1 or 3 channels, got 5"),
        ({"dtype": TensorProto.INT64}, None, {}, r"of float or uint8, got images"),
        ({"shape": ("n", 3, "h", "w")}, None, {}, "images of any size"),
        ({}, None, {"size": 7}, "size must be that of .*, 5 x 4, got 7 x 7"),
        (
            {"outputs": ("a", "b")},
            {"mean": MEAN, "std": STD},
            {},
            "has the outputs a, b",
        ),
        ({}, {"mean": MEAN, "std": STD, "output": "c"}, {}, "must be one of vectors"),
        ({}, None, {"mean": (1, 2), "std": (1,)}, "mean must be 1 or 3 finite numbers"),
        (
            {},
            {"mean": MEAN, "std": [0.0]},
            {},
            r"json: std must be 1 or 3 numbers above",
        ),
        ({}, {"means": MEAN}, {}, "no names but size, mean, std"),
        ({}, {"layout": "nchw", "fit": "zoom"}, {}, "fit must be crop, pad, stretch"),
        ({}, {"size": [1, 2, 3]}, {}, "size must be a number of pixels"),
        ({}, "{", {}, "broken preparation"),
        ({}, {"background": "white"}, {}, "must be written by tripletjax export"),
        ({"scale": np.nan}, {"mean": MEAN, "std": STD}, {}, "finite vectors, got NaN"),
        (
            {"shape": (2, "c", 5, 4), "dtype": TensorProto.UINT8},
            {"layout": "nchw", "size": [9, 9]},
            {},
            "size must be that of",
        ),
    ],
)
def test_bad_files_are_one_line(change, beside, options, words, tmp_path):
    file = write_onnx(tmp_path / "model.onnx", **change)
    if beside is not None:
        text = beside if isinstance(beside, str) else json.dumps(beside)
        (tmp_path / "model.onnx.json").write_text(text)
    with pytest.raises(ValueError, match=words) as caught:
        vectors_of(open_embedder(str(file), **options), [picture(9, 9)])
    assert "\n" not in str(caught.value)


def test_missing_and_broken_files_are_named(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"none\.onnx does not exist"):
        open_embedder(str(tmp_path / "none.onnx"))
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(write_onnx(tmp_path / "model.onnx").read_bytes()[:50])
    with pytest.raises(ValueError, match="is no ONNX file that ONNX Runtime reads"):
        open_embedder(str(broken))
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match=r'pip install -e "\.\[train,export\]"'):
        open_embedder(str(tmp_path / "model.onnx"))


@pytest.mark.slow
def test_every_command_takes_a_function(user_module, tmp_path, capsys):
    """Indexes, threshold and reports lie in runs, and not beside the user's files."""
    user_module(COLOURS)
    people = shapes(tmp_path / "people", kinds=8, each=9)
    image = str(next(people.rglob("*.png")))
    before = {*tmp_path.rglob("*")}
    home = tmp_path / "runs" / "embedder-colours.embed"
    name = ["--embedder", "colours:embed"]

    def call(*arguments):
        status = cli.main([*arguments[:1], *name, *map(str, arguments[1:])])
        return status, *capsys.readouterr()

    status, printed, _ = call("search", "--index", people, "--query", image)
    assert status == 0
    assert "72 images in the index (72 added)" in printed
    assert "index: runs/embedder-colours.embed/index" in printed
    status, printed, _ = call("verify", "--data", people)
    assert status == 0
    assert (
        "The threshold is kept in runs/embedder-colours.embed/calibration." in printed
    )
    report = home / "verifications" / "people" / "report.json"
    equal_error_rate = json.loads(report.read_text())["verification"][
        "equal_error_rate"
    ]
    assert equal_error_rate < 50
    status, printed, _ = call("verify", image, image)
    assert status == 0
    assert printed.startswith("same  distance 0.0000")
    status, printed, _ = call("identify", "--gallery", people, image)
    assert status == 0
    assert "gallery: 8 classes, 72 images" in printed
    status, printed, _ = call("evaluate", "--data", people)
    assert status == 0
    report = json.loads((home / "evaluations" / "people" / "report.json").read_text())
    assert report["run"] is None
    assert report["embedder"].startswith("function colours:embed, 48 dimensions")
    assert report["verification"]["equal_error_rate"] == equal_error_rate
    new = {*tmp_path.rglob("*")} - before
    top = {path.relative_to(tmp_path).parts[0] for path in new}
    assert top - {"__pycache__"} == {"runs"}

    # Another function, or the same one changed, is refused.
    user_module(COLOURS.replace("(4, 4)", "(3, 3)"))
    for arguments, words in (
        (("search", "--index", people), "was made by another embedder"),
        (("verify", image, image), "or another embedder. Choose one on images"),
        (("identify", "--gallery", people, image), "or another embedder. Choose one"),
    ):
        status, _, error = call(*arguments)
        assert status == 2
        assert words in error
        assert error.count("\n") == 1
    # In a directory of its own it works.
    own = ("--embedder-dir", tmp_path / "own")
    assert call("search", "--index", people, *own)[0] == 0
    assert (tmp_path / "own" / "index").is_dir()


def test_one_class_is_refused_before_images_are_read(user_module, tmp_path, capsys):
    """Photographs of thousands take minutes."""
    user_module(COLOURS)
    (tmp_path / "one" / "class").mkdir(parents=True)
    picture(4, 4).save(tmp_path / "one" / "class" / "1.png")
    for more in (("evaluate",), ("mine", "--out", "a.csv")):
        arguments = [*more, "--embedder", "colours:embed", "--data", "one"]
        assert cli.main(arguments) == 2
        assert capsys.readouterr().err == (
            f"tripletjax {more[0]}: one must have at least 2 folders of readable "
            "images, one per class, got 1.\n"
        )


def test_a_name_with_a_line_break_is_printed_in_one_line(user_module, tmp_path, capsys):
    user_module(COLOURS)
    folder = tmp_path / "two\nlines"
    folder.mkdir()
    (folder / "a\x1b\n.png").write_text("no image")
    embedder = ("--embedder", "colours:embed", "--embedder-dir", str(tmp_path / "own"))
    assert cli.main(["search", *embedder, "--index", str(folder), "--duplicates"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert r"- a\x1b\n.png: it is not a readable image" in lines
    arguments = ["cluster", *embedder, "--index", str(folder), "--threshold", "1"]
    assert cli.main(arguments) == 2
    assert capsys.readouterr().err.endswith(
        r"two\nlines must have at least 2 readable images to group, got 0." "\n"
    )


def test_serve_takes_a_file(tmp_path, monkeypatch, capsys):
    from tripletjax.apps import serve

    monkeypatch.chdir(tmp_path)
    write_onnx(tmp_path / "model.onnx")
    people = shapes(tmp_path / "people", kinds=2, each=3)
    apps = []
    monkeypatch.setattr(serve, "run", lambda app, **options: apps.append(app))
    numbers = ["--embedder-mean", "0.5", "--embedder-std", "0.5"]
    embedder = ["--embedder", "model.onnx", *numbers]
    assert cli.main(["serve", *embedder, "--index", str(people)]) == 0
    assert "no threshold was chosen in runs/embedder-model" in capsys.readouterr().out
    (app,) = apps
    assert len(app.paths) == 6
    assert app.index.embedder.key.startswith("onnx ")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("", "give --run RUN, or --embedder with another embedder."),
        ("--run a --embedder b:c", "--embedder cannot be combined with --run"),
        ("--run a --embedder-dir b", "--embedder-dir requires --embedder."),
        ("--run a --embedder-std 1", "--embedder-std requires --embedder."),
        ("--embedder b:c --embedder-size 0", "must be at least 1, got 0"),
        ("--embedder json:dumps --embedder-mean 1", "mean and std require"),
        ("--embedder nowhere:embed", "module nowhere does not exist"),
    ],
)
def test_wrong_use_is_one_line(arguments, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert cli.main(["search", *arguments.split(), "--index", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not [*tmp_path.iterdir()]


@pytest.mark.slow
def test_an_evaluation_shows_images_of_any_size(user_module, tmp_path):
    user_module(COLOURS)
    for number in range(6):
        file = tmp_path / "data" / f"class{number % 2}" / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        picture(9 + number, 20, seed=number).save(file)
    embedder = open_embedder("colours:embed")
    out = tmp_path / "out"
    report = evaluation.evaluate(embedder, tmp_path / "data", out=out)
    assert report["images"] == 6
    assert (out / "neighbors.png").exists()


@pytest.mark.slow
def test_an_exported_file_carries_its_preparation(tmp_path):
    """Without the JSON beside it, and whatever the size and colour of an image."""
    embedder = untrained("cnn", (20, 24, 3))
    people = shapes(tmp_path / "people", kinds=2, each=3, mode="RGB")
    exported = export(embedder, tmp_path / "model.onnx", check=people)
    exported.preparation.unlink()
    other = open_embedder(str(tmp_path / "model.onnx"))
    images = [picture(30, 11), picture(24, 20), picture(9, 50).convert("L")]
    np.testing.assert_allclose(
        vectors_of(other, images), vectors_of(embedder, images), atol=1e-4
    )
    with pytest.raises(ValueError, match="file carries the preparation of its run"):
        open_embedder(str(tmp_path / "model.onnx"), mean=(0.5,))
