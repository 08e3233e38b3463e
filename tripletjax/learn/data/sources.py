"""Names of datasets: the digits, a folder, or a dataset of tensorflow-datasets."""

import dataclasses
import os
from pathlib import Path

DIGITS, TFDS = "digits", "tfds:"


@dataclasses.dataclass(frozen=True)
class Source:
    """A dataset by its name.

    Attributes:
        name: ``digits``, ``tfds:NAME``, ``tfds:NAME:SPLIT``, or the path of a folder,
            absolute if the folder exists.
        label: name for directories of results.
    """

    name: str
    label: str

    @property
    def is_digits(self) -> bool:
        return self.name == DIGITS

    @property
    def in_tfds(self) -> bool:
        """Whether tensorflow-datasets has the dataset."""
        return self.name.startswith(TFDS)


def parse_source(text: str | Path) -> Source:
    """The dataset that ``--data`` names, which need not exist."""
    name = os.fspath(text)
    if name == DIGITS or name.startswith(TFDS):
        return Source(name, name.replace(":", "-"))
    folder = Path(name).resolve()
    return Source(str(folder) if folder.is_dir() else name, folder.name or "data")
