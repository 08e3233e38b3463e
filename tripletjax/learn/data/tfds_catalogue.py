"""Prepared datasets of tensorflow-datasets, read without TensorFlow."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from tripletjax.learn.errors import one_line_errors


@dataclasses.dataclass(frozen=True)
class Catalogue:
    """The images of a prepared dataset that have a label.

    Attributes:
        indices: of these records among all.
        labels: int32, of the same length.
        names: what each label stands for.
        unlabelled: how many other records there are.
        made_of: what tells one state of a dataset from another.
        image: the name of the feature.
        decoded: all records, with images as arrays.
        encoded: all records, with images as they are stored.
    """

    indices: list[int]
    labels: np.ndarray
    names: tuple[str, ...]
    unlabelled: int
    made_of: tuple
    image: str
    decoded: Any
    encoded: Any

    @classmethod
    def open(cls, name: str, data_dir: str | Path | None = None) -> "Catalogue":
        """Opens ``tfds:NAME`` or ``tfds:NAME:SPLIT``.

        Raises:
            FileNotFoundError: if it is not prepared.
            ValueError: if there is no such dataset, or it has no image and label.
            OSError: if it cannot be read.
        """
        folder = Path(data_dir or tfds.core.constants.DATA_DIR)
        with one_line_errors(folder, "read"):
            return cls._open(name, data_dir)

    @classmethod
    def _open(cls, name: str, data_dir: str | Path | None) -> "Catalogue":
        _, dataset, *split = name.split(":")
        if not dataset or len(split) > 1:
            raise ValueError(
                f"data must be tfds:NAME or tfds:NAME:SPLIT, got {name!r}."
            )
        # Whether it is there is known without the network, for which it would wait
        # minutes.
        try:
            builder: Any = tfds.builder(
                dataset, data_dir=data_dir, file_format="array_record"
            )
        except tfds.core.DatasetNotFoundError as error:
            raise ValueError(
                f"tensorflow-datasets has no dataset {dataset!r}."
            ) from error
        if not Path(builder.data_dir).exists():
            raise FileNotFoundError(
                f"the dataset {dataset!r} is not prepared in {builder.data_dir}. With "
                "the network at hand and TensorFlow installed (pip install "
                "tensorflow), run\n"
                f'    python -c "import tensorflow_datasets as tfds; tfds.builder('
                f"'{dataset}', file_format='array_record').download_and_prepare()\""
            )
        features = builder.info.features
        image = _named(features, "image", tfds.features.Image)
        label = _named(features, "label", tfds.features.ClassLabel)
        classes, text = tfds.features.ClassLabel, tfds.features.Text
        if (
            image is None
            or label is None
            or not isinstance(features[label], classes | text)
        ):
            raise ValueError(
                f"the dataset {dataset!r} must have an image and a label, it has: "
                f"{', '.join(features)}."
            )
        part = "+".join(split) or "+".join(builder.info.splits)
        # Images need not be decoded for their labels.
        skip = {image: tfds.decode.SkipDecoding()}
        records: Any = builder.as_data_source(part, decoders=skip)
        values = [record[label] for record in records]
        if isinstance(features[label], classes):
            labels, names = np.array(values, np.int32), tuple(features[label].names)
        else:
            # As of people, whose names are the labels.
            told = [bytes(value).decode(errors="replace") for value in values]
            found, labels = np.unique(told, return_inverse=True)
            labels, names = labels.astype(np.int32), tuple(map(str, found))
        # Records of which the label is not known have a negative one.
        indices = np.flatnonzero(labels >= 0)
        return cls(
            indices.tolist(),
            labels[indices],
            names,
            len(labels) - len(indices),
            (builder.info.full_name, builder.data_dir, part, len(records)),
            image,
            builder.as_data_source(part),
            records,
        )

    def picture(self, index: int) -> Image.Image:
        """An image, decoded."""
        x = np.asarray(self.decoded[index][self.image])
        return Image.fromarray(x[..., 0] if x.shape[-1] == 1 else x)

    def write(self, folder: Path) -> None:
        """Writes the images as they are stored, in one folder per class."""
        for index, label in zip(self.indices, self.labels.tolist()):
            stored = self.encoded[index][self.image]
            name = self.names[label].replace(os.sep, "_")
            # What begins with a dot is hidden.
            name = f"_{name}" if name.startswith(".") else name
            file = folder / name / f"{index:08d}.png"
            file.parent.mkdir(exist_ok=True)
            if isinstance(stored, bytes):
                # What an image is, its content tells.
                file.write_bytes(stored)
            else:
                self.picture(index).save(file)


def _named(features: Any, name: str, kind: type) -> str | None:
    kinds = [key for key, feature in features.items() if isinstance(feature, kind)]
    return name if name in features else kinds[0] if kinds else None
