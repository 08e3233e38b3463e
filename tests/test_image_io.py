"""One way of opening images: which formats, and why other files are refused."""

import io
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

import tripletjax
from tripletjax.learn.data import image_files, image_shape
from tripletjax.learn.data.image_files import (
    ImageError,
    ImageTooLargeError,
    is_image,
    open_image,
    read_image_file,
)
from tripletjax.learn.data.image_shape import ImageSpec

PIXELS = np.arange(768, dtype=np.uint8).reshape(16, 16, 3)
HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(200)
FOREIGN = {
    "photo.heic": (HEIC, "HEIC image: pip install pillow-heif adds its decoder"),
    "clip.jpg": (b"\0\0\0\x20ftypisom\0\0\2\0" + bytes(99), "it is a video"),
    "clip.mkv": (b"\x1aE\xdf\xa3" + bytes(99), "it is a video"),
    "clip.avi": (b"RIFF\x10\0\0\0AVI LIST", "it is a video"),
    "drawing.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "PostScript"),
    "paper.pdf": (b"%PDF-1.7\n", "it is a PDF document"),
    "a.svg": (b"<?xml version='1.0'?>\n<!-- x -->\n<svg width='9'/>", "an SVG drawing"),
    "404.jpg": (b"\n<!DOCTYPE html><html>404</html>", "it is a web page"),
    "lfs.jpg": (
        b"version https://git-lfs.github.com/spec/v1\n",
        "Git LFS pointer: git",
    ),
    "photos.zip": (b"PK\3\4", "it is an archive: unpack it"),
    "empty.png": (b"", "it is an empty file"),
    "notes.txt": (b"hello", "it is not a readable image"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_files_are_refused_with_a_reason(name, tmp_path):
    content, reason = FOREIGN[name]
    file = tmp_path / name
    file.write_bytes(content)
    assert not is_image(file)
    for read in (
        open_image,
        read_image_file,
        lambda _: open_image(io.BytesIO(content)),
    ):
        with pytest.raises(ImageError, match=reason):
            read(file)


@pytest.mark.parametrize("kind", ["EPS", "PDF", "WMF", "MPEG", "IM", "SPIDER"])
def test_formats_that_start_programs_or_have_no_signature_are_not_opened(kind):
    assert kind not in image_files.formats()
    assert {"PNG", "JPEG", "TIFF", "WEBP", "BMP", "GIF", "PPM"} <= {
        *image_files.formats()
    }


def test_postscript_starts_no_program(tmp_path, monkeypatch):
    file = tmp_path / "drawing.png"
    Image.fromarray(PIXELS).save(file, format="EPS")

    def start(*args, **options):
        raise AssertionError(f"{args} is started")

    monkeypatch.setattr(subprocess, "Popen", start)
    with pytest.raises(ImageError, match="it is PostScript, which is not opened"):
        open_image(file)


@pytest.mark.parametrize("form", ["png", "jpeg", "tiff", "bmp", "webp", "gif", "ppm"])
def test_images_are_opened_and_cut_ones_are_not(form, tmp_path):
    file = tmp_path / "image"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file, format=form)
    content = file.read_bytes()
    assert is_image(file)
    assert read_image_file(file) == content
    for opened in (file, str(file), io.BytesIO(content)):
        assert open_image(opened).size == (64, 64)
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(ImageError):
        open_image(file)


def test_other_errors_are_not_those_of_images(tmp_path, monkeypatch):
    file = tmp_path / "image.png"
    with pytest.raises(FileNotFoundError):
        open_image(file)
    Image.fromarray(PIXELS).save(file)
    for error in (OSError(5, "Input/output error"), MemoryError()):

        def load(self, error=error):
            raise error

        monkeypatch.setattr(ImageFile.ImageFile, "load", load)
        with pytest.raises(OSError, match=r"Input/output|not enough memory") as caught:
            open_image(file)
        assert not isinstance(caught.value, ImageError)


def test_more_pixels_than_asked_for_are_not_decoded(tmp_path, monkeypatch):
    Image.fromarray(PIXELS).save(tmp_path / "image.png")
    assert open_image(tmp_path / "image.png", most_pixels=256).size == (16, 16)
    with pytest.raises(
        ImageTooLargeError, match="it has 16 x 16 pixels, more than 255"
    ):
        open_image(tmp_path / "image.png", most_pixels=255)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(
        ImageTooLargeError, match="it has more pixels than Pillow opens"
    ):
        open_image(tmp_path / "image.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200)
    assert open_image(tmp_path / "image.png").size == (16, 16)


def test_pillow_heif_decodes_heic(tmp_path, monkeypatch):
    """A decoder in place of the package, which registers what it opens."""

    class Decoder(ImageFile.ImageFile):
        format = "HEIF"

        def _open(self):
            self._size, self._mode = (3, 2), "L"

        def load(self):
            self.im = Image.new("L", self.size, 7).im

    def register():
        Image.register_open("HEIF", Decoder, lambda start: b"ftypheic" in start)
        Image.register_extension("HEIF", ".heic")

    package = types.SimpleNamespace(register_heif_opener=register)
    monkeypatch.setitem(sys.modules, "pillow_heif", package)
    monkeypatch.setattr(Image, "OPEN", {**Image.OPEN})
    monkeypatch.setattr(Image, "ID", [*Image.ID])
    monkeypatch.setattr(Image, "EXTENSION", {**Image.EXTENSION})
    file = tmp_path / "photo.heic"
    file.write_bytes(HEIC)
    image_files.formats.cache_clear()
    try:
        assert (np.asarray(open_image(file)) == np.full((2, 3), 7)).all()
        file.write_bytes(HEIC.replace(b"heic", b"heix"))
        with pytest.raises(ImageError, match="it is a HEIC image that is broken"):
            open_image(file)
    finally:
        image_files.formats.cache_clear()


def test_numbers_that_are_none_are_black(tmp_path):
    values = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    values[0, :4] = np.nan, np.inf, -np.inf, -1
    Image.fromarray(values).save(tmp_path / "floats.tif")
    pixels = ImageSpec(8, 8, 1, white=1).fit(open_image(tmp_path / "floats.tif"))
    assert pixels[0, :4, 0].tolist() == [0, 255, 0, 0]
    np.testing.assert_array_equal(pixels[1:, :, 0], np.rint(values[1:] * 255))
    Image.fromarray(np.full((8, 8), np.nan, np.float32)).save(tmp_path / "none.tif")
    nothing = ImageSpec(8, 8, 1, white=1).fit(open_image(tmp_path / "none.tif"))
    with pytest.raises(ImageError, match="blank"):
        image_shape.check_not_blank(nothing)


def test_every_image_is_opened_in_one_place():
    """Formats are limited wherever Pillow opens a file."""
    root = Path(tripletjax.__file__).parent
    uses = {
        (file.relative_to(root).as_posix(), line.strip())
        for file in root.rglob("*.py")
        for line in file.read_text().splitlines()
        if "Image.open(" in line
    }
    assert {file for file, _ in uses} == {"learn/data/image_files.py"}
    assert all("formats=formats()" in line for _, line in uses)
