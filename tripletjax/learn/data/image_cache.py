"""Images that tensorflow-datasets keeps on disk as array_record files.

Reading and writing need no TensorFlow. The files lie in its usual folder,
``~/tensorflow_datasets`` or ``TFDS_DATA_DIR``.
"""

import contextlib
import dataclasses
import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from tqdm import tqdm

from tripletjax.learn.counts import counted
from tripletjax.learn.data import cache_cleanup
from tripletjax.learn.data.image_analysis import kind_of, tone_share
from tripletjax.learn.data.image_array import ArrayImages, ImageArray, StoredImages
from tripletjax.learn.data.image_files import FRAMES, is_image, read_ahead
from tripletjax.learn.data.image_shape import (
    BLANK,
    WHITES,
    ImageSpec,
    background_of,
    check_not_blank,
    flat,
    has_alpha,
    is_colour,
    is_wide,
    peak,
    white_of,
)
from tripletjax.learn.errors import one_line_errors, text_of_error
from tripletjax.learn.files import digest_of, digest_of_file, digest_of_image

# The version of decoding. Images of another version are decoded again.
FORMAT = 7
# Files of more bytes are read as a whole only if they begin as an image does.
LARGE = 2**24
# Images of more bytes than this stay on disk.
IN_MEMORY = 2**31
# The number of pictures whose size and colour decide the shape of all.
SAMPLE = 256

Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True)
class Decoding:
    """Decisions on how pictures become images.

    Attributes:
        kind: photos or characters.
        kind_by: the reason for the kind.
        white: the value that is white in pictures of more than 8 bits.
        background: the colour behind transparency.
        notes: lines about other decisions.
    """

    kind: str = "characters"
    kind_by: str = ""
    white: float = 65535
    background: str = "white"
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class DecodedImages:
    """Pictures decoded to images of one shape.

    Attributes:
        images: of the pictures that can be used, in their order.
        digests: of each image, as hexadecimal numbers.
        kept: the numbers of the pictures that can be used.
        skipped: the reason for each other picture, by its number.
        decoding: how the pictures were decoded.
    """

    images: ImageArray
    digests: list[str]
    kept: list[int]
    skipped: dict[int, str]
    decoding: Decoding

    @property
    def skip_counts(self) -> dict[str, int]:
        """The number of skipped pictures for each reason."""
        blank = sum(why == BLANK for why in self.skipped.values())
        return {"unreadable": len(self.skipped) - blank, "blank": blank}


def files_key(
    files: Sequence[Path], names: Sequence[str], size: int | None, kind: str | None
) -> str:
    """A digest of the contents of files and of their names."""

    def content(file: Path) -> str:
        try:
            # Videos and other large files are not read as a whole.
            if (size := file.stat().st_size) > LARGE and not is_image(file):
                return f"no image of {size} bytes"
            return digest_of_file(file)
        except OSError:
            # Decoding the file gives the reason.
            return "none"

    parts: list[str | bytes] = [str((FORMAT, size, kind))]
    with ThreadPoolExecutor() as pool:
        for name, digest in zip(names, pool.map(content, files)):
            parts += [os.fsencode(name), b"\0", digest]
    return digest_of(parts)


def cache_directory(data_dir: str | Path | None, key: str) -> Path:
    """The folder of the decoded images of a key, which need not exist."""
    folder = Path(data_dir or tfds.core.constants.DATA_DIR).resolve()
    return folder / "tripletjax" / key


def decode_and_cache(
    pictures: Sequence[Any],
    open_picture: Callable[[Any], Image.Image],
    directory: Path,
    *,
    source: str,
    size: int | None,
    kind: str | None = None,
    in_memory: int,
    progress: bool,
) -> DecodedImages:
    """Decode pictures to one shape and cache them, unless they are cached already.

    Args:
        pictures: arguments of `open_picture`.
        open_picture: opens a picture, or raises OSError.
        directory: the folder of the cached images.
        source: a name of the pictures, such as the path of their folder. Earlier
            states of the source that no process uses are removed from the cache.
        size: longer side of the images, in pixels.
        kind: photos or characters; decided by a sample if None.
        in_memory: the largest size of images that are read into memory, in bytes.
        progress: whether to show a progress bar.

    Raises:
        ValueError: if no picture can be used.
    """
    source = f"{source}, size {size}, kind {kind}"
    with (
        one_line_errors(directory, "written"),
        cache_cleanup.open_entry(directory, source, progress=progress) as notes,
    ):
        builder = ImageCacheBuilder(
            pictures=pictures,
            open_picture=open_picture,
            size=size,
            kind=kind,
            progress=progress,
            data_dir=directory,
            file_format="array_record",
        )
        prepare(builder)
    summary = json.loads(builder.info.metadata["summary"])
    skipped = {int(index): why for index, why in summary["skipped"].items()}
    digests, shape = summary["digests"], tuple(summary["shape"])
    n = len(digests)
    with one_line_errors(directory, "read"):
        records = builder.as_data_source("all_images")
    images = StoredImages(
        records, np.arange(n), (n, *shape), shape, directory=directory
    )
    if np.prod(images.shape, dtype=float) <= in_memory:
        images = ArrayImages.of(images[:])
    notes += cache_cleanup.remove_stale(directory, source)
    decoding = Decoding(**summary["decoding"])
    return DecodedImages(
        images,
        digests,
        [index for index in range(len(pictures)) if index not in skipped],
        skipped,
        dataclasses.replace(decoding, notes=(*decoding.notes, *notes)),
    )


class ImageCacheBuilder(tfds.core.GeneratorBasedBuilder):
    """Pictures decoded to one shape, in their order."""

    VERSION = tfds.core.Version("2.0.0")

    def __init__(
        self,
        *,
        pictures: Sequence[Any],
        open_picture: Callable[[Any], Image.Image],
        size: int | None,
        kind: str | None,
        progress: bool,
        **options: Any,
    ):
        self.pictures, self.open_picture = pictures, open_picture
        self.size, self.kind, self.progress = size, kind, progress
        # The reason for each picture that cannot be used, by its number.
        self.skipped: dict[int, str] = {}
        super().__init__(**options)

    def _info(self) -> tfds.core.DatasetInfo:
        image = tfds.features.Tensor(
            shape=(None, None, None), dtype=np.uint8, encoding="zlib"
        )
        return tfds.core.DatasetInfo(
            builder=self,
            description="Pictures decoded to one shape.",
            features=tfds.features.FeaturesDict({"image": image}),
            metadata=tfds.core.MetadataDict(),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict:
        return {"all_images": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict]]:
        spec, decoding = self._decide()

        def fit(image: Image.Image) -> tuple[np.ndarray, bool]:
            pixels = spec.fit(image)
            check_not_blank(pixels)
            return pixels, image.info.get(FRAMES, 1) > 1

        left = self._usable()
        bar = tqdm(
            self._apply(fit, left),
            desc="decoding images",
            total=len(left),
            unit="image",
            disable=not self.progress,
        )
        digests, animated = [], 0
        for row, (pixels, has_frames) in enumerate(bar):
            digests.append(digest_of_image(pixels))
            animated += has_frames
            yield row, {"image": pixels}
        if not digests:
            reasons = "; ".join(sorted(set(self.skipped.values()))[:3])
            raise ValueError(
                f"none of {counted(len(self.pictures), 'image')} can be used: {reasons}"
            )
        if animated:
            count = counted(animated, "image has", "images have")
            note = f"{count} several frames: the first one is used"
            decoding = dataclasses.replace(decoding, notes=(*decoding.notes, note))
        self.info.metadata["summary"] = json.dumps(
            {
                "shape": (spec.height, spec.width, spec.channels),
                "decoding": dataclasses.asdict(decoding),
                "digests": digests,
                "skipped": dict(sorted(self.skipped.items())),
            }
        )

    def _decide(self) -> tuple[ImageSpec, Decoding]:
        """Decide the shape of all images by a sample of them."""
        n = len(self.pictures)
        sample = range(0, n, max(1, n // SAMPLE))
        looks = [*self._apply(_look, sample)]
        if not looks:
            raise ValueError(
                f"none of {counted(len(sample), 'image')} could be read; the first: "
                f"{self.skipped[0]}"
            )
        sizes, colours, tones, wide, transparent = zip(*looks)
        kind, kind_by = kind_of(tones)
        if self.kind is not None:
            kind, kind_by = self.kind, "it was requested"
        notes, white = [], WHITES[-1]
        if any(wide):
            # One value for all images, so that their brightness can be compared.
            white = white_of(max(self._apply(_peak_if_wide, self._usable())))
            notes.append(f"in images of more than 8 bits {white:g} is white")
        transparent = [image for image in transparent if image is not None]
        background = background_of(transparent)
        if transparent:
            notes.append(f"{background} shows through transparency")
        spec = ImageSpec.of(
            sizes,
            any(colours),
            self.size,
            photos=kind == "photos",
            white=white,
            background=background,
        )
        return spec, Decoding(kind, kind_by, white, background, tuple(notes))

    def _usable(self) -> list[int]:
        return [i for i in range(len(self.pictures)) if i not in self.skipped]

    def _apply(
        self, function: Callable[[Image.Image], Result], indices: Sequence[int]
    ) -> Iterator[Result]:
        """Results for opened pictures, without those that raise OSError."""

        def open_and_apply(index: int) -> Result:
            return function(self.open_picture(self.pictures[index]))

        for part, results in read_ahead(indices, open_and_apply):
            for row, result in zip(part, results):
                if isinstance(result, OSError):
                    self.skipped[indices[row]] = text_of_error(result)
                else:
                    yield result


def _look(image: Image.Image) -> tuple:
    """The size, colour, tones and depth of a picture, and a small transparent copy."""
    transparent = image.resize((64, 64)) if has_alpha(image) else None
    tones = tone_share(flat(image))
    return image.size, is_colour(image), tones, is_wide(image), transparent


def _peak_if_wide(image: Image.Image) -> float:
    return peak(image) if is_wide(image) else 0.0


def prepare(builder: tfds.core.DatasetBuilder) -> None:
    """Write the files of a dataset, unless they exist."""
    tfds.disable_progress_bar()
    with one_line_errors(Path(builder.data_path), "prepared"):
        # The builder announces a download on standard output, even without one.
        with contextlib.redirect_stdout(io.StringIO()):
            builder.download_and_prepare()
        builder.info.read_from_directory(builder.data_path)
