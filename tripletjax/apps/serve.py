"""A page in the browser: search in an index, verify two images, identify one.

It listens on this machine alone unless told otherwise, loads nothing from elsewhere and
sends nothing there. It gives out pictures of the index as small copies, by numbers and
not by paths; what is uploaded is read within limits and removed when the page ends.
"""

import dataclasses
import functools
import os
import shutil
import signal
import tempfile
import threading
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

# Before Gradio is imported, which would ask its makers for news.
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import gradio as gr

from tripletjax.apps import identification, verification
from tripletjax.apps.embedders import vectors_of
from tripletjax.apps.images import shrink, thumbnail
from tripletjax.apps.search.index import Index
from tripletjax.apps.verification.calibration import Calibration
from tripletjax.learn.data.image_files import ImageError, ImageTooLargeError, open_image

# What is larger is refused before it is decoded.
MOST_BYTES, MOST_PIXELS = "20mb", 40_000_000
# So many images of the index are offered at a time, and found at most.
OFFERED, FOUND = 24, 48


class RefusedError(Exception):
    """What a visitor gave cannot be used; says why in a sentence."""


@dataclasses.dataclass(frozen=True)
class Served:
    """What the page answers from.

    Attributes:
        index: that is searched, up to date.
        paths: of its images.
        gallery: who is known, or None if the index has no classes.
        gallery_index: where the images of the gallery are.
        calibration: the threshold, or None if none was chosen.
    """

    index: Index
    paths: tuple[str, ...]
    gallery: identification.Gallery | None
    gallery_index: Index
    calibration: Calibration | None

    @functools.cached_property
    def strangers(self) -> identification.Strangers:
        """Who is not in the gallery, compared with it once for all visitors."""
        assert self.gallery is not None
        assert self.calibration is not None
        return identification.Strangers.of(self.gallery, self.calibration)

    def read(self, file: str | None) -> Image.Image:
        """An uploaded image.

        Raises:
            RefusedError: if there is none, or it is too large, or none at all.
        """
        if not file:
            raise RefusedError("Give an image first.")
        try:
            return open_image(file, most_pixels=MOST_PIXELS)
        except ImageTooLargeError as error:
            most = f"at most {MOST_PIXELS / 1e6:.0f} megapixels are taken"
            raise RefusedError(f"The image is too large: {error}; {most}.") from None
        except ImageError as error:
            raise RefusedError(
                f"This file is no image that can be read: {error}."
            ) from None
        except OSError:
            # Its words may name a path of this machine.
            raise RefusedError("This file cannot be read.") from None

    def vector(self, image: Image.Image) -> np.ndarray:
        try:
            return vectors_of(self.index.embedder, [image])
        except OSError as error:
            raise RefusedError(f"The image cannot be used: {error}.") from None

    def search(self, image: Image.Image, k: int, own: str | None = None) -> list:
        """Small copies of the nearest images of the index, with their distances."""
        leave_out = [[own] if own else []]
        (hits,) = self.index.search(
            self.vector(image), min(max(int(k), 1), FOUND), leave_out=leave_out
        )
        return [
            (thumbnail(self.index.file_of(hit.path)), _caption(hit.distance, hit.path))
            for hit in hits
        ]

    def verify(self, first: Image.Image, second: Image.Image) -> str:
        """Whether two images are the same, in a sentence."""
        if self.calibration is None:
            distance = np.linalg.norm(self.vector(first) - self.vector(second))
            return (
                f"Distance {distance:.3f}. Whether that is the same is not known: no "
                "threshold was chosen with `tripletjax verify`."
            )
        try:
            told = verification.decide(
                self.index.embedder, first, second, self.calibration
            )
        except OSError as error:
            raise RefusedError(f"The image cannot be used: {error}.") from None
        return (
            f"**{'The same' if told.same else 'Different'}**: distance "
            f"{told.distance:.3f}, threshold {told.threshold:.3f} (at which "
            f"{100 * self.calibration.far:g} % of different pairs are taken for the "
            f"same); probability of the same {told.probability:.2f}, if half of all "
            "pairs are."
        )

    def identify(self, image: Image.Image) -> tuple[str, list]:
        """A name or unknown, in a sentence, and the nearest image of the gallery."""
        if self.gallery is None:
            raise RefusedError(
                "The index has no folders of classes, so nobody is known."
            )
        threshold = float("inf")
        if self.calibration is not None:
            threshold = self.calibration.threshold
        (found,) = identification.identify(
            self.gallery, self.vector(image), threshold=threshold
        )
        told = f"**{found.name or 'Unknown'}**: the nearest is {found.nearest}, at a "
        told += f"distance of {found.distance:.3f}"
        if found.runner_up is not None:
            told += f", the next {found.runner_up} at {found.runner_up_distance:.3f}"
        told += "."
        if self.calibration is None:
            told += " No threshold was chosen, so that nobody is unknown."
        else:
            if count := len(self.strangers.distances):
                share = 100 * self.strangers.named(threshold) / count
                told += f" Of strangers {share:.0f} % get a name of this gallery."
        near = thumbnail(self.gallery_index.file_of(found.path))
        return told, [(near, _caption(found.distance, found.path))]


def _caption(distance: float, path: str) -> str:
    folder, _, name = path.rpartition("/")
    return f"{distance:.3f} {folder.rpartition('/')[2] or name}"


def served(
    index: Index, *, calibration: Calibration | None, gallery_index: Index | None = None
) -> Served:
    """What a page answers from: an index, and who is known.

    Args:
        index: that is searched, up to date.
        calibration: the threshold, if one was chosen.
        gallery_index: of the known classes; the index itself if not given.
    """
    of = index if gallery_index is None else gallery_index
    gallery = None
    try:
        gallery = identification.Gallery.of(of)
    except ValueError:
        if gallery_index is not None:
            raise
    return Served(index, tuple(index.vectors()[0]), gallery, of, calibration)


def page(of: Served) -> gr.Blocks:
    """The page, to be launched."""

    def offered() -> tuple[list, list[int]]:
        draw = np.random.default_rng()
        numbers = draw.permutation(len(of.paths))[:OFFERED].tolist()
        return [
            thumbnail(of.index.file_of(of.paths[number])) for number in numbers
        ], numbers

    def searched(file: str | None, k: int) -> tuple:
        try:
            image = of.read(file)
            return (
                "The nearest images of the index.",
                shrink(image),
                of.search(image, k),
            )
        except RefusedError as refused:
            return str(refused), None, []

    def searched_by(numbers: list[int], k: int, chosen: gr.SelectData) -> tuple:
        try:
            path = of.paths[numbers[chosen.index]]
            image = of.read(str(of.index.file_of(path)))
            hits = of.search(image, k, own=path)
            return f"The nearest to {path}.", shrink(image), hits
        except (RefusedError, IndexError, TypeError) as refused:
            return str(refused), None, []

    def verified(first: str | None, second: str | None) -> tuple:
        if not first or not second:
            return "Give two images.", []
        try:
            one, other = of.read(first), of.read(second)
            return of.verify(one, other), [shrink(one), shrink(other)]
        except RefusedError as refused:
            return str(refused), []

    def identified(file: str | None) -> tuple:
        try:
            image = of.read(file)
            told, near = of.identify(image)
            return told, [(shrink(image), "the image"), *near]
        except RefusedError as refused:
            return str(refused), []

    plain: dict[str, Any] = {"allow_preview": False, "columns": 6, "buttons": []}
    plain |= {"fit_columns": False}
    hidden: dict[str, Any] = {"api_visibility": "private", "show_progress": "minimal"}
    with gr.Blocks(title="tripletjax", analytics_enabled=False) as blocks:
        gr.Markdown(
            f"# Which of these is the same?\n{len(of.paths):,} images are known."
        )
        with gr.Tab("Search"):
            with gr.Row():
                query = gr.File(label="An image of yours", elem_id="search-file")
                shown = gr.Image(
                    label="The query", interactive=False, height=180, buttons=[]
                )
                k = gr.Slider(1, FOUND, 16, step=1, label="How many")
            told = gr.Markdown(elem_id="search-told")
            hits = gr.Gallery(label="Found, with distances", elem_id="hits", **plain)
            numbers = gr.State([])
            some = gr.Gallery(
                label="Or click one of the index", elem_id="some", **plain
            )
            others = gr.Button("Show others")
            answer = [told, shown, hits]
            query.upload(searched, [query, k], answer, **hidden)
            some.select(searched_by, [numbers, k], answer, **hidden)
            others.click(offered, None, [some, numbers], **hidden)
            blocks.load(offered, None, [some, numbers], **hidden)
        with gr.Tab("Verify"):
            with gr.Row():
                first = gr.File(label="One image", elem_id="verify-first")
                second = gr.File(label="Another", elem_id="verify-second")
            same = gr.Markdown(elem_id="verify-told")
            both = gr.Gallery(label="Both", elem_id="both", **plain)
            for file in (first, second):
                file.upload(verified, [first, second], [same, both], **hidden)
        with gr.Tab("Identify"):
            who = gr.File(label="An image", elem_id="identify-file")
            name = gr.Markdown(elem_id="identify-told")
            near = gr.Gallery(
                label="The image, and the nearest", elem_id="near", **plain
            )
            who.upload(identified, who, [name, near], **hidden)
    return blocks


def run(of: Served, *, host: str = "127.0.0.1", port: int = 7860) -> None:
    """Serves the page until it is interrupted, from the main thread.

    Args:
        of: what it answers from.
        host: the address that it listens on.
        port: likewise.

    Raises:
        OSError: if the port is taken.
    """
    # So that what was uploaded is removed then, too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    uploads = Path(tempfile.mkdtemp(prefix="tripletjax-"))
    os.environ["GRADIO_TEMP_DIR"] = str(uploads)
    fonts = ["system-ui", "sans-serif"]
    theme = gr.themes.Default(font=fonts, font_mono=["ui-monospace", "monospace"])
    blocks = page(of)
    try:
        blocks.launch(
            server_name=host,
            server_port=port,
            share=False,
            quiet=True,
            show_error=False,
            max_file_size=MOST_BYTES,
            footer_links=[],
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            enable_monitoring=False,
            theme=theme,
            prevent_thread_lock=True,
        )
        print(f"Open http://{host}:{port} in a browser; Ctrl-C ends.", flush=True)
        threading.Event().wait()
    finally:
        blocks.close(verbose=False)
        shutil.rmtree(uploads, ignore_errors=True)
