"""Options of every command, each declared once.

The options of a command are a dataclass: its docstring is the help of the command. This
module imports nothing of the extras, so that every help works without them.
"""

import argparse
import dataclasses
from functools import partial
from pathlib import Path
from types import EllipsisType, NoneType
from typing import Any, ClassVar, Self, get_args, get_type_hints

from tripletjax.learn import choices
from tripletjax.learn.runs.config import DATA, Config, classes_from_option
from tripletjax.learn.runs.options import (
    OptionError,
    check_options,
    flag,
    help_of,
    option,
    options_of,
)

# Names of values in the help, by their type.
METAVARS = {int: "N", float: "NUMBER", Path: "PATH", str: "TEXT"}

# Options of several commands.
run_option = partial(
    option, "directory of a finished run", required=True, metavar="RUN"
)
index_option = partial(
    option,
    "folder of images to search in, which is only read",
    required=True,
    metavar="FOLDER",
)
database_option = partial(
    option,
    "directory of the indexes (default: index in --run or --embedder-dir)",
    metavar="DIR",
)
remove_missing_option = partial(
    option,
    "remove missing images from the index, even if most images are missing",
    default=False,
)
json_option = partial(option, "JSON file for the report", metavar="FILE")
_of_run = partial(option, group="run")
_other = partial(option, group="embedder instead of a run")


class Options:
    """Options of a command, as its parser reads them.

    Attributes:
        extras: extras of the package that the command requires.
    """

    extras: ClassVar[str] = "train"

    def __post_init__(self) -> None:
        check_options(self)

    @classmethod
    def add_to(cls, parser: argparse.ArgumentParser) -> None:
        """Add a row for every option to the parser of the command."""
        add_options(parser, cls, {})

    @classmethod
    def names(cls) -> frozenset[str]:
        """Names of the options that the command takes by name."""
        return frozenset(
            field.name for field, one in options_of(cls) if not one.positional
        )

    @classmethod
    def of(cls, values: dict[str, Any]) -> Self:
        """The options of parsed values, by their names."""
        return cls(
            **{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        )

    def has(self, name: str) -> bool:
        """Whether the user gave an option that has no other default than none."""
        value = getattr(self, name)
        return value is not None and value is not False and value != ()

    def require(self, needed: str, *names: str) -> None:
        """Raise OptionError if one of the options is given without the needed one."""
        for name in names:
            if self.has(name) and not self.has(needed):
                raise OptionError(f"{{{name}}} requires {{{needed}}}.")

    def exclude(self, *names: str) -> None:
        """Raise OptionError if more than one of the options is given."""
        given = [name for name in names if self.has(name)]
        if len(given) > 1:
            raise OptionError(f"{{{given[1]}}} cannot be combined with {{{given[0]}}}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmbedderOptions(Options):
    """Options of a command that uses an embedder: of a run, or any other."""

    run: Path | None = option(
        "directory of a finished run; required without --embedder", metavar="RUN"
    )
    embedder: str | None = _other(
        "function from a list of Pillow images to vectors, in a module of the current "
        "directory or an installed one; or an ONNX file from images to vectors",
        metavar="MODULE:FUNCTION|FILE.onnx",
    )
    embedder_dir: Path | None = _other(
        "directory of the indexes, threshold and reports of --embedder (default: "
        "runs/embedder-NAME)",
        metavar="DIR",
    )
    embedder_size: int | None = _other(
        "image size in pixels: side of the images for an ONNX file (default: that of "
        "the file), or largest longer side of the images for a function (default: 640)",
        rule="at least 1",
    )
    embedder_mean: tuple[float, ...] = _other(
        "mean of pixel values from 0 to 1 for an ONNX file, for all channels or for "
        "each (default: that of FILE.onnx.json)",
        default=(),
        metavar="NUMBER",
    )
    embedder_std: tuple[float, ...] = _other(
        "standard deviation of pixel values for an ONNX file, for all channels or for "
        "each (default: that of FILE.onnx.json)",
        default=(),
        metavar="NUMBER",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.exclude("run", "embedder")
        if self.run is None and self.embedder is None:
            raise OptionError("give {run} RUN, or {embedder} with another embedder.")
        names = ("embedder_dir", "embedder_size", "embedder_mean", "embedder_std")
        self.require("embedder", *names)

    @property
    def home(self) -> Path:
        """The directory of indexes, threshold and reports: by default that of the run.

        With another embedder, by default a directory in ``runs``, as of `Train`.
        """
        if self.run is not None:
            return self.run
        if self.embedder_dir is not None:
            return self.embedder_dir
        name = Path(self.embedder or "").name.removesuffix(".onnx")
        return Path("runs") / f"embedder-{name.replace(':', '.')}"


def add_options(
    parser: argparse.ArgumentParser, cls: Any, groups: dict[str, Any], **common: Any
) -> None:
    """Add a row for every option of a dataclass to a parser.

    Args:
        parser: of a command.
        cls: the dataclass.
        groups: argument groups of the parser by title; missing ones are added.
        common: arguments of every row.
    """
    hints = get_type_hints(cls)
    for field, declared in options_of(cls):
        if not declared.in_command:
            continue
        title = declared.group
        if title is not None and title not in groups:
            groups[title] = parser.add_argument_group(title)
        rows = parser if title is None else groups[title]
        name, row = _row(field, declared, hints[field.name])
        rows.add_argument(name, **row | common)


def _row(
    field: dataclasses.Field, declared: Any, hint: Any
) -> tuple[str, dict[str, Any]]:
    """Name and arguments of an option for ``add_argument``."""
    inner = [x for x in get_args(hint) if x not in (NoneType, EllipsisType, ...)]
    row: dict[str, Any] = {"help": help_of(field)}
    required = field.default is dataclasses.MISSING
    if not required:
        row["default"] = field.default
    if hint is bool:
        return flag(field.name), row | {"action": "store_true"}
    value_type = inner[0] if inner else hint
    row["type"] = partial(_parse, value_type)
    row["metavar"] = declared.metavar or METAVARS[value_type]
    if declared.positional:
        return field.name, row if required else row | {"nargs": "*"}
    if declared.choices is not None:
        row |= {"choices": declared.choices, "metavar": None}
    if isinstance(field.default, tuple):
        row["nargs"] = "+"
    return flag(field.name), row | {"required": required}


def _parse(value_type: type, text: str) -> Any:
    """The value of an option from its text."""
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    try:
        return value_type(text)
    except ValueError:
        rule = "a whole number" if value_type is int else "a number"
        raise argparse.ArgumentTypeError(f"must be {rule}, got {text!r}") from None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train(Options):
    """Train an embedding of images and evaluate it on held-out images.

    Options that are not given are chosen from the data and written to config.json. The
    run keeps its last model, unless an earlier one is better by more than the standard
    error over the validation classes.
    """

    requested: dict[str, Any]
    augment: str | None = option(
        "random changes of images while training: none, more (for few images per "
        "class), or those of photos or characters, which also decide size and network "
        "(default: by the images)",
        group=DATA,
        choices=(*choices.KINDS, *choices.AUGMENTS),
    )
    out: Path | None = _of_run(
        "run directory (default: a new one in runs/)", metavar="RUN"
    )
    resume: bool = _of_run("continue the run in --out if there is one", default=False)
    devices: str | None = _of_run(
        "number of devices that share every batch, or all (default: 1); a run can be "
        "resumed with another number",
        metavar="N",
    )
    processes: str | None = _of_run(
        "number of processes: start this command once for each, with --coordinator and "
        "--process; or the word cluster, if Slurm, Open MPI, Kubernetes or a TPU pod "
        "starts them",
        metavar="N",
    )
    coordinator: str | None = _of_run(
        "address of process 0, the same in every process; the port must be free",
        metavar="HOST:PORT",
    )
    process: int | None = _of_run("number of this process, from 0", metavar="K")
    tensorboard: bool = _of_run(
        "also write the metrics for TensorBoard, with tensorboardX", default=False
    )

    def __post_init__(self) -> None:
        check_options(self)
        self.require("out", "resume")
        self.require("processes", "coordinator", "process")
        if self.processes is None:
            return
        count = self.process_count
        if self.processes != "cluster" and not count:
            raise OptionError(
                f"{{processes}} must be a number or cluster, got {self.processes}."
            )
        if self.devices not in (None, "all"):
            raise OptionError("{devices} must be all with {processes}.")
        if (self.coordinator is None, self.process is None) != (count is None,) * 2:
            raise OptionError(
                "{processes} N requires {coordinator} and {process}, {processes} "
                "cluster neither; one process uses all devices of a machine by "
                "{devices} all."
            )
        if self.process is not None and not 0 <= self.process < (count or 0):
            raise OptionError(
                f"{{process}} must be 0 to {count} - 1, got {self.process}."
            )

    @property
    def process_count(self) -> int | None:
        """Number of processes; None for those of a cluster, or for this one alone."""
        text = self.processes or ""
        return int(text) if text.isdecimal() else None

    @classmethod
    def add_to(cls, parser: argparse.ArgumentParser) -> None:
        groups: dict[str, Any] = {}
        # Options that are not given are absent: they may be those of an earlier run.
        add_options(parser, Config, groups, default=argparse.SUPPRESS)
        add_options(parser, cls, groups)

    @classmethod
    def names(cls) -> frozenset[str]:
        of_config = (field.name for field, one in options_of(Config) if one.in_command)
        return super().names() | {*of_config}

    @classmethod
    def of(cls, values: dict[str, Any]) -> Self:
        own = {field.name for field, _ in options_of(cls)}
        requested = {k: v for k, v in values.items() if k not in own}
        return cls(requested=requested, **{name: values[name] for name in own})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluate(EmbedderOptions):
    """Measure an embedder on a folder of classes.

    Retrieval: every image is a query for the others of its class. Verification: every
    pair of images is of the same class or of different classes. The command writes the
    report and its pictures (ROC, distances of pairs, nearest neighbours) to --out.
    """

    data: Path = option(
        "folder with one folder of images per class, seen in training or not",
        required=True,
        metavar="FOLDER",
    )
    classes_from: str | None = classes_from_option()
    rerank: bool = option(
        "also measure retrieval re-ranked by k-reciprocal neighbours", default=False
    )
    out: Path | None = option(
        "directory for the report (default: a new one in evaluations/ of --run or "
        "--embedder-dir)",
        metavar="DIR",
    )
    json: Path | None = json_option()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Search(EmbedderOptions):
    """Search a folder for images like given ones, or for near-duplicates.

    The command first updates the index: new and changed images are embedded, deleted
    ones removed. Distances are Euclidean, of unit vectors: from 0 to 2.
    """

    extras: ClassVar[str] = "train,search"

    index: Path = index_option()
    database: Path | None = database_option()
    remove_missing: bool = remove_missing_option()
    query: tuple[Path, ...] = option(
        "images to search for", default=(), metavar="IMAGE"
    )
    duplicates: bool = option("list groups of near-duplicate images", default=False)
    approximate: bool = option(
        "search only the most promising parts of the index: faster from some 300,000 "
        "images on",
        default=False,
    )
    together: bool = option("search once, by the mean of all queries", default=False)
    rerank: bool = option(
        "re-rank the hits by k-reciprocal neighbours: hits that share neighbours with "
        "the query come first",
        default=False,
    )
    k: int = option(
        "largest number of hits of a query", default=8, metavar="K", rule="at least 1"
    )
    within: float | None = option(
        "largest distance of a hit, or of two duplicates (default: any distance, 0.1 "
        "for duplicates)",
        metavar="DISTANCE",
        rule="0 to 2, as distances of unit vectors",
    )
    classes: tuple[str, ...] = option(
        "folders of the index to search in, at any depth", default=(), metavar="FOLDER"
    )
    out: Path | None = option(
        "picture of the hits (PNG), or table of the groups of duplicates (CSV)",
        metavar="FILE",
    )
    json: Path | None = json_option()

    def __post_init__(self) -> None:
        super().__post_init__()
        self.exclude("query", "duplicates")
        self.require("query", "together", "classes", "approximate", "rerank")
        if self.out is not None and not (self.query or self.duplicates):
            raise OptionError("{out} requires {query} or {duplicates}.")
        if self.out is not None and self.query and self.out.suffix != ".png":
            raise OptionError(f"{{out}} must be a .png file, got {self.out}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verify(EmbedderOptions):
    """Choose a threshold on a folder of classes, or compare two images by it.

    With --data, the command measures verification on classes that the run was not
    trained on, and keeps a threshold in the directory of the run or the embedder. With
    two images, it prints whether they are of the same class by this threshold.
    Distances are Euclidean, of unit vectors: from 0 to 2.
    """

    images: tuple[Path, ...] = option(
        "two images to compare", default=(), metavar="IMAGE", positional=True
    )
    data: str | None = option(
        "folder with one folder of images per class, such as a person, or tfds:NAME",
        metavar="FOLDER",
    )
    pairs: Path | None = option(
        "list of pairs in the format of pairs.txt of Labeled Faces in the Wild "
        "(default: all pairs)",
        metavar="FILE",
    )
    far: float | None = option(
        "false accept rate of the threshold (default: 0.01); with too few pairs to "
        "show it, no threshold is chosen",
        metavar="SHARE",
        rule="above 0 and below 1",
    )
    classes_from: str | None = classes_from_option()
    out: Path | None = option(
        "directory for the report (default: a new one in verifications/ of --run "
        "or --embedder-dir)",
        metavar="DIR",
    )
    json: Path | None = json_option()

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.data is None) == (not self.images):
            raise OptionError("give two images, or {data} FOLDER.")
        if self.images and len(self.images) != 2:
            raise OptionError(f"images must be two, got {len(self.images)}.")
        self.require("data", "pairs", "far", "classes_from", "out")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Identify(EmbedderOptions):
    """Name images by a gallery of known classes, or call them unknown.

    With a few images per class in the gallery, identification is few-shot
    classification. The threshold is that of tripletjax verify. The command prints its
    false positive rate at this gallery, which grows with the number of classes.
    """

    extras: ClassVar[str] = "train,search"

    images: tuple[Path, ...] = option(
        "images to name", default=(), metavar="IMAGE", positional=True
    )
    gallery: Path = option(
        "folder of known classes: one folder of images per class, such as a person",
        required=True,
        metavar="FOLDER",
    )
    data: Path | None = option(
        "folder of classes to measure on; classes named like one of the gallery are "
        "known, others unknown",
        metavar="FOLDER",
    )
    means: bool = option(
        "compare with the mean of each class instead of every image", default=False
    )
    fpir: float | None = option(
        "threshold by the largest share of unknown images that get a name of this "
        "gallery",
        metavar="SHARE",
        rule="above 0 and below 1",
    )
    within: float | None = option(
        "largest distance at which a class gives its name (default: the threshold of "
        "tripletjax verify)",
        metavar="DISTANCE",
        rule="0 to 2, as distances of unit vectors",
    )
    closed: bool = option(
        "name every image after its nearest class, at any distance", default=False
    )
    classes_from: str | None = classes_from_option()
    database: Path | None = database_option()
    remove_missing: bool = remove_missing_option()
    out: Path | None = option(
        "picture of the images beside the nearest of the gallery",
        metavar="FILE.png",
        rule="a .png file",
    )
    json: Path | None = json_option()

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.data is None) == (not self.images):
            raise OptionError("give images to name, or {data} FOLDER to measure on.")
        self.exclude("fpir", "within", "closed")
        if self.out is not None and not self.images:
            raise OptionError("{out} requires images to name.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cluster(EmbedderOptions):
    """Group the images of a folder by identity.

    The command first updates the index, as tripletjax search does. Groups merge by
    average linkage, up to a threshold that is chosen on the images of tripletjax
    verify. An image may stay alone. The images are only read.
    """

    extras: ClassVar[str] = "train,search"

    index: Path = option(
        "folder of images to group, which is only read", required=True, metavar="FOLDER"
    )
    database: Path | None = database_option()
    remove_missing: bool = remove_missing_option()
    threshold: float | None = option(
        "largest distance of two groups that merge, the root mean square over their "
        "pairs (default: best BCubed F on the images of tripletjax verify)",
        metavar="DISTANCE",
        rule="0 to 2, as distances of unit vectors",
    )
    evaluate: bool = option(
        "compare the groups with the folders of the index as known classes",
        default=False,
    )
    classes_from: str | None = classes_from_option()
    out: Path | None = option(
        "table of the groups; a contact sheet of the largest groups is written beside "
        "it, as FILE.png",
        metavar="FILE.csv",
        rule="a .csv file",
    )
    copy_to: Path | None = option(
        "new folder for a copy of the images, one folder per group", metavar="DIR"
    )
    link_to: Path | None = option(
        "new folder for links to the images, one folder per group", metavar="DIR"
    )
    json: Path | None = json_option()

    def __post_init__(self) -> None:
        super().__post_init__()
        self.exclude("copy_to", "link_to")
        self.require("evaluate", "classes_from")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mine(EmbedderOptions):
    """Mine the hardest triplets of a whole folder, and list likely label errors.

    The search is exact. Copies of an image are excluded. The margins exclude negatives
    that are nearer than, or hardly farther than, the positive: such negatives are often
    labelled wrongly. tripletjax train --triplets reads the file of triplets. The report
    and the likely label errors lie beside the file. Distances are Euclidean, of unit
    vectors: from 0 to 2.
    """

    data: Path = option(
        "folder with one folder of images per class", required=True, metavar="FOLDER"
    )
    classes_from: str | None = classes_from_option()
    k: int = option(
        "number of negatives of each anchor", default=1, metavar="K", rule="at least 1"
    )
    range_min: int = option(
        "first rank of negatives; 0 is the nearest one", default=0, rule="at least 0"
    )
    range_max: int | None = option(
        "rank of negatives to stop before (default: no limit)", rule="at least 1"
    )
    margin: float | None = option(
        "least difference between the distances of the negative and of the positive "
        "(default: no limit)",
        rule="finite in float32",
    )
    relative_margin: float | None = option(
        "least difference between the distances of the negative and of the positive, "
        "as a share of the positive's distance (default: no limit)",
        rule="finite in float32",
    )
    farthest_positive: bool = option(
        "take the farthest positive of each anchor instead of the nearest",
        default=False,
    )
    skip_label_errors: bool = option(
        "leave likely label errors out of the triplets", default=False
    )
    random: bool = option(
        "draw the negatives from the ranks below --range-max, with equal probability",
        default=False,
    )
    seed: int | None = option(
        "seed of the draws (default: 0)",
        metavar="S",
        rule="at least 0 and below 2**63",
    )
    out: Path = option(
        "file of triplets to write",
        required=True,
        metavar="FILE.csv",
        rule="a .csv file",
    )
    json: Path | None = option(
        "JSON file for the report (default: beside --out)", metavar="FILE"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("random", "seed")
        self.require("range_max", "random")
        if self.range_max is not None and self.range_max <= self.range_min:
            raise OptionError(
                "{range_max} must be above {range_min}, got "
                f"{self.range_max} and {self.range_min}."
            )

    @property
    def draw_seed(self) -> int | None:
        """Seed of random draws; None for the hardest negatives."""
        return (self.seed or 0) if self.random else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Serve(EmbedderOptions):
    """Show search, verification, identification and groups in a browser.

    The page loads nothing from other hosts. Everybody who reaches its address can see
    the images of the index.
    """

    extras: ClassVar[str] = "train,search,serve"

    index: Path = index_option()
    gallery: Path | None = option(
        "folder of known classes to identify: one folder of images per class (default: "
        "the folder of the index)",
        metavar="FOLDER",
    )
    database: Path | None = database_option()
    remove_missing: bool = remove_missing_option()
    host: str = option(
        "address to serve at; 127.0.0.1 is reachable from this machine alone",
        default="127.0.0.1",
        metavar="HOST",
    )
    port: int = option("port to serve at", default=7860, metavar="PORT")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export(Options):
    """Write the embedding of a run as ONNX, StableHLO or safetensors.

    The network in the file takes any number of uint8 images of the size that the run
    uses. The command compares its vectors with those of the run before it keeps the
    file.
    """

    extras: ClassVar[str] = "train,export"

    run: Path = run_option()
    out: Path = option(
        "file to write: model.onnx; model.stablehlo, for JAX and flatbuffers alone; or "
        "model.safetensors, the weights of a trained backbone for --backbone",
        required=True,
        metavar="FILE",
    )
    check: Path | None = option(
        "folder of images to compare on (default: the data of the run)",
        metavar="FOLDER",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Convert(Options):
    """Write a file of weights as safetensors, for --backbone without PyTorch.

    The file holds the network's arrays in float32. Wrappers of the network, such as
    module. or state_dict, and its classifier are left out; the command reports them.
    Files of PyTorch require an installed PyTorch, and are refused if they contain code.
    """

    file: Path = option(
        "file of weights to read (.safetensors, .pt, .pth, .bin, .ckpt, or "
        ".safetensors.index.json), or efficientnet-lite0 of the extra pretrained",
        required=True,
        metavar="FILE",
        positional=True,
    )
    out: Path = option(
        "file to write", required=True, metavar="OUT.safetensors", positional=True
    )


COMMANDS: dict[str, type[Options]] = {
    cls.__name__.lower(): cls
    for cls in (
        Train,
        Evaluate,
        Search,
        Verify,
        Identify,
        Cluster,
        Mine,
        Serve,
        Export,
        Convert,
    )
}
