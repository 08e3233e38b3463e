"""Several processes that train together: how they begin, agree, and end.

Each has devices of its own, on this machine or on others. JAX connects them
(`jax.distributed`). The first of them tells, and writes all but checkpoints, of which
each writes a part.
"""

import contextlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from tripletjax.learn.distributed.watchdog import Watchdog

Made = TypeVar("Made")

# In seconds: after a process has failed, others have so long to end by themselves; and
# this often it is looked whether one has.
GRACE, POLL = 10.0, 0.1


class OtherProcessError(RuntimeError):
    """The first process cannot go on; it says itself why."""


def of_first(make: Callable[[], Made]) -> Made:
    """What the first process makes, in every process; the others wait for it.

    Raises:
        OtherProcessError: in the others, if the first one raises an error.
    """
    if jax.process_count() == 1:
        return make()
    if jax.process_index() == 0:
        try:
            made = make()
        except Exception as error:
            _sent(pickle.dumps((False, f"{type(error).__name__}: {error}")))
            raise
        _sent(pickle.dumps((True, made)))
        return made
    good, made = pickle.loads(_sent(None))
    if not good:
        raise OtherProcessError(f"process 0 ended: {made}")
    return made


def _sent(message: bytes | None) -> bytes:
    """What the first process sends to all."""
    sizes = np.array(divmod(len(message or b""), 2**30), np.int32)
    high, low = multihost_utils.broadcast_one_to_all(sizes).tolist()
    data = np.zeros(high * 2**30 + low, np.uint8)
    if message is not None:
        data[:] = np.frombuffer(message, np.uint8)
    return multihost_utils.broadcast_one_to_all(data).tobytes()


def any_of(flag: bool) -> bool:
    """Whether any process says so."""
    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.process_allgather(np.array(flag)).any())


@contextlib.contextmanager
def joined(
    *,
    coordinator: str | None = None,
    count: int | None = None,
    index: int | None = None,
    devices: Sequence[int] | None = None,
    on_loss: Callable[[str, bool], Any] | None = None,
) -> Iterator[None]:
    """Within it this process is one of several; if another is lost, it ends.

    Args:
        coordinator: address and port on which the first process can be reached.
        count: how many processes there are.
        index: which of them this is. If these three are not given, JAX finds them out
            where it knows the cluster: Slurm, Open MPI, Kubernetes, TPU pods.
        devices: which of the machine's accelerators are this process's own.
        on_loss: what ends this process, in a thread of its own, called with what
            happened to another, and whether that one ended by itself; if not given, it
            says so and ends.

    Raises:
        ValueError: if there is no such cluster.
        Exception: what is raised within; the others are told, and end. JAX may then
            wait for them in vain at the end of this process: leave it by `end`.
    """
    # What stops a run is agreed on here (`any_of`), for all signals.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(coordinator, count, index, local_device_ids=devices)
    except (ValueError, KeyError) as error:
        raise ValueError(
            f"JAX finds no cluster of processes here ({error}): it knows Slurm, Open "
            "MPI, Kubernetes and TPU pods. Otherwise say how many there are, which "
            "this is, and where the first one is."
        ) from error
    host = None if coordinator is None else coordinator.rpartition(":")[0]
    watchdog = Watchdog(
        jax.process_index(), jax.process_count(), on_loss=on_loss or _end_too
    )
    watchdog.start(host, of_first)
    try:
        yield
    except KeyboardInterrupt:
        watchdog.close("was stopped")
        raise
    except OtherProcessError:
        # The others hear of it from the first one, too.
        watchdog.close()
        raise
    except BaseException as error:
        # Of an exchange that failed because another was lost, the watchdog tells more;
        # and of what all fail in, the first one.
        time.sleep(1.0 if jax.process_index() == 0 else 3.0)
        watchdog.close(f"ended: {type(error).__name__}: {error}")
        raise
    watchdog.close()


def check_coordinator(coordinator: str, *, first: bool) -> None:
    """Raises ValueError if it is no address, or the first process cannot have it."""
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ValueError(f"must be HOST:PORT, got {coordinator}")
    if first:
        try:
            socket.create_server(("", int(port))).close()
        except OSError as error:
            raise ValueError(f"has a port that cannot be had here: {error}") from None


def end(message: str, status: int = 2) -> NoReturn:
    """Ends the process at once: others may wait for it forever, and it for them."""
    sys.stdout.flush()
    if message:
        # A progress bar may stand in the line.
        print(f"\n{message}", file=sys.stderr, flush=True)
    os._exit(status)


def _end_too(told: str, by_itself: bool) -> NoReturn:
    end(told)


def end_with_parent() -> None:
    """Ends the process when the other end of its standard input is closed."""

    def watch() -> None:
        # Not by sys.stdin, which the end of the process would wait for.
        while os.read(0, 1):
            pass
        os._exit(2)

    threading.Thread(target=watch, daemon=True).start()


def launch(command: Sequence[str], count: int) -> tuple[int, str | None]:
    """Runs a command in several processes on this machine.

    Interrupts are handed on to all of them; a second one ends them.

    Args:
        command: to which ``--coordinator`` and ``--process`` are added.
        count: how many processes.

    Returns:
        The exit status: 0 if all have ended well, else that of the first that has not;
        and what happened to that one, if none of them could tell.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{probe.getsockname()[1]}"
    children: list[subprocess.Popen[bytes]] = []
    asked = 0

    def hand_on(number: int, frame: Any) -> None:
        nonlocal asked
        asked += 1
        for child in children:
            child.send_signal(number if asked == 1 else signal.SIGKILL)

    before = {}
    try:
        for index in range(count):
            of_one = ["--coordinator", coordinator, "--process", str(index)]
            # In sessions of their own: a Ctrl-C reaches them once, from here.
            child = subprocess.Popen(
                [*command, *of_one],
                stdin=subprocess.PIPE,
                stdout=None if index == 0 else subprocess.DEVNULL,
                start_new_session=True,
            )
            children.append(child)
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, hand_on)
        status, told = _waited_for(children)
    finally:
        for child in children:
            child.kill()
            child.wait()
        for number, handler in before.items():
            signal.signal(number, handler)
    return (130, None) if asked and status else (status, told)


def _waited_for(children: Sequence[subprocess.Popen]) -> tuple[int, str | None]:
    """The status of the first that failed, and what happened to it."""
    failed, until = None, float("inf")
    while True:
        ends = [child.poll() for child in children]
        if failed is None and any(ends):
            failed = next((i, end) for i, end in enumerate(ends) if end)
            until = time.monotonic() + GRACE
        if None not in ends or time.monotonic() > until:
            break
        time.sleep(POLL)
    if failed is None:
        return 0, None
    index, status = failed
    # Who ends by itself says why.
    if status > 0 or (ends[0] or 0) > 0:
        return max(status, 2), None
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = f"signal {-status}"
    return 2, f"process {index} of {len(children)} was ended by {name}"
