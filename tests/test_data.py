"""Where images come from, what is held out, and which make a batch."""

import errno
import io
import itertools
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from folders import prepare_digits, shapes
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from tripletjax.learn.data import (
    cache_cleanup,
    datasets,
    image_cache,
    image_files,
    image_shape,
    sampling,
    splits,
    triplet_files,
)
from tripletjax.learn.data.image_array import StoredImages
from tripletjax.learn.data.tfds_catalogue import Catalogue
from tripletjax.learn.files import digest_of_image

pytestmark = pytest.mark.usefixtures("own_data_dir")


def test_digits_come_back_as_they_are_in_the_file(tmp_path):
    from sklearn.datasets import load_digits

    digits = load_digits()
    dataset = datasets.load("digits", data_dir=tmp_path)
    assert "tensorflow" not in sys.modules
    assert not list(tmp_path.iterdir())
    sizes = [len(part) for part in (dataset.train, dataset.validation, dataset.test)]
    assert sizes == [808, 90, 899]
    np.testing.assert_array_equal(dataset.test.images[..., 0] / 15, digits.images[898:])
    np.testing.assert_array_equal(dataset.test.labels, digits.target[898:])
    rest = [*dataset.train.images, *dataset.validation.images]
    first = [image.tobytes() for image in np.uint8(digits.images[:898] * 15)]
    assert sorted(image.tobytes() for image in rest) == sorted(first)
    assert dataset.test.images.dtype == np.uint8
    assert dataset.label_names == tuple("0123456789")
    again = datasets.load("digits", data_dir=tmp_path)
    np.testing.assert_array_equal(again.train.images, dataset.train.images)


def test_digits_by_class_and_of_another_size(tmp_path):
    dataset = datasets.load("digits", split="classes", size=16, data_dir=tmp_path)
    parts = dataset.train, dataset.validation, dataset.test
    assert [len(set(part.labels)) for part in parts] == [6, 2, 2]
    assert len(set().union(*(part.labels for part in parts))) == 10
    assert sum(map(len, parts)) == 1797
    assert dataset.train.images.shape[1:] == (16, 16, 1)
    assert dataset.key != datasets.load("digits", data_dir=tmp_path).key


def test_copies_of_an_image_stay_together(tmp_path):
    folder = shapes(tmp_path / "pictures", kinds=2, each=10)
    for file in list(folder.rglob("*.*")):
        for number in range(3):
            shutil.copy(file, file.with_stem(f"{file.stem}-copy{number}"))
    dataset = datasets.load(str(folder), kind="characters", data_dir=tmp_path / "kept")
    parts = dataset.train, dataset.validation, dataset.test
    assert [len(part) for part in parts] == [56, 8, 16]
    seen = [{image.tobytes() for image in part.images} for part in parts]
    assert sum(map(len, seen)) == len(set.union(*seen)) == 20


def test_unknown_data():
    with pytest.raises(ValueError, match="data must be digits"):
        datasets.load("faces")
    with pytest.raises(ValueError, match="split must be one of images, classes"):
        datasets.load("digits", split="some")


def test_a_folder_of_images(tmp_path):
    folder = shapes(tmp_path / "pictures")
    dataset = datasets.load(str(folder), kind="characters", data_dir=tmp_path / "kept")
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
    one = datasets.load(str(folder), data_dir=tmp_path / "kept")
    for file in sorted(folder.rglob("*.*")):
        # In the opposite order.
        file.rename(file.with_name(f"{50 - int(file.stem)}{file.suffix}"))
    two = datasets.load(str(folder), data_dir=tmp_path / "kept")
    assert {x.tobytes() for x in one.test.images} == {
        x.tobytes() for x in two.test.images
    }


def test_classes_are_held_out_whole(tmp_path):
    folder = shapes(tmp_path / "pictures", kinds=8, each=4)
    dataset = datasets.load(str(folder), split="classes", data_dir=tmp_path / "kept")
    kinds = [
        set(part.labels) for part in (dataset.train, dataset.validation, dataset.test)
    ]
    assert [len(each) for each in kinds] == [4, 2, 2]
    assert set.union(*kinds) == set(range(8))
    few = shapes(tmp_path / "few", kinds=5, each=3)
    with pytest.raises(ValueError, match="to train on, got 1 of 5; give more classes"):
        datasets.load(str(few), split="classes", data_dir=tmp_path / "kept")


def test_a_folder_is_decoded_once(tmp_path, monkeypatch):
    folder = shapes(tmp_path / "pictures", each=4)
    one = datasets.load(str(folder), data_dir=tmp_path / "kept")
    assert list((tmp_path / "kept").rglob("*.array_record*"))
    with monkeypatch.context() as patch:
        patch.setattr(datasets, "open_image", lambda file: 1 / 0)
        two = datasets.load(str(folder), data_dir=tmp_path / "kept")
    assert one.key == two.key
    np.testing.assert_array_equal(one.train.images, two.train.images)
    # Another content at the same place.
    file = folder / "group0" / "kind0" / "0.png"
    Image.new("L", (24, 20), 77).save(file)
    assert datasets.load(str(folder), data_dir=tmp_path / "kept").key != one.key


def test_a_second_decode_of_the_same_folder_waits_for_the_first(
    tmp_path, monkeypatch, capsys
):
    folder, kept = str(shapes(tmp_path / "pictures")), tmp_path / "kept"
    prepare, calls, second = image_cache.prepare, [], []
    begun = threading.Event()

    def load():
        second.append(datasets.load(folder, data_dir=kept, progress=True))

    def slow(builder):
        if not calls:
            calls.append(builder)
            other.start()
            begun.wait(0.5)
            assert not second
        else:
            # The first decode has ended.
            assert builder.data_path.exists()
            calls.append(builder)
        prepare(builder)

    other = threading.Thread(target=load)
    monkeypatch.setattr(image_cache, "prepare", slow)
    first = datasets.load(folder, data_dir=kept)
    other.join()
    assert len(calls) == 2
    assert "waiting for another process" in capsys.readouterr().err
    assert second[0].key == first.key
    np.testing.assert_array_equal(first.test.images, second[0].test.images)
    assert not list(kept.rglob("*incomplete*"))


KILLED = """
import os, sys
from tripletjax.learn.data import datasets, image_shape
def stop(*args):
    os.kill(os.getpid(), 9)
image_shape.ImageSpec.fit = stop
datasets.load(sys.argv[1], data_dir=sys.argv[2])
"""
HOLDS = """
import sys
from tripletjax.learn.data import datasets
datasets.load(sys.argv[1], data_dir=sys.argv[2])
print("held", flush=True)
sys.stdin.read()
"""


@pytest.mark.slow
def test_what_nobody_needs_is_removed(tmp_path):
    folder, cache = shapes(tmp_path / "pictures"), tmp_path / "kept"

    def entries():
        return {path for path in (cache / "tripletjax").iterdir() if path.is_dir()}

    def python(program):
        command = [sys.executable, "-c", program, str(folder), str(cache)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, **pipes)

    def added(number):
        file = folder / "group0" / "kind0" / f"added{number}.png"
        Image.fromarray(np.uint8(np.eye(20) * 77 + number)).save(file)

    with python(KILLED) as killed:
        assert killed.wait() == -9
    assert list(cache.rglob("incomplete.*"))
    with python(HOLDS) as other:
        assert other.stdout.readline() == "held\n"
        assert not list(cache.rglob("incomplete.*"))
        (old,) = entries()
        added(1)
        one = datasets.load(str(folder), data_dir=cache)
        # A living process uses the other.
        assert old in entries()
        assert len(entries()) == 2
        assert not any("removed" in note for note in one.decoding.notes)
        assert "decoded images are kept in" in one.decoding.notes[-1]
        other.stdin.close()
    two = datasets.load(str(folder), data_dir=cache)
    assert old not in entries()
    assert len(entries()) == 1
    assert any("removed an earlier copy of images" in n for n in two.decoding.notes)
    # Another folder of the same images shares what is kept.
    copy = shutil.copytree(folder, tmp_path / "copy")
    datasets.load(str(copy), data_dir=cache)
    assert len(entries()) == 1
    with python(HOLDS) as other:
        other.communicate()
    added(2)
    datasets.load(str(folder), data_dir=cache)
    assert len(entries()) == 2


def test_of_several_frames_the_first_is_seen_and_that_is_said(tmp_path):
    folder = shapes(tmp_path / "pictures", each=4)
    frames = [Image.fromarray(np.uint8(np.eye(20) * 99 + n)) for n in (10, 90)]
    place = folder / "group0" / "kind0" / "moving.gif"
    frames[0].save(place, save_all=True, append_images=frames[1:])
    dataset = datasets.load(str(folder), data_dir=tmp_path / "kept")
    assert "1 image has several frames: the first one is used" in dataset.decoding.notes
    first = image_files.open_image(place).convert("L")
    assert abs(np.asarray(first, int) - np.asarray(frames[0], int)).max() < 3
    # The second frame is cut off.
    place.write_bytes(place.read_bytes()[:-40])
    assert image_files.open_image(place).size == (20, 20)


def test_broken_images_are_named_and_skipped(tmp_path):
    folder = shapes(tmp_path / "pictures", each=4)
    place = folder / "group0" / "kind0"
    (place / "none.png").write_bytes(b"this is no image")
    whole = (place / "0.png").read_bytes()
    (place / "half.png").write_bytes(whole[: len(whole) // 2])
    (place / "empty.jpg").write_bytes(b"")
    (place / "notes.txt").write_text("no image")
    (place / "Thumbs.db").write_bytes(b"not looked at")
    (place / "@eaDir").mkdir()
    (place / "@eaDir" / "thumb.png").write_bytes(whole)
    (folder / "README").write_text("no image")
    (folder / "papers").mkdir()
    (folder / "papers" / "a.pdf").write_text("no image")
    (place / ".hidden.png").write_bytes(b"not looked at")
    for _ in range(2):
        dataset = datasets.load(str(folder), data_dir=tmp_path / "kept")
        named = [line.split(":")[0] for line in dataset.skipped]
        broken = ("empty.jpg", "half.png", "none.png", "notes.txt")
        assert named == [
            "README",
            *(f"group0/kind0/{n}" for n in broken),
            "papers/a.pdf",
            "papers",
        ]
        counts = {name: n for name, n in dataset.skip_counts.items() if n}
        assert counts == {"unreadable": 5}
        counts = {name: n for name, n in dataset.entry_counts.items() if n}
        assert counts == {
            "files outside the folders of classes": 1,
            "folders without images": 1,
        }
        words = "an image that can be used: papers; most often, it is not a readable"
        assert sum(words in note for note in dataset.decoding.notes) == 1
        assert len(dataset.label_names) == 8
    assert len(dataset.train) + len(dataset.validation) + len(dataset.test) == 32


def test_images_are_known_by_what_they_hold(tmp_path):
    folder, draw = tmp_path / "pictures", np.random.default_rng(0)
    for form in ("tiff", "gif", "jpeg", "png", "bmp", "ppm"):
        (folder / form).mkdir(parents=True)
        for number in range(4):
            pixels = draw.integers(0, 200, (20, 24), dtype=np.uint8)
            suffix = ("", ".jfif", ".TIF", ".data")[number]
            Image.fromarray(pixels).save(
                folder / form / f"{number}{suffix}", format=form
            )
    dataset = datasets.load(str(folder), data_dir=tmp_path / "kept")
    assert dataset.skipped == ()
    assert len(dataset.label_names) == 6
    assert len(dataset.train) + len(dataset.validation) + len(dataset.test) == 24


def broken_exif(resolution):
    """Metadata with an orientation, and with a resolution that is none."""
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x011A] = resolution
    return exif.tobytes()


@pytest.mark.parametrize("form", ["jpeg", "png", "webp", "tiff"])
@pytest.mark.parametrize(
    ("exif", "turned"),
    [
        (broken_exif(0.0), True),
        (b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\x00\x01\x01\x12\x00\x03", False),
        (b"Exif\x00\x00garbage that is no metadata at all", False),
        (b"", False),
    ],
)
def test_metadata_never_cost_an_image(tmp_path, form, exif, turned):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    file = tmp_path / "image"
    options = {"lossless": True} if form == "webp" else {}
    if exif and form != "tiff":
        options["exif"] = exif
    Image.fromarray(pixels).save(file, format=form, **options)
    opened = image_files.open_image(file)
    assert opened.size == ((8, 12) if turned and form != "tiff" else (12, 8))
    if turned and form == "png":
        np.testing.assert_array_equal(np.asarray(opened), np.rot90(pixels, -1))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_are_upright_however_the_camera_was_held(tmp_path, orientation):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = tmp_path / "image.png"
    Image.fromarray(pixels).save(file, exif=exif.tobytes())
    with Image.open(file) as image:
        expected = ImageOps.exif_transpose(image)
    np.testing.assert_array_equal(image_files.open_image(file), expected)


@pytest.mark.parametrize(("most", "white"), [(255, 255), (256, 1023), (4095, 4095)])
def test_grey_of_more_than_8_bits_has_one_white(tmp_path, most, white):
    draw = np.random.default_rng(0)
    for kind in "ab":
        (tmp_path / "pictures" / kind).mkdir(parents=True)
        for number in range(4):
            pixels = draw.integers(0, most // 4, (6, 8)).astype(np.uint16)
            pixels[0, 0], pixels[0, 1] = number, most // 2
            if kind == "b" and number == 3:
                pixels[0, 1] = most
            file = tmp_path / "pictures" / kind / f"{number}.png"
            Image.fromarray(pixels).save(file)
    dataset = datasets.load(str(tmp_path / "pictures"), data_dir=tmp_path / "kept")
    assert dataset.decoding.white == white
    assert f"in images of more than 8 bits {white} is white" in dataset.decoding.notes
    parts = dataset.train, dataset.validation, dataset.test
    tops = np.concatenate([part.images[:, 0, 1, 0] for part in parts])
    low, high = (round(255 * value / white) for value in (most // 2, most))
    assert sorted(tops.tolist()) == [low] * 7 + [high]


def test_white_icons_are_seen_on_black(tmp_path):
    for kind in range(3):
        (tmp_path / "icons" / str(kind)).mkdir(parents=True)
        for number in range(4):
            pixels = np.full((16, 16, 4), 255, np.uint8)
            pixels[..., 3] = 0
            pixels[2 * kind : 2 * kind + 6, number : number + 9, 3] = 255
            file = tmp_path / "icons" / str(kind) / f"{number}.png"
            Image.fromarray(pixels).save(file)
    dataset = datasets.load(str(tmp_path / "icons"), data_dir=tmp_path / "kept")
    assert dataset.decoding.background == "black"
    assert "black shows through transparency" in dataset.decoding.notes
    assert (np.ptp(dataset.train.images, axis=(1, 2, 3)) > 200).all()
    assert dataset.skipped == ()


def test_blank_and_contradictory_images_are_named(tmp_path):
    folder = shapes(tmp_path / "pictures", kinds=3, each=6)
    Image.new("L", (24, 20), 77).save(folder / "group0" / "kind0" / "blank.png")
    shutil.copy(folder / "group0/kind0/0.png", folder / "group1/kind1/same.png")
    dataset = datasets.load(str(folder), data_dir=tmp_path / "kept")
    assert dataset.skipped == (
        "group0/kind0/blank.png: blank: all of its pixels are the same",
        "group0/kind0/0.png: the same image is in group1/kind1",
        "group1/kind1/same.png: the same image is in group0/kind0",
    )
    counts = {"unreadable": 0, "blank": 1, "in several classes": 2}
    assert dataset.skip_counts == counts
    assert not any(dataset.entry_counts.values())
    assert any(
        "2 images that are in several classes" in n for n in dataset.decoding.notes
    )
    assert len(dataset.train) + len(dataset.validation) + len(dataset.test) == 17
    for file in folder.rglob("*.*"):
        Image.new("L", (24, 20), 77).save(file)
    with pytest.raises(ValueError, match="none of 20 images can be used: blank"):
        datasets.load(str(folder), data_dir=tmp_path / "kept")


def test_training_runs_within_the_data_are_left_out(tmp_path):
    folder = shapes(tmp_path / "pictures", kinds=2, each=4)
    run = folder / "runs" / "pictures"
    run.mkdir(parents=True)
    for name in ("config.json", "metrics.jsonl"):
        (run / name).write_text("{}")
    shutil.copy(folder / "group0/kind0/0.png", run / "neighbors.png")
    dataset = datasets.load(str(folder), data_dir=tmp_path / "kept")
    assert dataset.label_names == ("group0/kind0", "group1/kind1")
    assert dataset.skipped == ()
    told = "directories of training runs are left out: runs/pictures"
    assert told in dataset.decoding.notes


@pytest.mark.parametrize(
    ("files", "names", "why"),
    [
        (("ann/2019/1", "ann/2021/2", "bob/2020/3"), ("ann", "bob"), "by date"),
        (("ann/1", "ann/old/2", "bob/3"), ("ann", "bob"), "beside sub-folders"),
        (("Greek/a01/1", "Latin/a01/2"), ("Greek/a01", "Latin/a01"), "no dates"),
        (("ann/1", "bob/2"), ("ann", "bob"), None),
    ],
)
def test_which_folders_are_classes(tmp_path, files, names, why):
    for number, file in enumerate(files):
        path = tmp_path / "pictures" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        for copy in range(2):
            pixels = np.arange(480).reshape(20, 24) % (50 + 7 * number + copy)
            Image.fromarray(np.uint8(pixels)).save(f"{path}{copy}.png")
    dataset = datasets.load(str(tmp_path / "pictures"), data_dir=tmp_path / "kept")
    assert dataset.label_names == names
    assert (why is None) == (len(dataset.decoding.notes) == 1)
    if why is not None:
        assert why in dataset.decoding.notes[0]
    for level in ("top", "leaf"):
        dataset = datasets.load(
            str(tmp_path / "pictures"), classes_from=level, data_dir=tmp_path / "kept"
        )
        depth = {name.count("/") for name in dataset.label_names}
        assert depth <= ({0} if level == "top" else {0, 1})


def test_files_that_cannot_be_opened_are_named_too(tmp_path, monkeypatch):
    folder = shapes(tmp_path / "pictures", kinds=2, each=4)
    opened = io.open

    def refused(file, *args, **options):
        if str(file).endswith("0.png"):
            raise PermissionError(f"{file} is not for you")
        return opened(file, *args, **options)

    monkeypatch.setattr("io.open", refused)
    monkeypatch.setattr("builtins.open", refused)
    dataset = datasets.load(str(folder), data_dir=tmp_path / "kept")
    assert len(dataset.skipped) == 2
    assert all("0.png is not for you" in words for words in dataset.skipped)


def test_names_that_are_not_utf8(tmp_path):
    folder = shapes(tmp_path / "pictures", kinds=2, each=4)
    one = folder / "group0" / "kind0"
    one.rename(os.fsdecode(os.fsencode(one.parent) + b"/caf\xe9"))
    dataset = datasets.load(str(folder), data_dir=tmp_path / "kept")
    assert dataset.label_names == ("group0/caf\ufffd", "group1/kind1")


def test_parts_of_a_dataset_are_not_classes(tmp_path):
    for part in ("train", "val"):
        shapes(tmp_path / "pictures" / part, kinds=2, each=4)
    with pytest.raises(ValueError, match=r"holds train and val.*Give one of them"):
        datasets.load(str(tmp_path / "pictures"), data_dir=tmp_path / "kept")
    # One alone may be called so.
    shutil.rmtree(tmp_path / "pictures" / "val")
    assert len(datasets.load(str(tmp_path / "pictures")).label_names) == 2


def test_links_are_followed_but_not_in_circles(tmp_path):
    folder = shapes(tmp_path / "pictures", each=4)
    (tmp_path / "links").mkdir()
    for name in ("group0", "group1"):
        (tmp_path / "links" / name).symlink_to(folder / name)
    (folder / "group0" / "back").symlink_to(tmp_path / "links")
    dataset = datasets.load(str(tmp_path / "links"), data_dir=tmp_path / "kept")
    assert len(dataset.label_names) == 8
    assert len(dataset.train) + len(dataset.validation) + len(dataset.test) == 32


def test_a_class_of_one_image_is_trained_on(tmp_path):
    folder = shapes(tmp_path / "pictures", kinds=3, each=8)
    (folder / "single").mkdir()
    drawn = np.arange(480, dtype=np.uint16).reshape(20, 24) // 2
    Image.fromarray(np.uint8(drawn)).save(folder / "single" / "a.png")
    dataset = datasets.load(str(folder), data_dir=tmp_path / "kept")
    label = dataset.label_names.index("single")
    assert (dataset.train.labels == label).sum() == 1


@pytest.mark.parametrize("each", [1, 2, 3, 4])
def test_small_classes_share_what_is_held_out(each):
    labels = np.repeat(np.arange(400), each)
    images = np.random.default_rng(0).integers(0, 256, (len(labels), 9), dtype=np.uint8)
    digests = np.array([digest_of_image(image) for image in images])
    parts = splits.held_out_images(labels, digests, "images")
    train, validation, test = parts
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(400 * each))
    assert np.bincount(labels[train], minlength=400).min() >= min(2, each)
    if each < 3:
        assert len(train) == len(labels)
        return
    # Four images give one of 0.6 to the test by rounding, three one of 0.45 by chance.
    assert abs(len(test) - (400 if each == 4 else 180)) < 40
    assert abs(len(validation) - splits.VALIDATION * len(labels)) < 40
    for part in (test, validation):
        assert np.bincount(labels[part]).max() == 1
    # What other classes there are does not matter.
    few = labels < 50
    fewer = splits.held_out_images(labels[few], digests[few], "images")
    for part, one in zip(parts, fewer):
        np.testing.assert_array_equal(one, part[labels[part] < 50])


@pytest.mark.parametrize(
    ("classes", "held_out"),
    [(20, (2, 3)), (127, (13, 19)), (128, (16, 19)), (400, (40, 60))],
)
def test_classes_are_held_out_that_tell_differences_from_noise(classes, held_out):
    labels = np.repeat(np.arange(classes), 2)
    digests = np.array([f"{row:040x}" for row in range(len(labels))])
    parts = splits.held_out_images(labels, digests, "classes")
    counts = [len(np.unique(labels[part])) for part in parts]
    assert counts == [classes - sum(held_out), *held_out]


@pytest.mark.parametrize("content", ["nothing", "loose", "one class", "all broken"])
def test_folders_that_cannot_be_trained_on(tmp_path, content):
    folder = tmp_path / "pictures"
    folder.mkdir()
    words = "has no images"
    if content == "loose":
        Image.new("L", (8, 8)).save(folder / "a.png")
        words = "one folder per class, but 1 image lies in it directly"
    elif content == "one class":
        shapes(folder, kinds=1)
        words = "has one folder of images"
    elif content == "all broken":
        shapes(folder, kinds=2, each=2)
        for file in folder.rglob("*.*"):
            file.write_bytes(b"broken")
        words = "none of 4 images could be read"
    with pytest.raises(ValueError, match=words):
        datasets.load(str(folder), data_dir=tmp_path / "kept")


def test_images_are_made_into_one_shape_without_distortion():
    shape = image_shape.ImageSpec(20, 40, 3)
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
    shape = image_shape.ImageSpec(10, 10, 1)
    for name, image in kinds.items():
        image.save(tmp_path / name)
        expected = 255 * (grey > 50) if name == "bits.png" else grey
        read = shape.fit(image_files.open_image(tmp_path / name))[..., 0]
        np.testing.assert_allclose(read, expected, atol=1, err_msg=name)
    clear = Image.new("LA", (10, 10), (0, 0))
    assert (shape.fit(clear) == 255).all()


def test_colour_is_what_is_seen(tmp_path):
    grey = Image.fromarray(np.uint8(np.arange(100).reshape(10, 10)))
    grey.convert("RGB").save(tmp_path / "grey.jpg")
    assert not image_shape.is_colour(image_files.open_image(tmp_path / "grey.jpg"))
    Image.new("RGB", (9, 9), (200, 30, 30)).save(tmp_path / "red.jpg")
    assert image_shape.is_colour(image_files.open_image(tmp_path / "red.jpg"))
    assert not image_shape.is_colour(grey.convert("P"))
    red = Image.new("RGB", (9, 9), (200, 30, 30)).quantize(4)
    assert red.mode == "P"
    assert image_shape.is_colour(red)


def test_the_shape_is_that_of_the_median_image():
    sizes = [(100, 50), (200, 100), (90, 45)]
    assert image_shape.ImageSpec.of(sizes, False, None) == image_shape.ImageSpec(
        16, 32, 1
    )
    assert image_shape.ImageSpec.of(sizes, True, None) == image_shape.ImageSpec(
        32, 64, 3
    )
    assert image_shape.ImageSpec.of(sizes, True, 100) == image_shape.ImageSpec(
        50, 100, 3
    )
    assert image_shape.ImageSpec.of([(8, 8)], False, None) == image_shape.ImageSpec(
        8, 8, 1
    )


@pytest.mark.slow
def test_datasets_of_the_catalogue(own_data_dir):
    prepare_digits()
    expected = datasets.load("digits")
    dataset = datasets.load("tfds:prepared_digits:test")
    assert dataset.label_names == expected.label_names
    parts = (dataset.train, dataset.validation, dataset.test)
    every = [image.tobytes() for part in parts for image in part.images]
    assert sorted(every) == sorted(image.tobytes() for image in expected.test.images)
    whole = datasets.load("tfds:prepared_digits")
    assert len(whole.train) + len(whole.validation) + len(whole.test) == 1797


class EncodedPictures(tfds.core.GeneratorBasedBuilder):
    """A dataset with images as the catalogue has them: encoded, of any size."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "label": tfds.features.ClassLabel(names=["dark", "bright"]),
        }
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features)
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for number in range(30):
            color = (5 + number, 4, 3) if number % 2 else (200 + number, 3, 5)
            opened = io.BytesIO()
            image = Image.new("RGB", (10 + number % 3, 12), color)
            image.paste((90, 90, 90), (0, 0, 4, 4))
            image.save(opened, "PNG")
            opened.seek(0)
            # The last are unlabelled.
            label = (number + 1) % 2 if number < 24 else -1
            yield number, {"image": opened, "label": label}


def test_encoded_images_of_the_catalogue(tmp_path):
    builder = EncodedPictures(data_dir=tmp_path, file_format="array_record")
    image_cache.prepare(builder)
    dataset = datasets.load("tfds:encoded_pictures", data_dir=tmp_path)
    assert dataset.label_names == ("dark", "bright")
    assert dataset.train.images.shape[1:] == (12, 11, 3)
    for part in (dataset.train, dataset.validation, dataset.test):
        bright = part.images[:, 6, 5, 0] > 100
        np.testing.assert_array_equal(part.labels, bright)
        assert len(part)
    assert sum(map(len, (dataset.train, dataset.validation, dataset.test))) == 24
    assert dataset.skipped == ("6 records without a label",)
    counts = {"unreadable": 0, "blank": 0, "without a label": 6}
    assert dataset.skip_counts == counts


class NamedPictures(EncodedPictures):
    """A dataset whose labels are names, as those of people."""

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "label": tfds.features.Text(),
        }
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features)
        )

    def _generate_examples(self):
        for number, record in super()._generate_examples():
            name = ".b/o" if record["label"] else "Ada"
            yield number, record | {"label": name}


def test_names_are_labels_and_folders(tmp_path):
    builder = NamedPictures(data_dir=tmp_path, file_format="array_record")
    image_cache.prepare(builder)
    dataset = datasets.load("tfds:named_pictures", data_dir=tmp_path)
    assert dataset.label_names == (".b/o", "Ada")
    assert sum(map(len, (dataset.train, dataset.validation, dataset.test))) == 30
    found = Catalogue.open("tfds:named_pictures", tmp_path)
    (tmp_path / "folder").mkdir()
    found.write(tmp_path / "folder")
    files = sorted((tmp_path / "folder").rglob("*.png"))
    assert len(files) == 30
    assert {file.parent.name for file in files} == {"Ada", "_.b_o"}
    for file in files:
        place = int(file.stem)
        with Image.open(file) as image:
            np.testing.assert_array_equal(image, found.picture(place))


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
        datasets.load(name)
    assert time.perf_counter() - start < 20


def test_images_that_do_not_fit_in_memory_stay_on_disk(tmp_path):
    folder = str(shapes(tmp_path / "pictures", each=6))
    options = {"kind": "characters", "data_dir": tmp_path / "kept"}
    whole = datasets.load(folder, **options)
    on_disk = datasets.load(folder, **options, in_memory=100)
    assert on_disk.key == whole.key
    for part in ("train", "validation", "test"):
        one, two = getattr(whole, part), getattr(on_disk, part)
        np.testing.assert_array_equal(one.labels, two.labels)
        assert isinstance(one.images, np.ndarray)
        assert isinstance(two.images, StoredImages)
        assert two.images.shape == one.images.shape
        for index in (slice(None), slice(3, 1), [2, 0, 0], 1, one.labels == 3):
            np.testing.assert_array_equal(one.images[index], two.images[index])
        some = two.images.part([3, 1])
        np.testing.assert_array_equal(some[:], one.images[[3, 1]])
    sources = (
        sampling.ImageBatches(d.train.images, d.train.labels, 4, 3, rotation_classes=2)
        for d in (whole, on_disk)
    )
    for one, two in zip(*(source[5] for source in sources)):
        np.testing.assert_array_equal(one, two)


def write_triplets(file, lines):
    file.write_text("\n".join(lines) + "\n", encoding="utf-8-sig")
    return file


def test_triplets_of_a_file(tmp_path):
    folder = shapes(tmp_path / "pictures", kinds=3, each=9)
    kinds = [sorted(path.iterdir()) for path in sorted(folder.glob("*/*"))]
    kinds = [[str(file.relative_to(tmp_path)) for file in kind] for kind in kinds]
    broken = folder / "broken.png"
    broken.write_bytes(b"")
    absolute = str((tmp_path / kinds[0][0]).resolve())
    rows = [(a, p, n) for a in kinds[0] for p in kinds[0][:2] for n in kinds[1][:2]]
    rows = [row for row in rows if row[0] != row[1]]
    lines = [f"{n}, {a} ,x,{p}" for a, p, n in rows]
    lines += ["", f"{kinds[1][0]},{absolute},x,pictures/broken.png"]
    lines += [f"{kinds[1][0]},{absolute},x,nowhere.png"]
    file = write_triplets(tmp_path / "t.csv", ["Negative,anchor,why,POSITIVE", *lines])
    for _ in range(2):
        triplets = triplet_files.load_triplets(file, data_dir=tmp_path / "kept")
        assert triplets.left_out == 2
        named = [line.split(":")[0] for line in triplets.skipped]
        assert named == ["nowhere.png", "pictures/broken.png"]
        parts = triplets.train, triplets.validation, triplets.test
        assert sum(map(len, parts)) == len(rows)
        anchors = [set(part[:, 0]) for part in parts]
        assert [len(part) for part in anchors] == [7, 1, 1]
        assert not anchors[0] & (anchors[1] | anchors[2])
        # Every triplet is of the pictures that the file names.
        shape = image_shape.ImageSpec(*triplets.images.shape[1:])
        files = {name: tmp_path / name for row in rows for name in row}
        content = {
            name: shape.fit(image_files.open_image(file)).tobytes()
            for name, file in files.items()
        }
        expected = sorted(tuple(content[name] for name in row) for row in rows)
        got = [
            tuple(triplets.images[place].tobytes() for place in triplet)
            for part in parts
            for triplet in part
        ]
        assert sorted(got) == expected


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([], "has no triplets"),
        (["anchor,positive,negative"], "has no triplets"),
        (["a.png,b.png"], "line 1: must have 3 columns, has 2"),
        (["a.png,b.png,c.png", "", "a.png,b.png,c.png,d.png"], "line 3: .* has 4"),
        (["a.png,b.png,a.png"], "line 1: .* three different images, got a.png"),
        (["a.png,b.png,"], "line 1: .* three different images"),
        (
            ["a.png,b.png,c.png"],
            r"t\.csv: none of 3 .* read; .*/a\.png: no such",
        ),
        (["a,p,n", "a.png,b.png,c.png"], "line 1: .*anchor, positive and negative"),
    ],
)
def test_files_that_are_no_triplets(tmp_path, lines, words):
    file = write_triplets(tmp_path / "t.csv", lines)
    with pytest.raises(ValueError, match=words):
        triplet_files.load_triplets(file, data_dir=tmp_path / "kept")


def test_broken_images_of_all_triplets(tmp_path):
    for name in "ab":
        drawn = np.arange(64, dtype=np.uint8).reshape(8, 8) + ord(name)
        Image.fromarray(drawn).save(tmp_path / f"{name}.png")
    file = write_triplets(tmp_path / "t.csv", ["a.png,b.png,c.png"])
    with pytest.raises(ValueError, match="no triplet of which all images can be read"):
        triplet_files.load_triplets(file, data_dir=tmp_path / "kept")


def test_triplets_as_other_programs_write_them(tmp_path):
    for number, name in enumerate((" a/1.png", "b, c.png", "d.png", "e.png")):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        pixels = np.arange(64, dtype=np.uint8).reshape(8, 8) + 50 * number
        Image.fromarray(pixels).save(file)
    names = '" a/1.png"', '"b, c.png"', "d.png", "e.png"
    rows = [(one, *two) for one in names for two in itertools.permutations(names, 2)]
    rows = [row for row in rows if len({*row}) == 3]
    expected = None
    for separator, slash in ((",", "/"), (";", "/"), ("\t", "/"), ("; ", "\\")):
        lines = [separator.join(row).replace("/", slash) for row in rows]
        file = write_triplets(tmp_path / "t.csv", lines)
        triplets = triplet_files.load_triplets(file, data_dir=tmp_path / "kept")
        assert (triplets.left_out, triplets.skipped) == (0, ())
        parts = triplets.train, triplets.validation, triplets.test
        assert sum(map(len, parts)) == len(rows) == 24
        expected = expected or triplets.key
        assert triplets.key == expected


# Batches.


@pytest.mark.parametrize(
    ("labels", "error", "words"),
    [
        (np.arange(12)[:, None] % 3, ValueError, r"one integer.*\(12, 1\)"),
        (np.eye(12), ValueError, r"one integer.*\(12, 12\)"),
        (np.arange(12.0), TypeError, "labels must be integers, got dtype float64"),
        (list("abcabcabcabc"), TypeError, "labels must be integers, got dtype <U1"),
        ([], ValueError, r"labels must be \[n\]"),
    ],
)
def test_labels_of_batches_are_checked(labels, error, words):
    images = np.zeros((12, 4, 4, 1), np.uint8)
    with pytest.raises(error, match=words):
        sampling.ClassBatches(labels, 2, 2)
    with pytest.raises(error, match=words):
        sampling.ImageBatches(images, labels, 2, 2)


@pytest.mark.parametrize(
    ("triplets", "words"),
    [
        (np.zeros((4, 2), int), r"integers \[t, 3\], got shape \(4, 2\)"),
        (np.zeros((4, 3)), r"integers \[t, 3\].*float64"),
        (np.full((4, 3), 12), "indices of the 12 images, got 12 to 12"),
        (np.full((4, 3), -1), "indices of the 12 images, got -1 to -1"),
    ],
)
def test_triplets_of_batches_are_checked(triplets, words):
    images = np.zeros((12, 4, 4, 1), np.uint8)
    with pytest.raises(ValueError, match=words):
        sampling.TripletBatches(images, triplets, 2)


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
    [(1, 2, "classes"), (2, 1, "per_class"), (3, 2, "at most 2")],
)
def test_batches_without_triplets_are_errors(classes, per_class, words):
    with pytest.raises(ValueError, match=words):
        sampling.ClassBatches(np.array([0, 0, 1, 1]), classes, per_class)


def test_batches_of_images_with_turned_classes():
    images = np.random.default_rng(0).integers(0, 99, (30, 5, 5, 2), dtype=np.uint8)
    labels = np.arange(30) % 3 + 10
    batches = sampling.ImageBatches(
        images, labels, classes=24, per_class=4, rotation_classes=8
    )
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
    with pytest.raises(
        ValueError, match=r"rotation_classes must be 1, 2, 4 or 8.*4 x 6 pixels"
    ):
        sampling.ImageBatches(
            np.zeros((4, 4, 6, 1)), [0, 0, 1, 1], 2, 2, rotation_classes=turns
        )


def test_half_turns_of_oblong_images():
    images = np.arange(4 * 24, dtype=np.uint8).reshape(4, 4, 6, 1)
    batches = sampling.ImageBatches(images, [0, 0, 1, 1], 4, 2, rotation_classes=2)
    got, kinds = batches[0]
    for image, kind in zip(got, kinds):
        back = np.rot90(image, 2) if kind >= 2 else image
        assert (images[2 * (kind % 2) :][:2] == back).all((1, 2, 3)).any()


def test_classes_drawn_by_frequency():
    counts = np.array([1, 2, 5, 12, 40])
    labels = np.repeat(np.arange(5), counts)
    batches = sampling.ClassBatches(labels, 2, 2, seed=3, class_sampling="frequency")
    steps = 4000
    drawn = np.array([labels[batches[step]][::2] for step in range(steps)])
    assert (drawn[:, 0] != drawn[:, 1]).all()
    # The first class of a batch is drawn as if an image had been.
    share = counts / counts.sum()
    first = np.bincount(drawn[:, 0], minlength=5) / steps
    np.testing.assert_allclose(first, share, atol=5 * np.sqrt(0.25 / steps))
    # The second is, among the others.
    second = share * ((share / (1 - share)).sum() - share / (1 - share))
    got = np.bincount(drawn[:, 1], minlength=5) / steps
    np.testing.assert_allclose(got, second, atol=5 * np.sqrt(0.25 / steps))


@pytest.mark.parametrize("class_sampling", sampling.CLASS_SAMPLING)
def test_processes_share_a_batch(class_sampling):
    images = np.arange(60, dtype=np.uint8).reshape(60, 1, 1, 1)
    labels = np.arange(60) % 6
    triplets = np.arange(60).reshape(20, 3)
    for step in (0, 7):
        options = {"seed": 2, "class_sampling": class_sampling}
        parts = [
            sampling.ImageBatches(images, labels, 4, 3, shard=(i, 3), **options)[step]
            for i in range(3)
        ]
        whole = sampling.ImageBatches(images, labels, 4, 3, **options)[step]
        for part, all_of_it in zip(zip(*parts), whole):
            np.testing.assert_array_equal(np.concatenate(part), all_of_it)
        parts = [
            sampling.TripletBatches(images, triplets, 8, 2, (i, 2))[step][1]
            for i in range(2)
        ]
        whole = sampling.TripletBatches(images, triplets, 8, 2)[step][1]
        parts = [part.reshape(3, 4) for part in parts]
        np.testing.assert_array_equal(np.concatenate(parts, 1), whole.reshape(3, 8))


@pytest.mark.parametrize("labels", [np.arange(39) % 4, np.arange(41) % 4])
def test_labels_of_other_images(labels):
    with pytest.raises(ValueError, match=r"labels \[n\], got \(40, 8, 8, 1\) and"):
        sampling.ImageBatches(np.zeros((40, 8, 8, 1), np.uint8), labels, 2, 2)


def test_batches_of_triplets():
    images = np.arange(60, dtype=np.uint8).reshape(60, 1, 1, 1)
    triplets = np.random.default_rng(0).integers(0, 60, (10, 3))
    batches = sampling.TripletBatches(images, triplets, size=4, seed=1)
    for step in (0, 3, 100):
        got, places = batches[step]
        np.testing.assert_array_equal(got.ravel(), places)
        rows = places.reshape(3, 4).T.tolist()
        assert all(row in triplets.tolist() for row in rows)
        np.testing.assert_array_equal(batches[step][1], places)
    # No triplet twice in a pass, and all of them in time.
    pairs = [
        np.concatenate(
            [batches[2 * i][1].reshape(3, 4), batches[2 * i + 1][1].reshape(3, 4)], 1
        )
        for i in range(30)
    ]
    assert all(len({tuple(row) for row in pair.T}) == 8 for pair in pairs)
    assert len({tuple(row) for row in np.concatenate(pairs, 1).T}) == 10


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"class_sampling": "some"},
            "class_sampling must be one of uniform, frequency",
        ),
        ({"shard": (2, 2)}, r"shard must be \(index, count\)"),
        ({"shard": (0, 3)}, "must divide the batch of 4"),
    ],
)
def test_bad_options_of_batches(options, words):
    with pytest.raises(ValueError, match=words):
        sampling.ClassBatches(np.array([0, 0, 1, 1]), 2, 2, **options)


@pytest.mark.parametrize("size", [0, 5])
def test_batches_of_too_many_triplets(size):
    with pytest.raises(ValueError, match="size must be 1 to 4"):
        sampling.TripletBatches(np.zeros((9, 1, 1, 1)), np.zeros((4, 3), int), size)


# Data folders that cannot be used.


def test_the_name_of_a_dataset_may_be_a_path(tmp_path):
    folder = shapes(tmp_path / "pictures", kinds=2, each=4)
    one, two = (datasets.load(of, data_dir=tmp_path) for of in (folder, str(folder)))
    assert (one.key, one.name) == (two.key, two.name)


def damage_info(file):
    if file.name == "dataset_info.json":
        file.write_text("{")


def damage_records(file):
    if "array_record" in file.name:
        file.write_bytes(file.read_bytes()[:100])


@pytest.mark.parametrize("damage", [damage_info, damage_records])
def test_damaged_data_are_one_line_with_their_folder(tmp_path, damage):
    data = shapes(tmp_path / "pictures", kinds=2, each=4)
    key = datasets.load(data, data_dir=tmp_path / "kept").key
    for file in (tmp_path / "kept").rglob("*"):
        if file.is_file():
            damage(file)
    with pytest.raises(OSError, match=r"^data in .*cannot be.*") as raised:
        datasets.load(data, data_dir=tmp_path / "kept")
    message = str(raised.value)
    assert message.endswith("If they are damaged, remove this folder.")
    assert "\n" not in message
    shutil.rmtree(Path(message.split()[2]))
    assert datasets.load(data, data_dir=tmp_path / "kept").key == key


def test_a_data_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    folder = shapes(tmp_path / "pictures", kinds=2, each=4)
    key = datasets.load(folder, data_dir=tmp_path / "kept").key
    opened = os.open

    def read_only(path, flags, *more, **options):
        if flags & (os.O_RDWR | os.O_WRONLY):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path, flags, *more, **options)

    monkeypatch.setattr(os, "open", read_only)
    monkeypatch.setattr(cache_cleanup, "_used", {})
    with pytest.raises(OSError, match=r"Permission denied. Set TFDS_DATA_DIR to"):
        datasets.load(folder, data_dir=tmp_path / "new", size=8)
    # What is decoded already is read.
    assert datasets.load(folder, data_dir=tmp_path / "kept").key == key
