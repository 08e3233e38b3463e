"""Folders of pictures for the tests."""

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from tripletjax.learn.data.digits import TRAIN, digits
from tripletjax.learn.data.image_cache import prepare


def shapes(folder, *, kinds=8, each=10, size=(24, 20), mode="L", seed=0):
    """A folder of pictures: of each kind rectangles of one place, with noise."""
    draw = np.random.default_rng(seed)
    for kind in range(kinds):
        place = folder / f"group{kind % 2}" / f"kind{kind}"
        place.mkdir(parents=True)
        for number in range(each):
            pixels = draw.integers(0, 60, (size[1], size[0], 3), dtype=np.uint8)
            left, top = divmod(kind, 4)
            pixels[4 * top : 4 * top + 6, 10 * left : 10 * left + 8] += 150
            image = Image.fromarray(pixels).convert(mode)
            suffix = ("png", "bmp", "webp")[number % 3]
            image.save(place / f"{number}.{suffix}", lossless=True)
    return folder


def write_digits(folder, *, per_class, classes=10, swapped=()):
    """Digits as files ``DIGIT/NUMBER.png``; some are in the folder of the next digit.

    Returns:
        The files of swapped images.
    """
    images, labels = digits()
    wrong = []
    for label in range(classes):
        rows = np.flatnonzero(np.asarray(labels) == label)[:per_class]
        for number, row in enumerate(rows):
            swap = (label, number) in swapped
            place = folder / str((label + swap) % classes)
            place.mkdir(parents=True, exist_ok=True)
            file = place / f"{label}_{number}.png"
            Image.fromarray(images[row].reshape(8, 8)).save(file)
            wrong += [file] * swap
    return wrong


def assert_drawn(file):
    """A picture of more than one colour."""
    with Image.open(file) as picture:
        assert np.ptp(np.asarray(picture)) > 0


class PreparedDigits(tfds.core.GeneratorBasedBuilder):
    """The digits as a dataset of the catalogue, in two splits."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "image": tfds.features.Tensor(shape=(8, 8, 1), dtype=np.uint8),
            "label": tfds.features.ClassLabel(num_classes=10),
        }
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features)
        )

    def _split_generators(self, dl_manager):
        halves = {"train": range(TRAIN), "test": range(TRAIN, 1797)}
        return {name: self._generate_examples(rows) for name, rows in halves.items()}

    def _generate_examples(self, rows):
        images, labels = digits()
        for row in rows:
            yield row, {"image": images[row], "label": int(labels[row])}


def prepare_digits():
    """Prepare ``tfds:prepared_digits`` in the folder of the environment."""
    prepare(PreparedDigits(file_format="array_record"))
