"""What a run directory says of its run: ``config.json``."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from tripletjax.learn.data.augment import Augment
from tripletjax.learn.data.image_shape import ImageSpec
from tripletjax.learn.files import write_json
from tripletjax.learn.runs.config import Config
from tripletjax.learn.runs.plan import (
    BackbonePlan,
    ClassBatchPlan,
    Plan,
    TripletBatchPlan,
)

FILE = "config.json"
# The results of a finished run, and the step of which they are.
SUMMARY = "summary.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageRecord:
    """How images are made ready for the network.

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
        requested: what was asked for.
        plan: what was decided.
        images: how images are made ready.
        data_key: a digest of what the run learns from.
        label_names: what each label stands for; none of given triplets.
        seen_names: of the classes that were trained on, or that the best model was
            chosen by; the others were held out whole.
        skipped: files that could not be used, and why.
        notes: what else was decided or found.
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
            return _from_json(json.loads(path.read_text(encoding="utf-8")))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path} is not the record of a run of this version: {error!r}."
            ) from error

    def write(self, run_dir: Path) -> None:
        write_json(run_dir / FILE, dataclasses.asdict(self))


def options_of(config: Config) -> dict[str, Any]:
    """The options of a configuration, but those left to their defaults."""
    return {
        field.name: value
        for field in dataclasses.fields(Config)
        if (value := getattr(config, field.name)) != field.default
    }


def _from_json(values: dict[str, Any]) -> RunRecord:
    requested, plan = dict(values["requested"]), dict(values["plan"])
    for options in (requested, plan):
        if options["augment"] is not None:
            options["augment"] = Augment(**options["augment"])
        for name in ("channels", "box"):
            if options[name] is not None:
                options[name] = tuple(options[name])
    if plan["backbone"] is not None:
        backbone = dict(plan["backbone"])
        backbone["options"] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in backbone["options"].items()
        }
        plan["backbone"] = BackbonePlan(**backbone)
    of_classes = "classes" in plan["batches"]
    batches = ClassBatchPlan if of_classes else TripletBatchPlan
    images: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in values["images"].items()
    }
    return RunRecord(
        requested=Config(**requested),
        plan=Plan(**plan | {"batches": batches(**plan["batches"])}),
        images=ImageRecord(**images),
        data_key=values["data_key"],
        label_names=tuple(values["label_names"]),
        seen_names=tuple(values["seen_names"]),
        skipped=tuple(values["skipped"]),
        notes=tuple(values["notes"]),
    )
