"""States of a run on disk, of which the last good one is always found again."""

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

from tripletjax.learn.distributed.keys import State, from_plain, plain
from tripletjax.learn.errors import first_line
from tripletjax.learn.files import digest_of, digest_of_file, free_path, write_text


class StateMismatchError(ValueError):
    """A whole state, but not of this model and optimizer."""


class Checkpoints:
    """The newest states of a directory, by step, kept by Orbax.

    Each is written beside the others and then renamed, so that a killed process leaves
    whole ones behind, and is read back before an older one goes. Several processes use
    one directory together, call all of this together, and have states of arrays that
    are on all of their devices; each writes a part, once. Digests of files,
    in ``DIRECTORY.digests.json``, tell a damaged one from one that cannot be read.

    Args:
        directory: where they are; any path will do.
        keep: how many are kept, at least 2.
        writable: whether what a killed process left behind is cleaned up, and damaged
            ones are moved aside; not while another process may be writing.
    """

    def __init__(self, directory: str | Path, *, keep: int = 2, writable: bool = True):
        if keep < 2:
            raise ValueError(f"keep must be at least 2, got {keep}.")
        self.directory = Path(directory).resolve()
        self.writable = writable
        self._alias = None
        path = self.directory
        if any(sign in str(path) for sign in "*?[]\\"):
            # Orbax takes its own path for a pattern: it gets another name for it.
            alias = tempfile.mkdtemp(prefix="checkpoints-")
            self._alias = weakref.finalize(self, shutil.rmtree, alias)
            path = Path(alias) / "states"
            if writable:
                self.directory.mkdir(parents=True, exist_ok=True)
            path.symlink_to(self.directory, target_is_directory=True)
        # Its annotations have not what it takes.
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
        """Of which steps there are states."""
        return [checkpoint.step for checkpoint in self._orbax.checkpoints]

    def _remove_older(self, keep: int) -> None:
        """Remove states that a killed process was removing."""
        if older := self.steps[:-keep]:
            for step in older:
                shutil.rmtree(self.directory / str(step))
            self._orbax.reload()

    def save(self, step: int, state: Any) -> None:
        """Keeps a state, unless there is one of this step.

        Raises:
            OSError: if it could not be written; older ones are still there.
        """
        if step in self.steps:
            return
        state = plain(state)
        try:
            metadata = {"digest": _digest(state), "kind": _digest_of_types(state)}
            self._orbax.save(step, state, custom_metadata=metadata)
        except Exception as error:
            # Orbax and TensorStore raise whatever they come across.
            raise OSError(
                f"the state of step {step} could not be written to {self.directory}: "
                f"{first_line(error)}"
            ) from error
        try:
            self._load(step, state)
        except Exception as error:
            raise OSError(
                f"the state of step {step} in {self.directory} could not be read back: "
                f"{first_line(error)}. The one before is still there."
            ) from error
        digests = {str(kept): self._digests().get(str(kept)) for kept in self.steps}
        if jax.process_index() == 0:
            digests[str(step)] = _file_digests(self.directory / str(step))
            write_text(self._digests_file, json.dumps(digests))

    def restore(self, like: State) -> tuple[int, State, list[str]] | None:
        """The newest whole state.

        A damaged one, whose files are not what was written, is moved aside, beside the
        directory, as ``STEP-damaged``.

        Args:
            like: a state with the same structure, shapes, dtypes and devices.

        Returns:
            Its step, the state, and what was damaged; None if there is none.

        Raises:
            ValueError: if it is a whole one of another structure.
            OSError: if one cannot be read that is not known to be damaged, or all are.
        """
        damaged = []
        for step in reversed(self.steps):
            try:
                arrays = plain(like)
                loaded = _uncommitted(self._load(step, arrays), arrays)
                return step, from_plain(loaded, like), damaged
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
                    # All have seen what is damaged before it goes.
                    _meet(f"{path} is damaged")
                    if jax.process_index() == 0:
                        aside = self.directory.parent / f"{path.name}-damaged"
                        path.rename(free_path(aside))
                    _meet(f"{path} is moved aside")
                    self._orbax.reload()
                damaged.append(f"the checkpoint of step {step} is damaged: {reason}")
        if damaged:
            raise OSError("; ".join(damaged) + "; there is none before.")
        return None

    def close(self) -> None:
        self._orbax.close()
        if self._alias is not None:
            self._alias()

    @property
    def _digests_file(self) -> Path:
        return self.directory.with_name(f"{self.directory.name}.digests.json")

    def _digests(self) -> dict[str, dict[str, str] | None]:
        """What was written, by step and file."""
        try:
            return json.loads(self._digests_file.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return {}

    def _is_damaged(self, step: int) -> bool:
        """Whether the files of a state are not what was written.

        Raises:
            OSError: if one of them cannot be read.
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
            raise ValueError("its content is not what was written.")
        return loaded


def _uncommitted(loaded: list[Any], like: list[Any]) -> list[Any]:
    """Arrays that were committed to no device are so again.

    Programs that were compiled for such arrays are compiled again for others.
    """
    usual = jnp.zeros(()).sharding.device_set

    def free(x: Any) -> bool:
        sharding = getattr(x, "sharding", None)
        if not isinstance(sharding, SingleDeviceSharding):
            return False
        return sharding.device_set == usual and not getattr(x, "committed", False)

    return [
        # A copy, so that its memory is JAX's and can be given away.
        jnp.copy(jax.device_put(np.asarray(x))) if free(old) else x
        for x, old in zip(loaded, like)
    ]


def _meet(where: str) -> None:
    """Waits for the other processes, if there are any."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(where)


def _file_digests(directory: Path) -> dict[str, str]:
    """A digest of every file in a directory, by its path within."""

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
        for part in (
            f"{x.shape}{x.dtype}",
            np.ascontiguousarray(x).view(np.uint8).data,
        )
    )


def _digest_of_types(arrays: list[Any]) -> str:
    """A digest of shapes and dtypes."""
    types = [f"{np.shape(x)}{jax.dtypes.canonicalize_dtype(x.dtype)}" for x in arrays]
    return digest_of([" ".join(types)])
