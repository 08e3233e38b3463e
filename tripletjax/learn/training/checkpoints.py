"""Checkpoints of a run, of which an undamaged one always remains."""

import json
import os
import shutil
import tempfile
import weakref
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint import v1 as ocp

from tripletjax.learn.distributed.keys import State, arrays_of, with_arrays
from tripletjax.learn.errors import first_line
from tripletjax.learn.files import digest_of, digest_of_file, free_path, write_text
from tripletjax.learn.training.interrupts import deferred_interrupts


class StateMismatchError(ValueError):
    """An undamaged checkpoint of another model or optimizer."""


class Checkpoints:
    """The newest checkpoints of a directory, by step, kept by Orbax.

    A checkpoint is written beside the others and then renamed, so that a killed process
    leaves complete ones. It is read back before an older one is removed. Digests of the
    files, in ``DIRECTORY.digests.json``, tell damaged files from unreadable ones.

    Several processes may share a directory: all of them call each method together, with
    states whose arrays are on the devices of all. Each process writes its part.

    Args:
        directory: any path.
        keep: number of checkpoints to keep, at least 2.
        writable: whether to remove unfinished files of killed processes and to move
            damaged checkpoints aside; False while another process may write.

    Raises:
        ValueError: if `keep` is less than 2.
    """

    @deferred_interrupts()
    def __init__(self, directory: str | Path, *, keep: int = 2, writable: bool = True):
        if keep < 2:
            raise ValueError(f"keep must be at least 2, got {keep}.")
        self.directory = Path(directory).resolve()
        self.writable = writable
        self._alias = None
        path = self.directory
        if any(sign in str(path) for sign in "*?[]\\"):
            # Orbax expands these signs in its own path: it gets an alias without them.
            alias = tempfile.mkdtemp(prefix="checkpoints-")
            self._alias = weakref.finalize(self, shutil.rmtree, alias)
            path = Path(alias) / "states"
            if writable:
                self.directory.mkdir(parents=True, exist_ok=True)
            path.symlink_to(self.directory, target_is_directory=True)
        # Any, since the annotations of Orbax lack some of the arguments it takes.
        checkpointer: Any = ocp.training.Checkpointer
        self._orbax = checkpointer(
            path,
            preservation_policy=ocp.training.preservation_policies.LatestN(keep),
            cleanup_tmp_directories=writable,
        )
        if writable and jax.process_count() == 1:
            self._remove_older(keep)

    @property
    def steps(self) -> list[int]:
        """Steps of the checkpoints, ascending."""
        return [checkpoint.step for checkpoint in self._orbax.checkpoints]

    def _remove_older(self, keep: int) -> None:
        """Remove states that a killed process was removing."""
        if older := self.steps[:-keep]:
            for step in older:
                shutil.rmtree(self.directory / str(step))
            self._orbax.reload()

    @deferred_interrupts()
    def save(self, step: int, state: Any) -> None:
        """Write a checkpoint, unless one of this step exists.

        Args:
            step: number of finished steps.
            state: any tree of arrays and random keys.

        Raises:
            OSError: if it cannot be written or read back; older ones remain.
        """
        if step in self.steps:
            return
        arrays = arrays_of(state)
        try:
            metadata = {"digest": _digest(arrays), "kind": _digest_of_types(arrays)}
            self._orbax.save(step, arrays, custom_metadata=metadata)
        except Exception as error:
            # Orbax and TensorStore document no common class of their errors.
            raise OSError(
                f"the state of step {step} could not be written to {self.directory}: "
                f"{first_line(error)}"
            ) from error
        try:
            self._load(step, arrays)
        except Exception as error:
            raise OSError(
                f"the state of step {step} in {self.directory} could not be read back: "
                f"{first_line(error)}. The checkpoint before it remains."
            ) from error
        digests = {str(kept): self._digests().get(str(kept)) for kept in self.steps}
        if jax.process_index() == 0:
            digests[str(step)] = _file_digests(self.directory / str(step))
            write_text(self._digests_file, json.dumps(digests))

    @deferred_interrupts()
    def restore(self, like: State) -> tuple[int, State, list[str]] | None:
        """Read the newest undamaged checkpoint.

        A checkpoint is damaged if its files differ from those that were written. It is
        moved out of the directory, as ``STEP-damaged`` beside it.

        Args:
            like: a state with the same structure, shapes, dtypes and devices.

        Returns:
            The step, the state, and a message for each damaged checkpoint; None if the
            directory has no checkpoint.

        Raises:
            StateMismatchError: if the checkpoint is of another structure.
            OSError: if an undamaged checkpoint cannot be read, or all are damaged.
        """
        messages = []
        for step in reversed(self.steps):
            try:
                arrays = arrays_of(like)
                loaded = _uncommitted(self._load(step, arrays), arrays)
                return step, with_arrays(like, loaded), messages
            except StateMismatchError:
                raise
            except Exception as error:
                reason = first_line(error)
                if not self._is_damaged(step):
                    raise OSError(
                        f"the checkpoint of step {step} in {self.directory} cannot be "
                        f"read, and nothing shows that it is damaged: {reason}"
                    ) from error
                if self.writable:
                    path = self.directory / str(step)
                    # The first barrier: every process has read the damaged files.
                    _wait_for_processes(f"{path} is damaged")
                    if jax.process_index() == 0:
                        aside = self.directory.parent / f"{path.name}-damaged"
                        path.rename(free_path(aside))
                    _wait_for_processes(f"{path} is moved aside")
                    self._orbax.reload()
                messages.append(f"the checkpoint of step {step} is damaged: {reason}")
        if messages:
            raise OSError("; ".join(messages) + "; no other checkpoint exists.")
        return None

    @deferred_interrupts()
    def close(self) -> None:
        self._orbax.close()
        if self._alias is not None:
            self._alias()

    @property
    def _digests_file(self) -> Path:
        return self.directory.with_name(f"{self.directory.name}.digests.json")

    def _digests(self) -> dict[str, dict[str, str] | None]:
        """Digests of the written files, by step and path."""
        try:
            return json.loads(self._digests_file.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return {}

    def _is_damaged(self, step: int) -> bool:
        """Whether the files of a checkpoint differ from those that were written.

        Raises:
            OSError: if a file cannot be read.
        """
        written = self._digests().get(str(step))
        return bool(written) and _file_digests(self.directory / str(step)) != written

    def _load(self, step: int, like: list[Any]) -> list[Any]:
        metadata = self._orbax.checkpointables_metadata(step).custom_metadata
        if metadata["kind"] != _digest_of_types(like):
            raise StateMismatchError(
                f"the checkpoint of step {step} in {self.directory} is of another "
                "model or optimizer."
            )
        loaded = self._orbax.load(step, like)
        if metadata["digest"] != _digest(loaded):
            raise ValueError("its arrays differ from those that were written.")
        return loaded


def _uncommitted(loaded: list[Any], like: list[Any]) -> list[Any]:
    """Move arrays whose counterparts were uncommitted to no device back to none.

    A committed array would compile the programs of uncommitted ones a second time.
    """
    default_devices = jnp.zeros(()).sharding.device_set

    def is_uncommitted(x: Any) -> bool:
        sharding = getattr(x, "sharding", None)
        if not isinstance(sharding, SingleDeviceSharding):
            return False
        on_default = sharding.device_set == default_devices
        return on_default and not getattr(x, "committed", False)

    return [
        # A copy, since JAX cannot donate the memory of NumPy.
        jnp.copy(jax.device_put(np.asarray(x))) if is_uncommitted(old) else x
        for x, old in zip(loaded, like)
    ]


def _wait_for_processes(barrier: str) -> None:
    """Wait until every process reaches the barrier of this name."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(barrier)


def _file_digests(directory: Path) -> dict[str, str]:
    """Digests of the files of a directory, by their paths within."""

    def fail(error: OSError) -> None:
        raise error

    digests = {}
    for folder, _, names in os.walk(directory, onerror=fail):
        for name in names:
            path = Path(folder) / name
            digests[str(path.relative_to(directory))] = digest_of_file(path)
    return digests


def _digest(arrays: list[Any]) -> str:
    return digest_of(
        part
        for x in map(np.asarray, arrays)
        for part in (f"{x.shape}{x.dtype}", np.ascontiguousarray(x).view(np.uint8).data)
    )


def _digest_of_types(arrays: list[Any]) -> str:
    """The digest of shapes and dtypes."""
    types = [f"{np.shape(x)}{jax.dtypes.canonicalize_dtype(x.dtype)}" for x in arrays]
    return digest_of([" ".join(types)])
