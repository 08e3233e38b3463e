"""Several processes that train together: how they connect, agree and end.

Each process has its own devices, on this machine or on others. JAX connects the
processes (`jax.distributed`). Process 0 prints, and writes all files but checkpoints,
of which each process writes a part.
"""

import contextlib
import os
import pickle
import socket
import sys
from collections.abc import Callable, Generator
from typing import NoReturn, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

Result = TypeVar("Result")

# Seconds without a heartbeat of another process, after which JAX ends this one.
HEARTBEAT_SECONDS = 20


class OtherProcessError(RuntimeError):
    """Process 0 failed, and reports the reason itself."""


def of_first(make: Callable[[], Result]) -> Result:
    """Call a function in process 0, and return its result in every process.

    Raises:
        OtherProcessError: in the others, if process 0 raises an error.
    """
    if jax.process_count() == 1:
        return make()
    if jax.process_index() == 0:
        try:
            result = make()
        except Exception as error:
            _broadcast(pickle.dumps((False, f"{type(error).__name__}: {error}")))
            raise
        _broadcast(pickle.dumps((True, result)))
        return result
    succeeded, result = pickle.loads(_broadcast(None))
    if not succeeded:
        raise OtherProcessError(f"process 0 ended: {result}")
    return result


def _broadcast(message: bytes | None) -> bytes:
    """Return the message of process 0 in every process."""
    sizes = np.array(divmod(len(message or b""), 2**30), np.int32)
    high, low = multihost_utils.broadcast_one_to_all(sizes).tolist()
    data = np.zeros(high * 2**30 + low, np.uint8)
    if message is not None:
        data[:] = np.frombuffer(message, np.uint8)
    return multihost_utils.broadcast_one_to_all(data).tobytes()


def any_of(flag: bool) -> bool:
    """Whether the flag is set in any process."""
    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.process_allgather(np.array(flag)).any())


@contextlib.contextmanager
def joined(
    *,
    coordinator: str | None = None,
    count: int | None = None,
    index: int | None = None,
) -> Generator[None]:
    """Connect this process with others; JAX ends it if one of the others is lost.

    An exchange between processes waits for all of them. A process that is killed,
    stopped or cut off is lost: JAX ends the others within about 20 seconds.

    Args:
        coordinator: address and port of process 0.
        count: number of processes.
        index: number of this process, from 0. Without these three arguments JAX asks
            the cluster: Slurm, Open MPI, Kubernetes or a TPU pod.

    Raises:
        ValueError: if JAX finds no cluster.
        Exception: an error raised within. Leave the process by `end` then, since JAX
            may wait for the others when it exits.
    """
    # Processes agree on stopping (`any_of`), for all signals.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            coordinator, count, index, heartbeat_timeout_seconds=HEARTBEAT_SECONDS
        )
    except (ValueError, KeyError) as error:
        raise ValueError(
            f"JAX finds no cluster of processes here ({error}). It knows Slurm, Open "
            "MPI, Kubernetes and TPU pods. Elsewhere give the number of processes, the "
            "number of this one, and the address of process 0."
        ) from error
    yield


def check_coordinator(coordinator: str, *, first: bool) -> None:
    """Raise ValueError for a wrong address, or a port that process 0 cannot open."""
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ValueError(f"must be HOST:PORT, got {coordinator}")
    if first:
        try:
            socket.create_server(("", int(port))).close()
        except OSError as error:
            raise ValueError(f"has a port that cannot be opened: {error}") from None


def end(message: str, status: int = 2) -> NoReturn:
    """End the process at once, without waiting for the others.

    The others may wait for this process for ever, and this process for the others.
    """
    sys.stdout.flush()
    if message:
        # A progress bar may stand in the line.
        print(f"\n{message}", file=sys.stderr, flush=True)
    os._exit(status)
