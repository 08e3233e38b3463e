"""Images with labels, stored and read back through tensorflow-datasets.

Datasets are kept as array_record files, which need no TensorFlow, in the usual place of
tensorflow-datasets (``~/tensorflow_datasets``, or ``TFDS_DATA_DIR``).
"""

import contextlib
import dataclasses
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds


@dataclasses.dataclass(frozen=True)
class Images:
    """Images with labels.

    Attributes:
        images: uint8 ``[n, height, width, channels]``.
        labels: int32 ``[n]``.
    """

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


@dataclasses.dataclass(frozen=True)
class Dataset:
    """What an embedding is trained on, and images that it never sees.

    Attributes:
        name: how the dataset is called.
        train: the images to train on.
        test: the images to evaluate on.
        label_names: what each label stands for.
    """

    name: str
    train: Images
    test: Images
    label_names: tuple[str, ...]


def load(name: str, *, data_dir: str | Path | None = None) -> Dataset:
    """Loads a dataset by name, preparing it first where needed.

    Args:
        name: ``"digits"``, the 1,797 handwritten digits that come with scikit-learn.
        data_dir: where tensorflow-datasets keeps its files; its default if not given.

    Returns:
        The `Dataset`.

    Raises:
        ValueError: if there is no such dataset.
    """
    if name != "digits":
        raise ValueError(f"there is no dataset {name!r}; there is: digits.")
    builder = Digits(data_dir=data_dir, file_format="array_record")
    tfds.disable_progress_bar()
    # It announces a download, on standard output, also where there is none.
    with contextlib.redirect_stdout(io.StringIO()):
        builder.download_and_prepare()
    return Dataset(
        name=name,
        train=_read(builder, "train"),
        test=_read(builder, "test"),
        label_names=tuple(builder.info.features["label"].names),
    )


class Digits(tfds.core.GeneratorBasedBuilder):
    """Handwritten digits of 13 writers, 8 x 8 pixels, in the order of the file.

    The first half trains and the second half tests. Writers follow one another in the
    file, so that a random split would show the test writers while training.
    """

    VERSION = tfds.core.Version("1.0.0")
    TRAIN = 898

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(
            {
                "image": tfds.features.Tensor(shape=(8, 8, 1), dtype=np.uint8),
                "label": tfds.features.ClassLabel(num_classes=10),
                # Records are stored in no particular order.
                "place": np.int64,
            }
        )
        return tfds.core.DatasetInfo(
            builder=self,
            description="The handwritten digits that come with scikit-learn.",
            citation=(
                "Alpaydin, Kaynak. Optical Recognition of Handwritten Digits. "
                "UCI Machine Learning Repository, 1998. doi:10.24432/C50P49"
            ),
            features=features,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict:
        from sklearn.datasets import load_digits

        digits = load_digits()
        # 17 levels, 0 to 16, spread over 0 to 240: exactly proportional.
        images = (digits.images * 15).astype(np.uint8)[..., None]
        half = slice(None, self.TRAIN), slice(self.TRAIN, None)
        return {
            split: self._generate_examples(images[part], digits.target[part])
            for split, part in zip(("train", "test"), half)
        }

    def _generate_examples(
        self, images: np.ndarray, labels: np.ndarray
    ) -> Iterator[tuple[int, dict]]:
        for place, (image, label) in enumerate(zip(images, labels)):
            yield place, {"image": image, "label": int(label), "place": place}


def _read(builder: tfds.core.DatasetBuilder, split: str) -> Images:
    source = builder.as_data_source(split)
    records = sorted(source.__getitems__(range(len(source))), key=lambda r: r["place"])
    return Images(
        images=np.stack([record["image"] for record in records]),
        labels=np.array([record["label"] for record in records], np.int32),
    )
