"""Pretrained networks, from the user's own files of weights.

backbone = backbones.recognise("resnet50.pth")
network, loaded = backbones.load("resnet50.pth")
features = network(images)
"""

import dataclasses
import functools
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from safetensors.numpy import save, save_file

from tripletjax.learn import choices
from tripletjax.learn.files import digest_of, digest_of_file, replaced
from tripletjax.learn.networks.backbones import (
    convnext,
    efficientnet,
    inception_resnet,
    resnet,
    vit,
)
from tripletjax.learn.networks.backbones.images import FACENET, IMAGENET, Images
from tripletjax.learn.networks.weights import (
    COUNTER,
    Loaded,
    Shapes,
    is_float,
    load_arrays,
    shapes_of,
)
from tripletjax.learn.networks.weights_files import (
    Arrays,
    WeightsError,
    is_safetensors,
    locate,
    read_arrays,
)

# Parts of the longest prefix of a wrapper, and the least number of a network's arrays.
LONGEST, LEAST = 6, 8


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of networks.

    Attributes:
        module: has `options_of`, from the shapes of a file's arrays, and the path of
            the file, to options; None for a file of another family. Its `rules_of`
            gives the rules of `load_weights` for these shapes, and its `title_of` the
            name of a network for its options.
        network: builds a network from options.
        least: smallest side of images, in pixels.
        images_of: from options to the images that a network was trained on.
    """

    module: Any
    network: Callable[..., nnx.Module]
    least: int
    images_of: Callable[[Mapping[str, Any]], Images] = lambda options: IMAGENET


FAMILIES = {
    "resnet": Family(resnet, resnet.ResNet, 8),
    "vit": Family(vit, vit.ViT, 1),
    "convnext": Family(convnext, convnext.ConvNeXt, 32),
    "efficientnet": Family(
        efficientnet, efficientnet.EfficientNet, 8, efficientnet.images_of
    ),
    "inception-resnet-v1": Family(
        inception_resnet, inception_resnet.InceptionResNetV1, 75, lambda _: FACENET
    ),
}
# Networks to train from scratch, by the name of a model.
UNTRAINED: dict[str, dict[str, Any]] = {
    f"resnet{depth}": {
        "blocks": blocks,
        "widths": (64, 128, 256, 512),
        "bottleneck": bottleneck,
    }
    for (blocks, bottleneck), depth in resnet.DEPTHS.items()
    if f"resnet{depth}" in choices.UNTRAINED
}


@dataclasses.dataclass(frozen=True)
class Backbone:
    """A network of a family.

    Attributes:
        family: of `FAMILIES`.
        options: of the network.
    """

    family: str
    options: dict[str, Any]

    @property
    def of(self) -> Family:
        return FAMILIES[self.family]

    @property
    def title(self) -> str:
        """Name of the network."""
        return self.of.module.title_of(self.options)

    @property
    def images(self) -> Images:
        """The images that the network was trained on."""
        return self.of.images_of(self.options)

    @property
    def multiple(self) -> int:
        """Divisor of the sides of images, in pixels."""
        return self.options.get("patch", 1)

    @property
    def least(self) -> int:
        """The smallest side of images, in pixels."""
        return max(self.of.least, self.multiple)

    def build(
        self, *, dtype: DTypeLike | None = None, rngs: nnx.Rngs, **options: Any
    ) -> nnx.Module:
        """Build the network with random parameters."""
        options = self.options | options
        return self.of.network(**options, dtype=dtype, rngs=rngs)

    @property
    def features(self) -> int:
        """Number of features."""
        network: Any = self.abstract()
        return network.features

    def abstract(self, *, dtype: DTypeLike | None = None) -> nnx.Module:
        """Build the network with shapes alone, to be filled."""
        return nnx.eval_shape(lambda: self.build(dtype=dtype, rngs=nnx.Rngs(0)))

    def fill(self, network: nnx.Module, arrays: Arrays, *, title: str) -> Loaded:
        """Load arrays into a network that `build` built; `title` names their file."""
        rules = self.of.module.rules_of(shapes_of(arrays))
        return load_arrays(network, arrays, rules, title=title)


@dataclasses.dataclass(frozen=True)
class Weights:
    """Weights of a pretrained network, from a file as people have it.

    Attributes:
        path: the file.
        backbone: the network.
        arrays: by the names that the network's library gives them.
        prefix: of these names in the file, which a wrapper of the network added.
        outside: names of other arrays of the file, without the prefix.
    """

    path: Path
    backbone: Backbone
    arrays: Arrays
    prefix: str = ""
    outside: tuple[str, ...] = ()

    @functools.cached_property
    def digest(self) -> str:
        """Digest of the file that `write` writes."""
        if self.is_plain:
            return digest_of_file(self.path)
        return digest_of([memoryview(self._content)])

    @property
    def is_plain(self) -> bool:
        """Whether the file is a safetensors file of these arrays alone."""
        return not self.prefix and is_safetensors(self.path)

    @property
    def _content(self) -> bytes:
        # safetensors writes the memory of an array, whatever its order.
        return save({n: np.asarray(x, order="C") for n, x in self.arrays.items()})

    @property
    def notes(self) -> list[str]:
        """Notes on the wrapper of the network."""
        if not self.prefix:
            return []
        notes = [f"unwrapped: names of its arrays begin with {self.prefix!r}"]
        if self.outside:
            parts = {name.partition(".")[0] for name in self.outside}
            notes.append(
                f"skipped arrays outside of {self.prefix!r}: {len(self.outside):,}, of "
                f"{', '.join(sorted(parts)[:5])}{', ...' if len(parts) > 5 else ''}"
            )
        return notes

    def fill(self, network: nnx.Module) -> Loaded:
        """Load the arrays into a network that `backbone.build` built."""
        return self.backbone.fill(network, self.arrays, title=str(self.path))

    def write(self, path: Path) -> None:
        """Write the arrays as one safetensors file; a plain one is copied."""
        if self.is_plain:
            shutil.copyfile(self.path, path)
        else:
            path.write_bytes(self._content)


def open_weights(backbone: str | Path) -> Weights:
    """Read a file of weights, and recognise its network by the names of the arrays.

    Names may have a prefix, which a wrapper of the network or a checkpoint adds:
    ``module.``, ``state_dict.model.``, ``teacher.backbone.``. If the file has a network
    and its moving average, the average is loaded.

    Args:
        backbone: a file, or a name of `choices.PRETRAINED`.

    Raises:
        FileNotFoundError: if there is no such file.
        WeightsError: if it is no whole file of weights, of an unknown network, or of
            several; or if the package of a name is not installed.
    """
    path = locate(backbone)
    arrays = read_arrays(path)
    prefix, network = _unwrap(shapes_of(arrays), path)
    inside = {
        name.removeprefix(prefix): array
        for name, array in arrays.items()
        if name.startswith(prefix)
    }
    outside = tuple(name for name in arrays if not name.startswith(prefix))
    return Weights(path, network, inside, prefix, outside)


def recognise(backbone: str | Path) -> Backbone:
    """Recognise the network of a file of weights, as `open_weights`."""
    return open_weights(backbone).backbone


# Words in prefixes of a moving average of the network.
AVERAGES = {"ema", "teacher"}


def _unwrap(shapes: Shapes, path: Path) -> tuple[str, Backbone]:
    """The prefix of all names of a network, and the network."""
    networks: dict[str, Backbone] = {}
    for prefix in ["", *_prefixes(shapes)]:
        if any(prefix.startswith(outer) for outer in networks):
            continue
        inside = {
            name.removeprefix(prefix): shape
            for name, shape in shapes.items()
            if name.startswith(prefix)
        }
        if (backbone := _by_names(inside, path)) is not None:
            networks[prefix] = backbone
    if not networks:
        some = ", ".join(sorted(shapes)[:5]) or "none"
        raise WeightsError(
            f"{path} is of no known network ({', '.join(FAMILIES)}). It has "
            f"{len(shapes):,} arrays: {some}{', ...' if len(shapes) > 5 else ''}."
        )
    averages = {
        prefix: backbone
        for prefix, backbone in networks.items()
        if AVERAGES & {*re.split(r"[._]", prefix)}
    }
    candidates = averages or networks
    if len(candidates) > 1:
        names = ", ".join(repr(prefix) for prefix in candidates)
        raise WeightsError(
            f"{path} holds {len(candidates)} networks, under the prefixes {names}. "
            "Save the arrays of one of them alone."
        )
    return next(iter(candidates.items()))


def _by_names(shapes: Shapes, path: Path) -> Backbone | None:
    for family, of in FAMILIES.items():
        if (options := of.module.options_of(shapes, str(path))) is not None:
            return Backbone(family, options)
    return None


def _prefixes(names: Iterable[str]) -> list[str]:
    """Beginnings of names that a wrapper may add; short ones first."""
    counts = Counter(
        ".".join(parts[:length]) + "."
        for parts in (name.split(".") for name in names)
        for length in range(1, min(len(parts), LONGEST + 1))
    )
    prefixes = [prefix for prefix, n in counts.items() if n >= LEAST]
    return sorted(prefixes, key=lambda prefix: prefix.count("."))


def convert(source: str | Path, out: Path) -> tuple[Weights, Loaded]:
    """Write the weights of a network as a safetensors file for `open_weights`.

    The file holds the arrays of the network in float32, without a classifier. The whole
    network must fit, as for `load`.

    Args:
        source: of `open_weights`.
        out: file to write, which ends in ``.safetensors``.

    Returns:
        The weights, and the record of their loading.

    Raises:
        FileExistsError: if `out` exists.
        FileNotFoundError, WeightsError: as `load`.
        ValueError: if `out` has another suffix, or a name that stands for another
            network.
    """
    if out.suffix != ".safetensors":
        raise ValueError(f"out must be a .safetensors file, got {out}.")
    if out.exists():
        raise FileExistsError(f"{out} already exists; give another file.")
    weights = open_weights(source)
    loaded = weights.fill(weights.backbone.abstract())
    arrays = {
        name: np.asarray(array, np.float32 if is_float(array) else None, order="C")
        for name, array in weights.arrays.items()
    }
    for name in loaded.unused:
        rest = {n: array for n, array in arrays.items() if n != name}
        # Some arrays that no variable takes tell networks apart.
        if not name.endswith(COUNTER) and (
            _by_names(shapes_of(rest), out) == weights.backbone
        ):
            arrays = rest
    if _by_names(shapes_of(arrays), out) != weights.backbone:
        raise ValueError(
            f"out must have {efficientnet.ORIGINAL_IN_TIMM} in its name exactly if the "
            f"converted file has, got {out}."
        )
    with replaced(out) as part:
        save_file(arrays, part)
    return weights, loaded


def load(
    backbone: str | Path, *, dtype: DTypeLike | None = None
) -> tuple[nnx.Module, Loaded]:
    """Load a pretrained network from a file of weights.

    Args:
        backbone: a file of weights, or a name of `choices.PRETRAINED`.
        dtype: of the computation; parameters are float32.

    Returns:
        The network, from images ``[n, height, width, 3]``, standardised by the mean
        and deviation of its training images, to features ``[n, f]``; and the record of
        the file.

    Raises:
        FileNotFoundError: if there is no such file.
        WeightsError: as `open_weights`, or if the arrays do not fit their network.
    """
    weights = open_weights(backbone)
    network = weights.backbone.abstract(dtype=dtype)
    loaded = weights.fill(network)
    network.eval()
    return network, loaded
