"""States of a run on disk, of which the last good one is always found again."""

import hashlib
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

State = TypeVar("State")


class OtherStateError(ValueError):
    """A whole state, but not of this model and optimizer."""


class Checkpoints:
    """The newest states of a directory, by step, kept by Orbax.

    Each is written beside the others and then renamed, so that a killed process leaves
    whole ones behind, and has a digest of what it holds, so that a damaged one is told
    from a good one.

    Args:
        directory: where they are.
        keep: how many are kept.
        writable: whether what a killed process left behind is cleaned up, and damaged
            ones are moved aside; not while another process may be writing.
    """

    def __init__(self, directory: str | Path, *, keep: int = 2, writable: bool = True):
        self.directory = Path(directory).resolve()
        self.writable = writable
        self._orbax = ocp.training.Checkpointer(
            self.directory,
            preservation_policy=ocp.training.preservation_policies.LatestN(keep),
            cleanup_tmp_directories=writable,
        )

    @property
    def steps(self) -> list[int]:
        """Of which steps there are states."""
        return [checkpoint.step for checkpoint in self._orbax.checkpoints]

    def save(self, step: int, state: Any) -> None:
        """Keeps a state, unless there is one of this step.

        Raises:
            OSError: if it could not be written; older ones are still there.
        """
        if step in self.steps:
            return
        state = _plain(state)
        try:
            metadata = {"digest": _digest(state), "kind": _kind(state)}
            self._orbax.save(step, state, custom_metadata=metadata)
        except Exception as error:
            # Orbax and TensorStore raise whatever they come across.
            raise OSError(
                f"the state of step {step} could not be written to {self.directory}: "
                f"{_brief(error)}"
            ) from error

    def restore(self, like: State) -> tuple[int, State, list[str]] | None:
        """The newest whole state.

        A damaged one is moved aside, beside the directory, as ``STEP-damaged``.

        Args:
            like: a state with the same structure, shapes and dtypes.

        Returns:
            Its step, the state, and what was damaged; None if there is none.

        Raises:
            ValueError: if it is a whole one of another structure.
            OSError: if all are damaged.
        """
        damaged = []
        for step in reversed(self.steps):
            try:
                return step, self._load(step, like), damaged
            except OtherStateError:
                raise
            except Exception as error:
                reason = _brief(error)
                if self.writable:
                    path = self.directory / str(step)
                    path.rename(_free(self.directory.parent / f"{path.name}-damaged"))
                    self._orbax.reload()
                damaged.append(f"the checkpoint of step {step} is damaged: {reason}")
        if damaged:
            raise OSError("; ".join(damaged) + "; there is none before.")
        return None

    def close(self) -> None:
        self._orbax.close()

    def _load(self, step: int, like: State) -> State:
        metadata = self._orbax.checkpointables_metadata(step).custom_metadata
        plain = _plain(like)
        if metadata["kind"] != _kind(plain):
            raise OtherStateError(
                f"the checkpoint of step {step} in {self.directory} is of another "
                "model or optimizer."
            )
        loaded = self._orbax.load(step, plain)
        if metadata["digest"] != _digest(loaded):
            raise ValueError("its content is not what was written.")
        leaves = [
            jax.random.wrap_key_data(x, impl=jax.random.key_impl(old))
            if _is_key(old)
            else x
            for old, x in zip(jax.tree.leaves(like), loaded)
        ]
        return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _plain(state: Any) -> list[Any]:
    """The arrays of a state; keys as the numbers that they are made of."""
    return [jax.random.key_data(x) if _is_key(x) else x for x in jax.tree.leaves(state)]


def _kind(arrays: list[Any]) -> str:
    """A digest of shapes and dtypes."""
    kinds = [f"{np.shape(x)}{jax.dtypes.canonicalize_dtype(x.dtype)}" for x in arrays]
    return hashlib.blake2b(" ".join(kinds).encode(), digest_size=16).hexdigest()


def _is_key(x: Any) -> bool:
    return hasattr(x, "dtype") and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)


def _digest(arrays: list[Any]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for x in arrays:
        x = np.asarray(x)
        digest.update(f"{x.shape}{x.dtype}".encode())
        digest.update(np.ascontiguousarray(x).view(np.uint8))
    return digest.hexdigest()


def _brief(error: Exception) -> str:
    """What an error says first; Orbax also prints whole trees of arrays."""
    first = str(error).strip().partition("\n")[0] or repr(error)
    return first if len(first) <= 200 else first[:200] + "..."


def _free(wanted: Path) -> Path:
    """`wanted`, or the first of wanted-2, wanted-3, ... that does not exist."""
    path, number = wanted, 1
    while path.exists():
        number += 1
        path = wanted.with_name(f"{wanted.name}-{number}")
    return path
