"""Images that tensorflow-datasets keeps on disk as array_record files.

That needs no TensorFlow. The files lie in its usual folder, ``~/tensorflow_datasets``
or ``TFDS_DATA_DIR``.
"""

import contextlib
import dataclasses
import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from tqdm import tqdm

from tripletjax.learn.data import cache_cleanup
from tripletjax.learn.data.image_analysis import kind_of, tone_share
from tripletjax.learn.data.image_array import (
    READ,
    ArrayImages,
    ImageArray,
    StoredImages,
)
from tripletjax.learn.data.image_files import FRAMES, is_image
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
from tripletjax.learn.errors import one_line_errors
from tripletjax.learn.files import digest_of, digest_of_file, digest_of_image

# Of how images are decoded; another number makes them be decoded again.
FORMAT = 6
# Files of more bytes are looked at before they are read as a whole.
LARGE = 2**24
# Images of more bytes than this stay on disk.
IN_MEMORY = 2**31
# So many pictures are looked at for their size and for colour.
LOOK = 256


@dataclasses.dataclass(frozen=True)
class Decoding:
    """What was decided of pictures to make images of them.

    Attributes:
        kind: what they are, photos or characters.
        kind_by: how that was decided.
        white: the value that is white in those of more than 8 bits.
        background: what shows through their transparency.
        notes: what else was decided or found.
    """

    kind: str = "characters"
    kind_by: str = ""
    white: float = 65535
    background: str = "white"
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class DecodedImages:
    """What became of some pictures.

    Attributes:
        images: of those that could be read, in their order.
        digests: of each image, as hexadecimal numbers.
        kept: which pictures these are.
        skipped: why the others could not be read, by number.
        decoding: what was decided of them.
    """

    images: ImageArray
    digests: list[str]
    kept: list[int]
    skipped: dict[int, str]
    decoding: Decoding

    @property
    def skip_counts(self) -> dict[str, int]:
        """How many pictures were skipped, by the kind of reason."""
        blank = sum(why == BLANK for why in self.skipped.values())
        return {"unreadable": len(self.skipped) - blank, "blank": blank}


def files_key(
    files: Sequence[Path], names: Sequence[str], size: int | None, kind: str | None
) -> str:
    """A digest of what files hold, and of their names."""

    def content(file: Path) -> str:
        try:
            # Videos and the like are not read as a whole.
            if (size := file.stat().st_size) > LARGE and not is_image(file):
                return f"no image of {size} bytes"
            return digest_of_file(file)
        except OSError:
            # It is named when it is to be decoded.
            return "none"

    parts: list[str | bytes] = [str((FORMAT, size, kind))]
    with ThreadPoolExecutor() as pool:
        for name, one in zip(names, pool.map(content, files)):
            parts += [os.fsencode(name), b"\0", one]
    return digest_of(parts)


def cache_directory(data_dir: str | Path | None, key: str) -> Path:
    """Where decoded images of this key are, or are to be."""
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
    """Decodes pictures to one shape and keeps them, unless they are kept already.

    Args:
        pictures: whatever the next argument takes.
        open_picture: raises OSError for one that cannot be read.
        directory: where they are kept, or are to be kept.
        source: what pictures these are, such as the path of a folder. Earlier states
            of it that are kept beside `directory` are removed, unless in use.
        size: of the longer side, in pixels.
        kind: what they are, photos or characters; decided by a sample if not given.
        in_memory: how many bytes of images are read into memory; more stay on disk.
        progress: whether to show a progress bar.

    Raises:
        ValueError: if none can be read.
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
    digests = summary["digests"]
    n = len(digests)
    with one_line_errors(directory, "read"):
        records = builder.as_data_source("all_images")
    images = StoredImages(
        records,
        np.arange(n),
        (n, *summary["shape"]),
        tuple(summary["shape"]),
        directory=directory,
    )
    if np.prod(images.shape, dtype=float) <= in_memory:
        images = ArrayImages.of(images[:])
    notes += cache_cleanup.remove_stale(directory, source)
    return DecodedImages(
        images,
        digests,
        [index for index in range(len(pictures)) if index not in skipped],
        skipped,
        Decoding(
            summary["kind"],
            summary["kind_by"],
            summary["white"],
            summary["background"],
            (*summary["notes"], *notes),
        ),
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
        skipped, digests, animated = {}, [], 0

        def tried(function: Callable, indices: Sequence[int]) -> Iterator[Any]:
            def one(index: int) -> Any:
                try:
                    return function(self.open_picture(self.pictures[index]))
                except OSError as error:
                    return error

            with ThreadPoolExecutor() as pool:
                for start in range(0, len(indices), READ):
                    some = indices[start : start + READ]
                    for index, result in zip(some, pool.map(one, some)):
                        if isinstance(result, OSError):
                            skipped[index] = str(result)
                        else:
                            yield result

        n = len(self.pictures)
        look = range(0, n, max(1, n // LOOK))

        def looked(image: Image.Image) -> tuple:
            wide = peak(image) if is_wide(image) else None
            clear = image.resize((64, 64)) if has_alpha(image) else None
            tones = tone_share(flat(image))
            return image.size, is_colour(image), tones, wide, clear

        seen = list(tried(looked, look))
        if not seen:
            raise ValueError(
                f"none of {len(look)} images could be read; the first: {skipped[0]}"
            )
        sizes, colours, tones, wide, clear = zip(*seen)
        kind, kind_by = kind_of(tones)
        if self.kind is not None:
            kind, kind_by = self.kind, "it was asked for"
        photos = kind == "photos"
        notes, white = [], WHITES[-1]
        if any(value is not None for value in wide):
            # One rule for all of them, so that their brightness can be compared.
            every = [index for index in range(n) if index not in skipped]
            peaks = tried(lambda one: peak(one) if is_wide(one) else 0.0, every)
            white = white_of(max(peaks))
            notes.append(f"in images of more than 8 bits {white:g} is white")
        background = background_of([image for image in clear if image is not None])
        if any(image is not None for image in clear):
            notes.append(f"{background} shows through transparency")
        shape = ImageSpec.of(
            sizes,
            any(colours),
            self.size,
            photos=photos,
            white=white,
            background=background,
        )

        def fitted(image: Image.Image) -> tuple[np.ndarray, bool]:
            pixels = shape.fit(image)
            check_not_blank(pixels)
            return pixels, image.info.get(FRAMES, 1) > 1

        left = [index for index in range(n) if index not in skipped]
        bar = tqdm(
            tried(fitted, left),
            desc="decoding images",
            total=len(left),
            unit="image",
            disable=not self.progress,
        )
        for row, (image, moving) in enumerate(bar):
            digests.append(digest_of_image(image))
            animated += moving
            yield row, {"image": image}
        if not digests:
            whys = sorted(set(skipped.values()))
            raise ValueError(f"none of {n} images can be used: {'; '.join(whys[:3])}")
        if animated:
            many = "1 image has" if animated == 1 else f"{animated:,} images have"
            notes.append(f"{many} several frames: the first is seen")
        self.info.metadata["summary"] = json.dumps(
            {
                "shape": dataclasses.astuple(shape)[:3],
                "white": white,
                "background": background,
                "notes": notes,
                "digests": digests,
                "skipped": dict(sorted(skipped.items())),
                "kind": kind,
                "kind_by": kind_by,
            }
        )


def prepare(builder: tfds.core.DatasetBuilder) -> None:
    tfds.disable_progress_bar()
    with one_line_errors(Path(builder.data_path), "prepared"):
        # It announces a download, on standard output, also where there is none.
        with contextlib.redirect_stdout(io.StringIO()):
            builder.download_and_prepare()
        builder.info.read_from_directory(builder.data_path)
