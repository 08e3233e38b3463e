"""Weights of a network from arrays of a file, and back: every array, or none.

Arrays have PyTorch's layout: kernels ``[out, in, ...]``.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from tripletjax.learn.networks.weights_files import Arrays, WeightsError, read_arrays

COUNTER = "num_batches_tracked"
# Names that an error lists for each fault, at most.
LISTED = 5


@dataclasses.dataclass(frozen=True)
class Part:
    """Target of a rule that fills the i-th of n equal parts of a variable.

    Attributes:
        target: the path, as of any rule.
        index: i, from 0.
        of: n, along the target's last axis, the outputs.
    """

    target: str
    index: int
    of: int


class Frozen(nnx.Variable):
    """A parameter that is not trained."""


# Variables that a file fills.
FILLED = nnx.Any(nnx.Param, nnx.BatchStat, Frozen)
Shapes = Mapping[str, tuple[int, ...]]
# By the name of an array, as a regular expression: the path of the variable that it
# fills, a part of one, or None to skip the array.
Rules = Mapping[str, "str | Part | None"]


@dataclasses.dataclass(frozen=True)
class Loaded:
    """Record of a loaded file of weights.

    Attributes:
        parameters: number of values loaded, not counting batch statistics.
        unused: names of arrays that a rule skips.
        dtypes: of the loaded arrays, in the file.
    """

    parameters: int
    unused: tuple[str, ...]
    dtypes: tuple[str, ...]

    @property
    def notes(self) -> list[str]:
        """Notes on skipped arrays and changed dtypes."""
        notes = []
        # Counters of batches interest no one.
        if unused := [name for name in self.unused if not name.endswith(COUNTER)]:
            notes.append(f"skipped arrays of the file: {_several(unused)}")
        if other := [dtype for dtype in self.dtypes if dtype != "float32"]:
            notes.append(f"arrays of {', '.join(other)} are cast to float32")
        return notes


def shapes_of(arrays: Arrays) -> Shapes:
    return {name: array.shape for name, array in arrays.items()}


def load_weights(model: nnx.Module, path: str | Path, rules: Rules) -> Loaded:
    r"""Load the arrays of a file of weights into a network, all or none.

    Every array of the file has exactly one rule, and every parameter and statistic of
    the network (`nnx.Param`, `nnx.BatchStat`, `Frozen`) is filled once, in its shape.
    Kernels are transposed from ``[out, in, ...]`` to Flax's ``[..., in, out]``.

    Args:
        model: the network, which may be abstract, as from `nnx.eval_shape`.
        path: a safetensors file, the index of its shards, or a file of PyTorch, which
            requires an installed PyTorch; nested dictionaries give names with dots.
        rules: from a regular expression for the whole name of an array to its target.
            A target is the dotted path of a variable, which may hold ``\1`` for a group
            of the expression, a `Part` of a variable, or None to skip the array.

    Returns:
        `Loaded`.

    Raises:
        FileNotFoundError: if there is no such file.
        WeightsError: if it holds no weights, is not whole, or is a pickle with code.
            Another message names every array that is missing, left over, filled twice,
            of another shape or not finite.

    >>> import tempfile
    >>> import numpy as np
    >>> from flax import nnx
    >>> from safetensors.numpy import save_file
    >>> from tripletjax.learn import load_weights
    >>> file = tempfile.mkdtemp() + "/fc.safetensors"
    >>> arrays = {"fc.weight": np.ones((3, 2)), "fc.bias": np.zeros(3)}
    >>> save_file(arrays | {"step": np.ones(1)}, file)
    >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    >>> rules = {r"fc\.weight": "kernel", r"fc\.bias": "bias", "step": None}
    >>> loaded = load_weights(model, file, rules)
    >>> loaded.parameters, loaded.unused
    (9, ('step',))
    >>> print(model(np.ones((1, 2))))
    [[2. 2. 2.]]
    """
    return load_arrays(model, read_arrays(path), rules, title=str(path))


def load_arrays(
    model: nnx.Module, arrays: Arrays, rules: Rules, *, title: str
) -> Loaded:
    """Load arrays by name into a network, as `load_weights`.

    Args:
        model: the network.
        arrays: by name.
        rules: of `load_weights`.
        title: of the arrays, for errors.
    """
    variables = _variables(model)
    faults = _Faults()
    filled: dict[str, list[tuple[Part, np.ndarray]]] = {}
    unused, dtypes = [], set()
    for name in sorted(arrays):
        array = arrays[name]
        matches = _targets(rules, name)
        if len(matches) != 1:
            fault = "left over" if not matches else "named by several rules"
            faults.add(fault, f"{name} {list(array.shape)}")
            continue
        ((part, target),) = matches
        if part is None:
            unused.append(name)
            continue
        if target not in variables:
            faults.add("left over", f"{name} {list(array.shape)}, for {target}")
            continue
        shape = list(variables[target].shape)
        shape[-1:] = [shape[-1] // part.of] if shape else []
        fitted = _fitted(array, target, shape)
        if fitted is None:
            faults.add(
                "misshapen",
                f"{name} {list(array.shape)}, for {target}, which is {shape} here",
            )
        elif not np.isfinite(fitted).all():
            faults.add("not finite", name)
        dtypes.add(array.dtype.name)
        fitted = np.zeros(shape, np.float32) if fitted is None else fitted
        filled.setdefault(target, []).append((part, fitted))
    values = {}
    for target, variable in variables.items():
        parts = sorted(filled.get(target, ()), key=lambda one: one[0].index)
        indices = [part.index for part, _ in parts]
        if not parts:
            faults.add("missing", f"{target} {list(variable.shape)}")
        elif indices != list(range(parts[0][0].of)):
            doubled = len(set(indices)) < len(indices)
            faults.add("filled twice" if doubled else "missing", f"parts of {target}")
        else:
            whole = np.concatenate([np.atleast_1d(x) for _, x in parts], axis=-1)
            values[target] = whole.reshape(variable.shape)
    faults.check(f"{title} does not fit {type(model).__name__}")
    _fill(model, values)
    return Loaded(
        sum(
            math.prod(variable.shape)
            for variable in variables.values()
            if not isinstance(variable, nnx.BatchStat)
        ),
        tuple(unused),
        tuple(sorted(dtypes)),
    )


def save_weights(
    model: nnx.Module,
    path: str | Path,
    *,
    like: str | Path | None = None,
    rules: Rules | None = None,
) -> None:
    """Save the parameters and statistics of a network as a safetensors file.

    The arrays have PyTorch's layout. Their names are those of the file that the network
    was loaded from. Otherwise kernels and scales end in ``weight``, statistics in
    ``running_mean`` and ``running_var``, with the counters of batches that PyTorch's
    strict loading requires.

    Args:
        model: the network.
        path: the file to write.
        like: the file that the network was loaded from, if any; skipped arrays are
            left out.
        rules: of `load_weights` for that file.
    """
    values = {
        target: np.asarray(variable[...])
        for target, variable in _variables(model).items()
    }
    arrays = _named_by_torch(values) if like is None else {}
    if like is not None:
        for name, array in read_arrays(like).items():
            if name.endswith(COUNTER):
                arrays[name] = array
            for part, target in _targets(rules or {}, name):
                if part is not None:
                    piece = np.split(values[target], part.of, axis=-1)[part.index]
                    arrays[name] = _to_torch(piece, target).reshape(array.shape)
    # safetensors writes the memory of an array, which a transposed one shares.
    save_file({name: np.ascontiguousarray(x) for name, x in arrays.items()}, path)


def _named_by_torch(values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    arrays = {}
    for target, value in values.items():
        before, _, last = target.rpartition(".")
        arrays[f"{before}.{TORCH_NAMES.get(last, last)}"] = _to_torch(value, target)
        if last == "var":
            arrays[f"{before}.{COUNTER}"] = np.zeros((), np.int64)
    return arrays


def _targets(rules: Rules, name: str) -> list[tuple[Part | None, str]]:
    """The targets of the rules that match a name, with their paths."""
    targets = []
    for rule, target in rules.items():
        if match := _compiled(rule).fullmatch(name):
            part = Part(target, 0, 1) if isinstance(target, str) else target
            targets.append((part, match.expand(part.target) if part else ""))
    return targets


# The cache of `re` is smaller than the rules of a large network.
_compiled = functools.cache(re.compile)


# PyTorch's name for the last part of a variable's path.
TORCH_NAMES = {
    "kernel": "weight",
    "scale": "weight",
    "mean": "running_mean",
    "var": "running_var",
}


def _variables(model: nnx.Module) -> dict[str, nnx.Variable]:
    """Parameters and statistics, by path."""
    state = nnx.state(model, FILLED)
    flat: Any = nnx.to_flat_state(state)
    return {".".join(map(str, path)): variable for path, variable in flat}


def _fill(model: nnx.Module, values: Mapping[str, np.ndarray]) -> None:
    state = nnx.state(model, FILLED)
    flat: Any = nnx.to_flat_state(state)
    new = [
        (
            path,
            variable.replace(
                jnp.asarray(values[".".join(map(str, path))], variable.dtype)
            ),
        )
        for path, variable in flat
    ]
    nnx.update(model, nnx.from_flat_state(new))


def _fitted(array: np.ndarray, target: str, shape: Sequence[int]) -> np.ndarray | None:
    """An array in the layout and the shape of a variable, or None if it cannot be."""
    if not is_float(array):
        return None
    array = array.astype(np.float32)
    if target.endswith("kernel"):
        array = _to_flax(array)
    # Scales of channels may have empty axes.
    same = [n for n in array.shape if n > 1] == [n for n in shape if n > 1]
    return array.reshape(shape) if same else None


def is_float(array: np.ndarray) -> bool:
    """Whether an array is of a floating-point type, of NumPy or of JAX."""
    return jax.dtypes.issubdtype(array.dtype, np.floating)


def _to_flax(kernel: np.ndarray) -> np.ndarray:
    """From ``[out, in, ...]`` to ``[..., in, out]``."""
    axes = *range(2, kernel.ndim), 1, 0
    return kernel.transpose(axes) if kernel.ndim > 1 else kernel


def _to_torch(array: np.ndarray, target: str) -> np.ndarray:
    if not target.endswith("kernel"):
        return array
    last = array.ndim - 1
    return array.transpose(last, last - 1, *range(last - 1))


class _Faults:
    """Faults of a file, with the names of their arrays."""

    def __init__(self) -> None:
        self.names: dict[str, list[str]] = {}

    def add(self, fault: str, name: str) -> None:
        self.names.setdefault(fault, []).append(name)

    def check(self, title: str) -> None:
        if self.names:
            lists = (f"{fault}: {_several(of)}" for fault, of in self.names.items())
            raise WeightsError(f"{title}; {'; '.join(lists)}.")


def _several(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - LISTED:,} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more
