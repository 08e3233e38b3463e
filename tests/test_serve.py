"""The page: what it answers, and in a browser."""

import dataclasses
import gc
import re
import shutil
import struct
import subprocess
import sys
import urllib.error
import urllib.request
import zlib

import numpy as np
import pytest
from browser import asked_for, needs_browser, open_browser
from folders import shapes
from processes import free_port
from selenium.common.exceptions import (
    ElementClickInterceptedException,
    StaleElementReferenceException,
)
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait
from test_verify import EMBEDDER

from tripletjax import cli
from tripletjax.apps import search, serve, verification

# Fixtures of the module are made once, by one worker.
pytestmark = pytest.mark.xdist_group("page")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("serve")
    shapes(root / "pictures", kinds=6, each=4)
    return root


@pytest.fixture(scope="module")
def served(root):
    index = search.Index(root / "pictures", root / "database", EMBEDDER)
    index.update()
    others = shapes(root / "others", kinds=8, each=9, seed=3)
    found = verification.evaluate(EMBEDDER, others, replicates=10)
    return serve.served(index, calibration=found.calibration)


def bomb(file, side):
    """A PNG file that says it has so many pixels."""
    head = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    parts = [(b"IHDR", head), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(x)) + name + x + struct.pack(">I", zlib.crc32(name + x))
        for name, x in parts
    )
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    return str(file)


def test_answers_are_those_of_the_applications(served):
    path = served.paths[5]
    image = served.read(str(served.index.file_of(path)))
    hits = served.search(image, 4, own=path)
    (expected,) = served.index.search(served.vector(image), 4, leave_out=[[path]])
    assert [caption.split()[0] for _, caption in hits] == [
        f"{hit.distance:.3f}" for hit in expected
    ]
    assert all(picture.shape == (112, 112, 3) for picture, _ in hits)
    assert len(served.search(image, 10**9)) == len(served.paths)
    assert served.verify(image, image).startswith("**The same**: distance 0.000")
    told, near = served.identify(image)
    name = path.rpartition("/")[0]
    assert told.startswith(f"**{name}**: the nearest is {name}")
    assert near[0][1].startswith("0.000")
    # Of those that the threshold was chosen on, two classes are not in the gallery.
    assert re.search(r"Of strangers \d+ % get a name", told)
    named = dataclasses.replace(
        served.calibration, names=np.repeat(name, len(served.calibration.names))
    )
    told, _ = dataclasses.replace(served, calibration=named).identify(image)
    assert "strangers" not in told


def test_without_a_threshold_it_says_so(served, root):
    plain = dataclasses.replace(served, calibration=None)
    image = served.read(str(served.index.file_of(served.paths[0])))
    assert "no threshold was chosen" in plain.verify(image, image)
    assert "nobody is unknown" in plain.identify(image)[0]
    loose = root / "loose"
    loose.mkdir()
    shutil.copy(served.index.file_of(served.paths[0]), loose / "one.png")
    index = search.Index(loose, root / "database", EMBEDDER)
    index.update()
    nobody = serve.served(index, calibration=None)
    with pytest.raises(serve.RefusedError, match="nobody is known"):
        nobody.identify(image)
    with pytest.raises(ValueError, match="one folder per class"):
        serve.served(served.index, calibration=None, gallery_index=index)


def test_what_is_uploaded_is_read_within_limits(served, tmp_path):
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "half.png").write_bytes(
        served.index.file_of(served.paths[0]).read_bytes()[:60]
    )
    (tmp_path / "photo.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    for file, words in (
        (None, "Give an image first"),
        (str(tmp_path / "text.png"), "no image that can be read"),
        (str(tmp_path / "half.png"), "no image that can be read"),
        (bomb(tmp_path / "large.png", 10_000), "10,000 x 10,000 pixels"),
        (
            bomb(tmp_path / "larger.png", 60_000),
            "too large: it has more pixels than Pillow opens; at most 40 megapixels",
        ),
        (str(tmp_path / "photo.heic"), "that can be read: it is a HEIC image"),
        (str(tmp_path / "gone.png"), r"This file cannot be read\.$"),
    ):
        with pytest.raises(serve.RefusedError, match=words):
            served.read(file)


@pytest.fixture
def address(own_data_dir, root, tmp_path):
    """The page of a run, in a process of its own, as its user starts it."""
    run = tmp_path / "run"
    assert cli.main(["train", "--steps", "2", "--out", str(run)]) == 0
    people = shapes(tmp_path / "people", kinds=8, each=9, seed=3)
    assert cli.main(["verify", "--run", str(run), "--data", str(people)]) == 0
    port = free_port()
    command = ["serve", "--run", run, "--index", root / "pictures", "--port", port]
    process = subprocess.Popen(
        [sys.executable, "-m", "tripletjax", *map(str, command)],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        told = ""
        while "Open http" not in told:
            line = process.stdout.readline()
            assert line, told
            told += line
        assert "24 images in the index" in told
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        # As if it was interrupted: what was uploaded is removed.
        assert process.wait(30) == 130
        process.stdout.close()


@pytest.mark.slow
@needs_browser
def test_the_page_in_a_browser(address, root, tmp_path):
    browser = open_browser(tmp_path / "profile")
    # What is drawn again meanwhile is looked for again.
    again = (StaleElementReferenceException, ElementClickInterceptedException)
    wait = WebDriverWait(browser, 120, ignored_exceptions=again)
    pictures = sorted((root / "pictures").rglob("*.png"))
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")

    def upload(place, file):
        selector = f"#{place} input[type=file]"
        wait.until(lambda b: b.find_elements(By.CSS_SELECTOR, selector))
        browser.find_element(By.CSS_SELECTOR, selector).send_keys(str(file))

    def said(place, words):
        wait.until(lambda b: words in b.find_element(By.ID, place).text)

    def images(place):
        return browser.find_elements(By.CSS_SELECTOR, f"#{place} img")

    def click(find):
        wait.until(lambda b: find().click() is None)

    def tab(name):
        buttons = browser.find_elements(By.CSS_SELECTOR, "button[role=tab]")
        click(lambda: next(one for one in buttons if one.text == name))

    try:
        browser.get(address)
        wait.until(lambda b: len(images("some")) == 24)
        # One of the index, then one that is uploaded, then one that is broken.
        click(lambda: images("some")[3])
        said("search-told", "The nearest to group")
        wait.until(lambda b: len(images("hits")) == 16)
        upload("search-file", pictures[0])
        said("search-told", "The nearest images of the index")
        wait.until(lambda b: "0.000" in b.find_element(By.ID, "hits").text)
        clear = "#search-file button[aria-label]"
        click(lambda: browser.find_element(By.CSS_SELECTOR, clear))
        upload("search-file", broken)
        said("search-told", "no image that can be read")
        tab("Verify")
        upload("verify-first", pictures[0])
        upload("verify-second", pictures[0])
        said("verify-told", "The same: distance 0.000")
        wait.until(lambda b: len(images("both")) == 2)
        tab("Identify")
        upload("identify-file", pictures[0])
        said("identify-told", "the nearest is group")
        wait.until(lambda b: len(images("near")) == 2)
        # Nothing comes from elsewhere.
        hosts = {
            url.split("/")[2] for url in asked_for(browser) if url.startswith("http")
        }
        assert hosts == {address.removeprefix("http://")}
    finally:
        browser.quit()
        browser.command_executor.close()
    # No file is given out that was not uploaded or shown.
    for path in ("/etc/passwd", str(pictures[0])):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"{address}/gradio_api/file={path}")
        with refused.value as answer:
            assert answer.code in (403, 404)
    # What is not closed is said here, and not in a test that comes later.
    gc.collect()
