"""Files of weights: safetensors in one or several files, and files of PyTorch.

The content of a file decides, not its name. Files of PyTorch are pickles, which could
run any code. An installed PyTorch reads their arrays, and refuses everything else.
"""

import argparse
import importlib
import importlib.metadata
import json
import pickle
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from tripletjax.learn.choices import PRETRAINED
from tripletjax.learn.errors import first_line, install_command

# The name of a shard, one of several files of one network.
SHARD = re.compile(r"-0*(\d+)-of-0*(\d+)")
# Beginnings of files: of PyTorch since 1.6, and before.
ZIP, PICKLE = b"PK\x03\x04", b"\x80"
# Deepest nesting of dictionaries; one that contains itself has no end.
DEEPEST = 16
CONVERT = "tripletjax convert FILE OUT.safetensors"


class WeightsError(ValueError):
    """A file without weights, or with weights of another network."""


Arrays = Mapping[str, np.ndarray]


def locate(backbone: str | Path) -> Path:
    """The file of weights of a path, or of a network of `choices.PRETRAINED`.

    Raises:
        WeightsError: if the network's package is not installed.
    """
    package = PRETRAINED.get(str(backbone))
    if package is None:
        return Path(backbone)
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        raise WeightsError(
            f"backbone {backbone} requires the package {package} and PyTorch: "
            f"{install_command('pretrained')}."
        ) from None
    for file in files:
        if file.suffix in (".pth", ".pt", ".safetensors"):
            return Path(str(file.locate()))
    raise WeightsError(f"the package {package} holds no weights; install it again.")


def is_safetensors(path: str | Path) -> bool:
    """Whether a file is one safetensors file by its beginning."""
    return Path(path).is_file() and _beginning(Path(path))[8:9] == b"{"


def read_arrays(path: str | Path) -> dict[str, np.ndarray]:
    """Read all arrays of a file of weights.

    Nested dictionaries, as in a checkpoint of PyTorch, give names with dots.

    Raises:
        FileNotFoundError: if there is no such file.
        WeightsError: if it holds no weights, is not whole, or is a pickle with code.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"weights file {path} does not exist.")
    if path.is_dir():
        raise WeightsError(f"{path} is a folder; backbone must be a file of weights.")
    start = _beginning(path)
    if not start:
        raise WeightsError(f"{path} is empty: 0 bytes.")
    if start.startswith(b"version https://git-lfs"):
        raise WeightsError(
            f"{path} is a pointer of Git LFS, not the weights. Download the file "
            "itself: git lfs pull."
        )
    # The header of safetensors comes after its length of eight bytes.
    if start[8:9] != b"{":
        if start.lstrip()[:1] == b"<":
            raise WeightsError(f"{path} is a web page, not weights. Download the file.")
        if start.lstrip()[:1] == b"{":
            return _read_shards(path)
        if start.startswith((ZIP, PICKLE)):
            return _read_torch(path)
    if (shard := SHARD.search(path.name)) and int(shard[2]) > 1:
        raise WeightsError(
            f"{path} is by its name shard {shard[1]} of {shard[2]} of a network. Give "
            "the index of the shards, a file that ends in .index.json."
        )
    return _read_safetensors(path)


def _beginning(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(64)


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    try:
        with safe_open(path, framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise WeightsError(f"{path} is no whole safetensors file: {error}.") from error


def _read_shards(path: Path) -> dict[str, np.ndarray]:
    """Read the arrays of several files, which an index lists by the name of an array.

    The index has the form of transformers: ``{"weight_map": {array: file}}``.
    """
    try:
        places = json.loads(path.read_text(encoding="utf-8"))["weight_map"].items()
        files = sorted({Path(name).name for _, name in places})
    except (ValueError, KeyError, TypeError, AttributeError):
        raise WeightsError(
            f"{path} is JSON, but no index of shards: no weight_map from names of "
            "arrays to names of files."
        ) from None
    arrays: dict[str, np.ndarray] = {}
    for file in files:
        shard = path.parent / file
        if not shard.is_file():
            raise WeightsError(f"{path} lists the shard {file}, which does not exist.")
        read = _read_torch if not is_safetensors(shard) else _read_safetensors
        arrays |= read(shard)
    if set(arrays) != {name for name, _ in places}:
        raise WeightsError(f"{path} lists other arrays than its shards hold.")
    return arrays


def _read_torch(path: Path) -> dict[str, np.ndarray]:
    try:
        torch: Any = importlib.import_module("torch")
    except ImportError:
        raise WeightsError(
            f"{path} is a file of PyTorch and requires it: pip install torch. Or "
            f"convert it where PyTorch is installed: {CONVERT}."
        ) from None
    try:
        # Many checkpoints keep the arguments of their training.
        allowed = torch.serialization.safe_globals([argparse.Namespace])
        # PyTorch would judge a path by its suffix.
        with allowed, warnings.catch_warnings(), path.open("rb") as file:
            warnings.simplefilter("ignore")
            content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise WeightsError(_refusal(path, str(error))) from None
    except Exception as error:
        # PyTorch raises many types of error on a damaged file.
        if "TorchScript" in str(error):
            raise WeightsError(
                f"{path} is a TorchScript archive, which holds code; save the arrays "
                "alone: torch.save(model.state_dict(), FILE)."
            ) from None
        raise WeightsError(
            f"{path} is no whole file of PyTorch: "
            f"{first_line(error).partition('. ')[0].rstrip('.')}."
        ) from None
    return flatten(content)


def _refusal(path: Path, reason: str) -> str:
    if (name := re.search(r"GLOBAL ([\w.]+)", reason)) is None:
        return f"{path} is a pickle, but no file of torch.save; give a file of weights."
    return (
        f"{path} is refused: it names {name[1]}, which could run code, and nothing of "
        "it ran. Save the arrays alone: torch.save(model.state_dict(), FILE)."
    )


def flatten(content: Any) -> dict[str, np.ndarray]:
    """The arrays of nested dictionaries, under their keys joined by dots.

    Args:
        content: dictionaries of NumPy arrays or tensors of PyTorch. Other values are
            left out.

    Raises:
        WeightsError: if two arrays have one name, or dictionaries nest too deeply.

    >>> flatten({"model": {"fc.bias": np.zeros(2)}, "epoch": 3})
    {'model.fc.bias': array([0., 0.])}
    """
    arrays: dict[str, np.ndarray] = {}
    for name, value in _leaves(content, ()):
        array = value if isinstance(value, np.ndarray) else _to_numpy(value)
        if array is None:
            continue
        if name in arrays:
            raise WeightsError(f"the file holds two arrays named {name}.")
        arrays[name] = array
    return arrays


def _leaves(content: Any, keys: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    if len(keys) > DEEPEST:
        raise WeightsError(f"dictionaries must nest at most {DEEPEST} deep.")
    if not isinstance(content, Mapping):
        yield ".".join(keys), content
        return
    for key, value in content.items():
        yield from _leaves(value, (*keys, str(key)))


def _to_numpy(value: Any) -> np.ndarray | None:
    """A tensor of PyTorch as an array; None for other values."""
    if not hasattr(value, "detach"):
        return None
    tensor = value.detach()
    if str(tensor.dtype) == "torch.bfloat16":
        # PyTorch has no NumPy arrays of this type.
        bits = tensor.contiguous().view(dtype=tensor.new_empty(0).short().dtype)
        return bits.numpy().view(ml_dtypes.bfloat16)
    try:
        return tensor.numpy()
    except (TypeError, RuntimeError) as error:
        raise WeightsError(
            f"a tensor is of type {tensor.dtype}, which has no array: "
            f"{first_line(error)}."
        ) from None
