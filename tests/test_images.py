"""Image files as they are shown: small copies on a white square."""

import numpy as np
import pytest
from PIL import Image

from tripletjax.apps.embedders import embedder_of
from tripletjax.apps.images import SIDE, thumbnail
from tripletjax.learn.data.image_files import open_image
from tripletjax.learn.data.image_shape import ImageSpec

STRIPES = np.arange(256).reshape(16, 16) // 4 % 2
FORMS = {
    "16 bits.png": (STRIPES * 40000 + 10000).astype(np.uint16),
    "12 bits.tif": (STRIPES * 3000 + 500).astype(np.uint16),
    "floats.tif": (STRIPES * 0.75 + 0.1).astype(np.float32),
    "8 bits.png": (STRIPES * 200 + 20).astype(np.uint8),
    "black on clear.png": np.stack([0 * STRIPES, 255 * STRIPES], -1).astype(np.uint8),
    "white on clear.png": np.stack([0 * STRIPES + 255, 255 * STRIPES], -1),
}
GREY = {
    "16 bits.png": (39, 195),
    "12 bits.tif": (31, 218),
    "floats.tif": (26, 217),
    "8 bits.png": (20, 220),
    "black on clear.png": (255, 0),
    "white on clear.png": (0, 255),
}


@pytest.fixture(params=FORMS)
def form(request, tmp_path):
    pixels = FORMS[request.param]
    pixels = pixels.astype(np.uint8) if pixels.ndim == 3 else pixels
    Image.fromarray(pixels).save(tmp_path / request.param)
    expected = np.where(STRIPES, *GREY[request.param][::-1])
    return tmp_path / request.param, expected


def test_thumbnails_show_what_a_network_sees(form):
    file, expected = form
    # Every pixel becomes a square.
    small = thumbnail(file)[3 :: SIDE // 16, 3 :: SIDE // 16]
    np.testing.assert_array_equal(small, np.stack([expected] * 3, -1))
    image = open_image(file)
    # A function is given the same pixels, and a run of such images alone sees them.
    prepared = embedder_of(lambda images: images, key="any").prepare(image)
    np.testing.assert_array_equal(np.asarray(prepared)[..., 0], expected)
    white = {"16": 65535, "12": 4095, "fl": 1}.get(file.name[:2], 255)
    background = "black" if file.name.startswith("white") else "white"
    spec = ImageSpec(16, 16, 1, white, background)
    np.testing.assert_array_equal(spec.fit(image)[..., 0], expected)


def test_a_thumbnail_of_no_file_is_empty(tmp_path):
    assert (thumbnail(tmp_path / "gone.png") == 255).all()
