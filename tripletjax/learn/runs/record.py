"""The record of a run in its directory: ``config.json``."""

import dataclasses
import json
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

from tripletjax.learn.data.image_shape import ImageSpec
from tripletjax.learn.files import write_json
from tripletjax.learn.runs.config import Config
from tripletjax.learn.runs.plan import Plan

FILE = "config.json"
# The results of a finished run, and the step of which they are.
SUMMARY = "summary.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageRecord:
    """Preparation of images for the network.

    Attributes:
        shape: height, width and channels that every image is fitted to.
        white: the value that is white in images of more than 8 bits.
        background: what shows through transparency.
        mean: of each channel, of images from 0 to 1 as the network sees them.
        std: likewise, the standard deviation.
    """

    shape: tuple[int, int, int]
    white: float
    background: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def spec(self) -> ImageSpec:
        return ImageSpec(*self.shape, self.white, self.background)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunRecord:
    """Everything that a run was made with.

    Attributes:
        requested: the request.
        plan: what was decided.
        images: how images are made ready.
        data_key: a digest of what the run learns from.
        label_names: what each label stands for; none of given triplets.
        seen_names: of the classes that were trained on, or that the best model was
            chosen by; the others were held out whole.
        skipped: files that could not be used, and why.
        notes: on choices and data.
    """

    requested: Config
    plan: Plan
    images: ImageRecord
    data_key: str
    label_names: tuple[str, ...]
    seen_names: tuple[str, ...]
    skipped: tuple[str, ...]
    notes: tuple[str, ...]

    @classmethod
    def read(cls, run_dir: Path) -> "RunRecord":
        """The record in a run directory.

        Raises:
            OSError: if there is none.
            ValueError: if it is of another version, or none at all.
        """
        path = run_dir / FILE
        try:
            return from_json(cls, json.loads(path.read_text(encoding="utf-8")))
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{path} is not the record of a run of this version: {error!r}."
            ) from error

    def write(self, run_dir: Path) -> None:
        write_json(run_dir / FILE, dataclasses.asdict(self))


def requested_options(config: Config) -> dict[str, Any]:
    """The options of a configuration that differ from their defaults."""
    return {
        field.name: value
        for field in dataclasses.fields(Config)
        if (value := getattr(config, field.name)) != field.default
    }


def from_json(hint: Any, value: Any) -> Any:
    """The value of a type hint, from JSON of its `dataclasses.asdict`.

    A list becomes a tuple, and an object the dataclass of the hint that has its fields.

    Raises:
        ValueError: if the hint is of dataclasses, and none has these fields.
    """
    classes = [x for x in (hint, *get_args(hint)) if dataclasses.is_dataclass(x)]
    if isinstance(value, list) and not classes:
        return tuple(from_json(Any, item) for item in value)
    if isinstance(value, dict) and not classes:
        return {name: from_json(Any, item) for name, item in value.items()}
    if not classes or (value is None and NoneType in get_args(hint)):
        return value
    for cls in classes:
        hints = get_type_hints(cls)
        if isinstance(value, dict) and hints.keys() == value.keys():
            return cls(**{k: from_json(hints[k], item) for k, item in value.items()})
    expected = " or ".join(cls.__name__ for cls in classes)
    raise ValueError(f"{expected} has other fields than {value!r:.200}")
