"""A page in the browser: search, verification, identification and groups of an index.

The page listens on localhost by default, loads nothing from other hosts and sends
nothing to them. It shows images of the index as thumbnails, by number and not by path.
Uploads are read within limits and removed when the page ends.
"""

import dataclasses
import functools
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

# Set before Gradio is imported, which otherwise reports its use to its makers.
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import gradio as gr

from tripletjax.apps import clustering, identification, mining, verification
from tripletjax.apps.embedders import vectors_of
from tripletjax.apps.images import shrink, thumbnail
from tripletjax.apps.search.index import DUPLICATE_DISTANCE, Index
from tripletjax.apps.verification.calibration import Calibration
from tripletjax.learn.counts import counted
from tripletjax.learn.data.image_files import ImageError, ImageTooLargeError, open_image

# Limits of an upload; the number of pixels is read before the image is decoded.
MAX_FILE_SIZE, MAX_PIXELS = "20mb", 40_000_000
# Images of the index that are offered as queries, and results at most.
SAMPLE_SIZE, MAX_RESULTS = 24, 48
# The threshold of groups if the run has none.
GROUP_DISTANCE = 0.5

Pictures = list[tuple[np.ndarray, str]]

GALLERY: dict[str, Any] = {
    "allow_preview": False,
    "columns": 6,
    "buttons": [],
    "fit_columns": False,
}
EVENT: dict[str, Any] = {"api_visibility": "private", "show_progress": "minimal"}


class RequestError(Exception):
    """A request that the page cannot answer; the message is for its visitor."""


@dataclasses.dataclass(frozen=True)
class App:
    """The index, gallery and threshold that the page answers from.

    Attributes:
        index: the index to search, up to date.
        paths: paths of its images.
        gallery: known classes, or None if the index has no class folders.
        gallery_index: the index of the gallery's images.
        calibration: the threshold, or None if none was chosen.
    """

    index: Index
    paths: tuple[str, ...]
    gallery: identification.Gallery | None
    gallery_index: Index
    calibration: Calibration | None

    @classmethod
    def of(
        cls,
        index: Index,
        *,
        calibration: Calibration | None,
        gallery_index: Index | None = None,
    ) -> "App":
        """Read the gallery from an index.

        Args:
            index: the index to search, up to date.
            calibration: the threshold, or None if none was chosen.
            gallery_index: an index of the known classes; by default `index`, if it has
                class folders.

        Raises:
            ValueError: if `gallery_index` has no class folders.
        """
        gallery, required = None, gallery_index is not None
        gallery_index = index if gallery_index is None else gallery_index
        try:
            gallery = identification.Gallery.of(gallery_index)
        except ValueError:
            if required:
                raise
        paths = tuple(index.vectors()[0])
        return cls(index, paths, gallery, gallery_index, calibration)

    @functools.cached_property
    def strangers(self) -> identification.Strangers:
        """Calibration images of other classes, compared with the gallery once."""
        assert self.gallery is not None
        assert self.calibration is not None
        return identification.Strangers.of(self.gallery, self.calibration)

    def read_image(self, file: str | None) -> Image.Image:
        """Decode an image file within the limits.

        Raises:
            RequestError: if `file` is None, too large, or not a readable image.
        """
        if not file:
            raise RequestError("Upload an image first.")
        try:
            return open_image(file, most_pixels=MAX_PIXELS)
        except ImageTooLargeError as error:
            limit = f"the limit is {MAX_PIXELS / 1e6:.0f} megapixels"
            raise RequestError(f"The image is too large: {error}; {limit}.") from None
        except ImageError as error:
            raise RequestError(f"The file is not a readable image: {error}.") from None
        except OSError:
            # The message of the error may name a path of this machine.
            raise RequestError("The file cannot be read.") from None

    def embed(self, image: Image.Image) -> np.ndarray:
        """The vector ``[1, d]`` of an image.

        Raises:
            RequestError: if the embedder rejects the image.
        """
        try:
            return vectors_of(self.index.embedder, [image])
        except OSError as error:
            raise RequestError(f"The image cannot be used: {error}.") from None

    def search(self, image: Image.Image, k: int, own: str | None = None) -> Pictures:
        """Thumbnails of the k nearest images of the index, with their distances.

        Args:
            image: the query.
            k: number of results, up to `MAX_RESULTS`.
            own: path of the query in the index, which is left out.

        Raises:
            RequestError: if the embedder rejects the image.
        """
        k = min(max(int(k), 1), MAX_RESULTS)
        leave_out = [[own] if own else []]
        (hits,) = self.index.search(self.embed(image), k, leave_out=leave_out)
        return [_picture(self.index, hit.path, hit.distance) for hit in hits]

    def verify(self, first: Image.Image, second: Image.Image) -> str:
        """Describe the decision whether two images are of the same class.

        Raises:
            RequestError: if the embedder rejects an image.
        """
        if self.calibration is None:
            distance = np.linalg.norm(self.embed(first) - self.embed(second))
            return (
                f"Distance {distance:.3f}. No decision: no threshold was chosen; "
                "choose one with `tripletjax verify`."
            )
        try:
            decision = verification.decide(
                self.index.embedder, first, second, self.calibration
            )
        except OSError as error:
            raise RequestError(f"The image cannot be used: {error}.") from None
        return (
            f"**{'Same' if decision.same else 'Different'}**: distance "
            f"{decision.distance:.3f}, threshold {decision.threshold:.3f} (FAR "
            f"{100 * self.calibration.far:g} %), match probability "
            f"{decision.probability:.2f} (equal priors)."
        )

    def identify(self, image: Image.Image) -> tuple[str, Pictures]:
        """Describe the class of an image, and show the nearest image of the gallery.

        Raises:
            RequestError: if there is no gallery, or the embedder rejects the image.
        """
        if self.gallery is None:
            raise RequestError(
                "Identification requires one folder per class; the index has none."
            )
        threshold = float("inf")
        if self.calibration is not None:
            threshold = self.calibration.threshold
        (identity,) = identification.identify(
            self.gallery, self.embed(image), threshold=threshold
        )
        text = (
            f"**{identity.name or 'Unknown'}**: nearest class {identity.nearest}, "
            f"distance {identity.distance:.3f}"
        )
        if identity.runner_up is not None:
            text += (
                f"; next class {identity.runner_up}, distance "
                f"{identity.runner_up_distance:.3f}"
            )
        text += f". {self._describe_threshold()}"
        nearest = _picture(self.gallery_index, identity.path, identity.distance)
        return text, [nearest]

    @functools.cached_property
    def group_threshold(self) -> float:
        """The threshold of groups that is chosen on the images of the calibration."""
        if self.calibration is None:
            return GROUP_DISTANCE
        return clustering.choose_threshold(self.calibration).threshold

    def group(self, threshold: float) -> tuple[str, list[list[str]]]:
        """Describe the groups of the index, and list the paths of the largest.

        Raises:
            RequestError: if the threshold is negative, or there are too few images.
        """
        try:
            groups = clustering.group_images(self.index, threshold)
        except ValueError as error:
            raise RequestError(f"The images cannot be grouped: {error}") from None
        text = (
            f"Images: {len(groups.paths):,}; groups of several images: "
            f"{groups.several:,}; single images: {len(groups) - groups.several:,}."
        )
        shown = range(min(groups.several, MAX_RESULTS))
        return text, [groups.paths_of(number) for number in shown]

    def near_duplicates(self, within: float) -> tuple[str, list[list[str]]]:
        """Describe the near-duplicates of the index, and list the largest groups.

        Raises:
            RequestError: if the distance is negative.
        """
        try:
            groups = self.index.duplicates(within)
        except ValueError as error:
            raise RequestError(f"Near-duplicates cannot be listed: {error}") from None
        count = sum(map(len, groups))
        text = (
            f"Groups of near-duplicates: {len(groups):,}, of {counted(count, 'image')}."
        )
        return text, groups[:MAX_RESULTS]

    def label_errors(self) -> tuple[str, Pictures]:
        """Describe likely label errors, and show each beside the nearest other class.

        Raises:
            RequestError: if the index has no class folders, or fewer than two images.
        """
        try:
            known = identification.Gallery.of(self.index)
        except ValueError:
            raise RequestError(
                "Label errors require one folder per class; the index has none."
            ) from None
        x, labels, n = known.vectors, known.labels, len(known.paths)
        if len(known.names) < 2:
            raise RequestError("Label errors require at least two classes.")
        errors = mining.find_label_errors(x, labels, *mining.find_neighbors(x))
        pictures: Pictures = []
        for image, nearest, ratio in zip(errors.images, errors.nearest, errors.ratio):
            for row, text in ((image, f"ratio {ratio:.2f}"), (nearest, "nearest")):
                path = known.paths[row]
                picture = thumbnail(self.index.file_of(path))
                pictures.append((picture, f"{text} {_name(path)}"))
        text = (
            f"Likely label errors: {len(errors.images):,} of {counted(n, 'image')}. "
            "The ratio is the distance to the nearest other class, divided by the "
            "distance to the own class."
        )
        return text, pictures[:MAX_RESULTS]

    def first_of_groups(self, groups: list[list[str]]) -> Pictures:
        """A thumbnail of the first image of each group, with the group's size."""
        return [
            (thumbnail(self.index.file_of(paths[0])), counted(len(paths), "image"))
            for paths in groups
        ]

    def images_of_group(self, paths: list[str]) -> Pictures:
        """Thumbnails of the images of a group, with their classes or names."""
        return [
            (thumbnail(self.index.file_of(path)), _name(path))
            for path in paths[:MAX_RESULTS]
        ]

    def _describe_threshold(self) -> str:
        if self.calibration is None:
            return "No threshold: every image is named after its nearest class."
        threshold = self.calibration.threshold
        text = f"Threshold {threshold:.3f}"
        if count := len(self.strangers.distances):
            fpir = 100 * self.strangers.count_named(threshold) / count
            text += f"; false positives at this gallery: {fpir:.0f} %"
        return f"{text}."


def _picture(index: Index, path: str, distance: float) -> tuple[np.ndarray, str]:
    """A thumbnail, with its distance and class as caption."""
    return thumbnail(index.file_of(path)), f"{distance:.3f} {_name(path)}"


def _name(path: str) -> str:
    """The class of an image, or its file name if it has none."""
    folder, _, name = path.rpartition("/")
    return folder.rpartition("/")[2] or name


def build_page(app: App) -> gr.Blocks:
    """Build the page of an `App`; `run` serves it."""
    with gr.Blocks(title="tripletjax", analytics_enabled=False) as blocks:
        gr.Markdown(
            "# Search, verification, identification, groups\n"
            f"Images in the index: {len(app.paths):,}"
        )
        with gr.Tab("Search"):
            _build_search(app, blocks)
        with gr.Tab("Verify"):
            _build_verification(app)
        with gr.Tab("Identify"):
            _build_identification(app)
        with gr.Tab("Groups"):
            _build_groups(app, "groups", app.group, app.group_threshold)
        with gr.Tab("Near-duplicates"):
            _build_groups(app, "copies", app.near_duplicates, DUPLICATE_DISTANCE)
        with gr.Tab("Label errors"):
            _build_label_errors(app)
    return blocks


def _build_search(app: App, blocks: gr.Blocks) -> None:
    """Search by an upload, or by an image of a random sample of the index."""

    def draw_sample() -> tuple[list[np.ndarray], list[int]]:
        rows = np.random.default_rng().permutation(len(app.paths))[:SAMPLE_SIZE]
        images = [thumbnail(app.index.file_of(app.paths[row])) for row in rows]
        return images, rows.tolist()

    def search_upload(file: str | None, k: int) -> tuple:
        try:
            image = app.read_image(file)
            hits = app.search(image, k)
            return "Nearest images of the index", shrink(image), hits
        except RequestError as error:
            return str(error), None, []

    def search_sample(rows: list[int], k: int, click: gr.SelectData) -> tuple:
        try:
            path = app.paths[rows[click.index]]
            image = app.read_image(str(app.index.file_of(path)))
            hits = app.search(image, k, own=path)
            return f"Nearest images to {path}", shrink(image), hits
        except (RequestError, IndexError, TypeError) as error:
            return str(error), None, []

    with gr.Row():
        upload = gr.File(label="Query image", elem_id="search-file")
        query = gr.Image(label="Query", interactive=False, height=180, buttons=[])
        k = gr.Slider(1, MAX_RESULTS, 16, step=1, label="Number of results")
    message = gr.Markdown(elem_id="search-message")
    hits = gr.Gallery(
        label="Nearest images, with distances", elem_id="search-hits", **GALLERY
    )
    rows = gr.State([])
    sample = gr.Gallery(
        label="Images of the index: click one to search by it",
        elem_id="search-sample",
        **GALLERY,
    )
    refresh = gr.Button("Show other images")
    outputs = [message, query, hits]
    upload.upload(search_upload, [upload, k], outputs, **EVENT)
    sample.select(search_sample, [rows, k], outputs, **EVENT)
    refresh.click(draw_sample, None, [sample, rows], **EVENT)
    blocks.load(draw_sample, None, [sample, rows], **EVENT)


def _build_verification(app: App) -> None:
    def verify(first: str | None, second: str | None) -> tuple:
        if not first or not second:
            return "Upload two images.", []
        try:
            images = app.read_image(first), app.read_image(second)
            return app.verify(*images), [shrink(image) for image in images]
        except RequestError as error:
            return str(error), []

    with gr.Row():
        uploads = [
            gr.File(label="First image", elem_id="verify-first"),
            gr.File(label="Second image", elem_id="verify-second"),
        ]
    message = gr.Markdown(elem_id="verify-message")
    pair = gr.Gallery(label="Both images", elem_id="verify-pair", **GALLERY)
    for upload in uploads:
        upload.upload(verify, uploads, [message, pair], **EVENT)


def _build_identification(app: App) -> None:
    def identify(file: str | None) -> tuple:
        try:
            image = app.read_image(file)
            text, nearest = app.identify(image)
            return text, [(shrink(image), "query"), *nearest]
        except RequestError as error:
            return str(error), []

    upload = gr.File(label="Query image", elem_id="identify-file")
    message = gr.Markdown(elem_id="identify-message")
    nearest = gr.Gallery(
        label="Query, and nearest image of the gallery",
        elem_id="identify-nearest",
        **GALLERY,
    )
    upload.upload(identify, upload, [message, nearest], **EVENT)


def _build_groups(
    app: App,
    name: str,
    find: Callable[[float], tuple[str, list[list[str]]]],
    threshold: float,
) -> None:
    """Groups of the index at a distance; a click on one shows its images.

    Args:
        app: answers the requests.
        name: beginning of the identifiers of elements.
        find: from a distance to a description and the paths of each group.
        threshold: the distance at first.
    """

    def show(distance: float | None) -> tuple:
        try:
            if distance is None:
                raise RequestError("Enter a distance.")
            text, groups = find(distance)
        except RequestError as error:
            return str(error), [], [], []
        return text, app.first_of_groups(groups), groups, []

    def open_group(groups: list[list[str]], click: gr.SelectData) -> Pictures:
        # The list may be newer than the click.
        if not 0 <= click.index < len(groups):
            return []
        return app.images_of_group(groups[click.index])

    with gr.Row():
        distance = gr.Number(
            round(threshold, 4), label="Largest distance", elem_id=f"{name}-distance"
        )
        button = gr.Button("Show groups", elem_id=f"{name}-show")
    message = gr.Markdown(elem_id=f"{name}-message")
    groups = gr.State([])
    firsts = gr.Gallery(
        label="Largest groups: click one to see its images",
        elem_id=f"{name}-list",
        **GALLERY,
    )
    images = gr.Gallery(
        label="Images of the group", elem_id=f"{name}-images", **GALLERY
    )
    button.click(show, distance, [message, firsts, groups, images], **EVENT)
    firsts.select(open_group, groups, images, **EVENT)


def _build_label_errors(app: App) -> None:
    def show() -> tuple:
        try:
            return app.label_errors()
        except RequestError as error:
            return str(error), []

    button = gr.Button("Show likely label errors", elem_id="labels-show")
    message = gr.Markdown(elem_id="labels-message")
    pictures = gr.Gallery(
        label="Likely label errors, each before the nearest image of the other class",
        elem_id="labels-images",
        **GALLERY,
    )
    button.click(show, None, [message, pictures], **EVENT)


def run(app: App, *, host: str = "127.0.0.1", port: int = 7860) -> None:
    """Serve the page from the main thread until an interrupt.

    Args:
        app: the index, gallery and threshold to answer from.
        host: address to listen on.
        port: port to listen on.

    Raises:
        OSError: if the port is in use.
    """
    # SIGTERM raises KeyboardInterrupt, so that uploads are removed then, too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    uploads = Path(tempfile.mkdtemp(prefix="tripletjax-"))
    os.environ["GRADIO_TEMP_DIR"] = str(uploads)
    fonts = ["system-ui", "sans-serif"]
    theme = gr.themes.Default(font=fonts, font_mono=["ui-monospace", "monospace"])
    blocks = build_page(app)
    try:
        blocks.launch(
            server_name=host,
            server_port=port,
            share=False,
            quiet=True,
            show_error=False,
            max_file_size=MAX_FILE_SIZE,
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
