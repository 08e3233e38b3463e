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
        indices: numbers of their records.
        labels: int32, of the same length.
        names: the name of each label.
        unlabelled: the number of records without a label.
        fingerprint: identifies this version of the dataset.
        image: the name of the feature with the image.
        decoded: all records, with images as arrays.
        encoded: all records, with images as they are stored.
    """

    indices: list[int]
    labels: np.ndarray
    names: tuple[str, ...]
    unlabelled: int
    fingerprint: tuple
    image: str
    decoded: Any
    encoded: Any

    @classmethod
    def open(cls, name: str, data_dir: str | Path | None = None) -> "Catalogue":
        """Open ``tfds:NAME`` or ``tfds:NAME:SPLIT``.

        Raises:
            FileNotFoundError: if the dataset is not prepared.
            ValueError: if there is no such dataset, or it has no image and label.
            OSError: if the dataset cannot be read.
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
        builder = _prepared_builder(dataset, data_dir)
        features = builder.info.features
        image = _named(features, "image", tfds.features.Image)
        label = _named(features, "label", tfds.features.ClassLabel)
        names_or_texts = tfds.features.ClassLabel | tfds.features.Text
        if (
            image is None
            or label is None
            or not isinstance(features[label], names_or_texts)
        ):
            raise ValueError(
                f"the dataset {dataset!r} must have an image and a label, it has: "
                f"{', '.join(features)}."
            )
        part = "+".join(split) or "+".join(builder.info.splits)
        # Labels need no decoded images.
        skip = {image: tfds.decode.SkipDecoding()}
        records = builder.as_data_source(part, decoders=skip)
        values = [record[label] for record in records]
        labels, names = _number_labels(values, features[label])
        # A record without a label has a negative one.
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
        """The decoded image of a record."""
        x = np.asarray(self.decoded[index][self.image])
        return Image.fromarray(x[..., 0] if x.shape[-1] == 1 else x)

    def write(self, folder: Path) -> None:
        """Write the images as they are stored, in one folder per class."""
        for index, label in zip(self.indices, self.labels.tolist()):
            stored = self.encoded[index][self.image]
            name = self.names[label].replace(os.sep, "_")
            # A name that begins with a dot would be hidden.
            name = f"_{name}" if name.startswith(".") else name
            file = folder / name / f"{index:08d}.png"
            file.parent.mkdir(exist_ok=True)
            if isinstance(stored, bytes):
                # Image files are known by their content, whatever their suffix.
                file.write_bytes(stored)
            else:
                self.picture(index).save(file)


def _prepared_builder(dataset: str, data_dir: str | Path | None) -> Any:
    # Whether a dataset is prepared is known without the network, for which
    # tensorflow-datasets would wait minutes.
    try:
        builder = tfds.builder(dataset, data_dir=data_dir, file_format="array_record")
    except tfds.core.DatasetNotFoundError as error:
        raise ValueError(f"tensorflow-datasets has no dataset {dataset!r}.") from error
    if not Path(builder.data_dir).exists():
        raise FileNotFoundError(
            f"the dataset {dataset!r} is not prepared in {builder.data_dir}. With the "
            "network at hand and TensorFlow installed (pip install tensorflow), run\n"
            '    python -c "import tensorflow_datasets as tfds; tfds.builder('
            f"'{dataset}', file_format='array_record').download_and_prepare()\""
        )
    return builder


def _number_labels(values: list, feature: Any) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels as int32, and their names, which may be labels themselves."""
    if isinstance(feature, tfds.features.ClassLabel):
        return np.array(values, np.int32), tuple(feature.names)
    texts = [bytes(value).decode(errors="replace") for value in values]
    names, labels = np.unique(texts, return_inverse=True)
    return labels.astype(np.int32), tuple(map(str, names))


def _named(features: Any, name: str, feature_type: type) -> str | None:
    """The feature of a name, or else the first one of a type."""
    if name in features:
        return name
    of_type = (key for key, one in features.items() if isinstance(one, feature_type))
    return next(of_type, None)
